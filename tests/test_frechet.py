"""The Fréchet distance: closed forms, both of its routes, singular covariances, and the peers."""

import numpy as np
import pytest
import torch
from scipy import linalg
from torchvision_peer import torchvision

from minidiff.evaluation.metrics.distances import fid, root_trace


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
    assert fid(real=x, fake=y) == pytest.approx(gap @ gap + np.trace(a) + np.trace(b) - 2 * cross,
                                                rel=1e-5)


def test_fd_of_degenerate_sets():
    flat = np.ones((10, 6))
    # constant features: only the shift
    assert fid(real=flat, fake=flat + 2) == pytest.approx(24)
    line = normal(0, 90, 1) * np.ones((1, 30))                                   # rank 1, n > d
    assert fid(real=line, fake=2 * line) == pytest.approx(30 * line[:, 0].var(ddof=1)
                                                          + fid_mean(line), rel=1e-6)


def fid_mean(line):
    return 30 * line[:, 0].mean() ** 2


@pytest.mark.parametrize("n,m", [(300, 260), (40, 30)])   # d = 24: full rank
def test_fd_equals_the_peers(n, m):
    """pytorch-fid: mean, np.cov, scipy's sqrtm; torch-fidelity: mean, np.cov, eigvals."""
    torchvision()   # which both import
    pytorch_fid = pytest.importorskip("pytorch_fid.fid_score", exc_type=ImportError)
    fidelity = pytest.importorskip("torch_fidelity.metric_fid", exc_type=ImportError)
    x, y = normal(0, n, 24) * np.linspace(0.5, 2, 24), 1.2 * normal(1, m, 24) + 0.3
    value = fid(real=x, fake=y)
    moments = [f(s) for s in (x, y)
               for f in (lambda s: s.mean(0), lambda s: np.cov(s, rowvar=False))]
    assert pytorch_fid.calculate_frechet_distance(*moments) == pytest.approx(value, rel=1e-5)
    both = [fidelity.fid_features_to_statistics(torch.from_numpy(s)) for s in (x, y)]
    peer = fidelity.fid_statistics_to_metric(*both, verbose=False)
    assert peer["frechet_inception_distance"] == pytest.approx(value, rel=1e-5)


def test_a_large_mean_costs_no_digits():
    """E[x²] − E[x]² would leave nothing of a spread of 1 beside a mean of 10⁸."""
    x, y = normal(0, 4000, 3), 1.3 * normal(1, 4000, 3)
    assert fid(real=x + 1e8, fake=y + 1e8) == pytest.approx(fid(real=x, fake=y), rel=1e-5)


def test_root_trace_of_singular_matrices():
    """By turns the first, the second and both are singular; diagonal ones have Σ √(s·t) by hand."""
    s, t = np.array([4.0, 9, 0, 1]), np.array([1.0, 4, 25, 16])
    for a, b in ((s, t), (t, s), (s, np.array([1.0, 0, 4, 9])), (t, t)):
        turn = np.linalg.qr(normal(0, 4, 4))[0]
        got = root_trace(turn @ np.diag(a) @ turn.T, turn @ np.diag(b) @ turn.T)
        assert got == pytest.approx(np.sqrt(a * b).sum(), rel=1e-7)
