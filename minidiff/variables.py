"""Conditions of an image: a category, a set of findings or a number, each in one of three states.

A cell of a table becomes one number of a tensor:

    state     Category (int64)   Findings (int64)   Number (float32)   meaning
    value     0 … k−1            0 … 2ᵏ−1, bits     the value itself   known; no bit: no finding
    unknown   −1                 −1                 NaN                missing; has an embedding
    null      −2                 −2                 −inf               dropped, for guidance

Labels are the values of all conditions, not of the column `label` alone: a dict from the name of
each variable to a tensor of shape (N,), one entry per image.
"""

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
FEW_VALUES = 5          # a column with more different numbers is a Number: icu 0/1 is a Category
MOST_VALUES = 100       # of a Category
MOST_FINDINGS = 60      # bits of an int64, and some to spare
AND, NONE = "|", "none"  # Edema|Effusion: both are present; none: no finding is
NO_FINDING = ("none", "no finding", "no_finding")  # as NIH, CheXpert and MIMIC write it, any case
USUAL = ("label", "sex", "age", "view")  # conditions if none are named, and if the data have them
RESERVED = ("file", "where", "file_name", "split", "patient", "seed", "set")


@dataclass(frozen=True)
class _Named:
    name: str
    values: tuple[str, ...]
    dtype: ClassVar[torch.dtype] = torch.int64
    null: ClassVar[int] = NULL


@dataclass(frozen=True)
class Category(_Named):
    """One of a few named values, e.g. label, sex or view."""

    def encode(self, cell: str, where: str = "") -> int:
        if cell == "":
            return UNKNOWN
        if cell in self.values:
            return self.values.index(cell)
        same = [k for k, value in enumerate(self.values) if _plain(value) == _plain(cell)]
        if len(same) == 1:
            return same[0]
        lower = {value.lower(): value for value in self.values}
        near = difflib.get_close_matches(cell.lower(), lower, 1)
        raise InputError(f"{_at(where)}{self.name} {cell!r} is not one of {', '.join(self.values)}"
                         + "".join(f"; nearest: {lower[word]}" for word in near))

    def decode(self, value: int) -> str:
        return self.values[int(value)] if value >= 0 else ""


@dataclass(frozen=True)
class Findings(_Named):
    """Named findings of which any may be present together, e.g. Edema|Effusion.

    Bit i of the code says whether values[i] is present.
    """

    def encode(self, cell: str, where: str = "") -> int:
        if cell == "":
            return UNKNOWN
        one = Category(self.name, self.values)
        return sum(1 << one.encode(part, where) for part in present(self.name, cell, where))

    def decode(self, value: int) -> str:
        if value < 0:
            return ""
        return AND.join(v for i, v in enumerate(self.values) if int(value) >> i & 1) or NONE

    def bits(self, cells: Tensor) -> Tensor:
        """Codes (N,) → which findings are present, bool (N, k); none if unknown or null."""
        places = torch.arange(len(self.values), device=cells.device)
        return (cells.clamp(min=0)[:, None] >> places & 1).bool()


@dataclass(frozen=True)
class Number:
    """A quantity in its own unit, e.g. age in years; mean and std are of the training rows."""

    name: str
    mean: float
    std: float
    low: float
    high: float
    dtype: ClassVar[torch.dtype] = torch.float32
    null: ClassVar[float] = -math.inf

    def encode(self, cell: str, where: str = "") -> float:
        if cell == "":
            return math.nan
        try:
            value = float(cell)
        except ValueError:
            raise InputError(f"{_at(where)}{self.name} {cell!r} is not a number; training saw "
                             f"{self.low:g} to {self.high:g}") from None
        return value if math.isfinite(value) else math.nan  # an export's "nan" or "-inf": unknown

    def decode(self, value: float) -> str:
        return f"{float(value):g}" if math.isfinite(value) else ""


Variable = Category | Findings | Number
KINDS = {"category": Category, "findings": Findings, "number": Number}  # from coarse to fine


def usable(names: Sequence[str], rows: Sequence[Mapping[str, str]],
           known: Sequence[str] = ()) -> tuple[str, ...]:
    """The conditions to use: those named, or the usual ones that have two values in the rows.

    The label and the conditions that an earlier stage knows always stay.
    """
    if tuple(names) != USUAL:
        return tuple(names)
    several = [name for name in names if len({row.get(name, "") for row in rows} - {""}) > 1]
    used = tuple(name for name in names if name in ("label", *known, *several))
    unused = [name for name in names if name not in used]
    if unused:
        print(f"no condition: {', '.join(unused)}, for the training rows have no two values of it")
    return used


def described(variables: Sequence[Variable]) -> str:
    """What can be asked for, in one line: values, or the range of a number."""
    return "; ".join(f"{v.name} {v.low:g} to {v.high:g}" if isinstance(v, Number)
                     else f"{v.name} {', '.join(v.values)}" for v in variables)


def check_names(names: Sequence[str]) -> None:
    """Refuse what cannot be a condition: nothing, a name twice, a column of identities."""
    if not names:
        raise InputError("--condition is empty; name at least one column, e.g. label")
    for name in names:
        if name in RESERVED:
            raise InputError(f"--condition {name}: this column says which image it is, and cannot "
                             "be a condition")
        if list(names).count(name) > 1:
            raise InputError(f"--condition names {name} twice")


def infer(name: str, cells: Sequence[str], old: Variable | None = None) -> Variable:
    """The variable that a column holds.

    Findings if a known cell names several. A Number if most cells are numbers, with more than 5
    different ones. Else a Category; a label always is one, unless its cells name several findings,
    for each image lies in the folder of its label. `old` is the variable of this name in the model
    that training goes on from: then a column of few numbers may still be a Number, and one value or
    none is enough.
    """
    known = [cell for cell in cells if cell != ""]
    if not known and old:
        return old
    if not known:
        raise InputError(f"condition {name!r} has no known value in the training rows")
    several = isinstance(old, Findings) or (name != "label" and any(AND in cell for cell in known))
    found = {present(name, cell) for cell in known} if several else set(known)
    numbers = [float(cell) for cell in known if _is_number(cell)]
    fewest = 0 if isinstance(old, Number) else FEW_VALUES
    if not several and 2 * len(numbers) > len(known) and len(set(numbers)) > fewest:
        x = torch.tensor(numbers, dtype=torch.float64)
        return Number(name, round(x.mean().item(), 6), round(x.std().item(), 6), x.min().item(),
                      x.max().item())
    if len(found) == 1 and not old:
        raise InputError(f"condition {name!r} has one value only, {known[0]!r}: there is nothing "
                         "to condition on")
    if several:
        return _checked(Findings(name, tuple(sorted(frozenset().union(*found)))))
    order = {cell: (not _is_number(cell), float(cell) if _is_number(cell) else 0.0, cell)
             for cell in found}
    return _checked(Category(name, tuple(sorted(found, key=order.get))))


def _checked(variable: Category | Findings) -> Category | Findings:
    n = len(variable.values)
    if isinstance(variable, Category) and n > MOST_VALUES:
        raise InputError(f"condition {variable.name!r} has {n} different values; a category may "
                         f"have up to {MOST_VALUES}")
    if isinstance(variable, Findings) and n > MOST_FINDINGS:
        raise InputError(f"condition {variable.name!r} has {n} different findings; it may have "
                         f"{MOST_FINDINGS}")
    return variable


def present(name: str, cell: str, where: str = "") -> frozenset[str]:
    """The findings that a known cell names; InputError for a|| and for a finding beside none."""
    parts = [part.strip() for part in cell.split(AND)]
    found = frozenset(part for part in parts if part.casefold() not in NO_FINDING)
    if "" in parts or (found and len(found) < len(set(parts))):
        fault = "has an empty finding" if "" in parts else "says none and a finding"
        raise InputError(f"{_at(where)}{name} {cell!r} {fault}; write Edema{AND}Effusion, or "
                         f"{NONE}, or leave it empty")
    return found


def merge(old: Sequence[Variable], new: Sequence[Variable]) -> list[Variable]:
    """The new variables, in their order, such that a model trained on the old ones can go on.

    Category and Findings: old values keep their places, new ones follow. Number: the old mean and
    std stay, for the weights depend on them, and the range covers both.
    """
    known = {v.name: v for v in old}
    return [_merge(known[v.name], v) if v.name in known else v for v in new]


def _merge(old: Variable, new: Variable) -> Variable:
    if type(old) is not type(new):
        kinds = {Category: "category", Findings: "set of findings", Number: "number"}
        raise InputError(f"condition {new.name!r} is a {kinds[type(new)]} here and a "
                         f"{kinds[type(old)]} in the model to go on from; change the column, or "
                         "give it another name")
    if isinstance(old, Number):
        return replace(old, low=min(old.low, new.low), high=max(old.high, new.high))
    values = (*old.values, *(value for value in new.values if value not in old.values))
    merged = replace(old, values=values)
    return _checked(merged) if isinstance(merged, Findings) else merged


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
    kinds = {cls: kind for kind, cls in KINDS.items()}
    return [{"kind": kinds[type(v)], **asdict(v)} for v in variables]


def from_json(items: Sequence[dict]) -> list[Variable]:
    """The inverse of `to_json`; JSON's lists become tuples again."""
    return [KINDS[item["kind"]](**{name: tuple(value) if isinstance(value, list) else value
                                   for name, value in item.items() if name != "kind"})
            for item in items]


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _plain(value: str) -> str:
    """F, f, Female and female are one value, and so is any word in other capitals."""
    return {"female": "f", "male": "m"}.get(value.lower(), value.lower())


def _at(where: str) -> str:
    return f"{where}: " if where else ""
