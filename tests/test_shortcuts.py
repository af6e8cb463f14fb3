"""The shortcut audit: planted shortcuts are found where they are, and nothing is read off the test
sets' labels.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff import variables as var
from minidiff.classification import inputs
from minidiff.classification.arms import Images
from minidiff.classification.predictor import Predictor, balance, fit
from minidiff.classification.shortcuts import (
    BLACKOUT,
    lung_mask,
    shortcut_audit,
    trivial_scores,
    without_lungs,
)
from minidiff.data import images, phantom
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.statistics import auroc

SIZE, TARGET = 32, var.Category("label", ("a", "b"))


def load(table, labels=("a", "b"), size=SIZE) -> Images:
    table, pixels = load_pixels(table, size)
    kind = var.Category if set(table.column("label")) <= set(labels) else var.Findings
    cells = var.encode([kind("label", tuple(labels))], table.rows)["label"]
    return Images(pixels, cells, table.column("patient"), table.rows,
                  [table.hashes[file] for file in table.column("file")])


def write(folder, n, seed, *, corner=False, wide="", sex=None):
    """n noise pictures, every second of label b: that has a bright corner, or is wider, or is of
    one sex.
    """
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        label = "ab"[i % 2]
        picture = rng.integers(60, 120, (1, SIZE, SIZE + 8 * (label == wide))).astype(np.uint8)
        picture[0, 10:22, 10:22] += np.uint8(90 * (label == "b"))  # disease, in the middle
        if corner and label == "b":
            picture[0, :3, -6:] = 255
        name = f"images/{label}/{i:03d}.png"
        images.write(folder / name, picture)
        rows.append({
            "file_name": name, "label": label, "patient": f"{folder.name}-{i // 2 if i % 8 else i}",
            "sex": ("FM"[rng.random() < (sex or 0.5) if label == "b" else rng.random() < 0.5])})
    write_table(folder / "metadata.csv", rows)
    return load(read_table(folder, split=False))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Label b has a bright corner and is wide in train and test; elsewhere a is the wide one, and
    no corner is bright.
    """
    root = tmp_path_factory.mktemp("planted")
    train, test = (write(root / name, n, k, corner=True, wide="b", sex=0.8)
                   for k, (name, n) in enumerate((("train", 80), ("test", 40))))
    return train, {"test": test, "other": write(root / "other", 40, 2, wide="a")}


@pytest.fixture(scope="module")
def found(planted):
    return shortcut_audit(*planted, target=TARGET, columns=["sex"], size=SIZE, steps=30)


def area(found, features, test_set, label="b"):
    row, = (r for r in found["rows"]
            if (r["features"], r["test_set"], r["label"]) == (features, test_set, label))
    return row["auroc"]


def test_a_shortcut_is_named_and_fails_elsewhere(found):
    assert found["shortcut"] and found["sentence"].startswith("SHORTCUT: ") and found["text"][
        -1] == found["sentence"]
    for features in ("header", "border", BLACKOUT):
        assert area(found, features, "test") > 0.95
        assert area(found, features, "other") < 0.7
    assert area(found, "header", "other") < 0.05  # the other way round there
    assert 0.55 < area(found, "metadata", "test") < 0.85
    assert "thumbnail" not in found["sentence"] and "no evidence" in found["sentence"]
    assert {r["features"] for r in found["rows"] if r["shortcut"]} >= {"header", "border", BLACKOUT}
    assert not any(r["shortcut"] for r in found["rows"]
                   if r["test_set"] == "other" or r["auroc"] < 0.9)


def test_the_rows_are_json_with_both_labels_and_intervals(found):
    json.dumps(found, allow_nan=False)
    assert len(found["rows"]) == 5 * 2 * 2  # features, labels, test sets
    assert all(r["low"] <= r["auroc"] <= r["high"] and (r["n"], r["n_rest"]) == (20, 20)
               for r in found["rows"])
    # of two labels, the same
    assert area(found, "header", "test", "a") == pytest.approx(area(found, "header", "test", "b"))


def test_equal_calls_give_equal_numbers(planted, found):
    assert shortcut_audit(*planted, target=TARGET, columns=["sex"], size=SIZE,
                          steps=30) == found


def test_the_labels_of_a_test_set_are_not_learned_from(planted):
    train, tests = planted
    sets = {"train": train, **tests}
    truth = {name: TARGET.bits(each.labels).numpy() for name, each in sets.items()}
    wrong = {"train": truth["train"], "test": truth["test"][::-1].copy(), "other": ~truth["other"]}
    right, turned = (trivial_scores(sets, known, [0, 1], ["sex"]) for known in (truth, wrong))
    for kind in right:
        for name in tests:
            np.testing.assert_array_equal(right[kind][name], turned[kind][name])


def test_without_the_lungs_the_disease_is_not_told(tmp_path):
    """Only the middle differs: the whole picture tells the label, and what the box leaves does
    not.
    """
    train, test = write(tmp_path / "train", 80, 0), write(tmp_path / "test", 80, 1)
    found = shortcut_audit(train, {"test": test}, target=TARGET, columns=["sex"], size=SIZE,
                           steps=30)
    assert area(found, BLACKOUT, "test") < 0.7 and area(found, "header", "test") < 0.9
    assert area(found, "thumbnail", "test") > 0.95  # the disease itself shows at 8 × 8
    assert not found["shortcut"] and found["sentence"] == ""      # and a disease is no shortcut


def test_a_set_of_one_side_has_no_figure_and_few_patients_are_not_learned(planted):
    train, tests = planted
    only = tests["test"].take(range(0, 40, 2))
    found = shortcut_audit(train, {"test": only}, target=TARGET, columns=[], size=SIZE, steps=2)
    assert all(r["auroc"] is None and r["low"] is None and not r["shortcut"] for r in found["rows"])
    assert not found["shortcut"] and found["sentence"] == "" and "–" in found["text"][1]
    assert "metadata" not in {r["features"] for r in found["rows"]}
    few = train.take([*range(0, 80, 2), 1, 3, 5])  # 3 images of b
    assert shortcut_audit(few, tests, target=TARGET, columns=[], size=SIZE,
                          steps=2)["rows"] == []


def test_findings_are_told_one_by_one(planted):
    train, tests = planted
    cells = {"a": ("none", "a"), "b": ("b", "a|b")}

    both_may = var.Findings("label", ("a", "b"))

    def both(each):
        rows = [{**row, "label": cells[row["label"]][k % 4 // 2]}
                for k, row in enumerate(each.rows)]
        return replace(each, rows=rows,
                       labels=var.encode([both_may], rows)["label"])

    sets = {name: both(each) for name, each in tests.items()}
    # a set in which nobody happens to have two is of findings all the same
    sets["single"] = sets["test"].take([i for i, row in enumerate(sets["test"].rows)
                                        if row["label"] in ("a", "b")])
    found = shortcut_audit(both(train), sets, target=both_may, columns=["sex"], size=SIZE,
                           steps=30)
    assert area(found, "header", "test", "b") > 0.95 and area(found, BLACKOUT, "test", "b") > 0.95
    assert area(found, "header", "single", "b") > 0.95
    assert 0.2 < area(found, "header", "test", "a") < 0.8  # a is there in half of either


def test_masks_are_found_in_either_layout_and_black_out_the_lungs(tmp_path):
    folder = phantom.write(tmp_path / "p", n=6, size=64, masks=True)
    table = read_table(folder, split=False)
    paths = [lung_mask(row) for row in table.rows]
    assert paths == [folder / "masks" / "lungs" / Path(name).relative_to("images")
                     for name in table.column("file_name")]
    pixels = load_pixels(table, 64)[1]
    dark = without_lungs(pixels, paths)
    for before, after, path in zip(pixels, dark, paths):
        lungs = torch.from_numpy(images.read(path)[0] > 127)
        assert (after[0][lungs] == 0).all() and lungs.float().mean() > 0.05
        kept = after[0] == before[0]
        # only the lungs and a rim of them
        assert kept.float().mean() > 1 - 2 * lungs.float().mean() and kept[:, :3].all()
    kaggle = tmp_path / "COVID"
    images.write(kaggle / "images" / "1.png", np.zeros((8, 8), np.uint8))
    assert lung_mask({"file": str(kaggle / "images/1.png"),
                      "file_name": "COVID/images/1.png"}) is None
    images.write(kaggle / "masks" / "1.png", np.zeros((8, 8), np.uint8))
    assert lung_mask({"file": str(kaggle / "images/1.png"),
                      "file_name": "COVID/images/1.png"}) == kaggle / "masks" / "1.png"
    assert lung_mask({"file": str(tmp_path / "flat.png"), "file_name": "flat.png"}) is None


def test_one_image_without_a_mask_puts_all_under_the_box(tmp_path):
    table = read_table(phantom.write(tmp_path / "p", n=60, size=32, masks=True), split=False)
    each = load(table, phantom.LABELS)
    audit = {"target": var.Category("label", phantom.LABELS), "columns": [], "size": SIZE,
             "steps": 2}
    assert shortcut_audit(each, {"test": each}, **audit)["region"] == "masks"
    lung_mask(table.rows[7]).unlink()
    assert shortcut_audit(each, {"test": each}, **audit)["region"] == "box"
    dark = without_lungs(each.pixels, None)
    assert (dark[:, :, 3:-3, 3:-3] == 0).all() and (dark[:, :, :3] == each.pixels[:, :1, :3]).all()


def test_a_file_that_cannot_be_read_is_named(planted, tmp_path):
    train, tests = planted
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    rows = [{**row, "file": str(broken)} if k == 3 else row for k, row in enumerate(train.rows)]
    with pytest.raises(InputError, match="broken.png"):
        shortcut_audit(replace(train, rows=rows), tests, target=TARGET, columns=[], size=SIZE,
                       steps=1)


@pytest.mark.slow
@pytest.mark.parametrize("confounding, low, high", [(0.0, 0.3, 0.72), (1.0, 0.95, 1.0)])
def test_on_phantoms_what_is_left_tells_the_hospital_and_not_the_disease(tmp_path, confounding, low,
                                                                         high):
    """With the lungs the disease is told either way; without them only where the label goes with
    the hospital.
    """
    table = read_table(phantom.write(tmp_path / "p", n=700, size=64, masks=True,
                                     confounding=confounding))
    train, test = (load(table.select(split=name), phantom.LABELS, 64) for name in ("train", "test"))
    found = shortcut_audit(train, {"test": test}, target=var.Category("label", phantom.LABELS),
                           columns=["sex"], size=64, steps=100)
    assert found["region"] == "masks"
    assert low < area(found, BLACKOUT, "test", "covid") <= high
    whole = Predictor([var.Category("label", phantom.LABELS)], width=8, size=64)
    labels = {"label": train.labels}
    fit(whole, train.pixels, labels, steps=100, lr=4e-3,
        weights=balance(whole.variables[0], labels))
    covid = phantom.LABELS.index("covid")
    assert auroc(whole.predict(test.pixels)["label"][:, covid].numpy(),
                 (test.labels == covid).numpy()) > 0.85


@pytest.mark.slow
def test_the_real_images_are_told_without_their_lungs(cxr):
    """Published: AUROC of the picture's shape and of a thumbnail ≥ .96 for covid within these
    hospitals.
    """
    table = read_table(cxr)
    train, test = (load(table.select(split=name), ("covid", "normal", "pneumonia"))
                   for name in ("train", "test"))
    target = var.Category("label", ("covid", "normal", "pneumonia"))
    found = shortcut_audit(train, {"test": test}, target=target, columns=["sex", "age", "view"],
                           size=SIZE, steps=3)
    assert area(found, "header", "test", "covid") > 0.97 and area(found, "thumbnail", "test",
                                                                  "covid") > 0.93
    assert found["shortcut"] and "covid" in found["sentence"] and found["region"] == "box"


@pytest.mark.parametrize("confounding,flagged", [(0.0, False), (0.9, True), (1.0, True)])
def test_a_confounded_phantom_has_a_shortcut_and_another_has_none(tmp_path, confounding, flagged):
    phantom.write(tmp_path / "data", n=600, size=32, confounding=confounding)
    data = inputs.read((str(tmp_path / "data"),), {}, (), size=32, seed=0,
                       out=str(tmp_path / "out"))
    found = shortcut_audit(data.sets["train"], data.tests, target=data.target,
                           columns=["sex", "age", "view"], size=32, steps=40)
    assert found["shortcut"] is flagged and found["sentence"].startswith("SHORTCUT") is flagged
    if not confounding:
        assert area(found, BLACKOUT, "test", "covid") < 0.75
