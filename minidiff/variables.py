"""What an image may be conditioned on: a category, a set of findings or a number, each with three
states.

A cell of a table becomes one number of a tensor:

    state     Category (int64)   Findings (int64)   Number (float32)    meaning
    value     0 … k−1            0 … 2ᵏ−1, bits     the value itself    known; no bit set: none of the findings
    unknown   −1                 −1                 NaN                 missing in the data: has an embedding of its own
    null      −2                 −2                 −inf                dropped for guidance: adds nothing

Labels are a dict from variable name to a tensor of shape (N,), one entry per image.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from minidiff.errors import InputError

Labels = dict[str, Tensor]
UNKNOWN, NULL = -1, -2  # of a Category and of Findings; a Number has NaN and -inf
# a column with at most this many different numbers (icu 0/1, a stage 1…4) is a category
FEW_VALUES = 5
MOST = 60               # findings that an int64 holds beside its sign, and some to spare
# Edema|Effusion: both are there; none: neither is, nor any other …
AND, NONE = "|", "none"
# … which NIH, CheXpert and MIMIC spell as one more finding; in any case
NONE_TOO = ("none", "no finding", "no_finding")


@dataclass(frozen=True)
class Category:
    """One of a few named values, e.g. label, sex or view."""

    name: str
    values: tuple[str, ...]
    dtype: ClassVar[torch.dtype] = torch.int64
    null: ClassVar[int] = NULL
    unknown: ClassVar[int] = UNKNOWN

    def encode(self, cell: str, where: str = "") -> int:
        if cell == "":
            return UNKNOWN
        if cell in self.values:
            return self.values.index(cell)
        same = [value for value in self.values if _plain(value) == _plain(cell)]
        if len(same) == 1:
            return self.values.index(same[0])
        near = difflib.get_close_matches(cell.lower(), {v.lower(): v for v in self.values}, 1)
        raise InputError(f"{_at(where)}{self.name} {cell!r} is not one of {', '.join(self.values)}"
                         + (f"; nearest: {next(v for v in self.values if v.lower() == near[0])}"
                            if near else ""))

    def decode(self, value: int) -> str:
        return self.values[int(value)] if value >= 0 else ""


@dataclass(frozen=True)
class Findings:
    """Named findings any of which may be present together, e.g. Edema|Effusion: bit i is
    values[i].
    """

    name: str
    values: tuple[str, ...]
    dtype: ClassVar[torch.dtype] = torch.int64
    null: ClassVar[int] = NULL
    unknown: ClassVar[int] = UNKNOWN

    def encode(self, cell: str, where: str = "") -> int:
        if cell == "":
            return UNKNOWN
        one = Category(self.name, self.values)
        return sum(1 << one.encode(part, where) for part in present(self.name, cell, where))

    def decode(self, value: int) -> str:
        return AND.join(v for i, v in enumerate(self.values)
                        if int(value) >> i & 1) or NONE if value >= 0 else ""

    def bits(self, cells: Tensor) -> Tensor:
        """Cells (N,) → which findings are present, bool (N, k); none where the cell is unknown or
        null.
        """
        places = torch.arange(len(self.values), device=cells.device)
        return (cells.clamp(min=0)[:, None] >> places & 1).bool()


@dataclass(frozen=True)
class Number:
    """A quantity in its own unit, e.g. age in years; mean and std are those of the training
    rows.
    """

    name: str
    mean: float
    std: float
    low: float
    high: float
    dtype: ClassVar[torch.dtype] = torch.float32
    null: ClassVar[float] = -math.inf
    unknown: ClassVar[float] = math.nan

    def encode(self, cell: str, where: str = "") -> float:
        if cell == "":
            return math.nan
        value = _number(cell)
        # "nan" and "-inf" of an export are no measurement, and not a word either: unknown
        if value is None:
            if _is_float(cell):
                return math.nan
            raise InputError(f"{_at(where)}{self.name} {cell!r} is not a number; training saw "
                             f"{self.low:g} to {self.high:g}")
        return value

    def decode(self, value: float) -> str:
        return f"{float(value):g}" if math.isfinite(value) else ""


Variable = Category | Findings | Number
RESERVED = ("file", "where", "file_name", "split", "patient", "seed", "set")
KINDS = {"category": Category, "findings": Findings, "number": Number}  # from coarse to fine


# the conditions where none are named: as many of them as the data have
USUAL = ("label", "sex", "age", "view")


def usable(names: Sequence[str], rows: Sequence[Mapping[str, str]],
           known: Sequence[str] = ()) -> tuple[str, ...]:
    """The conditions to use: those that were named, or of the usual ones those of which the rows
    hold two values, the label, and what an earlier stage knows."""
    if tuple(names) != USUAL:
        return tuple(names)
    kept = tuple(n for n in names
                 if n in ("label", *known) or len({row.get(n, "") for row in rows} - {""}) > 1)
    if lost := [name for name in names if name not in kept]:
        print(f"no condition: {', '.join(lost)}, for the training rows have no two values of it")
    return kept


def described(variables: Sequence[Variable]) -> str:
    """What there is to ask for, in a line: values, or from where to where numbers go."""
    return "; ".join(f"{v.name} {v.low:g} to {v.high:g}" if isinstance(v, Number)
                     else f"{v.name} {', '.join(v.values)}" for v in variables)


def check_names(names: Sequence[str]) -> None:
    """Refuse what cannot be a condition: nothing, a name twice, and columns that say which image it
    is and not how.
    """
    if not names:
        raise InputError("--condition is empty; name at least one column, e.g. label")
    for name in names:
        if name in RESERVED:
            raise InputError(f"--condition {name}: this column says which image it is, and cannot "
                             "be a condition")
        if list(names).count(name) > 1:
            raise InputError(f"--condition names {name} twice")


def infer(name: str, cells: Sequence[str], old: Variable | None = None) -> Variable:
    """The variable that a column of cells holds: Findings if a known cell names several, a Number
    if most are numbers.

    A Number has more than 5 different values. A label is a Category always, for an image lies in
    the folder of one label. `old` is the variable of this name in the model that training goes on
    from, to `merge` with: beside it, a column of few different numbers may still be a Number, and
    one of a single value or none says enough.
    """
    known = [c for c in cells if c != ""]
    if not known and old:
        return old
    if not known:
        raise InputError(f"condition {name!r} has no known value in the training rows")
    if isinstance(old, Findings) or name != "label" and any(AND in c for c in known):
        return _findings(name, known, old)
    numbers = [x for x in map(_number, known) if x is not None]
    if 2 * len(numbers) > len(known) and len(set(numbers)) > (0 if isinstance(old, Number)
                                                              else FEW_VALUES):
        x = torch.tensor(numbers, dtype=torch.float64)
        return Number(name, round(x.mean().item(), 6), round(x.std().item(), 6), x.min().item(),
                      x.max().item())
    if len(set(known)) == 1 and not old:
        raise InputError(f"condition {name!r} has one value only, {known[0]!r}: there is nothing "
                         "to condition on")
    if len(set(known)) > 100:
        raise InputError(f"condition {name!r} has {len(set(known))} different values; a category "
                         "may have up to 100")
    return Category(name, tuple(sorted(set(known),
                                       key=lambda c: (_number(c) is None, _number(c) or 0.0, c))))


def _findings(name: str, known: Sequence[str], old: Variable | None) -> Findings:
    sets = {present(name, cell) for cell in known}
    if len(sets) == 1 and not old:
        raise InputError(f"condition {name!r} has one value only, {known[0]!r}: there is nothing "
                         "to condition on")
    return _at_most(Findings(name, tuple(sorted(frozenset().union(*sets)))))


def _at_most(variable: Findings) -> Findings:
    if len(variable.values) > MOST:
        raise InputError(f"condition {variable.name!r} has {len(variable.values)} different "
                         f"findings; it may have {MOST}")
    return variable


def present(name: str, cell: str, where: str = "") -> frozenset[str]:
    """The findings that a known cell names; InputError for a|| and for a finding beside none."""
    parts = [part.strip() for part in cell.split(AND)]
    found = frozenset(part for part in parts if part.casefold() not in NONE_TOO)
    if "" in parts or (found and len(found) < len(set(parts))):
        fault = "has an empty finding" if "" in parts else "says none and a finding"
        raise InputError(f"{_at(where)}{name} {cell!r} {fault}; write Edema{AND}Effusion, or "
                         f"{NONE}, or leave it empty")
    return found


def merge(old: Sequence[Variable], new: Sequence[Variable]) -> list[Variable]:
    """The new variables, in their order, as a model trained on the old ones can go on with them.

    A Category and Findings keep the old values at their places, new ones follow. A Number keeps the
    old mean and std, for its weights mean something under these only; its range covers both.
    """
    known = {v.name: v for v in old}
    return [_merge(known[v.name], v) if v.name in known else v for v in new]


def _merge(old: Variable, new: Variable) -> Variable:
    if type(old) is not type(new):
        kinds = {cls: "set of findings" if cls is Findings else kind for kind, cls in KINDS.items()}
        raise InputError(f"condition {new.name!r} is a {kinds[type(new)]} here and a "
                         f"{kinds[type(old)]} in the model to go on from; mend the column, or give "
                         "it another name")
    if isinstance(old, Number):
        return replace(old, low=min(old.low, new.low), high=max(old.high, new.high))
    merged = replace(old, values=(*old.values, *(v for v in new.values if v not in old.values)))
    return _at_most(merged) if isinstance(merged, Findings) else merged


def encode(variables: Sequence[Variable], rows: Sequence[dict[str, str]]) -> Labels:
    """Rows of cells → labels, one tensor (N,) a variable; a column that a row lacks is unknown."""
    return {
        v.name: torch.tensor([v.encode(r.get(v.name, ""), r.get("where", "")) for r in rows],
                             dtype=v.dtype) for v in variables
    }


def decode(variables: Sequence[Variable], labels: Labels) -> list[dict[str, str]]:
    """The inverse of `encode`; unknown and null both become the empty cell."""
    columns = {v.name: [v.decode(x) for x in labels[v.name].tolist()] for v in variables}
    return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def drop(variables: Sequence[Variable], labels: Labels, mask: Tensor) -> Labels:
    """Labels with entry (n, i) set to null where mask (N, variables) is true."""
    return {
        v.name: labels[v.name].masked_fill(mask[:, i].to(labels[v.name].device), v.null)
        for i, v in enumerate(variables)
    }


def to_json(variables: Sequence[Variable]) -> list[dict]:
    return [{"kind": kind, **asdict(v)} for v in variables for kind, cls in KINDS.items()
            if isinstance(v, cls)]


def from_json(items: Sequence[dict]) -> list[Variable]:
    def build(kind: str, values: tuple = (), **fields) -> Variable:
        return KINDS[kind](**fields, **({"values": tuple(values)} if values else {}))

    return [build(**item) for item in items]


def _number(cell: str) -> float | None:
    return float(cell) if _is_float(cell) and math.isfinite(float(cell)) else None


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _plain(value: str) -> str:
    """F, f, Female and female are one value, and so is any word in other capitals."""
    return {"female": "f", "male": "m"}.get(value.lower(), value.lower())


def _at(where: str) -> str:
    return f"{where}: " if where else ""
