"""What a report is made of: tables and pixels of training, held-out and synthetic images, refused
where they cannot be.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from minidiff import runs
from minidiff.data import images
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.split import check_synthetic, check_unseen, of_other_data, trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation.judge import seen_by
from minidiff.evaluation.metrics.comparison import FEWEST
from minidiff.root import Rooted

SMALLEST = 8  # px a side at which images are compared


@dataclass(frozen=True)
class Config(Rooted):
    data: tuple[str, ...] = ()                # real data sets, with their splits; none: the root's
    samples: str = "ROOT/samples"             # folder of synthetic images, of the same form as a data set
    classifier: str = "ROOT/classifier"       # its judge/ reads images, its results are shown; may be absent
    vae: str = "ROOT/vae"                     # for its curve and reconstructions; may be absent
    diffusion: str = "ROOT/diffusion"         # for its curve and the membership audit; may be absent
    matrix: str = "ROOT/matrix"               # of evaluate.py matrix, for its heat map; may be absent
    out: str = "ROOT/report"                  # report.html and report.json
    extractors: tuple[str, ...] = ()          # pixels, classifier, vae or NAME=FILE; none: pixels and the judge
    size: int = 0                             # side at which images are compared, px; 0: that of the samples
    audit: int = 200                          # images on each side of the membership audit, 20 or more; 0: none
    repeats: int = 100                        # draws behind each floor; twice as many FD halves if synthetic, else half
    shown: int = 16                           # pictures of each label and kind
    seed: int = 0                             # of draws, resamples, pictures; of the patient split where the data bring none
    skip_bad: bool = False                    # leave unreadable images out, listed and counted, instead of refusing
    device: str = "auto"                      # of the membership audit: auto, cpu, cuda, cuda:1 …


def read(cfg: Config) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pixels of train, heldout (val and test) and synthetic, after what can be refused
    is refused.
    """
    if cfg.audit and cfg.audit < FEWEST:
        raise InputError(f"--audit {cfg.audit} is not allowed: {FEWEST} or more images on each "
                         "side, or 0 for none")
    if cfg.repeats < 10 or cfg.shown < 1 or cfg.size < 0 or 0 < cfg.size < SMALLEST:
        raise InputError(f"repeats {cfg.repeats}, shown {cfg.shown}, size {cfg.size}: allowed are "
                         f"10 and 1 or more, and a size of {SMALLEST} or more (0: that of the "
                         "samples)")
    for folder in cfg.data:
        if runs.nested(folder, cfg.samples):
            raise InputError(f"--samples {cfg.samples} is the folder of real data {folder}, or "
                             "lies in it or around it")
    real = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.root))
    made = read_table(cfg.samples, split=False)
    tables = {"train": real.select(split="train"), "heldout": real.select(split=("val", "test")),
              "synthetic": made}
    for name in ("train", "heldout"):
        if not len(tables[name]):
            raise InputError(f"{' '.join(cfg.data)} has no image in split "
                             f"{'train' if name == 'train' else 'val or test'}")
    strange = sorted(set(made.labels) - set(tables["train"].labels))
    if strange:
        known = ", ".join(tables["train"].labels)
        raise InputError(f"{cfg.samples}: the data have no label {', '.join(strange)}; they have "
                         f"{known}")
    check_synthetic(made.rows, made.hashes, real.hashes.values(), cfg.samples)
    unknown = check_origin(cfg, tables["heldout"])
    size = cfg.size or next(filter(None, map(side, made.column("file"))), SMALLEST)
    # grey is
    whole = Images(*load_pixels(real.select(split=("train", "val", "test")), size,
                                skip_bad=cfg.skip_bad))
    # decided once
    parts = {"train": whole.part("train"), "heldout": whole.part("val", "test")}
    loaded = {name: (replace(part.table, notes=[*part.table.notes, *unknown]), part.pixels)
              for name, part in parts.items()}
    loaded["synthetic"] = load_pixels(made, size, skip_bad=cfg.skip_bad)
    for name in ("heldout", "synthetic"):
        loaded[name][0].notes.extend(mixed(loaded[name][0], size,
                                           "real" if name == "heldout" else "synthetic"))
    return {name: table
            for name, (table, _) in loaded.items()}, {name: x for name, (_, x) in loaded.items()}


def check_origin(cfg: Config, heldout: Table) -> list[str]:
    """Raise InputError if generator or judge has seen a held-out image; a note for each of which
    that is unknown.
    """
    seen = {"the generator": trained_on(cfg.samples)}
    if (Path(cfg.classifier) / "judge").is_dir():
        seen["the judge"] = seen_by(cfg.classifier)
    return [note for who, known in seen.items()
            for note in check_unseen(heldout.rows, heldout.hashes, known, who)]


def of_these_data(cfg: Config, train: Table) -> tuple[Config, bool, list[str]]:
    """The config without the runs that were trained on other images than these, whether the
    generator was, and a note for each of them.

    Of the generator's own training images nothing is known then: that is noted, too, for no copy of
    them can be seen.
    """
    saw = {"classifier": seen_by(cfg.classifier), "vae": saw_of(Path(cfg.vae) / "vae.json"),
           "diffusion": saw_of(Path(cfg.diffusion) / "model.json")}
    strange = [name for name, seen in saw.items() if of_other_data(seen, train.rows, train.hashes)]
    notes = [f"{getattr(cfg, name)} was trained on other images than these: the page leaves it "
             f"out" for name in strange]
    elsewhere = of_other_data(trained_on(cfg.samples), train.rows, train.hashes)
    if elsewhere:
        notes.append(f"{cfg.samples}: its generator was trained on other images than these, of "
                     "which it may hold copies; none can be seen here")
    return replace(cfg, **dict.fromkeys(strange, os.devnull)), elsewhere, notes


def saw_of(path: Path) -> list[str]:
    return runs.read_json(path).get("trained_on", []) if path.is_file() else []


def side(file: str) -> int:
    """Shorter side of an image; 0 where it cannot be read."""
    try:
        return min(images.read(file).shape[1:])
    except InputError:
        return 0


def mixed(table: Table, size: int, name: str, at_most: int = 200) -> list[str]:
    """A note where images (the first 200) differ among themselves in size or mode, or are
    enlarged.
    """
    shapes = [images.read(file).shape for file in table.column("file")[:at_most]]
    sides = Counter(min(shape[1:]) for shape in shapes)
    found = [f"{name} images have shorter sides from {min(sides)} to {max(sides)} px; all were "
             f"brought to {size} px"] if len(sides) > 1 else []
    enlarged, colour = sum(n for s, n in sides.items()
                           if s < size), sum(shape[0] == 3 for shape in shapes)
    found += [f"{enlarged} of {len(shapes)} {name} images are smaller than {size} px and were "
              f"enlarged, which blurs them"] if enlarged else []
    return found + ([f"{colour} of {len(shapes)} {name} images are in colour, the others grey"]
                    if 0 < colour < len(shapes) else [])


def notes(tables: dict[str, Table]) -> list[str]:
    """What reading any of the tables remarked, once; that a synthetic image is a patient of its own
    goes without saying.
    """
    return list(dict.fromkeys(note for name, table in tables.items() for note in table.notes
                              if name != "synthetic" or "one image = one patient" not in note))
