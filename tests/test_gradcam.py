"""Grad-CAM: the closed form of the last layer, the definition elsewhere, a planted blob, and that
it leaves no trace.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidiff import variables as var
from minidiff.classification.gradcam import gradcam, layer_of, overlay
from minidiff.classification.predictor import Predictor, fit, prepare

LABEL = var.Category("label", ("left", "right", "none"))


@pytest.fixture(scope="module")
def blobs():
    """32 px of noise with a blob at the left, at the right, or none; and a predictor that has
    learned them.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 120, (240, 1, 32, 32)).astype(np.uint8)
    labels = torch.arange(240) % 3
    for picture, label in zip(pixels, labels.tolist()):
        if label < 2:
            top, left = rng.integers(4, 20), rng.integers(2, 6) + 16 * label
            picture[0, top : top + 8, left : left + 8] += 100
    predictor = Predictor([LABEL, var.Number("age", 50.0, 10.0, 20.0, 80.0)], width=8, size=32)
    pixels = torch.from_numpy(pixels)
    fit(predictor, pixels[:180], {"label": labels[:180], "age": torch.full((180,), 50.0)}, steps=60,
        batch=32)
    return predictor, pixels[180:], labels[180:]


def untrained(size=64):
    predictor = Predictor([LABEL], width=8, size=size, seed=1)
    for m in predictor.modules():  # statistics that are not 0 and 1
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.fill_(0.1), m.running_var.fill_(0.7)
    return predictor, torch.from_numpy(
        np.random.default_rng(1).integers(0, 255, (3, 1, size, size)).astype(np.uint8))


def activations(predictor, images, layer):
    kept = []
    hook = getattr(predictor.net, layer).register_forward_hook(lambda m, i,
                                                               o: kept.append(o.detach()))
    predictor.predict(images)
    hook.remove()
    return kept[0]


def scaled(maps, size):
    heat = F.interpolate(maps[:, None].float(), (size, size), mode="bilinear")[:, 0]
    return (heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)).numpy()


def test_at_the_last_layer_it_is_the_weights_of_fc():
    """Zhou et al. 2016: with a mean over places and one linear layer, Grad-CAM is CAM."""
    predictor, images = untrained()
    maps, warm = activations(predictor, images, "layer4"), 0
    for target in range(3):
        wanted = F.relu(torch.einsum("k,nkhw->nhw", predictor.net.fc.weight[target].detach(), maps))
        np.testing.assert_allclose(gradcam(predictor, images, target, layer="layer4"),
                                   scaled(wanted, 64), atol=1e-5)
        warm += int((wanted.amax((1, 2)) > 0).sum())
    assert warm >= 3


def test_elsewhere_the_weight_of_a_channel_is_the_slope_when_all_its_places_rise_together():
    """Eq. 1 by finite differences in float64, without autograd."""
    predictor, images = untrained()
    maps = activations(predictor, images, "layer2").double()
    double = copy.deepcopy(predictor).double()

    def rest(h):
        for layer in ("layer3", "layer4"):
            h = getattr(double.net, layer)(h)
        return double.net.fc(h.mean((2, 3)))

    with torch.no_grad():
        # one channel, everywhere
        rise = 1e-6 * torch.eye(maps.shape[1], dtype=torch.float64)[:, None, :, None, None]
        # (channels, images, answers)
        weights = torch.stack([rest(maps + e) - rest(maps - e) for e in rise])
    warm = 0
    for target in range(3):
        wanted = F.relu(torch.einsum("kn,nkhw->nhw", weights[:, :, target], maps))
        np.testing.assert_allclose(gradcam(predictor, images, target), scaled(wanted, 64),
                                   atol=1e-3)
        warm += int((wanted.amax((1, 2)) > 0).sum())
    assert warm >= 3


def test_the_warmest_place_is_the_blob(blobs):
    predictor, images, labels = blobs
    assert (predictor.predict(images)["label"].argmax(1) == labels).float().mean() > 0.9
    side = labels < 2
    heat = gradcam(predictor, images[side], labels[side])
    assert heat.shape == (40, 32, 32) and heat.dtype == np.float32 and heat.min() >= 0
    np.testing.assert_allclose(heat.max((1, 2)), 1, atol=1e-6)
    column = heat.reshape(40, -1).argmax(1) % 32
    assert ((column >= 16) == (labels[side] == 1).numpy()).mean() > 0.9
    bright = F.avg_pool2d(images[side, 0].float(), 5, 1, 2).numpy() > 150
    inside = np.mean([h[b].mean() for h, b in zip(heat, bright)])
    assert inside > 3 * np.mean([h[~b].mean() for h, b in zip(heat, bright)])


def test_another_answer_and_other_weights_give_another_map(blobs):
    """Sanity checks of Adebayo et al. 2018: a map that stayed the same would show edges, not
    reasons.
    """
    predictor, images, labels = blobs
    left = images[labels == 0]
    wanted = gradcam(predictor, left, 0)
    fresh = Predictor(predictor.variables, width=8, size=32, seed=5)
    for other in (gradcam(predictor, left, 1), gradcam(fresh, left, 0)):
        r = [np.corrcoef(a.ravel(), b.ravel())[0, 1] if b.std() > 0
             else 0.0 for a, b in zip(wanted, other)]
        assert np.mean(r) < 0.6


def test_an_image_has_its_map_whatever_is_beside_it_and_nothing_is_left_behind(blobs):
    predictor, images, _ = blobs
    before = {name: x.clone() for name, x in predictor.state_dict().items()}
    predictor.train()
    together = gradcam(predictor, images[:8], [0, 1, 2, 0, 1, 2, 0, 1])
    assert predictor.training
    predictor.eval()
    np.testing.assert_allclose(gradcam(predictor, images[:8], [0, 1, 2, 0, 1, 2, 0, 1], batch=3),
                               together, atol=1e-5)
    np.testing.assert_allclose(gradcam(predictor, images[4:5].expand(-1, 3, -1, -1), 1)[0],
                               together[4], atol=1e-5)
    with torch.no_grad():
        np.testing.assert_array_equal(gradcam(predictor, images[:8], 0),
                                      gradcam(predictor, images[:8], 0))
    assert all(torch.equal(x, before[name]) for name, x in predictor.state_dict().items())
    assert all(p.grad is None for p in predictor.parameters())
    assert not any(m._forward_hooks for m in predictor.modules())


def test_the_map_has_the_size_of_the_images_and_a_number_has_one_too(blobs):
    predictor, images, _ = blobs
    assert gradcam(predictor, F.interpolate(images[:2].float(), (48, 48)).to(torch.uint8),
                   0).shape == (2, 48, 48)
    assert gradcam(predictor, images[:2], 0, variable="age").shape == (2, 32, 32)
    assert prepare(images[:2], 32).shape == (2, 1, 32, 32)


def test_where_nothing_speaks_for_the_answer_the_map_is_cold():
    predictor, images = untrained()
    with torch.no_grad():
        predictor.net.fc.weight[0] = -1.0
    assert (gradcam(predictor, images, 0, layer="layer4") == 0).all()


@pytest.mark.parametrize("size, layer", [(32, "layer1"), (64, "layer2"), (96, "layer2"),
                                         (128, "layer3"), (224, "layer4")])
def test_the_layer_is_the_deepest_with_seven_places_a_side(size, layer):
    predictor, images = untrained(size)
    assert layer_of(predictor) == layer
    assert min(activations(predictor, images, layer).shape[2:]) >= 7


def test_an_overlay_leaves_cold_places_as_they_are(blobs):
    _, images, _ = blobs
    heat = np.zeros((2, 32, 32), np.float32)
    heat[:, 5, 6] = 1
    shown = overlay(images[:2], heat)
    assert shown.shape == (2, 32, 32, 3) and shown.dtype == np.uint8
    cold = heat == 0
    for channel in range(3):
        np.testing.assert_array_equal(shown[..., channel][cold], images[:2, 0].numpy()[cold])
    red, _, blue = shown[0, 5, 6].astype(int)
    assert red > blue + 40  # warm
