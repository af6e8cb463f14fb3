"""The comparison that a study is made for: named before training, and answered first.

Its difference is that of single networks, the mean over seeds. Its interval covers other patients
and other seeds, either of which may matter more. It says nothing about another generator: all
synthetic images of an arm come from one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from minidiff.errors import InputError
from minidiff.statistics import delong_parts, group_sums, two_way

FORM = re.compile(r"(?P<arm>[^:@]+):(?P<against>[^:@]+)(?:@(?P<test_set>[^:@]+))?")
LEAST_SEEDS, POWER = 3, 0.8  # with fewer seeds nothing is known of how much training varies


@dataclass(frozen=True)
class Primary:
    """arm minus against, on one test set."""

    arm: str
    against: str
    test_set: str = "test"

    def __str__(self) -> str:
        return f"{self.arm} minus {self.against}, on {self.test_set}"


def parse(text: str, arms: Sequence[str], test_sets: Sequence[str]) -> Primary | None:
    """ARM:ARM[@TEST_SET] → the comparison; None for ""."""
    if not text:
        return None
    match = FORM.fullmatch(text)
    if not match or match["arm"] == match["against"]:
        raise InputError(f"--primary {text!r}; allowed are two arms and, if not test, a test set: "
                         "ARM:ARM@TEST_SET")
    missing = [name for name in (match["arm"], match["against"]) if name not in arms]
    if missing:
        raise InputError(f"--primary {text}: {', '.join(missing)} is not among the arms, "
                         f"{', '.join(arms)}")
    if (match["test_set"] or "test") not in test_sets:
        raise InputError(f"--primary {text}: no test set is named {match['test_set']}; there are "
                         f"{', '.join(test_sets)}")
    return Primary(match["arm"], match["against"], match["test_set"] or "test")


def measure(primary: Primary, by_seed: Mapping[str, Sequence[np.ndarray]], truth: np.ndarray,
            patients: Sequence[str], place: int, exclusive: bool) -> dict:
    """The difference, its interval over other patients and seeds, and what it can resolve.

    The result is JSON. by_seed: of each arm the probabilities (n,k) of each seed; truth (n,k) bool.
    The figure is balanced accuracy, or the AUROC of label number `place` where labels do not
    exclude each other. answer: gain, harm or not resolved. "sees": the true difference that such a
    study would resolve four times in five; "times": how many times as many patients and seeds would
    see two points.
    """
    arms = [np.asarray(by_seed[name]) for name in (primary.arm, primary.against)]
    each = np.array([_shares(a, truth, place, exclusive) - _shares(b, truth, place, exclusive)
                     for a, b in zip(*arms)])
    # (seeds, patients), whose mean is the difference
    table = group_sums(each, patients) * len(set(patients))
    seeds, n = table.shape
    found = {"arm": primary.arm, "against": primary.against, "test_set": primary.test_set,
             "seeds": seeds, "patients": n, "metric": "balanced_accuracy" if exclusive else "auroc",
             "difference": None, "by_seed": None,
             "interval": [None, None], "answer": "not resolved", "sees": None, "times": None}
    if not np.isfinite(table).all():  # no patient on one side of the curve
        return found
    found |= {"difference": float(table.mean()), "by_seed": table.mean(1).tolist()}
    if seeds < LEAST_SEEDS:
        return found
    variance, freedom = two_way(table)
    reach, d = float(scipy.stats.t.ppf(0.975, freedom)), found["difference"]
    half = reach * math.sqrt(variance)
    sees = (reach + float(scipy.stats.norm.ppf(POWER))) * math.sqrt(variance)
    answer = "gain" if d - half > 0 else "harm" if d + half < 0 else "not resolved"
    return {**found, "interval": [d - half, d + half], "answer": answer, "sees": sees,
            "times": (sees / 0.02) ** 2}


def _shares(p: np.ndarray, truth: np.ndarray, place: int, exclusive: bool) -> np.ndarray:
    """(n,): what each image adds to the figure, whose sum it is."""
    if not exclusive:
        return delong_parts(p[:, place], truth[:, place])
    label = truth.argmax(1)
    return (p.argmax(1) == label) / (truth.sum(0)[label] * (truth.sum(0) > 0).sum())
