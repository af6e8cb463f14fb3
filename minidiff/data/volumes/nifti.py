"""One untrusted NIfTI file → a Volume, or the reason why not. Runs behind the guard."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from minidiff.data.dicom import Refused
from minidiff.data.dicom.tags import keyed
from minidiff.data.volumes import MAX_VOXELS, Volume, in_lps

MAGIC = {b"n+1\0": 344, b"n+2\0": 4}  # of a single file, and where it stands
MAX_BYTES = 16 * MAX_VOXELS           # of a file, unpacked
LABEL_INTENT = 1002                   # of a header: its values are names of tissues
FEW = 16                              # distinct whole numbers, at most, that are taken for names
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # of the units of a header: none named, m, mm, μm
SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)(?=[_.])")  # how BIDS begins a file's name


def is_nifti(path: str | Path) -> bool:
    """By its first bytes, unpacked if need be; no other compression is opened."""
    with open(path, "rb") as file:
        head = file.read(2)
    try:
        with (gzip.open if head == b"\x1f\x8b" else open)(path, "rb") as file:
            head = file.read(348)
    except (OSError, EOFError, zlib.error):
        return False
    return any(head[at : at + 4] == magic for magic, at in MAGIC.items())


def read(path: str, modality: str, salt: bytes, name: str, frame: int = 0) -> Volume:
    """The volume of a file; `name` is its keyed hash, `frame` the volume of a 4-D file, from 1.

    The patient is the subject that a BIDS name begins with, else the file itself. Raises Refused.
    """
    import nibabel

    image = nibabel.load(path)  # the header alone; pixels are read when they are asked for
    header = image.header
    if image.get_data_dtype().kind not in "iuf":
        raise Refused("colour" if image.get_data_dtype().names else "complex")
    shape = tuple(image.shape) + (1,) * (3 - len(image.shape))
    volumes = int(np.prod(shape[3:], dtype=np.int64))
    if volumes > 1 and not 1 <= frame <= volumes:
        raise Refused("frames", f"{volumes} volumes" + f", --frame {frame}" * bool(frame))
    if min(shape) < 1 or np.prod(shape[:3], dtype=np.int64) > MAX_VOXELS:
        raise Refused("size", " x ".join(map(str, shape)))
    if header["qform_code"] <= 0 and header["sform_code"] <= 0:
        raise Refused("geometry", "qform_code and sform_code are 0: left or right is not known")
    if (unit := int(header["xyzt_units"]) & 7) not in MM:
        raise Refused("geometry", f"xyzt_units names the unit of length {unit}, which is none")
    _check_scale(path, type(header))
    index = np.unravel_index(max(frame, 1) - 1, shape[3:]) if volumes > 1 else (0,) * len(shape[3:])
    values = np.asarray(image.dataobj[(..., *index)] if len(image.shape) > 3 else image.dataobj)
    values = values.reshape(shape[:3])
    if int(header["intent_code"]) == LABEL_INTENT or _are_names(values):
        raise Refused("labels")
    finite = np.isfinite(values)
    if not finite.any():
        raise Refused("damaged", "not one value is a number")
    values = np.where(finite, values, values[finite].min()).astype(np.float32)
    ras_to_lps = np.diag([-1.0, -1.0, 1.0])
    turned, spacing, _ = in_lps(values, MM[unit] * ras_to_lps @ image.affine[:3, :3])
    subject = SUBJECT.match(Path(path).name)
    patient = "p" + keyed(salt, "patient", subject[1]) if subject else "v" + name
    return Volume(turned, spacing, {"patient": patient, "volume": name, "modality": modality,
                                    **({} if unit else {"unit": "mm assumed"})})


def _check_scale(path: str, header: type) -> None:
    """As it stands in the file: a slope of 0 means none; one that is no number means nothing."""
    with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
        raw = header.from_fileobj(file, check=False)
        while file.read(2**24):  # to its end, where gzip's checksum stands
            if file.tell() > MAX_BYTES:
                raise Refused("huge")
    scale = float(raw["scl_slope"]), float(raw["scl_inter"])
    if not np.isfinite(scale).all():
        raise Refused("scale", f"scl_slope {scale[0]}, scl_inter {scale[1]}")


def _are_names(values: np.ndarray) -> bool:
    """Few whole numbers from 0 on: a segmentation, even where the header does not say so."""
    few = np.unique(values.ravel()[:: max(1, values.size // 100_000)])
    whole = len(few) <= FEW and np.array_equal(few, np.rint(few)) and few[0] >= 0
    return bool(whole and len(np.unique(values)) <= FEW)
