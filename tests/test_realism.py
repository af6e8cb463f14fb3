"""Can images be told from real ones? The discriminator, the numbers that say how, the answer."""

import numpy as np
import pytest
import torch
from test_answers import cloud, joined

from benchmarks import realism as bench
from minidiff.evaluation import pages
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.metrics.realism import (
    LOOKS,
    auroc_of,
    discriminate,
    looks,
    measure,
    same_numbers,
)
from minidiff.evaluation.metrics.report_rows import ALL
from minidiff.evaluation.verdicts import kind, verdicts


@pytest.fixture(scope="module")
def pool():
    return bench.phantoms(240)


def area(x, y, patients=None):
    real, fake = (cloud(0, "a", len(z))._replace(patients=np.array(names)) for z, names in (
        (x, patients or range(len(x))), (y, range(len(y)))))
    scores = discriminate([(x, y)], real_patients=real.patients, fake_patients=fake.patients)
    return auroc_of(scores, real, fake)["auroc"]


def test_the_discriminator_finds_a_shift_and_a_change_of_direction_and_nothing_in_nothing():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 200, 10))
    assert 0.4 < area(x, y) < 0.6 and area(x, y + 1) > 0.9
    one = np.eye(10)[0]
    assert area(x, y + one) > 0.7 and area(x, y * (1 + 3 * one)) < 0.65


def test_a_real_image_is_not_known_by_another_one_of_its_patient():
    """Features that name the patient tell the sides apart only if his images lie in two folds."""
    rng = np.random.default_rng(1)
    x, y = np.repeat(rng.standard_normal((20, 40)), 5, 0), rng.standard_normal((100, 40))
    assert area(x, y, np.repeat(np.arange(20), 5).tolist()) < 0.65 < 0.7 < area(x, y)


def test_both_sides_have_as_many_images_of_each_label():
    real, fake = np.array(list("aaaaabbc")), np.array(list("aabbbbdd"))
    i, j = same_numbers(real, fake)
    assert sorted(real[i]) == sorted(fake[j]) == list("aabb")
    assert len(set(i)) == len(set(j)) == 4


def test_looks_by_hand():
    flat = torch.full((1, 3, 16, 16), 51, dtype=torch.uint8)
    assert dict(zip(LOOKS, looks(flat)[0])) == pytest.approx(
        {"fine detail": 0, "texture": 0, "colour": 0, "contrast": 0, "brightness": 20}, abs=0.01)
    tinted = flat.clone()
    tinted[:, 2] = 102
    assert looks(tinted)[0, LOOKS.index("colour")] == pytest.approx(20, abs=1e-4)
    rng = np.random.default_rng(0)   # white noise of standard deviation s has a fine detail of s
    noise = torch.from_numpy(rng.normal(128, 20, (1, 1, 128, 128))).round().byte()
    assert looks(noise.expand(-1, 3, -1, -1))[0, 0] == pytest.approx(100, rel=0.03)


@pytest.mark.parametrize("change, way", [
    ("blur", ("fine detail", False)), ("noise", ("fine detail", True)),
    ("colour", ("colour", True)), ("texture", ("texture", True)),
    ("contrast", ("contrast", False)), ("brightness", ("brightness", True))])
def test_a_control_is_told_and_the_way_that_it_was_spoilt_is_named(pool, change, way):
    found = bench.answer(pool, 80, bench.CHANGES[change], 0)
    assert found["answer"] == "yes" and way in [(x["name"], x["more"]) for x in found["ways"]]


def test_real_images_of_other_patients_are_not_told(pool):
    found = bench.answer(pool, 80, bench.CHANGES["real"], 0)
    assert found["answer"] != "yes" and found["ways"] == [] and found["low"] < 0.5 < found["high"]


def test_too_few_images_are_said():
    few = joined(cloud(0, "a", 5), cloud(1, "b", 40))
    sides = dict.fromkeys(("train", "heldout", "synthetic"), few)
    sides["synthetic"] = cloud(2, "a", 40)
    pixels = {name: torch.zeros(side.n, 3, 16, 16, dtype=torch.uint8)
              for name, side in sides.items()}
    found = measure({"x": sides}, pixels)
    assert found == {"n": 5}
    (row,) = pages.answers(verdicts({"distances": [], "realism": found}))
    assert row["answer"] == "not resolved" and "too few images" in row["text"]


def figures(low=0.45, high=0.55, distances=((0.1, -0.1), (0.1, -0.1)), looks=()):
    spaces = [{"space": name, "KD": kd, "KD_low": end, "KD_high": 1.0,
               "KD_floor": {"median": 0.0, "low": -0.2, "high": 0.2, "n": 90, "m": 90}}
              for name, (kd, end) in zip(("pixels-pca64", "texture", "classifier"), distances)]
    rows = [{"name": name, "made": 1.0, "real": 2.0, "real_low": 1.5, "real_high": 2.5,
             "auroc": a, "low": a - 0.1, "high": a + 0.1} for name, a in looks]
    return {"n": 90, "auroc": (low + high) / 2, "low": low, "high": high, "spaces": spaces,
            "looks": rows}


NEAR, PAST, FAR = (0.1, -0.1), (0.3, 0.1), (0.9, 0.3)   # within the floor, beyond, all beyond


@pytest.mark.parametrize("low, high, distances, answer", [
    (0.45, 0.59, (NEAR, NEAR), "no"), (0.45, 0.61, (NEAR, NEAR), "not resolved"),
    (0.45, 0.59, (NEAR,), "not resolved"), (0.45, 0.59, (NEAR, PAST), "not resolved"),
    (0.45, 0.59, (NEAR, NEAR, FAR), "yes"), (0.61, 0.9, (NEAR, NEAR), "yes"),
    (0.59, 0.9, (NEAR, NEAR), "not resolved"), (None, None, (NEAR, NEAR), "not resolved"),
    (1.0, 1.0, (), "yes")])
def test_the_answer_takes_the_discriminator_and_two_distances(low, high, distances, answer):
    found = figures(low or 0, high or 0, distances) | {"low": low, "high": high}
    (v,) = verdicts({"distances": [], "realism": found})
    assert v["answer"] == answer
    assert kind(v) == {"yes": "no", "no": "yes"}.get(answer, "open")
    pages.answers([v])


def test_the_text_says_how_the_most_telling_first():
    ways = [("brightness", 0.75), ("contrast", 0.5), ("colour", 0.65), ("fine detail", 0.0)]
    (row,) = pages.answers(verdicts(jsonable(
        {"distances": [], "realism": figures(0.9, 1.0, looks=ways)})))
    assert row["question"] == "Can they be told from real ones?" and row["good"] == "no"
    said = row["text"][row["text"].index("They are"):]
    assert said == ("They are smoother than real images (fine detail 1.0 %; nine in ten real "
                    "images have 1.5 to 2.5 %), brighter (brightness 1.0 %; nine in ten real "
                    "images have 1.5 to 2.5 %).")
    (row,) = pages.answers(verdicts({"distances": [], "realism": figures(0.9, 1.0)}))
    assert "brightness do not show how" in row["text"]


def test_what_could_not_be_measured_is_open_and_says_why():
    for n in (5, 60):   # 60 of one patient are as good as none
        (row,) = pages.answers(verdicts({"distances": [], "realism": {"n": n}}))
        assert row["answer"] == "not resolved" and "Only" not in row["text"]
        assert row["text"].startswith("There are too few images")


def test_praise_that_a_broken_generator_gets_for_nothing_is_taken_back():
    copies = {"verdict": "no sign of copying", "suspected": False, "spaces": []}
    label = {"variable": "label", "kind": "category", "n": 90, "accuracy": 0.9, "low": 0.85,
             "high": 0.95}
    reached = {"extractor": "x", "label": ALL, "set": "synthetic", "coverage": 0.9,
               "coverage_low": 0.85, "coverage_high": 0.95, "coverage_floor": {"median": 0.9}}
    result = {"distances": [reached], "neighbours": copies, "agreement": [
        label | {"set": "held-out real"}, label | {"set": "synthetic"}]}
    new, shown, varied = pages.answers(verdicts(result, on_page=True))
    assert {v["answer"] for v in (new, shown, varied)} == {"yes"}
    told = result | {"realism": figures(0.9, 1.0)}
    first, new, shown, varied = pages.answers(verdicts(told, on_page=True))
    assert first["question"] == "Can they be told from real ones?"
    assert [v["answer"] for v in (first, new, shown, varied)] == [
        "yes", "not resolved", "yes", "not resolved"]
    assert "being new is no merit" in new["text"] and "variety is no merit" in varied["text"]
    assert "not that they look real" in shown["text"]
    suspected = told | {"neighbours": copies | {"suspected": True}}
    assert verdicts(suspected)[1]["answer"] == "no"   # a copy stays one
