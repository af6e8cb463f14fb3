"""The script: what it refuses, what it says is missing, and that it makes the page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import drawn
from PIL import Image
from test_report import SECTIONS, Page

import evaluate
from minidiff import config as settings
from minidiff.classification.predictor import Predictor
from minidiff.data import images, phantom
from minidiff.data.split import of_other_data
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation import sets
from minidiff.runs import sha256, write_json
from minidiff.variables import Category, Number


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small phantom, and other phantoms in the place of synthetic images."""
    folder = tmp_path_factory.mktemp("demo")
    phantom.write(folder / "real", n=240, size=32, seed=0)
    made = [{**row, "set": "1"} for row in drawn(folder / "samples", seed=1, n=90)]
    write_table(folder / "samples" / "metadata.csv", made)
    return folder


def config(demo, **more):
    absent = {name: str(demo / name) for name in ("classifier", "vae", "diffusion", "matrix")}
    return evaluate.Config(**{"data": (str(demo / "real"),), "samples": str(demo / "samples"),
                              "out": str(demo / "report"), "repeats": 10, **absent, **more})


def test_the_script_from_folders_to_page(demo):
    evaluate.run_report(config(demo))
    result = json.loads((demo / "report/report.json").read_text())
    page = Page((demo / "report/report.html").read_text())
    assert page.ids == SECTIONS and "No judge was found" in page.text
    assert result["data"]["size"] == 32 and result["samples"]["labels"] == {
        "covid": 30, "normal": 30, "pneumonia": 30}
    assert result["data"]["n_train"] + result["data"]["n_heldout"] == 240 and result["neighbours"][
        "suspected"] is False
    assert result["data"]["heldout_files"] == {"PNG": result["data"]["n_heldout"]}
    assert result["samples"]["files"] == {"PNG": 90} and "compressed" not in page.text
    assert [e["name"] for e in result["extractors"]] == ["pixels-pca64"] and len(
        result["extractors"][0]["identity"]) == 64
    first = result["verdict"][0]   # other phantoms of the same kind
    assert first["question"] == "Can they be told from real ones?" and first["answer"] != "yes"
    assert [s["space"] for s in result["realism"]["spaces"]] == ["pixels-pca64", "texture"]
    assert {r["condition"]
            for r in result["conditions"]} == {"sex", "age"} and result["membership"] is None
    assert result["duplicates"]["n"] == result["data"]["n_train"] and len(
        result["neighbours"]["closest"]) == 20
    grown = [r["n"] for r in result["growth"]]
    assert grown == sorted(set(grown)) and grown[-1] > 20
    assert {r["measure"] for r in result["variety"]} == {"Vendi, pixels-pca64", "MS-SSIM"}
    made = next(r for r in result["distances"] if r["set"] == "synthetic")
    # phantoms are like phantoms
    assert made["KD_low"] < made["KD_floor"]["high"]
    before = {k: v for k, v in result.items() if k != "provenance"}
    # the same command again is no fault
    evaluate.run_report(config(demo))
    again = json.loads((demo / "report/report.json").read_text())
    # from the features that were kept
    assert {k: v for k, v in again.items() if k != "provenance"} == before
    assert (demo / "report/features/pixels-pca64.safetensors").is_file()


def test_the_script_with_two_judges_and_named_extractors(demo, tiny, tmp_path, capsys):
    variables = [Category("label", ("covid", "normal", "pneumonia")),
                 Number("age", 55.0, 20.0, 20.0, 90.0), Category("view", ("AP", "PA"))]
    real = read_table(demo / "real", split_dir=demo)
    train = [real.hashes[row["file"]] for row in real.select(split="train").rows]
    for k, (name, seen) in enumerate({"judge": train, "other/judge": train[50:]}.items()):
        Predictor(variables, width=8, size=32, seed=k).save(tmp_path / name)
        write_json(tmp_path / name / "trained_on.json", seen)
    shutil.copytree(demo / "samples", tmp_path / "samples")
    own = sha256(tmp_path / "judge/predictor.safetensors")
    write_json(tmp_path / "samples/manifest.json", {
        "filters": [{"by": "recognised", "judge": own, "rejects": 30, "classifier": "c"}],
        "yield": 0.75, "rejects": {"not recognised": 30}, "trained_on": train})
    cfg = config(demo, classifier=str(tmp_path), extractors=("pixels", "classifier", "vae"),
                 vae=str(tiny / "vae"), out=str(tmp_path / "report"),
                 samples=str(tmp_path / "samples"), judge=str(tmp_path / "other"))
    evaluate.run_report(cfg)
    said = ("Filtered by sample.py --keep recognised (judge: c): 30 rejected. Of all images "
            "drawn, 75.0")
    assert said in capsys.readouterr().out
    result = json.loads((tmp_path / "report/report.json").read_text())
    assert [e["name"] for e in result["extractors"]] == ["pixels-pca64", "classifier", "vae"]
    assert {r["extractor"] for r in result["distances"]} == {"pixels-pca64", "classifier", "vae"}
    # view was never asked for
    assert [(r["judge"], r["variable"], r["set"]) for r in result["agreement"]] == [
        (j, v, s) for j in ("own", "independent") for s in ("held-out real", "synthetic")
        for v in ("label", "age")]
    first, second = result["judges"]
    assert (first["judge"], first["sha256"], first["trained_on"]) == ("own", own, len(train))
    assert (second["judge"], second["trained_on"], second["shared"]) == (
        "independent", len(train) - 50, len(train) - 50)
    assert result["samples"]["yield"] == 0.75 and result["samples"]["filters"][0]["judge"] == own
    assert any(", by an independent judge?" in v["question"] for v in result["verdict"])
    assert [s["space"] for s in result["neighbours"]["spaces"]] == ["pixels", "pixels, moved",
                                                                    "classifier", "vae"]
    page = Page((tmp_path / "report/report.html").read_text())
    assert all(e["identity"] in page.text for e in result["extractors"])
    text = " ".join(page.text.split())
    assert said in text and "synthetic, independent judge" in text
    assert f"trained on {len(train) - 50} images, {len(train) - 50} of them" in text


def test_faults_of_input_are_named(demo, tmp_path):
    out = str(tmp_path / "r")
    with pytest.raises(InputError, match="folder of real data"):
        evaluate.run_report(config(demo, samples=str(demo / "real"), out=out))
    with pytest.raises(InputError, match="folder of real data"):
        evaluate.run_report(config(demo, samples=str(demo / "real" / "images"), out=out))
    with pytest.raises(InputError, match="no such folder"):
        evaluate.run_report(config(demo, samples=str(demo / "nothing"), out=out))
    for knobs, match in (({"repeats": 1}, "repeats 1"), ({"size": 1}, "size 1"),
                         ({"shown": 0}, "shown 0")):
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
    with pytest.raises(InputError, match=f"holds 1 file of the real data, e.g. .*{name}"):
        evaluate.run_report(config(demo, samples=str(tmp_path / "samples"),
                                   out=str(tmp_path / "r")))


def test_a_generator_or_judge_that_saw_held_out_images_is_refused(demo, tmp_path):
    real = read_table(demo / "real", split_dir=demo)
    held, train = (real.hashes[real.select(split=name).rows[0]["file"]]
                   for name in ("test", "train"))
    shutil.copytree(demo / "samples", tmp_path / "samples")
    Predictor([Category("label", ("covid", "normal", "pneumonia"))], width=8,
              size=32).save(tmp_path / "judge")
    cfg = config(demo, samples=str(tmp_path / "samples"), classifier=str(tmp_path),
                 out=str(tmp_path / "r"))
    assert {f"what {who} was trained on is unknown"
            for who in ("the generator", "the judge")} <= set(sets.notes(sets.read(cfg)[0]))
    for name, who in (("samples/manifest.json", "the generator"),
                      ("judge/trained_on.json", "the judge")):
        # the second is as it should be
        for hashes in ([train, held], [train]):
            (tmp_path / name).write_text(json.dumps({"trained_on": hashes} if who == "the generator"
                                                    else hashes))
            if held in hashes:
                with pytest.raises(InputError, match=f"{who} was trained on 1 of"):
                    sets.read(cfg)
    assert not any("unknown" in note for note in sets.notes(sets.read(cfg)[0]))


def test_what_was_trained_on_other_images_is_left_out_by_name(demo, tmp_path, capsys):
    """The demo's judge must not judge another hospital's images, nor the demo's VAE and curves
    stand on its page.
    """
    others = [f"{k:064d}" for k in range(200)]
    Predictor([Category("label", ("covid", "normal", "pneumonia"))], width=8,
              size=32).save(tmp_path / "judge")
    shutil.copytree(demo / "samples", tmp_path / "samples")
    for name, content in (("judge/trained_on.json", others),
                          ("vae.json", {"trained_on": others, "psnr": 30.0}),
                          ("model.json", {"trained_on": others}),
                          ("samples/manifest.json", {"trained_on": others})):
        (tmp_path / name).write_text(json.dumps(content))
    foreign = dict.fromkeys(("classifier", "vae", "diffusion"), str(tmp_path))
    cfg = config(demo, samples=str(tmp_path / "samples"), out=str(tmp_path / "r"), **foreign)
    evaluate.run_report(cfg)
    result, printed = json.loads((tmp_path / "r/report.json").read_text()), capsys.readouterr().out
    assert not result["agreement"] and result["vae"] is None and result["membership"] is None
    assert [e["name"] for e in result["extractors"]] == ["pixels-pca64"]
    # once a note
    assert printed.count(f"{tmp_path} was trained on other images than these: the page leaves it "
                         f"out") == 1
    assert any("its generator was trained on other images" in note
               for note in result["data"]["notes"])
    table = read_table(demo / "real", split_dir=demo).select(split="train")
    own = [table.hashes[file] for file in table.column("file")]
    for seen, foreign in ((own[:10], False), (others + own, False), (None, False), (others, True),
                          (others + own[:9], True)):
        assert of_other_data(seen, table.rows, table.hashes) is foreign


def test_what_was_left_out_of_any_set_is_said(demo, tmp_path):
    for name in ("real", "samples"):
        shutil.copytree(demo / name, tmp_path / name)
    parts = read_table(tmp_path / "real", split_dir=tmp_path)
    bad = [parts.select(split=name).rows[0]["file"] for name in ("train", "test")]
    # the first sample gave the size
    bad += [read_table(tmp_path / "samples", split=False).rows[0]["file"]]
    for k, path in enumerate(bad):
        Path(path).write_bytes(b"no image %d" % k)
    cfg = config(demo, data=(str(tmp_path / "real"),), samples=str(tmp_path / "samples"),
                 out=str(tmp_path / "r"))
    with pytest.raises(InputError, match="cannot be read"):
        sets.read(cfg)
    tables, pixels = sets.read(replace(cfg, skip_bad=True))
    found = sets.notes(tables)
    assert pixels["train"].shape[-1] == 32 and len(found) == len(set(found))
    assert all(any(path in note for note in found)
               for path in bad) and not any("samples: no patient" in n for n in found)


def test_faults_show_before_the_work_and_absent_inputs_are_named(demo, tmp_path, monkeypatch,
                                                                 capsys):
    def work(*_, **__):
        raise AssertionError("the long computing has begun")

    monkeypatch.setattr(evaluate.report_rows, "by_label", work)
    monkeypatch.setattr("minidiff.evaluation.features.build.PixelPCA.fit", work)
    for name in ("results.json", "summary.json", "config.json"):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / name).write_text('{"a": ')
        with pytest.raises(InputError, match=f"{name} is damaged"):
            evaluate.run_report(config(demo, classifier=str(tmp_path / "broken"),
                                       out=str(tmp_path / "r")))
        (tmp_path / "broken" / name).unlink()
    printed = capsys.readouterr().out
    assert all(f"{demo / path} is absent" in printed
               for path in ("vae/vae.json", "vae/loss.png", "diffusion/loss.png"))
    Predictor([Category("label", ("covid", "normal"))], width=8, size=32).save(tmp_path / "judge")
    with pytest.raises(InputError, match="pneumonia"):
        evaluate.run_report(config(demo, classifier=str(tmp_path), out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


def test_sizes_and_modes_that_differ_and_small_sets_are_said(demo, tmp_path):
    """An unreadable image, sizes and modes that differ, a set too small: named, counted, grey with
    the reason.
    """
    rows = []
    for k in range(15):
        name = f"images/normal/{k}.png"
        grey = phantom.phantom(3, k, 48 if k % 3 else 32).image
        images.write(tmp_path / "few" / name,
                     np.stack([grey, grey, grey // 2]) if k % 5 == 4 else grey)
        rows.append({"file_name": name, "label": "normal"})
    (tmp_path / "few" / rows[7]["file_name"]).write_bytes(b"no image")
    write_table(tmp_path / "few" / "metadata.csv", rows)
    cfg = config(demo, samples=str(tmp_path / "few"), out=str(tmp_path / "r"), skip_bad=True)
    evaluate.run_report(cfg)
    result = json.loads((tmp_path / "r/report.json").read_text())
    told = " ".join(result["data"]["notes"])
    assert result["samples"][
        "n"] == 14 and "1 of 15 images could not be read" in told and "normal/7.png" in told
    assert "synthetic images have shorter sides from 32 to 48 px; all were brought to 32 px" in told
    assert "3 of 14 synthetic images are in colour" in told
    assert all(r["too_few"] for r in result["distances"]) and result["growth"] == []
    assert result["neighbours"]["suspected"] is None and "too few images" in result["neighbours"][
        "verdict"]
    page = Page((tmp_path / "r/report.html").read_text())
    assert "n < 20" in page.text and "too few images for any distance" in page.text


def test_other_compression_than_that_of_the_real_images_is_said(demo, tmp_path):
    shutil.copytree(demo / "samples", tmp_path / "samples")
    for path in (tmp_path / "samples").rglob("*.png"):
        Image.fromarray(images.read(path)[0]).save(path, "JPEG", quality=75)
    notes = sets.notes(sets.read(config(demo, samples=str(tmp_path / "samples")))[0])
    assert any("held-out: PNG; synthetic: JPEG of quality 75" in note for note in notes)


def test_the_audit_knows_training_from_held_out(tiny, tmp_path):
    """On the tiny run's own data: every image is on the side of the hashes that the run has
    kept.
    """
    made = [phantom.phantom(1, i, 32) for i in range(24)]
    for i, p in enumerate(made):
        images.write(tmp_path / f"samples/images/{i}.png", p.image)
    write_table(tmp_path / "samples/metadata.csv", [
        {"file_name": f"images/{i}.png", "label": p.row["label"]} for i, p in enumerate(made)])
    cfg = evaluate.Config(data=(str(tiny / "data"),), samples=str(tmp_path / "samples"),
                          diffusion=str(tiny / "diffusion"), classifier=str(tmp_path),
                          vae=str(tiny / "vae"), out=str(tiny / "r"), audit=20)
    tables, _ = sets.read(cfg)
    found = evaluate.membership_audit(cfg, tables)
    assert (found["n_train"], found["n_heldout"]) == (20, 20) and 0.1 < found["auroc"] < 0.9
    assert found == evaluate.membership_audit(cfg, tables) and found["made"] is None
    for model, made in ((sha256(tiny / "diffusion/model.safetensors"), True), ("0" * 64, False)):
        (tmp_path / "samples/manifest.json").write_text(json.dumps({"model": model}))
        assert evaluate.membership_audit(cfg, tables)["made"] is made
    assert all(evaluate.membership_audit(replace(cfg, **none), tables) is None
               for none in ({"audit": 0}, {"diffusion": "x"}))
    assert found["reference"] is None and found["random_split"] == tables["train"].random_split
    more = evaluate.membership_audit(replace(cfg, likelihood=20), tables)
    second = more.pop("likelihood")
    assert more == evaluate.membership_audit(cfg, tables) and "likelihood" not in found
    assert (second["n_train"], second["n_heldout"]) == (20, 20)
    assert second["auroc"] != found["auroc"] and second.keys() == found.keys() - {
        "random_split", "run", "reference", "made"}
    # a run is its own reference: every ratio is 1, and nothing is known (refused before, see below)
    same = evaluate.membership_audit(replace(cfg, reference=cfg.diffusion), tables)
    assert same["auroc"] == 0.5 and same["reference"] == cfg.diffusion
    swapped = {**tables, "train": tables["heldout"]}
    assert "known as train images" in evaluate.membership_audit(cfg, swapped)["why"]


def test_a_reference_must_have_seen_none_of_these_images(demo, tiny, tmp_path):
    cfg = evaluate.Config(data=(str(tiny / "data"),), samples=str(demo / "samples"), size=32,
                          out=str(tmp_path / "r"), reference=str(tiny / "diffusion"))
    with pytest.raises(InputError, match=r"--reference .* was trained on \d+ images of these data"):
        evaluate.run_report(cfg)
    with pytest.raises(InputError, match="--reference x: no finished diffusion run"):
        evaluate.run_report(replace(cfg, reference="x"))
    with pytest.raises(InputError, match="--reference x"):
        evaluate.run_report(config(demo, reference="x"))
    tables, _ = sets.read(config(demo))
    others = {name: replace(table, rows=table.rows[100:]) for name, table in tables.items()}
    sets.check_reference(str(tiny / "diffusion"), others)   # phantoms that it did not see


def test_extractors_that_cannot_be_built_are_refused(demo, tiny, tmp_path):
    cfg = config(demo, vae=str(tiny / "vae"))
    for spec, match in (("inception", "not known"), ("classifier", "needs a classifier run"),
                        ("dinov2=x.pt", "not known")):
        with pytest.raises(InputError, match=match):
            evaluate.run_report(replace(cfg, extractors=(spec,), out=str(tmp_path / "r2")))


def test_verbs_of_two_words():
    for words, kind in ((["readers", "plan", "--good", "0.7"], "plan"),
                        (["readers", "make"], "make"), (["readers", "score"], "score")):
        ((run, cfg),) = settings.parse(evaluate.VERBS, "report", "", words)
        assert run.__module__.endswith(f"readers.{kind}") and type(cfg).__name__ == "Config"
    with pytest.raises(SystemExit):
        settings.parse(evaluate.VERBS, "report", "", ["readers", "--good", "0.7"])


def test_an_audit_of_too_few_is_refused(demo, tmp_path):
    with pytest.raises(InputError, match="--audit 5"):
        evaluate.run_report(config(demo, out=str(tmp_path / "r"), audit=5))
    for knobs in ({"audit": 50, "likelihood": 60}, {"likelihood": 5}, {"audit": 0,
                                                                       "likelihood": 20}):
        with pytest.raises(InputError, match=f"--likelihood {knobs['likelihood']} is not allowed"):
            evaluate.run_report(config(demo, out=str(tmp_path / "r"), **knobs))
