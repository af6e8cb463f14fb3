"""Does a classifier serve all groups alike, and does a generator keep the mixture of attributes?

    gaps         AUROC, sensitivity (TPR) and false alarms (FPR) of one label in each group of a
                 column, at one threshold
    attributes   shares of each column's values, label by label, real beside synthetic, and how much
                 the label tells of them

A lower sensitivity of a group is its underdiagnosis (Seyyed-Kalantari et al. 2021).
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy

from minidiff.classification.scores import finite, pair
from minidiff.data.audit import age_band
from minidiff.data.split import Row
from minidiff.rating import effective_n, share_interval, short_by
from minidiff.statistics import (
    NONE,
    Interval,
    auroc,
    bootstrap_counts,
    finite_percentile,
    group_ids,
    patient_weights,
    weighted_auroc,
)
from minidiff.variables import AND, present

COLUMNS = ("sex", "age", "view", "source")
# images on the side that a figure is of, below which a group is not held against another
FEW = 20
# needs positives, needs negatives
METRICS = {"auroc": (True, True), "tpr": (True, False), "fpr": (False, True)}
UNKNOWN = "unknown"


def gaps(scores: Sequence[float], positive: Sequence[bool], rows: Sequence[Row],
         patients: Sequence[str], *, columns: Sequence[str] = COLUMNS, threshold: float | None,
         tests: int = 0, n_boot: int = 2000, seed: int = 0) -> dict:
    """"groups": each value of a column; "gaps": the largest difference of two, by metric.

    scores and positive (n,) are of one label; ages are in the audit's bands; an empty cell is the
    group "unknown". A score of `threshold` or more is an alarm; without a threshold TPR and FPR are
    None. `few` says that a group has less than 20 positives. A gap is between groups that have 20
    images of each side that it needs, "unknown" left aside: None where fewer than two are left.
    Intervals: of shares, Wilson's at the effective number of images, and of their differences
    `rating.short_by`; of AUROC, resamples of patients, and of its differences the t interval with
    their spread. Those of gaps are wide enough for `tests` pairs of groups at once (Bonferroni), of
    all arms and columns on a page; 0: for those compared here, as `pairs` counts them. `resolved`
    where they leave out 0.
    """
    tests = tests or pairs(positive, rows, columns, threshold is not None)
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    alarm = np.full(len(scores), math.nan) if threshold is None else scores >= threshold
    # the same resamples for all groups
    patients, weights = group_ids(patients), list(patient_weights(patients, n_boot, seed))
    groups, largest = [], []
    for column in columns:
        cells = np.array([cell_of(row, column) for row in rows], object)
        own = {name: _Group(scores, positive, alarm, patients, weights, cells == name)
               for name in sorted(set(cells), key=lambda name: (name == UNKNOWN, name))}
        if set(own) <= {UNKNOWN}:
            continue
        groups += [{"column": column, "group": name, **group.row()} for name, group in own.items()]
        largest += [{"column": column, **_gap(metric, own, tests)} for metric in METRICS
                    if metric == "auroc" or threshold is not None]
    return {"groups": groups, "gaps": largest, "threshold": threshold, "fewest": FEW,
            "tests": tests}


def pairs(positive: Sequence[bool], rows: Sequence[Row], columns: Sequence[str] = COLUMNS,
          alarms: bool = True) -> int:
    """How many pairs of groups `gaps` compares, over all columns and figures; alarms: TPR and FPR,
    too."""
    total, sides = 0, list(zip(positive, rows))
    for column in columns:
        counts = Counter((cell_of(row, column), bool(side)) for side, row in sides)
        known = {name for name, _ in counts if name != UNKNOWN}
        for needed in METRICS.values() if alarms else [METRICS["auroc"]]:
            enough = [name for name in known if _enough(
                (counts[name, True], counts[name, False]), needed)]
            total += math.comb(len(enough), 2)
    return total


def _enough(sides: tuple[int, int], needed: tuple[bool, bool]) -> bool:
    return all(n >= FEW for n, wanted in zip(sides, needed) if wanted)


def cell_of(row: Row, column: str) -> str:
    """The group of an image: the cell, of an age its band."""
    return (age_band(row) if column == "age" else row.get(column, "")) or UNKNOWN


class _Group:
    """The images of one value of a column, and what can be measured on them."""

    def __init__(self, scores, positive, alarm, patients, weights, member):
        self.scores, self.positive, self.alarm, self.patients = (
            column[member] for column in (scores, positive, alarm, patients))
        self.sides = int(self.positive.sum()), int((~self.positive).sum())
        # AUROC in each resample of patients, nan where a side is empty
        self.areas = np.concatenate([weighted_auroc(self.scores, self.positive, w[:, member])
                                     for w in weights])

    def value(self, metric: str) -> float:
        if metric == "auroc":
            return auroc(self.scores, self.positive)
        side = self.positive == (metric == "tpr")
        return float(self.alarm[side].mean()) if side.any() else math.nan

    def interval(self, metric: str, confidence: float = 0.95) -> Interval:
        if math.isnan(self.value(metric)):
            return NONE
        if metric == "auroc":
            return finite_percentile(self.areas, confidence)
        side = self.positive == (metric == "tpr")
        return share_interval(self.alarm[side], self.patients[side], confidence)

    def effective_n(self, metric: str) -> float:
        side = self.positive == (metric == "tpr")
        return effective_n(self.alarm[side], self.patients[side])

    def row(self) -> dict:
        out = {"n": len(self.scores), "patients": len(set(self.patients.tolist())),
               "positives": self.sides[0], "negatives": self.sides[1], "few": self.sides[0] < FEW}
        for metric in METRICS:
            out[metric] = finite(self.value(metric))
            out["interval" if metric == "auroc"
                else f"{metric}_interval"] = pair(self.interval(metric))
        return out


def _gap(metric: str, groups: dict[str, _Group], tests: int) -> dict:
    """The largest difference between two groups that have enough images."""
    known = {name: group for name, group in groups.items() if name != UNKNOWN
             and _enough(group.sides, METRICS[metric])}
    out = {"metric": metric, "groups": len(known), "high": None, "low": None, "gap": None,
           "interval": [None, None], "resolved": False}
    if len(known) < 2:
        return out
    values = {name: group.value(metric) for name, group in known.items()}
    high = max(values, key=values.get)
    low = min((name for name in values if name != high), key=values.get)
    confidence, a, b = 1 - 0.05 / tests, known[high], known[low]
    gap = values[high] - values[low]
    # so far out there are no resamples
    reach = scipy.stats.t.ppf((1 + confidence) / 2, min(*a.sides, *b.sides) - 1)
    half = float(reach * np.nanstd(a.areas - b.areas))
    interval = (gap - half, gap + half) if metric == "auroc" else short_by(
        values[high], a.effective_n(metric), values[low], b.effective_n(metric), confidence)
    return {**out, "high": high, "low": low, "gap": gap,
            "interval": pair(interval), "resolved": bool(interval[0] > 0)}


def attributes(real: Sequence[Row], synthetic: Sequence[Row], columns: Sequence[str] = COLUMNS, *,
               sources: int = 1, n_boot: int = 4000, seed: int = 0) -> dict:
    """"shares" of each value within a label, "association" of label and column, both sides.

    Real beside synthetic. A synthetic image's attributes are those that it was asked for; whether
    it shows them is the judge's to say. Association is Cramér's V, 0 … 1, corrected for its bias
    (Bergsma 2013), of images where the column is known; intervals from resamples, of real images by
    patient. `amplified`: the generator ties the label to the column more than the real images do,
    beyond the interval of the difference, which is wide enough for all rows of a page with so many
    `sources` of synthetic images (Bonferroni). With findings that go together each has its own row.
    A column of which the two sides have no value in common is left out.
    """
    several, sides = any(AND in row["label"] for row in real), (real, synthetic)
    named = [[present("label", row["label"]) if several else frozenset([row["label"]])
              for row in rows] for rows in sides]
    labels, shares, association = sorted(set().union(*named[0], *named[1])), [], []
    told = {column: [[cell_of(row, column) for row in rows] for rows in sides]
            for column in columns}
    # nothing in common: a source that is a folder's name
    told = {column: cells for column, cells in told.items()
            if ({*cells[0]} & {*cells[1]}) - {UNKNOWN}}
    of, tests = labels if several else [""], sources * len(told)
    for column, cells in told.items():
        for label in labels:
            real_own, own = (Counter(cell for cell, names in zip(column_cells, of_rows)
                                     if label in names)
                             for column_cells, of_rows in zip(cells, named))
            n, m = real_own.total(), own.total()
            shares += [{"column": column, "value": value, "label": label, "n_real": n,
                        "n_synthetic": m, "real": real_own[value] / n if n else None,
                        "synthetic": own[value] / m if m else None}
                       for value in sorted({*real_own, *own})]
        for label in of:
            association.append({"column": column, "label": label, **_amplified(
                [[(label in names if several else names, cell, row["patient"])
                  for names, cell, row in zip(*side) if cell != UNKNOWN]
                 for side in zip(named, cells, sides)], n_boot, seed,
                1 - 0.05 / (tests * len(of)))})
    return {"shares": shares, "association": association}


def cramers_v(counts: np.ndarray, draws: int = 1) -> np.ndarray:
    """Tables (…,r,c) of counts → bias-corrected Cramér's V (…), 0 to 1, or nan.

    nan where a side has one value only. φ² = χ²/n − (r−1)(c−1)/(n−1), at least 0; V =
    √(φ²/min(r̃−1, c̃−1)) with r̃ = r − (r−1)²/(n−1), and c̃ likewise (Bergsma 2013). r and c are
    the rows and columns that have counts. The term is what chance adds to φ² in one draw of n
    images; a resample is drawn twice, first from the world and then from the sample, and takes it
    twice.
    """
    x = np.asarray(counts, float)
    n, down, across = x.sum((-2, -1)), x.sum(-1), x.sum(-2)
    expected = down[..., :, None] * across[..., None, :] / np.maximum(n, 1)[..., None, None]
    chi2 = (np.square(x - expected) / np.where(expected > 0, expected, 1)).sum((-2, -1))
    r, c, more = (down > 0).sum(-1), (across > 0).sum(-1), np.maximum(n - 1, 1)
    phi2 = np.maximum(chi2 / np.maximum(n, 1) - draws * (r - 1) * (c - 1) / more, 0)
    least = np.minimum(r - (r - 1) ** 2 / more, c - (c - 1) ** 2 / more) - 1
    return np.where(least > 0, np.sqrt(np.minimum(phi2 / np.where(least > 0, least, 1), 1)), np.nan)


def _amplified(sides: Sequence[Sequence[tuple]], n_boot: int, seed: int,
               confidence: float) -> dict:
    """V of real and of synthetic images, (label, cell, patient) each, and their difference."""
    values, draws, out = [], [], {}
    for k, (name, rows) in enumerate(zip(("real", "synthetic"), sides)):
        value, drawn = math.nan, np.full(n_boot, math.nan)
        if rows:
            label, cell, patient = (group_ids(column) for column in zip(*rows))
            shape = (patient.max() + 1, label.max() + 1, cell.max() + 1)
            tables = np.zeros(shape)  # of each patient: the table of his images
            np.add.at(tables, (patient, label, cell), 1)
            value = float(cramers_v(tables.sum(0)))
            drawn = cramers_v(np.tensordot(bootstrap_counts(len(tables), n_boot, seed + k), tables,
                                           1), draws=2)
        values.append(value)
        draws.append(drawn)
        out |= {name: finite(value), f"{name}_interval": pair(finite_percentile(drawn)),
                f"n_{name}": len(rows)}
    difference = finite_percentile(draws[1] - draws[0], confidence)
    return {**out, "difference": finite(values[1] - values[0]), "interval": pair(difference),
            "amplified": difference[0] > 0}
