"""FID and KID of any two folders or arrays: the figure, its name, its floor, and what is
refused.
"""

import json
import pickle

import data_sets
import numpy as np
import pytest
import torch

import evaluate
import minidiff
from minidiff import config
from minidiff.data import images, phantom
from minidiff.errors import InputError
from minidiff.evaluation import fid as rooms
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics import distances


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))


def drawn(n, seed=0, size=32):
    return np.stack([phantom.phantom(seed, i, size).image for i in range(n)])


def flat(folder, pixels):
    for i, image in enumerate(pixels):
        images.write(folder / f"{i:03d}.png", image)
    return folder


def test_folders_and_arrays_give_the_formula_of_the_metrics(tmp_path):
    a, b = drawn(40), drawn(30, seed=1)
    stacks = [torch.from_numpy(x)[:, None].expand(-1, 3, -1, -1) for x in (a, b)]
    pca = PixelPCA().fit(stacks[0])
    x, y = (pca(s).double().numpy() for s in stacks)
    for found in (minidiff.fid(flat(tmp_path / "a", a), str(flat(tmp_path / "b", b)),
                               extractor="pixels"),
                  minidiff.fid(a, b[..., None], extractor="pixels"),
                  minidiff.fid(stacks[0], stacks[1], extractor="pixels")):
        assert found == pytest.approx(distances.fid(real=x, fake=y), rel=1e-9)
        assert found.sizes == (
            40, 30) and found.extractor == "pixels-pca64" and found.floor.n + found.floor.m <= 40
    assert minidiff.kid(a, b, extractor="pixels") == pytest.approx(distances.kid(real=x, fake=y),
                                                                   rel=1e-9)


def test_in_other_features_it_is_not_called_fid():
    a, b = drawn(24), drawn(24, seed=1)
    assert repr(minidiff.fid(a, b, extractor="pixels")).startswith("Fréchet distance ")
    text = repr(minidiff.kid(a, b, extractor="pixels"))
    assert text.startswith(
        "kernel "
        "distance ") and "n = 24 and 24, pixels-pca64; at n = 12 and 12: real against" in text
    assert "without a floor" in repr(minidiff.fid(a[:6], b, extractor="pixels"))
    found = minidiff.fid(a, b, extractor="pixels")
    assert pickle.loads(pickle.dumps(found)).sizes == (
        24, 24) and f"{found:.2f}" == f"{float(found):.2f}"
    assert "at n = 12 and 12: this " in repr(found) and type(found)(3.0) == 3 and repr(
        type(found)(3.0)) == "3.0"
    assert minidiff.fid(a, b, extractor="pixels", draws=0).floor is None


def test_fid_means_inception_and_without_its_weights_it_stops_with_the_command(no_weights, tmp_path,
                                                                               capsys):
    folder = flat(tmp_path / "some", drawn(4))
    for call in (minidiff.fid, minidiff.kid):
        with pytest.raises(InputError, match="python -m minidiff.diffusion.public fetch inception"):
            call(drawn(4), drawn(4))
    with pytest.raises(SystemExit) as stop:
        config.main(evaluate.VERBS, default="report", doc="",
                    argv=["fid", str(folder), str(folder)])
    assert stop.value.code == 2 and "fetch inception" in capsys.readouterr().err


def test_with_weights_it_is_fid(monkeypatch):
    class Fake:
        name, identity = "inception-pytorch-fid", "0" * 64

        def __call__(self, x):
            return x.float().flatten(1)[:, :5]

    monkeypatch.setattr(rooms, "inception", lambda: "inception-pytorch-fid=x")
    monkeypatch.setattr(rooms, "build", lambda specs,
                        **_: [Fake()] if specs == ["inception-pytorch-fid=x"] else [])
    assert repr(minidiff.fid(drawn(20), drawn(20, 1))).startswith("FID ")
    assert repr(minidiff.kid(drawn(20), drawn(20, 1))).startswith("KID ")


def test_the_command_prints_both_and_keeps_them(tmp_path, capsys):
    a, b = flat(tmp_path / "a", drawn(24)), flat(tmp_path / "b", drawn(24, seed=1))
    words = ["fid", str(a), str(b), "--extractor", "pixels", "--out", str(tmp_path / "fid.json")]
    config.main(evaluate.VERBS, default="report", doc="", argv=words)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Fréchet distance ") and out[1].startswith("kernel distance ")
    kept = json.loads((tmp_path / "fid.json").read_text())
    assert [f["n"] for f in kept["figures"]] == [[24, 24]] * 2 and kept["folders"] == [str(a),
                                                                                       str(b)]


def test_a_data_set_brings_its_patients_and_masks_are_no_images(tmp_path):
    folder = phantom.write(tmp_path / "p", n=60, size=32, masks=True)
    stacks, patients = rooms.load(folder, rooms.files(folder))
    assert sum(map(len, stacks)) == len(patients) == 60 and len(set(patients)) < 60
    nested = tmp_path / "nested"
    flat(nested / "x" / "deep", drawn(3)), flat(nested / "masks", drawn(3))
    assert sum(map(len, rooms.load(nested, rooms.files(nested))[0])) == 3


def test_images_of_several_sizes_are_stacked_apart(tmp_path):
    flat(tmp_path / "a", drawn(3)), flat(tmp_path / "a" / "b", drawn(2, size=64))
    stacks, patients = rooms.load(tmp_path / "a", rooms.files(tmp_path / "a"))
    assert [tuple(s.shape) for s in stacks] == [(3, 3, 32, 32),
                                                (2, 3, 64, 64)] and len(patients) == 5
    with pytest.raises(InputError, match="one size; the real ones have 32 × 32, 64 × 64"):
        minidiff.fid(tmp_path / "a", tmp_path / "a", extractor="pixels")


@pytest.mark.parametrize("value, said",
                         [(np.zeros((4, 8, 8)), "uint8"), ("missing", "no such folder"),
                          ([[1], [1, 2]], "neither a folder"),
                          (np.zeros((4, 8, 8, 2), np.uint8), "1 or 3 channels"),
                          (np.zeros((1, 8, 8), np.uint8), "N of 2 or more"), (["a"], "uint8")])
def test_what_is_no_set_of_images_is_refused(value, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        minidiff.fid(value, drawn(4), extractor="pixels")


@pytest.mark.parametrize("folders", [[], ["a"], ["a", "b", "c"]])
def test_two_folders_are_compared(folders, capsys):
    with pytest.raises(SystemExit):
        config.main(evaluate.VERBS, default="report", doc="", argv=["fid", *folders])
    assert "two folders of images are compared" in capsys.readouterr().err


def test_it_says_where_two_folders_mix_labels_differently(tmp_path):
    sets = {name: data_sets.data_set(tmp_path / name, [
        {"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)])
        for name, labels in {"real": "aaaaaaaaab", "made": "ab" * 5, "same": "baaaaaaaaa"}.items()}
    assert "a 90% and 50%, b 10% and 50%" in rooms.mixes(sets["real"], sets["made"])
    assert rooms.mixes(sets["real"], sets["same"]) == rooms.mixes(sets["real"], str(tmp_path)) == ""
