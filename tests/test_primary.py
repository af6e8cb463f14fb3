"""The primary comparison: declared in words, measured over patients and seeds, and honest where
nothing differs.
"""

import json
import math

import numpy as np
import pytest

from minidiff.classification.primary import LEAST_SEEDS, Primary, measure, parse
from minidiff.errors import InputError
from minidiff.evaluation.study_verdicts import primary_text
from minidiff.statistics import auroc, delong, delong_parts, two_way

ARMS = ["real", "real+1xduplicates", "real+1xsynthetic"]
PRIMARY = Primary("a", "b")


def study(rng, seeds, patients, gain=0.0, seed_sd=0.0, labels=3):
    """Probabilities of two arms, each seed of which is right more or less often, and the truth."""
    truth = np.eye(labels, dtype=bool)[np.arange(patients) % labels]
    hard = rng.random(patients)
    arms = {}
    for arm, extra in (("a", gain), ("b", 0.0)):
        arms[arm] = []
        for _ in range(seeds):
            right = hard + 0.15 * rng.standard_normal(
                patients) < 0.8 + extra + seed_sd * rng.standard_normal()
            said = np.where(right, truth.argmax(1), (truth.argmax(1) + 1) % labels)
            arms[arm].append(np.eye(labels)[said])
    return arms, truth, [f"p{i}" for i in range(patients)]


def test_words_become_a_comparison():
    assert parse("", ARMS, ["test"]) is None
    assert parse("real+1xsynthetic:real", ARMS, ["test"]) == Primary("real+1xsynthetic", "real",
                                                                     "test")
    assert parse("real+1xsynthetic:real@away", ARMS, ["test", "away"]).test_set == "away"


@pytest.mark.parametrize("text,named",
                         [("real", "'real'"), ("real:real", "real:real"), ("real:other", "other"),
                          ("real:real+1xsynthetic@away", "away")])
def test_what_is_not_there_is_refused_by_name(text, named):
    with pytest.raises(InputError, match="--primary.*" + named.replace("+", r"\+")):
        parse(text, ARMS, ["test"])


def test_the_difference_is_the_mean_of_balanced_accuracies():
    arms, truth, patients = study(np.random.default_rng(0), 3, 90, gain=0.1)
    found = measure(PRIMARY, arms, truth, patients, 0, True)
    by_hand = [np.mean([(x.argmax(1) == k)[truth[:, k]].mean()
                        - (y.argmax(1) == k)[truth[:, k]].mean() for k in range(3)])
               for x, y in zip(arms["a"], arms["b"])]
    assert found["by_seed"] == pytest.approx(by_hand) and found["difference"] == pytest.approx(
        np.mean(by_hand))
    low, high = found["interval"]
    assert low < found["difference"] < high and found["sees"] > (high - low) / 2


def test_images_of_one_patient_count_as_one():
    arms, truth, patients = study(np.random.default_rng(1), 4, 60)
    twice = measure(PRIMARY, {k: [np.tile(p, (2, 1)) for p in v] for k, v in arms.items()},
                    np.tile(truth, (2, 1)), patients * 2, 0, True)
    once = measure(PRIMARY, arms, truth, patients, 0, True)
    assert twice["interval"] == pytest.approx(once["interval"]) and twice["patients"] == 60


def test_findings_are_measured_by_the_area_under_the_curve():
    rng = np.random.default_rng(2)
    truth = rng.random((80, 2)) < 0.4
    arms = {arm: [np.clip(0.3 + 0.3 * truth + 0.2 * rng.standard_normal(truth.shape), 0, 1)
                  for _ in range(3)] for arm in "ab"}
    found = measure(PRIMARY, arms, truth, [str(i) for i in range(80)], 1, False)
    area = [auroc(x[:, 1], truth[:, 1]) - auroc(y[:, 1], truth[:, 1])
            for x, y in zip(arms["a"], arms["b"])]
    assert found["metric"] == "auroc" and found["by_seed"] == pytest.approx(area)


def test_without_a_positive_nothing_is_measured():
    truth = np.zeros((30, 2), bool)
    arms = {arm: [np.full(truth.shape, 0.5)] * 3 for arm in "ab"}
    found = measure(PRIMARY, arms, truth, [str(i) for i in range(30)], 0, False)
    assert found["difference"] is None and found[
        "answer"] == "not resolved" and "NaN" not in json.dumps(found)
    assert "one side" in primary_text(found)


def test_parts_of_an_area_sum_to_it_and_spread_as_delong_says():
    rng = np.random.default_rng(3)
    positive = rng.random(200) < 0.3
    scores = rng.standard_normal(200) + positive
    parts, (area, se) = delong_parts(scores, positive), delong(scores, positive)
    m, n = positive.sum(), (~positive).sum()
    left = parts - area / 200
    assert parts.sum() == pytest.approx(area)
    assert math.sqrt(left[positive].var(ddof=1) * m
                     + left[~positive].var(ddof=1) * n) == pytest.approx(se)


def test_fewer_than_three_seeds_resolve_nothing():
    arms, truth, patients = study(np.random.default_rng(4), LEAST_SEEDS - 1, 300, gain=0.3)
    found = measure(PRIMARY, arms, truth, patients, 0, True)
    assert found["difference"] > 0.1 and found["answer"] == "not resolved" and found["sees"] is None
    assert "NaN" not in json.dumps(found) and "fewer than 3" in primary_text(found)


def test_two_way_variance_of_a_table_of_seeds_and_patients():
    """Known components: the mean's variance is s²/seeds + p²/patients + e²/(seeds·patients)."""
    rng = np.random.default_rng(5)
    drawn = [two_way(rng.normal(0, 2, (8, 1)) + rng.normal(0, 3, (1, 50))
                     + rng.normal(0, 1, (8, 50)))[0] for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(4 / 8 + 9 / 50 + 1 / 400, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seeds,seed_sd", [(3, 0.0), (3, 0.05), (5, 0.02), (10, 0.05)])
def test_equal_arms_are_called_different_in_one_study_of_twenty_at_most(seeds, seed_sd):
    rng, runs = np.random.default_rng(seeds), 1000
    wrong = sum(measure(PRIMARY, *study(rng, seeds, 150, seed_sd=seed_sd), 0,
                        True)["answer"] != "not resolved" for _ in range(runs))
    assert wrong / runs <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.slow
def test_a_difference_of_the_stated_size_is_found_four_times_in_five():
    rng, found = np.random.default_rng(6), []
    for _ in range(300):
        found.append(measure(PRIMARY, *study(rng, 5, 300, gain=0.05, seed_sd=0.01), 0, True))
    sees, true = np.median([f["sees"] for f in found]), np.mean([f["difference"] for f in found])
    power = np.mean([f["answer"] == "gain" for f in found])
    assert power >= 0.75 if true >= sees else power <= 0.85
