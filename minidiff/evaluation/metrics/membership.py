"""Can one tell from a model who was in its training set? A membership audit by patient.

A model that knows an image by heart denoises it better than one that it never saw. Each image gets
the same times and the same noise, and its score is the negative mean of the logarithm of its errors
(times differ in error by orders of magnitude). Where a second run exists that saw none of these
images, its errors say how difficult each image is, and the score is the mean logarithm of the
ratio (reference-model calibration; Watson et al. 2022).

A second attack, where it is asked for, has one error an image: 2^bits, of the bits a number of its
latents that the model's likelihood takes, so that its score is −bits. It adds up over all levels
how the model's flow contracts round the image, which no error shows.

What counts is the share of training images found at 1 % false alarms (Carlini et al. 2022): a model
may betray few patients, each with certainty, at an AUROC of .5. The share has an upper bound that
allows for chance on both sides (`most_found`), and a p. AUROC stands beside it. An AUROC of .5 and
a share of 1 % say that this attack finds nothing; another may.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.evaluation.metrics.distances import permuted_sides
from minidiff.evaluation.metrics.pairwise import blocks
from minidiff.statistics import (
    auroc_interval,
    bootstrap_counts,
    clopper_pearson,
    delong,
    finite_percentile,
    group_ids,
    z_value,
)

Losses = Callable[[Tensor, int, int], Tensor]   # images, time, seed of the noise → (n,)
Errors = Callable[[Table], Tensor]   # errors of the images of these rows, above 0: (n, k)
DENOISING, LIKELIHOOD = "denoising error", "likelihood"   # the attacks

TIMES, DRAWS = (100, 200, 300, 400), 8   # of 1,000 levels: where memory shows; errors an image
FPR, LEAK = 0.01, 0.05   # false alarms; share of training images found, from which it is a leak
ALPHA = 0.05             # of the bound
NEEDED = 440             # patients on each side with which a model that has memorised nothing has
                         # its bound below LEAK in four of five audits; tests compute it
FEWEST_PATIENTS, FEWEST = 2, 20          # on each side; images on each side of `audit`


def audit(tables: Mapping[str, Table], trained_on: Collection[str],
          attacks: Mapping[str, Errors], *, images: Mapping[str, int], run: str,
          references: Mapping[str, Errors] | None = None, seed: int = 0) -> dict:
    """Audit a model on train and heldout images; {"why"} where that is not possible.

    trained_on: SHA-256 of the images that the model, of `run`, saw. attacks: the model's errors,
    references those of a run that saw none of the images. images: of each attack at most so many
    of each side, the first of one draw (`of_one_mix`); 0 leaves it out. The figures are those of
    DENOISING, and "likelihood" those of LIKELIHOOD, if it was asked.
    """
    known, found = {}, {}
    try:
        for side in ("train", "heldout"):
            table = tables[side]
            rows = [row for row in table.rows
                    if (table.hashes[row["file"]] in trained_on) == (side == "train")]
            if len(rows) < FEWEST:
                raise InputError(f"of the images here {len(rows)} are known as {side} images of "
                                 f"{run}; {FEWEST} are needed")
            known[side] = replace(table, rows=rows)
        drawn = of_one_mix(known, seed)
        for side, table in drawn.items():
            if len(table) < FEWEST:
                raise InputError(f"{len(table)} {side} images of {run} can be drawn so that both "
                                 f"sides have labels in the same shares; {FEWEST} are needed")
        for attack, most in ((attack, most) for attack, most in images.items() if most):
            own = {side: replace(table, rows=table.rows[:most]) for side, table in drawn.items()}
            errors = {side: attacks[attack](table) for side, table in own.items()}
            if references:
                errors = {side: x / references[attack](own[side]) for side, x in errors.items()}
            found[attack] = membership(**errors, seed=seed, **{
                f"{side}_patients": table.column("patient") for side, table in own.items()})
        return {**found.pop(DENOISING), **found, "random_split": tables["train"].random_split}
    except InputError as error:
        return {"why": str(error)}


def of_one_mix(sides: Mapping[str, Table], seed: int) -> dict[str, Table]:
    """Each side's rows in an order by chance, the first k of which have labels in the same shares
    on both sides, but for whole images; it ends where a label does.

    A label that is rarer among training images, and harder, would be taken for memory. The common
    shares are the smaller ones of each label.
    """
    counts = {side: Counter(table.column("label")) for side, table in sides.items()}
    shares = {label: min(n[label] / n.total() for n in counts.values())
              for label in set.intersection(*map(set, counts.values()))}
    drawn = {}
    for side, table in sides.items():
        turn, places = Counter(), []
        for i in np.random.default_rng(seed).permutation(len(table)):
            label = table.rows[i]["label"]
            if label in shares:
                places.append(((turn[label] + 0.5) / shares[label], int(i)))
                turn[label] += 1
        ends = min((counts[side][label] / share for label, share in shares.items()), default=0)
        drawn[side] = replace(table, rows=[table.rows[i] for place, i in sorted(places)
                                           if place < ends])
    return drawn


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
    From the first image of each patient, as images of one patient are not independent: tpr, the
    share found at no more than 1 % false alarms; tpr_most, its upper bound (95 %); tpr_p, how
    likely a model that has memorised nothing finds as many.
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
    low, high = auroc_interval(both, member)
    one = [s[np.unique(group, return_index=True)[1]] for s, group in zip(scores, groups)]
    return {"auroc": area, "low": low, "high": high,
            "by_patient": finite_percentile(_resampled(*scores, *groups, n_boot, seed)),
            "chance": z_value() * math.sqrt((n + m + 1) / (12 * n * m)),
            "p": float((1 + (sums[1:] >= sums[0] - 1e-9).sum()) / len(sums)),
            **found_at(*one), "n_train": n, "n_heldout": m,
            "patients_train": len(one[0]), "patients_heldout": len(one[1])}


def found_at(train: np.ndarray, heldout: np.ndarray) -> dict:
    """"tpr" of independent scores (n,), (m,) at "false_alarms", its bound and p (`membership`).

    p: if training and held-out images could change places, the number of training images before so
    many held-out ones is negative hypergeometric. Equal scores count against the model in the
    bound and for it in p.
    """
    n, m, alarms = len(train), len(heldout), int(FPR * len(heldout) + 1e-9)
    above = int((train > np.sort(heldout)[m - 1 - alarms]).sum())
    return {"tpr": above / n, "false_alarms": alarms, "tpr_most": most_found(train, heldout),
            "tpr_p": float(scipy.stats.nhypergeom.sf(above - 1, n + m, n, alarms + 1))}


def most_found(train: np.ndarray, heldout: np.ndarray, alpha: float = ALPHA) -> float:
    """Upper bound (1 − alpha) of the share of all training images above the score that 1 % of all
    held-out images exceed, from independent scores (n,), (m,).

    Exact for any scores, by halves of alpha: with probability 1 − alpha/2 that score is no lower
    than the k-th highest of the held-out ones (binomial), and Clopper & Pearson (1934) bound the
    share of training images there.
    """
    m = len(heldout)
    k = int(scipy.stats.binom.ppf(1 - alpha / 2, m, FPR)) + 1
    above = int((train >= np.sort(heldout)[m - k]).sum())
    return clopper_pearson(above, len(train), 1 - alpha)[1]


def _scores(errors: Tensor, name: str) -> np.ndarray:
    """Negative mean log of the errors (n,k) of each image: (n,)."""
    x = np.asarray(errors, dtype=np.float64)
    bad = ~(np.isfinite(x) & (x > 0)).all(1)
    if not len(x) or bad.any():
        raise InputError(f"{bad.sum()} of {len(x)} {name} images have an error that is not a "
                         "number above 0")
    return -np.log(x).mean(1)


def _resampled(train: np.ndarray, heldout: np.ndarray, p: np.ndarray, q: np.ndarray, n_boot: int,
               seed: int) -> np.ndarray:
    """AUROC in resamples of patients on both sides: (n_boot,)."""
    c, e = (bootstrap_counts(group.max() + 1, n_boot, seed + k)[:, group]
            for k, group in enumerate((p, q)))
    total = 0.0
    for rows in blocks(len(train), len(heldout)):
        own = train[rows, None]
        total = total + ((c[:, rows] @ ((own > heldout) + 0.5 * (own == heldout))) * e).sum(1)
    return total / (c.sum(1) * e.sum(1))
