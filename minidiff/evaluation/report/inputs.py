"""What a report is made of: tables and pixels of training, held-out and synthetic images, refused where they cannot be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from minidiff import runs
from minidiff.data import images
from minidiff.data.dataset import load_pixels
from minidiff.data.split import check_unseen, trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation.report.comparison import FEWEST

SMALLEST = 8  # px a side at which images are compared


class Inputs(Protocol):
    """The knobs that are read here; those of `evaluate.Config`."""

    data: tuple[str, ...]
    samples: str
    classifier: str
    out: str
    size: int
    audit: int
    repeats: int
    shown: int
    seed: int
    skip_bad: bool


def read(cfg: Inputs) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pixels of train, heldout (val and test) and synthetic, after what can be refused is refused."""
    if cfg.audit and cfg.audit < FEWEST:
        raise InputError(f"--audit {cfg.audit} is not allowed: {FEWEST} or more images on each side, or 0 for none")
    if cfg.repeats < 10 or cfg.shown < 1 or cfg.size < 0 or 0 < cfg.size < SMALLEST:
        raise InputError(f"repeats {cfg.repeats}, shown {cfg.shown}, size {cfg.size}: allowed are 10 and 1 or more, and a "
                         f"size of {SMALLEST} or more (0: that of the samples)")
    for folder in cfg.data:
        a, b = Path(folder).resolve(), Path(cfg.samples).resolve()
        if a == b or a in b.parents or b in a.parents:
            raise InputError(f"--samples {cfg.samples} is the folder of real data {folder}, or lies in it or around it")
    real = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.out).parent)
    made = read_table(cfg.samples, split=False)
    tables = {"train": real.select(split="train"), "heldout": real.select(split=("val", "test")), "synthetic": made}
    for name in ("train", "heldout"):
        if not len(tables[name]):
            raise InputError(f"{' '.join(cfg.data)} has no image in split {'train' if name == 'train' else 'val or test'}")
    strange = sorted(set(made.labels) - set(tables["train"].labels))
    if strange:
        known = ", ".join(tables["train"].labels)
        raise InputError(f"{cfg.samples}: the data have no label {', '.join(strange)}; they have {known}")
    known = set(real.hashes.values())
    same = [file for file in made.column("file") if made.hashes[file] in known]
    if same:
        raise InputError(f"{cfg.samples} holds {len(same)} files of the real data, e.g. {same[0]}: these are not synthetic")
    unknown = check_origin(cfg, tables["heldout"])
    tables["heldout"] = replace(tables["heldout"], notes=[*real.notes, *unknown])
    size = cfg.size or next(filter(None, map(side, made.column("file"))), SMALLEST)
    loaded = {name: load_pixels(table, size, skip_bad=cfg.skip_bad) for name, table in tables.items()}
    for name in ("heldout", "synthetic"):
        loaded[name][0].notes.extend(mixed(loaded[name][0], size, "real" if name == "heldout" else "synthetic"))
    return {name: table for name, (table, _) in loaded.items()}, {name: x for name, (_, x) in loaded.items()}


def check_origin(cfg: Inputs, heldout: Table) -> list[str]:
    """Raise InputError if generator or judge has seen a held-out image; a note for each of which that is unknown."""
    judge = Path(cfg.classifier) / "judge"
    listed = judge / "trained_on.json"
    seen = {"the generator": trained_on(cfg.samples)}
    if judge.is_dir():
        seen["the judge"] = set(runs.read_json(listed)) if listed.is_file() else None
    for who, hashes in seen.items():
        check_unseen(heldout.rows, heldout.hashes, hashes or set(), who)
    return [f"what {who} was trained on is unknown" for who, hashes in seen.items() if not hashes]


def side(file: str) -> int:
    """Shorter side of an image; 0 where it cannot be read."""
    try:
        return min(images.read(file).shape[1:])
    except InputError:
        return 0


def mixed(table: Table, size: int, name: str, at_most: int = 200) -> list[str]:
    """A note where images (the first 200) differ among themselves in size or mode, or are enlarged."""
    shapes = [images.read(file).shape for file in table.column("file")[:at_most]]
    sides = Counter(min(shape[1:]) for shape in shapes)
    found = [f"{name} images have shorter sides from {min(sides)} to {max(sides)} px; all were brought to {size} px"
             ] if len(sides) > 1 else []
    enlarged, colour = sum(n for s, n in sides.items() if s < size), sum(shape[0] == 3 for shape in shapes)
    found += [f"{enlarged} of {len(shapes)} {name} images are smaller than {size} px and were enlarged, which blurs them"
              ] if enlarged else []
    return found + ([f"{colour} of {len(shapes)} {name} images are in colour, the others grey"]
                    if 0 < colour < len(shapes) else [])


def notes(tables: dict[str, Table]) -> list[str]:
    """What reading any of the tables remarked, once; that a synthetic image is a patient of its own goes without saying."""
    return list(dict.fromkeys(note for name, table in tables.items() for note in table.notes
                              if name != "synthetic" or "one image = one patient" not in note))
