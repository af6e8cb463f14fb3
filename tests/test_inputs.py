"""inputs: what breaks the protocol of a study is refused; what was left out or taken is noted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from study_data import SPLITS, toy, write_set, write_world

from minidiff.classification import inputs
from minidiff.data.table import read_table
from minidiff.errors import InputError
from minidiff.root import Reading


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("inputs"))


def read(world, **changes):
    knobs = {**world, **changes}
    return inputs.read(knobs["data"], {"synthetic": knobs["synthetic"]}, knobs["external"],
                       size=32, seed=0, out="x/out",
                       **{name: changes[name] for name in ("reading", "hold_out", "near_copies",
                                                           "skip_bad") if name in changes})


def test_real_images_are_no_synthetic_ones(world, tmp_path):
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    copy = next(Path(world["data"][0]).rglob("*.png"))
    (Path(samples) / "images" / "light" / "005.png").write_bytes(copy.read_bytes())
    with pytest.raises(InputError,
                       match=r"samples holds 1 file of the real data, e\.g\. .*light/005.png"):
        read(world, synthetic=(samples,))
    with pytest.raises(InputError, match="real holds 90 files of the real data"):
        read(world, synthetic=world["data"])


@pytest.mark.parametrize("which", ["val", "test", "clinic"])
def test_a_generator_that_saw_a_held_out_image_is_refused(world, tmp_path, which):
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    real, clinic = read_table(world["data"]), read_table(world["external"])
    train = [real.hashes[row["file"]] for row in real.select(split="train").rows]
    held_out = clinic.rows[0] if which == "clinic" else real.select(split=which).rows[3]
    manifest = Path(samples) / "manifest.json"
    manifest.write_text(json.dumps({"trained_on": train}))
    found = read(world, synthetic=(samples,))
    assert found.saw["synthetic"] == set(train) and not any("trained on" in note
                                                            for note in found.notes)
    manifest.write_text(
        json.dumps({"trained_on": [*train, {**real.hashes, **clinic.hashes}[held_out["file"]]]}))
    with pytest.raises(InputError, match="the generator of .*samples was trained on 1 of 44 "
                       "held-out images"):
        read(world, synthetic=(samples,))


def test_a_near_copy_in_a_test_set_is_refused_or_left_out(world, tmp_path):
    """A training picture, brightened and saved anew: other bytes, the same film."""
    films = torch.rand(15, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    films = 200 * torch.nn.functional.interpolate(films, (96, 96), mode="bicubic").clamp(0, 1)
    ours, theirs = films[:12].to(torch.uint8), (torch.cat([1.1 * films[:1],
                                                           films[12:]])).to(torch.uint8)
    data = write_set(tmp_path / "real", replace(toy((4, 4, 4), 7), pixels=ours),
                     ("train", "train", "test", "val"))
    clinic = write_set(tmp_path / "clinic", replace(toy((2, 2, 0), 8), pixels=theirs),
                       ("external",))
    knobs = {"size": 96, "seed": 0, "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match="1 near copy .*clinic.*--near-copies drop"):
        inputs.read((data,), {}, (clinic,), **knobs)
    found = inputs.read((data,), {}, (clinic,), **knobs, near_copies="drop")
    assert len(found.sets["clinic"]) == 3 and any("1 near copies" in note and "000.png" in note
                                                  for note in found.notes)


def test_files_too_small_to_be_compared_are_not_refused_but_noted(world, tmp_path):
    """At 32 px two films of one outline look like copies; what is compared does not hang on the
    size of the study.
    """
    found = read(world)
    assert any("near copies were not looked for: with files of fewer than 96 px" in note
               for note in found.notes)
    films = torch.rand(15, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    films = 200 * torch.nn.functional.interpolate(films, (96, 96), mode="bicubic").clamp(0, 1)
    films[3] = (1.1 * films[2]).clamp(0, 255)  # a training film in the test set, brighter
    data = write_set(tmp_path / "real", replace(toy((5, 5, 5), 7), pixels=films.to(torch.uint8)),
                     SPLITS)
    knobs = {"seed": 0, "out": str(tmp_path / "out"), "size": 32}
    with pytest.raises(InputError, match="1 near copy of training or validation"):
        inputs.read((data,), {}, (), **knobs)


def test_a_validation_patient_in_an_external_set_is_refused(world, tmp_path):
    clinic = Path(write_set(tmp_path / "clinic", toy((4, 4), 9), ("external",)))
    of_val = read_table(world["data"]).select(split="val").rows[0]["patient"]
    text = (clinic / "metadata.csv").read_text()
    (clinic / "metadata.csv").write_text(text.replace("external,9-0,", f"external,{of_val},"))
    with pytest.raises(InputError, match=f"patient '{of_val}' crosses splits.*--distinct-patients "
                       "if clinic numbers its own"):
        read(world, external=(str(clinic),))
    found = read(world, external=(str(clinic),), reading=Reading(distinct_patients=True))
    assert f"external {of_val}" in found.sets["clinic"].patients
    assert found.sets["train"].patients == read(world, external=()).sets["train"].patients


def test_a_generator_that_saw_another_image_of_a_held_out_patient_is_refused(world, tmp_path):
    """Of a patient with films of two views, one view is held out; the generator saw the other."""
    data = write_set(tmp_path / "real", toy((40, 40, 40), 5, per_patient=2),
                     ("train",) * 6 + ("test",) * 2 + ("val",) * 2)
    lines = (Path(data) / "metadata.csv").read_text().splitlines()
    views = {f"5-{k}": "AP,PA" if k in (0, 1, 20, 21, 40, 41) else "PA,PA" for k in range(60)}
    new = [lines[0]]
    for i, line in enumerate(lines[1:]):
        name, label, split, patient, _, age = line.split(",")
        new.append(",".join((name, label, split, patient, views[patient].split(",")[i % 2], age)))
    (Path(data) / "metadata.csv").write_text("\n".join(new) + "\n")
    table = read_table(data)
    row = next(row for row in table.rows if row["patient"] == "5-0" and row["view"] == "PA")
    samples = write_set(tmp_path / "samples", toy((5, 6, 7), 2))
    (Path(samples) / "manifest.json").write_text(
        json.dumps({"trained_on": [table.hashes[row["file"]]]}))
    with pytest.raises(InputError,
                       match="the generator of .* was trained on other images of 1 held-out p"):
        read(world, data=(data,), external=(), synthetic=(samples,), hold_out="view=AP")


def test_a_source_held_out_is_a_test_set_of_its_own(world, tmp_path):
    ours = write_set(tmp_path / "ours", toy((20, 20, 20), 5), SPLITS)
    theirs = write_set(tmp_path / "theirs", toy((0, 20), 6), SPLITS)
    found = read(world, data=(ours, theirs), external=(), hold_out="source=theirs")
    held = found.sets["theirs"]
    assert {row["source"] for name in ("train", "val", "test")
            for row in found.sets[name].rows} == {"ours"}
    assert [row["source"] for row in held.rows].count("theirs") == 20
    assert any("theirs has light only" in note for note in found.notes)
    assert {row["label"] for row in held.rows if row["source"] == "ours"} == {"dark", "striped"}


def test_without_a_validation_split_one_is_taken_from_training(world, tmp_path):
    data = write_set(tmp_path / "real", toy((20, 20, 20), 5, per_patient=2),
                     ("train", "train", "test", "test"))
    found = read(world, data=(data,), external=())
    assert not set(found.sets["val"].patients) & set(
        found.sets["train"].patients) and len(found.sets["test"]) == 30
    assert set(found.sets["val"].labels.tolist()) == {0, 1, 2} and any("no validation split" in note
                                                                       for note in found.notes)


@pytest.mark.parametrize("cells, words", [
    ({"train": ["a", "a"], "val": ["a"], "test": ["a", "b"]}, "train has only 'a', 2 images"),
    ({"train": ["a", "b"], "test": ["b"]}, "test has only 'b', 1 image"),
    ({"train": ["a", "b"], "test": []}, "test has no image"),
    ({"train": ["a", "b"], "test": ["a", "c", "d"]},
     "test has labels that the train split has not: c, d; train has a, b"),
    ({"train": ["a", "b", "c"], "val": ["a", "b"]}, "val has no image of c, which training has"),
    ({"train": ["a", "b"], "clinic": ["z", "z"]}, "clinic has only 'z', 2 images"),
])
def test_sets_that_cannot_be_studied_are_refused(cells, words):
    with pytest.raises(InputError, match=words):
        inputs.check_labels(cells)


def test_assumed_patients_of_folders_of_one_name_are_not_the_same(world, tmp_path):
    ours, theirs = (write_set(tmp_path / where / "chest", toy((20, 20, 20), seed))
                    for where, seed in (("a", 5), ("b", 6)))
    found = inputs.read((ours,), {}, (theirs,), size=32, seed=0, out=str(tmp_path / "out"))
    assert len(found.sets["chest"]) == 60 and not set(found.sets["chest"].patients) & set(
        found.sets["train"].patients)


def test_a_label_lost_to_skip_bad_is_refused(world, tmp_path):
    folder = Path(write_set(tmp_path / "real", toy((10, 10, 4), 5),
                            ("train", "test", "val", "train")))
    (folder / "images" / "striped" / "021.png").write_bytes(b"x")
    with pytest.raises(InputError, match="test has no image of striped"):
        read(world, data=(str(folder),), external=(), skip_bad=True)
