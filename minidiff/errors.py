"""Two exceptions that the scripts turn into one sentence and exit status 2."""


class InputError(ValueError):
    """Bad input: the message names the file, the value and what is allowed."""


class TrainingFault(RuntimeError):
    """Training cannot go on: the message says why, and which images were in the batch."""


def count(n: int, one: str, many: str = "") -> str:
    """1 image, 2,000 images: a number and its noun, for a message."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
