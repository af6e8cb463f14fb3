"""train.py rare: who is left out, how many steps follow from the losses, what is refused, what a
new label begins with, and that the last model without a copy is kept.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from minidiff import runs
from minidiff.data import images, phantom
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.table import read_table, write_table
from minidiff.diffusion import begin, store
from minidiff.errors import InputError
from minidiff.stages import rare

RareConfig, learn = train.VERBS["rare"]


def draw(folder: Path, label: str, patients, **cells) -> str:
    """32 px phantoms of one label, two images of every patient but the first."""
    rows = []
    for k in patients:
        for visit in range(1 if k == patients[0] else 2):
            p = phantom.phantom(5, 10 * k + 8 + visit, 32, label=label)
            rows.append({"file_name": f"images/{k}-{visit}.png", "split": "", **p.row,
                         "patient": f"p{k}", **cells})
            images.write(folder / rows[-1]["file_name"], p.image)
    write_table(folder / "metadata.csv", rows)
    return str(folder)


@pytest.fixture
def few(tmp_path):
    return draw(tmp_path / "few", "pneumothorax", range(3))


def config(tiny, few, root, **knobs):
    return RareConfig(**{"data": (few,), "init": str(tiny / "diffusion"), "root": str(root),
                         "steps": 4, "snapshots": 1, "batch": 2, "folds": 2, "per_label": 2,
                         **knobs})


@pytest.mark.parametrize("n, most, sizes", [(3, 5, [1, 1, 1]), (10, 5, [2] * 5), (7, 3, [3, 2, 2])])
def test_every_patient_is_left_out_once(n, most, sizes):
    patients = [f"p{k // 2}" for k in range(2 * n)]
    groups = rare.folds(["x"] * len(patients), patients, most, seed=0)
    assert [len(group) for group in groups] == sizes
    assert sorted(p for group in groups for p in group) == sorted(set(patients))
    assert groups == rare.folds(["x"] * len(patients), patients, most, seed=0)


def test_each_of_two_labels_stays_in_training():
    labels, patients = ["x"] * 3 + ["y"] * 2, ["a", "b", "c", "d", "e"]
    groups = rare.folds(labels, patients, 2, seed=1)
    assert all({label for label, p in zip(labels, patients) if p not in group} == {"x", "y"}
               for group in groups)
    for wrong in (["a"] * 5, ["a", "b", "c", "d", "d"]):
        with pytest.raises(InputError, match="has 1 patient in"):
            rare.folds(labels, wrong, 2, seed=1)


def test_the_fewest_steps_within_a_standard_error_are_taken():
    """Four patients; at 20 steps the loss is lowest, at 10 it is more by .01 ± .02, at 5 by 1."""
    lowest = np.array([1.0, 2.0, 3.0, 4.0])
    spread = np.array([-1.0, 1.0, -1.0, 1.0]) * 0.02
    held_out = np.stack([lowest + 1, lowest + 0.01 + spread, lowest, lowest + 0.5], 1)
    found = rare.choose([5, 10, 20, 40], held_out, held_out / 2, (lowest + 2)[:, None])
    assert (found["step"], found["lowest"], found["alike"]) == (10, 20, [10])
    assert found["gap"] == pytest.approx(1)
    # the differences from the base are 1.99 ∓ .02 of 4.5; t with 3 degrees of freedom is 3.182
    half = 3.1824 * 0.02 * (4 / 3) ** 0.5 / 2
    assert found["gain"] == pytest.approx([x / 4.5 for x in (1.99, 1.99 - half, 1.99 + half)],
                                          rel=1e-4)


def test_losses_that_are_all_noise_take_the_fewest_steps_and_resolve_nothing():
    wrong = gained = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        patient = rng.normal(1, 0.3, (10, 1))  # that patients differ does not count
        held_out, base = patient + rng.normal(0, 0.01, (10, 4)), patient + rng.normal(0, 0.01,
                                                                                     (10, 1))
        found = rare.choose([1, 2, 3, 4], held_out, held_out, base)
        wrong += len(found["alike"]) < 3
        gained += found["gain"][1] > 0
    assert gained < 0.1 * 200 and wrong < 0.4 * 200  # three comparisons with the luckiest of four


def test_a_new_label_begins_with_nothing_and_the_old_ones_stay(tiny, few, tmp_path):
    """At step 0 the losses are the base's with the label dropped; the base's labels keep their
    vectors."""
    old = store.load_pipeline(tiny / "diffusion")[0].conditioner
    table = read_table(few, split=False)
    start = begin.start_diffusion(str(tiny / "diffusion"), "", "TINY",
                                  {v.name: table.column(v.name) for v in old.variables}, "auto", 0)
    variable, before = start.model.conditioner.variables[0], old.variables[0]
    assert variable.values == (*before.values, "pneumothorax")
    weight, was = (c.embeddings[0].weight for c in (start.model.conditioner, old))
    assert torch.equal(weight[:3], was[:3]) and torch.equal(weight[4], was[3])
    assert not weight[3].any()
    store.save_vae(tmp_path / "new", start.vae, size=32)
    store.save_model(tmp_path / "new", start.model, start.schedule, start.prediction, size=32)
    new = Images(*load_pixels(table, 32))
    cfg = config(tiny, few, tmp_path)
    at_start, base = (rare.losses(folder, new, cfg) for folder in (tmp_path / "new",
                                                                   tiny / "diffusion"))
    assert np.array_equal(at_start, base) and at_start.shape == (5,) and (at_start > 0).all()
    # the times and noise of an image do not depend on the model, and those of two images differ
    assert len(set(at_start.tolist())) == 5


def test_a_run_resumes_and_keeps_the_last_model_without_a_copy(tiny, few, tmp_path, no_pictures,
                                                               monkeypatch, capsys):
    cfg = config(tiny, few, tmp_path / "r")
    looked = []

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rare, "copies_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        learn(cfg)
    out = tmp_path / "r/rare"
    sheet, first = map(images.read, (out / "rebuilt.png", Path(few) / "images/0-0.png"))
    assert sheet.shape[-2:] == (66, 168)  # the five images, and below them as they are given back
    assert (sheet[..., :32, :32] == first).all() and (sheet[..., 34:, :32] != first).any()
    left = {path: path.stat().st_mtime_ns for path in (*out.glob("fold-*/losses.json"),
                                                       out / "all/model.json")}
    assert len(left) == 3 and not [*out.glob("fold-*/run/snapshots")]

    def copying(folder, *_):
        looked.append(folder)
        return {"found": int(folder == out / "all"), "n": 2, "seen": 0.1, "probes": 5,
                "probes_found": 4}

    monkeypatch.setattr(rare, "copies_of", copying)
    monkeypatch.setattr(rare, "choose", lambda *args: {**choose(*args), "step": 4})
    learn(cfg)
    result = runs.read_json(out / "rare.json")
    assert looked == [out / "all", out / "all/snapshots/step_00000002"]
    assert result["kept"] == str(looked[1]) and "1 of 2 samples are copies" in result["text"]
    assert f"--run {looked[1]} --label pneumothorax" in capsys.readouterr().out
    assert left == {path: path.stat().st_mtime_ns if "fold" in str(path) else left[path]
                    for path in left}
    # no patient is on both sides of a fold, and each is held out in one of them
    for fold in range(2):
        table = read_table(out / f"fold-{fold}/data")
        held = set(table.select(split="val").column("patient"))
        assert held == set(result["folds"][fold]["patients"])
        assert held.isdisjoint(table.select(split="train").column("patient"))
        assert len(result["folds"][fold]["losses"]["2"]) == 5
    # all are trained on in the end, and what the base's data hold out stands in
    whole, base = read_table(out / "data"), read_table(tiny / "data")
    assert whole.select(split="train").column("label") == ["pneumothorax"] * 5
    held = base.select(split=("val", "test"))
    assert {*whole.select(split=("val", "test")).digests} == {*held.digests}
    assert {*read_table(out / "prior", split=False).digests} == {*base.select(
        split="train").digests}
    assert sample.watcher(sample.SampleConfig(run=str(out / "all"), root=str(out)), 32)
    model = runs.read_json(looked[1] / "model.json")
    assert model["variables"][0]["values"][-1] == "pneumothorax"
    for knob in ({"lr": 2e-3}, {"snapshots": 2}, {"guidance": 2.0}):
        with pytest.raises(InputError, match="holds a run with other settings"):
            learn(config(tiny, few, tmp_path / "r", **knob))


choose = rare.choose


def test_copies_are_looked_for_among_the_new_images(tiny, few, tmp_path, monkeypatch):
    """A generator that gives a training image back is found out; one that gives fresh ones is not.
    """
    cfg = config(tiny, few, tmp_path)
    new = Images(*load_pixels(read_table(few, split=False), 32))
    _, prior, labels = rare.read(cfg)
    monkeypatch.setattr(rare, "plan", lambda *_, **__: [])
    drawn = [phantom.phantom(6, 10 * k, 32, label="pneumothorax").image for k in range(20)]
    fresh = torch.from_numpy(np.stack(drawn))[:, None].expand(-1, 3, -1, -1)
    for made, copies in ((fresh, 0), (torch.cat([fresh, new.pixels[2:3]]), 1)):
        monkeypatch.setattr(rare, "make_images", lambda *_, made=made: made)
        found = rare.copies_of(tiny / "diffusion", new, prior, labels, cfg)
        assert found["found"] == copies and found["n"] == len(made)
    assert found["images"][0]["fake"] == 20 and found["images"][0]["train"] == 2


def test_what_cannot_be_learned_or_left_out_is_refused(tiny, few, tmp_path):
    def refused(match, **knobs):
        with pytest.raises(InputError, match=match):
            learn(config(tiny, few, tmp_path / "r", **knobs))
        assert not (tmp_path / "r/rare/config.json").exists()

    def data(name, label, patients, **cells):
        return (draw(tmp_path / name, label, patients, **cells),)

    refused("--init is missing: give a finished diffusion run", init="")
    refused("a.safetensors: give a finished diffusion run", init="a.safetensors")
    refused("holds 'covid', which .* knows: give new labels alone",
            data=data("old", "covid", range(3)))
    refused("'pneumothorax' has 1 patient in 1 --folds", data=data("one", "pneumothorax", [1]))
    refused("has no image to train on", data=data("held", "nodule", range(3), split="test"))
    refused("--folds", folds=1)
    prior = data("both", "pneumothorax", range(30, 36), split="train")[0]
    rows = read_table(prior).rows
    for split, wanted in (("train", "has no image in split val or test"),
                          ("val", "--prior holds 'pneumothorax', the new label")):
        write_table(Path(prior) / "metadata.csv", [{**rows[0], "split": split}, *rows[1:]])
        refused(wanted, prior=(prior,))
    held = read_table(tiny / "data").select(split="val").rows[0]["patient"]
    shared = read_table(few, split=False).rows
    write_table(Path(few) / "metadata.csv", [{**row, "patient": held} if row["patient"] == "p1"
                                             else row for row in shared])
    refused(f"patient {held} of --data is one of --prior, too")
    assert rare.read(config(tiny, few, tmp_path, distinct_patients=True))[2] == ["pneumothorax"]


@pytest.mark.slow
def test_what_the_gate_finds_is_what_the_table_says():
    from benchmarks import rare as measured
    kept = json.loads(measured.FILE.read_text())["gate"]
    assert kept[1] == json.loads(json.dumps(measured.gate(10)))
