"""One folder for an experiment: what is found in it, and that nothing of another one gets in."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import classify
import evaluate
import sample
import train
from minidiff import config
from minidiff.data import phantom
from minidiff.errors import InputError
from minidiff.root import Rooted, data_of, then


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(folder, **knobs):
    Path(folder).mkdir(parents=True)
    Path(folder, "config.json").write_text(json.dumps({"kind": "x", **knobs}))


def test_without_a_word_it_is_the_demo():
    assert train.VAEConfig().data == train.DiffusionConfig().data == ("runs/demo/phantom",)
    assert (train.VAEConfig().out, sample.SampleConfig().run) == ("runs/demo/vae",
                                                                  "runs/demo/diffusion")
    assert classify.Config().synthetic == (
        "runs/demo/samples",) and evaluate.Config().matrix == "runs/demo/matrix"


def test_each_script_finds_what_the_one_before_left_and_the_data_by_its_config():
    run("runs/x/vae", data=["DIR", "DIR2"])
    cfg = evaluate.Config(root="runs/x")
    assert cfg.data == ("DIR", "DIR2") and cfg.out == "runs/x/report"
    for name in ("samples", "classifier", "vae", "diffusion", "matrix"):
        assert getattr(cfg, name) == f"runs/x/{name}"
    assert classify.Config(root="runs/x").synthetic == ("runs/x/samples",)
    pooled = ("a=runs/g0/samples", "runs/g1/samples")  # the first names the root
    assert classify.Config(data=("D",), synthetic=pooled).out == "runs/g0/classifier"
    assert sample.SampleConfig(root="runs/x") == sample.SampleConfig(root="runs/x",
                                                                     run="runs/x/diffusion",
                                                                     out="runs/x/samples")


def test_explicit_flags_go_before():
    run("runs/x/vae", data=["DIR"])
    cfg = evaluate.Config(root="runs/x", data=("OTHER",), samples="elsewhere")
    assert cfg.data == (
        "OTHER",) and cfg.samples == "elsewhere" and cfg.classifier == "runs/x/classifier"


@pytest.mark.parametrize(
    "knobs, root", [({"out": "runs/y/samples"}, "runs/y"), ({"run": "runs/y/diffusion"}, "runs/y"),
                    ({"run": "runs/y/diffusion/best"}, "runs/y"),
                    ({"run": "runs/y/diffusion/snapshots/step_00000100"}, "runs/y"),
                    ({"root": "runs/z", "run": "runs/y/diffusion"}, "runs/z"), ({}, "runs/demo")])
def test_the_root_is_that_of_the_run_that_was_named(knobs, root):
    cfg = sample.SampleConfig(**knobs)
    assert cfg.root == root and cfg.out == knobs.get("out", f"{root}/samples")


@pytest.mark.parametrize("make", [train.VAEConfig, train.DiffusionConfig, classify.Config,
                                  evaluate.Config, evaluate.MatrixConfig, evaluate.AuditConfig])
def test_other_data_do_not_enter_the_demo(make):
    with pytest.raises(InputError, match="--data elsewhere: name the folder of this experiment"):
        make(data=("elsewhere",))
    assert make(data=("./runs/demo/phantom/",)).root == "runs/demo"
    assert make(data=("elsewhere",), root="runs/x").out.startswith("runs/x/")


def test_a_root_without_runs_asks_for_data():
    with pytest.raises(InputError, match="--data is missing: no run in runs/x says"):
        classify.Config(root="runs/x")
    run("runs/x/classifier", data=["DIR"])
    assert data_of("runs/x") == classify.Config(root="runs/x").data == ("DIR",)


def test_a_saved_config_is_the_same_again(tmp_path):
    cfg = train.VAEConfig(root="runs/x", data=("DIR",))
    saved = tmp_path / "c.json"
    saved.write_text(json.dumps(cfg.__dict__))
    assert config.from_dict(train.VAEConfig, config.load(saved)) == cfg


def test_a_picture_may_be_put_anywhere():
    assert sample.TrajectoryConfig(out="way.png").run == "runs/demo/diffusion"


@pytest.mark.parametrize("argv, said",
                         [(["--kl", "1"], "write `train.py vae --kl …`"),
                          (["--no-shard"], "write `train.py diffusion --no-shard …`"),
                          (["--init", "x"], "vae or diffusion --init"), (["--out", "x"], "--out"),
                          (["--from=x"], "goes to one stage alone")])
def test_a_flag_of_one_stage_needs_its_name(argv, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        config.main(train.VERBS, default=["vae", "diffusion"], doc="", argv=argv)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_what_both_stages_have_goes_to_both():
    found = config.parse(train.VERBS, ["vae", "diffusion"], "",
                         ["--root", "runs/x", "--data", "DIR", "--size", "128"])
    assert [(run.__name__, cfg.size, cfg.data, cfg.out)
            for run, cfg in found] == [("train_vae", 128, ("DIR",), "runs/x/vae"),
                                       ("train_diffusion", 128, ("DIR",), "runs/x/diffusion")]


def test_a_mistyped_stage_is_no_flag(capsys):
    with pytest.raises(SystemExit):
        config.main(train.VERBS, default=["vae", "diffusion"], doc="", argv=["vea"])
    assert "'vea'" in capsys.readouterr().err


def test_lists_are_resolved_item_by_item():
    @dataclass(frozen=True)
    class Two(Rooted):
        folders: tuple[str, ...] = ("ROOT/a", "b")

    assert Two(root="r").folders == ("r/a", "b")


@pytest.mark.parametrize("argv, out, vae", [
    (["--root", "runs/z"], "runs/z/report", "runs/z/vae"),              # its own paths go along
    (["--out", "runs/z/report"], "runs/z/report", "runs/x/vae"),        # what it named stays named
    ([], "runs/x/report", "runs/x/vae")])
def test_a_preset_moves_with_the_root(argv, out, vae):
    run("runs/x/report", **{**evaluate.Config(root="runs/x", data=("D",)).__dict__, "data": ["D"]})
    words = ["report", "--from", "runs/x/report/config.json", *argv]
    ((_, cfg),) = config.parse(evaluate.VERBS, "report", "", words)
    assert (cfg.out, cfg.vae, cfg.data) == (out, vae, ("D",)) and cfg.root == out.rpartition("/")[0]


def test_the_vae_of_the_root_must_be_of_the_same_images(tiny, tmp_path):
    phantom.write("other", n=72, size=32, seed=5)
    knobs = {"steps": 2, "batch": 4, "snapshots": 0, "root": "runs/mix"}
    train.train_vae(train.VAEConfig(data=(str(tiny / "data"),), size=32, steps=2, batch=4,
                                    root="runs/mix"))
    with pytest.raises(InputError, match="runs/mix/vae was trained on other images than these"):
        train.Stage(train.DiffusionConfig(data=("other",), **knobs))
    # named
    assert train.Stage(train.DiffusionConfig(data=("other",), vae="runs/mix/vae",
                                               **knobs)).data.size == 32


def test_a_run_from_before_a_knob_was_there_goes_on(tiny, no_pictures):
    cfg = train.VAEConfig(data=(str(tiny / "data"),), size=32, steps=2, batch=4, root="runs/x")
    train.train_vae(cfg)
    saved = Path("runs/x/vae/config.json")
    before = {k: v for k, v in json.loads(saved.read_text()).items() if k not in ("root", "grey")}
    saved.write_text(json.dumps(before))
    train.train_vae(cfg)
    with pytest.raises(InputError, match="grey: 'auto' there, 'yes' now"):
        train.train_vae(replace(cfg, grey="yes"))


def test_what_comes_next_is_said_where_it_holds():
    cfg = sample.SampleConfig(root="runs/x")
    assert then("classify", cfg, "samples") == "next: python classify.py --root runs/x"
    assert then("classify", replace(cfg, out="runs/x/samples-1"), "samples") == ""
    assert then("classify", sample.SampleConfig(), "samples") == "next: python classify.py"


def test_relative_data_are_found_from_another_folder(tmp_path, monkeypatch):
    run("runs/x/vae", data=["A"], root="runs/x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert classify.Config(root="../runs/x").data == ("../A",)
    assert classify.Config(root=str(tmp_path / "runs/x")).data == ("../A",)
