"""scores: figures follow their definitions and their peers; a label that is not there says so;
intervals hold the truth.
"""

import json
import math

import numpy as np
import pytest
from scipy import integrate
from scipy.stats import norm
from study_data import bootstrap_indices

from minidiff.classification.scores import (
    Benefit,
    check_probabilities,
    figures,
    score,
    thresholds_at_specificity,
)
from minidiff.errors import InputError

LABELS = ["dark", "light", "striped"]


def one_hot(answers, k=3):
    return np.eye(k)[answers] * 0.7 + 0.3 / k


def truth_of(answers, k=3):
    return np.eye(k, dtype=bool)[answers]


def world(n=240, seed=0, per_patient=2):
    rng = np.random.default_rng(seed)
    truth = truth_of(rng.choice(3, n, p=[0.15, 0.4, 0.45]))
    z = np.exp(rng.normal(size=(n, 3)) + truth)
    return z / z.sum(1, keepdims=True), truth, [str(i // per_patient) for i in range(n)]


def test_scores_follow_their_definitions():
    s = score(one_hot([0, 0, 0, 1, 1, 0]), truth_of([0, 0, 0, 0, 1, 1]), list("aabbcc"), LABELS,
              n_boot=50)
    assert s["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert s["accuracy"] == pytest.approx(4
                                          / 6) and s["balanced_accuracy"] == pytest.approx((3 / 4
                                                                                            + 1 / 2)
                                                                                           / 2)
    assert s["recall"] == {"dark": 0.75, "light": 0.5, "striped": None}
    assert s["auroc"]["dark"] == pytest.approx((3 * 0.5 + 3 * 1 + 0.5) / 8)
    assert s["auroc_macro"] == pytest.approx((s["auroc"]["dark"] + s["auroc"]["light"]) / 2)
    assert s["prevalence"] == pytest.approx({"dark": 4 / 6, "light": 2 / 6, "striped": 0})
    assert (s["n"],
            s["patients"]) == (6,
                               3) and s["accuracy_interval"][0] < 4 / 6 < s["accuracy_interval"][1]
    for name in ("auroc", "auprc"):
        assert s[name]["striped"] is None and s[name + "_interval"]["striped"] == [None, None]
    json.dumps(s, allow_nan=False)


def test_net_benefit_is_cases_found_less_the_price_of_false_alarms():
    """2 of 4 cases found and 1 false alarm among 5, where 2 % have it and 20 alarms cost a case."""
    called = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    positive, net = np.arange(9) < 4, Benefit(0.02, 20)
    assert net.parts(called, positive).sum() == pytest.approx(0.02 / 2 - 0.98 / 5 / 20)
    assert net.parts(np.ones((3, 9), bool), positive).sum(1) == pytest.approx([net.of_all] * 3)
    for one_sided in (called[:4], called[4:]):
        assert np.isnan(net.parts(one_sided, np.full(len(one_sided), one_sided[1]))).all()


def test_the_threshold_has_the_highest_net_benefit_of_all_there_are():
    rng = np.random.default_rng(0)
    for prevalence, alarms in ((0.02, 1), (0.1, 5), (0.3, 10), (0.5, 1)):
        net = Benefit(prevalence, alarms)
        for _ in range(50):
            positive = np.arange(30) < 8
            scores = np.round(rng.normal(positive, 1), 1)  # with ties
            cut = net.threshold(scores, positive)
            every = [net.parts(scores >= t, positive).sum() for t in (*scores, math.inf)]
            assert net.parts(scores >= cut, positive).sum() == pytest.approx(max(every))
    assert net.threshold(np.arange(4.0), np.arange(4) > 1) == 1.5
    assert Benefit(0.9, 10).threshold(np.arange(4.0), np.arange(4) < 2) == -math.inf
    assert Benefit(0.01, 1).threshold(np.arange(4.0), np.arange(4) < 2) == math.inf
    assert net.threshold(np.arange(4.0), np.zeros(4, bool)) == math.inf


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    p, truth, patients = world()
    y, answer, s = truth.argmax(1), p.argmax(1), score(p, truth, patients, LABELS, n_boot=0)
    assert s["accuracy"] == pytest.approx(metrics.accuracy_score(y, answer), abs=1e-12)
    assert s["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(y, answer),
                                                   abs=1e-12)
    assert list(s["recall"].values()) == pytest.approx(
        metrics.recall_score(y, answer, average=None).tolist(), abs=1e-12)
    assert s["confusion"] == metrics.confusion_matrix(y, answer).tolist()
    assert s["auroc_macro"] == pytest.approx(metrics.roc_auc_score(y, p, multi_class="ovr",
                                                                   average="macro"), abs=1e-12)
    for k, label in enumerate(LABELS):
        assert s["auroc"][label] == pytest.approx(metrics.roc_auc_score(truth[:, k], p[:, k]),
                                                  abs=1e-12)
        assert s["auprc"][label] == pytest.approx(
            metrics.average_precision_score(truth[:, k], p[:, k]), abs=1e-12)


def test_a_resample_has_the_figures_of_its_images():
    """Weights give what the images themselves, drawn so often, would."""
    p, truth, patients = world(90)
    weights = np.array([np.bincount(i, minlength=90) for i in bootstrap_indices(patients, 5, 3)],
                       float)
    drawn = figures(p, truth, weights)
    for row, i in enumerate(bootstrap_indices(patients, 5, 3)):
        s = score(p[i], truth[i], [patients[j] for j in i], LABELS, n_boot=0)
        assert [drawn[name][row]
                for name in ("accuracy", "balanced_accuracy", "auroc_macro")] == pytest.approx(
                    [s["accuracy"], s["balanced_accuracy"], s["auroc_macro"]], abs=1e-12)
        assert drawn["auroc"][row] == pytest.approx(list(s["auroc"].values()), abs=1e-12)


def test_one_label_in_a_set_has_recall_and_no_auroc():
    s = score(one_hot([0, 0, 1]), truth_of([0, 0, 0]), list("abc"), LABELS,
              thresholds=dict.fromkeys(LABELS, 0.5), n_boot=30)
    assert s["recall"]["dark"] == pytest.approx(2 / 3) and s["accuracy"] == pytest.approx(2 / 3)
    assert s["auroc_macro"] is None and s["auroc_macro_interval"] == [None, None]
    assert set(s["auroc"].values()) == {None} == set(s["auprc"].values())
    dark, light = s["at_threshold"]["dark"], s["at_threshold"]["light"]
    assert dark["sensitivity"] == pytest.approx(2 / 3)
    assert dark["specificity"] is None and dark["specificity_interval"] == [None, None]
    assert (light["sensitivity"], light["specificity"]) == (None, pytest.approx(2 / 3))
    json.dumps(s, allow_nan=False)


def test_perfect_areas_have_no_interval():
    """Resamples of a perfect answer are all perfect: a width of 0 would be a claim that nothing
    supports.
    """
    answers = [0] * 9 + [1] * 9
    s = score(one_hot(answers, 2), truth_of(answers, 2), [str(i) for i in range(18)], LABELS[:2],
              n_boot=40)
    assert s["auroc_macro"] == s["balanced_accuracy"] == s["accuracy"] == 1
    assert s["auroc_interval"]["dark"] == s["auroc_interval_patients"]["dark"] == [None, None]
    assert s["balanced_accuracy_interval"] == [None, None]
    assert s["accuracy_interval"][0] < 0.85                                     # Wilson's has one


def test_findings_that_go_together():
    rng = np.random.default_rng(5)
    truth = rng.random((200, 2)) < (0.3, 0.6)
    p = 1 / (1 + np.exp(-(rng.normal(size=(200, 2)) + 2 * truth - 1)))
    cut = thresholds_at_specificity(p, truth, ["effusion", "nodule"])
    s = score(p, truth, [str(i) for i in range(200)], ["effusion", "nodule"], exclusive=False,
              thresholds=cut, n_boot=60)
    assert s["accuracy"] is s["balanced_accuracy"] is s["recall"] is s["confusion"] is s[
        "recall_interval"] is None
    assert s["auroc_macro"] == pytest.approx(np.mean(list(s["auroc"].values())))
    for k, label in enumerate(("effusion", "nodule")):
        low, high = s["auroc_interval_patients"][label]
        assert low < s["auroc"][label] < high < 1
        own = s["at_threshold"][label]
        assert own["specificity"] == pytest.approx(
            (p[~truth[:, k], k] < cut[label]).mean()) and own["specificity"] >= 0.9
        assert own["sensitivity"] == pytest.approx((p[truth[:, k], k] >= cut[label]).mean())
    json.dumps(s, allow_nan=False)


def test_a_finding_of_all_images_has_no_part_in_the_mean():
    rng = np.random.default_rng(6)
    truth = np.column_stack([rng.random(80) < 0.4, np.ones(80, bool), np.zeros(80, bool)])
    s = score(rng.random((80, 3)), truth, [str(i) for i in range(80)], LABELS, exclusive=False,
              n_boot=30)
    assert s["auroc_macro"] == s["auroc"]["dark"] is not None and s["auroc_macro_interval"][0] < s[
        "auroc_macro"]
    assert s["auroc"]["light"] is s["auprc"]["light"] is s["auroc"]["striped"] is s["auprc"][
        "striped"] is None


def test_thresholds_come_of_validation():
    p, truth, patients = world(200, seed=1)
    cut = thresholds_at_specificity(p[:100], truth[:100], LABELS, specificity=0.8)
    held = score(p[100:], truth[100:], patients[100:], LABELS, thresholds=cut,
                 n_boot=0)["at_threshold"]
    for k, label in enumerate(LABELS):
        assert held[label]["threshold"] == cut[label]
        assert held[label]["specificity"] == pytest.approx(
            (p[100:][~truth[100:, k], k] < cut[label]).mean())
    only = thresholds_at_specificity(p[truth[:, 1]], truth[truth[:, 1]], LABELS)
    assert only["light"] is None and only["dark"] is not None
    assert score(p, truth, patients, LABELS, thresholds=only,
                 n_boot=0)["at_threshold"]["light"] is None


def test_images_of_one_patient_do_not_count_as_many():
    p, truth, _ = world(100, seed=2)
    p, truth = np.repeat(p, 6, 0), np.repeat(truth, 6, 0)        # six times the same picture
    alone, whole = (score(p, truth, patients, LABELS, n_boot=300) for patients in
                    ([str(i) for i in range(600)], [str(i // 6) for i in range(600)]))
    for name in ("auroc_macro_interval", "balanced_accuracy_interval",
                 "accuracy_interval_patients"):
        narrow, wide = (s[name][1] - s[name][0] for s in (alone, whole))
        assert 2 < wide / narrow < 3, name                       # √6 = 2.45
    # DeLong's takes images as independent, and says so
    assert alone["auroc_interval"] == whole["auroc_interval"]


def test_no_resamples_no_interval_and_the_same_seed_the_same():
    p, truth, patients = world(60)
    assert score(p, truth, patients, LABELS, n_boot=0)["auroc_interval_patients"]["dark"] == [None,
                                                                                              None]
    assert score(p, truth, patients, LABELS, n_boot=40, seed=3) == score(p, truth, patients, LABELS,
                                                                         n_boot=40, seed=3)
    assert score(p, truth, patients, LABELS, n_boot=40, seed=3) != score(p, truth, patients, LABELS,
                                                                         n_boot=40, seed=4)


@pytest.mark.parametrize("row, exclusive, words", [
    ([0.5, math.nan], True, "of image 1 sum to nan: 0.5, nan; allowed are 0 to 1"),
    ([1.2, -0.2], True, "of image 1 sum to 1: 1.2, -0.2"),
    ([math.inf, 0.0], False, "of image 1 sum to inf: inf, 0"),
    ([0.5, 0.4], True, "probabilities of image 1 sum to 0.9"),
])
def test_what_is_no_probability_is_refused(row, exclusive, words):
    with pytest.raises(InputError, match=words):
        check_probabilities(np.array([[0.5, 0.5], row]), exclusive, "arms/real/0")
    check_probabilities(np.array([[0.5, 0.50005]]), True, "rounding")
    check_probabilities(np.array([[0.9, 0.8]]), False, "findings")


@pytest.mark.slow
def test_intervals_hold_the_truth():
    """1,000 sets of 150 patients, 3 in 10 positive, with one to three alike images each; truth in
    closed form.
    """
    rng, runs, rate, apart, alike = np.random.default_rng(0), 1000, 0.3, 1.5, 0.6

    def at(s):  # of a positive with score s: how likely it is, times the precision there
        hits = rate * norm.sf(s - apart)
        return norm.pdf(s - apart) * hits / (hits + (1 - rate) * norm.sf(s))

    recall, area, precision = norm.cdf(apart / 2), norm.cdf(apart
                                                            / math.sqrt(2)), integrate.quad(at, -8,
                                                                                            10)[0]
    held = {}
    for run in range(runs):
        positive, images = rng.random(150) < rate, rng.integers(1, 4, 150)
        patient = np.repeat(np.arange(150), images)
        y, n = positive[patient], len(patient)
        s = (rng.normal(size=150)
             * alike**0.5)[patient] + rng.normal(size=n) * (1 - alike) ** 0.5 + apart * y
        # both recalls are Φ(apart / 2) at one half
        p = 1 / (1 + np.exp(-(apart * s - apart**2 / 2)))
        found = score(np.stack([1 - p, p], 1), truth_of(y.astype(int), 2), patient.tolist(),
                      ["no", "yes"], n_boot=200, seed=run)
        for name, (low, high), truth in (("auroc", found["auroc_interval_patients"]["yes"], area),
                                         ("DeLong", found["auroc_interval"]["yes"], area),
                                         ("auprc", found["auprc_interval"]["yes"], precision),
                                         ("Wilson", found["accuracy_interval"], recall),
                                         ("balanced", found["balanced_accuracy_interval"], recall),
                                         ("accuracy", found["accuracy_interval_patients"], recall)):
            held[name] = held.get(name, 0) + (low <= truth <= high) / runs
    assert all(0.93 <= held[name] <= 0.97
               for name in ("auroc", "auprc", "balanced", "accuracy")), held
    assert held["DeLong"] < 0.91 and held["Wilson"] < 0.92, held   # what the docstring warns of
