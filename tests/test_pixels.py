"""pixels: several tensors read as one give what their copy gives, and hold none of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from study_data import toy

from benchmarks.memory import Held
from minidiff import pixels
from minidiff.classification import shortcuts
from minidiff.classification.arms import Images, parse, training_set
from minidiff.classification.predictor import Predictor, fit
from minidiff.classification.study import fingerprint
from minidiff.pixels import Gathered, each, is_grey, scratch, to_grey
from minidiff.variables import Category

TARGET = Category("label", ("dark", "light", "striped"))


def drawn(n, channels, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(
        0, 256, (n, channels, 6, 5), np.uint8))


GREY, COLOUR, ONE = drawn(5, 1).expand(-1, 3, -1, -1), drawn(4, 3, 1), drawn(3, 1, 2)


@pytest.mark.parametrize("parts", [(GREY,), (ONE, ONE), (GREY, ONE), (GREY, COLOUR, GREY[:0], ONE)])
def test_what_is_gathered_equals_the_copy(parts):
    channels = max(part.shape[1] for part in parts)
    whole = torch.cat([part.expand(-1, channels, -1, -1) for part in parts])
    index = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist() * 2
    for found, copy in ((Gathered(*parts), whole),
                        (Gathered(*parts, index=index), whole[index]),
                        (Gathered(Gathered(*parts, index=index), *parts, index=index[:7]),
                         torch.cat([whole[index], whole])[index[:7]])):
        assert found.shape == copy.shape and len(found) == len(copy)
        assert torch.equal(found[:], copy) and torch.equal(found[2:5], copy[2:5])
        assert torch.equal(found[[3, -1, 3]], copy[[3, -1, 3]]) and torch.equal(found[1], copy[1])
        chosen = torch.arange(len(copy)) % 2 == 0
        assert torch.equal(found[chosen], copy[chosen])
        assert [*map(len, found.split(4))] == [*map(len, copy.split(4))]
        assert torch.equal(torch.cat([*found.split(4)]), copy)
        assert torch.equal(torch.stack([*each(found)]), copy)
        assert is_grey(found[:2]) is all(part is not COLOUR for part in parts)
        assert torch.equal(to_grey(found[:]), to_grey(copy))
        with pytest.raises(IndexError):
            found[len(copy)]
    assert [*Gathered(GREY, index=[]).split(4)][0].shape == (0, 3, 6, 5)


def copied(images: Images) -> Images:
    """The same pictures as a tensor of their own."""
    return replace(images, pixels=images.pixels[:].contiguous())


def used(name: str, n: int, of=lambda images: images) -> tuple[list, int, int]:
    """What an arm of n images of its scarcest label trains and predicts, the most bytes that this
    holds, and the bytes of its pixels."""
    real, made = toy((3 * n, n, 4 * n), 1), toy((n, n, n), 2)
    with Held() as held:
        # what is there counts as held from now on
        assert len(real.pixels[:1]) == len(made.pixels[:1]) == 1
        held.peak = before = held.now
        found, size = [], 0
        for images in map(of, training_set(parse(name, ["synthetic"]), real, {"synthetic": made},
                                           positive="light", seed=0)):
            net = Predictor([TARGET], width=8, size=32)
            fit(net, images.pixels, {"label": images.labels}, steps=1, batch=32)
            found += [fingerprint(images), net.logits(images.pixels, 32)["label"].tolist()]
            size += math.prod(images.pixels.shape)
    return found, held.peak - before, size


@pytest.mark.parametrize("name", ["real@9+1xsynthetic", "synthetic-then-real@9"])
def test_an_arm_trains_as_its_copy_would_and_holds_no_pixels(name):
    few, many = used(name, 9), used(name, 40)
    grown = (many[1] - few[1]) / (many[2] - few[2])
    assert grown < 0.1  # labels, places and logits: 40 bytes beside 1024 of pixels
    assert used(name, 9, copied)[0] == few[0]


def test_scratch_is_a_file_where_it_is_large_and_black_either_way(monkeypatch):
    x = torch.randint(0, 256, (7, 3, 20, 20), dtype=torch.uint8)
    there = shortcuts.without_lungs(x, None)
    monkeypatch.setattr(pixels, "SCRATCH", 0)
    assert isinstance(scratch((3, 2)), np.memmap) and not scratch((3, 2)).any()
    assert torch.equal(shortcuts.without_lungs(Gathered(x), None), there)
    assert torch.equal(there[:, 0, :2], to_grey(x)[:, 0, :2]) and not there[:, 0, 5, 5].any()
