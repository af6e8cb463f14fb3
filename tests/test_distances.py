import itertools

import numpy as np
import pytest
from scipy import linalg

from minidiff.errors import InputError
from minidiff.evaluation import distances as ds
from minidiff.evaluation.distances import fid, floor, kid


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def white(seed, n, d):
    """n points whose mean is exactly 0 and whose covariance is exactly I."""
    x = normal(seed, n, d)
    return np.linalg.qr(x - x.mean(0))[0] * np.sqrt(n - 1)


@pytest.mark.parametrize("n,d", [(20, 64), (200, 16), (2, 5)])
def test_fd_of_a_set_with_itself_is_zero(n, d):
    x = normal(0, n, d)
    assert abs(fid(real=x, fake=x)) < 1e-9


@pytest.mark.parametrize("n,d", [(20, 64), (200, 16)])
def test_fd_of_equal_covariances_is_the_squared_shift(n, d):
    x, shift = normal(0, n, d), normal(1, d)
    assert fid(real=x, fake=x + shift) == pytest.approx(shift @ shift)


def test_fd_of_scaled_identity():
    d, s = 12, 1.7
    assert fid(real=white(0, 50, d), fake=s * white(1, 80, d)) == pytest.approx(d * (1 - s) ** 2)


def test_fd_symmetry_rotation_scale():
    x, y = normal(0, 30, 40), 1.3 * normal(1, 25, 40) + 0.4
    turn = np.linalg.qr(normal(2, 40, 40))[0]
    value = fid(real=x, fake=y)
    assert fid(real=y, fake=x) == pytest.approx(value)
    assert fid(real=x @ turn, fake=y @ turn) == pytest.approx(value)
    assert fid(real=3 * x, fake=3 * y) == pytest.approx(9 * value)


@pytest.mark.parametrize("n", [23, 24, 25, 60])   # d = 24: below, at and above the change of route
def test_both_routes_agree_with_sqrtm(n):
    x, y = normal(0, n, 24), 1.2 * normal(1, 40, 24) + 0.3
    a, b = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(a + 1e-13 * np.eye(24)).real
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    gap = x.mean(0) - y.mean(0)
    assert fid(real=x, fake=y) == pytest.approx(gap @ gap + np.trace(a) + np.trace(b) - 2 * cross, rel=1e-5)


def test_fd_of_degenerate_sets():
    flat = np.ones((10, 6))
    assert fid(real=flat, fake=flat + 2) == pytest.approx(24)                    # constant features: only the shift
    line = normal(0, 90, 1) * np.ones((1, 30))                                   # rank 1, n > d
    assert fid(real=line, fake=2 * line) == pytest.approx(30 * line[:, 0].var(ddof=1) + fid_mean(line), rel=1e-6)


def fid_mean(line):
    return 30 * line[:, 0].mean() ** 2


@pytest.mark.parametrize("metric", [fid, kid])
def test_bad_input_is_named(metric):
    x = normal(0, 8, 3)
    with pytest.raises(InputError, match="fake side has 1"):
        metric(real=x, fake=x[:1])
    with pytest.raises(InputError, match="1 of 8 real feature vectors"):
        metric(real=np.where(np.arange(8)[:, None] == 3, np.nan, x), fake=x)
    with pytest.raises(TypeError):
        metric(x, x)


def test_kd_equals_the_double_loop():
    x, y = normal(0, 7, 5), normal(1, 9, 5)
    k = lambda a, b: (a @ b / 5 + 1) ** 3  # noqa: E731
    own = lambda s: np.mean([k(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)])  # noqa: E731
    assert kid(real=x, fake=y) == pytest.approx(own(x) + own(y) - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kd_is_unbiased_and_may_be_negative():
    values = np.array([kid(real=normal(i, 20, 6), fake=normal(1000 + i, 15, 6)) for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20
    assert 0.3 < (values < 0).mean() < 0.8


def clustered(seed, patients, d, shift=0.0):
    """Two images a patient that resemble one another."""
    centre = np.repeat(normal(seed, patients, d), 2, axis=0)
    return centre + 0.5 * normal(seed + 50_000, 2 * patients, d) + shift, np.repeat(np.arange(patients), 2)


def test_kd_interval_covers_zero_under_the_null_and_the_shift_when_there_is_one():
    null = hits = 0
    big_x, big_y = normal(1, 3000, 8), normal(2, 3000, 8) + 0.4
    truth = kid(real=big_x, fake=big_y)
    for i in range(60):
        x, y = normal(10 + i, 60, 8), normal(500 + i, 60, 8)
        low, high = ds.kid_interval(real=x, fake=y, real_patients=range(60), n_boot=200, seed=i)
        null += low <= 0 <= high
        low, high = ds.kid_interval(real=x, fake=y + 0.4, real_patients=range(60), n_boot=200, seed=i)
        hits += low <= truth <= high
    assert null >= 53 and hits >= 50, (null, hits)


def test_kd_with_two_images_a_patient_is_unbiased_only_without_their_pairs():
    plain, by_patient = [], []
    for i in range(200):
        (x, p), (y, q) = clustered(i, 15, 6), clustered(i + 700, 15, 6)
        plain.append(kid(real=x, fake=y))
        by_patient.append(kid(real=x, fake=y, real_patients=p, fake_patients=q))
    error = np.std(by_patient) / np.sqrt(200)
    assert abs(np.mean(by_patient)) < 3 * error < np.mean(plain)


def test_kd_interval_pairs_no_patient_with_its_own_copy():
    """By hand: each resample written out as a list of images, pairs of one patient skipped."""
    x, patients = clustered(3, 5, 4)
    y = normal(7, 6, 4)
    draws = []
    for c, e in zip(ds.bootstrap_counts(5, 40, 9), ds.bootstrap_counts(6, 40, 10)):
        a, b = np.repeat(np.arange(10), c[patients]), np.repeat(np.arange(6), e)
        k = lambda u, v: ds.kernel(u[None], v[None]).item()  # noqa: E731
        own = np.mean([k(x[i], x[j]) for i in a for j in a if patients[i] != patients[j]])
        theirs = np.mean([k(y[i], y[j]) for i in b for j in b if i != j])
        draws.append(own + theirs - 2 * np.mean([k(x[i], y[j]) for i in a for j in b]))
    got = ds.kid_interval(real=x, fake=y, real_patients=patients, n_boot=40, seed=9)
    assert got == pytest.approx(ds.percentile(draws))


def test_draws_without_pairs_keep_their_place():
    x, y, z = normal(0, 8, 3), normal(1, 9, 3), normal(2, 9, 3)
    kwargs = {"real": x, "real_patients": [0, 1] * 4, "n_boot": 200, "seed": 3}
    a, b = ds.kid_draws(fake=y, **kwargs), ds.kid_draws(fake=z, fake_patients=[0, 1, 1] * 3, **kwargs)
    alone = (ds.bootstrap_counts(2, 200, 3) == 0).any(1)
    assert a.shape == b.shape == (200,) and (np.isnan(a) == alone).all() and np.isnan(b)[alone].all()
    assert ds.finite_percentile(a) == ds.percentile(a[~alone]) and np.isnan(ds.finite_percentile(a[alone])).all()
    assert np.isnan(ds.kid_p(real=x, fake=y, real_patients=[0] * 8, permutations=19))   # one patient: no KD, no p


def test_permutation_p_is_uniform_under_the_null_and_small_under_a_shift():
    values = [ds.kid_p(real=normal(i, 25, 6), fake=normal(900 + i, 30, 6), permutations=99, seed=i) for i in range(100)]
    assert 0.4 < np.mean(values) < 0.6 and 2 <= sum(p <= 0.1 for p in values) <= 20
    assert ds.kid_p(real=normal(0, 40, 6), fake=normal(1, 40, 6) + 1, permutations=199) == pytest.approx(1 / 200)


def test_permutation_p_by_patient_is_less_sure_than_by_image():
    by_image, by_patient = [], []
    for i in range(40):
        (x, p), (y, q) = clustered(i, 12, 4), clustered(i + 400, 12, 4)
        by_image.append(ds.kid_p(real=x, fake=y, permutations=99))
        by_patient.append(ds.kid_p(real=x, fake=y, real_patients=p, fake_patients=q, permutations=99))
    assert np.mean(by_image) < 0.3 and 0.38 < np.mean(by_patient) < 0.62


def test_floor_is_zero_for_kd_and_positive_for_fd():
    x, patients = clustered(0, 150, 10)
    kd = floor(kid, real=x, patients=patients, n=60, m=80)
    assert kd.low < 0 < kd.high and (kd.n, kd.m) == (60, 80)
    small, large = (floor(fid, real=x, patients=patients, n=n, m=n) for n in (30, 120))
    assert small.median > 2 * large.median > 0


def test_floor_keeps_patients_apart():
    """All images of a patient are equal and all patients far apart: a shared patient would make k(x, y) huge."""
    patients = np.repeat(np.arange(20), 5)
    x = 50 * np.eye(20)[patients]
    seen = []
    floor(lambda *, real, fake: seen.append((real, fake)) or 0.0, real=x, patients=patients, n=33, m=40, repeats=30)
    for real, fake in seen:
        assert len(real) == 33 and len(fake) == 40
        assert not set(real.argmax(1)) & set(fake.argmax(1))


def test_floor_shrinks_to_the_pool_and_says_so():
    x = normal(0, 40, 5)
    spread = floor(fid, real=x, patients=range(40), n=100, m=300)
    assert (spread.n, spread.m) == (10, 30)
    with pytest.raises(InputError, match="too few"):
        floor(fid, real=x[:4], patients=[0, 0, 0, 1], n=5, m=5)


def test_floor_of_kd_equals_kd_of_the_subsets():
    x = normal(0, 50, 5)
    direct = floor(lambda *, real, fake: kid(real=real, fake=fake), real=x, patients=range(50), n=20, m=20, repeats=20)
    assert floor(kid, real=x, patients=range(50), n=20, m=20, repeats=20) == pytest.approx(direct)


def test_fd_spread_holds_half_sizes():
    spread = ds.fid_spread(real=normal(0, 60, 5), fake=normal(1, 41, 5), repeats=50)
    assert (spread.n, spread.m) == (30, 20) and 0 < spread.low < spread.median < spread.high
