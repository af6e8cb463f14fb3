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
    psi = np.array([[float(p > q) + 0.5 * (p == q) for q in scores[~positive]] for p in scores[positive]])
    m, n = psi.shape
    area, se = st.delong(scores, positive)
    assert area == pytest.approx(psi.mean(), abs=1e-12)
    assert se == pytest.approx(math.sqrt(psi.mean(1).var(ddof=1) / m + psi.mean(0).var(ddof=1) / n), abs=1e-12)


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
    draws = st.bootstrap_indices(groups, 300, seed=4)
    for draw in draws:
        seen = np.bincount(draw, minlength=6)
        assert seen[0] == seen[2] and seen[3] == seen[4] == seen[5]
        assert seen[0] + seen[1] + seen[3] == 3                       # three patients, three drawn
    assert all((a == b).all() for a, b in zip(draws, st.bootstrap_indices(groups, 300, seed=4)))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(draws, st.bootstrap_indices(groups, 300, seed=5)))


def test_percentile():
    assert st.percentile(np.arange(101)) == pytest.approx((2.5, 97.5))
