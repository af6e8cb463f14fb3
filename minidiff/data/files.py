"""What one image file is, beside a picture: its header, its border, its greys, and letters that
were burned into it.

An audit reads every file once and keeps no more than this of it, and a small square: 12 kB an
image.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from PIL import Image
from tqdm import tqdm

from minidiff.data import images
from minidiff.errors import InputError

# px: side of the thumbnail; side at which the border is cut off, and its width
THUMBNAIL, EDGE, RIM = 8, 64, 4
BINS = 64                        # of the histogram of greys
FLAT = 8                         # grey values within which a part of the image counts as constant
LOOK = 640                       # px: longer side, at the most, at which letters are looked for
# grey values by which a letter's strokes, and their middle, stand out from around them
STROKE, PEAK = 45, 80
LETTERS = 3                      # that stand in line, before they are text
WIDE = {"I": 16, "I;16": 16, "I;16B": 16, "I;16L": 16, "1": 1}

Box = tuple[int, int, int, int]  # left, top, right, bottom, in px of the file


class Facts(NamedTuple):
    """What is known of one file; an unreadable one has a fault and zeros."""

    fault: str = ""               # why it cannot be read
    bytes: int = 0
    format: str = ""              # what it is, whatever its name says: PNG, JPEG
    mode: str = ""                # Pillow's: L, RGB, RGBA, P, I;16 …
    bits: int = 0                 # a channel
    channels: int = 0             # in fact: 1 if the three are equal
    width: int = 0
    height: int = 0
    carries: tuple[str, ...] = () # EXIF, text or comments: names may be in there
    turned: bool = False          # EXIF says that it is to be rotated or mirrored
    pixels: str = ""              # sha256 of the decoded picture
    constant: float = 0.0         # share of the most frequent range of 8 grey values
    text: tuple[Box, ...] = ()    # lines of letters
    histogram: np.ndarray = np.zeros(BINS)                              # shares
    thumbnail: np.ndarray = np.zeros(THUMBNAIL**2)                      # greys, of the whole picture, whatever its shape
    border: np.ndarray = np.zeros(4 * EDGE // RIM)                      # greys, clockwise in pieces of 4 × 4 of 64 × 64


def read_facts(files: Sequence[str | Path], side: int) -> tuple[list[Facts], np.ndarray]:
    """Facts of each file, and the middle of each picture as a grey square, uint8 (N,side,side), in
    which copies are looked for; black where a file cannot be read."""
    squares = np.zeros((len(files), side, side), np.uint8)
    with ThreadPoolExecutor() as pool:
        found = pool.map(facts, files, squares)
        return list(tqdm(found, "reading images", len(files), unit=" images",
                         disable=len(files) < 200)), squares


def typical_side(files: Iterable[str | Path], at_most: int) -> int:
    """The shorter side that nine of ten readable images have, from their headers alone; 8 to
    at_most.
    """
    sides = []
    for file in files:
        try:
            with Image.open(file, formats=images.FORMATS) as image:
                sides.append(min(image.size))
        except Exception:  # named later, by facts()
            continue
    return int(np.clip(np.quantile(sides, 0.1), 8, at_most)) if sides else at_most


def facts(file: str | Path, square: np.ndarray) -> Facts:
    """All of one file, whose middle is written into `square`; never raises for what is in the
    file.
    """
    try:
        picture = images.read(file)
    except InputError as error:
        return Facts(fault=str(error))
    data = Path(file).read_bytes()
    # only after images.read has let it pass
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        image.load()
        exif = image.getexif()
        carries = [*(["EXIF"] if len(exif) else []),
                   *(k for k, v in image.info.items() if isinstance(v, (str, bytes)) and k not in (
                       "exif", "icc_profile", "transparency", "jfif_unit", "background"))]
        header = {"bytes": len(data), "format": image.format or "", "mode": image.mode,
                  "bits": WIDE.get(image.mode, 8),
                  "turned": exif.get(0x0112, 1) != 1, "carries": tuple(sorted(carries))}
    grey = picture[0] if len(picture) == 1 else picture.mean(0).astype(np.uint8)
    whole = Image.fromarray(grey)
    square[:] = images.square(grey[None], len(square))[0]
    counts = np.bincount(grey.ravel(), minlength=256)
    return Facts(
        **header, channels=len(picture), width=grey.shape[1], height=grey.shape[0],
        pixels=hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest(),
        constant=float(np.convolve(counts, np.ones(FLAT), "valid").max() / grey.size),
        text=tuple(text(grey)), histogram=counts.reshape(BINS, -1).sum(1) / grey.size,
        thumbnail=np.asarray(whole.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX),
                             float).ravel(),
        border=_border(np.asarray(whole.resize((EDGE, EDGE), Image.Resampling.BOX), float)))


def _border(x: np.ndarray) -> np.ndarray:
    """(64,64) → (64,): the mean greys of the rim's pieces of 4 × 4, side after side."""
    sides = (x[:RIM], x[:, -RIM:].T, x[-RIM:], x[:, :RIM].T)
    return np.concatenate([s.reshape(RIM, -1, RIM).mean((0, 2)) for s in sides])


def text(grey: np.ndarray) -> list[Box]:
    """Lines of 3 or more letters, bright on dark or dark on bright: uint8 (H,W) → boxes.

    A letter is a connected stroke of high contrast, small and not much wider than high; letters of
    a line have about one height, stand at one height, and next to each other. A single L or R is no
    line.
    """
    zoom = max(1, round(max(grey.shape) / LOOK))
    x = np.asarray(Image.fromarray(grey).reduce(zoom), np.float32)
    tallest = max(12, max(x.shape) // 14)
    around = scipy.ndimage.uniform_filter(x, 2 * (tallest // 2) + 1)
    boxes = [box for sign in (1, -1) for box in _lines(_letters(sign * (x - around), tallest))]
    return [tuple(int(zoom * c) for c in box) for box in boxes]


def _letters(contrast: np.ndarray, tallest: int) -> list[Box]:
    """Connected strokes of the size and shape of letters."""
    named, n = scipy.ndimage.label(contrast > STROKE, np.ones((3, 3)))
    areas, found = np.bincount(named.ravel(), minlength=n + 1), []
    for k, (rows, columns) in enumerate(scipy.ndimage.find_objects(named), 1):
        high, wide = rows.stop - rows.start, columns.stop - columns.start
        if not (5 <= high <= tallest and wide <= 1.6 * high and areas[k] / (high * wide) > 0.15
                and areas[k] >= 6):
            continue
        if contrast[rows, columns][named[rows, columns] == k].max() > PEAK:
            found.append((columns.start, rows.start, columns.stop, rows.stop))
    return found


def _lines(letters: list[Box]) -> list[Box]:
    """Letters that stand in a row, 3 or more, from left to right."""
    lines: list[list[Box]] = []
    for box in sorted(letters):
        high = box[3] - box[1]
        for line in lines:
            last = line[-1]
            tall = last[3] - last[1]
            level = abs(box[3] - last[3]) <= 0.25 * tall or abs(box[1] - last[1]) <= 0.25 * tall
            if level and 0.6 <= high / tall <= 1.7 and -1 <= box[0] - last[2] <= 1.2 * tall:
                line.append(box)
                break
        else:
            lines.append([box])
    return [(min(b[0] for b in s), min(b[1] for b in s), max(b[2] for b in s), max(b[3] for b in s))
            for s in lines if len(s) >= LETTERS]
