import math

import numpy as np
import pytest

from minidiff import statistics as st


def test_wilson_golden():
    low, high = st.wilson(68, 100)
    assert (round(low, 3), round(high, 3)) == (0.583, 0.763)
    assert st.wilson(0, 10)[0] == 0 and st.wilson(10, 10)[1] == 1
    assert st.wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    assert all(math.isnan(v) for v in st.wilson(0, 0))
    wide, narrow = st.wilson(5, 10, 0.99), st.wilson(5, 10, 0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_delong_equals_the_double_loop_with_ties():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 12, 70) / 4 + 0.0, rng.random(70) < 0.4
    scores = scores + positive
    psi = np.array([[float(p > q) + 0.5 * (p == q) for q in scores[~positive]]
                    for p in scores[positive]])
    m, n = psi.shape
    area, se = st.delong(scores, positive)
    assert area == pytest.approx(psi.mean(), abs=1e-12)
    assert se == pytest.approx(math.sqrt(psi.mean(1).var(ddof=1) / m + psi.mean(0).var(ddof=1) / n),
                               abs=1e-12)


def test_auroc_ends():
    assert st.auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 1
    assert st.auroc([1, 2, 3, 4], [1, 1, 0, 0]) == 0
    assert st.auroc([1, 1, 1, 1], [1, 0, 1, 0]) == 0.5
    assert math.isnan(st.auroc([1, 2], [1, 1]))
    assert all(math.isnan(v) for v in st.auroc_interval([1, 2, 3, 4], [0, 0, 1, 1]))


def test_auroc_interval_covers():
    """Two unit normals one apart: the area is Φ(1/√2) = 0.7602."""
    rng, hits = np.random.default_rng(1), 0
    positive = np.arange(120) < 50
    for _ in range(200):
        low, high = st.auroc_interval(rng.normal(size=120) + positive, positive)
        hits += low <= 0.76025 <= high
    assert 180 <= hits <= 199


def test_pearson():
    rng = np.random.default_rng(2)
    x = rng.normal(size=400)
    r, low, high = st.pearson(x, 0.6 * x + 0.8 * rng.normal(size=400))
    assert low < 0.6 < high and high - low < 0.15 and r == pytest.approx(0.6, abs=0.08)
    assert st.pearson(x, 2 * x + 1)[0] == pytest.approx(1)
    assert math.isnan(st.pearson(x, np.ones(400))[0])


def test_bootstrap_takes_whole_patients():
    groups = ["b", "a", "b", "c", "c", "c"]

    def draws(seed):
        return np.concatenate(list(st.patient_weights(groups, 300, seed)))

    seen = draws(4)
    assert seen.shape == (300, 6)
    assert (seen[:, 0] == seen[:, 2]).all() and (seen[:, 3:] == seen[:, 3:4]).all()
    assert (seen[:, [0, 1, 3]].sum(1) == 3).all()             # three patients, three drawn
    assert (seen == draws(4)).all() and (seen != draws(5)).any()


def test_percentile():
    assert st.percentile(np.arange(101)) == pytest.approx((2.5, 97.5))


# ---- pairs of ROC curves

OVARIAN = """
    3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0
    1.6 5.6 5 1  3.8 5.7 5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1
    4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1
    3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1
    3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1
    3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1
    3.6 6.6 5 1"""


def paired(a, b, positive):
    """Area of a minus that of b, and DeLong's standard error, from what each image adds to it."""
    parts = st.delong_parts(a, positive) - st.delong_parts(b, positive)
    return parts.sum(), math.sqrt(sum(side.sum() * parts[side].var(ddof=1)
                                      for side in (positive, ~positive)))


def test_delong_of_the_paper():
    """Albumin, total protein and K-G score of DeLong et al. 1988, the 43 complete records, as
    SAS/STAT's manual has them.
    """
    albumin, protein, kg, benefit = np.array(OVARIAN.split(), float).reshape(-1, 4).T
    kg, benefit = 10 - kg, benefit > 0
    for scores, area, se in ((albumin, 0.7366, 0.0927), (protein, 0.6478, 0.1000),
                             (kg, 0.7258, 0.1028)):
        assert st.delong(scores, benefit) == pytest.approx((area, se), abs=5e-5)
    assert paired(albumin, kg, benefit) == pytest.approx((0.0108, 0.0953), abs=5e-5)
    assert paired(protein, kg, benefit) == pytest.approx((-0.0780, 0.1046), abs=5e-5)


def test_delong_of_a_pair_equals_the_covariance_of_the_double_loop():
    rng = np.random.default_rng(7)
    positive = rng.random(60) < 0.4
    a, b = (np.round(positive + rng.normal(size=60), 1) for _ in range(2))
    psi = [np.array([[float(p > q) + 0.5 * (p == q) for q in s[~positive]] for p in s[positive]])
           for s in (a, b)]
    m, n = psi[0].shape
    # of both areas: eq. 5 of the paper
    s = np.cov([x.mean(1) for x in psi]) / m + np.cov([x.mean(0) for x in psi]) / n
    d, se = paired(a, b, positive)
    assert d == pytest.approx(psi[0].mean() - psi[1].mean(), abs=1e-12)
    assert se == pytest.approx(math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1]), abs=1e-12)
    assert np.isnan(st.delong_parts(a, np.ones(60, bool))).all()


def test_parts_of_an_area_sum_to_it_and_spread_as_delong_says():
    rng = np.random.default_rng(3)
    positive = rng.random(200) < 0.3
    scores = rng.standard_normal(200) + positive
    parts, (area, se) = st.delong_parts(scores, positive), st.delong(scores, positive)
    left = parts - area / 200
    assert parts.sum() == pytest.approx(area)
    assert math.sqrt(sum(side.sum() * left[side].var(ddof=1)
                         for side in (positive, ~positive))) == pytest.approx(se)


def test_two_way_variance_of_a_table_of_seeds_and_patients():
    """Known components: the mean's variance is s²/seeds + p²/patients + e²/(seeds·patients)."""
    rng = np.random.default_rng(5)
    drawn = [st.two_way(rng.normal(0, 2, (8, 1)) + rng.normal(0, 3, (1, 50))
                        + rng.normal(0, 1, (8, 50)))[0] for _ in range(400)]
    assert np.mean(drawn) == pytest.approx(4 / 8 + 9 / 50 + 1 / 400, rel=0.1)


# ---- areas, thresholds and tests against scikit-learn and statsmodels


@pytest.fixture(scope="module")
def ties():
    rng = np.random.default_rng(8)
    positive = rng.random(300) < 0.2
    return np.round(positive + rng.normal(size=300), 1), positive


def test_areas_are_those_of_scikit_learn_weighted_too(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = ties
    assert st.auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores),
                                                       abs=1e-12)
    theirs = metrics.average_precision_score(positive, scores)
    ours = st.weighted_precision(scores, positive, np.ones((1, 300)))[0]
    assert ours == pytest.approx(theirs, abs=1e-12)
    weights = st.bootstrap_counts(300, 20, 1).astype(float)
    for ours, peer in ((st.weighted_auroc, metrics.roc_auc_score),
                       (st.weighted_precision, metrics.average_precision_score)):
        theirs = [peer(positive, scores, sample_weight=w) for w in weights]
        np.testing.assert_allclose(ours(scores, positive, weights), theirs, rtol=0, atol=1e-12)
    nothing = np.ones((1, 3))
    assert math.isnan(st.weighted_auroc([1, 2, 3], [1, 1, 1], nothing)[0])
    assert math.isnan(st.weighted_precision([1, 2, 3], [0, 0, 0], nothing)[0])


def test_thresholds_are_the_most_sensitive_of_those_allowed(ties):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, positive = ties
    fpr, _, at = metrics.roc_curve(positive, scores, drop_intermediate=False)
    for specificity in (0.0, 0.5, 0.8, 0.9, 0.95):
        t = st.threshold_at(scores, positive, specificity)
        assert t == at[fpr <= 1 - specificity + 1e-9][-1]
        assert (scores[~positive] < t).mean() >= specificity
        below = scores[scores < t]
        # the next one would break it
        assert not len(below) or (scores[~positive] < below.max()).mean() < specificity
    t = st.threshold_at(scores, positive, 1.0)
    assert t > scores[~positive].max() and not (scores[~positive] >= t).any()
    assert st.threshold_at([0.2, 0.9], [1, 0], 1.0) == np.nextafter(0.9, 1)
    assert math.isnan(st.threshold_at([0.2, 0.9], [1, 1], 0.9))


def test_holm_and_wilson_are_those_of_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    ps = np.random.default_rng(9).random(17) ** 3
    np.testing.assert_allclose(st.holm(ps), multitest.multipletests(ps, method="holm")[1], rtol=0,
                               atol=1e-15)
    assert st.holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04],
                                                            nan_ok=True) and st.holm([]) == []
    for k, n in ((0, 9), (3, 9), (68, 100), (100, 100)):
        assert st.wilson(k, n) == pytest.approx(
            proportion.proportion_confint(k, n, method="wilson"), abs=1e-12)


# ---- resampling


# ---- do 95 % intervals hold the truth in 95 % of sets?


def test_wilson_covers_by_enumeration():
    """No simulation: the binomial chances of all k whose interval holds p, over a range of p."""
    from scipy.stats import binom
    for n in (10, 25, 100, 225):
        ends = np.array([st.wilson(k, n) for k in range(n + 1)])
        p = np.linspace(0.02, 0.98, 193)
        held = (ends[:, :1] <= p) & (p <= ends[:, 1:])
        chance = (binom.pmf(np.arange(n + 1)[:, None], n, p) * held).sum(0)
        # it swings with p, as all intervals of counts
        assert 0.94 < chance.mean() < 0.965 and chance.min() > 0.83


@pytest.mark.slow
def test_delong_covers():
    """Two correlated readings of unit normals, 1.5 and 1 apart: areas Φ(1.5/√2) and Φ(1/√2). 4,000
    sets, ± 0.7 points.
    """
    from scipy.stats import norm
    rng, runs, z = np.random.default_rng(3), 4000, st.z_value()
    positive, truth = np.arange(120) < 40, norm.cdf(np.array([1.5, 1]) / math.sqrt(2))
    held = np.zeros(2)
    for _ in range(runs):
        common = rng.normal(size=120)
        a, b = ((common + rng.normal(size=120)) / math.sqrt(2) + apart * positive
                for apart in (1.5, 1))
        low, high = st.auroc_interval(a, positive)
        d, se = paired(a, b, positive)
        held += low <= truth[0] <= high, abs(d - (truth[0] - truth[1])) <= z * se
    share = held / runs
    assert (share > 0.93).all() and (share < 0.97).all(), share
