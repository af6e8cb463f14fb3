"""Labels from a table beside DICOM files: as RSNA, VinDr and hospitals have them, and faulty
ones.
"""

import csv

import numpy as np
import pytest
from dicom_files import ARRAY, encode, everything, fates, make, run

from minidiff.data.dicom import labels, reader
from minidiff.data.table import read_table
from minidiff.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = {"PatientID": "P{}", "StudyInstanceUID": "2.25.9.{}", "SeriesInstanceUID": "2.25.8.{}",
       "SOPInstanceUID": "2.25.7.{}", "AccessionNumber": "A{}"}


def table(path, header: str, *rows: str):
    path.write_text("\n".join((header, *rows)) + "\n")
    return str(path)


def read(tmp_path, header: str, *rows: str, columns=()):
    return labels.read(table(tmp_path / "t.csv", header, *rows), columns)


@pytest.fixture
def source(tmp_path):
    """Four files, 0.dcm to 3.dcm, of which the last two are of patient P1."""
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(4):
        ids = {name: text.format(min(k, 2) if name == "PatientID" and k > 2 else k)
               for name, text in IDS.items()}
        (folder / f"{k}.dcm").write_bytes(encode(make((ARRAY + k) % 256, **ids)))
    return folder


def got(source, out) -> dict[str, str]:
    """Source file → label of its image."""
    with open(f"{out}.names.csv", newline="") as file:
        images = {line["image"]: line["source"] for line in csv.DictReader(file) if line["image"]}
    return {images[row["file_name"].split("/")[-1].removesuffix(".png")]: row["label"]
            for row in read_table(out, split=False).rows}


@pytest.mark.parametrize("header,name", [
    ("patientId,Target", "P{}"), ("Patient ID,class", "P{}"), ("subject_id,label", "P{}"),
    ("StudyInstanceUID,label", "2.25.9.{}"), ("study,Label", "2.25.9.{}"),
    ("SeriesInstanceUID,label", "2.25.8.{}"), ("SOPInstanceUID,finding", "2.25.7.{}"),
    ("sop,label", "2.25.7.{}"), ("Accession Number,diagnosis", "A{}"),
    ("image_id,class_name", "{}"), ("file_name,label", "dicom/{}.dcm"),
])
def test_labels_by_patient_study_series_image_or_file_name(source, tmp_path, header, name):
    rows = [f"{name.format(k)},{'covid' if k % 2 else 'normal'}" for k in range(4)]
    path = table(tmp_path / "t.csv", header, *rows)
    by_patient = name == "P{}"
    assert run(source, tmp_path / "out", label="", labels=path) == 0
    assert got(source, tmp_path / "out") == {
        "0.dcm": "normal", "1.dcm": "covid", "2.dcm": "normal",
        "3.dcm": "normal" if by_patient else "covid"}
    assert fates(tmp_path / "out") == {**{f"{k}.dcm": "imported" for k in range(4)},
                                       **({f"{path}: P3": "absent"} if by_patient else {})}
    content = everything(tmp_path / "out")
    assert all(text.format(k).encode() not in content for text in IDS.values() if "2.25" in text
               for k in range(4))


def test_boxes_repeat_a_row_and_boxes_are_not_read(tmp_path):
    """As in RSNA's table: a row for each box, Target 0 or 1, also where pandas made it 1.0."""
    found = read(tmp_path, "patientId,x,y,width,height,Target", "a,1,2,3,4,1", "a,5,6,7,8,1.0",
                 "b,,,,,0", "c,,,,,0")
    assert found == ("patient", {"a": "1", "b": "0", "c": "0"})
    found = read(tmp_path, "patientId,class", "a,Lung Opacity", "a,lung opacity",
                 "b,No Lung Opacity / Not Normal", "c,Normal")
    assert found.of == {"a": "Lung Opacity", "b": "No Lung Opacity / Not Normal", "c": "Normal"}


def test_rows_that_disagree_are_refused_with_the_way_out(tmp_path):
    """As in VinDr's table: several readers, several findings."""
    with pytest.raises(InputError, match=r"t.csv:3: image_id 'a' has the class_name 'Cardiomegaly'"
                                         r".*in .*t.csv:2; an image has one label.*--columns"):
        read(tmp_path, "image_id,class_name,rad_id", "a,Aortic enlargement,R1", "a,Cardiomegaly,R2")


def test_the_nearest_id_counts_and_columns_may_be_named(tmp_path):
    rows = ("P1,2.25.1,covid,0", "P1,2.25.2,normal,1")
    found = read(tmp_path, "patient,StudyInstanceUID,label,Pneumonia", *rows)
    assert found == ("study", {"2.25.1": "covid", "2.25.2": "normal"})
    found = read(tmp_path, "patient,StudyInstanceUID,label,Pneumonia", *rows,
                 columns=("label=Pneumonia",))
    assert found.of == {"2.25.1": "0", "2.25.2": "1"}
    found = read(tmp_path, "patientId,class,Target", "P1,ill,1",
                 columns=("patient=patientId", "label=Target"))
    assert found == ("patient", {"P1": "1"})
    for columns in (("study=exam", "label=outcome"), ("study=exam,label=outcome",)):
        found = read(tmp_path, "exam,outcome,patient", "2.25.1,ill,P1", columns=columns)
        assert found == ("study", {"2.25.1": "ill"})
    found = read(tmp_path, "image_id,rad,Edema,Mass", "a,R1,1,0", "a,R2,1,0", "b,R1,0,0",
                 "c,R1,1,1", "d,R1,-1,1", columns=("label=edema|Mass",))
    assert found == ("image", {"a": "Edema", "b": "none", "c": "Edema|Mass", "d": ""})


def test_ids_as_spreadsheets_and_pandas_write_them(tmp_path):
    found = read(tmp_path, "patient,label", "13.0,a", "007,b", "7,c")
    assert found.of == {"13": "a", "007": "b", "7": "c"}
    for cell in ("1.23E+12", "1,2e+11", "nan", ""):
        with pytest.raises(InputError, match=r"t.csv:3: patient .* is no id"):
            read(tmp_path, "patient,label", "1,a", f'"{cell}",b')


@pytest.mark.parametrize("header,rows,says", [
    ("x,label", ("1,a",), "no column of ids; it has x, label"),
    ("patient,x", ("1,a",), "none is called like the label; choose: --columns label="),
    ("patient,class,Target", ("1,a,0",), "class and Target may each be the label"),
    ("patient,subject_id,label", ("1,2,a",), "patient and subject_id may each be the patient"),
    ("patient,label", ("1,",), "label has 0 different values"),
    ("patient,label", tuple(f"{k},{k}" for k in range(101)), "label has 101 different values"),
    ("patient,label", ("1,1.0", "2,0.0", "3,-1.0"), "-1 for 1 ids, which means uncertain"),
])
def test_what_is_ambiguous_is_refused(tmp_path, header, rows, says):
    with pytest.raises(InputError, match=says):
        read(tmp_path, header, *rows)


def test_files_and_rows_without_a_partner_are_listed(source, tmp_path):
    path = table(tmp_path / "t.csv", "patient,label", "P0,a", "P1,", "P9,b")
    assert run(source, tmp_path / "out", label="", labels=path) == 1
    assert fates(tmp_path / "out") == {"0.dcm": "imported", "1.dcm": "unlisted",
                                       "2.dcm": "unlisted", "3.dcm": "unlisted",
                                       f"{path}: P1": "absent", f"{path}: P9": "absent"}
    assert b"P9" in (tmp_path / "out.names.csv").read_bytes()
    assert b"P9" not in everything(tmp_path / "out")
    before = everything(tmp_path / "out")
    assert run(source, tmp_path / "out", label="", labels=path) == 1  # again: nothing changes
    assert everything(tmp_path / "out") == before
    table(tmp_path / "t.csv", "patient,label", "P0,b")
    with pytest.raises(InputError, match="another labels"):
        run(source, tmp_path / "out", label="", labels=path)


def test_one_name_of_two_files_is_refused_and_one_file_of_two_names_is_a_conflict(source, tmp_path):
    path = table(tmp_path / "t.csv", "image_id,label", "0,a", "1,b", "2,a", "3,b", "copy,b")
    (source / "copy.dcm").write_bytes((source / "0.dcm").read_bytes())
    assert run(source, tmp_path / "out", label="", labels=path) == 1
    assert fates(tmp_path / "out")["copy.dcm"] == fates(tmp_path / "out")["0.dcm"] == "conflict"
    (source / "below").mkdir()
    (source / "below" / "1.dcm").write_bytes(encode(make(np.rot90(ARRAY))))
    with pytest.raises(InputError, match=r"'1' a label, and 2 different files have this name"):
        run(source, tmp_path / "out2", label="", labels=path)


def test_one_way_of_labelling_is_asked_for(source, tmp_path):
    path = table(tmp_path / "t.csv", "patient,label", "P0,a")
    for way in ({"label": "", "labels": ""}, {"label": "covid", "labels": path},
                {"label": "", "label_from": ("a",), "labels": path}):
        with pytest.raises(InputError, match="import needs --label NAME"):
            run(source, tmp_path / "out", **way)
    with pytest.raises(InputError, match="--columns are those of the table of --labels"):
        run(source, tmp_path / "out", columns=("label=x",))
    with pytest.raises(InputError, match="no such file"):
        run(source, tmp_path / "out", label="", labels=str(tmp_path / "none.csv"))


def test_the_id_leaves_the_guarded_process_hashed_only(source, tmp_path):
    path = table(tmp_path / "t.csv", "patient,label", "P0,a")
    _, row = reader.convert(str(source / "0.dcm"), reader.Options("ab" * 32, labels=path))
    assert (row["id"], row["label"]) == ("P0", "a")
    assert run(source, tmp_path / "out", label="", labels=path) == 1
    assert '"id": "P0"' not in (tmp_path / "out" / "import.jsonl").read_text()
