"""study: the same call ends as an unbroken one, what breaks the protocol is refused, and the tables
say what was done.
"""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study_data import LABELS, TINY, toy, write_set

from minidiff.classification import inputs, study
from minidiff.data.table import read_table
from minidiff.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))  # classify.py is a script, beside the package
import classify

ARMS = ("real", "real-plain", "real+1xduplicates", "real+.5xsynthetic", "synthetic",
        "synthetic-then-real", "real@8+1xsynthetic", "real-strong-even")
SPLITS = ("train", "train", "train", "test", "val")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return root, dict(data=(write_set(root / "real", toy((30, 30, 30), 1), SPLITS, findings=True),),
                      synthetic=(write_set(root / "samples", toy((20, 20, 20), 2), findings=True),),
                      external=(write_set(root / "clinic", toy((4, 4, 0), 3), ("external",)),),
                      condition=("label", "view", "age"), device="cpu", arms=ARMS, seeds=2,
                      positive="light", **TINY)


@pytest.fixture(scope="module")
def unbroken(world):
    root, knobs = world
    classify.run_study(classify.Config(**knobs, out=str(root / "unbroken")))
    return root / "unbroken"


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_results_for_every_arm_seed_and_test_set(world, unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert {(r["arm"], r["seed"], r["test_set"]) for r in results} == {
        (arm, seed, name) for arm in ARMS for seed in (0, 1) for name in ("test", "clinic")}
    assert {r["arm"]: r["n_train"]
            for r in results} == dict(zip(ARMS, (54, 54, 108, 81, 60, 114, 68, 54)))
    summary = summary_of(unbroken)
    assert len(summary["arms"]) == 16 and {a["variable"]: a["n"]
                                           for a in summary["judge"]}["age"] == 18
    real = next(row for row in summary["arms"]
                if (row["arm"], row["test_set"]) == ("real@8+1xsynthetic", "test"))
    assert (real["real"], real["added_kind"], real["generator_extra"]) == (44, "synthetic", None)
    assert real["remark"] == "what its generator saw is unknown"
    assert {(d["arm"], d["against"]) for d in summary["differences"]["clinic"]} >= {
        ("real+.5xsynthetic", "real+1xduplicates"), ("synthetic-then-real", "real")}
    files = json.loads((unbroken / "judge" / "trained_on.json").read_text())
    train = read_table(world[1]["data"]).select(split="train")
    assert files == sorted(train.hashes[file] for file in train.column("file")) and len(files) == 54
    assert (unbroken / "study.html").stat().st_size > 10_000 and (unbroken / "arms.csv").is_file()


def test_what_is_tuned_is_tuned_on_validation(unbroken):
    """Threshold, temperature and conformal quantiles follow from the validation logits alone."""
    from minidiff.classification.calibration import pooled, probabilities, temperature
    from minidiff.classification.predictive_uncertainty import Conformal
    from minidiff.classification.scores import thresholds_at_specificity
    arm = unbroken / "arms" / "real"
    found = [json.loads((arm / str(seed) / "result.json").read_text()) for seed in (0, 1)]
    z = pooled(np.array([f["logits"]["val"] for f in found]))
    truth = np.eye(3, dtype=bool)[np.repeat(range(3), 6)]
    tuned = json.loads((arm / "tuned.json").read_text())
    assert tuned["temperature"] == temperature(z, truth) and tuned["seeds"] == [0, 1]
    assert tuned["thresholds"] == thresholds_at_specificity(probabilities(z), truth, LABELS)
    assert tuned["conformal"] == Conformal.fit(probabilities(z), truth).to_json()
    for one in found:
        looks = {line["step"]: line["val_loss"] for line in one["log"] if "val_loss" in line}
        assert one["best_step"] == min(looks, key=looks.get) and len(looks) == 8


def test_an_interrupted_study_ends_as_an_unbroken_one(world, unbroken, monkeypatch):
    root, knobs = world
    cfg, real_fit, calls = classify.Config(**knobs, out=str(root / "broken")), study.fit, []

    def fit(*args, **kwargs):
        calls.append(kwargs["progress"])
        if len(calls) == 7:  # in the second stage of synthetic-then-real
            raise KeyboardInterrupt
        return real_fit(*args, **kwargs)

    monkeypatch.setattr(study, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        classify.run_study(cfg)
    classify.run_study(cfg)
    # 18 fits, the interrupted pair again
    assert len(calls) == 20 and calls.count("synthetic-then-real, seed 0") == 4
    for name in ("results.json", "summary.json", "study.html", "judge/agreement.json",
                 "arms/real/1/result.json"):
        assert (root / "broken" / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_more_arms_are_added_and_other_settings_refused(world, unbroken, capsys):
    knobs = world[1]
    before = (unbroken / "results.json").read_bytes()
    with pytest.raises(InputError, match="steps: 8 there, 9 now"):
        classify.run_study(classify.Config(**{**knobs, "steps": 9}, out=str(unbroken)))
    stamp = (unbroken / "arms/real/0/result.json").stat().st_mtime_ns
    classify.run_study(classify.Config(**knobs, out=str(unbroken)))
    assert (unbroken / "results.json").read_bytes() == before
    assert (unbroken / "arms/real/0/result.json").stat().st_mtime_ns == stamp
    shown = capsys.readouterr().out
    for words in ("real+.5xsynthetic − real+1xduplicates", "clinic: 8 images of",
                  "2 of 2"):
        assert words in shown
    assert "note: samples: no patient ids: one image = one patient, assumed" in shown
    assert "what the generator was trained on is unknown" in shown


def test_the_primary_comparison_is_declared_and_stays(world, tmp_path, monkeypatch):
    knobs = {**world[1], "arms": ("real+1xduplicates", "real+1xsynthetic"), "seeds": 3,
             "out": str(tmp_path / "out")}
    classify.run_study(classify.Config(**knobs))
    primary = summary_of(tmp_path / "out")["primary"]
    assert (primary["arm"], primary["against"], primary["seeds"]) == ("real+1xsynthetic",
                                                                      "real+1xduplicates", 3)
    assert primary["difference"] == pytest.approx(
        np.mean(primary["by_seed"])) and primary["interval"][0] is not None
    page = (tmp_path / "out" / "study.html").read_text()
    assert page.index("Primary comparison") < page.index("Is there a shortcut:")
    assert "this one generator" in page
    with pytest.raises(InputError, match="primary.json declares real"):
        classify.run_study(classify.Config(**{**knobs,
                                              "primary": "real+1xduplicates:real+1xsynthetic"}))
    with pytest.raises(InputError, match="name both arms"):
        classify.run_study(classify.Config(**{**knobs, "arms": ("real",)}))


def test_without_equal_counts_nothing_is_primary_by_itself(unbroken):
    assert summary_of(unbroken)["primary"] is None and not (unbroken / "primary.json").exists()


def test_a_finished_pair_of_other_images_or_with_damage_is_refused(world, unbroken):
    knobs, path = world[1], unbroken / "arms/real/0/result.json"
    whole = path.read_text()
    form = json.loads(whole)
    for change, words in (({"trained_on": ["x"]}, "other training images"),
                          ({"tested_on": {}}, "in another order"),
                          ({"logits": {**form["logits"], "test": form["logits"]["test"][1:]}},
                           "are not 18 × 3 finite")):
        path.write_text(json.dumps({**form, **change}))
        with pytest.raises(InputError, match=words):
            classify.run_study(classify.Config(**knobs, out=str(unbroken)))
    path.write_text(whole[:50])
    with pytest.raises(InputError, match="result.json is damaged"):
        classify.run_study(classify.Config(**knobs, out=str(unbroken)))
    path.write_text(whole)


def test_bad_requests_are_one_sentence(world, tmp_path):
    knobs = world[1]

    def refused(match, **changes):
        with pytest.raises(InputError, match=match):
            classify.run_study(classify.Config(**{**knobs, "out": str(tmp_path / "out"),
                                                  **changes}))

    refused("run sample.py first", synthetic=(str(tmp_path / "none"),))
    refused("arm 'best'; allowed are real, real", arms=("best",))
    refused("name each of them once", arms=("real", "real"))
    refused("two folders are named 'synthetic'", synthetic=("a", "b"))
    refused("cannot be named 'real'", synthetic=("real=a",))
    refused("seeds is 0", seeds=0)
    refused("batch is 1; allowed are 2", batch=1)
    refused("without --init", arms=("real-scratch",))
    refused("--positive ill: training has dark, light, striped", positive="ill")
    refused("names view twice", condition=("label", "view", "view"))
    refused("--target height: no such column", target="height")
    refused("write column=value; source has real", hold_out="source=mars")
    refused("source has real", hold_out="source=")
    refused("height has no value", hold_out="height=")
    refused("a set is named 'test' already", hold_out="split=test")
    refused("a set of real images is named 'train'", synthetic=(f"train={knobs['synthetic'][0]}",),
            arms=("real", "train"))
    refused("a set of real images is named 'clinic'",
            synthetic=(f"clinic={knobs['synthetic'][0]}",), arms=("real+clinic",))
    refused("--target age: numbers from 20 to 67", target="age", external=())
    refused("no such column in .*clinic", target="findings")
    refused("--even height: no training image has it", even=("height",))
    refused("real-even weighs labels that exclude each other", target="findings", external=(),
            arms=("real-even",))
    refused("needs 162 images of 'dark'; synthetic has 20", arms=("real", "real+9xsynthetic"))
    refused("condition 'height' has no known value", condition=("label", "height"))
    refused("no such folder", data=(str(tmp_path / "none"),))
    refused("crosses splits",
            external=(write_set(tmp_path / "copy", toy((30, 30, 30), 1), ("external",)),))
    assert not (tmp_path / "out").exists()


def test_several_labels_an_image(world, tmp_path):
    """--target findings: cells a|b make the study multi-label, from the loss to the page."""
    knobs = {**world[1], "target": "findings", "external": (), "arms": ("real", "real+1xsynthetic"),
             "positive": "odd"}
    classify.run_study(classify.Config(**knobs, out=str(tmp_path / "out")))
    summary = summary_of(tmp_path / "out")
    assert summary["labels"] == ["dark", "light", "odd", "striped"] and not summary["exclusive"]
    assert summary["arms"][0]["ensemble"]["accuracy"] is None and summary["arms"][0][
        "auroc_macro"] is not None
    p = json.loads((tmp_path / "out/arms/real/0/result.json").read_text())["logits"]["test"]
    assert np.shape(p) == (18, 4)


def test_the_label_is_no_metadata_of_itself(world, tmp_path, monkeypatch):
    """Wherever it stands among the conditions: a shortcut that knows the answer would be none."""
    monkeypatch.setattr(classify, "study_page", lambda *_: "")
    knobs = {**world[1], "external": (), "arms": ("real",), "seeds": 1,
             "condition": ("view", "label")}
    classify.run_study(classify.Config(**knobs, out=str(tmp_path / "out")))
    rows = json.loads((tmp_path / "out/audit.json").read_text())["rows"]
    # views say nothing of these labels
    assert max(row["auroc"] for row in rows if row["features"] == "metadata") < 0.9


def test_a_start_from_another_run_and_what_it_may_not_be(world, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "study_page", lambda *_: "")
    knobs = {**world[1], "external": (), "arms": ("real", "real-scratch"), "seeds": 1, "steps": 1,
             "lr": 1e-12}
    classify.run_study(classify.Config(**knobs, init=str(unbroken / "arms/real/0"),
                                       out=str(tmp_path / "out")))
    logits = [json.loads((path / "result.json").read_text())["logits"]["test"]
              for path in (unbroken / "arms/real/0", tmp_path / "out/arms/real/0",
                           tmp_path / "out/arms/real-scratch/0")]
    assert np.abs(np.subtract(*logits[:2])).max() < np.abs(np.subtract(logits[0], logits[2])).max()
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for init, words in ((tmp_path / "none", "no such folder or file"),
                        (tmp_path / "evil.pth", "no weights can be read"),
                        (unbroken, "holds no predictor")):
        with pytest.raises(InputError, match=words):
            classify.run_study(classify.Config(**knobs, init=str(init),
                                               out=str(tmp_path / "other")))
    with pytest.raises(InputError, match="--width 12"):
        knobs["width"] = 12
        classify.run_study(classify.Config(**knobs, init=str(unbroken / "judge"),
                                           out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_predictions_of_new_images(world, unbroken, tmp_path):
    out = tmp_path / "new.csv"
    knobs = {"model": str(unbroken), "arm": "real", "data": world[1]["external"][0],
             "out": str(out), "device": "cpu"}
    classify.predict(classify.PredictConfig(**knobs))
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 8 and all(abs(sum(float(r[f"p_{k}"]) for k in LABELS) - 1) < 1e-5
                                  for r in rows)
    assert set(rows[0]) == {"file_name", *(f"p_{k}" for k in LABELS), "set", "entropy",
                            "disagreement", "typical"}
    found = [json.loads((unbroken / f"arms/real/{k}/result.json").read_text()) for k in (0, 1)]
    p = torch.tensor([one["logits"]["clinic"] for one in found]).softmax(-1).numpy()
    assert [float(r["disagreement"]) for r in rows] == pytest.approx(
        list((p * np.log(p)).sum(-1).mean(0) - (p.mean(0) * np.log(p.mean(0))).sum(-1)), abs=2e-6)
    # an earlier table of predictions may be replaced, nothing else
    classify.predict(classify.PredictConfig(**knobs))
    table = Path(world[1]["data"][0]) / "metadata.csv"
    before = table.read_bytes()
    for changes, words in (({"out": str(table)}, "no table of predictions"),
                           ({"out": str(tmp_path)}, "no table of pred"),
                           ({"arm": "best"}, "has real, real"),
                           ({"data": str(tmp_path / "none")}, "no such folder"),
                           ({"model": str(tmp_path)}, "no finished study"),
                           ({"data": str(tmp_path)}, "no PNG or JPEG")):
        with pytest.raises(InputError, match=words):
            classify.predict(classify.PredictConfig(**{**knobs, "arm": "", **changes}))
    assert table.read_bytes() == before
    for name, data, words in (("typical.safetensors", b"abc", "is damaged"),
                              ("typical.safetensors", None, "not finished"),
                              ("tuned.json", b"{}", "is damaged; run the study's command again")):
        path = unbroken / "arms/real" / name
        whole = path.read_bytes()
        path.write_bytes(data) if data else path.unlink()
        with pytest.raises(InputError, match=words):
            classify.predict(classify.PredictConfig(**knobs))
        path.write_bytes(whole)


def test_two_processes_share_the_pairs(world, unbroken, tmp_path):
    knobs = {**world[1], "arms": ("real", "real+1xduplicates"), "out": str(tmp_path / "out")}
    words = [word for name, value in knobs.items()
             for word in (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", "--", classify.__file__, *words], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    for pair in ("real/0", "real/1", "real+1xduplicates/0", "real+1xduplicates/1"):
        name = f"arms/{pair}/result.json"
        assert (tmp_path / "out" / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert len(summary_of(tmp_path / "out")["arms"]) == 4


# ---- the protocol


def read(world, **changes):
    knobs = {**world[1], **changes}
    return inputs.read(knobs["data"], {"synthetic": knobs["synthetic"][0]}, knobs["external"],
                       size=32, seed=0, out="x/out",
                       **{name: changes[name] for name in ("hold_out", "near_copies", "skip_bad")
                          if name in changes})


def test_real_images_are_no_synthetic_ones(world, tmp_path):
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    copy = next(Path(world[1]["data"][0]).rglob("*.png"))
    (Path(samples) / "images" / "light" / "005.png").write_bytes(copy.read_bytes())
    with pytest.raises(InputError,
                       match=r"samples holds 1 file of the real data, e\.g\. .*light/005.png"):
        read(world, synthetic=(samples,))
    with pytest.raises(InputError, match="real holds 90 files of the real data"):
        read(world, synthetic=world[1]["data"])


@pytest.mark.parametrize("which", ["val", "test", "clinic"])
def test_a_generator_that_saw_a_held_out_image_is_refused(world, tmp_path, which):
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    real, clinic = read_table(world[1]["data"]), read_table(world[1]["external"])
    train = [real.hashes[row["file"]] for row in real.select(split="train").rows]
    held_out = clinic.rows[0] if which == "clinic" else real.select(split=which).rows[3]
    manifest = Path(samples) / "manifest.json"
    manifest.write_text(json.dumps({"trained_on": train}))
    found = read(world, synthetic=(samples,))
    assert found.saw["synthetic"] == set(train) and not any("trained on" in note
                                                            for note in found.notes)
    manifest.write_text(
        json.dumps({"trained_on": [*train, {**real.hashes, **clinic.hashes}[held_out["file"]]]}))
    with pytest.raises(InputError, match="the generator was trained on 1 of 44 held-out images"):
        read(world, synthetic=(samples,))


def test_a_near_copy_in_a_test_set_is_refused_or_left_out(world, tmp_path):
    """A training picture, brightened and saved anew: other bytes, the same film."""
    films = torch.rand(15, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    films = 200 * torch.nn.functional.interpolate(films, (96, 96), mode="bicubic").clamp(0, 1)
    ours, theirs = films[:12].to(torch.uint8), (torch.cat([1.1 * films[:1],
                                                           films[12:]])).to(torch.uint8)
    data = write_set(tmp_path / "real", replace(toy((4, 4, 4), 7), pixels=ours),
                     ("train", "train", "test", "val"))
    clinic = write_set(tmp_path / "clinic", replace(toy((2, 2, 0), 8), pixels=theirs),
                       ("external",))
    knobs = {"size": 96, "seed": 0, "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match="1 near copy .*clinic.*--near-copies drop"):
        inputs.read((data,), {}, (clinic,), **knobs)
    found = inputs.read((data,), {}, (clinic,), **knobs, near_copies="drop")
    assert len(found.sets["clinic"]) == 3 and any("1 near copies" in note and "000.png" in note
                                                  for note in found.notes)


def test_files_too_small_to_be_compared_are_not_refused_but_noted(world, tmp_path):
    """At 32 px two films of one outline look like copies; what is compared does not hang on the
    size of the study.
    """
    found = read(world)
    assert any("near copies were not looked for: with files of fewer than 96 px" in note
               for note in found.notes)
    films = torch.rand(15, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    films = 200 * torch.nn.functional.interpolate(films, (96, 96), mode="bicubic").clamp(0, 1)
    films[3] = (1.1 * films[2]).clamp(0, 255)  # a training film in the test set, brighter
    data = write_set(tmp_path / "real", replace(toy((5, 5, 5), 7), pixels=films.to(torch.uint8)),
                     SPLITS)
    knobs = {"seed": 0, "out": str(tmp_path / "out"), "size": 32}
    with pytest.raises(InputError, match="1 near copy of training or validation"):
        inputs.read((data,), {}, (), **knobs)


def test_a_validation_patient_in_an_external_set_is_refused(world, tmp_path):
    clinic = Path(write_set(tmp_path / "clinic", toy((4, 4), 9), ("external",)))
    of_val = read_table(world[1]["data"]).select(split="val").rows[0]["patient"]
    text = (clinic / "metadata.csv").read_text()
    (clinic / "metadata.csv").write_text(text.replace("external,9-0,", f"external,{of_val},"))
    with pytest.raises(InputError, match=f"patient '{of_val}' crosses splits"):
        read(world, external=(str(clinic),))


def test_a_generator_that_saw_another_image_of_a_held_out_patient_is_refused(world, tmp_path):
    """Of a patient with films of two views, one view is held out; the generator saw the other."""
    data = write_set(tmp_path / "real", toy((40, 40, 40), 5, per_patient=2),
                     ("train",) * 6 + ("test",) * 2 + ("val",) * 2)
    lines = (Path(data) / "metadata.csv").read_text().splitlines()
    views = {f"5-{k}": "AP,PA" if k in (0, 1, 20, 21, 40, 41) else "PA,PA" for k in range(60)}
    new = [lines[0]]
    for i, line in enumerate(lines[1:]):
        name, label, split, patient, _, age = line.split(",")
        new.append(",".join((name, label, split, patient, views[patient].split(",")[i % 2], age)))
    (Path(data) / "metadata.csv").write_text("\n".join(new) + "\n")
    table = read_table(data)
    row = next(row for row in table.rows if row["patient"] == "5-0" and row["view"] == "PA")
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    (Path(samples) / "manifest.json").write_text(
        json.dumps({"trained_on": [table.hashes[row["file"]]]}))
    with pytest.raises(InputError,
                       match="its generator was trained on other images of 1 held-out patients"):
        read(world, data=(data,), external=(), synthetic=(samples,), hold_out="view=AP")


def test_a_source_held_out_is_a_test_set_of_its_own(world, tmp_path):
    ours = write_set(tmp_path / "ours", toy((20, 20, 20), 5), SPLITS)
    theirs = write_set(tmp_path / "theirs", toy((0, 20), 6), SPLITS)
    found = read(world, data=(ours, theirs), external=(), hold_out="source=theirs")
    held = found.sets["theirs"]
    assert {row["source"] for name in ("train", "val", "test")
            for row in found.sets[name].rows} == {"ours"}
    assert [row["source"] for row in held.rows].count("theirs") == 20
    assert any("theirs has light only" in note for note in found.notes)
    assert {row["label"] for row in held.rows if row["source"] == "ours"} == {"dark", "striped"}


def test_without_a_validation_split_one_is_taken_from_training(world, tmp_path):
    data = write_set(tmp_path / "real", toy((20, 20, 20), 5, per_patient=2),
                     ("train", "train", "test", "test"))
    found = read(world, data=(data,), external=())
    assert not set(found.sets["val"].patients) & set(
        found.sets["train"].patients) and len(found.sets["test"]) == 30
    assert set(found.sets["val"].labels.tolist()) == {0, 1, 2} and any("no validation split" in note
                                                                       for note in found.notes)


@pytest.mark.parametrize("cells, words", [
    ({"train": ["a", "a"], "val": ["a"], "test": ["a", "b"]}, "train has only 'a', 2 images"),
    ({"train": ["a", "b"], "test": ["b"]}, "test has only 'b', 1 image"),
    ({"train": ["a", "b"], "test": []}, "test has no image"),
    ({"train": ["a", "b"], "test": ["a", "c", "d"]},
     "test has labels that the train split has not: c, d; train has a, b"),
    ({"train": ["a", "b", "c"], "val": ["a", "b"]}, "val has no image of c, which training has"),
    ({"train": ["a", "b"], "clinic": ["z", "z"]}, "clinic has only 'z', 2 images"),
])
def test_sets_that_cannot_be_studied_are_refused(cells, words):
    with pytest.raises(InputError, match=words):
        inputs.check_labels(cells)


def test_assumed_patients_of_folders_of_one_name_are_not_the_same(world, tmp_path):
    ours, theirs = (write_set(tmp_path / where / "chest", toy((20, 20, 20), seed))
                    for where, seed in (("a", 5), ("b", 6)))
    found = inputs.read((ours,), {}, (theirs,), size=32, seed=0, out=str(tmp_path / "out"))
    assert len(found.sets["chest"]) == 60 and not set(found.sets["chest"].patients) & set(
        found.sets["train"].patients)


def test_a_label_lost_to_skip_bad_is_refused(world, tmp_path):
    folder = Path(write_set(tmp_path / "real", toy((10, 10, 4), 5),
                            ("train", "test", "val", "train")))
    (folder / "images" / "striped" / "021.png").write_bytes(b"x")
    with pytest.raises(InputError, match="test has no image of striped"):
        read(world, data=(str(folder),), external=(), skip_bad=True)
