"""The 1-nearest-neighbour test: by hand, under the null, by patient, and on copies."""

import numpy as np
import pytest
from scipy import stats

from minidiff.errors import InputError
from minidiff.evaluation.metrics.two_sample import c2st, neighbours


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_accuracy_by_hand():
    """On a line: real 0 1 5, synthetic 2.1 6 6.3. Nearest: 1 0 6 | 1 6.3 6, right: yes yes no | no
    yes yes.
    """
    got = c2st(real=np.array([[0.0], [1], [5]]), fake=np.array([[2.1], [6], [6.3]]),
               permutations=50)
    assert got.accuracy == pytest.approx(4 / 6) and got.n == 3 and got.low < 4 / 6 < got.high


def test_p_by_all_divisions():
    """The share of all divisions into 4 and 4 with as high an accuracy, counted; 20,000 random ones
    come near it.
    """
    from itertools import combinations
    x, y = normal(0, 4, 3), normal(1, 4, 3) + 0.8
    nearest = neighbours(np.concatenate([x, y]), np.arange(8))
    accuracy = lambda left: np.mean([(i in left) == (nearest[i] in left) for i in range(8)])  # noqa: E731
    exact = np.mean([accuracy(left) >= accuracy(range(4)) for left in combinations(range(8), 4)])
    assert c2st(real=x, fake=y, permutations=20_000).p == pytest.approx(exact, abs=0.02)


def test_sets_that_are_apart_and_sets_that_are_one():
    far = c2st(real=normal(0, 40, 5), fake=normal(1, 40, 5) + 9, permutations=99)
    assert far.accuracy == 1 and far.p == 0.01 and far.low > 0.85 and far.high == 1
    one = c2st(real=np.zeros((40, 5)), fake=np.zeros((40, 5)))   # ties everywhere: broken at random
    assert 0.3 < one.accuracy < 0.7


def test_copies_fall_below_chance():
    """The nearest neighbour of each copy is its original, of the other side."""
    x = normal(0, 60, 8)
    got = c2st(real=x, fake=x + 1e-3 * normal(1, 60, 8), permutations=99)
    assert got.accuracy == 0 and got.p == 1 and got.high < 0.15


def test_sides_are_made_equal_with_the_seed():
    x, y = normal(0, 90, 4), normal(1, 30, 4) + 1
    got = c2st(real=x, fake=y, permutations=99)
    assert got.n == 30 and got == c2st(real=x, fake=y, permutations=99)
    seeds = [c2st(real=x, fake=y, permutations=9, seed=s).accuracy for s in range(5)]
    assert len(set(seeds)) > 1


def test_a_neighbour_of_the_same_patient_is_left_out():
    """Follow-ups lie next to each other: with them, real images are told from others of the same
    kind.
    """
    centre = np.repeat(normal(0, 40, 6), 2, axis=0)
    x, patients = centre + 0.01 * normal(1, 80, 6), np.repeat(np.arange(40), 2)
    y = normal(2, 80, 6)
    plain, by_patient = (c2st(real=x, fake=y, real_patients=p) for p in (None, patients))
    assert plain.accuracy > 0.65 and plain.p < 0.01
    assert by_patient.accuracy < 0.6 and by_patient.p > 0.05
    nearest = neighbours(np.concatenate([x, y]), np.concatenate([patients, 40 + np.arange(80)]))
    assert (patients[np.arange(80)] != np.append(patients, np.arange(40, 120))[nearest[:80]]).all()


def test_bad_input_is_named():
    x = normal(0, 8, 3)
    with pytest.raises(InputError, match="1 of 8 fake feature vectors"):
        c2st(real=x, fake=np.where(np.arange(8)[:, None] == 3, np.nan, x))
    with pytest.raises(InputError, match="all 8 images are of one patient"):
        neighbours(x, np.zeros(8, dtype=int))
    with pytest.raises(TypeError):
        c2st(x, x)


def simulate(runs, n, shift, patients):
    """`runs` results, n a side, d = 8; with patients, two images each on the real side, which
    resemble one another.
    """
    found = []
    for i in range(runs):
        x, y = normal((0, i), n, 8), normal((1, i), n, 8) + shift
        if patients:
            x = 0.6 * x + 0.8 * np.repeat(normal((2, i), n // 2, 8), 2, axis=0)
        found.append(c2st(real=x, fake=y, real_patients=np.arange(n) // 2 if patients else None,
                          permutations=199, seed=i))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("patients", [False, True])
def test_under_the_null_p_is_uniform_and_accuracy_one_half(patients):
    found = simulate(400, 50, 0, patients)
    assert np.mean([r.accuracy for r in found]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([r.p <= 0.05 for r in found]) <= 0.08
    assert stats.kstest([r.p for r in found], "uniform").pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("shift", [0, 0.3, 1])
def test_the_interval_covers_the_expected_accuracy(patients, shift):
    found = simulate(400, 50, shift, patients)
    truth = np.mean([r.accuracy for r in found])
    assert np.mean([r.low <= truth <= r.high for r in found]) >= 0.9
