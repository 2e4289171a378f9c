"""The errors that are not bugs: the command line prints them without a traceback."""


class InputError(ValueError):
    """What was wrong, the offending value, and what would be accepted, as a sentence or two."""


class SavingFailed(RuntimeError):
    """The system let a run write no further (a full disk, say); the message names the folder and what survived."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the weights are those from before the step that the message names."""
