"""study: arms are count-matched, figures follow their definitions, an interrupted study ends as an unbroken one."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.classification import study
from minidiff.classification.study import Images
from minidiff.data import images as files
from minidiff.data.table import read_table
from minidiff.errors import InputError
from minidiff.variables import Category

sys.path.insert(0, str(Path(__file__).parents[1]))  # classify.py is a script, beside the package
import classify

LABEL = Category("label", ("dark", "light", "striped"))
TINY = {"size": 32, "width": 4, "steps": 3, "batch": 8, "lr": 2e-3}


def toy(counts, seed, per_patient=1):
    """Noise whose brightness or stripes are its label."""
    g = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = g.integers(0, 60, (len(labels), 1, 32, 32)) + np.array([30, 120, 60])[labels][:, None, None, None]
    pixels[labels == 2, :, ::4] += 90
    patients = [f"{seed}-{i // per_patient}" for i in range(len(labels))]
    return Images(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels), patients)


def one(**arms):
    """Arms of one seed each."""
    return {name.replace("_", "+"): [p] for name, p in arms.items()}


def one_hot(answers, k=3):
    return np.eye(k)[answers] * 0.8 + 0.1


# ---- arms


def test_arms_hold_what_the_table_says_and_are_count_matched():
    real, synthetic = toy((10, 4, 6), 1), toy((3, 9, 6), 2)
    made = {arm: study.training_set(arm, real, synthetic, classes=3, seed=0) for arm in study.ARMS}
    assert {arm: len(m.pixels) for arm, m in made.items()} == {
        "real": 20, "real+duplicates": 38, "real+synthetic": 38, "synthetic": 18}
    duplicates, added = made["real+duplicates"], made["real+synthetic"]
    assert torch.equal(duplicates.labels.bincount(), added.labels.bincount())  # label by label, not only in all
    assert torch.equal(added.pixels[20:], synthetic.pixels) and torch.equal(duplicates.pixels[:20], real.pixels)
    own = {x.numpy().tobytes(): int(y) for x, y in zip(real.pixels, real.labels)}
    repeats = [x.numpy().tobytes() for x in duplicates.pixels[20:]]
    assert [own[x] for x in repeats] == duplicates.labels[20:].tolist()        # real images under their own labels
    light = [x for x in repeats if own[x] == 1]
    assert sorted(light.count(x) for x in set(light)) == [2, 2, 2, 3]          # 9 of 4, in rounds


def test_duplicates_are_drawn_by_seed():
    real, synthetic = toy((10, 4, 6), 1), toy((3, 2, 2), 2)
    a, b, c = (study.training_set("real+duplicates", real, synthetic, classes=3, seed=s).pixels for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_finished_arm_is_read_and_other_images_are_refused(tmp_path):
    train, tests = toy((8, 8, 8), 1), {"test": toy((4, 4, 4), 2)}
    first = study.train_arm(tmp_path, "real", 0, train, tests, LABEL, **TINY)
    stamp = (tmp_path / "real_seed0.json").stat().st_mtime_ns
    assert study.train_arm(tmp_path, "real", 0, train, tests, LABEL, **TINY) == first
    assert (tmp_path / "real_seed0.json").stat().st_mtime_ns == stamp
    assert np.array(first["probabilities"]["test"]).shape == (12, 3)
    with pytest.raises(InputError, match="other training images"):
        study.train_arm(tmp_path, "real", 0, toy((8, 8, 8), 3), tests, LABEL, **TINY)
    turned = {"test": Images(*(x.flip(0) for x in tests["test"][:2]), tests["test"].patients[::-1])}
    with pytest.raises(InputError, match="in another order"):
        study.train_arm(tmp_path, "real", 0, train, turned, LABEL, **TINY)


# ---- figures


def test_scores_follow_their_definitions():
    test = toy((4, 2, 0), 0, per_patient=2)
    p = one_hot([0, 0, 0, 1, 1, 0])
    s = study.score(p, test, LABEL.values)
    assert s["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert s["accuracy"] == pytest.approx(4 / 6) and s["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert s["recall"] == {"dark": 0.75, "light": 0.5, "striped": None}
    assert s["auroc"]["dark"] == pytest.approx((3 * 0.5 + 3 * 1 + 0.5) / 8) and s["auroc"]["striped"] is None
    assert (s["n"], s["patients"]) == (6, 3) and s["accuracy_interval"][0] < 4 / 6 < s["accuracy_interval"][1]
    json.dumps(s, allow_nan=False)


def test_one_class_in_an_external_set_has_recall_and_no_auroc():
    s = study.score(one_hot([0, 0, 1]), toy((3, 0, 0), 0), LABEL.values)
    assert s["recall"]["dark"] == pytest.approx(2 / 3) and s["auroc_macro"] is None
    found = study.differences(one(real=one_hot([0, 0, 1]), synthetic=one_hot([0, 0, 0])), toy((3, 0, 0), 0), n_boot=20)
    assert {d["metric"]: d["difference"] for d in found}["auroc_macro"] is None
    json.dumps([s, found], allow_nan=False)


def test_differences_are_paired_and_resolved_only_where_they_should_be():
    test = toy((40, 40, 40), 0)
    truth = test.labels.numpy()
    good, same, bad = truth.copy(), truth.copy(), truth.copy()
    bad[::2] = (bad[::2] + 1) % 3
    good[:3], same[3:6] = 1, 1  # other mistakes, as many
    arms = one(real=one_hot(good), real_synthetic=one_hot(same), synthetic=one_hot(bad))
    found = {(d["arm"], d["metric"]): d for d in study.differences(arms, test, n_boot=300)}
    worse = found["synthetic", "accuracy"]
    assert worse["resolved"] and worse["interval"][1] < 0 and worse["difference"] == pytest.approx(-57 / 120)
    assert not found["real+synthetic", "accuracy"]["resolved"]
    nothing = study.differences(one(real=one_hot(good), synthetic=one_hot(good)), test, n_boot=50)
    assert all(d["interval"] == [0, 0] and not d["resolved"] for d in nothing)


def test_a_difference_with_one_seed_of_the_other_sign_is_not_resolved():
    """Two seeds far better and one a little worse: patients cannot undo it, another seed could."""
    test = toy((40, 40, 40), 0)
    truth = test.labels.numpy()
    bad, worse = truth.copy(), truth.copy()
    bad[::2], worse[:70] = (bad[::2] + 1) % 3, (worse[:70] + 1) % 3
    real = [one_hot(bad)] * 3
    for third, resolved in ((truth, True), (worse, False)):
        arms = {"real": real, "synthetic": [one_hot(truth), one_hot(truth), one_hot(third)]}
        found = study.differences(arms, test, n_boot=200)[0]
        assert found["interval"][0] > 0.3 and found["difference"] == pytest.approx(0.5)
        assert (found["resolved"], found["seeds"], found["seeds_agree"]) == (resolved, 3, 2 + resolved)


def test_a_damaged_arm_is_named(tmp_path):
    (tmp_path / "real_seed0.json").write_text('{"arm": "re')
    with pytest.raises(InputError, match="real_seed0.json is damaged"):
        study.train_arm(tmp_path, "real", 0, toy((8, 8, 8), 1), {}, LABEL, **TINY)


def test_images_of_one_patient_do_not_count_as_many_patients():
    truth = np.repeat([0, 1], 60)
    answers = truth.copy()
    answers[:20] = 1
    widths = []
    for per_patient in (1, 20):
        test = toy((60, 60), 0, per_patient)
        found = study.differences(one(real=one_hot(answers, 2), synthetic=one_hot(truth, 2)), test, n_boot=400)
        widths.append(found[0]["interval"][1] - found[0]["interval"][0])
    assert widths[1] > 2 * widths[0]


def test_summary_is_mean_and_deviation_over_seeds():
    rows = [{"test_set": "test", "arm": "real", "n_train": 9, "accuracy": a, "balanced_accuracy": a, "auroc_macro": None}
            for a in (0.5, 0.7)]
    (row,) = study.summarise(rows)
    assert row["accuracy"] == pytest.approx(0.6) and row["accuracy_sd"] == pytest.approx(0.02**0.5)
    assert row["seeds"] == 2 and row["auroc_macro"] is None and row["auroc_macro_sd"] is None


@pytest.mark.parametrize("cells, words", [
    ({"train": ["a", "a"], "test": ["a", "b"]}, "the train split has only 'a', 2 images"),
    ({"train": ["a", "b"], "test": ["b"]}, "the test split has only 'b', 1 images"),
    ({"train": ["a", "b"], "test": []}, "the test split has no image"),
    ({"train": ["a", "b"], "test": ["a", "c", "d"]}, "test has labels that the train split has not: c, d; train has a, b"),
    ({"train": ["a", "b"], "test": ["a", "b"], "clinic": ["z"]}, "clinic has labels that the train split has not: z"),
])
def test_sets_that_cannot_be_studied_are_refused(cells, words):
    with pytest.raises(InputError, match=words):
        study.check_labels(cells)


# ---- the script


def write_set(folder, images, splits=None):
    lines = ["file_name,label,split,patient,view,age"]
    for i, (x, label) in enumerate(zip(images.pixels, images.labels.tolist())):
        name = f"images/{LABEL.values[label]}/{i:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.write(folder / name, x)
        split = splits[i % len(splits)] if splits else ""
        patient = images.patients[i] if splits else ""
        lines.append(f"{name},{LABEL.values[label]},{split},{patient},{'AP' if i % 2 else 'PA'},{20 + i % 50}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return root, dict(
        data=(write_set(root / "real", toy((20, 20, 20), 1), ("train", "train", "train", "test", "val")),),
        synthetic=write_set(root / "samples", toy((5, 6, 7), 2)),
        external=(write_set(root / "clinic", toy((4, 4, 0), 3), ("external",)),),
        condition=("label", "view", "age"), device="cpu", arms=tuple(study.ARMS), seeds=2, **TINY)


@pytest.fixture(scope="module")
def unbroken(world):
    root, knobs = world
    classify.run_study(classify.Config(**knobs, out=str(root / "unbroken")))
    return root / "unbroken"


def test_study_writes_results_for_every_arm_seed_and_test_set(world, unbroken):
    results = json.loads((unbroken / "results.json").read_text())
    assert {(r["arm"], r["seed"], r["test_set"]) for r in results} == {
        (arm, seed, name) for arm in study.ARMS for seed in (0, 1) for name in ("test", "clinic")}
    assert {r["arm"]: r["n_train"] for r in results} == {
        "real": 36, "real+duplicates": 54, "real+synthetic": 54, "synthetic": 18}
    summary = json.loads((unbroken / "summary.json").read_text())
    assert len(summary["arms"]) == 8 and {a["variable"]: a["n"] for a in summary["judge"]}["age"] == 12
    assert {d["against"] for d in summary["differences"]["clinic"]} == {"real", "real+duplicates"}
    assert (unbroken / "judge" / "predictor.safetensors").exists()
    files = json.loads((unbroken / "judge" / "trained_on.json").read_text())
    train = read_table(world[1]["data"]).select(split="train")
    assert files == sorted(train.hashes[file] for file in train.column("file")) and len(files) == 36


def test_an_interrupted_study_ends_as_an_unbroken_one(world, unbroken, monkeypatch):
    root, knobs = world
    cfg, real_fit, calls = classify.Config(**knobs, out=str(root / "broken")), study.fit, []

    def fit(*args, **kwargs):
        calls.append(kwargs["progress"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real_fit(*args, **kwargs)

    monkeypatch.setattr(study, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        classify.run_study(cfg)
    classify.run_study(cfg)
    assert len(calls) == len(set(calls)) + 1 == 9  # eight fits, the interrupted one twice
    for name in ("results.json", "summary.json", "judge/agreement.json", "arms/synthetic_seed1.json"):
        assert (root / "broken" / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_other_settings_in_the_same_folder_are_refused_and_fewer_arms_are_not(world, unbroken, capsys):
    knobs = world[1]
    before = (unbroken / "results.json").read_bytes()
    with pytest.raises(InputError, match="steps: 3 there, 4 now"):
        classify.run_study(classify.Config(**{**knobs, "steps": 4}, out=str(unbroken)))
    classify.run_study(classify.Config(**knobs, out=str(unbroken)))
    assert (unbroken / "results.json").read_bytes() == before
    shown = capsys.readouterr().out
    assert "real+synthetic − real+duplicates" in shown and "clinic: 8 images" in shown and "of 2 seeds)" in shown
    assert "note: samples: no patient ids: one image = one patient, assumed" in shown
    assert "does not say what its generator was trained on" in shown


def test_bad_requests_are_one_sentence(world, tmp_path):
    knobs = world[1]

    def refused(match, **changes):
        with pytest.raises(InputError, match=match):
            classify.run_study(classify.Config(**{**knobs, "out": str(tmp_path / "out"), **changes}))

    refused("run sample.py first", synthetic=str(tmp_path / "none"))
    refused("arms best; allowed are real, real", arms=("best",))
    refused("name each of them once", arms=("real", "real"))
    refused("seeds is 0", seeds=0)
    refused("batch is 1; allowed are 2", batch=1)
    refused("names view twice", condition=("label", "view", "view"))
    refused("--condition patient", condition=("label", "patient"))
    refused("no such folder", data=(str(tmp_path / "none"),))
    refused("condition 'height'", condition=("label", "height"))
    copied = toy((20, 20, 20), 1)
    refused("crosses splits", external=(write_set(tmp_path / "copy", copied, ("external",)),))
    assert not (tmp_path / "out").exists()


def test_arms_real_needs_no_samples(world, tmp_path):
    knobs = {**world[1], "synthetic": str(tmp_path / "none"), "arms": ("real",), "seeds": 1, "external": ()}
    classify.run_study(classify.Config(**knobs, out=str(tmp_path / "out")))
    assert [r["arm"] for r in json.loads((tmp_path / "out" / "results.json").read_text())] == ["real"]


def read(world, **changes):
    return classify.read(classify.Config(**{**world[1], **changes}))


def test_real_images_are_no_synthetic_ones(world, tmp_path):
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    copy = next(Path(world[1]["data"][0]).rglob("*.png"))
    (Path(samples) / "images" / "light" / "005.png").write_bytes(copy.read_bytes())
    with pytest.raises(InputError, match=r"samples: 1 of 18 files are real images .* e\.g\. .*light/005.png"):
        read(world, synthetic=samples)
    with pytest.raises(InputError, match="60 of 60 files are real"):
        read(world, synthetic=world[1]["data"][0])
    with pytest.raises(InputError, match="8 of 8 files are real"):
        read(world, synthetic=world[1]["external"][0])


@pytest.mark.parametrize("which", ["real", "clinic"])
def test_a_generator_that_saw_a_test_image_is_refused(world, tmp_path, which):
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    real, clinic = read_table(world[1]["data"]), read_table(world[1]["external"])
    train = [real.hashes[row["file"]] for row in real.select(split="train").rows]
    held_out = real.select(split="test").rows[3] if which == "real" else clinic.rows[0]
    manifest = Path(samples) / "manifest.json"
    manifest.write_text(json.dumps({"trained_on": train}))
    tables, _ = read(world, synthetic=samples)
    assert not any("trained on" in note for note in tables["synthetic"].notes)
    manifest.write_text(json.dumps({"trained_on": [*train, {**real.hashes, **clinic.hashes}[held_out["file"]]]}))
    with pytest.raises(InputError, match="the generator was trained on 1 of 20 held-out images"):
        read(world, synthetic=samples)


def test_a_label_that_no_test_patient_has_is_refused(world, tmp_path):
    images = toy((10, 10, 4), 5)
    folder = Path(write_set(tmp_path / "real", images, ("train", "test")))
    lines = (folder / "metadata.csv").read_text().replace(",striped,test", ",striped,train")
    (folder / "metadata.csv").write_text(lines)
    with pytest.raises(InputError, match="label 'striped' needs 1 or more images in split 'test'; has train 4"):
        read(world, data=(str(folder),), external=())


def test_assumed_patients_of_folders_of_one_name_are_not_the_same(world, tmp_path):
    ours, theirs = (write_set(tmp_path / where / "chest", toy((20, 20, 20), seed)) for where, seed in (("a", 5), ("b", 6)))
    tables, _ = read(world, data=(ours,), external=(theirs,), arms=("real",), out=str(tmp_path / "out"))
    assert len(tables["chest"]) == 60 and not set(tables["chest"].column("patient")) & set(tables["train"].column("patient"))


def test_a_label_lost_to_skip_bad_is_refused(world, tmp_path):
    folder = Path(write_set(tmp_path / "real", toy((10, 10, 4), 5), ("train", "test")))
    for k in (21, 23):
        (folder / "images" / "striped" / f"{k:03d}.png").write_bytes(b"x%d" % k)
    with pytest.raises(InputError, match="label 'striped' needs 1 or more images in split 'test'"):
        read(world, data=(str(folder),), external=(), skip_bad=True)
