"""data.layouts: tables, class folders and splits of folders, and every kind of bad table."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from data_sets import data_set, in_every_split, picture, refused, rows_of

from minidiff.data.table import read_table, write_table


def test_metadata_is_read_as_it_stands(tmp_path):
    rows = rows_of(4, split=["train", "val", "test", "train"], patient=["p", "q", "r", "p"],
                   age=["", "50", "6.5", ""])
    table = read_table(data_set(tmp_path / "d", rows))
    assert [{key: r[key] for key in rows[0]} for r in table.rows] == rows
    assert table.labels == ["a", "b"] and table.column("age") == ["", "50", "6.5",
                                                                  ""] and not table.patients_assumed
    assert table.rows[2]["where"] == f"{tmp_path}/d/metadata.csv:4" and table.column("source") == [
        "d"] * 4
    assert all(Path(row["file"]).is_absolute() and Path(row["file"]).is_file()
               for row in table.rows)


def test_byte_order_mark_and_blank_lines_of_spreadsheets(tmp_path):
    picture(tmp_path / "x.png", 1)
    (tmp_path / "metadata.csv").write_bytes("\ufefffile_name , label\r\nx.png, a \r\n\r\n".encode())
    assert [(r["file_name"], r["label"])
            for r in read_table(tmp_path, split=False).rows] == [("x.png", "a")]


@pytest.mark.parametrize("top", ["", "images/"])
@pytest.mark.parametrize("below", ["", "images/"])
def test_class_folders(tmp_path, top, below):
    for k, label in enumerate(["Normal", "Viral Pneumonia"]):
        picture(tmp_path / f"{top}{label}/{below}x.png", k)
        picture(tmp_path / f"{top}{label}/{below}.hidden.png", k)
        picture(tmp_path / f"{top}{label}/masks/x.png", 7)
        shutil.copy(tmp_path / f"{top}{label}/{below}x.png",
                    tmp_path / f"{top}{label}/{below}y.JPEG")
        (tmp_path / f"{top}{label}/readme.txt").write_text("no image")
    picture(tmp_path / "__MACOSX/Normal/x.png", 9)
    table = read_table(tmp_path, split=False)
    assert Counter(table.column("label")) == {"Normal": 2,
                                              "Viral Pneumonia": 2} and table.patients_assumed
    assert len(set(table.column("patient"))) == 4
    assert f"{tmp_path.name}: no patient ids: one image = one patient, assumed" in table.notes


def test_kaggle_splits_are_kept(tmp_path):
    for k, (split, label) in enumerate((s, c) for s in ("Train", "valid", "test")
                                       for c in ("NORMAL", "PNEUMONIA")):
        picture(tmp_path / split / label / "images" / "im.png", k)
    # the archive holds a second copy of itself
    picture(tmp_path / "chest_xray" / "NORMAL" / "im.png", 99)
    table = read_table(tmp_path)
    assert Counter(table.column("split")) == {"train": 2, "val": 2, "test": 2}
    assert len(set(table.column("patient"))) == 6
    assert any("left out" in note and "chest_xray" in note for note in table.notes)
    assert in_every_split(table, "train", "val", "test")


def test_nested_data_sets_are_left_alone(tmp_path):
    outer = data_set(tmp_path / "outer", rows_of(4))
    data_set(outer / "other", rows_of(6))
    data_set(outer / "images" / "deep", rows_of(6))
    assert len(read_table(outer, split=False)) == 4
    assert len(read_table([outer, outer / "other"], split=False)) == 10


def test_row_without_file_and_file_without_row(tmp_path):
    folder = data_set(tmp_path / "d", rows_of(5))
    (folder / "images/003.png").unlink()
    refused(folder, "1 row(s) without a file", "metadata.csv:5", "003.png", "--only-listed leaves")
    picture(folder / "images/003.png", 3)
    picture(folder / "images/extra/x.png", 9)
    (folder / "images/extra/x.png").rename(folder / "images/extra/x.PNG")
    refused(folder, "1 file(s) without a row", "images/extra/x.PNG")


def test_missing_and_empty_folder(tmp_path):
    refused([], "no data folder")
    refused(tmp_path / "none", "no such folder", "none")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    refused(tmp_path / "empty", "no metadata.csv and no class folders")
    picture(tmp_path / "flat" / "x.png", 1)
    # a picture beside class folders is left out; alone, it is data without a label
    table = read_table(tmp_path / "flat", split=False)
    assert table.labels == ["any"] and "no image has a label" in " ".join(table.notes)
    for k, split in enumerate(("train", "valid")):
        picture(tmp_path / "inner" / split / "x.png", k)
    table = read_table(tmp_path / "inner")
    assert sorted(zip(table.column("split"), table.column("label"))) == [
        ("train", "any"), ("val", "any")]
    refused([tmp_path / "inner", tmp_path / "above"], "in no class folder", "other folders are")
    data_set(tmp_path / "above" / "cxr", rows_of(2))
    refused(tmp_path / "above", "data sets inside it: cxr")


def test_split_of_some_rows_only(tmp_path):
    refused(data_set(tmp_path / "d", rows_of(4, split=["train", "", "test", ""])), "metadata.csv:3",
            "no split")


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "images/../../x.png", ""])
def test_a_path_out_of_the_folder(tmp_path, name):
    folder = data_set(tmp_path / "d", rows_of(1))
    write_table(folder / "metadata.csv", [*rows_of(1), {"file_name": name, "label": "a"}])
    refused(folder, "metadata.csv:3", repr(name), "not a path inside")


BAD_CSV = {
    "no label column": ("file_name,sex\nx.png,F\n", "no column 'label'; it has file_name, sex"),
    "tildes": ("file_name~label\nx.png~a\n", "no column 'file_name'"),
    "empty": ("", "no column 'file_name'; it has none"),
    "header only": ("file_name,label\n", "no rows"),
    "a column twice": ("file_name,label,age,age\nx.png,a,1,2\n", "'age' is there twice"),
    "a reserved column": ("file_name,label,where\nx.png,a,b\n", "'where' is there twice or"),
    "a cell too many": ("file_name,label\nx.png,a\ny.png,a,b\n",
                        "metadata.csv:3: 3 cells where the header has 2"),
    "no label": ("file_name,label\nx.png,\n", "metadata.csv:2: no label for x.png"),
    "an open quote": ('file_name,label\nx.png,"a\n', "not a CSV table"),
    "latin-1": ("file_name,label\nx.png,é\n".encode("latin-1"), "not a CSV table in UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_metadata(tmp_path, kind):
    text, says = BAD_CSV[kind]
    (tmp_path / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, str(tmp_path / "metadata.csv"), says)
