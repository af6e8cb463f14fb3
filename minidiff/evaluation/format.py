"""How numbers and tables are written on pages and terminals.

A number that is missing, None or NaN, is written as a dash.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NUMBER = re.compile(r"[−+<≥-]?\s?[.\d]")  # what a cell of numbers begins with


def missing(x: float | None) -> bool:
    return x is None or math.isnan(x)


def num(x: float | None) -> str:
    """Three significant digits with a true minus."""
    if missing(x):
        return "–"
    text = f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 0.001 or x == 0 else f"{x:.1e}"
    return text.replace("-", "−")


def fixed(x: float | None, places: int = 1, unit: float = 1) -> str:
    """This many places behind the point, of x in this unit."""
    return "–" if missing(x) else f"{unit * x:.{places}f}".replace("-", "−")


def p_value(p: float | None) -> str:
    return "< 0.001" if p is not None and p < 0.0005 else fixed(p, 3)


def signed(x: float | None) -> str:
    return ("+" if x is not None and x > 0 else "") + num(x)


def span(low: float | None, high: float | None) -> str:
    return f"{num(low)} to {num(high)}"


def percent(x: float | None) -> str:
    return "–" if missing(x) else f"{100 * x:.1f} %"


def hundred(x: float | None) -> str:
    """A share in per cent, without the sign."""
    return "–" if missing(x) else num(100 * x)


def points(x: float | None) -> str:
    """A share as percentage points with its sign."""
    return "–" if missing(x) else f"{100 * x:+.1f}".replace("-", "−")


def distance_names(extractor: str) -> tuple[str, str]:
    """What the kernel and the Fréchet distance are called: KID and FID in Inception's features."""
    return ("KID", "FID") if "inception" in extractor else ("kernel distance", "Fréchet distance")


def plain(value: Any) -> str:
    """A dictionary or list in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def jsonable(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity as None, what it cannot as text."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)


@dataclass(frozen=True)
class Row:
    """Cells are anything with a text; kind "own", "small" or "first" marks the row on a page."""

    cells: Sequence[Any]
    kind: str = ""


class Table:
    """A head and rows, which may be plain sequences of cells and end before the head does.

    It is written as HTML (macros.html) or as text.
    """

    def __init__(self, head: Sequence[str], rows: Iterable[Row | Sequence[Any]]):
        self.head = list(head)
        self.rows = [row if isinstance(row, Row) else Row(row) for row in rows]

    def texts(self) -> list[list[str]]:
        padded = ([*row.cells, *[""] * (len(self.head) - len(row.cells))] for row in self.rows)
        return [["" if cell is None else str(cell) for cell in cells] for cells in padded]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers: they are set flush right, the others left.

        Rows of kind "small" do not count: they say in words why a number is missing.
        """
        rows = [texts for texts, row in zip(self.texts(), self.rows) if "small" not in row.kind]
        columns = zip(*rows) if rows else [()] * len(self.head)
        return [any(map(NUMBER.match, filled))
                and all(c in "–" or NUMBER.match(c) for c in filled)
                for filled in ([c for c in column if c] for column in columns)]

    def text(self, indent: str = "  ") -> str:
        """Columns of equal width, numbers flush right."""
        lines, flush = [self.head, *self.texts()], self.numeric()
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(indent + "  ".join(
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(line, widths, flush)).rstrip() for line in lines)
