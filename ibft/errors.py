"""The error that a user's input causes, as opposed to a bug: the command line prints it without a traceback."""


class InputError(ValueError):
    """What was wrong, the offending value, and what would be accepted, as a sentence or two."""
