"""Uncertainty of a classifier's answers: closed forms, scikit-learn, and promises of coverage held
in simulation.
"""

import json
import math

import numpy as np
import pytest
import safetensors.numpy
from scipy import stats

from minidiff.classification.predictive_uncertainty import (
    Conformal,
    FeatureDistance,
    conformal_p,
    coverage_interval,
    entropy,
    missable,
    mutual_information,
    realised,
    right_answers,
    selective,
    shrunk,
    summary,
)


def test_entropy_and_disagreement_in_closed_form():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 50)
    assert np.allclose(entropy(p), stats.entropy(p, axis=1), atol=1e-14, rtol=0)
    assert entropy(np.full((1, 4), 0.25))[0] == pytest.approx(math.log(4)) and entropy(
        np.eye(4)).tolist() == [0] * 4
    assert entropy(np.full((1, 3), 0.5), exclusive=False)[0] == pytest.approx(3 * math.log(2))
    torn = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])            # each sure, of opposite labels
    assert mutual_information(torn)[0] == pytest.approx(math.log(2))
    assert mutual_information(torn, exclusive=False)[0] == pytest.approx(2 * math.log(2))
    # both unsure: nothing to settle
    assert mutual_information(np.full((2, 1, 2), 0.5))[0] == 0
    members = rng.dirichlet(np.ones(3), (5, 20))
    mean = members.mean(0)
    divergence = np.mean([stats.entropy(m, mean, axis=1) for m in members], 0)
    assert np.allclose(mutual_information(members), divergence, atol=1e-13, rtol=0)


def drawn(rng, n, shares=(0.7, 0.25, 0.05), sharp=1.5):
    """Probabilities of a fair but imperfect classifier, and the truth; the last label is rare."""
    y = rng.choice(len(shares), n, p=shares)
    z = rng.normal(size=(n, len(shares))) + sharp * np.eye(len(shares))[y] + np.log(shares)
    return np.exp(z) / np.exp(z).sum(1, keepdims=True), np.eye(len(shares), dtype=bool)[y]


def test_sets_are_those_of_the_p_values():
    """The definition: label k is out where no more than α(n_k+1) − 1 of its calibration images have
    as low a p_k.
    """
    rng = np.random.default_rng(1)
    p_val, truth_val = drawn(rng, 400)
    p, _ = drawn(rng, 300)
    for alpha in (0.1, 0.05, 0.37):
        found = Conformal.fit(p_val, truth_val, alpha)
        for k in range(3):
            own = p_val[truth_val[:, k], k]
            value = (1 + (own[None] <= p[:, k:k + 1]).sum(1)) / (len(own) + 1)
            assert np.array_equal(found.sets(p)[:, k], value > alpha)
    # findings that go together: a column each, no other rule
    both = Conformal.fit(p_val[:, :2], truth_val[:, :2])
    assert both.thresholds == Conformal.fit(p_val, truth_val).thresholds[:2]


def test_sets_equal_those_of_crepes():
    crepes = pytest.importorskip("crepes")
    rng = np.random.default_rng(2)
    p_val, truth_val = drawn(rng, 400)
    p, _ = drawn(rng, 300)
    sets = Conformal.fit(p_val, truth_val).sets(p)
    for k in range(3):
        peer = crepes.ConformalClassifier().fit(1 - p_val[truth_val[:, k], k])
        assert np.array_equal(sets[:, k],
                              peer.predict_p(1 - p[:, k:k + 1], smoothing=False)[:, 0] > 0.1)


def test_too_few_calibration_images_rule_nothing_out_and_say_so():
    p = np.linspace(0.1, 0.9, 9)[:, None] * [1, 0, 0] + [0, 0.05, 0.05]
    truth = np.zeros((9, 3), bool)
    truth[:, 0] = True
    truth[:8, 1] = True
    # 9, 8 and no calibration images at α = .1
    found = Conformal.fit(p, truth)
    assert found.thresholds == (p[0, 0], -math.inf, -math.inf) and found.n == (9, 8, 0)
    assert found.sets(np.zeros((1, 3))).tolist() == [[False, True, True]]
    assert found.sets(p).all()                                 # as low as the lowest is not lower
    remarks = found.remarks(["normal", "covid", "other"])
    assert len(remarks) == 2 and "covid" in remarks[0] and "8 calibration" in remarks[
        0] and "takes 9" in remarks[0]
    assert Conformal.from_json(json.loads(json.dumps(found.to_json()))) == found
    row = realised(found.sets(np.zeros((2, 3))), np.eye(3, dtype=bool)[[1, 0]],
                   ["normal", "covid", "other"], found)
    assert row["classes"]["covid"]["always"] and row["classes"]["covid"]["coverage"] == 1
    # one miss of one is no news
    assert row["classes"]["normal"]["coverage"] == 0 and row["classes"]["normal"]["kept"]
    assert row["classes"]["other"]["coverage"] is None and row["classes"]["other"][
        "kept"] is None and row["mean_size"] == 2
    assert row["classes"]["other"]["expected"] == [None,
                                                   None] and row["classes"]["other"]["low"] is None
    json.dumps(row, allow_nan=False)


def test_missable_is_exact_at_whole_products():
    assert [missable(n, 0.1) for n in (8, 9, 18, 19, 29, 99)] == [0, 1, 1, 2, 3, 10]
    # 28.999999999999996 in floats
    assert missable(19, 0.05) == 1 and missable(9, 0.3) == 3 and missable(99, 0.29) == 29
    low, high = coverage_interval(25, 0.1, confidence=0.9)
    # 5 to 95 % of 25 and 200 calibration images
    assert (round(low, 2), round(high, 2)) == (0.82, 0.99)
    low, high = coverage_interval(200, 0.1, confidence=0.9)
    assert (round(low, 2), round(high, 2)) == (0.86, 0.93)
    assert coverage_interval(8, 0.1) == (1, 1)
    endless, few = coverage_interval(50, 0.1), coverage_interval(50, 0.1, 20)
    assert few[0] < endless[0] < endless[1] < few[1]
    assert coverage_interval(50, 0.1, 10 ** 6) == pytest.approx(endless, abs=1e-3)


def test_coverage_by_label_where_all_together_would_fail():
    """One threshold for all labels keeps its promise on the common ones: of the rare label it
    misses most.
    """
    rng = np.random.default_rng(3)
    p_val, truth_val = drawn(rng, 4000)
    p, truth = drawn(rng, 20_000)
    found = Conformal.fit(p_val, truth_val)
    result = realised(found.sets(p), truth, ["a", "b", "rare"], found)
    for name, row in result["classes"].items():
        assert row["kept"] and row["beta"][0] - 0.02 < row["coverage"] < row["beta"][1] + 0.02, name
        assert row["low"] < row["coverage"] < row["high"] and row["expected"][0] <= row["beta"][0]
    marginal = np.quantile(p_val[truth_val], 0.1)
    assert (p[truth[:, 2], 2] >= marginal).mean() < 0.6
    assert result["target"] == 0.9 and 0 <= result["empty"] <= 1 and result[
        "mean_size"] == found.sets(p).sum(1).mean()
    assert result["classes"]["a"]["in_others"] == found.sets(p)[~truth[:, 0], 0].mean()
    broken = realised(np.zeros_like(truth), truth, ["a", "b", "rare"], found)
    assert broken["empty"] == 1 and not any(row["kept"] for row in broken["classes"].values())


def test_selective_curve_by_hand_and_whatever_the_order():
    u, right = np.array([0.1, 0.2, 0.3, 0.4]), np.array([True, True, False, True])
    found = selective(u, right)
    assert [r["n"] for r in found["curve"]] == [1, 2, 3, 4]
    assert [r["accuracy"] for r in found["curve"]] == pytest.approx([1, 1, 2 / 3, 3 / 4])
    assert found["area"] == pytest.approx(
        (1 + 1 + 2 / 3 + 3 / 4) / 4) and found["area_random"] == 0.75
    assert found["area_best"] == pytest.approx((1 + 1 + 1 + 3 / 4) / 4)
    rng = np.random.default_rng(4)
    u, right, order = rng.integers(0, 4, 200) / 4, rng.random(200) < 0.7, rng.permutation(200)
    found, other = selective(u, right), selective(u[order], right[order])
    assert found["curve"] == other["curve"] and found["area"] == pytest.approx(other["area"],
                                                                               abs=1e-12)
    assert len(found["curve"]) == 4 and found["curve"][-1]["accuracy"] == found[
        "area_random"] == right.mean()
    # knows nothing: as good as random, and one row
    flat = selective(np.zeros(200), right)
    assert flat["area"] == pytest.approx(right.mean()) and len(flat["curve"]) == 1
    sure = selective(~right + 0.001 * rng.random(200), right)   # errors last of all
    assert sure["area"] == pytest.approx(sure["area_best"]) and sure["curve"][0]["accuracy"] == 1
    assert len(sure["curve"]) == 19 and sure["curve"][0]["n"] == 20


def test_shrunk_covariance_and_distance_equal_scikit_learns():
    covariance = pytest.importorskip("sklearn.covariance")
    rng = np.random.default_rng(5)
    truth = np.eye(3, dtype=bool)[rng.integers(0, 3, 60)]
    x = rng.normal(size=(60, 40)) @ rng.normal(size=(40, 40)) + 3 * truth @ rng.normal(size=(3, 40))
    centres = np.stack([x[truth[:, k]].mean(0) for k in range(3)])
    residual = x - centres[truth.argmax(1)]
    peer = covariance.LedoitWolf(assume_centered=True).fit(residual)
    assert 0.01 < peer.shrinkage_ < 0.99
    assert np.allclose(shrunk(residual), peer.covariance_, rtol=1e-10, atol=1e-10)
    found, new = FeatureDistance.fit(x, truth), rng.normal(size=(25, 40)) * 4
    want = np.sqrt(np.min([peer.mahalanobis(new - c) for c in centres], 0))
    assert np.allclose(found.distance(new), want, rtol=1e-9)
    state = safetensors.numpy.load(safetensors.numpy.save(vars(found)))
    assert np.array_equal(FeatureDistance(**state).distance(new), found.distance(new))
    # findings that go together: one centre
    one = FeatureDistance.fit(x, rng.random((60, 3)) < 0.5)
    assert one.centres.shape == (1, 40) and np.allclose(one.centres[0], x.mean(0))
    # no image of the fourth label
    assert FeatureDistance.fit(x, np.c_[truth, np.zeros(60, bool)]).centres.shape == (3, 40)
    assert FeatureDistance.fit(x[:, :1], truth).distance(x[:, :1]).shape == (60,)
    # a network that learned nothing does not end the study
    assert (FeatureDistance.fit(np.ones_like(x), truth).distance(x) == 0).all()


def test_distance_does_not_care_for_the_unit_of_a_feature_rotation_or_order():
    rng = np.random.default_rng(6)
    x, truth = rng.normal(size=(80, 6)), np.eye(2, dtype=bool)[rng.integers(0, 2, 80)]
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    new = rng.normal(size=(10, 6)) * 2
    order = rng.permutation(80)
    assert np.allclose(FeatureDistance.fit(7 * x @ turn, truth).distance(7 * new @ turn),
                       FeatureDistance.fit(x, truth).distance(new))
    assert np.allclose(FeatureDistance.fit(x[order], truth[order]).distance(new),
                       FeatureDistance.fit(x, truth).distance(new))


def test_conformal_p_by_hand_and_level():
    assert conformal_p(np.array([0.5, 2, 3.5, 9]), np.array([3.0, 1, 2])).tolist() == [1, 3 / 4,
                                                                                       1 / 4, 1 / 4]
    rng = np.random.default_rng(7)
    low = np.mean([(conformal_p(rng.normal(size=50), rng.normal(size=99)) <= 0.05).mean()
                   for _ in range(400)])
    assert low == pytest.approx(0.05, abs=0.006)


def test_right_answers():
    p, truth = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]), np.array([[1, 0, 0], [0, 0, 1]], bool)
    assert right_answers(p, truth).tolist() == [True, False]
    assert right_answers(p, np.array([[1, 0, 0], [1, 1, 0]], bool),
                         exclusive=False).tolist() == [True, False]


@pytest.fixture(scope="module")
def study():
    """Five members that agree on the own hospital, and on another one guess, far from all that they
    saw.
    """
    rng, members, truth, distances = np.random.default_rng(8), {}, {}, {}
    for name, n, sharp, shift in (("val", 400, 3, 0), ("test", 300, 3, 0),
                                  ("elsewhere", 150, 0.3, 4)):
        y = rng.integers(0, 3, n)
        z = sharp * np.eye(3)[y] + rng.normal(size=(n,
                                                    3)) + rng.normal(size=(5, n,
                                                                           3)) * (0.3 + (shift > 0))
        members[name] = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        truth[name], distances[name] = np.eye(3, dtype=bool)[y], np.abs(rng.normal(size=n)) + shift
    conformal = Conformal.fit(members["val"].mean(0), truth["val"])
    return members, truth, ["a", "b", "c"], conformal, distances


def test_summary_finds_the_other_hospital(study):
    members, truth, labels, conformal, distances = study
    found = summary(members, truth, labels, conformal, distances=distances)
    assert set(found) == {"test", "elsewhere"}
    own, far = found["test"], found["elsewhere"]
    assert all(row["kept"] for row in own["conformal"]["classes"].values())
    assert not any(row["kept"] for row in far["conformal"]["classes"].values())
    for kind in ("entropy", "mutual_information", "distance"):
        assert own[kind]["ood"] is None and far[kind]["ood"]["auroc"] > 0.75, kind
        assert far[kind]["ood"]["n"] == 150 and far[kind]["ood"]["n_rest"] == 300
    assert own["entropy"]["wrong"]["auroc"] > 0.75 and own["entropy"]["wrong"]["low"] > 0.6
    assert own["entropy"]["mean_wrong"] > own["entropy"]["mean_right"]
    assert own["entropy"]["selective"]["area"] > own["entropy"]["selective"]["area_random"] == own[
        "accuracy"]
    assert own["distance"]["atypical"]["low"] < 0.05 < own["distance"]["atypical"]["high"]
    assert far["distance"]["atypical"]["share"] > 0.9 and far["n"] == 150 and far["members"] == 5
    json.dumps(found, allow_nan=False)


def test_summary_of_less(study):
    """One member has nobody to disagree with; without distances or an error there is less to say,
    and no nan.
    """
    members, truth, labels, conformal, _ = study
    one = {name: p[:1] for name, p in members.items()}
    found = summary(one, truth, labels, conformal)["elsewhere"]
    assert "mutual_information" not in found and "distance" not in found
    certain = {"test": np.repeat(truth["test"][None].astype(float), 2, 0)}
    flawless = summary(certain, truth, labels, conformal)["test"]
    assert flawless["entropy"]["wrong"]["auroc"] is None and flawless["entropy"][
        "mean_wrong"] is None
    assert flawless["accuracy"] == 1
    json.dumps(flawless, allow_nan=False)
    findings = summary(members, truth, labels, conformal, exclusive=False)["test"]
    assert findings["accuracy"] == right_answers(members["test"].mean(0), truth["test"],
                                                 False).mean()


@pytest.mark.slow
def test_intervals_of_coverage_cover():
    """2,000 studies: the coverage of sets from 25, 60 and 200 calibration images lies in its Beta
    interval in 93 to 97 of 100; that of 40 test images in the beta-binomial one in 95 or more, for
    it goes by steps of 1/40."""
    rng, names = np.random.default_rng(9), ["a", "b", "c"]
    counts, endless, few, covered = (25, 60, 200), np.zeros(3), np.zeros(3), np.zeros(3)
    truth_val, truth = (np.repeat(np.eye(3, dtype=bool), n, 0) for n in (counts, (40, 40, 40)))
    for _ in range(2000):
        # any score with a known distribution
        found = Conformal.fit(rng.normal(size=(285, 3)), truth_val)
        sets = found.sets(rng.normal(size=(120, 3)))
        rows = realised(sets, truth, names, found)["classes"]
        for k, name in enumerate(names):
            true, row = stats.norm.sf(found.thresholds[k]), rows[name]
            endless[k] += row["beta"][0] <= true <= row["beta"][1]
            few[k] += row["expected"][0] <= row["coverage"] <= row["expected"][1]
            covered[k] += true
    assert (endless >= 1860).all() and (endless <= 1940).all(), endless
    assert (few >= 1890).all() and (few <= 1995).all(), few
    # .923, .902, .900: never below .9
    want = [(n + 1 - missable(n, 0.1)) / (n + 1) for n in counts]
    assert covered / 2000 == pytest.approx(want, abs=0.004)
