"""What is wrong with a data set, or only odd, before a model learns it: findings, in numbers and
places, no page.

A finding has a level:

    mend   what must not be: unreadable files, one patient or one film in two splits, one film under
           two labels. A study that goes on all the same is wrong
    look   what a person must judge: shortcuts, sources that go with the label, letters in the
           picture, odd shapes
    note   what is to be known, and written into the paper
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff.data.baselines import baselines, features
from minidiff.data.duplicates import SIDE, Pair, connected, near_duplicates
from minidiff.data.files import Facts, read_facts, typical_side
from minidiff.data.images import EXTENSIONS
from minidiff.data.split import SPLITS, Row, split_patients
from minidiff.data.table import Table
from minidiff.errors import InputError, count

COLUMNS = ("sex", "age", "view")   # that a classifier might know a label by
LEVELS = ("mend", "look", "note")
# share of a picture within 8 grey values: mostly constant; next to nothing else
CONSTANT, BLANK = 0.75, 0.999
# a size so many times the median, or a shape so many times less square, is odd
FAR = 4.0
# difference of labels in the share of empty cells from which emptiness tells the label
MISSING = 0.5
# share of one label, from which a source is its own; share of a label's images in such
PURE, ALONE = 0.8, 0.9
AGES = (0, 18, 40, 60, 80)         # years: bands of the tables; the first are children


def audit(table: Table, *, columns: Sequence[str] = COLUMNS,
          seed: int = 0) -> tuple[dict, list[Facts]]:
    """Everything found about the images of a table (read with split=False, check=False), and the
    facts of each file.

    The result is plain JSON: status ("go on", or "mend" if a finding of that level is there),
    findings, files, pairs, tables, baselines, histograms. Numbers of images are places in the
    table.
    """
    files = table.column("file")
    side = typical_side(files, SIDE)
    facts, squares = read_facts(files, side)
    good = [i for i, f in enumerate(facts) if not f.fault]
    if not good:
        raise InputError(f"none of {len(files)} images can be read, e.g. "
                         f"{facts[0].fault if facts else 'there are none'}")
    rows = [table.rows[i] for i in good]
    pairs = film_pairs(facts, squares)
    trivial = baselines(features([facts[i] for i in good], rows, columns),
                        [row["label"] for row in rows],
                        _groups(len(facts), pairs, table.rows)[good])
    found = [*unreadable(facts), *duplicates(pairs, table.rows, sharp=side == SIDE),
             *patients(table), *odd_files(table, facts), *confounding(rows, columns),
             *shortcuts(trivial), *letters(facts)]
    found.sort(key=lambda finding: LEVELS.index(finding["level"]))
    return {
        "status": "mend" if any(f["level"] == "mend" for f in found) else "go on",
        "images": len(files), "readable": len(good), "patients": len(set(table.column("patient"))),
        "patients_assumed": table.patients_assumed, "fingerprint": table.fingerprint,
        "findings": found, "notes": table.notes,
        "files": {name: dict(Counter(str(getattr(facts[i], name)) for i in good).most_common())
                  for name in ("format", "mode", "bits", "channels")}
        | {"size": _sizes([facts[i] for i in good])}, "pairs": pairs, "compared_at": side,
        "tables": tables(rows, columns), "missing": missing(rows), "baselines": trivial,
        "histograms": histograms(rows, [facts[i] for i in good]),
    }, facts


def check_pictures(rows: Sequence[Row], pictures: Iterable[Tensor]) -> None:
    """The fast form, for the start of training: raise InputError if one picture, however encoded,
    lies in two splits or under two labels.

    Compares what is trained on, uint8 (3,S,S) each, bit for bit; copies that differ are found by
    the audit only. Pictures of one grey are all alike and are not compared."""
    first: dict[bytes, Row] = {}
    for row, picture in zip(rows, pictures):
        # grey beside data in colour has three channels
        picture = picture[:1] if (picture == picture[:1]).all() else picture
        key = hashlib.sha256(picture.contiguous().numpy().tobytes()).digest()
        other = row if picture.min() == picture.max() else first.setdefault(key, row)
        for column, what in (("split", "splits"), ("label", "labels")):
            if other[column] != row[column]:
                raise InputError(f"one picture has two {what}: {other['file']} is "
                                 f"{other[column] or 'without'}, {row['file']} is "
                                 f"{row[column] or 'without'}; evaluate.py audit looks for more")


def film_pairs(facts: Sequence[Facts], squares: np.ndarray) -> list[Pair]:
    """Pairs that show one film, the nearest first: distance 0 if all pixels are equal, next to 0
    for altered copies.
    """
    usable = [i for i, f in enumerate(facts) if not f.fault and f.constant < BLANK]
    pictures = torch.from_numpy(squares if len(usable) == len(facts) else squares[usable])[:, None]
    near = {(usable[i], usable[j]): d for i, j, d in near_duplicates(pictures)}
    first: dict[str, int] = {}
    equal = {(first[facts[i].pixels], i): 0.0 for i in usable
             if first.setdefault(facts[i].pixels, i) != i}
    return sorted(((i, j, d) for (i, j), d in (near | equal).items()),
                  key=lambda pair: (pair[2], pair))


def finding(kind: str, level: str, text: str, images: Iterable[int] = (),
            pairs: Iterable[Pair] = ()) -> dict:
    return {"kind": kind, "level": level, "text": text, "images": list(images),
            "pairs": [list(p) for p in pairs]}


def unreadable(facts: Sequence[Facts]) -> list[dict]:
    bad = [i for i, f in enumerate(facts) if f.fault]
    blank = [i for i, f in enumerate(facts) if not f.fault and f.constant >= BLANK]
    plain = [i for i, f in enumerate(facts) if CONSTANT <= f.constant < BLANK]
    some = "; ".join(facts[i].fault for i in bad[:5]) + ("; …" if len(bad) > 5 else "")
    found = [finding("unreadable", "mend", f"{len(bad)} of {len(facts)} files cannot be read: "
                     f"{some}", bad), finding("blank", "mend", f"{count(len(blank), 'image')} of "
                                              f"one grey throughout", blank),
             finding("mostly constant", "look", f"{count(len(plain), 'image')} with {CONSTANT:.0%} "
                     f"or more of the area within 8 grey values", plain)]
    return [f for f in found if f["images"]]


def duplicates(pairs: Sequence[Pair], rows: Sequence[Row], *, sharp: bool = True) -> list[dict]:
    """One film twice: across splits, patients, or only so; and under two labels. Pictures of fewer
    than 96 px have too little detail to be sure of an altered copy: unless `sharp`, nothing but
    equal pixels must be mended."""
    def differ(column: str, i: int, j: int) -> bool:
        return rows[i].get(column, "") != rows[j].get(column, "")

    def tell(pair: Pair) -> str:
        return " = ".join(f"{rows[k]['file_name']} ({rows[k]['source']}, "
                          f"{rows[k]['split'] or 'no split'}, {rows[k]['label']}, "
                          f"{rows[k]['patient']})" for k in pair[:2])

    kinds: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        i, j, distance = pair
        own = [("film across splits", "mend", "one film in two splits") if differ("split", i, j)
               else ("film of two patients", "look", "one film under two patients, maybe one")
               if differ("patient", i, j)
               else ("duplicate", "note", "one film twice, same patient, same split")]
        own += [("label conflict", "mend", "one film under two labels")] if differ("label", i,
                                                                                   j) else []
        for kind, level, what in own:
            if distance > 0 and not sharp and level == "mend":
                kinds[f"perhaps a {kind}", "look", f"{what}, if pictures of so few px can "
                      f"tell"].append(pair)
            else:
                kinds[kind, level, what].append(pair)
    return [finding(kind, level, f"{what}: {len(some)} pair(s), {sum(d == 0 for *_, d in some)} "
                    "equal in every "
                    f"pixel: " + "; ".join(map(tell, some[:3])) + ("; …" if len(some) > 3 else ""),
                    pairs=some) for (kind, level, what), some in kinds.items()]


def patients(table: Table) -> list[dict]:
    """Patients in two splits, with two labels, or unknown."""
    images = defaultdict(list)
    for i, row in enumerate(table.rows):
        images[row["patient"]].append(i)

    def several(column: str) -> dict[str, list[int]]:
        return {p: own for p, own in images.items()
                if len({table.rows[i][column] for i in own}) > 1}

    found, across, labels = [], several("split"), several("label")
    if across:
        some = ", ".join(f"{p} "
                         f"({', '.join(sorted({table.rows[i]['split'] or 'none' for i in own}))})"
                         for p, own in list(across.items())[:5])
        found.append(finding("patient across splits", "mend", f"{len(across)} patient(s) in two "
                             f"splits: {some}", [i for own in across.values() for i in own]))
    if labels:
        found.append(finding("patient with two labels", "note", f"{len(labels)} patient(s) have "
                             "images of two labels, as in the course of a disease, or by mistake: "
                             f"{', '.join(list(labels)[:5])}",
                             [i for own in labels.values() for i in own]))
    if table.patients_assumed:
        found.append(finding("patients unknown", "look", "no patient ids in some folder: each "
                             "image counts as a patient, and images of one patient may lie on both "
                             "sides of a split"))
    most = max(map(len, images.values()))
    if most > 1:
        found.append(finding("images per patient", "note", f"{len(images)} patients with 1 to "
                             f"{most} images, {sum(len(own) > 1 for own in images.values())} with "
                             "more than one"))
    return found


def odd_files(table: Table, facts: Sequence[Facts]) -> list[dict]:
    """What differs from the rest in kind: depth, mode, size, shape, name; what carries text; what
    no reader looks at.
    """
    good = [i for i, f in enumerate(facts) if not f.fault]
    area = np.array([facts[i].width * facts[i].height for i in good]) ** 0.5
    shape = np.array([abs(np.log(facts[i].width / facts[i].height)) for i in good])
    middle, common = np.median(area), Counter(facts[i].mode for i in good).most_common(1)[0][0]
    suffixes = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg")}
    groups = {
        ("size", "look", f"of a size beyond {FAR:g} times the median of {middle:.0f} "
         f"px"): [i for i, a in zip(good, area) if not 1 / FAR <= a / middle <= FAR],
        ("shape", "look", "more than twice as wide as high, or as high as "
         "wide"): [i for i, s in zip(good, shape) if s > np.log(2)],
        ("mode", "note", f"of another mode than {common}, the most "
         f"frequent"): [i for i in good if facts[i].mode != common],
        ("colour", "look",
         "in colour, which no radiograph is"): [i for i in good if facts[i].channels > 1],
        ("rotated by EXIF", "note", "turned upright by their EXIF, as our reader does and others "
         "do not"): [i for i in good if facts[i].turned],
        ("carries text", "look", "with EXIF or text beside the picture, in which names may stand "
         "(our reader drops it)"): [i for i in good if facts[i].carries],
        ("name", "note", "whose name ends as another format's"):
        [i for i in good
         if not table.rows[i]["file"].lower().endswith(suffixes.get(facts[i].format, ""))],
    }
    found = [finding(kind, level, f"{count(len(some), 'image')} {text}", some)
             for (kind, level, text), some in groups.items() if some]
    folders = sorted({str(Path(file).parent) for file in table.column("file")})
    strays = Counter(Path(name).suffix.lower() or "no ending" for folder in folders
                     for name in os.listdir(folder) if not (Path(folder) / name).is_dir()
                     and Path(name).suffix.lower() not in (*EXTENSIONS, ".csv"))
    if strays:
        kinds = ", ".join(f"{suffix} {n}" for suffix, n in sorted(strays.items()))
        found.append(finding("other files", "note",
                             f"beside the images lie files that are not read: {kinds}"))
    return found


def confounding(rows: Sequence[Row], columns: Sequence[str]) -> list[dict]:
    """Labels that come from sources of their own, and columns whose emptiness tells the label."""
    by_label, found = defaultdict(list), []
    for row in rows:
        by_label[row["label"]].append(row)
    if len(by_label) < 2:
        return []
    sizes = Counter(row["source"] for row in rows)
    for label, own in by_label.items():
        counts = Counter(row["source"] for row in own)
        at_least = max(PURE, len(own) / len(rows) + 0.2)  # and more than the label has over all
        pure = sorted(s for s in counts if counts[s] >= at_least * sizes[s])
        alone = sum(counts[s] for s in pure)
        if alone >= ALONE * len(own):
            found.append(finding("confounded", "look", f"CONFOUNDED: {alone} of {len(own)} images "
                                 f"of {label} come from sources that hold little else "
                                 f"({', '.join(pure)}), so that the hospital tells the label"))
    for name in columns:
        empty = {label: sum(not row.get(name) for row in own) / len(own)
                 for label, own in by_label.items()}
        if max(empty.values()) - min(empty.values()) >= MISSING:
            shares = ", ".join(f"{label} {share:.0%}" for label, share in empty.items())
            found.append(finding("missing by label", "look",
                                 f"whether {name} is known goes with the label; empty in {shares}"))
    young = {label: (sum(0 <= a < AGES[1] for a in ages), len(ages))
             for label, own in by_label.items()
             if (ages := [a for row in own if (a := _age(row)) is not None])}
    if any(k for k, _ in young.values()):
        some = ", ".join(f"{label} {k} of {n} of known age" for label, (k, n) in young.items())
        found.append(finding("children", "look", f"patients under 18: {some}"))
    return found


def shortcuts(trivial: Sequence[dict]) -> list[dict]:
    return [finding("shortcut", "look", f"SHORTCUT: the {b['features']} alone tells {b['label']} "
                    f"from the rest with AUROC {b['auroc']:.3f} ({b['low']:.3f} to "
                    f"{b['high']:.3f}; n = {b['n']} and {b['n_rest']})")
            for b in trivial if b["shortcut"]]


def letters(facts: Sequence[Facts]) -> list[dict]:
    some = [i for i, f in enumerate(facts) if f.text]
    return [finding("burned-in text", "look", f"{count(len(some), 'image')} with what seem to be "
                    "letters in the picture; look whether any names a "
                    f"person", some)] if some else []


def tables(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """For split, source and each column: value → label → images; "" is unknown, an age is its
    band.
    """
    found = {name: defaultdict(Counter) for name in ("split", "source", *columns, "all at once")}
    for row in rows:
        cells = {name: age_band(row) if name == "age"
                 else row.get(name, "") for name in ("split", "source", *columns)}
        cells["all at once"] = " · ".join([row["source"],
                                           *(cells[name] or "?" for name in columns)])
        for name, cell in cells.items():
            found[name][cell][row["label"]] += 1
    return {name: {value: dict(counts) for value, counts in sorted(cells.items())}
            for name, cells in found.items()}


def missing(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Column → label → share of empty cells, of columns that have any."""
    labels = sorted({row["label"] for row in rows})
    names = [k for k in dict.fromkeys(k for row in rows for k in row)
             if k not in ("file", "where", "file_name", "label")]
    found = {
        name: {label: float(np.mean([not row.get(name) for row in rows if row["label"] == label]))
               for label in labels} for name in names}
    return {name: shares for name, shares in found.items() if any(shares.values())}


def histograms(rows: Sequence[Row], facts: Sequence[Facts]) -> dict[str, list[float]]:
    """Source → mean histogram of greys, 64 bins."""
    groups = defaultdict(list)
    for row, f in zip(rows, facts):
        groups[row["source"]].append(f.histogram)
    return {source: np.mean(some, 0).tolist() for source, some in sorted(groups.items())}


def new_split(table: Table, pairs: Sequence[Pair], seed: int) -> dict[str, str]:
    """Patient → split, for a table without splits: patients who share a film, altered or not, stay
    together.
    """
    film = connected(len(table), [(i, j) for i, j, _ in pairs])
    return split_patients(table.rows, {row["file"]: str(f) for row, f in zip(table.rows, film)},
                          seed)


def mended(table: Table, pairs: Sequence[Pair]) -> list[Row]:
    """The rows of a table that brings splits, without leaks: what belongs together by patient or
    film goes to one split.

    To "train" if it lay in several of train, val and test, for a held-out image must be new; what
    shares a patient or film with another split ("external") is "left-out", and so is a film under
    two labels.
    """
    group, rows = _groups(len(table), pairs, table.rows), []
    splits: dict[int, set[str]] = defaultdict(set)
    for g, row in zip(group, table.rows):
        splits[g].add(row["split"])
    conflict = {k for i, j, _ in pairs
                if table.rows[i]["label"] != table.rows[j]["label"] for k in (i, j)}
    for i, (g, row) in enumerate(zip(group, table.rows)):
        split = row["split"]
        if len(splits[g]) > 1:
            split = "train" if splits[g] <= set(
                SPLITS) else split if split not in SPLITS else "left-out"
        rows.append({**row, "split": "left-out" if i in conflict else split})
    return rows


def _groups(n: int, pairs: Sequence[Pair], rows: Sequence[Row]) -> np.ndarray:
    """What belongs together, by patient or by film: the number of each image's group."""
    first: dict[str, int] = {}
    same = [(first.setdefault(row["patient"], i), i) for i, row in enumerate(rows)]
    return connected(n, [*((i, j) for i, j, _ in pairs), *same])


def _sizes(facts: Sequence[Facts]) -> Mapping[str, int]:
    sides = np.array([[f.width, f.height] for f in facts])
    return {"shorter side, least": int(sides.min()),
            "shorter side, median": int(np.median(sides.min(1))),
            "longer side, most": int(sides.max()),
            "different shapes": len({tuple(s) for s in sides.tolist()}),
            "square": int((sides[:, 0] == sides[:, 1]).sum())}


def _age(row: Row) -> float | None:
    try:
        return float(row.get("age", ""))
    except ValueError:
        return None


def age_band(row: Row) -> str:
    age = _age(row)
    if age is None or not age >= 0:
        return ""
    low = max(a for a in AGES if a <= age)
    high = next((a - 1 for a in AGES if a > low), None)
    return f"{low}–{high}" if high else f"{low}+"
