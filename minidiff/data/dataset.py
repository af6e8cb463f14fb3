"""Pixels of a table in memory, their ranges, and augmentation."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.counted import order, order_of_groups
from minidiff.data import images
from minidiff.data.split import check_pictures
from minidiff.data.table import Row, Table, read_table
from minidiff.errors import InputError, count, first_few

ROTATION = 5.0  # degrees, at most: the limits of a careful radiographer
SHIFT = 0.04    # of the side
SCALE = 0.06
GAIN = 0.10
BIAS = 0.05     # of the range
FEW_COLOUR = 0.05  # share of colour images up to which they are made grey like the rest
Grey = Literal["auto", "yes", "no"]
# No horizontal flip: a heart on the right is a rare disease (situs inversus), not a variation.


@dataclass(frozen=True, eq=False)
class Images:
    """Rows and, in the same order, their pixels: uint8 (N, 3, S, S)."""

    table: Table
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.table)

    @property
    def size(self) -> int:
        return self.pixels.shape[-1]

    @property
    def grey(self) -> bool:
        return self.pixels.stride(1) == 0  # one channel in memory, expanded to three

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of each image: later stages refuse to test on what this one was trained on."""
        return sorted({self.table.hashes[row["file"]] for row in self.table.rows})

    def part(self, *splits: str) -> "Images":
        """The images of these splits."""
        index = [i for i, row in enumerate(self.table.rows) if row["split"] in splits]
        channels = 1 if self.grey else 3
        pixels = self.pixels[:, :channels][index].expand(-1, 3, -1, -1)
        return Images(replace(self.table, rows=[self.table.rows[i] for i in index]), pixels)

    def names(self, index: Sequence[int]) -> str:
        """The first images of a batch by name, for the message of a fault."""
        return first_few((self.table.rows[i]["file"] for i in index), 4)


def read_images(folders: Sequence[str], size: int, *, seed: int, split_dir: Path, skip_bad: bool,
                prior: Sequence[str] = (), grey: Grey = "auto") -> Images:
    """The images of data folders, and of the training split of `prior` folders; leaks are checked
    over all.

    Raises InputError where there is nothing to train on or nothing held out.
    """
    if size % 8 or size < 32:
        raise InputError(f"--size {size} is not allowed: a multiple of 8, 32 or more")
    table = read_table([*folders, *prior], seed=seed, split_dir=split_dir)
    rows = [row for row in table.rows
            if row["split"] in ("train", *(() if _under(row, prior) else ("val", "test")))]
    table = replace(table, rows=rows)
    for splits in (("train",), ("val", "test")):
        if not len(table.select(split=splits)):
            found = ", ".join(sorted(set(table.column("split")))) or "none of train, val, test"
            raise InputError(f"{' '.join(folders)} has no image in split {' or '.join(splits)}; it "
                             f"has {found}")
    table, pixels = load_pixels(table, size, skip_bad=skip_bad, grey=grey)
    check_pictures(table.rows, pixels)
    return Images(table, pixels)


def picker(train: Images, seed: int, balance: float = 0.0, prior: Sequence[str] = (),
           prior_share: float = 0.0) -> Callable[[Sequence[int]], list[int]]:
    """slots → which training image fills each.

    balance: 0 leaves labels as frequent as they are, 1 makes all equally frequent. `prior_share` of
    the slots is filled from the prior folders: images of the same kind that keep a model from
    forgetting the rest (class-prior preservation of Ruiz et al. 2023, with real images).
    """
    rows = train.table.rows
    others = [i for i, row in enumerate(rows) if _under(row, prior)]
    if not balance and not others:
        return lambda slots: order(len(rows), seed, slots)
    own = sorted(set(range(len(rows))) - set(others))
    groups = [[i for i in own if rows[i]["label"] == label]
              for label in sorted({rows[i]["label"] for i in own})]
    most = max(map(len, groups))
    shares = [round(len(group) ** (1 - balance) * most**balance) for group in groups]
    if others:
        groups, shares = [*groups, others], [
            *shares, max(1, round(sum(shares) * prior_share / (1 - prior_share)))]
    return lambda slots: order_of_groups(groups, shares, seed, slots)


def _under(row: Row, folders: Sequence[str]) -> bool:
    return any(row["file"].startswith(os.path.join(os.path.abspath(folder), ""))
               for folder in folders)


def load_pixels(table: Table, size: int, *, skip_bad: bool = False,
                grey: Grey = "auto") -> tuple[Table, Tensor]:
    """Read all images of a table as squares: (table, uint8 (N,3,size,size)).

    Where all are grey, one channel is kept in memory and expanded to three. `grey` yes takes the
    mean of the channels of colour images, no leaves them, auto takes it where they are few among
    grey ones, since two of them must not colour all samples. Bad files raise one InputError that
    lists them; with `skip_bad` they are dropped, counted on stderr and listed in the notes.
    """

    def load(row: Row) -> np.ndarray | str:
        try:
            return images.square(images.read(row["file"]), size)
        except InputError as error:
            return str(error) if row["where"] == row["file"] else f"{row['where']}: {error}"

    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it decodes
        loaded = list(tqdm(pool.map(load, table.rows), "reading images", len(table),
                           unit=" images", disable=len(table) < 200))
    faults = [item for item in loaded if isinstance(item, str)]
    if faults and (not skip_bad or len(faults) == len(table)):
        listed = "; ".join(faults[:5]) + ("; …" if len(faults) > 5 else "")
        raise InputError(f"{len(faults)} of {len(table)} images cannot be read (--skip-bad drops "
                         f"them): {listed}")
    rows = [row for row, item in zip(table.rows, loaded) if not isinstance(item, str)]
    squares = [item for item in loaded if not isinstance(item, str)]
    constant = [row["file"] for row, item in zip(rows, squares) if item.min() == item.max()]
    notes = list(table.notes)
    if faults:
        names = [row["file"] for row, item in zip(table.rows, loaded) if isinstance(item, str)]
        print(f"{len(faults)} of {len(table)} images cannot be read and are left out: "
              f"{first_few(names)}", file=sys.stderr)
        notes += [f"{len(faults)} of {len(table)} images could not be read and were dropped: "
                  f"{'; '.join(faults)}"]
    if constant:
        notes += [f"{count(len(constant), 'image')} of one grey throughout: {', '.join(constant)}"]
    colour = [row["file"] for row, item in zip(rows, squares) if len(item) == 3]
    if 0 < len(colour) < len(rows):
        turned = grey == "yes" or (grey == "auto" and len(colour) <= FEW_COLOUR * len(rows))
        notes += [f"{len(colour)} of {len(rows)} images are in colour, the others grey; these were "
                  f"{'made grey' if turned else 'left so'}: {first_few(colour)}"]
        grey = "yes" if turned else grey
    if grey == "yes":
        squares = [item.mean(0, keepdims=True).round().astype(np.uint8) for item in squares]
    return replace(table, rows=rows, notes=notes), _stack(squares, size)


def augment(batch: Tensor, generators: Sequence[torch.Generator], strength: float = 1.0) -> Tensor:
    """Small rotation, shift, scale, gain and bias of float32 (N,C,S,S) in [-1,1]; the same out.

    Image k depends on its own CPU generator alone, of which it takes six numbers, whatever else is
    in the batch.
    """
    n, _, height, width = batch.shape
    assert len(generators) == n and height == width, (len(generators), batch.shape)
    if n == 0 or strength == 0:
        return batch
    draws = torch.stack([torch.rand(6, generator=g, dtype=torch.float64) for g in generators])
    angle, dx, dy, zoom, gain, bias = (strength * (2 * draws - 1)).T
    angle, zoom = angle * math.radians(ROTATION), 1 / (1 + zoom * SCALE)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # theta maps places of the result to places of the input; coordinates run from -1 to 1, so a
    # shift counts twice
    theta = torch.stack([cos, -sin, 2 * SHIFT * dx, sin, cos, 2 * SHIFT * dy], 1).view(n, 2,
                                                                                       3).to(batch)
    places = F.affine_grid(theta, batch.shape, align_corners=False)
    moved = F.grid_sample(batch, places, mode="bilinear", padding_mode="border",
                          align_corners=False)
    gain, bias = ((1 + GAIN * gain).to(batch), (2 * BIAS * bias).to(batch))
    return (moved * gain.view(n, 1, 1, 1) + bias.view(n, 1, 1, 1)).clamp(-1, 1)


def _stack(squares: Sequence[np.ndarray], size: int) -> Tensor:
    if not squares:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    channels = max(len(square) for square in squares)
    stacked = np.empty((len(squares), channels, size, size), np.uint8)
    for place, square in zip(stacked, squares):
        place[:] = square
    return torch.from_numpy(stacked).expand(-1, 3, -1, -1)
