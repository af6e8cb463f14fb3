"""extractors: what specs build and what is refused, and what a distance is called in each."""

import hashlib

import pytest
import torch
from conftest import ROOT
from test_backbones import saved, torchvision_net

from minidiff.classification.predictor import Predictor
from minidiff.errors import InputError
from minidiff.evaluation.features import backbones
from minidiff.evaluation.features.build import (
    EXTRACTORS,
    NETWORKS,
    build,
    describe,
)
from minidiff.evaluation.format import distance_names
from minidiff.variables import Category

TRAIN = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8,
                      generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def judge():
    return Predictor([Category("label", ("a", "b"))], width=8, size=32)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return saved(torchvision_net("resnet18"), tmp_path_factory.mktemp("weights") / "resnet18.pth")


def names(*specs, **given):
    return [e.name for e in build(specs, train=TRAIN, **given)]


def test_defaults_and_order(judge, weights):
    assert names() == ["pixels-pca64"] and names(judge=judge) == ["pixels-pca64", "classifier"]
    assert names(f"resnet18={weights}", "pixels", judge=judge) == ["resnet18", "pixels-pca64"]


def test_every_extractor_says_what_it_is(judge, weights, monkeypatch):
    monkeypatch.setattr(backbones, "BATCH", 2)
    pin = hashlib.sha256(weights.read_bytes()).hexdigest()
    for extractor in build(["pixels", "classifier", f"resnet18={weights}@{pin}"], train=TRAIN,
                           judge=judge):
        said = describe(extractor)
        assert said["name"] == extractor.name and len(said["identity"]) == 64
        assert extractor(TRAIN[:2]).shape[0] == 2 and extractor(TRAIN[:2]).dtype == torch.float32
    assert said["sha256"] == pin and said["file"] == "resnet18.pth" and said[
        "side"] == 224 and said["public"] is False


REFUSED = {
    "pixel": "'pixel' is not known, nearest: pixels; allowed are pixels, classifier, vae and, as "
    "NAME=FILE, resnet18", "classifier": "classifier needs a classifier run",
    "vae": "vae needs a VAE run", "pixels=x": "pixels takes no file", "resnet18": "resnet18 needs "
    "its weights, as resnet18=FILE:", "resnet18=auto": "only Inception's file is downloaded",
    "resnet18=/no/such": "there is no file /no/such",
    "inception-clean-fid": "inception-clean-fid=FILE, auto: pt_inception",
    "pixels pixels": "pixels is given twice",
    "resnet18={weights}@" + "0" * 64: "its SHA-256 is .*, not 0000",
}


@pytest.mark.parametrize("specs", REFUSED)
def test_specs_are_refused_with_what_is_allowed(specs, weights):
    with pytest.raises(InputError, match=REFUSED[specs]):
        names(*specs.format(weights=weights).split())


def test_the_generators_own_vae_is_never_the_only_one():
    vae = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match="own VAE cannot be the only"):
        names("vae", vae=vae)
    assert names("vae", "pixels", vae=vae) == ["vae", "pixels-pca64"]


def test_all_specs_are_checked_before_the_first_is_worked_on(monkeypatch):
    monkeypatch.setattr("minidiff.evaluation.features.build.PixelPCA", None)
    with pytest.raises(InputError, match="not known"):
        names("pixels", "nonsense")


def test_fid_and_kid_are_inceptions_alone():
    for name in ("pixels-pca64", "classifier", "resnet50"):
        assert distance_names(name) == ("kernel distance", "Fréchet distance")
    assert distance_names("inception-clean-fid") == ("KID", "FID")


def test_the_table_in_the_docs_is_that_of_the_code():
    text = (ROOT / "docs" / "extractors.md").read_text()
    for name in EXTRACTORS:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        if name in NETWORKS:
            network = NETWORKS[name]
            assert f"| {network.input.side} |" in row and f"| {network.d} |" in row
            assert f"`{network.input.resize.__name__}`" in row and all(f"`{k[:8]}" in row
                                                                       for k in network.known)
    assert backbones.CONVERT in text
