"""Intervals and tests: shares, areas under the ROC curve, correlation, resampling of patients.

Only numpy and scipy. Intervals are (low, high) at 95 % by default, and (nan, nan) without data.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import scipy

Interval = tuple[float, float]
NONE: Interval = (math.nan, math.nan)


def z_value(confidence: float = 0.95) -> float:
    """How many standard errors a two-sided interval reaches to each side: 1.96 at 95 %."""
    return float(scipy.stats.norm.ppf((1 + confidence) / 2))


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Interval of a share k/n (Wilson 1927): right also for small n and near 0 or 1."""
    assert 0 <= k <= n, (k, n)
    if n == 0:
        return NONE
    z, p = z_value(confidence), k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def clopper_pearson(k: float, n: float, confidence: float = 0.95) -> Interval:
    """Exact interval of a share k/n, not too narrow at any share (Clopper & Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if k <= 0 else float(scipy.special.betaincinv(k, n - k + 1, tail))
    return low, 1.0 if k >= n else float(scipy.special.betaincinv(k + 1, n - k, 1 - tail))


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """P(score of a positive > score of a negative), ties count half; nan if a side is empty."""
    return delong(scores, positive)[0]


def delong(scores: Sequence[float], positive: Sequence[bool]) -> tuple[float, float]:
    """Area under the ROC curve and its standard error (nan with fewer than two on a side).

    DeLong et al. 1988, through midranks in O(n log n) as Sun & Xu 2014.
    """
    above, below = _placements(scores, positive)
    m, n = len(above), len(below)
    if not (m and n):
        return math.nan, math.nan
    se = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n) if min(m, n) > 1 else math.nan
    return float(above.mean()), se


def _placements(scores: Sequence[float], positive: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives
    above it; ties count half."""
    x, positive = np.asarray(scores, float), np.asarray(positive, bool)
    assert x.shape == positive.shape and not np.isnan(x).any()
    pos, neg, ranks = x[positive], x[~positive], scipy.stats.rankdata(x)
    above = (ranks[positive] - scipy.stats.rankdata(pos)) / max(len(neg), 1)
    return above, 1 - (ranks[~positive] - scipy.stats.rankdata(neg)) / max(len(pos), 1)


def delong_parts(scores: Sequence[float], positive: Sequence[bool]) -> np.ndarray:
    """What each image adds to the area (n,): the sum is the area, the spread is DeLong's.

    nan as in `delong`.
    """
    positive = np.asarray(positive, bool)
    above, below = _placements(scores, positive)
    if not (len(above) and len(below)):
        return np.full(len(positive), math.nan)
    area, parts = above.mean(), np.empty(len(positive))
    parts[positive], parts[~positive] = (above - area) / len(above), (below - area) / len(below)
    return parts + area / len(parts)


def auroc_interval(scores: Sequence[float], positive: Sequence[bool]) -> Interval:
    """DeLong's interval on the logit scale, within 0…1 (Pepe 2003); nan at an area of 0 or 1."""
    return logit_interval(*delong(scores, positive))


def logit_interval(share: float, se: float) -> Interval:
    """Interval of a share from its standard error, symmetric on the logit scale; nan at 0 and 1."""
    if not (0 < share < 1 and se > 0):
        return NONE
    centre, half = math.log(share / (1 - share)), z_value() * se / (share * (1 - share))
    return 1 / (1 + math.exp(half - centre)), 1 / (1 + math.exp(-half - centre))


def weighted_auroc(scores: Sequence[float], positive: Sequence[bool],
                   weights: np.ndarray) -> np.ndarray:
    """`auroc` of b resamples, in which image i counts weights[:, i] times: (b,n) → (b,)."""
    p, n = _by_score(scores, positive, weights)
    with np.errstate(invalid="ignore"):
        return (p * (n.cumsum(1) - n / 2)).sum(1) / (p.sum(1) * n.sum(1))


def weighted_precision(scores: Sequence[float], positive: Sequence[bool],
                       weights: np.ndarray) -> np.ndarray:
    """Average precision of b resamples, weights (b,n) → (b,): the mean over positives of the
    precision at their score. Images of equal score come together; nan without a positive."""
    p, n = (side[:, ::-1] for side in _by_score(scores, positive, weights))
    hits = p.cumsum(1)
    with np.errstate(invalid="ignore"):
        return (p * hits / np.maximum(hits + n.cumsum(1), 1e-12)).sum(1) / p.sum(1)


def _by_score(scores: Sequence[float], positive: Sequence[bool],
              weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (b,d) of positives and of negatives at the d distinct scores, lowest first."""
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    weights, positive = weights[:, order], positive[order]
    return (np.add.reduceat(weights * positive, starts, axis=1),
            np.add.reduceat(weights * ~positive, starts, axis=1))


def threshold_at(scores: Sequence[float], positive: Sequence[bool], specificity: float) -> float:
    """The lowest t at which "score ≥ t" has this specificity or more: the most sensitive one.

    Just above the highest score if there is no such score; nan without a negative.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    negative = np.sort(scores[~positive])
    if not len(negative):
        return math.nan
    below = max(math.ceil(specificity * len(negative) - 1e-9), 1)  # negatives that must stay below
    most = negative[below - 1] if specificity > 0 else -math.inf
    higher = scores[scores > most]
    return float(higher.min()) if len(higher) else float(np.nextafter(most, math.inf))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for a family of tests (Holm 1979); nan stays nan and does not count."""
    ps = np.asarray(ps, float)
    known = np.flatnonzero(~np.isnan(ps))
    order, adjusted = known[np.argsort(ps[known], kind="stable")], np.full(len(ps), math.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(ps[order] * np.arange(len(order), 0, -1)),
                                 1.0)
    return adjusted.tolist()


def pearson(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Correlation and interval on Fisher's z scale: (r, low, high); nan if < 4 pairs, no spread."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 4 or x.std() == 0 or y.std() == 0:
        return math.nan, math.nan, math.nan
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    return r, *fisher_interval(r, z_value() / math.sqrt(len(x) - 3))


def fisher_interval(r: float, half: float) -> tuple[float, float]:
    """The ends of a correlation's interval of this half width on Fisher's scale z = artanh r."""
    z = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    return math.tanh(z - half), math.tanh(z + half)


def group_ids(groups: Sequence) -> np.ndarray:
    """Group names, e.g. patients → 0 … G−1 in order of first appearance."""
    seen: dict = {}
    return np.array([seen.setdefault(g, len(seen)) for g in groups], dtype=np.int64)


def group_sums(table: np.ndarray, groups: Sequence) -> np.ndarray:
    """(rows, n) → (rows, groups): the columns of one group added up."""
    of = group_ids(groups)
    return np.stack([np.bincount(of, row) for row in table])


def two_way(*tables: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of a (raters, items) table over other raters and other items, and its
    degrees of freedom; with two tables, of the difference of their means.

    Raters are readers or trained networks, items are images or patients; two tables have the same
    raters. Two-way random effects, from the mean squares of raters, items and rest; degrees of
    freedom by Satterthwaite.
    """
    raters = len(tables[0])
    by_rater = tables[0].mean(1) - (tables[1].mean(1) if len(tables) > 1 else 0)
    parts = [(by_rater.var(ddof=1) / raters, raters - 1)] if raters > 1 else []
    rest = 0.0
    for t in tables:
        n, left = t.shape[1], t - t.mean(1, keepdims=True) - t.mean(0) + t.mean()
        parts.append((t.mean(0).var(ddof=1) / n, n - 1))
        rest += (left**2).sum() / ((raters - 1) * (n - 1)) / (raters * n) if raters > 1 else 0
    # the rest is part of both mean squares
    variance = max(sum(v for v, _ in parts) - rest, *(v for v, _ in parts), 0.0)
    if not variance:
        return variance, math.inf
    return variance, max(variance**2 / sum(v * v / df for v, df in parts), 1.0)


def bootstrap_counts(n: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each of n things is drawn in n_boot resamples: (n_boot, n), rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)


def patient_weights(patients: Sequence, n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples of whole patients as weights of images, (b,n), some fifty at a time.

    Images of one patient are not independent: resamples of single images give intervals that are
    too narrow.
    """
    group = group_ids(patients)
    for counts in np.array_split(bootstrap_counts(group.max() + 1, n_boot, seed),
                                 max(1, n_boot // 50)):
        yield counts[:, group].astype(float)


def auroc_by_patient(scores: Sequence[float], positive: Sequence[bool], patients: Sequence, *,
                     resamples: int = 500, seed: int = 0) -> tuple[float, Interval]:
    """Area under the ROC curve, and its middle 95 % over resamples of whole patients."""
    area = auroc(scores, positive)
    if math.isnan(area):
        return area, NONE
    areas = np.concatenate([weighted_auroc(scores, positive, w)
                            for w in patient_weights(patients, resamples, seed)])
    return area, finite_percentile(areas)


def percentile(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The middle of a distribution: from (1 − confidence)/2 to (1 + confidence)/2 of its values."""
    return tuple(np.quantile(np.asarray(values, float),
                             [(1 - confidence) / 2, (1 + confidence) / 2]).tolist())


def finite_percentile(draws: np.ndarray, confidence: float = 0.95) -> Interval:
    """`percentile` over the draws that have a value; (nan, nan) where none has."""
    draws = draws[np.isfinite(draws)]
    return percentile(draws, confidence) if len(draws) else NONE
