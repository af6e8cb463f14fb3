"""How many images a reading study needs for an interval of some width or a test of some power."""

import bisect
import math
from dataclasses import dataclass

import numpy as np
import scipy

from minidiff.errors import InputError
from minidiff.rating import agreement, mover
from minidiff.statistics import clopper_pearson, wilson, z_value

MOST = 5000  # images of a kind; no reader would see more
# an exact test's power moves in a saw-tooth: the n given holds for the next hundred as well
BLOCK = 100


@dataclass(frozen=True)
class Config:
    good: float = 0.68       # expected share of synthetic images called Good
    good_real: float = 0.68  # and of real ones
    interval: float = 0.2    # wanted width of a 95 % interval, of a share and of a kappa
    margin: float = 0.15     # by which synthetic may fall short of real
    told: float = 0.6        # share of right answers to "real or generated?" that should be found
    agree: float = 0.8       # expected share of images on which two readers agree
    power: float = 0.8       # chance to find what is there
    seconds: float = 10.0    # an image, of a reader's time


def run(cfg: Config) -> None:
    """Say how many images a reading study needs."""
    rows = plan(cfg)
    for row in rows:
        print(f"{row['n'] or 'over ' + str(MOST):>10}  {row['for']}")
    largest = max((row["n"] or MOST) for row in rows[:2])
    shown = 2 * largest * 1.15 + 10
    print(f"With {largest} images of each kind, 15 % repeats and 10 controls: {shown:.0f} images "
          f"to rate Good or Bad, {2 * largest} to call real or generated, "
          f"{(shown + 2 * largest) * cfg.seconds / 60:.0f} minutes a reader.")


def plan(cfg: Config) -> list[dict]:
    """{"n", "for"} for each aim, one reader; n is None where even `MOST` would not do."""
    for name in ("good", "good_real", "interval", "margin", "told", "agree", "power"):
        low = 0.5 if name == "told" else 0  # half of the answers are right by chance
        if not low < getattr(cfg, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is not allowed: "
                             f"between {low} and 1")
    if 1 - cfg.agree > 2 * min(cfg.good, 1 - cfg.good):
        raise InputError(f"--agree {cfg.agree} is not possible where {cfg.good} are Good: "
                         f"{abs(2 * cfg.good - 1):.2f} or more is")
    if cfg.good - cfg.good_real <= -cfg.margin:
        raise InputError(f"--good {cfg.good} falls short of --good-real {cfg.good_real} by the "
                         f"margin {cfg.margin} or more: no number of images would show that it "
                         "does not")
    return [
        {"n": n_for_width(cfg.good, cfg.interval), "for": f"synthetic images: a Good-rate of "
         f"{cfg.good:.0%} to ± {cfg.interval / 2:.1%} (Wilson)"},
        {"n": n_for_margin(cfg.good, cfg.good_real, cfg.margin, cfg.power), "for": f"of each kind: "
         f"to show synthetic ({cfg.good:.0%}) no more than {cfg.margin:.0%} below real "
         f"({cfg.good_real:.0%}), power {cfg.power:.0%} (exact limits)"},
        {"n": n_for_told(cfg.told, cfg.power), "for": f"of both kinds together: to find "
         f"{cfg.told:.0%} right, not 50 %, power {cfg.power:.0%} (binomial, exact)"},
        {"n": n_for_kappa(cfg.agree, cfg.good, cfg.interval), "for": f"two readers: Cohen's kappa "
         f"to ± {cfg.interval / 2:.2f} where they agree on {cfg.agree:.0%}"},
    ]


def n_for_width(p: float, width: float) -> int | None:
    """Fewest images at which Wilson's interval of a share p is no wider."""
    n = 1 + bisect.bisect_left(range(1, MOST + 1), True,
                               key=lambda n: -np.subtract(*wilson(p * n, n)) <= width)
    return n if n <= MOST else None


def margin_power(n: int, p: float, q: float, margin: float) -> float:
    """Exact chance that the lower limit of p − q, n images of each, is above −margin.

    The limit is that of `rating.short_by`, by which a study of readers decides.
    """
    shares = np.arange(n + 1) / n
    ends = np.array([clopper_pearson(k, n) for k in range(n + 1)]).T
    low, _ = mover(shares[:, None], ends[:, :, None], shares, ends)
    k = np.arange(n + 1)
    return float(scipy.stats.binom.pmf(k, n, p) @ (low > -margin) @ scipy.stats.binom.pmf(k, n, q))


def n_for_margin(p: float, q: float, margin: float, power: float) -> int | None:
    """Fewest images of each kind with this power; beyond 200, to a hundredth."""
    n = 5
    while n <= MOST // 2:
        if margin_power(n, p, q, margin) >= power:
            return n
        n += max(1, n // 100)
    return None


def told_power(n: int | np.ndarray, p: float, alpha: float = 0.05) -> float | np.ndarray:
    """Power of the two-sided exact binomial test against 1/2."""
    # reject at this or fewer, if that is rare enough
    limit = scipy.stats.binom.ppf(alpha / 2, n, 0.5)
    limit = limit - (scipy.stats.binom.cdf(limit, n, 0.5) > alpha / 2)
    return scipy.stats.binom.cdf(limit, n, p) + scipy.stats.binom.sf(n - limit - 1, n, p)


def n_for_told(p: float, power: float) -> int | None:
    enough = told_power(np.arange(1, MOST + 1 + BLOCK), p) >= power
    return next((n for n in range(1, MOST + 1) if enough[n - 1 : n - 1 + BLOCK].all()), None)


def n_for_kappa(agree: float, good: float, width: float) -> int | None:
    """Images for Cohen's kappa of two readers with the same Good-rate, by its standard error."""
    n, apart = 20_000, (1 - agree) / 2
    cells = np.rint(n * np.array([good - apart, apart, apart, 1 - good - apart])).astype(int)
    ratings = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], cells, 0)
    each = agreement(ratings, "cohen").se * math.sqrt(len(ratings))         # of one image
    needed = math.ceil((2 * z_value() * each / width) ** 2)
    return needed if needed <= MOST else None
