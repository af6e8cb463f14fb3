"""One cell of the reference matrix: what a set of images (column) scores against a real subset
(row), in one space.

KD needs no equal numbers and takes all images of both sides; FD, MIND, density, coverage and C2ST
depend on the number, and are measured at the smaller n on both sides. Beside FD, MIND and coverage
stands what real against real of the same label scores at that n: a bare FD measures n.

The headline of a candidate S against held-out images H, with O the real images that say how far is
far:

    ρ = KD(S, H) / KD(O, H)      0: another sample of the same hospital; 1: as far as O; above 1:
                                 farther

Its interval is a bootstrap by patient in which numerator and denominator share the draws of H.
Where the interval of the denominator holds 0 there is no ρ. A limit on ρ is read off KD(S, H) −
limit · KD(O, H), which needs no division.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minidiff.errors import InputError
from minidiff.evaluation.matrix.subsets import Subset
from minidiff.evaluation.metrics.distances import (
    fid,
    finite_percentile,
    floor,
    kid,
    kid_draws,
    kid_p,
    mind,
)
from minidiff.evaluation.metrics.manifold import prdc
from minidiff.evaluation.metrics.copying import FEWEST
from minidiff.evaluation.metrics.two_sample import c2st
from minidiff.statistics import wilson

LIMIT = 0.5  # of ρ, up to which a set passes
Null = Callable[[int], dict]


def cell(row: Subset, column: Subset, space: str, null: Null, *, permutations: int = 1000,
         resamples: int = 1000, seed: int = 0) -> tuple[dict, np.ndarray | None]:
    """Numbers of one cell and the bootstrap draws of its KD; {"grey": why} and None where there are
    too few images.

    Of a real column, images of patients who are in the row are left out.
    """
    held = column.without(row.patients)
    found = {"row": row.name, "column": column.name, "extractor": space, "n_r": len(row),
             "n_s": len(held),
             "data": [row.content[:12], column.content[:12]], "confounded": confounded(row, column)}
    if len(held) < FEWEST <= len(column):
        return {**found, "grey": f"{len(held)} images of other patients; {FEWEST} are needed"}, None
    if row.grey or held.grey:
        return {**found, "grey": row.grey or held.grey}, None
    x, y = row.features[space], held.features[space]
    sets = {"real": x, "fake": y, "real_patients": row.patients, "fake_patients": held.patients}
    draws = kid_draws(**sets, n_boot=resamples, seed=seed)
    low, high = finite_percentile(draws)
    n = min(len(x), len(y))
    # a subset lies in the order of its draw: its first n are a draw, too
    equal = {"real": x[:n], "fake": y[:n]}
    patients = {"real_patients": row.patients[:n], "fake_patients": held.patients[:n]}
    # its interval says enough: no p
    spread, told = prdc(**equal), c2st(**equal, **patients, permutations=1, seed=seed)
    covered = wilson(round(spread.coverage * n), n)
    return {**found, "n": n, "KD": kid(**sets), "KD_low": low, "KD_high": high,
            "KD_p": kid_p(**sets, permutations=permutations, seed=seed), "FD": fid(**equal),
            "MIND": mind(**equal, seed=seed), "density": spread.density,
            "coverage": spread.coverage, "coverage_low": covered[0], "coverage_high": covered[1],
            "C2ST": told.accuracy, "C2ST_low": told.low, "C2ST_high": told.high, **null(n)}, draws


def real_against_real(pool: Sequence[Subset], space: str, *, repeats: int, seed: int = 0) -> Null:
    """n → what two draws of n other patients each score, of one label and source: FD, MIND and
    coverage as {name: …}.

    A pool too small for two draws of n gives smaller ones: `null_n` says of how many. Computed once
    for each n.
    """
    features = np.concatenate([s.features[space] for s in pool])
    patients = np.concatenate([s.patients for s in pool])
    metrics = {"FD": fid, "MIND": lambda **sets: mind(**sets, directions=200),
               "coverage": lambda **sets: prdc(**_equal(**sets)).coverage}
    cache: dict[int, dict] = {}

    def null(n: int) -> dict:
        if n not in cache:
            cache[n] = {}
            try:
                for name, metric in metrics.items():
                    found = floor(metric, real=features, patients=patients, n=n, m=n,
                                  repeats=repeats, seed=seed)
                    cache[n] |= {f"{name}_null": found.median, f"{name}_null_low": found.low,
                                 f"{name}_null_high": found.high, "null_n": found.n}
            except InputError:   # too few patients to compare real with real: the null stays unsaid
                cache[n] = {}
        return cache[n]

    return null


def rho(made: tuple[dict, np.ndarray], yardstick: tuple[dict, np.ndarray]) -> dict:
    """ρ with its interval, and whether it keeps the limit: {"rho", "rho_low", "rho_high",
    "resolved", "within"}.

    within is True where all of the interval of KD(S,H) − ½ KD(O,H) is at most 0 and the yardstick
    is resolved, False where all of it, and of KD(S,H), is above 0, else None.
    """
    (s, s_draws), (o, o_draws) = made, yardstick
    contrast = finite_percentile(s_draws - LIMIT * o_draws)
    resolved = bool(o["KD_low"] > 0)
    found = {"KD": s["KD"], "KD_low": s["KD_low"], "KD_high": s["KD_high"], "n": s["n_s"],
             "n_r": s["n_r"],
             "yardstick_KD": o["KD"], "yardstick_low": o["KD_low"], "yardstick_high": o["KD_high"],
             "yardstick_n": o["n_s"], "resolved": resolved, "within": True if resolved
             and contrast[1] <= 0 else False if contrast[0] > 0 and s["KD_low"] > 0 else None}
    if resolved:
        low, high = finite_percentile(s_draws / np.where(o_draws > 0, o_draws, np.nan))
        found |= {"rho": s["KD"] / o["KD"], "rho_low": low, "rho_high": high}
    return found


def confounded(row: Subset, column: Subset) -> bool:
    """Do row and column differ in label and in source alike, so that nobody can say which of the
    two is seen?
    """
    return (column.truth
            or column.label) != row.label and not set(row.sources) & set(column.sources)


def _equal(real: np.ndarray, fake: np.ndarray) -> dict[str, np.ndarray]:
    # the patient at the border of two draws may leave one a little smaller
    n = min(len(real), len(fake))
    return {"real": real[:n], "fake": fake[:n]}
