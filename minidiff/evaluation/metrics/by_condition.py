"""The conditions by which figures are broken down: columns that real and synthetic rows share."""

from collections.abc import Mapping

import numpy as np
import torch

from minidiff.cells import spelled
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.variables import RESERVED, Findings, Number, infer

NO_CONDITION = (*RESERVED, "source")
MOST_VALUES = 8             # of a category that is shown by value


def groups(tables: Mapping[str, Table]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Condition → set (train, heldout, synthetic) → the value of each row as text, "" if unknown.

    Numbers are cut into thirds of the training rows, and each of the commonest findings is a
    condition. The second dict says, by name, why a condition cannot be broken down.
    """
    columns = {name: dict(*table.rows[:1]) for name, table in tables.items()}
    found, why = {}, {}
    for name in columns["synthetic"]:
        if name in NO_CONDITION or not all(name in known for known in columns.values()):
            continue
        cells = {side: np.array(table.column(name)) for side, table in tables.items()}
        try:
            v = infer(name, cells["train"].tolist())
        except InputError:   # one value, or none: nothing to break down by
            continue
        if not any(cells["synthetic"]):
            continue
        try:
            if name == "label" and v.exclusive:  # figures go by label already
                continue
            if not v.exclusive:
                found |= _each_finding(v, cells)
                continue
            cells = _alike(name, cells) if v.values else _thirds(v, cells)
        except InputError as error:   # a cell of another kind than those of training
            why[name] = str(error)
            continue
        if len(set(cells["train"]) - {""}) <= MOST_VALUES:
            found[name] = cells
    return found, why


def _alike(name: str, cells: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A value has one spelling on all sides, that of training: F may be female elsewhere."""
    first = spelled(name, filter(None, [*cells["train"].tolist(), *(
        cell for column in cells.values() for cell in column.tolist())]))
    return {side: np.array([first.get(cell, "") for cell in column.tolist()])
            for side, column in cells.items()}


def _thirds(v: Number, cells: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    numbers = {side: np.array([v.encode(c) for c in column.tolist()])
               for side, column in cells.items()}
    a, b = np.quantile(numbers["train"][np.isfinite(numbers["train"])], [1 / 3, 2 / 3])
    names = np.array([f"under {a:g}", f"{a:g} to {b:g}", f"{b:g} and over", ""])
    return {side: names[np.where(np.isfinite(x), (x >= a).astype(int) + (x >= b), 3)]
            for side, x in numbers.items()}


def _each_finding(v: Findings, cells: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    # the other sets may have a finding that training lacks
    v = infer(v.name, np.concatenate(list(cells.values())).tolist(), v)
    sets = {side: np.array([v.encode(c) for c in column.tolist()])
            for side, column in cells.items()}
    there = {side: v.bits(torch.from_numpy(x)).numpy() for side, x in sets.items()}
    commonest = np.argsort(-there["train"].sum(0), kind="stable")[:MOST_VALUES]
    return {f"{v.name}: {v.values[i]}": {side: np.where(x < 0, "", np.where(
        there[side][:, i], "yes", "no")) for side, x in sets.items()} for i in commonest}


def in_order(cells: np.ndarray) -> list[str]:
    """The known values, bands of a number from low to high."""
    return sorted(set(cells.tolist()) - {""},
                  key=lambda text: (not text.startswith("under"), "over" in text, text))
