"""The errors that are not bugs: the command line prints them without a traceback."""


class InputError(ValueError):
    """What was wrong, the offending value, and what would be accepted, as a sentence or two."""


class SavingFailed(RuntimeError):
    """The system let a run write no further (a full disk, say); the message names the folder and what survived."""


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not finite; the weights are those from before the step that the message names."""


class FailedElsewhere(RuntimeError):
    """Another process of the run failed, and says why; this one only leaves."""


class Interrupted(RuntimeError):
    """A signal ended the run after a whole step, and a checkpoint was written; the message says how to go on.

    Args:
        message: for people.
        number: the signal's.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message, number)  # both, for another process to make it anew
        self.number = number

    def __str__(self) -> str:
        return str(self.args[0])


class HarnessError(RuntimeError):
    """An evaluation that could not judge a sample, which therefore has no score; the message says why."""
