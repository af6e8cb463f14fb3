"""Reads what a study is made of, and refuses what breaks its protocol.

Refused are a patient, an identical file or picture, and a near copy on both sides; a generator that
has seen validation or test patients; a test set of one label; labels that training does not know.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minidiff import variables as var
from minidiff.classification.arms import DUPLICATES, Images
from minidiff.classification.generators import check_one_recipe
from minidiff.counted import order
from minidiff.data.dataset import load_pixels
from minidiff.data.duplicates import SIDE, near_duplicates
from minidiff.data.files import typical_side
from minidiff.data.pixel_map import contents
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
from minidiff.data.table import Table, read_external, read_table
from minidiff.errors import InputError, count
from minidiff.pixels import Gathered, Pictures
from minidiff.root import AS_WE_NAME, Reading

INTERNAL = ("train", "val", "test")


@dataclass(frozen=True)
class Inputs:
    """Sets by name: train, val, test, then the external ones; and sources, synthetic or real."""

    target: var.Category | var.Findings
    sets: dict[str, Images]
    sources: dict[str, list[Images]]  # of each generator that a source pools
    saw: dict[str, set[str] | None]   # sha256 of the generators' training images; None: unknown
    tables: dict[str, Table]          # of the sets
    notes: list[str]
    others: frozenset[str] = frozenset()  # sources of other real images

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

    @property
    def generators(self) -> dict[str, int]:
        """How many generators each source pools."""
        return {name: len(own) for name, own in self.sources.items()}

    def made_for(self, network: int) -> dict[str, Images]:
        """Of each source the images for one network, the study's first being 0: those of generator
        network mod their number."""
        return {name: own[network % len(own)] for name, own in self.sources.items()}

    def rows(self, name: str) -> list[dict[str, str]]:
        """Those of a set, or of all generators of a source."""
        parts = [self.sets[name]] if name in self.sets else self.sources[name]
        return [row for images in parts for row in images.rows]

    def truth(self, name: str) -> torch.Tensor:
        """bool (N,k): which label, or which findings, each image of a set has."""
        return self.target.bits(self.sets[name].labels)


def read(data: Sequence[str], synthetic: Mapping[str, Sequence[str]], external: Sequence[str],
         reading: Reading = AS_WE_NAME, *, size: int, seed: int, out: str, target: str = "label",
         others: Mapping[str, str] = {}, hold_out: str = "", near_copies: str = "refuse",
         skip_bad: bool = False) -> Inputs:
    """Read everything and refuse what breaks the protocol.

    synthetic: name → folders of samples, each of another generator of one recipe. others: name →
    folder of real images of other patients, which is used whole, whatever its splits. hold_out:
    column=value, whose rows are a test set of their own. near_copies: "refuse", or "drop"
    the test images that are near copies of training images.
    """
    outside = [Path(folder).resolve().name for folder in external]
    column, _, value = hold_out.partition("=")
    names = Counter([*INTERNAL, DUPLICATES, *outside, *synthetic, *others, *[value] * bool(value)])
    for name in [name for name, n in names.items() if n > 1]:
        raise InputError(f"two sets are named {name!r}; rename a folder of --external or what "
                         "--hold-out names, or write --synthetic NAME=DIR")
    real = _targeted(read_table(data, reading, seed=seed, split_dir=Path(out).parent), target)
    real, tables, everyone = real.select(split=SPLITS), dict[str, Table](), real.rows
    if hold_out:
        real, tables[value] = _held_out(real, column, value)
    real, carved = _with_validation(real, seed)
    tables = {**{name: real.select(split=name) for name in INTERNAL}, **tables}
    for name, folder in zip(outside, external):
        tables[name] = _targeted(read_external(folder, reading), target)
        _check_apart([*tables["train"].rows, *tables["val"].rows], real.hashes, name, tables[name])
    check_labels({name: table.column("label") for name, table in tables.items()}, target)
    hashes = {file: digest for table in tables.values() for file, digest in table.hashes.items()}
    unseen = [row for name, table in tables.items()
              if name not in (("train", "val") if carved else ("train",)) for row in table.rows]
    samples = {name: [_targeted(_synthetic(name, folder, tables["train"].rows, unseen, hashes,
                                           everyone), target) for folder in folders]
               for name, folders in synthetic.items()}
    notes = [note for name, folders in synthetic.items()
             for note in check_one_recipe(folders, samples[name])]
    known = [{**row, "split": "the study"} for table in tables.values() for row in table.rows]
    samples |= {name: [_targeted(_other(name, folder, reading, known, hashes), target)]
                for name, folder in others.items()}
    loaded, drawn = ({name: load_pixels(table, size, skip_bad=skip_bad)
                      for name, table in some.items()}
                     for some in (tables, {(name, k): table for name, own in samples.items()
                                           for k, table in enumerate(own)}))
    # each file once: a held-out source may borrow test images
    apart = {**loaded, **{name: drawn[name, 0] for name in others}}
    once = {row["file"]: ({**row, "split": name}, key) for name, own in apart.items()
            for row, key in zip(own[0].rows, contents(*own))}
    check_pictures(*zip(*once.values()))
    loaded |= _near_copies(apart, near_copies, ("train", "val", *others))
    # once more, for images may have been left out
    variable = check_labels({name: loaded[name][0].column("label") for name in tables}, target)
    made = {key: Images(pixels, var.encode([variable], table.rows)["label"],
                        table.column("patient"), table.rows, table.digests)
            for key, (table, pixels) in {**loaded, **drawn}.items()}
    notes += [note for table, _ in (*loaded.values(), *drawn.values()) for note in table.notes]
    return Inputs(variable, {name: made[name] for name in tables},
                  {name: [made[name, k] for k in range(len(own))] for name, own in samples.items()},
                  {name: trained_on(folders[0]) for name, folders in synthetic.items()}
                  | dict.fromkeys(others, set()),
                  {name: table for name, (table, _) in loaded.items()}, list(dict.fromkeys(notes)),
                  frozenset(others))


def _targeted(table: Table, target: str) -> Table:
    """The table with another column as its label; rows where it is empty are left out."""
    if target == "label":
        return table
    if not any(target in row for row in table.rows):
        where = os.path.commonpath([os.path.dirname(row["file"]) for row in table.rows])
        raise InputError(f"--target {target}: no such column in {where}; there are "
                         f"{', '.join(table.rows[0])}")
    rows = [{**row, "label": row[target]} for row in table.rows if row.get(target, "")]
    lost = len(table) - len(rows)
    notes = [f"{count(lost, 'image')} without {target} left out"] if lost else []
    return replace(table, rows=rows, notes=[*table.notes, *notes])


def _with_validation(table: Table, seed: int) -> tuple[Table, bool]:
    """The table with a val split: where it brings none, by patient out of train, and then True."""
    if "val" in table.column("split"):
        return table, False
    train = sorted(table.select(split="train").rows, key=lambda row: row["label"], reverse=True)
    label_of = {row["patient"]: row["label"] for row in train}  # the first of a patient's labels
    chosen = set()
    for label in set(label_of.values()):
        own = sorted(patient for patient in label_of if label_of[patient] == label)
        chosen |= {own[k] for k in order(len(own), seed, range(max(1, round(HELD_OUT * len(own)))))}
    rows = [{**row, "split": "val"} if row["split"] == "train" and row["patient"] in chosen
            else row for row in table.rows]
    note = f"no validation split: {len(chosen)} of the training patients were taken for it"
    return replace(table, rows=rows, notes=[*table.notes, note]), True


def _held_out(table: Table, column: str, value: str) -> tuple[Table, Table]:
    """The table without the patients of these rows, and the rows as a test set. If it has one label
    only, the other labels' test images stand beside it, and the note says so."""
    own = [row for row in table.rows if value and row.get(column) == value]
    if not own:
        there = ", ".join(filter(None, sorted(set(table.column(column))))) or "no value"
        raise InputError(f"--hold-out {column}={value}: write column=value; {column or 'a column'} "
                         f"has {there}")
    patients, labels = {row["patient"] for row in own}, {row["label"] for row in own}
    rest = replace(table, rows=[row for row in table.rows if row["patient"] not in patients])
    notes = [f"{value}: held out of training, validation and the internal test"]
    if len(labels) == 1:
        own += [row for row in rest.rows if row["split"] == "test" and row["label"] not in labels]
        notes += [f"{value} has {labels.pop()} only; the other labels beside it are the internal "
                  "test's"]
    return rest, replace(table, rows=own, notes=notes)


def _synthetic(name: str, folder: str, train: Sequence[Row], unseen: Sequence[Row],
               hashes: Mapping[str, str], real: Sequence[Row]) -> Table:
    """Samples; refused if one is a copy of a real file, or if the generator was trained on an
    image, or on a patient, of the rows that are to be unseen."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder of samples; run sample.py first, or ask for "
                         "--arms real")
    table, seen = read_table(folder, split=False), trained_on(folder)
    if var.ANY in set(table.labels) - {row["label"] for row in train}:
        raise InputError(f"{folder} has images without a label, for their model was told none: a "
                         "classifier cannot learn from them; train the model with --condition "
                         "label, or ask for --arms real")
    check_synthetic(table.rows, table.hashes, hashes.values(), folder)
    patients = {row["file"]: row["patient"] for row in real}
    notes = check_unseen(unseen, hashes, seen, f"the generator of {folder}", patients)
    if of_other_data(seen, train, hashes):
        notes += [f"{folder}: its generator was trained on other images than these training images"]
        if name == "synthetic":
            raise InputError(f"{notes[-1]}; write --synthetic NAME={folder} if that is what you "
                             "want to know")
    # samples of two folders are of two patients, though their files have the same names
    rows = [{**row, "patient": f"{folder} {row['patient']}"} for row in table.rows]
    return replace(table, rows=rows, notes=[*table.notes, *notes])


def _check_apart(rows: Sequence[Row], hashes: Mapping[str, str], name: str, table: Table) -> None:
    """Raise InputError if a set of another hospital shares a patient or a file with these rows."""
    check_leakage([*rows, *({**row, "split": name} for row in table.rows)],
                  {**hashes, **table.hashes},
                  f"; --distinct-patients if {name} numbers its own, else leave them out of it")


def _other(name: str, folder: str, reading: Reading, known: Sequence[Row],
           hashes: Mapping[str, str]) -> Table:
    """Real images to train on besides; refused if a model made them, or if they share a patient or
    a file with any set of the study."""
    if (Path(folder) / "manifest.json").is_file():
        raise InputError(f"--other {name}={folder}: a model made these images; give them as "
                         f"--synthetic {name}={folder}")
    table = read_external(folder, reading)
    _check_apart(known, hashes, name, table)
    return table


def _near_copies(loaded: Mapping[str, tuple[Table, torch.Tensor]], what: str,
                 seen: Sequence[str]) -> dict[str, tuple[Table, Pictures]]:
    """Refuse test images that show again a film of the sets that were `seen`, or leave them out.

    Whatever the size of the study, they are compared at 96 px; files of fewer have too little
    detail to tell films apart, and that they were not compared is noted. Returns the changed sets.
    """
    names = [name for name, (table, _) in loaded.items() for _ in table.rows]
    rows = [row for table, _ in loaded.values() for row in table.rows]
    table, pixels = loaded["test"]
    if typical_side((row["file"] for row in rows), SIDE) < SIDE:
        note = (f"near copies were not looked for: with files of fewer than {SIDE} px, different "
                "films look like one")
        return {"test": (replace(table, notes=[*table.notes, note]), pixels)}
    rows_by_set = [{**row, "split": name} for row, name in zip(rows, names)]  # in this order
    hashes = {file: digest for t, _ in loaded.values() for file, digest in t.hashes.items()}
    all_pixels = (load_pixels(Table(rows_by_set, hashes=hashes), SIDE)[1][:, :1]
                  if pixels.shape[-1] < SIDE
                  else Gathered(*(pixels[:, :1] for _, pixels in loaded.values())))
    pairs = [(i, j, d) for i, j, d in near_duplicates(all_pixels)
             if (names[i] in seen) != (names[j] in seen)]
    if pairs and what == "refuse":
        (i, j, d), found = pairs[0], count(len(pairs), "near copy", "near copies")
        raise InputError(f"{found} of training or validation images in a test set, e.g. "
                         f"{rows[i]['file']} ({names[i]}) and {rows[j]['file']} ({names[j]}), "
                         f"distance {d:.3f}; --near-copies drop leaves the test images out")
    gone, left = {rows[k]["file"] for pair in pairs for k in pair[:2] if names[k] not in seen}, {}
    for name, (table, pixels) in loaded.items():
        index = [k for k, row in enumerate(table.rows) if row["file"] not in gone or name in seen]
        if len(index) < len(table):
            lost = sorted(os.path.basename(row["file"]) for row in table.rows
                          if row["file"] in gone)
            note = (f"{name}: {len(lost)} near copies of training or validation images are left "
                    f"out: {', '.join(lost)}")
            rows = [table.rows[k] for k in index]
            left[name] = (replace(table, rows=rows, notes=[*table.notes, note]),
                          Gathered(pixels, index=index))
    return left


def check_labels(cells: Mapping[str, Sequence[str]], target: str = "label") -> var.Category:
    """What the sets are labelled by, a variable named label.

    InputError for numbers, a set of one label or none, and labels that train has not.
    """
    found = var.infer(target, cells["train"]) if len(set(cells["train"])) > 1 else None
    if found and not found.values:
        raise InputError(f"--target {target}: numbers from {found.low:g} to {found.high:g}; a "
                         "classifier tells labels apart, of which a column of numbers may have up "
                         f"to {var.FEW_VALUES}")
    for name, column in cells.items():
        if len(set(column)) < 2:
            there = f"only {column[0]!r}, {count(len(column), 'image')}" if column else "no image"
            raise InputError(f"a classifier needs two labels or more; {name} has {there}: add "
                             "images of another label, or name another column by --target")
        values = (set(column) if found.exclusive
                  else set().union(*(var.present(target, cell) for cell in column)))
        unknown = sorted(values - set(found.values))
        lacking = [value for value in found.values if value not in values]
        if unknown:
            raise InputError(f"{name} has labels that the train split has not: "
                             f"{', '.join(unknown)}; train has {', '.join(found.values)}")
        # of many findings, some are too rare for every split
        if lacking and name in ("val", "test") and found.exclusive:
            raise InputError(f"{name} has no image of {', '.join(lacking)}, which training has; "
                             "split anew, or leave it out")
    return replace(found, name="label")
