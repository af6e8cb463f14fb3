"""data.table: union of data sets, splits by patient, leakage."""

import csv
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from data_sets import data_set, in_every_split, picture, refused, rows_of
from PIL import Image

from minidiff.data import phantom
from minidiff.data.table import read_table, write_table
from minidiff.root import Reading

CXR = Path(os.environ.get("MINIDIFF_CXR", Path(__file__).parents[2] / "shared" / "cxr"))
needs_cxr = pytest.mark.skipif(not CXR.is_dir(),
                               reason=f"no real chest X-rays at {CXR}; set MINIDIFF_CXR")


# --- writing


def test_what_is_written_is_read_again(tmp_path):
    first = read_table(data_set(tmp_path / "d",
                                rows_of(3, note=['has, "quotes"', "two\nlines", "ä"])), split=False)
    write_table(tmp_path / "d" / "metadata.csv", first.rows)
    again = read_table(tmp_path / "d", split=False)
    assert again.column("note") == first.column("note") and again.fingerprint == first.fingerprint
    assert "where" not in (tmp_path / "d" / "metadata.csv").read_text().splitlines()[0].split(",")


def test_columns_in_order_of_first_appearance_and_absent_cells_empty(tmp_path):
    write_table(tmp_path / "t.csv", [{"b": 1, "a": 2.5}, {"c": "x", "a": 3}])
    with open(tmp_path / "t.csv") as file:
        assert list(csv.reader(file)) == [["b", "a", "c"], ["1", "2.5", ""], ["", "3", "x"]]


# --- several data sets


def test_columns_and_labels_unite_and_absent_cells_are_unknown(tmp_path):
    one = data_set(tmp_path / "one", rows_of(2, sex=["F", "M"], split=["train"] * 2))
    two = data_set(tmp_path / "two",
                   rows_of(3, crp=["1", "", "2"], split=["test"] * 3, label=["A", "c", "c"]))
    table = read_table([one, two])
    assert table.labels == ["a", "b", "c"] and "label 'A' is read as 'a'" in table.notes
    assert table.column("crp") == ["", "", "1", "", "2"] and table.column("sex") == ["F", "M", "",
                                                                                     "", ""]
    assert all(row.keys() == table.rows[0].keys() for row in table.rows)
    assert table.column("source") == ["one"] * 2 + ["two"] * 3
    assert len(set(table.column("patient"))) == 5  # images/000.png of both are two people


def test_a_split_is_random_where_it_was_made_here_or_says_so(tmp_path):
    """One given split among several folders is enough for no."""
    bare = data_set(tmp_path / "bare", rows_of(9, label=["a"] * 9))
    given = data_set(tmp_path / "given", rows_of(3, split=["train", "val", "test"]), [20, 21, 22])
    assert read_table(bare).random_split and not read_table(given).random_split
    assert not read_table([bare, given]).random_split
    assert not read_table(given).select(split="train").random_split
    (Path(given) / "random-split.txt").write_text("")
    assert read_table([bare, given]).random_split
    assert read_table(phantom.write(tmp_path / "p", n=30, size=32)).random_split


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [data_set(tmp_path / above / "d", rows_of(2), [k, k + 1])
               for k, above in ((1, "x"), (3, "y"))]
    table = read_table(folders, split=False)
    assert table.column("source") == ["d", "d", "d-2",
                                      "d-2"] and len(set(table.column("patient"))) == 4


def test_only_folders_without_splits_are_split(tmp_path):
    given = data_set(tmp_path / "given", rows_of(6, split=["external"] * 6))
    table = read_table([given, data_set(tmp_path / "free", rows_of(20))])
    assert Counter(table.select(source="given").column("split")) == {"external": 6}
    assert set(table.select(source="free").column("split")) == {"train", "val", "test"}


def test_a_patient_already_in_a_split_stays_there(tmp_path):
    given = data_set(tmp_path / "given", rows_of(4, split=["test"] * 4, patient=lambda k: f"p{k}"))
    free = data_set(tmp_path / "free", rows_of(40, patient=lambda k: f"p{k // 2}"))
    table = read_table([given, free], Reading(same_patients=True))
    assert set(table.select(patient=["p0", "p1", "p2", "p3"]).column("split")) == {"test"}


def test_some_patients_unknown_is_counted(tmp_path):
    table = read_table(data_set(tmp_path / "d", rows_of(3, patient=["p", "", ""])), split=False)
    assert table.notes == ["d: 2 images without a patient id count as one patient "
                           "each"] and not table.patients_assumed
    assert table.column("patient") == ["p", "d/images/001.png", "d/images/002.png"]


# --- splits


def patients_of(table) -> dict[str, set]:
    splits = defaultdict(set)
    for row in table.rows:
        splits[row["patient"]].add(row["split"])
    return splits


def test_split_is_by_patient_and_stratified(tmp_path):
    # label b is rare: 20 patients of 3 images against 100
    rows = rows_of(360, patient=lambda k: f"p{k // 3}", label=lambda k: "b" if k >= 300 else "a")
    table = read_table(data_set(tmp_path / "d", rows))
    assert all(len(splits) == 1 for splits in patients_of(table).values())
    counts = Counter(zip(table.column("label"), table.column("split")))
    # fmt: skip
    assert {k: n // 3 for k, n in counts.items()} == {
        ("a", "train"): 70, ("a", "val"): 15, ("a", "test"): 15, ("b", "train"): 14,
        ("b", "val"): 3, ("b", "test"): 3
    }


def test_split_depends_on_data_and_seed_alone(tmp_path):
    rows = rows_of(60, patient=lambda k: f"p{k // 2}")
    table = read_table(data_set(tmp_path / "d", rows), seed=3)
    order = np.random.default_rng(0).permutation(60)
    again = read_table(data_set(tmp_path / "e" / "d", [rows[k] for k in order],
                                list(40_000 + order)), seed=3)
    other = read_table(tmp_path / "d", seed=4)
    assert patients_of(table) == patients_of(again) != patients_of(other)


def test_split_is_written_once_and_reused(tmp_path):
    folder = data_set(tmp_path / "d", rows_of(30))
    first = read_table(folder, split_dir=tmp_path / "run")
    (saved,) = (tmp_path / "run").iterdir()
    assert saved.name.startswith("split-") and saved.suffix == ".csv"
    swapped = saved.read_text().replace("val", "x").replace("test", "val").replace("x", "test")
    saved.write_text(swapped)
    again = read_table(folder, split_dir=tmp_path / "run", seed=1)
    # a resumed run compares them
    assert again.notes == first.notes and saved.name in again.notes[-1]
    swap = {"train": "train", "val": "test", "test": "val"}
    assert again.column("split") == [swap[s] for s in first.column("split")]
    picture(folder / "images/000.png", 60_000)  # other data, another split
    read_table(folder, split_dir=tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 2
    saved.write_text("\n".join(saved.read_text().splitlines()[:-1]))
    picture(folder / "images/000.png", 1000 * (sum(b"d") % 60))
    refused(folder, str(saved), "delete", split_dir=tmp_path / "run")


@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_file_stay_together(tmp_path, seed):
    """Three patients in a chain of identical files, p0 = p1 and p1 = p2, are one for the split."""
    rows = rows_of(40, patient=lambda k: f"p{k // 2}", label=lambda k: "a")
    contents = list(range(40))
    contents[2], contents[4] = contents[0], contents[3]
    table = read_table(data_set(tmp_path / "d", rows, contents), seed=seed)
    assert len(set(table.select(patient=["p0", "p1", "p2"]).column("split"))) == 1
    assert "2 files with the content of another one of the same label and split" in table.notes


def test_splits_that_nothing_uses_are_noted(tmp_path):
    rows = rows_of(6, split=["train", "val", "test", "ward", "ward", "external"])
    noted = [note for note in read_table(data_set(tmp_path / "d", rows)).notes
             if "other splits" in note]
    assert noted == ["images of other splits than train, val, test, neither trained nor tested on: "
                     "'ward' 2"]
    assert not any("other splits" in note for note in read_table(tmp_path / "d", split=False).notes)


def test_patient_of_two_labels_counts_for_the_rarer(tmp_path):
    rows = rows_of(43, patient=lambda k: f"p{k}", label=lambda k: "a")
    rows += [{"file_name": f"images/b{k}.png", "label": "b", "patient": f"p{k}"} for k in range(3)]
    assert in_every_split(read_table(data_set(tmp_path / "d", rows)), "train", "val", "test")


def test_rows_are_selected_by_their_cells(tmp_path):
    table = read_table(data_set(tmp_path / "d", rows_of(6, split=["train", "train", "train",
                                                                  "train", "test", "ward"])))
    assert len(table.select(split="train")) == 4 and len(table.select(split="train",
                                                                      label="a")) == 2
    assert table.select(split=["test", "ward"]).labels == ["a", "b"]
    assert in_every_split(table, "train") and not in_every_split(table, "train", "test")


def test_fingerprint_follows_content_label_patient_and_split(tmp_path):
    rows = rows_of(4, split=["train"] * 4, patient=["p", "q", "r", "s"], age=["1"] * 4)

    def fingerprint(name, rows, contents=(1, 2, 3, 4)):
        return read_table(data_set(tmp_path / name / "d", rows, contents)).fingerprint

    first = fingerprint("0", rows)
    assert fingerprint("1", rows[::-1], (4, 3, 2, 1)) == first
    assert fingerprint("2", [r | {"age": "2"} for r in rows]) == first
    assert read_table(tmp_path / "0" / "d", check=False).fingerprint == first
    changed = [fingerprint("3", rows, (1, 2, 3, 5))]
    changed += [fingerprint(c, [rows[0] | {c: "test"}, *rows[1:]])
                for c in ("label", "patient", "split")]
    assert len({first, *changed}) == 5


# --- equal patient ids of two folders


def two_wards(folder: Path, **columns) -> list[Path]:
    """Two folders that number their patients alike: 0 to 19, or 0.0 to 19.0."""
    return [data_set(folder / name, rows_of(20, patient=[f"{k}{end}" for k in range(20)],
                                            label=["a"] * 10 + ["b"] * 10, **columns))
            for name, end in (("north", ""), ("south", ".0"))]


def test_equal_ids_of_two_folders_are_one_person_or_two_as_the_user_says(tmp_path):
    wards = two_wards(tmp_path)
    refused(wards, "20 patient ids of two folders, e.g. '0' of", "north", "south",
            "--same-patients if they are the same persons", "--distinct-patients if each folder")
    same = read_table(wards, Reading(same_patients=True))
    assert len(set(same.column("patient"))) == 20
    assert all(len(splits) == 1 for splits in patients_of(same).values())
    other = read_table(wards, Reading(distinct_patients=True))
    assert set(other.column("patient")) == {f"{ward}/{k}" for ward in ("north", "south")
                                            for k in range(20)}
    # the table of one folder says nothing of others
    alone = read_table(wards[0], Reading(distinct_patients=True))
    assert alone.fingerprint == read_table(wards[0]).fingerprint
    refused(wards, "exclude each other", reading=Reading((), False, True, True))


def test_one_person_in_two_folders_must_not_cross_given_splits(tmp_path):
    folders = [data_set(tmp_path / split, rows_of(4, split=[split] * 4, patient=list("1234")))
               for split in ("train", "test")]
    refused(folders, "4 patient ids of two folders")
    refused(folders, "patient '1' crosses splits", reading=Reading(same_patients=True))
    assert len(read_table(folders, Reading(distinct_patients=True))) == 8


def test_unknown_patients_of_two_folders_are_never_one(tmp_path):
    folders = [data_set(tmp_path / name, rows_of(4, patient=["nan", "?", "None", ""]))
               for name in ("north", "south")]
    assert len(set(read_table(folders, split=False).column("patient"))) == 8


def test_folders_of_one_name_are_kept_apart(tmp_path):
    folders = [data_set(tmp_path / above / "d", rows_of(2, patient=["1", "2"]), [k, k + 1])
               for k, above in ((1, "x"), (3, "y"))]
    table = read_table(folders, Reading(distinct_patients=True), split=False)
    assert table.column("patient") == ["d/1", "d/2", "d-2/1", "d-2/2"]


# --- near copies


def film(seed: int, side: int = 160) -> np.ndarray:
    rough = np.random.default_rng(seed).random((20, 20))
    smooth = Image.fromarray((255 * rough).astype(np.uint8)).resize((side, side),
                                                                   Image.Resampling.BICUBIC)
    return np.asarray(smooth)


def films(folder: Path, n: int, copies: bool) -> Path:
    """n films of as many patients, and of the first ten a second patient's JPEG of half the size,
    or another film."""
    rows = rows_of(n + 10, label=lambda k: "a", patient=lambda k: f"p{k}")
    for k, row in enumerate(rows):
        row["file_name"] = f"images/{k:03d}.{'jpg' if k >= n else 'png'}"
        path = folder / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(film(k - n if copies and k >= n else k))
        image.resize((120, 120) if k >= n else image.size).save(path, quality=70)
    write_table(folder / "metadata.csv", rows)
    return folder


def test_a_split_made_here_keeps_re_encoded_copies_on_one_side(tmp_path, capsys):
    folder = films(tmp_path / "d", 40, copies=True)
    table = read_table(folder, split_dir=tmp_path / "run", seed=1)
    said = capsys.readouterr().out
    assert "10 pairs of copies, kept on one side of the split" in said
    split = {row["file_name"][7:10]: row["split"] for row in table.rows}
    assert all(split[f"{k:03d}"] == split[f"{k + 40:03d}"] for k in range(10))
    again = read_table(folder, split_dir=tmp_path / "run", seed=1)
    assert again.rows == table.rows and again.notes == table.notes
    assert "copies" not in capsys.readouterr().out  # the saved split is read, nothing is compared


@pytest.mark.parametrize("seed", range(3))
def test_small_pictures_of_equal_pixels_stay_together(tmp_path, seed):
    """Another file of the same pixels, which training would refuse on two sides."""
    rows = rows_of(40, patient=lambda k: f"p{k}", label=lambda k: "a")
    for k, row in enumerate(rows):
        path = tmp_path / "d" / row["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(film(k % 20, 40)).save(path, compress_level=9 if k < 20 else 0)
    write_table(tmp_path / "d" / "metadata.csv", rows)
    split = read_table(tmp_path / "d", seed=seed).column("split")
    assert split[:20] == split[20:] and set(split) == {"train", "val", "test"}


def test_without_near_copies_the_split_is_as_if_none_were_looked_for(tmp_path, monkeypatch):
    folder = films(tmp_path / "d", 40, copies=False)
    table = read_table(folder, seed=1)
    monkeypatch.setattr("minidiff.data.table.near_copies", lambda files: [])
    assert read_table(folder, seed=1).rows == table.rows


# --- bad tables


@pytest.mark.parametrize("first, second", [("train", "test"), ("train", "val"),
                                           ("test", "external"), ("val", "ward")])
def test_patient_across_splits(tmp_path, first, second):
    rows = rows_of(3, split=[first, first, second], patient=["p7", "q", "p7"])
    folder = data_set(tmp_path / "d", rows)
    refused(folder, "patient 'p7' crosses splits", f"000.png is {first}", f"002.png is {second}")


def test_identical_file_across_splits_even_of_two_data_sets(tmp_path):
    folder = data_set(tmp_path / "d", rows_of(2, split=["train", "test"], label=["a", "a"]), [5, 5])
    refused(folder, "identical file crosses splits", "000.png is train", "001.png is test")
    one = data_set(tmp_path / "one", rows_of(2, split=["train"] * 2), [1, 2])
    two = data_set(tmp_path / "two", rows_of(2, split=["external"] * 2), [3, 2])
    refused([one, two], "identical file crosses splits", str(one), str(two))


def test_identical_file_under_two_labels(tmp_path):
    folder = data_set(tmp_path / "d", rows_of(2, split=["train"] * 2), [5, 5])
    refused(folder, "two labels", "000.png is a", "001.png is b")


def test_duplicate_rows(tmp_path):
    rows = rows_of(3)
    folder = data_set(tmp_path / "d", [*rows, rows[1] | {"file_name": "images/./001.png"}, rows[0]])
    at = folder / "metadata.csv"
    # side by side
    refused(folder, f"4 duplicate rows, which name a file again: {at}:2, {at}:6, {at}:3, {at}:5")
    refused([data_set(tmp_path / "e", rows), tmp_path / "e"], "6 duplicate rows")


def test_split_of_too_few_patients(tmp_path):
    rows = rows_of(30, patient=lambda k: f"p{k}", label=lambda k: "rare" if k < 2 else "a")
    refused(data_set(tmp_path / "d", rows), "label 'rare' has 2 patient(s)", "3 or more")


# --- real chest X-rays


@needs_cxr
def test_cxr_as_given():
    table = read_table(CXR)
    assert Counter(table.column("label")) == {"covid": 124, "normal": 500, "pneumonia": 500}
    with open(CXR / "metadata.csv", newline="") as file:
        assert table.column("split") == [row["split"] for row in csv.DictReader(file)]
    assert len(set(table.column("patient"))) == 764 and not table.patients_assumed
    assert in_every_split(table, "train", "val", "test", per_label=9)


@needs_cxr
def test_cxr_unites_with_its_neighbours():
    table = read_table([CXR, CXR / "hannover", CXR / "external"])
    assert len(table) == 1124 + 243 + 40 and table.labels == ["covid", "normal", "pneumonia"]
    for name in ("crp", "ldh", "po2", "icu"):
        assert {table.rows[k][name] for k in range(1124)} == {""}
        assert any(table.select(source="hannover").column(name))
    assert Counter(table.column("split"))["external"] == 40


@needs_cxr
def test_cxr_class_folders_without_the_table():
    table = read_table(CXR / "images")
    assert table.patients_assumed and Counter(table.column("label")) == {
        "covid": 124, "normal": 500, "pneumonia": 500}
    assert Counter(table.column("split"))["val"] in range(168, 172)
