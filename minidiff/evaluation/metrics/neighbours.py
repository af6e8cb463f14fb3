"""Are the synthetic images copies of training images? Nearest neighbours in pixels and in feature
spaces, and a verdict.

A generator trained with augmentation would copy a moved and turned image, which plain pixels do not
find again: so images are also laid over each other. The best of 162 moves, half of them mirrored,
finds the nearest few at 24 px, least squares lays these over exactly, and their fine detail is
compared (`data.duplicates`).

Real images that the generator never saw are the yardstick. No single score decides:

    near      the share of synthetic images nearer to a training image than 5 % of held-out images
              are; Fisher's exact test against the held-out share itself
    C_T       whether synthetic images as a whole rank nearer to the training set than held-out ones
              (`copying`)
    closest   whether the synthetic images that lie conspicuously near to some real image have a
              training image there more often than the pool of training and held-out images does
              (`copying.exchange`)

Copies are suspected where near or C_T finds too little distance (p < .1) and closest confirms that
it is to training images in particular (p < .05 over all spaces; below .2 it is left open). The
first two alone would also accuse images that are merely smooth or typical, which lie nearer to
everything; closest bounds the rate of false alarms at 5 %, whatever the images look like, as long
as the split was made at random by patient. docs/memorisation.md has the power of each.

q is the distance to the nearest training image by that to the nearest held-out image, with equally
many of both (random draws from the larger side), since the nearest of more is nearer; without
copies its median is about 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.data.duplicates import laid_over, small
from minidiff.evaluation.features.extractor import grey
from minidiff.evaluation.metrics.copying import (
    FEWEST_FOR_CELLS,
    DataCopying,
    authentic,
    calibrated,
    cells,
    data_copying,
    exchange,
)
from minidiff.statistics import wilson

SIDE, MOVED_SIDE = 64, 24              # pixels a side
LOOKED_AT = 5                          # images of each set that an image is laid over
# degrees, share of the side, share: of each none, this much, and its opposite
TURN, SHIFT, ZOOM = 4.0, 0.03, 0.045
# of closest, which bounds false alarms; of near and C_T, which only open the gate
ALPHA, UNCLEAR, GATE = 0.05, 0.2, 0.1
QUANTILE = 0.05
FEWEST = 20           # images on each side, below which nothing is said


def equalised(images: Tensor, side: int = SIDE) -> Tensor:
    """Pixels after histogram equalisation: uint8 (N,C,H,W) → (N, s²) with mean 0, variance 1; s =
    side or less.

    Each grey value becomes its rank in its own image, so that no change of brightness or contrast
    hides a copy.
    """
    x = grey(images, min(side, *images.shape[2:])).flatten(1)
    x = (x * 255).round().long()
    counts = torch.zeros(len(x), 256).scatter_add_(1, x, torch.ones(x.shape))
    ranks = (counts.cumsum(1) - counts / 2).gather(1, x)
    ranks = ranks - ranks.mean(1, keepdim=True)
    return ranks / ranks.std(1, keepdim=True).clamp(min=1e-6)


@lru_cache
def moves() -> Tensor:
    """None first, 81 small turns, shifts and zooms, then the same mirrored, as maps from places to
    places: (162,2,3).
    """
    maps = []
    for mirror, move in itertools.product((1, -1),
                                          sorted(itertools.product((0, -1, 1), repeat=4), key=any)):
        turn, dx, dy, zoom = move[0] * math.radians(TURN), 2 * SHIFT * move[1], 2 * SHIFT * move[
            2], 1 + ZOOM * move[3]
        cos, sin = math.cos(turn) / zoom, math.sin(turn) / zoom
        maps.append([[cos * mirror, -sin, dx], [sin * mirror, cos, dy]])
    return torch.tensor(maps)


def moved(images: Tensor, side: int = MOVED_SIDE) -> Tensor:
    """Equalised pixels of the 162 versions of each image, the unmoved one first: (N,C,H,W) →
    (N,162,s²).
    """
    x = grey(images, min(2 * side, *images.shape[2:]))[:, None]
    grids = F.affine_grid(moves(), [len(moves()), *x.shape[1:]], align_corners=False)
    versions = torch.cat([x,
                          *(F.grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border",
                                          align_corners=False) for grid in grids[1:])])
    return equalised(versions * 255,
                     side).unflatten(0, (len(grids), len(x))).transpose(0, 1).contiguous()


def pixel_spaces(images: Tensor) -> dict[str, Tensor]:
    """The two pixel spaces: equalised pixels, and small images to be laid over each other."""
    return {"pixels": equalised(images), "pixels, moved": small(images, SIDE)}


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances of all pairs, features (n,d), (m,d) or small images (n,1,s,s), (m,1,s,s) → float64
    (n,m).

    Features: Euclidean, by products in float64, |x|² + |y|² − 2 x·y, in which equal rows give ≈ 0.
    Images: 1 − correlation of detail, as `overlaid` finds it.
    """
    if x.ndim == 4:
        return overlaid(x, y)
    x, y = x.double(), y.double()
    squares = y.square().sum(1)
    parts = [part.square().sum(1, keepdim=True) + squares - 2 * part @ y.T
             for part in x.split(2048)]
    return torch.cat(parts).clamp(min=0).sqrt()


def overlaid(x: Tensor, y: Tensor, looked_at: int = LOOKED_AT) -> Tensor:
    """1 − correlation of detail of each x (n,1,s,s) laid over the few y (m,1,s,s) that it is most
    like at 24 px after the best move; 1 for all others: float64 (n,m)."""
    found, other = torch.ones(len(x), len(y), dtype=torch.float64), equalised(y, MOVED_SIDE)
    for first in tqdm(range(0, len(x), 32), "laying images over each other", disable=len(x) < 200,
                      leave=False):
        versions = moved(x[first : first + 32])
        alike, move = (versions.flatten(0, 1) @ other.T).view(*versions.shape[:2], len(y)).max(1)
        j = alike.topk(min(looked_at, len(y)), dim=1).indices
        i = torch.arange(len(j))[:, None].expand_as(j).flatten()
        j = j.flatten()
        found[first + i, j] = laid_over(x[first + i].float(), y[j].float(),
                                        moves()[move[i, j]]).double()
    return found


# of the very tensors: many synthetic sets are compared with the same training images
@lru_cache(maxsize=8)
def spacing(x: Tensor) -> Tensor:
    """Distance of each of x to the nearest other one, (n,)."""
    parts = []
    for first, part in enumerate(x.split(2048)):
        d = distances(part, x)
        d[torch.arange(len(part)), torch.arange(len(part)) + 2048 * first] = math.inf
        parts.append(d.amin(1))
    return torch.cat(parts)


class Space(NamedTuple):
    """Distances in one space, and the cells that it is cut into for C_T (of synthetic, held-out and
    training images).
    """

    to_train: Tensor            # (n, T) of synthetic images
    to_heldout: Tensor          # (n, H)
    heldout_to_train: Tensor    # (H, T)
    spacing: Tensor             # (T,) of each training image to the nearest other one
    cells: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


@lru_cache(maxsize=8)
def _between(heldout: Tensor, train: Tensor) -> Tensor:
    return distances(heldout, train)


def memorisation(*, fake: Mapping[str, Tensor], train: Mapping[str, Tensor],
                 heldout: Mapping[str, Tensor], pairs: int = 20,
                 patients: tuple[Sequence, Sequence] | None = None,
                 labels: tuple[Sequence, Sequence] | None = None, seed: int = 0) -> dict:
    """Compare synthetic with training and held-out images in every space: name → features (N,d), or
    small images (N,1,s,s), as `pixel_spaces` gives them.

    patients and labels are those of (training, held-out) images; without patients every image is
    one of its own. Returns {"verdict", "suspected", "spaces", "closest"}: suspected is None where
    that cannot be told, spaces are dicts of numbers, and closest are pairs, as indices, in the
    first space.
    """
    sizes = [len(next(iter(side.values()))) for side in (fake, train, heldout)]
    if min(sizes) < FEWEST:
        verdict = "too few images to tell ({} synthetic, {} training, {} held-out; each side needs {})"
        return {"verdict": verdict.format(*sizes, FEWEST), "suspected": None, "spaces": [],
                "closest": []}
    spaces = {}
    for name, x in fake.items():
        parts = tuple(cells(train[name], x, heldout[name],
                            seed=seed)) if min(sizes) >= FEWEST_FOR_CELLS else None
        spaces[name] = Space(distances(x, train[name]), distances(x, heldout[name]),
                             _between(heldout[name], train[name]), spacing(train[name]), parts)
    return judge(spaces, pairs=pairs, patients=patients, labels=labels, seed=seed)


def judge(spaces: Mapping[str, Space], *, pairs: int = 20, patients: tuple[Sequence, Sequence]
          | None = None, labels: tuple[Sequence, Sequence] | None = None, divisions: int = 2000,
          seed: int = 0) -> dict:
    """`memorisation` from distances; divisions are those of `exchange`."""
    rows = [{"space": name, "n": len(s.to_train), "train": s.to_train.shape[1],
             "heldout": s.to_heldout.shape[1], **_near(s.to_train, s.heldout_to_train),
             **_ranked(data_copying(s.to_train, s.heldout_to_train, s.cells)),
             **_calibrated(s.to_train, s.heldout_to_train),
             **_authentic(s.to_train, s.heldout_to_train, s.spacing),
             **_ratio(s.to_train, s.to_heldout, seed)} for name, s in spaces.items()]
    train, pool = rows[0]["train"], rows[0]["train"] + rows[0]["heldout"]
    of_all = [[*side[0], *side[1]] if side else None for side in (patients, labels)]
    found = exchange([calibrated(torch.cat([s.to_train, s.to_heldout], 1))
                      for s in spaces.values()], train, patients=of_all[0] or range(pool),
                     labels=of_all[1], divisions=divisions, seed=seed)
    for row, e in zip(rows, found):
        row |= {"closest": e.top, "closest_train": e.inside, "closest_expected": e.expected,
                "closest_p": e.p}
    verdict, suspected = _verdict(rows)
    first = next(iter(spaces.values()))
    return {"verdict": verdict, "suspected": suspected, "spaces": rows,
            "closest": _pairs(first.to_train, first.to_heldout, pairs)}


def _verdict(spaces: Sequence[dict]) -> tuple[str, bool | None]:
    """In words, and whether copies are suspected; None: open."""
    near = [s for s in spaces if min(s["near_p"], s["copying_p"]) < GATE]
    found, unclear = ([s["space"] for s in near if s["closest_p"] < limit]
                      for limit in (ALPHA, UNCLEAR))
    if found:
        return f"copies suspected (in {' and '.join(found)})", True
    if unclear:
        return f"copies cannot be excluded (in {' and '.join(unclear)}): look at the pairs", None
    return "no sign of copying", False


def _ranked(c: DataCopying) -> dict:
    return {"copying_z": c.z, "copying_p": c.p, "copying_cells": c.cells}


def _near(to_train: Tensor, heldout_to_train: Tensor) -> dict:
    """How many synthetic images lie nearer to training images than the nearest 5 % of held-out ones
    do.
    """
    own, theirs = to_train.amin(1).numpy(), heldout_to_train.amin(1).numpy()
    threshold, near, near_heldout, p = _below(own, theirs)
    low, high = wilson(near, len(own))
    return {"threshold": threshold, "near": near, "near_share": near / len(own), "near_low": low,
            "near_high": high, "near_heldout": near_heldout,
            "near_heldout_share": near_heldout / len(theirs), "near_p": p,
            "median_distance": float(np.median(own)),
            "median_heldout_distance": float(np.median(theirs))}


def _below(own: np.ndarray, theirs: np.ndarray) -> tuple[float, int, int, float]:
    """The 5 % quantile of theirs, how many of own and of theirs are below it, and Fisher's p of
    more of own.
    """
    threshold = float(np.quantile(theirs, QUANTILE))
    a, b = int((own < threshold).sum()), int((theirs < threshold).sum())
    table = [[a, len(own) - a], [b, len(theirs) - b]]
    return threshold, a, b, float(scipy.stats.fisher_exact(table, alternative="greater").pvalue)


def _calibrated(to_train: Tensor, heldout_to_train: Tensor) -> dict:
    """The same of the calibrated distance: conspicuously near by the standard of the image's own
    neighbourhood.
    """
    threshold, near, _, p = _below(*(calibrated(d)[0].numpy()
                                     for d in (to_train, heldout_to_train)))
    return {"calibrated_threshold": threshold, "calibrated_near": near, "calibrated_p": p}


def _authentic(to_train: Tensor, heldout_to_train: Tensor, spaced: Tensor) -> dict:
    """AuthPct of synthetic and of held-out images against the same training images; Fisher's p of a
    lower one.
    """
    own, theirs = authentic(to_train, spaced), authentic(heldout_to_train, spaced)
    table = [[int(x.sum()), int((~x).sum())] for x in (own, theirs)]
    shares = [100 * a / (a + b) for a, b in table]
    return {"auth_pct": shares[0], "auth_heldout": shares[1], "auth_excess": shares[0] - shares[1],
            "auth_p": float(scipy.stats.fisher_exact(table, alternative="less").pvalue)}


def _ratio(to_train: Tensor, to_heldout: Tensor, seed: int, draws: int = 20) -> dict:
    """Quantiles of q over images and over equal-size draws of the larger side."""
    rng, size = np.random.default_rng(seed), min(to_train.shape[1], to_heldout.shape[1])
    draw = lambda d: d[:, rng.permutation(d.shape[1])[:size]].min(1).values  # noqa: E731
    q = torch.stack([draw(to_train) / draw(to_heldout).clamp(min=1e-12) for _ in range(draws)])
    low, quarter, median = np.quantile(q.numpy(), [0.05, 0.25, 0.5])
    return {"q05": float(low), "q25": float(quarter), "q50": float(median), "q_size": size}


def _pairs(to_train: Tensor, to_heldout: Tensor, pairs: int) -> list[dict]:
    """The synthetic images nearest to a training image by the standard of that image's next
    neighbours.
    """
    relative, nearest = calibrated(to_train)
    return [{"fake": i, "train": int(nearest[i]), "heldout": int(to_heldout[i].argmin()),
             "d_train": float(to_train[i].min()), "d_heldout": float(to_heldout[i].min()),
             "relative": float(relative[i])}
            for i in relative.argsort(stable=True)[:pairs].tolist()]
