import pytest
import torch

from benchmarks.memory import Held
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import (
    PixelPCA,
    PredictorFeatures,
    VAEFeatures,
    digest,
    filled,
    grey,
    pca_psnr,
    principal,
    psnr,
)


def images(n, side=40, rank=5, seed=0):
    """Images that are sums of a few fixed pictures."""
    g = torch.Generator().manual_seed(7)
    basis = torch.rand(rank, 1, side, side, generator=g)
    weights = torch.rand(n, rank, generator=torch.Generator().manual_seed(seed))
    x = torch.einsum("nr,rchw->nchw", weights / rank, basis)
    return (255 * x).round().to(torch.uint8).expand(n, 3, side, side)


def test_grey_is_the_mean_over_channels_and_areas():
    x = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    x[:, :, :2, :2] = torch.tensor([30, 60, 90]).view(3, 1, 1)
    assert torch.allclose(grey(x, 2), torch.tensor([[[60 / 255, 0], [0, 0]]]))
    assert grey(x).shape == (1, 4, 4) and grey(x, 8).shape == (1, 8, 8)


@pytest.mark.parametrize("n,d", [(12, 30), (50, 20)])
def test_principal_axes_are_those_of_the_svd(n, d):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).double()
    mean, axes = principal(x, 6)
    v = torch.linalg.svd(x - x.mean(0)).Vh[:6].T
    assert torch.allclose(axes.T @ axes, torch.eye(6).double(), atol=1e-10)
    assert torch.allclose((axes * v).sum(0).abs(), torch.ones(6).double(), atol=1e-8)


def test_many_images_take_one_small_grey_picture_each(monkeypatch):
    """float32 of 16 × 16 px, 1 kB, and 8 coordinates; all else is of one block of rows."""
    monkeypatch.setattr("minidiff.evaluation.features.extractor.SIDE", 16)
    whole, most = PixelPCA(4).fit(images(1000)), []
    monkeypatch.setattr("minidiff.evaluation.features.extractor.ROWS", 64)
    for n in (600, 1000):
        x = images(n)
        with Held() as held:
            assert len(x[:1]) == 1  # what is there counts as held from now on
            held.peak = before = held.now
            extractor = PixelPCA(4).fit(x)
        most.append(held.peak - before)
    assert (most[1] - most[0]) / 400 < 1300
    torch.testing.assert_close(extractor.mean, whole.mean)
    torch.testing.assert_close(extractor(x).norm(dim=1), whole(x).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_pixel_pca():
    extractor = PixelPCA().fit(images(200))
    features = extractor(images(50, seed=1))
    assert features.shape == (50, 64) and features.dtype == torch.float32
    train = extractor(images(200))
    assert train.mean(0).abs().max() < 1e-3 and train.var(0).mean() == pytest.approx(1, rel=1e-3)
    # batch size plays no part
    assert torch.allclose(extractor(images(50, seed=1)[3:9]), features[3:9], atol=1e-5)
    assert PixelPCA().fit(images(10))(images(3)).shape == (3, 9)
    with pytest.raises(InputError, match="at least 2"):
        PixelPCA().fit(images(1))


def test_pixel_pca_does_not_depend_on_brightness_scale():
    half = lambda x: (x / 2).round().to(torch.uint8)  # noqa: E731
    a, b = PixelPCA(k=4).fit(images(100)), PixelPCA(k=4).fit(half(images(100)))
    assert torch.allclose(a(images(20, seed=2)).abs(), b(half(images(20, seed=2))).abs(), atol=0.15)


def test_psnr_closed_forms():
    x = torch.full((2, 8, 8), 0.5)
    assert psnr(x, x + 0.1) == pytest.approx([20.0, 20.0], abs=1e-4)
    # rank 5 and rounding: kept by 6 axes
    assert pca_psnr(images(100), images(20, seed=3), k=6) > 50
    noise = torch.randint(0, 256, (60, 1, 16, 16), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    assert pca_psnr(noise[:40], noise[40:], k=8) < 13                   # white noise has no axes
    assert pca_psnr(images(100), images(20), k=6, limit=50) > 40


def test_predictor_features_pass_through():
    class Fake:
        def features(self, x):
            return x.float().mean((2, 3))

    extractor = PredictorFeatures(Fake())
    assert extractor.name == "classifier" and extractor(images(4)).shape == (4, 3)


def test_digest_sees_name_type_shape_bytes_and_facts():
    x = torch.arange(6.0)
    sums = [digest(*given, **facts) for given, facts in (
        (({"a": x},), {}), (({"b": x},), {}), (({"a": x.view(2, 3)},), {}),
        (({"a": x.view(torch.int32)},), {}),
        (({"a": x + 1},), {}), (({"a": x},), {"side": 32}), (({"a": x, "b": x},), {}), (({},), {}))]
    assert len(set(sums)) == len(sums) and all(len(s) == 64 for s in sums)
    # order, layout: no
    assert digest({"b": x, "a": x.view(2, 3).T.contiguous().T.flatten()}) == digest({"a": x,
                                                                                     "b": x})


def test_identity_is_of_what_was_fitted():
    fitted = [PixelPCA(k=k).fit(images(n)) for n, k in ((30, 64), (30, 64), (31, 64), (30, 3))]
    assert fitted[0].identity == fitted[1].identity and len({e.identity for e in fitted}) == 3


def test_identity_of_the_classifier_is_of_its_weights():
    from minidiff.classification.predictor import Predictor
    from minidiff.variables import Category

    made = [Predictor([Category("label", ("a", "b"))], width=8, size=32, seed=seed)
            for seed in (0, 0, 1)]
    found = [PredictorFeatures(p).identity for p in made]
    assert found[0] == found[1] != found[2]


def test_vae_features_are_the_latent_means():
    from minidiff.diffusion.vae import TINY, VAE

    vae, x = VAE(TINY), images(3, side=32)
    extractor = VAEFeatures(vae)
    features = extractor(x)
    with torch.no_grad():
        means = vae.encode(x.float() / 127.5 - 1).mean
    assert features.shape == (3, 256) and torch.equal(
        features, means.flatten(1)) and len(extractor.identity) == 64


def test_a_batch_is_filled_up_with_its_last_entry():
    x = torch.arange(6).view(3, 2)
    assert filled(x, 5).tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]] and filled(x, 3) is x
