"""The answers of the report, from the distances and the judge's readings behind them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidiff.classification.judge_agreement import judge_agreement
from minidiff.evaluation import pages
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.matrix import gates
from minidiff.evaluation.metrics.agreement import within_label
from minidiff.evaluation.metrics.distances import kid
from minidiff.evaluation.metrics.report_rows import ALL, AT_EQUAL_N, Side, by_label
from minidiff.evaluation.verdicts import (
    beyond,
    in_any,
    in_every,
    variety,
    verdicts,
)
from minidiff.statistics import wilson
from minidiff.variables import Category, Number

NORMAL = ("Is synthetic normal nearer to real normal than real images of other labels are "
          "(a low bar)?")


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
    return by_label("pixels-pca64", synthetic=made, **sides, labels=["normal", "covid", "rare"],
                   repeats=20)


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
    assert found["rare", "synthetic"]["too_few"] and "KD" not in found["rare", "synthetic"]
    # at equal numbers, beside real against real there
    for name in AT_EQUAL_N:
        spread = same[f"{name}_floor"]
        assert spread["low"] <= spread["median"] <= spread["high"] and spread["n"] == spread[
            "m"] == same["equal_n"] == 40
    assert other["MIND"] > 3 * same["MIND"] and other["coverage"] < 0.5 < same[
        "coverage_low"] <= same["coverage"]
    assert same["C2ST_p"] > 0.01 > other["C2ST_p"] and other["C2ST_low"] > 0.5
    assert same["MIND"] < 2 * same["MIND_floor"]["high"] and 0.35 < same["C2ST_floor"][
        "median"] < 0.65


def answers(result):
    return {v["question"]: v["answer"] for v in pages.answers(verdicts(jsonable(result)))}


def test_verdicts_on_likeness_say_yes_no_and_not_resolved():
    question = NORMAL
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
        found = by_label("x", synthetic=made, train=train, heldout=heldout,
                        labels=["normal", "covid"], repeats=20)
        assert all(np.isfinite([r[k] for k in ("KD", "KD_low", "KD_high", "KD_p")]).all()
                   for r in found if "KD" in r)
        assert all(r["beyond_low"] <= r["beyond_high"] for r in found
                   if r["set"] != "synthetic" and r["label"] != ALL)
    heldout = joined(few(4, "normal", 30, 9), few(5, "covid", 30, 1, 2.0))
    found = by_label("x", synthetic=made, train=train, heldout=heldout, labels=["normal", "covid"],
                    repeats=20)
    assert all(r["too_few"] for r in found if r["label"] == "covid")


def test_other_labels_are_held_out_images_of_other_patients():
    """A classifier puts the labels of its training images far apart: they must not be what
    synthetic images are held to.
    """
    train = joined(cloud(0, "normal", 60), cloud(10, "covid", 60, 9.0))
    heldout = joined(cloud(1, "normal", 60), cloud(11, "covid", 60, 1.0))
    made = joined(cloud(5, "normal", 60, 2.0), cloud(6, "covid", 60))
    found = by_label("classifier", synthetic=made, train=train, heldout=heldout,
                    labels=["normal", "covid"], repeats=20)
    row = next(r for r in found if (r["label"], r["set"]) == ("normal", "real covid"))
    assert row["KD"] == pytest.approx(kid(real=heldout.of("normal").features,
                                          fake=heldout.of("covid").features))
    assert answers({"distances": found})[NORMAL] == "no"
    shared = heldout._replace(
        patients=np.array([f"p{i % 60}" if i % 60 < 15 else f"p{i}" for i in range(120)]))
    found = by_label("classifier", synthetic=made, train=train, heldout=shared,
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
                  for row in judge_agreement(judge, torch.zeros(300), labels, which)]
    age, sex = (next(r for r in found[2:] if r["variable"] == name) for name in ("age", "sex"))
    assert age["low"] > 0.5 and age["within_low"] < age["within_r"] < age["within_high"] < age[
        "high"]
    assert sex["within_chance"] > 0.8 > max(v["n"] for v in sex["by_value"]) / sex["n"]
    given = answers({"distances": [], "agreement": found})
    assert set(given) == {"Do the images follow the age that was asked for?",
                          "Do the images follow the sex that was asked for?"}
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
    assert answers({"distances": [], "agreement": both}) == {
        "Do the images follow the age that was asked for?": "not resolved"}


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
    assert answers(result) == {"Do the images show the label that was asked for?": answer}


@pytest.mark.parametrize("k,answer", [(90, "yes"), (52, "not resolved"), (30, "no")])
def test_verdict_on_an_attribute_compares_with_guessing(k, answer):
    result = {"distances": [], "agreement": [share(99, 100, "held-out real", "sex"),
                                             share(k, 100, "synthetic", "sex")]}
    assert answers(result) == {"Do the images follow the sex that was asked for?": answer}


@pytest.mark.parametrize("word", ["gain", "harm", "no gain of interest", "not resolved",
                                  "not shown"])
def test_verdict_on_the_classifier_study_is_its_primary_comparison(word):
    primary = {"arm": "real+1xsynthetic", "against": "real+1xduplicates", "test_set": "test",
               "metric": "balanced_accuracy", "difference": 0.02, "interval": [0.01, 0.03],
               "answer": word, "seeds": 5, "generators": 1, "patients": 300, "p": 0.01,
               "added": ["synthetic", "duplicates"], "doubts": [], "sees": 0.03,
               "patients_needed": 700}
    assert answers({"distances": [], "study": {"primary": primary}}) == {
        "Did synthetic training images help a classifier (test set)?": word}
    assert answers({"distances": [], "study": {"primary": None}}) == {}


def test_a_study_of_an_older_version_is_not_tested():
    older = {"primary": {"arm": "a", "against": "b", "answer": "harm", "times": 2},
             "arms": [{"arm": "a"}],
             "differences": {"test": [{"arm": "a", "metric": "auroc", "resolved": False}]}}
    assert answers({"distances": [], "study": older}) == {
        "Did synthetic training images help a classifier?": "not tested"}


AUDIT = {"auroc": 0.5, "by_patient": (0.44, 0.55), "p": 0.5, "tpr": 0.01, "tpr_most": 0.04,
         "tpr_p": 0.5, "false_alarms": 5, "n_train": 500, "n_heldout": 500,
         "patients_train": 500, "patients_heldout": 500, "reference": None, "random_split": True}


@pytest.mark.parametrize("found, answer", [
    ({}, "yes"), ({"tpr_most": 0.05}, "not resolved"), ({"tpr_p": 0.025}, "no"),
    ({"p": 0.025}, "no"), ({"p": 0.026}, "yes"),
    ({"tpr_p": 0.001, "random_split": False}, "not resolved"),
    ({"random_split": False}, "not resolved")])
def test_the_audit_is_good_open_or_bad(found, answer):
    (row,) = pages.answers(verdicts(jsonable({"distances": [], "membership": AUDIT | found})))
    assert row["answer"] == answer
    assert ("may not be random" in row["text"]) == ("random_split" in found)
    assert ("440 patients" in row["text"]) == ("tpr_most" in found)


@pytest.mark.parametrize("first, second, answer", [
    ({}, {}, "yes"), ({}, {"p": 0.012}, "no"), ({}, {"tpr_p": 0.0125}, "no"),
    ({"p": 0.02}, {"p": 0.02}, "yes"), ({"p": 0.012}, {}, "no"),   # each of two: half of .025
    ({"tpr_most": 0.05}, {"tpr_most": 0.01}, "not resolved")])     # the first one says yes
def test_a_second_attack_can_only_take_a_yes_away(first, second, answer):
    likelihood = {**AUDIT, "n_train": 100, "tpr_most": 0.12, "auroc": 0.625} | second
    (row,) = pages.answers(verdicts({"distances": [], "membership": AUDIT | first | {
        "likelihood": likelihood}}))
    assert row["answer"] == answer
    assert "The likelihood, asked of 100 and 500 of these images" in row["text"]
    assert "AUROC is 0.625" in row["text"] and "a p of 0.0125 or less is a leak" in row["text"]


def test_the_audit_names_its_reference_and_is_not_there_without_a_run():
    (row,) = pages.answers(verdicts({"distances": [],
                                     "membership": AUDIT | {"reference": "runs/y"}}))
    assert "measured with runs/y" in row["text"]
    assert answers({"distances": [], "membership": {"why": "no run"}}) == {}


def test_an_interval_answers_only_where_all_of_it_agrees():
    assert [beyond(*ends, 0.5) for ends in ((0.6, 0.9), (0.1, 0.4), (0.4, 0.6), (0.5, 0.9),
                                            (None, None), (None, 0.4))] == [
        "yes", "no", "not resolved", "not resolved", "not resolved", "not resolved"]


def test_many_answers_become_one():
    yes, no, unclear = "yes", "no", "not resolved"
    assert [in_every(a) for a in ([yes], [yes, unclear], [yes, no], [unclear], [])] == [
        yes, unclear, no, unclear, unclear]
    assert [in_any(a) for a in ([yes], [yes, unclear], [yes, no], [unclear], [])] == [
        yes, yes, no, unclear, unclear]


def test_variety_is_held_to_what_real_images_reach_in_every_space():
    def space(low, high):
        return {"extractor": "x", "label": ALL, "set": "synthetic", "coverage": 0.5,
                "coverage_low": low, "coverage_high": high, "coverage_floor": {"median": 0.9}}

    good, bad, between = space(0.85, 0.95), space(0.5, 0.7), space(0.7, 0.9)
    for some, answer in (([good, good], "yes"), ([good, bad], "no"), ([good, between],
                                                                     "not resolved")):
        (row,) = pages.answers(variety(some))
        assert row["question"] == "Are they as varied as real images?" and row["answer"] == answer


COPIES = "Are the images new, not copies of training images?"
PLAIN = {"near_p": 1.0, "copying_z": 0.5}
NAMED = {"limit": 0.09, "n": 300, "found": 0, "images": [], "heldout": 0, "probes": 64,
         "probes_found": 57, "seen": 0.006, "at_most": 0.012}


def test_copies_are_not_excluded_where_the_generator_saw_other_images():
    found = {"verdict": "no sign of copying", "suspected": False, "spaces": []}
    question = "Are the images new, not copies of training images?"
    assert answers({"distances": [], "neighbours": found}) == {question: "yes"}
    (row,) = pages.answers(verdicts({"distances": [], "neighbours": found,
                                    "samples": {"of_other_data": True}}))
    assert row["answer"] == "not resolved" and "trained on other images" in row["text"]


@pytest.mark.parametrize("named, words", [
    (NAMED, ["No single image was named", "at most 1.2 %", "Of 64 probes",
            "names 57", "at least 9"]),
    (NAMED | {"found": 2, "heldout": 1}, ["they match their", "but for 1 in 1,000",
                                      "1 held-out image is as near"]),
    (NAMED | {"probes_found": 0, "seen": None, "at_most": None}, ["says nothing"])])
def test_beside_the_answer_on_copies_stands_what_would_have_been_found(named, words):
    found = {"verdict": "no sign of copying", "suspected": bool(named["found"]), "named": named,
             "fewest": 9, "spaces": [{"space": "pixels", "near_share": 0.04, **PLAIN}]}
    (row,) = pages.answers(verdicts({"distances": [], "neighbours": found}))
    assert row["answer"] == ("no" if named["found"] else "yes" if named["seen"] else "not resolved")
    assert all(text in row["text"] for text in words)


@pytest.mark.parametrize("more, answer, words", [
    ({}, "yes", "No sign"), ({"near_p": 1e-6}, "not resolved", "smooth or typical images"),
    ({"copying_z": -5.0}, "not resolved", "smooth or typical images"),
    ({"random_split": False}, "not resolved", "may not be random")])
def test_report_and_matrix_say_the_same_of_copies(more, answer, words):
    space = {"space": "pixels", "near_share": 0.04, "closest_train": 20, "closest": 20, "n": 50,
             "closest_expected": 12.0, "train": 90, "heldout": 60, "auth_excess": 1.0, **PLAIN}
    found = {"verdict": "no sign of copying", "suspected": False, "named": None,
             "random_split": more.get("random_split", True), "spaces": [{**space, **more}]}
    (row,) = pages.answers(verdicts({"distances": [], "neighbours": found}))
    assert row["answer"] == gates.novelty(found)["answer"] == answer and words in row["text"]
