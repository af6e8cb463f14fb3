import json
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidiff.classification.agreement import agreement
from minidiff.data import images
from minidiff.evaluation.metrics.comparison import ALL, EQUAL, Side, compare
from minidiff.evaluation.metrics.distances import kid
from minidiff.evaluation.metrics.within import within_label
from minidiff.evaluation.pages import report
from minidiff.evaluation.pages import report_sections as sections
from minidiff.evaluation.pages.format import jsonable, num
from minidiff.evaluation.pages.page import table
from minidiff.evaluation.verdicts import verdicts
from minidiff.statistics import wilson
from minidiff.variables import Category, Number

SECTIONS = ["verdict", "copies", "pictures", "collection", "distances", "numbers", "variety",
            "conditions", "agreement", "matrix", "study", "training", "provenance"]
VOID = {"meta", "img", "br"}
WITHIN = ("within_r", "within_low", "within_high")
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
        self.fetched += [v for k, v in attrs.items()
                         if k in ("src", "href", "srcset", "data", "action")]

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
    sides = {name: joined(cloud(k, "normal", n), cloud(k + 10, "covid", n, 2.0))
             for k, name in names}
    made = joined(cloud(5, "normal", 40, shift_of_made), cloud(6, "covid", 40, 2.0),
                  cloud(7, "rare", 3))
    return compare("pixels-pca64", synthetic=made, **sides, labels=["normal", "covid", "rare"],
                   repeats=20)


def bare(**more):
    data = {"folders": ["a <b> & c"], "size": 64, "n_train": 120, "n_heldout": 120,
            "heldout_labels": {"normal": 60},
            "patients_assumed": True, "notes": ["<script>alert(1)</script>"]}
    samples = {"folder": "runs/x/samples", "n": 83, "labels": {"normal": 40}}
    return {"data": data, "samples": samples, "distances": [], **more}


def test_the_table_of_distances():
    found = {(r["label"], r["set"]): r for r in rows()}
    assert list(found)[:2] == [(ALL, "synthetic"), (ALL, "real")]
    same, other = found["covid", "synthetic"], found["covid", "real normal"]
    # as many as there are synthetic ones
    assert same["n"] == 60 and same["m"] == 40 and other["m"] == 40
    assert same["KD_low"] <= 0 <= same["KD_high"] and same["KD_p"] > 0.01
    assert other["KD_low"] > 0 and other["KD_p"] < 0.01 and other["beyond_low"] > 0
    assert same["KD_floor"]["low"] < 0 < same["KD_floor"]["high"] and same["FD_floor"]["median"] > 0
    assert (same["FD_floor_halves"]["n"], same["FD_floor_halves"]["m"]) == (30, 20)
    assert found["rare", "synthetic"]["small"] and "KD" not in found["rare", "synthetic"]
    # at equal numbers, beside real against real there
    for name in EQUAL:
        spread = same[f"{name}_floor"]
        assert spread["low"] <= spread["median"] <= spread["high"] and spread["n"] == spread[
            "m"] == same["equal_n"] == 40
    assert other["MIND"] > 3 * same["MIND"] and other["coverage"] < 0.5 < same[
        "coverage_low"] <= same["coverage"]
    assert same["C2ST_p"] > 0.01 > other["C2ST_p"] and other["C2ST_low"] > 0.5
    assert same["MIND"] < 2 * same["MIND_floor"]["high"] and 0.35 < same["C2ST_floor"][
        "median"] < 0.65


def answers(result):
    return {v["question"]: v["answer"] for v in verdicts(jsonable(result))}


def test_verdicts_on_likeness_say_yes_no_and_not_resolved():
    question = "Is synthetic normal nearer to held-out real normal than real images of other labels are?"
    assert answers({"distances": rows()})[question] == "yes"
    assert answers({"distances": rows(4.0)})[question] == "no"
    # made like the other label
    assert answers({"distances": rows(2.0)})[question] == "not resolved"
    assert not any("rare" in q for q in answers({"distances": rows()}))


def test_few_patients_get_intervals_or_a_grey_cell():
    """Resamples of one patient over and over have no KD; they must not shift the pairing with the
    synthetic draws.
    """
    def few(seed, label, n, patients, shift=0.0):
        side = cloud(seed, label, n, shift)
        return side._replace(patients=np.array([f"{seed}-{i % patients}" for i in range(n)]))

    train = joined(few(0, "normal", 30, 2), few(1, "covid", 30, 2, 2.0))
    made = joined(cloud(2, "normal", 40), cloud(3, "covid", 40, 2.0))
    for held in (2, 3):
        heldout = joined(few(4, "normal", 30, 9), few(5, "covid", 30, held, 2.0))
        found = compare("x", synthetic=made, train=train, heldout=heldout,
                        labels=["normal", "covid"], repeats=20)
        assert all(np.isfinite([r[k] for k in ("KD", "KD_low", "KD_high", "KD_p")]).all()
                   for r in found if "KD" in r)
        assert all(r["beyond_low"] <= r["beyond_high"] for r in found
                   if r["set"] != "synthetic" and r["label"] != ALL)
    heldout = joined(few(4, "normal", 30, 9), few(5, "covid", 30, 1, 2.0))
    found = compare("x", synthetic=made, train=train, heldout=heldout, labels=["normal", "covid"],
                    repeats=20)
    assert all(r["small"] for r in found if r["label"] == "covid")


def test_other_labels_are_held_out_images_of_other_patients():
    """A classifier puts the labels of its training images far apart: they must not be what
    synthetic images are held to.
    """
    train = joined(cloud(0, "normal", 60), cloud(10, "covid", 60, 9.0))
    heldout = joined(cloud(1, "normal", 60), cloud(11, "covid", 60, 1.0))
    made = joined(cloud(5, "normal", 60, 2.0), cloud(6, "covid", 60))
    found = compare("classifier", synthetic=made, train=train, heldout=heldout,
                    labels=["normal", "covid"], repeats=20)
    row = next(r for r in found if (r["label"], r["set"]) == ("normal", "real covid"))
    assert row["KD"] == pytest.approx(kid(real=heldout.of("normal").features,
                                          fake=heldout.of("covid").features))
    assert answers({"distances": found})["Is synthetic normal nearer to held-out real normal than "
                                         "real images of other labels are?"] == "no"
    shared = heldout._replace(
        patients=np.array([f"p{i % 60}" if i % 60 < 15 else f"p{i}" for i in range(120)]))
    found = compare("classifier", synthetic=made, train=train, heldout=shared,
                    labels=["normal", "covid"], repeats=20)
    assert next(r["m"] for r in found if (r["label"], r["set"]) == ("normal", "real covid")) == 45


def confounded(seed, n=300, effect=0.0):
    """Age asked for and judged, both much higher in covid; within a label the judged follows the
    asked by `effect`.
    """
    rng = np.random.default_rng(seed)
    group = np.array(["normal", "covid", "rare"])[np.arange(n) % 3]
    age = 40 + 30 * (group == "covid") + rng.normal(0, 4, n)
    base = 40 + 30 * (group == "covid")
    judged = base + effect * (age - base) + rng.normal(0, 4, n)
    sex = (rng.random(n) < np.where(group == "covid", 0.9, 0.1)).astype(np.int64)
    read = np.where(rng.random(n) < effect, sex, group == "covid")
    labels = {"age": torch.tensor(age, dtype=torch.float32), "sex": torch.tensor(sex)}
    out = {"age": torch.tensor(judged, dtype=torch.float32),
           "sex": F.one_hot(torch.tensor(read).long(), 2).float()}
    return labels, out, group.tolist()


@pytest.mark.parametrize("effect,expected", [(0.0, {"not resolved", "no"}), (0.9, {"yes"})])
def test_attributes_are_judged_within_label(effect, expected):
    """A judge that sees the label alone agrees with asked age and sex overall, and must not count
    as moving them.
    """
    variables = [Number("age", 50.0, 15.0, 20.0, 90.0), Category("sex", ("F", "M"))]
    found = []
    for seed, which in enumerate(("held-out real", "synthetic")):
        labels, judged, group = confounded(seed, effect=effect)
        judge = SimpleNamespace(variables=variables, predict=lambda _, judged=judged: judged)
        within = within_label(variables, judged, labels, group)
        found += [{**row, **within[row["variable"]]}
                  for row in agreement(judge, torch.zeros(300), labels, which)]
    age, sex = (next(r for r in found[2:] if r["variable"] == name) for name in ("age", "sex"))
    assert age["low"] > 0.5 and age["within_low"] < age["within_r"] < age["within_high"] < age[
        "high"]
    assert sex["within_chance"] > 0.8 > max(v["n"] for v in sex["by_value"]) / sex["n"]
    given = answers({"distances": [], "agreement": found})
    assert set(given) == {"Does asking for age move the picture?",
                          "Does asking for sex move the picture?"}
    assert set(given.values()) <= expected


def test_within_label_by_hand_and_where_nothing_is_known():
    age = Number("age", 50.0, 15.0, 20.0, 90.0)
    asked = torch.tensor([1.0, 2, 3, 4, 11, 12, 13, 14, math.nan])
    judged = torch.tensor([1.0, 3, 2, 4, 51, 53, 52, 54, 9])
    group = list("aaaabbbbc")
    found = within_label([age], {"age": judged}, {"age": asked}, group)["age"]
    # of each label, and so of both
    assert found["within_r"] == pytest.approx(0.8)
    # 8 cells − 2 means − 3 + 1
    assert found["within_low"] == pytest.approx(math.tanh(math.atanh(0.8) - 1.959964 / 2))
    same = within_label([age], {"age": judged}, {"age": torch.tensor([40.1] * 4 + [60.7] * 5)},
                        group)["age"]
    assert math.isnan(same["within_r"])
    assert within_label([age], {"age": judged}, {"age": torch.full((9,), math.nan)},
                        group) == {"age": {}}
    flat = {"variable": "age", "n": 9, "kind": "number",
            **dict.fromkeys(("r", "low", "high"), math.nan), **same}
    both = [flat | {"set": "held-out real"}, flat | {"set": "synthetic"}]
    assert answers({"distances": [], "agreement": both}) == {"Does asking for age move the "
                                                             "picture?": "not resolved"}


def share(k, n, which, variable="label"):
    half = {"value": "a", "n": n // 2, "accuracy": k / n}
    low, high = wilson(k, n)
    return {"variable": variable, "set": which, "kind": "category", "n": n, "accuracy": k / n,
            "low": low, "high": high, "by_value": [half, half | {"value": "b"}],
            **({} if variable == "label" else {"within_chance": 0.5})}


@pytest.mark.parametrize("k,answer", [(98, "yes"), (88, "not resolved"), (50, "no")])
def test_verdict_on_the_label_asked_for(k, answer):
    result = {"distances": [],
              "agreement": [share(99, 100, "held-out real"), share(k, 100, "synthetic")]}
    assert answers(result) == {"Do the pictures show the label asked for?": answer}


@pytest.mark.parametrize("k,answer", [(90, "yes"), (52, "not resolved"), (30, "no")])
def test_verdict_on_an_attribute_compares_with_guessing(k, answer):
    result = {"distances": [], "agreement": [share(99, 100, "held-out real", "sex"),
                                             share(k, 100, "synthetic", "sex")]}
    assert answers(result) == {"Does asking for sex move the picture?": answer}


@pytest.mark.parametrize("word,answer",
                         [("gain", "yes"), ("not resolved", "not resolved"), ("harm", "no")])
def test_verdict_on_the_classifier_study_is_its_primary_comparison(word, answer):
    primary = {"arm": "real+1xsynthetic", "against": "real+1xduplicates", "test_set": "test",
               "metric": "balanced_accuracy", "difference": 0.02, "interval": [0.01, 0.03],
               "answer": word, "seeds": 5, "patients": 300, "sees": 0.03, "times": 2.2}
    assert list(answers({"distances": [], "study": {"primary": primary}}).values()) == [answer]
    assert answers({"distances": [], "study": {"primary": None}}) == {}


def test_page_without_any_optional_input(tmp_path):
    path = report.write(tmp_path, bare(), {})
    page = Page(path.read_text())
    assert page.ids == SECTIONS
    assert "Not for diagnosis" in page.text and "one patient, assumed" in page.text and "python classify.py" in page.text
    assert "<script>alert(1)</script>" in page.text                          # as text, escaped
    assert all(url.startswith("#") for url in page.fetched)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == []


def test_page_with_every_input(tmp_path):
    shares = ["near_share", "near_low", "near_high", "near_heldout_share", "near_p", "closest_p",
              "q05", "q50", "copying_z",
              "copying_p", "auth_pct", "auth_heldout", "auth_p", "calibrated_p"]
    spread = {"median": 0.1, "low": 0.0, "high": 0.2}
    point = {"extractor": "pixels-pca64",
             **dict.fromkeys(("KD", "FD", "KD_floor", "FD_floor"), spread)}
    kd = {"KD": 0.1, "KD_low": 0.0, "KD_high": 0.2, "KD_floor": spread, "small": False}
    cell = {"extractor": "pixels-pca64", "condition": "sex", "value": "F", "n": 40, "m": 30}
    audit = {"auroc": 0.7, "by_patient": [0.62, 0.78], "p": 0.001, "tpr": 0.1,
             "tpr_by_patient": [0.0, 0.2], "n_train": 60,
             "n_heldout": 60, "note": "few", "run": "runs/y", "made": False}
    space = {"space": "pixels", "n": 80, "train": 120, "heldout": 120, "closest": 20,
             "closest_train": 10, "closest_expected": 10.0, "q_size": 120, "calibrated_near": 4,
             **dict.fromkeys(shares, 0.5)}
    arm = {"test_set": "test", "seed": 0, "accuracy": 0.9}
    result = bare(
        distances=rows(),
        neighbours={"verdict": "no sign of copying", "suspected": False, "spaces": [space],
                    "closest": [{"d_train": 1.0, "d_heldout": 1.1}]},
        extractors=[{"name": "pixels-pca64", "identity": "abc123"}],
        growth=[point | {"n": 10}, point | {"n": 40}],
        conditions=[cell | kd, cell | {"value": "M", "n": 3, "small": True}],
        variety=[{"label": "normal", "measure": "MS-SSIM", "n": 40, "small": False,
                  "synthetic": 0.5, "real": 0.4, "range": spread},
                 {"label": "rare", "measure": "MS-SSIM", "n": 3, "small": True}],
        duplicates={"n": 120, "exact": 1, "near": 2, "surplus": 2, "across_patients": 1},
        membership=audit, commands={"report": "python evaluate.py --out <x>",
                                    "samples": "python sample.py", "vae": ""},
        agreement=[share(99, 100, "held-out real"), share(95, 100, "synthetic"),
                   {"variable": "age", "set": "synthetic", "n": 0},
                   {"variable": "age", "set": "held-out real", "n": 3, "kind": "number",
                    "r": math.nan, "low": math.nan,
                    "high": math.nan, "slope": 1.0, "mae": 4.0, **dict.fromkeys(WITHIN, math.nan)}],
        classifier=[{**arm, "arm": "real"},
                    {**arm, "arm": "real+synthetic", "n": 50, "balanced_accuracy": None}],
        study={"arms": [{"arm": "real", "test_set": "test", "accuracy": 0.9, "accuracy_sd": None}]},
        vae={"psnr": 30.1, "psnr_pca64": 27.0}, provenance={"command": "evaluate.py"},
        configs={"runs/x": {"kind": "vae"}, "none": None})
    logs = {"vae": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val_loss": 1.1}],
            "diffusion": []}
    shot = {"png": DOT, "label": "normal", "d": 1.0, "p": None}
    strip = {"condition": "sex", "value": "<F>", "n": 9, "m": 8, "shown": 6, "heldout": DOT,
             "synthetic": DOT}
    pictures = {"grids": {"normal": (DOT, DOT)}, "pairs": [(DOT, DOT, DOT)], "logs": logs,
                "rebuilt": DOT, "best": [shot], "worst": [shot | {"p": 0.25}],
                "beside": [(DOT, DOT, DOT)], "collection": [strip]}
    html = report.write(tmp_path, result, pictures).read_text()
    page = Page(html)
    assert page.ids == SECTIONS and html.count("<img") == 3 + 1 + 1 + 3 + 2 + 2 + 3 + 1 + 1 + 1
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in page.fetched)
    assert all(text in page.text
               for text in ("n < 20", "30.1 dB", "no known cell", "abc123",
                            "$ python evaluate.py --out <x>".strip("$ "), "p 25.0 %", "1 exact",
                            "runs/y is not the model that made these samples"))
    # below pictures, collection; provenance
    assert page.text.count("python sample.py") == 3
    assert {"Does the model keep who was in its training set to "
            "itself?": "no"}.items() <= answers(result).items()
    assert not re.search(r"\bnan\b", page.text)
    # the same numbers, the same page
    assert report.write(tmp_path, result, pictures).read_text() == html


def test_marks():
    assert [num(x) for x in (None, math.nan, -0.25, 12345.6, 0,
                             0.00012)] == ["–", "–", "−0.25", "12346", "0", "1.2e−04"]
    assert "&lt;b&gt;" in table(["a"], [("", ["<b>"])])
    assert jsonable({"a": (math.inf, np.float64(2.0), "x")}) == {"a": [None, 2.0, "x"]}


def test_the_audit_is_good_open_or_bad():
    for ends, answer in (((0.44, 0.55), "yes"), ((0.45, 0.7), "not resolved"), ((0.51, 0.9), "no"),
                         ((math.nan, math.nan), "not resolved")):
        audit = {"auroc": 0.5, "by_patient": ends, "n_train": 9, "n_heldout": 9}
        assert list(answers({"distances": [], "membership": audit}).values()) == [answer]
    assert answers({"distances": [], "membership": {"why": "no run"}}) == {}


def test_a_matrix_is_shown_with_its_state():
    sets = [{"name": name, "kind": "real", "label": "a", "part": part, "too_few": ""}
            for name, part in (("a · train", "train"), ("a · held-out", "held-out"))]
    cell = {"extractor": "pixels", "confounded": False, "KD": 0.5}
    found = {"status": "INVALID", "faults": ["blur (a) was not caught"],
             "controls": [{"caught": True}, {"caught": False}], "config": {"out": "runs/m"},
             "rows": sets, "columns": sets, "extractors": [{"name": "pixels"}],
             "cells": [cell | {"row": r["name"], "column": c["name"]} for r in sets for c in sets]}
    shown = report.matrix(found)
    assert "INVALID" in shown and "blur (a) was not caught" in shown and "1 of 2" in shown and shown.count(
        "<img") == 1
    assert "python evaluate.py matrix" in report.matrix(None)


def test_a_grey_cell_says_why():
    row = {"extractor": "x", "label": "a", "set": "synthetic", "n": 40, "m": 30, "small": True}
    rows = [row, row | {"label": "b", "m": 19}]
    text = Page(sections.numbers({"distances": rows})).text
    # in each table; the former in the note
    assert text.count("one patient") == 3 + 1 and text.count("n < 20") == 3
    cell = {"extractor": "x", "condition": "sex", "value": "F", "n": 19, "m": 40, "small": True}
    assert "n < 20" in Page(sections.conditions({"conditions": [cell]})).text
