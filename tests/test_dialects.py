"""data.dialects: table files as spreadsheets, servers and hubs write them."""

import codecs

import pytest
from data_sets import picture, refused

from minidiff.data.dialects import read_csv, read_lines
from minidiff.data.table import read_table
from minidiff.errors import InputError

TEXT = 'file_name,label,age\r\nx.png,"a, ""b""",34\r\ny.png,ä,\r\n'
ROWS = [("x.png", 'a, "b"', "34"), ("y.png", "ä", "")]


def cells(path) -> list[tuple]:
    return [(row["file_name"], row["label"], row["age"])
            for row in read_csv(path, ("file_name", "label"))]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
@pytest.mark.parametrize("name", ["metadata.csv", "t.tsv"])
def test_delimiters_encodings_and_line_ends(delimiter, codec, end, name, tmp_path):
    text = TEXT.replace("\r\n", end)
    text = text if delimiter == "," else text.replace(", ", "\0").replace(
        ",", delimiter).replace("\0", ", ")
    (tmp_path / name).write_bytes(text.encode(codec))
    assert cells(tmp_path / name) == ROWS


@pytest.mark.parametrize("bom, codec", [(codecs.BOM_UTF16_LE, "utf-16-le"),
                                        (codecs.BOM_UTF16_BE, "utf-16-be")])
def test_marks_of_utf_16_and_the_line_of_excel(bom, codec, tmp_path):
    text = "sep=;\r\n" + TEXT.replace("a, ", "a- ").replace(",", ";").replace("a- ", "a, ")
    (tmp_path / "t.csv").write_bytes(bom + text.encode(codec))
    assert cells(tmp_path / "t.csv") == ROWS
    assert read_csv(tmp_path / "t.csv", ())[1]["where"].endswith("t.csv:4")


def test_decimal_commas_do_not_make_columns(tmp_path):
    (tmp_path / "t.csv").write_text("file_name;label;age\nx.png;a;34,5\ny.png;b;7,25\n")
    assert [row[2] for row in cells(tmp_path / "t.csv")] == ["34,5", "7,25"]


def test_windows_1252_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "metadata.csv").write_bytes(TEXT.encode("cp1252"))
    refused(tmp_path, "not a CSV table in UTF-8 or UTF-16", "save it as CSV UTF-8")


@pytest.mark.parametrize("header", ["File_Name,LABEL,Patient,Sex,AGE", "file name,Label,patient ID,"
                                    "SEX,Age", "FileName,label,PatientID,sex,age",
                                    "filename,label,patient_id,sex,age"])
def test_our_columns_in_other_capitals_and_signs(header, tmp_path):
    for k in range(2):
        picture(tmp_path / f"{k}.png", k)
    (tmp_path / "metadata.csv").write_text(f"{header}\n0.png,a,007,F,1\n1.png,b,008,M,2\n")
    table = read_table(tmp_path, split=False)
    assert [table.column(name) for name in ("label", "patient", "sex", "age")] == [
        ["a", "b"], ["007", "008"], ["F", "M"], ["1", "2"]]


def test_a_column_of_our_name_goes_before_its_likes(tmp_path):
    (tmp_path / "t.csv").write_text("file_name,label,Label,patient,Patient ID\nx.png,a,b,p,q\n")
    (row,) = read_csv(tmp_path / "t.csv", ("file_name", "label"))
    assert (row["label"], row["Label"], row["patient"], row["Patient ID"]) == ("a", "b", "p", "q")
    (tmp_path / "t.csv").write_text("file_name,Label,LABEL\nx.png,a,b\n")
    with pytest.raises(InputError, match="'Label' and 'LABEL' may both be label; choose"):
        read_csv(tmp_path / "t.csv", ("file_name", "label"))
    assert read_csv(tmp_path / "t.csv", ("label",), ["label=LABEL"])[0]["label"] == "b"


def test_json_lines(tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"file_name": "x.png", "label": 1, "age": 34.5, "f": ["A", "B"], "ok": true}\n\n'
        '{"file_name": "y.png", "label": " b ", "age": null, "new": 2}\n')
    header, lines = read_lines(tmp_path / "m.jsonl")
    assert header == ["file_name", "label", "age", "f", "ok", "new"]
    assert lines == [(1, ["x.png", "1", "34.5", "A|B", "True", ""]),
                     (3, ["y.png", "b", "", "", "", "2"])]
    for text in ("[1]", "{", '"x"'):
        (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(InputError, match="m.jsonl: not a CSV table"):
            read_lines(tmp_path / "m.jsonl")


def test_empty_columns_behind_the_last_are_dropped(tmp_path):
    (tmp_path / "t.csv").write_text("file_name;label;age;;\nx.png;a;1;;\ny.png;b;;;\n;;;;\n")
    assert cells(tmp_path / "t.csv") == [("x.png", "a", "1"), ("y.png", "b", "")]
    (tmp_path / "t.csv").write_text(",file_name,label,age\n0,x.png,a,1\n")  # an index
    assert read_csv(tmp_path / "t.csv", ())[0][""] == "0"
