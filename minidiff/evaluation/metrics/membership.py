"""Can one tell from the model's errors who was in its training set? A membership audit by patient.

A model that knows an image by heart denoises it better than one that it never saw. Each image gets
the same times and the same noise, its score is the negative mean of the logarithm of its errors
(times differ in error by orders of magnitude), and the question is how well the score tells
training from held-out images: AUROC, and the share of training images found when 1 % of held-out
ones are named in error (Carlini et al. 2022 hold that to be the figure that counts). .5 and 1 % say
that this attack finds nothing; another may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.metrics.copying import dealt
from minidiff.evaluation.metrics.distances import finite_percentile
from minidiff.statistics import auroc_interval, bootstrap_counts, delong, group_ids, z_value

Losses = Callable[[Tensor, int, int], Tensor]

TIMES, DRAWS = (100, 200, 300, 400), 8   # of 1,000 levels: where memory shows; errors an image
FPR = 0.01
FEWEST = 2


class Membership(NamedTuple):
    """low, high: DeLong's 95 % interval; by_patient: that of a bootstrap of patients; chance: how
    far from .5 the AUROC of so many images comes by chance (95 %); p: permutation of patients,
    one-sided; tpr at no more than 1 % false alarms."""

    auroc: float
    low: float
    high: float
    by_patient: tuple[float, float]
    chance: float
    p: float
    tpr: float
    tpr_by_patient: tuple[float, float]
    false_alarms: int
    n_train: int
    n_heldout: int
    patients_train: int
    patients_heldout: int
    note: str


def denoising_errors(losses: Losses, images: Tensor, *, times: Sequence[int] = TIMES,
                     draws: int = DRAWS, batch: int = 32) -> Tensor:
    """Errors of images (N,…), each at the same times and noise: float64 (N, draws).

    images are whatever losses takes, a batch of rows at a time: pixels, latents, or row numbers
    where labels go with them. losses(images, t, noise_seed) → (n,) are the errors at time t with
    the one noise that the seed says, the same for every image; draw k is at time times[k %
    len(times)] with noise seed k.
    """
    errors = torch.empty(len(images), draws, dtype=torch.float64)
    for k in tqdm(range(draws), "denoising errors", disable=len(images) * draws < 400, leave=False):
        for first in range(0, len(images), batch):
            part = slice(first, first + batch)
            errors[part, k] = losses(images[part], times[k % len(times)], k).double().cpu()
    return errors


def membership(train: Tensor, heldout: Tensor, *, train_patients: Sequence | None = None,
               heldout_patients: Sequence | None = None, n_boot: int = 1000,
               seed: int = 0) -> Membership:
    """Audit errors of training images (n,k) and held-out ones (m,k), from `denoising_errors` with
    the same times and noise.

    Without patients every image is one of its own. Raises InputError where a side has fewer than
    two patients and where an error is not a number above 0.
    """
    sides = [_checked(train, "training"), _checked(heldout, "held-out")]
    assert sides[0].shape[1] == sides[1].shape[1], (train.shape, heldout.shape)
    scores = [-np.log(side).mean(1) for side in sides]
    n, m = map(len, scores)
    patients = [list(p) if p is not None else [(k, i) for i in range(len(s))]
                for k, (p, s) in enumerate(zip((train_patients, heldout_patients), scores))]
    groups = [group_ids(p) for p in patients]
    for name, group in zip(("training", "held-out"), groups):
        if group.max() + 1 < FEWEST:
            raise InputError(f"a membership audit needs {FEWEST} or more {name} patients; there is "
                             f"{group.max() + 1}")
    both, member = np.concatenate(scores), np.arange(n + m) < n
    area, _ = delong(both, member)
    sums = dealt(n, [*patients[0], *patients[1]], None, 2000, seed) @ scipy.stats.rankdata(both)
    draws = _draws(*scores, *groups, n_boot, seed)
    tpr, alarms = _found(*scores, np.ones((1, n)), np.ones((1, m)))
    return Membership(area, *auroc_interval(both, member), finite_percentile(draws[0]),
                      z_value() * math.sqrt((n + m + 1) / (12 * n * m)),
                      float((1 + (sums[1:] >= sums[0] - 1e-9).sum()) / len(sums)), float(tpr[0]),
                      finite_percentile(draws[1]), int(alarms[0]), n, m,
                      *(int(g.max()) + 1 for g in groups), _note(n, m))


def _draws(train: np.ndarray, heldout: np.ndarray, p: np.ndarray, q: np.ndarray, n_boot: int,
           seed: int) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and share found in resamples of patients on both sides: (n_boot,) each."""
    c, e = bootstrap_counts(p.max() + 1, n_boot, seed)[:, p], bootstrap_counts(q.max() + 1, n_boot,
                                                                               seed + 1)[:, q]
    wins = (train[:, None] > heldout) + 0.5 * (train[:, None] == heldout)
    return ((c @ wins) * e).sum(1) / (c.sum(1) * e.sum(1)), _found(train, heldout, c, e)[0]


def _found(train: np.ndarray, heldout: np.ndarray, c: np.ndarray,
           e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of training images above the lowest threshold with no more than 1 % of held-out images
    above it, and how many those are; counts c (B,n), e (B,m) say how often each image is there."""
    order = np.argsort(-heldout, kind="stable")
    above = np.cumsum(e[:, order], axis=1)                          # held-out images down to here
    allowed = np.floor(FPR * above[:, -1] + 1e-9)
    # the first that may not be above the threshold
    first = (above > allowed[:, None]).argmax(1)
    threshold = heldout[order][first]
    return ((c * (train > threshold[:, None])).sum(1) / c.sum(1),
            (e * (heldout > threshold[:, None])).sum(1))


def _checked(errors: Tensor, name: str) -> np.ndarray:
    x = np.asarray(errors, dtype=np.float64)
    assert x.ndim == 2, x.shape
    bad = ~(np.isfinite(x) & (x > 0)).all(1)
    if not len(x) or bad.any():
        raise InputError(f"{bad.sum()} of {len(x)} {name} images have an error that is not a "
                         "number above 0")
    return x


def _note(n: int, m: int) -> str:
    if FPR * m < 1:
        return f"1 % of {m} held-out images is less than one: the share found is at no false alarm, and says little"
    return f"1 % of {m} held-out images is {int(FPR * m)}: the share found hangs on few images" if m < 1000 else ""
