"""Which images lie where the other set's images lie? Two answers, both by nearest neighbours.

Precision, recall, density and coverage draw a ball around each image of a set, that reaches to the
k-th nearest other image of the same set.

    precision   share of synthetic images inside any real image's ball (Kynkäänniemi et al. 2019):
                is it plausible?
    recall      share of real images inside any synthetic image's ball: could it all have been made?
    density     how many real balls a synthetic image is in, divided by k (Naeem et al. 2020): one
                far-off real image with a huge ball does not count for much
    coverage    share of real images with a synthetic image inside their ball: collapse shows here

Two samples of one distribution do not score 1: 1,000 normal variables give about .53, .53, 1.0 and
.97 at n = 3,000, and the density of three pairs of samples ran from .98 to 1.10. So all four stand
beside real against real at the same n, with as many images on each side.

C2ST is the 1-nearest-neighbour two-sample test: each image of the pooled sets takes the label, real
or synthetic, of its nearest neighbour among all others (Lopez-Paz & Oquab 2017; Schilling 1986).
Where both sets are of one kind about half of the labels are right; 1 is a set that anything tells
apart. Well below one half is a warning, too: the nearest neighbour of a synthetic image then is a
real one that it copies. Encoders leave traces: files of both sides must have come out of the same
one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from minidiff.errors import InputError
from minidiff.evaluation.metrics.distances import draw, permuted_sides
from minidiff.evaluation.metrics.pairwise import (
    ROWS,
    blocks,
    checked,
    distances,
    nearest_other_distance,
    patient_codes,
    to_others,
)
from minidiff.statistics import wilson


class PRDC(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(*, real: np.ndarray, fake: np.ndarray, k: int = 5) -> PRDC:
    """All four at the k-th neighbour, features (n,d) and (m,d); both sides need more than k images.

    k = 5 and "inside" = nearer than the radius, as the density and coverage paper has it. With k =
    3 the first two are those of Kynkäänniemi et al., who also count the border ("≤"): the same but
    where distances tie.
    """
    x, y = (torch.from_numpy(f) for f in checked(real, fake))
    for name, f in (("real", x), ("fake", y)):
        if len(f) <= k:
            raise InputError(f"balls to neighbour {k} need at least {k + 1} images; the {name} "
                             f"side has {len(f)}")
    radius, radius_fake = nearest_other_distance(x, k), nearest_other_distance(y, k)
    plausible, reached, covered, inside = torch.zeros(len(y), dtype=torch.bool), 0, 0, 0
    for rows in blocks(len(x), len(y), ROWS):   # not all pairs at a time
        d = distances(x[rows], y)
        balls = d < radius[rows, None]
        plausible |= balls.any(0)
        inside += int(balls.sum())
        covered += int(balls.any(1).sum())
        reached += int((d < radius_fake).any(1).sum())
    return PRDC(plausible.double().mean().item(), reached / len(x), inside / (k * len(y)),
                covered / len(x))


def coverage_worth(coverage: float, *, real: np.ndarray, fake: np.ndarray,
                   real_patients: Sequence | None = None, k: int = 5, draws: int = 50,
                   seed: int = 0) -> float:
    """The effective number of images behind the coverage of these sets: the n of its interval.

    Neighbourhoods overlap and share synthetic images, so real images are not independent. The
    variance is that over random halves of both sides (of patients), which for a mean is that of the
    whole, and at least that of independent images. Where all or none are covered, k neighbours
    count once. It is measured on 2,000 images a side at most.
    """
    x, y = checked(real, fake)
    n, group = len(x), draw(patient_codes(real_patients, len(x)), 2000, seed)
    x, y = (torch.from_numpy(draw(f, 2000, seed)) for f in (x, y))
    group = np.unique(group, return_inverse=True)[1]
    within, across = distances(x, x).fill_diagonal_(torch.inf).numpy(), distances(x, y).numpy()
    patients, rng, found = int(group.max()) + 1, np.random.default_rng(seed), []
    for _ in range(draws if 0 < coverage < 1 else 0):
        some = np.flatnonzero(np.isin(group, rng.permutation(patients)[: patients // 2]))
        other = rng.permutation(len(y))[: len(y) // 2]
        if len(some) > k:
            radius = np.partition(within[np.ix_(some, some)], k - 1, axis=1)[:, k - 1]
            found.append((across[np.ix_(some, other)].min(1) < radius).mean())
    if len(found) < 2:
        return patients / k
    alone = coverage * (1 - coverage)
    return n / len(x) * alone / max(np.var(found, ddof=1), alone / len(x))


class C2ST(NamedTuple):
    """Accuracy with its interval, and p of its being above chance."""

    accuracy: float
    low: float
    high: float
    p: float


def c2st(*, real: np.ndarray, fake: np.ndarray, real_patients: Sequence | None = None,
         fake_patients: Sequence | None = None, permutations: int = 1000, seed: int = 0) -> C2ST:
    """Leave-one-out accuracy of 1-NN; of the larger of (n,d) and (m,d) a random draw is taken.

    A neighbour of the same patient is left out: it would give a real image away however good the
    synthetic ones are. p: how often the accuracy is as high with patients dealt out anew,
    neighbours as they are (exact).

    Images whose answers depend on each other count for less: two that are each other's nearest are
    both right or both wrong, and patients repeat themselves. With w such partners an image, itself
    included, n counts as 2n/w in Wilson's interval.
    """
    x, y = checked(real, fake)
    n = min(len(x), len(y))
    p, q = (draw(patient_codes(names, len(f)), n, seed + k) for k, (names, f) in
            enumerate(((real_patients, x), (fake_patients, y))))
    pool = np.concatenate([draw(x, n, seed), draw(y, n, seed + 1)])
    group = np.unique(np.concatenate([p, p.max() + 1 + q]), return_inverse=True)[1]
    nearest = neighbours(pool, group, seed)
    labels = permuted_sides(group, n, permutations, seed)
    values = (labels == labels[:, nearest]).mean(1)
    accuracy, total = float(values[0]), 2 * n
    # never of one patient: no pair is counted twice
    mutual = (nearest[nearest] == np.arange(total)).sum()
    ties = (np.bincount(group) ** 2).sum() + mutual
    low, high = wilson(accuracy * total ** 2 / ties, total ** 2 / ties)
    above = (values[1:] >= accuracy - 1e-12).sum()
    return C2ST(accuracy, low, high, float((1 + above) / (1 + permutations)))


def neighbours(pool: np.ndarray, group: np.ndarray, seed: int = 0) -> np.ndarray:
    """Index of each image's nearest image of another patient: (N,d), (N,) → (N,).

    Of equally near ones a random one: by index the real side, which comes first, would win every
    tie.
    """
    if group.max() == 0:
        raise InputError(f"all {len(pool)} images are of one patient, whose images are not each "
                         "other's neighbours")
    order = np.random.default_rng(seed).permutation(len(pool))
    pairs = to_others(torch.from_numpy(pool[order]), torch.from_numpy(group[order]))
    nearest = np.empty(len(pool), dtype=np.int64)
    nearest[order] = order[torch.cat([d.argmin(1) for d in pairs]).numpy()]
    return nearest
