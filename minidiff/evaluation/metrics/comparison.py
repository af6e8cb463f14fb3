"""The table of distances: what each set of images scores against held-out real images of a label.

    synthetic          what the generator made when asked for this label
    real, this label   training images of the label: what perfect looks like, by other patients
    real, another      held-out images of every other label, by other patients: how far a wrong
                       picture is

All are compared with the same held-out images, at equal numbers where the data allow it. The other
labels are held-out, too: a classifier has pushed the labels of its training images farther apart
than those of any image it has not seen.

KD and FD take all images of both sides. MIND, precision, recall, density, coverage and C2ST (EQUAL)
are measured at the smaller number on both sides, and so is what real scores against real there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.metrics.distances import (
    Metric,
    disjoint_draws,
    equal,
    fid,
    fid_spread,
    finite_percentile,
    floor,
    kd_with_interval,
    kid,
    kid_p,
    mind,
    spread_of,
)
from minidiff.evaluation.metrics.manifold import prdc
from minidiff.evaluation.metrics.two_sample import c2st
from minidiff.statistics import wilson

FEWEST = 20   # images on each side, below which nothing is measured; nor where all are of a patient
ALL = "all labels"
EQUAL = ("MIND", "precision", "recall", "density", "coverage", "C2ST")  # measured at equal numbers
NEIGHBOUR = 5        # whose distance is the radius of precision, recall, density and coverage
NULLS = 20           # draws of real against real behind the floors of EQUAL


class Side(NamedTuple):
    """One set of images as an extractor sees it."""

    features: np.ndarray       # (N,d)
    labels: np.ndarray         # (N,) of str
    patients: np.ndarray       # (N,) of str; a synthetic image is a patient of its own

    @property
    def n(self) -> int:
        return len(self.features)

    def of(self, label: str) -> "Side":
        return self if label == ALL else self.take(np.flatnonzero(self.labels == label))

    def take(self, index: np.ndarray) -> "Side":
        return Side(*(column[index] for column in self))


def joined(*sides: Side) -> Side:
    return Side(*map(np.concatenate, zip(*sides)))


def between(real: Side, fake: Side) -> dict[str, np.ndarray]:
    """Two sets as `kid` takes them."""
    return {"real": real.features, "fake": fake.features, "real_patients": real.patients,
            "fake_patients": fake.patients}


def too_few(*sides: Side) -> bool:
    return any(s.n < FEWEST or len(set(s.patients)) == 1 for s in sides)


def floor_of(metric: Metric, pool: Side, n: int, m: int, repeats: int, seed: int) -> dict | None:
    """What real scores against real at n and m; None where there are too few patients."""
    try:
        return floor(metric, real=pool.features, patients=pool.patients, n=n, m=m, repeats=repeats,
                     seed=seed)._asdict()
    except InputError:
        return None


def compare(extractor: str, *, synthetic: Side, train: Side, heldout: Side, labels: Sequence[str],
            seed: int = 0, repeats: int = 100) -> list[dict]:
    """Rows of every distance with intervals, p and floors, one for each label and set."""
    rows = []
    for label in tqdm([ALL, *labels], desc=f"distances, {extractor}", unit="label", leave=False):
        known, reference, made = (side.of(label) for side in (train, heldout, synthetic))
        rng = np.random.default_rng(seed)
        sets = {"synthetic": made, "real": _at_most(known, made.n, rng)}
        strangers = heldout.take(np.flatnonzero(~np.isin(heldout.patients, reference.patients)))
        for other in labels:
            if label not in (ALL, other):
                sets[f"real {other}"] = _at_most(strangers.of(other), made.n, rng)
        floors = _floors(joined(known, reference), reference.n, made.n, repeats, seed)
        draws = {}
        for name, side in sets.items():
            row = {"extractor": extractor, "label": label, "set": name, "n": reference.n,
                   "m": side.n, **floors, "too_few": too_few(reference, side)}
            rows.append(row)
            if row["too_few"]:
                continue
            found, draws[name] = kd_with_interval(**between(reference, side), seed=seed)
            row |= found | _measure_equal(reference, side, seed)
            row["KD_p"] = kid_p(**between(reference, side), seed=seed)
            both = {"real": reference.features, "fake": side.features}
            halves = fid_spread(**both, repeats=2 * repeats if side is made else repeats // 2,
                                seed=seed)
            row |= {"FD": fid(**both), "FD_halves": halves.median, "FD_low": halves.low,
                    "FD_high": halves.high}
            if side is not made and "synthetic" in draws:
                # how much farther than the synthetic set; equal held-out patients draw by draw
                farther = draws[name] - draws["synthetic"]
                row["beyond_low"], row["beyond_high"] = finite_percentile(farther)
    return rows


def _measure_equal(reference: Side, side: Side, seed: int, permutations: int = 1000,
                   directions: int = 1000) -> dict:
    """EQUAL at n of each, with intervals of coverage and C2ST and the permutation p of C2ST."""
    n = min(reference.n, side.n)
    real, fake = (Side(*(equal(column, n, seed + k) for column in s))
                  for k, s in enumerate((reference, side)))
    both = {"real": real.features, "fake": fake.features}
    found = {"equal_n": n, "MIND": mind(**both, directions=directions, seed=seed)}
    if n > NEIGHBOUR:
        found |= prdc(**both, k=NEIGHBOUR)._asdict()
        found["coverage_low"], found["coverage_high"] = wilson(round(found["coverage"] * n), n)
    test = c2st(**between(real, fake), permutations=permutations, seed=seed)
    return found | {"C2ST": test.accuracy, "C2ST_low": test.low, "C2ST_high": test.high,
                    "C2ST_p": test.p}


def _floors(pool: Side, n: int, m: int, repeats: int, seed: int) -> dict:
    """Real against real of one label, at the numbers at which each distance is measured.

    {"KD_floor": …}, without what cannot be compared for too few patients. FD_floor_halves stands
    beside FD_halves.
    """
    found = {"KD_floor": floor_of(kid, pool, n, m, repeats, seed),
             "FD_floor": floor_of(fid, pool, n, m, repeats, seed),
             "FD_floor_halves": floor_of(fid, pool, n // 2, m // 2, repeats, seed)}
    found = {name: spread for name, spread in found.items() if spread}
    try:
        draws, n, m = disjoint_draws(pool.patients, min(n, m), min(n, m), NULLS, seed)
    except InputError:
        return found
    rows = [_measure_equal(pool.take(a), pool.take(b), seed, permutations=1, directions=200)
            for a, b in draws]
    for name in EQUAL:
        values = [row.get(name, np.nan) for row in rows]
        found[f"{name}_floor"] = spread_of(values, n, m)._asdict()
    return found


def _at_most(side: Side, n: int, rng: np.random.Generator) -> Side:
    """At most n images, at random: FD depends on the number."""
    return side if side.n <= n else side.take(np.sort(rng.permutation(side.n)[:n]))
