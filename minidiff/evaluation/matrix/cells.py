"""One cell of the reference matrix: what a set of images (column) scores against a real subset
(row), in one space.

KD needs no equal numbers and takes all images of both sides; FD, MIND, density, coverage and C2ST
depend on the number, and are measured at the smaller n on both sides. Beside FD, MIND and coverage
stands what real against real of the same label scores at that n: a bare FD measures n.

The headline of a candidate S against held-out images H, where the real images O say how far is far:

    ρ = KD(S, H) / KD(O, H)      0: another sample of the same hospital; 1: as far as O; above 1:
                                 farther

Its interval is a bootstrap by patient in which numerator and denominator share the draws of H.
Where the interval of the denominator holds 0 there is no ρ. Whether ρ keeps a limit is read from
KD(S, H) − limit · KD(O, H), which needs no division.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from minidiff.errors import InputError
from minidiff.evaluation.matrix.subsets import Subset
from minidiff.evaluation.metrics.copying import FEWEST
from minidiff.evaluation.metrics.distances import (
    fid,
    finite_percentile,
    floor,
    kd_with_interval,
    kid_p,
    mind,
)
from minidiff.evaluation.metrics.neighbours import c2st, prdc
from minidiff.statistics import wilson

LIMIT = 0.5  # of ρ, up to which a set passes
Null = Callable[[int], dict]


def cell(row: Subset, column: Subset, space: str, null: Null, *, permutations: int = 1000,
         resamples: int = 1000, seed: int = 0) -> tuple[dict, np.ndarray | None]:
    """Numbers of one cell and the bootstrap draws of its KD; {"too_few": why} and None where there
    are too few images. Images of a column whose patients are in the row are left out."""
    others = column.without(row.patients)
    found = {"row": row.name, "column": column.name, "extractor": space, "n_r": len(row),
             "n_s": len(others), "data": [row.content[:12], column.content[:12]],
             "confounded": confounded(row, column)}
    too_few = row.too_few or others.too_few
    if len(others) < FEWEST <= len(column):
        too_few = f"{len(others)} images of other patients; {FEWEST} are needed"
    if too_few:
        return {**found, "too_few": too_few}, None
    x, y = row.features[space], others.features[space]
    both = {"real": x, "fake": y, "real_patients": row.patients, "fake_patients": others.patients}
    kd, draws = kd_with_interval(**both, n_boot=resamples, seed=seed)
    n = min(len(x), len(y))
    equal = {"real": x[:n], "fake": y[:n]}  # subsets lie in random order: the first n are a draw
    spread = prdc(**equal)
    reached = wilson(round(spread.coverage * n), n)
    told = c2st(**equal, real_patients=row.patients[:n], fake_patients=others.patients[:n],
                permutations=1, seed=seed)  # its interval says enough: no p
    return {**found, "n": n, **kd,
            "KD_p": kid_p(**both, permutations=permutations, seed=seed), "FD": fid(**equal),
            "MIND": mind(**equal, seed=seed), "density": spread.density,
            "coverage": spread.coverage, "coverage_low": reached[0], "coverage_high": reached[1],
            "C2ST": told.accuracy, "C2ST_low": told.low, "C2ST_high": told.high, **null(n)}, draws


def real_against_real(pool: Sequence[Subset], space: str, *, repeats: int, seed: int = 0) -> Null:
    """n → FD, MIND and coverage between two draws of n real images of different patients.

    A pool too small for two draws of n gives smaller ones: `null_n` says of how many. A pool of too
    few patients gives nothing.
    """
    features = np.concatenate([s.features[space] for s in pool])
    patients = np.concatenate([s.patients for s in pool])
    metrics = {"FD": fid, "MIND": functools.partial(mind, directions=200), "coverage": _coverage}

    @functools.cache
    def null(n: int) -> dict:
        found = {}
        try:
            for name, metric in metrics.items():
                if drawn := floor(metric, real=features, patients=patients, n=n, m=n,
                                  repeats=repeats, seed=seed):
                    found |= {f"{name}_null": drawn.median, f"{name}_null_low": drawn.low,
                              f"{name}_null_high": drawn.high, "null_n": drawn.n}
        except InputError:   # too few images for the balls of coverage
            return {}
        return found

    return null


def rho(made: tuple[dict, np.ndarray], yardstick: tuple[dict, np.ndarray]) -> dict:
    """ρ with its interval where the yardstick is resolved, and whether ρ keeps the limit.

    within is True where all of the interval of KD(S,H) − ½ KD(O,H) is at most 0 and the yardstick
    is resolved, False where all of it, and of KD(S,H), is above 0, else None.
    """
    (s, s_draws), (o, o_draws) = made, yardstick
    contrast = finite_percentile(s_draws - LIMIT * o_draws)
    resolved, within = bool(o["KD_low"] > 0), None
    if resolved and contrast[1] <= 0:
        within = True
    elif contrast[0] > 0 and s["KD_low"] > 0:
        within = False
    found = {"KD": s["KD"], "KD_low": s["KD_low"], "KD_high": s["KD_high"], "n": s["n_s"],
             "n_r": s["n_r"], "yardstick_KD": o["KD"], "yardstick_low": o["KD_low"],
             "yardstick_high": o["KD_high"], "yardstick_n": o["n_s"], "resolved": resolved,
             "within": within}
    if resolved:
        low, high = finite_percentile(s_draws / np.where(o_draws > 0, o_draws, np.nan))
        found |= {"rho": s["KD"] / o["KD"], "rho_low": low, "rho_high": high}
    return found


def confounded(row: Subset, column: Subset) -> bool:
    """Do label and source both differ, so that nobody can say which of the two is seen?"""
    same_label = (column.truth or column.label) == row.label
    return not same_label and not set(row.sources) & set(column.sources)


def _coverage(real: np.ndarray, fake: np.ndarray) -> float:
    n = min(len(real), len(fake))  # the patient at the border of two draws may leave one smaller
    return prdc(real=real[:n], fake=fake[:n]).coverage
