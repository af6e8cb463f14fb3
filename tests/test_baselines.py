"""data.baselines: the regression against its definition and sklearn, folds, intervals."""

import numpy as np
import pytest
from study_data import bootstrap_indices

from minidiff.data import baselines, files
from minidiff.statistics import auroc, auroc_by_patient, percentile


def test_the_regression_is_at_its_minimum_and_gives_the_log_odds_ratio():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)), rng.random(200) < 0.3
    w = baselines.logistic(x, y, ridge=2.0)
    p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    assert np.abs(x.T @ (p - y) + 2.0 * w[:-1]).max() < 1e-4 and abs((p - y).sum()) < 1e-4

    a, b, c, d = 30, 10, 15, 45  # y = 1 and 0 at x = 1; at x = 0
    x, y = np.repeat([1.0, 1.0, 0.0, 0.0], (a, b, c, d))[:, None], np.repeat([1, 0, 1, 0],
                                                                             (a, b, c, d))
    slope, level = baselines.logistic(x, y, ridge=1e-8)
    assert slope == pytest.approx(np.log(a * d / (b * c)),
                                  abs=1e-5) and level == pytest.approx(np.log(c / d), abs=1e-5)
    # separable
    assert np.isfinite(baselines.logistic(np.arange(20.0)[:, None] - 9.5, np.arange(20) > 9)).all()


def test_the_regression_against_sklearn():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(150, 8)), rng.random(150) < 0.5
    theirs = linear.LogisticRegression(C=0.5, tol=1e-10, max_iter=10000).fit(x, y)
    np.testing.assert_allclose(baselines.logistic(x, y, ridge=2.0),
                               [*theirs.coef_[0], theirs.intercept_[0]], atol=1e-4)


def test_patients_stay_whole_in_folds_and_labels_even():
    patients = [f"p{k // 2}" for k in range(200)]
    labels = ["rare" if k < 40 else "common" for k in range(200)]
    fold = baselines.fold_of(labels, patients)
    assert all(len({f for f, q in zip(fold, patients) if q == p}) == 1 for p in patients)
    assert [sum(1 for f, label in zip(fold, labels) if f == k and label == "rare")
            for k in range(5)] == [8] * 5
    # whatever the order
    assert (fold == baselines.fold_of(labels[::-1], patients[::-1])[::-1]).all()


def test_the_interval_is_that_of_resampled_patients():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(40), 3)
    positive = np.repeat(rng.random(40) < 0.4, 3)
    scores = np.round(positive + rng.normal(size=120), 1)  # with ties
    area, interval = auroc_by_patient(scores, positive, patients, resamples=200, seed=7)
    slow = [auroc(scores[i], positive[i]) for i in bootstrap_indices(patients, 200, 7)]
    assert area == auroc(scores, positive)
    np.testing.assert_allclose(interval, percentile(slow), rtol=1e-12)


def test_noise_tells_nothing_and_a_hint_is_found_out_of_its_fold():
    rng = np.random.default_rng(3)
    patients, ours = [f"p{k}" for k in range(600)], np.arange(600) % 2 == 0
    noise = rng.normal(size=(600, 30))
    fold = baselines.fold_of(ours.astype(str), patients)
    assert abs(auroc(baselines.out_of_fold(noise, ours, fold), ours) - 0.5) < 0.08
    hint = np.column_stack([noise, ours + 0.3 * rng.normal(size=600), np.full(600, 3.0)])
    assert auroc(baselines.out_of_fold(hint, ours, fold), ours) > 0.97


def test_columns_become_features_whatever_is_in_them():
    facts = [files.Facts(width=10, height=10, bytes=100)] * 12
    rows = [{"sex": "FM"[k % 2], "age": str(k) if k % 3 else "", "view": "PA",
             "note": "" if k < 6 else "word"} for k in range(12)]
    x = baselines.features(facts, rows, ("sex", "age", "view", "note", "absent"))["metadata"]
    # sex, age and whether it is known, whether a note is known
    assert x.shape == (12, 2 + 2 + 1) and np.isfinite(x).all()
    assert (x[:, 3] == [k % 3 == 0 for k in range(12)]).all()
