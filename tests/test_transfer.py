"""transfer: a classifier begins where another one ended, or at torchvision's weights."""

import pytest
import safetensors.torch
import torch

from minidiff.classification.predictor import Predictor
from minidiff.classification.transfer import begin
from minidiff.errors import InputError
from minidiff.variables import Category

LABEL = Category("label", ("a", "b", "c"))
X = torch.randint(0, 256, (4, 1, 64, 64),
                  generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def predictor(width, seed, values=LABEL.values):
    return Predictor([Category("label", values)], width=width, size=64, seed=seed)


@pytest.mark.parametrize("form", ["pth", "wrapped.pth", "safetensors"])
def test_a_torchvision_file_of_three_channels_and_a_thousand_classes(tmp_path, form):
    theirs = predictor(64, 1).net.state_dict()
    state = {**theirs, "conv1.weight": (theirs["conv1.weight"] / 3).repeat(1, 3, 1, 1),
             "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    path = tmp_path / f"resnet18.{form}"
    if form == "safetensors":
        safetensors.torch.save_file({k: x.contiguous() for k, x in state.items()}, path)
    else:
        torch.save({"state_dict": state} if "wrapped" in form else state, path)
    ours = predictor(64, 2)
    before = ours.net.fc.weight.clone()
    assert begin(ours, path) == ["fc.weight", "fc.bias"] and torch.equal(ours.net.fc.weight, before)
    assert (ours.features(X) - predictor(64, 1).features(X)).abs().max() < 1e-4


def test_another_predictor_with_the_same_labels_and_with_others(tmp_path):
    theirs = predictor(8, 1)
    theirs.save(tmp_path)
    ours, other = predictor(8, 2), predictor(8, 2, ("x", "y"))
    assert begin(ours, tmp_path) == [] and torch.equal(ours.logits(X)["label"],
                                                       theirs.logits(X)["label"])
    assert begin(other, tmp_path) == ["fc.weight", "fc.bias"] and torch.equal(other.features(X),
                                                                              theirs.features(X))


def test_another_width_is_named(tmp_path):
    predictor(8, 1).save(tmp_path)
    with pytest.raises(InputError,
                       match=r"not a resnet18 of this size.*--width 16; resnet18 has 64"):
        begin(predictor(16, 1), tmp_path)
