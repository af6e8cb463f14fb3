"""The images of data folders as one tensor, and what a command says of them at its start."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minidiff import distributed
from minidiff import variables as var
from minidiff.balance import turns
from minidiff.cells import in_units
from minidiff.counted import order, order_of_groups
from minidiff.data import phantom, pixel_map
from minidiff.data.files import typical_side
from minidiff.data.images import AS_EIGHT
from minidiff.data.split import SPLITS, check_pictures
from minidiff.data.table import Row, Table, read_table
from minidiff.errors import InputError, count, first_few
from minidiff.pixels import Gathered, Pictures, is_grey
from minidiff.root import AS_WE_NAME, DEMO, Reading

FEW_COLOUR = 0.05  # share of colour images up to which they are made grey like the rest
LONGEST = 30  # characters of a label at a glance
WIDEST = 8  # labels side by side at a glance; of more, the most frequent
PHANTOM = f"{DEMO}/phantom"  # the demo's data, drawn if they are not there
Grey = Literal["auto", "yes", "no"]


@dataclass(frozen=True, eq=False)
class Images:
    """Rows and, in the same order, their pixels: uint8 or uint16 (N, 3, S, S)."""

    table: Table
    pixels: Pictures

    def __len__(self) -> int:
        return len(self.table)

    @property
    def size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def grey(self) -> bool:
        return is_grey(self.pixels[:1])  # one channel in memory, expanded to three

    @property
    def bits(self) -> int:
        return 16 if self.pixels.dtype == torch.uint16 else 8

    @property
    def facts(self) -> dict[str, Any]:
        """What a model saw: side, colour, depth; and of each modality, or else label, the window
        that all its training images share, or ""."""
        seen: dict[str, set[str]] = {}
        for row in self.part("train").table.rows:
            window = row.get("window", "")
            seen.setdefault(row.get("modality") or row["label"], set()).add(
                window if in_units(window) else "")
        shared = {name: next(iter(each)) if len(each) == 1 else "" for name, each in seen.items()}
        return {"size": self.size, "grey": self.grey, "bits": self.bits, "windows": shared}

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of each image: later stages refuse to test on what this one was trained on."""
        return sorted({self.table.hashes[row["file"]] for row in self.table.rows})

    def part(self, *splits: str, label: str = "") -> "Images":
        """The images of these splits, of one label or of all."""
        index = [i for i, row in enumerate(self.table.rows)
                 if row["split"] in splits and label in ("", row["label"])]
        start, stop = (index[0], index[-1] + 1) if index else (0, 0)
        pixels = Gathered(self.pixels, index=index)
        if isinstance(self.pixels, Tensor):  # mapped, a split is a slice; in memory it is copied
            pixels = self.pixels[start:stop] if stop - start == len(index) else pixels[:]
        return Images(replace(self.table, rows=[self.table.rows[i] for i in index]), pixels)

    def names(self, index: Sequence[int]) -> str:
        """The first images of a batch by name, for the message of a fault."""
        return first_few((self.table.rows[i]["file"] for i in index), 4)


def read_images(folders: Sequence[str], size: int, reading: Reading = AS_WE_NAME, *, seed: int,
                split_dir: Path, skip_bad: bool, prior: Sequence[str] = (),
                grey: Grey = "auto", deep: bool = False) -> Images:
    """The images of data folders, and of the training split of `prior` folders; leaks are checked
    over all. deep: see `load_pixels`.

    Raises InputError where there is nothing to train on or nothing held out.
    """
    if size % 8 or size < 32:
        raise InputError(f"--size {size} is not allowed: a multiple of 8, 32 or more")
    table = read_table([*folders, *prior], reading, seed=seed, split_dir=split_dir)
    rows = [row for row in table.rows
            if row["split"] in ("train", *(() if _under(row, prior) else ("val", "test")))]
    table = replace(table, rows=rows)
    for splits in (("train",), ("val", "test")):
        if not len(table.select(split=splits)):
            found = ", ".join(sorted(set(table.column("split")))) or "none of train, val, test"
            raise InputError(f"{' '.join(folders)} has no image in split {' or '.join(splits)}; it "
                             f"has {found}")
    table, pixels = load_pixels(table, size, skip_bad=skip_bad, grey=grey, deep=deep)
    check_pictures(table.rows, pixel_map.contents(table, pixels))
    return Images(table, pixels)


def picker(train: Images, seed: int, balance: float = 0.0, prior: Sequence[str] = (),
           prior_share: float = 0.0) -> Callable[[Sequence[int]], list[int]]:
    """slots → which training image fills each.

    balance: 0 leaves labels and findings as frequent as they are, 1 makes all equally frequent (see
    `balance.turns`). `prior_share` of the slots is filled from the prior folders: images of the
    same kind that keep a model from forgetting the rest (class-prior preservation of Ruiz et al.
    2023, with real images).
    """
    rows = train.table.rows
    others = [i for i, row in enumerate(rows) if _under(row, prior)]
    if not balance and not others:
        return lambda slots: order(len(rows), seed, slots)
    own = sorted(set(range(len(rows))) - set(others))
    cells = sorted({rows[i]["label"] for i in own})
    groups = [[i for i in own if rows[i]["label"] == cell] for cell in cells]
    counts = dict(zip(cells, map(len, groups)))
    shares = [*turns(counts, balance, any(var.AND in cell for cell in cells)).values()]
    if others:
        groups, shares = [*groups, others], [
            *shares, max(1, round(sum(shares) * prior_share / (1 - prior_share)))]
    return lambda slots: order_of_groups(groups, shares, seed, slots)


def _under(row: Row, folders: Sequence[str]) -> bool:
    return any(row["file"].startswith(os.path.join(os.path.abspath(folder), ""))
               for folder in folders)


def load_pixels(table: Table, size: int, *, skip_bad: bool = False,
                grey: Grey = "auto", deep: bool = False) -> tuple[Table, Tensor]:
    """Read all images of a table as squares: (table, uint8 (N,3,size,size)); with `deep` uint16,
    where all are grey of 16 bits over the whole range, else these become 8 and a note says so.

    Where all are grey, one channel is kept and expanded to three. `grey` yes takes the mean of the
    channels of colour images, no leaves them, auto takes it where they are few among grey ones,
    since two of them must not colour all samples. Bad files raise one InputError that lists them;
    with `skip_bad` they are dropped, counted on stderr and listed in the notes. Pixels that are
    mapped are ordered split by split, so that a split is a slice.
    """
    if pixel_map.is_mapped(len(table), size):
        table = replace(table, rows=sorted(table.rows, key=lambda row: (
            SPLITS.index(row["split"]) if row.get("split") in SPLITS else len(SPLITS))))
    form = pixel_map.form_of(table.rows, grey == "yes", deep)
    pixels, kinds, bad = pixel_map.read(table, size, form)
    if bad and (not skip_bad or len(bad) == len(table)):
        raise InputError(f"{len(bad)} of {len(table)} images cannot be read (--skip-bad drops "
                         f"them): {first_few(bad.values(), 5, '; ')}")
    notes = list(table.notes)
    if bad:
        print(f"{len(bad)} of {len(table)} images cannot be read and are left out: "
              f"{first_few(bad)}", file=sys.stderr)
        notes += [f"{len(bad)} of {len(table)} images could not be read and were dropped: "
                  f"{'; '.join(bad.values())}"]
    constant, colour, fine = ([row["file"] for row, kind in zip(table.rows, kinds) if kind & each]
                              for each in (pixel_map.CONSTANT, pixel_map.COLOUR, pixel_map.DEEP))
    rows = [row for row in table.rows if row["file"] not in bad]
    if constant:
        notes += [f"{count(len(constant), 'image')} of one grey throughout: {', '.join(constant)}"]
    if 0 < len(colour) < len(rows):
        turned = grey == "yes" or (grey == "auto" and len(colour) <= FEW_COLOUR * len(rows))
        notes += [f"{len(colour)} of {len(rows)} images are in colour, the others grey; these were "
                  f"{'made grey' if turned else 'left so'}: {first_few(colour)}"]
        grey = "yes" if turned else grey
    wanted = (3 if not rows or (colour and grey != "yes") else
              2 if deep and len(fine) == len(rows) else 1)
    if fine and wanted != 2:
        notes += [f"{count(len(fine), 'image')} {AS_EIGHT}"]
    table = replace(table, rows=rows, notes=notes)
    if wanted != form:
        pixels = pixel_map.read(table, size, wanted)[0]
    return table, pixels.expand(-1, 3, -1, -1)


def read_training_set(cfg: Any, size: int, prior: tuple[str, ...] = ()) -> Images:
    """The images that a stage's config names, `size` px wide; rank 0 makes a split if need be."""
    with distributed.rank0_first():
        if cfg.data == (PHANTOM,):
            phantom.write(PHANTOM, scarce=phantom.SCARCE)
        data = read_images(cfg.data, size, cfg, seed=cfg.seed, split_dir=Path(cfg.root),
                           skip_bad=cfg.skip_bad, prior=prior, grey=cfg.grey, deep=True)
    if distributed.rank() == 0:
        print(glance((*cfg.data, *prior), by_split(data.table), grey=data.grey, bits=data.bits,
                     size=size, root=cfg.root))
    return data


def glance(folders: Sequence[str], tables: Mapping[str, Table], *, grey: bool | None = None,
           bits: int = 8, size: int = 0, root: str | Path = "") -> str:
    """Images of each set by label, patients, colour, and the notes of reading them.

    tables: set → its rows; size: the side to which they are resized, px; root: the folder in which
    a split that was made here is kept.
    """
    rows = [row for table in tables.values() for row in table.rows]
    of_each = {name: var.labels_in(table.column("label")) for name, table in tables.items()}
    counts = Counter(label for several in of_each.values() for own in several for label in own)
    labels = sorted(label for label, _ in counts.most_common(WIDEST))
    others = ["others"] if len(counts) > WIDEST else []
    lines = [["", *(label if len(label) <= LONGEST else f"{label[:LONGEST]}…" for label in labels),
              *others, "images", "patients"]]
    for name, table in tables.items():
        own = Counter(label if label in labels else "others"
                      for several in of_each[name] for label in several)
        cells = [*(own[label] for label in labels + others), len(table),
                 len(set(table.column("patient")))]
        lines.append([name, *(f"{n:,}" for n in cells)])
    wide = [max(map(len, column)) for column in zip(*lines)]
    text = [f"data: {' '.join(folders)}"]
    text += ["  " + "  ".join(cell.rjust(w) for cell, w in zip(line, wide)).rstrip()
             for line in lines]
    assumed = any(table.patients_assumed for name, table in tables.items() if name != "synthetic")
    colour = {None: [], True: [f"grey{f' of {bits} bits' * (bits > 8)}"], False: ["colour"]}[grey]
    text += ["  " + "; ".join(["patients assumed: one image, one patient" if assumed
                               else "patients known", *colour])]
    side = typical_side((row["file"] for row in rows), size) if size else 0
    text += [f"  most images have {side} px or fewer and are enlarged to {size}, which blurs "
             f"them"] if side < size else []
    notes = dict.fromkeys(note for table in tables.values() for note in table.notes)
    notes = [note.replace("kept in split-", f"kept in {Path(root) / 'split-'}") for note in notes]
    return "\n".join(text + [f"  {note}" for note in notes
                             if "one image = one patient" not in note])


def by_split(table: Table) -> dict[str, Table]:
    """The table's parts that are trained and tested on."""
    return {name: part for name in SPLITS if len(part := table.select(split=name))}
