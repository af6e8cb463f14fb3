"""data.compression: formats and qualities of files, and which sides differ."""

import json

import numpy as np
import pytest
from PIL import Image

from minidiff.data import phantom
from minidiff.data.compression import compression, differ, difference, quality, told
from minidiff.evaluation import fid as rooms

GREY = Image.fromarray(phantom.phantom(0, 0, 64).image)


def saved(folder, n, ending="png", kind=None, **options):
    folder.mkdir(exist_ok=True)
    for k in range(n):
        x = Image.fromarray(phantom.phantom(1, k, 32).image)
        x.save(folder / f"{kind or ending}{options.get('quality', '')}-{k:03d}.{ending}", kind,
               **options)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("q", [1, 25, 49, 50, 51, 75, 80, 90, 95, 99, 100])
def test_the_quality_is_the_one_that_was_asked_for(tmp_path, q, mode):
    GREY.convert(mode).save(tmp_path / "a.jpg", quality=q)
    assert compression([tmp_path / "a.jpg"]) == {"JPEG": 1, "quality": [q, q, q]}


def test_tables_of_other_programs_have_a_near_quality():
    with_sense = np.clip(np.arange(64) // 4 + 2, 1, 255)  # finer than 75, coarser than 95
    assert 75 < quality(with_sense) < 95
    assert quality([1] * 64) == 100 and quality([255] * 64) == 1


def test_formats_are_counted(tmp_path):
    saved(tmp_path, 3)
    saved(tmp_path, 2, "jpg", "JPEG", quality=80)
    saved(tmp_path, 1, "jfif", "JPEG", quality=95)
    saved(tmp_path, 1, "webp", lossless=True)
    saved(tmp_path, 1, "tif", compression="jpeg")
    GREY.save(tmp_path / "lossy.webp", quality=70)
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    found = compression(sorted(tmp_path.iterdir()))
    assert found == {"PNG": 3, "JPEG": 3, "lossless WEBP": 1, "TIFF of JPEG": 1, "WEBP": 1,
                     "quality": [80, 80, 95]}
    assert told(found) == ("3 JPEG of quality 80 (80 to 95), 3 PNG, 1 TIFF of JPEG, 1 WEBP, 1 "
                           "lossless WEBP")
    assert told({"PNG": 9}) == "PNG" and told({}) == "none"
    assert told({"JPEG": 1100, "quality": [90, 90, 90]}) == "JPEG of quality 90"


JPEG = {"JPEG": 100, "quality": [85, 90, 95]}


@pytest.mark.parametrize("a,b,yes", [
    ({"PNG": 9}, {"PNG": 100}, False), ({"PNG": 9}, {"BMP": 3, "TIFF": 1, "PNG": 4}, False),
    ({"PNG": 9}, {"lossless WEBP": 3}, False), ({"PNG": 9}, JPEG, True),
    ({"PNG": 9}, {"WEBP": 3}, True), (JPEG, {"TIFF of JPEG": 5}, True), (JPEG, JPEG, False),
    (JPEG, {"JPEG": 7, "quality": [50, 94, 100]}, False),
    (JPEG, {"JPEG": 7, "quality": [50, 95, 100]}, True),
    ({"PNG": 96, "JPEG": 4, "quality": [90, 90, 90]}, {"PNG": 9}, False),
    ({"PNG": 95, "JPEG": 5, "quality": [90, 90, 90]}, {"PNG": 9}, True), ({}, {}, False),
])
def test_sides_differ_where_they_lose_different_things(a, b, yes):
    assert differ(a, b) == differ(b, a) == yes
    assert bool(difference(a, b, ("real", "synthetic"))) == yes


def test_fid_names_the_formats_and_warns(tmp_path, capsys):
    for name, kind in (("real", {"ending": "jpg", "kind": "JPEG", "quality": 75}),
                       ("made", {"ending": "png"}), ("more", {"ending": "bmp"})):
        saved(tmp_path / name, 14, **kind)

    def measured(a, b):
        rooms.run_fid(rooms.FIDConfig(folders=(str(tmp_path / a), str(tmp_path / b)),
                                      extractor="pixels", draws=0, out=str(tmp_path / "out.json")))
        return capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())

    text, result = measured("real", "made")
    assert f"files: {tmp_path / 'real'}: JPEG of quality 75; {tmp_path / 'made'}: PNG" in text
    assert "note: the files are compressed differently (real: JPEG of quality 75; synthetic: PNG)" \
        in text
    assert result["files"] == [{"JPEG": 14, "quality": [75, 75, 75]}, {"PNG": 14}]
    assert result["note"].startswith("the files are compressed differently")
    text, result = measured("made", "more")
    assert "compressed differently" not in text and result["note"] == ""
