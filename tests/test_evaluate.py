"""The script: what it refuses, what it says is missing, and that it makes the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import SECTIONS, Page

import evaluate
from minidiff import config as settings
from minidiff.classification.predictor import Predictor
from minidiff.data import images, phantom
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.variables import Category, Number


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small phantom, and other phantoms in the place of synthetic images."""
    folder = tmp_path_factory.mktemp("demo")
    phantom.write(folder / "real", n=240, size=32, seed=0)
    made = []
    for i in range(90):
        p = phantom.phantom(1, i, 32)
        name = f"images/{p.row['label']}/{i:06d}.png"
        images.write(folder / "samples" / name, p.image)
        made.append({"file_name": name, "label": p.row["label"], "set": "1", "sex": p.row["sex"], "age": p.row["age"]})
    write_table(folder / "samples" / "metadata.csv", made)
    return folder


def config(demo, **more):
    absent = {name: str(demo / name) for name in ("classifier", "vae", "diffusion")}
    return evaluate.Config(**{"data": (str(demo / "real"),), "samples": str(demo / "samples"), "out": str(demo / "report"),
                              "repeats": 10, **absent, **more})


def test_the_script_from_folders_to_page(demo):
    evaluate.run_report(config(demo))
    result = json.loads((demo / "report/report.json").read_text())
    page = Page((demo / "report/report.html").read_text())
    assert page.ids == SECTIONS and "No judge was found" in page.text
    assert result["data"]["size"] == 32 and result["samples"]["labels"] == {"covid": 30, "normal": 30, "pneumonia": 30}
    assert result["data"]["n_train"] + result["data"]["n_heldout"] == 240 and result["neighbours"]["suspected"] is False
    made = next(r for r in result["distances"] if r["set"] == "synthetic")
    assert made["KD_low"] < made["KD_floor"]["high"]                          # phantoms are like phantoms
    evaluate.run_report(config(demo))                                         # the same command again is no fault


def test_the_script_with_a_judge(demo, tmp_path):
    variables = [Category("label", ("covid", "normal", "pneumonia")), Number("age", 55.0, 20.0, 20.0, 90.0),
                 Category("view", ("AP", "PA"))]
    Predictor(variables, width=4, size=32).save(tmp_path / "judge")
    evaluate.run_report(config(demo, classifier=str(tmp_path), out=str(tmp_path / "report")))
    result = json.loads((tmp_path / "report/report.json").read_text())
    assert {r["extractor"] for r in result["distances"]} == {"pixels-pca64", "classifier"}
    assert [(r["variable"], r["set"]) for r in result["agreement"]] == [
        (v, s) for s in ("held-out real", "synthetic") for v in ("label", "age")]          # view was never asked for
    assert [s["space"] for s in result["neighbours"]["spaces"]] == ["pixels", "pixels, moved", "classifier"]


def test_faults_of_input_are_named(demo, tmp_path):
    out = str(tmp_path / "r")
    with pytest.raises(InputError, match="folder of real data"):
        evaluate.run_report(config(demo, samples=str(demo / "real"), out=out))
    with pytest.raises(InputError, match="folder of real data"):
        evaluate.run_report(config(demo, samples=str(demo / "real" / "images"), out=out))
    with pytest.raises(InputError, match="no such folder"):
        evaluate.run_report(config(demo, samples=str(demo / "nothing"), out=out))
    for knobs, match in (({"repeats": 1}, "repeats 1"), ({"size": 1}, "size 1"), ({"shown": 0}, "shown 0")):
        with pytest.raises(InputError, match=match):
            evaluate.run_report(config(demo, out=out, **knobs))
    for flag, value in (("--seed", "-1"), ("--repeats", "0")):
        with pytest.raises(InputError, match=f"{flag} {value}"):
            settings.parse(evaluate.VERBS, "report", "", [flag, value])
    shutil.copytree(demo / "real", tmp_path / "copy")
    with pytest.raises(InputError, match="files of the real data"):
        evaluate.run_report(config(demo, samples=str(tmp_path / "copy"), out=out))
    image = np.asarray(torch.randint(0, 255, (32, 32), dtype=torch.uint8))
    for i in range(3):
        images.write(tmp_path / "odd" / "tumour" / f"{i}.png", image + i)
    with pytest.raises(InputError, match="no label tumour"):
        evaluate.run_report(config(demo, samples=str(tmp_path / "odd"), out=out))


def test_one_real_file_among_the_samples_is_refused(demo, tmp_path):
    shutil.copytree(demo / "samples", tmp_path / "samples")
    name = (tmp_path / "samples/metadata.csv").read_text().splitlines()[1].split(",")[0]
    shutil.copy(next((demo / "real").rglob("*.png")), tmp_path / "samples" / name)
    with pytest.raises(InputError, match=f"holds 1 files of the real data, e.g. .*{name}"):
        evaluate.run_report(config(demo, samples=str(tmp_path / "samples"), out=str(tmp_path / "r")))


def test_a_generator_or_judge_that_saw_held_out_images_is_refused(demo, tmp_path):
    real = read_table(demo / "real", split_dir=demo)
    held, train = (real.hashes[real.select(split=name).rows[0]["file"]] for name in ("test", "train"))
    shutil.copytree(demo / "samples", tmp_path / "samples")
    Predictor([Category("label", ("covid", "normal", "pneumonia"))], width=4, size=32).save(tmp_path / "judge")
    cfg = config(demo, samples=str(tmp_path / "samples"), classifier=str(tmp_path), out=str(tmp_path / "r"))
    assert {f"what {who} was trained on is unknown" for who in ("the generator", "the judge")} <= set(
        evaluate.notes(evaluate.read(cfg)[0]))
    for name, who in (("samples/manifest.json", "the generator"), ("judge/trained_on.json", "the judge")):
        for hashes in ([train, held], [train]):                               # the second is as it should be
            (tmp_path / name).write_text(json.dumps({"trained_on": hashes} if who == "the generator" else hashes))
            if held in hashes:
                with pytest.raises(InputError, match=f"{who} was trained on 1 of"):
                    evaluate.read(cfg)
    assert not any("unknown" in note for note in evaluate.notes(evaluate.read(cfg)[0]))


def test_what_was_left_out_of_any_set_is_said(demo, tmp_path):
    for name in ("real", "samples"):
        shutil.copytree(demo / name, tmp_path / name)
    parts = read_table(tmp_path / "real", split_dir=tmp_path)
    bad = [parts.select(split=name).rows[0]["file"] for name in ("train", "test")]
    bad += [read_table(tmp_path / "samples", split=False).rows[0]["file"]]     # the first sample gave the size
    for k, path in enumerate(bad):
        Path(path).write_bytes(b"no image %d" % k)
    cfg = config(demo, data=(str(tmp_path / "real"),), samples=str(tmp_path / "samples"), out=str(tmp_path / "r"))
    with pytest.raises(InputError, match="cannot be read"):
        evaluate.read(cfg)
    tables, pixels = evaluate.read(replace(cfg, skip_bad=True))
    found = evaluate.notes(tables)
    assert pixels["train"].shape[-1] == 32 and len(found) == len(set(found))
    assert all(any(path in note for note in found) for path in bad) and not any("samples: no patient" in n for n in found)


def test_faults_show_before_the_work_and_absent_inputs_are_named(demo, tmp_path, monkeypatch, capsys):
    def work(*_, **__):
        raise AssertionError("the long computing has begun")

    monkeypatch.setattr(evaluate, "compare", work)
    monkeypatch.setattr(evaluate.PixelPCA, "fit", work)
    for name in ("results.json", "summary.json", "config.json"):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / name).write_text('{"a": ')
        with pytest.raises(InputError, match=f"{name} is damaged"):
            evaluate.run_report(config(demo, classifier=str(tmp_path / "broken"), out=str(tmp_path / "r")))
        (tmp_path / "broken" / name).unlink()
    printed = capsys.readouterr().out
    assert all(f"{demo / path} is absent" in printed for path in ("vae/vae.json", "vae/log.jsonl", "diffusion/log.jsonl"))
    Predictor([Category("label", ("covid", "normal"))], width=4, size=32).save(tmp_path / "judge")
    with pytest.raises(InputError, match="pneumonia"):
        evaluate.run_report(config(demo, classifier=str(tmp_path), out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()
