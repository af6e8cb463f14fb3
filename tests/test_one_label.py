"""Images of one label only, and models that are told no label: training, samples, what is left out
of reports and matrices, and where it is said.
"""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_sets import drawn
from test_report import Page

import classify
import evaluate
import minidiff
import sample
import train
from minidiff import runs
from minidiff.classification import inputs
from minidiff.data import phantom
from minidiff.data.table import read_table, write_table
from minidiff.diffusion import model as models
from minidiff.diffusion import unet as unets
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.guidance import guided
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError
from minidiff.evaluation import sets
from minidiff.evaluation.matrix.run import MatrixConfig, run_matrix


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """three/ (all labels), and of covid alone covid/, a class folder, table/, with sex, age and
    view, and like/, drawings in place of samples."""
    folder = tmp_path_factory.mktemp("one")
    phantom.write(folder / "three", n=240, size=32, seed=4)
    shutil.copytree(folder / "three" / "images" / "covid", folder / "covid" / "covid")
    shutil.copytree(folder / "covid", folder / "table" / "images")
    write_table(folder / "table" / "metadata.csv", read_table(folder / "three").select(
        label="covid").rows)
    rows = [row for row in drawn(folder / "drawn", 1, 90) if row["label"] == "covid"]
    shutil.copytree(folder / "drawn" / "images" / "covid", folder / "like" / "images" / "covid")
    write_table(folder / "like" / "metadata.csv", rows)
    return folder


def trained(tiny: Path, data: Path, root: Path, **knobs) -> Path:
    train.train_diffusion(train.DiffusionConfig(
        data=(str(data),), root=str(root), vae=str(tiny / "vae"), steps=2, batch=4, snapshots=0,
        **knobs))
    return root


def sampled(root: Path, **knobs) -> list[dict]:
    cfg = sample.SampleConfig(root=str(root), steps=2, **{"per_label": 4, **knobs})
    sample.sample(cfg)
    with open(Path(cfg.out) / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def lone(tiny, data, tmp_path_factory):
    return trained(tiny, data / "covid", tmp_path_factory.mktemp("lone"))


def test_of_one_label_a_model_learns_without_conditions_and_samples_have_it(lone, capsys):
    saved = runs.read_json(lone / "diffusion" / "model.json")
    assert saved["variables"] == [] and {row["label"] for row in saved["rows"]} == {"covid"}
    rows = sampled(lone, guidance=3.0, per_label=23)
    assert {row["label"] for row in rows} == {"covid"} and len(rows) == 23
    said = capsys.readouterr().out
    assert "nothing was guided" in said and "next: python evaluate.py" in said
    sample.verify(sample.VerifyConfig(root=str(lone), k=2))
    sample.trajectory(sample.TrajectoryConfig(root=str(lone), steps=2, label="covid"))
    assert "trajectory.png: no conditions;" in capsys.readouterr().out
    assert minidiff.load(lone).sample(n=2, steps=1, label="covid").shape == (2, 32, 32)
    for ask in (lambda: sampled(lone, label=("normal",), out=str(lone / "x")),
                lambda: minidiff.load(lone).sample(label="normal")):
        with pytest.raises(InputError, match="not conditioned on label; all that it makes is cov"):
            ask()
    for knobs, refusal in (({"given": ("sex=F",)}, "it has none"),
                           ({"scales": ("label=3",)}, "it has none"),
                           ({"independent": ("sex",)}, "is not conditioned on label")):
        with pytest.raises(InputError, match=refusal):
            sampled(lone, out=str(lone / "x"), **knobs)


def test_conditions_of_other_rows_and_real_images_to_begin_at(lone, data, tmp_path):
    assert {row["label"] for row in sampled(lone, like=(str(data / "three"),), out=str(
        tmp_path / "a"))} == {"covid"}  # the model's own label, whatever theirs are
    wanted = tmp_path / "wanted.csv"
    wanted.write_text("n\n3\n")
    rows = sampled(lone, rows=str(wanted), out=str(tmp_path / "b"))
    assert [row["label"] for row in rows] == ["covid"] * 3
    rows = sampled(lone, origin=(str(data / "covid"),), out=str(tmp_path / "c"))
    assert [row["label"] for row in rows] == ["covid"] * 4


def test_a_model_without_conditions_makes_images_of_any_label(tiny, data, tmp_path, no_pictures,
                                                              capsys):
    root = trained(tiny, data / "three", tmp_path / "r", condition=())
    assert "conditions: none" in capsys.readouterr().out
    assert {row["label"] for row in sampled(root)} == {"any"}
    assert {row["label"] for row in read_table(root / "samples", split=False).rows} == {"any"}


def test_conditions_stay_where_only_the_label_has_one_value(tiny, data, tmp_path, no_pictures,
                                                            capsys):
    root = trained(tiny, data / "table", tmp_path / "r")
    said = capsys.readouterr().out
    assert "no condition: label, for" in said and "conditions: sex F, M; age" in said
    made = sampled(root, given=("sex=F",))
    assert {(row["label"], row["sex"]) for row in made} == {("covid", "F")}


def test_another_label_among_the_held_out_images_is_refused(tiny, data, tmp_path):
    shutil.copytree(data / "three", tmp_path / "odd")
    rows = [{**row, "split": row["split"] if row["label"] == "covid" else "val"}
            for row in read_table(data / "three").rows]
    write_table(tmp_path / "odd" / "metadata.csv", rows)
    with pytest.raises(InputError, match="label '(normal|pneumonia)' is not one of covid"):
        trained(tiny, tmp_path / "odd", tmp_path / "r")


def test_without_variables_the_context_is_the_null_context_and_guidance_is_one_call():
    model = models.from_scratch(unets.TINY, [], 0)
    torch.nn.init.normal_(model.unet.conv_out.weight, generator=torch.Generator().manual_seed(1))
    calls, unet = [], model.unet.forward
    model.unet.forward = lambda x, *rest: calls.append(len(x)) or unet(x, *rest)
    x, denoiser = torch.ones(3, 4, 8, 8), Denoiser(model, Schedule.scaled_linear(), "v")
    context = model.conditioner.null_context.expand(3, -1, -1)
    with torch.no_grad():
        plain = unet(x, torch.full((3,), 500.0), context)
        assert torch.equal(model(x, torch.full((3,), 500.0), {}), plain)
        calls.clear()
        out = [guided(denoiser, {}, {}, scale)(x, 1.0) for scale in (0.0, 1.0, 3.0, {})]
    assert calls == [3] * 4 and all(torch.equal(out[0], other) for other in out[1:])
    assert model.conditioner.null(3) == {}


def report(data: Path, out: Path, source: str, samples: Path) -> dict:
    absent = {name: str(out / "none") for name in ("classifier", "vae", "diffusion", "matrix")}
    evaluate.run_report(evaluate.Config(data=(str(data / source),), samples=str(samples),
                                        root=str(out), out=str(out / "report"), repeats=10,
                                        **absent))
    return runs.read_json(out / "report" / "report.json")


def test_a_report_of_one_label_asks_what_needs_no_second_one_and_says_so(data, tmp_path):
    found = report(data, tmp_path, "covid", data / "like")
    assert [v["question"] for v in found["verdict"]] == [
        "Can they be told from real ones?",
        "Are the images new, not copies of training images?"]
    # a row of all labels and one of the only label would be the same twice
    assert {(r["label"], r["set"]) for r in found["distances"]} == {
        ("all labels", "synthetic"), ("all labels", "real")}
    assert {r["label"] for r in found["variety"]} == {"all labels"}
    assert sum("cannot be asked without a second label" in n for n in found["data"]["notes"]) == 1
    page = Page((tmp_path / "report" / "report.html").read_text()).text
    assert "a judge has no other to tell it from" in page
    assert "a classifier has nothing to tell apart" in page
    assert "python classify.py" not in page and "another label" not in page


def unlabelled(data: Path, folder: Path) -> Path:
    shutil.copytree(data / "like", folder)
    rows = read_table(data / "like", split=False).rows
    write_table(folder / "metadata.csv", [{**row, "label": "any"} for row in rows])
    return folder


def test_samples_without_a_label_are_compared_with_images_of_all_labels(data, tmp_path):
    found = report(data, tmp_path, "three", unlabelled(data, tmp_path / "made"))
    row = next(r for r in found["distances"] if r["set"] == "synthetic")
    assert {r["label"] for r in found["distances"]} == {"all labels"}
    assert row["n"] == found["data"]["n_heldout"] and row["m"] == found["samples"]["n"]
    assert found["realism"]["n"] > 20 and sets.UNLABELLED in found["data"]["notes"]
    assert set(found["data"]["train_labels"]) == {"covid", "normal", "pneumonia"}
    page = Page((tmp_path / "report" / "report.html").read_text()).text
    assert "they cannot train a classifier" in page
    some = replace(read_table(tmp_path / "made", split=False), hashes={})
    some.rows[0]["label"] = "covid"  # some with a label and some without: neither one nor the other
    write_table(tmp_path / "made" / "metadata.csv", some.rows)
    with pytest.raises(InputError, match="the data have no label any"):
        sets.read_synthetic(str(tmp_path / "made"), ["covid", "normal"], [])


@pytest.mark.parametrize("source", ["covid", "three"])
def test_a_matrix_without_labels_needs_no_judge_and_is_valid(data, tmp_path, source):
    made = data / "like" if source == "covid" else unlabelled(data, tmp_path / "made")
    cfg = MatrixConfig(data=(str(data / source),), samples=(str(made),), root=str(tmp_path),
                       out=str(tmp_path / "matrix"), n=40, permutations=100, resamples=100,
                       repeats=10)
    run_matrix(cfg)
    found = runs.read_json(tmp_path / "matrix" / "matrix.json")
    assert found["status"] == "VALID" and found["shortcuts"] == []
    ours = next(v for v in found["verdicts"] if v["kind"] == "synthetic")
    assert ours["LABEL"]["answer"] == ours["FIDELITY"]["answer"] == "not tested"
    assert "one label" in ours["LABEL"]["text"] and "yardstick" in ours["FIDELITY"]["text"]
    caught = {c["control"]: c["caught"] for c in found["controls"]}
    assert caught == {"copycat": True, "near-copy": True, "collapse": True, "blur": None,
                      "noise": None}
    assert [e["name"] for e in found["extractors"]] == ["pixels-pca64", "spectrum"]


def test_a_classifier_says_what_it_lacks_and_the_way_out(data, tmp_path):
    cfg = classify.Config(data=(str(data / "covid"),), root=str(tmp_path), arms=("real",))
    with pytest.raises(InputError, match=r"train has only 'covid', \d+ images: add images of "
                       "another label, or name another column by --target"):
        classify.run_study(cfg)
    made = unlabelled(data, tmp_path / "made")
    with pytest.raises(InputError, match="images without a label, for their model was told none"):
        inputs.read([str(data / "three")], {"synthetic": [str(made)]}, [], size=32, seed=0,
                    out=str(tmp_path / "c"))
