import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage, optimize, stats
from torchvision_peer import torchvision

from minidiff.data.phantom import phantom
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics import distances as ds
from minidiff.evaluation.metrics import pairwise
from minidiff.evaluation.metrics.distances import fid, floor, kid, mind
from minidiff.evaluation.metrics.neighbours import c2st, prdc
from minidiff.statistics import finite_percentile, percentile


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def kid_interval(**sets):
    return finite_percentile(ds.kid_draws(**sets))


def test_kd_equals_torch_fidelity():
    torchvision()
    fidelity = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    x, y = normal(0, 70, 16), 1.1 * normal(1, 70, 16) + 0.2
    peer = fidelity.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), kid_subsets=1,
                                           kid_subset_size=70, kid_kernel="poly",
                                           kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
                                           kid_kernel_poly_coef0=1, rng_seed=0, verbose=False)
    assert kid(real=x, fake=y) == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-9)


@pytest.mark.parametrize("metric", [fid, kid, mind])
def test_two_images_are_enough_and_order_does_not_matter(metric):
    x, y = normal(0, 2, 5), normal(1, 2, 5) + 1
    assert np.isfinite(metric(real=x, fake=y)) and metric(real=x,
                                                          fake=y) == pytest.approx(metric(real=y,
                                                                                          fake=x))
    x, y = normal(0, 30, 5), normal(1, 30, 5)
    assert metric(real=x[::-1],
                  fake=y[np.arange(30) * 7 % 30]) == pytest.approx(metric(real=x, fake=y))


def test_mind_of_a_shift_a_scale_and_of_itself():
    """A shift δ is 3d·mean (u·δ)² = 3|δ|² over all directions u; the sorted values of 2x are those
    of x, twice.
    """
    x, shift = normal(0, 100, 40), normal(1, 40)
    assert mind(real=x, fake=x) == 0
    assert mind(real=x, fake=x + shift, directions=4000) == pytest.approx(3 * shift @ shift,
                                                                          rel=0.1)
    # d = 1: no direction but ±1
    assert mind(real=x[:, :1], fake=x[:, :1] + 2) == pytest.approx(12)
    assert mind(real=x[:, :1], fake=2 * x[:, :1]) == pytest.approx(3 * (x[:, 0] ** 2).mean())
    assert mind(real=3 * x,
                fake=3 * x + 3 * shift) == pytest.approx(9 * mind(real=x, fake=x + shift))


def test_mind_is_the_wasserstein_distance_of_projections():
    """Against the optimal assignment of the points of each projection, which needs no sorting."""
    x, y = normal(0, 25, 3), normal(1, 25, 3)
    u = np.random.default_rng(5).standard_normal((7, 3))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    cost = [((a[:, None] - b) ** 2) for a, b in zip(u @ x.T, u @ y.T)]
    best = np.mean([c[optimize.linear_sum_assignment(c)].mean() for c in cost])
    assert mind(real=x, fake=y, directions=7, seed=5) == pytest.approx(9 * best)


def test_mind_draws_equal_numbers_with_the_seed():
    x, y = normal(0, 90, 6), normal(1, 40, 6)
    assert mind(real=x, fake=y) == mind(real=x, fake=y) == pytest.approx(
        mind(real=ds.draw(x, 40, 0), fake=y)) != mind(real=x, fake=y, seed=3)
    null = floor(mind, real=x, patients=range(90), n=40, m=40, repeats=20)
    assert 0 < null.median < mind(real=x, fake=y + 0.7)


@pytest.mark.parametrize("metric", [fid, kid, mind])
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
    within = [np.mean([k(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
    assert kid(real=x, fake=y) == pytest.approx(
        sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kd_is_unbiased_and_may_be_negative():
    values = np.array([kid(real=normal(i, 20, 6), fake=normal(1000 + i, 15, 6))
                       for i in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20
    assert 0.3 < (values < 0).mean() < 0.8


def clustered(seed, patients, d, shift=0.0):
    """Two images a patient that resemble one another."""
    centre = np.repeat(normal(seed, patients, d), 2, axis=0)
    return centre + 0.5 * normal(seed + 50_000, 2 * patients,
                                 d) + shift, np.repeat(np.arange(patients), 2)


def test_kd_interval_covers_zero_under_the_null_and_the_shift_when_there_is_one():
    null = hits = 0
    big_x, big_y = normal(1, 3000, 8), normal(2, 3000, 8) + 0.4
    truth = kid(real=big_x, fake=big_y)
    for i in range(60):
        x, y = normal(10 + i, 60, 8), normal(500 + i, 60, 8)
        low, high = kid_interval(real=x, fake=y, real_patients=range(60), n_boot=200, seed=i)
        null += low <= 0 <= high
        low, high = kid_interval(real=x, fake=y + 0.4, real_patients=range(60), n_boot=200,
                                 seed=i)
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
        k = lambda u, v: pairwise.kernel(u[None], v[None]).item()  # noqa: E731
        own = np.mean([k(x[i], x[j]) for i in a for j in a if patients[i] != patients[j]])
        theirs = np.mean([k(y[i], y[j]) for i in b for j in b if i != j])
        draws.append(own + theirs - 2 * np.mean([k(x[i], y[j]) for i in a for j in b]))
    got = kid_interval(real=x, fake=y, real_patients=patients, n_boot=40, seed=9)
    assert got == pytest.approx(percentile(draws))


def test_draws_without_pairs_keep_their_place():
    x, y, z = normal(0, 8, 3), normal(1, 9, 3), normal(2, 9, 3)
    kwargs = {"real": x, "real_patients": [0, 1] * 4, "n_boot": 200, "seed": 3}
    a, b = ds.kid_draws(fake=y, **kwargs), ds.kid_draws(fake=z, fake_patients=[0, 1, 1] * 3,
                                                        **kwargs)
    alone = (ds.bootstrap_counts(2, 200, 3) == 0).any(1)
    assert a.shape == b.shape == (200,) and (np.isnan(a)
                                             == alone).all() and np.isnan(b)[alone].all()
    assert finite_percentile(a) == percentile(a[~alone]) and np.isnan(
        finite_percentile(a[alone])).all()
    # one patient: no KD, no p
    assert np.isnan(ds.kid_p(real=x, fake=y, real_patients=[0] * 8, permutations=19))


def test_permutation_p_is_uniform_under_the_null_and_small_under_a_shift():
    values = [ds.kid_p(real=normal(i, 25, 6), fake=normal(900 + i, 30, 6), permutations=99, seed=i)
              for i in range(100)]
    assert 0.4 < np.mean(values) < 0.6 and 2 <= sum(p <= 0.1 for p in values) <= 20
    assert ds.kid_p(real=normal(0, 40, 6), fake=normal(1, 40, 6) + 1,
                    permutations=199) == pytest.approx(1 / 200)


def test_permutation_p_by_patient_is_less_sure_than_by_image():
    by_image, by_patient = [], []
    for i in range(40):
        (x, p), (y, q) = clustered(i, 12, 4), clustered(i + 400, 12, 4)
        by_image.append(ds.kid_p(real=x, fake=y, permutations=99))
        by_patient.append(ds.kid_p(real=x, fake=y, real_patients=p, fake_patients=q,
                                   permutations=99))
    assert np.mean(by_image) < 0.3 and 0.38 < np.mean(by_patient) < 0.62


def test_floor_is_zero_for_kd_and_positive_for_fd():
    x, patients = clustered(0, 150, 10)
    kd = floor(kid, real=x, patients=patients, n=60, m=80)
    assert kd.low < 0 < kd.high and (kd.n, kd.m) == (60, 80)
    small, large = (floor(fid, real=x, patients=patients, n=n, m=n) for n in (30, 120))
    assert small.median > 2 * large.median > 0


def test_floor_keeps_patients_apart():
    """All images of a patient are equal and all patients far apart: a shared patient would make
    k(x, y) huge.
    """
    patients = np.repeat(np.arange(20), 5)
    x = 50 * np.eye(20)[patients]
    seen = []
    floor(lambda *, real, fake: seen.append((real, fake)) or 0.0, real=x, patients=patients, n=33,
          m=40, repeats=30)
    for real, fake in seen:
        assert len(real) == 33 and len(fake) == 40
        assert not set(real.argmax(1)) & set(fake.argmax(1))


def test_floor_shrinks_to_the_pool_and_says_so():
    x = normal(0, 40, 5)
    spread = floor(fid, real=x, patients=range(40), n=100, m=300)
    assert (spread.n, spread.m) == (10, 30)
    assert floor(fid, real=x[:4], patients=[0, 0, 0, 1], n=5, m=5) is None   # too few patients


def test_floor_of_kd_equals_kd_of_the_subsets():
    x = normal(0, 50, 5)
    direct = floor(lambda *, real, fake: kid(real=real, fake=fake), real=x, patients=range(50),
                   n=20, m=20, repeats=20)
    assert floor(kid, real=x, patients=range(50), n=20, m=20, repeats=20) == pytest.approx(direct)


def test_fd_spread_holds_half_sizes():
    spread = ds.fid_spread(real=normal(0, 60, 5), fake=normal(1, 41, 5), repeats=50)
    assert (spread.n, spread.m) == (30, 20) and 0 < spread.low < spread.median < spread.high


def gaussian_kd(shift):
    """KD between N(0, I) and N(shift, I) in closed form.

    E k(x, y) for x ~ N(μ, I), y ~ N(ν, I) needs E (x·y)ʲ: a, a² + |μ|² + |ν|² + d, a³ + 3a|ν|² +
    3a(|μ|² + d + 2), a = μ·ν.
    """
    d, s = len(shift), shift @ shift

    def mean(a, p, q):
        moments = a, a ** 2 + p + q + d, a ** 3 + 3 * a * q + 3 * a * (p + d + 2)
        return 1 + 3 * moments[0] / d + 3 * moments[1] / d ** 2 + moments[2] / d ** 3
    return mean(0, 0, 0) + mean(s, s, s) - 2 * mean(0, 0, s)


def test_the_closed_form_of_kd():
    shift = np.array([0.8, 0, 0.3, 0.5])
    draws = [kid(real=normal(i, 400, 4), fake=normal(i + 5000, 400, 4) + shift) for i in range(60)]
    assert np.mean(draws) == pytest.approx(gaussian_kd(shift), abs=4 * np.std(draws) / 60 ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.15, 1.0])
def test_kd_intervals_cover_the_true_kd(shift):
    """1,000 runs of 60 real images of 40 patients against 50 synthetic ones, d = 8, the 95 %
    interval of each.
    """
    truth = gaussian_kd(np.full(8, shift))
    hits, missed = 0, [0, 0]
    for i in range(1000):
        patients = np.arange(60) % 40
        low, high = kid_interval(real=normal((0, i), 60, 8), fake=normal((1, i), 50, 8) + shift,
                                 real_patients=patients, n_boot=300, seed=i)
        hits += low <= truth <= high
        missed[int(truth > high)] += not low <= truth <= high
    assert hits >= 900, (hits, missed)


def phantoms(start, n, **kwargs):
    seen = [phantom(7, start + i, 64, **kwargs) for i in range(n)]
    images = torch.from_numpy(np.stack([p.image for p in seen]))
    return images[:, None].expand(-1, 3, -1, -1), np.array([p.row["patient"] for p in seen])


@pytest.mark.slow
def test_p_of_real_against_real_is_uniform():
    """200 random halves, by patient, of 120 phantoms."""
    images, patients = phantoms(2000, 120)
    x = PixelPCA().fit(phantoms(0, 200)[0])(images).numpy()
    names, values = np.unique(patients), []
    for i in range(200):
        left = np.isin(patients, np.random.default_rng(i).permutation(names)[:len(names) // 2])
        values.append(ds.kid_p(real=x[left], fake=x[~left], real_patients=patients[left],
                               fake_patients=patients[~left], permutations=400, seed=i))
    assert stats.kstest(values, "uniform").pvalue > 0.01, np.quantile(values,
                                                                      [0.05, 0.25, 0.5, 0.75, 0.95])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["blur", "noise"])
def test_blur_and_noise_raise_kd_step_by_step(fault):
    """Four levels of each on 100 phantoms, against 100 others."""
    pixels = PixelPCA().fit(phantoms(0, 200)[0])
    real, _ = phantoms(1000, 100)
    clean, _ = phantoms(3000, 100)
    noise, values = np.random.default_rng(0).standard_normal(clean.shape[:1] + clean.shape[2:]), []
    for level in range(5):
        x = clean[:, 0].numpy().astype(float)
        x = ndimage.gaussian_filter(x, (0, 1.5 * level,
                                        1.5 * level)) if fault == "blur" else x + 25 * level * noise
        x = torch.from_numpy(x.round().clip(0, 255).astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
        values.append(kid(real=pixels(real).numpy(), fake=pixels(x).numpy()))
    assert (np.diff(values) > 0).all() and values[-1] > 10 * abs(values[0]), values


def test_blocks_equal_the_whole_and_memory_stays_theirs(monkeypatch):
    """Every sum over all pairs, in blocks of 7 rows that cut through patients, and as a whole."""
    x, y = normal(0, 60, 5), normal(1, 45, 5) + 0.2
    p, q = np.arange(60) // 2, np.arange(45) // 4
    sets = {"real": x, "fake": y, "real_patients": p, "fake_patients": q}

    def figures():
        null = floor(kid, real=x, patients=p, n=20, m=20, repeats=10)
        return [kid(**sets), *ds.kid_draws(**sets, n_boot=20), ds.kid_p(**sets, permutations=50),
                *null, *prdc(real=x, fake=y), *c2st(**sets, permutations=20)]

    whole = figures()
    monkeypatch.setattr(pairwise, "CELLS", 7 * 60)
    assert [rows.start for rows in pairwise.blocks(60, 60)] == list(range(0, 60, 7))
    assert figures() == pytest.approx(whole, rel=1e-9)


def test_the_memory_of_all_pairs_does_not_grow_with_them(monkeypatch):
    """1,500 × 1,500 cells of float64 are 18 MB: none is held, where 2**16 cells may be."""
    monkeypatch.setattr(pairwise, "CELLS", 2**16)
    x, y = normal(0, 1500, 4), normal(1, 1500, 4)
    for measure in (kid, lambda **s: ds.kid_draws(**s, n_boot=2),
                    lambda **s: ds.kid_p(**s, permutations=2)):
        tracemalloc.start()
        measure(real=x, fake=y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 9e6, peak
