"""The one kind of error a user is meant to read.

Whatever a user can cause (a path, a key, a file, a value) raises :class:`UserError` with one line that says what is
wrong, where, and what to do about it. Entry points print that line and exit with code 2; every other exception is a
bug of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Bad input: one line naming the thing, the place and the remedy."""


class ToldElsewhere(UserError):
    """The same on a process that need not tell it: another one of its run does."""
