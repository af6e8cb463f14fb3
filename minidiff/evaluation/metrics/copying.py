"""Are the synthetic images copies of training images? Scores of copying, and a verdict.

Plain copies are named one by one (`named`), and one is enough. Weaker ones are sought in all images
together, against real images that the generator never saw; no single score decides:

    near      the share of synthetic images nearer to a training image than 5 % of held-out images
              are; Fisher's exact test against the held-out share itself
    C_T       `data_copying`, Meehan, Chaudhuri & Dasgupta 2020: do synthetic images rank nearer to
              the training set than held-out ones, in each cell of the space
    closest   `train_heldout_permutation_test`: if nothing was copied, training and held-out
              patients can change places. So, of the synthetic images that lie conspicuously near to
              some real image, as many have a training image there as training images there are

Copies are suspected where near or C_T finds too little distance (p < .1) and closest confirms that
it is to training images in particular (p < .05 over all spaces; below .2 it is left open). The
first two alone would also accuse images that are merely smooth or typical, which lie nearer to
everything; closest bounds the rate of false alarms at 5 %, whatever the images look like, as long
as the split was made at random by patient. Where it was not, held-out images may be of other
hospitals or years, and what these tests find is "not resolved". docs/memorisation.md has the power
of each.

Three more numbers are reported and decide nothing:

    authentic    Alaa et al. 2022: the share that lies farther from its nearest training image than
                 this one from its own. Its null is not 50 % and rises with the training set: beside
                 it stands that of held-out images
    calibrated   Carlini et al. 2023: the distance to the nearest training image by the usual
                 distance to its neighbourhood
    q            the distance to the nearest training image by that to the nearest held-out one,
                 with equally many of both; without copies its median is about 1

Distances are (n, m), of each of n images to each of m, as `pairwise.distances` gives them.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from minidiff.evaluation.features.extractor import principal
from minidiff.evaluation.metrics.distances import permuted_sides
from minidiff.evaluation.metrics.few import few, of_all
from minidiff.evaluation.metrics.named import named
from minidiff.evaluation.metrics.pairwise import distances
from minidiff.evaluation.metrics.recognition import nearest_by_patient, recognition
from minidiff.statistics import group_ids, wilson

# of closest, which bounds false alarms; of near and C_T, which only open the gate
ALPHA, UNCLEAR, GATE = 0.05, 0.2, 0.1
QUANTILE = 0.05           # of held-out images, that lie as near to training images as near says
FEWEST = 20               # images on each side, below which nothing is said
NEXT, SCALE = 50, 0.5     # Carlini et al.: so many images are the neighbourhood, and their α
AXES, AT_LEAST = 64, 20   # of the space that is cut into cells; synthetic images in one that counts
FEWEST_FOR_CELLS = 500    # images on each side, below which there is but one cell
SMALLEST_TOP = 5          # synthetic images that closest looks at, at the least


class Space(NamedTuple):
    """Distances in one space, and the cells of synthetic, held-out and training images for C_T."""

    to_train: Tensor            # (n, T) of synthetic images
    to_heldout: Tensor          # (n, H)
    heldout_to_train: Tensor    # (H, T)
    nearest_other: Tensor       # (T,) of each training image to the nearest other one
    cells: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


# Kept for the last tensors: many synthetic sets are compared with the same real images.
_between = lru_cache(maxsize=8)(distances)


def memorisation(*, fake: Mapping[str, Tensor], train: Mapping[str, Tensor],
                 heldout: Mapping[str, Tensor], pairs: int = 20,
                 patients: tuple[Sequence, Sequence] | None = None,
                 labels: tuple[Sequence, Sequence] | None = None, random_split: bool = True,
                 seed: int = 0) -> dict:
    """Compare synthetic with training and held-out images in every space, and give a verdict.

    Spaces: name → features (N,d), or small images (N,1,s,s), as `pixel_spaces` gives them.
    patients and labels are those of (training, held-out) images; without patients every image is
    one of its own. random_split: was it made at random by patient? Returns {"verdict",
    "suspected", "named", "fewest", "spaces", "closest"}: suspected is None where that cannot be
    told, named is None without small images, fewest is that of `fewest_copies`, spaces are dicts of
    numbers, and closest are pairs, as indices, in the first space. Of too many images for memory a
    draw is looked at (`few`), and the verdict says so.
    """
    n, t, h = sizes = [len(next(iter(side.values()))) for side in (fake, train, heldout)]
    fake, heldout, (patients, labels), kept = few(fake, heldout, t, (patients, labels), seed)
    images = next((name for name, x in train.items() if x.ndim == 4), None)
    seen = {} if images is None else {images: distances(fake[images], train[images])}
    found = images and named(seen[images], _between(heldout[images], train[images]), train[images],
                             seed)
    if min(n, t, h) < FEWEST:
        verdict = (f"too few images to tell ({n} synthetic, {t} training, {h} held-out; each side "
                   f"needs {FEWEST})")
        return of_all(with_named({"verdict": verdict, "suspected": None, "fewest": None,
                                  "spaces": [], "closest": []}, found), kept, sizes[::2])
    spaces, known = {}, {}
    people = tuple(patients[0]) if patients else tuple(range(t))
    kinds = tuple(labels[0]) if labels else (0,) * t
    for name, x in fake.items():
        y, z, parts = train[name], heldout[name], None
        if min(n, t, h) >= FEWEST_FOR_CELLS:
            parts = tuple(cells(y, x, z, seed=seed))
        to_train = seen[name] if name in seen else distances(x, y)
        own, others = nearest_by_patient(y, people)
        spaces[name] = s = Space(to_train, distances(x, z), _between(z, y),
                                 torch.minimum(own, others), parts)
        known[name] = recognition(own, others, people, kinds, s.to_train.amin(1),
                                  s.heldout_to_train.amin(1))
    result = copy_verdict(spaces, pairs=pairs, patients=patients, labels=labels,
                          random_split=random_split, seed=seed)
    for row in result["spaces"]:
        row["recognition"] = known[row["space"]]
    return of_all(with_named(result, found), kept, sizes[::2])


def with_named(found: dict, copies: dict | None) -> dict:
    """The verdict on all images together, overruled where single images are named."""
    if copies and (k := copies["found"]):
        are = "is a copy" if k == 1 else "are copies"
        found |= {"suspected": True,
                  "verdict": f"{k} of {copies['n']} synthetic images {are} of a training image"}
    return {**found, "named": copies}


def fewest_copies(train: int, heldout: int) -> int:
    """The fewest copies that the test of all images together can find, were they exact.

    By chance, so many nearest images are all next to a training image with probability ALPHA.
    """
    return max(SMALLEST_TOP, math.ceil(math.log(ALPHA) / math.log(train / (train + heldout))))


def copy_verdict(spaces: Mapping[str, Space], *, pairs: int = 20,
                 patients: tuple[Sequence, Sequence] | None = None,
                 labels: tuple[Sequence, Sequence] | None = None, random_split: bool = True,
                 permutations: int = 2000, seed: int = 0) -> dict:
    """`memorisation` from distances; permutations are those of closest."""
    rows = [{"space": name, **_scores(space, seed)} for name, space in spaces.items()]
    train, pool = rows[0]["train"], rows[0]["train"] + rows[0]["heldout"]
    of_all = [[*side[0], *side[1]] if side else None for side in (patients, labels)]
    nearest = [calibrated(torch.cat([s.to_train, s.to_heldout], 1)) for s in spaces.values()]
    closest = train_heldout_permutation_test(nearest, train, patients=of_all[0] or range(pool),
                                             labels=of_all[1], permutations=permutations, seed=seed)
    for row, c in zip(rows, closest):
        row |= {"closest": c.top, "closest_train": c.inside, "closest_expected": c.expected,
                "closest_p": c.p}
    verdict, suspected = _verdict(rows, random_split)
    return {"verdict": verdict, "suspected": suspected, "random_split": random_split,
            "fewest": fewest_copies(train, pool - train), "spaces": rows,
            "closest": _pairs(next(iter(spaces.values())), pairs)}


def _verdict(spaces: Sequence[dict], random_split: bool = True) -> tuple[str, bool | None]:
    """In words, and whether copies are suspected; None: open."""
    near = [s for s in spaces if min(s["near_p"], s["copying_p"]) < GATE]
    found, unclear = ([s["space"] for s in near if s["closest_p"] < limit]
                      for limit in (ALPHA, UNCLEAR))
    if found and not random_split:
        return (f"nearer to training images than to held-out ones (in {' and '.join(found)}), but "
                "the split came with the data and may not be random: look at the pairs", None)
    if found:
        return f"copies suspected (in {' and '.join(found)})", True
    if unclear:
        return f"copies cannot be excluded (in {' and '.join(unclear)}): look at the pairs", None
    return "no sign of copying", False


def _scores(s: Space, seed: int) -> dict:
    """All numbers of one space but closest."""
    own, theirs = s.to_train.amin(1).numpy(), s.heldout_to_train.amin(1).numpy()
    threshold, near, near_heldout = _below(own, theirs)
    low, high = wilson(int(near.sum()), len(own))
    c_t = data_copying(s.to_train, s.heldout_to_train, s.cells)
    limit, *odd = _below(*(calibrated(d)[0].numpy() for d in (s.to_train, s.heldout_to_train)))
    free = [authentic(d, s.nearest_other).numpy() for d in (s.to_train, s.heldout_to_train)]
    shares = [100 * int(x.sum()) / len(x) for x in free]
    return {"n": len(own), "train": s.to_train.shape[1], "heldout": s.to_heldout.shape[1],
            "threshold": threshold, "near": int(near.sum()), "near_share": float(near.mean()),
            "near_low": low, "near_high": high, "near_heldout": int(near_heldout.sum()),
            "near_heldout_share": float(near_heldout.mean()),
            "near_p": _fisher_p(near, near_heldout, "greater"),
            "median_distance": float(np.median(own)),
            "median_heldout_distance": float(np.median(theirs)),
            "copying_z": c_t.z, "copying_p": c_t.p, "copying_cells": c_t.cells,
            "calibrated_threshold": limit, "calibrated_near": int(odd[0].sum()),
            "calibrated_p": _fisher_p(*odd, "greater"),
            "auth_pct": shares[0], "auth_heldout": shares[1], "auth_excess": shares[0] - shares[1],
            "auth_p": _fisher_p(*free, "less"), **_ratio(s.to_train, s.to_heldout, seed)}


def _below(own: np.ndarray, theirs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The 5 % quantile of theirs, and which of own and of theirs are below it."""
    threshold = float(np.quantile(theirs, QUANTILE))
    return threshold, own < threshold, theirs < threshold


def _fisher_p(own: np.ndarray, theirs: np.ndarray, alternative: str) -> float:
    """Fisher's exact p that own (n,) is true more or less often than theirs (m,)."""
    table = [[int(x.sum()), int((~x).sum())] for x in (own, theirs)]
    return float(scipy.stats.fisher_exact(table, alternative=alternative).pvalue)


def _ratio(to_train: Tensor, to_heldout: Tensor, seed: int, draws: int = 20) -> dict:
    """Quantiles of q over images and over equal-size draws of the larger side."""
    rng, size = np.random.default_rng(seed), min(to_train.shape[1], to_heldout.shape[1])

    def nearest(d: Tensor) -> Tensor:
        return d[:, rng.permutation(d.shape[1])[:size]].min(1).values

    q = torch.stack([nearest(to_train) / nearest(to_heldout).clamp(min=1e-12)
                     for _ in range(draws)])
    low, quarter, median = np.quantile(q.numpy(), [0.05, 0.25, 0.5])
    return {"q05": float(low), "q25": float(quarter), "q50": float(median), "q_size": size}


def _pairs(s: Space, pairs: int) -> list[dict]:
    """The synthetic images conspicuously nearest to a training image, with what they are near."""
    relative, nearest = calibrated(s.to_train)
    return [{"fake": i, "train": int(nearest[i]), "heldout": int(s.to_heldout[i].argmin()),
             "d_train": float(s.to_train[i].min()), "d_heldout": float(s.to_heldout[i].min()),
             "relative": float(relative[i])}
            for i in relative.argsort(stable=True)[:pairs].tolist()]


class DataCopying(NamedTuple):
    """C_T, far below 0 where the training set is copied; p of this or less; cells that counted."""

    z: float
    p: float
    cells: int


def data_copying(own: Tensor, theirs: Tensor, cells: tuple[np.ndarray, np.ndarray, np.ndarray]
                 | None = None, at_least: int = AT_LEAST) -> DataCopying:
    """C_T of distances to the training images (T): of synthetic images (n,T) and held-out (m,T).

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
        return DataCopying(np.nan, np.nan, 0)
    weight = np.array(weights) / sum(weights)
    z = float(weight @ scores)
    return DataCopying(z, float(scipy.stats.norm.cdf(z / np.sqrt(weight @ weight))), len(scores))


def rank_z(x: np.ndarray, y: np.ndarray) -> float:
    """Mann–Whitney's U of x (n,) against y (m,) as a z: below 0 where x tends to be smaller."""
    n, m = len(x), len(y)
    u = scipy.stats.rankdata(np.concatenate([x, y]))[:n].sum() - n * (n + 1) / 2
    return float((u - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def cells(train: Tensor, *others: Tensor, k: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Cell numbers of others …, then of train (T,…): k-means of train on its first 64 axes."""
    mean, axes = principal(train.flatten(1).double(), AXES)
    x, *rest = ((f.flatten(1).double() - mean) @ axes for f in (train, *others))
    begin = x[np.random.default_rng(seed).permutation(len(x))[:k]].numpy()
    centres, _ = scipy.cluster.vq.kmeans2(x.numpy(), begin, iter=50, minit="matrix",
                                          missing="warn")
    return [torch.cdist(f, torch.from_numpy(centres)).argmin(1).numpy() for f in (*rest, x)]


def authentic(own: Tensor, nearest_other: Tensor) -> Tensor:
    """Is each image farther from its nearest training image than that is from another? (n,) bool.

    own (n,T); nearest_other (T,): distance of each training image to the nearest other one. The
    share of such images is AuthPct.
    """
    nearest = own.min(1)
    return nearest.values > nearest_other[nearest.indices]


def calibrated(d: Tensor) -> tuple[Tensor, Tensor]:
    """Carlini's distance to the nearest x of each row, and which that is: (n,), (n,).

    ℓ(x̂, x; S) = d(x̂, x) / (α · mean of d(x̂, y) over y in S), S the 50 nearest. They call x̂ a
    copy below 1; that depends on the space, and here it is compared with held-out images.
    """
    values, index = d.topk(min(NEXT, d.shape[1]), dim=1, largest=False)
    return values[:, 0] / (SCALE * values.mean(1)).clamp(min=1e-12), index[:, 0]


class Closest(NamedTuple):
    """Of the `top` nearest images `inside` lie next to a training image, `expected` by chance."""

    top: int
    inside: int
    expected: float
    p: float    # over all spaces


def train_heldout_permutation_test(spaces: Sequence[tuple[Tensor, Tensor]], train: int, *,
                                   patients: Sequence, labels: Sequence | None = None,
                                   permutations: int = 2000, seed: int = 0) -> list[Closest]:
    """Test that training images are no likelier to be the nearest than held-out ones, by space.

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
    strata = None if labels is None else group_ids(labels)
    member = permuted_sides(group_ids(patients), train, permutations, seed, strata=strata,
                            dtype=np.float32)
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
    return [Closest(*rest, float((1 + (greatest[1:] >= excess[0] - 1e-9).sum()) / len(greatest)))
            for excess, *rest in found]
