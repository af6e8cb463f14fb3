"""How numbers and tables are written on pages and terminals.

A number that is missing, None or NaN, is written as a dash.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

NUMBER = re.compile(r"[−+<≥-]?\s?[.\d]")  # what a cell of numbers begins with
POINTS = "balanced_accuracy", "accuracy", "net_benefit"  # in per cent; differences in points
INTERNAL = "test"  # the test set of the training hospitals; all others are external


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


def with_interval(x: float | None, ends: Sequence[float | None] | None = None, *, form: str,
                  scale: float = 1, between: str = " to ", unit: str = "") -> str:
    """A number with its interval in brackets; – where there is no number."""
    if missing(x):
        return "–"
    value, low, high = (v if v is None else form.format(scale * v)
                        for v in (x, *(ends or (None, None))))
    interval = "" if None in (low, high) else f" ({low}{between}{high})"
    return f"{value}{unit}{interval}".replace("-", "−")


share = partial(with_interval, form="{:.1f}", scale=100, between="–")   # 61.2 (54.0–68.1)
area = partial(with_interval, form="{:.3f}", between="–")               # 0.912 (0.871–0.944)
delta = partial(with_interval, form="{:+.3f}")                          # +0.012 (−0.004 to +0.029)
points = partial(with_interval, form="{:+.1f}", scale=100)              # +1.2 (−0.4 to +2.9)


def difference(d: Mapping, unit: str = " points") -> str:
    """That of two arms by one figure: points of a share with their unit, or of an area."""
    if d["metric"] in POINTS:
        return points(d["difference"], d["interval"], unit=unit)
    return delta(d["difference"], d["interval"])


def size(x: float | None, metric: str, unit: str = " points") -> str:
    """How large a difference is, without its sign."""
    if metric not in POINTS:
        return "≥ 1" if not missing(x) and x > 1 else area(x)
    return f"≥ 100{unit}" if not missing(x) and x > 1 else share(x, unit=unit)


def patients(n: int) -> str:
    """To two digits: the number is no surer than the difference that it follows from."""
    return "over a million" if n > 1e6 else f"{float(f'{n:.2g}'):,.0f}"


def about(n: int) -> str:
    return patients(n) if n > 1e6 else f"about {patients(n)}"


def metric_name(metric: str, positive: str) -> str:
    """auroc → AUROC, covid."""
    names = {"auroc": f"AUROC, {positive}", "auroc_macro": "AUROC, mean over labels"}
    return names.get(metric, metric.replace("_", " "))


def set_name(name: str) -> str:
    return "internal test set" if name == INTERNAL else f"external set {name}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


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
