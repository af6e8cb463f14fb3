"""One folder for an experiment: what is found in it, and that nothing of another one gets in."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import classify
import evaluate
import sample
import train
from minidiff import config
from minidiff.data import phantom
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.root import Reading, Rooted, data_of, reading_of, then


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


@pytest.mark.parametrize("make", [train.DiffusionConfig, sample.SampleConfig, classify.Config,
                                  evaluate.Config, evaluate.AuditConfig])
def test_what_was_said_of_equal_patient_ids_reaches_later_commands(make):
    run("runs/x/vae", data=["A", "B"], distinct_patients=True, columns=["label=finding"])
    cfg = make(root="runs/x")
    assert cfg.distinct_patients and not cfg.same_patients and cfg.columns == ("label=finding",)
    # a flag of a later command, say for an external set, leaves the rest as it was
    cfg = make(root="runs/x", only_listed=True)
    assert cfg.distinct_patients and cfg.only_listed and cfg.columns == ("label=finding",)
    if make is not sample.SampleConfig:  # which has no --data
        other = make(root="runs/x", data=("C",))  # other data, of which nothing was said
        assert not other.distinct_patients and other.columns == ()


@pytest.mark.parametrize(
    "knobs, root", [({"out": "runs/y/samples"}, "runs/y"), ({"run": "runs/y/diffusion"}, "runs/y"),
                    ({"run": "runs/y/diffusion/best"}, "runs/y"),
                    ({"run": "runs/y/diffusion/snapshots/step_00000100"}, "runs/y"),
                    ({"run": "runs/y/diffusion/averaged/std_0.15"}, "runs/y"),
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
        train.Stage(train.DiffusionConfig(data=("other",), **knobs), train.FREE)
    # named
    assert train.Stage(train.DiffusionConfig(data=("other",), vae="runs/mix/vae",
                                               **knobs), train.FREE).data.size == 32


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


def test_how_data_are_read_goes_with_them():
    """Kept in a run, and taken from there where a later command names neither."""
    how = {"columns": ["label=finding"], "only_listed": True}
    run("runs/x/vae", data=["DIR"], **how)
    for make in (train.DiffusionConfig, classify.Config, evaluate.Config, evaluate.MatrixConfig,
                 evaluate.AuditConfig, sample.SampleConfig):
        cfg = make(root="runs/x")
        assert (cfg.columns, cfg.only_listed) == (("label=finding",), True)
    other = classify.Config(root="runs/x", data=("OTHER",))  # other data, another way
    assert (other.columns, other.only_listed) == ((), False)
    own = classify.Config(root="runs/x", data=("DIR/",), columns=("label=x",))
    assert (own.columns, own.only_listed) == (("label=x",), True)
    run("runs/y/vae", data=["DIR"])  # from before the knobs were there
    assert classify.Config(root="runs/y").columns == ()
    assert reading_of({"data": ["DIR"], **how}) == Reading(("label=finding",), True)


def test_names_of_columns_may_hold_blanks():
    ((_, cfg),) = config.parse(evaluate.VERBS, "report", "", [
        "audit", "--root", "runs/x", "--data", "D", "--columns",
        "file_name=Image Index,label=Finding Labels", "patient=Patient ID"])
    assert cfg.columns == ("file_name=Image Index", "label=Finding Labels", "patient=Patient ID")


@pytest.mark.parametrize("there, here, said", [
    (True, True, "DATA was begun"), (True, False, "first/DATA"), (False, True, "second/DATA"),
    (False, False, "second/DATA")])
def test_a_copied_root_does_not_take_other_data_of_the_same_name(there, here, said, tmp_path,
                                                                 monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first / "runs/x/vae", data=["DATA"], root="runs/x")
    (first / "runs/x/vae/run.json").write_text(json.dumps({"sessions": [{"folder": str(first)}]}))
    shutil.copytree(first / "runs", second / "runs")
    for folder, wanted in ((first, there), (second, here)):
        if wanted:
            (folder / "DATA").mkdir()
    monkeypatch.chdir(second)
    if there and here:
        with pytest.raises(InputError, match="first/DATA, and there is .*second/DATA, too"):
            classify.Config(root="runs/x")
        assert classify.Config(root="runs/x", data=("DATA",)).data == ("DATA",)
    else:
        data, = classify.Config(root="runs/x").data
        assert str(Path(data).resolve()).endswith(said)


def test_data_inside_a_copied_root_were_copied_with_it(tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first / "runs/x/vae", data=["runs/x/DATA"], root="runs/x")
    (first / "runs/x/vae/run.json").write_text(json.dumps({"sessions": [{"folder": str(first)}]}))
    (first / "runs/x/DATA").mkdir()
    shutil.copytree(first / "runs", second / "runs")
    monkeypatch.chdir(second)
    assert classify.Config(root="runs/x").data == ("runs/x/DATA",)


def test_a_root_that_was_moved_and_data_that_were_moved_resume(tiny, no_pictures):
    shutil.copytree(tiny / "data", "data")
    cfg = train.VAEConfig(data=("data",), size=32, steps=2, batch=4, root="runs/x")
    train.train_vae(cfg)
    knobs = {"steps": 2, "batch": 6, "snapshots": 0, "views": 1}
    train.train_diffusion(train.DiffusionConfig(root="runs/x", vae="runs/x/vae", **knobs))
    Path("data").rename("elsewhere")
    Path("runs/x").rename("runs/y")
    for data in (("elsewhere",), ()):  # from then on, it is known where they are
        train.train_diffusion(train.DiffusionConfig(data=data, root="runs/y", vae="runs/y/vae",
                                                    **knobs))
        assert len(json.loads(Path("runs/y/diffusion/run.json").read_text())["sessions"]) > 1
    (row, *_), table = read_table("elsewhere").rows, Path("elsewhere/metadata.csv")
    table.write_text(table.read_text().replace(row["patient"], "somebody else"))
    with pytest.raises(InputError, match="images, labels, patients or splits are others"):
        train.train_diffusion(train.DiffusionConfig(root="runs/y", vae="runs/y/vae", **knobs))


def test_data_whose_renamed_folders_are_a_condition_are_not_the_same(tiny, no_pictures):
    """Hospitals A and B told apart by the folder: renamed, the model would take one for another."""
    for name, odd in (("A", 0), ("B", 1)):
        rows = [row for row in read_table(tiny / "data").rows if int(row["patient"][-1]) % 2 == odd]
        for row in rows:
            del row["source"]
            Path(name, row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(row["file"], Path(name, row["file_name"]))
        write_table(f"{name}/metadata.csv", rows)
    knobs = {"steps": 2, "batch": 6, "snapshots": 0, "views": 1, "root": "runs/x",
             "condition": ("label", "source"), "vae": str(tiny / "vae")}
    train.train_diffusion(train.DiffusionConfig(data=("A", "B"), **knobs))
    Path("A").rename("C")
    with pytest.raises(InputError, match="conditions: .*'A', 'B'.* there, .*'B', 'C'"):
        train.train_diffusion(train.DiffusionConfig(data=("C", "B"), **knobs))
