"""Calibration: parity with scikit-learn and netcal, closed forms, and simulated classifiers whose
fault is known.
"""

import importlib
import math

import numpy as np
import pytest
from scipy import special

from minidiff.classification.calibration import (
    HOTTEST,
    brier,
    calibration,
    confidence_and_right,
    ece,
    ece_null,
    equal_mass,
    nll,
    pooled,
    probabilities,
    reliability,
    temperature,
)


def simulated(rng, n, k=3, sharp=2.0, exclusive=True):
    """Logits and truths drawn from the very probabilities that the logits give."""
    z = rng.normal(size=(n, k)) * sharp
    p = probabilities(z, 1.0, exclusive)
    if not exclusive:
        return z, rng.random((n, k)) < p
    drawn = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=k - 1)
    return z, np.eye(k, dtype=bool)[drawn]


def plain_ece(confidence, right):
    """The error before what chance adds is taken off: the sum over bins of n |d| / N."""
    return sum(row["n"] * abs(row["share"] - row["confidence"])
               for row in reliability(confidence, right, bins=15)) / len(confidence)


def test_figures_equal_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    curve = importlib.import_module("sklearn.calibration").calibration_curve
    z, truth = simulated(np.random.default_rng(0), 600)
    p = probabilities(z)
    assert nll(z, truth) == pytest.approx(metrics.log_loss(truth.argmax(1), p), abs=1e-12)
    assert brier(p, truth) == pytest.approx(sum(metrics.brier_score_loss(truth[:, k], p[:, k])
                                                for k in range(3)), abs=1e-12)
    assert brier(p[:, :1], truth[:, :1],
                 exclusive=False) == pytest.approx(metrics.brier_score_loss(truth[:, 0], p[:, 0]))
    assert nll(z[:, :1], truth[:, :1], exclusive=False) == pytest.approx(
        metrics.log_loss(truth[:, 0], special.expit(z[:, 0])), abs=1e-12)
    confidence, right = confidence_and_right(p, truth)
    # 600 / 15 images a bin: the same bins
    shares, means = curve(right, confidence, n_bins=15, strategy="quantile")
    assert plain_ece(confidence, right) == pytest.approx(np.abs(shares - means).mean(),
                                                                   abs=1e-12)
    shares, means = curve(right, confidence, n_bins=10, strategy="quantile")
    rows = reliability(confidence, right)
    assert np.allclose([r["share"] for r in rows], shares, atol=1e-12, rtol=0)
    assert np.allclose([r["confidence"] for r in rows], means, atol=1e-12, rtol=0)
    assert all(r["low"] < r["share"] < r["high"] or r["share"] in (r["low"], r["high"])
               for r in rows)


def test_temperature_is_the_peers_and_the_truth():
    """Logits made 2.5 times too large have T = 2.5; scikit-learn's logistic regression on one
    feature has the same slope.
    """
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    for exclusive in (True, False):
        z, truth = simulated(rng, 20_000, exclusive=exclusive)
        assert temperature(2.5 * z, truth, exclusive) == pytest.approx(2.5, rel=0.03)
        t = temperature(z, truth, exclusive)
        around = [nll(z, truth, t * f, exclusive) for f in (0.999, 1.0, 1.001)]
        assert around[1] < min(around[0], around[2])
    z, truth = simulated(rng, 500, k=1, exclusive=False)
    peer = linear.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12,
                                     max_iter=10_000).fit(3 * z, truth[:, 0])
    assert 1 / temperature(3 * z, truth, exclusive=False) == pytest.approx(peer.coef_[0, 0],
                                                                           rel=1e-6)


def test_ece_and_temperature_equal_netcals():
    netcal = pytest.importorskip("netcal.metrics")
    z, truth = simulated(np.random.default_rng(2), 600)
    p = probabilities(2 * z)
    peer = netcal.ECE(15, equal_intervals=False).measure(p, truth.argmax(1))
    assert plain_ece(*confidence_and_right(p, truth)) == pytest.approx(peer, abs=1e-9)


def test_temperature_changes_no_answer_and_ends_where_there_is_no_minimum():
    rng = np.random.default_rng(3)
    z, truth = simulated(rng, 300)
    for t in (0.05, temperature(z, truth), 40.0):
        assert np.array_equal(probabilities(z, t).argmax(1), z.argmax(1))
    # never wrong: nothing to learn from
    assert temperature(z, np.eye(3, dtype=bool)[z.argmax(1)]) == 1.0
    assert temperature(z, np.eye(3, dtype=bool)[z.argmin(1)]) == HOTTEST      # worse than no logits
    assert temperature(np.zeros((4, 3)), np.eye(3, dtype=bool)[[0, 1, 2, 0]]) == 1.0
    one_error = np.eye(3, dtype=bool)[z.argmax(1)]
    one_error[0] = np.eye(3, dtype=bool)[z[0].argmin()]
    assert 0.05 < temperature(z, one_error) < 1.0


def test_pooled_logits_are_those_of_the_mean_probability():
    rng = np.random.default_rng(4)
    members = rng.normal(size=(5, 40, 3)) * 3
    for exclusive in (True, False):
        mean = probabilities(members, 1.0, exclusive).mean(0)
        assert np.allclose(probabilities(pooled(members, exclusive), 1.0, exclusive), mean,
                           atol=1e-14, rtol=0)
    certain = pooled(np.full((2, 1, 1), 60.0), exclusive=False)   # 1 − p is 9e-27: p rounds to 1
    assert certain[0, 0] == pytest.approx(60, abs=1e-9)


def test_bins_do_not_depend_on_the_order_of_the_images():
    rng = np.random.default_rng(5)
    # six values: most bins would cut through equal confidences
    confidence = rng.integers(5, 11, 200) / 10
    right, order = rng.random(200) < confidence, rng.permutation(200)
    assert ece(confidence, right) == pytest.approx(ece(confidence[order], right[order]), abs=1e-15)
    parts = equal_mass(confidence, 15)
    assert sorted(np.concatenate(parts)) == list(range(200))
    assert all(len(np.unique(confidence[i])) == 1 for i in parts) and len(parts) == 6
    sizes = [len(i) for i in equal_mass(rng.random(200), 15)]
    assert len(sizes) == 15 and set(sizes) <= {13, 14}
    assert len(equal_mass(rng.random(4), 15)) == 4


def test_ece_in_closed_form():
    """225 images; the true error is that of the probabilities in 400,000: none; .06 for logits 1.5
    times too large.
    """
    right = np.arange(100) < 80
    assert plain_ece(np.full(100, 0.9), right) == pytest.approx(0.1, abs=1e-12)
    assert ece(np.full(100, 0.9), right) == pytest.approx(0.1, abs=1e-4)
    # d = 0: below what chance adds
    assert ece(np.full(100, 0.8), right) == 0.0
    # 86 of 100: by the integral of |d + sε|
    d, s = 0.04, 0.03
    e = np.linspace(-9, 9, 200_001)
    folded = (np.abs(d + s * e) * np.exp(-e * e / 2)).sum() * (e[1] - e[0]) / math.sqrt(2 * math.pi)
    assert ece(np.full(100, 0.9), np.arange(100) < 86) == pytest.approx(2 * d - folded, abs=1e-8)
    # certain and right, σ = 0
    assert ece(np.ones(20), np.ones(20, bool)) == 0.0


def test_debiasing_takes_off_what_chance_adds():
    """225 images; the true error is that of the probabilities in 400,000: none, and .06 for logits
    1.5 times too large.
    """
    rng = np.random.default_rng(6)
    for factor in (1.0, 1.5):
        z, _ = simulated(rng, 400_000, sharp=3.0)
        sure, answer = probabilities(factor * z).max(1), z.argmax(1)
        true = probabilities(z)[np.arange(len(z)), answer]
        want = np.mean([abs(sure[i].mean() - true[i].mean()) for i in equal_mass(sure, 15)])
        found = []
        for _ in range(200):
            z, truth = simulated(rng, 225, sharp=3.0)
            pair = confidence_and_right(probabilities(factor * z), truth)
            found.append([plain_ece(*pair), ece(*pair)])
        plain, debiased = np.mean(found, 0)
        assert plain > want + 0.015                         # .063 and .078
        assert abs(debiased - want) < 0.65 * (plain - want)  # .037 and .063


def test_null_tells_chance_from_a_fault():
    z, truth = simulated(np.random.default_rng(7), 225)
    report = calibration(3 * z, truth, temperature(3 * z, truth), n_boot=300)
    assert report["ece"] > report["ece_null_high"] > report["ece_null_median"] > 0
    scaled = report["scaled"]
    assert scaled["ece"] < scaled["ece_null_high"] and scaled["nll"] < report["nll"] and scaled[
        "brier"] < report["brier"]
    assert report["temperature"] == pytest.approx(3, rel=0.25) and report["n"] == 225
    assert sum(r["n"] for r in report["bins"]) == sum(r["n"] for r in report["bins_scaled"]) == 225
    assert report == calibration(3 * z, truth, temperature(3 * z, truth), n_boot=300)
    findings = calibration(z, np.random.default_rng(8).random((225, 3)) < special.expit(z), 1.0,
                           False, n_boot=100)
    assert sum(r["n"]
               for r in findings["bins"]) == 3 * 225 and findings["ece"] < findings["ece_null_high"]


@pytest.mark.slow
def test_null_is_exceeded_by_one_calibrated_classifier_in_twenty():
    """1,000 sets of 225 images: their error is below "high" in 93 to 97 of 100, and below "median"
    in half.
    """
    rng, below, half = np.random.default_rng(9), 0, 0
    for k in range(1000):
        confidence, right = confidence_and_right(*_with_p(simulated(rng, 225)))
        null, found = ece_null(confidence, n_boot=500, seed=k), ece(confidence, right)
        below += found <= null["high"]
        half += found <= null["median"]
    assert 930 <= below <= 970 and 450 <= half <= 550


@pytest.mark.slow
def test_intervals_of_the_reliability_plot_cover():
    """Bins of 1,000 sets of 300 images: Wilson's interval holds the mean probability in 93 to 98 of
    100 (a bin's probabilities differ, so the share varies a little less than the binomial that the
    interval stands on)."""
    rng, hits, bins = np.random.default_rng(10), 0, 0
    for _ in range(1000):
        for row in reliability(*confidence_and_right(*_with_p(simulated(rng, 300)))):
            hits, bins = hits + (row["low"] <= row["confidence"] <= row["high"]), bins + 1
    assert 0.93 <= hits / bins <= 0.98


def _with_p(pair):
    return probabilities(pair[0]), pair[1]
