"""The page of a study, its CSV tables and its charts, over figures of simulated classifiers."""

import copy
import csv
import io
import json
import re
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import pytest
from study_figures import ARMS, LABELS, SENTENCE, make, with_shortcut
from test_readers_page import browser  # noqa: F401 - the fixture
from test_report import Page
from test_report_browser import WIDE

from minidiff.data.images import png_bytes
from minidiff.evaluation.pages import study_pictures
from minidiff.evaluation.pages.study import study_page
from minidiff.evaluation.pages.study_answers import answers
from minidiff.evaluation.pages.study_tables import csv_tables, flat, printed


@pytest.fixture(scope="module")
def study():
    return make()


def pictures():
    g = np.random.default_rng(1)
    return {kind: [{"shots": [png_bytes(g.integers(0, 255, (3, 64, 64), np.uint8))
                              for _ in range(2)],
                    "lines": [f"test: {kind}", "p(covid) 0.93", f"{i}.png"]} for i in range(4)]
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
    monkeypatch.setattr(study_pictures, "_png", lambda figure: plt.close(figure) or b"png")


def test_every_section_is_there_and_nothing_is_fetched(html):
    page = Page(html)
    assert page.ids == ["answers", "audit", "arms", "differences", "curves", "uncertainty",
                        "fairness", "attributes", "pictures", "training", "made"]
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in page.fetched)
    text = text_of(html)
    for words in ("8 arms of training images, 3 seeds each",
                  "generator saw 54 more real images than this arm", "900 300", "False alarms",
                  "AUROC 0.880 (0.580–0.980)", "Sensitivity and specificity: at the", "test: hits",
                  "Internal test set: 74 images of 37 patients", "external set clinic"):
        assert words in text, words
    assert "&lt;no&gt; label" in html and "nan" not in text and "None" not in text


def test_numbers_on_the_page_are_those_of_the_summary(study, html):
    summary, text = study[0], text_of(html)
    for row in summary["arms"]:
        low, high = row["ensemble"]["balanced_accuracy_interval"]
        if low is not None:
            value = 100 * row["ensemble"]["balanced_accuracy"]
            assert f"{value:.1f} ({100 * low:.1f}–{100 * high:.1f})" in text
    for own in summary["differences"].values():
        for d in (d for d in own if d["metric"] == "auroc"):
            ends = " to ".join(f"{x:+.3f}" for x in d["interval"])
            assert f"{d['arm']} − {d['against']} {d['difference']:+.3f} ({ends})".replace(
                "-0.", "−0.") in text


def test_a_shortcut_is_said_once_a_section_and_in_every_chart(html, shortcut_html):
    """In the section's words and in the margin of a chart, never over the numbers."""
    warned = re.findall(r'<section id="(\w+)">(.*?)</section>', shortcut_html, re.S)
    counts = {name: body.count(f'<p class="note no">{SENTENCE}</p>') for name, body in warned}
    told = ("arms", "differences", "curves", "uncertainty", "fairness")
    assert counts == {name: int(name in told) for name in counts} and "background:url" not in html
    assert dict(warned)["answers"].count(SENTENCE) == 1 and SENTENCE not in html
    assert '<tr class="bad"><td>border</td><td>covid</td>' in shortcut_html
    drawn, clean = ([url for url in Page(page).fetched if url.startswith("data:")]
                    for page in (shortcut_html, html))
    # all charts but that of the loss on validation, and no picture
    assert [url in clean for url in drawn] == [False] * 8 + [True] * 25


SECTION = {"audit": {"audit"}, "differences": {"differences"}, "uncertainty": {"uncertainty"},
           "fairness": {"fairness"}, "attributes": {"attributes"}, "arms": {"arms"}}


def small(study):
    """Of two arms, for what is drawn many times."""
    summary, results = copy.deepcopy(study)
    kept = ("real", "real+1xsynthetic")
    summary["arms"] = [row for row in summary["arms"] if row["arm"] in kept]
    summary["differences"] = {s: [d for d in own if {d["arm"], d["against"]} <= set(kept)]
                              for s, own in summary["differences"].items()}
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
        for chart in ("forest", "lines"):
            monkeypatch.setattr(study_pictures, chart, lambda *numbers, **how: b"png")
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
    assert "differences" not in Page(html).ids
    assert "1 arm of training images, 1 seed each" in text_of(html)
    assert "test: 74 images of 37 patients" in printed(summary)
    assert [row[1] for row in answers(summary)][-1] == "not tested" and "None" not in text_of(html)


def test_several_labels_an_image(undrawn):
    arms = {name: ARMS[name] for name in ("real", "real+1xduplicates", "real+1xsynthetic")}
    summary, results = make(exclusive=False, arms=arms, n_boot=20)
    html = study_page(summary, results)
    text = text_of(html)
    assert "AUROC, mean over labels" in text
    assert "balanced accuracy" not in text and "None" not in text
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
                            "seeds": [0.5, None],
                            "interval": [None, None] if k % 4 == 0 else [0.4, 0.9]}
                           for k, arm in enumerate(kinds)] for s in range(sets)}
    png = study_pictures.forest(points, kinds, "AUROC", False)
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width == 1440 and height == pytest.approx(150 * (0.9 + 0.27 * 15) * -(-sets // 3), abs=2)


def test_fifteen_arms_have_fifteen_lines():
    kinds = {f"arm {k}": ("synthetic", "duplicates", None)[k % 3] for k in range(24)}
    lines = study_pictures.line_styles({"test": dict.fromkeys(kinds)}, kinds)
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
    html = study_page(summary, results, {"hits": [{"shots": [], "lines": ["<u>line"]}]})
    assert not any(tag in html for tag in ("<b>real", "<i>", "<u>")) and "&lt;b&gt;real" in html


@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser_it_fits_and_fetches_nothing(browser, shortcut_html,  # noqa: F811
                                                  tmp_path, width):
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
    if width == 1200:  # no table has to be scrolled
        assert page.evaluate("""[...document.querySelectorAll('.scroll')].filter(
            e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))""") == []
    else:  # charts keep their size and are scrolled
        assert page.evaluate("Math.min(...[...document.querySelectorAll('.scroll > img')].map("
                             "e => e.getBoundingClientRect().width))") > 600
    context.close()
