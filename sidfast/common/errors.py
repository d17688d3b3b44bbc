"""The exceptions that a user is meant to see, how they are told, and what every command asks of names."""

import argparse
import contextlib
import functools
import os
import re
import sys
import time

INTERRUPTED = 130                                        # exit code after Ctrl-C, as shells have it
_ALONE = 5                                               # seconds after which a process counts as refused alone


class UserError(Exception):
    """A mistake in the user's input: one line that says what is wrong, where, and what would be right (exit code 2)."""


class RunError(Exception):
    """A run that cannot go on, through no mistake in its input: one line that says why, and what is left (exit code 1).

    Raised on all processes alike; the first one tells it.
    """


class Diverged(RunError):
    """Training has come to networks whose outputs or gradients are not finite."""


class NothingFinite(Diverged):
    """A network whose output is not finite for any input."""

    def __init__(self):
        super().__init__("a network's output is not finite for any input")


class NonFiniteImage(UserError):
    """A model makes images with non-finite pixels."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, as any other."""

    def error(self, message):
        """Tell it and exit with 2."""
        tell_refusal(f"{message} ({self.prog} --help lists what there is)")
        sys.exit(2)


def speaks():
    """Whether this process is the first one, or may be: several have one voice."""
    rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    known = all(re.fullmatch("[0-9]{1,9}", text) for text in (rank, processes))
    return not (known and 0 < int(rank) < int(processes))


def tell(message):
    """Print a line on standard error, in the first process."""
    if speaks():
        print(f"sidfast: {message}", file=sys.stderr, flush=True)


def tell_refusal(error):
    """Tell a user's mistake before this process ends: the first one does it for all, who came upon it alike.

    Others wait: a launcher ends all processes with the first that ends, which might silence that one. One that is still
    there after some seconds was refused alone, and says so itself.
    """
    if not speaks():
        time.sleep(_ALONE)
    print(f"sidfast: {one_line(error)}", file=sys.stderr, flush=True)


tell_once = functools.cache(tell)                        # once in a process for the same message


def say(text):
    """Print on standard output, at once."""
    print(text, flush=True)


class Unfailing:
    """A text stream that loses what it cannot write, on a full disk or to a reader that is gone, and never raises."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        """As a stream's; what it cannot write counts as written."""
        with contextlib.suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:                   # of a locale without the character
                self._stream.write(text.encode("ascii", "backslashreplace").decode())
            self._stream.flush()
        return len(text)

    def flush(self):
        """Nothing is held back."""

    def __getattr__(self, name):
        return getattr(self._stream, name)


@contextlib.contextmanager
def unfailing_streams():
    """Inside the block, and when the interpreter ends, nothing fails because of standard output or standard error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:                   # closed: the next file would get its number, and what is said
            setattr(sys, name, open(os.devnull, mode))   # noqa: SIM115
    streams = sys.stdout, sys.stderr
    with contextlib.redirect_stdout(Unfailing(sys.stdout)), contextlib.redirect_stderr(Unfailing(sys.stderr)):
        try:
            yield
        finally:
            for stream in streams:
                try:
                    stream.flush()
                except OSError:                          # what it still holds would fail again as the interpreter ends
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_program(action, leave):
    """Run a program: its exit code. 0: done or stopped in order, or what `action()` returns; 1: it failed; 2: the
    user's input is at fault (one line on standard error); 130: Ctrl-C, whose exception may say more.

    `leave`: end the process at once after Ctrl-C, as threads may still be writing.
    """
    with unfailing_streams():
        try:
            code = action() or 0
        except UserError as error:
            tell_refusal(error)
            code = 2
        except RunError as error:
            tell(one_line(error))
            code = 1
        except KeyboardInterrupt as error:
            tell(str(error) or "interrupted")
            code = INTERRUPTED
    if leave and code == INTERRUPTED:
        os._exit(code)
    return code


def one_line(error, limit=1000):
    """An exception's message as one printable line of at most about `limit` characters."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))
    return text if len(text) <= limit else f"{text[:limit // 2]} [...] {text[-limit // 2:]}"


def first_reason(error):
    """The first line of an exception's text that says something: not one that ends in a colon, unless there is no
    other."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if not line.endswith(":")), lines[0])[:300]


def check_paths(names):
    """Raise UserError for names {option: text or None} that are empty, or that no file system takes: too long, or with
    a null character."""
    for option, name in names.items():
        if name == "":
            raise UserError(f"{option} '': is empty")
        try:
            os.stat(name or ".")
        except (OSError, ValueError) as error:           # (ValueError: a null character, or half a surrogate pair)
            if isinstance(error, (FileNotFoundError, NotADirectoryError)):
                continue                                 # whether it should be there is not for this to say
            reason = getattr(error, "strerror", None) or "no name of a file"
            raise UserError(f"{option} {str(name)[:80]!a}: {reason}") from None
