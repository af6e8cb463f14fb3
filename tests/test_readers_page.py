"""The reading page, driven in a real browser from disk: rated by keyboard, closed, resumed,
exported and scored.
"""

import base64
import hashlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from minidiff.data import images
from minidiff.data.table import read_csv, write_table
from minidiff.evaluation.readers import answers, make, score

SECRET = bytes(range(32))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """Chromium: lasting(profile folder) and fresh(**options), each → a context of pages."""
    sync_api = pytest.importorskip("playwright.sync_api",
                                   reason="pip install playwright to drive the reading page")
    if not CHROMIUM:
        pytest.skip("no chromium on this machine to open the reading page in (apt install "
                    "chromium)")
    with sync_api.sync_playwright() as playwright:
        how = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        shared = playwright.chromium.launch(**how)
        yield SimpleNamespace(
            fresh=shared.new_context,
            lasting=lambda folder: playwright.chromium.launch_persistent_context(str(folder),
                                                                                 **how))
        shared.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of 24 images, 4 repeats and 2 controls, with 2 readers; (page, key)."""
    from readers_data import write_sets
    root = tmp_path_factory.mktemp("page")
    write_sets(root)
    cfg = make.Config(data=(str(root / "real"),), samples=(str(root / "made"),),
                      out=str(root / "out"),
                      key=str(root / "key"), per_label=6, readers=2, repeat=1 / 6, controls=2)
    page, _ = make.make(cfg, SECRET)
    return page, answers.read_key(root / "key" / "key.json")


def good_by_rule(item_id):
    return int(item_id, 16) % 3 > 0


def rate(page, key, reader, start, stop):
    """Answer images start … stop − 1 by keyboard as `good_by_rule` says; in part 2 the same rule
    says "generated".
    """
    orders = key.orders[reader - 1]
    listed = [(b, key.items[k]["id"]) for b, order in orders.items() for k in order]
    for at in range(start, stop):
        block, item = listed[at]
        if at and block != listed[at - 1][0]:
            page.wait_for_selector("#rest-title:has-text('Part 2')")
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
        k = at - (len(orders["quality"]) if block == "origin" else 0) + 1
        page.wait_for_function(
            f"document.getElementById('film').getAttribute('aria-label').startsWith('Image {k} "
            "of')")
        page.wait_for_timeout(25)
        rule = good_by_rule(item)
        page.keyboard.press("1" if rule == (block == "quality") else "2")
        if block == "quality" and not rule:
            page.keyboard.press("a")
            page.keyboard.press("t")
        page.keyboard.press(str(1 + at % 4))


def test_rated_by_keyboard_closed_resumed_exported_and_scored(browser, study, tmp_path):
    path, key = study
    url, asked = path.as_uri() + "?reader=2", []
    first = browser.lasting(tmp_path / "profile")
    page = first.new_page()
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url)
    page.focus("#go")
    page.keyboard.press("Enter")
    rate(page, key, 2, 0, 13)
    page.keyboard.press("p")
    assert page.is_visible("#rest") and not page.is_visible("#film")
    page.keyboard.press("p")
    # take the 13th back and give it again
    page.keyboard.press("u")
    rate(page, key, 2, 12, 13)
    # in the middle; it writes to disk as it goes
    page.close()
    first.close()

    second = browser.lasting(tmp_path / "profile")
    page = second.new_page()
    faults = []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.goto(path.as_uri())                                         # it knows the last reader
    assert page.input_value("#reader") == "2" and "14 of 54" in page.inner_text("#go")
    page.click("#go")
    rate(page, key, 2, 13, 54)
    page.wait_for_selector("#files button")
    files = []
    for kind in ("jsonl", "csv"):
        with page.expect_download() as got:
            page.click(f"#files button[data-code={kind}]")
        files.append(tmp_path / got.value.suggested_filename)
        got.value.save_as(files[-1])
    second.close()
    assert not faults and all(u.startswith(("file:", "data:", "blob:")) for u in asked), (faults,
                                                                                          asked)

    rows = answers.read_rows(files[0])
    assert rows == answers.read_rows(files[1]) and len(rows) == 54
    for row in rows:
        rule = good_by_rule(row["item"])
        assert row["answer"] == {("quality", True): "good", ("quality", False): "bad",
                                 ("origin", True): "generated",
                                 ("origin", False): "real"}[row["block"], rule]
        assert row["confidence"] == 1 + (row["position"] - 1) % 4 and row["ms"] > 0
        assert row["reasons"] == (["anatomy", "text_marker"] if row["answer"] == "bad" else [])
        assert row["undone"] == (row["position"] == 13)
    readings, remarks = answers.read_readings((str(files[0]), str(files[1])), key)
    assert len(readings) == 1 and "doubled" in remarks[0] and readings[0].missing == 0
    found = score.summary(key, readings)["readers"][0]
    for kind in score.KINDS:
        ids = [key.items[k]["id"] for k in key.where(kind=kind)]
        assert found[kind]["n"] == len(ids) == 12
    assert found["seconds"] > 0


def test_no_request_is_let_out_even_when_asked_for(browser, study):
    context = browser.fresh()
    page = context.new_page()
    page.goto(study[0].as_uri())
    blocked = page.evaluate("""async () => {
        const found = [];
        document.addEventListener('securitypolicyviolation', e => found.push(e.effectiveDirective));
        await fetch('https://example.com/').catch(() => 0);
        const image = new Image(); image.src = 'https://example.com/a.png';
        await new Promise(r => setTimeout(r, 200));
        const script = document.createElement('script');
        script.textContent = 'window.ran = 1'; document.head.append(script);
        return [found, window.ran];
    }""")
    context.close()
    assert {"connect-src", "img-src"} <= set(blocked[0]) and blocked[1] is None


def test_sha256_and_pixels_in_the_browser(browser, study):
    path, key = study
    html = path.read_text()
    source = re.search(r"function sha256\(string\) \{.*?\n\}\n", html, re.S)[0]
    context = browser.fresh(device_scale_factor=1, viewport={"width": 900, "height": 700})
    page = context.new_page()
    texts = ["", "abc", "ü€𝄞" * 17, *("x" * n for n in (55, 56, 63, 64, 65, 119, 120, 1000))]
    for text in texts:
        found = page.evaluate(f"text => {{ {source}; return sha256(text); }}", text)
        assert found == hashlib.sha256(text.encode()).hexdigest()
    page.goto(path.as_uri() + "?reader=1")
    page.click("#go")
    page.wait_for_timeout(200)
    data = json.loads(re.search(r'id="study">(.*?)</script>', html, re.S)[1])
    shown = np.array(Image.open(
        io.BytesIO(base64.b64decode(data["items"][data["orders"][0]["quality"][0]]["png"]))))
    film = "document.getElementById('film')"
    page.evaluate(f"{film}.style.width = {film}.style.height = '{len(shown)}px'; "
                  "window.dispatchEvent(new Event('resize'))")
    read = (f"Array.from({film}.getContext('2d').getImageData(0, 0, {film}.width, "
            f"{film}.height).data).filter((_, i) => i % 4 == 0)")
    # untouched to the grey level
    assert np.array_equal(np.reshape(page.evaluate(read), shown.shape), shown)
    page.keyboard.press("i")
    assert np.array_equal(np.reshape(page.evaluate(read), shown.shape), 255 - shown)
    page.keyboard.press("0")
    page.keyboard.press("ArrowUp")
    assert np.array_equal(np.reshape(page.evaluate(read), shown.shape),
                          np.minimum(shown.astype(int) + 6, 255))
    page.keyboard.press("ArrowDown")
    for _ in range(8):
        # 48 steps: twice the contrast
        page.keyboard.press("ArrowRight")
    wanted = np.clip((shown.astype(float) - 127.5) * 2 + 127.5, 0, 255)
    assert np.abs(np.reshape(page.evaluate(read), shown.shape) - wanted).max() <= 0.51
    page.keyboard.press("0")
    page.keyboard.press("+")
    assert not np.array_equal(np.reshape(page.evaluate(read), shown.shape), shown)      # larger
    context.close()


SMALL = """() => [...document.querySelectorAll('button, input')]
    .filter(e => e.checkVisibility()).map(e => {
    const r = e.getBoundingClientRect();
    return [e.id || e.textContent, r.width, r.height, r.left >= 0 && r.right <= innerWidth + 1];
}).filter(r => r[1] < 44 || r[2] < 44 || !r[3])"""


@pytest.mark.parametrize("width,height", [(820, 1180), (1180, 820), (1280, 800), (390, 844)])
def test_usable_by_touch_and_labelled(browser, study, width, height):
    context = browser.fresh(viewport={"width": width, "height": height}, has_touch=True)
    page = context.new_page()
    page.goto(study[0].as_uri() + "?reader=1")
    assert page.evaluate(SMALL) == []
    page.tap("#go")
    page.tap("#answers button[data-code=bad]")
    page.tap("#reasons button[data-code=artefact]")
    assert page.evaluate(SMALL) == []
    film = page.locator("#film").bounding_box()
    assert film["width"] == pytest.approx(film["height"],
                                          abs=1) and film["y"] >= 0 and film["x"] >= 0
    assert width < 560 or film["y"] + film["height"] <= height + 1 and film["width"] >= 0.55 * min(
        width, height)
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input')]
        .filter(e => e.checkVisibility() &&
        !(e.textContent.trim() || e.labels && e.labels.length)).length""")
    assert nameless == 0 and page.get_attribute("#film", "aria-label") == "Image 1 of 30"
    pressed = page.locator("[aria-pressed=true]").all_inner_texts()
    assert [text.split()[0] for text in pressed] == ["Bad", "Artefact"]
    page.tap("#confidence button[data-code='3']")
    page.wait_for_selector("#film[aria-label='Image 2 of 30']")
    page.keyboard.press("Tab")
    outline = page.evaluate("(s => s.outlineStyle + "
                            "s.outlineWidth)(getComputedStyle(document.activeElement))")
    # focus is to be seen
    assert outline == "solid3px"
    context.close()


def test_part_one_is_closed_once_part_two_began(browser, study):
    path, key = study
    context = browser.fresh()
    page = context.new_page()
    page.goto(path.as_uri() + "?reader=1")
    page.click("#go")
    n = len(key.orders[0]["quality"])
    rate(page, key, 1, 0, n)
    page.wait_for_selector("#rest-title:has-text('Part 2')")
    # still open here
    page.keyboard.press("u")
    rate(page, key, 1, n - 1, n)
    page.reload()
    page.click("#go")
    page.wait_for_selector("#rest-title:has-text('Part 2')")
    page.click("#back")
    page.wait_for_selector("#film[aria-label='Image 1 of 24']")
    page.keyboard.press("u")
    stored = page.evaluate("Object.assign({}, localStorage)")
    context.close()
    slot = f"minidiff-{key.study}-1-"
    assert {name for name in stored
            if name.startswith(slot)} == {slot + str(k) for k in (*range(1, n + 1), "undone")}
    assert json.loads(stored[slot + "undone"]) == {str(n): 1}


def test_a_window_is_cut_from_all_of_16_bits(browser, tmp_path):
    """The values that 16 bits have and 8 do not are on the page, and a narrow window shows them."""
    from readers_data import write_sets
    write_sets(tmp_path, n=3, labels=("a",))
    rng, whole = np.random.default_rng(1), []
    for name in ("real", "made"):
        rows = read_csv(tmp_path / name / "metadata.csv", ("file_name",))
        for row in rows:
            picture = rng.integers(30000, 34000, (48, 48)).astype(np.uint16)
            images.write(tmp_path / name / row["file_name"], picture)
            whole += [] if row.get("split") == "train" else [picture]
        write_table(tmp_path / name / "metadata.csv",
                    [{**row, "window": "-1000 1000 HU"} for row in rows])
    cfg = make.Config(data=(str(tmp_path / "real"),), samples=(str(tmp_path / "made"),),
                      out=str(tmp_path / "out"), key=str(tmp_path / "key"), per_label=3, readers=1,
                      repeat=0, controls=0)
    path, _ = make.make(cfg, SECRET)
    context = browser.fresh(device_scale_factor=1, viewport={"width": 900, "height": 700})
    page = context.new_page()
    page.goto(path.as_uri() + "?reader=1")
    page.click("#go")
    page.wait_for_timeout(200)
    study = json.loads(re.search(r'id="study">(.*?)</script>', path.read_text(), re.S)[1])
    rows = np.array(Image.open(io.BytesIO(base64.b64decode(
        study["items"][study["orders"][0]["quality"][0]]["png"]))), int)
    shown = 256 * rows[:48] + rows[48:]
    assert any(np.array_equal(shown, picture) for picture in whole)
    film = "document.getElementById('film')"
    page.evaluate(f"{film}.style.width = {film}.style.height = '48px'; "
                  "window.dispatchEvent(new Event('resize'))")
    read = (f"Array.from({film}.getContext('2d').getImageData(0, 0, 48, 48).data)"
            ".filter((_, i) => i % 4 == 0)")
    assert page.inner_text("#scale") == "Centre 0, width 2000 HU"
    for steps, times, greys in ((0, 1, 16), (12, 8, 120)):  # as many greys as the window can show
        for _ in range(steps):
            page.keyboard.press("ArrowRight")
        assert page.inner_text("#scale").endswith(f"width {2000 // times} HU")
        found = np.reshape(page.evaluate(read), (48, 48))
        wanted = np.clip((shown / 257 - 127.5) * times + 127.5, 0, 255)
        assert np.abs(found - wanted).max() <= 0.51 and len(np.unique(found)) >= greys
    context.close()


def test_one_set_of_8_bits_makes_all_8(tmp_path):
    from readers_data import write_sets
    write_sets(tmp_path, n=3, labels=("a",))
    for row in read_csv(tmp_path / "real/metadata.csv", ("file_name",)):
        image = images.read(tmp_path / "real" / row["file_name"])
        images.write(tmp_path / "real" / row["file_name"], images.in_depth(image, 16))
    cfg = make.Config(data=(str(tmp_path / "real"),), samples=(str(tmp_path / "made"),),
                      out=str(tmp_path / "out"), key=str(tmp_path / "key"), per_label=3, readers=1)
    path, key = make.make(cfg, SECRET)
    study = json.loads(re.search(r'id="study">(.*?)</script>', path.read_text(), re.S)[1])
    sizes = {Image.open(io.BytesIO(base64.b64decode(it["png"]))).size for it in study["items"]}
    assert study["bits"] == 8 and sizes == {(48, 48)} and study["window"] == ""
