"""All pairs of two sets of images: distances, kernels and nearest neighbours, in chunks of rows.

Features are compared as they are. Small images are laid over each other, for a generator trained
with augmentation would copy a moved and turned image, which plain pixels do not find again: the
best of 162 moves, half of them mirrored, finds the nearest few at 24 px, least squares lays these
over exactly, and their fine detail is compared (`data.duplicates`).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.data.duplicates import laid_over, small
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import Extractor, grey
from minidiff.pixels import laid_in
from minidiff.statistics import group_ids

ROWS = 1024                 # of a matrix of all pairs at a time: that of 50,000 images is 20 GB
CELLS = 2**24               # of such a matrix at a time: 128 MiB; up to 4,096 images it is whole
SIDE, MOVED_SIDE = 64, 24   # pixels a side
CANDIDATES = 16             # images of each set that an image is laid over
# degrees, share of the side, share: of each none, this much, and its opposite
TURN, SHIFT, ZOOM = 4.0, 0.03, 0.045


def checked(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides in float64, (n,d) and (m,d); InputError for fewer than 2 images, NaN, infinity."""
    x, y = (np.asarray(f, dtype=np.float64) for f in (real, fake))
    assert x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1], (x.shape, y.shape)
    for name, f in (("real", x), ("fake", y)):
        if len(f) < 2:
            raise InputError(f"a distance needs at least 2 images on each side; the {name} side "
                             f"has {len(f)}")
        check_finite(name, f)
    return x, y


def check_finite(name: str, features: np.ndarray) -> None:
    """Raise InputError that counts the rows of (n,d) with NaN or infinity; `name` is their side."""
    bad = len(features) - int(np.isfinite(features).all(1).sum())
    if bad:
        raise InputError(f"{bad} of {len(features)} {name + ' ' if name else ''}feature vectors "
                         "hold NaN or infinity")


def patient_codes(names: Sequence | None, n: int) -> np.ndarray:
    """Patients of n images as codes (n,); without names every image is a patient of its own."""
    assert names is None or len(names) == n, (len(names), n)
    return np.arange(n) if names is None else group_ids(names)


def blocks(n: int, m: int, most: int | None = None) -> Iterator[slice]:
    """Slices of the n rows of a matrix (n, m), of CELLS cells each and of at most `most` rows."""
    step = max(1, min(most or n, CELLS // max(m, 1)))
    return (slice(first, first + step) for first in range(0, n, step))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y/d + 1)³ for all pairs: (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_mean(x: np.ndarray, y: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """Mean of k(x, y) over pairs of different patients, p (n,) and q (m,); nan without any."""
    total, pairs = 0.0, 0
    for rows in blocks(len(x), len(y), ROWS):
        apart = p[rows, None] != q
        total += (kernel(x[rows], y) * apart).sum()
        pairs += int(apart.sum())
    return float(total / pairs) if pairs else np.nan


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances of all pairs of features (n,d), (m,d) or small images (n,1,s,s) → float64 (n,m).

    Features: Euclidean, by products in float64, |x|² + |y|² − 2 x·y, in which equal rows give ≈ 0.
    Images: 1 − correlation of detail, as `overlaid` finds it.
    """
    if x.ndim == 4:
        return overlaid(x, y)
    x, y = x.double(), y.double()
    squares = y.square().sum(1)
    parts = [part.square().sum(1, keepdim=True) + squares - 2 * part @ y.T
             for part in x.split(2 * ROWS)]
    return torch.cat(parts).clamp(min=0).sqrt()


def nearest(x: Tensor, y: Tensor, k: int) -> Tensor:
    """Distances of each of x (n,d) to the k nearest of y (m,d), from near to far: (n, k).

    y is taken in parts, which as doubles hold CELLS numbers, too."""
    def of(part: Tensor) -> Tensor:
        return torch.cat([distances(x[rows], part).topk(min(k, len(part)), largest=False).values
                          for rows in blocks(len(x), len(part))])
    return torch.cat([*map(of, y.split(max(1, CELLS // y.shape[1])))], 1).topk(
        k, largest=False).values


def to_others(x: Tensor, group: Tensor | None = None) -> Iterator[Tensor]:
    """Distances of all pairs of x, `blocks` of rows at a time; infinite within a group, or to
    itself."""
    group = torch.arange(len(x)) if group is None else group
    for rows in blocks(len(x), len(x), ROWS):
        yield distances(x[rows], x).masked_fill(group[rows, None] == group, torch.inf)


def nearest_other_distance(x: Tensor, k: int = 1) -> Tensor:
    """Distance of each of x to its k-th nearest other one: (n,)."""
    return torch.cat([d.kthvalue(k, dim=1).values for d in to_others(x)])


def pixel_spaces(images: Tensor, *extractors: Extractor) -> dict[str, Tensor]:
    """The two pixel spaces, equalised pixels and small images to be laid over each other; and
    features."""
    return {"pixels": equalised(images), "pixels, moved": small(images, SIDE),
            **{e.name: e(images) for e in extractors}}


def equalised(images: Tensor, side: int = SIDE) -> Tensor:
    """Pixels after histogram equalisation: uint8 (N,C,H,W) → (N, s²), s = side or less.

    Each grey value becomes its rank in its own image, so that no change of brightness or contrast
    hides a copy. Mean 0, variance 1.
    """
    side = min(side, *images.shape[2:])
    return laid_in(torch.empty(len(images), side**2),
                   (_equalised(part, side) for part in images.split(ROWS)))


def _equalised(images: Tensor, side: int) -> Tensor:
    x = grey(images, side).flatten(1)
    x = (x * 255).round().long()
    counts = torch.zeros(len(x), 256).scatter_add_(1, x, torch.ones(x.shape))
    ranks = (counts.cumsum(1) - counts / 2).gather(1, x)
    ranks = ranks - ranks.mean(1, keepdim=True)
    return ranks / ranks.std(1, keepdim=True).clamp(min=1e-6)


@lru_cache
def moves() -> Tensor:
    """Maps of places to places (162,2,3): none, 80 turns, shifts and zooms, and all mirrored."""
    maps = []
    steps = sorted(itertools.product((0, -1, 1), repeat=4), key=any)
    for mirror, (turn, dx, dy, zoom) in itertools.product((1, -1), steps):
        angle, scale = turn * math.radians(TURN), 1 + ZOOM * zoom
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        maps.append([[cos * mirror, -sin, 2 * SHIFT * dx], [sin * mirror, cos, 2 * SHIFT * dy]])
    return torch.tensor(maps)


def moved(images: Tensor, side: int = MOVED_SIDE) -> Tensor:
    """Equalised pixels of the 162 versions of each image, unmoved first: (N,C,H,W) → (N,162,s²)."""
    x = grey(images, min(2 * side, *images.shape[2:]))[:, None]
    grids = F.affine_grid(moves(), [len(moves()), *x.shape[1:]], align_corners=False)[1:]
    versions = [F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border",
                              align_corners=False) for grid in grids]
    ranks = equalised(torch.cat([x, *versions]) * 255, side)
    return ranks.unflatten(0, (len(moves()), len(x))).transpose(0, 1).contiguous()


def overlaid(x: Tensor, y: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """1 − correlation of detail of small images x (n,1,s,s) laid over y (m,1,s,s): float64 (n,m).

    Each x is laid over the few y that it is most like at 24 px after the best move; to all others
    its distance is 1.
    """
    found, other = torch.ones(len(x), len(y), dtype=torch.float64), equalised(y, MOVED_SIDE)
    bar = tqdm(list(blocks(len(x), len(y) * len(moves()), 32)), "laying images over each other",
               disable=len(x) < 200, leave=False)
    for rows in bar:
        first, versions = rows.start, moved(x[rows])
        alike, move = (versions.flatten(0, 1) @ other.T).view(*versions.shape[:2], len(y)).max(1)
        j = alike.topk(min(candidates, len(y)), dim=1).indices
        i = torch.arange(len(j))[:, None].expand_as(j).flatten()
        j = j.flatten()
        found[first + i, j] = laid_over(x[first + i].float(), y[j].float(),
                                        moves()[move[i, j]]).double()
    return found
