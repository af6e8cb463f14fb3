"""One table that is written as HTML, CSV or text."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

NUMBER = re.compile(r"[−+<≥-]?\s?[.\d]")  # what a cell of numbers begins with


@dataclass(frozen=True)
class Row:
    """Cells are anything with a text; kind "own", "small" or "first" marks the row on a page."""

    cells: Sequence[Any]
    kind: str = ""


class Table:
    """A head and rows; rows may be plain sequences of cells, and end before the head does."""

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

    def csv(self) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.head, *self.texts()])
        return out.getvalue()

    def text(self, indent: str = "  ") -> str:
        """Columns of equal width, numbers flush right."""
        lines, flush = [self.head, *self.texts()], self.numeric()
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(indent + "  ".join(
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(line, widths, flush)).rstrip() for line in lines)
