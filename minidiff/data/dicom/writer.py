"""Synthetic images as DICOM Secondary Capture (PS3.3 A.8.1) that say in their tags, and on request
in their pixels, that they show no patient.

Every image is a patient, a study and a series of its own, for conditions such as sex and age differ
from image to image. Its UIDs are made of its content (2.25., PS3.5 B.2): none belongs to anybody,
and the same command makes the same files.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import minidiff
from minidiff import runs
from minidiff.data import images
from minidiff.data.dicom.reader import SYNTHETIC
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.variables import RESERVED

if TYPE_CHECKING:
    from pydicom import Dataset

NOTICE = "SYNTHETIC - NOT A PATIENT"
# as wide as the image allows
LINES = (NOTICE, "SYNTHETIC -\nNOT A PATIENT", "SYNTHETIC\nNOT A\nPATIENT")
SPACE = uuid.UUID("5f0d5a9e-6f1f-4d55-9d0e-6d6e69646966")  # of our UIDs: any fixed one
RECIPE = ("sampler", "steps", "guidance")  # columns that say how an image was drawn
# what is left are the conditions
OTHER = (*RESERVED, *RECIPE, "source", "origin", "outside_training")


def export(samples: Path, out: Path, *, burn_in: bool = False) -> int:
    """Write every image of a finished sample folder as a DICOM file of the same name; how many.

    Raises InputError for a folder without a manifest, since of nothing else is it known to be
    synthetic, and for files that are not as the manifest has them.
    """
    if not (samples / "manifest.json").is_file():
        raise InputError(f"{samples} has no manifest.json: only what `python sample.py` drew is "
                         "exported as synthetic")
    manifest = runs.read_json(samples / "manifest.json")
    hashes, model = manifest.get("sha256", {}), manifest.get("model", "")
    rows = read_table(samples, split=False, check=False).rows
    changed = [row["file"] for row in rows
               if hashes.get(row["file_name"]) != runs.sha256(row["file"])]
    if changed or not model:
        raise InputError(f"{samples}: {len(changed)} of {len(rows)} images are not as the manifest "
                         f"has them, or it names no model: {', '.join(changed[:3])}")
    if out.exists() and (not out.is_dir()
                         or any(out.iterdir())) and not (out / "export.csv").is_file():
        raise InputError(f"{out} exists and is no export; give another --out, nothing there is "
                         "overwritten")
    index = [{"file_name": Path(row["file_name"]).with_suffix(".dcm").as_posix(),
              "label": row["label"], "source": row["file_name"], "seed": row.get("seed", ""),
              "burned_in": burn_in} for row in rows]
    write_table(out / "export.csv", index)  # first: its presence says whose folder it is
    for row, line in zip(tqdm(rows, "exporting", unit=" images"), index):
        pixels = images.read(row["file"])
        ds = dataset(burn(pixels) if burn_in else pixels, row, model=model, burned_in=burn_in)
        line["sop_instance_uid"] = ds.SOPInstanceUID
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        runs.write_atomic(out / line["file_name"], buffer.getvalue(), durable=False)
    write_table(out / "export.csv", index)
    return len(rows)


def dataset(pixels: np.ndarray, row: Mapping[str, str], *, model: str, burned_in: bool) -> Dataset:
    """Secondary Capture of uint8 (C,H,W), C = 1 or 3; `row` is that of metadata.csv, model the
    sha256 of its weights.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import (
        PYDICOM_IMPLEMENTATION_UID,
        ExplicitVRLittleEndian,
        SecondaryCaptureImageStorage,
    )

    channels, height, width = pixels.shape
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    _identity(ds, row, key=f"{model} {row.get('seed', '')} {row['file_name']} "
              f"{uuid.uuid5(SPACE, pixels.tobytes().hex())}")
    conditions = {name: cell for name, cell in row.items()
                  if name not in (*OTHER, "file", "where") and cell}
    drawn = "; ".join(f"{name} {row[name]}" for name in ("seed", *RECIPE) if row.get(name))
    start = "from a real image, changed" if row.get("origin") else "from noise"
    ds.ImageType = ["DERIVED", "SECONDARY", SYNTHETIC]
    ds.DerivationDescription = (f"{NOTICE}. Drawn {start}, by a diffusion model, sha256 {model}; "
                                f"{drawn}; minidiff {minidiff.__version__}")[:1024]
    ds.ImageComments = (f"{NOTICE}. Conditions: "
                        + "; ".join(f"{n}={c}" for n, c in conditions.items()))[:10240]
    ds.ContentQualification = "RESEARCH"
    ds.BurnedInAnnotation = "YES" if burned_in else "NO"
    ds.LossyImageCompression = "00"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = channels, "MONOCHROME2" if channels == 1 else "RGB"
    if channels == 3:
        ds.PlanarConfiguration = 0
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = height, width, 8, 8, 7, 0
    data = np.ascontiguousarray(pixels.transpose(1, 2, 0)).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.ImplementationClassUID, ds.file_meta.ImplementationVersionName = PYDICOM_IMPLEMENTATION_UID, "MINIDIFF"
    return ds


def _identity(ds: Dataset, row: Mapping[str, str], key: str) -> None:
    """Who, which study, series and equipment; every name says that there is no patient. Empty: must
    be there, unknown.
    """
    made = {level: uuid.uuid5(SPACE, f"{level} {key}") for level in ("image", "series", "study")}
    ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.StudyInstanceUID = (f"2.25.{made[level].int}"
                                                                    for level in made)
    ds.PatientName, ds.PatientID = "SYNTHETIC^NOT A PATIENT", f"{SYNTHETIC}-{made['study'].hex[:16]}"
    ds.PatientSex = row["sex"] if row.get("sex") in ("F", "M", "O") else ""
    age = row.get("age", "")
    if age.replace(".", "", 1).isdigit() and 0 <= float(age) < 1000:
        ds.PatientAge = f"{int(float(age)):03d}Y"
    for name in ("PatientBirthDate", "StudyDate", "StudyTime", "ReferringPhysicianName",
                 "AccessionNumber", "PatientOrientation", "Laterality"):
        setattr(ds, name, None)
    ds.StudyID = ds.SeriesNumber = ds.InstanceNumber = "1"
    ds.Modality, ds.ConversionType = "OT", "SYN"  # other; synthetic image
    ds.StudyDescription = ds.SeriesDescription = NOTICE
    ds.Manufacturer, ds.SoftwareVersions = "minidiff", minidiff.__version__


def burn(pixels: np.ndarray) -> np.ndarray:
    """Write the notice into the lower left corner, white on black; a copy of uint8 (C,H,W)."""
    channels, height, width = pixels.shape
    sheet = Image.fromarray(np.zeros((height, width), np.uint8))
    draw = ImageDraw.Draw(sheet)
    for size, words in ((size, words) for size in (max(10, min(height, width) // 32), 10, 8)
                        for words in LINES):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.multiline_textbbox((0, 0), words, font, spacing=1)
        if right - left + 4 <= width and bottom - top + 4 <= height // 2:
            break
    else:
        raise InputError(f"--burn-in needs images of 64 or more pixels a side; these have {width} "
                         f"x {height}")
    box_top, box_right = height - int(bottom - top) - 4, int(right - left) + 4
    draw.multiline_text((2 - left, box_top + 2 - top), words, 255, font, spacing=1)
    burned = pixels.copy()
    burned[:, box_top:, :box_right] = np.asarray(sheet)[None, box_top:, :box_right]
    return burned
