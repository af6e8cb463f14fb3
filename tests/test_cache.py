"""cache: equal bytes with and without it, only the missing computed, nothing damaged or stale
trusted; streams of files.
"""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from test_backbones import saved, torchvision_net

from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.errors import InputError
from minidiff.evaluation.features import backbones, cache
from minidiff.evaluation.features.backbones import BACKBONES, load
from minidiff.evaluation.features.cache import FeatureCache, content_keys, stream
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
    network = load("resnet18", BACKBONES["resnet18"],
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
    said = f"is stale: made by counting {Counting().identity[:12]}, and it is {new.identity[:12]} now"
    assert said in capsys.readouterr().out


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
    with pytest.raises(InputError, match="counting gives other than finite numbers"):
        FeatureCache(tmp_path)(Counting(scale=float("nan")), PIXELS)
    assert not list(tmp_path.iterdir())


def test_keys_are_of_content_shape_and_not_of_storage():
    grey = PIXELS[:4, :1]
    keys = content_keys(grey.expand(-1, 3, -1, -1))
    assert len(set(keys)) == 4 and content_keys(grey.repeat(1, 3, 1,
                                                            1)) == keys == content_keys(grey)
    assert content_keys(PIXELS[:4]) != keys and content_keys(grey.reshape(4, 1, 16, 64)) != keys
    with pytest.raises(AssertionError):
        FeatureCache(None)(Counting(), PIXELS, keys)
    extractor = Counting()
    # trusted
    assert torch.equal(*FeatureCache(None)(extractor, PIXELS[:2],
                                           ["same", "same"])) and extractor.sizes == [32]


@pytest.fixture
def folder(tmp_path):
    """Files of different sizes and modes, and one that is none."""
    rng = np.random.default_rng(0)
    for k in range(11):
        array = rng.integers(0, 256, (40 + 7 * k, 60, 3) if k % 2 else (50, 40 + 3 * k),
                             dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{k:02d}.{'png' if k % 3 else 'jpg'}")
    (tmp_path / "05.png").write_bytes(b"no image")
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_of_files_gives_the_features_of_their_pixels(extractors, folder, monkeypatch,
                                                              workers):
    for module in (backbones, cache):
        monkeypatch.setattr(module, "BATCH", 4)
    network, faults = extractors["resnet18"], []
    found = list(stream(network, folder, workers=workers, faults=faults))
    files, features = [f for part, _ in found for f in part], torch.cat([x for _, x in found])
    assert [len(part) for part, _ in found] == [4, 4, 2] and files == [f for f in folder
                                                                       if f.stem != "05"]
    assert len(faults) == 1 and "05.png: cannot be opened" in faults[0]
    assert torch.equal(features,
                       torch.cat([network(torch.tensor(images.read(f)[None])) for f in files]))
    with pytest.raises(InputError, match="05.png"):
        list(stream(network, folder, workers=workers))
    assert list(stream(network, [])) == []


def test_a_stream_that_is_left_early_stops_reading(extractors, folder, monkeypatch):
    for module in (backbones, cache):
        monkeypatch.setattr(module, "BATCH", 2)
    read, seen = images.read, []
    monkeypatch.setattr(images, "read", lambda path: (seen.append(path), read(path))[1])
    running = stream(extractors["resnet18"], [f for f in folder if f.stem != "05"] * 4)
    next(running)
    running.close()
    # of 40: never the whole folder in memory
    assert len(seen) <= 8
