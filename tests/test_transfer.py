"""Transfer: shares of the real patients lie one in the other, other real images are told from
generated ones and kept apart from the study's patients, and the curve is that of the arms.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study_data import TINY, toy, write_set, write_world
from study_figures import make

from minidiff.classification import inputs, study
from minidiff.classification.arms import comparisons, parse, training_set, validation_set
from minidiff.data.subset import share_of_patients
from minidiff.errors import InputError
from minidiff.evaluation.pages import study_pictures
from minidiff.evaluation.pages.study import study_page

sys.path.insert(0, str(Path(__file__).parents[1]))  # classify.py is a script, beside the package
import classify
from benchmarks import transfer

NAMES = ["made", "other"]


def stages(name, real, seed=0):
    return training_set(parse(name, NAMES), real, {"other": toy((7, 7, 7), 9)}, positive="light",
                        seed=seed, subset_seed=5)


def test_shares_are_whole_patients_one_in_the_other_and_of_each_label_alike():
    patients = [f"{label}{i // 3}" for label in "abc" for i in range({"a": 90, "b": 30, "c": 6}
                                                                     [label])]
    kept = {share: share_of_patients([[p[0]] for p in patients], patients, share, seed=1)
            for share in (0.05, 0.1, 0.25, 0.5, 0.999)}
    counts = {share: [len({patients[i] for i in rows if patients[i][0] == label})
                      for label in "abc"] for share, rows in kept.items()}
    # a patient of three images each; c has two patients, of whom one is the least
    assert counts == {0.05: [2, 1, 1], 0.1: [3, 1, 1], 0.25: [8, 2, 1], 0.5: [15, 5, 1],
                      0.999: [30, 10, 2]}
    for fewer, more in zip(kept.values(), list(kept.values())[1:]):
        assert set(fewer) <= set(more) and fewer == sorted(fewer)
        assert all((i in fewer) == (i - i % 3 in fewer) for i in range(len(patients)))
    assert kept[0.1] != share_of_patients([[p[0]] for p in patients], patients, 0.1, seed=2)


def test_a_patient_of_several_labels_stays_whole_and_no_label_is_lost():
    """Each patient has a and one of b, c, so that none counts as a patient of a."""
    patients = [f"p{i // 2:02d}" for i in range(40)]
    labels = [["a"] if i % 2 else ["b" if i < 30 else "c"] for i in range(40)]
    rows = share_of_patients(labels, patients, 0.05, seed=0)
    assert {name for i in rows for name in labels[i]} == {"a", "b", "c"}
    assert all((i in rows) == (i ^ 1 in rows) for i in range(40)) and len(rows) <= 6
    both = [["a", "b"]] * 9 + [["a"]]  # findings: b is the rarer of an image's two
    assert share_of_patients(both, list("0123456789"), 0.2, seed=0)[-1] == 9


def test_arms_of_a_share_hold_it_in_each_stage_and_validate_with_as_much():
    real, val = toy((40, 20, 60), 1, per_patient=2), toy((20, 10, 30), 2, per_patient=2)

    def counts(name):
        return [stage.labels.bincount(minlength=3).tolist() for stage in stages(name, real)]

    assert counts("real@10%") == [[4, 2, 6]] and counts("real@2.5%") == [[2, 2, 2]]
    assert counts("real-then-real@10%") == [[4, 2, 6]] * 2
    assert counts("other-then-real-strong@10%") == [[7, 7, 7], [4, 2, 6]]
    small, large = stages("real@5%", real, 3)[0], stages("other-then-real@25%", real, 3)[1]
    assert set(small.patients) < set(large.patients)
    drawn = [stages("real@10%", real, seed)[0].patients for seed in range(3)]
    assert drawn[0] != drawn[1] != drawn[2]  # each network has its own
    own = validation_set(parse("other-then-real@10%", NAMES), real, val, positive="light", seed=0)
    assert own.labels.bincount().tolist() == [2, 2, 4] and set(own.patients) < set(val.patients)


@pytest.mark.parametrize("name", ["real@0%", "real@100%", "real@%", "real@5%%", "real@5.%x"])
def test_shares_that_are_none_are_refused(name):
    with pytest.raises(InputError, match="shares below 100 %, which is real|allowed are real"):
        parse(name, NAMES)


def test_generated_images_first_are_held_against_real_ones_first():
    names = [f"{start}{at}" for at in ("@5%", "") for start in
             ("real", "real-then-real", "made-then-real", "other-then-real")]
    pairs = comparisons([parse(name, NAMES) for name in names], ["other"])
    for at in ("@5%", ""):
        assert [b for a, b in pairs if a == f"made-then-real{at}"] == [
            f"real{at}", f"real-then-real{at}", f"other-then-real{at}"]
        assert [b for a, b in pairs if a == f"other-then-real{at}"] == [
            f"real{at}", f"real-then-real{at}"]
    assert ("real@5%", "real") in pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("transfer")
    knobs = write_world(root)
    clinic = write_set(root / "clinic2", replace(toy((9, 9, 9), 4)), ("train", "test"))
    cfg = classify.Config(**knobs, other=(f"there={clinic}",), out=str(root / "out"), device="cpu",
                          arms=("real@20%", "there-then-real@20%", "real",
                                "synthetic-then-real@20%"), seeds=3, positive="light",
                          condition=("label",), **TINY)
    classify.run_study(cfg)
    return root, cfg, json.loads((root / "out/summary.json").read_text())


def test_other_real_images_are_called_so_and_raise_no_doubt(made):
    _, _, summary = made
    facts = {row["arm"]: row for row in summary["arms"] if row["test_set"] == "test"}
    row = facts["there-then-real@20%"]
    assert (row["added_kind"], row["generator_extra"], row["real"], row["n_train"]) == (
        "other", 0, 12, 39)  # 20 % of 18 patients of each label are 4; and all 27, of any split
    assert row["remark"] == "trained on other real images, too"
    assert facts["synthetic-then-real@20%"]["added_kind"] == "synthetic"
    assert "there" not in summary["generators"] and "there" not in summary["attributes"]
    assert "real@20%: validation has 3 of 18 images, its share too" in summary["notes"]


def test_the_curve_is_that_of_the_arms_and_stands_on_the_page(made):
    root, _, summary = made
    means = {(row["test_set"], row["arm"]): row["balanced_accuracy"] for row in summary["arms"]}
    curve = [row for row in summary["learning"] if row["metric"] == "balanced_accuracy"]
    assert {(row["start"], row["share"]) for row in curve} == {
        ("real", 0.2), ("real", 1), ("there-then-real", 0.2), ("synthetic-then-real", 0.2)}
    for row in curve:
        arm = row["start"] + ("@20%" if row["share"] < 1 else "")
        assert row["value"] == pytest.approx(means[row["test_set"], arm])
        low, high = row["interval"]
        assert low is None or low <= row["value"] <= high
    page = (root / "out/study.html").read_text()
    assert "Learning curves" in page and "each network has drawn its own" in page


def test_a_curve_is_drawn_with_a_point_and_an_interval_for_each_share(monkeypatch):
    seen = []
    monkeypatch.setattr(study_pictures, "_png", lambda figure: seen.append(figure) or b"png")
    summary, results = make()
    assert "Learning curves" not in study_page(summary, results)
    row = {"test_set": "test", "metric": "balanced_accuracy", "interval": [0.5, 0.7], "value": 0.6}
    summary["learning"] = [row | {"start": start, "share": share, "arm": start}
                           for start in ("real", "synthetic") for share in (1.0, 0.05)]
    summary["learning"][0] |= {"interval": [None, None]}
    seen.clear()
    assert "Learning curves" in study_page(summary, results)
    axes = next(f.axes[0] for f in seen if f.axes[0].get_xlabel() == "real training images, %")
    assert [np.allclose(line.get_xdata(), [5, 100], rtol=0.03) for line in axes.lines] == [True] * 2
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert [line.get_ydata().tolist() for line in axes.lines] == [[60, 60], [60, 60]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["5", "100"]
    assert np.allclose(axes.collections[0].get_segments()[0], [[5, 50], [5, 70]], rtol=0.03)


@pytest.mark.parametrize("change, words", [
    ({"other": ("clinic",)}, "--other clinic: write NAME=DIR"),
    ({"other": ("real=clinic",)}, "no other folder has; taken are synthetic, real, duplicates"),
    ({"other": ("synthetic=clinic",)}, "a name that no other folder has"),
    ({"arms": ("here-then-real@5%",)}, "no folder is named 'here'; there are: synthetic, there"),
])
def test_bad_requests_are_one_sentence(made, change, words):
    with pytest.raises(InputError, match=words):
        classify.run_study(replace(made[1], **change))


def test_other_images_share_no_patient_and_no_file_with_the_study(made, tmp_path):
    root, cfg, _ = made

    def read(folder):
        return inputs.read(cfg.data, {}, (), size=32, seed=0, out=str(tmp_path / "out"),
                           others={"there": folder})

    clinic = str(root / "clinic2")
    assert read(clinic).others == {"there"} and read(clinic).saw == {"there": set()}
    with pytest.raises(InputError, match="crosses splits.*--distinct-patients if there numbers"):
        read(write_set(tmp_path / "same", toy((3, 3, 3), 1), ("train",)))
    copy = write_set(tmp_path / "copy", toy((3, 3, 3), 8), ("train",))
    own = next(Path(cfg.data[0]).glob("images/light/*.png"))
    (Path(copy) / "images/light/003.png").write_bytes(own.read_bytes())
    with pytest.raises(InputError, match="an identical file"):
        read(copy)
    (root / "samples/manifest.json").write_text("{}")
    with pytest.raises(InputError, match="a model made these images; give them as --synthetic"):
        read(str(root / "samples"))
    strange = toy((3, 3, 3), 8)
    rows = [{**row, "label": "odd"} for row in strange.rows]
    with pytest.raises(InputError, match="odd"):
        read(write_set(tmp_path / "strange", replace(strange, rows=rows), ("train",)))


# --- benchmarks/transfer.py

def test_hospitals_show_the_same_patient_and_differ_in_what_is_said():
    north, south = (transfer.drawn(11, 3, name, grain=False) for name in ("north", "south"))
    inner = np.s_[3:-3, 3:-3]
    want = 255 * (0.15 + 0.7 * (north / 255.0) ** 1.6)
    assert np.abs(south[inner] - want[inner]).max() < 2 and not south[:3].any()
    grain = transfer.drawn(11, 3, "south")[inner] - 1.0 * south[inner]
    assert 0.9 < grain.std() / (0.04 * 255) < 1.1


def test_matched_greys_are_those_of_the_other_hospital_in_the_order_of_the_image():
    g = torch.Generator().manual_seed(0)
    x, target = (torch.randint(0, 256, (n, 1, 8, 8), generator=g, dtype=torch.uint8)
                 for n in (3, 5))
    y = transfer.matched(x, target)
    assert y.dtype == torch.uint8 and set(y.unique().tolist()) <= set(target.unique().tolist())
    for before, after in zip(x.flatten(1), y.flatten(1)):
        assert (after[before.argsort(stable=True)].diff() >= 0).all()
    assert y.flatten(1).float().mean(1).sub(target.float().mean()).abs().max() < 3


@pytest.mark.slow
def test_a_part_of_the_benchmark_comes_again(tmp_path):
    """Two seeds of two arms of phantoms: at 5 % of the images, real ones of the same hospital
    first, and the control. On another CPU training goes elsewhere, so by 10 points."""
    saved = json.loads(transfer.SAVED.read_text())["phantom, curve"]["differences"]
    want = next(d["by_seed"] for d in saved if (d["arm"], d["against"]) == (
        "same-then-real@5%", "real-then-real@5%"))[:2]
    transfer.prepare("phantom", tmp_path, tmp_path)
    data = inputs.read((str(tmp_path / "real"),), {}, (), size=64, seed=0,
                       out=str(tmp_path / "out"), others={"same": str(tmp_path / "north")})
    recipe, truth = study.Recipe(64, 16, 150, 32, 2e-3, "covid"), data.sets["test"].labels

    def figure(name, seed):
        found = study.train_pair(tmp_path / "arms" / name / str(seed), parse(name, ["same"]), seed,
                                 data, recipe)
        right = torch.tensor(found["logits"]["test"]).argmax(1) == truth
        return torch.stack([right[truth == k].double().mean() for k in range(3)]).mean().item()

    got = [figure("same-then-real@5%", seed) - figure("real-then-real@5%", seed)
           for seed in (0, 1)]
    assert got == pytest.approx(want, abs=0.1)
