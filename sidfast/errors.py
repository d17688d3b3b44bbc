"""The one exception that a user is meant to see."""


class UserError(Exception):
    """A mistake in the user's input: one line that says what is wrong, where, and what would be right (exit code 2)."""
