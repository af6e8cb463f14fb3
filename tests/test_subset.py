"""subset: fewer training patients in a folder of its own; what is held out stays, and nothing is
written over.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from study_data import toy, write_set

from minidiff.classification.shortcuts import lung_mask
from minidiff.data.subset import SubsetConfig, first_patients, write_subset
from minidiff.data.table import read_table
from minidiff.errors import InputError

SPLITS = ("train", "train", "train", "test", "val")


@pytest.fixture
def data(tmp_path):
    folder = Path(write_set(tmp_path / "my real", toy((30, 30, 30), 1, per_patient=5),
                            ("train",) * 15 + ("test",) * 10 + ("val",) * 5))
    for file in folder.glob("images/*/*.png"):
        mask = folder / "masks" / "lungs" / file.relative_to(folder / "images")
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(file.read_bytes())
    return folder


def counts(table):
    return Counter(zip(table.column("label"), table.column("split")))


def test_a_subset_has_fewer_whole_patients_and_the_same_held_out_images(data, tmp_path, capsys):
    cfg = SubsetConfig(data=(str(data),), keep=("light=12",), out=str(tmp_path / "ten"))
    write_subset(cfg)
    before, after = read_table(data), read_table(cfg.out)
    # a split that was given stays one, and a random one stays random
    assert not after.random_split
    (data / "random-split.txt").touch()
    write_subset(replace(cfg, out=str(tmp_path / "random")))
    assert read_table(tmp_path / "random").random_split
    # of patients with five images each, two
    assert counts(after) == {**counts(before), ("light", "train"): 10}
    assert "train light 10" in capsys.readouterr().out
    train = before.select(split="train")
    kept = first_patients(train.column("label"), train.column("patient"), {"light": 12}, 0)
    wanted = sorted(train.hashes[train.rows[i]["file"]] for i in kept)
    own = after.select(split="train")
    assert sorted(own.hashes[file] for file in own.column("file")) == wanted
    assert set(own.column("patient")) <= set(train.column("patient")) and all(lung_mask(row)
                                                                              for row in after.rows)


def test_the_same_command_goes_on_and_another_is_refused(data, tmp_path):
    cfg = SubsetConfig(data=(str(data),), keep=("light=12",), out=str(tmp_path / "ten"))
    write_subset(cfg)
    whole = read_table(cfg.out).fingerprint
    (tmp_path / "ten" / "metadata.csv").unlink()  # as if it had been killed before its last file
    next((tmp_path / "ten").glob("images/light/*.png")).unlink()
    write_subset(cfg)
    assert read_table(cfg.out).fingerprint == whole
    table = (data / "metadata.csv").read_bytes()
    for out, keep, words in (
            (cfg.out, "light=5", "other settings"),
            (str(data), "light=12", "lie within each other"),
            (str(data / "images" / "ten"), "light=12", "lie within each other"),
            (str(tmp_path / "new"), "flu=3", "labels: dark, light, striped"),
            (str(tmp_path / "new"), "light", "write label=images"),
            (str(tmp_path / "new"), "light=4", "the first patient, 1-.*, has 5; ask for more")):
        with pytest.raises(InputError, match=words):
            write_subset(SubsetConfig(data=cfg.data, keep=(keep,), out=out))
    assert read_table(cfg.out).fingerprint == whole and (data
                                                         / "metadata.csv").read_bytes() == table
    assert not (tmp_path / "new").exists()


def test_two_folders_with_files_of_one_name_and_one_source_are_kept_apart(tmp_path):
    """Both say that they are of the source "clinic", and both have images/dark/000.png."""
    folders = []
    for where, seed in (("a", 1), ("b", 2)):
        folder = Path(write_set(tmp_path / where / "chest", toy((10, 10), seed), SPLITS))
        head, *lines = (folder / "metadata.csv").read_text().splitlines()
        (folder / "metadata.csv").write_text(
            "\n".join([f"{head},source", *(f"{line},clinic" for line in lines)]) + "\n")
        folders.append(str(folder))
    write_subset(SubsetConfig(data=tuple(folders), keep=("light=5",), out=str(tmp_path / "five")))
    after, before = read_table(str(tmp_path / "five")), read_table(folders)
    assert len(set(after.hashes.values())) == len(after) == 40 - 7
    assert {(after.hashes[row["file"]], row["label"], row["split"]) for row in after.rows} < {
        (before.hashes[row["file"]], row["label"], row["split"]) for row in before.rows}


def test_labels_with_commas(tmp_path):
    folder = Path(write_set(tmp_path / "real", toy((30, 30, 30), 1, per_patient=5),
                            ("train",) * 15 + ("test",) * 10 + ("val",) * 5))
    table = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(table.replace(",light,", ',"light, left",'))
    write_subset(SubsetConfig(data=(str(folder),), keep=("light", " left=12", "dark=6"),
                              out=str(tmp_path / "ten")))
    kept = counts(read_table(tmp_path / "ten"))
    assert kept["light, left", "train"] <= 12 and kept["dark", "train"] <= 6
    with pytest.raises(InputError, match="--keep light: write label=images"):
        write_subset(SubsetConfig(data=(str(folder),), keep=("light", " right=12"),
                                  out=str(tmp_path / "no")))
