"""Can a classifier tell real from synthetic? The 1-nearest-neighbour two-sample test.

Each image of the pooled sets takes the label, real or synthetic, of its nearest neighbour among all
others (Lopez-Paz & Oquab 2017; Schilling 1986). Where both sets are of one kind about half of the
labels are right; 1 is a set that anything tells apart. Well below one half is a warning, too: the
nearest neighbour of a synthetic image then is a real one that it copies. Encoders leave traces:
files of both sides must have come out of the same one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from minidiff.errors import InputError
from minidiff.evaluation.metrics.distances import equal, permuted_sides
from minidiff.evaluation.metrics.pairwise import checked, patient_codes, to_others
from minidiff.statistics import wilson


class C2ST(NamedTuple):
    """Accuracy with its interval, p of its being above chance, and the images on each side."""

    accuracy: float
    low: float
    high: float
    p: float
    n: int


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
    p, q = (equal(patient_codes(names, len(f)), n, seed + k) for k, (names, f) in
            enumerate(((real_patients, x), (fake_patients, y))))
    pool = np.concatenate([equal(x, n, seed), equal(y, n, seed + 1)])
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
    return C2ST(accuracy, low, high, float((1 + above) / (1 + permutations)), n)


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
