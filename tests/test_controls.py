"""The frauds are what they are said to be, and texture has a space in which blur and noise cannot
hide.
"""

import math

import numpy as np
import pytest
import torch

from minidiff.data import phantom
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import Spectrum, log_power
from minidiff.evaluation.matrix.controls import (
    CONTROLS,
    LEFT,
    blurred,
    collapsed,
    copycat,
    near_copy,
    noisy,
)
from minidiff.evaluation.metrics.copying import memorisation
from minidiff.evaluation.metrics.distances import fid, kid
from minidiff.evaluation.metrics.neighbours import prdc
from minidiff.evaluation.metrics.pairwise import pixel_spaces


@pytest.fixture(scope="module")
def images():
    """96 phantoms of 32 px: grey, one channel expanded to three."""
    drawn = [torch.from_numpy(phantom.phantom(5, i, 32, label="normal").image) for i in range(96)]
    return torch.stack(drawn)[:, None].expand(-1, 3, -1, -1)


def rng(seed=0):
    return np.random.default_rng(seed)


def contents(x):
    return {image.numpy().tobytes() for image in x}


@pytest.mark.parametrize("make", [c.make for c in CONTROLS.values() if c.make])
def test_every_control_is_uint8_grey_and_repeatable(images, make):
    made = make(images[:40], 30, rng())
    assert made.dtype == torch.uint8 and made.shape == (30, 3, 32, 32)
    assert torch.equal(made[:, 0], made[:, 1]) and torch.equal(made[:, 0], made[:, 2])
    assert torch.equal(made, make(images[:40], 30,
                                  rng())) and not torch.equal(made, make(images[:40], 30, rng(1)))


def test_copies_and_collapse_hold_training_images_only(images):
    known = contents(images)
    copies, few = copycat(images, 500, rng()), collapsed(images, 50, rng())
    # a bootstrap repeats some
    assert contents(copies) < known and len(copies) == 96 and len(contents(copies)) < 96
    assert contents(few) < known and len(contents(few)) == LEFT and len(few) == 50


@pytest.mark.parametrize("seed", range(5))
def test_a_copied_training_set_has_a_better_distance_to_it_than_new_patients_have(seed):
    train, new = torch.from_numpy(rng(seed).standard_normal((2, 400, 8)))
    # one draw lies between them, and not two
    copied = copycat(train, 400, rng(seed))
    assert fid(real=train.numpy(), fake=copied.numpy()) < 0.8 * fid(real=train.numpy(),
                                                                    fake=new.numpy())


def test_near_copies_are_no_copies_and_are_found_nevertheless(images):
    train, held = images[:60], images[60:]
    made = near_copy(train, 36, rng())
    assert not contents(made) & contents(train)
    real = pixel_spaces(train)
    assert memorisation(fake=pixel_spaces(made), train=real,
                        heldout=pixel_spaces(held))["suspected"] is True
    assert memorisation(fake=pixel_spaces(held[:18].repeat(2, 1, 1, 1)), train=real,
                        heldout=pixel_spaces(held[18:].repeat(2, 1, 1, 1)))["suspected"] is not True


def test_noise_has_the_size_that_is_asked_for_and_blur_the_width():
    flat = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    assert noisy(flat, 4, rng(), sigma=0.05).float().std().item() == pytest.approx(0.05 * 255,
                                                                                   rel=0.02)
    point = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    point[..., 16, 16] = 255
    assert blurred(point, 1, rng(),
                   sigma=1.0)[0, 0, 16, 16].item() == pytest.approx(255 / (2 * math.pi), abs=1.5)


def test_a_wave_lies_in_the_ring_of_its_frequency():
    x = torch.arange(64) / 64
    for cycles in (4, 10, 25):
        wave = (128 + 60 * torch.sin(2 * math.pi * cycles * x)).round().byte().expand(1, 3, 64, 64)
        power = log_power(wave, rings=31)[0]
        # rings start at 1 cycle a side, one cycle wide
        assert power.argmax().item() == cycles - 1


@pytest.mark.parametrize("make, levels",
                         [(blurred, (0.4, 0.8, 1.6, 3.2)), (noisy, (0.02, 0.05, 0.1, 0.2))])
def test_kd_in_the_spectrum_rises_with_blur_and_with_noise(images, make, levels):
    train, held = images[:60], images[60:]
    space = Spectrum().fit(train)
    real = space(held).double().numpy()
    sets = [train, *(make(train, 60, rng(), level) for level in levels)]
    distances = [kid(real=real, fake=space(x).double().numpy()) for x in sets]
    assert distances == sorted(distances) and distances[1] > distances[0] + 0.1


def test_the_spectrum_is_of_its_own_form(images):
    space = Spectrum().fit(images)
    features = space(images)
    assert features.dtype == torch.float32 and features.shape == (96, 15) and features.mean(
        0).abs().max() < 0.2
    assert space.identity == Spectrum().fit(images).identity != Spectrum().fit(images[:50]).identity
    assert torch.equal(space(images[:7]), features[:7])
    with pytest.raises(InputError, match="at least 2 images, and there is 1"):
        Spectrum().fit(images[:1])


@pytest.mark.parametrize("n", [300])
def test_coverage_after_a_collapse_is_below_a_fifth(n):
    x = rng().standard_normal((2 * n, 16))
    few = np.tile(x[n : n + LEFT], (n // LEFT, 1))
    assert prdc(real=x[:n], fake=few).coverage < 0.2 < 0.9 < prdc(real=x[:n], fake=x[n:]).coverage
