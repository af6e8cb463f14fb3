"""Facts of one image file: its header, its border, its greys, and letters burned into it.

An audit reads every file once and keeps only these and a small square: 12 kB an image.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from PIL import Image
from tqdm import tqdm

from minidiff.data import images
from minidiff.errors import InputError
from minidiff.pixels import scratch
from minidiff.runs import write_atomic

THUMBNAIL, EDGE, RIM = 8, 64, 4  # px: side of the thumbnail; of an image and its border
BINS = 64                        # of the histogram of greys
FLAT = 8                         # grey values within which a part of the image counts as constant
LOOK = 640                       # px: longest side at which letters are looked for
STROKE, PEAK = 45, 80            # grey values of contrast: of a letter's strokes, of their middle
SHARD = 256                      # images that a kill loses
LOOKED_AT = 5000                 # images whose side tells that of all
LETTERS = 3                      # letters in a line make a text
BITS = {"1": 1, "F": 32, **dict.fromkeys(("I", "I;16", "I;16B", "I;16L"), 16)}  # other modes: 8
HARMLESS = {"exif", "icc_profile", "transparency", "jfif_unit", "background",
            "compression"}       # beside the pixels

Box = tuple[int, int, int, int]  # left, top, right, bottom, in px of the file


class Facts(NamedTuple):
    """What is known of one file; an unreadable one has a fault and zeros."""

    fault: str = ""               # why it cannot be read
    bytes: int = 0
    format: str = ""              # what it is, whatever its name says: PNG, JPEG …
    mode: str = ""                # Pillow's: L, RGB, RGBA, P, I;16 …
    bits: int = 0                 # a channel
    channels: int = 0             # in fact: 1 if the three are equal
    width: int = 0
    height: int = 0
    carries: tuple[str, ...] = ()  # EXIF, text or comments: names may be in there
    turned: bool = False          # EXIF says that it is to be rotated or mirrored
    outliers: bool = False        # of more than 8 bits, with values that `grey_range` leaves out
    pixels: str = ""              # sha256 of the decoded picture
    constant: float = 0.0         # share of the most frequent range of 8 grey values
    text: tuple[Box, ...] = ()    # lines of letters
    histogram: np.ndarray = np.zeros(BINS)          # shares
    thumbnail: np.ndarray = np.zeros(THUMBNAIL**2)  # greys of the whole image, whatever its shape
    border: np.ndarray = np.zeros(4 * EDGE // RIM)  # greys, clockwise: 4 × 4 of 64 × 64


def read_facts(files: Sequence[str | Path], side: int,
               folder: Path | None = None) -> tuple[list[Facts], np.ndarray]:
    """Facts of each file, and the middle of each image as a grey square for the search of copies,
    uint8 (N,side,side); black where a file cannot be read. What is read is kept in `folder`, which
    is of these files alone: after a kill the same call goes on."""
    squares, found = scratch((len(files), side, side)), []
    with ThreadPoolExecutor() as pool, tqdm(desc="reading images", total=len(files),
                                            unit=" images", disable=len(files) < 200) as bar:
        for k in range(0, len(files), SHARD):
            names, own = files[k : k + SHARD], squares[k : k + SHARD]
            path = folder and folder / str(k)
            some = _kept(path, own) if path and path.is_file() else [*pool.map(facts, names, own)]
            if path and not path.is_file():
                rows = [[x.tolist() if isinstance(x, np.ndarray) else x for x in f] for f in some]
                write_atomic(path, json.dumps(rows).encode() + b"\n" + own.tobytes())
            found += some
            bar.update(len(some))
    return found, squares


def _kept(path: Path, squares: np.ndarray) -> list[Facts]:
    """Facts that `read_facts` has written, and their squares."""
    with open(path, "rb") as file:
        rows = json.loads(file.readline())
        squares[:] = np.frombuffer(file.read(), np.uint8).reshape(squares.shape)
    return [Facts(*((np.array if isinstance(usual, np.ndarray) else type(usual))(x)
                    for x, usual in zip(row, Facts()))) for row in rows]


def typical_side(files: Iterable[str | Path], at_most: int) -> int:
    """The shorter side that nine of ten readable images reach, by their headers; 8 to at_most.

    Of 10,000 images or more, every second is looked at, of 15,000 every third, and so on.
    """
    files, sides = list(files), []
    for file in files[:: max(1, len(files) // LOOKED_AT)]:
        # a file that cannot be read is named later, by facts()
        with suppress(Exception), Image.open(file, formats=images.FORMATS) as image:
            sides.append(min(image.size))
    return int(np.clip(np.quantile(sides, 0.1), 8, at_most)) if sides else at_most


def facts(file: str | Path, square: np.ndarray) -> Facts:
    """All of one file, whose middle is written into `square`; never raises for a bad file."""
    try:
        picture = images.read(file)
    except InputError as error:
        return Facts(fault=str(error))
    data = Path(file).read_bytes()
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        turned = image.getexif().get(0x0112, 1) != 1  # loading turns a TIFF, and forgets that
        image.load()
        exif = image.getexif()
        if image.format == "TIFF":  # every tag is EXIF there: those of text remain
            exif = [value for value in exif.values() if isinstance(value, str)]
        carries = {k for k, v in image.info.items() if isinstance(v, (str, bytes))} - HARMLESS
        header = {"bytes": len(data), "format": image.format or "", "mode": image.mode,
                  "bits": BITS.get(image.mode, 8), "turned": turned,
                  "outliers": image.mode in images.WIDE and _outliers(np.asarray(image)),
                  "carries": tuple(sorted(carries | ({"EXIF"} if len(exif) else set())))}
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


def _outliers(x: np.ndarray) -> bool:
    return images.grey_range(x) != (x.min(), x.max())


def _border(x: np.ndarray) -> np.ndarray:
    """(64,64) → (64,): the mean greys of the rim's pieces of 4 × 4, side after side."""
    sides = (x[:RIM], x[:, -RIM:].T, x[-RIM:], x[:, :RIM].T)
    return np.concatenate([s.reshape(RIM, -1, RIM).mean((0, 2)) for s in sides])


def text(grey: np.ndarray) -> list[Box]:
    """Lines of 3 or more letters, bright on dark or dark on bright: uint8 (H,W) → boxes.

    A letter is a connected stroke of high contrast, small and not much wider than high. The letters
    of a line have about the same height and level and stand next to each other. A single L or R is
    no line.
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
        of_size = (5 <= high <= tallest and wide <= 1.6 * high and areas[k] >= 6
                   and areas[k] / (high * wide) > 0.15)
        if of_size and contrast[rows, columns][named[rows, columns] == k].max() > PEAK:
            found.append((columns.start, rows.start, columns.stop, rows.stop))
    return found


def _lines(letters: list[Box]) -> list[Box]:
    """Letters that stand in a row, 3 or more, from left to right."""
    lines: list[list[Box]] = []
    for box in sorted(letters):
        high = box[3] - box[1]
        for line in lines:
            last, tall = line[-1], line[-1][3] - line[-1][1]
            level = abs(box[3] - last[3]) <= 0.25 * tall or abs(box[1] - last[1]) <= 0.25 * tall
            if level and 0.6 <= high / tall <= 1.7 and -1 <= box[0] - last[2] <= 1.2 * tall:
                line.append(box)
                break
        else:
            lines.append([box])
    return [(min(b[0] for b in s), min(b[1] for b in s), max(b[2] for b in s), max(b[3] for b in s))
            for s in lines if len(s) >= LETTERS]
