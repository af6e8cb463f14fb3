"""Agreement of readers and comparison of their shares, in numpy and scipy only.

Ratings are a matrix (images, readers) of categories 0 … q − 1, with −1 where a reader gave none. A
coefficient of agreement is (observed − chance) / (1 − chance); the three here differ in what they
call chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from minidiff.statistics import NONE, Interval, two_way, wilson, z_value

CHANCE = ("cohen", "fleiss", "ac1")


class Agreement(NamedTuple):
    """A coefficient, its interval and standard error, the agreement observed and that by chance,
    over n images.
    """

    value: float
    low: float
    high: float
    se: float
    observed: float
    expected: float
    n: int


def effective_wilson(p: float, variance: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share p whose variance is not p(1 − p)/n: at the n that would have
    given this variance.

    One image read by several readers is one draw, not several (Korn & Graubard 1998). n serves
    where the variance is 0.
    """
    n = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else n
    return wilson(p * n, n, confidence)


def mover(p: float, of_p: Interval, q: float, of_q: Interval) -> Interval:
    """Interval of p − q from an interval of each: the square-and-add rule (Zou & Donner 2008); also
    on arrays.
    """
    d = p - q
    return d - np.hypot(p - of_p[0], of_q[1] - q), d + np.hypot(of_p[1] - p, q - of_q[0])


def newcombe(k: int, n: int, k2: int, n2: int, confidence: float = 0.95) -> Interval:
    """Interval of k/n − k2/n2, two independent shares (Newcombe 1998, method 10: Wilson's limits,
    squared and added).
    """
    if not (n and n2):
        return NONE
    low, high = mover(k / n, wilson(k, n, confidence), k2 / n2, wilson(k2, n2, confidence))
    return float(low), float(high)


def against_chance(k: int, n: int, chance: float = 0.5) -> float:
    """Two-sided exact binomial p of k right among n."""
    return float(scipy.stats.binomtest(k, n, chance).pvalue) if n else math.nan


def agreement(ratings: Sequence, chance: str, categories: int = 2,
              confidence: float = 0.95) -> Agreement:
    """Cohen's kappa (two readers, each with his own habit), Fleiss' kappa (any number) or Gwet's
    AC1 (any number).

    Where nearly all images are of one category kappa falls although readers agree (the prevalence
    paradox); AC1 does not. Images with one rating count for the categories' shares only. The
    standard error is that of the linear part of the coefficient, which is Fleiss, Cohen & Everitt
    1969 for Cohen's and Gwet 2008 for the others. The interval is Wilson's on the agreement
    observed, at the number of images that would have this standard error: it stays below 1 and has
    a width even where all agree. nan where there is no such image, or where chance alone would make
    all agree.
    """
    assert chance in CHANCE, chance
    x = np.asarray(ratings, np.int64)
    x = x[(x >= 0).all(1)] if chance == "cohen" else x[(x >= 0).any(1)]
    # (images, readers, categories)
    given = (x[:, :, None] == np.arange(categories)).astype(float)
    votes, raters = given.sum(1), given.sum((1, 2))
    n, twice = len(x), raters > 1
    if not twice.any():
        return Agreement(*[math.nan] * 6, 0)
    pairs = np.where(twice, raters * (raters - 1), 1)
    # of each image: share of pairs that agree
    same = np.where(twice, (votes * (votes - 1)).sum(1) / pairs, 0)
    observed = same.sum() / twice.sum()
    share = votes / raters[:, None]
    mean = share.mean(0)
    if chance == "cohen":
        assert x.shape[1] == 2, "Cohen's kappa is of two readers"
        by_reader = given.mean(0)                                               # (2, categories)
        expected = float(by_reader[0] @ by_reader[1])
        # of each image on the expectation
        pull = (given[:, 0] @ by_reader[1] + given[:, 1] @ by_reader[0]) / 2
    elif chance == "fleiss":
        expected, pull = float(mean @ mean), share @ mean
    else:
        unlike = (1 - mean) / (categories - 1)
        expected, pull = float(mean @ unlike), share @ unlike
    if 1 - expected < 1e-12:
        return Agreement(math.nan, *NONE, math.nan, float(observed), expected, n)
    value = (observed - expected) / (1 - expected)
    each = n / twice.sum() * (same - expected * twice) - 2 * (1 - value) * (pull - expected)
    each = each / (1 - expected)
    se = math.sqrt(((each - value) ** 2).sum() / n / (n - 1)) if n > 1 else math.nan
    ends = effective_wilson(observed, (se * (1 - expected)) ** 2, int(twice.sum()), confidence)
    low, high = ((p - expected) / (1 - expected) for p in ends)
    return Agreement(float(value), float(low), float(high), se, float(observed), expected, n)


def intraclass(first: Sequence[int], second: Sequence[int],
               confidence: float = 0.95) -> tuple[float, float, float]:
    """Kappa of one reader's two looks at the same images (0 or 1), in which neither look comes
    first: (kappa, low, high).

    The interval is of all kappas whose expected numbers of pairs fit those seen by chi-square
    (Donner & Eliasziw 1992): honest with 25 pairs, where an interval from a standard error is not,
    and wide even where no pair differs.
    """
    a, b = np.asarray(first), np.asarray(second)
    assert a.shape == b.shape
    n, p = len(a), (a.mean() + b.mean()) / 2 if len(a) else 0.0
    if p * (1 - p) == 0:
        return math.nan, *NONE
    seen = np.array([(a * b).sum(), (a != b).sum(), ((1 - a) * (1 - b)).sum()], float)
    kappa, limit = 1 - seen[1] / (2 * n * p * (1 - p)), scipy.stats.chi2.ppf(confidence, 1)

    def misfit(k: float) -> float:
        shared = k * p * (1 - p)
        wanted = n * np.array([p * p + shared, 2 * (p * (1 - p) - shared), (1 - p) ** 2 + shared])
        return float(((seen - wanted) ** 2 / np.maximum(wanted, 1e-12)).sum() - limit)

    # where one kind of agreeing pairs would vanish
    least = -min(p / (1 - p), (1 - p) / p)
    low = scipy.optimize.brentq(misfit, least,
                                kappa) if kappa > least and misfit(least) > 0 else least
    high = scipy.optimize.brentq(misfit, kappa, 1) if kappa < 1 and misfit(1.0) > 0 else 1.0
    return float(kappa), float(low), float(high)


def two_way_random_interval(*tables: np.ndarray, confidence: float = 0.95) -> tuple[float, Interval]:
    """Mean of a (readers, images) table of 0 and 1, or of one minus another by the same readers;
    its interval over other readers and other images.

    Drawing readers and images again (Owen 2007) has the same limit, but is too narrow for two to
    five readers.
    """
    means, (variance, freedom) = [t.mean() for t in tables], two_way(*tables)
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, freedom))
    if len(tables) == 1:
        wide = variance * (reach / z_value(confidence)) ** 2
        return float(means[0]), effective_wilson(float(means[0]), wide, tables[0].shape[1],
                                                 confidence)
    ends = [effective_wilson(float(m), 0, t.shape[1], confidence)
            for m, t in zip(means, tables)] if not variance else []
    d, half = float(means[0] - means[1]), reach * math.sqrt(variance)
    low, high = mover(means[0], ends[0], means[1], ends[1]) if ends else (d - half, d + half)
    return d, (float(max(low, -1)), float(min(high, 1)))
