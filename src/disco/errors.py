"""The one error type that the command line shows as a single line with exit code 2."""


class UserError(ValueError):
    """Bad input. The message is one line: what, what was given, why, what to do instead."""
