import base64
import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from readers_data import export, key_of, reading, rows_of, write_sets
from scipy import stats

from minidiff.errors import InputError
from minidiff.evaluation.page import jsonable
from minidiff.evaluation.readers import answers, keyed, make, plan, score
from minidiff.rating import newcombe
from minidiff.runs import read_json, sha256, write_json
from minidiff.statistics import wilson

SECRET = bytes(range(32))


def data_of(page):
    """What the page carries, as JSON."""
    return json.loads(re.search(r'id="study">(.*?)</script>', page.read_text(), re.S)[1])


def config(root, **knobs):
    given = {"per_label": 20, "readers": 3, "out": str(root / "out"), "key": str(root / "key"), **knobs}
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
    kinds = [(item["kind"], item["label"]) for item in key.items if "repeat_of" not in item and item["kind"] != "control"]
    assert all(kinds.count((kind, label)) == 20 for kind in ("real", "synthetic") for label in "ab")
    assert len(key.repeats) == 12 and sum(key.items[k]["kind"] == "real" for k, _ in key.repeats) == 6
    assert len(key.where(kind="control")) == 10 and {i.get("control") for i in key.items} == {None, "noise", "blur", "tiles"}
    assert all("test" in i["file_name"] for i in key.items if i["kind"] == "real")      # held-out, never training
    assert [i["id"] for i in key.items] == [i["id"] for i in page["items"]] == sorted(i["id"] for i in key.items)
    assert all(re.fullmatch("[0-9a-f]{32}", i["id"]) for i in key.items) and len(page["items"]) == 102


def test_hashes_and_folders(study):
    root, key, page = study
    assert [p.name for p in (root / "out").iterdir()] == ["index.html"]
    plan_ = read_json(root / "key" / "preregistration.json")
    assert page["key"] == plan_["key_sha256"] == sha256(root / "key" / "key.json") and page["id"] == page["key"][:16]
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
        assert sorted(order["origin"]) == sorted(key.where(kind="real") + key.where(kind="synthetic"))
    a, b, c = (np.argsort(order["quality"]) for order in key.orders)
    single = [k for k in range(102) if k not in twin]
    assert max(abs(np.corrcoef(x[single], y[single])[0, 1]) for x, y in ((a, b), (a, c), (b, c))) < 0.35


def test_gaps_where_the_list_is_short_and_places_are_fair():
    order, gap = keyed.spaced_order(20, [(0, 10), (1, 11), (2, 12)], 50, np.random.default_rng(0))
    assert sorted(order) == list(range(20)) and 8 <= gap <= 17
    assert all(abs(order.index(k) - order.index(k + 10)) >= gap for k in range(3))
    assert keyed.spaced_order(4, [], 50, np.random.default_rng(0))[1] == 4
    assert keyed.spaced_order(2, [(0, 1)], 50, np.random.default_rng(1))[1] == 1
    rng, pairs = np.random.default_rng(2), [(k, 100 + k) for k in range(15)]
    places = np.array([np.argsort(keyed.spaced_order(120, pairs, 50, rng)[0]) for _ in range(100)])
    assert abs((places[:, :15] < places[:, 100:115]).mean() - .5) < .05                # either showing may come first
    assert abs(places[:, 15:100].mean() - 59.5) < 2


def test_the_same_secret_and_only_it_makes_the_same_study(study, tmp_path):
    root, key, page = study
    made = []
    for name, secret in (("a", SECRET), ("b", bytes(32))):
        cfg = dataclasses.replace(config(root), out=str(tmp_path / name), key=str(tmp_path / f"{name}-key"))
        made.append(make.make(cfg, secret)[0])
    assert made[0].read_bytes() == (root / "out" / "index.html").read_bytes()
    other = data_of(made[1])
    assert not {i["id"] for i in other["items"]} & {i["id"] for i in page["items"]} and other["orders"] != page["orders"]


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
        source = np.asarray(Image.open((root / "real" if item["set"] == "real" else Path(item["set"])) / item["file_name"]))
        assert np.array_equal(shown, source) == (item["kind"] != "control")


def knn_accuracy(x, y):
    """Leave-one-out accuracy of the nearest neighbour, means of classes and a ridge; the best of the three."""
    x = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    n, hits = len(y), np.zeros(3)
    folds = np.random.default_rng(0).permutation(n) % 10
    for k in range(10):
        own, out = folds != k, folds == k
        d = ((x[out][:, None] - x[own][None]) ** 2).sum(-1)
        hits[0] += (y[own][d.argmin(1)] == y[out]).sum()
        means = np.stack([x[own & (y == c)].mean(0) for c in (0, 1)])
        hits[1] += (((x[out][:, None] - means) ** 2).sum(-1).argmin(1) == y[out]).sum()
        a = np.c_[x[own], np.ones(own.sum())]
        w = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ (2.0 * y[own] - 1))
        hits[2] += ((np.c_[x[out], np.ones(out.sum())] @ w > 0) == y[out]).sum()
    return hits / n


def facts(page, item, f, at):
    """What can be told of an item without looking at its pixels."""
    name = [int(c, 16) for c in item["id"]]
    return [len(f), *f[:41], at, *name, *(o["quality"].index(at) for o in page["orders"])]


def test_the_truth_is_not_in_names_sizes_headers_or_order(tmp_path):
    """The samples compress 1.6 times better than the real images; a classifier on all but pixels must not gain by it."""
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
    assert knn_accuracy(np.array(packed, float), y).max() > .95                       # it would, were they packed
    x = np.array([facts(page, item, f, at) for at, (item, f) in enumerate(zip(page["items"], files))], float)
    assert (abs(knn_accuracy(x, y) - .5) < .1).all()
    header = np.array([[len(f), *f[:41]] for f in files], float)
    assert (header.std(0) == 0).all()                                                 # not a bit differs
    visible = re.sub(r'"png":"[^"]*"', "", html).lower()
    assert all(word not in visible for word in (str(tmp_path).lower(), "images/", "testa", "atest", "synthetic", "train",
                                                *(i["sha256"] for i in key.items)))
    assert set(page["items"][0]) == {"id", "png"}


def test_labels_are_shown_only_if_asked_for(tmp_path):
    write_sets(tmp_path)
    make.make(config(tmp_path, per_label=4, show_label=True, origin=False, size=32), SECRET)
    page = data_of(tmp_path / "out" / "index.html")
    key = answers.read_key(tmp_path / "key" / "key.json")
    assert page["labelled"] and [i["label"] for i in page["items"]] == [i["label"] for i in key.items]
    assert set(key.orders[0]) == {"quality"} and Image.open(io.BytesIO(pngs(page)[0])).size == (32, 32)


def test_the_policy_names_the_scripts_that_are_there(study):
    html = (study[0] / "out" / "index.html").read_text()
    policy = re.search(r'Policy" content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; img-src data:") and "unsafe" not in policy
    for kind in ("script", "style"):
        text = re.search(rf"<{kind}>(.*?)</{kind}>", html, re.S)[1]
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(", re.sub(r'"png":"[^"]*"', "", html))


def test_a_translation_must_be_whole(tmp_path):
    write_sets(tmp_path)
    words = make.texts("")
    german = words | {"lang": "de", "good": "Gut </script> &"}
    write_json(tmp_path / "de.json", german)
    path, _ = make.make(config(tmp_path, per_label=2, controls=0, text=str(tmp_path / "de.json")), SECRET)
    assert '<html lang="de">' in path.read_text() and path.read_text().count("</script>") == 2
    assert data_of(path)["text"]["good"] == "Gut </script> &"
    for broken in ({k: v for k, v in words.items() if k != "bad"}, words | {"image": "Bild {k}"}, []):
        write_json(tmp_path / "de.json", broken)
        with pytest.raises(InputError, match="de.json.*(bad|image|lang|title)"):
            make.texts(str(tmp_path / "de.json"))
    used = set(re.findall(r'say\("(\w+)"', (make.HERE / "reader.js").read_text()))
    used |= set(re.findall(r'data-text="(\w+)"', (make.HERE / "reader.html").read_text()))
    assert used <= set(words)


def test_what_make_refuses(tmp_path):
    write_sets(tmp_path)
    for knobs, message in (({"per_label": 11}, "label 'a' has only 10 held-out"), ({"margin": 0.9}, "--margin 0.9"),
                           ({"key": str(tmp_path / "out" / "key")}, "must lie apart"), ({"repeat": 1.5}, "--repeat"),
                           ({"size": 8}, "--size 8"), ({"text": str(tmp_path / "none.json")}, "none.json")):
        with pytest.raises(InputError, match=message):
            make.make(config(tmp_path, **{"per_label": 4, **knobs}), SECRET)
    assert not (tmp_path / "out").exists()
    write_json(tmp_path / "made" / "manifest.json", {"trained_on": [sha256(tmp_path / "real/images/atest0.png")]})
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
        assert [r.reader for r in readings][:1] == [1] and len(remarks) == 1 and name in remarks[0], (name, remarks)
        return remarks[0]

    two = rows[2]
    assert "checksum" in remark("edited", two, lambda t: t.replace('"answer":"bad"', '"answer":"good"', 1))
    assert "last line" in remark("cut", two, lambda t: t[: len(t) // 2])
    assert "checksum" in remark("shortened", two, lambda t: t.replace(t.splitlines(True)[7], ""))
    assert "answered twice" in remark("twice", [*two[:5], two[4], *two[5:]])
    assert "rows were moved" in remark("left-out", [*two[:5], *two[6:]])
    assert "rows were moved" in remark("swapped", [two[1], two[0], *two[2:]])
    assert "rows were moved" in remark("borrowed", [{**row, "reader": 3} for row in two])
    assert "foreign" in remark("foreign", [{**row, "study": "f" * 16} for row in two])
    assert "reader 9" in remark("nobody", [{**row, "reader": 9} for row in two])
    assert "confidence 7" in remark("odd", [{**two[0], "confidence": 7}, *two[1:]])
    assert "columns" in remark("columns", [{k: v for k, v in row.items() if k != "ms"} for row in two])
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
    (tmp_path / "a.csv").write_bytes(("\ufeff" + (text.getvalue() + end).replace("\n", "\r\n")).encode())
    assert answers.read_rows(tmp_path / "a.csv") == rows == answers.read_rows(export(tmp_path / "a.jsonl", rows))


# --- scoring


def test_numbers_by_hand():
    """Reader 1: 68 of 100 synthetic, 91 of 100 real; of 20 repeats 3 differ; 9 of 10 controls; 113 of 200 told right."""
    key = key_of(100, 1, repeats=20, controls=10)
    quality = np.r_[np.arange(100) < 68, np.arange(100) < 91, np.full(20, True), np.arange(10) < 1].astype(int)
    quality[200:203] = 0                                                              # of images that were Good at first
    origin = np.full(230, -1)
    origin[:200] = np.r_[np.arange(100) < 60, np.arange(100) >= 53]
    found = score.summary(key, [reading(1, quality, origin)])
    row = found["readers"][0]
    low, high = wilson(68, 100)
    assert (round(low, 3), round(high, 3)) == (.583, .763)
    assert (row["synthetic"]["value"], row["synthetic"]["low"], row["synthetic"]["high"]) == (.68, low, high)
    assert row["real"]["k"] == 91 and row["difference"]["value"] == pytest.approx(-.23)
    assert (row["difference"]["low"], row["difference"]["high"]) == newcombe(68, 100, 91, 100)
    assert row["intra"]["n"] == 20 and row["intra"]["same"] == .85 and row["controls_bad"] == 9 and row["attentive"]
    right = 60 + 53
    assert row["origin"]["k"] == right and row["origin"]["p"] == pytest.approx(stats.binomtest(right, 200).pvalue)
    assert row["origin"]["said_synthetic"] == .6 and row["origin"]["said_real"] == pytest.approx(.47)
    pooled = found["pooled"]
    assert pooled["synthetic"]["low"] == pytest.approx(low)
    assert pooled["difference"]["low"] == pytest.approx(row["difference"]["low"])
    assert math.isnan(pooled["difference"]["wide_low"]) and found["agreement"] == []


def test_the_first_showing_counts_whichever_item_it_was():
    key = key_of(2, 1, repeats=1)
    r = reading(1, np.array([1, 1, 1, 1, 0]), np.full(5, -1))
    assert r.first(key, [0]) == 1
    earlier = dataclasses.replace(r, position=np.array([5, 2, 3, 4, 1]))
    assert earlier.first(key, [0]) == 0


def test_inattentive_and_unfinished_readers_are_shown_and_not_pooled():
    key = key_of(40, 3, repeats=4, controls=10)
    rng = np.random.default_rng(3)
    fine, blind = (np.r_[rng.integers(0, 2, 84), np.full(10, controls)] for controls in (0, 1))
    origin = np.r_[rng.integers(0, 2, 80), np.full(14, -1)]
    part = fine.copy()
    part[50:] = -1
    unfinished = dataclasses.replace(reading(3, part, origin), missing=44)
    found = score.summary(key, [reading(1, fine, origin), reading(2, blind, origin), unfinished])
    assert [r["pooled"] for r in found["readers"]] == [True, False, False] and found["pooled"]["readers"] == [1]
    assert [r["attentive"] for r in found["readers"]] == [True, False, True]
    assert score.summary(key, [unfinished])["pooled"] is None


def test_verdicts():
    key = key_of(200, 3)

    def answer(synthetic, real, told):
        rng = np.random.default_rng(4)
        rs = [reading(k, np.r_[rng.random(200) < synthetic, rng.random(200) < real],
                      (rng.random(400) < told) == np.repeat([True, False], 200)) for k in (1, 2, 3)]
        found = jsonable({**score.summary(key, rs), "design": key.design})
        return [v["answer"] for v in score.result_page.verdicts(found)]
    assert answer(.8, .8, .5) == ["yes", "not resolved"]
    assert answer(.4, .9, .9) == ["no", "yes"]
    assert answer(.72, .85, .5)[0] == "not resolved"


def test_against_numbers(tmp_path):
    key, rng = key_of(60, 3), np.random.default_rng(5)
    values = rng.normal(size=60)
    rs = [reading(k, np.r_[values + rng.normal(size=60) * .5 > 0, np.ones(60)], np.zeros(120)) for k in (1, 2, 3)]
    rows = [f"{k}.png,{values[k]},{rng.normal()},x" for k in range(60) if k]
    (tmp_path / "n.csv").write_text("file_name,likeness,chance,words\n" + "\n".join(rows) + "\n")
    numbers = score.read_numbers(str(tmp_path / "n.csv"), key)
    assert list(numbers) == ["likeness", "chance"] and math.isnan(numbers["likeness"][0])
    like, chance = score.summary(key, rs, numbers)["numbers"]
    assert like["n"] == 59 and like["r_low"] > .6 and like["auroc_low"] > .8
    assert chance["r_low"] < 0 < chance["r_high"] and chance["auroc_low"] < .5 < chance["auroc_high"]
    for text, message in (("a,b\n1,2\n", "no column 'file_name'"), ("file_name,x\nno.png,3\n", "no row has a number"),
                          ("file_name,x\n1.png,3\n1.png,4\n", "two rows")):
        (tmp_path / "n.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            score.read_numbers(str(tmp_path / "n.csv"), key)


def test_from_files_to_page(study, tmp_path, capsys):
    root, key, _ = study
    rng = np.random.default_rng(6)
    files = tuple(export(tmp_path / f"{r}.jsonl", rows_of(key, r, rng)) for r in (1, 2))
    cfg = score.Config(answers=files, key=str(root / "key" / "key.json"), out=str(tmp_path / "score"))
    score.run(cfg)
    first = (tmp_path / "score" / "readers.html").read_text()
    third = export(tmp_path / "3.jsonl", rows_of(key, 3, rng)[:20])
    score.run(dataclasses.replace(cfg, answers=(*files, third)))                      # one reader more: the page anew
    result, page = read_json(tmp_path / "score" / "readers.json"), (tmp_path / "score" / "readers.html").read_text()
    assert [r["pooled"] for r in result["readers"]] == [True, True, False] and "unfinished" in page and page != first
    assert "Cohen" in page and "Not for diagnosis" in page and not re.search(r"\bnan\b|<script|>None<", page)
    assert len(result["verdict"]) == 2 and result["agreement"][0]["which"] == "cohen"
    assert "unfinished, 20 of 182" in capsys.readouterr().out
    with pytest.raises(InputError, match="none of the files can be used"):
        score.run(dataclasses.replace(cfg, answers=(str(tmp_path / "none"),)))
    with pytest.raises(InputError, match="not the key"):
        score.run(dataclasses.replace(cfg, key=str(root / "key" / "preregistration.json")))


# --- planning


def test_plan_by_other_ways(capsys):
    assert -np.subtract(*wilson(.68 * 81, 81)) <= .2 < -np.subtract(*wilson(.68 * 80, 80))
    assert plan.n_for_width(.68, .2) == 81
    assert plan.n_for_width(.5, .001) is None
    for p, approximate in ((.6, 194), (.65, 85), (.7, 47)):                           # of the normal approximation
        n = plan.n_for_told(p, .8)
        assert approximate <= n <= 1.2 * approximate
        assert all(plan.told_power(m, p) >= .8 for m in range(n, n + 50)) and plan.told_power(n - 1, p) < .8
    outcomes = np.arange(48)
    rejected = np.array([stats.binomtest(int(k), 47).pvalue <= .05 for k in outcomes])
    assert plan.told_power(47, .7) == pytest.approx((stats.binom.pmf(outcomes, 47, .7) * rejected).sum())
    n = plan.n_for_kappa(.8, .68, .36)                                                # SE .092 at 100
    assert 95 <= n <= 106
    plan.run(plan.Config())
    assert "minutes a reader" in capsys.readouterr().out


def test_margin_power_equals_simulation():
    rng = np.random.default_rng(7)
    k, m = rng.binomial(60, .7, 2000), rng.binomial(60, .72, 2000)
    hits = np.mean([newcombe(a, 60, b, 60)[0] > -.15 for a, b in zip(k, m)])
    assert plan.margin_power(60, .7, .72, .15) == pytest.approx(hits, abs=.035)
    n = plan.n_for_margin(.68, .68, .15, .8)
    assert plan.margin_power(n, .68, .68, .15) >= .8 > plan.margin_power(n - 8, .68, .68, .15)


@pytest.mark.parametrize("knobs,message", [
    ({"told": .4}, "--told"), ({"agree": .2}, "--agree"), ({"good": .5, "good_real": .7}, "no number of images"),
    ({"interval": 0}, "--interval")])
def test_what_plan_refuses(knobs, message):
    with pytest.raises(InputError, match=message):
        plan.plan(plan.Config(**knobs))


# --- simulated readers


RATES, REAL, TOLD, RHO, AGAIN = (.6, .68, .76), (.8, .86, .9), (.5, .58, .66), .55, .8


def simulated(rng, key, n, repeats):
    """Three readers of known Good-rates and known kappas: what they see in an image is partly shared, partly their own, and
    partly of the moment; each has his own threshold."""
    shared, out = rng.normal(size=2 * n), []
    for r, (made, real, told) in enumerate(zip(RATES, REAL, TOLD), 1):
        own = math.sqrt(RHO) * shared + math.sqrt(AGAIN - RHO) * rng.normal(size=2 * n)
        limit = np.repeat(stats.norm.ppf([made, real]), n)
        looks = [own + math.sqrt(1 - AGAIN) * rng.normal(size=2 * n) < limit for _ in range(2)]
        second = np.array([k % 2 * n + k // 2 for k in range(repeats)])
        quality = np.r_[looks[0], looks[1][second]]
        right = rng.random(2 * n) < told
        origin = np.where(right, np.repeat([1, 0], n), np.repeat([0, 1], n))
        out.append(reading(r, quality, np.r_[origin, np.full(repeats, -1)]))
    return out


def both(p, q, rho):
    """P(both Good) of two thresholds on normals with this correlation."""
    return stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([stats.norm.ppf(p), stats.norm.ppf(q)])


def truths():
    """What `simulated` was made with, worked out from the normal distribution."""
    pairs = [(0, 1), (0, 2), (1, 2)]
    observed = np.mean([1 - RATES[a] - RATES[b] + 2 * both(RATES[a], RATES[b], RHO) for a, b in pairs])
    p = np.mean(RATES)
    fleiss, ac1 = p * p + (1 - p) ** 2, 2 * p * (1 - p)
    two = 1 - RATES[0] - RATES[1] + 2 * both(RATES[0], RATES[1], RHO)
    chance = RATES[0] * RATES[1] + (1 - RATES[0]) * (1 - RATES[1])
    mixed = (RATES[1] + REAL[1]) / 2                                                  # of repeats: half of each kind
    same = np.mean([1 - 2 * q + 2 * both(q, q, AGAIN) for q in (RATES[1], REAL[1])])
    intra = 1 - (1 - same) / (2 * mixed * (1 - mixed))
    return {"rate": RATES[1], "real": REAL[1], "difference": RATES[1] - REAL[1], "told": TOLD[1], "pooled": p,
            "pooled difference": p - np.mean(REAL), "pooled told": np.mean(TOLD),
            "fleiss": (observed - fleiss) / (1 - fleiss), "ac1": (observed - ac1) / (1 - ac1),
            "cohen": (two - chance) / (1 - chance), "intra": intra}


@pytest.mark.slow
def test_simulated_readers_are_recovered_in_93_to_97_percent_of_1000_runs():
    rng, n, repeats = np.random.default_rng(8), 150, 90
    key, truth = key_of(n, 3, repeats), truths()
    hits, sums = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.0)
    for _ in range(1000):
        rs = simulated(rng, key, n, repeats)
        three, two = score.summary(key, rs), score.summary(key, rs[:2])
        row, pooled = three["readers"][1], three["pooled"]
        found = {"rate": row["synthetic"], "real": row["real"], "difference": row["difference"], "told": row["origin"],
                 "pooled": pooled["synthetic"], "pooled difference": pooled["difference"], "pooled told": pooled["origin"],
                 "fleiss": three["agreement"][0]["kappa"], "ac1": three["agreement"][0]["ac1"],
                 "cohen": two["agreement"][0]["kappa"], "intra": row["intra"]}
        for name, x in found.items():
            hits[name] += x["low"] <= truth[name] <= x["high"]
            sums[name] += x["value"] / 1000
    print({name: (h, round(sums[name], 3), round(float(truth[name]), 3)) for name, h in hits.items()})
    assert all(abs(sums[name] - truth[name]) < .012 for name in truth), sums
    assert all(930 <= h <= 970 for h in hits.values()), hits
