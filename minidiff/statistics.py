"""Intervals and tests, in numpy and scipy only: shares, areas under the curve, correlations, resampling by patient.

Intervals are (low, high) tuples of floats at 95 % unless asked; with nothing to count they are (nan, nan).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]
NONE: Interval = (math.nan, math.nan)


def z_value(confidence: float = 0.95) -> float:
    """How many standard errors a two-sided interval reaches to each side: 1.96 at 95 %."""
    return float(stats.norm.ppf((1 + confidence) / 2))


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Interval of a share k/n; honest at small n and near 0 or 1, where k/n ± 1.96 se is not (Wilson 1927)."""
    assert 0 <= k <= n, (k, n)
    if n == 0:
        return NONE
    z, p = z_value(confidence), k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """P(score of a positive > score of a negative), ties counted half (Mann–Whitney); nan if a side is empty."""
    return delong(scores, positive)[0]


def delong(scores: Sequence[float], positive: Sequence[bool]) -> tuple[float, float]:
    """Area under the ROC curve and its standard error (nan with fewer than two on a side).

    DeLong et al. 1988, through midranks in O(n log n) as Sun & Xu 2014.
    """
    x, positive = np.asarray(scores, float), np.asarray(positive, bool)
    assert x.shape == positive.shape and not np.isnan(x).any()
    pos, neg = x[positive], x[~positive]
    m, n = len(pos), len(neg)
    if m == 0 or n == 0:
        return math.nan, math.nan
    ranks = stats.rankdata(x)
    above = (ranks[positive] - stats.rankdata(pos)) / n        # of each positive: share of negatives below it
    below = 1 - (ranks[~positive] - stats.rankdata(neg)) / m   # of each negative: share of positives above it
    if m == 1 or n == 1:
        return float(above.mean()), math.nan
    return float(above.mean()), math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)


def auroc_interval(scores: Sequence[float], positive: Sequence[bool], confidence: float = 0.95) -> Interval:
    """DeLong's interval on the logit scale, so that it stays within 0…1 (Pepe 2003); nan where the area is 0 or 1."""
    area, se = delong(scores, positive)
    if not (0 < area < 1 and se > 0):
        return NONE
    centre, half = math.log(area / (1 - area)), z_value(confidence) * se / (area * (1 - area))
    return 1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-half - centre))


def pearson(x: Sequence[float], y: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Correlation with its interval on Fisher's z scale: (r, low, high); nan with fewer than 4 pairs or no spread."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 4 or x.std() == 0 or y.std() == 0:
        return math.nan, math.nan, math.nan
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    centre, half = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), z_value(confidence) / math.sqrt(len(x) - 3)
    return r, math.tanh(centre - half), math.tanh(centre + half)


def codes(groups: Sequence) -> np.ndarray:
    """Group names → 0 … G−1, in order of first appearance: the same names always give the same codes."""
    seen: dict = {}
    return np.array([seen.setdefault(g, len(seen)) for g in groups], dtype=np.int64)


def bootstrap_counts(n: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each of n things is drawn in each of n_boot resamples with replacement: (n_boot, n), rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)


def bootstrap_indices(groups: Sequence, n_boot: int, seed: int) -> list[np.ndarray]:
    """Resamples of whole patients: for each, the indices of its images, those of a patient drawn twice twice.

    Images of one patient are not independent; resampling single images would make every interval too narrow.
    """
    group = codes(groups)
    counts = bootstrap_counts(group.max() + 1, n_boot, seed)
    return [np.repeat(np.arange(len(group)), c[group]) for c in counts]


def percentile(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The middle of a distribution: from (1 − confidence)/2 to (1 + confidence)/2 of its values."""
    low, high = np.quantile(np.asarray(values, float), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
