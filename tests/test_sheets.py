"""Sets of samples: what a resumed command looks at again, and what it leaves."""

import builtins
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minidiff import hashes
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.dataset import Images
from minidiff.data.table import Table
from minidiff.evaluation.quick import Quick
from minidiff.hashes import hashes_of
from minidiff.sampling import sheets
from minidiff.variables import Category


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A finished folder of three sets of four, whose files are old to the cache; and its plan."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "YOUNG", -1)
    out = tmp_path / "out"
    rows = [{"file_name": f"images/{k}.png", "label": "a", "set": str(1 + k // 4)}
            for k in range(12)]
    for k, row in enumerate(rows):
        images.write(out / row["file_name"], np.arange(64, dtype=np.uint8).reshape(8, 8) + k)
    finish(out, rows, {"1", "2", "3"}, set())
    digests = hashes_of(out / row["file_name"] for row in rows)
    (out / "manifest.json").write_text(json.dumps(
        {"sha256": dict(zip([row["file_name"] for row in rows], digests.values()))}))
    return out, rows


def finish(out, rows, due, whole, watch=None):
    """The sets that are left after one call."""
    sets = sheets.unfinished(out, rows, whole, watch)
    sheets.finish_sets(SimpleNamespace(out=str(out), origin=(), keep=()), sets, due & set(sets),
                       watch)
    return set(sets)


def test_of_a_finished_folder_no_image_is_opened(made, monkeypatch):
    out, rows = made
    opened, honest = [], builtins.open

    def count(file, *args, **kwargs):
        opened.append(str(file))
        return honest(file, *args, **kwargs)

    for module in (builtins, io):  # Pillow opens by builtins, pathlib by io
        monkeypatch.setattr(module, "open", count)
    whole = sheets.as_written(out, rows, rehash=False)
    assert whole == {row["file_name"] for row in rows}
    assert sheets.unfinished(out, rows, whole, None) == {}
    assert not [file for file in opened if file.endswith(".png")]
    assert sheets.as_written(out, rows, rehash=True) == whole
    assert len([file for file in opened if file.endswith(".png")]) == len(rows)


@pytest.mark.parametrize("damage, left, there", [
    (lambda path: path.write_bytes(path.read_bytes()[:50]), {"2"}, False),  # made anew
    (lambda path: path.unlink(), {"2"}, False),
    (lambda path: images.write(path, np.eye(8, dtype=np.uint8)), {"2"}, True)])  # by hand: kept
def test_the_set_of_an_image_that_changed_is_made_again(made, damage, left, there):
    out, rows = made
    path = out / rows[5]["file_name"]
    damage(path)
    whole = sheets.as_written(out, rows, rehash=False)
    assert rows[5]["file_name"] not in whole and path.exists() == there
    assert set(sheets.unfinished(out, rows, whole, None)) == left


def test_a_set_without_its_sheet_is_made_again(made):
    out, rows = made
    (out / "sheets/set_0003.png").unlink()
    whole = sheets.as_written(out, rows, rehash=False)
    assert set(sheets.unfinished(out, rows, whole, None)) == {"3"}


def watch(folder, judge=None, seed=0):
    """Quick numbers against 24 real images of noise, half of them held out."""
    x = np.random.default_rng(seed).integers(0, 256, (24, 8, 8), np.uint8)
    rows = [{"file": str(folder / f"{seed}-{k}.png"), "label": "a", "patient": str(k),
             "split": "train" if k % 2 else "test"} for k in range(24)]
    for row, image in zip(rows, x):
        images.write(row["file"], image)
    pixels = torch.from_numpy(x)[:, None].expand(-1, 3, -1, -1)
    return Quick(*(Images(Table(rows[k::2]), pixels[k::2]) for k in (1, 0)), judge)


def test_quick_numbers_are_kept_until_what_they_depend_on_changes(made, tmp_path):
    out, rows = made
    real, every = watch(tmp_path / "real"), {"1", "2", "3"}
    assert finish(out, rows, every, set(), real) == set()
    numbers = json.loads((out / "sheets/set_0002.json").read_text())
    assert numbers["n"] == 4 and len(numbers["of"]) == 64

    def left(watch=real):
        return set(sheets.unfinished(out, rows, set(), watch))

    moved = watch(tmp_path / "moved")
    assert left() == left(moved) == set()  # also before there is a manifest
    assert "real" in vars(real) and "real" not in vars(moved)  # and nothing was measured
    assert left(watch(tmp_path / "real", seed=1)) == every
    judge, other = (Predictor([Category("label", ("a", "b"))], width=8, size=8, seed=seed)
                    for seed in range(2))
    assert left(watch(tmp_path / "real", judge)) == every
    assert finish(out, rows, every, set(), watch(tmp_path / "real", judge)) == set()
    assert left(watch(tmp_path / "real", judge)) == set()
    assert left(watch(tmp_path / "real", other)) == left() == every
    finish(out, rows, every, set(), real)
    for spoil, number in ((lambda: images.write(out / rows[5]["file_name"], np.eye(8, dtype="u1")),
                           "2"), ((out / "sheets/set_0003.json").unlink, "3"),
                          (lambda: (out / "sheets/set_0001.json").write_text("{"), "1"),
                          ((out / "sheets/set_0001.png").unlink, "1"),
                          ((out / rows[11]["file_name"]).unlink, "3")):
        spoil()
        assert left() == {number}
        finish(out, rows, every, set(), real)


def test_only_complete_sets_that_are_due_are_finished_each_once(made):
    out, rows = made
    (out / rows[0]["file_name"]).unlink()
    for number in (1, 2, 3):
        (out / f"sheets/set_{number:04d}.png").unlink()
    assert finish(out, rows, {"1", "2"}, set()) == {"1", "3"}  # 1 lacks an image, 3 is not due
    assert [path.name for path in (out / "sheets").iterdir()] == ["set_0002.png"]
    assert images.read(out / "sheets/set_0002.png").shape[1:] == (8, 10 * 8 + 9 * 2)


def test_without_a_manifest_every_image_is_decoded(made):
    out, rows = made
    (out / "manifest.json").unlink()
    path = out / rows[7]["file_name"]
    path.write_bytes(path.read_bytes()[:50])
    assert sheets.as_written(out, rows, rehash=False) == set() and not path.exists()
    assert set(sheets.unfinished(out, rows, set(), None)) == {"1", "2", "3"}
