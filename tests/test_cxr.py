"""The four scripts on real chest X-rays, for a few steps: the way of the data, not the quality."""

import csv
import json

import pytest

import classify
import evaluate
import sample
import train
from minidiff import config
from minidiff import variables as var
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table, write_table


def share(folder, target, every):
    """A data set of every so-many-th patient of each label and split of another: the same files, by
    links.
    """
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    patients = dict.fromkeys(row["patient"] for row in sorted(
        rows, key=lambda r: (r["label"], r["split"], r["patient"])))
    kept = set(list(patients)[::every])
    rows = [row for row in rows if row["patient"] in kept]
    for row in rows:
        (target / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (target / row["file_name"]).symlink_to(folder / row["file_name"])
    write_table(target / "metadata.csv", rows)
    return target


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_the_whole_way_on_real_images(cxr, tmp_path, monkeypatch, every):
    external, cxr = cxr / "external", share(cxr, tmp_path / "cxr", every)
    monkeypatch.chdir(tmp_path)

    def run(script, *argv):
        default = ["vae", "diffusion"] if script is train else next(iter(script.VERBS))
        config.main(script.VERBS, default=default, doc="", argv=[str(a) for a in argv])

    run(train, "vae", "--data", cxr, "--size", 32, "--steps", 3, "--batch", 2, "--out", "x/vae")
    run(train, "diffusion", "--data", cxr, "--vae", "x/vae", "--views", 1, "--steps", 2, "--batch",
        4, "--out", "x/diffusion")
    run(sample, "--run", "x/diffusion", "--per-label", 20, "--steps", 2, "--out", "x/samples")
    run(classify, "--data", cxr, "--synthetic", "x/samples", "--external", external,
        "--near-copies", "drop", "--size", 32, "--width", 8, "--steps", 3, "--seeds", 1, "--arms",
        "real", "real+duplicates", "real+synthetic", "--out", "x/classifier")
    run(evaluate, "--data", cxr, "--samples", "x/samples", "--classifier", "x/classifier", "--vae",
        "x/vae", "--diffusion", "x/diffusion", "--repeats", 10, "--out", "x/report")

    rows = list(csv.DictReader((tmp_path / "x/samples/metadata.csv").open()))
    assert len(rows) == 60 and {row["sex"] for row in rows} <= {"F", "M", ""}
    results = json.loads((tmp_path / "x/classifier/results.json").read_text())
    assert {row["test_set"] for row in results} == {"test", "external"}
    summary = json.loads((tmp_path / "x/classifier/summary.json").read_text())
    # the header alone tells it
    assert summary["positive"] == "covid" and summary["audit"]["shortcut"]
    assert {row["generator_extra"] for row in summary["arms"]} == {0}
    assert (tmp_path / "x/report/report.html").stat().st_size > 20_000


def test_two_sources_unite_and_half_known_laboratory_values_are_conditions(cxr):
    table = read_table([cxr, cxr / "hannover"])
    train_rows = table.select(split="train")
    variables = [var.infer(name, train_rows.column(name))
                 for name in ("label", "source", "crp", "ldh", "po2", "icu")]
    assert [type(v).__name__ for v in variables] == ["Category", "Category", "Number", "Number",
                                                     "Number", "Category"]
    labels = var.encode(variables, train_rows.rows)
    ours = [row["source"] == "hannover" for row in train_rows.rows]
    known = labels["crp"].isfinite()
    assert 0.2 < known[ours].float().mean() < 0.8 and not known[[not o for o in ours]].any()
    assert (labels["icu"] == var.UNKNOWN).any() and not (labels["icu"] == var.NULL).any()


def test_every_image_is_read(cxr):
    table, pixels = load_pixels(read_table(cxr), 32)
    assert pixels.shape == (1124, 3, 32, 32) and pixels.stride(1) == 0  # grey
    assert (pixels[:, 0].flatten(1).float().std(1) > 5).all()
