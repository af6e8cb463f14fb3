"""DICOM files made for the tests: `make(pixels, **elements)` is a dataset, `encode(ds, syntax)` its
bytes.
"""

import csv
import io

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", minversion="3")
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402

from minidiff.data.dicom import REASONS, folder  # noqa: E402
from minidiff.data.dicom.reader import Options  # noqa: E402

SALT = "ab" * 32
OPTIONS = Options(SALT)
ARRAY = np.arange(48).reshape(6, 8)
NATIVE = {"implicit": uid.ImplicitVRLittleEndian, "explicit": uid.ExplicitVRLittleEndian,
          "big endian": uid.ExplicitVRBigEndian, "deflated": uid.DeflatedExplicitVRLittleEndian}
PACKED = {"RLE": uid.RLELossless, "JPEG-LS": uid.JPEGLSLossless, "JPEG 2000": uid.JPEG2000Lossless}


def make(pixels=ARRAY, stored=8, signed=False, photometric="MONOCHROME2", **elements) -> Dataset:
    """A projection radiograph that states no burned-in text; elements overwrite, None leaves one
    out.
    """
    pixels = np.asarray(pixels)
    allocated = 8 if stored == 8 else 16
    ds = Dataset()
    ds.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID, ds.StudyInstanceUID = "2.25.1", "2.25.2"
    ds.Modality, ds.BurnedInAnnotation, ds.PatientID = "DX", "NO", "12345"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3 if pixels.ndim == 3 else 1), photometric
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = allocated, stored, stored - 1
    ds.PixelRepresentation = int(signed)
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    data = pixels.astype(f"{'i' if signed else 'u'}{allocated // 8}").tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB" if allocated == 8 else "OW"
    for name, value in elements.items():
        setattr(ds, name, value)
        if value is None:
            delattr(ds, name)
    return ds


def encode(ds: Dataset, syntax=uid.ExplicitVRLittleEndian) -> bytes:
    """The file, in a native transfer syntax or compressed without loss."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    native = uid.ExplicitVRLittleEndian if syntax.is_encapsulated else syntax
    ds.file_meta.TransferSyntaxUID = native
    if syntax.is_encapsulated:
        if not pydicom.pixels.get_encoder(syntax).is_available:
            pytest.skip(f"no encoder for {syntax.name} is installed")
        ds.compress(syntax, generate_instance_uid=False)
    if syntax == uid.ExplicitVRBigEndian and ds.BitsAllocated == 16:
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds["PixelData"].VR = "OW"
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def item(**elements) -> Dataset:
    """One item of a sequence."""
    ds = Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def lut(first: int, bits: int, entries, packed: bool = False) -> Dataset:
    """A modality or VOI lookup table."""
    ds = Dataset()
    ds.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) % 65536, first, bits])
    if packed:
        ds.add_new("LUTData", "OW", np.asarray(entries).astype("<u2").tobytes())
    else:
        ds.add_new("LUTData", "US", [int(v) for v in entries])
    return ds


def run(source, out, *, salt=None, **changes) -> int:
    """The import's exit status."""
    given = {"label": "covid", "salt": str(salt or out.parent / "salt"), **changes}
    try:
        folder.import_folder(folder.ImportConfig(source=str(source), out=str(out), **given))
    except SystemExit as end:
        return end.code
    return 0


def fates(out) -> dict[str, str]:
    """Source file → key of REASONS, or "imported"."""
    keys = {(result, why): key
            for key, (result, why) in REASONS.items()} | {("imported", ""): "imported"}
    with open(f"{out}.names.csv", newline="") as file:
        return {line["source"]: keys[line["result"], line["reason"]]
                for line in csv.DictReader(file)}


def everything(out) -> bytes:
    """All that stands in a folder: contents and names."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return b"\n".join([str(path.relative_to(out)).encode() for path in files] + [path.read_bytes()
                                                                                 for path in files])
