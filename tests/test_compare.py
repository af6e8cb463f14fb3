"""compare: differences of single networks, over patients and trainings, and the words for them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from minidiff.classification.compare import (
    ALPHA,
    METRICS,
    Primary,
    answer,
    compare,
    contributions,
    difference,
    judged,
    parse,
    seen,
    summarise,
)
from minidiff.classification.scores import score
from minidiff.errors import InputError
from minidiff.statistics import two_way

LABELS = ["dark", "light", "striped"]
ARMS = ["real", "real+1xduplicates", "real+1xsynthetic"]
TRUTH = np.repeat([0, 1, 2], 40)
EACH = [str(i) for i in range(120)]


def one_hot(answers, k=3):
    return np.eye(k)[answers] * 0.7 + 0.3 / k


def soft(truth, apart, rng):
    z = np.exp(rng.normal(size=truth.shape) + apart * truth)
    return z / z.sum(1, keepdims=True)


def run(arms, truth=TRUTH, patients=EACH, pairs=None, positive="dark", **rest):
    """Rows by (arm, metric)."""
    truth = np.eye(3, dtype=bool)[truth] if truth.ndim == 1 else truth
    pairs = pairs or [(arm, "real") for arm in arms if arm != "real"]
    rows = compare(arms, truth, patients, LABELS[:truth.shape[1]], pairs, positive=positive, **rest)
    json.dumps(rows, allow_nan=False)
    return {(row["arm"], row["metric"]): row for row in rows}


def row(arm, p, d=0.05, metric="auroc", **more):
    """A difference of 5 points, of 100 patients, as `compare` has it."""
    return {"arm": arm, "against": "real", "metric": metric, "seeds": 5, "generators": 1,
            "patients": 100, "difference": d, "interval": [d - 0.04, d + 0.04], "p": p,
            "ways": [[0.02, 50]], **more}


# --- the declared comparison

def test_words_become_a_comparison():
    assert parse("", ARMS, ["test"]) is None
    assert parse("real+1xsynthetic:real", ARMS, ["test"]) == Primary(
        "real+1xsynthetic", "real", "test", "balanced_accuracy")
    assert parse("real+1xsynthetic:real", ARMS, ["test"], exclusive=False).metric == "auroc"
    found = parse("real+1xsynthetic:real+1xduplicates@away:auroc", ARMS, ["test", "away"])
    assert (found.test_set, found.metric) == ("away", "auroc")
    assert str(found) == "real+1xsynthetic minus real+1xduplicates, auroc on away"


@pytest.mark.parametrize("text,against,test_set", [
    ("real@25+1xsynthetic:real@25+1xduplicates", "real@25+1xduplicates", "test"),
    ("real@25+1xsynthetic:real@25+1xduplicates@2019:auroc", "real@25+1xduplicates", "2019"),
    ("real@25+1xsynthetic:real@25", "real@25", "test"),
    ("real@25+1xsynthetic:real@25:auroc", "real@25", "test"),
    ("real@25+1xsynthetic:real@2019", "real", "2019")])
def test_arms_of_few_real_images_may_be_named(text, against, test_set):
    arms = ["real", "real@25", "real@25+1xduplicates", "real@25+1xsynthetic"]
    found = parse(text, arms, ["test", "2019"])
    assert (found.arm, found.against, found.test_set) == ("real@25+1xsynthetic", against, test_set)


@pytest.mark.parametrize("text,named,exclusive", [
    ("real", "'real'", True), ("real:real", "real:real", True), ("real:other", "other", True),
    ("real:real+1xsynthetic@away", "no test set is named away", True),
    ("real:real+1xsynthetic:f1", "no figure is named f1", True),
    ("real:real+1xsynthetic:accuracy", "there are auroc_macro, auroc", False)])
def test_what_is_not_there_is_refused_by_name(text, named, exclusive):
    with pytest.raises(InputError, match="--primary.*" + named.replace("+", r"\+")):
        parse(text, ARMS, ["test"], exclusive)


# --- figures, intervals and p

def test_what_images_add_sums_to_the_figures_of_a_score():
    rng, truth = np.random.default_rng(1), np.eye(3, dtype=bool)[TRUTH[15:]]
    p = soft(truth, 1, rng)
    figures = score(p, truth, EACH[15:], LABELS, n_boot=0)
    for metric in METRICS:
        value = figures["auroc"]["dark"] if metric == "auroc" else figures[metric]
        assert contributions(metric, p, truth, 0).sum() == pytest.approx(value)


def test_a_difference_is_the_mean_of_single_networks_with_the_wider_interval():
    """By hand: Student's t over networks, and two-way over networks and patients."""
    rng, truth = np.random.default_rng(2), np.eye(3, dtype=bool)[TRUTH]
    arms = {arm: [soft(truth, apart + rng.normal(0, spread), rng) for _ in range(4)]
            for arm, apart, spread in (("real", 1, 0), ("calm", 1.2, 0), ("wild", 1.2, 0.5))}
    found = run(arms)
    for arm in ("calm", "wild"):
        own = found[arm, "accuracy"]
        right = [(p.argmax(1) == TRUTH) * 1.0 - (q.argmax(1) == TRUTH)
                 for p, q in zip(arms[arm], arms["real"])]
        assert own["by_seed"] == pytest.approx(np.mean(right, 1))
        assert own["difference"] == pytest.approx(np.mean(right))
        variance, freedom = two_way(np.array(right))
        alone = np.std(own["by_seed"], ddof=1) / 2
        assert own["ways"] == [pytest.approx([math.sqrt(variance), freedom]),
                               pytest.approx([alone, 3])]
        half = max(se * stats.t.ppf(0.975, df) for se, df in own["ways"])
        assert own["interval"] == pytest.approx([own["difference"] - half,
                                                 own["difference"] + half])
        assert own["p"] == pytest.approx(max(2 * stats.t.sf(abs(own["difference"]) / se, df)
                                             for se, df in own["ways"]))
        assert (own["p"] < ALPHA) == (own["interval"][0] * own["interval"][1] > 0)


def test_images_of_one_patient_count_as_one():
    rng, truth = np.random.default_rng(3), np.eye(3, dtype=bool)[TRUTH]
    arms = {arm: [soft(truth, 1, rng) for _ in range(4)] for arm in ("real", "other")}
    once = run(arms)["other", "balanced_accuracy"]
    twice = run({arm: [np.tile(p, (2, 1)) for p in own] for arm, own in arms.items()},
                np.tile(truth, (2, 1)), EACH * 2)["other", "balanced_accuracy"]
    assert twice["interval"] == pytest.approx(once["interval"]) and twice["patients"] == 120


def test_the_networks_of_a_generator_take_the_place_of_one():
    table = np.random.default_rng(4).normal(0.3, 1, (7, 50))
    of = [s % 3 for s in range(7)]
    pooled = difference(table, of)
    means = np.stack([table[[s for s in range(7) if of[s] == g]].mean(0) for g in range(3)])
    assert pooled["interval"] == difference(means)["interval"]
    assert len(pooled["by_seed"]) == 7 and pooled["ways"][1][1] == 2
    # two generators say as little as two seeds
    assert difference(table, [s % 2 for s in range(7)])["p"] is None
    rng, truth = np.random.default_rng(5), np.eye(3, dtype=bool)[TRUTH]
    arms = {arm: [soft(truth, 1, rng) for _ in range(6)] for arm in ("real", "pool")}
    found = run(arms, generators={"pool": 3, "real": 1})["pool", "auroc"]
    assert found["generators"] == 3 and found["ways"][1][1] == 2
    assert run(arms)["pool", "auroc"]["ways"][1][1] == 5


@pytest.mark.parametrize("seeds", [1, 2])
def test_fewer_than_three_seeds_have_no_interval(seeds):
    found = run({"real": [one_hot((TRUTH + 1) % 3)] * seeds, "good": [one_hot(TRUTH)] * seeds})
    own = found["good", "accuracy"]
    assert own["difference"] == 1 and own["p"] is None and own["interval"] == [None, None]
    (said, *_), = judged({"test": [own]}, None).values()
    assert said["answer"] == "not resolved" and said["sees"] is None


def test_equal_arms_and_what_cannot_be_measured():
    same = [soft(np.eye(3)[TRUTH], 1, np.random.default_rng(6))] * 3
    found = run({"real": same, "twin": same})
    assert all(own["difference"] == 0 and own["p"] == 1 for own in found.values())
    found = run({"real": [one_hot([0, 0, 1])] * 3, "other": [one_hot([0, 0, 0])] * 3},
                np.array([0, 0, 0]), list("abc"))
    assert found["other", "accuracy"]["difference"] == pytest.approx(1 / 3)
    for metric in ("auroc", "auroc_macro"):
        own = found["other", metric]
        assert own["difference"] is own["p"] is None and own["interval"] == [None, None]


def test_findings_that_go_together_have_areas_alone():
    rng = np.random.default_rng(7)
    truth = rng.random((150, 2)) < (0.3, 0.5)
    arms = {name: [1 / (1 + np.exp(-(rng.normal(size=(150, 2)) + apart * truth)))
                   for _ in range(3)] for name, apart in (("real", 0.5), ("other", 3))}
    found = run(arms, truth, [str(i) for i in range(150)], positive="light", exclusive=False)
    assert {metric for _, metric in found} == {"auroc", "auroc_macro"}
    assert all(own["p"] < 0.05 and own["difference"] > 0 for own in found.values())


def test_what_is_no_probability_names_its_arm():
    with pytest.raises(InputError, match="arm other: the probabilities of image 0 sum to 2"):
        run({"real": [one_hot(TRUTH)] * 3, "other": [np.full((120, 3), 2 / 3)] * 3})


# --- words

def test_the_primary_comparison_is_tested_first_and_opens_the_others():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    primary = Primary("a", "real", "test", "auroc")
    ps = (0.04, 0.001, 0.02, 0.3)
    rows = {"test": [row(arm, p) for arm, p in zip("abcd", ps)], "away": [row("a", 0.004, -0.05)]}
    found = judged(rows, primary)
    others = [*found["test"][1:], *found["away"]]
    assert found["test"][0]["p_holm"] == 0.04 and found["test"][0]["answer"] == "gain"
    assert [own["p_holm"] for own in others] == pytest.approx(
        multitest.multipletests([*ps[1:], 0.004], method="holm")[1].tolist())
    assert [own["answer"] for own in others] == ["gain", "gain", "not resolved", "harm"]
    assert [own["primary"] for own in found["test"]] == [True, False, False, False]
    # .06 and what cannot be tested leave the others closed, whatever their p
    for p in (0.06, None):
        rows["test"][0] = row("a", p)
        found = judged(rows, primary)
        assert found["test"][0]["answer"] == "not resolved"
        assert {own["answer"] for own in (*found["test"][1:], *found["away"])} == {"not tested"}
    # without a primary comparison, all of them are one family
    found = judged({"test": [row(arm, p) for arm, p in zip("abcd", ps)]}, None)
    assert [own["answer"] for own in found["test"]] == ["not resolved", "gain", "not resolved",
                                                        "not resolved"]


def test_a_gain_of_interest_is_excluded_by_the_whole_interval():
    low, wide, worse = ({"difference": d, "interval": [d - half, d + half]}
                        for d, half in ((0.0, 0.01), (0.0, 0.03), (-0.05, 0.01)))
    assert [answer(0.5, own, 0.02) for own in (low, wide)] == ["no gain of interest",
                                                              "not resolved"]
    assert answer(0.5, low) == "not resolved" and answer(0.001, worse, 0.02) == "harm"
    # a gain that is sure, and surely too small
    assert answer(0.01, {"difference": 0.01, "interval": [0.005, 0.015]}, 0.02) == (
        "no gain of interest")
    # of the primary comparison alone
    found = judged({"test": [row(arm, 0.5, 0.0) for arm in "ab"]},
                   Primary("a", "real", "test", "auroc"), 0.1)
    assert [own["answer"] for own in found["test"]] == ["no gain of interest", "not tested"]


def test_what_a_study_sees_is_that_of_the_textbook_and_of_its_own_level():
    """With many networks, 1.96 + .84 standard errors; with few, that of the noncentral t."""
    assert seen([(0.02, 1e9)], 0.05) == pytest.approx(0.02 * (1.959964 + 0.841621), rel=1e-5)
    few = seen([(0.02, 4)], 0.05) * math.sqrt(stats.chi2.median(4) / 4)
    assert stats.nct.sf(stats.t.ppf(0.975, 4), 4, few / 0.02) == pytest.approx(0.8, abs=1e-4)
    assert seen([(0.02, 4), (0.01, 1e9)], 0.05) == seen([(0.02, 4)], 0.05)
    found = judged({"test": [row(arm, 0.2) for arm in "abc"]}, Primary("a", "real", "test",
                                                                       "auroc"))["test"]
    first, second, _ = found
    assert first["sees"] == pytest.approx(seen([(0.02, 50)], 0.05))
    assert second["sees"] == pytest.approx(seen([(0.02, 50)], 0.025))
    assert first["patients_needed"] == math.ceil(100 * (first["sees"] / 0.05) ** 2)
    (none,) = judged({"test": [row("a", 1.0, 0.0)]}, None)["test"]
    assert none["patients_needed"] is None and none["sees"] > 0


def test_summary_is_mean_and_deviation_over_seeds():
    rows = [{"test_set": "test", "arm": "real", "n_train": 9, "accuracy": a, "balanced_accuracy": a,
             "auroc_macro": None, "auroc": {"dark": a / 2, "light": 1}, "positive": "dark"}
            for a in (0.5, 0.7)]
    (own,) = summarise(rows)
    assert own["accuracy"] == pytest.approx(0.6) and own["accuracy_sd"] == pytest.approx(0.02**0.5)
    assert own["auroc_positive"] == pytest.approx(0.3) and own[
        "auroc_positive_sd"] == pytest.approx(0.02**0.5 / 2)
    assert own["seeds"] == 2 and own["auroc_macro"] is None and own["auroc_macro_sd"] is None
    (alone,) = summarise(rows[:1])
    assert alone["accuracy"] == 0.5 and alone["accuracy_sd"] is None
