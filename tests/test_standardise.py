"""standardise: what each way is said to take away, it takes away exactly."""

import numpy as np
import pytest
import torch

from minidiff.data.standardise import (
    MARGIN,
    check,
    equalise,
    local,
    onto_lungs,
    plausible,
    standardised,
)
from minidiff.errors import InputError

SIDE = 64


def pictures(n=4, top=100, side=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, top, (n, 1, side, side), generator=g, dtype=torch.uint8)


def test_ranks_are_blind_to_every_rising_map():
    x, g = pictures(), torch.Generator().manual_seed(1)
    for _ in range(5):  # 100 greys to any 100 of 256, in their order; and to their squares
        rising = torch.randperm(256, generator=g)[:100].sort().values.to(torch.uint8)
        assert torch.equal(equalise(rising[x.long()]), equalise(x))
    assert not torch.equal(equalise(255 - x), equalise(x))


def test_ranks_are_mid_ranks():
    x = torch.tensor([7, 7, 9, 200], dtype=torch.uint8).view(1, 1, 2, 2)
    assert equalise(x).flatten().tolist() == [64, 64, 159, 223]  # 255 × (1, 1, 2.5, 3.5) / 4
    x = torch.arange(255, -1, -1, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (equalise(x).int() - x.int()).abs().max() <= 1


def test_local_contrast_is_blind_to_gain_and_offset_and_nearly_to_shading():
    x = pictures()
    for gain, offset in ((2, 0), (1, 90), (2, 55)):
        assert (local(gain * x + offset).int() - local(x).int()).abs().max() <= 1  # of rounding
    shaded = (x.float() + torch.linspace(0, 150, x.shape[-1])).round().to(torch.uint8)
    assert (local(shaded).float() - local(x).float()).abs().mean() < 4
    assert (shaded.float() - x.float()).abs().mean() > 70


def test_a_constant_picture_has_no_contrast():
    assert (local(torch.full((1, 1, 32, 32), 9, dtype=torch.uint8)) == 128).all()


def two_lungs(top=10, bottom=50, left=(10, 26), right=(38, 54)):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, slice(*left)] = mask[top:bottom, slice(*right)] = True
    return mask


def test_the_box_round_the_lungs_fills_the_picture():
    ramp = torch.arange(SIDE, dtype=torch.uint8).expand(1, 1, SIDE, SIDE).contiguous()
    mask = torch.from_numpy(two_lungs())[None]
    out = onto_lungs(ramp, mask, torch.tensor([True]), outside=True).float()
    low, high = 10 / SIDE - MARGIN, 54 / SIDE + MARGIN
    place = (torch.arange(SIDE) + 0.5) / SIDE
    assert (out[0, 0] - ((low + (high - low) * place) * SIDE - 0.5)).abs().max() <= 0.51
    assert torch.equal(onto_lungs(ramp, mask, torch.tensor([False]), outside=True), ramp)


def test_masked_is_black_outside_the_lungs_and_as_it_was_within():
    white = torch.full((2, 1, SIDE, SIDE), 200, dtype=torch.uint8)
    masks = torch.from_numpy(np.stack([two_lungs(), np.zeros((SIDE, SIDE), bool)]))
    out = standardised(white, ["masked"], lambda x: (masks, torch.tensor([True, False])))
    assert out[0, 0, 32, 32] == 0 and out[0, 0, 32, 12] == 200 and (out[1] == 200).all()
    assert 0.5 < (out[0] == 200).float().mean() < 0.9


def test_what_may_be_lungs():
    found = plausible(two_lungs())
    assert found.sum() == two_lungs().sum()
    specks = two_lungs()
    specks[60, 60] = True
    assert not plausible(specks)[60, 60] and plausible(specks).sum() == two_lungs().sum()


@pytest.mark.parametrize("mask", [
    np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool),
    two_lungs(left=(10, 26), right=(30, 32)),              # one far smaller
    two_lungs(bottom=13),                                  # both too small
    two_lungs(left=(2, 20), right=(21, 22)),
    two_lungs().T,                                         # one above the other
    two_lungs() | (np.mgrid[:SIDE, :SIDE][0] == 30)],      # grown together
    ids=["none", "all", "small", "flat", "thin", "above", "one"])
def test_what_cannot_be_lungs(mask):
    assert plausible(mask) is None


@pytest.mark.parametrize("names, said", [
    (("sharpen",), "--standardise sharpen; allowed are equalise, local, lungs, masked"),
    (("local", "local"), "each once"), (("local", "lungs"), "lungs or masked first"),
    (("lungs", "masked"), "lungs or masked first")])
def test_what_cannot_work_is_refused_by_name(names, said):
    with pytest.raises(InputError, match=said):
        check(names)
    check(("masked", "equalise", "local"))
