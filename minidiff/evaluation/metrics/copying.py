"""Scores of copying, from distances alone: three that are published, and one test that needs no
yardstick.

    data_copying   C_T, Meehan, Chaudhuri & Dasgupta 2020: are synthetic images nearer to the
                   training set than held-out real ones, by ranks, in each cell of the space
    authentic      Alaa et al. 2022: the share that lies farther from its nearest training image
                   than this one from its own. Its null is not 50 % and rises with the size of the
                   training set: beside it stands that of held-out images
    calibrated     Carlini et al. 2023: the distance to the nearest training image by the usual
                   distance to its neighbourhood
    exchange       if nothing was copied, training and held-out patients can change places: of the
                   synthetic images that lie conspicuously near to some real image, as many have a
                   training image there as training images there are

The first three also accuse images that are merely smooth or typical, which lie nearer to
everything; the fourth does not. Distances are (n, m), of each of n images to each of m, any real
number of the space's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from minidiff.evaluation.features.extractor import principal
from minidiff.statistics import group_ids

# Carlini et al.: so many nearest images are the neighbourhood, this much of its distance is 1
NEXT, ALPHA = 50, 0.5
# of the space that is cut into cells; synthetic images in a cell that counts
AXES, AT_LEAST = 64, 20
FEWEST_FOR_CELLS = 500    # images on each side, below which there is but one cell
SMALLEST_TOP = 5          # synthetic images that `exchange` looks at, at the least


class DataCopying(NamedTuple):
    """C_T, far below 0 where the training set is copied; P(this or less without copying); cells
    that counted; sizes.
    """

    z: float
    p: float
    cells: int
    n: int
    m: int


def data_copying(own: Tensor, theirs: Tensor, cells: tuple[np.ndarray, np.ndarray, np.ndarray]
                 | None = None, at_least: int = AT_LEAST) -> DataCopying:
    """C_T of distances to the training images (T): of synthetic images (n,T) and of held-out ones
    (m,T).

    cells are the cell numbers of synthetic, held-out and training images; the nearest training
    image is looked for in the image's own cell. Cells with fewer than `at_least` synthetic images
    do not count (τ = at_least/n); the others weigh as many held-out images as they hold. nan where
    no cell counts.
    """
    if cells is None:
        cells = tuple(np.zeros(size, int) for size in (len(own), len(theirs), own.shape[1]))
        at_least = 1
    scores, weights = [], []
    for cell in np.unique(cells[2]):
        a, b, t = (torch.from_numpy(np.flatnonzero(part == cell)) for part in cells)
        if len(a) >= at_least and len(b):
            scores.append(rank_z(own[a][:, t].amin(1).numpy(), theirs[b][:, t].amin(1).numpy()))
            weights.append(len(b))
    if not scores:
        return DataCopying(np.nan, np.nan, 0, len(own), len(theirs))
    weight = np.array(weights) / sum(weights)
    z = float(weight @ scores)
    return DataCopying(z, float(scipy.stats.norm.cdf(z / np.sqrt(weight @ weight))), len(scores),
                       len(own), len(theirs))


def rank_z(x: np.ndarray, y: np.ndarray) -> float:
    """Mann–Whitney's U of x against y as a z: below 0 where x tends to be smaller. (n,), (m,); ties
    count half.
    """
    n, m = len(x), len(y)
    u = scipy.stats.rankdata(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def cells(train: Tensor, *others: Tensor, k: int = 3, seed: int = 0) -> list[np.ndarray]:
    """k-means of training features (T,…) on their first 64 principal axes → cell numbers of others
    …, then of train.
    """
    mean, axes = principal(train.flatten(1).double(), AXES)
    x, *rest = ((f.flatten(1).double() - mean) @ axes for f in (train, *others))
    begin = x[np.random.default_rng(seed).permutation(len(x))[:k]].numpy()
    centres = torch.from_numpy(scipy.cluster.vq.kmeans2(x.numpy(), begin, iter=50, minit="matrix",
                                                        missing="warn")[0])
    return [torch.cdist(f, centres).argmin(1).numpy() for f in (*rest, x)]


def authentic(own: Tensor, spacing: Tensor) -> Tensor:
    """Is each image farther from its nearest training image than that one from its own nearest?
    (n,T), (T,) → (n,) bool.

    spacing: distance of each training image to the nearest other one. The share of such images is
    AuthPct.
    """
    nearest = own.min(1)
    return nearest.values > spacing[nearest.indices]


def calibrated(d: Tensor) -> tuple[Tensor, Tensor]:
    """ℓ(x̂, x; S) = d(x̂, x) / (α · mean of d(x̂, y) over y in S), S the 50 nearest, and which the
    nearest x is: (n,), (n,).

    Carlini et al. call x̂ a copy below 1; that depends on the space, and here it is compared with
    held-out images.
    """
    values, index = d.topk(min(NEXT, d.shape[1]), dim=1, largest=False)
    return values[:, 0] / (ALPHA * values.mean(1)).clamp(min=1e-12), index[:, 0]


class Exchange(NamedTuple):
    """Of the `top` nearest synthetic images `inside` lie next to a training image, `expected` by
    chance; p: all spaces.
    """

    top: int
    inside: int
    expected: float
    p: float


def exchange(spaces: Sequence[tuple[Tensor, Tensor]], train: int, *, patients: Sequence,
             labels: Sequence | None = None,
             divisions: int = 2000, seed: int = 0) -> list[Exchange]:
    """Permutation test that training images are no likelier to be the nearest than held-out ones;
    one result a space.

    spaces: for n synthetic images, how near the nearest real image is (`calibrated`, small is near)
    and which it is, of the pool of `train` training images followed by the held-out ones. patients
    (and labels) of the pool: patients are dealt out anew, those of a label among themselves, so
    that any one label's share of either side stays.

    How many of the nearest images are copies is not known beforehand: the statistic is the greatest
    excess, in standard deviations, over tops of 5 to all images; the p of each space is that of the
    greatest over all spaces (Westfall & Young 1993), so that the chance of any p ≤ α is α at most,
    however many spaces there are and whatever the images look like, as long as the split was made
    at random by patient.
    """
    member = dealt(train, patients, labels, divisions, seed)
    n = len(spaces[0][0])
    tops = np.unique(np.append(np.geomspace(min(SMALLEST_TOP, n), n, 24).round().astype(int), n))
    found = []
    for relative, nearest in spaces:
        order = nearest[relative.argsort(stable=True)].numpy()
        hits = np.cumsum(np.add.reduceat(member[:, order], np.append(0, tops[:-1]), axis=1,
                                         dtype=np.int32), axis=1)
        expected, spread = hits.mean(0), hits.std(0)
        excess = (hits - expected) / np.where(spread > 0, spread, np.inf)
        at = int(excess[0].argmax())
        found.append((excess.max(1), int(tops[at]), int(hits[0, at]), float(expected[at])))
    greatest = np.max([excess for excess, *_ in found], 0)
    return [Exchange(*rest, float((1 + (greatest[1:] >= excess[0] - 1e-9).sum()) / len(greatest)))
            for excess, *rest in found]


def dealt(train: int, patients: Sequence, labels: Sequence | None, divisions: int,
          seed: int) -> np.ndarray:
    """Who is in the training set, (1 + divisions, pool) bool: as it is, then at random. Of each
    label as many images as there are; the patient at the border may be divided."""
    group = group_ids(patients)
    stratum = group_ids(labels) if labels is not None else np.zeros(len(group), int)
    rng = np.random.default_rng(seed)
    # one key a patient
    keys = rng.random((divisions, group.max() + 1), dtype=np.float32)[:, group]
    member = np.zeros((1 + divisions, len(group)), bool)
    member[0, :train] = True
    for one in np.unique(stratum):
        inside = np.flatnonzero(stratum == one)
        order = inside[np.argsort(keys[:, inside], axis=1, kind="stable")]
        np.put_along_axis(member[1:], order[:, :int((inside < train).sum())], True, axis=1)
    return member
