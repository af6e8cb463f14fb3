import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import evaluate
from minidiff.classification.predictor import Predictor
from minidiff.data import images, phantom
from minidiff.data.table import write_table
from minidiff.errors import InputError
from minidiff.evaluation import report
from minidiff.evaluation.comparison import ALL, Side, compare
from minidiff.evaluation.page import jsonable, num, table
from minidiff.evaluation.verdict import verdicts
from minidiff.statistics import wilson
from minidiff.variables import Category, Number

SECTIONS = ["verdict", "pictures", "distances", "agreement", "copies", "study", "training", "provenance"]
VOID = {"meta", "img"}
DOT = images.png_bytes(np.zeros((4, 4), np.uint8))


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps text, ids and whatever would be fetched."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.fetched, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.fetched += [v for k, v in attrs.items() if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def cloud(seed, label, n, shift=0.0, d=6):
    x = np.random.default_rng(seed).normal(size=(n, d)) + shift
    return Side(x, np.array([label] * n), np.array([f"{seed}-{i}" for i in range(n)]))


def joined(*sides):
    return Side(*(np.concatenate(columns) for columns in zip(*sides)))


def rows(shift_of_made=0.0, n=60):
    names = enumerate(("train", "heldout"))
    sides = {name: joined(cloud(k, "normal", n), cloud(k + 10, "covid", n, 2.0)) for k, name in names}
    made = joined(cloud(5, "normal", 40, shift_of_made), cloud(6, "covid", 40, 2.0), cloud(7, "rare", 3))
    return compare("pixels-pca64", synthetic=made, **sides, labels=["normal", "covid", "rare"], repeats=20)


def bare(**more):
    data = {"folders": ["a <b> & c"], "size": 64, "n_train": 120, "n_heldout": 120, "heldout_labels": {"normal": 60},
            "patients_assumed": True, "notes": ["<script>alert(1)</script>"]}
    samples = {"folder": "runs/x/samples", "n": 83, "labels": {"normal": 40}}
    return {"data": data, "samples": samples, "distances": [], **more}


def test_the_table_of_distances():
    found = {(r["label"], r["set"]): r for r in rows()}
    assert list(found)[:2] == [(ALL, "synthetic"), (ALL, "real")]
    same, other = found["covid", "synthetic"], found["covid", "real normal"]
    assert same["n"] == 60 and same["m"] == 40 and other["m"] == 40      # as many as there are synthetic ones
    assert same["KD_low"] <= 0 <= same["KD_high"] and same["KD_p"] > 0.01
    assert other["KD_low"] > 0 and other["KD_p"] < 0.01 and other["beyond_low"] > 0
    assert same["KD_floor"]["low"] < 0 < same["KD_floor"]["high"] and same["FD_floor"]["median"] > 0
    assert (same["FD_floor_halves"]["n"], same["FD_floor_halves"]["m"]) == (30, 20)
    assert found["rare", "synthetic"]["small"] and "KD" not in found["rare", "synthetic"]


def answers(result):
    return {v["question"]: v["answer"] for v in verdicts(jsonable(result))}


def test_verdicts_on_likeness_say_yes_no_and_not_resolved():
    question = "Is synthetic normal nearer to held-out real normal than real images of other labels are?"
    assert answers({"distances": rows()})[question] == "yes"
    assert answers({"distances": rows(4.0)})[question] == "no"
    assert answers({"distances": rows(2.0)})[question] == "not resolved"     # made like the other label
    assert not any("rare" in q for q in answers({"distances": rows()}))


def share(k, n, which, variable="label"):
    half = {"value": "a", "n": n // 2, "accuracy": k / n}
    low, high = wilson(k, n)
    return {"variable": variable, "set": which, "kind": "category", "n": n, "accuracy": k / n, "low": low, "high": high,
            "by_value": [half, half | {"value": "b"}]}


@pytest.mark.parametrize("k,answer", [(98, "yes"), (88, "not resolved"), (50, "no")])
def test_verdict_on_the_label_asked_for(k, answer):
    result = {"distances": [], "agreement": [share(99, 100, "held-out real"), share(k, 100, "synthetic")]}
    assert answers(result) == {"Do the pictures show the label asked for?": answer}


@pytest.mark.parametrize("k,answer", [(90, "yes"), (52, "not resolved"), (30, "no")])
def test_verdict_on_an_attribute_compares_with_guessing(k, answer):
    result = {"distances": [], "agreement": [share(99, 100, "held-out real", "sex"), share(k, 100, "synthetic", "sex")]}
    assert answers(result) == {"Does asking for sex move the picture?": answer}


@pytest.mark.parametrize("interval,answer", [((0.01, 0.04), "yes"), ((-0.01, 0.04), "not resolved"), ((-0.05, -0.01), "no")])
def test_verdict_on_the_classifier_study(interval, answer):
    d = {"arm": "real+synthetic", "against": "real+duplicates", "metric": "balanced_accuracy", "difference": 0.02,
         "interval": list(interval), "resolved": answer != "not resolved"}
    assert list(answers({"distances": [], "study": {"differences": {"test": [d]}}}).values()) == [answer]
    assert answers({"distances": [], "study": {"differences": {"test": [d | {"interval": [None, None]}]}}}) == {}


def test_page_without_any_optional_input(tmp_path):
    path = report.write(tmp_path, bare(), {})
    page = Page(path.read_text())
    assert page.ids == SECTIONS
    assert "Not for diagnosis" in page.text and "one patient, assumed" in page.text and "python classify.py" in page.text
    assert "<script>alert(1)</script>" in page.text                          # as text, escaped
    assert all(url.startswith("#") for url in page.fetched)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == []


def test_page_with_every_input(tmp_path):
    shares = ["near_share", "near_low", "near_high", "near_heldout_share", "near_p", "closest_p", "q05", "q50"]
    space = {"space": "pixels", "n": 80, "train": 120, "heldout": 120, "closest": 20, "closest_train": 10,
             "closest_expected": 10.0, "q_size": 120, **dict.fromkeys(shares, 0.5)}
    arm = {"test_set": "test", "seed": 0, "accuracy": 0.9}
    result = bare(
        distances=rows(),
        neighbours={"verdict": "no sign of copying", "suspected": False, "spaces": [space],
                    "closest": [{"d_train": 1.0, "d_heldout": 1.1}]},
        agreement=[share(99, 100, "held-out real"), share(95, 100, "synthetic"),
                   {"variable": "age", "set": "synthetic", "n": 0},
                   {"variable": "age", "set": "held-out real", "n": 3, "kind": "number", "r": math.nan, "low": math.nan,
                    "high": math.nan, "slope": 1.0, "mae": 4.0}],
        classifier=[{**arm, "arm": "real"}, {**arm, "arm": "real+synthetic", "n": 50, "balanced_accuracy": None}],
        study={"arms": [{"arm": "real", "test_set": "test", "accuracy": 0.9, "accuracy_sd": None}]},
        vae={"psnr": 30.1, "psnr_pca64": 27.0}, provenance={"command": "evaluate.py"},
        configs={"runs/x": {"kind": "vae"}, "none": None})
    logs = {"vae": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val_loss": 1.1}], "diffusion": []}
    pictures = {"grids": {"normal": (DOT, DOT)}, "pairs": [(DOT, DOT, DOT)], "logs": logs, "vae": DOT}
    html = report.write(tmp_path, result, pictures).read_text()
    page = Page(html)
    assert page.ids == SECTIONS and html.count("<img") == 2 + 2 + 3 + 1 + 1 + 1
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in page.fetched)
    assert all(text in page.text for text in ("n too small", "30.1 dB", "no known cell"))
    assert not re.search(r"\bnan\b", page.text)
    assert report.write(tmp_path, result, pictures).read_text() == html       # the same numbers, the same page


def test_marks():
    assert [num(x) for x in (None, math.nan, -0.25, 12345.6, 0, 0.00012)] == ["–", "–", "−0.25", "12346", "0", "1.2e−04"]
    assert "&lt;b&gt;" in table(["a"], [("", ["<b>"])])
    assert jsonable({"a": (math.inf, np.float64(2.0), "x")}) == {"a": [None, 2.0, "x"]}


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
    with pytest.raises(InputError, match="repeats 1"):
        evaluate.run_report(config(demo, repeats=1, out=out))
    shutil.copytree(demo / "real", tmp_path / "copy")
    with pytest.raises(InputError, match="files of the real data"):
        evaluate.run_report(config(demo, samples=str(tmp_path / "copy"), out=out))
    image = np.asarray(torch.randint(0, 255, (32, 32), dtype=torch.uint8))
    for i in range(3):
        images.write(tmp_path / "odd" / "tumour" / f"{i}.png", image + i)
    with pytest.raises(InputError, match="no label tumour"):
        evaluate.run_report(config(demo, samples=str(tmp_path / "odd"), out=out))
