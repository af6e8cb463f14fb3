"""Sampling: a data set that reads as one, each image a function of its seed and conditions, gaps filled."""

import csv
import json
import os

import pytest
import torch
from PIL import Image

import sample
from minidiff import config
from minidiff import variables as var
from minidiff.data import images
from minidiff.data.table import read_table
from minidiff.diffusion import store
from minidiff.diffusion.generate import Recipe, to_uint8
from minidiff.errors import TrainingFault


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "set"
    cfg = sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), per_label=4, steps=3, batch=5)
    sample.sample(cfg)
    return cfg, out


def test_a_folder_of_samples_is_a_data_set(made):
    _, out = made
    table = read_table(out, split=False)
    assert len(table) == 12 and table.labels == ["covid", "normal", "pneumonia"]
    assert images.read(table.rows[0]["file"]).shape == (1, 32, 32)  # grey in, grey out
    with open(out / "metadata.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"file_name", "label", "set", "seed", "sex", "age", "view", "sampler", "steps", "guidance"} <= set(rows[0])
    assert (out / "sheets" / "set_0001.png").exists()


def test_each_png_carries_its_own_recipe(made):
    _, out = made
    path = sorted(out.glob("images/covid/*.png"))[0]
    text = Image.open(path).text
    assert text["label"] == "covid" and text["seed"] == str(int(path.stem)) and json.loads(text["recipe"])["steps"] == 3
    assert len(text["model"]) == 64


def test_pixels_do_not_depend_on_the_batch(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    labels = var.encode(pipeline.conditioner.variables, facts["rows"][:7])
    recipe = Recipe(steps=4, guidance=2.0)
    whole = list(pipeline.latents(labels, range(7), recipe))[-1]
    for i in (0, 3, 6):
        alone = list(pipeline.latents({k: v[i : i + 1] for k, v in labels.items()}, [i], recipe))[-1]
        pixels = [pipeline.vae.decode(z) for z in (alone, whole[i : i + 1])]
        assert (pixels[0] - pixels[1]).abs().max() < 1e-5
    permuted = list(pipeline.latents({k: v.flip(0) for k, v in labels.items()}, range(6, -1, -1), recipe))[-1]
    assert (permuted.flip(0) - whole).abs().max() < 1e-5


def test_the_same_command_fills_gaps_and_keeps_the_rest(made):
    cfg, out = made
    manifest = (out / "manifest.json").read_text()
    files = sorted(out.glob("images/*/*.png"))
    kept = {p: p.stat().st_mtime_ns for p in files[3:]}
    for path in files[:2]:
        path.unlink()
    files[2].write_bytes(files[2].read_bytes()[:50])  # cut short: made again as well
    sample.sample(cfg)
    assert (out / "manifest.json").read_text() == manifest
    assert kept == {p: p.stat().st_mtime_ns for p in files[3:]}


def test_another_setting_is_refused(made, capsys):
    cfg, out = made
    with pytest.raises(SystemExit) as stop:
        config.main(sample.VERBS, default="sample", doc="",
                    argv=["--run", cfg.run, "--out", str(out), "--per-label", "4", "--guidance", "3"])
    assert stop.value.code == 2 and "steps: 3 there, 16 now" in capsys.readouterr().err


def test_verify_passes_and_finds_an_edited_file(made, capsys, tmp_path):
    cfg, out = made
    sample.verify(sample.VerifyConfig(out=str(out), k=5))
    assert "13 files as written; 5 images made again, largest difference 0" in capsys.readouterr().out
    victim = sorted(out.glob("images/*/*.png"))[5]
    before = victim.read_bytes()
    os.utime(victim)
    pixels = images.read(victim).copy()
    pixels[0, 3, 3] ^= 1
    images.write(victim, pixels)
    with pytest.raises(ValueError, match=f"1 of 13 files are not as they were written: .*{victim.name}"):
        sample.verify(sample.VerifyConfig(out=str(out)))
    victim.write_bytes(before)
    relabelled = (out / "metadata.csv").read_text()
    (out / "metadata.csv").write_text(relabelled.replace("covid,1", "normal,1"))
    with pytest.raises(ValueError, match="metadata.csv"):
        sample.verify(sample.VerifyConfig(out=str(out)))
    (out / "metadata.csv").write_text(relabelled)


def test_conditions_come_from_training_rows_of_the_label(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    cfg = sample.SampleConfig(per_label=200)
    rows = sample.plan(cfg, pipeline.conditioner.variables, facts["rows"])
    known = {tuple(row.values()) for row in facts["rows"]}
    assert all((r["label"], r["sex"], r["age"], r["view"]) in known for r in rows)
    for name, of_label in (("normal", rows[200:400]), ("covid", rows[:200])):
        pool = [row for row in facts["rows"] if row["label"] == name]
        for column in ("sex", "view"):
            for value in ("F", "M", "", "AP", "PA"):  # the shares are those of the real rows, to within one place
                real, made = (sum(r[column] == value for r in some) / len(some) for some in (pool, of_label))
                assert abs(real - made) <= 0.02, (name, column, value, real, made)
    assert [r["set"] for r in rows] == [str(i // 100 + 1) for i in range(600)]
    cfg = sample.SampleConfig(label=("covid",), given=("sex=F", "age="))
    fixed = sample.plan(cfg, pipeline.conditioner.variables, facts["rows"])
    assert {(r["label"], r["sex"], r["age"]) for r in fixed} == {("covid", "F", "")} and len({r["view"] for r in fixed}) == 2


@pytest.mark.parametrize("argv, said", [
    (["--label", "covit"], "label 'covit' is not one of covid, normal, pneumonia; nearest: covid"),
    (["--given", "weight=3"], "the model has no such condition; it has label, sex, age, view"),
    (["--given", "label=covid"], "choose labels by --label"),
    (["--given", "sex"], "write name=value"),
    (["--label", "covid", "covid"], "named twice"),
    (["--per-label", "0"], "--per-label 0 is not allowed: 1 to inf"),
    (["--guidance", "nan"], "--guidance nan is not allowed: 0 to 100"),
    (["--steps", "2000"], "--steps 2000 is more than the 1000 levels"),
    (["--given", "sex=X"], "sex 'X' is not one of F, M"),
    (["--given", "age=old"], "age 'old' is not a number"),
    (["--eta", "0.5"], "--eta 0.5 belongs to --sampler ddim"),
    (["--run", "nowhere"], "nowhere/model.json is missing: the diffusion stage"),
])
def test_bad_requests_are_one_sentence(tiny, tmp_path, capsys, argv, said):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        config.main(sample.VERBS, default="sample", doc="",
                    argv=["--run", str(tiny / "diffusion"), "--out", str(out), *argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and not out.exists(), err


def test_non_finite_pixels_are_never_written():
    with pytest.raises(TrainingFault):
        to_uint8(torch.tensor([[0.0, float("nan")]]))
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("recipe", [
    Recipe("ddim", "leading", 4), Recipe("ddim", "trailing", 4, 2.0, 1.0), Recipe("heun", "karras", 3, 2.0),
])
def test_every_sampler_and_ladder_gives_images(tiny, recipe):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    labels = var.encode(pipeline.conditioner.variables, facts["rows"][:2])
    a, b = (torch.cat(list(pipeline.images(labels, [5, 6], recipe, batch=n))) for n in (1, 2))
    assert a.shape == (2, 3, 32, 32) and a.dtype == torch.uint8
    assert (a.int() - b.int()).abs().max() <= 1
