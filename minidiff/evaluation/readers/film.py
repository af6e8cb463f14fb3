"""The images of a reading study as they are shown: grey of one size and depth, some spoilt on
purpose; and as files of one length."""

import hmac
import struct
import zlib

import numpy as np
import scipy

from minidiff.data import images

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def generator(secret: bytes, purpose: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hmac.digest(secret, purpose.encode(), "sha256"),
                                                "big"))


def render(raw: list[np.ndarray], items: list[dict], size: int, bits: int,
           secret: bytes) -> np.ndarray:
    """Every item as uint8 or uint16 (N,size,size), grey; controls spoilt."""
    out, unit = np.empty((len(raw), size, size), f"uint{bits}"), 257 if bits == 16 else 1
    for k, (image, it) in enumerate(zip(raw, items)):
        square = images.square(images.in_depth(image, bits), size) / unit
        grey = np.tensordot(LUMA, square, 1) if len(square) == 3 else square[0]
        if it["kind"] == "control":
            grey = SPOIL[it["control"]](grey, generator(secret, f"control {k}"))
        out[k] = np.clip(np.rint(grey * unit), 0, 255 * unit)
    return out


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return image + rng.normal(0, 110, image.shape)


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(image, image.shape[0] / 14, mode="nearest")


def tiles(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Its sixteen tiles, each in the place of another; the rest at the right and below stays."""
    side, out, order = image.shape[0] // 4, image.copy(), rng.permutation(16)
    for to, of in zip(order, np.roll(order, 1)):
        (y, x), (v, u) = (tuple(side * np.array(divmod(int(k), 4))) for k in (to, of))
        out[y : y + side, x : x + side] = image[v : v + side, u : u + side]
    return out


SPOIL = {"noise": noise, "blur": blur, "tiles": tiles}


def stored_png(image: np.ndarray) -> bytes:
    """The PNG of uint8 (H,W), stored without compression: of one length for all of one size.

    Of uint16, for browsers show 8 bits: the upper bytes, and below them the lower ones, (2H,W).
    """
    if image.dtype == np.uint16:
        image = np.concatenate([image >> 8, image & 255]).astype(np.uint8)
    height, width = image.shape
    # each row says "no filter" first
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image], 1).tobytes()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(
        ">I", zlib.crc32(kind + data)) for kind, data in chunks)
