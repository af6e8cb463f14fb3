"""Agreement of readers (Cohen, Fleiss, Gwet AC1, intraclass kappa), and intervals of their shares.

Only numpy and scipy. Ratings are a matrix (images, readers) of categories 0 … q − 1, and −1 if a
reader gave none. A coefficient of agreement is (observed − chance) / (1 − chance); they differ in
what they call chance.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from minidiff.statistics import (
    NONE,
    Interval,
    clopper_pearson,
    group_ids,
    two_way,
    wilson,
    z_value,
)

CHANCE = ("cohen", "fleiss", "ac1")


class Agreement(NamedTuple):
    """A coefficient over n images, with the observed agreement and that expected by chance."""

    value: float
    low: float
    high: float
    se: float
    observed: float
    expected: float
    n: int


def effective_wilson(p: float, variance: float, n: float) -> Interval:
    """Wilson's interval of a share p with any variance, at the n that would give this variance.

    An image that several readers rate is one draw, not several (Korn & Graubard 1998). At a
    variance of 0, n is used.
    """
    n = p * (1 - p) / variance if variance > 0 and 0 < p < 1 else n
    return wilson(p * n, n)


def mover(p: float, of_p: Interval, q: float, of_q: Interval) -> Interval:
    """Interval of p − q from the intervals of both, by square and add (Zou & Donner 2008)."""
    return (p - q - np.hypot(p - of_p[0], of_q[1] - q),
            p - q + np.hypot(of_p[1] - p, q - of_q[0]))


def newcombe(k: int, n: int, k2: int, n2: int) -> Interval:
    """Interval of k/n − k2/n2, two independent shares (Newcombe 1998, method 10)."""
    if not (n and n2):
        return NONE
    low, high = mover(k / n, wilson(k, n), k2 / n2, wilson(k2, n2))
    return float(low), float(high)


def short_by(p: float, n: float, q: float, m: float, confidence: float = 0.95) -> Interval:
    """Interval of p − q, shares of n and m independent images, by which a margin is decided.

    Square and add of Clopper and Pearson's limits: at a margin of 10 points each end errs in 2.4 %
    at most, where those of Newcombe do in up to 4.2 % (300 images against 45).
    """
    if not (n > 0 and m > 0):
        return NONE
    low, high = mover(p, clopper_pearson(p * n, n, confidence), q,
                      clopper_pearson(q * m, m, confidence))
    return float(low), float(high)


def effective_n(hit: Sequence[bool], patients: Sequence) -> float:
    """The effective number of images behind a share, where patients have several images.

    The variance is that of a ratio of sums over patients (linearised), at least that of independent
    images, which it equals where each image is of another patient; where all images agree, each
    patient counts once.
    """
    hit, of = np.asarray(hit, float), group_ids(patients)
    n, p = len(hit), float(hit.mean())
    off = np.bincount(of, hit - p)                # of each patient: hits more than expected
    if not (0 < p < 1 and len(off) > 1):
        return len(off)
    return p * (1 - p) / max(float(off @ off) / n**2, p * (1 - p) / n)


def share_interval(hit: Sequence[bool], patients: Sequence, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share at its effective number of images."""
    n = effective_n(hit, patients)
    return wilson(float(np.mean(hit)) * n, n, confidence)


def against_chance(k: int, n: int, chance: float = 0.5) -> float:
    """Two-sided exact binomial p of k right among n."""
    return float(scipy.stats.binomtest(k, n, chance).pvalue) if n else math.nan


def agreement(ratings: Sequence, chance: str, categories: int = 2) -> Agreement:
    """Cohen's kappa (two readers), or Fleiss' kappa or Gwet's AC1 (any number of readers).

    If nearly all images are of one category, kappa falls although readers agree (the prevalence
    paradox); AC1 does not. Images with one rating count only for the shares of the categories. The
    standard error comes from the linear part of the coefficient: Fleiss, Cohen & Everitt 1969 for
    Cohen's, Gwet 2008 for the others. The interval is Wilson's of the observed agreement, at the
    number of images that gives this standard error: it stays below 1, and has a width even if all
    agree. nan without an image of two ratings, or if chance alone makes all agree.
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
    linear = n / twice.sum() * (same - expected * twice) - 2 * (1 - value) * (pull - expected)
    linear = linear / (1 - expected)  # part of each image in the coefficient
    se = math.sqrt(((linear - value) ** 2).sum() / n / (n - 1)) if n > 1 else math.nan
    ends = effective_wilson(observed, (se * (1 - expected)) ** 2, int(twice.sum()))
    low, high = ((p - expected) / (1 - expected) for p in ends)
    return Agreement(float(value), float(low), float(high), se, float(observed), expected, n)


def intraclass(first: Sequence[int], second: Sequence[int]) -> tuple[float, float, float]:
    """Kappa of one reader who rates the same images twice, 0 or 1: (kappa, low, high).

    The order of the two ratings does not count. The interval holds all kappas whose expected
    numbers of pairs fit the observed ones by chi-square (Donner & Eliasziw 1992): valid from 25
    pairs, unlike an interval from a standard error, and wide even if no pair differs.
    """
    a, b = np.asarray(first), np.asarray(second)
    assert a.shape == b.shape
    n, p = len(a), (a.mean() + b.mean()) / 2 if len(a) else 0.0
    if p * (1 - p) == 0:
        return math.nan, *NONE
    seen = np.array([(a * b).sum(), (a != b).sum(), ((1 - a) * (1 - b)).sum()], float)
    kappa, limit = 1 - seen[1] / (2 * n * p * (1 - p)), scipy.stats.chi2.ppf(0.95, 1)

    def misfit(k: float) -> float:
        shared = k * p * (1 - p)
        wanted = n * np.array([p * p + shared, 2 * (p * (1 - p) - shared), (1 - p) ** 2 + shared])
        return float(((seen - wanted) ** 2 / np.maximum(wanted, 1e-12)).sum() - limit)

    low, high = -min(p / (1 - p), (1 - p) / p), 1.0  # below, a number of pairs would be negative
    if kappa > low and misfit(low) > 0:
        low = scipy.optimize.brentq(misfit, low, kappa)
    if kappa < 1 and misfit(1.0) > 0:
        high = scipy.optimize.brentq(misfit, kappa, 1)
    return float(kappa), float(low), float(high)


def two_way_random_interval(*tables: np.ndarray) -> tuple[float, Interval]:
    """Mean of a (readers, images) table of 0 and 1, with its interval over other readers and other
    images; with two tables by the same readers, of the difference.

    Resampling readers and images (Owen 2007) has the same limit, but is too narrow for two to five
    readers.
    """
    variance, freedom = two_way(*tables)
    reach = float(scipy.stats.t.ppf(0.975, freedom))
    p = float(tables[0].mean())
    if len(tables) == 1:
        wide = variance * (reach / z_value()) ** 2
        return p, effective_wilson(p, wide, tables[0].shape[1])
    q = float(tables[1].mean())
    low, high = p - q - reach * math.sqrt(variance), p - q + reach * math.sqrt(variance)
    if not variance:
        of_p, of_q = (effective_wilson(share, 0, table.shape[1])
                      for share, table in zip((p, q), tables))
        low, high = mover(p, of_p, q, of_q)
    return p - q, (float(max(low, -1)), float(min(high, 1)))
