"""The files of one DICOM series, or one enhanced file of many frames → a Volume, or the reason why
not. Runs behind the guard."""

from pathlib import Path

import numpy as np

from minidiff.data.dicom import Dataset, Refused, pixels, reader, tags
from minidiff.data.dicom.pixels import text
from minidiff.data.volumes import MAX_VOXELS, MODALITIES, TILT, Volume, in_lps

# Files that differ in one of these are of different volumes, though of one series.
APART = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "EchoNumbers", "EchoTime",
         "TemporalPositionIdentifier", "Rows", "Columns", "ImageOrientationPatient")
NEEDED = (*APART, "ImagePositionPatient", "ImageType", "SliceThickness")
GROUPS = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
FRAMES = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
SAME = 0.01   # mm between slices that are one
EVEN = 0.1    # share of the usual step by which a step may differ


def describe(path: str) -> str:
    """What the files of a volume have in common, as one text; raises Refused for other files."""
    from pydicom import dcmread

    ds = dcmread(path, stop_before_pixels=True, force=True,
                 specific_tags=[*NEEDED, *FRAMES, "Modality", "SOPInstanceUID"])
    if text(ds, "Modality") not in MODALITIES:
        raise Refused("modality", text(ds, "Modality") or "none")
    if "LOCALIZER" in text(ds, "ImageType").upper():
        raise Refused("scout")
    places = frames(ds)
    if not text(ds, "SeriesInstanceUID") or any(
            len(_numbers(place, name)) != n for place in places
            for name, n in (("ImageOrientationPatient", 6), ("ImagePositionPatient", 3))):
        raise Refused("geometry", "no series, orientation or position")
    turned = {" ".join(f"{round(x, 2) + 0.0:.2f}"  # no −0.00
                       for x in _numbers(place, "ImageOrientationPatient")) for place in places}
    if len(turned) > 1:
        raise Refused("geometry", f"frames of {len(turned)} orientations")
    whole = [text(ds, "SOPInstanceUID")] if FRAMES[1] in ds else []  # such a file is a volume
    return "\n".join([*(text(ds, name) for name in APART[:-1]), *turned, *whole])


def frames(ds: Dataset) -> list[Dataset]:
    """Where each frame of an enhanced file lies, by its functional groups (PS3.3 C.7.6.16.2); of a
    plain file, the file itself."""
    if FRAMES[1] not in ds:
        return [ds]
    found = []
    for own in ds[FRAMES[1]].value:
        place = type(own)()
        for group in (*list(ds.get(FRAMES[0]) or [])[:1], own):
            for name in GROUPS:
                place.update({e.tag: e for item in list(group.get(name) or [])[:1] for e in item})
        found.append(place)
    return found


def read(paths: list[str], salt: bytes, accept: tuple[str, ...] = ()) -> Volume:
    """The volume of these files, in any order. Raises Refused, for doubled slices, too.

    Where steps are uneven (a slice is missing) or the gantry was tilted, it may be cut across the
    axis of the slices alone: `only`.
    """
    files = [reader.load(Path(path).read_bytes(), NEEDED) for path in paths]
    for ds in files:
        reader.check_burned_in(ds, accept)
    # each slice: where it lies, the file, and its frame there, from 1
    found = [(place, ds, k) for ds in files for k, place in enumerate(frames(ds), 1)]
    first, rows, columns = found[0][0], files[0].Rows, files[0].Columns
    if rows * columns * len(found) > MAX_VOXELS:
        raise Refused("size", f"{columns} x {rows} x {len(found)}")
    turned = np.array(_numbers(first, "ImageOrientationPatient"))
    along_row, along_column = turned[:3], turned[3:]
    normal = np.cross(along_row, along_column)
    positions = np.array([_numbers(place, "ImagePositionPatient") for place, *_ in found])
    order = np.argsort(positions @ normal, kind="stable")
    positions, steps = positions[order], np.diff(positions[order] @ normal)
    if len(steps) and steps.min() < SAME:
        raise Refused("doubled", f"{int((steps < SAME).sum())} slices")
    usual = float(np.median(steps)) if len(steps) else _thickness(first)
    uneven = len(steps) and np.abs(steps - usual).max() > EVEN * usual
    sideways = np.diff(positions, axis=0) - steps[:, None] * normal
    tilted = len(steps) and np.linalg.norm(sideways, axis=1).max() > TILT * usual
    values = np.stack([physical(*found[k][1:]).T for k in order], 2)  # (columns, rows, slices)
    spacing = _numbers(first, "PixelSpacing")
    if len(spacing) != 2:
        raise Refused("geometry", "no PixelSpacing")
    ways = np.stack([along_row * spacing[1], along_column * spacing[0], normal * usual], 1)
    turned, mm, was = in_lps(values, ways)
    facts = tags.facts(files[0], salt)
    name = tags.keyed(salt, "series", text(files[0], "SeriesInstanceUID"))
    facts |= {"patient": facts["patient"] or "v" + name, "volume": name}
    only = was.index(2) if uneven or tilted or len(found) == 1 else None
    return Volume(turned, mm, facts, only)


def physical(ds: Dataset, frame: int) -> np.ndarray:
    """(H,W) float32 after the rescale; padding has the least value beside it. Of a MONOCHROME1 of
    other than Hounsfield units, negative: what is high there is dark."""
    values, padding = pixels.physical(ds, frame)
    if text(ds, "Modality") == "CT" and not pixels.in_hounsfield(ds):
        raise Refused("scale", "not in Hounsfield units")
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
