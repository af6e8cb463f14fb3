"""Differences between arms on the same images: how large, how sure, and what is needed to tell.

A difference is that of the mean probabilities over seeds. It is resolved where three things hold:
its interval leaves out 0, over resamples of whole patients that are the same for both arms; its p
is below .05 after Holm's correction for all comparisons by this figure; and every single seed has
its sign, for neither interval nor p includes how much training varies from seed to seed. What is
resolved holds for other patients, but not for other generators, nor surely for other seeds where
there are few. The tests:

    figure                            one image a patient         several images a patient
    accuracy                          exact McNemar               signs flipped by patient
    balanced_accuracy                 signs flipped by patient    signs flipped by patient
    auroc, of the label of interest   DeLong, paired              bootstrap of patients
    auroc_macro                       bootstrap of patients       bootstrap of patients
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from minidiff.classification.scores import check_probabilities, figures, finite
from minidiff.statistics import (
    NONE,
    bootstrap_p,
    delong_pair,
    group_ids,
    holm,
    mcnemar,
    patient_weights,
    percentile,
    sign_flip_p,
    z_value,
)

METRICS = ("balanced_accuracy", "accuracy", "auroc_macro", "auroc")
ALPHA, POWER = 0.05, 0.8


def compare(by_seed: Mapping[str, Sequence[np.ndarray]], truth: np.ndarray, patients: Sequence[str],
            labels: Sequence[str], pairs: Sequence[tuple[str, str]], *, positive: str,
            exclusive: bool = True, n_boot: int = 2000, seed: int = 0) -> list[dict]:
    """A row for each pair of arms, the first minus the second, and figure; for JSON.

    by_seed: of each arm the probabilities (n,k) of each seed, in the same order of seeds; truth
    (n,k) bool; `positive` the label of "auroc". Labels that do not exclude each other have no
    accuracy. Resamples that lack a label of the set are left out; there are 60 a pair or more, or
    no p of theirs could be below .05 after Holm. "patients_needed": how many would show the
    difference that was found with a power of 80 %, were it the true one; no surer than the
    difference is.
    """
    truth, place = np.asarray(truth, bool), list(labels).index(positive)
    arms = {arm: np.asarray(by_seed[arm], float)
            for arm in dict.fromkeys(arm for pair in pairs for arm in pair)}
    for arm, members in arms.items():
        assert members.shape[1:] == truth.shape == (len(patients),
                                                    len(labels)), (arm, members.shape, truth.shape)
        for p in members:
            check_probabilities(p, exclusive, f"arm {arm}")
    ones = np.ones((1, len(truth)))
    mean = {arm: members.mean(0) for arm, members in arms.items()}
    whole = {arm: _headline(p, truth, ones, place, exclusive) for arm, p in mean.items()}
    single = {arm: [_headline(p, truth, ones, place, exclusive) for p in members]
              for arm, members in arms.items()}
    drawn, n_boot = {arm: [] for arm in arms}, max(n_boot, 60 * len(pairs))
    group = group_ids(patients)
    for weights in patient_weights(patients, n_boot, seed):
        for arm, p in mean.items():
            drawn[arm].append(_headline(p, truth, weights, place, exclusive))
    drawn, rows = {arm: np.concatenate(parts, 1) for arm, parts in drawn.items()}, []
    for a, b in pairs:
        assert len(arms[a]) == len(arms[b]), (a, b, "differ in their number of seeds")
        for k, metric in enumerate(METRICS):
            if not exclusive and "accuracy" in metric:
                continue
            # rounded, for equal figures may differ in their last bit
            d, *by_one_seed = (round(float((x - y)[k, 0]), 12) for x, y in
                               [(whole[a], whole[b]), *zip(single[a], single[b])])
            spread = (drawn[a] - drawn[b])[k]
            spread = spread[~np.isnan(spread)]
            test, p = (_own_test(metric, mean[a], mean[b], truth, place, group, n_boot, seed)
                       or ("bootstrap", bootstrap_p(spread)))
            interval = percentile(spread) if len(spread) else NONE
            rows.append({"arm": a, "against": b, "metric": metric, "difference": finite(d),
                         "interval": [finite(x) for x in interval], "p": finite(p), "test": test,
                         "seeds": len(arms[a]),
                         "seeds_agree": sum(bool(np.sign(x) == np.sign(d)) for x in by_one_seed),
                         "patients_needed": patients_needed(d, spread, len(set(patients)))})
    return _judged(rows)


def _headline(p: np.ndarray, truth: np.ndarray, weights: np.ndarray, place: int,
              exclusive: bool) -> np.ndarray:
    """METRICS in each of b resamples: (4,b), nan where there is none."""
    found = figures(p, truth, weights, exclusive)
    found["auroc"] = found["auroc"][:, place]
    return np.stack([found.get(metric, np.full(len(weights), math.nan)) for metric in METRICS])


def _own_test(metric: str, a: np.ndarray, b: np.ndarray, truth: np.ndarray, place: int,
              group: np.ndarray, n_perm: int, seed: int) -> tuple[str, float] | None:
    """The test of a figure and its two-sided p; None where the bootstrap is the test.

    p is nan where DeLong's has no answer.
    """
    alone = group.max() + 1 == len(group)  # images are as independent as patients
    if metric == "auroc" and alone:
        d, se = delong_pair(a[:, place], b[:, place], truth[:, place])
        return "DeLong", 1.0 if d == 0 else 2 * float(
            scipy.stats.norm.sf(abs(d) / se)) if se > 0 else math.nan
    if "accuracy" not in metric:
        return None
    right_a, right_b = (np.take_along_axis(truth, p.argmax(1)[:, None], 1)[:, 0] for p in (a, b))
    if metric == "accuracy" and alone:
        return "McNemar exact", mcnemar(int((right_a & ~right_b).sum()),
                                        int((right_b & ~right_a).sum()))
    share = 1 / truth.sum(0)[truth.argmax(1)] if metric == "balanced_accuracy" else np.ones(
        len(truth))
    return "sign flip", sign_flip_p(np.bincount(group, share * (right_a * 1.0 - right_b)), n_perm,
                                    seed)


def patients_needed(difference: float, drawn: np.ndarray, patients: int) -> int | None:
    """Patients that would show a difference at 5 % with a power of 80 %.

    The standard error falls as 1/√patients. `drawn` are its resamples over so many patients; None
    for no difference and no spread.
    """
    se = float(np.std(drawn, ddof=1)) if len(drawn) > 1 else 0.0
    if not (abs(difference) > 0 and se > 0):
        return None
    reach = z_value(1 - ALPHA) + float(scipy.stats.norm.ppf(POWER))
    return math.ceil(patients * (reach * se / difference) ** 2)


def _judged(rows: list[dict]) -> list[dict]:
    """With "p_holm", over the pairs of each metric, and "resolved"."""
    adjusted = {}
    for metric in METRICS:
        own = [i for i, row in enumerate(rows) if row["metric"] == metric]
        adjusted |= dict(
            zip(own, holm([math.nan if rows[i]["p"] is None else rows[i]["p"] for i in own])))
    judged = []
    for i, row in enumerate(rows):
        low, high = row["interval"]
        resolved = (low is not None and (low > 0 or high < 0) and adjusted[i] < ALPHA
                    and row["seeds_agree"] == row["seeds"])
        judged.append({**row, "p_holm": finite(adjusted[i]), "resolved": bool(resolved)})
    return judged


def summarise(results: Sequence[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of each figure, an entry for each arm and test set.

    "auroc_positive" is that of the label that each result names as its "positive".
    """
    rows = []
    for (test_set, arm), group in grouped(results, "test_set", "arm").items():
        row = {"test_set": test_set, "arm": arm, "seeds": len(group),
               "n_train": group[0]["n_train"]}
        group = [{**r, "auroc_positive": r["auroc"][r["positive"]]} for r in group]
        for name in ("accuracy", "balanced_accuracy", "auroc_macro", "auroc_positive"):
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
