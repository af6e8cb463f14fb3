"""How image files are compressed, by their headers: a codec alone moves the distance between two
sets of images.

JPEG and lossy WebP leave blocks and take fine detail, which features see. A PNG that was made of a
JPEG still has its traces, and nothing says so: only what the files themselves are is told here.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidiff.data.images import FORMATS

APART = 5       # points of quality, and per cent of the files, from which two sides differ
LUMINANCE = (   # of quality 50, row after row (ITU-T T.81, Table K.1)
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113,
    92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99)


def quality(table: Iterable[int]) -> int:
    """The quality, 1 to 100, at which libjpeg's table is nearest to that of a JPEG for luminance.

    Exact for what libjpeg wrote; other programs count otherwise, but finer tables are higher here,
    too.
    """
    q = np.arange(1, 101)
    scale = np.where(q < 50, 5000 // q, 200 - 2 * q)
    tables = np.clip((np.outer(scale, LUMINANCE) + 50) // 100, 1, 255)
    return int(q[np.abs(tables - np.array(list(table))).sum(1).argmin()])


def compression(files: Iterable[str | Path]) -> dict[str, Any]:
    """Files by format, and of the JPEG ones the least, median and greatest quality, estimated.

    {"JPEG": 30, "PNG": 2, "quality": [85, 92, 95]}; a lossless WebP and a TIFF with JPEG in it are
    formats of their own. Files that cannot be read are left out.
    """
    counts, qualities = Counter(), []
    for file in files:
        with suppress(Exception), Image.open(file, formats=FORMATS) as image:
            kind = image.format or ""
            if kind == "JPEG":
                qualities.append(quality(image.quantization[0]))
            elif kind == "WEBP" and b"VP8L" in Path(file).read_bytes()[:64]:
                kind = "lossless WEBP"
            elif kind == "TIFF" and image.info.get("compression") == "jpeg":
                kind = "TIFF of JPEG"
            counts[kind] += 1
    found = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    spread = np.percentile(qualities, (0, 50, 100), method="lower").tolist() if qualities else None
    return found | ({"quality": spread} if spread else {})


def told(side: Mapping[str, Any]) -> str:
    """PNG; or 12 PNG, 1,012 JPEG of quality 90 (85 to 95)."""
    kinds = {kind: n for kind, n in side.items() if kind != "quality"}
    least, median, most = side.get("quality", (0, 0, 0))
    span = f" ({least} to {most})" if least < most else ""
    words = {"JPEG": f"JPEG of quality {median}{span}"}
    return ", ".join((f"{n:,} " if len(kinds) > 1 else "") + words.get(kind, kind)
                     for kind, n in kinds.items()) or "none"


def differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Do two sides lose different things? PNG, BMP and the like lose nothing, and are one."""
    shares = [defaultdict(float), defaultdict(float)]
    for share, side in zip(shares, (a, b)):
        kinds = {kind: n for kind, n in side.items() if kind != "quality"}
        for kind, n in kinds.items():
            lossy = kind in ("JPEG", "WEBP", "TIFF of JPEG")
            share[kind if lossy else ""] += 100 * n / sum(kinds.values())
    apart = max((abs(shares[0][kind] - shares[1][kind]) for kind in {*shares[0], *shares[1]}),
                default=0)
    medians = [side["quality"][1] for side in (a, b) if "quality" in side]
    return apart >= APART or (len(medians) == 2 and abs(medians[0] - medians[1]) >= APART)


def difference(a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]) -> str:
    """What must be said of two sides that are compressed differently; "" for others."""
    return (f"the files are compressed differently ({names[0]}: {told(a)}; {names[1]}: {told(b)}): "
            "part of each distance is due to that") if differ(a, b) else ""
