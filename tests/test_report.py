"""The report's page: every section with and without its input, and rendered again from files."""

import base64
import json
import math
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_answers import rows, share

from minidiff.data import images
from minidiff.errors import InputError
from minidiff.evaluation import pages
from minidiff.evaluation.format import Row, Table, jsonable, num
from minidiff.evaluation.pages import pictures, report

SECTIONS = ["verdict", "realism", "copies", "pictures", "collection", "distances", "numbers",
            "variety", "conditions", "agreement", "matrix", "study", "training", "provenance"]
VOID = {"meta", "img", "br"}
WITHIN = ("within_r", "within_low", "within_high")
DOT = images.png_bytes(np.zeros((4, 4), np.uint8))


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps text, ids and whatever would be fetched."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.fetched, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        assert tag not in ("script", "link", "iframe", "object")
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.fetched += [v for k, v in attrs.items()
                         if k in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def bare(**more):
    data = {"folders": ["a <b> & c"], "size": 64, "n_train": 120, "n_heldout": 120,
            "heldout_labels": {"normal": 60},
            "patients_assumed": True, "notes": ["<script>alert(1)</script>"]}
    samples = {"folder": "runs/x/samples", "n": 83, "labels": {"normal": 40}}
    return {"data": data, "samples": samples, "distances": [], **more}


def test_page_without_any_optional_input(tmp_path):
    path = report.write(tmp_path, bare(), {})
    page = Page(path.read_text())
    assert page.ids == SECTIONS
    assert all(text in page.text for text in (
        "Not for diagnosis", "assumed to be of another patient", "python classify.py",
        "python evaluate.py matrix"))
    assert "<script>alert(1)</script>" in page.text                          # as text, escaped
    assert all(url.startswith("#") for url in page.fetched)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == []


def test_page_with_every_input(tmp_path):
    shares = ["near_share", "near_low", "near_high", "near_heldout_share", "near_p", "closest_p",
              "q05", "q50", "copying_z",
              "copying_p", "auth_pct", "auth_heldout", "auth_p", "calibrated_p"]
    spread = {"median": 0.1, "low": 0.0, "high": 0.2}
    point = {"extractor": "pixels-pca64",
             **dict.fromkeys(("KD", "FD", "KD_floor", "FD_floor"), spread)}
    kd = {"KD": 0.1, "KD_low": 0.0, "KD_high": 0.2, "KD_floor": spread, "too_few": False}
    cell = {"extractor": "pixels-pca64", "condition": "sex", "value": "F", "n": 40, "m": 30}
    audit = {"auroc": 0.7, "by_patient": [0.62, 0.78], "p": 0.001, "tpr": 0.1, "tpr_p": 0.01,
             "tpr_most": 0.2, "false_alarms": 0, "n_train": 60, "n_heldout": 60,
             "patients_train": 50, "patients_heldout": 40, "random_split": True,
             "reference": "runs/z", "run": "runs/y", "made": False}
    audit["likelihood"] = audit | {"n_train": 31}
    space = {"space": "pixels", "n": 80, "train": 120, "heldout": 120, "closest": 20,
             "closest_train": 10, "closest_expected": 10.0, "q_size": 120, "calibrated_near": 4,
             **dict.fromkeys(shares, 0.5)}
    known = space | {"space": "classifier", "recognition": {
        "n": 70, "patients": 33, "found": 0.31, "low": 0.2, "high": 0.4, "chance": 0.01,
        "near": 0.2, "near_heldout": 0.1}}
    named = {"limit": 0.09, "n": 80, "found": 14, "heldout": 0, "seen": None, "at_most": None,
             "probes": 64, "probes_found": 60,
             "images": [{"fake": k, "train": k, "distance": 0.0123} for k in range(14)]}
    arm = {"test_set": "test", "seed": 0, "accuracy": 0.9}
    result = bare(
        distances=rows(),
        neighbours={"verdict": "14 of 80 synthetic images are copies of a training image",
                    "suspected": True, "spaces": [space, known], "fewest": 5, "named": named,
                    "closest": [{"d_train": 1.0, "d_heldout": 1.1}]},
        extractors=[{"name": "pixels-pca64", "identity": "abc123"}],
        growth=[point | {"n": 10}, point | {"n": 40}],
        conditions=[cell | kd, cell | {"value": "M", "n": 3, "too_few": True}],
        variety=[{"label": "normal", "measure": "MS-SSIM", "n": 40, "too_few": False,
                  "synthetic": 0.5, "real": 0.4, "range": spread},
                 {"label": "rare", "measure": "MS-SSIM", "n": 3, "too_few": True}],
        duplicates={"n": 120, "exact": 1, "near": 2, "surplus": 2, "across_patients": 1},
        membership=audit, commands={"report": "python evaluate.py --out <x>",
                                    "samples": "python sample.py", "vae": ""},
        agreement=[share(99, 100, "held-out real"), share(95, 100, "synthetic"),
                   {"variable": "age", "set": "synthetic", "n": 0},
                   {"variable": "age", "set": "held-out real", "n": 3, "kind": "number",
                    "r": math.nan, "low": math.nan,
                    "high": math.nan, "slope": 1.0, "mae": 4.0, **dict.fromkeys(WITHIN, math.nan)}],
        classifier=[{**arm, "arm": "real"},
                    {**arm, "arm": "real+synthetic", "n": 50, "balanced_accuracy": None}],
        study={"arms": [{"arm": "real", "test_set": "test", "accuracy": 0.9, "accuracy_sd": None}]},
        vae={"psnr": 30.1, "psnr_pca64": 27.0}, provenance={"command": "evaluate.py"},
        configs={"runs/x": {"kind": "vae"}, "none": None})
    shot = {"png": DOT, "label": "normal", "d": 1.0, "p": None}
    strip = {"condition": "sex", "value": "<F>", "n": 9, "m": 8, "shown": 6, "heldout": DOT,
             "synthetic": DOT}
    drawn = {"labels": [strip], "grids": [strip], "pairs": [(DOT, DOT, DOT)], "rebuilt": DOT,
             "losses": {"vae": DOT}, "best": [shot], "worst": [shot | {"p": 0.25}],
             "beside": [(DOT, DOT, DOT)], "collection": [strip], "named": [(DOT, DOT)] * 12}
    html = report.write(tmp_path, result, drawn).read_text()
    page = Page(html)
    assert page.ids == SECTIONS
    assert html.count("<img") == 24 + 2 + 3 + 1 + 1 + 3 + 2 + 2 + 3 + 1 + 1 + 1
    assert all(url.startswith(("#", "data:image/png;base64,")) for url in page.fetched)
    assert "denoising error, calibrated" in html and "likelihood, calibrated" in html
    assert ">31<" in html and "with one probe" in page.text
    assert all(text in page.text
               for text in ("n < 20", "30.1 dB", "no known cell", "abc123", "1.1", "0.0123",
                            "And 2 more, in report.json", "denoising error, calibrated",
                            "python evaluate.py --out <x>", "p 25.0 %", "1 exact",
                            "runs/y is not the model that made these samples"))
    # below pictures, collection; provenance
    assert page.text.count("python sample.py") == 3
    told = json.loads((tmp_path / "report.json").read_text())["verdict"]
    assert {"question": "Does the model keep private who was in its training set?",
            "answer": "no"}.items() <= told[1].items()
    assert not re.search(r"\bnan\b", page.text)
    # the same numbers, the same page
    assert report.write(tmp_path, result, drawn).read_text() == html
    (tmp_path / "report.html").unlink()
    assert report.write_page(tmp_path).read_text() == html


def test_a_page_needs_its_numbers_and_its_pictures(tmp_path):
    with pytest.raises(InputError, match="report.json: no such file"):
        report.write_page(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "report.html").write_text("with pictures")
    with pytest.raises(InputError, match="without pictures.json"):
        report.write_page(tmp_path)
    assert (tmp_path / "report.html").read_text() == "with pictures"


@pytest.mark.parametrize("size,side", [(32, 128), (64, 128), (96, 192), (224, 224), (512, 256)])
def test_the_tiles_of_a_sheet_are_128_pixels_or_more(size, side, tmp_path):
    x = torch.randint(0, 255, (8, 3, size, size), dtype=torch.uint8)
    (tmp_path / "x.png").write_bytes(pictures.sheet(x))
    assert images.read(tmp_path / "x.png").shape[1:] == (2 * side + 4, 6 * side + 20)


@pytest.mark.parametrize("size, shown", [(64, 64), (511, 511), (512, 256), (800, 266)])
def test_images_of_512_pixels_and_more_are_shown_reduced(size, shown):
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, size, size), np.uint8))
    (pair,) = pictures.pairs([{"fake": 0, "train": 1}], {"synthetic": x, "train": x})
    assert pair == tuple(images.png_bytes(pictures.reduced(image)) for image in x)
    assert pictures.reduced(x).shape == (2, 3, shown, shown)
    if size == shown:
        assert pair == tuple(map(images.png_bytes, x))
    else:
        k = size // shown
        assert float(pictures.reduced(x)[1, 2, 0, 1]) == round(x[1, 2, :k, k : 2 * k].double()
                                                               .mean().item())


def test_a_page_that_would_be_too_large_shows_all_its_images_at_one_smaller_scale_and_says_so():
    rng = np.random.default_rng(0)
    noise = [images.png_bytes(rng.integers(0, 256, shape, np.uint8))
             for shape in ((64, 64), (3, 64, 64), (128, 40)) for _ in range(3)]
    chart = images.png_bytes(np.repeat(np.arange(300, dtype=np.uint8)[None] // 2, 200, 0))
    page = "<h1></h1><nav></nav>" + "".join(
        f'<img alt="data:image/png;base64,A" src="{pages.data_uri(png)}">'
        for png in [chart, *noise])
    assert pages.fitted(page, len(page)) == page
    for most in (len(page) * 9 // 10, len(page) // 2, len(page) // 6):
        small = pages.fitted(page, most)
        assert most / 2 < len(small.encode()) <= most
        found = [base64.b64decode(text) for text in pages.PICTURE.findall(small)]
        sides = np.array([struct.unpack(">II", png[16:24]) for png in found[1:]])
        assert found[0] == chart and len(found) == 10
        share = float(re.search(r"shown at ([\d.]+) % of\s+their width", small)[1]) / 100
        assert np.abs(sides - share * np.array([(64, 64)] * 6 + [(40, 128)] * 3)).max() <= 1
        assert small.index("shown at") < small.index("<nav>")


def test_a_picture_with_equal_channels_is_made_smaller_in_grey():
    grey = np.random.default_rng(0).integers(0, 256, (1, 32, 32), np.uint8)
    small = images.smaller(images.png_bytes(grey.repeat(3, 0)), 0.5)
    assert small == images.smaller(images.png_bytes(grey), 0.5)
    assert struct.unpack(">IIBB", small[16:26]) == (16, 16, 8, 0)
    page = f'<nav></nav><img src="{pages.data_uri(images.png_bytes(grey.repeat(3, 0)))}">'
    found = pages.fitted(page, len(page) - 1)   # as large as before
    assert found == f'<nav></nav><img src="{pages.data_uri(images.png_bytes(grey))}">'


@pytest.mark.slow
def test_the_page_of_noise_at_512_pixels_has_less_than_10_mb(tmp_path):
    """Noise cannot be compressed: no real image takes more."""
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 3, 512, 512), np.uint8))
    triples = 10 * pictures.pairs([{"fake": k, "train": k + 1, "heldout": k + 2} for k in range(5)],
                                  dict.fromkeys(("synthetic", "train", "heldout"), x))
    strip = {"condition": "sex", "value": "F", "n": 9, "m": 8, "shown": 16,
             **dict.fromkeys(("heldout", "synthetic"), pictures.sheet(x))}
    shot = {"png": triples[0][0], "label": "normal", "d": 1.0, "p": None}
    result = bare()
    result["data"]["size"] = 512
    page = report.write(tmp_path, result, {
        "labels": [strip] * 3, "grids": [strip] * 3, "pairs": triples[:20], "best": [shot] * 12,
        "worst": [shot] * 12, "beside": triples[20:28], "collection": [strip] * 6,
        "named": triples[28:40]})
    assert (tmp_path / "pictures.json").stat().st_size > 5e7
    assert 5e6 < page.stat().st_size < 1e7
    assert "512 pixels a side and are shown with 256" in Page(page.read_text()).text


def test_marks():
    assert [num(x) for x in (None, math.nan, -0.25, 12345.6, 0,
                             0.00012)] == ["–", "–", "−0.25", "12346", "0", "1.2e−04"]
    assert jsonable({"a": (math.inf, np.float64(2.0), "x")}) == {"a": [None, 2.0, "x"]}


def test_a_matrix_is_shown_with_its_state():
    sets = [{"name": name, "kind": "real", "label": "a", "part": part, "too_few": ""}
            for name, part in (("a · train", "train"), ("a · held-out", "held-out"))]
    cell = {"extractor": "pixels", "confounded": False, "KD": 0.5}
    found = {"status": "INVALID", "faults": ["blur (a) was not caught"],
             "controls": [{"caught": True}, {"caught": False}], "config": {"out": "runs/m"},
             "rows": sets, "columns": sets, "extractors": [{"name": "pixels"}],
             "cells": [cell | {"row": r["name"], "column": c["name"]} for r in sets for c in sets]}
    html = report.render(bare(), {"matrix": found})
    assert html.count("<img") == 1
    text = " ".join(Page(html).text.split())
    assert all(x in text for x in ("INVALID", "blur (a) was not caught", "1 of 2 control sets"))


def test_a_row_that_was_not_measured_says_why():
    row = {"extractor": "x", "label": "a", "set": "synthetic", "n": 40, "m": 30, "too_few": True}
    text = Page(report.render(bare(distances=[row, row | {"label": "b", "m": 19}]), {})).text
    # in each table; the former in the note, too
    assert text.count("one patient") == 3 + 1 and text.count("n < 20") == 3
    cell = {"extractor": "x", "condition": "sex", "value": "F", "n": 19, "m": 40, "too_few": True}
    assert "n < 20" in Page(report.render(bare(conditions=[cell]), {})).text


def test_a_table_is_text_and_its_cells_are_escaped():
    table = Table(["set", "n"], [["<b>", 12], Row(["rare", "n < 20"], "small"), ["c"]])
    assert table.numeric() == [False, True] and table.texts()[2] == ["c", ""]
    assert table.text().split("\n")[1] == "  <b>       12"
    html = pages.ENVIRONMENT.get_template("macros.html").module.table(table)
    assert '<tr class="small"><td>rare</td><td class="n">n &lt; 20</td>' in html
    assert "<td>&lt;b&gt;</td>" in html


def test_distances_are_called_kid_and_fid_in_inceptions_features_alone():
    made = [r | {"extractor": name} for name in ("inception-clean-fid", "pixels-pca64")
            for r in rows()]
    text = Page(report.render(bare(distances=made), {})).text
    assert "KID" in text and "kernel distance" in text and "synthetic normal lies at a KID" in text


def without(rows, *names):
    return [{k: v for k, v in r.items() if not k.startswith(names)} for r in rows]


def test_a_number_that_an_older_report_lacks_is_a_dash():
    made = rows()
    assert "MIND" in Page(report.render(bare(distances=made), {})).text
    for names in (["C2ST"], ["coverage"], ["KD_floor"], ["FD_halves"], ["KD_p"], ["equal_n"]):
        Page(report.render(bare(distances=without(made, *names)), {}))
    old = [r if r["set"] == "synthetic" else without([r], "density")[0] for r in made]
    assert "<td>–</td>" in report.render(bare(distances=old), {})
    Page(report.render(bare(distances=without(made, *report.AT_EQUAL_N)), {}))


def test_a_report_of_another_version_is_refused_by_its_version(tmp_path):
    report.write(tmp_path, bare(provenance={"minidiff": "0.0.9"}), {})
    result = json.loads((tmp_path / "report.json").read_text())
    del result["samples"]["n"]
    (tmp_path / "report.json").write_text(json.dumps(result))
    (tmp_path / "report.html").write_text("as it was")
    with pytest.raises(InputError, match=r"minidiff 0\.0\.9 made it, .* cannot render it: .*'n'"):
        report.write_page(tmp_path)
    assert (tmp_path / "report.html").read_text() == "as it was"


def test_growth_is_drawn_without_what_one_patient_cannot_give():
    none = dict.fromkeys(("median", "low", "high"))
    some = {"median": 0.1, "low": 0.0, "high": 0.2}
    growth = [{"extractor": "x", "n": n, "KD": none, "KD_floor": None, "FD": some, "FD_floor": some}
              for n in (10, 20)]
    assert report.render(bare(growth=growth), {})
    assert report.growth_chart(growth).startswith(b"\x89PNG")


def test_the_autoencoder_is_named_by_what_was_measured():
    def told(**vae):
        return " ".join(Page(report.render(bare(vae=vae), {})).text.split())

    assert "at 30.1 dB PSNR." in told(psnr=30.1)
    assert "pixels reach 27.0 dB" in told(psnr=30.1, psnr_pca64=27.0)
    assert all("dB" not in text for text in (told(), told(psnr=None), told(psnr_pca64=27.0)))


def test_a_floor_of_fewer_images_says_of_how_many():
    made = [r | {"KD_floor": r["KD_floor"] | {"n": 50, "m": 33}} if r["label"] == "covid" else r
            for r in rows()]
    text = " ".join(Page(report.render(bare(distances=made), {})).text.split())
    assert text.count("(covid: at 50 and 33, as there are no more real images)") == 1
    assert "), n = 50, 33" in text
    assert "no more real images" not in Page(report.render(bare(distances=rows()), {})).text


def test_arms_with_synthetic_images_are_marked():
    arms = [{"arm": arm, "test_set": "test", "accuracy": 0.9} for arm in ("real", "real+synthetic")]
    classifier = [{**a, "seed": 0} for a in arms]
    html = report.render(bare(classifier=classifier, study={"arms": arms}), {})
    assert html.count('<tr class="own') == 1
