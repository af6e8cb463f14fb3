"""cache: equal bytes with and without it, only the missing computed, nothing damaged trusted."""

import pytest
import safetensors.torch
import torch
from test_backbones import saved, torchvision_net

from minidiff.classification.predictor import Predictor
from minidiff.errors import InputError
from minidiff.evaluation.features import backbones
from minidiff.evaluation.features import build as cache
from minidiff.evaluation.features.backbones import BACKBONES, Network
from minidiff.evaluation.features.build import FeatureCache, content_keys
from minidiff.evaluation.features.extractor import PixelPCA, PredictorFeatures, digest
from minidiff.variables import Category

PIXELS = torch.randint(0, 256, (75, 3, 32, 32), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))


class Counting:
    """Mean and deviation of each channel; counts the images it was given, and how many at once."""

    name = "counting"

    def __init__(self, scale=1.0):
        self.scale, self.sizes = scale, []
        self.identity = digest({}, scale=scale)

    def __call__(self, x):
        self.sizes.append(len(x))
        return torch.cat([x.float().mean((2, 3)), x.float().std((2, 3))], 1) * self.scale


def test_only_the_missing_are_computed_and_in_one_size(tmp_path):
    extractor, kept = Counting(), FeatureCache(tmp_path)
    first = kept(extractor, PIXELS[:40])
    assert extractor.sizes == [32, 32] and torch.allclose(first, Counting()(PIXELS[:40]))
    # a new run reads the file
    again = FeatureCache(tmp_path)(extractor, PIXELS[:40])
    assert extractor.sizes == [32, 32] and torch.equal(again, first)
    order = torch.tensor([60, 3, 60, 39, 41])
    # 60 and 41 are new, 60 twice
    mixed = kept(extractor, PIXELS[order])
    assert extractor.sizes == [32, 32, 32] and torch.allclose(mixed, Counting()(PIXELS[order]))
    assert torch.equal(mixed[1], first[3]) and torch.equal(mixed[0], mixed[2])
    assert len(safetensors.torch.load_file(tmp_path / "counting.safetensors")["names"]) == 42
    assert [p.name for p in tmp_path.iterdir()] == ["counting.safetensors"]
    assert kept(extractor, PIXELS[:0]).shape == (0, 6)


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    network = Network("resnet18", BACKBONES["resnet18"],
                   saved(torchvision_net("resnet18"), tmp_path_factory.mktemp("weights") / "w.pth"))
    judge = Predictor([Category("label", ("a", "b"))], width=8, size=32)
    return {"pixels": PixelPCA().fit(PIXELS), "classifier": PredictorFeatures(judge),
            "resnet18": network}


@pytest.mark.parametrize("name", ["pixels", "classifier", "resnet18"])
def test_the_same_bytes_whether_cached_or_not(extractors, tmp_path, name, monkeypatch):
    x = PIXELS
    # a network in batches of 32 takes long here: see the slow test of inception
    if name == "resnet18":
        x = PIXELS[:11]
        for module in (backbones, cache):
            monkeypatch.setattr(module, "BATCH", 4)
    extractor, kept = extractors[name], FeatureCache(tmp_path)
    without = FeatureCache(None)(extractor, x)
    parts = torch.cat([kept(extractor, part) for part in (x[5:6], x[:9].flip(0), x[3:])])
    assert torch.equal(parts, torch.cat([without[5:6], without[:9].flip(0), without[3:]]))
    assert torch.equal(kept(extractor, x),
                       without) and torch.equal(FeatureCache(tmp_path)(extractor, x), without)
    assert torch.allclose(extractor(x), without, atol=1e-5 * without.abs().max().item())


def test_a_grey_set_is_handed_on_as_grey(tmp_path):
    """Expanded from one channel, it is resized once and not thrice; the features are those of three
    equal channels.
    """
    class Watching(Counting):
        def __call__(self, x):
            strides.append(x.stride(1))
            return super().__call__(x)

    strides, grey = [], PIXELS[:3, :1].expand(-1, 3, -1, -1)
    features = FeatureCache(None)(Watching(), grey)
    assert torch.equal(features,
                       FeatureCache(None)(Watching(), grey.contiguous())) and strides == [0, 1024]


def damage(path, how):
    data = bytearray(path.read_bytes())
    stored = safetensors.torch.load(bytes(data))
    if how == "cut":
        path.write_bytes(data[:-50])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        data[-3] ^= 1
        path.write_bytes(data)
    elif how == "edited":
        safetensors.torch.save_file(stored | {"features": stored["features"] + 1e-3}, path)
    elif how == "foreign":
        safetensors.torch.save_file({"weights": torch.zeros(3)}, path)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "edited", "foreign"])
def test_a_damaged_cache_is_said_and_made_anew(tmp_path, capsys, how):
    extractor, kept = Counting(), FeatureCache(tmp_path)
    right = kept(extractor, PIXELS[:5])
    damage(tmp_path / "counting.safetensors", how)
    assert capsys.readouterr().out == "" and torch.equal(kept(extractor, PIXELS[:5]), right)
    assert "counting.safetensors is damaged" in capsys.readouterr().out and extractor.sizes == [32,
                                                                                                32]
    assert torch.equal(kept(extractor, PIXELS[:5]),
                       right) and capsys.readouterr().out == "" and len(extractor.sizes) == 2


def test_a_stale_cache_is_said_and_made_anew(tmp_path, capsys):
    kept, new = FeatureCache(tmp_path), Counting(scale=2.0)
    old = kept(Counting(), PIXELS[:5])
    assert torch.equal(kept(new, PIXELS[:5]), 2 * old) and new.sizes == [32]
    then, now = Counting().identity[:12], new.identity[:12]
    assert f"is stale: made by counting {then}, and it is {now} now" in capsys.readouterr().out


def test_what_is_computed_is_kept_when_a_long_run_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SAVED", 32)

    class Stopped(Counting):
        def __call__(self, x):
            if len(self.sizes) == 2:
                raise KeyboardInterrupt
            return super().__call__(x)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path)(Stopped(), PIXELS)
    extractor = Counting()
    assert torch.allclose(FeatureCache(tmp_path)(extractor, PIXELS),
                          Counting()(PIXELS)) and extractor.sizes == [32]


def test_other_than_finite_features_are_refused_and_not_kept(tmp_path):
    with pytest.raises(InputError, match="counting gives NaN or infinity"):
        FeatureCache(tmp_path)(Counting(scale=float("nan")), PIXELS)
    assert not list(tmp_path.iterdir())


def test_keys_are_of_content_shape_and_not_of_storage():
    grey = PIXELS[:4, :1]
    keys = content_keys(grey.expand(-1, 3, -1, -1))
    assert len(set(keys)) == 4 and content_keys(grey.repeat(1, 3, 1,
                                                            1)) == keys == content_keys(grey)
    assert content_keys(PIXELS[:4]) != keys and content_keys(grey.reshape(4, 1, 16, 64)) != keys
