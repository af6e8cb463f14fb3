"""lungs: what is drawn is found, whatever the film did; and a network comes back as it was."""

import json

import pytest
import torch

from minidiff.classification import lungs
from minidiff.classification.lungs import LungNet, dice, drawn, fit, kept_whole, look, randomise
from minidiff.counted import AUGMENT, generators
from minidiff.errors import InputError
from minidiff.pixels import to_float


@pytest.fixture(scope="module")
def phantoms():
    return drawn(24, 5)


def test_dice_is_its_formula():
    a, b = torch.zeros(3, 8, 8, dtype=torch.bool), torch.zeros(3, 8, 8, dtype=torch.bool)
    a[0, :4], b[0, 2:6], a[1], b[1] = True, True, True, True
    assert dice(a, b).tolist() == [0.5, 1, 0]


def test_a_drawing_is_varied_by_its_own_numbers_and_its_mask_goes_with_it(phantoms):
    x, masks = to_float(phantoms[0]), phantoms[1]
    whole, moved = randomise(x, masks, generators(3, range(24), AUGMENT))
    one, own = randomise(x[5:6], masks[5:6], generators(3, [5], AUGMENT))
    assert torch.allclose(one[0], whole[5], atol=1e-5) and torch.equal(own[0], moved[5])
    assert whole.abs().max() <= 1 and (dice(moved, masks) < 0.9).float().mean() > 0.5
    # where the picture is its own mask, lungs stay the brighter part under their moved mask
    shown, under = randomise(2 * masks[:, None].float() - 1, masks,
                             generators(4, range(24), AUGMENT))
    brighter = [(a[0][m].mean() > a[0][~m].mean()).item() for a, m in zip(shown, under)]
    assert sum(brighter) >= 22


def test_the_network_sees_ranks_at_its_own_size(phantoms):
    big = phantoms[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    seen = look(big.expand(-1, 3, -1, -1))
    assert seen.shape == (24, 1, 64, 64) and (seen - look(phantoms[0])).abs().mean() < 0.05
    assert torch.equal(look((big // 2)[:, :, ::2, ::2] * 2), look((big // 2)[:, :, ::2, ::2]))


def test_equal_trainings_are_equal_and_it_comes_back_from_disk(phantoms, tmp_path):
    nets, before = [LungNet(0), LungNet(0)], torch.get_rng_state()
    for net in nets:
        fit(net, *phantoms, steps=3, batch=4, lr=3e-3, seed=0, progress="")
    a, b = (net.state_dict() for net in nets)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(torch.get_rng_state(), before)
    nets[0].save(tmp_path)
    again = LungNet.load(tmp_path)
    assert torch.equal(again(look(phantoms[0])), nets[0](look(phantoms[0])))
    masks, found = again.find(phantoms[0])
    assert masks.shape == (24, 64, 64) and not masks[~found].any()
    note, = kept_whole(again, {"new": phantoms[0]})
    assert f"{int(found.sum())} of 24 images of new" in note and kept_whole(None, {}) == []


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(InputError, match="has no lungs .*classify.py lungs --out"):
        LungNet.load(tmp_path)
    (tmp_path / lungs.FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match="has no lungs"):
        LungNet.load(tmp_path)


@pytest.mark.slow
def test_lungs_of_fresh_phantoms_are_found(tmp_path):
    cfg = lungs.Config(out=str(tmp_path / "lungs"), n=400, steps=160, device="cpu")
    lungs.train_lungs(cfg)
    found = json.loads((tmp_path / "lungs/dice.json").read_text())
    assert found["drawn"]["dice"] > 0.9 and found["drawn"]["plausible"] > 180
    assert found["varied"]["dice"] > 0.75
    lungs.train_lungs(cfg)  # finished: nothing is trained again
