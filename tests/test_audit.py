"""The audit of a data set: each fault planted, each statistic against its definition, and silence
where nothing is wrong.
"""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from minidiff.data import audit, baselines, files, images, phantom
from minidiff.data.duplicates import Pair
from minidiff.data.table import Table, read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.audit import AuditConfig, run_audit
from minidiff.statistics import auroc, auroc_by_patient, bootstrap_indices, percentile

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


# --- statistics


def test_the_regression_is_at_its_minimum_and_gives_the_log_odds_ratio():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)), rng.random(200) < 0.3
    w = baselines.logistic(x, y, ridge=2.0)
    p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    assert np.abs(x.T @ (p - y) + 2.0 * w[:-1]).max() < 1e-4 and abs((p - y).sum()) < 1e-4

    a, b, c, d = 30, 10, 15, 45  # y = 1 and 0 at x = 1; at x = 0
    x, y = np.repeat([1.0, 1.0, 0.0, 0.0], (a, b, c, d))[:, None], np.repeat([1, 0, 1, 0],
                                                                             (a, b, c, d))
    slope, level = baselines.logistic(x, y, ridge=1e-8)
    assert slope == pytest.approx(np.log(a * d / (b * c)),
                                  abs=1e-5) and level == pytest.approx(np.log(c / d), abs=1e-5)
    # separable
    assert np.isfinite(baselines.logistic(np.arange(20.0)[:, None] - 9.5, np.arange(20) > 9)).all()


def test_the_regression_against_sklearn():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(150, 8)), rng.random(150) < 0.5
    theirs = linear.LogisticRegression(C=0.5, tol=1e-10, max_iter=10000).fit(x, y)
    np.testing.assert_allclose(baselines.logistic(x, y, ridge=2.0),
                               [*theirs.coef_[0], theirs.intercept_[0]], atol=1e-4)


def test_patients_stay_whole_in_folds_and_labels_even():
    patients = [f"p{k // 2}" for k in range(200)]
    labels = ["rare" if k < 40 else "common" for k in range(200)]
    fold = baselines.fold_of(labels, patients)
    assert all(len({f for f, q in zip(fold, patients) if q == p}) == 1 for p in patients)
    assert [sum(1 for f, label in zip(fold, labels) if f == k and label == "rare")
            for k in range(5)] == [8] * 5
    # whatever the order
    assert (fold == baselines.fold_of(labels[::-1], patients[::-1])[::-1]).all()


def test_the_interval_is_that_of_resampled_patients():
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(40), 3)
    positive = np.repeat(rng.random(40) < 0.4, 3)
    scores = np.round(positive + rng.normal(size=120), 1)  # with ties
    area, interval = auroc_by_patient(scores, positive, patients, resamples=200, seed=7)
    slow = [auroc(scores[i], positive[i]) for i in bootstrap_indices(patients, 200, 7)]
    assert area == auroc(scores, positive)
    np.testing.assert_allclose(interval, percentile(slow), rtol=1e-12)


def test_noise_tells_nothing_and_a_hint_is_found_out_of_its_fold():
    rng = np.random.default_rng(3)
    patients, ours = [f"p{k}" for k in range(600)], np.arange(600) % 2 == 0
    noise = rng.normal(size=(600, 30))
    fold = baselines.fold_of(ours.astype(str), patients)
    assert abs(auroc(baselines.out_of_fold(noise, ours, fold), ours) - 0.5) < 0.08
    hint = np.column_stack([noise, ours + 0.3 * rng.normal(size=600), np.full(600, 3.0)])
    assert auroc(baselines.out_of_fold(hint, ours, fold), ours) > 0.97


def test_columns_become_features_whatever_is_in_them():
    facts = [files.Facts(width=10, height=10, bytes=100)] * 12
    rows = [{"sex": "FM"[k % 2], "age": str(k) if k % 3 else "", "view": "PA",
             "note": "" if k < 6 else "word"} for k in range(12)]
    x = baselines.features(facts, rows, ("sex", "age", "view", "note", "absent"))["metadata"]
    # sex, age and whether it is known, whether a note is known
    assert x.shape == (12, 2 + 2 + 1) and np.isfinite(x).all()
    assert (x[:, 3] == [k % 3 == 0 for k in range(12)]).all()


# --- single files


def test_facts_of_odd_files(tmp_path):
    x = phantom.phantom(0, 0, SIDE).image
    wide = Image.fromarray(x.astype(np.uint16) * 17)
    wide.save(tmp_path / "wide.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "somebody")
    Image.fromarray(x).save(tmp_path / "text.png", pnginfo=info)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(x[:40]).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([x, x // 2, x])).save(tmp_path / "colour.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "text.png").read_bytes()[:500])
    names = ("wide.png", "text.png", "turned.jpg", "colour.png", "cut.png")
    known, squares = files.read_facts([tmp_path / name for name in names], 32)
    get = dict(zip(names, known))
    assert (get["wide.png"].bits, get["wide.png"].channels) == (16, 1)
    assert get["text.png"].carries == ("Patient",) and get["text.png"].bits == 8 and not get[
        "text.png"].turned
    assert get["turned.jpg"].turned and (get["turned.jpg"].width, get["turned.jpg"].height) == (40,
                                                                                                96)
    assert get["colour.png"].channels == 3
    assert "cut.png" in get["cut.png"].fault
    assert squares.shape == (5, 32,
                             32) and (squares[:4].std((1, 2)) > 10).all() and not squares[4].any()
    assert get["text.png"].histogram.sum() == pytest.approx(1) and get["text.png"].border.shape == (
        64,)


def test_the_border_is_the_border():
    x = np.zeros((64, 64))
    x[:4] = 200  # the upper edge
    border = files._border(x)
    assert (border[:16] == 200).all() and (
        border[16:][[0, -16]] == 200).all() and border.sum() == 200 * 18


def test_letters_are_found_and_anatomy_is_not_taken_for_them():
    hits, font = 0, ImageFont.load_default(14)
    for i in range(30):
        x = phantom.phantom(1, i, 256).image
        assert files.text(x) == []
        image, y = Image.fromarray(x), (6 if i % 2 else 230)
        dark = x[y : y + 14, 20:120].mean() < 140
        word = ("SMITH JOHN", "PORTABLE", "12.03.1951")[i % 3]
        ImageDraw.Draw(image).text((20, y), word, fill=255 if dark else 0, font=font)
        boxes = files.text(np.asarray(image))
        hits += any(left < 120 and abs(top - y) < 14 for left, top, *_ in boxes)
    assert hits >= 27
    image = Image.fromarray(x)
    ImageDraw.Draw(image).text((20, 6), "L", fill=255, font=font)
    assert files.text(np.asarray(image)) == []  # one letter is no line, as the docstring says


# --- findings


def test_nothing_is_found_where_nothing_is_wrong(clean):
    result, kinds = found(clean)
    assert result["status"] == "go on" and not result["pairs"]
    assert set(kinds) <= {"images per patient",
                          "shortcut"} and kinds["images per patient"]["level"] == "note"
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
    assert result["status"] == "mend"
    assert places["unreadable"] == ["images/bad.png"] and places["blank"] == ["images/blank.png"]
    assert pairs_of(folder,
                    kinds["film across splits"]) == {(train["file_name"], "images/again.png")}
    assert pairs_of(folder, kinds["label conflict"]) == {(other["file_name"], "images/other.png")}
    assert test["patient"] in kinds["patient across splits"]["text"]
    assert kinds["patient with two labels"]["level"] == "note"
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
    assert result["status"] == "go on"  # a person must judge; no file can be mended


def test_small_pictures_are_not_accused():
    rows = [{"file_name": k, "source": "s", "split": k, "label": k, "patient": k}
            for k in ("a", "b", "c")]
    kinds = {f["kind"]: f["level"]
             for f in audit.duplicates([(0, 1, 0.01), (1, 2, 0.0)], rows, sharp=False)}
    assert kinds == {"perhaps a film across splits": "look", "perhaps a label conflict": "look",
                     "film across splits": "mend", "label conflict": "mend"}
    assert {f["level"] for f in audit.duplicates([(0, 1, 0.01)], rows)} == {"mend"}


def test_the_fast_form_sees_one_picture_in_two_files():
    x = torch.from_numpy(np.stack([phantom.phantom(0, i, 32).image
                                   for i in range(3)]))[:, None].expand(-1, 3, -1, -1)
    grey = torch.full((1, 32, 32), 7, dtype=torch.uint8).expand(3, -1, -1)

    def rows(*cells):
        return [{"file": f"{k}.png", "split": s, "label": label}
                for k, (s, label) in enumerate(cells)]

    audit.check_pictures(rows(*[("train", "a")] * 3), x)
    audit.check_pictures(rows(("train", "a"), ("train", "a")), [x[0], x[0]])
    # one grey is no picture
    audit.check_pictures(rows(("train", "a"), ("test", "b")), [grey, grey])
    with pytest.raises(InputError, match=r"two splits: 0.png is train, 1.png is test"):
        audit.check_pictures(rows(("train", "a"), ("test", "a")), [x[0], x[0].clone()])
    with pytest.raises(InputError, match="two labels"):
        audit.check_pictures(rows(("train", "a"), ("train", "b")), [x[0], x[0]])


# --- splits


def table_of(*cells):
    keys = ("file", "patient", "split", "label")
    return Table([dict(zip(keys, c)) for c in cells])


def test_a_mended_split_keeps_what_belongs_together_in_one_place():
    table = table_of(("0", "a", "train", "x"), ("1", "a", "test", "x"), ("2", "b", "val", "x"),
                     ("3", "c", "external", "x"), ("4", "d", "train", "x"), ("5", "e", "test", "x"),
                     ("6", "f", "train", "y"), ("7", "g", "test", "y"))
    pairs: list[Pair] = [(3, 4, 0.0), (5, 6, 0.01)]
    splits = [row["split"] for row in audit.mended(table, pairs)]
    assert splits == ["train", "train", "val", "external", "left-out", "left-out", "left-out",
                      "test"]
    sound = table_of(("0", "a", "train", "x"), ("1", "b", "test", "x"))
    assert audit.mended(sound, []) == sound.rows


def test_groups_are_connected_components():
    assert list(audit.connected(5, [(0, 3), (3, 4)])) == [0, 1, 2, 0,
                                                          0] and list(audit.connected(2, [])) == [0,
                                                                                                  1]


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
    assert stop.value.code == 1 and "film across splits" in capsys.readouterr().err
    page = (tmp_path / "b/audit.html").read_text()
    assert "<b>again" not in page and "&lt;b&gt;again.png" in page and "http" not in page.split(
        "</style>")[1]
    assert page.count("<img") == 2 and "equal in every pixel" in page
    result = json.loads((tmp_path / "b/audit.json").read_text())
    assert result["status"] == "mend" and result["files_of"][result["pairs"][0][1]].endswith(
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
    pairs = audit.film_pairs(*files.read_facts(names, 96))
    planted = {(k, k + 24) for k in range(24)}
    assert len(planted & {p[:2] for p in pairs}) >= 23 and {p[:2] for p in pairs} <= planted


# --- real X-rays


def test_one_film_of_the_public_collections_is_in_training_and_in_the_external_set(cxr):
    table = read_table([cxr, cxr / "external"], split=False, check=False).select(label="covid")
    result, _ = audit.audit(table)
    kinds = {f["kind"]: f for f in result["findings"]}
    (i, j, _), = kinds["film across splits"]["pairs"]
    assert {table.rows[k]["patient"]
            for k in (i, j)} == {"ieee-36", "figure1-COVID-00022"} and result["status"] == "mend"


@pytest.mark.slow
def test_the_audit_of_real_x_rays_and_planted_copies(cxr, tmp_path):
    table = read_table([cxr, cxr / "external"], split=False, check=False)
    result, facts = audit.audit(table)
    kinds = {f["kind"]: f for f in result["findings"]}
    assert {"film across splits", "film of two patients", "duplicate", "confounded", "shortcut",
            "burned-in text", "children"} <= set(kinds)
    by = {(b["label"], b["features"]): b["auroc"] for b in result["baselines"]}
    assert by["covid", "header"] > 0.97 and by["covid", "thumbnail"] > 0.93 and by["pneumonia",
                                                                                   "metadata"] < 0.7
    assert 60 < len(kinds["burned-in text"]["images"]) < 120 and len(result["pairs"]) < 8
    assert list(itertools.islice((f.fault for f in facts if f.fault), 1)) == []
