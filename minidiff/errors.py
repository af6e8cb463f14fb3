"""The two exceptions that the scripts turn into one sentence and exit status 2."""


class InputError(ValueError):
    """Bad input: the message names the file, the value and what is allowed."""


class TrainingFault(RuntimeError):
    """Training cannot go on: the message says why, and which images were in the batch."""
