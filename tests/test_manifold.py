"""Precision, recall, density, coverage: by the definitions, by the peers, and which way round they
are.
"""

import numpy as np
import pytest
import torch
from torchvision_peer import torchvision

from minidiff.errors import InputError
from minidiff.evaluation.metrics import manifold
from minidiff.evaluation.metrics.manifold import prdc


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
    monkeypatch.setattr(manifold, "ROWS", 7)   # several parts
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


def test_bad_input_is_named():
    x = normal(0, 9, 3)
    with pytest.raises(InputError, match="neighbour 5 need at least 6 images; the fake side has 5"):
        prdc(real=x, fake=x[:5])
    with pytest.raises(InputError, match="1 of 9 real feature vectors"):
        prdc(real=np.where(np.arange(9)[:, None] == 3, np.nan, x), fake=x)
    with pytest.raises(TypeError):
        prdc(x, x)
