"""Edits of real images: which of their conditions become others, and which of their pixels.

    label=covid          this value
    sex=other            the other one of two
    age=+30, age=-30     a number: so much more, so much less
    findings=+Edema      findings: this one as well; -Edema: without it

A row keeps what is not named. `before_<name>` holds each cell that was named as it was, `change`
the words, `mask` the file whose white pixels are made anew.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff import cells
from minidiff import variables as var
from minidiff.data import images
from minidiff.errors import InputError, count
from minidiff.names import on_disk, rejoined, text
from minidiff.sampling.plan import NULL, Row, plan_origin, spelled

OTHER = "other"    # the value that a category of two has not
BEFORE = "before_"
WHITE = 128        # grey level from which a pixel of a mask is white


def plan(known: Sequence[Row], variables: Sequence[var.Variable], labels: Sequence[str],
         per_label: int, *, change: Sequence[str], mask: str, size: int,
         seed: int) -> tuple[list[Row], str]:
    """Rows as of `plan_origin`, edited; and a sentence on the originals that have nothing to
    change, which are left out."""
    changes, reasons = read_changes(change, variables), Counter()

    def edit(row: Row) -> Row | None:
        row, why = changed(variables, changes, row)
        reasons.update([why] * bool(why))
        return row

    rows = plan_origin(known, variables, labels, per_label, seed, edit if changes else None)
    words = f"--change {' '.join(f'{k}={v}' for k, v in changes.items())}"
    shown = ", ".join(f"{n} {why}" for why, n in reasons.most_common())
    if not rows:
        raise InputError(f"{words}: no image of --origin has anything to change: {shown}")
    said = f"{words} leaves out {count(reasons.total(), 'image')}: {shown}" * bool(reasons)
    return masked(rows, mask, size) if mask else rows, said


def read_changes(items: Sequence[str], variables: Sequence[var.Variable]) -> dict[str, str]:
    """Name → what it becomes, each checked against the model."""
    by_name, changes = {v.name: v for v in variables}, {}
    for item in rejoined(items, lambda whole: _is_value(whole, by_name)):
        name, equals, to = item.partition("=")
        if not equals:
            raise InputError(f"--change {item}: write name=value, age=+30 or sex=other")
        if name not in by_name:
            raise InputError(f"--change {item}: the model has no such condition; it has "
                             f"{', '.join(by_name) or 'none'}")
        if name in changes:
            raise InputError(f"--change {item}: {name} is changed twice")
        _check(f"--change {item}", by_name[name], to)
        changes[name] = to
    return changes


def changed(variables: Sequence[var.Variable], changes: Mapping[str, str],
            row: Row) -> tuple[Row | None, str]:
    """The row with its changes; None and why, where a cell is not known or all stay as they are."""
    before = {v.name: row.get(v.name, "") for v in variables if v.name in changes}
    for name, cell in before.items():
        if cell in ("", NULL, var.ANY):
            return None, f"of unknown {name}"
    after = {v.name: _applied(v, before[v.name], changes[v.name])
             for v in variables if v.name in changes}
    years = cells.to_number(after.get("age", ""))
    if not math.isnan(years) and not 0 <= years <= cells.OLDEST:  # a table that says so is in error
        return None, f"whose age would be {after['age']}"
    if after == before:
        return None, f"with {' '.join(f'{k}={v}' for k, v in before.items())} already"
    return {**row, **after, "change": " ".join(f"{k}={v}" for k, v in changes.items()),
            **{BEFORE + name: cell for name, cell in before.items()}}, ""


def before(row: Row) -> Row:
    """The row with the conditions of its original."""
    return {**row, **{name.removeprefix(BEFORE): cell for name, cell in row.items()
                      if name.startswith(BEFORE)}}


def masked(rows: Sequence[Row], folder: str, size: int) -> list[Row]:
    """Rows with the mask of each original, all of them read and checked."""
    found: dict[Path, str] = {}
    for row in rows:
        path = _mask_of(Path(folder), row["origin"])
        if path in found:
            raise InputError(f"--mask {path} is the mask of {found[path]} and of {row['origin']}: "
                             "put the masks into folders as their images are")
        found[path] = row["origin"]
        read_mask(path, images.read(on_disk(row["origin"])), size)
    return [{**row, "mask": text(str(path))} for row, path in zip(rows, found)]


def read_mask(path: str | Path, original: np.ndarray, size: int) -> Tensor:
    """Which pixels of the central square of an original (C, H, W) are made anew: bool (1, S, S)."""
    mask = images.read(path)
    if mask.shape[1:] != original.shape[1:]:
        (high, wide), (h, w) = mask.shape[1:], original.shape[1:]
        raise InputError(f"{path}: a mask of {wide} x {high} pixels for an image of {w} x {h}; "
                         "both need the same size")
    if len(mask) > 1:
        raise InputError(f"{path}: a mask in colour; it needs to be grey, white where the image is "
                         "made anew")
    white = torch.tensor(images.square(mask, size)) >= WHITE
    if not white.any():
        raise InputError(f"{path}: an empty mask; no pixel of its central square is white, and "
                         "white pixels are those that are made anew")
    return white


def _mask_of(folder: Path, original: str) -> Path:
    """The file in the folder that has the name of the original, by as many of the folders above as
    there are, in the format of the original or as PNG."""
    parts = Path(original).parts[1:]
    names = [Path(*parts[k:]) for k in range(len(parts))]
    for name in names:
        for path in (folder / name, folder / name.with_suffix(".png")):
            if (path := Path(on_disk(str(path)))).is_file():
                return path
    raise InputError(f"--mask {folder}: no mask of {original}; it would be {folder / names[-1]} or "
                     f"{folder / Path(*parts[-2:])}")


def _is_value(item: str, by_name: Mapping[str, var.Variable]) -> bool:
    name, _, to = item.partition("=")
    return name in by_name and to in by_name[name].values


def _step(variable: var.Variable, to: str) -> str:
    """+ or − of a relative change, else ""."""
    relative = not variable.values or not variable.exclusive
    return to[:1] if relative and to[:1] in ("+", "-") and to not in variable.values else ""


def _is_other(variable: var.Variable, to: str) -> bool:
    return to == OTHER and bool(variable.values) and OTHER not in variable.values


def _check(flag: str, variable: var.Variable, to: str) -> None:
    if _is_other(variable, to):
        if not variable.exclusive or len(variable.values) != 2:
            raise InputError(f"{flag}: {variable} is no choice of two; name the value")
    elif _step(variable, to) and not to[1:]:
        raise InputError(f"{flag}: write how much, {variable.name}=+30, or which, "
                         f"{variable.name}=+Edema")
    elif _step(variable, to) and not variable.values and (
            to[1:2] in "+-" or math.isnan(cells.to_number(to[1:]))):
        raise InputError(f"{flag}: write a number after the sign, e.g. {variable.name}=+30")
    elif variable.name == "label" and not to:
        raise InputError(f"{flag}: an image needs a label; allowed are "
                         f"{', '.join(variable.values)}, and {NULL}")
    elif to not in (NULL, var.ANY):
        variable.encode(to[1:] if _step(variable, to) else to, flag)


def _applied(variable: var.Variable, cell: str, to: str) -> str:
    """A known cell → what it becomes."""
    if _is_other(variable, to):
        return next(value for value in variable.values if value != cell)
    if not (step := _step(variable, to)):
        same = to not in ("", NULL, var.ANY) and variable.encode(to) == variable.encode(cell)
        return cell if same else spelled(variable, to)
    if not variable.values:
        by = variable.encode(to[1:])
        return f"{variable.encode(cell) + (by if step == '+' else -by):.6g}"
    there, named = variable.encode(cell), variable.encode(to[1:])
    there = there | named if step == "+" else there & ~named
    return cells.AND.join(value for i, value in enumerate(variable.values)
                          if there >> i & 1) or var.NONE
