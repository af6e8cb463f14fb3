"""Rows of a data set: one dict of text cells an image, from metadata.csv or from class folders;
splits by patient.

Three layouts are read as they come, several folders together if need be:

    metadata.csv         file_name,label[,split,patient,sex,…], paths relative to its folder
                         (Hugging Face imagefolder)
    <class>/…            class folders of PNG or JPEG (torchvision ImageFolder; Kaggle:
                         <class>/images, masks ignored)
    <split>/<class>/…    train, val, test above the class folders (Kaggle)

A cell is text and "" is unknown. A row has the columns of its data set, and always

    file, where          the absolute path; the place to name in an error. Made by reading, never
                         written
    file_name, label, split
    patient              `folder/file_name` where it is unknown: one image = one patient, assumed
    source               the name of the folder, unless the data set has this column

A folder inside that holds a metadata.csv of its own is another data set and is left alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from minidiff.data.images import EXTENSIONS
from minidiff.data.split import HELD_OUT, SPLITS, Row, check_leakage, split_patients
from minidiff.errors import InputError, count
from minidiff.runs import sha256, write_atomic

SYNONYMS = {"training": "train", "valid": "val", "validation": "val",
            "testing": "test"} | {s: s for s in SPLITS}
ADDED = ("file", "where")


@dataclass(frozen=True)
class Table:
    """The rows of one or several data sets; `notes` are what a report must say about them."""

    rows: list[Row]
    patients_assumed: bool = False  # some folder knows no patient: there, one image = one patient
    notes: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict, repr=False)  # file → sha256 of its content

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[str]:
        return [row.get(name, "") for row in self.rows]

    @property
    def labels(self) -> list[str]:
        return sorted(set(self.column("label")))

    @property
    def fingerprint(self) -> str:
        """sha256 over content, label, patient and split of every row; neither order nor file names
        count.

        Where patients are assumed, their ids are made of the file names and of the folder's name,
        and these do count.
        """
        self.hashes.update(_hash(file for file in self.column("file") if file not in self.hashes))
        return _fingerprint(self.rows, self.hashes)

    def select(self, **wanted: str | Sequence[str]) -> Table:
        """The rows whose cells are as asked: `select(split="train", label=["covid", "normal"])`."""
        allowed = {name: {value} if isinstance(value, str)
                   else set(value) for name, value in wanted.items()}
        return replace(self, rows=[r for r in self.rows
                                   if all(r.get(k, "") in v for k, v in allowed.items())])

    def require(self, *splits: str, per_label: int = 1) -> None:
        """Raise InputError unless each of these splits has `per_label` images of every label."""
        counts = Counter(zip(self.column("label"), self.column("split")))
        for label in self.labels:
            for split in splits:
                if counts[label, split] < per_label:
                    have = ", ".join(f"{s or 'no split'} {n}"
                                     for (k, s), n in sorted(counts.items()) if k == label)
                    raise InputError(f"label {label!r} needs {per_label} or more images in split "
                                     f"{split!r}; has {have}")


def require_classes(table: Table, at_least: int = 2) -> None:
    """Raise InputError if there are too few labels to tell apart."""
    if len(table.labels) < at_least:
        found = ", ".join(map(repr, table.labels)) or "none"
        raise InputError(f"a classifier needs {at_least} or more labels; the data have {found}")


def read_table(
    folders: str | Path | Sequence[str | Path],
    *,
    seed: int = 0,
    split: bool = True,
    split_dir: str | Path | None = None,
    check: bool = True,
) -> Table:
    """Read data folders as one table; columns and labels unite, absent cells are "".

    Splits that a folder brings are kept. Folders without any are split by patient, stratified by
    label, 70/15/15; the split is written once to `split_dir` under the fingerprint of the data and
    reused from there, whatever the seed, so that no later run tests on what an earlier one trained
    on. `split=False` leaves them without. `check` compares the content of all files. Raises
    InputError if a folder is not laid out as above, if rows and files do not match one to one, and
    if a patient or an identical file crosses splits.
    """
    folders = [Path(os.path.abspath(f))
               for f in ([folders] if isinstance(folders, (str, Path)) else folders)]
    if not folders:
        raise InputError("no data folder given")
    rows, notes, assumed = [], [], False
    for folder, name in zip(folders, _names(folders)):
        part, remarks = _read_folder(folder)
        known = sum(row.get("patient", "") != "" for row in part)
        if known == 0:
            remarks += ["no patient ids: one image = one patient, assumed"]
        elif known < len(part):
            remarks += [f"{len(part) - known} images without a patient id count as one patient "
                        f"each"]
        assumed |= known == 0
        rows += [{"source": name, **r, "patient": r.get("patient") or f"{name}/{r['file_name']}"}
                 for r in part]
        notes += [f"{name}: {remark}" for remark in remarks]
    columns = dict.fromkeys(key for row in rows for key in row)
    rows, remarks = _unite_labels([{**dict.fromkeys(columns, ""), **row} for row in rows])
    notes += remarks
    _check_unique(rows)
    notes += _odd_splits(rows) if split else []
    to_split = split and any(not row["split"] for row in rows)
    hashes = _hash(row["file"] for row in rows) if check or to_split else {}
    if to_split:
        rows, remark = _fill_splits(rows, hashes, seed, split_dir)
        notes += [remark]
    if check:
        check_leakage(rows, hashes)
        copies = len(rows) - len(set(hashes.values()))
        notes += [f"{count(copies, 'file')} with the content of another one of the same label and "
                  f"split"] if copies else []
    return Table(rows, assumed, notes, hashes)


def write_table(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, whole or not at all."""
    write_atomic(path, csv_text(rows))


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as CSV; columns in order of first appearance, an absent cell is empty."""
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in ADDED]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- reading one folder


def _read_folder(folder: Path) -> tuple[list[Row], list[str]]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    rows, remarks = _read_metadata(folder) if is_data_set(folder) else _read_classes(folder)
    splits = [SYNONYMS.get(row.get("split", "").lower(), row.get("split", "")) for row in rows]
    if "" in splits and any(splits):
        at = rows[splits.index("")]["where"]
        raise InputError(f"{at}: no split, nor have {splits.count('') - 1} other rows; give every "
                         "row one, or none")
    paths = [os.path.normpath(folder / row["file_name"]) for row in rows]
    return [{**row, "split": s, "file": p} for row, s, p in zip(rows, splits, paths)], remarks


def _read_metadata(folder: Path) -> tuple[list[Row], list[str]]:
    path = folder / "metadata.csv"
    rows = read_csv(path, needed=("file_name", "label"))
    for row in rows:
        name = Path(row["file_name"])
        if not row["file_name"] or name.is_absolute() or ".." in name.parts:
            raise InputError(f"{row['where']}: file_name {row['file_name']!r} is not a path inside "
                             f"{folder}")
        if not row["label"]:
            raise InputError(f"{row['where']}: no label for {name}")
    missing = [f"{r['where']} {r['file_name']}" for r in rows
               if not (folder / r["file_name"]).is_file()]
    if missing:
        raise InputError(f"{len(missing)} row(s) without a file: {some(missing)}")
    named = {os.path.normpath(row["file_name"]) for row in rows}
    tops = {Path(name).parts[0] for name in named if len(Path(name).parts) > 1}
    files = [file for top in tops for file in image_files(folder / top)]
    if any(len(Path(name).parts) == 1 for name in named):
        files += image_files(folder, deep=False)
    orphans = sorted({os.path.relpath(file, folder) for file in files} - named)
    if orphans:
        raise InputError(f"{path}: {len(orphans)} file(s) without a row: {some(orphans)}")
    return rows, []


def _read_classes(folder: Path) -> tuple[list[Row], list[str]]:
    tops = _subfolders(folder)
    bases = [(SYNONYMS[top.name.lower()], top) for top in tops
             if top.name.lower() in SYNONYMS] or [("", folder)]
    rows, left_out = [], [top.name for top in tops
                          if bases[0][0] and top not in [base for _, base in bases]]
    for split, base in bases:
        base = base / "images" if (base / "images").is_dir() else base
        left_out += [os.path.relpath(file, folder) for file in image_files(base, deep=False)]
        for label in _subfolders(base):
            files = image_files(label)
            left_out += [] if files else [os.path.relpath(label, folder)]
            named = [(os.path.relpath(file, folder), str(file)) for file in files]
            rows += [{"file_name": n, "label": label.name, "split": split, "where": file}
                     for n, file in named]
    if not rows:
        inside = [path.name for path in sorted(folder.iterdir()) if is_data_set(path)]
        hint = f"; data sets inside it: {some(inside)}" if inside else ""
        raise InputError(f"{folder}: no metadata.csv and no class folders of PNG or JPEG "
                         f"files{hint}")
    return rows, [f"left out, in no class folder or without images: "
                  f"{some(left_out)}"] if left_out else []


def read_csv(path: str | Path, needed: Sequence[str]) -> list[Row]:
    """Rows of text cells, and as "where" the place of each, to be named in an error; InputError for
    a faulty table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader
                     if any(cells)]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table in UTF-8 ({error})") from None
    header = lines[0][1] if lines else []
    for name in needed:
        if name not in header:
            raise InputError(f"{path}: no column {name!r}; it has {', '.join(header) or 'none'}")
    for name in header:
        if header.count(name) > 1 or name in ADDED:
            raise InputError(f"{path}: column {name!r} is "
                             f"{'reserved' if name in ADDED else 'there twice'}; rename it")
    if len(lines) < 2:
        raise InputError(f"{path}: a header but no rows")
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} cells where the header has "
                             f"{len(header)}")
    return [{**dict(zip(header, cells)), "where": f"{path}:{number}"}
            for number, cells in lines[1:]]


def image_files(folder: Path, deep: bool = True) -> list[Path]:
    """The images in a folder and, if `deep`, below it, in order; masks, hidden folders and other
    data sets left out.
    """
    here = sorted(path for path in folder.iterdir() if path.is_file())
    files = [path for path in here
             if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
    return files + [file for below in _subfolders(folder)
                    for file in image_files(below)] if deep else files


def _subfolders(folder: Path) -> list[Path]:
    def counts(path: Path) -> bool:
        hidden = path.name.startswith((".", "__MACOSX")) or path.name.lower().endswith(("mask",
                                                                                        "masks"))
        return path.is_dir() and not hidden and not is_data_set(path)

    return sorted(path for path in folder.iterdir() if counts(path))


def is_data_set(folder: Path) -> bool:
    """Has this folder a table of its own?"""
    return (folder / "metadata.csv").is_file()


# --- over all rows


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.name for folder in folders]
    return [f"{name}-{names[:k].count(name) + 1}" if name in names[:k]
            else name for k, name in enumerate(names)]


def _check_unique(rows: Sequence[Row]) -> None:
    counts = Counter(row["file"] for row in rows)
    twice = [row["where"] for row in sorted(rows, key=lambda row: row["file"])
             if counts[row["file"]] > 1]
    if twice:
        raise InputError(f"{len(twice)} duplicate rows, which name a file again: {some(twice, 4)}")


def _unite_labels(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """Labels that differ in capitals only are one, spelled as first met: Kaggle writes NORMAL,
    Normal and normal.
    """
    spelling = {}
    labels = [spelling.setdefault(row["label"].lower(), row["label"]) for row in rows]
    changed = sorted({(row["label"], label) for row, label in zip(rows, labels)
                      if row["label"] != label})
    united = [{**row, "label": label} for row, label in zip(rows, labels)]
    return united, [f"label {old!r} is read as {new!r}" for old, new in changed]


def _odd_splits(rows: Sequence[Row]) -> list[str]:
    """A remark on splits that no script asks for; "external" is one that is left out on purpose."""
    counts = Counter(row["split"] for row in rows if row["split"] not in ("", "external", *SPLITS))
    named = ", ".join(f"{name!r} {n}" for name, n in sorted(counts.items()))
    return [f"images of other splits than {', '.join(SPLITS)}, neither trained nor tested on: "
            f"{named}"] if counts else []


def _fill_splits(
    rows: list[Row], hashes: Mapping[str, str], seed: int, split_dir: str | Path | None
) -> tuple[list[Row], str]:
    path = split_dir and Path(split_dir) / f"split-{_fingerprint(rows, hashes)[:12]}.csv"
    remark = f"split by patient here, {1 - 2 * HELD_OUT:.0%} / {HELD_OUT:.0%} / {HELD_OUT:.0%}, "
    # the same when it is made and when it is read: a resumed
    remark += f"kept in {path.name}" if path else f"seed {seed}"
    if path and path.is_file():                                   # run compares its notes
        splits = {row["patient"]: row["split"]
                  for row in read_csv(path, needed=("patient", "split"))}
    else:
        splits = split_patients(rows, hashes, seed)
        if path:
            write_table(path, [{"patient": patient, "split": s} for patient, s in splits.items()])
    if not {row["patient"] for row in rows} <= set(splits):
        raise InputError(f"{path}: patients are missing from this saved split; delete the file to "
                         "split anew")
    return [{**row, "split": row["split"] or splits[row["patient"]]} for row in rows], remark


def _hash(files: Iterable[str]) -> dict[str, str]:
    files = list(files)
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter
        return dict(zip(files, pool.map(sha256, files)))


def _fingerprint(rows: Iterable[Row], hashes: Mapping[str, str]) -> str:
    lines = ["\t".join((hashes[r["file"]], r["label"], r["patient"], r["split"])) for r in rows]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def some(items: Iterable[str], shown: int = 3) -> str:
    """The first of them, and how many more there are, for a message."""
    items = list(items)
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown
                                       else "")
