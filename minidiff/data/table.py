"""Data folders as one table: rows, fingerprint, and splits by patient.

A cell is text and "" is unknown. A row has the columns of its data set, and always

    file, where          the absolute path; the place to name in an error (never written)
    file_name, label, split
    patient              `folder/file_name` where it is unknown: one image = one patient, assumed
    source               the name of the folder, unless the data set has this column

The layouts of a folder are those of `layouts`.
"""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minidiff import cells
from minidiff.data.classes import FLAT
from minidiff.data.columns import Remark, alike_patients, read_columns
from minidiff.data.dialects import ADDED, read_csv
from minidiff.data.duplicates import near_copies
from minidiff.data.folders import split_named
from minidiff.data.layouts import random_split, read_folder
from minidiff.data.split import HELD_OUT, SPLITS, Row, check_leakage, equal_pairs, split_patients
from minidiff.errors import InputError, count, first_few
from minidiff.hashes import hashes_of
from minidiff.names import text
from minidiff.root import AS_WE_NAME, Reading
from minidiff.runs import write_atomic


@dataclass(frozen=True)
class Table:
    """The rows of one or several data sets; `notes` are what a report must say about them."""

    rows: list[Row]
    patients_assumed: bool = False  # some folder knows no patient: there, one image = one patient
    notes: list[str] = field(default_factory=list)
    # of every file that was read, rows of which may have been left out since: the sha256 of its
    # content, and its patient where the data name one
    hashes: dict[str, str] = field(default_factory=dict, repr=False)
    patients: dict[str, str] = field(default_factory=dict, repr=False)
    random_split: bool = True  # by patient: drawn here, or drawn before as every folder says
    remarks: list[Remark] = field(default_factory=list)  # on cells; also among the notes

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
        return _fingerprint(self.rows, dict(zip(self.column("file"), self.digests)))

    @property
    def digests(self) -> list[str]:
        """The SHA-256 of each row's file; those that nobody asked for before are computed now."""
        files = self.column("file")
        self.hashes.update(hashes_of(f for f in files if f not in self.hashes))
        return [self.hashes[file] for file in files]

    def select(self, **wanted: str | Sequence[str]) -> "Table":
        """The rows whose cells are as asked: `select(split="train", label=["covid", "normal"])`."""
        allowed = {name: {value} if isinstance(value, str) else set(value)
                   for name, value in wanted.items()}
        return replace(self, rows=[row for row in self.rows
                                   if all(row.get(k, "") in v for k, v in allowed.items())])


def read_table(
    folders: str | Path | Sequence[str | Path],
    reading: Reading = AS_WE_NAME,
    *,
    seed: int = 0,
    split: bool = True,
    split_dir: str | Path | None = None,
    check: bool = True,
) -> Table:
    """Read data folders as one table; columns and labels unite, absent cells are "".

    Splits that a folder brings are kept, also where the folders given are named train, test …
    themselves. Folders without any are split by patient, stratified by label, 70/15/15, with near
    copies on one side; the split is written once to `split_dir` under the fingerprint of the data
    and reused from there, whatever the seed, so that no later run tests on what an earlier one
    trained on. `split=False` leaves them without. `check` compares the content of all files. Raises
    InputError if a folder is not laid out as above, if rows and files do not match one to one, if a
    patient or an identical file crosses splits, and if two folders share patient ids and `reading`
    does not say whether these are the same persons.
    """
    folders = [Path(os.path.abspath(f))
               for f in ([folders] if isinstance(folders, (str, Path)) else folders)]
    if not folders:
        raise InputError("no data folder given")
    table = _read(folders, reading, check)
    rows, notes = table.rows, table.notes + (_odd_splits(table.rows) if split else [])
    to_split = split and any(not row["split"] for row in rows)
    hashes = (hashes_of((row["file"] for row in rows), reading.rehash)
              if check or to_split or reading.rehash else {})
    if to_split:
        rows, remark = _fill_splits(rows, hashes, seed, split_dir)
        notes += [remark]
    if check:
        check_leakage(rows, hashes)
        copies = len(rows) - len(set(hashes.values()))
        notes += [f"{count(copies, 'file')} with the content of another one of the same label and "
                  f"split"] if copies else []
    return replace(table, rows=rows, notes=notes, hashes=hashes)


def read_external(folders: str | Sequence[str], reading: Reading, *, split: bool = False) -> Table:
    """Data sets of other hospitals: an assumed patient is none of the other data, nor is any where
    each folder numbers its own."""
    table = read_table(folders, reading, split=split)
    own = None if reading.distinct_patients else table.patients
    rows = [row if own and row["file"] in own else {**row, "patient": f"external {row['patient']}"}
            for row in table.rows]
    return replace(table, rows=rows, patients={row["file"]: row["patient"] for row in rows
                                               if row["file"] in table.patients})


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


def _read(folders: Sequence[Path], reading: Reading, check: bool) -> Table:
    """The rows of all folders, with patients, columns and labels united."""
    if reading.same_patients and reading.distinct_patients:
        raise InputError("--same-patients and --distinct-patients exclude each other")
    rows, notes, remarks, assumed, random, named, ids = [], [], [], False, True, {}, {}
    splits = [split_named(folder.name) for folder in folders]
    for folder, name, own in zip(folders, _names(folders), splits):
        part, said = read_folder(folder, reading)
        if FLAT in said and len(folders) > 1:
            raise InputError(f"{folder}: its images lie in no class folder, and other folders are "
                             f"given beside it; move them to {folder}/LABEL, or give the folder "
                             "above alone, if all below it are named after a label")
        if own and len(set(splits) - {""}) > 1 and not part[0]["split"]:
            part = [{**row, "split": own} for row in part]
        random &= not part[0]["split"] or random_split(folder)
        apart = f"{name}/" if reading.distinct_patients and len(folders) > 1 else ""
        patients, unknown = _patients(part, apart, name)
        ids[folder] = set(filter(None, patients))
        assumed |= not ids[folder]
        named |= {row["file"]: patient for row, patient in zip(part, patients) if patient}
        rows += [{"source": name, **row, "patient": patient or f"{name}/{row['file_name']}"}
                 for row, patient in zip(part, patients)]
        notes += [f"{name}: {remark}" for remark in said]
        remarks += unknown
    columns = dict.fromkeys(key for row in rows for key in row)
    rows, of_cells = read_columns([{**dict.fromkeys(columns, ""), **row} for row in rows])
    _check_unique(rows)
    remarks += [*of_cells, *alike_patients(named.values()),
                *([] if reading.same_patients else _shared(ids, check))]
    return Table(rows, assumed, notes + [remark.text for remark in remarks], {}, named, random,
                 remarks)


def _names(folders: Sequence[Path]) -> list[str]:
    """A source for each folder: its name, with a number where an earlier one has the same."""
    names = [text(folder.name) for folder in folders]
    earlier = [names[:k].count(name) for k, name in enumerate(names)]
    return [f"{name}-{n + 1}" if n else name for name, n in zip(names, earlier)]


def _check_unique(rows: Sequence[Row]) -> None:
    counts = Counter(row["file"] for row in rows)
    twice = [row["where"] for row in sorted(rows, key=lambda row: row["file"])
             if counts[row["file"]] > 1]
    if twice:
        raise InputError(f"{len(twice)} duplicate rows, which name a file again: "
                         f"{first_few(twice, 4)}; keep one row for each image, with several "
                         "findings as Edema|Effusion")


def _patients(rows: Sequence[Row], prefix: str, folder: str) -> tuple[list[str], list[Remark]]:
    """The patient of each row in its normal form, behind a prefix, "" where it is unknown; and a
    remark on those, with the words that say so."""
    found = [cells.patient(row.get("patient", ""), row["where"]) for row in rows]
    words = Counter(row.get("patient", "") for row, patient in zip(rows, found) if not patient)
    said = first_few((f"{word!r} {n}" for word, n in sorted(words.items()) if word), 5)
    said = f" ({said})" if said else ""
    text = (f"{words.total()} images without a patient id{said} count as one patient each"
            if any(found) else f"no patient ids{said}: one image = one patient, assumed")
    return [patient and prefix + patient for patient in found], (
        [Remark("patients unknown", "warning", f"{folder}: {text}")] if words else [])


def _shared(ids: Mapping[Path, set[str]], refuse: bool) -> list[Remark]:
    """A remark, or InputError, on patient ids of two folders, each of which may be two persons."""
    first: dict[str, Path] = {}
    twice = [(patient, first[patient], folder) for folder in ids for patient in sorted(ids[folder])
             if first.setdefault(patient, folder) != folder]
    if not twice:
        return []
    patient, one, other = twice[0]
    text = (f"{count(len(twice), 'patient id')} of two folders, e.g. {patient!r} of {one} and "
            f"{other}: --same-patients if they are the same persons, --distinct-patients if each "
            "folder numbers its own")
    if refuse:
        raise InputError(text)
    return [Remark("patient ids of two folders", "error", text)]


def _odd_splits(rows: Sequence[Row]) -> list[str]:
    """A remark on splits that no script asks for; "external" is left out on purpose."""
    counts = Counter(row["split"] for row in rows if row["split"] not in ("", "external", *SPLITS))
    named = ", ".join(f"{name!r} {n}" for name, n in sorted(counts.items()))
    return [f"images of other splits than {', '.join(SPLITS)}, neither trained nor tested on: "
            f"{named}"] if counts else []


def _fill_splits(rows: list[Row], hashes: Mapping[str, str], seed: int,
                 split_dir: str | Path | None) -> tuple[list[Row], str]:
    """The rows with a split each, made here or kept from an earlier run, and a remark that is the
    same in both cases, for a resumed run compares its notes."""
    path = split_dir and Path(split_dir) / f"split-{_fingerprint(rows, hashes)[:12]}.csv"
    if path and path.is_file():
        kept = read_csv(path, needed=("patient", "split"))
        splits = {row["patient"]: row["split"] for row in kept}
    else:
        copies = near_copies([row["file"] for row in rows])
        splits = split_patients(rows, [*copies, *equal_pairs(hashes[row["file"]] for row in rows)],
                                seed)
        if path:
            write_split(path, splits)
    if not {row["patient"] for row in rows} <= set(splits):
        raise InputError(f"{path}: patients are missing from this saved split; delete the file to "
                         "split anew")
    return [{**row, "split": row["split"] or splits[row["patient"]]} for row in rows], (
        f"split by patient here, {1 - 2 * HELD_OUT:.0%} / {HELD_OUT:.0%} / {HELD_OUT:.0%}, "
        + (f"kept in {path.name}" if path else f"seed {seed}"))


def write_split(path: str | Path, splits: Mapping[str, str]) -> None:
    """Write patient → split where `read_table` looks for it."""
    write_table(path, [{"patient": patient, "split": name} for patient, name in splits.items()])


def _fingerprint(rows: Iterable[Row], hashes: Mapping[str, str]) -> str:
    lines = ["\t".join((hashes[r["file"]], r["label"], r["patient"], r["split"])) for r in rows]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
