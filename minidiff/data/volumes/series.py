"""The files of one DICOM series → a Volume, or the reason why not. Runs behind the guard."""

from pathlib import Path

import numpy as np

from minidiff.data.dicom import Dataset, Refused, pixels, reader, tags
from minidiff.data.dicom.pixels import text
from minidiff.data.volumes import MAX_VOXELS, MODALITIES, TILT, Volume, in_lps

# Files that differ in one of these are of different volumes, though of one series.
APART = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "EchoNumbers", "EchoTime",
         "TemporalPositionIdentifier", "Rows", "Columns", "ImageOrientationPatient")
NEEDED = (*APART, "ImagePositionPatient", "ImageType", "SliceThickness")
SAME = 0.01   # mm between slices that are one
EVEN = 0.1    # share of the usual step by which a step may differ


def describe(path: str) -> str:
    """What the files of a volume have in common, as one text; raises Refused for other files."""
    from pydicom import dcmread

    ds = dcmread(path, stop_before_pixels=True, specific_tags=[*NEEDED, "Modality"],
                 force=True)
    if text(ds, "Modality") not in MODALITIES:
        raise Refused("modality", text(ds, "Modality") or "none")
    if "LOCALIZER" in text(ds, "ImageType").upper():
        raise Refused("scout")
    if not text(ds, "SeriesInstanceUID") or len(_numbers(ds, "ImageOrientationPatient")) != 6 \
            or len(_numbers(ds, "ImagePositionPatient")) != 3:
        raise Refused("geometry", "no series, orientation or position")
    turned = " ".join(f"{round(x, 2) + 0.0:.2f}"  # no −0.00
                      for x in _numbers(ds, "ImageOrientationPatient"))
    return "\n".join([*(text(ds, name) for name in APART[:-1]), turned])


def read(paths: list[str], salt: bytes, accept: tuple[str, ...] = ()) -> Volume:
    """The volume of these files, in any order. Raises Refused, for doubled slices, too.

    Where steps are uneven (a slice is missing) or the gantry was tilted, it may be cut across the
    axis of the slices alone: `only`.
    """
    found = [reader.load(Path(path).read_bytes(), NEEDED) for path in paths]
    for ds in found:
        reader.check_burned_in(ds, accept)
        if text(ds, "Modality") == "CT" and not pixels.in_hounsfield(ds):
            raise Refused("scale", "not in Hounsfield units")
    first = found[0]
    rows, columns = first.Rows, first.Columns
    if rows * columns * len(found) > MAX_VOXELS:
        raise Refused("size", f"{columns} x {rows} x {len(found)}")
    turned = np.array(_numbers(first, "ImageOrientationPatient"))
    along_row, along_column = turned[:3], turned[3:]
    normal = np.cross(along_row, along_column)
    positions = np.array([_numbers(ds, "ImagePositionPatient") for ds in found])
    order = np.argsort(positions @ normal, kind="stable")
    positions, steps = positions[order], np.diff(positions[order] @ normal)
    if len(steps) and steps.min() < SAME:
        raise Refused("doubled", f"{int((steps < SAME).sum())} slices")
    usual = float(np.median(steps)) if len(steps) else _thickness(first)
    uneven = len(steps) and np.abs(steps - usual).max() > EVEN * usual
    sideways = np.diff(positions, axis=0) - steps[:, None] * normal
    tilted = len(steps) and np.linalg.norm(sideways, axis=1).max() > TILT * usual
    values = np.stack([physical(found[k]).T for k in order], 2)  # (columns, rows, slices)
    spacing = _numbers(first, "PixelSpacing")
    if len(spacing) != 2:
        raise Refused("geometry", "no PixelSpacing")
    ways = np.stack([along_row * spacing[1], along_column * spacing[0], normal * usual], 1)
    turned, mm, was = in_lps(values, ways)
    facts, name = tags.facts(first, salt), tags.keyed(salt, "series", text(first,
                                                                           "SeriesInstanceUID"))
    facts |= {"patient": facts["patient"] or "v" + name, "volume": name}
    only = was.index(2) if uneven or tilted or len(found) == 1 else None
    return Volume(turned, mm, facts, only)


def physical(ds: Dataset) -> np.ndarray:
    """(H,W) float32 after the rescale; padding has the least value beside it. Of a MONOCHROME1 of
    other than Hounsfield units, negative: what is high there is dark."""
    values, padding = pixels.physical(ds)
    if ds.PhotometricInterpretation == "MONOCHROME1" and text(ds, "Modality") != "CT":
        values = -values
    if padding.any() and not padding.all():
        values[padding] = values[~padding].min()
    return values


def _numbers(ds: Dataset, name: str) -> list[float]:
    try:
        found = [float(x) for x in np.ravel(ds.get(name, []))]
    except (TypeError, ValueError):
        return []
    return found if np.isfinite(found).all() else []


def _thickness(ds: Dataset) -> float:
    return next(iter(_numbers(ds, "SliceThickness")), 1.0)
