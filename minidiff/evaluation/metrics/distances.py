"""Distances between two sets of feature vectors, each with what it would be between real and real.

    FD   Fréchet distance of two Gaussians (Heusel et al. 2017). Biased upwards at small n: at n =
         125 real against real is far from 0, so a bare FD says nothing. It stands beside the floor
         at the same n.
    KD   squared maximum mean discrepancy under k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018).
         Unbiased: between two sets of one distribution it is 0 on average, and hence negative about
         half of the time. Never clipped. Two images of one patient resemble each other, and their
         pair is left out like that of an image with itself.
    MIND sliced Wasserstein distance (Berthet et al. 2026). Biased upwards like FD, but less beside
         its signal, and it sees every moment of the projections, not two.

Features are (n, d), numpy or CPU tensors; all sums run in float64. Where many subsets of one pool
are compared, the pooled kernel matrix is computed once, and the KD of a subset is a sum over some
of its cells.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch
from tqdm import tqdm

from minidiff.evaluation.metrics.pairwise import (
    blocks,
    checked,
    kernel,
    kernel_mean,
    patient_codes,
)
from minidiff.statistics import bootstrap_counts, finite_percentile, group_ids

Metric = Callable[..., float]


class Spread(NamedTuple):
    """A figure over random draws: its median, 5–95 %, and the sizes of the two sets."""

    median: float
    low: float
    high: float
    n: int
    m: int


def fid(*, real: np.ndarray, fake: np.ndarray) -> float:
    """Fréchet distance |μ₁−μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½, covariances with 1/(n−1).

    With A = Xc/√(n−1) and B = Yc/√(m−1), the eigenvalues of Σ₁Σ₂ are the squared singular values of
    A·Bᵀ, so the last trace is its nuclear norm: exact, and no d × d matrix is formed. From n ≥ d
    on, the covariances themselves are cheaper.
    """
    x, y = checked(real, fake)
    if min(len(x), len(y)) >= x.shape[1]:
        s, t = _covariance(x), _covariance(y)
        traces, cross = np.trace(s) + np.trace(t), root_trace(s, t)
    else:
        a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
        traces, cross = (a * a).sum() + (b * b).sum(), np.linalg.norm(a @ b.T, ord="nuc")
    shift = x.mean(0) - y.mean(0)
    return float(shift @ shift + traces - 2 * cross)


def _covariance(x: np.ndarray) -> np.ndarray:
    """(d,d), with 1/(n−1); centred before it is squared, for E[x²] − E[x]² loses all digits where
    the mean is large beside the spread."""
    x = x - x.mean(0)
    return x.T @ x / (len(x) - 1)


def root_trace(s: np.ndarray, t: np.ndarray) -> float:
    """tr (ST)^½ of two covariances (d,d).

    Any root S = LLᵀ will do: ST has the eigenvalues of LᵀTL, which is symmetric, so that they are
    real and, but for rounding, not negative. Cholesky's L costs a seventh of the root by eigh,
    which remains where S is singular.
    """
    try:
        root = np.linalg.cholesky(s)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(s)
        root = vectors * np.sqrt(values.clip(0))
    # PyTorch brings a LAPACK that takes half of NumPy's time
    product = torch.from_numpy(root.T @ t @ root)
    return torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum().item()


def mind(*, real: np.ndarray, fake: np.ndarray, directions: int = 1000, seed: int = 0) -> float:
    """Sliced Wasserstein distance: 3d × the mean over directions of the squared 2-Wasserstein one.

    On a line that distance is the mean squared difference of the sorted values, given as many on
    each side: of the larger side a random draw is taken. Two sets that differ by a shift δ alone
    are 3|δ|² apart (Berthet et al. 2026, arXiv 2605.06797; α = 3d). The same seed has the same
    directions, whatever the sets.
    """
    x, y = checked(real, fake)
    n, d = min(len(x), len(y)), x.shape[1]
    x, y = (draw(f, n, seed + k) for k, f in enumerate((x, y)))
    rng, total = np.random.default_rng(seed), 0.0
    for start in range(0, directions, 100):   # 50,000 × 100 projections at a time are 40 MB a side
        u = rng.standard_normal((min(100, directions - start), d))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        total += ((np.sort(u @ x.T) - np.sort(u @ y.T)) ** 2).mean(1).sum()
    return float(3 * d * total / directions)


def draw(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows, drawn without replacement and left in order; all where there are no more."""
    if len(rows) <= n:
        return rows
    return rows[np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])]


def same_mix(labels: Sequence[str], wanted: Sequence[str], seed: int = 0) -> np.ndarray:
    """Indices of the most images in the proportions of the labels wanted. Labels that are absent
    are left out; all images where none is present, as for a model without labels."""
    have, want = Counter(labels), Counter(wanted)
    if not have.keys() & want.keys():
        return np.arange(len(labels))
    times = min(have[label] / n for label, n in want.items() if have[label])
    return _of_each(labels, {label: times * n for label, n in want.items()}, seed)


def matched(labels: Sequence[str], others: Sequence[str],
            seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the most images of two sets in which every label has the same share of both.

    Two sets of one kind are far apart where their labels are mixed differently. Labels that one set
    lacks are left out; where they share none, both are whole. With r images of the second for each
    of the first, the smaller side of each label limits their number; r is the ratio of one of the
    labels, so that 1/n + 1/m is least.
    """
    x, y = Counter(labels), Counter(others)
    both = sorted(x.keys() & y.keys())
    if not both:
        return np.arange(len(labels)), np.arange(len(others))

    def most(ratio: float) -> dict[str, float]:
        return {label: min(x[label], y[label] / ratio) for label in both}

    ratio = max((y[label] / x[label] for label in both),
                key=lambda r: sum(most(r).values()) * r / (1 + r))
    return (_of_each(labels, most(ratio), seed),
            _of_each(others, {label: ratio * n for label, n in most(ratio).items()}, seed))


def _of_each(labels: Sequence[str], counts: Mapping[str, float], seed: int) -> np.ndarray:
    """Indices of so many images of each label, at least one, drawn at random and in order."""
    rng, labels = np.random.default_rng(seed), np.asarray(labels)
    return np.sort(np.concatenate([np.zeros(0, int), *(
        rng.permutation(np.flatnonzero(labels == label))[: max(1, int(n + 1e-9))]
        for label, n in counts.items())]))


def kid(*, real: np.ndarray, fake: np.ndarray, real_patients: Sequence | None = None,
        fake_patients: Sequence | None = None) -> float:
    """Kernel distance: mean k(x,x′) + mean k(y,y′) − 2 mean k(x,y), pairs of one patient left out.

    Without patients every image is one of its own: the usual unbiased U-statistic over i ≠ j.
    """
    x, y = checked(real, fake)
    p, q = patient_codes(real_patients, len(x)), len(x) + patient_codes(fake_patients, len(y))
    return kernel_mean(x, x, p, p) + kernel_mean(y, y, q, q) - 2 * kernel_mean(x, y, p, q)


def kid_draws(*, real: np.ndarray, fake: np.ndarray, real_patients: Sequence | None = None,
              fake_patients: Sequence | None = None, n_boot: int = 1000,
              seed: int = 0) -> np.ndarray:
    """`kid` in resamples of patients, who are never paired with copies of themselves: (n_boot,).

    Equal seeds draw the same real patients, so that two fakes can be compared draw by draw. A draw
    of one and the same patient over and over has no pairs: it is nan and keeps its place.

    A patient drawn twice must not meet his copy: k(x, x) is larger than any honest pair, and with
    it a plain bootstrap covers 0 under the null in 0 % of runs. The kernel is summed by patient
    first; the rest is counts.
    """
    x, y = checked(real, fake)
    p, q = patient_codes(real_patients, len(x)), patient_codes(fake_patients, len(y))
    c, e = (bootstrap_counts(group.max() + 1, n_boot, seed + k) for k, group in enumerate((p, q)))
    across = _resampled(x, y, p, q, c, e) / ((c @ np.bincount(p)) * (e @ np.bincount(q)))
    with np.errstate(invalid="ignore"):
        return _within(x, p, c) + _within(y, q, e) - 2 * across


def kd_with_interval(*, n_boot: int = 1000, seed: int = 0, **sets) -> tuple[dict, np.ndarray]:
    """KD with its 95 % interval, and the draws behind it; the sets as `kid` takes them."""
    draws = kid_draws(**sets, n_boot=n_boot, seed=seed)
    low, high = finite_percentile(draws)
    return {"KD": kid(**sets), "KD_low": low, "KD_high": high}, draws


def kid_p(*, real: np.ndarray, fake: np.ndarray, real_patients: Sequence | None = None,
          fake_patients: Sequence | None = None, permutations: int = 1000, seed: int = 0) -> float:
    """Permutation p of `kid`: how often the sides are as far apart with patients dealt out anew.

    Sides of which one holds a single patient have no KD and do not count; nan if it is so as
    observed.
    """
    x, y = checked(real, fake)
    pool, p = np.concatenate([x, y]), patient_codes(real_patients, len(x))
    group = np.concatenate([p, p.max() + 1 + patient_codes(fake_patients, len(y))])
    sides = permuted_sides(group, len(x), permutations, seed).astype(float)
    values = _kd_of_draws(pool, group, sides)
    if not np.isfinite(values[0]):
        return np.nan
    others = values[1:][np.isfinite(values[1:])]
    return float((1 + (others >= values[0] - 1e-12).sum()) / (1 + len(others)))


def permuted_sides(group: np.ndarray, n: int, permutations: int, seed: int, *,
                   strata: np.ndarray | None = None, dtype: type = np.float64) -> np.ndarray:
    """Which of the pooled images are on the first side, (1 + permutations, N) bool: row 0 as it is.

    The first n images are on it; in the other rows, as many of each stratum (N,) by chance.
    Patients, the codes in `group` (N,), go to one side as a whole, but for the one at the border.
    dtype is that of the random keys, one a patient.
    """
    rng = np.random.default_rng(seed)
    keys = rng.random((permutations, group.max() + 1), dtype=dtype)[:, group]
    strata = np.zeros(len(group), int) if strata is None else strata
    sides = np.zeros((1 + permutations, len(group)), bool)
    sides[0, :n] = True
    for one in np.unique(strata):
        inside = np.flatnonzero(strata == one)
        order = inside[np.argsort(keys[:, inside], axis=1, kind="stable")]
        np.put_along_axis(sides[1:], order[:, :int((inside < n).sum())], True, axis=1)
    return sides


def fid_spread(*, real: np.ndarray, fake: np.ndarray, repeats: int = 200, seed: int = 0) -> Spread:
    """FD between random halves of each side. A bootstrap's interval would miss FD's own value."""
    x, y = checked(real, fake)
    rng, n, m = np.random.default_rng(seed), max(2, len(x) // 2), max(2, len(y) // 2)
    draws = [fid(real=x[rng.permutation(len(x))[:n]], fake=y[rng.permutation(len(y))[:m]])
             for _ in range(repeats)]
    return spread_of(draws, n, m)


def floor(metric: Metric, *, real: np.ndarray, patients: Sequence, n: int, m: int,
          repeats: int = 100, seed: int = 0) -> Spread | None:
    """The metric between two disjoint draws of real patients, of n and m images: the best score.

    A pool of fewer than n + m images gives draws that are smaller in proportion; the sizes used are
    returned. None where there are too few patients for any.
    """
    draws, n, m = disjoint_draws(patients, n, m, repeats, seed)
    if not draws:
        return None
    x, _ = checked(real, real)
    if metric is kid:
        left, right = np.zeros((2, len(draws), len(x)))
        for i, (a, b) in enumerate(draws):
            left[i, a] = right[i, b] = 1
        values = _kd_of_draws(x, group_ids(patients), left, right)
        values = values[np.isfinite(values)]
    else:
        bar = tqdm(draws, "real against real", leave=False, disable=len(x) < 2000)
        values = [metric(real=x[a], fake=x[b]) for a, b in bar]
    return spread_of(values, n, m) if len(values) else None


def disjoint_draws(patients: Sequence, n: int, m: int, repeats: int, seed: int
                   ) -> tuple[list[tuple[np.ndarray, np.ndarray]], int, int]:
    """Pairs of random sets of images, no patient in both, and their sizes: n and m, or smaller.

    No pairs where there are too few patients.
    """
    group = group_ids(patients)
    if min(n, m, len(group)) >= 2:
        # the patient at the border may leave most images of the biggest unused
        share = min(1.0, (len(group) - int(np.bincount(group).max()) + 1) / (n + m))
        n, m = int(n * share), int(m * share)
    rng, draws = np.random.default_rng(seed), []
    for _ in range(repeats if min(n, m, len(group)) >= 2 else 0):
        order = np.argsort(rng.random(group.max() + 1)[group], kind="stable")  # patient by patient
        a, rest = order[:n], order[n:]
        draws.append((a, rest[group[rest] != group[a[-1]]][:m]))
    return draws, n, m


def spread_of(values: Sequence[float], n: int, m: int) -> Spread:
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return Spread(float(median), float(low), float(high), n, m)


def _kd_of_draws(x: np.ndarray, group: np.ndarray, left: np.ndarray,
                 right: np.ndarray | None = None) -> np.ndarray:
    """KD of some of the images x (n,d) with others, marked with 1 in left and right (R,n): (R,).

    right None: the rest. Pairs of one patient, by the codes in `group`, are left out; nan where
    there are no others.
    """
    rest = 1 - left if right is None else right

    def sums(k: np.ndarray, rows: slice) -> np.ndarray:
        """Of the cells of rows of symmetric k within left, within right, and across: (3, R)."""
        to_left = left[:, rows] @ k
        to_right = k.sum(0) - to_left if right is None else right[:, rows] @ k
        return np.stack([(to_left * left).sum(1), (to_right * rest).sum(1),
                         (to_left * rest).sum(1)])

    cells, pairs = 0.0, 0.0
    for rows in blocks(len(x), len(x)):
        apart = (group[rows, None] != group).astype(float)
        cells = cells + sums(kernel(x[rows], x) * apart, rows)
        pairs = pairs + sums(apart, rows)
    with np.errstate(invalid="ignore"):
        one, other, across = cells / pairs
        return one + other - 2 * across


def _sum_by(k: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cells of k added up by patient on both sides: (n, m) → (P, Q)."""
    left, right = (scipy.sparse.csr_array((np.ones(len(g)), (g, np.arange(len(g)))))
                   for g in (rows, columns))
    return left @ (right @ k.T).T


def _resampled(x: np.ndarray, y: np.ndarray, p: np.ndarray, q: np.ndarray, c: np.ndarray,
               e: np.ndarray) -> np.ndarray:
    """Sum of k(x, y) where the patients p and q count as often as c and e (n_boot, P) say, not
    within a patient where q is p: (n_boot,)."""
    total = 0.0
    for rows in blocks(len(x), len(y)):
        own, codes = np.unique(p[rows], return_inverse=True)
        sums = _sum_by(kernel(x[rows], y), codes, q)
        if q is p:
            sums[np.arange(len(own)), own] = 0
        total = total + ((np.take(c, own, 1) @ sums) * e).sum(1)
    return total


def _within(x: np.ndarray, group: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of k(x, x) over pairs of different patients in each resample: (n_boot,)."""
    total, size = _resampled(x, x, group, group, counts, counts), np.bincount(group)
    return total / ((counts @ size) ** 2 - counts ** 2 @ size ** 2)
