"""Distances between two sets of feature vectors, each with what it would be between real and real.

    FD   Fréchet distance of two Gaussians (Heusel et al. 2017). Biased upwards at small n: at n =
         125 real against real is far from 0, so a bare FD says nothing. It stands beside the floor
         at the same n.
    KD   squared maximum mean discrepancy under k(x, y) = (x·y/d + 1)³ (Bińkowski et al. 2018).
         Unbiased: between two sets of one distribution it is 0 on average, and hence negative about
         half of the time. Never clipped. Two images of one patient resemble each other, and their
         pair is left out like that of an image with itself.
    MIND sliced Wasserstein distance (Berthet et al. 2026). Biased upwards like FD, but less beside
    its signal, and
         it sees every moment of the projections, not two.

Features are (n, d), numpy or CPU tensors; all sums run in float64. Where many subsets of one pool
are compared, the pooled kernel matrix is computed once, and the KD of a subset is a sum over some
of its cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.metrics.moments import Moments, check_finite, fid_of, frechet
from minidiff.statistics import bootstrap_counts, group_ids, percentile

Metric = Callable[..., float]
SIZES = 15           # subset sizes of FD∞'s line
ROWS = 1024          # of a kernel matrix at a time: that of 50,000 images would be 20 GB
FEWEST_LINE = 2000   # images on each side, below which FD is not yet a line in 1/n


class Spread(NamedTuple):
    """The distribution of a distance over random draws: its median, 5–95 %, and the sizes of the
    two sets.
    """

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
        return fid_of(*(Moments(x.shape[1]).add(side) for side in (x, y)))
    a, b = (x - x.mean(0)) / np.sqrt(len(x) - 1), (y - y.mean(0)) / np.sqrt(len(y) - 1)
    return frechet(x.mean(0) - y.mean(0), (a * a).sum() + (b * b).sum(),
                   np.linalg.norm(a @ b.T, ord="nuc"))


class Extrapolated(NamedTuple):
    """FD∞, the FD at the largest n, that n, and the root mean square of the FDs about the line."""

    value: float
    at_n: float
    n: int
    residual: float


def fid_infinity(*, real: np.ndarray, fake: np.ndarray, seed: int = 0) -> Extrapolated:
    """FD∞: FD of random subsets at 15 sizes, as a straight line in 1/n, read off at 1/n = 0 (Chong
    & Forsyth 2020).

    Both sides shrink together, so that the bias of both falls away: the paper shrinks the synthetic
    side alone and keeps that of the real one. Sizes are evenly spaced from n/2 to n, n the smaller
    side, since FD bends away from the line below. It takes bias off, not all of it: between two
    draws of n = 2,000 with a 1/k spectrum FD∞ is .00 at d = 512 and .32 at d = 2,048, of an FD of
    .36 and 1.43. InputError with fewer than 2,000 images on a side.
    """
    x, y = checked(real, fake)
    n = min(len(x), len(y))
    if n < FEWEST_LINE:
        raise InputError(f"FD∞ needs at least {FEWEST_LINE} images on each side; there are "
                         f"{len(x)} real and {len(y)} fake")
    rng, sizes = np.random.default_rng(seed), np.linspace(n // 2, n, SIZES).astype(int)
    values = np.array([fid(real=x[rng.permutation(len(x))[:k]], fake=y[rng.permutation(len(y))[:k]])
                       for k in sizes])
    slope, value = np.polyfit(1 / sizes, values, 1)
    residual = values - value - slope / sizes
    return Extrapolated(float(value), float(values[-1]), n, float(np.sqrt((residual ** 2).mean())))


def mind(*, real: np.ndarray, fake: np.ndarray, directions: int = 1000, seed: int = 0) -> float:
    """3d × the mean, over random directions, of the squared 2-Wasserstein distance between the two
    sets' projections.

    On a line that distance is the mean squared difference of the sorted values, given as many on
    each side: of the larger side a random draw is taken. Two sets that differ by a shift δ alone
    are 3|δ|² apart (Berthet et al. 2026, arXiv 2605.06797; α = 3d). The same seed has the same
    directions, whatever the sets.
    """
    x, y = checked(real, fake)
    n, d = min(len(x), len(y)), x.shape[1]
    x, y = (equal(f, n, seed + k) for k, f in enumerate((x, y)))
    rng, total = np.random.default_rng(seed), 0.0
    for start in range(0, directions, 100):   # 50,000 × 100 projections at a time are 40 MB a side
        u = rng.standard_normal((min(100, directions - start), d))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        total += ((np.sort(u @ x.T) - np.sort(u @ y.T)) ** 2).mean(1).sum()
    return float(3 * d * total / directions)


def equal(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n of the rows, drawn at random without replacement and left in order; all of them where there
    are no more.
    """
    return rows if len(rows) <= n else rows[np.sort(
        np.random.default_rng(seed).permutation(len(rows))[:n])]


def same_mix(labels: Sequence[str], wanted: Sequence[str], seed: int = 0) -> np.ndarray:
    """Indices of as many labelled images as there are in the proportions of `wanted`; all, where a
    label has none.
    """
    counts = Counter(wanted)
    there = {label: np.flatnonzero(np.array(labels) == label) for label in counts}
    times = min(len(there[label]) / n for label, n in counts.items())
    if not times:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed)
    return np.sort(np.concatenate([rng.permutation(there[label])[: max(1, int(times * n))]
                                   for label, n in counts.items()]))


def kid(*, real: np.ndarray, fake: np.ndarray, real_patients: Sequence | None = None,
        fake_patients: Sequence | None = None) -> float:
    """Kernel distance: mean k(x,x′) + mean k(y,y′) − 2 mean k(x,y), all pairs, those within a
    patient left out.

    Without patients every image is one of its own: the usual unbiased U-statistic over i ≠ j.
    """
    x, y = checked(real, fake)
    p, q = patient_codes(real_patients, len(x)), patient_codes(fake_patients, len(y))
    return _pairs_mean(x, x, p) + _pairs_mean(y, y, q) - 2 * _pairs_mean(x, y)


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """k(x, y) = (x·y/d + 1)³ for all pairs: (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kid_interval(*, confidence: float = 0.95, **sets) -> tuple[float, float]:
    """Percentile bootstrap of `kid` by patient; arguments as `kid_draws`."""
    return finite_percentile(kid_draws(**sets), confidence)


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
    c, e = bootstrap_counts(p.max() + 1, n_boot, seed), bootstrap_counts(q.max() + 1, n_boot,
                                                                         seed + 1)
    across = ((c @ _sum_by(kernel(x, y), p,
                           q)) * e).sum(1) / ((c @ np.bincount(p)) * (e @ np.bincount(q)))
    with np.errstate(invalid="ignore"):
        return _within(kernel(x, x), p, c) + _within(kernel(y, y), q, e) - 2 * across


def finite_percentile(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """`percentile` over the draws that have a value; (nan, nan) where none has."""
    draws = draws[np.isfinite(draws)]
    return percentile(draws, confidence) if len(draws) else (np.nan, np.nan)


def kid_p(*, real: np.ndarray, fake: np.ndarray, real_patients: Sequence | None = None,
          fake_patients: Sequence | None = None, permutations: int = 1000, seed: int = 0) -> float:
    """Permutation p of `kid`: how often a random division of the pooled patients is as far apart as
    this one.

    A division that puts a single patient on one side has no KD and does not count; nan if that is
    the one observed.
    """
    x, y = checked(real, fake)
    pool, p = np.concatenate([x, y]), patient_codes(real_patients, len(x))
    group = np.concatenate([p, p.max() + 1 + patient_codes(fake_patients, len(y))])
    k, apart, a = kernel(pool, pool), _apart(group), divisions(group, len(x), permutations, seed)
    (aa, ab, bb), (n_aa, n_ab, n_bb) = _blocks(k * apart, a), _blocks(apart, a)
    with np.errstate(invalid="ignore"):
        values = aa / n_aa + bb / n_bb - 2 * ab / n_ab
    others = values[1:][np.isfinite(values[1:])]
    return float((1 + (others >= values[0] - 1e-12).sum())
                 / (1 + len(others))) if np.isfinite(values[0]) else np.nan


def divisions(group: np.ndarray, n: int, permutations: int, seed: int) -> np.ndarray:
    """Divisions of the pooled images into n and the rest: 1 for the n, (permutations + 1, N); row 0
    is as observed.

    Patients, the codes in `group` (N,), go to one side as a whole, but for the one at the border.
    """
    # one key a patient
    keys = np.random.default_rng(seed).random((permutations, group.max() + 1))[:, group]
    a = np.zeros((permutations + 1, len(group)))
    np.put_along_axis(a[1:], np.argsort(keys, axis=1, kind="stable")[:, :n], 1, axis=1)
    a[0, :n] = 1
    return a


def fid_spread(*, real: np.ndarray, fake: np.ndarray, repeats: int = 200, seed: int = 0) -> Spread:
    """FD between random halves of each side. A bootstrap of FD is dishonest: its interval misses
    its own point value.
    """
    x, y = checked(real, fake)
    rng, n, m = np.random.default_rng(seed), max(2, len(x) // 2), max(2, len(y) // 2)
    return _spread([fid(real=x[rng.permutation(len(x))[:n]], fake=y[rng.permutation(len(y))[:m]])
                    for _ in range(repeats)], n, m)


def floor(metric: Metric, *, real: np.ndarray, patients: Sequence, n: int, m: int,
          repeats: int = 100, seed: int = 0) -> Spread:
    """The metric between two disjoint random draws of real patients, of n and m images: what
    perfect would score.

    A pool of fewer than n + m images gives draws that are smaller in proportion; the sizes used are
    returned.
    """
    x, _ = checked(real, real)
    group = group_ids(patients)
    biggest = int(np.bincount(group).max())
    # the patient at the border may leave biggest − 1 images unused
    share = min(1.0, (len(x) - biggest + 1) / (n + m))
    n, m = int(n * share), int(m * share)
    if min(n, m) < 2:
        raise InputError(f"{len(x)} real images of {group.max() + 1} patients are too few to "
                         "compare real with real")
    rng, draws = np.random.default_rng(seed), []
    for _ in range(repeats):
        # images, patient by patient
        order = np.argsort(rng.random(group.max() + 1)[group], kind="stable")
        a, rest = order[:n], order[n:]
        draws.append((a, rest[group[rest] != group[a[-1]]][:m]))
    if metric is not kid:
        bar = tqdm(draws, "real against real", leave=False, disable=len(x) < 2000)
        return _spread([metric(real=x[a], fake=x[b]) for a, b in bar], n, m)
    left, right = np.zeros((2, repeats, len(x)))
    for i, (a, b) in enumerate(draws):
        left[i, a] = right[i, b] = 1
    apart = _apart(group)
    k = kernel(x, x) * apart
    mean = lambda u, v: ((u @ k) * v).sum(1) / ((u @ apart) * v).sum(1)  # noqa: E731
    with np.errstate(invalid="ignore"):
        values = mean(left, left) + mean(right, right) - 2 * mean(left, right)
    if not np.isfinite(values).any():
        raise InputError(f"{len(x)} real images of {group.max() + 1} patients are too few to "
                         "compare real with real")
    return _spread(values[np.isfinite(values)], n, m)


def patient_codes(names: Sequence | None, n: int) -> np.ndarray:
    """Patients of n images as codes (n,); without names every image is a patient of its own."""
    assert names is None or len(names) == n, (len(names), n)
    return np.arange(n) if names is None else group_ids(names)


def _apart(group: np.ndarray) -> np.ndarray:
    """1 where two images are of different patients, else 0; the diagonal is 0: (n, n)."""
    return (group[:, None] != group).astype(float)


def _pairs_mean(x: np.ndarray, y: np.ndarray, group: np.ndarray | None = None) -> float:
    """Mean of k(x, y) over all pairs, or those of different patients of one set; nan where there is
    but one patient.
    """
    total, pairs = 0.0, 0
    for first in range(0, len(x), ROWS):
        k = kernel(x[first : first + ROWS], y)
        apart = np.ones(k.shape,
                        bool) if group is None else group[first : first + ROWS, None] != group
        total, pairs = total + (k * apart).sum(), pairs + int(apart.sum())
    return float(total / pairs) if pairs else np.nan


def _blocks(k: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of symmetric k (N,N) within the images that a row of a (R,N) marks, across, and within
    the rest: (R,) each.
    """
    within = ((a @ k) * a).sum(1)
    across = a @ k.sum(1) - within
    return within, across, k.sum() - within - 2 * across


def _sum_by(k: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cells of k added up by patient on both sides: (n, m) → (P, Q)."""
    left, right = (scipy.sparse.csr_array((np.ones(len(g)), (g, np.arange(len(g)))))
                   for g in (rows, columns))
    return left @ (right @ k.T).T


def _within(k: np.ndarray, group: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of k over pairs of different patients in each resample: (n, n), (n,), (n_boot, P) →
    (n_boot,).
    """
    k, size = _sum_by(k, group, group), np.bincount(group)
    np.fill_diagonal(k, 0)
    return ((counts @ k) * counts).sum(1) / ((counts @ size) ** 2 - counts ** 2 @ size ** 2)


def _spread(values: Sequence[float], n: int, m: int) -> Spread:
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return Spread(float(median), float(low), float(high), n, m)


def checked(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides in float64, (n,d) and (m,d); InputError for fewer than 2 images, NaN or
    infinity.
    """
    x, y = (np.asarray(f, dtype=np.float64) for f in (real, fake))
    assert x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1], (x.shape, y.shape)
    for name, f in (("real", x), ("fake", y)):
        if len(f) < 2:
            raise InputError(f"a distance needs at least 2 images on each side; the {name} side "
                             f"has {len(f)}")
        check_finite(name, f)
    return x, y
