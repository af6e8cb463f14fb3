"""Names of files in any form, and a folder for any label."""

import csv
import os
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest

import sample
import train
from minidiff import variables as var
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.names import LONGEST, folders, on_disk, rejoined, text
from minidiff.sampling.plan import plan

GOOD = ["covid", "No Finding", "COVID-19", "Pleural_Thickening", "Ödem", "肺炎", "a.b", "+", "(x)"]
ODD = ["No Lung Opacity / Not Normal", "con", "CON.txt", "lpt1", "trailing.", "trailing ", " lead",
       ".hidden", "..", ".", "50%", "a|b,c", 'a:b*c?"<>\\', "tab\there", "a\u202eb", "x" * 300,
       "肺" * 100, "", "Covid", "COVID", "straße", "STRASSE", "e\u0301", "é"]


def test_good_labels_are_their_own_folders():
    assert folders(GOOD) == {label: label for label in GOOD}


def test_any_label_has_a_folder_that_every_disk_holds(tmp_path):
    found = folders([*GOOD, *ODD])
    # a disk that takes capitals and accents in two forms for one another tells them apart, too
    assert len({unicodedata.normalize("NFC", name).casefold() for name in found.values()}) == len(
        found)
    for label, name in found.items():
        (tmp_path / name / "x").mkdir(parents=True)
        assert len(name.encode()) <= LONGEST and name[-1] not in ". " and name[0] not in ". "
        assert not set(name) & set('<>:"/\\|?*') and name.split(".")[0].lower() != "con"
        assert unquote(name) == label or name == "%" or "%~" in name
    assert found["No Lung Opacity / Not Normal"] == "No Lung Opacity %2F Not Normal"
    assert found["con"] == "%63on" and found["Covid"] == "%43ovid" and found["covid"] == "covid"
    assert folders(["Covid"]) == {"Covid": "Covid"}
    assert folders(["x" * 299 + "a"]) != folders(["x" * 299 + "b"])


def test_names_of_any_bytes_have_a_text_and_are_found_by_it(tmp_path):
    raw = os.fsdecode(b"m\xfcll")
    (tmp_path / raw).mkdir()
    written = unicodedata.normalize("NFD", "Müller.png")
    (tmp_path / raw / written).touch()
    assert text(raw) == "m\\xfcll" and text(written) == "Müller.png" and text(" F ") == "F"
    assert text("\ufeffcovid \u200b") == "covid"
    assert on_disk("m\\xfcll/Müller.png", tmp_path) == f"{raw}/{written}"
    assert on_disk(str(tmp_path / "m\\xfcll")) == str(tmp_path / raw)
    assert on_disk("none/x.png", tmp_path) == "none/x.png"


def test_a_table_and_a_disk_may_spell_names_differently(tiny, tmp_path):
    """The table is composed and the disk is not, as after a Mac; labels in both forms are one."""
    rows, data = read_table(tiny / "data").rows, tmp_path / "data"
    (data / "images").mkdir(parents=True)
    new = []
    for i, row in enumerate(rows):
        name = f"images/Röntgen {i}.png"
        shutil.copy(row["file"], data / unicodedata.normalize("NFD" if i % 2 else "NFC", name))
        label = "Ödem" if row["label"] == "covid" else "normal"
        new.append({**row, "file_name": name,
                    "label": unicodedata.normalize("NFD" if i % 3 else "NFC", label)})
    write_table(data / "metadata.csv", new)
    table = read_table(data)
    assert table.labels == ["normal", "Ödem"] and len(table) == len(rows)
    assert {row["file_name"] for row in table.rows} == {row["file_name"] for row in new}
    (data / "images" / "more.png").write_bytes(Path(rows[0]["file"]).read_bytes())
    with pytest.raises(InputError, match="without a row: images/more.png"):
        read_table(data)


def test_class_folders_that_are_no_utf8_are_split_and_read_again(tiny, tmp_path):
    data = tmp_path / os.fsdecode(b"b\xe9")
    for i, row in enumerate(read_table(tiny / "data").rows):
        folder = data / os.fsdecode(b"sch\xe4del") if row["label"] == "covid" else data / "normal"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(row["file"], folder / os.fsdecode(b"%d\xff.png" % i))
    first, again = (read_table(data, split_dir=tmp_path / "root") for _ in range(2))
    assert first.labels == ["normal", "sch\\xe4del"] and first.rows == again.rows
    assert first.fingerprint == again.fingerprint and first.rows[0]["patient"].startswith("b\\xe9/")


def test_a_model_of_odd_labels_is_sampled_continued_and_verified(tiny, tmp_path, no_pictures):
    odd = {"covid": "No Lung Opacity / Not Normal", "normal": "x" * 300, "pneumonia": "con"}
    shutil.copytree(tiny / "data", tmp_path / "data")
    with open(tmp_path / "data/metadata.csv", newline="") as file:
        rows = [{**row, "label": odd[row["label"]]} for row in csv.DictReader(file)]
    write_table(tmp_path / "data/metadata.csv", rows)
    train.train_diffusion(train.DiffusionConfig(
        data=(str(tmp_path / "data"),), vae=str(tiny / "vae"), views=1, steps=2, batch=6,
        snapshots=0, out=str(tmp_path / "diffusion")))
    cfg = sample.SampleConfig(run=str(tmp_path / "diffusion"), out=str(tmp_path / "samples"),
                              per_label=2, steps=2)
    sample.sample(cfg)
    made = tmp_path / "samples/images"
    assert {"%63on", "No Lung Opacity %2F Not Normal"} < {path.name for path in made.iterdir()}
    assert read_table(tmp_path / "samples", split=False).labels == sorted(odd.values())
    gap = next((made / "%63on").iterdir())
    before = gap.read_bytes()
    gap.unlink()
    sample.sample(replace(cfg, device="cpu"))
    assert gap.read_bytes() == before
    sample.verify(sample.VerifyConfig(out=str(tmp_path / "samples"), k=2))


def test_a_label_with_commas_can_be_asked_for():
    variables = [var.Category("label", ("a, b", "c"))]
    known = [{"label": "a, b"}, {"label": "c"}]
    for words, wanted in ((("a", " b"), {"a, b"}), (("c",), {"c"}), ((), {"a, b", "c"})):
        assert {row["label"] for row in plan(variables, known, labels=words, per_label=1)} == wanted
    assert rejoined(["['a'", " 'b']", "c", "d", "e"], {"['a', 'b']", "d,e"}.__contains__) == [
        "['a', 'b']", "c", "d,e"]
