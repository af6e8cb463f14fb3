"""Are the synthetic images copies of training images? Nearest neighbours in pixels and in one feature space.

A generator trained with augmentation would copy a moved and turned image, which plain pixels do not find again: so
pixels are also compared after the best of 81 small moves.

Real images that the generator never saw are the yardstick, and two tests must agree before copies are suspected:

    near      the share of synthetic images nearer to a training image than 5 % of held-out images are; Fisher's exact
              test against the held-out share itself. It alone would also accuse images that are merely smooth or
              typical: they lie nearer to everything.
    closest   synthetic images whose nearest real image, of training and held-out together, is nearest by the standard of
              its next 50 (the ratio of Carlini et al. 2023). A generator that copies nothing finds training images there
              only as often as the pool holds them, whatever else is odd about its output; binomial test.

q is the distance to the nearest training image by that to the nearest held-out image, with equally many of both
(random draws from the larger side), since the nearest of more is nearer; without copies its median is about 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from minidiff.evaluation.features import grey
from minidiff.statistics import wilson

SIDE, MOVED_SIDE = 64, 24              # pixels a side
TURN, SHIFT, ZOOM = 4.0, 0.03, 0.045  # degrees, share of the side, share: of each none, this much, and its opposite
NEXT = 50             # next neighbours, which say what an ordinary distance is
ALPHA, UNCLEAR, QUANTILE = 0.01, 0.05, 0.05
FEWEST = 20           # images on each side, below which nothing is said


def equalised(images: Tensor, side: int = SIDE) -> Tensor:
    """Pixels after histogram equalisation: uint8 (N,C,H,W) → (N, s²) with mean 0, variance 1; s = side or less.

    Each grey value becomes its rank in its own image, so that no change of brightness or contrast hides a copy.
    """
    x = grey(images, min(side, *images.shape[2:])).flatten(1)
    x = (x * 255).round().long()
    counts = torch.zeros(len(x), 256).scatter_add_(1, x, torch.ones(x.shape))
    ranks = (counts.cumsum(1) - counts / 2).gather(1, x)
    ranks = ranks - ranks.mean(1, keepdim=True)
    return ranks / ranks.std(1, keepdim=True).clamp(min=1e-6)


def moved(images: Tensor, side: int = MOVED_SIDE) -> Tensor:
    """Equalised pixels of 81 versions of each image, turned, shifted and zoomed: (N,C,H,W) → (N,81,s²), unmoved first."""
    x = grey(images, min(2 * side, *images.shape[2:]))[:, None]
    versions = []
    for move in sorted(itertools.product((0, -1, 1), repeat=4), key=any):
        turn, dx, dy, zoom = move[0] * math.radians(TURN), 2 * SHIFT * move[1], 2 * SHIFT * move[2], 1 + ZOOM * move[3]
        cos, sin = math.cos(turn) / zoom, math.sin(turn) / zoom
        theta = torch.tensor([[[cos, -sin, dx], [sin, cos, dy]]])
        grid = F.affine_grid(theta, [1, *x.shape[1:]], align_corners=False).expand(len(x), -1, -1, -1)
        version = F.grid_sample(x, grid, padding_mode="border", align_corners=False) if any(move) else x
        versions.append(equalised(version * 255, side))
    return torch.stack(versions, 1)


def pixel_spaces(images: Tensor, *, query: bool) -> dict[str, Tensor]:
    """The two pixel spaces; training images, which nothing is asked about, need no moved versions (query=False)."""
    return {"pixels": equalised(images),
            "pixels, moved": moved(images) if query else equalised(images, MOVED_SIDE)}


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of all pairs, (n,d), (m,d) → (n,m).

    (n,v,d) holds v versions of each: of x the nearest counts, of y the first.
    By products, |x|² + |y|² − 2 x·y: in float64, in which equal rows give ≈ 0, but for many versions in float32.
    """
    precision = torch.float64 if x.ndim == 2 else torch.float32
    x, y = (x if x.ndim == 3 else x[:, None]).to(precision), (y if y.ndim == 2 else y[:, 0]).to(precision)
    squares, nearest = y.square().sum(1), []
    for part in x.split(max(1, 2048 // x.shape[1])):
        versions = part.flatten(0, 1)
        d = versions.square().sum(1, keepdim=True) + squares - 2 * versions @ y.T
        nearest.append(d.view(*part.shape[:2], len(y)).amin(1))
    return torch.cat(nearest).double().clamp(min=0).sqrt()


def memorisation(*, fake: Mapping[str, Tensor], train: Mapping[str, Tensor], heldout: Mapping[str, Tensor],
                 pairs: int = 8, seed: int = 0) -> dict:
    """Compare synthetic with training and held-out images in every space: name → features (N,d), or versions (N,v,d).

    Returns {"verdict", "suspected", "spaces", "closest"}: suspected is None where that cannot be told, spaces are dicts
    of numbers, and closest are pairs, as indices, in the first space.
    """
    sizes = [len(next(iter(side.values()))) for side in (fake, train, heldout)]
    if min(sizes) < FEWEST:
        verdict = "too few images to tell ({} synthetic, {} training, {} held-out; each side needs {})"
        return {"verdict": verdict.format(*sizes, FEWEST), "suspected": None, "spaces": [], "closest": []}
    spaces, closest = [], []
    for name in fake:
        to_train, to_heldout = distances(fake[name], train[name]), distances(fake[name], heldout[name])
        spaces.append({"space": name, "n": sizes[0], "train": sizes[1], "heldout": sizes[2],
                       **_near(to_train, distances(heldout[name], train[name])),
                       **_closest(to_train, to_heldout),
                       **_ratio(to_train, to_heldout, seed)})
        closest = closest or _pairs(to_train, to_heldout, pairs)
    near = [s for s in spaces if s["near_p"] < ALPHA]
    found, unclear = ([s["space"] for s in near if s["closest_p"] < limit] for limit in (ALPHA, UNCLEAR))
    if found:
        verdict, suspected = f"copies suspected (in {' and '.join(found)})", True
    elif unclear:
        verdict, suspected = f"copies cannot be excluded (in {' and '.join(unclear)}): look at the pairs", None
    else:
        verdict, suspected = "no sign of copying", False
    return {"verdict": verdict, "suspected": suspected, "spaces": spaces, "closest": closest}


def _near(to_train: Tensor, heldout_to_train: Tensor) -> dict:
    """How many synthetic images lie nearer to training images than the nearest 5 % of held-out ones do."""
    own, theirs = to_train.min(1).values.numpy(), heldout_to_train.min(1).values.numpy()
    threshold = float(np.quantile(theirs, QUANTILE))
    near, near_heldout = int((own < threshold).sum()), int((theirs < threshold).sum())
    table = [[near, len(own) - near], [near_heldout, len(theirs) - near_heldout]]
    low, high = wilson(near, len(own))
    return {"threshold": threshold, "near": near, "near_share": near / len(own), "near_low": low, "near_high": high,
            "near_heldout": near_heldout, "near_heldout_share": near_heldout / len(theirs),
            "near_p": float(stats.fisher_exact(table, alternative="greater").pvalue),
            "median_distance": float(np.median(own)), "median_heldout_distance": float(np.median(theirs))}


def _closest(to_train: Tensor, to_heldout: Tensor) -> dict:
    """Of the most conspicuously near synthetic images, how many have their nearest real image in the training set."""
    share = to_train.shape[1] / (to_train.shape[1] + to_heldout.shape[1])
    k = max(FEWEST, math.ceil(math.log(ALPHA / 10) / math.log(share)))   # enough for chance alone to be below ALPHA/10
    k = min(k, max(FEWEST, len(to_train) // 4), len(to_train))
    relative, nearest = nearness(torch.cat([to_train, to_heldout], 1))
    first = relative.argsort(stable=True)[:k]
    inside = int((nearest[first] < to_train.shape[1]).sum())
    return {"closest": k, "closest_train": inside, "closest_expected": k * share,
            "closest_p": float(stats.binomtest(inside, k, share, alternative="greater").pvalue)}


def _ratio(to_train: Tensor, to_heldout: Tensor, seed: int, draws: int = 20) -> dict:
    """Quantiles of q over images and over equal-size draws of the larger side."""
    rng, size = np.random.default_rng(seed), min(to_train.shape[1], to_heldout.shape[1])
    draw = lambda d: d[:, rng.permutation(d.shape[1])[:size]].min(1).values  # noqa: E731
    q = torch.stack([draw(to_train) / draw(to_heldout).clamp(min=1e-12) for _ in range(draws)])
    low, quarter, median = np.quantile(q.numpy(), [0.05, 0.25, 0.5])
    return {"q05": float(low), "q25": float(quarter), "q50": float(median), "q_size": size}


def _pairs(to_train: Tensor, to_heldout: Tensor, pairs: int) -> list[dict]:
    """The synthetic images nearest to a training image by the standard of that image's next neighbours."""
    relative, nearest = nearness(to_train)
    return [{"fake": i, "train": int(nearest[i]), "heldout": int(to_heldout[i].argmin()),
             "d_train": float(to_train[i].min()), "d_heldout": float(to_heldout[i].min()), "relative": float(relative[i])}
            for i in relative.argsort(stable=True)[:pairs].tolist()]


def nearness(d: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest by the mean distance to the next 50, and the index of the nearest: (n,m) → (n,), (n,)."""
    values, index = d.topk(min(NEXT + 1, d.shape[1]), dim=1, largest=False)
    return values[:, 0] / values[:, 1:].mean(1).clamp(min=1e-12), index[:, 0]
