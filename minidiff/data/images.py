"""The only reader and the only writer of image files: whatever came in, uint8 (C,H,W) comes out,
or, where it is asked for and there, grey of 16 bits.

A file is untrusted: only the decoders of FORMATS open it, its size is checked in the header before
a pixel is decoded, and every fault becomes one `InputError` that names the file. Metadata (EXIF,
text) is dropped.
"""

import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from minidiff.errors import InputError, refuse
from minidiff.pixels import to_depth
from minidiff.runs import what_it_is, write_atomic

# Format: its endings. More decoders are more risk: EPS calls Ghostscript, FITS unpacks gzip.
ENDINGS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "TIFF": (".tif", ".tiff"),
           "WEBP": (".webp",), "BMP": (".bmp",)}
FORMATS, EXTENSIONS = tuple(ENDINGS), sum(ENDINGS.values(), ())
KINDS = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"  # for a message
MAX_PIXELS = 64_000_000
MAX_SIDE = 8192
NARROW = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's modes
WIDE = ("I", "I;16", "I;16B", "I;16L", "F")          # grey of 12 to 32 bits
WEBP_GREY = 1  # grey level by which the channels of grey differ: WebP has no grey, and rounds
PERCENTILES = (0.5, 99.5)  # between them lies the middle 99 % of the pixels
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how one begins, whether it can be read or not
COMPRESSIONS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg",
                "tiff_ccitt", "group3", "group4")  # of a TIFF, in Pillow's names
WHOLE = "grey range", "0 to 65535"  # text of a PNG of ours: black and white are these, in all files
AS_EIGHT = "of 16 bits, read here as 8: the nearest of 256 greys over the whole range"  # a note
PHOTOMETRIC, SAMPLE_FORMAT, TILE_SIDES = 262, 339, (322, 323)  # tags of a TIFF

# Pillow warns from 89 megapixels on. Set here once, because warnings.catch_warnings is not safe in
# threads; should somebody reset the filters, our own and lower limit still holds.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def read(path: str | Path, *, deep: bool = False) -> np.ndarray:
    """Read an image of FORMATS as uint8 (C,H,W): C = 1 if it is grey in fact (three equal channels
    count), else 3.

    Grey of more than 8 bits is scaled by its own `grey_range` to 0…255. 16 bits that we wrote, of
    which the range is WHOLE, become the nearest of 256 over that, or with `deep` stay uint16
    (1,H,W). Colour of 16 bits keeps its upper 8. EXIF orientation is applied. Alpha is dropped
    where it is opaque, else the image is laid on black. A constant image is not a fault here.
    Raises InputError for a file that is missing, empty, truncated, corrupt, animated, of several
    pages, CMYK, too large or not of these.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    try:
        data = path.read_bytes()
        if not data:
            raise InputError(f"{path}: the file is empty (0 bytes)")
        _check_header(path, data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()  # raises on a truncated file; ImageFile.LOAD_TRUNCATED_IMAGES stays False
            tags, slack = dict(getattr(image, "tag_v2", {})), WEBP_GREY * (image.format == "WEBP")
            found = _to_array(ImageOps.exif_transpose(image), tags, slack)
            return found if deep else in_depth(found, 8)
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        tiff = ("a TIFF of a kind that is not read: allowed are grey of up to 16 or 32 bits, RGB "
                "and palette; save it as one of these, or PNG") if data.startswith(TIFF) else ""
        what = what_it_is(data) or tiff or "damaged, or of another format"
        raise InputError(f"{path}: cannot be opened as {KINDS}, the formats allowed; it is "
                         f"{what}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, …
        raise InputError(f"{path}: damaged image ({str(error) or type(error).__name__})") from None


def write(path: str | Path, image: np.ndarray | Tensor,
          text: Mapping[str, str] | None = None, *, quick: bool = False) -> None:
    """Write uint8 (H,W) or (C,H,W), C = 1 or 3, or uint16 of one channel, as a PNG; the file is
    there whole or not at all.

    `quick`: a fifth of the time, an eighth larger; for a sheet of many images, which takes seconds.
    """
    assert Path(path).suffix == ".png", path
    write_atomic(path, png_bytes(image, text, 1 if quick else 6), durable=False)


def png_bytes(image: np.ndarray | Tensor, text: Mapping[str, str] | None = None,
              level: int = 6) -> bytes:
    """The PNG file of uint8 (H,W) or (C,H,W), or of uint16 of one channel, which says that its
    range is WHOLE; with text chunks; zlib's level."""
    info, image = PngImagePlugin.PngInfo(), np.asarray(image)
    for key, value in {**(text or {}), **dict([WHOLE] * (image.dtype == np.uint16))}.items():
        # a keyword of PNG is short and Latin-1
        info.add_text(key.encode("latin-1", "backslashreplace").decode("latin-1")[:79], str(value))
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, "PNG", pnginfo=info, compress_level=level)
    return buffer.getvalue()


def in_depth(image: np.ndarray, bits: int) -> np.ndarray:
    """uint8 or uint16 → the same greys in 8 or 16 bits."""
    if image.dtype == f"uint{bits}":
        return image
    return to_depth(torch.tensor(image), getattr(torch, f"uint{bits}")).numpy()


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 (C,H,W) or uint16 (1,H,W) so that its shorter side is `size`, and keep the
    central square: (C,size,size).

    Never padded: a border would show the aspect ratio, from which the label of public collections
    can be predicted.
    """
    _, height, width = image.shape
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resized = _to_pil(image).resize((size, size), Image.Resampling.BICUBIC, box)  # antialiased
    return _channels_first(np.asarray(resized))


def smaller(png: bytes, share: float) -> bytes:
    """A PNG of grey or colour again, with both sides at this share of their pixels."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        size = [max(1, round(side * share)) for side in image.size]
        small = _to_pil(in_depth(_to_array(image, {}, 0), 8)).resize(size, Image.Resampling.BICUBIC)
    return png_bytes(_channels_first(np.asarray(small)))


def grid(images: np.ndarray | Tensor, columns: int, pad: int = 2) -> np.ndarray:
    """uint8 (N,C,H,W) → a sheet of `columns` columns with white lines between: uint8 (C,H',W')."""
    images = np.asarray(images)
    n, channels, height, width = images.shape
    rows, high, wide = -(-n // columns), height + pad, width + pad
    tiles = np.full((rows * columns, channels, high, wide), 255, np.uint8)
    tiles[:n, :, :height, :width] = images
    sheet = tiles.reshape(rows, columns, channels, high, wide).transpose(2, 0, 3, 1, 4)
    return sheet.reshape(channels, rows * high, columns * wide)[:, : rows * high - pad,
                                                                : columns * wide - pad]


def grey_range(x: np.ndarray) -> tuple[float, float]:
    """The values of an image that become black and white: its least and its greatest, apart from
    outliers.

    An outlier, such as a hot or dead pixel of a detector, lies farther beyond the middle 99 % than
    these are wide. One of them would leave all others nearly black.
    """
    low = float(np.percentile(x, PERCENTILES[0], method="higher"))
    high = float(np.percentile(x, PERCENTILES[1], method="lower"))
    if high > low:
        x = x[(x >= 2 * low - high) & (x <= 2 * high - low)]
    return float(x.min()), float(x.max())


def _check_header(path: Path, data: bytes) -> None:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        (width, height), tags = image.size, getattr(image, "tag_v2", {})
        packed = image.info.get("compression") if tags else ""
        refuse({
            f"{width} x {height} pixels; allowed are {MAX_PIXELS // 10**6} megapixels and sides "
            f"to {MAX_SIDE}": width * height > MAX_PIXELS or max(
                width, height, *(tags.get(tag, 0) for tag in TILE_SIDES)) > MAX_SIDE,
            f"mode {image.mode}; allowed are grey, RGB, palette, and grey of 16 or 32 bits":
                image.mode not in (*NARROW, *WIDE),
            f"a TIFF compressed by {packed}; allowed are {', '.join(COMPRESSIONS)}":
                tags and packed not in COMPRESSIONS,
        }, f"{path}: ")
        with suppress(EOFError):
            image.seek(1)  # and not n_frames, which would read the heads of all
            raise InputError(f"{path}: animated or of several pages; one still image is needed")
        image.verify()  # the checksums of a PNG


def _to_array(image: Image.Image, tags: Mapping[int, object], slack: int) -> np.ndarray:
    if image.mode in WIDE:
        grey = np.asarray(image)
        if image.info.get(WHOLE[0]) == WHOLE[1]:
            return grey[None].astype(np.uint16)
        if image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
            grey = grey.view(np.uint32)  # it has no sign, but Pillow gives it one
        if not np.isfinite(grey).all():
            raise ValueError("values that are no numbers")
        grey = _scale_by_range(grey)[None]
        white_is_zero = tags.get(PHOTOMETRIC) == 0  # Pillow itself turns images of up to 8 bits
        return 255 - grey if white_is_zero else grey
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[None]
    black = Image.new("RGBA", image.size, "black")
    image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    colour = _channels_first(np.asarray(image))
    return colour[:1] if np.ptp(colour, 0).max() <= slack else colour


def _scale_by_range(wide: np.ndarray) -> np.ndarray:
    # Pillow's convert("L") clips at 255, which turns a 16-bit radiograph white; and detectors use
    # 10 to 14 of the 16 bits, so that dividing by 257 would leave most of them nearly black.
    low, high = grey_range(wide)
    x = wide.astype(np.float64)
    x = (x - low) * (255 / (high - low)) if high > low else x / 257
    return np.rint(np.clip(x, 0, 255)).astype(np.uint8)


def _to_pil(image: np.ndarray | Tensor) -> Image.Image:
    array = np.asarray(image)
    assert array.dtype in (np.uint8, np.uint16), (array.dtype, array.shape)
    if array.ndim == 3:
        array = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
