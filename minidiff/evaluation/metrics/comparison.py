"""The table of distances: what each set of images scores against held-out real images of a label.

    synthetic          what the generator made when asked for this label
    real, this label   training images of the label: what perfect looks like, by other patients
    real, another      held-out images of every other label, by other patients: how far a wrong
                       picture is

All are compared with the same held-out images, at equal numbers where the data allow it. The other
labels are held-out, too: a classifier has pushed the labels of its training images apart, farther
than those of any image it has not seen.

KD and FD take all images of both sides. MIND, precision, recall, density, coverage and C2ST (EQUAL)
are measured at the smaller number on both sides, and so is what real scores against real there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.metrics.distances import (
    equal,
    fid,
    fid_spread,
    finite_percentile,
    floor,
    kid,
    kid_draws,
    kid_p,
    mind,
)
from minidiff.evaluation.metrics.manifold import prdc
from minidiff.evaluation.metrics.two_sample import c2st
from minidiff.statistics import group_ids, wilson

# images on each side, below which a cell stays grey; so it does where they are all of one patient
FEWEST = 20
ALL = "all labels"
EQUAL = ("MIND", "precision", "recall", "density", "coverage", "C2ST")  # measured at equal numbers
NEIGHBOUR = 5        # whose distance is the radius of precision, recall, density and coverage
NULLS = 20           # draws of real against real behind the floors of EQUAL


class Side(NamedTuple):
    """One set of images as an extractor sees it."""

    features: np.ndarray       # (N,d)
    labels: np.ndarray         # (N,) of str
    patients: np.ndarray       # (N,) of str; a synthetic image is a patient of its own

    def of(self, label: str) -> Side:
        return self if label == ALL else self.take(np.flatnonzero(self.labels == label))

    def take(self, index: np.ndarray) -> Side:
        return Side(*(column[index] for column in self))


def joined(*sides: Side) -> Side:
    return Side(*map(np.concatenate, zip(*sides)))


def between(real: Side, fake: Side) -> dict[str, np.ndarray]:
    """Two sets as `kid` takes them."""
    return {"real": real.features, "fake": fake.features, "real_patients": real.patients,
            "fake_patients": fake.patients}


def compare(extractor: str, *, synthetic: Side, train: Side, heldout: Side, labels: Sequence[str],
            seed: int = 0, repeats: int = 100) -> list[dict]:
    """Rows of every distance with intervals, p and floors, one for each label and each set that is
    compared with it.
    """
    rows = []
    for label in tqdm([ALL, *labels], desc=f"distances, {extractor}", unit="label", leave=False):
        reference, made = heldout.of(label), synthetic.of(label)
        rng = np.random.default_rng(seed)
        others = [] if label == ALL else [other for other in labels if other != label]
        sets = {"synthetic": made, "real": _some(train.of(label), len(made.features), rng)}
        strangers = heldout.take(np.flatnonzero(~np.isin(heldout.patients, reference.patients)))
        sets |= {f"real {other}": _some(strangers.of(other), len(made.features), rng)
                 for other in others}
        made_draws = None
        floors = _floors(train.of(label), reference, len(made.features), repeats, seed)
        floors |= _equal_floors(train.of(label), reference, len(made.features), seed)
        for name, side in sets.items():
            row = {"extractor": extractor, "label": label, "set": name,
                   "n": len(reference.features), "m": len(side.features), **floors}
            row["small"] = min(row["n"], row["m"]) < FEWEST or 1 in (len(set(s.patients))
                                                                     for s in (reference, side))
            rows.append(row)
            if row["small"]:
                continue
            row |= _measure(reference, side, 2 * repeats if side is made else repeats // 2, seed)
            row |= _measure_equal(reference, side, seed)
            draws = kid_draws(**between(reference, side), seed=seed)
            row["KD_low"], row["KD_high"] = finite_percentile(draws)
            if side is made:
                made_draws = draws
            # how much farther than the synthetic set; equal held-out patients draw by draw
            elif made_draws is not None:
                row["beyond_low"], row["beyond_high"] = finite_percentile(draws - made_draws)
    return rows


def _measure(reference: Side, side: Side, repeats: int, seed: int) -> dict:
    sets, both = between(reference, side), {"real": reference.features, "fake": side.features}
    halves = fid_spread(**both, repeats=repeats, seed=seed)
    return {"KD": kid(**sets), "KD_p": kid_p(**sets, seed=seed), "FD": fid(**both),
            "FD_halves": halves.median, "FD_low": halves.low, "FD_high": halves.high}


def _measure_equal(reference: Side, side: Side, seed: int, permutations: int = 1000,
                   directions: int = 1000) -> dict:
    """EQUAL at n of each, with Wilson's intervals of coverage and C2ST and the permutation p of the
    latter.
    """
    n = min(len(reference.features), len(side.features))
    real, fake = (Side(*(equal(column, n, seed + k) for column in s))
                  for k, s in enumerate((reference, side)))
    both = {"real": real.features, "fake": fake.features}
    found = {"equal_n": n, "MIND": mind(**both, directions=directions, seed=seed)}
    if n > NEIGHBOUR:
        found |= prdc(**both, k=NEIGHBOUR)._asdict()
        found["coverage_low"], found["coverage_high"] = wilson(round(found["coverage"] * n), n)
    told = c2st(**between(real, fake), permutations=permutations, seed=seed)
    return found | {"C2ST": told.accuracy, "C2ST_low": told.low, "C2ST_high": told.high,
                    "C2ST_p": told.p}


def _equal_floors(train: Side, heldout: Side, m: int, seed: int) -> dict:
    """EQUAL between two draws of real patients of one label, at the number at which they are
    measured or, where there are too few, at as many as there are: {"MIND_floor": …}."""
    n, pool, drawn = min(len(heldout.features), m), joined(train, heldout), []
    known = np.column_stack([pool.features, group_ids(pool.patients)])  # last: who it is

    def measure(real: np.ndarray, fake: np.ndarray) -> float:
        sides = (Side(x[:, :-1], x[:, -1].astype(str), x[:, -1].astype(int)) for x in (real, fake))
        drawn.append(_measure_equal(*sides, seed, permutations=1, directions=200))
        return 0.0

    try:
        sizes = floor(measure, real=known, patients=pool.patients, n=n, m=n, repeats=NULLS,
                      seed=seed)
    except InputError:   # too few for any floor: the cell is grey anyway
        return {}
    found = {}
    for name in EQUAL:
        low, median, high = np.quantile([d.get(name, np.nan) for d in drawn], [0.05, 0.5, 0.95])
        found[f"{name}_floor"] = {"median": median, "low": low, "high": high, "n": sizes.n,
                                  "m": sizes.m}
    return found


def _floors(train: Side, heldout: Side, m: int, repeats: int, seed: int) -> dict:
    """Real against real of one label at the same numbers, from training and held-out patients
    together.
    """
    n, pool = len(heldout.features), joined(train, heldout)
    known = {"real": pool.features, "patients": pool.patients, "repeats": repeats, "seed": seed}
    try:
        # beside the halves of fid_spread
        found = {"KD_floor": floor(kid, **known, n=n, m=m),
                 "FD_floor": floor(fid, **known, n=n, m=m),
                 "FD_floor_halves": floor(fid, **known, n=n // 2, m=m // 2)}
    except InputError:   # too few for any floor: the cell is grey anyway
        return {}
    return {name: spread._asdict() for name, spread in found.items()}


def _some(side: Side, n: int, rng: np.random.Generator) -> Side:
    """At most n images, at random: FD depends on the number."""
    return side if len(side.features) <= n else side.take(
        np.sort(rng.permutation(len(side.features))[:n]))
