"""What cells mean: numbers, ages, words for one value, lists, unknown; and the columns of a table
read so.
"""

import math

import pytest
from data_sets import data_set, refused, rows_of

from minidiff import cells
from minidiff import variables as var
from minidiff.data.columns import read_columns
from minidiff.data.table import read_table
from minidiff.errors import InputError
from minidiff.variables import Category, Findings, Number


def column(name: str, values: list[str]) -> tuple[list[str], list[str]]:
    """A column as it is read, and the kinds of its remarks."""
    rows, remarks = read_columns([{name: cell, "where": f"m.csv:{k}"}
                                  for k, cell in enumerate(values, 2)])
    return [row[name] for row in rows], [remark.kind for remark in remarks]


# --- one cell


@pytest.mark.parametrize("cell, value", [
    ("34.5", 34.5), ("34,5", 34.5), ("0,125", 0.125), ("1 234", 1234), ("1'234", 1234),
    ("1\u202f234,5", 1234.5), ("12,345.6", 12345.6), ("12.345,6", 12345.6), ("1,234,567", 1234567),
    ("95%", 95), ("95 %", 95), ("\u22123", -3), ("1e3", 1000), (".5", 0.5), ("1.234", 1.234),
])
def test_numbers_as_people_write_them(cell, value):
    assert cells.to_number(cell) == value


@pytest.mark.parametrize("cell", ["1,234", ">89", "<5", "2020-03-01", "01.03.2020", "40-49",
                                  "1,2,3", "nan", "inf", "", "ten", "1_000"])
def test_what_may_be_two_numbers_or_none_is_no_number(cell):
    assert math.isnan(cells.to_number(cell))


@pytest.mark.parametrize("cell, years", [
    ("60", 60), ("060Y", 60), ("069Y", 69), ("000D", 0), ("6M", 0.5), ("18 months", 1.5),
    ("52W", 52 * 7 / 365.25), ("60 years", 60), ("34,5", 34.5), (">89", 90), ("90+", 90),
    ("≥90", 90), ("-1", -1),
])
def test_ages(cell, years):
    assert cells.to_years(cell) == pytest.approx(years)
    assert cells.number("PatientAge", cell) == pytest.approx(years)


@pytest.mark.parametrize("cell", ["<1", "40-49", "60+", ">65", "adult", "1956-03-01", "6 x", ""])
def test_no_ages(cell):
    assert math.isnan(cells.to_years(cell))


def test_units_are_of_ages_alone():
    assert math.isnan(cells.number("dose", "6M")) and cells.meaning("dosage") == "dosage"
    assert [cells.meaning(name) for name in ("Patient Age", "anchor_age", "PatientSex_DICOM",
                                             "Gender", "View Position")] == ["age", "age", "sex",
                                                                            "sex", "view"]


def test_the_normal_form_of_a_patient():
    assert cells.patient("13") == cells.patient("13.0") == cells.patient("13.00") == "13"
    assert cells.patient("007") == "007" != cells.patient("7") and cells.patient("0.0") == "0"
    assert cells.patient("007.0") == "007.0" and cells.patient("13.5") == "13.5"
    assert not any(map(cells.patient, ("nan", "NA", "N/A", "None", "null", "unknown", "?", "-",
                                       "NaN", "<NA>", " ", "")))
    with pytest.raises(InputError, match=r"m.csv:3: patient '1.23E\+11' .* spreadsheet has cut"):
        cells.patient("1.23E+11", "m.csv:3")


# --- columns


def test_ten_spellings_of_sex_are_two():
    words = ["F", "f", "female", "Female", "F ", "weiblich", "M", "Male", "male", "MÄNNLICH"]
    found, kinds = column("sex", words)
    assert found == ["F"] * 6 + ["M"] * 4 and kinds == ["spellings"]
    assert column("sex", ["Male", "Female", "Male"]) == (["Male", "Female", "Male"], [])
    assert column("gender", ["male", "F", "Female"])[0] == ["male", "F", "F"]


def test_a_sex_that_may_be_either_stays_and_is_refused_as_a_condition():
    rows = [{"sex": cell, "where": f"m.csv:{k}"} for k, cell in enumerate(["F", "M", "1", "F"], 2)]
    assert column("sex", [row["sex"] for row in rows]) == (["F", "M", "1", "F"],
                                                           ["unknown spellings"])
    sex = var.infer("sex", [row["sex"] for row in rows])
    assert sex == Category("sex", ("F", "M"))
    with pytest.raises(InputError, match="m.csv:4: sex '1' is not one of F, M"):
        var.encode([sex], rows)
    assert column("sex", ["1", "2", "1"]) == (["1", "2", "1"], [])  # codes throughout are codes
    assert column("sex", ["F", "M", "H"])[1] == ["unknown spellings"]  # Spanish: M is a woman


@pytest.mark.parametrize("name, values, read", [
    ("view", ["AP", "Antero-posterior", "ap", "a.p.", "PA", "postero anterior", "AP Supine"],
     ["AP", "AP", "AP", "AP", "PA", "PA", "AP Supine"]),
    ("icu", ["0", "1.0", "yes", "TRUE", "no", "1"], ["0", "1.0", "1.0", "1.0", "0", "1.0"]),
    ("icu", ["1", "1.0", "0", "0.0"], ["1", "1", "0", "0"]),
    ("stage", ["1", "1.0", "2", "3"], ["1", "1", "2", "3"]),
    ("ward", ["A", "a ", "B  1", "b 1"], ["A", "A", "B  1", "B  1"]),
    ("icu", ["yes", "Y", "not known", "0", "#DIV/0!", "nicht bekannt"],
     ["yes", "yes", "", "0", "", ""]),
    ("Gender", ["Fem", "U", "girl", "not specified", "M"], ["Fem", "", "Fem", "", "M"]),
    ("u", ["U", "x"], ["U", "x"]),
    ("age", ["6 mois", "60 Jahre", "61 años", "12 Wochen"], ["0.5", "60", "61", "0.229979"]),
    ("label", ["Not known", "anonymous", "covid"], ["Not known", "anonymous", "covid"]),
    ("view", ["PA", "nan", "N/A", "None", "", "?"], ["PA", "", "", "", "", ""]),
    ("crp", ["1", "NULL", "-", "3"], ["1", "", "", "3"]),
    ("age", ["60", "060Y", "6M", "nan", "55.0"], ["60", "60", "0.5", "", "55.0"]),
    ("label", ["COVID", "covid", "norma\u0301l", "norm\u00e1l"],
     ["COVID", "COVID", "norma\u0301l", "norma\u0301l"]),
    ("label", ["1", "1.0", "0"], ["1", "1", "0"]),
    ("label", ["N", "F", "T", "n"], ["N", "F", "T", "N"]),  # normal, fracture, tumour
])
def test_one_value_has_one_spelling(name, values, read):
    assert column(name, values)[0] == read


def test_numbers_with_a_unit_are_no_names():
    kilograms = [f"{k} kg" for k in range(50, 60)]
    with pytest.raises(InputError, match="weight' has no number that can be read, only .*'50 kg'"):
        var.infer("weight", kilograms)
    rows = [{"weight": cell, "where": cell} for cell in [*map(str, range(50, 60)), "38,5 °C"]]
    with pytest.raises(InputError, match="38,5 °C: weight .* is not a number"):
        var.encode([var.infer("weight", [row["weight"] for row in rows])], rows)
    assert var.infer("stage", ["1a", "2a", "2b", "3a", "3b", "4"]).kind == "category"


def test_few_ages_beside_one_that_cannot_be_read():
    rows = [{"age": cell, "where": f"m.csv:{k}"} for k, cell in enumerate(["60", "61", "60-y"], 2)]
    age = var.infer("age", [row["age"] for row in rows])
    assert age == Category("age", ("60", "61"))
    with pytest.raises(InputError, match="m.csv:4: age '60-y' is not one of 60, 61"):
        var.encode([age], rows)


def test_nothing_is_said_of_a_table_in_which_each_value_has_one_spelling():
    rows = [{"label": "covid", "sex": "F", "age": "55.0", "view": "PA", "icu": "0",
             "findings": "Edema|Effusion", "note": "Fever, cough", "where": ""},
            {"label": "normal", "sex": "M", "age": "5", "view": "AP", "icu": "1",
             "findings": "none", "note": "fever", "where": ""}]
    assert read_columns(rows) == (rows, [])


def test_ages_that_nobody_has_are_unknown_and_named():
    rows, remarks = read_columns([{"age": cell, "where": f"m.csv:{k}"} for k, cell in enumerate(
        ["60", "069Y", "-1", "180", "999", "999", "adult"], 2)])
    assert [row["age"] for row in rows] == ["60", "69", "", "", "", "", "adult"]
    said = {remark.kind: remark for remark in remarks}
    assert "'-1' (1), '180' (1), '999' (2)" in said["impossible ages"].text
    assert "m.csv:4, m.csv:5, m.csv:6" in said["impossible ages"].text
    assert "'adult' (1)" in said["unreadable ages"].text
    assert {said[kind].level for kind in ("impossible ages", "unreadable ages")} == {"warning"}


def test_lists_of_findings_by_any_mark():
    found, kinds = column("findings", ["Edema; Effusion", "edema|Effusion", "Edema", "Effusion",
                                       "Effusion, Edema", "['Edema', 'Effusion']", "[]", "None"])
    assert found == ["Edema|Effusion", "Edema|Effusion", "Edema", "Effusion", "Effusion|Edema",
                     "Edema|Effusion", "none", "none"] and kinds == ["lists"]
    assert var.infer("findings", found) == Findings("findings", ("Edema", "Effusion"))


def test_a_comma_within_a_name_is_no_list_and_a_doubtful_one_is_refused():
    names = ["Pneumonia, viral", "Pneumonia, bacterial", "Normal"]
    assert column("cause", names) == (names, [])
    assert var.infer("cause", names).values == tuple(sorted(names))
    with pytest.raises(InputError, match="'Edema, Effusion' may be one value or several, as only "
                       "Edema also stands alone; write Edema|Effusion"):
        var.infer("findings", ["Edema, Effusion", "Edema", "Normal"])


def test_what_columns_takes_over_is_told_once():
    rows = [{"Patient Age": cell, "age": cell, "where": "m.csv:2"} for cell in ("060Y", "414Y")]
    rows, remarks = read_columns(rows)
    assert [row["age"] for row in rows] == ["60", ""]
    assert [remark.kind for remark in remarks] == ["ages with units", "impossible ages"]


def test_labels_of_the_same_findings_in_another_order_are_named():
    assert column("label", ["Edema|Mass", "Mass|Edema", "Mass"])[1] == ["labels alike"]
    assert column("label", ["Edema|Mass", "Edema", "Mass"])[1] == []


def test_labels_and_patients_that_look_alike_are_named():
    assert column("label", ["covid-19", "covid 19", "normal"])[1] == ["labels alike"]
    assert column("label", ["unknown", "normal"])[1] == ["unknown labels"]
    assert column("label", ["covid", "normal"])[1] == []


# --- conditions


def test_a_condition_understands_what_the_reader_understands():
    age, icu = Number("age", 50, 10, 0, 90), Category("icu", ("0", "1"))
    assert age.encode("060Y") == 60 and age.encode("6M") == 0.5 and age.encode("34,5") == 34.5
    assert math.isnan(age.encode("N/A")) and math.isnan(age.encode(""))
    assert [icu.encode(cell) for cell in ("1.0", "yes", "FALSE")] == [1, 1, 0]
    assert Category("view", ("AP", "PA")).encode("Antero-posterior") == 0
    both = Findings("seen", ("Edema", "Effusion"))
    assert both.encode("edema; effusion") == both.encode("Edema, Effusion") == 3
    with pytest.raises(InputError, match="m.csv:7: crp '1,234' is not a number"):
        Number("crp", 1, 1, 0, 9).encode("1,234", "m.csv:7")


def test_a_model_that_knows_f_learns_no_female():
    old, new = Category("sex", ("F", "M")), Category("sex", ("Female", "Male", "O"))
    assert old.merged(new).values == ("F", "M", "O")


def test_a_column_of_numbers_in_two_units_or_of_dates_is_refused():
    plain = [str(k) for k in range(9)]
    for values, said in (([*plain, "95%"], "'95%' stands beside '0'"),
                         ([*plain, "34,5", "1.234"], "'1.234' stands beside '34,5'"),
                         ([f"2020-03-0{k}" for k in range(1, 8)], "no number that can be read"),
                         ([f">{k}" for k in range(9)], "no number that can be read")):
        with pytest.raises(InputError, match=said):
            var.infer("x", values)
    crp = var.infer("crp", [*plain, "1,234"])
    assert isinstance(crp, Number) and crp.high == 8  # and the row of the last is refused
    assert var.infer("x", [f"{k}%" for k in range(9)]).high == 8


# --- tables


def test_unknown_patients_are_one_each_and_the_words_are_named(tmp_path):
    ids = ["13", "13.0", "007", "7", "nan", "N/A", "?", ""]
    table = read_table(data_set(tmp_path / "d", rows_of(8, patient=ids)), split=False)
    assert table.column("patient")[:4] == ["13", "13", "007", "7"]
    assert len(set(table.column("patient"))) == 7
    assert ("d: 4 images without a patient id ('?' 1, 'N/A' 1, 'nan' 1) count as one patient "
            "each") in table.notes
    assert "patient '007' and '7' differ in capitals or leading zeros only" in " ".join(table.notes)
    nobody = read_table(data_set(tmp_path / "e", rows_of(3, patient=["NA", "-", "null"])),
                        split=False)
    assert nobody.patients_assumed and len(set(nobody.column("patient"))) == 3
    assert "('-' 1, 'NA' 1, 'null' 1): one image = one patient" in nobody.notes[0]


def test_one_patient_in_two_spellings_does_not_cross_splits(tmp_path):
    rows = rows_of(3, patient=["13", "q", "13.0"], split=["train", "val", "test"])
    refused(data_set(tmp_path / "d", rows), "patient '13' crosses splits")


def test_a_label_that_says_nothing_is_refused(tmp_path):
    folder = data_set(tmp_path / "d", rows_of(4, label=["a", "b", "nan", "a"]))
    refused(folder, "metadata.csv:4", "no label")


def test_unknown_splits_are_none(tmp_path):
    rows = rows_of(12, split=["nan"] * 12)
    assert set(read_table(data_set(tmp_path / "d", rows)).column("split")) == {"train", "val",
                                                                               "test"}
