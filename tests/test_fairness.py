"""Gaps between groups and shares of attributes: by hand, planted, and the coverage of their
intervals.
"""

import json

import numpy as np
import pytest
from scipy import stats

from minidiff.classification.fairness import UNKNOWN, attributes, cramers_v, gaps
from minidiff.rating import share_interval
from minidiff.statistics import auroc, wilson


def group(out, column, name):
    row, = (r for r in out["groups"] if (r["column"], r["group"]) == (column, name))
    return row


def gap(out, column, metric):
    row, = (r for r in out["gaps"] if (r["column"], r["metric"]) == (column, metric))
    return row


def draw(rng, groups, n, images=1):
    """n positive and n negative patients of each group {sex: (TPR, FPR)}, threshold 0, scores
    normal, 1 to `images` each.
    """
    scores, positive, rows, patients = [], [], [], []
    for sex, rates in groups.items():
        for side, rate in zip((True, False), rates):
            for i in range(n):
                own = rng.normal()
                for _ in range(rng.integers(1, images + 1)):
                    noise = 0.7 * own + np.sqrt(1 - 0.49) * rng.normal() if images > 1 else own
                    scores.append(noise + stats.norm.ppf(rate))
                    positive.append(side)
                    rows.append({"sex": sex})
                    patients.append(f"{sex}{side}{i}")
    return np.array(scores), np.array(positive), rows, patients


def test_rates_and_areas_are_those_of_each_group():
    scores = [0.9, 0.8, 0.2, 0.6, 0.1, 0.7, 0.3, 0.5]
    positive = [1, 1, 1, 0, 0, 1, 1, 0]
    rows = [{"sex": s} for s in "FFFFFMMM"]
    out = gaps(scores, positive, rows, list("abcdefgh"), columns=["sex"], threshold=0.5, n_boot=200)
    women, men = group(out, "sex", "F"), group(out, "sex", "M")
    assert (women["n"], women["positives"], women["negatives"], women["patients"]) == (5, 3, 2, 5)
    # 0.5 is an alarm
    assert (women["tpr"], women["fpr"], men["tpr"], men["fpr"]) == (2 / 3, 1 / 2, 1 / 2, 1.0)
    assert women["auroc"] == auroc(scores[:5], np.array(positive[:5], bool)) and men["auroc"] == 0.5
    assert women["few"] and gap(out, "sex", "tpr")["gap"] is None and not gap(out, "sex",
                                                                              "tpr")["resolved"]
    json.dumps(out, allow_nan=False)


def test_a_planted_gap_is_found_and_two_equal_groups_have_none():
    rng = np.random.default_rng(0)
    out = gaps(*draw(rng, {"F": (0.55, 0.1), "M": (0.9, 0.1)}, 150), columns=["sex"], threshold=0.0,
               n_boot=400)
    found = gap(out, "sex", "tpr")
    assert (found["high"], found["low"],
            found["resolved"]) == ("M", "F", True) and abs(found["gap"] - 0.35) < 0.12
    assert found["interval"][0] < found["gap"] < found["interval"][1] and gap(out, "sex",
                                                                              "auroc")["resolved"]
    assert not gap(out, "sex", "fpr")["resolved"]


def test_few_of_a_side_are_shown_but_not_compared_and_unknown_is_no_group_to_compare():
    rng = np.random.default_rng(1)
    scores, positive, rows, patients = draw(rng, {"F": (0.9, 0.1), "M": (0.2, 0.1), "": (0.01, 0.9),
                                                  "X": (0.9, 0.9)}, 40)
    keep = [k for k, row in enumerate(rows)
            if not (row["sex"] == "X" and positive[k]) or rng.random() < 0.3]
    out = gaps(scores[keep], positive[keep], [rows[k] for k in keep], [patients[k] for k in keep],
               columns=["sex"], threshold=0.0, n_boot=100)
    assert [r["group"] for r in out["groups"]] == ["F", "M", "X", UNKNOWN]
    assert group(out, "sex", "X")["few"] and group(out, "sex", "X")["tpr"] is not None
    assert gap(out, "sex", "tpr")["groups"] == 2 and (gap(out, "sex", "tpr")["low"]) == "M"
    # it has negatives enough
    assert gap(out, "sex", "fpr")["groups"] == 3 and gap(out, "sex", "fpr")["high"] == "X"


def test_ages_come_in_bands_and_a_column_of_nothing_is_left_out():
    rows = [{"age": age, "view": ""} for age in ("17", "18.0", "39", "40", "85", "", "unknown")]
    out = gaps(np.arange(7) / 7, [1, 0, 1, 0, 1, 0, 1], rows, list("abcdefg"),
               columns=["age", "view", "sex"], threshold=None, n_boot=50)
    bands = [("0–17", 1), ("18–39", 2), ("40–59", 1), ("80+", 1), (UNKNOWN, 2)]
    assert [(r["group"], r["n"]) for r in out["groups"]] == bands
    assert {r["metric"] for r in out["gaps"]} == {"auroc"} and all(r["tpr"] is None
                                                                   for r in out["groups"])
    assert group(out, "age", "18–39")["auroc"] == 1.0 and group(out, "age", "80+")["auroc"] is None


def test_images_of_one_patient_count_as_far_as_they_differ():
    hit = np.array([True] * 30 + [False] * 10)
    alone = share_interval(hit, np.arange(40))
    np.testing.assert_allclose(alone, wilson(30, 40), atol=1e-12)
    # five equal images tell what one tells
    copied = share_interval(np.repeat(hit, 5), np.repeat(np.arange(40), 5))
    np.testing.assert_allclose(copied, alone, atol=1e-12)
    mixed = share_interval(np.tile([True, True, True, False], 10), np.repeat(np.arange(10), 4))
    # no patient differs: as 40, no more
    np.testing.assert_allclose(mixed, wilson(30, 40), atol=1e-12)
    assert share_interval(np.ones(12, bool), np.repeat(np.arange(4), 3)) == wilson(4, 4)


def test_equal_calls_give_equal_numbers():
    data = draw(np.random.default_rng(2), {"F": (0.8, 0.1), "M": (0.9, 0.2)}, 30, images=3)
    assert gaps(*data, columns=["sex"], threshold=0.0,
                n_boot=100) == gaps(*data, columns=["sex"], threshold=0.0, n_boot=100)


def test_cramers_v_by_scipy_and_at_its_ends():
    table = np.array([[30, 10, 5], [12, 40, 9]])
    n, (r, c) = table.sum(), table.shape
    chi2 = stats.chi2_contingency(table, correction=False).statistic
    # uncorrected
    assert np.sqrt(chi2 / n / (min(r,
                                   c) - 1)) == pytest.approx(stats.contingency.association(table))
    phi2 = chi2 / n - (r - 1) * (c - 1) / (n - 1)
    wanted = np.sqrt(phi2 / (min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1))
    assert cramers_v(table) == pytest.approx(wanted, rel=1e-12)
    padded = np.zeros((4, 5))
    # values that do not occur do not count
    padded[[[0], [2]], [0, 1, 4]] = table
    np.testing.assert_allclose(cramers_v(np.stack([padded, padded.astype(int)])), wanted)
    assert cramers_v(np.diag([20, 30])) == 1.0 and cramers_v(np.outer([20, 30], [2, 4])) == 0.0
    assert np.isnan(cramers_v(np.array([[5, 9]]))) and np.isnan(cramers_v(np.zeros((2, 2))))


def people(rng, n, share, name):
    """n rows of which covid is male with probability `share`, normal with .5."""
    rows = []
    for i in range(n):
        label = ("covid", "normal")[i % 2]
        rows.append({"label": label,
                     "sex": "M" if rng.random() < (share if label == "covid" else 0.5) else "F",
                     "source": name, "patient": f"{name}{i}"})
    return rows


def test_a_generator_that_ties_the_label_tighter_is_found_and_one_that_does_not_is_not():
    rng = np.random.default_rng(3)
    real = people(rng, 800, 0.6, "real")
    for share, amplified in ((0.95, True), (0.6, False)):
        out = attributes(real, people(rng, 400, share, "made"), ("sex", "source", "view"),
                         n_boot=300)
        row, = out["association"]  # the folder's name is no attribute, and view is unknown
        assert (row["column"], row["amplified"], row["n_real"],
                row["n_synthetic"]) == ("sex", amplified, 800, 400)
        assert row["interval"][0] < row["difference"] < row["interval"][1]
        male, = (s for s in out["shares"] if (s["value"], s["label"]) == ("M", "covid"))
        assert abs(male["synthetic"] - share) < 0.06 and male["n_real"] == 400
        for side in ("real", "synthetic"):
            assert sum(s[side] for s in out["shares"] if s["label"] == "covid") == pytest.approx(1)
        json.dumps(out, allow_nan=False)


def test_findings_have_a_row_each_and_unknown_cells_count_in_shares_only():
    rows = [{"label": ("a|b", "a", "none", "b")[i % 4], "sex": ("F", "M", "")[i % 3],
             "patient": str(i)} for i in range(120)]
    out = attributes(rows, rows, ("sex",), n_boot=50)
    assert [r["label"] for r in out["association"]] == ["a", "b"] and {
        r["n_real"] for r in out["association"]} == {80}
    assert {s["value"] for s in out["shares"]} == {"F", "M", UNKNOWN} and {
        s["n_real"] for s in out["shares"]} == {60}
    assert not any(r["amplified"] for r in out["association"])


@pytest.mark.slow
def test_intervals_of_shares_and_gaps_cover_at_95_percent():
    """1,000 test sets of 40 + 40 patients a group, 1 to 3 images each. That of a gap is made of
    exact limits of both groups, and may cover more, not less.
    """
    truth = {"tpr": 0.9 - 0.75,
             "auroc": np.subtract(*stats.norm.cdf(stats.norm.ppf([0.9, 0.75]) / np.sqrt(2)))}
    rng, inside = np.random.default_rng(0), {"tpr": 0, "auroc": 0, "share": 0}
    for run in range(1000):
        out = gaps(*draw(rng, {"F": (0.9, 0.5), "M": (0.75, 0.5)}, 40, images=3), columns=["sex"],
                   threshold=0.0, n_boot=300, seed=run)
        for metric, wanted in truth.items():
            found = gap(out, "sex", metric)
            inside[metric] += found["interval"][0] <= (wanted if found["high"] == "F"
                                                       else -wanted) <= found["interval"][1]
        low, high = group(out, "sex", "F")["tpr_interval"]
        inside["share"] += low <= 0.9 <= high
    assert all(k / 1000 >= 0.93 for k in inside.values()) and inside["share"] <= 970, inside


@pytest.mark.slow
def test_an_equal_association_is_called_amplified_in_a_fortieth_and_its_interval_covers():
    """1,000 pairs of 600 real and 200 synthetic images, both of the same ties."""
    rng, inside, amplified = np.random.default_rng(0), 0, 0
    for run in range(1000):
        row, = attributes(people(rng, 600, 0.8, "real"), people(rng, 200, 0.8, "made"), ("sex",),
                          n_boot=300, seed=run)["association"]
        inside += row["interval"][0] <= 0 <= row["interval"][1]
        amplified += row["amplified"]
    assert 0.93 <= inside / 1000 <= 0.97 and amplified / 1000 <= 0.04, (inside, amplified)
