"""What to make: one row an image, decided before the first one is made. File name, label, set, seed
and conditions.

A cell is the text of a value, "" for unknown, or `null` for a condition that is dropped. Where
conditions are drawn, they are those of one real row of the same label, unknown cells included: by
systematic sampling (sorted by their conditions, every (rows / images)th is taken from a random
start), synthetic patients have the joint distribution of age, sex and view that the real ones have,
without the luck of the draw (independent draws gave 60 of 100 AP where the training rows have 53).

Conditions that are to be independent of the label are drawn from the rows of all labels, each label
weighing the same, and every label gets the same list of them: in the set that is made, the label
tells nothing of source, view or age.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import lcm
from pathlib import Path

import torch

from minidiff import variables as var
from minidiff.counted import ROWS, seeded
from minidiff.errors import InputError

Row = dict[str, str]
SET = 100       # images a set, each with its contact sheet
NULL = "null"   # a cell that is dropped, as for guidance
ALIKE = -1      # slot of the draw that all labels share; theirs count from 0


def plan(variables: Sequence[var.Variable], known: Sequence[Row], *, labels: Sequence[str] = (),
         per_label: int = SET, sets: int = 0, given: Sequence[str] = (),
         independent: Sequence[str] = (), seed: int = 0) -> list[Row]:
    """Rows for `per_label` images of each label, or for `sets` of 100; in turns, so that every set
    holds all labels.

    known: the real rows to draw conditions from. given: `name=value`, `name=low:high` (spread
    evenly), `name=` (unknown) or `name=null`. independent: names of conditions that every label has
    alike. Raises InputError for what the model does not know.
    """
    by_name = {v.name: v for v in variables}
    fixed = read_given(given, by_name)
    check_independent(independent, by_name, fixed)
    if labels and "label" not in by_name:
        raise InputError(f"--label {' '.join(labels)}: the model is not conditioned on label but "
                         f"on {', '.join(by_name)}")
    labels = list(labels or (by_name["label"].values if "label" in by_name else ("any",)))
    for place, label in enumerate(labels):
        if "label" in by_name:
            by_name["label"].encode(label, "--label")
            labels[place] = label = spelled(by_name["label"], label)
        if labels.count(label) > 1:
            raise InputError(f"--label {label}: named twice")
    counts = [len(range(place, sets * SET, len(labels))) if sets
              else per_label for place in range(len(labels))]
    told = [row for row in known
            if row.get("label") in by_name["label"].values] if independent else known
    alike = _alike([by_name[name] for name in independent], told, max(counts), seed)
    columns = []
    for place, (label, n) in enumerate(zip(labels, counts)):
        drawn = _of_label(label, n, variables, known, fixed,
                          seeded(seed, sum(counts[:place]), ROWS))
        columns.append([{**row, **cells} for row, cells in zip(drawn, alike)])
    # in turns: every set
    return numbered([columns[i % len(labels)][i // len(labels)] for i in range(sum(counts))], seed)


def plan_rows(path: str, variables: Sequence[var.Variable], seed: int = 0) -> list[Row]:
    """One image for each row of a CSV whose columns are conditions; `n` asks for several of a
    row.
    """
    rows = []
    for row in read_csv(path, [v.name for v in variables], ("n",)):
        n = row.get("n") or "1"
        if not n.isdecimal() or not 1 <= int(n) <= 1_000_000:
            raise InputError(f"{row['where']}: n {n!r} is not a number of images")
        for v in variables:
            _check(v, row.get(v.name, ""), row["where"])
        rows += [{"label": "any", **{v.name: spelled(v, row.get(v.name, "")) for v in variables}}
                 for _ in range(int(n))]
    return numbered(rows, seed)


def plan_origin(known: Sequence[Row], variables: Sequence[var.Variable], labels: Sequence[str],
                per_label: int, seed: int = 0) -> list[Row]:
    """Up to `per_label` real images of each label, evenly picked, to begin at; each keeps its own
    conditions.
    """
    rows = []
    for label in labels or sorted({row["label"] for row in known}):
        pool = [row for row in known if row["label"] == label]
        if not pool:
            there = ", ".join(sorted({row["label"] for row in known}))
            raise InputError(f"--label {label}: the images of --origin have {there}")
        for i in range(min(per_label, len(pool))):
            row = pool[i * len(pool) // min(per_label, len(pool))]
            cells = {v.name: row.get(v.name, "") for v in variables}
            for v in variables:
                _check(v, cells[v.name], row["file"])
            rows.append({"label": label, **{v.name: spelled(v, cells[v.name]) for v in variables},
                         "origin": row["file"]})
    return numbered(rows, seed)


def read_csv(path: str, names: Sequence[str], more: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV whose columns are among the names, once each; `where` names the line, for
    messages.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV: {error}") from None
    odd = sorted({name for name in header if name not in (*names, *more)})
    twice = sorted({name for name in header if header.count(name) > 1})
    if odd or twice or not lines:
        fault = f"no such condition: {', '.join(odd)}" if odd else f"two columns {twice[0]}" if twice else "no rows"
        raise InputError(f"{path}: {fault}; the model has {', '.join(names) or 'none'}")
    for place, cells in enumerate(lines, 2):
        if len(cells) != len(header):
            raise InputError(f"{path} line {place}: {len(cells)} cells under {len(header)} columns")
    return [dict(zip(header, cells), where=f"{path} line {place}")
            for place, cells in enumerate(lines, 2)]


def spelled(variable: var.Variable, cell: str) -> str:
    """A cell as the model spells it: female is F where the training rows say F."""
    if isinstance(variable, var.Category) and cell and not _is_null(variable, cell):
        return variable.decode(variable.encode(cell))
    return cell


def numbered(rows: Sequence[Row], seed: int) -> list[Row]:
    """Each row with its file name, set and seed; `images/<label>/000017.png` is seed + 17 of set
    1.
    """
    for row in rows:
        if Path(row["label"]).name != row["label"]:
            raise InputError(f"label {row['label']!r} cannot name a folder")
    return [{"file_name": f"images/{row['label']}/{i:06d}.png", "label": row["label"],
             "set": str(i // SET + 1), "seed": str(seed + i),
             **{k: v for k, v in row.items() if k != "label"}} for i, row in enumerate(rows)]


def read_given(given: Sequence[str], by_name: Mapping[str, var.Variable]) -> Row:
    """`name=value` items, each checked against the model."""
    fixed = {}
    for item in given:
        name, is_there, cell = item.partition("=")
        if not is_there or name == "label":
            raise InputError(f"--given {item}: " + ("choose labels by --label" if name == "label"
                                                    else "write name=value"))
        if name not in by_name:
            raise InputError(f"--given {name}={cell}: the model has no such condition; it has "
                             f"{', '.join(by_name)}")
        if fixed.get(name, cell) != cell:
            raise InputError(f"--given {name}={cell} contradicts --given {name}={fixed[name]}")
        for part in cell.split(":") if isinstance(by_name[name], var.Number) else [cell]:
            _check(by_name[name], part, "--given")
        if cell.count(":") > 1 and isinstance(by_name[name], var.Number):
            raise InputError(f"--given {item}: a range is low:high")
        fixed[name] = spelled(by_name[name], cell)
    return fixed


def check_independent(names: Sequence[str], by_name: Mapping[str, var.Variable],
                      fixed: Row) -> None:
    """Conditions that are to be independent of the label, each checked against the model and what
    is given.
    """
    for name in names:
        if name not in by_name or name == "label" or "label" not in by_name:
            others = ", ".join(other for other in by_name if other != "label") or "none"
            raise InputError(f"--independent {name}: " + (
                "the model is not conditioned on label" if "label" not in by_name else
                "label cannot be independent of itself" if name == "label" else
                f"the model has no such condition; it has {others}"))
        if name in fixed:
            raise InputError(f"--independent {name} contradicts --given {name}={fixed[name]}")
        if list(names).count(name) > 1:
            raise InputError(f"--independent {name}: named twice")


def encode(variables: Sequence[var.Variable], rows: Sequence[Row]) -> var.Labels:
    """Rows of a plan → labels, as `variables.encode`, with the cells that are null."""
    null = [[_is_null(v, row.get(v.name, "")) for v in variables] for row in rows]
    plain = [{**row, **{v.name: "" for v, drop in zip(variables, drops) if drop}}
             for row, drops in zip(rows, null)]
    return var.drop(variables, var.encode(variables, plain),
                    torch.tensor(null, dtype=torch.bool).view(len(rows), -1))


def outside(variables: Sequence[var.Variable], row: Row) -> list[str]:
    """Numbers of a row that lie outside what training saw."""
    cells = ((v, row.get(v.name, "")) for v in variables if isinstance(v, var.Number))
    return [v.name for v, cell in cells
            if cell not in ("", NULL) and not v.low <= v.encode(cell) <= v.high]


def _is_null(variable: var.Variable, cell: str) -> bool:
    return cell == NULL and NULL not in getattr(variable, "values", ())


def _check(variable: var.Variable, cell: str, where: str) -> None:
    if not _is_null(variable, cell):
        variable.encode(cell, where)


def _alike(variables: Sequence[var.Variable], known: Sequence[Row], n: int, seed: int) -> list[Row]:
    """The n joint cells of these variables that every label gets, from rows of all labels, each
    label weighing the same.
    """
    if not variables or not known:  # without a row, _of_label will say so
        return [{}] * n
    sizes = Counter(row["label"] for row in known)
    weights = [lcm(*sizes.values()) // sizes[row["label"]] for row in known]
    drawn = _drawn(known, n, variables, seeded(seed, ALIKE, ROWS), weights)
    return [{v.name: row.get(v.name, "") for v in variables} for _, row in drawn]


def _of_label(label: str, n: int, variables: Sequence[var.Variable], known: Sequence[Row],
              fixed: Row, generator: torch.Generator) -> list[Row]:
    pool = [row for row in known if row.get("label", label) == label]
    if not pool:
        raise InputError(f"label {label!r}: there is no real row of this label to draw conditions "
                         "from")
    rows = []
    for i, real in _drawn(pool, n, variables, generator, [1] * len(pool)):
        row = {"label": label, **{v.name: real.get(v.name, "") for v in variables}}
        for name, cell in fixed.items():
            low, between, high = cell.partition(":")
            row[name] = f"{float(low) + (i + 0.5) / n * (float(high) - float(low)):.6g}" if between else cell
        rows.append({**row, "label": label})
    return rows


def _drawn(pool: Sequence[Row], n: int, variables: Sequence[var.Variable],
           generator: torch.Generator, weights: Sequence[int]) -> list[tuple[int, Row]]:
    """A systematic sample of n rows by weight, sorted by these variables: each with its place in
    it, in random order.
    """
    coarse_first = sorted(variables, key=lambda v: list(var.KINDS.values()).index(type(v)))

    def place(k: int) -> list[tuple]:
        cells = [(v, pool[k].get(v.name, "")) for v in coarse_first]
        return [(cell == "", v.encode(cell) if cell else 0) for v, cell in cells]

    order = sorted(range(len(pool)), key=place)
    ends = list(accumulate(weights[k] for k in order))
    start = torch.rand((), generator=generator).item()
    return [(i, pool[order[bisect_right(ends, (i + start) * ends[-1] / n)]])
            for i in torch.randperm(n, generator=generator).tolist()]
