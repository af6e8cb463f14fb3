"""data.images: TIFF, WebP, BMP and the endings that browsers and scanners give; and hot pixels."""

import numpy as np
import pytest
from PIL import Image
from test_images import NOISE, RAMP, grey, retagged, save

from minidiff.data import images


@pytest.mark.parametrize("ending", ["jfif", "jpe", "tif", "tiff", "webp", "bmp"])
def test_what_scanners_browsers_and_windows_save_is_read(tmp_path, ending):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "webp": "WEBP"}
    path = save(tmp_path / f"a.{ending}", grey(), format=kinds.get(ending), quality=100)
    read = images.read(path)
    assert read.shape == (1, 16, 16) and np.abs(read[0].astype(int) - RAMP).max() < 9
    assert path.suffix in images.EXTENSIONS
    if ending in ("tif", "tiff", "bmp"):
        assert np.array_equal(read[0], RAMP)


@pytest.mark.parametrize("packed", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_a_tiff_is_what_a_png_of_the_same_picture_is(tmp_path, mode, packed):
    image = grey(NOISE).convert(mode)
    png, tiff = save(tmp_path / "a.png", image), save(tmp_path / "a.tif", image, compression=packed)
    assert np.array_equal(images.read(tiff), images.read(png))


def test_grey_webp_is_one_channel_though_its_colours_are_rounded(tmp_path):
    path = save(tmp_path / "a.webp", grey(NOISE), quality=40)
    channels = np.asarray(Image.open(path)).astype(int)
    assert np.ptp(channels, 2).max() == 1 and images.read(path).shape == (1, 64, 64)
    tint = Image.merge("RGB", [grey(NOISE), grey(NOISE), grey(NOISE // 2)])
    assert images.read(save(tmp_path / "b.webp", tint)).shape == (3, 64, 64)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("packed", ["raw", "tiff_lzw"])
def test_a_wide_tiff_is_scaled_by_its_own_range(tmp_path, dtype, packed):
    wide = (RAMP.astype(dtype) * 16 + 1000) / dtype(1)
    path = save(tmp_path / "a.tif", Image.fromarray(wide.astype(dtype)), compression=packed)
    assert np.array_equal(images.read(path)[0], RAMP)


def test_values_of_a_tiff_below_zero_and_beyond_31_bits_keep_their_order(tmp_path):
    signed = save(tmp_path / "a.tif", Image.fromarray(RAMP.astype(np.int32) - 200))
    assert np.array_equal(images.read(signed)[0], RAMP)
    wide = save(tmp_path / "b.tif", Image.fromarray((RAMP.astype(np.uint32) << 24).view(np.int32)))
    wide.write_bytes(retagged(wide.read_bytes(), (339, 2), (339, 1)))  # without a sign
    assert np.array_equal(images.read(wide)[0], RAMP)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_in_some_tiffs(tmp_path, dtype):
    image = Image.fromarray(RAMP.astype(dtype) * dtype(257 if dtype == np.uint16 else 1))
    path = save(tmp_path / "a.tif", image, tiffinfo={262: 0})
    data = path.read_bytes()
    stored = RAMP.astype("<u2") * 257
    if dtype == np.uint16:  # Pillow writes the values as they are: 0 stands for white
        assert stored.tobytes() in data and np.array_equal(images.read(path)[0], 255 - RAMP)
    else:                   # and of 8 bits their complement
        assert (255 - RAMP).tobytes() in data and np.array_equal(images.read(path)[0], RAMP)


# --- one hot pixel


@pytest.mark.parametrize(("at", "value"), [(0, 65535), (1, 0), (2, 60000)])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_hot_or_dead_pixel_does_not_darken_the_others(tmp_path, ending, at, value):
    rng = np.random.default_rng(at)
    wide = rng.normal(20000, 1500, (128, 128)).clip(16000, 24000).astype(np.uint16)
    good = images.read(save(tmp_path / f"good.{ending}", Image.fromarray(wide)))
    wide[5 + at, 9] = value
    read = images.read(save(tmp_path / f"hot.{ending}", Image.fromarray(wide)))
    others = np.ones((1, 128, 128), bool)
    others[0, 5 + at, 9] = False
    assert np.array_equal(read[others], good[others])
    assert read[0, 5 + at, 9] == (255 if value > 20000 else 0)


def test_letters_beyond_the_range_of_the_detector_do_not_darken_it(tmp_path):
    wide = np.linspace(200, 4095, 200 * 200).astype(np.uint16).reshape(200, 200)
    good = images.read(save(tmp_path / "good.png", Image.fromarray(wide)))
    wide[10:20, 10:20] = 65535  # 0.25 % of the area
    read = images.read(save(tmp_path / "L.png", Image.fromarray(wide)))
    assert np.abs(read.astype(int) - good)[:, 20:].max() <= 1


def test_a_wide_range_without_outliers_is_kept_whole():
    rng = np.random.default_rng(3)
    for x in (rng.normal(0, 1, 10**5), rng.uniform(0, 9, 500), np.array([5, 900]), np.full(9, 7),
              np.where(rng.uniform(size=10**4) < 0.004, 4000, 0), np.arange(4)):
        assert images.grey_range(x) == (x.min(), x.max())
