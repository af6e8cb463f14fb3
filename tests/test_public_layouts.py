"""data.layouts on public data sets as they come: read right, or refused with what to do."""

import shutil
from collections import Counter
from pathlib import Path

import public_sets as sets
import pytest
from data_sets import picture, refused

from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
from minidiff.errors import InputError
from minidiff.root import Reading


def read(folder, *columns: str, only_listed: bool = False, split: bool = False):
    return read_table(folder, Reading(columns, only_listed), split=split)


def counted(table, *columns: str) -> Counter:
    return Counter(zip(*map(table.column, columns)))


def has_note(table, *parts: str) -> bool:
    return any(all(part in note for part in parts) for note in table.notes)


# --- tables of other names and columns


def test_nih_is_known_by_its_header_and_its_lists_are_the_split(tmp_path):
    """Two archives, Data_Entry_2017.csv beside the boxes' table, names without folders."""
    table = read(sets.nih(tmp_path / "nih"), split=True)
    assert counted(table, "split") == {("train",): 16, ("test",): 8} and not table.random_split
    assert table.labels == ["Cardiomegaly|Effusion", "No Finding"]
    assert len(set(table.column("patient"))) == 12 and not table.patients_assumed
    assert table.rows[0].items() >= {"sex": "M", "age": "58", "view": "PA", "patient": "1",
                                     "file_name": "images_001/images/00000001_000.png"}.items()
    assert has_note(table, "Data_Entry_2017.csv is read as NIH ChestX-ray14")
    (tmp_path / "nih/Data_Entry_2017.csv").unlink()
    refused(tmp_path / "nih", "BBox_List_2017.csv: no column 'file_name'",
            '--columns "file_name=Image Index,label=COLUMN"')
    (tmp_path / "nih/BBox_List_2017.csv").unlink()
    refused(tmp_path / "nih", "images_001: a folder of this name is no label")


def test_an_image_in_two_lists_or_in_none(tmp_path):
    folder = sets.nih(tmp_path / "nih")
    with open(folder / "train_val_list.txt", "a") as file:
        file.write("00000012_001.png\n")
    refused(folder, "00000012_001.png is in 2 of the lists")
    (folder / "train_val_list.txt").write_text("00000001_000.png\n")
    refused(folder, "00000001_001.png is in 0 of the lists")


def test_part_of_nih_names_what_is_absent(tmp_path):
    folder = sets.nih(tmp_path / "nih")
    shutil.rmtree(folder / "images_002")
    refused(folder, "12 row(s) without a file", "00000007_000.png")


def test_chexpert_asks_for_a_finding(tmp_path):
    """Paths begin above the folder; 1 present, 0 absent, -1 uncertain, empty not mentioned."""
    folder = sets.chexpert(tmp_path / "CheXpert-v1.0-small")
    refused(folder, "train.csv: no column 'label'", "--columns", "label=Edema|Pneumonia")
    with pytest.raises(InputError, match="no label for .*patient00003.*--only-listed"):
        read(folder, "label=Pneumonia")
    table = read(folder, "label=Pneumonia", only_listed=True, split=True)
    assert counted(table, "label", "split") == {
        ("Pneumonia", "train"): 4, ("no Pneumonia", "train"): 4, ("Pneumonia", "val"): 2,
        ("no Pneumonia", "val"): 2}
    assert set(table.column("patient")) == {f"patient{p:05d}" for p in (1, 2, 5, 6, 64541, 64542)}
    assert has_note(table, "6 images without a label") and table.column("view") == ["AP"] * 12
    both = read(folder, "label=Edema|Pneumonia", only_listed=True)
    assert set(both.labels) == {"Pneumonia", "Edema"}


def test_several_findings_are_joined_and_none_is_said(tmp_path):
    sets.pictures(tmp_path, [f"{k}.png" for k in range(6)])
    sets.table(tmp_path / "all.csv", "Path,Edema,Mass", [
        {"Path": f"{k}.png", "Edema": e, "Mass": m} for k, (e, m) in enumerate(
            [(1, 1), (0, 1), (0, ""), ("", ""), (1, -1), (1, "")])])
    table = read(tmp_path, "file_name=Path", "label=Edema|Mass", only_listed=True)
    assert table.column("label") == ["Edema|Mass", "Mass", "none", "Edema"]
    sets.table(tmp_path / "all.csv", "Path,Edema,Mass", [
        {"Path": f"{k}.png", "Edema": 1, "Mass": "yes"} for k in range(6)])
    with pytest.raises(InputError, match=r"all.csv:2: Mass 'yes' is none of 1 \(present\)"):
        read(tmp_path, "file_name=Path", "label=Edema|Mass")


@pytest.mark.parametrize("make, said", [
    (sets.mimic, "files: a folder of this name is no label"),
    (sets.bimcv, "sub-S03040, sub-S03041, sub-S03042 and 3 more look like patients")])
def test_trees_of_patients_are_refused(make, said, tmp_path):
    refused(make(tmp_path / "d"), said, "write a metadata.csv with the columns")


@pytest.mark.parametrize("below", ["files", "files/p10"])
def test_so_are_their_branches(below, tmp_path):
    refused(sets.mimic(tmp_path) / below, "look like patients or studies")


def test_padchest(tmp_path):
    table = read(sets.padchest(tmp_path / "p"))
    assert counted(table, "patient") == {("830",): 2, ("831",): 2, ("832",): 2}
    assert table.column("sex") == ["F"] * 6 and table.column("view") == ["PA"] * 6
    assert table.labels == ["edema|mass", "normal"] and has_note(table, "read as PadChest")


def test_ieee8023(tmp_path):
    """metadata.csv with columns of its own; other folders of the repository are listed."""
    table = read(sets.ieee8023(tmp_path / "covid-chestxray-dataset"))
    assert counted(table, "label", "patient") == {
        ("Pneumonia/Viral/COVID-19", "0"): 2, ("Pneumonia/Viral/COVID-19", "1"): 1,
        ("No Finding", "1"): 1, ("No Finding", "2"): 2}
    assert table.column("file_name")[0] == "images/auntminnie-0-2020_01_28.png"
    assert has_note(table, "1 image that no row names (annotations/lungs.png)")


def test_covid_radiography_leaves_masks_out_and_says_so(tmp_path):
    table = read(sets.radiography(tmp_path / "d"))
    assert counted(table, "label") == dict.fromkeys(
        [("COVID",), ("Lung_Opacity",), ("Normal",), ("Viral Pneumonia",)], 3)
    assert has_note(table, "5 other files (.txt 1, .xlsx 4); 12 masks (COVID/masks/")


def test_kaggle_pneumonia_doubled_and_from_a_mac(tmp_path):
    folder = sets.kaggle(tmp_path)
    table = read(folder, split=True)
    assert counted(table, "split", "label") == dict.fromkeys(
        [(s, c) for s in ("train", "val", "test") for c in ("NORMAL", "PNEUMONIA")], 1)
    assert has_note(table, "6 images in no class folder (chest_xray/")
    assert not has_note(table, "MACOSX") and not has_note(table, "DS_Store")
    refused(tmp_path, "holds test/NORMAL", f"give --data {folder}")
    folder.rename(tmp_path / "OCT2017")
    refused(tmp_path, f"give --data {tmp_path}/OCT2017")


def test_rsna_says_how_dicom_comes_in(tmp_path):
    (tmp_path / "stage_2_train_images").mkdir()
    (tmp_path / "stage_2_train_images/0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm").write_bytes(b"x")
    sets.table(tmp_path / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target",
               [{"patientId": "0004cfab-14fd-4e49-80ba-63a80b6bddd6", "Target": 0}])
    refused(tmp_path, "is a DICOM file: python -m minidiff.data.dicom import")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/IM0001").write_bytes(bytes(128) + b"DICM")
    refused(tmp_path / "d", "IM0001 is a DICOM file")


def test_columns_of_your_own(tmp_path):
    sets.pictures(tmp_path, [f"scans/{k}.png" for k in range(4)])
    rows = [{"picture": f"{k}", "diagnosis": "ab"[k % 2], "person": "x", "CRP value": k}
            for k in range(4)]
    sets.table(tmp_path / "list.csv", "picture,diagnosis,person,CRP value", rows)
    table = read(tmp_path, "file_name=picture", "label=Diagnosis", "patient=person",
                 "crp=CRP value")
    assert table.column("crp") == list("0123") and table.column("label") == list("abab")
    assert set(table.column("patient")) == {"x"} and table.rows[0]["file_name"] == "scans/0.png"
    for columns, said in ((["label:diagnosis"], "write name=column"),
                          (["file_name=picture", "label=nothing"],
                           "list.csv: no column 'nothing' for label; it has picture"),
                          (["file_name=picture", "label=diagnosis", "label=person"],
                           "has both")):
        with pytest.raises(InputError, match=said):
            read(tmp_path, *columns)


def test_columns_may_fit_several_folders_and_none_of_ours(tmp_path):
    """One --columns for tables that differ, among them one with minidiff's own names."""
    for k, header in enumerate(("picture,finding", "image,diagnosis", "file_name,label")):
        sets.pictures(tmp_path / f"d{k}", ["x.png"], k)
        a, b = header.split(",")
        sets.table(tmp_path / f"d{k}" / "metadata.csv", header, [{a: "x.png", b: f"l{k}"}])
    table = read([tmp_path / f"d{k}" for k in range(3)], "file_name=picture", "file_name=image",
                 "label=finding", "label=diagnosis")
    assert table.column("label") == ["l0", "l1", "l2"]


def test_two_tables_that_may_be_the_one(tmp_path):
    sets.pictures(tmp_path, ["x.png"])
    for name in ("a.csv", "b.csv"):
        sets.table(tmp_path / name, "file_name,label", [{"file_name": "x.png", "label": "a"}])
    refused(tmp_path, "a.csv and b.csv both name files and labels", split=False)


def test_columns_beside_class_folders_of_another_hospital(tmp_path):
    sets.pictures(tmp_path / "ours", ["x.png"])
    sets.table(tmp_path / "ours/list.csv", "image,finding", [{"image": "x", "finding": "covid"}])
    sets.pictures(tmp_path / "theirs", ["covid/y.png", "normal/z.png"], 1)
    table = read([tmp_path / "ours", tmp_path / "theirs"], "file_name=image", "label=finding")
    assert table.column("label") == ["covid", "covid", "normal"]
    assert has_note(table, "theirs: --columns says nothing here")
    sets.table(tmp_path / "theirs/other.csv", "a,b", [{"a": 1, "b": 2}])
    with pytest.raises(InputError, match="other.csv: no column 'image' for file_name"):
        read(tmp_path / "theirs", "file_name=image", "label=finding")


def test_tables_of_splits_name_files_in_their_folders(tmp_path):
    """train.csv and test.csv, file names that both folders have; a backslash of Windows."""
    for k, split in enumerate(("train", "test")):
        sets.pictures(tmp_path / "img" / split, ["a.png", "b.png"], 2 * k)
        sets.table(tmp_path / f"{split}.csv", "file_name,label", [
            {"file_name": name, "label": name[0]} for name in ("a.png", "b.png")])
    assert read(tmp_path).column("file_name") == [
        f"img/{split}/{name}.png" for split in ("test", "train") for name in "ab"]
    assert read(tmp_path).column("split") == ["test"] * 2 + ["train"] * 2
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").unlink()
    sets.table(tmp_path / "metadata.csv", "file_name,label", [
        {"file_name": f"img\\{split}\\{name}.png", "label": name}
        for split in ("train", "test") for name in "ab"])
    assert read(tmp_path).column("split") == ["train"] * 2 + ["test"] * 2


def test_a_table_without_endings_is_pointed_at(tmp_path):
    sets.pictures(tmp_path / "train", ["000bec.png", "001513.png"])
    sets.table(tmp_path / "labels.csv", "id,breed", [
        {"id": "000bec", "breed": "a"}, {"id": "001513", "breed": "b"}])
    refused(tmp_path, "one label only, 'any'", "name the columns of labels.csv by --columns")
    assert read(tmp_path, "file_name=id", "label=breed").labels == ["a", "b"]
    refused(tmp_path / "labels.csv", "labels.csv is a file: give the folder")


def test_two_metadata_files(tmp_path):
    for folder in (tmp_path, tmp_path / "aside"):
        sets.pictures(folder, ["x.png"], len(folder.parts))
        sets.table(folder / "metadata.csv", "file_name,label", [{"file_name": "x.png",
                                                                 "label": "a"}])
        (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "label": "b"}')
    refused(tmp_path, "metadata.csv and metadata.jsonl: keep the one that holds")
    (tmp_path / "metadata.jsonl").unlink()
    assert read(tmp_path).labels == ["a"]


# --- Hugging Face imagefolder


def hub(folder: Path, where: str, form: str, named: str) -> Path:
    """20 images: 12 in train/, 4 in validation/, 4 in test/."""
    of = [("train", range(12)), ("validation", range(12, 16)), ("test", range(16, 20))]
    lines = {}
    for split, numbers in of:
        sets.pictures(folder / split, [f"{k:04d}.png" for k in numbers], numbers[0])
        top = folder / (split if where == "inside" else "")
        lines.setdefault(top, []).extend(
            {"file_name": f"{split}/{k:04d}.png" if named == "with" else f"{k:04d}.png",
             "label": "ab"[k % 2]} for k in numbers)
    for top, rows in lines.items():
        if form == "csv":
            sets.table(top / "metadata.csv", "file_name,label", rows)
        else:
            text = [f'{{"file_name": "{row["file_name"]}", "label": "{row["label"]}", "age": null, '
                    '"findings": ["Edema", "Mass"], "size": [4, 4.5]}' for row in rows]
            (top / "metadata.jsonl").write_text("\n".join(text) + "\n")
    return folder


@pytest.mark.parametrize("where", ["inside", "above"])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("named", ["with", "without"])
def test_splits_of_an_image_folder_are_kept(where, form, named, tmp_path):
    table = read(hub(tmp_path / "d", where, form, named), split=True)
    assert counted(table, "split") == {("train",): 12, ("val",): 4, ("test",): 4}
    assert all(Path(row["file_name"]).parts[0][:3] == row["split"][:3] for row in table.rows)
    assert not table.random_split and len(set(table.column("file"))) == 20
    if form == "jsonl":
        assert table.rows[0].items() >= {"age": "", "findings": "Edema|Mass",
                                         "size": "4|4.5"}.items()


def test_splits_given_as_folders_of_their_own_are_kept(tmp_path):
    folder = hub(tmp_path / "d", "inside", "csv", "without")
    table = read([folder / name for name in ("train", "validation", "test")], split=True)
    assert counted(table, "split") == {("train",): 12, ("val",): 4, ("test",): 4}
    assert "split by patient" in " ".join(read(folder / "train", split=True).notes)
    sets.pictures(tmp_path / "more", [f"{c}/{k}.png" for c in "ab" for k in range(3)], 50)
    both = read([folder / "train", tmp_path / "more"], split=True)  # one such name says nothing
    assert set(both.select(source="train").column("split")) == {"train", "val", "test"}


def test_a_file_of_one_name_in_two_splits_is_refused(tmp_path):
    folder = hub(tmp_path / "d", "above", "csv", "without")
    picture(folder / "test/0001.png", 99)
    refused(folder, "metadata.csv:3: file_name '0001.png' may be test/0001.png or train/0001.png")


def test_one_split_folder_alone_gives_no_split(tmp_path):
    folder = hub(tmp_path / "d", "inside", "csv", "without")
    for name in ("validation", "test"):
        shutil.rmtree(folder / name)
    table = read(folder, split=True)
    assert set(table.column("split")) == {"train", "val", "test"}
    assert has_note(table, "all images lie in folders named train")


@pytest.mark.parametrize("table", [
    "train/labels.csv", "train/images/metadata.csv", "images/list.tsv", "annotations/finding.csv",
    "train.txt", "extra.parquet"])
def test_images_are_not_without_a_label_where_a_table_below_may_know_it(table, tmp_path):
    """Once all of them were called `any`."""
    top = "" if "images/" in table else str(Path(table).parent)
    sets.pictures(tmp_path, [f"{name}/{k}.png" for name in ("train", "test") for k in range(3)]
                  if "train" in table else [f"images/{k}.png" for k in range(6)])
    (tmp_path / table).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / table).write_text("1 0.png covid\n" if table.endswith("txt") else
                                  "file_name,label\n0.png,a\n")
    refused(tmp_path, Path(table).name, "metadata.csv" if top else "may know more")


def test_a_data_set_in_a_folder_of_its_own_gives_no_label(tmp_path):
    """An archive unpacked into a folder of its name, which is given with the folder above."""
    sets.pictures(tmp_path, [f"sample/images/{k}.png" for k in range(4)])
    (tmp_path / "sample/list.csv").write_text("Image Index,Finding Labels\n0.png,Mass\n")
    refused(tmp_path, "one label only, 'sample'", "sample/list.csv")
    (tmp_path / "sample/list.csv").write_text("a,b\n1,2\n")  # of no images
    assert read(tmp_path).labels == ["sample"]


@pytest.mark.parametrize("name", ["Dataset_type", "set", "phase"])
def test_a_column_that_says_nothing_but_splits_is_the_split(name, tmp_path):
    sets.pictures(tmp_path, [f"{k}.png" for k in range(6)])
    rows = [{"file_name": f"{k}.png", "label": "ab"[k % 2], name: "TRAIN" if k < 4 else "Test"}
            for k in range(6)]
    sets.table(tmp_path / "metadata.csv", f"file_name,label,{name}", rows)
    assert counted(read(tmp_path), "split") == {("train",): 4, ("test",): 2}
    sets.table(tmp_path / "metadata.csv", f"file_name,label,{name},split", rows)  # empty on purpose
    assert counted(read(tmp_path), "split") == {("",): 6}
    sets.table(tmp_path / "metadata.csv", f"file_name,label,{name},stage", [
        {**row, "stage": "train" if k else "val"} for k, row in enumerate(rows)])
    refused(tmp_path, f"{name} and stage may each be the split", f"--columns split={name}")


def test_what_tables_know_of_images_in_class_folders_is_not_lost(tmp_path):
    names = [f"{label}/{label}{k}.png" for label in "ab" for k in range(3)]
    sets.pictures(tmp_path, names)
    lists = {"train": names[::3] + names[1::3], "test": names[2::3]}
    for split, own in lists.items():
        (tmp_path / f"{split}.csv").write_text("\n".join(["image", *own]) + "\n")
    assert counted(read(tmp_path), "split") == {("train",): 4, ("test",): 2}
    for split in lists:
        (tmp_path / f"{split}.csv").unlink()
    for column in ("Patient ID", "split"):
        table = f"image,{column}\n" + "".join(f"{name},train\n" for name in names)
        (tmp_path / "clinical.csv").write_text(table)
        refused(tmp_path, f"clinical.csv knows the {column.split()[0].lower()} of images", "label")
    (tmp_path / "clinical.csv").write_text("image,quality\n" + f"{names[0]},good\n")
    assert has_note(read(tmp_path), "1 other file (.csv 1)")


def test_splits_below_images_are_no_labels(tmp_path):
    sets.pictures(tmp_path, [f"images/{name}/{k}.png" for name in ("train", "val")
                             for k in range(3)])
    refused(tmp_path, "named after a split is no label; give --data", "images")
    assert read(tmp_path / "images").labels == ["any"]


def test_a_folder_like_that_of_a_split_is_not_lost(tmp_path):
    sets.pictures(tmp_path, [f"{name}/{label}/{k}.png" for name in ("train", "test_1")
                             for label in "ab" for k in range(2)])
    refused(tmp_path, "test_1 is laid out like train", "rename it")
    shutil.move(tmp_path / "test_1", tmp_path / "Validate ")
    assert counted(read(tmp_path), "split") == {("train",): 4, ("val",): 4}
    for k, name in enumerate(("train", "Validate ", "more")):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        sets.pictures(tmp_path / name, ["0.png"], k)
        (tmp_path / name / "Metadata.csv").write_text("file_name,label\n0.png,a\n")
    refused(tmp_path, "more is laid out like", "rename it")
    shutil.rmtree(tmp_path / "more")
    assert counted(read(tmp_path), "split", "label") == {("train", "a"): 1, ("val", "a"): 1}


def test_a_split_folder_without_its_table(tmp_path):
    folder = hub(tmp_path / "d", "inside", "csv", "without")
    (folder / "test/metadata.csv").unlink()
    refused(folder, f"{folder}/test has images and no table, unlike {folder}/train")


def test_a_table_says_more_than_a_folder(tmp_path):
    folder = hub(tmp_path / "d", "above", "csv", "with")
    rows = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join([f"{rows[0]},split", *(
        f"{row},{['train', 'val', 'test'][k % 3]}" for k, row in enumerate(rows[1:]))]))
    assert counted(read(folder), "split") == {("train",): 7, ("val",): 7, ("test",): 6}


@pytest.mark.parametrize("names", [("Train set", "Test set"), ("train_images", "test_images"),
                                   ("trainset", "valset"), ("DEV", "Evaluation")])
def test_other_names_of_splits(names, tmp_path):
    for k, name in enumerate(names):
        sets.pictures(tmp_path / name, ["covid/x.png", "normal/x.png"], 2 * k)
    splits = Counter(read(tmp_path).column("split"))
    assert len(splits) == 2 and set(splits) < {"train", "val", "test"}


def test_splits_below_the_labels(tmp_path):
    for k, (label, split) in enumerate((c, s) for c in ("covid", "normal")
                                       for s in ("Training", "Valid", "Test")):
        picture(tmp_path / label / split / "x.png", k)
    assert counted(read(tmp_path), "label", "split") == dict.fromkeys(
        [(c, s) for c in ("covid", "normal") for s in ("train", "val", "test")], 1)


# --- what class folders may be


@pytest.mark.parametrize("names", [
    ["images_001", "images_002"], ["data"], ["old_train_images"], ["JPEG"], ["part 1"],
    ["CXR_png"], ["New folder (2)", "covid"], ["images_normalized"], ["ChinaSet_AllFiles"]])
def test_folders_that_only_hold_files(names, tmp_path):
    for k, name in enumerate(names):
        sets.pictures(tmp_path / name / ("covid" if name == "data" else ""), ["a.png"], k)
    refused(tmp_path, "is no label")


@pytest.mark.parametrize("names", [
    ["patient001", "patient002"], ["covid", "Patient 3"], ["00000013"], ["1.2.840.113619.2"],
    ["case1"], ["0123456789abcdef0"], [str(k) for k in range(12)], ["Huber", "Mayer", "Li", "Cruz",
                                                                   "Abe"],
    ["2020-01", "2020-02"], ["2021.3.14"]])
def test_folders_of_patients(names, tmp_path):
    for k, name in enumerate(names):
        sets.pictures(tmp_path / name, ["a.png", "b.png"], 2 * k)
    refused(tmp_path, "look like patients or studies, not like labels")


@pytest.mark.parametrize("names", [
    ["0", "1", "2", "3", "4"], ["COVID-19", "no finding"], ["grade_1", "grade_2"], ["T1", "T2"],
    ["J18.9", "U07.1"], ["covid_images", "normal_images"], ["H1N1", "covid19"],
    ["BI-RADS 4a", "B19"], ["covid"]])
def test_labels_with_numbers(names, tmp_path):
    for k, name in enumerate(names):
        sets.pictures(tmp_path / name, ["a.png", "b.png", "c.png"], 3 * k)
    assert read(tmp_path).labels == sorted(names)


def test_patients_below_the_labels_are_patients(tmp_path):
    for k in range(8):
        sets.pictures(tmp_path / ["covid", "normal"][k % 2] / f"patient{k}", ["a.png", "b.png"],
                      2 * k)
    table = read(tmp_path)
    assert len(set(table.column("patient"))) == 8 and not table.patients_assumed
    assert has_note(table, "patients are read off the folders patient0")


def test_two_levels_that_may_both_be_labels(tmp_path):
    for k, (top, low) in enumerate((a, b) for a in ("clinic A", "clinic B")
                                   for b in ("covid", "normal")):
        picture(tmp_path / top / low / "x.png", k)
    refused(tmp_path, "clinic A", "clinic B hold the folders covid, normal")
    refused(tmp_path, f"give --data {tmp_path}/clinic A")
    shutil.rmtree(tmp_path / "clinic B")
    refused(tmp_path, "clinic A hold the folders covid, normal")


# --- nothing disappears


RUBBISH = ("Thumbs.db", "thumbs/x.png", "__pycache__/x.png", "Network Trash Folder/x.png",
           ".DS_Store", "@eaDir/x.png@SynoPhoto.png", "#recycle/x.png", "desktop.ini",
           "$RECYCLE.BIN/x.png", ".Trash-1000/files/x.png", "._x.png", "lost+found/x.png",
           "__MACOSX/covid/._x.png")


@pytest.mark.parametrize("form", ["table", "classes"])
def test_known_rubbish_is_skipped_silently(form, tmp_path):
    sets.pictures(tmp_path, ["covid/x.png", "normal/x.png"])
    for k, name in enumerate(RUBBISH):
        for top in ("", "covid"):
            picture(tmp_path / top / f"{name}.png", 50 + k)
            (tmp_path / top / f"{name}.png").rename(tmp_path / top / name)
    if form == "table":
        sets.table(tmp_path / "metadata.csv", "file_name,label", [
            {"file_name": f"{label}/x.png", "label": label} for label in ("covid", "normal")])
    table = read(tmp_path)
    assert len(table) == 2 and not has_note(table, "left out")


def test_all_else_is_listed_with_its_number(tmp_path):
    sets.pictures(tmp_path, ["covid/x.png", "normal/x.png", "normal/masks/x.png", "loose.png",
                             "covid/old.png", ".old/y.png", ".old/z.png"])
    (tmp_path / "covid/old.png").rename(tmp_path / "covid/.old.png")
    (tmp_path / "normal/x.txt").write_text("report")
    (tmp_path / "normal/README").write_text("report")
    (tmp_path / "empty").mkdir()
    (note,) = (n for n in read(tmp_path).notes if "left out" in n)
    for part in ("1 mask (normal/masks/x.png)", "2 other files (.txt 1, no ending 1)",
                 "1 hidden file (covid/.old.png)", "1 image in no class folder (loose.png)",
                 "2 images in a hidden folder (.old/y.png, .old/z.png)",
                 "1 folder without images (empty)"):
        assert part in note, note


def test_class_folders_beside_images_are_listed(tmp_path):
    sets.pictures(tmp_path, ["images/covid/x.png", "images/normal/x.png", "pneumonia/x.png"])
    assert has_note(read(tmp_path), "1 image in no class folder (pneumonia/x.png)")


@pytest.mark.parametrize("name", ["x.gif", "y.HEIC", "z.npy"])
def test_pictures_that_are_not_read_are_refused_with_the_images(name, tmp_path):
    sets.pictures(tmp_path, ["covid/x.png", "normal/x.png"])
    (tmp_path / "covid" / name).write_bytes(b"GIF89a")
    table = read(tmp_path)
    with pytest.raises(InputError, match=f"1 of 3 images cannot be read .*{name}"):
        load_pixels(table, 32)
    kept, _ = load_pixels(table, 32, skip_bad=True)
    assert len(kept) == 2 and has_note(kept, name)


def test_dangling_links_and_links_that_turn_back(tmp_path):
    sets.pictures(tmp_path, ["covid/x.png", "normal/x.png"])
    link = tmp_path / "normal/y.png"
    link.symlink_to("/mnt/gone/y.png")
    refused(tmp_path, "normal/y.png is a link to /mnt/gone/y.png, which is not there")
    link.unlink()
    (tmp_path / "pneumonia").symlink_to("/mnt/gone/pneumonia")
    refused(tmp_path, "pneumonia is a link to")
    (tmp_path / "pneumonia").unlink()
    (tmp_path / "covid/all").symlink_to(tmp_path)
    refused(tmp_path, "covid/all is a link to a folder above it")


def test_beside_a_table_they_are_listed(tmp_path):
    """Originals and maps that no row names are not needed."""
    sets.pictures(tmp_path, ["images/x.png", "images/y.png"])
    sets.table(tmp_path / "metadata.csv", "file_name,label", [
        {"file_name": f"images/{k}.png", "label": k} for k in "xy"])
    for name in ("images/x.dcm", "images/x.npy", "dicom/x.dcm", "dicom/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "images/z.png").symlink_to("/mnt/gone/z.png")
    table = read(tmp_path)
    assert len(table) == 2 and has_note(
        table, "1 picture that is not read (images/x.npy)", "1 DICOM file (images/x.dcm)",
        "1 dangling link (images/z.png)")
    (tmp_path / "images/y.png").unlink()
    (tmp_path / "images/y.png").symlink_to("/mnt/gone/y.png")
    refused(tmp_path, "1 row(s) without a file", "images/y.png")


def test_only_listed_for_a_table_that_names_a_subset(tmp_path):
    sets.pictures(tmp_path, [f"images/{k}.png" for k in range(6)])
    sets.table(tmp_path / "metadata.csv", "file_name,label", [
        {"file_name": f"images/{k}.png", "label": "ab"[k] if k < 2 else ""} for k in range(3)])
    refused(tmp_path, "metadata.csv:4: no label for images/2.png", "--only-listed")
    table = read(tmp_path, only_listed=True)
    assert table.column("label") == ["a", "b"]
    assert has_note(table, "3 images that no row names (images/3.png, images/4.png, images/5.png)",
                    "1 image without a label (images/2.png)")
    (tmp_path / "images/1.png").unlink()
    table = read(tmp_path, only_listed=True)
    assert table.column("label") == ["a"]
    assert has_note(table, "1 row without a file", "metadata.csv:3 images/1.png")
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(InputError, match="3 row.s. without a file"):
        read(tmp_path, only_listed=True)
