"""Can one tell from the model's errors who was in its training set? A membership audit by patient.

A model that knows an image by heart denoises it better than one that it never saw. Each image gets
the same times and the same noise, its score is the negative mean of the logarithm of its errors
(times differ in error by orders of magnitude), and the question is how well the score separates
training from held-out images: AUROC, and the share of training images found when 1 % of held-out
ones are accused in error (Carlini et al. 2022 hold that to be the figure that counts). .5 and 1 %
say that this attack finds nothing; another may.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.evaluation.metrics.distances import finite_percentile, permuted_sides
from minidiff.statistics import auroc_interval, bootstrap_counts, delong, group_ids, z_value

Losses = Callable[[Tensor, int, int], Tensor]   # images, time, seed of the noise → (n,)

TIMES, DRAWS = (100, 200, 300, 400), 8   # of 1,000 levels: where memory shows; errors an image
FPR = 0.01
FEWEST_PATIENTS, FEWEST = 2, 20          # on each side; images on each side of `audit`


def audit(tables: Mapping[str, Table], trained_on: Collection[str],
          losses_of: Callable[[Table], Losses], *, images: int, run: str, seed: int = 0) -> dict:
    """Audit a model on train and heldout images; {"why"} where that is not possible.

    trained_on: SHA-256 of the images that the model, of `run`, saw. losses_of(table) are its losses
    on the images of these rows by their number. images: at most so many of each side.
    """
    errors, patients = {}, {}
    try:
        for side in ("train", "heldout"):
            table = tables[side]
            rows = [row for row in table.rows
                    if (table.hashes[row["file"]] in trained_on) == (side == "train")]
            if len(rows) < FEWEST:
                raise InputError(f"of the images here {len(rows)} are known as {side} images of "
                                 f"{run}; {FEWEST} are needed")
            order = np.random.default_rng(seed).permutation(len(rows))[:images]
            own = replace(table, rows=[rows[i] for i in order])
            errors[side] = denoising_errors(losses_of(own), torch.arange(len(own)))
            patients[f"{side}_patients"] = own.column("patient")
        return membership(**errors, **patients, seed=seed)
    except InputError as error:
        return {"why": str(error)}


def denoising_errors(losses: Losses, images: Tensor, *, times: Sequence[int] = TIMES,
                     draws: int = DRAWS, batch: int = 32) -> Tensor:
    """Errors of images (N,…), each at the same times and noise: float64 (N, draws).

    images are whatever losses takes, a batch of rows at a time: pixels, latents, or row numbers
    where labels go with them. losses(images, t, noise_seed) → (n,) are the errors at time t with
    the one noise of that seed, the same for every image; draw k is at time times[k % len(times)]
    with noise seed k.
    """
    errors = torch.empty(len(images), draws, dtype=torch.float64)
    for k in tqdm(range(draws), "denoising errors", disable=len(images) * draws < 400, leave=False):
        parts = [losses(part, times[k % len(times)], k) for part in images.split(batch)]
        errors[:, k] = torch.cat(parts).double().cpu()
    return errors


def membership(train: Tensor, heldout: Tensor, *, train_patients: Sequence | None = None,
               heldout_patients: Sequence | None = None, n_boot: int = 1000,
               seed: int = 0) -> dict:
    """Audit errors of training images (n,k) and held-out ones (m,k), from `denoising_errors`.

    Both must have the same times and noise. Without patients every image is one of its own. Raises
    InputError where a side has fewer than two patients or an error is not a number above 0.

    low and high are DeLong's 95 % interval, by_patient that of a bootstrap of patients. chance: how
    far from .5 the AUROC of so many images lies in 95 %. p: one-sided permutation of patients.
    tpr: at no more than 1 % false alarms.
    """
    assert train.shape[1] == heldout.shape[1], (train.shape, heldout.shape)
    scores = [_scores(train, "training"), _scores(heldout, "held-out")]
    n, m = map(len, scores)
    patients = [list(p) if p is not None else [(k, i) for i in range(size)]
                for k, (p, size) in enumerate(((train_patients, n), (heldout_patients, m)))]
    groups = [group_ids(p) for p in patients]
    for name, group in zip(("training", "held-out"), groups):
        if group.max() + 1 < FEWEST_PATIENTS:
            raise InputError(f"a membership audit needs {FEWEST_PATIENTS} or more {name} "
                             f"patients; there is {group.max() + 1}")
    both, member = np.concatenate(scores), np.arange(n + m) < n
    area, _ = delong(both, member)
    sides = permuted_sides(group_ids([*patients[0], *patients[1]]), n, 2000, seed, dtype=np.float32)
    sums = sides @ scipy.stats.rankdata(both)
    areas, shares = _resampled(*scores, *groups, n_boot, seed)
    tpr, alarms = _found(*scores, np.ones((1, n)), np.ones((1, m)))
    low, high = auroc_interval(both, member)
    return {"auroc": area, "low": low, "high": high, "by_patient": finite_percentile(areas),
            "chance": z_value() * math.sqrt((n + m + 1) / (12 * n * m)),
            "p": float((1 + (sums[1:] >= sums[0] - 1e-9).sum()) / len(sums)),
            "tpr": float(tpr[0]), "tpr_by_patient": finite_percentile(shares),
            "false_alarms": int(alarms[0]), "n_train": n, "n_heldout": m,
            "patients_train": int(groups[0].max()) + 1,
            "patients_heldout": int(groups[1].max()) + 1, "note": _note(m)}


def _scores(errors: Tensor, name: str) -> np.ndarray:
    """Negative mean log of the errors (n,k) of each image: (n,)."""
    x = np.asarray(errors, dtype=np.float64)
    bad = ~(np.isfinite(x) & (x > 0)).all(1)
    if not len(x) or bad.any():
        raise InputError(f"{bad.sum()} of {len(x)} {name} images have an error that is not a "
                         "number above 0")
    return -np.log(x).mean(1)


def _resampled(train: np.ndarray, heldout: np.ndarray, p: np.ndarray, q: np.ndarray, n_boot: int,
               seed: int) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and share found in resamples of patients on both sides: (n_boot,) each."""
    c, e = (bootstrap_counts(group.max() + 1, n_boot, seed + k)[:, group]
            for k, group in enumerate((p, q)))
    wins = (train[:, None] > heldout) + 0.5 * (train[:, None] == heldout)
    return ((c @ wins) * e).sum(1) / (c.sum(1) * e.sum(1)), _found(train, heldout, c, e)[0]


def _found(train: np.ndarray, heldout: np.ndarray, c: np.ndarray,
           e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Share of training images above the threshold, and held-out images above it: (B,), (B,).

    The threshold is the lowest with no more than 1 % of held-out images above it; counts c (B,n),
    e (B,m) say how often each image is there.
    """
    order = np.argsort(-heldout, kind="stable")
    above = np.cumsum(e[:, order], axis=1)            # held-out images down to here
    allowed = np.floor(FPR * above[:, -1] + 1e-9)
    first = (above > allowed[:, None]).argmax(1)      # that may not be above the threshold
    threshold = heldout[order][first]
    return ((c * (train > threshold[:, None])).sum(1) / c.sum(1),
            (e * (heldout > threshold[:, None])).sum(1))


def _note(m: int) -> str:
    if FPR * m < 1:
        return (f"1 % of {m} held-out images is less than one: the share found is at no false "
                "alarm, and says little")
    if m < 1000:
        return f"1 % of {m} held-out images is {int(FPR * m)}: the share found rests on few images"
    return ""
