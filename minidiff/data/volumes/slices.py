"""A Volume → its slices as grey images, as a radiologist looks at them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from minidiff.data import images
from minidiff.data.dicom import Refused
from minidiff.data.dicom.pixels import PRESETS, windowed
from minidiff.data.volumes import PLANES, Volume

SQUARE = 0.01  # share by which the sides of a pixel may differ


class Cut(NamedTuple):
    """Which slices, and how they become grey."""

    plane: str = "axial"
    window: str = "auto"          # of PRESETS, for CT; percentile, which auto is for MR
    slices: int = 0               # so many, evenly spaced; 0: all
    low: float = 0.0              # of the axis, 0 its lowest slice (feet, front or right) …
    high: float = 1.0             # … and 1 its highest
    bits: int = 8


def cut(volume: Volume, how: Cut) -> Iterator[tuple[np.ndarray, dict[str, str]]]:
    """Grey (H,W) of square pixels and the row of each slice; one that is all of one grey is left
    out. Raises Refused for a plane or window that does not fit the volume."""
    axis = PLANES[how.plane]
    if volume.only not in (None, axis):
        whole = next(plane for plane, k in PLANES.items() if k == volume.only)
        raise Refused("gap", f"its slices are {whole}")
    low, high = limits(volume, how.window)
    window = f"{low:.6g} {high:.6g}" + " HU" * (volume.facts["modality"] == "CT")
    n, (across, down) = volume.values.shape[axis], (k for k in range(3) if k != axis)
    places = [k for k in range(n) if how.low <= (k + 0.5) / n <= how.high]
    if 0 < how.slices < len(places):
        places = [places[int((i + 0.5) * len(places) / how.slices)] for i in range(how.slices)]
    for k in places:
        seen = volume.values.take(k, axis).T              # (down, across)
        seen = seen[::-1] if down == 2 else seen          # head on top
        grey = shown(seen, low, high)
        grey, mm = square(grey, volume.spacing[down], volume.spacing[across])
        if max(grey.shape) > images.MAX_SIDE:
            raise Refused("size", " x ".join(map(str, grey.shape)))
        grey = np.rint(grey * (2**how.bits - 1)).astype(f"uint{how.bits}")
        if np.ptp(grey):
            yield grey, volume.facts | {"plane": how.plane, "position": f"{(k + 0.5) / n:.4f}",
                                        "spacing": f"{mm:.3f}", "window": window}


def limits(volume: Volume, window: str) -> tuple[float, float]:
    """The values that become black and white: a preset of CT, or the middle 99 % of the volume."""
    ct = volume.facts["modality"] == "CT"
    if (window in PRESETS) != ct:
        raise Refused("window", f"window {window}, modality {volume.facts['modality']}")
    if ct:
        centre, width = PRESETS[window]
        return centre - width / 2, centre + width / 2
    low, high = np.percentile(volume.values, images.PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def shown(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 … 1: DICOM's LINEAR_EXACT."""
    return windowed(values.astype(np.float64), (low + high) / 2, high - low, "LINEAR_EXACT")


def square(grey: np.ndarray, down: float, across: float) -> tuple[np.ndarray, float]:
    """0 … 1 (H,W) with pixels of down × across mm → the same in square pixels of the finer side."""
    mm = min(down, across)
    if abs(down - across) <= SQUARE * mm:
        return grey, mm
    height, width = (max(1, round(n * side / mm)) for n, side in zip(grey.shape, (down, across)))
    finer = Image.fromarray(grey.astype(np.float32)).resize((width, height),
                                                            Image.Resampling.BICUBIC)
    return np.clip(np.asarray(finer, np.float64), 0, 1), mm
