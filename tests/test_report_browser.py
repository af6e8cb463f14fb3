"""The report in a real browser, from disk: nothing fails, nothing is fetched, every picture is
there, and it fits.
"""

import pytest
from test_readers_page import browser  # noqa: F401 - the fixture

import evaluate
from minidiff.classification.predictor import Predictor
from minidiff.data import images, phantom
from minidiff.data.table import write_table
from minidiff.variables import Category

LOADED = "[...document.images].map(i => i.complete && i.naturalWidth > 0)"
WIDE = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.scroll')).map(e => e.tagName + '.' + e.className)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a small phantom run with a judge, under a long name; its URL."""
    root = tmp_path_factory.mktemp("browser")
    phantom.write(root / "real", n=150, size=32, seed=0)
    folder, rows = root / f"samples-{'of-a-long-name-' * 4}", []
    for i in range(75):
        p = phantom.phantom(1, i, 32)
        images.write(folder / f"images/{i}.png", p.image)
        rows.append({"file_name": f"images/{i}.png",
                     **{c: p.row[c] for c in ("label", "sex", "age", "view")}})
    write_table(folder / "metadata.csv", rows)
    Predictor([Category("label", ("covid", "normal", "pneumonia")), Category("sex", ("F", "M"))],
              width=8, size=32).save(root / "classifier/judge")
    absent = {name: str(root / name) for name in ("vae", "diffusion", "matrix")}
    evaluate.run_report(evaluate.Config(data=(str(root / "real"),), samples=str(folder),
                                        out=str(root / "report"),
                                        classifier=str(root / "classifier"), repeats=10, **absent))
    return (root / "report/report.html").as_uri()


@pytest.mark.parametrize("width,height", [(1280, 900), (360, 740)])
def test_the_report_opens_and_fits(browser, report, width, height):  # noqa: F811
    context = browser.fresh(viewport={"width": width, "height": height})
    page, asked, faults = context.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    page.goto(report)
    loaded = page.evaluate(LOADED)
    assert len(loaded) > 40 and all(loaded)
    assert not faults and [u for u in asked if not u.startswith("data:")] == [report], (faults,
                                                                                        asked[:5])
    assert page.evaluate(
        "document.documentElement.scrollWidth") <= width and page.evaluate(WIDE) == []
    assert page.evaluate("[...document.querySelectorAll('nav a')].every(a => "
                         "document.querySelector(a.hash))")
    assert page.evaluate("[...document.images].every(i => i.alt)")
    marks = page.evaluate("[...document.querySelectorAll('.answer')].map(e => getComputedStyle(e, "
                          "'::before').content)")
    # an answer is more than a colour
    assert marks and set(marks) <= {'"✓ "', '"✗ "', '"? "'}
    context.close()


def test_a_wide_table_scrolls_inside_itself(browser, report):  # noqa: F811
    context = browser.fresh(viewport={"width": 360, "height": 740})
    page = context.new_page()
    page.goto(report)
    inner = page.evaluate("[...document.querySelectorAll('#numbers .scroll')].map(e => "
                          "[e.scrollWidth, e.clientWidth])")
    assert inner and all(wide > seen and seen <= 360 for wide, seen in inner)
    context.close()


def test_printed_it_is_whole_pages_without_the_menu(browser, report):  # noqa: F811
    context = browser.fresh(viewport={"width": 700, "height": 1000})
    page = context.new_page()
    page.goto(report)
    page.emulate_media(media="print")
    assert not page.is_visible("nav") and page.is_visible("#verdict")
    assert page.pdf(format="A4").startswith(b"%PDF")
    overflow = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => "
                             "getComputedStyle(e).overflowX)")
    # no number behind a scroll bar
    assert set(overflow) == {"visible"}
    context.close()
