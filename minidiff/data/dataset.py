"""Pixels of a table in memory, their ranges, and augmentation."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.counted import order as order
from minidiff.counted import seeded as seeded
from minidiff.data import images
from minidiff.data.table import Row, Table
from minidiff.errors import InputError

ROTATION = 5.0  # degrees, at most; the limits of a careful radiographer, not of what a classifier could bear
SHIFT = 0.04    # of the side
SCALE = 0.06
GAIN = 0.10
BIAS = 0.05     # of the range
# No horizontal flip: it moves the heart to the right side, a rare disease (situs inversus) and not a variation.


def load_pixels(table: Table, size: int, *, skip_bad: bool = False) -> tuple[Table, Tensor]:
    """Read all images of a table as squares: (table, uint8 (N,3,size,size)).

    Where all are grey, one channel is kept in memory and expanded to three. Bad files raise one InputError that lists
    them; with `skip_bad` they leave the table, counted on stderr and listed in its notes. None is ever replaced.
    """

    def load(row: Row) -> np.ndarray | str:
        try:
            return images.square(images.read(row["file"]), size)
        except InputError as error:
            return str(error) if row["where"] == row["file"] else f"{row['where']}: {error}"

    with ThreadPoolExecutor() as pool:  # Pillow lets go of the interpreter while it decodes
        bar = tqdm(pool.map(load, table.rows), "reading images", len(table), unit=" images", disable=len(table) < 200)
        loaded = list(bar)
    faults = [item for item in loaded if isinstance(item, str)]
    if faults and (not skip_bad or len(faults) == len(table)):
        listed = "; ".join(faults[:5]) + ("; …" if len(faults) > 5 else "")
        raise InputError(f"{len(faults)} of {len(table)} images cannot be read (--skip-bad drops them): {listed}")
    rows = [row for row, item in zip(table.rows, loaded) if not isinstance(item, str)]
    squares = [item for item in loaded if not isinstance(item, str)]
    constant = [row["file"] for row, item in zip(rows, squares) if item.min() == item.max()]
    notes = list(table.notes)
    if faults:
        names = ", ".join([row["file"] for row, item in zip(table.rows, loaded) if isinstance(item, str)][:3])
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        print(f"{len(faults)} of {len(table)} images cannot be read and are left out: {names}{more}", file=sys.stderr)
        notes += [f"{len(faults)} of {len(table)} images could not be read and were dropped: {'; '.join(faults)}"]
    if constant:
        notes += [f"{len(constant)} images are of one grey throughout: {', '.join(constant)}"]
    return replace(table, rows=rows, notes=notes), _stack(squares, size)


def augment(batch: Tensor, generators: Sequence[torch.Generator], strength: float = 1.0) -> Tensor:
    """Small rotation, shift, scale, gain and bias of float32 (N,C,S,S) in [-1,1]; the same out.

    Image k depends on its own CPU generator alone, of which it takes six numbers, whatever else is in the batch.
    """
    n, _, height, width = batch.shape
    assert len(generators) == n and height == width, (len(generators), batch.shape)
    if n == 0 or strength == 0:
        return batch
    draws = torch.stack([torch.rand(6, generator=g, dtype=torch.float64) for g in generators])
    angle, dx, dy, zoom, gain, bias = (strength * (2 * draws - 1)).T
    angle, zoom = angle * math.radians(ROTATION), 1 / (1 + zoom * SCALE)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # theta maps places of the result to places of the input; coordinates run from -1 to 1, so a shift counts twice
    theta = torch.stack([cos, -sin, 2 * SHIFT * dx, sin, cos, 2 * SHIFT * dy], 1).view(n, 2, 3).to(batch)
    places = F.affine_grid(theta, batch.shape, align_corners=False)
    moved = F.grid_sample(batch, places, mode="bilinear", padding_mode="border", align_corners=False)
    gain, bias = ((1 + GAIN * gain).to(batch), (2 * BIAS * bias).to(batch))
    return (moved * gain.view(n, 1, 1, 1) + bias.view(n, 1, 1, 1)).clamp(-1, 1)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0…255 → float32 [-1,1]."""
    return pixels.float() / 127.5 - 1


def _stack(squares: Sequence[np.ndarray], size: int) -> Tensor:
    if not squares:
        return torch.empty(0, 3, size, size, dtype=torch.uint8)
    channels = max(len(square) for square in squares)
    stacked = np.empty((len(squares), channels, size, size), np.uint8)
    for place, square in zip(stacked, squares):
        place[:] = square
    return torch.from_numpy(stacked).expand(-1, 3, -1, -1)
