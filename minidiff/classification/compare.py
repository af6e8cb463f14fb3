"""Differences between arms: how large, how sure, and which of them are resolved.

    probabilities (networks, n, k) ─ contributions ─▶ (networks, patients) ─ difference ─▶ interval
    and p ─ judged ─▶ gain, harm, no gain of interest, or not resolved

A difference is that of single networks, the mean over the seeds of both arms. It has to hold for
other patients and for other trainings, so its p is the larger of two:

    two-way     Student's t with the variance over patients and networks together, its degrees of
                freedom by Satterthwaite (`statistics.two_way`)
    networks    Student's t over the networks alone, with one degree of freedom fewer than networks.
                With few networks, their variance may be small by chance, which deceives the first

Where an arm pools several generators, those of one generator are averaged and take the place of a
network. With fewer than three networks nothing is resolved. The primary comparison is tested first,
at 5 %. Only where it is resolved are the others tested, at 5 % for all of them together (Holm
1979). So at most 5 % of pages call any difference resolved where there is none; simulated in
tests/test_verdicts.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy

from minidiff.classification.scores import Benefit, check_probabilities, finite
from minidiff.errors import InputError
from minidiff.statistics import delong_parts, group_ids, group_sums, holm, two_way

METRICS = ("balanced_accuracy", "accuracy", "auroc_macro", "auroc")
BENEFIT = "net_benefit"  # where a prevalence was stated
ALPHA, POWER = 0.05, 0.8
FEWEST = 3  # networks, or generators: with fewer, how much training varies is unknown
GAIN, HARM, EXCLUDED, OPEN = "gain", "harm", "no gain of interest", "not resolved"
UNTESTED = "not tested"  # because the primary comparison was not resolved
FORM = re.compile(r"(?P<arm>[^:]+):(?P<against>[^:]+?)(?:@(?P<test_set>[^:@]+))?"
                  r"(?::(?P<metric>[^:@]+))?")


@dataclass(frozen=True)
class Primary:
    """The comparison that a study is made for, named before training: arm minus against."""

    arm: str
    against: str
    test_set: str = "test"
    metric: str = "balanced_accuracy"

    def __str__(self) -> str:
        return f"{self.arm} minus {self.against}, {self.metric} on {self.test_set}"


class Declared(NamedTuple):
    """What a study asks first, written down before training.

    worth: the smallest gain of interest of the primary comparison, in points. benefit: at which
    prevalence the net benefit is asked for, if at all.
    """

    primary: Primary | None = None
    worth: float = 0.0
    benefit: Benefit | None = None


def figures(exclusive: bool, benefit: bool) -> tuple[str, ...]:
    """Those of a comparison; labels that do not exclude each other have no accuracy."""
    return METRICS[0 if exclusive else 2:] + ((BENEFIT,) if benefit else ())


def parse(text: str, arms: Sequence[str], test_sets: Sequence[str], exclusive: bool = True,
          benefit: bool = False) -> Primary | None:
    """ARM:ARM[@TEST_SET][:FIGURE] → the comparison; None for ""."""
    if not text:
        return None
    match = FORM.fullmatch(text)
    metrics = figures(exclusive, benefit)
    against, test_set = (match["against"], match["test_set"]) if match else ("", None)
    if f"{against}@{test_set}" in arms:  # real@25 is an arm
        against, test_set = f"{against}@{test_set}", None
    if not match or match["arm"] == against:
        raise InputError(f"--primary {text!r}; allowed are two arms and, if not test, a test set: "
                         f"ARM:ARM@TEST_SET, and one of :{', :'.join(metrics)}")
    found = Primary(match["arm"], against, test_set or "test",
                    match["metric"] or ("balanced_accuracy" if exclusive else "auroc"))
    for kind, name, allowed in (("arm", found.arm, arms), ("arm", found.against, arms),
                                ("test set", found.test_set, test_sets),
                                ("figure", found.metric, metrics)):
        if name not in allowed:
            raise InputError(f"--primary {text}: no {kind} is named {name}; there are "
                             f"{', '.join(allowed)}")
    return found


def contributions(metric: str, p: np.ndarray, truth: np.ndarray, place: int) -> np.ndarray:
    """(n,): what each image adds to the figure, which is their sum; p (n,k), truth (n,k) bool.

    Those to an area are DeLong's; nan where the set lacks images for the figure.
    """
    if metric == "auroc":
        return delong_parts(p[:, place], truth[:, place])
    if metric == "auroc_macro":
        both = np.flatnonzero(truth.any(0) & ~truth.all(0))
        return np.mean([delong_parts(p[:, k], truth[:, k]) for k in both], 0) if len(both) else (
            np.full(len(p), math.nan))
    label = truth.argmax(1)
    images = truth.sum(0)[label] * truth.any(0).sum() if metric == "balanced_accuracy" else len(p)
    return (p.argmax(1) == label) / images


def difference(table: np.ndarray, generators: Sequence[int] | None = None) -> dict:
    """Mean of (networks, patients), its interval over other patients and networks, and p.

    generators: that of each network, where there are several. ways: standard error and degrees of
    freedom, two-way and of the networks alone; interval and p are the more careful of the two.
    """
    found = {"difference": None, "by_seed": None, "interval": [None, None], "p": None, "ways": []}
    if not np.isfinite(table).all():
        return found
    # rounded, as equal figures may differ in their last bit; + 0 turns −0 into 0
    found |= {"difference": round(float(table.mean()), 12) + 0.0, "by_seed": table.mean(1).tolist()}
    if generators is not None and len(set(generators)) > 1:
        of = group_ids(generators)
        table = np.stack([table[of == g].mean(0) for g in range(of.max() + 1)])
    raters = len(table)
    if raters < FEWEST or table.shape[1] < 2:
        return found
    variance, freedom = two_way(table)
    if not variance:
        return found | {"p": 1.0}
    own = math.sqrt(table.mean(1).var(ddof=1) / raters)
    ways = [[math.sqrt(variance), float(freedom)], *([[own, raters - 1]] if own else [])]
    d, half = table.mean(), max(se * t_value(df) for se, df in ways)
    return found | {"interval": [float(d - half), float(d + half)], "ways": ways,
                    "p": float(max(2 * scipy.stats.t.sf(abs(d) / se, df) for se, df in ways))}


def mean_figure(metric: str, members: np.ndarray, truth: np.ndarray, patients: Sequence[str],
                place: int, generators: int) -> dict:
    """A figure of single networks (networks,n,k), and its interval as of a difference; for JSON."""
    parts = np.array([contributions(metric, p, truth, place) for p in members])
    found = difference(group_sums(parts, patients) * len(set(patients)),
                       [s % generators for s in range(len(parts))])
    return {"value": found["difference"], "interval": found["interval"]}


def t_value(freedom: float, level: float = ALPHA) -> float:
    """How many standard errors away a difference is resolved, two-sided."""
    return float(scipy.special.stdtrit(freedom, 1 - level / 2))


def seen(ways: Sequence[tuple[float, float]], level: float) -> float:
    """The true difference that is resolved with a power of 80 %.

    From the noncentral t. An estimated standard error is more often too small than too large, by
    the median of chi; this makes up for it.
    """
    return float(max(se * scipy.special.nctdtrinc(df, 1 - POWER, t_value(df, level))
                     / math.sqrt(scipy.special.chdtri(df, 0.5) / df) for se, df in ways))


def compare(by_seed: Mapping[str, Sequence[np.ndarray]], truth: np.ndarray, patients: Sequence[str],
            labels: Sequence[str], pairs: Sequence[tuple[str, str]], *, positive: str,
            exclusive: bool = True, generators: Mapping[str, int] = {},
            benefit: Mapping[str, np.ndarray] = {}) -> list[dict]:
    """A row for each pair of arms, the first minus the second, and figure; for JSON.

    by_seed: of each arm the probabilities (n,k) of each network, in the same order of seeds; truth
    (n,k) bool; `positive` the label of "auroc". generators: how many each arm pools; network s was
    trained on the images of generator s mod this. benefit: of each arm (networks,n), what each
    image adds to its net benefit.
    """
    truth, place = np.asarray(truth, bool), list(labels).index(positive)
    metrics = figures(exclusive, bool(benefit))
    tables: dict[tuple[str, str], np.ndarray] = {}
    for arm in dict.fromkeys(sum(pairs, ())):
        members = np.asarray(by_seed[arm], float)
        assert members.shape[1:] == truth.shape == (len(patients), len(labels)), (arm, truth.shape)
        for p in members:
            check_probabilities(p, exclusive, f"arm {arm}")
        for metric in metrics:
            parts = benefit[arm] if metric == BENEFIT else np.array(
                [contributions(metric, p, truth, place) for p in members])
            tables[arm, metric] = group_sums(parts, patients) * len(set(patients))
    rows = []
    for (a, b), metric in ((pair, metric) for pair in pairs for metric in metrics):
        x, y = tables[a, metric], tables[b, metric]
        assert len(x) == len(y), (a, b, "differ in their number of seeds")
        g = max(generators.get(a, 1), generators.get(b, 1))
        rows.append({"arm": a, "against": b, "metric": metric, "seeds": len(x), "generators": g,
                     "patients": x.shape[1],
                     **difference(x - y, [s % g for s in range(len(x))])})
    return rows


def judged(differences: Mapping[str, Sequence[Mapping]], primary: Primary | None,
           worth: float = 0.0) -> dict[str, list[dict]]:
    """The rows of `compare` by test set with "p_holm", "answer", "sees" and "patients_needed".

    worth: the smallest gain of interest of the primary comparison. sees: the true difference that
    this study would resolve four times in five; patients_needed: how many, with more networks by
    the same factor, would resolve the one found. Both at the level of the test: 5 %, divided by
    their number for all but the primary comparison.
    """
    rows = [{**row, "test_set": name} for name, own in differences.items() for row in own]
    for row in rows:
        row["primary"] = primary == Primary(row["arm"], row["against"], row["test_set"],
                                            row["metric"])
    first, rest = ([row for row in rows if row["primary"] is one] for one in (True, False))
    assert len(first) == bool(primary), primary
    for row in first:
        row |= {"p_holm": row["p"], "answer": answer(row["p"], row, worth), **_sizes(row, ALPHA)}
    tested = all(row["p"] is not None and row["p"] < ALPHA for row in first)
    level = ALPHA / max(1, sum(row["p"] is not None for row in rest))
    for row, p in zip(rest, holm([math.nan if row["p"] is None else row["p"] for row in rest])):
        p = finite(p) if tested else None
        row |= {"p_holm": p, "answer": answer(p, row) if tested else UNTESTED, **_sizes(row, level)}
    return {name: [row for row in rows if row["test_set"] == name] for name in differences}


def answer(p: float | None, row: Mapping, worth: float = 0.0) -> str:
    """Gain, harm, no gain of interest where all of a gain's interval is below it, not resolved."""
    sure, high = p is not None and p < ALPHA, row["interval"][1]
    if sure and row["difference"] < 0:
        return HARM
    if worth and high is not None and high < worth:
        return EXCLUDED
    return GAIN if sure else OPEN


def _sizes(row: Mapping, level: float) -> dict:
    """The difference detectable with a power of 80 %, and the patients that the one found needs."""
    if not row["ways"]:
        return {"sees": None, "patients_needed": None}
    sees, d = seen(row["ways"], level), row["difference"]
    return {"sees": sees,
            "patients_needed": math.ceil(row["patients"] * (sees / d) ** 2) if d else None}


def summarise(results: Sequence[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of each figure, an entry for each arm and test set.

    "auroc_positive" is that of the label that each result names as its "positive".
    """
    rows = []
    for (test_set, arm), group in grouped(results, "test_set", "arm").items():
        row = {"test_set": test_set, "arm": arm, "seeds": len(group),
               "n_train": group[0]["n_train"]}
        group = [{**r, "auroc_positive": r["auroc"][r["positive"]]} for r in group]
        for name in ("accuracy", "balanced_accuracy", "auroc_macro", "auroc_positive", BENEFIT):
            if name not in group[0]:
                continue
            values = [r[name] for r in group if r[name] is not None]
            row[name] = float(np.mean(values)) if values else None
            row[name + "_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def grouped(rows: Sequence[Mapping], *keys: str) -> dict:
    """Rows by their value of a key, or by the tuple of several, in order of first appearance."""
    found: dict = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        found.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return found
