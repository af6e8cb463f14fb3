"""Damaged and hostile DICOM files behind the guard: cut, flipped, slow, large, crashing."""

import os
import signal
import sys

import numpy as np
import pytest
from dicom_files import (
    NATIVE,
    OPTIONS,
    PACKED,
    encode,
    make,
)

from minidiff.data import images
from minidiff.data.dicom import Refused, reader
from minidiff.data.dicom.guard import Guard

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def guard():
    guard = Guard()
    yield guard
    guard.stop()


@pytest.mark.parametrize("syntax", {**NATIVE, **PACKED}.values(), ids=list({**NATIVE, **PACKED}))
def test_a_file_cut_anywhere_is_never_half_an_image(tmp_path, guard, syntax):
    rng = np.random.default_rng(3)
    data = encode(make(rng.integers(0, 4096, (40, 48)), 12), syntax)
    image, _ = reader.convert(write(tmp_path, data), OPTIONS)
    for end in sorted({*rng.integers(0, len(data), 40), *range(len(data) - 8, len(data))}):
        try:
            assert guard.convert(write(tmp_path, data[:end]), OPTIONS)[0] == image
            assert end >= len(data) - 4  # an end mark or a filling byte: the image is whole without
        except Refused as refused:
            assert refused.key == "damaged" or end < 200


@pytest.mark.parametrize("syntax", {**NATIVE, **PACKED}.values(), ids=list({**NATIVE, **PACKED}))
def test_flipped_bytes_do_no_more_than_spoil_the_image(tmp_path, guard, syntax):
    rng = np.random.default_rng(4)
    data = encode(make(rng.integers(0, 4096, (40, 48)), 12, WindowCenter=9, WindowWidth=99), syntax)
    for _ in range(60):
        spoilt = bytearray(data)
        for at in rng.integers(128, len(data) if rng.random() < 0.3 else 700, 3):
            spoilt[at] = rng.integers(256)
        try:
            image, row = guard.convert(write(tmp_path, spoilt), OPTIONS)
        except Refused as refused:
            assert refused.key not in ("time", "memory")
        else:
            (tmp_path / "x.png").write_bytes(image)
            assert images.read(tmp_path / "x.png").ndim == 3 and set(row) == {
                "patient", "sex", "age", "view", "modality"}


def write(tmp_path, data) -> str:
    (tmp_path / "x").write_bytes(data)
    return str(tmp_path / "x")


def test_time_memory_and_a_crash_cost_one_file_only(tmp_path, guard):
    small = write(tmp_path, encode(make()))
    assert guard.convert(small, OPTIONS)
    os.kill(guard.process.pid, signal.SIGKILL)
    with pytest.raises(Refused, match="crash"):
        guard.convert(small, OPTIONS)
    assert guard.convert(small, OPTIONS)
    guard.seconds = 0
    os.kill(guard.process.pid, signal.SIGSTOP)  # or it might have answered before anybody looked
    with pytest.raises(Refused, match="time"):
        guard.convert(small, OPTIONS)
    guard.seconds = 60
    if sys.platform == "linux":
        tight = Guard(gigabytes=0.1)
        with pytest.raises(Refused, match="memory"):
            tight.convert(write(tmp_path, encode(make(np.zeros((6000, 6000)), 16))), OPTIONS)
        assert tight.convert(write(tmp_path, encode(make())), OPTIONS)
        tight.stop()


@pytest.mark.slow
def test_the_largest_image_that_is_allowed_fits(tmp_path, guard):
    x = np.random.default_rng(5).integers(0, 65536, (8000, 8000))
    assert x.size == images.MAX_PIXELS
    image, _ = guard.convert(write(tmp_path, encode(make(x, 16))), OPTIONS._replace(bits=16))
    assert len(image) > 10**8
