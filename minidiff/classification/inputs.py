"""Reads what a study is made of, and refuses what breaks its protocol.

Refused are a patient, an identical file or picture, and a near copy on both sides; a generator that
has seen validation or test patients; a test set of one label; labels that training does not know.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minidiff import variables as var
from minidiff.classification.arms import DUPLICATES, Images
from minidiff.counted import order
from minidiff.data.dataset import load_pixels
from minidiff.data.duplicates import SIDE, near_duplicates
from minidiff.data.files import typical_side
from minidiff.data.split import (
    HELD_OUT,
    SPLITS,
    Row,
    check_leakage,
    check_pictures,
    check_synthetic,
    check_unseen,
    of_other_data,
    trained_on,
)
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError, count

INTERNAL = ("train", "val", "test")


@dataclass(frozen=True)
class Inputs:
    """Sets by name: train, val, test, then the external ones; and synthetic folders."""

    target: var.Category | var.Findings
    sets: dict[str, Images]
    sources: dict[str, Images]
    saw: dict[str, set[str] | None]   # sha256 of a generator's training images; None: unknown
    tables: dict[str, Table]
    notes: list[str]

    @property
    def labels(self) -> list[str]:
        return list(self.target.values)

    @property
    def exclusive(self) -> bool:
        """Whether an image has one label; as findings, it may have several or none."""
        return self.target.exclusive

    @property
    def tests(self) -> dict[str, Images]:
        return {name: images for name, images in self.sets.items() if name not in ("train", "val")}

    def truth(self, name: str) -> torch.Tensor:
        """bool (N,k): which label, or which findings, each image of a set has."""
        return self.target.bits(self.sets[name].labels)


def read(data: Sequence[str], synthetic: Mapping[str, str], external: Sequence[str], *, size: int,
         seed: int, out: str, target: str = "label", hold_out: str = "",
         near_copies: str = "refuse", skip_bad: bool = False) -> Inputs:
    """Read everything and refuse what breaks the protocol.

    hold_out: column=value, whose rows are a test set of their own. near_copies: "refuse", or "drop"
    the test images that show a training film.
    """
    real = _targeted(read_table(data, seed=seed, split_dir=Path(out).parent), target)
    real = replace(real, rows=[row for row in real.rows if row["split"] in SPLITS])
    tables, everyone = dict[str, Table](), real.rows
    if hold_out:
        real, tables = _held_out(real, hold_out)
    real, carved = _with_validation(real, seed)
    tables = {**{name: real.select(split=name) for name in INTERNAL}, **tables}
    for folder in external:
        name = Path(folder).resolve().name
        if name in (*tables, DUPLICATES):
            raise InputError(f"--external {folder}: a set named {name!r} is there already; rename "
                             "its folder")
        tables[name] = _targeted(_external(folder), target)
        rows = [{**row, "split": name} for row in tables[name].rows]
        check_leakage([*tables["train"].rows, *tables["val"].rows, *rows],
                      {**real.hashes, **tables[name].hashes})
    for name in sorted({*tables} & {*synthetic}):
        raise InputError(f"--synthetic {synthetic[name]}: a set of real images is named {name!r}; "
                         "write NAME=DIR")
    _variable(target, tables["train"].column("label"))
    check_labels({name: table.column("label") for name, table in tables.items()}, target)
    hashes = {file: digest for table in tables.values() for file, digest in table.hashes.items()}
    unseen = [row for name, table in tables.items()
              if name not in (("train", "val") if carved else ("train",)) for row in table.rows]
    samples = {name: _targeted(_synthetic(folder, unseen, hashes, everyone), target)
               for name, folder in synthetic.items()}
    for name, folder in synthetic.items():
        if of_other_data(trained_on(folder), tables["train"].rows, hashes):
            text = (f"{folder}: its generator was trained on other images than these training "
                    "images")
            if name == "synthetic":
                raise InputError(f"{text}; write --synthetic NAME={folder} if that is what you "
                                 "want to know")
            samples[name].notes.append(text)
    loaded = {name: load_pixels(table, size, skip_bad=skip_bad)
              for name, table in {**tables, **samples}.items()}
    # each file once: a held-out source may borrow test images
    once = {row["file"]: ({**row, "split": name}, picture) for name in tables
            for row, picture in zip(loaded[name][0].rows, loaded[name][1])}
    check_pictures([row for row, _ in once.values()], (picture for _, picture in once.values()))
    loaded |= _near_copies({name: loaded[name] for name in tables}, near_copies)
    tables = {name: loaded[name][0] for name in tables}
    # images may have been left out
    check_labels({name: table.column("label") for name, table in tables.items()}, target)
    variable = replace(_variable(target, tables["train"].column("label")), name="label")
    notes = [note for name, (table, _) in loaded.items() for note in table.notes]
    made = {name: _images(*loaded[name], variable) for name in loaded}
    return Inputs(variable, {name: made[name] for name in tables},
                  {name: made[name] for name in samples},
                  {name: trained_on(folder) for name, folder in synthetic.items()},
                  {name: table for name, (table, _) in loaded.items()}, list(dict.fromkeys(notes)))


def _images(table: Table, pixels: torch.Tensor, variable: var.Variable) -> Images:
    return Images(pixels, var.encode([variable], table.rows)["label"], table.column("patient"),
                  table.rows, [table.hashes[file] for file in table.column("file")])


def _variable(target: str, cells: Sequence[str]) -> var.Category | var.Findings | None:
    """What there is to be told apart; None where `check_labels` will say that there is nothing."""
    found = var.infer(target, cells) if len(set(cells)) > 1 else None
    if found and not found.values:
        raise InputError(f"--target {target}: numbers from {found.low:g} to {found.high:g}; a "
                         "classifier tells labels apart, of which a column of numbers may have up "
                         f"to {var.FEW_VALUES}")
    return found


def _targeted(table: Table, target: str) -> Table:
    """The table with another column as its label; rows where it is empty are left out."""
    if target == "label":
        return table
    if target not in {key for row in table.rows for key in row}:
        where = os.path.commonpath([os.path.dirname(row["file"]) for row in table.rows])
        raise InputError(f"--target {target}: no such column in {where}; there are "
                         f"{', '.join(table.rows[0])}")
    rows = [{**row, "label": row[target]} for row in table.rows if row.get(target, "")]
    lost = len(table) - len(rows)
    note = f"{count(lost, 'image')} without {target} left out"
    return _noted(table, note, rows) if lost else replace(table, rows=rows)


def _noted(table: Table, note: str, rows: Sequence[Row] | None = None) -> Table:
    """The table with one more note, and other rows if given."""
    return replace(table, rows=table.rows if rows is None else rows, notes=[*table.notes, note])


def _with_validation(table: Table, seed: int) -> tuple[Table, bool]:
    """The table with a val split: where it brings none, by patient out of train, and then True."""
    if "val" in table.column("split"):
        return table, False
    label_of: dict[str, str] = {}  # patient → the first of his labels
    for row in table.select(split="train").rows:
        label_of[row["patient"]] = min(row["label"], label_of.get(row["patient"], row["label"]))
    chosen = set()
    for label in sorted(set(label_of.values())):
        own = sorted(patient for patient in label_of if label_of[patient] == label)
        chosen |= {own[k] for k in order(len(own), seed, range(max(1, round(HELD_OUT * len(own)))))}
    rows = [{**row, "split": "val"} if row["split"] == "train" and row["patient"] in chosen
            else row for row in table.rows]
    note = f"no validation split: {len(chosen)} of the training patients were taken for it"
    return _noted(table, note, rows), True


def _held_out(table: Table, hold_out: str) -> tuple[Table, dict[str, Table]]:
    """column=value: a test set of these rows, none of whose patients is trained on. If it has one
    label only, the other labels' test images stand beside it, and the note says so."""
    column, _, value = hold_out.partition("=")
    values = sorted(set(table.column(column)))
    if not column or not value or value not in values:
        there = ", ".join(filter(None, values)) or "no value"
        raise InputError(f"--hold-out {hold_out}: write column=value; {column or 'a column'} has "
                         f"{there}")
    if value in (*INTERNAL, DUPLICATES):
        raise InputError(f"--hold-out {hold_out}: a set is named {value!r} already; rename this "
                         f"{column}")
    patients = {row["patient"] for row in table.rows if row[column] == value}
    own = [row for row in table.rows if row[column] == value]
    rest = replace(table, rows=[row for row in table.rows if row["patient"] not in patients])
    labels, notes = {row["label"] for row in own}, [f"{value}: held out of training, validation "
                                                    f"and the internal test"]
    if len(labels) == 1:
        own += [row for row in rest.rows if row["split"] == "test" and row["label"] not in labels]
        notes += [f"{value} has {next(iter(labels))} only; the other labels beside it are the "
                  f"internal test's"]
    return rest, {value: replace(table, rows=own, notes=notes)}


def _external(folder: str) -> Table:
    """A further test set; assumed patients of a folder of the same name are other patients."""
    table, prefix = read_table(folder, split=False), os.path.basename(os.path.abspath(folder))
    rows = [{**row, "patient": f"external {row['patient']}"}
            if row["patient"] == f"{prefix}/{row['file_name']}" else row for row in table.rows]
    return replace(table, rows=rows)


def _synthetic(folder: str, unseen: Sequence[Row], hashes: Mapping[str, str],
               real: Sequence[Row]) -> Table:
    """Samples; refused if one is a copy of a real file, or if the generator was trained on an
    image, or on a patient, of the rows that are to be unseen."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of samples; run sample.py first, or ask for "
                         "--arms real")
    table, seen = read_table(folder, split=False), trained_on(folder)
    check_synthetic(table.rows, table.hashes, hashes.values(), folder)
    notes = [f"{folder}: {note}" for note in check_unseen(unseen, hashes, seen, "the generator")]
    patients = {row["patient"] for row in real if hashes[row["file"]] in (seen or ())}
    shared = [row for row in unseen if row["patient"] in patients]
    if shared:
        raise InputError(f"{folder}: its generator was trained on other images of "
                         f"{len({r['patient'] for r in shared})} held-out patients, e.g. "
                         f"{shared[0]['patient']}")
    return replace(table, notes=[*table.notes, *notes])


def _near_copies(loaded: Mapping[str, tuple[Table, torch.Tensor]],
                 what: str) -> dict[str, tuple[Table, torch.Tensor]]:
    """Refuse test images that show a training or validation film again, or leave them out.

    Whatever the size of the study, they are compared at 96 px; files of fewer have too little
    detail to tell films apart, and that they were not compared is noted.
    """
    names = [name for name, (table, _) in loaded.items() for _ in table.rows]
    rows = [row for table, _ in loaded.values() for row in table.rows]
    if typical_side((row["file"] for row in rows), SIDE) < SIDE:
        table, pixels = loaded["test"]
        note = (f"near copies were not looked for: with files of fewer than {SIDE} px, different "
                "films look like one")
        return {"test": (_noted(table, note), pixels)}
    pixels = torch.cat([pixels[:, :1] for _, pixels in loaded.values()])
    if pixels.shape[-1] < SIDE:
        pixels = load_pixels(Table(rows), SIDE)[1][:, :1]
    seen = ("train", "val")
    pairs = [(i, j, d) for i, j, d in near_duplicates(pixels)
             if (names[i] in seen) != (names[j] in seen)]
    if not pairs:
        return {}
    i, j, d = pairs[0]
    if what == "refuse":
        found = count(len(pairs), "near copy", "near copies")
        raise InputError(f"{found} of training or validation images in a test set, e.g. "
                         f"{rows[i]['file']} ({names[i]}) and {rows[j]['file']} ({names[j]}), "
                         f"distance {d:.3f}; --near-copies drop leaves the test images out")
    gone = {rows[k]["file"] for pair in pairs for k in pair[:2] if names[k] not in seen}
    left = {}
    for name, (table, pixels) in loaded.items():
        index = [k for k, row in enumerate(table.rows) if row["file"] not in gone or name in seen]
        if len(index) < len(table):
            lost = ", ".join(sorted(os.path.basename(row["file"]) for row in table.rows
                                    if row["file"] in gone))
            note = (f"{name}: {len(table) - len(index)} near copies of training or validation "
                    f"images are left out: {lost}")
            left[name] = _noted(table, note, [table.rows[k] for k in index]), pixels[index]
    return left


def check_labels(cells: Mapping[str, Sequence[str]], target: str = "label") -> None:
    """Raise InputError for a set of one label or none, and for labels that train has not."""
    several = target != "label" and any(var.AND in cell for cell in cells["train"])

    def values(name: str) -> set[str]:
        return set().union(*(var.present(target, cell) if several
                             else {cell} for cell in cells[name]))

    for name, column in cells.items():
        if len(set(column)) < 2:
            found = f"only {column[0]!r}, {count(len(column), 'image')}" if column else "no image"
            raise InputError(f"a classifier needs two labels or more; {name} has {found}")
        unknown, lacking = sorted(values(name) - values("train")), sorted(values("train")
                                                                          - values(name))
        if unknown:
            raise InputError(f"{name} has labels that the train split has not: "
                             f"{', '.join(unknown)}; train has "
                             f"{', '.join(sorted(values('train')))}")
        # of many findings, some are too rare for every split
        if lacking and name in ("val", "test") and not several:
            raise InputError(f"{name} has no image of {', '.join(lacking)}, which training has; "
                             "split anew, or leave it out")
