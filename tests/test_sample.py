"""Sampling: a data set that reads as one, each image a function of its seed and conditions, gaps
filled.
"""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
from minidiff import config, runs
from minidiff import variables as var
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.table import read_table, write_table
from minidiff.diffusion import store, unet
from minidiff.diffusion.generate import Recipe
from minidiff.errors import InputError, TrainingFault
from minidiff.evaluation import selection
from minidiff.evaluation.quick import Quick
from minidiff.overlap import Behind
from minidiff.pixels import to_uint8

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples") / "set"
    cfg = sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), per_label=4, steps=3,
                              batch=5)
    sample.sample(cfg)
    return cfg, out


def test_a_folder_of_samples_is_a_data_set(made):
    _, out = made
    table = read_table(out, split=False)
    assert len(table) == 12 and table.labels == ["covid", "normal", "pneumonia"]
    assert images.read(table.rows[0]["file"]).shape == (1, 32, 32)  # grey in, grey out
    with open(out / "metadata.csv") as file:
        rows = list(csv.DictReader(file))
    assert {"file_name", "label", "set", "seed", "sex", "age", "view", "sampler", "steps",
            "guidance"} <= set(rows[0])
    assert (out / "sheets" / "set_0001.png").exists()


def test_each_png_carries_its_own_recipe(made):
    _, out = made
    path = sorted(out.glob("images/covid/*.png"))[0]
    text = Image.open(path).text
    assert text["label"] == "covid" and text["seed"] == str(int(path.stem)) and json.loads(
        text["recipe"])["steps"] == 3
    assert len(text["model"]) == 64


def test_pixels_do_not_depend_on_the_batch(tiny):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    labels = var.encode(pipeline.conditioner.variables, facts["rows"][:7])
    recipe = Recipe(steps=4, guidance=2.0)
    whole = list(pipeline.latents(labels, range(7), recipe))[-1]
    for i in (0, 3, 6):
        alone = list(pipeline.latents({k: v[i : i + 1] for k, v in labels.items()}, [i],
                                      recipe))[-1]
        pixels = [pipeline.vae.decode(z) for z in (alone, whole[i : i + 1])]
        assert (pixels[0] - pixels[1]).abs().max() < 1e-5
    permuted = list(pipeline.latents({k: v.flip(0) for k, v in labels.items()}, range(6, -1, -1),
                                     recipe))[-1]
    assert (permuted.flip(0) - whole).abs().max() < 1e-5


def test_the_same_command_fills_gaps_and_keeps_the_rest(made):
    cfg, out = made
    manifest = (out / "manifest.json").read_text()
    elsewhere = json.loads(manifest)
    elsewhere["made_on"]["machine"] = "H100"
    runs.write_json(out / "manifest.json", elsewhere)
    sample.sample(cfg)  # nothing is made, so it stays where it was made
    assert json.loads((out / "manifest.json").read_text()) == elsewhere
    files = sorted(out.glob("images/*/*.png"))
    kept = {p: p.stat().st_mtime_ns for p in files[3:]}
    for path in files[:2]:
        path.unlink()
    files[2].write_bytes(files[2].read_bytes()[:50])  # cut short: made again as well
    sample.sample(cfg)
    assert (out / "manifest.json").read_text() == manifest
    assert kept == {p: p.stat().st_mtime_ns for p in files[3:]}


def test_a_file_that_cannot_be_written_ends_the_run_before_its_set_counts(tiny, tmp_path,
                                                                          monkeypatch):
    """Written in turn, and by threads, as beside a GPU: the fault comes with the next batch."""
    whole_write = images.write

    def full_disk(path, image, text=None):
        if Path(path).name == "000001.png":
            raise OSError(28, "No space left on device", str(path))
        whole_write(path, image, text)

    for threaded in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(images, "write", full_disk)
            patch.setattr(sample, "Behind",
                          lambda _, on=threaded: Behind(torch.device("meta" if on else "cpu")))
            out = tmp_path / f"set-{threaded}"
            with pytest.raises(OSError, match="No space left"):
                sample.sample(request(tiny, out))
        there = {path.name for path in out.glob("images/*/*.png")}
        assert "000001.png" not in there and "000000.png" in there and len(there) < 8
        assert not (out / "manifest.json").exists() and not (out / "sheets").exists()


def test_files_written_by_threads_are_the_same(tiny, tmp_path, monkeypatch):
    sample.sample(request(tiny, tmp_path / "in turn"))
    monkeypatch.setattr(sample, "Behind", lambda _: Behind(torch.device("meta")))
    sample.sample(request(tiny, tmp_path / "threads"))
    assert bytes_of(tmp_path / "threads") == bytes_of(tmp_path / "in turn")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text())
                 for name in ("in turn", "threads")]
    assert manifests[0] == manifests[1]
    assert {p.name for p in (tmp_path / "threads/sheets").iterdir()} == {"set_0001.png",
                                                                         "set_0001.json"}


def test_precision_is_resolved_recorded_and_kept(tiny, tmp_path):
    """In bf16 the UNet's weights are cast, once, and nothing else; autocast is nowhere."""
    low, seen = replace(request(tiny, tmp_path / "low"), precision="bf16"), []
    unet_forward = unet.UNet.forward

    def forward(self, x, t, context):
        seen.append((self.conv_in.weight.dtype, context.dtype,
                     torch.is_autocast_enabled("cpu")))
        return unet_forward(self, x, t, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet.UNet, "forward", forward)
        sample.sample(low)
    assert set(seen) == {(torch.bfloat16, torch.float32, False)}
    sample.sample(request(tiny, tmp_path / "full"))
    for name, precision in (("low", "bf16"), ("full", "fp32")):
        made_on = runs.read_json(tmp_path / name / "manifest.json")["made_on"]
        assert made_on["precision"] == precision and made_on["device"] == "cpu"
        assert {"torch", "machine"} <= set(made_on)
        run = runs.read_json(tmp_path / name / "run.json")
        assert run["facts"]["precision"] == precision
    low_pixels, full = (torch.stack([torch.tensor(images.read(p)).int() for p in sorted(
        (tmp_path / name).glob("images/*/*.png"))]) for name in ("low", "full"))
    assert 0 < (low_pixels - full).abs().max() < 40
    with pytest.raises(InputError, match="precision: 'bf16' there, 'fp32' now"):
        sample.sample(replace(low, precision="auto"))  # on the CPU: fp32
    sample.sample(replace(request(tiny, tmp_path / "full"), precision="fp32"))  # what auto was


def test_compiling_is_the_unets_alone_and_leaves_one_shape(tiny, tmp_path, monkeypatch):
    shapes = []

    def compile_(network, dynamic):
        assert isinstance(network, unet.UNet) and dynamic is False
        network.register_forward_pre_hook(lambda m, given: shapes.append(tuple(given[0].shape)))
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    cfg = replace(request(tiny, tmp_path / "set"), per_label=3, compile="yes")
    sample.sample(cfg)  # 9 images by 4: the last batch holds 1, and is filled up
    assert shapes and set(shapes) == {(8, 4, 8, 8)}
    assert len(bytes_of(tmp_path / "set")) == 9
    shapes.clear()
    sample.sample(replace(cfg, out=str(tmp_path / "auto"), compile="auto"))
    assert not shapes  # never on a CPU unasked
    a, b = (torch.stack([torch.tensor(images.read(p)).int() for p in sorted(
        (tmp_path / name).glob("images/*/*.png"))]) for name in ("set", "auto"))
    assert (a - b).abs().max() <= 1


def test_another_setting_is_refused(made, capsys):
    cfg, out = made
    with pytest.raises(SystemExit) as stop:
        config.main(sample.VERBS, default="sample", doc="",
                    argv=["--run", cfg.run, "--out", str(out), "--per-label", "4", "--guidance",
                          "3"])
    assert stop.value.code == 2 and "steps: 3 there, 12 now" in capsys.readouterr().err


def test_verify_passes_and_finds_an_edited_file(made, capsys, tmp_path):
    cfg, out = made
    sample.verify(sample.VerifyConfig(out=str(out), k=5))
    said = capsys.readouterr().out
    assert "13 files as written; " in said and "largest difference 0 of 255" in said
    victim = sorted(out.glob("images/*/*.png"))[5]
    before = victim.read_bytes()
    os.utime(victim)
    pixels = images.read(victim).copy()
    pixels[0, 3, 3] ^= 1
    images.write(victim, pixels)
    with pytest.raises(ValueError,
                       match=f"1 of 13 files are not as they were written: .*{victim.name}"):
        sample.verify(sample.VerifyConfig(out=str(out)))
    victim.write_bytes(before)
    relabelled = (out / "metadata.csv").read_text()
    (out / "metadata.csv").write_text(relabelled.replace("covid,1", "normal,1"))
    with pytest.raises(ValueError, match="metadata.csv"):
        sample.verify(sample.VerifyConfig(out=str(out)))
    (out / "metadata.csv").write_text(relabelled)


@pytest.mark.parametrize("argv, said", [
    (["--label", "covit"], "label 'covit' is not one of covid, normal, pneumonia; nearest: covid"),
    (["--given", "weight=3"], "the model has no such condition; it has label, sex, age, view"),
    (["--given", "label=covid"], "labels are chosen by --label"),
    (["--given", "sex"], "write name=value"), (["--label", "covid", "covid"], "named twice"),
    (["--per-label", "0"], "--per-label 0 is not allowed: 1 to inf"),
    (["--guidance", "nan"], "--guidance nan is not allowed: 0 to 100"),
    (["--steps", "2000"], "--steps 2000 is more than the 1000 levels"),
    (["--given", "sex=X"], "sex 'X' is not one of F, M"),
    (["--given", "age=old"], "age 'old' is not a number"),
    (["--eta", "0.5"], "eta 0.5: it belongs to the sampler ddim"),
    (["--given", "age=20:x"], "age 'x' is not a number"),
    (["--given", "sex=F", "sex=M"], "--given sex=M contradicts --given sex=F"),
    (["--independent", "weight"], "--independent weight: the model has no such condition; it has "
     "sex, age, view"), (["--independent", "label"], "label cannot be independent of itself"),
    (["--independent", "sex", "sex"], "--independent sex: named twice"),
    (["--independent", "sex", "--given", "sex=F"], "--independent sex contradicts --given sex=F"),
    (["--independent", "sex", "--rows", "x.csv"], "--rows says all about the images"),
    (["--independent", "sex", "--origin", "x"], "--origin: each image keeps its own conditions"),
    (["--scales", "agee=2"], "the model has no such condition; it has label, sex, age, view; "
     "nearest: age"), (["--scales", "age"], "write name=number"),
    (["--interval", "1"], "interval 1: two noise levels"),
    (["--rescale", "2"], "--rescale 2.0 is not allowed: 0 to 1"),
    (["--strength", "0"], "--strength 0.0 is not allowed: 0.01 to 1"),
    (["--keep", "pretty"], "--keep pretty: allowed are recognised and new"),
    (["--keep", "recognised"], "needs --classifier"),
    (["--real", "nowhere"], "--real nowhere: no such data folder"),
    (["--rows", "nowhere.csv"], "nowhere.csv: no such file"),
    (["--rows", "x.csv", "--label", "covid"], "--rows says all about the images"),
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
    Recipe("ddim", "leading", 4), Recipe("ddim", "trailing", 4, 2.0, 1.0),
    Recipe("heun", "karras", 3, 2.0),
])
def test_every_sampler_and_ladder_gives_images(tiny, recipe):
    pipeline, facts = store.load_pipeline(tiny / "diffusion")
    labels = var.encode(pipeline.conditioner.variables, facts["rows"][:2])
    a, b = (torch.cat(list(pipeline.images(labels, [5, 6], recipe, batch=n))) for n in (1, 2))
    assert a.shape == (2, 3, 32, 32) and a.dtype == torch.uint8
    assert (a.int() - b.int()).abs().max() <= 1


def test_ages_outside_training_are_made_and_marked(tiny, tmp_path, capsys):
    out = tmp_path / "old"
    sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), label=("covid",),
                                      per_label=2, steps=2, given=("age=120",)))
    assert "2 images have age outside what training saw" in capsys.readouterr().err
    assert {row["outside_training"]
            for row in csv.DictReader((out / "metadata.csv").open())} == {"age"}


def test_quick_numbers_of_each_set(tiny, tmp_path):
    out = tmp_path / "set"
    sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), per_label=8,
                                      steps=2))
    numbers = json.loads((out / "sheets" / "set_0001.json").read_text())
    assert {"n", "n_real", "KD", "KD_floor_95", "nearest", "of"} == set(numbers)
    assert numbers["n"] == 24
    assert numbers["KD"] > numbers["KD_floor_95"]  # six steps of training make no phantoms


def test_images_from_real_ones_lie_beside_them(tiny, tmp_path):
    out = tmp_path / "set"
    sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out),
                                      origin=(str(tiny / "data"),), steps=8,
                                      per_label=3, strength=0.25, label=("covid", "normal")))
    rows = list(csv.DictReader((out / "metadata.csv").open()))
    assert len(rows) == 6 and all(Path(row["origin"]).parent.name == row["label"] for row in rows)
    assert images.read(out / "sheets" / "pairs_0001.png").shape[2] == 10 * 32 + 9 * 2
    sample.verify(sample.VerifyConfig(out=str(out), k=6))


def test_rejects_are_drawn_again_with_another_seed_and_named(tiny, tmp_path, monkeypatch, capsys):
    whole_make = sample.make

    def faulty(cfg, pipeline, cell, seeds, progress):
        pixels, finite = whole_make(cfg, pipeline, cell, seeds)
        pixels[[i for i, seed in enumerate(seeds) if seed == 1]] = 7                    # one grey
        return pixels, torch.tensor([seed not in (2, 2 + sample.RETRY) for seed in seeds])

    monkeypatch.setattr(sample, "make", faulty)
    out = tmp_path / "set"
    sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), label=("covid",),
                                      per_label=4, steps=2))
    seeds = {row["file_name"][-5:]: int(row["seed"])
             for row in csv.DictReader((out / "metadata.csv").open())}
    assert list(seeds.values()) == [0, 1 + sample.RETRY, 2 + 2 * sample.RETRY, 3]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rejects"] == {"of one grey": 1, "not finite": 2} and manifest["yield"] == 4 / 7
    assert "re-drawn" in capsys.readouterr().out
    monkeypatch.undo()
    sample.verify(sample.VerifyConfig(out=str(out), k=4))
    monkeypatch.setattr(sample, "make", lambda cfg, p, cell,
                        *_: (torch.zeros(len(cell), 3, 32, 32, dtype=torch.uint8),
                             torch.ones(len(cell), dtype=torch.bool)))
    with pytest.raises(InputError,
                       match="10 seeds gave no image to keep, the last one was of one grey"):
        sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(tmp_path / "b"),
                                          per_label=1, steps=2))


def test_filters_are_recorded_with_what_they_knew(tiny, tmp_path, monkeypatch, capsys):
    judge, seen = tmp_path / "run" / "judge", []
    Predictor([var.Category("label", ("covid", "normal", "pneumonia"))], width=8,
              size=32).save(judge)
    runs.write_json(judge / "trained_on.json", ["a", "b", "c"])

    def every_other(judge, pixels, labels):
        seen.append(len(labels))
        return torch.arange(len(labels)) % 2 == 0

    monkeypatch.setattr(sample, "recognised", every_other)
    monkeypatch.setattr(Quick, "near_limit", 0.25)
    monkeypatch.setattr(Quick, "near_copies", lambda self, pixels: torch.zeros(len(pixels)) > 0)
    out = tmp_path / "set"
    sample.sample(sample.SampleConfig(
        run=str(tiny / "diffusion"), out=str(out), label=("covid",), per_label=4, steps=2,
        keep=("recognised", "new"), classifier=str(tmp_path / "run")))
    manifest = json.loads((out / "manifest.json").read_text())
    recognised, new = manifest["filters"]
    assert seen == [4, 2, 1] and manifest["yield"] == 4 / 7
    assert recognised == {
        "by": "recognised", "judge": runs.sha256(judge / "predictor.safetensors"), "train": 3,
        "classifier": str(tmp_path / "run"), "rejects": 3, "held_out": 0,
        "gate": "the most probable label is the one asked for"}
    data = read_table(tiny / "data", split_dir=tiny)
    assert new == {"by": "new", "judge": None, "rejects": 0, "gate": 0.25,
                   "train": len(data.select(split="train")),
                   "held_out": len(data.select(split=("val", "test")))}
    assert manifest["checkpoint"] is None
    # what the filter decided is no number to watch
    assert "recognised" not in json.loads((out / "sheets" / "set_0001.json").read_text())
    assert "re-drawn: 3 not recognised" in capsys.readouterr().out
    assert selection.of(out) == {name: manifest[name]
                                 for name in ("filters", "yield", "rejects", "checkpoint")}


def request(tiny, out):
    return sample.SampleConfig(run=str(tiny / "diffusion"), out=str(out), per_label=7, steps=3,
                               batch=4)


def command(tiny, out, *launcher):
    return [sys.executable, *launcher, str(ROOT / "sample.py"), "--run", str(tiny / "diffusion"),
            "--out", str(out), "--per-label", "7", "--steps", "3", "--batch", "4"]


def bytes_of(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("images/*/*.png"))}


def test_two_processes_and_a_killed_run_give_the_same_bytes(tiny, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    sample.sample(request(tiny, tmp_path / "one"))
    expected = bytes_of(tmp_path / "one")
    assert len(expected) == 21
    two = command(tiny, tmp_path / "two", "-m", "torch.distributed.run", "--standalone",
                  "--nproc-per-node", "2", "--")
    subprocess.run(two, check=True, env=env, capture_output=True)
    assert bytes_of(tmp_path / "two") == expected
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text())
                 for name in ("one", "two")]
    assert manifests[0] == manifests[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(command(tiny, tmp_path / "killed"), env=env, **quiet)
    while len(list((tmp_path / "killed").glob("images/*/*.png"))) < 6:
        assert killed.poll() is None
        time.sleep(0.002)
    killed.kill(), killed.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists(), "killed too late to test anything"
    sample.sample(request(tiny, tmp_path / "killed"))
    assert bytes_of(tmp_path / "killed") == expected


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_other_batches_differ_in_a_grey_level_of_few_pixels(tiny, tmp_path, batch):
    for name, size in (("a", 4), ("b", batch)):
        sample.sample(sample.SampleConfig(run=str(tiny / "diffusion"), out=str(tmp_path / name),
                                          per_label=7, steps=3, batch=size))
    a, b = (torch.stack([torch.tensor(images.read(p)).int()
                         for p in sorted((tmp_path / name).glob("images/*/*.png"))])
            for name in ("a", "b"))
    assert (a - b).abs().max() <= 1 and (a != b).float().mean() <= 1e-3


def test_columns_of_other_commands_stay(tiny, tmp_path):
    cfg = sample.SampleConfig(run=str(tiny / "diffusion"), out=str(tmp_path / "s"),
                              label=("covid",), per_label=2, steps=2)
    sample.sample(cfg)
    path = tmp_path / "s" / "metadata.csv"
    rows = list(csv.DictReader(path.open()))
    write_table(path, [{**row, "uncertainty": f".{k}"} for k, row in enumerate(rows)])
    sample.sample(cfg)
    again = list(csv.DictReader(path.open()))
    assert [row["uncertainty"] for row in again] == [".0", ".1"]
    assert [{k: row[k] for k in rows[0]} for row in again] == rows

