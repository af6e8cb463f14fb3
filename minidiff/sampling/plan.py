"""What to make: a row for each image, decided before the first one is made.

A row is file name, label, set, seed and conditions. A cell is the text of a value, "" for unknown,
or `null` for a condition that is dropped; a dropped label is `any`. Conditions that are drawn are
those of one real row of the same label, unknown cells included. The draw is a systematic sample:
rows are sorted by their conditions, and every (rows / images)th is taken from a random start. So
synthetic patients have the joint distribution of age, sex and view of the real ones, without the
luck of independent draws (which gave 60 of 100 AP where training has 53).

Findings, of which an image may have several, are drawn as whole cells, Edema|Effusion, as often as
the real rows have them, or balanced (`balance.turns`). A combination that no real row has may be
asked for by name; its other conditions are drawn from all rows.

Conditions that are to be independent of the label are drawn from the rows of all labels, each label
weighing the same, and every label gets the same list of them: in the set that is made, the label
tells nothing about source, view or age.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from math import lcm

import torch

from minidiff import cells
from minidiff import variables as var
from minidiff.balance import turns
from minidiff.counted import ROWS, seeded
from minidiff.data.dialects import read_lines
from minidiff.errors import InputError
from minidiff.names import folders, rejoined, text

Row = dict[str, str]
SET = 100       # images a set, each with its contact sheet
NULL = "null"   # a cell that is dropped, as for guidance
RETRY = 10**9   # seeds from one attempt at an image to the next: no image of any set has them
SHARED = -1     # slot of the draw that all labels share; their own count from 0
DRAWN = ""      # in place of a label: findings are drawn, too


def plan(variables: Sequence[var.Variable], known: Sequence[Row], *,
         like: Sequence[Row] | None = None, labels: Sequence[str] = (), per_label: int = SET,
         sets: int = 0, given: Sequence[str] = (), independent: Sequence[str] = (),
         balance: float = 0.0, seed: int = 0) -> list[Row]:
    """Rows for `per_label` images of each label, or for `sets` of 100; every set holds all labels.
    Where labels are findings and none are named, `per_label` times their number are drawn together.

    known: the model's training rows; conditions are drawn from them, or from `like`. given:
    `name=value`, `name=low:high` (spread evenly), `name=` (unknown) or `name=null`. independent:
    names of conditions that every label has alike. Raises InputError for what the model does not
    know.
    """
    by_name = {v.name: v for v in variables}
    fixed = read_given(given, by_name)
    check_independent(independent, by_name, fixed)
    several = "label" in by_name and not by_name["label"].exclusive
    if balance and (labels or not several):
        raise InputError(f"--balance {balance:g}: it is for findings that are drawn, and "
                         + ("--label names them" if several else "labels that exclude each other "
                            "get --per-label images each"))
    labels, like = _labels(labels, by_name, known), known if like is None else like
    k, each = len(labels), per_label * (len(by_name["label"].values) if labels == [DRAWN] else 1)
    if several:  # as of labels that exclude each other, rows that the model cannot say are left out
        of_row = {row["label"]: _code(by_name["label"], row["label"]) for row in like}
        like = [row for row in like if of_row[row["label"]] is not None]
    counts = [len(range(place, sets * SET, k)) if sets else each for place in range(k)]
    pool = [row for row in like
            if not independent or several or row.get("label") in by_name["label"].values]
    shared = _shared([by_name[name] for name in independent], pool, max(counts), several, seed)
    columns = []
    for place, (label, n) in enumerate(zip(labels, counts)):
        pool = [row for row in like if "label" not in by_name or label == DRAWN
                or row.get("label", label) == label
                or several and of_row[row["label"]] == by_name["label"].encode(label)]
        pool = pool or (list(like) if several else [])
        own = _of_label(label, n, variables, pool, fixed, seeded(seed, sum(counts[:place]), ROWS),
                        balance)
        columns.append([row | cells for row, cells in zip(own, shared)])
    return numbered([columns[i % k][i // k] for i in range(sum(counts))], seed)


def plan_rows(path: str, variables: Sequence[var.Variable], known: Sequence[Row],
              seed: int = 0) -> list[Row]:
    """An image for each row of a CSV whose columns are conditions; `n` asks for several of one."""
    rows, alone = [], {"label": untold(known)}
    for row in read_csv(path, [v.name for v in variables], ("n",)):
        n = row.get("n") or "1"
        if not n.isdecimal() or not 1 <= int(n) <= 1_000_000:
            raise InputError(f"{row['where']}: n {n!r} is not a number of images")
        row |= {"label": row.get("label") or var.ANY}  # never unknown: dropped, as in training
        rows += [alone | _spelled(variables, row, row["where"])] * int(n)
    return numbered(rows, seed)


def plan_origin(known: Sequence[Row], variables: Sequence[var.Variable], labels: Sequence[str],
                per_label: int, seed: int = 0,
                edit: Callable[[Row], Row | None] | None = None) -> list[Row]:
    """Up to `per_label` real images of each label to begin at, with their own conditions, or with
    those that `edit` makes of them; None leaves one out."""
    def begun(row: Row) -> Row:
        return {"label": row["label"], **_spelled(variables, row, row["file"]),
                "origin": text(row["file"])}

    rows, there = [], sorted({row["label"] for row in known})
    for label in rejoined(labels, there.__contains__) or there:
        pool = [row for row in known if row["label"] == label]
        if not pool:
            raise InputError(f"--label {label}: the images of --origin have {', '.join(there)}")
        if edit:
            pool = [row for row in map(edit, map(begun, pool)) if row]
        n = min(per_label, len(pool))
        picked = [pool[i * len(pool) // n] for i in range(n)]
        rows += picked if edit else map(begun, picked)
    return numbered(rows, seed)


def read_csv(path: str, names: Sequence[str], more: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV with columns among these names; `where` is the line, for error messages."""
    header, lines = read_lines(path)
    faults = [f"no such condition: {name}" for name in sorted({*header} - {*names, *more})]
    faults += [f"two columns {name}" for name, n in Counter(header).items() if n > 1]
    faults += [] if lines else ["no rows"]
    if faults:
        raise InputError(f"{path}: {faults[0]}; the model has {', '.join(names) or 'none'}")
    return [dict(zip(header, cells), where=f"{path} line {number}") for number, cells in lines]


def numbered(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows with file name, set and seed: `images/<label>/000017.png` is seed + 17, of set 1; of a
    label that cannot name a folder see `names`."""
    folder = folders(row["label"] for row in rows)
    return [{"file_name": f"images/{folder[row['label']]}/{i:06d}.png", "label": row["label"],
             "set": str(i // SET + 1), "seed": str(seed + i),
             **{k: v for k, v in row.items() if k != "label"}} for i, row in enumerate(rows)]


def read_given(given: Sequence[str], by_name: Mapping[str, var.Variable]) -> Row:
    """`name=value` items, each checked against the model."""
    fixed = {}
    for item in given:
        name, equals, cell = item.partition("=")
        if name == "label" or not equals:
            raise InputError(f"--given {item}: write name=value; labels are chosen by --label")
        _require_known(f"--given {item}", name, by_name)
        if fixed.get(name, cell) != cell:
            raise InputError(f"--given {item} contradicts --given {name}={fixed[name]}")
        ends = [cell] if by_name[name].values else cell.split(":")
        for end in ends:
            _check(by_name[name], end, "--given")
        if len(ends) > 2 or (len(ends) == 2 and {"", NULL} & set(ends)):
            raise InputError(f"--given {item}: a range is low:high, two numbers")
        fixed[name] = spelled(by_name[name], cell)
    return fixed


def check_independent(names: Sequence[str], by_name: Mapping[str, var.Variable],
                      fixed: Row) -> None:
    """Refuse conditions that cannot be made independent of the label."""
    if names and "label" not in by_name:
        raise InputError(f"--independent {names[0]}: the model is not conditioned on label")
    for name in names:
        flag = f"--independent {name}"
        if name == "label":
            raise InputError(f"{flag}: label cannot be independent of itself")
        _require_known(flag, name, {n: v for n, v in by_name.items() if n != "label"})
        if name in fixed:
            raise InputError(f"{flag} contradicts --given {name}={fixed[name]}")
        if list(names).count(name) > 1:
            raise InputError(f"{flag}: named twice")


def encode(variables: Sequence[var.Variable], rows: Sequence[Row]) -> var.Labels:
    """Rows of a plan → labels, as `variables.encode`, with the cells that are null."""
    null = [[_is_null(v, row.get(v.name, "")) for v in variables] for row in rows]
    plain = [row | {v.name: "" for v, drop in zip(variables, drops) if drop}
             for row, drops in zip(rows, null)]
    mask = torch.tensor(null, dtype=torch.bool).view(len(rows), len(variables))
    return var.drop(variables, var.encode(variables, plain), mask)


def in_windows(rows: Sequence[Row], windows: Mapping[str, str]) -> list[Row]:
    """Rows with the window of their modality, or of their label, that is of all training images."""
    common = next(iter(windows.values())) if len({*windows.values()}) == 1 else ""
    known = [windows.get(row.get("modality"), windows.get(row.get("label"), common))
             for row in rows]
    return [{**row, **({"window": window} if window else {})} for row, window in zip(rows, known)]


def outside(variables: Sequence[var.Variable], row: Row) -> list[str]:
    """Numbers of a row that lie outside what training saw."""
    asked = ((v, row.get(v.name, "")) for v in variables if not v.values)
    return [v.name for v, cell in asked
            if cell not in ("", NULL) and not v.low <= v.encode(cell) <= v.high]


def spelled(variable: var.Variable, cell: str) -> str:
    """A cell as the model spells it: female is F where the training rows say F, and 060Y is 60."""
    if _is_null(variable, cell):
        return var.ANY if variable.name == "label" else NULL
    if not cell:
        return cell
    if not variable.exclusive:
        return cells.listed(variable.name, (*variable.values, cell)).get(cell, cell)
    if variable.values:
        return variable.values[variable.encode(cell)]
    return ":".join(end if cells.PLAIN.fullmatch(end) else f"{variable.encode(end):.6g}"
                    for end in cell.split(":")).replace("nan", "")


def _spelled(variables: Sequence[var.Variable], row: Row, where: str) -> Row:
    """All conditions of a row, each checked against the model."""
    for v in variables:
        _check(v, row.get(v.name, ""), where)
    return {v.name: spelled(v, row.get(v.name, "")) for v in variables}


def untold(known: Sequence[Row]) -> str:
    """The label of what a model makes that is told none: that of all its training rows, or "any".
    """
    labels = {row.get("label", var.ANY) for row in known}
    return labels.pop() if len(labels) == 1 else var.ANY


def _labels(labels: Sequence[str], by_name: Mapping[str, var.Variable],
            known: Sequence[Row]) -> list[str]:
    """The labels to make, as the model spells them."""
    if "label" not in by_name:
        alone = untold(known)
        if {*labels} - {alone}:
            raise InputError(f"--label {' '.join(labels)}: the model is not conditioned on label; "
                             f"all that it makes is {alone}")
        return [alone]
    variable = by_name["label"]
    labels = rejoined(labels, variable.values.__contains__)
    codes = var.encode([variable], [{"label": label, "where": "--label"} for label in labels])
    if not variable.exclusive:  # Effusion|Edema as the rows have it, Edema|Effusion
        cells = {row["label"]: variable.encode(row["label"]) for row in known}
        first = {code: cell for cell, code in reversed(cells.items())}
        labels = [first.get(code, spelled(variable, label)) for label, code in zip(
            labels, codes["label"].tolist())] or [DRAWN]
    chosen = ([spelled(variable, label) for label in labels or variable.values]
              if variable.exclusive else labels)
    if len({variable.encode(label) if label else label for label in chosen}) < len(chosen):
        raise InputError(f"--label {' '.join(chosen)}: one is named twice")
    return chosen


def _code(variable: var.Variable, cell: str) -> int | None:
    """A cell's code; None of one that the model cannot say."""
    try:
        return variable.encode(cell)
    except InputError:
        return None


def _require_known(flag: str, name: str, variables: Mapping[str, var.Variable]) -> None:
    if name not in variables:
        raise InputError(f"{flag}: the model has no such condition; it has "
                         f"{', '.join(variables) or 'none'}")


def _is_null(variable: var.Variable, cell: str) -> bool:
    return cell in (NULL, var.ANY) and cell not in variable.values


def _check(variable: var.Variable, cell: str, where: str) -> None:
    if not _is_null(variable, cell):
        variable.encode(cell, where)


def _shared(variables: Sequence[var.Variable], known: Sequence[Row], n: int, several: bool,
            seed: int) -> list[Row]:
    """The n joint cells that all labels get, from rows of all labels, each label weighing alike, or
    each row where labels are several findings."""
    if not variables or not known:  # without a row, _of_label will say so
        return [{}] * n
    sizes = Counter(row["label"] for row in known)
    weights = [1 if several else lcm(*sizes.values()) // sizes[row["label"]] for row in known]
    drawn = _systematic(known, n, variables, seeded(seed, SHARED, ROWS), weights)
    return [{v.name: row.get(v.name, "") for v in variables} for _, row in drawn]


def _of_label(asked: str, n: int, variables: Sequence[var.Variable], pool: Sequence[Row],
              fixed: Row, generator: torch.Generator, balance: float = 0.0) -> list[Row]:
    """n rows of one label, or of all that are drawn, with what is fixed in place of what was
    drawn."""
    if not pool:
        raise InputError(f"label {asked!r}: there is no real row of this label to draw conditions "
                         "from")
    ranges = [v.name for v in variables if not v.values and ":" in fixed.get(v.name, "")]
    sizes = Counter(row.get("label", "") for row in pool)
    due = turns(sizes, balance, True) if balance else sizes
    weights = [due[row.get("label", "")] / sizes[row.get("label", "")] for row in pool]
    rows = []
    for i, real in _systematic(pool, n, variables, generator, weights):
        label = asked or real["label"]
        row = {"label": label, **{v.name: real.get(v.name, "") for v in variables}, **fixed}
        for name in ranges:
            low, high = map(float, fixed[name].split(":"))
            row[name] = f"{low + (i + 0.5) / n * (high - low):.6g}"
        rows.append({**row, "label": label})
    return rows


def _systematic(pool: Sequence[Row], n: int, variables: Sequence[var.Variable],
                generator: torch.Generator, weights: Sequence[float]) -> list[tuple[int, Row]]:
    """n rows sampled by weight along their order by these variables: (place, row), shuffled."""
    coarse_first = sorted(variables, key=lambda v: list(var.KINDS).index(v.kind))

    def place(k: int) -> list[tuple]:
        cells = [(v, pool[k].get(v.name, "")) for v in coarse_first]
        return [(cell == "", v.encode(cell) if cell else 0) for v, cell in cells]

    order = sorted(range(len(pool)), key=place)
    ends = list(accumulate(weights[k] for k in order))
    start = torch.rand((), generator=generator).item()
    return [(i, pool[order[bisect_right(ends, (i + start) * ends[-1] / n)]])
            for i in torch.randperm(n, generator=generator).tolist()]
