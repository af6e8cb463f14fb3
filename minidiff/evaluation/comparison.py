"""The table of distances: what each set of images scores against held-out real images of a label.

    synthetic          what the generator made when asked for this label
    real, this label   training images of the label: what perfect looks like, by other patients
    real, another      held-out images of every other label, by other patients: how far a wrong picture is

All are compared with the same held-out images, at equal numbers where the data allow it. The other labels are held-out,
too: a classifier has pushed the labels of its training images apart, farther than those of any image it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.distances import fid, fid_spread, finite_percentile, floor, kid, kid_draws, kid_p

FEWEST = 20  # images on each side, below which a cell stays grey; so it does where they are all of one patient
ALL = "all labels"


class Side(NamedTuple):
    """One set of images as an extractor sees it."""

    features: np.ndarray       # (N,d)
    labels: np.ndarray         # (N,) of str
    patients: np.ndarray       # (N,) of str; a synthetic image is a patient of its own

    def of(self, label: str) -> Side:
        return self if label == ALL else self.take(np.flatnonzero(self.labels == label))

    def take(self, index: np.ndarray) -> Side:
        return Side(*(column[index] for column in self))


def compare(extractor: str, *, synthetic: Side, train: Side, heldout: Side, labels: Sequence[str], seed: int = 0,
            repeats: int = 100) -> list[dict]:
    """Rows of FD and KD with intervals, p and floors, one for each label and each set that is compared with it."""
    rows = []
    for label in tqdm([ALL, *labels], desc=f"distances, {extractor}", unit="label", leave=False):
        reference, made = heldout.of(label), synthetic.of(label)
        rng = np.random.default_rng(seed)
        others = [] if label == ALL else [other for other in labels if other != label]
        sets = {"synthetic": made, "real": _some(train.of(label), len(made.features), rng)}
        strangers = heldout.take(np.flatnonzero(~np.isin(heldout.patients, reference.patients)))
        sets |= {f"real {other}": _some(strangers.of(other), len(made.features), rng) for other in others}
        made_draws = None
        floors = _floors(train.of(label), reference, len(made.features), repeats, seed)
        for name, side in sets.items():
            row = {"extractor": extractor, "label": label, "set": name,
                   "n": len(reference.features), "m": len(side.features), **floors}
            row["small"] = min(row["n"], row["m"]) < FEWEST or 1 in (len(set(s.patients)) for s in (reference, side))
            rows.append(row)
            if row["small"]:
                continue
            row |= _measure(reference, side, 2 * repeats if side is made else repeats // 2, seed)
            draws = _draws(reference, side, seed)
            row["KD_low"], row["KD_high"] = finite_percentile(draws)
            if side is made:
                made_draws = draws
            elif made_draws is not None:   # how much farther than the synthetic set; equal held-out patients draw by draw
                row["beyond_low"], row["beyond_high"] = finite_percentile(draws - made_draws)
    return rows


def _draws(reference: Side, side: Side, seed: int) -> np.ndarray:
    return kid_draws(real=reference.features, fake=side.features, real_patients=reference.patients,
                     fake_patients=side.patients, seed=seed)


def _measure(reference: Side, side: Side, repeats: int, seed: int) -> dict:
    both = {"real": reference.features, "fake": side.features}
    patients = {"real_patients": reference.patients, "fake_patients": side.patients}
    halves = fid_spread(**both, repeats=repeats, seed=seed)
    return {"KD": kid(**both, **patients), "KD_p": kid_p(**both, **patients, seed=seed),
            "FD": fid(**both), "FD_halves": halves.median, "FD_low": halves.low, "FD_high": halves.high}


def _floors(train: Side, heldout: Side, m: int, repeats: int, seed: int) -> dict:
    """Real against real of one label at the same numbers, from training and held-out patients together."""
    pool = {"real": np.concatenate([train.features, heldout.features]),
            "patients": np.concatenate([train.patients, heldout.patients]), "repeats": repeats, "seed": seed}
    n = len(heldout.features)
    try:
        found = {"KD_floor": floor(kid, **pool, n=n, m=m), "FD_floor": floor(fid, **pool, n=n, m=m),
                 "FD_floor_halves": floor(fid, **pool, n=n // 2, m=m // 2)}   # beside the halves of fid_spread
    except InputError:   # too few for any floor: the cell is grey anyway
        return {}
    return {name: spread._asdict() for name, spread in found.items()}


def _some(side: Side, n: int, rng: np.random.Generator) -> Side:
    """At most n images, at random: FD depends on the number."""
    return side if len(side.features) <= n else side.take(np.sort(rng.permutation(len(side.features))[:n]))
