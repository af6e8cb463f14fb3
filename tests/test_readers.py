import base64
import csv
import dataclasses
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from readers_data import export, knn_accuracy, rows_of, write_sets

from minidiff.errors import InputError
from minidiff.evaluation.readers import answers, make, score
from minidiff.runs import read_json, sha256, write_json

SECRET = bytes(range(32))


def data_of(page):
    """What the page carries, as JSON."""
    return json.loads(re.search(r'id="study">(.*?)</script>', page.read_text(), re.S)[1])


def config(root, **knobs):
    given = {"per_label": 20, "readers": 3, "out": str(root / "out"), "key": str(root / "key"),
             **knobs}
    return make.Config(data=(str(root / "real"),), samples=(str(root / "made"),), **given)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """80 images, 12 repeats, 10 controls, 3 readers: (folder, key, the page's data)."""
    root = tmp_path_factory.mktemp("study")
    write_sets(root, n=24)
    make.make(config(root), SECRET)
    return root, answers.read_key(root / "key" / "key.json"), data_of(root / "out" / "index.html")


# --- making


def test_what_is_shown(study):
    root, key, page = study
    kinds = [(item["kind"], item["label"]) for item in key.items
             if "repeat_of" not in item and item["kind"] != "control"]
    assert all(kinds.count((kind, label)) == 20 for kind in ("real", "synthetic") for label in "ab")
    assert len(key.repeats) == 12 and sum(key.items[k]["kind"] == "real"
                                          for k, _ in key.repeats) == 6
    assert len(key.where(kind="control")) == 10 and {i.get("control") for i in key.items} == {
        None, "noise", "blur", "tiles"}
    # held-out, never training
    assert all("test" in i["file_name"] for i in key.items if i["kind"] == "real")
    assert [i["id"] for i in key.items] == [i["id"] for i in page["items"]] == sorted(
        i["id"] for i in key.items)
    assert all(re.fullmatch("[0-9a-f]{32}", i["id"])
               for i in key.items) and len(page["items"]) == 102


def test_hashes_and_folders(study):
    root, key, page = study
    assert [p.name for p in (root / "out").iterdir()] == ["index.html"]
    plan_ = read_json(root / "key" / "preregistration.json")
    assert page["key"] == plan_["key_sha256"] == sha256(
        root / "key" / "key.json") and page["id"] == page["key"][:16]
    assert plan_["page_sha256"] == sha256(root / "out" / "index.html")
    assert SECRET.hex() in (root / "key" / "key.json").read_text()
    assert SECRET.hex() not in json.dumps(plan_) + (root / "out" / "index.html").read_text()


def test_orders(study):
    _, key, page = study
    assert page["orders"] == key.orders and len(key.orders) == 3
    twin = dict(key.repeats) | {b: a for a, b in key.repeats}
    for order in key.orders:
        assert sorted(order["quality"]) == list(range(102))
        place = {k: at for at, k in enumerate(order["quality"])}
        assert min(abs(place[a] - place[b]) for a, b in key.repeats) >= key.design["gap"] == 50
        assert sorted(order["origin"]) == sorted(key.where(kind="real")
                                                 + key.where(kind="synthetic"))
    a, b, c = (np.argsort(order["quality"]) for order in key.orders)
    single = [k for k in range(102) if k not in twin]
    assert max(abs(np.corrcoef(x[single], y[single])[0, 1])
               for x, y in ((a, b), (a, c), (b, c))) < 0.35


def test_gaps_where_the_list_is_short_and_places_are_fair():
    order, gap = make.spaced_order(20, [(0, 10), (1, 11), (2, 12)], 50, np.random.default_rng(0))
    place = np.argsort(order)
    assert sorted(order) == list(range(20)) and 8 <= gap <= 17
    assert all(abs(place[k] - place[k + 10]) >= gap for k in range(3))
    assert make.spaced_order(4, [], 50, np.random.default_rng(0))[1] == 4
    assert make.spaced_order(2, [(0, 1)], 50, np.random.default_rng(1))[1] == 1
    rng, pairs = np.random.default_rng(2), [(k, 100 + k) for k in range(15)]
    places = np.array([np.argsort(make.spaced_order(120, pairs, 50, rng)[0]) for _ in range(100)])
    # either showing may come first
    assert abs((places[:, :15] < places[:, 100:115]).mean() - .5) < .05
    assert abs(places[:, 15:100].mean() - 59.5) < 2


def test_the_same_secret_and_only_it_makes_the_same_study(study, tmp_path):
    root, key, page = study
    made = []
    for name, secret in (("a", SECRET), ("b", bytes(32))):
        cfg = dataclasses.replace(config(root), out=str(tmp_path / name),
                                  key=str(tmp_path / f"{name}-key"))
        made.append(make.make(cfg, secret)[0])
    assert made[0].read_bytes() == (root / "out" / "index.html").read_bytes()
    other = data_of(made[1])
    assert not {i["id"] for i in other["items"]} & {
        i["id"] for i in page["items"]} and other["orders"] != page["orders"]


def pngs(page):
    return [base64.b64decode(item["png"]) for item in page["items"]]


def test_all_images_are_of_one_form(study):
    _, key, page = study
    files = pngs(page)
    assert len({len(f) for f in files}) == 1 and len({f[:41] for f in files}) == 1
    for f in files[:3]:
        image = Image.open(io.BytesIO(f))
        image.verify()
        assert (image.mode, image.size, image.info) == ("L", (48, 48), {})
        assert re.findall(rb"[A-Z]{4}", f[:41]) == [b"IHDR", b"IDAT"]
    by_id = {i["id"]: f for i, f in zip(page["items"], files)}
    for a, b in key.repeats:
        assert by_id[key.items[a]["id"]] == by_id[key.items[b]["id"]]


def test_pixels_are_those_of_the_file_and_controls_are_not(study):
    root, key, page = study
    for item, f in zip(key.items, pngs(page)):
        shown = np.asarray(Image.open(io.BytesIO(f)))
        source = np.asarray(Image.open((root / "real" if item["set"] == "real"
                                        else Path(item["set"])) / item["file_name"]))
        assert np.array_equal(shown, source) == (item["kind"] != "control")


def facts(page, item, f, at):
    """What can be told of an item without looking at its pixels."""
    name = [int(c, 16) for c in item["id"]]
    return [len(f), *f[:41], at, *name, *(o["quality"].index(at) for o in page["orders"])]


def test_the_truth_is_not_in_names_sizes_headers_or_order(tmp_path):
    """The samples compress 1.6 times better than the real images; a classifier on all but pixels
    must not gain by it.
    """
    write_sets(tmp_path, n=150, size=24)
    make.make(config(tmp_path, per_label=150, repeat=0, controls=0), SECRET)
    key = answers.read_key(tmp_path / "key" / "key.json")
    html = (tmp_path / "out" / "index.html").read_text()
    page = data_of(tmp_path / "out" / "index.html")
    y = np.array([item["kind"] == "synthetic" for item in key.items]).astype(int)
    files = pngs(page)
    packed = []
    for f in files:
        out = io.BytesIO()
        Image.open(io.BytesIO(f)).save(out, "PNG")
        packed.append([out.tell()])
    # it would, were they packed
    assert knn_accuracy(np.array(packed, float), y).max() > .95
    x = np.array([facts(page, item, f, at)
                  for at, (item, f) in enumerate(zip(page["items"], files))], float)
    assert (abs(knn_accuracy(x, y) - .5) < .1).all()
    header = np.array([[len(f), *f[:41]] for f in files], float)
    # not a bit differs
    assert (header.std(0) == 0).all()
    visible = re.sub(r'"png":"[^"]*"', "", html).lower()
    assert all(word not in visible
               for word in (str(tmp_path).lower(), "images/", "testa", "atest", "synthetic",
                            "train", *(i["sha256"] for i in key.items)))
    assert set(page["items"][0]) == {"id", "png"}


def test_labels_are_shown_only_if_asked_for(tmp_path):
    write_sets(tmp_path)
    make.make(config(tmp_path, per_label=4, show_label=True, origin=False, size=32), SECRET)
    page = data_of(tmp_path / "out" / "index.html")
    key = answers.read_key(tmp_path / "key" / "key.json")
    assert page["labelled"] and [i["label"] for i in page["items"]] == [i["label"]
                                                                        for i in key.items]
    assert set(key.orders[0]) == {"quality"} and Image.open(io.BytesIO(pngs(page)[0])).size == (32,
                                                                                                32)


def test_the_policy_names_the_scripts_that_are_there(study):
    html = (study[0] / "out" / "index.html").read_text()
    policy = re.search(r'Policy" content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:") and "unsafe" not in policy
    for kind in ("script", "style"):
        text = re.search(rf"<{kind}>(.*?)</{kind}>", html, re.S)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(",
                         re.sub(r'"png":"[^"]*"', "", html))


def test_a_translation_must_be_whole(tmp_path):
    write_sets(tmp_path)
    words = make.texts("")
    german = words | {"lang": "de", "good": "Gut </script> &"}
    write_json(tmp_path / "de.json", german)
    path, _ = make.make(config(tmp_path, per_label=2, controls=0, text=str(tmp_path / "de.json")),
                        SECRET)
    assert '<html lang="de">' in path.read_text() and path.read_text().count("</script>") == 2
    assert data_of(path)["text"]["good"] == "Gut </script> &"
    for broken in ({k: v for k, v in words.items() if k != "bad"}, words | {"image": "Bild {k}"},
                   []):
        write_json(tmp_path / "de.json", broken)
        with pytest.raises(InputError, match="de.json.*(bad|image|lang|title)"):
            make.texts(str(tmp_path / "de.json"))
    used = set(re.findall(r'say\("(\w+)"', (make.HERE / "reader.js").read_text()))
    used |= set(re.findall(r'data-text="(\w+)"', (make.HERE / "reader.html").read_text()))
    assert used <= set(words)


def test_what_make_refuses(tmp_path):
    write_sets(tmp_path)
    for knobs, message in (({"per_label": 11}, "label 'a' has only 10 held-out"),
                           ({"margin": 0.9}, "--margin 0.9"),
                           ({"key": str(tmp_path / "out" / "key")}, "must lie apart"),
                           ({"repeat": 1.5}, "--repeat"), ({"size": 8}, "--size 8"),
                           ({"text": str(tmp_path / "none.json")}, "none.json")):
        with pytest.raises(InputError, match=message):
            make.make(config(tmp_path, **{"per_label": 4, **knobs}), SECRET)
    assert not (tmp_path / "out").exists()
    write_json(tmp_path / "made" / "manifest.json",
               {"trained_on": [sha256(tmp_path / "real/images/atest0.png")]})
    with pytest.raises(InputError, match="was trained on 1 of 20 held-out"):
        make.make(config(tmp_path, per_label=4), SECRET)
    (tmp_path / "made" / "manifest.json").unlink()
    make.make(config(tmp_path, per_label=4), SECRET)
    with pytest.raises(InputError, match="never made over another"):
        make.make(config(tmp_path, per_label=4), SECRET)
    with pytest.raises(InputError, match="not synthetic"):
        make.read(dataclasses.replace(config(tmp_path), samples=(str(tmp_path / "real"),)))


def test_enlarged_images_are_noted(tmp_path):
    write_sets(tmp_path, made_size=24)
    make.make(config(tmp_path, per_label=2, size=48, controls=0), SECRET)
    notes = read_json(tmp_path / "key" / "preregistration.json")["notes"]
    assert any("4 synthetic images, smaller than 48 px" in note for note in notes)
    assert not any("real images," in note for note in notes)


# --- answers


def test_files_that_are_not_as_exported_are_named(study, tmp_path):
    _, key, _ = study
    rng = np.random.default_rng(0)
    rows = {r: rows_of(key, r, rng) for r in (1, 2, 3)}
    good = export(tmp_path / "good.jsonl", rows[1])
    assert answers.read_readings((good,), key)[1] == []

    def remark(name, changed, raw=None):
        file = export(tmp_path / f"{name}.jsonl", changed)
        if raw:
            (tmp_path / f"{name}.jsonl").write_text(raw((tmp_path / f"{name}.jsonl").read_text()))
        readings, remarks = answers.read_readings((good, file), key)
        assert [r.reader for r in readings][:1] == [1] and len(remarks) == 1 and name in remarks[
            0], (name, remarks)
        return remarks[0]

    two = rows[2]
    assert "checksum" in remark("edited", two,
                                lambda t: t.replace('"answer":"bad"', '"answer":"good"', 1))
    assert "last line" in remark("cut", two, lambda t: t[: len(t) // 2])
    assert "checksum" in remark("shortened", two, lambda t: t.replace(t.splitlines(True)[7], ""))
    assert "rows were moved, doubled" in remark("twice", [*two[:5], two[4], *two[5:]])
    assert "rows were moved" in remark("left-out", [*two[:5], *two[6:]])
    assert "rows were moved" in remark("swapped", [two[1], two[0], *two[2:]])
    assert "rows were moved" in remark("borrowed", [{**row, "reader": 3} for row in two])
    assert "foreign" in remark("foreign", [{**row, "study": "f" * 16} for row in two])
    assert "reader 9" in remark("nobody", [{**row, "reader": 9} for row in two])
    assert "confidence 7" in remark("odd", [{**two[0], "confidence": 7}, *two[1:]])
    assert "columns" in remark("columns",
                               [{k: v for k, v in row.items() if k != "ms"} for row in two])
    assert "unfinished, 50 of 182" in remark("unfinished", two[:50])
    assert "not UTF-8" in answers.read_readings((str(_binary(tmp_path)),), key)[1][0]
    assert "no such file" in answers.read_readings((str(tmp_path / "none"),), key)[1][0]


def _binary(folder):
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    return folder / "binary"


def test_doubled_readers(study, tmp_path):
    _, key, _ = study
    rng = np.random.default_rng(1)
    rows = rows_of(key, 1, rng)
    whole, part = export(tmp_path / "whole.jsonl", rows), export(tmp_path / "part.jsonl", rows[:40])
    readings, remarks = answers.read_readings((part, whole), key)
    assert [r.missing for r in readings] == [0] and "part.jsonl: doubled" in remarks[0]
    other = export(tmp_path / "other.jsonl", rows_of(key, 1, rng))
    readings, remarks = answers.read_readings((whole, other), key)
    assert readings == [] and "doubled, with different answers" in remarks[0]


def test_csv_equals_jsonl_and_survives_a_spreadsheet(study, tmp_path):
    _, key, _ = study
    rows = rows_of(key, 2, np.random.default_rng(2))
    text = io.StringIO()
    writer = csv.DictWriter(text, answers.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "reasons": " ".join(row["reasons"])} for row in rows)
    end = f"sha256,{hashlib.sha256(text.getvalue().encode()).hexdigest()},{len(rows)}\n"
    (tmp_path / "a.csv").write_bytes(("\ufeff" + (text.getvalue() + end).replace("\n",
                                                                                 "\r\n")).encode())
    assert answers.read_rows(tmp_path / "a.csv") == rows == answers.read_rows(
        export(tmp_path / "a.jsonl", rows))


# --- from files to page


def test_from_files_to_page(study, tmp_path, capsys):
    root, key, _ = study
    rng = np.random.default_rng(6)
    files = tuple(export(tmp_path / f"{r}.jsonl", rows_of(key, r, rng)) for r in (1, 2))
    cfg = score.Config(answers=files, key=str(root / "key" / "key.json"),
                       out=str(tmp_path / "score"))
    score.run(cfg)
    first = (tmp_path / "score" / "readers.html").read_text()
    third = export(tmp_path / "3.jsonl", rows_of(key, 3, rng)[:20])
    # one reader more: the page anew
    score.run(dataclasses.replace(cfg, answers=(*files, third)))
    result, page = read_json(tmp_path / "score" / "readers.json"), (
        tmp_path / "score" / "readers.html").read_text()
    assert [r["pooled"]
            for r in result["readers"]] == [True, True,
                                            False] and "unfinished" in page and page != first
    assert "Cohen" in page and "Not for diagnosis" in page and not re.search(
        r"\bnan\b|<script|>None<", page)
    assert len(result["verdict"]) == 2 and result["agreement"][0]["which"] == "cohen"
    assert "unfinished, 20 of 182" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the files can be used"):
        score.run(dataclasses.replace(cfg, answers=(str(tmp_path / "none"),)))
    with pytest.raises(InputError, match="not the key"):
        score.run(dataclasses.replace(cfg, key=str(root / "key" / "preregistration.json")))
