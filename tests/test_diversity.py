"""Vendi by closed forms; MS-SSIM by two peers, closed forms and its pairs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision_peer import torchvision

from minidiff.errors import InputError
from minidiff.evaluation.metrics import diversity
from minidiff.evaluation.metrics.diversity import ms_ssim, scales, similarity, vendi


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pictures(seed, n, side, channels=3):
    """Smooth random pictures, grey, uint8 (n,3,side,side)."""
    x = torch.rand(n, 1, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, size=(side, side), mode="bilinear")
    return (255 * x).round().to(torch.uint8).expand(-1, channels, -1, -1)


@pytest.mark.parametrize("d", [8, 40])   # either Gram matrix
def test_vendi_counts_what_is_different(d):
    turn = np.linalg.qr(normal(0, d, d))[0]
    assert vendi(turn[:6]) == pytest.approx(6)                                     # orthogonal
    assert vendi(np.repeat(normal(1, 1, d), 9, axis=0)) == pytest.approx(1)        # equal
    # four kinds, five times each
    assert vendi(np.repeat(turn[:4], 5, axis=0)) == pytest.approx(4)
    assert vendi(np.repeat(turn[:2], [3, 1], axis=0)) == pytest.approx(
        np.exp(-(.75 * np.log(.75) + .25 * np.log(.25))))
    # cosines: lengths do not count
    assert vendi(5 * turn[:3] * [[1], [2], [9]]) == pytest.approx(3)


def test_vendi_of_two_vectors_at_an_angle():
    """K/2 has the eigenvalues (1 ± cos)/2."""
    p = (1 + np.array([1, -1]) * np.cos(0.7)) / 2
    assert vendi(np.array([[1, 0], [np.cos(0.7), np.sin(0.7)]])) == pytest.approx(
        np.exp(-(p * np.log(p)).sum()))


def test_vendi_falls_with_collapse_and_rises_with_n():
    x = normal(0, 125, 32)
    assert vendi(np.repeat(x[:5], 25, axis=0)) <= 5 < vendi(x[:40]) < vendi(x) <= 32


def test_vendi_names_bad_input():
    with pytest.raises(InputError, match="1 of 3 feature vectors are 0"):
        vendi(np.array([[1.0, 0], [0, 0], [0, 1]]))
    with pytest.raises(InputError, match="1 of 2 feature vectors hold NaN"):
        vendi(np.array([[1.0, 0], [np.nan, 0]]))


def alike(height, width):
    """Two smooth pictures, three times, that resemble each other."""
    x, y = (torch.rand(3, 1, height, width, generator=torch.Generator().manual_seed(i))
            for i in range(2))
    x = F.avg_pool2d(x, 9, 1, 4)
    return x, (x + 0.3 * F.avg_pool2d(y, 5, 1, 2)).clamp(0, 1)


def test_similarity_equals_pytorch_msssim():
    peer = pytest.importorskip("pytorch_msssim")
    x, y = (f.double() for f in alike(176, 192))
    theirs = peer.ms_ssim(x, y, data_range=1, size_average=False)
    assert similarity(x, y).tolist() == pytest.approx(theirs.tolist(), abs=1e-6)


def test_small_and_odd_pictures_by_windows_written_out():
    """At 87 × 70 px there are three scales; the last line of an odd side is left out."""
    x, y = alike(87, 70)
    g = np.exp(-np.arange(-5, 6) ** 2 / 4.5)
    g = np.outer(g, g) / g.sum() ** 2
    a, b, value = x[0, 0].double().numpy(), y[0, 0].double().numpy(), 1.0
    for level, weight in enumerate((0.0448, 0.2856, 0.3001)):
        terms = []
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                m, n = (g * p).sum(), (g * q).sum()
                terms.append((2 * (g * (p - m) * (q - n)).sum()
                              + 9e-4) / ((g * ((p - m) ** 2 + (q - n) ** 2)).sum() + 9e-4))
                if level == 2:
                    terms[-1] *= (2 * m * n + 1e-4) / (m * m + n * n + 1e-4)
        value *= np.mean(terms) ** (weight * 1.0001 / 0.6305)
        h, w = a.shape[0] // 2, a.shape[1] // 2
        a, b = (f[:2 * h, :2 * w].reshape(h, 2, w, 2).mean((1, 3)) for f in (a, b))
    assert scales(87, 70) == 3 and similarity(x, y)[0].item() == pytest.approx(value, abs=1e-5)


def test_similarity_is_near_torchmetrics():
    """torchmetrics lets the window of the coarsest scale reach over the border, mirrored: equal but
    for that.
    """
    torchvision()
    peer = pytest.importorskip("torchmetrics.functional.image", exc_type=ImportError)
    x = pictures(0, 4, 256, 1) / 255
    y = (x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    measure = peer.multiscale_structural_similarity_index_measure
    theirs = [measure(a[None], b[None], data_range=1.0).item() for a, b in zip(x, y)]
    assert similarity(x, y).tolist() == pytest.approx(theirs, abs=2e-3)


def test_similarity_of_constant_pictures_is_the_luminance_alone():
    """Contrast · structure is C2/C2 = 1 there, luminance (2ab + C1)/(a² + b² + C1) to the power of
    the coarsest weight.
    """
    a, b = 0.3, 0.8
    x, y = (torch.full((1, 1, 64, 64), v, dtype=torch.float64) for v in (a, b))
    w = diversity.WEIGHTS
    luminance = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert similarity(x, y).item() == pytest.approx(luminance ** (w[2] * sum(w) / sum(w[:3])),
                                                    rel=1e-9)
    assert similarity(x, x).item() == pytest.approx(1)
    # opposite structure
    assert similarity(x + 0.1 * torch.eye(64), x - 0.1 * torch.eye(64)).item() < 0.8


def test_the_number_of_scales():
    sides = (512, 176, 175, 88, 87, 64, 44, 43, 32, 22, 21, 11)
    assert [scales(s, 512) for s in sides] == [5, 5, 4, 4, 3, 3, 3, 2, 2, 2, 1, 1]
    assert scales(300, 64) == 3
    with pytest.raises(InputError, match="at least 11 px; these are 10 × 64"):
        scales(10, 64)


def test_ms_ssim_is_the_mean_over_all_pairs_where_they_are_few(monkeypatch):
    monkeypatch.setattr(diversity, "BATCH", 3 * 48 * 48)   # several batches
    x = pictures(0, 6, 48)
    grey = x[:, :1] / 255
    hand = np.mean([similarity(grey[i:i + 1], grey[j:j + 1]).item() for i in range(6)
                    for j in range(i)])
    assert ms_ssim(x) == pytest.approx(hand, rel=1e-5)
    assert ms_ssim(x, seed=4) == pytest.approx(hand, rel=1e-5)
    assert ms_ssim(x, pairs=4) == ms_ssim(x, pairs=4) != ms_ssim(x, pairs=4, seed=1)


@pytest.mark.parametrize("n", [2, 5, 60, 5000])
def test_pairs_are_unordered_of_different_images_and_none_twice(n):
    i, j = diversity._pairs(n, 1000, 0, np.arange(n))
    assert len(i) == min(1000, n * (n - 1) // 2) == len(set(zip(i.tolist(), j.tolist())))
    assert (j >= 0).all() and (j < i).all() and (i < n).all()
    if n > 50:
        assert np.mean(np.concatenate([i, j])) == pytest.approx((n - 1) / 2, rel=0.1)


def test_images_of_one_patient_make_no_pair():
    x = pictures(0, 8, 32)
    x = torch.cat([x, x])
    patients = list(range(8)) * 2
    assert ms_ssim(x, patients=patients) == pytest.approx(ms_ssim(x[:8]), abs=1e-6)
    assert ms_ssim(x) > ms_ssim(x[:8]) + 0.02
    with pytest.raises(InputError, match="pair of images of different patients; there are 2"):
        ms_ssim(x[:2], patients=["a", "a"])
    with pytest.raises(InputError, match="there are 1"):
        ms_ssim(x[:1])


def test_collapse_raises_ms_ssim():
    x = pictures(0, 40, 64)
    assert ms_ssim(x[:3].repeat(13, 1, 1, 1)) > ms_ssim(x) + 0.2
    assert ms_ssim(x[:1].repeat(9, 1, 1, 1)) == pytest.approx(1)
