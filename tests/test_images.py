"""data.images: every kind of file that comes in, every kind that is refused, and the square
geometry.
"""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.data import images
from minidiff.errors import InputError

CXR = Path(os.environ.get("MINIDIFF_CXR", Path(__file__).parents[2] / "shared" / "cxr"))
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
TURN = np.pad(np.full((2, 3), 200, np.uint8), ((0, 2), (0, 5)))  # bright upper left corner, 4 x 8


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def grey(array: np.ndarray = RAMP) -> Image.Image:
    return Image.fromarray(array)


# --- what comes in


def test_grey_comes_back_as_it_was(tmp_path):
    images.write(tmp_path / "a.png", RAMP)
    assert np.array_equal(images.read(tmp_path / "a.png"), RAMP[None])


def test_colour_comes_back_as_it_was_and_from_a_tensor(tmp_path):
    colour = torch.from_numpy(np.stack([RAMP, RAMP[::-1].copy(), RAMP.T.copy()]))
    images.write(tmp_path / "a.png", colour)
    assert np.array_equal(images.read(tmp_path / "a.png"), colour.numpy())


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_grey_in_disguise_is_one_channel(tmp_path, mode):
    path = save(tmp_path / "a.png", grey().convert(mode))
    assert np.array_equal(images.read(path), RAMP[None])


def test_one_odd_pixel_makes_three_channels(tmp_path):
    rgb = np.repeat(RAMP[:, :, None], 3, 2)
    rgb[3, 4, 2] ^= 1
    assert images.read(save(tmp_path / "a.png", Image.fromarray(rgb))).shape == (3, 16, 16)


def test_palette_is_looked_up_not_read_as_grey(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([90, 90, 90, 10, 20, 30])
    assert images.read(save(tmp_path / "a.png", image)).tolist() == [[[90, 10]], [[90, 20]],
                                                                     [[90, 30]]]


def test_one_bit_is_black_and_white(tmp_path):
    image = Image.fromarray(np.array([[True, False]]))
    assert images.read(save(tmp_path / "a.png", image)).tolist() == [[[255, 0]]]


def test_half_transparent_lies_on_black(tmp_path):
    image = Image.merge("LA", [grey(np.full((2, 2), 200, np.uint8)),
                               grey(np.array([[255, 0], [255, 51]], np.uint8))])
    assert images.read(save(tmp_path / "a.png", image)).tolist() == [[[200, 0], [200, 40]]]


def test_16_bit_is_scaled_by_its_own_range(tmp_path):
    # 12 bits, as a detector gives
    wide = np.linspace(1000, 5095, 256).round().astype(np.uint16).reshape(16, 16)
    read = images.read(save(tmp_path / "a.png", Image.fromarray(wide)))
    expected = np.rint((wide - 1000.0) * 255 / 4095).astype(np.uint8)
    assert np.array_equal(read, expected[None]) and read.min() == 0 and read.max() == 255


def test_16_bit_of_one_value_keeps_its_grey(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(np.full((2, 2), 257 * 99, np.uint16)))
    assert (images.read(path) == 99).all()


def test_constant_image_is_read(tmp_path):
    assert (images.read(save(tmp_path / "a.png", grey(np.full((5, 5), 7, np.uint8)))) == 7).all()


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path, extension):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    options = {"quality": 100} if extension == "jpg" else {}
    read = images.read(save(tmp_path / f"a.{extension}", grey(TURN), exif=exif, **options))
    assert read.shape == (1, 8, 4) and np.abs(read[0].astype(int) - np.rot90(TURN, -1)).max() < 12


def test_content_counts_and_not_the_extension(tmp_path):
    path = save(tmp_path / "a.png", grey(np.full((8, 8), 50, np.uint8)), format="JPEG")
    assert (images.read(path) == 50).all()


def test_metadata_of_the_input_does_not_come_out(tmp_path):
    images.write(tmp_path / "a.png", RAMP, {"patient": "Doe, Jane"})
    assert Image.open(tmp_path / "a.png").text == {"patient": "Doe, Jane"}
    images.write(tmp_path / "b.png", images.read(tmp_path / "a.png"))
    assert b"Doe" in (tmp_path / "a.png").read_bytes() and b"Doe" not in (tmp_path
                                                                          / "b.png").read_bytes()


# --- what is refused


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT",
                                                 zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def flip_bit(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 20
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def retagged(tiff: bytes, old: tuple[int, int], new: tuple[int, int]) -> bytes:
    """A TIFF with another tag and value in the place of one: (tag, value) of 16 bits."""
    entries = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in (old, new)]
    assert tiff.count(entries[0]) == 1
    return tiff.replace(*entries)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
PNG, JPEG = encoded(grey(NOISE), "PNG"), encoded(grey(NOISE), "JPEG")
FRAMES = {"save_all": True, "append_images": [grey(RAMP[::-1].copy())]}
REFUSED = {
    "zero bytes": (b"", "0 bytes"),
    "text": (b"not an image at all", "which begins 'not an image at all'"),
    "a web page": (b"<!DOCTYPE html>\n<html><title>Log in", "a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "dicom": (bytes(128) + b"DICM\2\0\0\0UL\4\0", "minidiff.data.dicom import"),
    "truncated png": (PNG[: len(PNG) // 2], "damaged"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "damaged"),
    "header of a png only": (PNG[:33], "WEBP or BMP"),
    "a bit of a png flipped": (flip_bit(PNG), "damaged"),
    "gif": (encoded(grey(), "GIF"), "WEBP or BMP"),
    "animated gif": (encoded(grey(), "GIF", **FRAMES), "WEBP or BMP"),
    "pages of a tiff": (encoded(grey(), "TIFF", **FRAMES), "several pages"),
    "animated webp": (encoded(grey(), "WEBP", **FRAMES), "animated"),
    "cmyk tiff": (encoded(grey().convert("CMYK"), "TIFF"), "CMYK"),
    "lab tiff": (encoded(Image.new("LAB", (8, 8)), "TIFF"), "LAB"),
    "a tiff in zstd": (encoded(grey(), "TIFF", compression="zstd"), "compressed by zstd"),
    "a tiff of 64 bits": (retagged(encoded(grey(), "TIFF"), (258, 8), (258, 64)), "of a kind"),
    "a tiff of huge tiles": (retagged(encoded(grey(), "TIFF"), (284, 1), (322, 60000)), "8192"),
    "no numbers": (encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
                   "no numbers"),
    "truncated tiff": (encoded(grey(NOISE), "TIFF")[:2000], "damaged"),
    "truncated webp": (encoded(grey(NOISE), "WEBP")[:700], "damaged"),
    "truncated bmp": (encoded(grey(NOISE), "BMP")[:2000], "damaged"),
    "65 megapixels of bmp": (encoded(grey(), "BMP").replace(
        struct.pack("<ii", 16, 16), struct.pack("<ii", 8125, 8000)), "64 megapixels"),
    "animated png": (encoded(grey(), "PNG", **FRAMES), "animated"),
    "cmyk": (encoded(grey().convert("CMYK"), "JPEG"), "CMYK"),
    "65 megapixels": (png_header(8125, 8000), "64 megapixels"),
    "100 megapixels": (png_header(10_000, 10_000), "64 megapixels"),
    "900 megapixels": (png_header(30_000, 30_000), "64 megapixels"),
    "a long side": (png_header(8193, 1), "8192"),
}


# pytest resets the filters; the limit holds
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_sentence_that_names_the_file(tmp_path, kind):
    data, says = REFUSED[kind]
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        images.read(path)
    message = str(error.value)
    assert message.startswith(str(path)) and says in message and "\n" not in message


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(InputError, match="no such image file"):
            images.read(path)


def test_every_byte_of_a_png_may_be_cut_off(tmp_path):
    data = encoded(grey(NOISE[:12, :12]), "PNG")
    for length in range(1, len(data) - 12):  # the last 12 are the empty closing chunk
        (tmp_path / "a.png").write_bytes(data[:length])
        with pytest.raises(InputError):
            images.read(tmp_path / "a.png")


def test_random_damage_never_escapes_as_another_error(tmp_path):
    rng = np.random.default_rng(1)
    kinds = [PNG, JPEG, *(encoded(grey(NOISE), kind) for kind in ("TIFF", "WEBP", "BMP")),
             encoded(grey(NOISE), "TIFF", compression="tiff_lzw"),
             encoded(grey(NOISE), "TIFF", compression="jpeg")]
    for data in kinds * 150:
        broken = np.frombuffer(data, np.uint8).copy()
        broken[rng.integers(0, min(len(broken), 400), 4)] = rng.integers(0, 256, 4)
        (tmp_path / "a.png").write_bytes(broken.tobytes())
        with contextlib.suppress(InputError):
            assert images.read(tmp_path / "a.png").dtype == np.uint8


# --- writing


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    images.write(tmp_path / "a.png", RAMP)
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        images.write(tmp_path / "a.png", RAMP.T)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path
                                                                  / "a.png").read_bytes() == before


def test_grid_places_every_image_once():
    stack = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 3, 4), np.uint8)
    sheet = images.grid(stack, columns=2, pad=1)
    assert sheet.shape == (1, 3 * 3 + 2, 2 * 4 + 1)
    assert [int(sheet[0, r, c]) for r in (0, 4, 8) for c in (0, 5)] == [1, 2, 3, 4, 5, 255]
    assert {v: int((sheet == v).sum()) for v in range(1, 6)} == dict.fromkeys(range(1, 6), 12)


# --- geometry


def test_square_of_a_square_at_its_own_size_changes_nothing():
    assert np.array_equal(images.square(NOISE[None], 64), NOISE[None])


@pytest.mark.parametrize("shape", [(40, 100), (100, 40)])
def test_square_keeps_the_centre_without_padding(shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    long = (x if shape[1] > shape[0] else y)[None].astype(np.uint8)
    square = images.square(long, 40)
    assert np.array_equal(square, long[:, 30:70, :] if shape[0] > 40 else long[:, :, 30:70])


def test_square_is_antialiased():
    # a naive bilinear would pick one of the two
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))[None]
    assert np.abs(images.square(stripes, 32).astype(int) - 127.5).max() < 5


def test_square_has_no_shift():
    """The centre of mass of a blob stays where it was, in units of the side."""
    y, x = np.mgrid[:200, :200]
    blob = (255 * np.exp(-((x - 60) ** 2 + (y - 130) ** 2) / 300)).astype(np.uint8)[None]
    small = images.square(blob, 50)[0].astype(float)
    rows, columns = np.mgrid[:50, :50]
    centre = [(small * (axis + 0.5)).sum() / small.sum() for axis in (columns, rows)]
    assert np.allclose(centre, [60.5 / 4, 130.5 / 4], atol=0.03)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (64, 63)])
def test_square_of_any_shape(shape, channels):
    square = images.square(np.full((channels, *shape), 77, np.uint8), 32)
    assert square.shape == (channels, 32, 32) and square.dtype == np.uint8 and (square == 77).all()


# --- as published


@pytest.mark.skipif(not CXR.is_dir(), reason=f"no real chest X-rays at {CXR}; set MINIDIFF_CXR")
def test_files_as_published_are_read():
    files = [path for path in sorted((CXR / "raw").rglob("*")) if path.is_file()]
    shapes = {path.name: images.read(path).shape for path in files}
    assert len(shapes) == 11
    for name, shape in shapes.items():
        with Image.open(next(path for path in files if path.name == name)) as image:
            assert shape[1:] == image.size[::-1]
    assert shapes["00000773_001.png"] == (1, 1024, 1024)  # an RGBA file, grey in fact
    assert shapes["01E392EE-69F9-4E33-BFCE-E5C968654078.jpeg"][0] == 3
    assert all(np.ptp(images.square(images.read(path), 64)) > 100 for path in files)
