"""Monitoring: better images score better, copies are left out, and a choice that the numbers do not
bear is not made.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidiff import runs
from minidiff.data import phantom
from minidiff.data.dataset import Images, read_images
from minidiff.errors import InputError
from minidiff.evaluation import monitor
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics.distances import kid, kid_draws, matched, same_mix
from minidiff.evaluation.monitor import Checkpoint, MonitorConfig, checkpoints, choose, measure

LABELS = ["covid", "normal", "pneumonia"]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitor")
    phantom.write(folder / "data", n=210, size=32, seed=0)
    data = read_images([str(folder / "data")], 32, seed=0, split_dir=folder, skip_bad=False)
    return folder, data.part("train"), data.part("val", "test")


@pytest.fixture(scope="module")
def fresh():
    """60 phantoms of other patients, and their labels in turn."""
    drawn = [phantom.phantom(7, i, 32) for i in range(60)]
    pixels = torch.from_numpy(
        np.stack([p.image if p.image.ndim == 3 else p.image[None] for p in drawn]))
    return pixels.expand(-1, 3, -1, -1), [p.row["label"] for p in drawn]


@pytest.fixture(scope="module")
def course(real, fresh):
    """A training that goes from a blur to good phantoms, and ends in copies of the training
    images.
    """
    _, train, _ = real
    pixels, labels = fresh
    blurred = [F.avg_pool2d(F.pad(pixels.float(), [k // 2] * 4, mode="replicate"), k,
                            1).to(torch.uint8) for k in (9, 5)]
    index = {label: iter([i for i, row in enumerate(train.table.rows) if row["label"] == label] * 9)
             for label in LABELS}
    copies = train.pixels[[next(index[label]) for label in labels]]
    made = dict(zip((Checkpoint(s, Path(f"s{s}")) for s in (100, 200, 300, 400)),
                    (*blurred, pixels, copies)))
    log = [{"step": 300, "val_loss": 0.5, "gap": 0.02, "gap_low": -0.01},
           {"step": 400, "val_loss": None}]
    return made, labels, log


@pytest.fixture(scope="module")
def result(real, course):
    _, train, heldout = real
    made, labels, log = course
    return measure(made, labels, train, heldout, [PixelPCA().fit(train.pixels)], log, repeats=20)


def test_the_curve_falls_and_copies_are_left_out(result):
    values = [p["KD"]["pixels-pca64"]["value"] for p in result["points"]]
    assert values[0] > values[1] > values[2] and values[3] < values[1]
    assert values[1] > result["floors"]["pixels-pca64"]["high"] > values[2]
    assert [p["copying"]["suspected"] for p in result["points"]] == [False, False, False, True]
    assert result["points"][3]["copying"]["named"]["found"] > 0
    assert all(p["copying"]["named"]["found"] == 0 for p in result["points"][:3])
    # a copy has no distance
    assert result["points"][3]["copying"]["spaces"][0]["q50"] < 1e-6
    assert result["choice"]["step"] == 300 and result["choice"]["resolved"]
    assert "left out for theirs: 1" in result["choice"]["text"]
    assert result["points"][2]["loss"] == {"val_loss": 0.5, "gap": 0.02, "gap_low": -0.01}
    assert result["points"][3]["loss"]["gap"] is None


def test_numbers_are_those_of_the_room(result, real, course):
    _, train, heldout = real
    made, labels, _ = course
    held, own = matched(heldout.table.column("label"), labels)
    x = PixelPCA().fit(train.pixels)
    patients = np.array(heldout.table.column("patient"))[held]
    value = kid(real=x(heldout.pixels[held]), fake=x(made[Checkpoint(300, Path("s300"))][own]),
                real_patients=patients)
    assert result["points"][2]["KD"]["pixels-pca64"]["value"] == value and result["points"][2][
        "n"] == len(held)


def test_the_mix_of_labels_is_that_asked_for():
    labels = ["a"] * 50 + ["b"] * 20 + ["c"] * 10
    index = same_mix(labels, ["a", "b"] * 5)
    assert [labels[i] for i in index] == ["a"] * 20 + ["b"] * 20 and (
        same_mix(labels, ["a", "b"] * 5) == index).all()
    # 20 of a to 10 of c
    assert len(same_mix(labels, ["a", "a", "c"])) == 30
    # those that there are, and all of them for a model that knows no label
    assert len(same_mix(labels, ["a", "b", "d"])) == 40 and len(same_mix(labels, ["any"])) == 80


@pytest.mark.parametrize("made,n,m", [
    ({"a": 50, "b": 50}, (90, 10), (50, 5)),              # real are 90 and 10
    ({"a": 90, "b": 10}, (90, 10), (90, 10)),
    ({"a": 5, "b": 50}, (1, 10), (5, 50)),
    ({"b": 30, "d": 70}, (0, 10), (0, 30))])              # what one side lacks is left out
def test_both_sides_keep_the_most_images_of_one_mix(made, n, m):
    sides = ["a"] * 90 + ["b"] * 10, [label for label, k in made.items() for _ in range(k)]
    found = [[side[i] for i in index] for side, index in zip(sides, matched(*sides))]
    assert [tuple(side.count(label) for label in "ab") for side in found] == [n, m]
    assert [len(i) for i in matched(["a"] * 9, ["any"] * 4)] == [9, 4]


def point(step, suspected=False, **values):
    return {"step": step, "KD": {k: {"value": v} for k, v in values.items()},
            "copying": {"suspected": suspected}}


def test_the_rule_of_choice():
    rng = np.random.default_rng(0)
    # of the held-out patients, which all checkpoints share
    luck = rng.normal(0, 1, 1000)

    def drawn(*values, noise=0.01):
        return [v + luck + noise * rng.normal(0, 1, 1000) for v in values]

    points = [point(1, x=0.5), point(2, x=0.1), point(3, x=0.3)]
    taken = choose(points, {"x": drawn(0.5, 0.1, 0.3)})
    # the intervals of all overlap
    assert (taken["step"], taken["resolved"], taken["alike"]) == (2, True, [])
    taken = choose(points, {"x": drawn(0.5, 0.1, 0.3, noise=0.4)})
    assert (taken["step"], taken["resolved"],
            taken["alike"]) == (2, False, [1, 3]) and "Not resolved" in taken["text"]
    # not excluded is not clean
    points[1]["copying"]["suspected"] = None
    assert choose(points, {"x": drawn(0.5, 0.1, 0.3)})["step"] == 3
    both = [point(1, x=0.1, y=9.0), point(2, x=0.2, y=1.0), point(3, x=0.9, y=1.1)]
    # the best of x is worse in y
    assert choose(both, {"x": drawn(0.1, 0.2, 0.9), "y": drawn(9, 1, 1.1)})["step"] is None
    taken = choose(both, {"x": drawn(0.1, 0.2, 0.9, noise=0.1), "y": drawn(9, 1, 1.1)})
    assert (taken["step"], taken["resolved"]) == (2, True)
    assert choose([point(1, True, x=0.1)], {"x": drawn(0.1)})["step"] is None


def test_few_test_images_leave_the_choice_untested(real, fresh):
    _, train, heldout = real
    pixels, labels = fresh
    few = Images(replace(heldout.table, rows=[{**row, "split": "test"}
                                              for row in heldout.table.rows[:15]]),
                 heldout.pixels[:15])
    for at, why in ((Checkpoint(1, Path("s1")), r"15 test images .* needs 20"),
                    (None, "no checkpoint was taken")):
        found = monitor.tested(at, ["any"] * 60, lambda point: pixels, train, few, [], [])
        assert re.fullmatch(f".*{why}", found["why"])
        assert monitor.said(found).startswith("Not tested: ")


def test_draws_of_checkpoints_are_paired():
    """Two checkpoints that make nearly the same images: the bootstrap of the difference sees it,
    two intervals do not.
    """
    rng = np.random.default_rng(1)
    real, fake = rng.normal(0, 1, (150, 16)), rng.normal(0.1, 1, (90, 16))
    near = fake + 0.05 * rng.normal(0, 1, fake.shape)
    a, b = (kid_draws(real=real, fake=f, seed=0) for f in (fake, near))
    assert (a - b).std() < 0.3 * a.std()


def snapshot(folder, **facts):
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "model.json", {"size": 32, **facts})
    (folder / "model.safetensors").write_bytes(folder.name.encode())


def a_run(root, data, steps=(100, 200)):
    snapshot(root / "diffusion")
    for step in steps:
        snapshot(root / "diffusion" / "snapshots" / f"step_{step:08d}", step=step)
    snapshot(root / "diffusion" / "best", step=steps[-1] if steps else 300)
    runs.write_json(root / "diffusion" / "config.json",
                    {"steps": 300, "data": [str(data)], "seed": 0})
    return root / "diffusion"


def test_checkpoints_are_listed_by_step_once(tmp_path):
    run = a_run(tmp_path, "data")
    assert [(p.step, p.folder.name) for p in checkpoints(run)] == [
        (100, "step_00000100"), (200, "step_00000200"), (300, "diffusion")]
    with pytest.raises(InputError, match="holds no model"):
        checkpoints(tmp_path / "nothing")


def test_a_run_from_end_to_end(real, course, tmp_path, capsys):
    folder, *_ = real
    made, labels, _ = course
    run = a_run(tmp_path, folder / "data")
    by_folder = dict(zip([p.folder for p in checkpoints(run)], list(made.values())[1:]))
    cfg = MonitorConfig(run=str(run), classifier=str(tmp_path / "none"),
                        out=str(tmp_path / "monitor"), repeats=10)
    rows, asked = [{"label": label, "seed": str(i)} for i, label in enumerate(labels)], []

    def sample(where, rows):
        asked.append((where.name, {row["seed"] for row in rows}))
        return by_folder[where]

    # the same command again is no fault
    for _ in range(2):
        monitor.run(cfg, rows, sample)
    found = json.loads((tmp_path / "monitor" / "monitor.json").read_text())
    assert found["choice"]["step"] == 200 and set(found["models"]) == {"100", "200", "300"}
    out = capsys.readouterr().out
    assert "take step 200" in out
    # chosen on val; judged on test, and by images that the choice has not seen
    data = read_images([str(folder / "data")], 32, seed=0, split_dir=folder, skip_bad=False)
    val, test = (len(matched(data.part(split).table.column("label"), labels)[0])
                 for split in ("val", "test"))
    assert {p["n"] for p in found["points"]} == {val} and found["test"]["n"] == test
    assert found["test"]["step"] == 200 and found["test"]["folder"].endswith("step_00000200")
    assert found["test"]["KD"] != found["points"][1]["KD"]
    assert f"On {test} test images, which had no part in the choice, and 60 images" in out
    assert f"val, {val}" in out and f"test, {test}" in out
    (*_, (name, seeds)), before = asked, asked[0][1]
    assert name == "step_00000200" and not seeds & before and len(seeds) == len(before) == 60
    for name in ("monitor.png", "seeds.png"):
        assert (tmp_path / "monitor" / name).read_bytes().startswith(b"\x89PNG")
    # the model has changed
    with pytest.raises(InputError, match="models"):
        (run / "model.safetensors").write_bytes(b"another")
        monitor.run(cfg, rows, lambda where, rows: by_folder[where])


def test_what_cannot_be_measured_is_refused(real, course, tmp_path):
    folder, train, heldout = real
    made, labels, log = course
    few = {point: pixels[:12] for point, pixels in made.items()}
    with pytest.raises(InputError, match="12 images of each checkpoint"):
        measure(few, labels[:12], train, heldout, [PixelPCA().fit(train.pixels)], log, repeats=10)
    run = a_run(tmp_path, folder / "data", steps=())
    cfg = MonitorConfig(run=str(run), out=str(tmp_path / "m"))
    with pytest.raises(InputError, match="kept 1 model, step 300: train with --snapshots"):
        monitor.run(cfg, [{"label": "covid"}], None)
    run = a_run(tmp_path / "b", folder / "data")
    snapshot(run, trained_on=[heldout.table.hashes[heldout.table.rows[0]["file"]]])
    with pytest.raises(InputError, match="was trained on 1 of"):
        monitor.run(MonitorConfig(run=str(run), out=str(tmp_path / "m")), [{"label": "covid"}],
                    None)


@pytest.mark.slow
def test_equal_checkpoints_are_seldom_told_apart_and_unequal_ones_are():
    """Under the null, one of two checkpoints is called better in at most 8 % of 300 runs; a shift
    is seen in 80 %.
    """
    def resolved(shift, i):
        rng = np.random.default_rng([i, int(10 * shift)])
        real = rng.normal(0, 1, (120, 8))
        fakes = rng.normal(0, 1, (90, 8)), rng.normal(shift, 1, (90, 8))
        points = [point(s, x=kid(real=real, fake=f)) for s, f in zip((1, 2), fakes)]
        return choose(points, {"x": [kid_draws(real=real, fake=f, n_boot=400, seed=0)
                                     for f in fakes]})["resolved"]

    assert np.mean([resolved(0.0, i) for i in range(300)]) <= 0.08
    assert np.mean([resolved(0.5, i) for i in range(100)]) >= 0.8
