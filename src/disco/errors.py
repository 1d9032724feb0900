"""The error types that the command line shows as a single line with exit code 2."""


class UserError(ValueError):
    """Bad input. The message is one line: what, what was given, why, what to do instead."""


class NoSpaceError(UserError):
    """The disk or a quota is full. Nothing is wrong with what was to be written: with room it goes on."""
