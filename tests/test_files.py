"""data.files: what is known of one file, its border, and letters burned into it."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from minidiff.data import files, phantom

SIDE = 96


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


def test_what_was_read_before_a_kill_is_taken_as_it_was(tmp_path, monkeypatch):
    rng, names = np.random.default_rng(0), [tmp_path / f"{k}.png" for k in range(8)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 30), np.uint8)).save(name)
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "somebody")
    picture = Image.new("L", (256, 256), 20)
    ImageDraw.Draw(picture).text((20, 20), "SMITH JOHN", 255, ImageFont.load_default(14))
    picture.save(names[1], pnginfo=info)
    names[2].write_bytes(b"no picture")
    whole, squares = files.read_facts(names, 16)
    assert whole[1].text and whole[1].carries and whole[2].fault
    monkeypatch.setattr(files, "SHARD", 3)
    facts, read = files.facts, []

    def killed(name, square):
        if name == names[4]:
            raise KeyboardInterrupt
        return facts(name, square)

    def counted(name, square):
        read.append(name)
        return facts(name, square)

    monkeypatch.setattr(files, "facts", killed)
    with pytest.raises(KeyboardInterrupt):
        files.read_facts(names, 16, tmp_path / "kept")
    monkeypatch.setattr(files, "facts", counted)
    for again in (names[3:], []):  # after a kill, and once more
        read.clear()
        found, same = files.read_facts(names, 16, tmp_path / "kept")
        assert sorted(read) == again and (same == squares).all()
        found = [f._replace(text=tuple(map(tuple, f.text))) for f in found]
        assert list(map(repr, found)) == list(map(repr, whole))
        for one, other in zip(found, whole):
            assert all(np.array_equal(a, b) for a, b in zip(one[-3:], other[-3:]))
            assert list(map(type, one)) == list(map(type, other))


def test_facts_of_tiff_and_of_a_hot_pixel(tmp_path):
    x = phantom.phantom(0, 0, SIDE).image
    wide = x.astype(np.uint16) * 16
    Image.fromarray(x[:40]).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    Image.fromarray(x).save(tmp_path / "named.tif", tiffinfo={270: "Doe^Jane"})
    Image.fromarray(wide.astype(np.float32)).save(tmp_path / "float.tif")
    wide[7, 7] = 65535
    Image.fromarray(wide).save(tmp_path / "hot.tif")
    names = ("turned.tif", "named.tif", "float.tif", "hot.tif")
    known, _ = files.read_facts([tmp_path / name for name in names], 32)
    assert [f.bits for f in known] == [8, 8, 32, 16] and {f.format for f in known} == {"TIFF"}
    assert [f.carries for f in known] == [(), ("EXIF",), (), ()]
    assert [f.turned for f in known] == [True, False, False, False]
    assert [f.outliers for f in known] == [False, False, False, True]


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


def test_of_many_images_some_tell_the_side_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOOKED_AT", 10)
    for k in range(20):
        Image.new("L", (16 + k % 2, 40)).save(tmp_path / f"{k:02d}.png")
    paths = sorted(map(str, tmp_path.glob("*.png")))
    assert files.typical_side(paths[:19], 100) == 16
    assert files.typical_side(paths[1:] + paths[1:2], 100) == 17  # every second of twenty
