"""The only reader and the only writer of image files: whatever came in, uint8 (C,H,W) comes out.

A file is untrusted: only the PNG and JPEG decoders open it, its size is checked in the header
before a pixel is decoded, and every fault becomes one `InputError` that names the file. Metadata
(EXIF, text) is dropped.
"""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from minidiff.errors import InputError
from minidiff.runs import write_atomic

FORMATS = ("PNG", "JPEG")  # more decoders are more risk: EPS calls Ghostscript, FITS unpacks gzip
EXTENSIONS = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 64_000_000
MAX_SIDE = 8192
NARROW = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's modes
WIDE = ("I", "I;16", "I;16B", "I;16L")               # of a 16-bit grey PNG

# Pillow warns from 89 megapixels on. Set here once, because warnings.catch_warnings is not safe in
# threads; should somebody reset the filters, our own and lower limit still holds.
warnings.simplefilter("error", Image.DecompressionBombWarning)


def read(path: str | Path) -> np.ndarray:
    """Read a PNG or JPEG as uint8 (C,H,W): C = 1 if it is grey in fact (three equal channels
    count), else 3.

    16-bit grey is scaled by its own min…max to 0…255; colour of 16 bits keeps its upper 8. EXIF
    orientation is applied. Alpha is dropped where it is opaque, else the image is laid on black. A
    constant image is not a fault here. Raises InputError for a file that is missing, empty,
    truncated, corrupt, animated, CMYK, too large or not of these.
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
            return _to_array(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: cannot be opened as {' or '.join(FORMATS)}, the formats "
                         f"allowed") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path}: more than {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, …
        raise InputError(f"{path}: damaged image ({str(error) or type(error).__name__})") from None


def write(path: str | Path, image: np.ndarray | Tensor,
          text: Mapping[str, str] | None = None) -> None:
    """Write uint8 (H,W) or (C,H,W), C = 1 or 3, as a PNG; the file appears whole or not at all."""
    assert Path(path).suffix == ".png", path
    write_atomic(path, png_bytes(image, text), durable=False)


def png_bytes(image: np.ndarray | Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """The PNG file of uint8 (H,W) or (C,H,W), or of uint16 (H,W), with text chunks."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        # a keyword of PNG is short and Latin-1
        info.add_text(key.encode("latin-1", "backslashreplace").decode("latin-1")[:79], str(value))
    buffer = io.BytesIO()
    _to_pil(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 (C,H,W) so that its shorter side is `size`, and keep the central square: uint8
    (C,size,size).

    Never padded: a border would show the aspect ratio, from which the label of public collections
    can be predicted.
    """
    _, height, width = image.shape
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    resized = _to_pil(image).resize((size, size), Image.Resampling.BICUBIC, box)  # antialiased
    return _channels_first(np.asarray(resized))


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


def _check_header(path: Path, data: bytes) -> None:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        (width, height), frames = image.size, getattr(image, "n_frames", 1)
        for wrong, text in (
            (width * height > MAX_PIXELS or max(width, height) > MAX_SIDE,
             f"{width} x {height} pixels; allowed are {MAX_PIXELS // 10**6} megapixels and sides "
             f"to {MAX_SIDE}"),
            (frames > 1, f"animated ({frames} frames); one still image is needed"),
            (image.mode not in (*NARROW, *WIDE), f"mode {image.mode}; allowed are grey, RGB, "
             "palette and 16-bit grey"),
        ):
            if wrong:
                raise InputError(f"{path}: {text}")
        image.verify()  # the checksums of a PNG


def _to_array(image: Image.Image) -> np.ndarray:
    if image.mode in WIDE:
        return _scale_by_range(np.asarray(image))[None]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[None]
    black = Image.new("RGBA", image.size, "black")
    image = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    colour = _channels_first(np.asarray(image))
    return colour[:1] if (colour == colour[0]).all() else colour


def _scale_by_range(wide: np.ndarray) -> np.ndarray:
    # Pillow's convert("L") clips at 255, which turns a 16-bit radiograph white; and detectors use
    # 10 to 14 of the 16 bits, so that dividing by 257 would leave most of them nearly black.
    x = wide.astype(np.float64)
    low, high = x.min(), x.max()
    x = (x - low) * (255 / (high - low)) if high > low else x / 257
    return np.rint(x).astype(np.uint8)


def _to_pil(image: np.ndarray | Tensor) -> Image.Image:
    array = np.asarray(image)
    assert array.dtype in (np.uint8, np.uint16), (array.dtype, array.shape)
    if array.ndim == 3:
        array = array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(array))


def _channels_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
