"""Synthetic images as DICOM Secondary Capture (PS3.3 A.8.1) that say in their tags, and on request
in their pixels, that they show no patient.

Every image is a patient, a study and a series of its own, since sex and age differ from image to
image. Its UIDs are derived from its content (2.25., PS3.5 B.2): they belong to nobody, and the same
command makes the same files.
"""

import io
import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import minidiff
from minidiff import runs
from minidiff.cells import in_units
from minidiff.data import images
from minidiff.data.dicom import Dataset, claim_out, need_pydicom
from minidiff.data.dicom.reader import SYNTHETIC
from minidiff.data.dicom.tags import sex
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.variables import RESERVED, to_number

NOTICE = "SYNTHETIC - NOT A PATIENT"
LINES = (NOTICE, "SYNTHETIC -\nNOT A PATIENT", "SYNTHETIC\nNOT A\nPATIENT")  # the first that fits
SPACE = uuid.UUID("5f0d5a9e-6f1f-4d55-9d0e-6d6e69646966")  # of our UIDs: any fixed one
RECIPE = ("sampler", "steps", "guidance")  # columns that say how an image was drawn
OTHER = (*RESERVED, *RECIPE, "source", "origin", "mask", "change", "window",
         "outside_training")  # not conditions


@dataclass(frozen=True)
class ExportConfig:
    positional: ClassVar[str] = "samples"
    samples: str = "runs/demo/samples"  # finished folder of samples; first, without its flag
    out: str = ""                       # new folder of DICOM files
    burn_in: bool = False               # write the notice into the pixels' corner, too


def export_samples(cfg: ExportConfig) -> None:
    """Write a folder of samples as DICOM Secondary Capture marked as synthetic.

    Raises InputError for a folder without a manifest, which alone proves that images are synthetic,
    and for files that differ from the manifest.
    """
    need_pydicom()
    if not cfg.out:
        raise InputError("export needs --out DIR")
    samples, out = Path(cfg.samples), Path(cfg.out)
    if not (samples / "manifest.json").is_file():
        raise InputError(f"{samples} has no manifest.json: only what `python sample.py` drew is "
                         "exported as synthetic")
    manifest = runs.read_json(samples / "manifest.json")
    hashes, model = manifest.get("sha256", {}), manifest.get("model", "")
    rows = read_table(samples, split=False, check=False).rows
    changed = [row["file"] for row in rows
               if hashes.get(row["file_name"]) != runs.sha256(row["file"])]
    if changed or not model:
        raise InputError(f"{samples}: {len(changed)} of {len(rows)} images differ from the "
                         f"manifest, or it names no model: {', '.join(changed[:3])}")
    claim_out(out, "export.csv", "export")
    index = [{"file_name": Path(row["file_name"]).with_suffix(".dcm").as_posix(),
              "label": row["label"], "source": row["file_name"], "seed": row.get("seed", ""),
              "burned_in": cfg.burn_in} for row in rows]
    write_table(out / "export.csv", index)  # first: its presence says whose folder it is
    for row, line in zip(tqdm(rows, "exporting", unit=" images"), index):
        pixels = images.read(row["file"], deep=True)
        ds = dataset(burn(pixels) if cfg.burn_in else pixels, row, model=model,
                     burned_in=cfg.burn_in)
        line["sop_instance_uid"] = ds.SOPInstanceUID
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        runs.write_atomic(out / line["file_name"], buffer.getvalue(), durable=False)
    write_table(out / "export.csv", index)
    print(f"{out}: {len(rows)} DICOM files, each marked {NOTICE!r}")


def dataset(pixels: np.ndarray, row: Mapping[str, str], *, model: str, burned_in: bool) -> Dataset:
    """Secondary Capture of uint8 (C,H,W), C = 1 or 3, or uint16 (1,H,W); `row` is that of
    metadata.csv, `model` the sha256 of its weights."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset

    channels, height, width = pixels.shape
    conditions = "; ".join(f"{name}={cell}" for name, cell in row.items()
                           if name not in (*OTHER, "file", "where") and cell
                           and not name.startswith("before_"))
    recipe = "; ".join(f"{name} {row[name]}" for name in ("seed", *RECIPE) if row.get(name))
    start = "from a real image, changed" if row.get("origin") else "from noise"
    start += f" to {row['change']}" if row.get("change") else ""
    bits, window = 8 * pixels.itemsize, in_units(row.get("window", ""))
    data = pixels.transpose(1, 2, 0).astype(pixels.dtype.newbyteorder("<")).tobytes()
    elements = _identity(row, key=f"{model} {row.get('seed', '')} {row['file_name']} "
                         f"{uuid.uuid5(SPACE, pixels.tobytes().hex())}") | {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED", "SECONDARY", SYNTHETIC],
        "DerivationDescription": f"{NOTICE}. Drawn {start}, by a diffusion model, sha256 {model}; "
                                 f"{recipe}; minidiff {minidiff.__version__}"[:1024],
        "ImageComments": f"{NOTICE}. Conditions: {conditions}"[:10240],
        "ContentQualification": "RESEARCH",
        "BurnedInAnnotation": "YES" if burned_in else "NO",
        "LossyImageCompression": "00",
        "SamplesPerPixel": channels,
        "PhotometricInterpretation": "MONOCHROME2" if channels == 1 else "RGB",
        **({"PlanarConfiguration": 0} if channels == 3 else {}),
        **(_scale(*window, 2**bits - 1) if window and channels == 1 else {}),
        "Rows": height, "Columns": width, "BitsAllocated": bits, "BitsStored": bits,
        "HighBit": bits - 1, "PixelRepresentation": 0, "PixelData": data + b"\0" * (len(data) % 2),
    }
    ds = _filled(Dataset(), elements)
    ds["PixelData"].VR = "OB" if bits == 8 else "OW"
    ds.file_meta = _filled(FileMetaDataset(), {
        "TransferSyntaxUID": uid.ExplicitVRLittleEndian,
        "MediaStorageSOPClassUID": uid.SecondaryCaptureImageStorage,
        "MediaStorageSOPInstanceUID": ds.SOPInstanceUID,
        "ImplementationClassUID": uid.PYDICOM_IMPLEMENTATION_UID,
        "ImplementationVersionName": "MINIDIFF",
    })
    ds.SOPClassUID = uid.SecondaryCaptureImageStorage
    return ds


def _scale(low: float, high: float, unit: str, top: int) -> dict[str, str]:
    """From 0 … top to the values of black and white in a window; and that window itself (PS3.3
    C.11.1, C.11.2)."""
    return {"RescaleIntercept": f"{low:.10g}", "RescaleSlope": f"{(high - low) / top:.10g}",
            "RescaleType": unit or "US",  # unspecified
            "WindowCenter": f"{(low + high) / 2:.10g}", "WindowWidth": f"{high - low:.10g}",
            "VOILUTFunction": "LINEAR_EXACT"}


def _filled(ds: Dataset, elements: Mapping[str, object]) -> Dataset:
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def _identity(row: Mapping[str, str], key: str) -> dict[str, str | None]:
    """Elements of patient, study, series and equipment; all names say that there is no patient.

    None: the element must be there, and its value is unknown.
    """
    image, series, study = (uuid.uuid5(SPACE, f"{level} {key}")
                            for level in ("image", "series", "study"))
    age = to_number(row.get("age", ""))
    unknown = ("PatientBirthDate", "StudyDate", "StudyTime", "ReferringPhysicianName",
               "AccessionNumber", "PatientOrientation", "Laterality")
    return {
        "SOPInstanceUID": f"2.25.{image.int}", "SeriesInstanceUID": f"2.25.{series.int}",
        "StudyInstanceUID": f"2.25.{study.int}",
        "PatientName": "SYNTHETIC^NOT A PATIENT", "PatientID": f"{SYNTHETIC}-{study.hex[:16]}",
        "PatientSex": sex(row.get("sex", "")),
        **({"PatientAge": f"{int(age):03d}Y"} if 0 <= age < 1000 else {}),
        **dict.fromkeys(unknown),
        "StudyID": "1", "SeriesNumber": "1", "InstanceNumber": "1",
        "Modality": "OT", "ConversionType": "SYN",  # other; synthetic image
        "StudyDescription": NOTICE, "SeriesDescription": NOTICE,
        "Manufacturer": "minidiff", "SoftwareVersions": minidiff.__version__,
    }


def burn(pixels: np.ndarray) -> np.ndarray:
    """Write the notice into the lower left corner, white on black; a copy of uint8 or uint16
    (C,H,W)."""
    channels, height, width = pixels.shape
    sheet = Image.fromarray(np.zeros((height, width), np.uint8))
    draw = ImageDraw.Draw(sheet)
    for size, words in itertools.product((max(10, min(height, width) // 32), 10, 8), LINES):
        font = ImageFont.load_default(size)
        left, top, right, bottom = draw.multiline_textbbox((0, 0), words, font, spacing=1)
        if right - left + 4 <= width and bottom - top + 4 <= height // 2:
            break
    else:
        raise InputError(f"--burn-in needs images of 64 or more pixels a side; these have {width} "
                         f"x {height}")
    box_top, box_right = height - int(bottom - top) - 4, int(right - left) + 4
    draw.multiline_text((2 - left, box_top + 2 - top), words, 255, font, spacing=1)
    burned, notice = pixels.copy(), images.in_depth(np.array(sheet), 8 * pixels.itemsize)
    burned[:, box_top:, :box_right] = notice[None, box_top:, :box_right]
    return burned
