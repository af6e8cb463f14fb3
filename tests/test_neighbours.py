"""Precision, recall, density, coverage and the 1-nearest-neighbour test: by their definitions, by
the peers, under the null, by patient, and on copies.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision_peer import torchvision

from minidiff.errors import InputError
from minidiff.evaluation.metrics import neighbours as module
from minidiff.evaluation.metrics import pairwise
from minidiff.evaluation.metrics.neighbours import c2st, neighbours, prdc


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def by_loops(x, y, k):
    d = lambda a, b: float(np.linalg.norm(a - b))  # noqa: E731
    r = [sorted(d(a, b) for b in x)[k] for a in x]
    s = [sorted(d(a, b) for b in y)[k] for a in y]
    precision = np.mean([any(d(a, b) < r[i] for i, a in enumerate(x)) for b in y])
    recall = np.mean([any(d(a, b) < s[j] for j, b in enumerate(y)) for a in x])
    density = sum(d(a, b) < r[i] for i, a in enumerate(x) for b in y) / (k * len(y))
    coverage = np.mean([min(d(a, b) for b in y) < r[i] for i, a in enumerate(x)])
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_all_four_by_their_definitions(k, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 7)   # several parts
    x, y = normal(0, 30, 4), 0.8 * normal(1, 23, 4) + 0.5
    assert prdc(real=x, fake=y, k=k) == pytest.approx(by_loops(x, y, k))


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("n,m,d", [(125, 125, 64), (90, 140, 8)])
def test_all_four_equal_the_package_prdc(k, n, m, d):
    peer = pytest.importorskip("prdc")
    x, y = normal(0, n, d), 0.9 * normal(1, m, d) + 0.1
    got = peer.compute_prdc(real_features=x, fake_features=y, nearest_k=k)
    assert prdc(real=x, fake=y, k=k)._asdict() == pytest.approx(got)


def test_precision_and_recall_equal_torch_fidelity():
    torchvision()
    peer = pytest.importorskip("torch_fidelity.metric_prc", exc_type=ImportError)
    x, y = normal(0, 100, 12), 0.8 * normal(1, 80, 12) + 0.2
    precision, recall = peer.calculate_precision_recall_full(torch.from_numpy(y),
                                                             torch.from_numpy(x), neighborhood=3)
    assert prdc(real=x, fake=y, k=3)[:2] == pytest.approx((precision, recall))


def test_a_tight_cluster_is_precise_and_recalls_nothing():
    """The convention that is easily swapped; density above 1 says that it sits where real images
    are dense.
    """
    x, y = normal(0, 300, 6), 0.05 * normal(1, 300, 6)
    got = prdc(real=x, fake=y)
    assert got.precision > 0.8 and got.recall < 0.3 and got.coverage < 0.3 and got.density > 1
    swapped = prdc(real=y, fake=x)
    assert swapped.precision < 0.3 and swapped.recall > 0.8


def test_collapse_to_five_real_images_shows_in_recall_and_coverage():
    x = normal(0, 125, 16)
    got = prdc(real=x, fake=np.repeat(normal(0, 125, 16)[:5], 25, axis=0))
    assert got.precision == 1 and got.recall == 0 and got.coverage < 0.2


def test_sets_of_their_own_and_far_apart():
    x = normal(0, 60, 5)
    same, apart = prdc(real=x, fake=x), prdc(real=x, fake=x + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1,
                                                            1) and same.density == pytest.approx(1)
    assert apart == (0, 0, 0, 0)


def test_one_far_off_real_image_raises_precision_and_not_density():
    x = np.concatenate([normal(0, 100, 4), 30 * np.eye(4)[:1]])
    y = 3 * normal(1, 100, 4) + 6
    alone, with_it = prdc(real=x[:-1], fake=y), prdc(real=x, fake=y)
    assert with_it.precision > alone.precision + 0.3 and with_it.density < alone.density + 0.3


def test_density_and_coverage_of_real_against_real_do_not_drift():
    """About 1 and .97 at any n and d, as the paper says; the density of one pair of draws
    scatters.
    """
    got = [prdc(real=normal(2 * i, 250, 256), fake=normal(2 * i + 1, 250, 256)) for i in range(4)]
    _, _, density, coverage = np.mean(got, axis=0)
    assert density == pytest.approx(1, abs=0.15) and coverage == pytest.approx(0.97, abs=0.03)


def test_bad_input_of_prdc_is_named():
    x = normal(0, 9, 3)
    with pytest.raises(InputError, match="neighbour 5 need at least 6 images; the fake side has 5"):
        prdc(real=x, fake=x[:5])
    with pytest.raises(InputError, match="1 of 9 real feature vectors"):
        prdc(real=np.where(np.arange(9)[:, None] == 3, np.nan, x), fake=x)
    with pytest.raises(TypeError):
        prdc(x, x)


def test_accuracy_of_c2st_by_hand():
    """On a line: real 0 1 5, synthetic 2.1 6 6.3. Nearest: 1 0 6 | 1 6.3 6, right: yes yes no | no
    yes yes.
    """
    got = c2st(real=np.array([[0.0], [1], [5]]), fake=np.array([[2.1], [6], [6.3]]),
               permutations=50)
    assert got.accuracy == pytest.approx(4 / 6) and got.low < 4 / 6 < got.high


def test_p_by_all_divisions():
    """The share of all divisions into 4 and 4 with as high an accuracy, counted; 20,000 random ones
    come near it.
    """
    x, y = normal(0, 4, 3), normal(1, 4, 3) + 0.8
    nearest = neighbours(np.concatenate([x, y]), np.arange(8))

    def accuracy(left):
        return np.mean([(i in left) == (nearest[i] in left) for i in range(8)])

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
    assert got == c2st(real=x, fake=y, permutations=99)
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


def test_bad_input_of_c2st_is_named():
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


def test_the_nearest_are_those_of_all_pairs_in_whatever_parts(monkeypatch):
    x, y = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    whole = torch.cdist(x.double(), y.double()).sort(1).values
    for cells in (2**24, 1000, 40):  # 40: parts of y are smaller than k
        monkeypatch.setattr(pairwise, "CELLS", cells)
        torch.testing.assert_close(pairwise.nearest(x[:50], y, 7), whole[:50, :7])
