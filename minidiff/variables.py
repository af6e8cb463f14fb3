"""Conditions of an image: a category, a set of findings or a number, each in one of three states.

A cell of a table becomes one number of a tensor:

    state     Category (int64)   Findings (int64)   Number (float32)   meaning
    value     0 … k−1            0 … 2ᵏ−1, bits     the value itself   known; no bit: no finding
    unknown   −1                 −1                 NaN                missing; has an embedding
    null      −2                 −2                 −inf               dropped, for guidance

Labels are the values of all conditions, not of the column `label` alone: a dict from the name of
each variable to a tensor of shape (N,), one entry per image.

A condition's type is a class here and its embedding in diffusion/conditioning.py. All others ask
its `values` (none: a quantity on a line, with low, high and mean) and whether it is `exclusive`
(one value at a time). A type that is neither of these touches the places that measure it, too.
"""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.cells import (
    AND,
    NO_FINDING,
    check_numbers,
    is_numberlike,
    is_unknown,
    keys,
    listed,
    number,
    strange,
    to_number,
)
from minidiff.errors import InputError

# Every condition of N images by name, of which the class column, "label", is only one: (N,) each.
Labels = dict[str, Tensor]
UNKNOWN, NULL = -1, -2  # of a Category and of Findings; a Number has NaN and -inf
FEW_VALUES = 5          # a column with more different numbers is a Number: icu 0/1 is a Category
MOST_VALUES = 100       # of a Category
MOST_FINDINGS = 60      # bits of an int64, and some to spare
NONE = "none"           # no finding is present
USUAL = ("label", "sex", "age", "view")  # conditions if none are named, and if the data have them
ANY = "any"            # the label of images that have none
RESERVED = ("file", "where", "file_name", "split", "patient", "seed", "set", "origin", "change",
            "mask")


@dataclass(frozen=True)
class Category:
    """One of a few named values, e.g. label, sex or view. A network has a logit for each."""

    name: str
    values: tuple[str, ...]
    kind: ClassVar[str] = "category"
    exclusive: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.int64
    null: ClassVar[int] = NULL

    def __str__(self) -> str:
        return f"{self.name} {', '.join(self.values)}"

    def encode(self, cell: str, where: str = "") -> int:
        if cell == "":
            return UNKNOWN
        if cell in self.values:
            return self.values.index(cell)
        *known, own = keys(self.name, (*self.values, cell))
        if known.count(own) == 1:
            return known.index(own)
        lower = {value.lower(): value for value in self.values}
        near = difflib.get_close_matches(cell.lower(), lower, 1)
        raise InputError(f"{_at(where)}{self.name} {cell!r} is not one of {', '.join(self.values)}"
                         + "".join(f"; nearest: {lower[word]}" for word in near))

    def known(self, cells: Tensor) -> Tensor:
        return cells >= 0

    def bits(self, cells: Tensor) -> Tensor:
        """Codes (N,) → which values are present, bool (N, k); none if unknown or null."""
        return cells[:, None] == torch.arange(len(self.values), device=cells.device)

    def read(self, y: Tensor) -> Tensor:
        """Outputs of a network → a probability for each value; of a Number its value."""
        return y.softmax(-1)

    def seen(self, probabilities: Tensor) -> Tensor:
        """Which values an image is said to have, bool (N, k)."""
        return self.bits(probabilities.argmax(1))

    def error(self, y: Tensor, cells: Tensor) -> Tensor:
        """Loss (N,) of a network's outputs, finite also where a cell is unknown or null."""
        return F.cross_entropy(y, cells.clamp(min=0), reduction="none")

    def merged(self, new: "Category") -> "Category":
        """This variable with the values of a new one behind its own; female is no new one beside
        F."""
        both = tuple(dict.fromkeys(self.values + new.values))
        said = keys(self.name, both)
        n = len(self.values)
        return replace(self, values=tuple(value for k, value in enumerate(both)
                                          if k < n or said[k] not in said[:k]))


@dataclass(frozen=True)
class Findings(Category):
    """Named findings of which any may be present together, e.g. Edema|Effusion.

    Bit i of the code says whether values[i] is present. A network has a logit for each.
    """

    kind: ClassVar[str] = "findings"
    exclusive: ClassVar[bool] = False

    def __post_init__(self):
        if len(self.values) > MOST_FINDINGS:
            raise InputError(f"condition {self.name!r} has {len(self.values)} different findings; "
                             f"it may have {MOST_FINDINGS}")

    def encode(self, cell: str, where: str = "") -> int:
        if cell == "":
            return UNKNOWN
        code = super().encode
        if any(mark in cell for mark in ";,["):
            cell = listed(self.name, (*self.values, cell)).get(cell, cell)
        return sum(1 << code(part, where) for part in present(self.name, cell, where))

    def bits(self, cells: Tensor) -> Tensor:
        places = torch.arange(len(self.values), device=cells.device)
        return (cells.clamp(min=0)[:, None] >> places & 1).bool()

    def read(self, y: Tensor) -> Tensor:
        return y.sigmoid()

    def seen(self, probabilities: Tensor) -> Tensor:
        return probabilities > 0.5

    def error(self, y: Tensor, cells: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y, self.bits(cells).float(),
                                                  reduction="none").mean(1)


@dataclass(frozen=True)
class Number:
    """A quantity in its own unit, e.g. age in years; mean and std are of the training rows.

    A network has one output, in standard deviations from the mean.
    """

    name: str
    mean: float
    std: float
    low: float
    high: float
    kind: ClassVar[str] = "number"
    values: ClassVar[tuple[str, ...]] = ()
    exclusive: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype] = torch.float32
    null: ClassVar[float] = -math.inf

    def __str__(self) -> str:
        return f"{self.name} {self.low:g} to {self.high:g}"

    def encode(self, cell: str, where: str = "") -> float:
        if cell == "":
            return math.nan
        value = number(self.name, cell)
        # an export's "nan" or "-inf" is unknown
        if math.isnan(value) and not is_unknown(cell) and "inf" not in cell.casefold():
            raise InputError(f"{_at(where)}{self.name} {cell!r} is not a number; training saw "
                             f"{self.low:g} to {self.high:g}")
        return value

    def known(self, cells: Tensor) -> Tensor:
        return cells.isfinite()

    def read(self, y: Tensor) -> Tensor:
        return y[..., 0] * self.std + self.mean

    def error(self, y: Tensor, cells: Tensor) -> Tensor:
        # 0 · NaN would still be NaN
        target = (cells.nan_to_num(self.mean, self.mean, self.mean) - self.mean) / self.std
        return (y[..., 0] - target).square()

    def merged(self, new: "Number") -> "Number":
        """This variable with a range that covers both: weights depend on its mean and std."""
        return replace(self, low=min(self.low, new.low), high=max(self.high, new.high))


Variable = Category | Findings | Number
KINDS = {v.kind: v for v in (Category, Findings, Number)}  # from coarse to fine


def usable(names: Sequence[str], rows: Sequence[Mapping[str, str]],
           known: Sequence[str] = ()) -> tuple[str, ...]:
    """The conditions to use: of those named what has two values in the rows, or is known already.

    What an earlier stage knows always stays. The others are printed: with one value, or none, there
    is nothing to tell. But a column without any value that was named is refused later, by `infer`:
    it may be misspelt.
    """
    found = {name: _different(name, {row.get(name, "") for row in rows} - {""}) for name in names}
    unused = [name for name, (_, values, _) in found.items() if name not in known
              and (len(values) == 1 or (not values and tuple(names) == USUAL))]
    if unused:
        print(f"no condition: {', '.join(unused)}, for the training rows have no two values of it")
    return tuple(name for name in names if name not in unused)


def check_names(names: Sequence[str]) -> None:
    """Refuse what cannot be a condition: a name twice, a column of identities."""
    for name in names:
        if name in RESERVED:
            raise InputError(f"--condition {name}: this column says which image it is, and cannot "
                             "be a condition")
        if list(names).count(name) > 1:
            raise InputError(f"--condition names {name} twice")


def infer(name: str, cells: Sequence[str], old: Variable | None = None) -> Variable:
    """The variable that a column holds.

    Findings if a known cell names several, Edema|Effusion. A Number if most cells are numbers, with
    more than 5 different ones. Else a Category. `old` is the variable of this name in the model
    that training goes on from: then a column of few numbers may still be a Number, and one value or
    none is enough.
    """
    known = [cell for cell in cells if cell != ""]
    if not known and old:
        return old
    if not known:
        raise InputError(f"condition {name!r} has no known value in the training rows")
    several, found, known = _different(name, known, old)
    meant = [cell for cell in known if is_numberlike(name, cell)]
    fewest = 0 if isinstance(old, Number) else FEW_VALUES
    numbers = [x for cell in meant if not math.isnan(x := number(name, cell))]
    different = len(set(numbers)) + sum(math.isnan(number(name, cell)) for cell in set(meant))
    if not several and 2 * len(meant) > len(known) and different > fewest:
        check_numbers(name, meant)
        if not numbers:
            raise InputError(f"condition {name!r} has no number that can be read, only such as "
                             f"{meant[0]!r}; write 1234.5, without signs, dates or commas")
        x = torch.tensor(numbers, dtype=torch.float64)
        return Number(name, round(x.mean().item(), 6), round(x.std().item(), 6), x.min().item(),
                      x.max().item())
    if len(found) == 1 and not old:
        raise InputError(f"condition {name!r} has one value only, {known[0]!r}: there is nothing "
                         "to condition on")
    if several:
        return Findings(name, tuple(sorted(frozenset().union(*found))))
    if len(found) > MOST_VALUES:
        raise InputError(f"condition {name!r} has {len(found)} different values; a category may "
                         f"have up to {MOST_VALUES}")
    found -= set(strange(name, found))  # whose rows are refused
    words = sorted(cell for cell in found if math.isnan(to_number(cell)))
    return Category(name, (*sorted(found.difference(words), key=lambda c: (to_number(c), c)),
                           *words))


def _different(name: str, known: Collection[str],
               old: Variable | None = None) -> tuple[bool, set, list[str]]:
    """Do these known cells name several findings? The different values among them, and the cells,
    their lists in one form."""
    if name != "label" or isinstance(old, Findings):  # a list of labels may be one's name
        lists = listed(name, known)
        known = [lists.get(cell, cell) for cell in known]
    classes = name == "label" and old is not None and old.exclusive  # and remain so
    several = isinstance(old, Findings) or (not classes and any(AND in cell for cell in known))
    return several, {present(name, cell) for cell in known} if several else set(known), list(known)


def present(name: str, cell: str, where: str = "") -> frozenset[str]:
    """The findings that a known cell names; InputError for a|| and for a finding beside none."""
    parts = [part.strip() for part in cell.split(AND)]
    found = frozenset(part for part in parts if part.casefold() not in NO_FINDING)
    if "" in parts or (found and len(found) < len(set(parts))):
        fault = "has an empty finding" if "" in parts else "says none and a finding"
        raise InputError(f"{_at(where)}{name} {cell!r} {fault}; write Edema{AND}Effusion, or "
                         f"{NONE}, or leave it empty")
    return found


def labels_in(cells: Sequence[str]) -> list[list[str]]:
    """What each cell of the column label counts as: itself, or, where any names several findings,
    each of those that it names, or none."""
    several = any(AND in cell for cell in cells)
    return [sorted(present("label", cell)) or [NONE] if several and cell else [cell]
            for cell in cells]


def merge(old: Sequence[Variable], new: Sequence[Variable]) -> list[Variable]:
    """The new variables, in their order, such that a model trained on the old ones can go on.

    Old values keep their places, new ones follow; a Number keeps its mean and std.
    """
    merged, known = [], {v.name: v for v in old}
    for v in new:
        before = known.get(v.name, v)
        if before.kind != v.kind:
            raise InputError(f"condition {v.name!r} is of kind {v.kind} here and of kind "
                             f"{before.kind} in the model to go on from; change the column, or "
                             "give it another name")
        merged.append(before.merged(v))
    return merged


def encode(variables: Sequence[Variable], rows: Sequence[dict[str, str]]) -> Labels:
    """Rows of cells → labels, one tensor (N,) a variable; a column that a row lacks is unknown."""
    return {
        v.name: torch.tensor([v.encode(r.get(v.name, ""), r.get("where", "")) for r in rows],
                             dtype=v.dtype) for v in variables
    }


def drop(variables: Sequence[Variable], labels: Labels, mask: Tensor) -> Labels:
    """Labels with entry (n, i) set to null where mask (N, variables) is true."""
    return {
        v.name: labels[v.name].masked_fill(mask[:, i].to(labels[v.name].device), v.null)
        for i, v in enumerate(variables)
    }


def findings_of(variables: Sequence[Variable]) -> list[str]:
    """All findings that an image may have, of whatever variable."""
    return [value for v in variables if not v.exclusive for value in v.values]


def to_json(variables: Sequence[Variable]) -> list[dict]:
    return [{"kind": v.kind, **asdict(v)} for v in variables]


def from_json(items: Sequence[dict]) -> list[Variable]:
    """The inverse of `to_json`; JSON's lists become tuples again."""
    return [KINDS[item["kind"]](**{name: tuple(value) if isinstance(value, list) else value
                                   for name, value in item.items() if name != "kind"})
            for item in items]


def _at(where: str) -> str:
    return f"{where}: " if where else ""
