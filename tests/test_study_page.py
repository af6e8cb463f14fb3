"""The study's page and CSV tables, over figures that the study's own functions measure on simulated
classifiers.
"""

import copy
import csv
import io
import json
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_readers_page import browser  # noqa: F401 - the fixture
from test_report import Page
from test_report_browser import WIDE

from minidiff.classification import fairness, uncertainty
from minidiff.classification.assess import roc
from minidiff.classification.calibration import calibration, pooled, probabilities, temperature
from minidiff.classification.compare import compare, summarise
from minidiff.classification.scores import score, thresholds_at_specificity
from minidiff.data.images import png_bytes
from minidiff.evaluation.study import charts
from minidiff.evaluation.study.answers import answers, open_because
from minidiff.evaluation.study.study_page import csv_tables, flat, study_page

LABELS = ["covid", "normal", "pneumonia"]
SETS = {"val": (20, 40, 40), "test": (16, 30, 28), "clinic": (26, 18, 0)}
SKILL = {"val": 0.8, "test": 0.8, "clinic": 0.25}
ARMS = {  # name: (real, added, kind, generator_extra, gain in skill)
    "real": (300, 0, None, 0, 0.0), "real-plain": (300, 0, None, 0, -0.3),
    "real+1xduplicates": (300, 237, "duplicates", 0, 0.05), "real+1xsynthetic": (300, 237, "synthetic", 0, 0.3),
    "real+2xduplicates": (300, 474, "duplicates", 0, 0.0), "real+2xsynthetic": (300, 474, "synthetic", 0, 3.0),
    "synthetic": (0, 900, "synthetic", 0, -0.8), "real@25+2xsynthetic": (246, 150, "synthetic", 54, -0.2)}
PAIRS = [("real-plain", "real"), ("real+1xduplicates", "real"),
         ("real+1xsynthetic", "real+1xduplicates"), ("real+1xsynthetic", "real"),
         ("real+2xduplicates", "real"), ("real+2xsynthetic", "real+2xduplicates"),
         ("real+2xsynthetic", "real"), ("synthetic", "real+1xduplicates"),
         ("real@25+2xsynthetic", "real")]
TELLS = {"header": 0.62, "border": 0.71, "thumbnail": 0.84, "metadata": 0.6,
         "lungs blacked out": 0.88}
SENTENCE = ("SHORTCUT: the border of the picture alone tells covid from the rest with AUROC 0.953 "
            "(0.910 to 0.980, n = 16 and 58). What a classifier scores on this test set is no "
            "evidence that it sees disease.")


def make(exclusive=True, arms=ARMS, seeds=3, n_boot=100):
    """(summary, results) as `assess` makes them, of simulated logits."""
    g, truth, rows, patients = np.random.default_rng(0), {}, {}, {}
    for name, counts in SETS.items():
        which = np.repeat(range(3), counts)
        truth[name] = np.eye(3, dtype=bool)[which] | (False if exclusive
                                                      else g.random((len(which), 3)) < 0.2)
        rows[name] = [{"label": "|".join(x for x, y in zip(LABELS, line) if y),
                       "file_name": f"{i}.png", "view": "AP", "sex": "FM"[g.integers(2)],
                       "age": str(g.integers(20, 90)), "patient": f"{name}{i // 2 * 2}"}
                      for i, line in enumerate(truth[name])]
        patients[name] = [row["patient"] for row in rows[name]]
    common = {name: g.normal(size=t.shape) for name, t in truth.items()}
    z = {arm: {name: np.stack([(SKILL[name] + facts[-1] * (name != "clinic")) * (2 * t - 0.7) + 0.9
                               * common[name] + 0.5 * g.normal(size=t.shape) for _ in range(seeds)])
               for name, t in truth.items()} for arm, facts in arms.items()}
    p = {arm: {name: probabilities(each, exclusive=exclusive) for name, each in sets.items()}
         for arm, sets in z.items()}
    results, table, tests = [], [], ("test", "clinic")
    by_set = {kind: {name: {} for name in tests}
              for kind in ("calibration", "uncertainty", "fairness", "roc")}
    for arm, (real, added, kind, extra, _) in arms.items():
        mean = {name: each.mean(0) for name, each in p[arm].items()}
        cut = thresholds_at_specificity(mean["val"], truth["val"], LABELS)
        t = temperature(pooled(z[arm]["val"], exclusive), truth["val"], exclusive)
        conformal = uncertainty.Conformal.fit(mean["val"], truth["val"])
        distances = {name: g.gamma(20, 0.1, len(x)) + (name == "clinic")
                     for name, x in truth.items()}
        unsure = uncertainty.summary(p[arm], truth, LABELS, conformal, distances=distances,
                                     exclusive=exclusive)
        for name in tests:
            side, data = (mean[name][:, 0], truth[name][:, 0]), (truth[name], patients[name],
                                                                 LABELS)
            each = [{"arm": arm, "seed": seed, "test_set": name, "positive": "covid",
                     "n_train": real + added,
                     "best_step": 90, **score(q, *data, exclusive=exclusive, n_boot=0)}
                    for seed, q in enumerate(p[arm][name])]
            whole = score(mean[name], *data, exclusive=exclusive, thresholds=cut, n_boot=n_boot)
            remark = f"generator saw {extra} more real images than this arm" if extra else ""
            results += each
            table += [{**row, "real": real, "added_kind": kind, "generator_extra": extra,
                       "remark": remark, "ensemble": whole} for row in summarise(each)]
            for what, value in (
                    ("calibration", calibration(pooled(z[arm][name], exclusive), truth[name], t,
                                                exclusive, n_boot=50)), ("roc", roc(*side)),
                    ("uncertainty",
                     {**unsure[name], "mc_dropout": {"entropy": unsure[name]["entropy"]}}),
                    ("fairness", fairness.gaps(*side, rows[name], patients[name],
                                               threshold=cut["covid"], n_boot=n_boot))):
                by_set[what][name][arm] = value
    pairs = [pair for pair in PAIRS if set(pair) <= set(arms)]
    compared = {name: compare({arm: list(p[arm][name]) for arm in arms}, truth[name],
                              patients[name], LABELS, pairs,
                              positive="covid", exclusive=exclusive, n_boot=200) for name in tests}
    audit = [{"features": f, "label": label, "test_set": name, "auroc": a - 0.2 * (name != "test"),
              "low": a - 0.3, "high": min(a + 0.1, 1), "n": 16, "n_rest": 58, "shortcut": False}
             for f, a in TELLS.items() for label in LABELS for name in tests]
    summary = {
        "labels": LABELS, "positive": "covid", "exclusive": exclusive, "patients_assumed": False,
        "images": {name: Counter(row["label"] for row in own) for name, own in rows.items()},
        "patients": {name: len(set(own)) for name, own in patients.items()},
        "notes": ["clinic: <no> label pneumonia"],
        "audit": {"rows": audit, "shortcut": False, "sentence": "", "region": "masks", "text": []},
        "recipe": {"steps": 120, "size": 64},
        "generators": {"synthetic": {"n_images": 900, "saw": 300, "known": True}},
        "arms": table, "differences": compared, **by_set,
        "attributes": {"synthetic": fairness.attributes(rows["val"], rows["test"], n_boot=50)},
        "judge": [{"variable": "label", "n": 74, "accuracy": 0.91},
                  {"variable": "age", "n": 70, "r": 0.62}],
        "curves": {arm: [[step, 1 / step + k / 50] for step in (30, 60, 90, 120)]
                   for k, arm in enumerate(arms)}}
    return json.loads(json.dumps(summary)), json.loads(json.dumps(results))


@pytest.fixture(scope="module")
def study():
    return make()


def with_shortcut(summary):
    summary = copy.deepcopy(summary)
    row = next(r for r in summary["audit"]["rows"]
               if (r["features"], r["label"], r["test_set"]) == ("border", "covid", "test"))
    row |= {"auroc": 0.953, "low": 0.91, "high": 0.98, "shortcut": True}
    summary["audit"] |= {"shortcut": True, "sentence": SENTENCE}
    return summary


def pictures():
    g = np.random.default_rng(1)
    return {kind: [([png_bytes(g.integers(0, 255, (3, 64, 64), np.uint8)) for _ in range(2)],
                    [f"test: {kind}", "p(covid) 0.93", f"{i}.png"]) for i in range(4)]
            for kind in ("hits", "misses", "alarms")}


def text_of(html):
    return " ".join(Page(html.replace("<", " <")).text.split())


@pytest.fixture(scope="module")
def html(study):
    return study_page(*study, pictures())


@pytest.fixture(scope="module")
def shortcut_html(study):
    return study_page(with_shortcut(study[0]), study[1], pictures())


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are made but not rendered."""
    monkeypatch.setattr(charts, "_png", lambda figure: plt.close(figure) or b"png")


def test_every_section_is_there_and_nothing_is_fetched(html):
    page = Page(html)
    assert page.ids == ["answers", "audit", "arms", "differences", "curves", "uncertainty",
                        "fairness", "attributes", "pictures", "training", "made"]
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in page.fetched)
    text = text_of(html)
    for words in ("8 arms of training images, 3 seeds each",
                  "generator saw 54 more real images than this arm", "900 300", "False alarms",
                  "AUROC 0.880 (0.580–0.980)", "Sensitivity and specificity: at the", "test: hits"):
        assert words in text, words
    assert "&lt;no&gt; label" in html and "nan" not in text and "None" not in text


def test_numbers_on_the_page_are_those_of_the_summary(study, html):
    summary, text = study[0], text_of(html)
    for row in summary["arms"]:
        low, high = row["ensemble"]["balanced_accuracy_interval"]
        if low is not None:
            assert f"{100 * row['ensemble']['balanced_accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})" in text
    for own in summary["differences"].values():
        for d in (d for d in own if d["metric"] == "auroc"):
            ends = " to ".join(f"{x:+.3f}" for x in d["interval"])
            assert f"{d['arm']} − {d['against']} {d['difference']:+.3f} ({ends})".replace(
                "-0.", "−0.") in text


def answer(summary, **change):
    """The answer about synthetic images on the internal set by AUROC, after a change of one pair,
    arm or else.
    """
    summary = copy.deepcopy(summary)
    rows = summary["differences"]["test"] = [
        {**d, "difference": 0.02, "interval": [-0.01, 0.05], "p_holm": 0.3, "resolved": False,
         "patients_needed": 1234} for d in summary["differences"]["test"]]
    for d in rows:
        if (d["arm"], d["against"]) in change.get("pairs", {}):
            d |= {"difference": (gain := change["pairs"][d["arm"], d["against"]]),
                  "interval": [gain - 0.01, gain + 0.01], "p_holm": 0.01, "resolved": True}
    for row in summary["arms"]:
        row |= change.get("arms", {}).get(row["arm"], {})
    if "keep" in change:
        summary["differences"]["test"] = [d for d in rows if d["against"] in change["keep"]]
    if change.get("shortcut"):
        summary = with_shortcut(summary)
    kind, said, html = next(row for row in answers(summary) if "Internal test set, AUROC" in row[2])
    return kind, said, Page(html).text


ONE, TWO = (("real+1xsynthetic", "real+1xduplicates"), ("real+2xsynthetic", "real+2xduplicates"))


def test_the_answer_is_yes_only_over_as_many_duplicates_with_a_generator_that_saw_no_more(study):
    summary = study[0]
    kind, said, text = answer(summary, pairs={ONE: 0.04})
    assert (kind, said) == ("yes",
                            "yes") and "Better: real+1xsynthetic +0.040 (+0.030 to +0.050)." in text
    assert "Not resolved with 37 patients: real+2xsynthetic +0.020 (−0.010 to +0.050), about 1,200 patients" in text
    # without real images it is another question
    assert "synthetic +0" not in text.replace("xsynthetic +0", "")
    assert answer(summary)[:2] == ("open", "not resolved")
    assert answer(summary, pairs={("real+1xsynthetic", "real"): 0.04})[:2] == ("open",
                                                                               "not resolved")
    for extra in (54, None):
        kind, said, text = answer(summary, pairs={ONE: 0.04}, arms={
            "real+1xsynthetic": {"generator_extra": extra, "remark": "generator saw some more"}})
        assert (kind, said) == ("open", "not shown") and "[generator saw some more]" in text
    kind, said, text = answer(summary, pairs={ONE: 0.04},
                              arms={"real+1xduplicates": {"n_train": 400}})
    assert (kind, said) == ("open", "not shown")
    assert "[not count-matched: 537 images, real+1xduplicates has 400]" in text


def test_harm_is_said_where_every_ratio_is_resolved(study):
    assert answer(study[0], pairs={ONE: -0.04, TWO: -0.05})[:2] == ("no", "no, harmed")
    kind, said, text = answer(study[0], pairs={ONE: -0.04})
    assert (kind, said) == ("open", "not resolved") and "Worse: real+1xsynthetic −0.040" in text


def test_without_duplicates_it_is_not_tested(study):
    kind, said, text = answer(study[0], keep=("real",))
    assert (kind, said) == ("open", "not tested") and "real+1xsynthetic over real +0.020" in text


def test_a_shortcut_comes_first_and_stands_over_every_table_and_chart(study, html, shortcut_html):
    plain, html, summary = html, shortcut_html, with_shortcut(study[0])
    kind, said, text = answers(summary)[0]
    assert (kind, said) == ("no", "SHORTCUT") and SENTENCE in Page(text).text
    tables = html.count("<table>")
    over = f'<p class="note no">{SENTENCE}</p><div class="scroll" style="background'
    assert tables > 15 and html.count(over) == tables
    assert "SHORTCUT%3C/text" not in plain and answers(study[0])[0][:2] == ("yes", "none found")
    drawn, clean = ([url for url in Page(page).fetched if url.startswith("data:")]
                    for page in (html, plain))
    same = [url in clean for url in drawn]
    # all charts but that of the loss on validation, and no picture
    assert same == [False] * 8 + [True] * 25
    assert answer(study[0], pairs={ONE: 0.04}, shortcut=True)[:2] == ("open", "yes, by SHORTCUT?")


def test_why_a_difference_is_open():
    d = {"difference": 0.02, "interval": [-0.01, 0.05], "p_holm": 0.3, "seeds": 3, "seeds_agree": 3,
         "patients_needed": 640}
    assert open_because(d) == "about 640 patients would be needed"
    assert open_because({**d,
                         "patients_needed": 3_210_000}) == "over a million patients would be needed"
    assert open_because({**d, "interval": [0.0, 0.0],
                         "patients_needed": None}) == "no difference at all"
    assert open_because({**d, "interval": [0.01, 0.05]}) == "p is 0.300 after Holm’s correction"
    assert open_because({**d, "interval": [0.01, 0.05], "p_holm": 0.01,
                         "seeds_agree": 2}).startswith("only 2 of 3 seeds")
    for nothing in ({"difference": None}, {"interval": [None, None]}):
        assert open_because({**d, **nothing}) == "cannot be measured here"


SECTION = {"audit": {"audit"}, "differences": {"differences"}, "uncertainty": {"uncertainty"},
           "fairness": {"fairness"}, "attributes": {"attributes"}, "arms": {"arms"}}


def small(study):
    """Of two arms, for what is drawn many times."""
    summary, results = copy.deepcopy(study)
    kept = ("real", "real+1xsynthetic")
    summary["arms"] = [row for row in summary["arms"] if row["arm"] in kept]
    for kind in ("calibration", "uncertainty", "fairness", "roc"):
        summary[kind] = {s: {arm: arms[arm] for arm in kept} for s, arms in summary[kind].items()}
    return summary, [r for r in results if r["arm"] in kept]


@pytest.mark.parametrize("absent", ["labels", "positive", "exclusive", "images", "patients",
                                    "notes", "audit", "recipe", "judge", "generators", "arms",
                                    "differences", "calibration", "uncertainty", "fairness",
                                    "attributes", "roc", "curves", "patients_assumed"])
def test_what_is_missing_is_left_out(study, undrawn, monkeypatch, absent):
    whole, results = small(study)
    if absent != "arms":  # without their kinds, every line and mark has to be drawn
        for chart in ("forest", "roc", "reliability", "selective", "courses"):
            monkeypatch.setattr(charts, chart, lambda *numbers: b"png")
    ids = set(Page(study_page(whole, results)).ids)
    less = {key: value for key, value in whole.items() if key != absent}
    assert ids - set(Page(study_page(less, results)).ids) == SECTION.get(absent, set())
    assert csv_tables(less, results)


def test_nothing_at_all_is_tolerated():
    assert Page(study_page({}, [])).ids == ["answers"] and csv_tables({}, []) == {}
    assert [row[1] for row in answers({})] == ["not audited", "not tested"]


def test_one_arm_and_one_seed_are_a_study(undrawn):
    summary, results = make(arms={"real": ARMS["real"]}, seeds=1, n_boot=20)
    html = study_page(summary, results)
    assert "differences" not in Page(html).ids and "1 arm of training images, 1 seed each" in html
    assert [row[1] for row in answers(summary)][-1] == "not tested" and "None" not in text_of(html)


def test_several_labels_an_image(undrawn):
    arms = {name: ARMS[name] for name in ("real", "real+1xduplicates", "real+1xsynthetic")}
    summary, results = make(exclusive=False, arms=arms, n_boot=20)
    html = study_page(summary, results)
    text = text_of(html)
    assert "AUROC, mean over labels" in text and "balanced accuracy" not in text and "None" not in text
    counts = Counter(label for cell, n in summary["images"]["test"].items()
                     for label in cell.split("|") * n)
    # each finding, not each cell
    assert f"test 37 74 {' '.join(str(counts[label]) for label in LABELS)}" in text


def test_the_tables_hold_every_number(study):
    summary, results = study
    found = {name: list(csv.DictReader(io.StringIO(text)))
             for name, text in csv_tables(summary, results).items()}
    assert set(found) == {"arms", "seeds", "differences", "shortcuts", "roc", "calibration",
                          "reliability", "conformal",
                          "uncertainty", "selective", "groups", "gaps", "shares", "association"}
    assert len(found["arms"]) == 16 and len(found["seeds"]) == 48 and len(
        found["differences"]) == 2 * 9 * 4
    for row, line in zip(summary["arms"], found["arms"]):
        low, _ = row["ensemble"]["auroc_interval_patients"]["covid"]
        assert float(line["ensemble_auroc_covid"]) == row["ensemble"]["auroc"]["covid"]
        assert line["ensemble_auroc_interval_patients_covid_low"] == ("" if low is None
                                                                      else str(low))
        assert json.loads(line["ensemble_confusion"]) == row["ensemble"]["confusion"]
    for d, line in zip(summary["differences"]["test"], found["differences"]):
        assert [float(line["interval_low"]),
                float(line["interval_high"])] == d["interval"] and line["test_set"] == "test"
    corners = [[float(r["fpr"]), float(r["tpr"])] for r in found["roc"]
               if (r["test_set"], r["arm"]) == ("clinic", "real")]
    assert corners == summary["roc"]["clinic"]["real"]
    assert {r["arm"] for r in found["conformal"]} == set(ARMS) and len(found["conformal"]) == 48
    assert flat({"a": {"b": [1, 2]}, "interval": (None, 2.0), "c": None}) == {
        "a_b": "[1, 2]", "interval_low": None, "interval_high": 2.0, "c": None}


@pytest.mark.parametrize("sets", [1, 4])
def test_forests_of_any_size_have_the_width_of_the_page(sets):
    kinds = {f"arm {k}": ("synthetic", "duplicates", None)[k % 3] for k in range(15)}
    points = {f"set {s}": [{"name": arm, "arm": arm, "value": None if k == s else 0.5 + k / 50,
                            "seeds": [0.5, None], "interval": [None, None] if k % 4 == 0
                            else [0.4, 0.9]} for k, arm in enumerate(kinds)] for s in range(sets)}
    png = charts.forest(points, kinds, "AUROC", False)
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width == 1440 and height == pytest.approx(150 * (0.9 + 0.27 * 15) * -(-sets // 3), abs=2)


def test_fifteen_arms_have_fifteen_lines():
    kinds = {f"arm {k}": ("synthetic", "duplicates", None)[k % 3] for k in range(24)}
    lines = charts._lines({"test": dict.fromkeys(kinds)}, kinds)
    assert len({(line["color"], line["linestyle"], line["linewidth"])
                for line in lines.values()}) == 24


def test_names_are_text_not_html(study, undrawn):
    summary, results = small(study)
    for row in (*summary["arms"], *results):
        row["arm"] = row["arm"].replace("real", "<b>real")
    for kind in ("calibration", "uncertainty", "fairness", "roc"):
        summary[kind] = {s: {arm.replace("real", "<b>real"): v for arm, v in arms.items()}
                         for s, arms in summary[kind].items()}
    summary["positive"], summary["differences"] = "<i>", {}
    html = study_page(summary, results, {"hits": [([], ["<u>line"])]})
    assert "<b>real" not in html and "<i>" not in html and "<u>" not in html and "&lt;b&gt;real" in html


@pytest.mark.parametrize("width", [1150, 360])
def test_in_a_browser_it_fits_and_fetches_nothing(browser, shortcut_html, tmp_path, width):  # noqa: F811
    (tmp_path / "study.html").write_text(shortcut_html)
    context = browser.fresh(viewport={"width": width, "height": 900})
    page, asked, faults = context.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: faults.append(m.text))
    page.goto((tmp_path / "study.html").as_uri())
    assert [url for url in asked
            if not url.startswith("data:")] == [(tmp_path / "study.html").as_uri()] and not faults
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate(
        "document.documentElement.scrollWidth") <= width and page.evaluate(WIDE) == []
    assert page.evaluate("[...document.images].every(i => i.alt && i.complete && i.naturalWidth > "
                         "0)")
    behind = page.evaluate("""[...document.querySelectorAll('.scroll:has(table)')].map(
        e => getComputedStyle(e).backgroundImage)""")
    assert len(behind) > 15 and all("SHORTCUT" in image for image in behind)
    context.close()
