"""What is wrong with a data set, or only odd, before a model learns from it: findings as JSON.

A finding has a level:

    error    must be repaired: unreadable files, one patient or copies of one image in two splits,
             copies of one image under two labels; figures measured on such data are wrong
    warning  a person must judge: shortcuts, sources that go with the label, letters in the image
    info     to be known, and reported in a paper
"""

import bisect
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from minidiff.cells import to_number
from minidiff.data.baselines import baselines, features
from minidiff.data.dialects import ADDED
from minidiff.data.dialects import ENDINGS as TABLES
from minidiff.data.duplicates import SIDE, Pair, near_duplicates, only
from minidiff.data.files import Facts, read_facts, typical_side
from minidiff.data.folders import Left, image_files
from minidiff.data.images import ENDINGS, EXTENSIONS
from minidiff.data.split import Row, equal_pairs, group_images
from minidiff.data.table import Table
from minidiff.errors import InputError, count, first_few
from minidiff.runs import json_key
from minidiff.variables import labels_in

COLUMNS = ("sex", "age", "view")  # from which a classifier might predict the label
LEVELS = ("error", "warning", "info")
CONSTANT, BLANK = 0.75, 0.999     # share of an image within 8 grey values: mostly, wholly constant
FAR = 4.0                         # a size so many times the median, or so many times less, is odd
MISSING = 0.5                     # difference of labels in their share of empty cells
PURE, ALONE = 0.8, 0.9            # share of a source that is one label; of a label in such sources
AGES = (0, 18, 40, 60, 80)        # years: bands of the tables; the first are children
COPIES = {                        # kind: level, text
    "copy across splits": ("error", "one image in two splits"),
    "copy across patients": ("warning", "one image under two patients, who may be one"),
    "duplicate": ("info", "one image twice, same patient, same split"),
    "label conflict": ("error", "one image under two labels"),
}


def audit(table: Table, *, columns: Sequence[str] = COLUMNS,
          folder: Path | None = None) -> tuple[dict, list[Facts]]:
    """Everything found about the images of a table (read with split=False, check=False), and the
    facts of each file, which are kept in `folder` meanwhile.

    The result is plain JSON: status ("ok", or "error" if there is a finding of that level),
    findings, files, pairs, tables, baselines, histograms. Images are given by place in the table.
    """
    files = table.column("file")
    side = typical_side(files, SIDE)
    key = hashlib.sha256(json_key(files=files, digests=table.digests).encode()).hexdigest()
    facts, squares = read_facts(files, side, folder and folder / key)
    good = [i for i, f in enumerate(facts) if not f.fault]
    if not good:
        raise InputError(f"none of {len(files)} images can be read, e.g. "
                         f"{facts[0].fault if facts else 'there are none'}")
    rows, known = [table.rows[i] for i in good], [facts[i] for i in good]
    pairs = copies(facts, squares)
    trivial = baselines(features(known, rows, columns), [row["label"] for row in rows],
                        group_images(table.rows, [pair[:2] for pair in pairs])[good])
    empty = missing(rows)
    findings = [*odd_images(files, facts), *other_files(files),
                *copied(pairs, table.rows, certain=side == SIDE), *patients(table),
                *(finding(*remark) for remark in table.remarks), *confounded(rows),
                *missing_by_label(empty, columns), *children(rows), *shortcuts(trivial)]
    findings.sort(key=lambda finding: LEVELS.index(finding["level"]))
    return {
        "status": "error" if any(f["level"] == "error" for f in findings) else "ok",
        "images": len(files), "readable": len(good), "patients": len(set(table.column("patient"))),
        "patients_assumed": table.patients_assumed, "fingerprint": table.fingerprint,
        "findings": findings, "notes": table.notes,
        "files": {name: dict(Counter(str(getattr(f, name)) for f in known).most_common())
                  for name in ("format", "mode", "bits", "channels")} | {"size": sizes(known)},
        "pairs": pairs, "compared_at": side, "tables": tables(rows, columns),
        "missing": empty, "baselines": trivial, "histograms": histograms(rows, known),
    }, facts


def copies(facts: Sequence[Facts], squares: np.ndarray) -> list[Pair]:
    """Pairs of copies, the nearest first: distance 0 if all pixels are equal, near 0 if altered.

    The squares are sorted on the way, for they are large."""
    usable = [i for i, f in enumerate(facts) if not f.fault and f.constant < BLANK]
    altered = near_duplicates(torch.from_numpy(only(squares, usable))[:, None])
    found = {(usable[i], usable[j]): distance for i, j, distance in altered}
    found |= {(usable[i], usable[j]): 0.0
              for i, j in equal_pairs(facts[k].pixels for k in usable)}
    return sorted(((i, j, distance) for (i, j), distance in found.items()),
                  key=lambda pair: (pair[2], pair))


# --- findings


def finding(kind: str, level: str, text: str, images: Iterable[int] = (),
            pairs: Iterable[Pair] = ()) -> dict:
    return {"kind": kind, "level": level, "text": text, "images": list(images),
            "pairs": [list(p) for p in pairs]}


def odd_images(files: Sequence[str], facts: Sequence[Facts]) -> list[dict]:
    """Images that cannot be read, and those that differ in kind from the rest."""
    good = [f for f in facts if not f.fault]
    median = np.median([(f.width * f.height) ** 0.5 for f in good])
    mode = Counter(f.mode for f in good).most_common(1)[0][0]
    faults = first_few((f.fault for f in facts if f.fault), 5, "; ")
    checks = {  # kind: level, text, which of the readable images
        "blank": ("error", "of one grey throughout", lambda f, _: f.constant >= BLANK),
        "mostly constant": ("warning",
                            f"with {CONSTANT:.0%} or more of the area within 8 grey values",
                            lambda f, _: CONSTANT <= f.constant < BLANK),
        "size": ("warning", f"of a size beyond {FAR:g} times the median of {median:.0f} px",
                 lambda f, _: not 1 / FAR <= (f.width * f.height) ** 0.5 / median <= FAR),
        "shape": ("warning", "more than twice as wide as high, or as high as wide",
                  lambda f, _: max(f.width, f.height) > 2 * min(f.width, f.height)),
        "colour": ("warning", "in colour, which no radiograph is", lambda f, _: f.channels > 1),
        "carries text": ("warning", "with EXIF or text beside the pixels, which may hold names "
                         "(minidiff drops it)", lambda f, _: f.carries),
        "burned-in text": ("warning", "with what seem to be letters in the image; look whether "
                           "any names a person", lambda f, _: f.text),
        "outliers": ("info", "of more than 8 bits, with a few values far beyond the rest, as of a "
                     "hot pixel; minidiff scales greys without them, others may see black",
                     lambda f, _: f.outliers),
        "mode": ("info", f"of another mode than {mode}, the most frequent",
                 lambda f, _: f.mode != mode),
        "rotated by EXIF": ("info", "turned upright by EXIF, as minidiff does and others do not",
                            lambda f, _: f.turned),
        "name": ("info", "whose name has the ending of another format",
                 lambda f, file: not file.lower().endswith(ENDINGS.get(f.format, ""))),
    }
    found = [finding("unreadable", "error", f"{len(facts) - len(good)} of {len(facts)} files "
                     f"cannot be read: {faults}", [i for i, f in enumerate(facts) if f.fault])]
    for kind, (level, text, is_odd) in checks.items():
        odd = [i for i, f in enumerate(facts) if not f.fault and is_odd(f, files[i])]
        found.append(finding(kind, level, f"{count(len(odd), 'image')} {text}", odd))
    return [f for f in found if f["images"]]


def other_files(files: Sequence[str]) -> list[dict]:
    """Files beside the images that nothing reads, by their endings; but for rubbish and tables."""
    left: Left = {}
    for folder in sorted({Path(file).parent for file in files}):
        left.setdefault("picture", []).extend(
            path for path in image_files(folder, deep=False, left=left)
            if not path.name.lower().endswith(EXTENSIONS))
    endings = Counter(path.suffix.lower() or "no ending" for paths in left.values()
                      for path in paths if path.suffix.lower() not in TABLES)
    listed = ", ".join(f"{ending} {n}" for ending, n in sorted(endings.items()))
    return [finding("other files", "info", "files that are not read lie beside the images: "
                    f"{listed}")] if endings else []


def copied(pairs: Sequence[Pair], rows: Sequence[Row], *, certain: bool = True) -> list[dict]:
    """Copies of one image: across splits, across patients, or neither; and under two labels.

    Images of fewer than 96 px have too little detail to be sure of an altered copy: unless
    `certain`, only equal pixels are an error.
    """
    def place(k: int) -> str:
        row = rows[k]
        return (f"{row['file_name']} ({row['source']}, {row['split'] or 'no split'}, "
                f"{row['label']}, {row['patient']})")

    kinds: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        split, patient, label = (rows[pair[0]][name] != rows[pair[1]][name]
                                 for name in ("split", "patient", "label"))
        holds = {"copy across splits": split, "copy across patients": patient and not split,
                 "duplicate": not patient and not split, "label conflict": label}
        for kind in filter(holds.get, holds):
            level, text = COPIES[kind]
            if level == "error" and pair[2] > 0 and not certain:
                kind, level, text = f"possible {kind}", "warning", f"{text}, or two that look alike"
            kinds[kind, level, text].append(pair)
    found = []
    for (kind, level, text), own in kinds.items():
        listed = first_few((f"{place(i)} = {place(j)}" for i, j, _ in own), 3, "; ")
        found.append(finding(kind, level, f"{text}: {count(len(own), 'pair')}, "
                             f"{sum(pair[2] == 0 for pair in own)} equal in every pixel: {listed}",
                             pairs=own))
    return found


def patients(table: Table) -> list[dict]:
    """Patients in two splits or with two labels."""
    images, found = defaultdict(list), []
    for i, row in enumerate(table.rows):
        images[row["patient"]].append(i)
    for column, kind, level, text in (
            ("split", "patient across splits", "error", "in two splits"),
            ("label", "patient with two labels", "info",
             "with images of two labels, as in the course of a disease, or by mistake")):
        values = {p: sorted({table.rows[i][column] or "none" for i in own})
                  for p, own in images.items()}
        several = {p: names for p, names in values.items() if len(names) > 1}
        if several:
            named = first_few((f"{p} ({', '.join(names)})" for p, names in several.items()), 5)
            found.append(finding(kind, level, f"{count(len(several), 'patient')} {text}: {named}",
                                 [i for p in several for i in images[p]]))
    numbers = [len(own) for own in images.values()]
    if max(numbers) > 1:
        found.append(finding("images per patient", "info", f"{len(numbers)} patients with 1 to "
                             f"{max(numbers)} images, {sum(n > 1 for n in numbers)} with more than "
                             "one"))
    return found


def confounded(rows: Sequence[Row]) -> list[dict]:
    """Labels that come from sources of their own."""
    found, sizes = [], Counter(row["source"] for row in rows)
    for label, own in _by_label(rows).items():
        at_least = max(PURE, len(own) / len(rows) + 0.2)  # and more than the label has over all
        counts = Counter(row["source"] for row in own)
        pure = {s: n for s, n in sorted(counts.items()) if n >= at_least * sizes[s]}
        if sum(pure.values()) >= ALONE * len(own):
            found.append(finding("confounded", "warning", f"CONFOUNDED: {sum(pure.values())} of "
                                 f"{len(own)} images of {label} come from sources that hold little "
                                 f"else ({', '.join(pure)}), so the hospital predicts the label"))
    return found


def missing_by_label(empty: Mapping[str, Mapping[str, float]],
                     columns: Sequence[str]) -> list[dict]:
    """Columns whose empty cells predict the label; `empty` is what `missing` found."""
    shares = {name: empty[name] for name in columns if name in empty}
    return [finding("missing by label", "warning", f"whether {name} is known goes with the label; "
                    f"empty in {', '.join(f'{label} {share:.0%}' for label, share in own.items())}")
            for name, own in shares.items() if max(own.values()) - min(own.values()) >= MISSING]


def children(rows: Sequence[Row]) -> list[dict]:
    ages = {label: [age for row in own if (age := to_number(row.get("age", ""))) >= 0]
            for label, own in _by_label(rows).items()}
    young = {label: sum(age < AGES[1] for age in known) for label, known in ages.items()}
    if len(ages) < 2 or not any(young.values()):
        return []
    listed = ", ".join(f"{label} {young[label]} of {len(known)} of known age"
                       for label, known in ages.items() if known)
    return [finding("children", "warning", f"patients under 18: {listed}")]


def shortcuts(trivial: Sequence[dict]) -> list[dict]:
    return [finding("shortcut", "warning", f"SHORTCUT: {b['label']} is predicted from the "
                    f"{b['features']} alone with AUROC {b['auroc']:.3f} ({b['low']:.3f} to "
                    f"{b['high']:.3f}; n = {b['n']}, and {b['n_rest']} of the rest)")
            for b in trivial if b["shortcut"]]


# --- tables


def tables(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    """For split, source and each column: value → label → images; "" is unknown, an age is its
    band."""
    names = ("split", "source", *columns)
    found = {name: defaultdict(Counter) for name in (*names, "all at once")}
    for row, labels in zip(rows, labels_in([row["label"] for row in rows])):
        cells = {name: age_band(row) if name == "age" else row.get(name, "") for name in names}
        cells["all at once"] = " · ".join([row["source"],
                                           *(cells[name] or "?" for name in columns)])
        for name, cell in cells.items():
            found[name][cell].update(labels)
    return {name: {value: dict(counts) for value, counts in sorted(cells.items())}
            for name, cells in found.items()}


def missing(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Column → label → share of empty cells, of columns that have any."""
    by_label = sorted(_by_label(rows).items())
    names = dict.fromkeys(name for row in rows for name in row
                          if name not in (*ADDED, "file_name", "label"))
    found = {name: {label: float(np.mean([not row.get(name) for row in own]))
                    for label, own in by_label} for name in names}
    return {name: shares for name, shares in found.items() if any(shares.values())}


def histograms(rows: Sequence[Row], facts: Sequence[Facts]) -> dict[str, list[float]]:
    """Source → mean histogram of greys, 64 bins."""
    return {source: np.mean([f.histogram for row, f in zip(rows, facts)
                             if row["source"] == source], 0).tolist()
            for source in sorted({row["source"] for row in rows})}


def sizes(facts: Sequence[Facts]) -> Mapping[str, int]:
    sides = np.array([[f.width, f.height] for f in facts])
    return {"shorter side, least": int(sides.min()),
            "shorter side, median": int(np.median(sides.min(1))),
            "longer side, most": int(sides.max()),
            "different shapes": len({tuple(s) for s in sides.tolist()}),
            "square": int((sides[:, 0] == sides[:, 1]).sum())}


def age_band(row: Row) -> str:
    """18–39: the band of AGES in which a row's age lies; "" where it is unknown."""
    age = to_number(row.get("age", ""))
    k = bisect.bisect(AGES, age)
    if not age >= 0:
        return ""
    return f"{AGES[k - 1]}–{AGES[k] - 1}" if k < len(AGES) else f"{AGES[-1]}+"


def _by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found = defaultdict(list)
    for row, labels in zip(rows, labels_in([row["label"] for row in rows])):
        for label in labels:
            found[label].append(row)
    return found
