"""Stored values of a DICOM image → grey as a viewer shows it (DICOM PS3.3 C.7.6.3, C.11.1, C.11.2).

    stored ─ modality: LUT | rescale ─▶ physical ─ VOI: LUT | window | percentile ─▶ 0…1
           ─ MONOCHROME1: 1 − y ─▶ uint

A stored value has 16 bits at most. So this is computed once, in float64, for every value between
the least and the greatest that occur, and the pixels are looked up: exact, and without a float
image. Padding becomes black.
"""

import numpy as np
from scipy.special import expit

from minidiff.data.dicom import MAX_FRAMES, Dataset, Refused
from minidiff.data.images import MAX_PIXELS, MAX_SIDE, PERCENTILES

PRESETS = {"lung": (-600, 1500), "soft": (40, 400), "bone": (400, 1800),  # centre, width in HU
           "wide": (0, 2000)}  # for 16 bits, of which any of the others is cut later
GREY_IN_FACT = 2  # grey levels by which channels of grey may differ after lossy compression
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio")
NEEDED = (  # the elements, besides the pixels, that this module reads
    "Modality", "ImageType", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", *SPACINGS, "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "RescaleType", "VOILUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)


def grey(ds: Dataset, *, frame: int = 0, window: str = "auto", bits: int = 8) -> np.ndarray:
    """The image of a dataset: uint8 or uint16 (H,W), bright = dense as the file means it.

    frame: 0 for an image of one frame, else counted from 1. window: "file" applies the first VOI
    LUT or else the first window of the file; "percentile" spreads the middle 99 % (padding apart)
    over the range; the presets are for CT alone; "auto" is the percentile for MR, the file's own
    for all but CT, and where it has none, 8 bits as they are and more bits by percentile. Raises
    Refused.
    """
    frame = _check(ds, frame)
    pixels = _stored(ds, frame)
    if pixels.ndim == 3:  # many radiographs come as a Secondary Capture of three equal channels
        if (pixels.max(2) - pixels.min(2)).max() > GREY_IN_FACT:
            raise Refused("colour", "its channels differ")
        return np.rint(pixels.mean(2)).astype(f"uint{bits}") * (1 if bits == 8 else 257)
    places, counts, values, padding = _values(ds, pixels, frame)
    rescaled, span = modality(ds, values)
    shown = voi(ds, rescaled, span, counts, window)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    shown[padding] = 0
    return np.rint(shown * (2**bits - 1)).astype(f"uint{bits}")[places]


def physical(ds: Dataset, frame: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image of one frame, or one of its frames, from 1: rescaled values (H,W), float32, and
    where it is padding. The dataset gets the rescale of that frame. Raises Refused."""
    frame = _check(ds, frame)
    pixels = _stored(ds, frame)
    if pixels.ndim == 3:
        raise Refused("colour")
    places, _, values, padding = _values(ds, pixels, frame)
    rescaled, _ = modality(ds, values)
    return rescaled.astype(np.float32)[places], padding[places]


def _values(ds: Dataset, pixels: np.ndarray,
            frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The place of each pixel in a table of stored values; how often each occurs, padding apart;
    these values; and which are padding."""
    _take_frame_groups(ds, frame)
    low = int(pixels.min())
    places = pixels.astype(np.int32) - low
    counts = np.bincount(places.ravel())
    values = low + np.arange(len(counts))
    padding = _padding(ds, values)
    counts[padding] = 0
    return places, counts, values, padding


def modality(ds: Dataset, values: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Stored values → physical ones, float64, and the range that these can have."""
    bits = number(ds, "BitsStored")
    stored = np.array([0, 2**bits - 1]) - (2 ** (bits - 1) if ds.PixelRepresentation else 0)
    if ds.get("ModalityLUTSequence"):
        found, top = _look_up(ds, ds.ModalityLUTSequence[0], values, signed=stored[0] < 0)
        return found, (0, top)
    if ds.get("RescaleSlope") is not None and ds.get("RescaleIntercept") is not None:
        slope, intercept = float(ds.RescaleSlope), float(ds.RescaleIntercept)
        if slope == 0 or not np.isfinite((slope, intercept)).all():
            raise Refused("damaged", f"rescale {slope} · x + {intercept}")
        values, stored = slope * values + intercept, slope * stored + intercept
    return values.astype(np.float64), (min(stored), max(stored))


def voi(ds: Dataset, physical: np.ndarray, span: tuple[float, float], counts: np.ndarray,
        window: str) -> np.ndarray:
    """Physical values → 0…1; `counts` says how often each occurs."""
    kind = text(ds, "Modality")
    if (window in PRESETS and not in_hounsfield(ds)) or (window == "auto" and kind == "CT"):
        raise Refused("window", f"window {window}, Modality {kind}")
    if window in PRESETS:
        return windowed(physical, *PRESETS[window])
    if window == "file" or (window == "auto" and kind != "MR"):
        if ds.get("VOILUTSequence"):
            found, top = _look_up(ds, ds.VOILUTSequence[0], np.rint(physical).astype(np.int64),
                                  signed=span[0] < 0)
            return np.minimum(found / top, 1)
        centre, width = _first(ds, "WindowCenter"), _first(ds, "WindowWidth")
        if (centre is None) != (width is None):
            raise Refused("window_values", f"WindowCenter {centre}, WindowWidth {width}: one of "
                          "them is absent")
        if centre is not None and width is not None:
            return windowed(physical, centre, width, text(ds, "VOILUTFunction") or "LINEAR")
        if window == "file":
            raise Refused("window", "the file has neither a VOI LUT nor a window")
        if number(ds, "BitsStored") == 8:
            return (physical - span[0]) / (span[1] - span[0])
    if not counts.any():
        raise Refused("window", "nothing but padding")
    low, high = np.percentile(np.repeat(physical, counts), PERCENTILES, method="inverted_cdf")
    return np.clip((physical - low) / max(high - low, np.finfo(float).tiny), 0, 1)


def in_hounsfield(ds: Dataset) -> bool:
    """A CT whose rescaled values are Hounsfield units."""
    return (text(ds, "Modality") == "CT" and text(ds, "RescaleType") in ("", "HU")
            and ds.get("RescaleIntercept") is not None
            and "LOCALIZER" not in str(ds.get("ImageType")))  # a scout has other units


def windowed(x: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """A VOI LUT Function (PS3.3 C.11.2.1.2, C.11.2.1.3): 0…1. LINEAR ends half a value within its
    bounds."""
    shapes = {"LINEAR": lambda: np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1),
              "LINEAR_EXACT": lambda: np.clip((x - centre) / width + 0.5, 0, 1),
              "SIGMOID": lambda: expit(4 * (x - centre) / width)}
    least = 1 if function == "LINEAR" else np.finfo(float).tiny
    if function not in shapes or not np.isfinite((centre, width)).all() or width < least:
        raise Refused("window_values", f"WindowCenter {centre:g}, WindowWidth {width:g}, "
                      f"{function}: the width must be {'1' if least == 1 else 'above 0'} or more, "
                      f"the function one of {', '.join(shapes)}")
    if (function, width) == ("LINEAR", 1):
        return (x > centre - 0.5).astype(np.float64)
    return shapes[function]()


# --- reading elements


def text(ds: Dataset, name: str) -> str:
    """An element as text; "" where it is absent or empty."""
    value = ds.get(name)
    return "" if value is None else str(value).strip()


def number(ds: Dataset, name: str, default: int | None = None) -> int:
    """An element as one integer. Raises Refused where it is none."""
    value = ds.get(name, default)
    try:
        return int(default if value is None or value == "" else value)  # None is no number either
    except (TypeError, ValueError):
        raise Refused("damaged", f"{name} is not a number") from None


def _first(ds: Dataset, name: str) -> float | None:
    """A number, or the first of several; None where there is none."""
    try:
        value = next(iter(np.ravel(ds.get(name)).tolist()), None)
        return None if value in (None, "") else float(value)
    except ValueError as error:  # pydicom reads an element when it is asked for
        raise Refused("window_values", f"{name}: {error}") from None


def _look_up(ds: Dataset, item: Dataset, values: np.ndarray, *,
             signed: bool) -> tuple[np.ndarray, int]:
    """Values through a LUT (PS3.3 C.11.1.1), float64, and the greatest that it can give."""
    n, first, bits = (int(v) & 0xFFFF for v in item.LUTDescriptor)  # read as US or as SS
    n, first = n or 2**16, first - 2**16 if signed and first >= 2**15 else first
    data = item["LUTData"].value
    if isinstance(data, bytes):
        wide = len(data) >= 2 * n
        order = "<" if ds.original_encoding[1] else ">"
        data = np.frombuffer(data[: 2 * n if wide else n], order + "u2" if wide else "u1")
    entries = np.atleast_1d(np.asarray(data, np.int64))[:n] & 0xFFFF
    if not 8 <= bits <= 16 or len(entries) < n:
        raise Refused("damaged",
                      f"LUT of {n} entries of {bits} bits, with {len(entries)} in the file")
    return entries[np.clip(values - first, 0, n - 1)].astype(np.float64), 2**bits - 1


def _padding(ds: Dataset, values: np.ndarray) -> np.ndarray:
    """Which values stand for no image (PS3.3 C.7.5.1.1.2): one, or those from it to the limit."""
    value, limit = ds.get("PixelPaddingValue"), ds.get("PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return np.zeros(len(values), bool)
    ends = np.array([value, limit if isinstance(limit, int) else value])  # read as US or as SS
    ends = ends.astype(np.int16 if ds.PixelRepresentation else np.uint16)
    return (values >= ends.min()) & (values <= ends.max())


def _take_frame_groups(ds: Dataset, frame: int) -> None:
    """Copy rescale and window of one frame of an enhanced image out of its functional groups."""
    groups = list(ds.get("SharedFunctionalGroupsSequence") or [])[:1]
    groups += list(ds.get("PerFrameFunctionalGroupsSequence") or [])[frame : frame + 1]
    names = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    for item in (group.get(name)[0] for group in groups for name in names if group.get(name)):
        ds.update({element.tag: element for element in item})


# --- pixels


def _check(ds: Dataset, frame: int) -> int:
    """Judge the header before a pixel is decoded; the frame counted from 0."""
    rows, columns = number(ds, "Rows"), number(ds, "Columns")
    frames, kind = number(ds, "NumberOfFrames", 1) or 1, text(ds, "PhotometricInterpretation")
    allocated, stored = number(ds, "BitsAllocated"), number(ds, "BitsStored")
    samples, high = number(ds, "SamplesPerPixel", 1), number(ds, "HighBit")
    sign, allowed = number(ds, "PixelRepresentation"), (8, 16) if samples == 1 else (8,)
    expected = 1 if kind in ("MONOCHROME1", "MONOCHROME2") else 3
    for key, wrong, detail in (
        ("size", rows * columns > MAX_PIXELS or max(rows, columns) > MAX_SIDE
         or min(rows, columns) < 1, f"{columns} x {rows}"),
        ("frames", not 1 <= frames <= MAX_FRAMES or (frames > 1 and not 1 <= frame <= frames),
         f"{frames} frames" + (f", --frame {frame}" if frame else "")),
        ("colour", kind == "PALETTE COLOR", kind),
        ("damaged", sign not in (0, 1) or samples != expected,
         f"PixelRepresentation {sign}; {samples} samples a pixel, {kind!r}"),
        ("bits", allocated not in allowed or not 8 <= stored <= allocated or high != stored - 1,
         f"{allocated} allocated, {stored} stored, highest {high}, {samples} samples a pixel"),
        # with MONOCHROME1 it says the same thing a second time (PS3.3 C.8.11.3)
        ("sense", (kind, text(ds, "PresentationLUTShape")) == ("MONOCHROME2", "INVERSE"), ""),
    ):
        if wrong:
            raise Refused(key, detail)
    for name in SPACINGS:
        sides = np.ravel(ds.get(name))
        if len(sides) == 2 and abs(float(sides[0]) - float(sides[1])) > 0.01 * abs(sides[1]):
            raise Refused("stretched", f"{name} {sides[0]:g} x {sides[1]:g}")
    return max(frame, 1) - 1 if frames > 1 else 0


def _stored(ds: Dataset, frame: int) -> np.ndarray:
    """One frame as (H,W) integers without the bits above the stored ones (old overlays), or as RGB
    (H,W,3)."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder, pixel_array

    syntax = ds.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused("codec", f"{syntax.name}: pydicom knows no decoder") from None
    if not decoder.is_available:
        raise Refused("codec", f"{syntax.name}: install one of "
                      f"{'; '.join(decoder.missing_dependencies)}")
    if syntax.is_encapsulated:
        stream = get_frame(ds.PixelData, frame,
                           number_of_frames=number(ds, "NumberOfFrames", 1) or 1)
        size = codestream_size(stream)
        if size and size != (ds.Rows, ds.Columns):
            raise Refused("mismatch", f"{size[1]} x {size[0]} compressed, {ds.Columns} x {ds.Rows} "
                          "in the header")
    pixels = pixel_array(ds, index=frame)
    if pixels.shape[:2] != (ds.Rows, ds.Columns):
        raise Refused("mismatch", f"{pixels.shape} decoded")
    return pixels


def codestream_size(stream: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream names, before anything is decoded;
    None for others.

    Decoders believe the size in the stream: a huge one behind a small header would fill the memory.
    """
    siz = stream.find(b"\xff\x4f\xff\x51")  # JPEG 2000: SOC, then SIZ (ISO 15444-1 A.5.1)
    if 0 <= siz < 4096 and len(stream) >= siz + 24:
        right, down, left, top = (int.from_bytes(stream[siz + k : siz + k + 4], "big")
                                  for k in (8, 12, 16, 20))
        return down - top, right - left
    at = 2  # JPEG: from marker to marker
    while stream[:2] == b"\xff\xd8" and at + 9 <= len(stream) and stream[at] == 0xFF:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0xF7 or marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            # start of frame
            return tuple(int.from_bytes(stream[at + k : at + k + 2], "big") for k in (5, 7))
        else:
            at += 2 + length
    return None
