"""The audit of a data set: each fault planted, and silence where nothing is wrong."""

import csv
import itertools
import json
import shutil

import pytest
from PIL import Image

from minidiff.data import audit, files, images, phantom
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.audit import AuditConfig, run_audit

SIDE = 96


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """60 phantoms of 41 patients in three splits, nothing wrong with them."""
    folder = tmp_path_factory.mktemp("clean")
    rows = []
    for i in range(60):
        label = ("covid", "normal", "pneumonia")[i % 3]
        p = phantom.phantom(5, i, SIDE, label=label)
        name = f"images/{label}/{i:03d}.png"
        images.write(folder / name, p.image)
        patient = i if i < 39 else i - 39 if i < 58 else i  # some have two images, of one label
        split = "train" if patient % 5 < 3 else ("val", "test")[patient % 2]
        rows.append({"file_name": name, "label": label, "split": split, "patient": f"p{patient}",
                     **{k: p.row[k] for k in ("sex", "age", "view")}})
    write_table(folder / "metadata.csv", rows)
    return folder


@pytest.fixture
def data(clean, tmp_path):
    """A copy to plant faults in: (folder, rows, save)."""
    folder = tmp_path / "data"
    shutil.copytree(clean, folder)
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    return folder, rows, lambda: write_table(folder / "metadata.csv", rows)


def found(folder, **knobs):
    result, _ = audit.audit(read_table(folder, split=False, check=False), **knobs)
    return result, {f["kind"]: f for f in result["findings"]}


def add(folder, rows, image, name, like, **cells):
    image.save(folder / name) if isinstance(image,
                                            Image.Image) else (folder / name).write_bytes(image)
    rows.append({**like, "file_name": name, **cells})


# --- findings


def test_nothing_is_found_where_nothing_is_wrong(clean):
    result, kinds = found(clean)
    assert result["status"] == "ok" and not result["pairs"]
    assert set(kinds) <= {"images per patient",
                          "shortcut"} and kinds["images per patient"]["level"] == "info"
    # it shows in a phantom's
    assert all("thumbnail" in f["text"] for f in result["findings"] if f["kind"] == "shortcut")
    assert (result["images"], result["readable"], result["patients"]) == (60, 60, 41)
    assert sum(sum(c.values()) for c in result["tables"]["view"].values()) == 60
    assert {b["features"] for b in result["baselines"]} == {"header", "border", "thumbnail",
                                                            "metadata"}
    json.dumps(result)


def test_every_planted_fault_is_found(data):
    folder, rows, save = data
    train, test = (next(r for r in rows if r["split"] == s and r["label"] == "covid")
                   for s in ("train", "test"))
    other = next(r for r in rows if r["split"] == "train" and r["label"] == "normal")
    picture = Image.open(folder / train["file_name"])
    add(folder, rows, b"no image", "images/bad.png", train, patient="q1")
    add(folder, rows, Image.new("L", (96, 96), 90), "images/blank.png", train, patient="q2")
    # train → test
    add(folder, rows, picture.resize((144, 144)).crop((6, 6, 138, 138)), "images/again.png", test)
    # two labels
    add(folder, rows, Image.open(folder / other["file_name"]).point(lambda v: min(255, v + 15)),
        "images/other.png", other, label="pneumonia")
    # patient
    add(folder, rows, phantomly(300, 96), "images/cross.png", train, patient=test["patient"])
    add(folder, rows, phantomly(301, 400), "images/big.png", train, patient="q3")
    add(folder, rows, phantomly(302, 96).resize((240, 96)), "images/flat.png", train, patient="q4")
    add(folder, rows,
        Image.merge("RGB", [phantomly(303, 96), phantomly(303, 96).point(lambda v: v // 2)]
                    + [phantomly(303, 96)]), "images/colour.png", train, patient="q5")
    (folder / "images/notes.txt").write_text("")
    save()
    result, kinds = found(folder)
    places = {name: [result_row(folder, i) for i in kinds[name]["images"]] for name in kinds}
    assert result["status"] == "error"
    assert places["unreadable"] == ["images/bad.png"] and places["blank"] == ["images/blank.png"]
    assert pairs_of(folder,
                    kinds["copy across splits"]) == {(train["file_name"], "images/again.png")}
    assert pairs_of(folder, kinds["label conflict"]) == {(other["file_name"], "images/other.png")}
    assert test["patient"] in kinds["patient across splits"]["text"]
    assert kinds["patient with two labels"]["level"] == "info"
    assert places["size"] == ["images/big.png"] and places["shape"] == ["images/flat.png"]
    assert places["colour"] == ["images/colour.png"] and ".txt 1" in kinds["other files"]["text"]
    levels = [f["level"] for f in result["findings"]]
    assert levels == sorted(levels, key=audit.LEVELS.index)


def phantomly(index, size):
    return Image.fromarray(phantom.phantom(9, index, min(size, 512), label="covid").image)


def result_row(folder, place):
    return read_table(folder, split=False, check=False).rows[place]["file_name"]


def pairs_of(folder, finding):
    return {(result_row(folder, i), result_row(folder, j)) for i, j, _ in finding["pairs"]}


def test_a_hot_pixel_and_other_formats_are_noted(data):
    folder, rows, save = data
    wide = images.read(folder / rows[0]["file_name"])[0].astype("uint16") * 16
    wide[3, 3] = 65535
    add(folder, rows, Image.fromarray(wide), "hot.png", rows[0])
    add(folder, rows, Image.fromarray(wide // 4), "scan.tiff", rows[1])
    save()
    _, by_kind = found(folder)
    assert {k for k in by_kind if "name" in k} == set()  # .tiff is the ending of a TIFF
    assert by_kind["outliers"]["level"] == "info" and by_kind["outliers"]["images"] == [60, 61]


def test_cells_that_say_one_thing_in_many_ways_are_named(data):
    folder, rows, save = data
    for row, sex in zip(rows, ("F", "f", "female", "Female", "weiblich", "M", "Male", "male", "m",
                               "1", "N/A")):
        row["sex"] = sex
    for row, age in zip(rows, ("-1", "180", "999", "069Y", "adult", "6M")):
        row["age"] = age
    for row, patient in zip(rows, ("nan", "?", "q", "Q")):
        row["patient"] = patient
    save()
    result, kinds = found(folder)
    assert set(result["tables"]["sex"]) == {"", "F", "M", "1"}
    assert "'weiblich' is read as 'F'" in "".join(
        f["text"] for f in result["findings"] if f["kind"] == "spellings")
    levels = {"impossible ages": "'-1' (1), '180' (1), '999' (1) is no age",
              "unknown spellings": "sex '1' (1) has no known meaning beside F, M",
              "patients unknown": "2 images without a patient id ('?' 1, 'nan' 1)",
              "patients alike": "'Q' and 'q' differ in capitals"}
    for kind, text in levels.items():
        assert kinds[kind]["level"] == "warning" and text in kinds[kind]["text"], kinds[kind]
    assert result["status"] == "ok"


def test_other_files_are_those_that_reading_lists(data):
    folder = data[0]
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "x.npy", ".hidden.png", "list.csv"):
        (folder / "images/covid" / name).write_bytes(b"x")
    found = audit.other_files(read_table(folder, split=False, check=False).column("file"))
    assert "lie beside the images: .npy 1, .png 1, .txt 1" in found[0]["text"]


def test_equal_patient_ids_of_two_folders_are_an_error_until_it_is_said_whose_they_are(
        tmp_path, capsys):
    for k, ward in enumerate(("north", "south")):
        rows = [{"file_name": f"{i}.png", "label": "ab"[i % 2], "patient": i} for i in range(6)]
        for i, row in enumerate(rows):
            images.write(tmp_path / ward / row["file_name"], phantom.phantom(k, i, 32).image)
        write_table(tmp_path / ward / "metadata.csv", rows)
    knobs = {"root": str(tmp_path), "data": (str(tmp_path / "north"), str(tmp_path / "south"))}
    with pytest.raises(SystemExit) as stop:
        run_audit(AuditConfig(**knobs))
    assert stop.value.code == 1
    assert "--same-patients if they are the same persons" in capsys.readouterr().out
    run_audit(AuditConfig(**knobs, out=str(tmp_path / "again"), distinct_patients=True))
    assert json.loads((tmp_path / "again/audit.json").read_text())["patients"] == 12


def test_shortcuts_are_called_so(data):
    folder, rows, save = data
    for row in rows:
        # from another scanner: other shape, another source, sex not written down
        if row["label"] == "covid":
            picture = Image.open(folder / row["file_name"])
            picture.resize((108, 96)).save(folder / row["file_name"])
            row |= {"sex": ""}
        row["source"] = "north" if row["label"] == "covid" else "south"
    save()
    result, kinds = found(folder)
    by = {(b["label"], b["features"]): b for b in result["baselines"]}
    assert by["covid", "header"]["auroc"] == 1 and by["covid", "header"]["shortcut"]
    assert by["covid", "metadata"]["auroc"] > 0.9 and "SHORTCUT" in kinds["shortcut"]["text"]
    assert by["normal", "border"]["auroc"] < 0.9 and not by["normal", "border"]["shortcut"]
    assert "north" in kinds["confounded"]["text"] and "sex" in kinds["missing by label"]["text"]
    assert result["missing"]["sex"]["covid"] == 1 and set(result["histograms"]) == {"north",
                                                                                    "south"}
    assert result["status"] == "ok"  # a person must judge; no file can be mended


def test_small_pictures_are_not_accused():
    rows = [{"file_name": k, "source": "s", "split": k, "label": k, "patient": k}
            for k in ("a", "b", "c")]
    kinds = {f["kind"]: f["level"]
             for f in audit.copied([(0, 1, 0.01), (1, 2, 0.0)], rows, certain=False)}
    assert kinds == {"possible copy across splits": "warning", "possible label conflict": "warning",
                     "copy across splits": "error", "label conflict": "error"}
    assert {f["level"] for f in audit.copied([(0, 1, 0.01)], rows)} == {"error"}


def test_a_written_split_is_read_by_the_scripts_and_keeps_copies_together(data, tmp_path):
    folder, rows, save = data
    like = rows[0]
    for k, row in enumerate(list(rows[:6])):
        brighter = Image.open(folder / row["file_name"]).point(lambda v: min(255, v + 12))
        add(folder, rows, brighter, f"images/copy{k}.png", row, patient=f"copy{k}")
    for row in rows:
        row.pop("split")
    save()
    run_audit(AuditConfig(data=(str(folder),), out=str(tmp_path / "runs/audit"), write_split=True))
    written = list((tmp_path / "runs").glob("split-*.csv"))
    assert len(written) == 1
    before = written[0].read_bytes()
    table = read_table(folder, split_dir=tmp_path / "runs")
    splits = {row["file_name"]: row["split"] for row in table.rows}
    assert all(splits[f"images/copy{k}.png"] == splits[rows[k]["file_name"]]
               for k in range(6)), like
    assert {"train", "val", "test"} == set(splits.values()) and written[0].read_bytes() == before
    # kept, not drawn anew
    run_audit(AuditConfig(data=(str(folder),), out=str(tmp_path / "runs/audit"), write_split=True))
    assert written[0].read_bytes() == before


# --- page, exit status


def test_page_json_and_exit_status(data, tmp_path, capsys):
    folder, rows, save = data
    cfg = AuditConfig(data=(str(folder),), out=str(tmp_path / "a"), write_split=True)
    run_audit(cfg)  # 0: no SystemExit
    assert "nothing to write" in capsys.readouterr().out
    train, test = (next(r for r in rows if r["split"] == s) for s in ("train", "test"))
    add(folder, rows, Image.open(folder / train["file_name"]), "images/<b>again.png", test,
        label=train["label"])
    save()
    cfg = AuditConfig(data=(str(folder),), out=str(tmp_path / "b"), write_split=True)
    with pytest.raises(SystemExit) as stop:
        run_audit(cfg)
    assert stop.value.code == 1 and "copy across splits" in capsys.readouterr().err
    assert not (tmp_path / "b/facts").exists()  # they hold small pictures
    page = (tmp_path / "b/audit.html").read_text()
    assert "<b>again" not in page and "&lt;b&gt;again.png" in page and "http" not in page.split(
        "</style>")[1]
    assert page.count("<img") == 2 and "equal in every pixel" in page
    result = json.loads((tmp_path / "b/audit.json").read_text())
    assert result["status"] == "error" and result["files_of"][result["pairs"][0][1]].endswith(
        "<b>again.png")

    # put in place, as the docs say
    shutil.copy(next((tmp_path / "b").glob("metadata-*.csv")), folder / "metadata.csv")
    run_audit(AuditConfig(data=(str(folder),), out=str(tmp_path / "c")))                 # 0
    read_table(folder)


def test_what_cannot_be_audited_is_refused(tmp_path):
    (tmp_path / "d/covid").mkdir(parents=True)
    (tmp_path / "d/covid/x.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 1 images can be read.*x.png"):
        run_audit(AuditConfig(data=(str(tmp_path / "d"),), out=str(tmp_path / "o")))


def test_copies_of_every_kind_are_found_in_files(tmp_path):
    from PIL import ImageOps
    # one of each patient
    drawn = {p.row["patient"]: p for p in (phantom.phantom(2, i, 160) for i in range(30))}
    sources = [Image.fromarray(p.image) for p in list(drawn.values())[:24]]
    kinds = (ImageOps.mirror, lambda x: x.crop((8, 8, 152, 152)),
             lambda x: x.point(lambda v: int(v * 0.8 + 40)), None)
    names = []
    for k, x in enumerate(sources):
        x.save(tmp_path / f"{k}.png")
        names.append(tmp_path / f"{k}.png")
    for k, x in enumerate(sources):
        kind = kinds[k % 4]
        names.append(tmp_path / (f"{k}c.png" if kind else f"{k}c.jpg"))
        kind(x).save(names[-1]) if kind else x.save(names[-1], quality=40)
    pairs = audit.copies(*files.read_facts(names, 96))
    planted = {(k, k + 24) for k in range(24)}
    assert len(planted & {p[:2] for p in pairs}) >= 23 and {p[:2] for p in pairs} <= planted


# --- real X-rays


def test_one_picture_of_the_public_collections_is_in_training_and_in_the_external_set(cxr):
    table = read_table([cxr, cxr / "external"], split=False, check=False).select(label="covid")
    result, _ = audit.audit(table)
    kinds = {f["kind"]: f for f in result["findings"]}
    (i, j, _), = kinds["copy across splits"]["pairs"]
    assert {table.rows[k]["patient"]
            for k in (i, j)} == {"ieee-36", "figure1-COVID-00022"} and result["status"] == "error"


@pytest.mark.slow
def test_the_audit_of_real_x_rays_and_planted_copies(cxr, tmp_path):
    table = read_table([cxr, cxr / "external"], split=False, check=False)
    result, facts = audit.audit(table)
    kinds = {f["kind"]: f for f in result["findings"]}
    assert {"copy across splits", "copy across patients", "duplicate", "confounded", "shortcut",
            "burned-in text", "children"} <= set(kinds)
    by = {(b["label"], b["features"]): b["auroc"] for b in result["baselines"]}
    assert by["covid", "header"] > 0.97 and by["covid", "thumbnail"] > 0.93 and by["pneumonia",
                                                                                   "metadata"] < 0.7
    assert 60 < len(kinds["burned-in text"]["images"]) < 120 and len(result["pairs"]) < 8
    assert list(itertools.islice((f.fault for f in facts if f.fault), 1)) == []
