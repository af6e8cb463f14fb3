"""study: the same call ends as an unbroken one, bad requests are refused, and the tables say what
was done.
"""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from study_data import LABELS, SPLITS, TINY, toy, write_set, write_world

from minidiff.classification import inputs, study
from minidiff.data.table import read_table
from minidiff.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))  # classify.py is a script, beside the package
import classify

ARMS = ("real", "real-plain", "real+1xduplicates", "real+.5xsynthetic", "synthetic",
        "synthetic-then-real", "real@8+1xsynthetic", "real-strong-even")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return root, dict(write_world(root), condition=("label", "view", "age"), device="cpu",
                      arms=ARMS, seeds=2, positive="light", **TINY)


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


def test_who_has_few_images_tunes_with_few(unbroken):
    """8 of 18 training images are light: so 3 of 6 of validation, and all that is tuned is theirs.
    """
    from minidiff.classification.calibration import pooled, probabilities, temperature
    from minidiff.classification.predictive_uncertainty import Conformal
    arm = unbroken / "arms" / "real@8+1xsynthetic"
    z = pooled(np.array([json.loads((arm / f"{seed}/result.json").read_text())["logits"]["val"]
                         for seed in (0, 1)]))
    truth = np.eye(3, dtype=bool)[np.repeat(range(3), (6, 3, 6))]
    tuned = json.loads((arm / "tuned.json").read_text())
    assert z.shape == (15, 3) and tuned["temperature"] == temperature(z, truth)
    assert tuned["conformal"] == Conformal.fit(probabilities(z), truth).to_json()
    assert len(json.loads((arm / "distances.json").read_text())) == 15
    notes = summary_of(unbroken)["notes"]
    assert ("real@8+1xsynthetic: validation has 3 of the 6 images of light, as training has at "
            "most 8 of 18") in notes
    assert any(note.startswith("real@8+1xsynthetic: light is in every set: 3 ") for note in notes)
    assert any(note.startswith("light is in every set: 6 ") for note in notes)


def test_real_before_real_differs_from_its_counterpart_in_the_images_alone(world, tmp_path,
                                                                          monkeypatch):
    """Looks, rates, seeds, weights of the classes and the choice of the best are the same."""
    knobs, real_fit, calls = world[1], study.fit, []
    data = inputs.read(knobs["data"], {"synthetic": knobs["synthetic"]}, (), size=32, seed=0,
                       out=str(tmp_path / "out"))
    recipe = study.Recipe(**TINY, positive="light")

    def fit(predictor, pixels, labels, **given):
        log = real_fit(predictor, pixels, labels, **given)
        calls.append((pixels, {name: x for name, x in given.items() if name not in (
            "progress", "sample_weight", "validation")}, log))
        return log

    monkeypatch.setattr(study, "fit", fit)
    results = [study.train_pair(tmp_path / name, study.kinds.parse(name, ["synthetic"]), 0, data,
                                recipe) for name in ("synthetic-then-real", "real-then-real")]
    real = data.sets["train"].pixels
    assert [torch.equal(pixels, real) for pixels, *_ in calls] == [False, True, True, True]
    assert calls[0][1] == calls[2][1] and calls[1][1] == calls[3][1]
    assert [given["start"] for _, given, _ in calls] == [0, 4, 0, 4]
    for (*_, first), (*_, second), result in zip(calls[::2], calls[1::2], results):
        assert result["log"] == first + second
        assert [line["step"] for line in second] == [5, 6, 7, 8]
        assert [line["lr"] for line in first] == [line["lr"] for line in second]
        best = min(second, key=lambda line: line["val_loss"])
        assert result["best_step"] == best["step"]
    assert results[1]["n_train"] == 108


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
    for words in ("real+.5xsynthetic − real+1xduplicates", "clinic: 8 images of", "detectable"):
        assert words in shown
    assert "note: samples: no patient ids: one image = one patient, assumed" in shown
    assert re.search("what the generator of .*samples was trained on is unknown", shown)


def test_the_primary_comparison_is_declared_and_stays(world, tmp_path):
    knobs = {**world[1], "arms": ("real+1xduplicates", "real+1xsynthetic"), "seeds": 3,
             "worth": 2.0, "out": str(tmp_path / "out")}
    classify.run_study(classify.Config(**knobs))
    summary = summary_of(tmp_path / "out")
    primary = summary["primary"]
    assert (primary["arm"], primary["against"], primary["seeds"], summary["worth"]) == (
        "real+1xsynthetic", "real+1xduplicates", 3, 2)
    assert primary in summary["differences"]["test"] and primary["primary"]
    assert primary["difference"] == pytest.approx(
        np.mean(primary["by_seed"])) and primary["interval"][0] is not None
    shares = {row["arm"]: row["balanced_accuracy"] for row in summary["arms"]
              if row["test_set"] == "test"}  # the figures of the table differ by the difference
    assert primary["difference"] == pytest.approx(
        shares["real+1xsynthetic"] - shares["real+1xduplicates"])
    page = (tmp_path / "out" / "study.html").read_text()
    assert page.index("Primary comparison") < page.index("Is there a shortcut:")
    assert "this one generator" in page and primary["answer"] in page
    for change, words in (
            ({"primary": "real+1xduplicates:real+1xsynthetic"}, "primary.json declares real"),
            ({"primary": "real+1xsynthetic:real+1xduplicates:auroc"}, "primary.json declares real"),
            ({"worth": 3.0}, "--worth 3: .*primary.json declares 2, and arms are trained"),
            ({"arms": ("real",)}, "name both arms")):
        with pytest.raises(InputError, match=words):
            classify.run_study(classify.Config(**{**knobs, **change}))


def test_net_benefit_stands_beside_auroc_where_a_prevalence_is_stated(world, tmp_path):
    knobs = {**world[1], "arms": ("real+1xduplicates", "real+1xsynthetic", "real@8"), "seeds": 3,
             "prevalence": 0.05, "primary": "real+1xsynthetic:real+1xduplicates:net_benefit",
             "worth": 1.0, "out": str(tmp_path / "out")}
    classify.run_study(classify.Config(**knobs))
    summary = summary_of(tmp_path / "out")
    shares = {row["arm"]: row["net_benefit"] for row in summary["arms"]
              if row["test_set"] == "test"}
    assert all(0.05 - 0.095 <= x <= 0.05 for x in shares.values())
    assert summary["benefit"]["of_all"] == pytest.approx(0.05 - 0.095)
    first = summary["primary"]
    assert first["metric"] == "net_benefit" and first["difference"] == pytest.approx(
        shares["real+1xsynthetic"] - shares["real+1xduplicates"])
    page = " ".join((tmp_path / "out" / "study.html").read_text().split())
    assert "net benefit, cases per 100" in page and "where 5.0 % have it and 10 false" in page
    assert "net benefit: did synthetic images help more" in page
    with pytest.raises(InputError, match="declares --prevalence 0.05 --false-alarms 10, and arms"):
        classify.run_study(classify.Config(**{**knobs, "prevalence": 0.1}))


def test_without_equal_counts_nothing_is_primary_by_itself(world, unbroken):
    assert summary_of(unbroken)["primary"] is None and not (unbroken / "primary.json").exists()
    late = {**world[1], "out": str(unbroken), "primary": "real-plain:real"}
    with pytest.raises(InputError, match="--primary real-plain:real: both arms are trained"):
        classify.run_study(classify.Config(**late))
    with pytest.raises(InputError, match="--worth 2 needs a primary comparison"):
        classify.run_study(classify.Config(**{**world[1], "out": str(unbroken), "worth": 2.0}))


def test_a_finished_pair_of_other_images_or_with_damage_is_refused(world, unbroken):
    knobs, path = world[1], unbroken / "arms/real/0/result.json"
    whole = path.read_text()
    form = json.loads(whole)
    for change, words in (({"trained_on": ["x"]}, "was trained on other images"),
                          ({"tested_on": {}}, "was tested on other images .* in another order"),
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
    refused("two folders are named 'a'", synthetic=("a=x", "a=y"))
    refused("cannot be named 'real'", synthetic=("real=a",))
    refused("seeds is 0", seeds=0)
    refused("--worth -1; allowed are 0", worth=-1.0)
    refused("--prevalence 5; allowed are 0, .* below 1, e.g. .05 for 5 %", prevalence=5.0)
    refused("--false-alarms 0; allowed", prevalence=0.1, false_alarms=0.0)
    refused("--primary real-plain:real:net_benefit: no figure is named net_benefit",
            primary="real-plain:real:net_benefit", out=str(tmp_path / "no prevalence"))
    refused("batch is 1; allowed are 2", batch=1)
    refused("without --init", arms=("real-scratch",))
    refused("--positive ill: training has dark, light, striped", positive="ill")
    refused("names view twice", condition=("label", "view", "view"))
    refused("--target height: no such column", target="height")
    refused("write column=value; source has real", hold_out="source=mars")
    refused("source has real", hold_out="source=")
    refused("height has no value", hold_out="height=")
    refused("two sets are named 'test'", hold_out="split=test")
    refused("two sets are named 'train'.*write --synthetic NAME=DIR", arms=("real", "train"),
            synthetic=(f"train={knobs['synthetic'][0]}",))
    refused("two sets are named 'clinic'", external=(*knobs["external"], *knobs["external"]))
    refused("two sets are named 'clinic'",
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
    for init, words in ((tmp_path / "none", "none: no weights can be read .*No such file"),
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


def test_predictions_of_new_images(world, unbroken, tmp_path, monkeypatch):
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
    # an earlier table of predictions may be replaced, nothing else; mapped images, without a split,
    # give the same one
    written = out.read_bytes()
    monkeypatch.setenv("MINIDIFF_CACHE", str(tmp_path / "maps"))
    classify.predict(classify.PredictConfig(**knobs))
    assert out.read_bytes() == written and [*(tmp_path / "maps").glob("*.pixels")]
    monkeypatch.delenv("MINIDIFF_CACHE")
    table = Path(world[1]["data"][0]) / "metadata.csv"
    before = table.read_bytes()
    for changes, words in (({"out": str(table)}, "no table of predictions"),
                           ({"out": str(tmp_path)}, "no table of pred"),
                           ({"arm": "best"}, "has real, real"),
                           ({"data": str(tmp_path / "none")}, "none: no PNG, JPEG"),
                           ({"model": str(tmp_path)}, "no finished study"),
                           ({"data": str(tmp_path)}, "no PNG, JPEG")):
        with pytest.raises(InputError, match=words):
            classify.predict(classify.PredictConfig(**{**knobs, "arm": "", **changes}))
    assert table.read_bytes() == before
    spoilt = json.loads((unbroken / "arms/real/tuned.json").read_text())
    spoilt["conformal"]["thresholds"][0] = "x"
    again = "arms/real: .* or damaged .*; run the study's command again"
    for name, data, words in (("typical.safetensors", b"abc", again),
                              ("typical.safetensors", None, again), ("tuned.json", b"{}", again),
                              ("tuned.json", json.dumps(spoilt).encode(), again),
                              ("distances.json", None, "distances.json: no such file")):
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


@pytest.mark.parametrize("target", ["label", "view"])
def test_the_judge_weighs_the_classes_of_its_target_alike(world, tmp_path, monkeypatch, target):
    """Whatever column is the target; training has twice as many images of one value."""
    given = {}

    def fit(judge, pixels, labels, **knobs):
        given.update(knobs, labels=labels)
        return []

    monkeypatch.setattr(classify, "fit", fit)
    table = Path(write_set(tmp_path / "real", toy((30, 15, 30), 1), SPLITS)) / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line.replace(",PA,", ",AP,") if i % 3 == 1 else line
                               for i, line in enumerate(lines)) + "\n")
    cfg = classify.Config(**{**world[1], "target": target, "condition": ("label",)})
    data = inputs.read((str(table.parent),), {}, (), size=32, seed=0, out=str(tmp_path / "out"),
                       target=target)
    classify.train_judge(cfg, tmp_path / "judge", data, [data.target])
    weight = given["weights"]["label"][given["labels"]["label"]]
    of_class = [weight[given["labels"]["label"] == k].sum().item() for k in range(len(data.labels))]
    assert weight.unique().numel() > 1 and of_class == pytest.approx([of_class[0]] * len(of_class))
