"""compare: differences are paired, resolved only where they should be, and tested by the test that
fits the patients.
"""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm
from study_data import bootstrap_indices

from minidiff.classification.compare import METRICS, compare, patients_needed, summarise
from minidiff.classification.scores import score
from minidiff.errors import InputError
from minidiff.statistics import delong_pair, percentile, sign_flip_p

LABELS = ["dark", "light", "striped"]
TRUTH = np.repeat([0, 1, 2], 40)
EACH = [str(i) for i in range(120)]


def one_hot(answers, k=3):
    return np.eye(k)[answers] * 0.7 + 0.3 / k


def soft(truth, apart, rng):
    z = np.exp(rng.normal(size=truth.shape) + apart * truth)
    return z / z.sum(1, keepdims=True)


def run(arms, truth=TRUTH, patients=EACH, pairs=None, positive="dark", **rest):
    """Rows by (arm, metric); one seed an arm where an array is given."""
    arms = {arm: [p] if isinstance(p, np.ndarray) else p for arm, p in arms.items()}
    truth = np.eye(3, dtype=bool)[truth] if truth.ndim == 1 else truth
    pairs = pairs or [(arm, "real") for arm in arms if arm != "real"]
    rows = compare(arms, truth, patients, LABELS[:truth.shape[1]], pairs, positive=positive, **rest)
    json.dumps(rows, allow_nan=False)
    return {(row["arm"], row["metric"]): row for row in rows}


def test_differences_are_paired_and_resolved_only_where_they_should_be():
    good, same, bad = TRUTH.copy(), TRUTH.copy(), TRUTH.copy()
    bad[::2] = (bad[::2] + 1) % 3
    good[:3], same[3:6] = 1, 1  # other mistakes, as many
    found = run({"real": one_hot(good), "same": one_hot(same), "bad": one_hot(bad)}, n_boot=300)
    worse = found["bad", "accuracy"]
    assert worse["resolved"] and worse["interval"][1] < 0 and worse["difference"] == pytest.approx(
        -57 / 120)
    assert not any(found["same", metric]["resolved"] for metric in METRICS)
    nothing = run({"real": one_hot(good), "twin": one_hot(good)}, n_boot=50)
    assert all(row["interval"] == [0, 0] and row["p"] == 1 and not row["resolved"]
               and row["patients_needed"] is None for row in nothing.values())


def test_a_difference_with_one_seed_of_the_other_sign_is_not_resolved():
    """Two seeds far better and one a little worse: patients cannot undo it, another seed could."""
    bad, worse = TRUTH.copy(), TRUTH.copy()
    bad[::2], worse[:70] = (bad[::2] + 1) % 3, (worse[:70] + 1) % 3
    for third, resolved in ((TRUTH, True), (worse, False)):
        found = run({"real": [one_hot(bad)] * 3,
                     "other": [one_hot(TRUTH), one_hot(TRUTH), one_hot(third)]}, n_boot=200)
        row = found["other", "accuracy"]
        assert row["interval"][0] > 0.3 and row["difference"] == pytest.approx(0.5) and row[
            "p_holm"] < 1e-9
        assert (row["resolved"], row["seeds"], row["seeds_agree"]) == (resolved, 3, 2 + resolved)


def test_it_is_the_mean_probability_that_is_compared():
    """Two seeds that err on different images, surely and unsurely: their mean is right
    everywhere.
    """
    wrong = [(TRUTH + (np.arange(120) % 2 == k)) % 3 for k in (0, 1)]
    members = [np.where((np.arange(120) % 2 == k)[:, None], 0.4 * one_hot(wrong[k]) + 0.2,
                        one_hot(TRUTH)) for k in (0, 1)]
    row = run({"real": [one_hot(TRUTH)] * 2, "ensemble": members},
              n_boot=50)["ensemble", "accuracy"]
    assert row["difference"] == 0 and row["seeds_agree"] == 0


def test_the_intervals_are_those_of_whole_patients_drawn_for_both_arms():
    rng, truth = np.random.default_rng(1), np.eye(3, dtype=bool)[TRUTH]
    a, b, patients = soft(truth, 1.5, rng), soft(truth, 1, rng), [str(i // 3) for i in range(120)]
    found = run({"other": a, "real": b}, patients=patients, n_boot=80, seed=5)
    drawn = {metric: [] for metric in METRICS}
    for i in bootstrap_indices(patients, 80, 5):
        one, two = (score(p[i], truth[i], [patients[j] for j in i], LABELS, n_boot=0)
                    for p in (a, b))
        for metric, values in drawn.items():
            x, y = (s[metric]["dark"] if metric == "auroc" else s[metric] for s in (one, two))
            values.append(x - y)
    for metric, values in drawn.items():
        row = found["other", metric]
        assert row["interval"] == pytest.approx(percentile(values), abs=1e-12)
        across = min(np.less_equal(values, 0).sum(), np.greater_equal(values, 0).sum())
        if row["test"] == "bootstrap":
            assert "auroc" in metric and row["p"] == pytest.approx(min(1, 2 * (1 + across) / 81))
    right = [p.argmax(1) == TRUTH for p in (a, b)]
    flips = (1.0 * right[0] - right[1]).reshape(40, 3).sum(1)   # one a patient
    for metric in ("accuracy", "balanced_accuracy"):            # 40 images of each label: the same
        assert found["other", metric]["test"] == "sign flip"
        assert found["other", metric]["p"] == sign_flip_p(flips, 80, 5)


def test_tests_fit_the_figure_and_the_patients():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng, truth = np.random.default_rng(2), np.eye(3, dtype=bool)[TRUTH]
    arms = {name: soft(truth, apart, rng)
            for name, apart in zip(("real", *"abcd"), (1, 1, 1.3, 1.8, 3))}
    found = run(arms, n_boot=200)
    right = {name: p.argmax(1) == TRUTH for name, p in arms.items()}
    for name in "abcd":
        assert [found[name, metric]["test"] for metric in METRICS] == ["sign flip", "McNemar exact",
                                                                       "bootstrap", "DeLong"]
        table = [[(right[name] & right["real"]).sum(), (right[name] & ~right["real"]).sum()],
                 [(~right[name] & right["real"]).sum(), (~right[name] & ~right["real"]).sum()]]
        assert found[name, "accuracy"]["p"] == pytest.approx(
            tables.mcnemar(table, exact=True).pvalue, abs=1e-12)
        d, se = delong_pair(arms[name][:, 0], arms["real"][:, 0], truth[:, 0])
        assert found[name, "auroc"]["difference"] == pytest.approx(d)
        assert found[name, "auroc"]["p"] == pytest.approx(2 * norm.sf(abs(d) / se))
    for metric in METRICS:  # the family is all pairs, figure by figure
        ours, ps = ([found[name, metric][key] for name in "abcd"] for key in ("p_holm", "p"))
        assert ours == pytest.approx(multitest.multipletests(ps, method="holm")[1].tolist(),
                                     abs=1e-12)
        assert all(found[name, metric]["resolved"] <= (found[name, metric]["p_holm"] < 0.05)
                   for name in "abcd")
    assert found["d", "auroc"]["resolved"] and not found["a", "auroc"]["resolved"]


def test_balanced_accuracy_weighs_labels_alike_in_its_test_too():
    """Of 8 rare and 112 common images: six rare ones right against twelve common ones. Balanced,
    the rare ones win.
    """
    truth = np.repeat([0, 1], (8, 112))
    a, b = truth.copy(), truth.copy()
    b[:6], a[50:62] = 1, 0
    found = run({"real": one_hot(b, 2), "other": one_hot(a, 2)}, np.eye(2, dtype=bool)[truth],
                n_boot=4000)
    row = found["other", "balanced_accuracy"]
    assert row["difference"] == pytest.approx((6 / 8 - 12 / 112) / 2) and row["p"] < 0.07
    assert found["other",
                 "accuracy"]["difference"] == pytest.approx(-6
                                                            / 120) and found["other",
                                                                             "accuracy"]["p"] > 0.2


def test_four_images_of_a_dozen_resolve_nothing():
    """The bootstrap's interval leaves out 0; signs are all alike by chance one time in eight."""
    answers = np.repeat([0, 1, 2], 4)
    worse = answers.copy()
    worse[[0, 1, 4, 5]] = 2
    found = run({"real": one_hot(worse), "other": one_hot(answers)}, answers,
                [str(i) for i in range(12)], n_boot=1000)
    row = found["other", "balanced_accuracy"]
    assert row["interval"][0] > 0 and row["p"] == pytest.approx(1 / 8,
                                                                abs=0.03) and not row["resolved"]


def test_a_difference_significant_alone_may_not_be_among_many():
    """Ten discordant images of which nine speak for it: p = .021, and .43 as the best of twenty."""
    rng = np.random.default_rng(3)
    base = TRUTH.copy()
    base[:40:2] = 1
    better, arms = base.copy(), {"real": one_hot(base)}
    better[:18:2], better[1] = 0, 1
    arms["better"] = one_hot(better)
    assert run(arms, n_boot=300)["better", "accuracy"]["resolved"]
    for k in range(19):
        other = base.copy()
        other[rng.choice(np.arange(0, 40, 2), 2,
                         replace=False)], other[rng.choice(np.arange(41, 80), 2)] = 0, 2
        arms[f"other {k}"] = one_hot(other)
    row = run(arms, n_boot=300)["better", "accuracy"]
    assert row["interval"][0] > 0 and row["p"] < 0.05 < row["p_holm"] and not row["resolved"]


def test_images_of_one_patient_do_not_count_as_many():
    truth = np.repeat([0, 1], 60)
    answers = truth.copy()
    answers[:20] = 1
    found = [run({"real": one_hot(answers, 2), "better": one_hot(truth, 2)},
                 np.eye(2, dtype=bool)[truth], [str(i // each) for i in range(120)],
                 n_boot=400)["better", "accuracy"] for each in (1, 20)]
    narrow, wide = (row["interval"][1] - row["interval"][0] for row in found)
    assert wide > 2 * narrow
    assert found[0]["resolved"] and not found[1]["resolved"]  # all errors are one patient's


def test_patients_needed_is_that_of_the_textbook():
    """Paired shares: n = (1.96 + 0.84)² (b + c − d²) / d², b and c the shares of discordant pairs
    (Connor 1987).
    """
    answers, better = np.zeros(400, int), np.zeros(400, int)
    answers[:60], better[40:60] = 1, 1
    better[60:80] = 1   # 40 right in `better` alone, 20 in `real` alone
    truth = np.eye(2, dtype=bool)[np.r_[np.zeros(399, int), 1]]
    found = run({"real": one_hot(answers, 2), "better": one_hot(better, 2)}, truth,
                [str(i) for i in range(400)], n_boot=4000)["better", "accuracy"]
    d = found["difference"]
    assert d == pytest.approx(20 / 400)
    assert found["patients_needed"] == pytest.approx(
        (1.959964 + 0.841621) ** 2 * (60 / 400 - d**2) / d**2, rel=0.05)
    drawn = np.array([0.0, 0.2])  # standard deviation √.02
    assert patients_needed(0.1, drawn,
                           50) == math.ceil(50 * (1.959964 + 0.841621) ** 2 * 0.02 / 0.01)
    assert [patients_needed(*case, 50)
            for case in ((0.0, drawn), (math.nan, drawn), (0.1, drawn[:1]))] == [None] * 3


def test_findings_that_go_together_have_areas_alone():
    rng = np.random.default_rng(4)
    truth = rng.random((150, 2)) < (0.3, 0.5)
    arms = {name: 1 / (1 + np.exp(-(rng.normal(size=(150, 2)) + apart * truth)))
            for name, apart in (("real", 0.5), ("other", 3))}
    found = run(arms, truth, [str(i) for i in range(150)], positive="light", exclusive=False,
                n_boot=100)
    assert {metric for _, metric in found} == {"auroc", "auroc_macro"}
    assert all(row["resolved"] and row["difference"] > 0 for row in found.values())
    d, _ = delong_pair(arms["other"][:, 1], arms["real"][:, 1], truth[:, 1])
    assert found["other", "auroc"]["difference"] == pytest.approx(d)


def test_a_set_of_one_label_has_no_areas_to_compare():
    found = run({"real": one_hot([0, 0, 1]), "other": one_hot([0, 0, 0])}, np.array([0, 0, 0]),
                list("abc"), n_boot=20)
    assert found["other", "accuracy"]["difference"] == pytest.approx(1 / 3)
    for metric in ("auroc", "auroc_macro"):
        row = found["other", metric]
        assert row["difference"] is row["p"] is row["p_holm"] is row["patients_needed"] is None
        assert row["interval"] == [None, None] and not row["resolved"]


def test_many_pairs_have_resamples_enough_to_be_resolved():
    """With 20 resamples no p is below 2/21; the best of many must be able to be."""
    good, bad = one_hot(TRUTH), one_hot((TRUTH + 1) % 3)
    found = run({"real": bad, **{str(k): good for k in range(12)}}, n_boot=20)
    assert found["3",
                 "balanced_accuracy"]["p_holm"] < 0.05 and found["3",
                                                                 "balanced_accuracy"]["resolved"]


def test_what_is_no_probability_names_its_arm():
    with pytest.raises(InputError, match="arm other: the probabilities of image 0 sum to 2"):
        run({"real": one_hot(TRUTH), "other": np.full((120, 3), 2 / 3)})


def test_summary_is_mean_and_deviation_over_seeds():
    rows = [{"test_set": "test", "arm": "real", "n_train": 9, "accuracy": a, "balanced_accuracy": a,
             "auroc_macro": None, "auroc": {"dark": a / 2, "light": 1}, "positive": "dark"}
            for a in (0.5, 0.7)]
    (row,) = summarise(rows)
    assert row["accuracy"] == pytest.approx(0.6) and row["accuracy_sd"] == pytest.approx(0.02**0.5)
    assert row["auroc_positive"] == pytest.approx(0.3) and row[
        "auroc_positive_sd"] == pytest.approx(0.02**0.5 / 2)
    assert row["seeds"] == 2 and row["auroc_macro"] is None and row["auroc_macro_sd"] is None
    (alone,) = summarise(rows[:1])
    assert alone["accuracy"] == 0.5 and alone["accuracy_sd"] is None


@pytest.mark.slow
def test_nothing_is_found_where_nothing_is_and_something_where_it_is():
    """1,000 pairs of equally good arms, half of whose noise is common: resolved in about 5 %, and
    the interval of the difference holds 0 in about 95 %. Then arms that differ, on as many patients
    as a large set says are needed: found in about 80 % of 600 sets."""
    rng, runs, n = np.random.default_rng(0), 1000, 150
    held, resolved = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0.0)
    for seed in range(runs):
        rows = compare(*_twins(rng, n, 1.5, 1.5), [str(i) for i in range(n)], LABELS[:2],
                       [("a", "b")], positive="light", n_boot=200, seed=seed)
        for row in rows:
            low, high = row["interval"]
            held[row["metric"]] += (low <= 0 <= high) / runs
            resolved[row["metric"]] += row["resolved"] / runs
    assert all(0.93 <= share <= 0.97 for share in held.values()), held
    assert all(0.02 <= share <= 0.065 for share in resolved.values()), resolved
    (arms, truth), patients = _twins(rng, 6000, 1.8, 1.2), [str(i) for i in range(6000)]
    rows = compare(arms, truth, patients, LABELS[:2], [("a", "b")], positive="light", n_boot=1000)
    needed, hits = next(row["patients_needed"] for row in rows if row["metric"] == "auroc"), 0
    for _ in range(600):
        arms, truth = _twins(rng, needed, 1.8, 1.2)
        d, se = delong_pair(arms["a"][0][:, 1], arms["b"][0][:, 1], truth[:, 1])
        hits += 2 * norm.sf(abs(d) / se) < 0.05
    assert 100 < needed < 300 and 0.72 <= hits / 600 <= 0.88, (needed, hits)


def _twins(rng, n, first, second):
    truth, common, arms = np.eye(2, dtype=bool)[(rng.random(n) < 0.3)
                                                .astype(int)], rng.normal(size=n), {}
    for name, apart in (("a", first), ("b", second)):
        s = (common + rng.normal(size=n)) / math.sqrt(2) + apart * truth[:, 1]
        p = 1 / (1 + np.exp(-(apart * s - apart**2 / 2)))
        arms[name] = [np.stack([1 - p, p], 1)]
    return arms, truth
