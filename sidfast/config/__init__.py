"""The configuration of a run: its schema, and what is wrong with one."""
