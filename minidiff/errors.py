"""Two exceptions that scripts turn into one sentence and exit status 2, and parts of it."""

from collections.abc import Iterable, Mapping


class InputError(ValueError):
    """Bad input: the message names the file, the value and what is allowed."""


class TrainingFault(RuntimeError):
    """Training cannot go on: the message says why, and which images were in the batch."""


def refuse(faults: Mapping[str, object], before: str = "", after: str = "") -> None:
    """InputError of the first text whose value holds, between what stands before and after it."""
    for text, holds in faults.items():
        if holds:
            raise InputError(f"{before}{text}{after}")


def count(n: int, one: str, many: str = "") -> str:
    """1 image, 2,000 images: a number and its noun, for a message."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def first_few(items: Iterable[str], shown: int = 3, separator: str = ", ") -> str:
    """The first of them, and how many more there are, for a message."""
    items = list(items)
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(items[:shown]) + more
