"""What runs behind the guard: files of one volume → its slices."""

from minidiff.data import images
from minidiff.data.dicom import reader
from minidiff.data.volumes import nifti, series, slices


@reader.refusing
def describe(path: str) -> list[tuple[bytes, dict[str, str]]]:
    """What tells the volume of a DICOM file from others."""
    return [(b"", {"key": series.describe(path)})]


@reader.refusing
def convert(paths: list[str], kind: str, salt: str, name: str, modality: str, frame: int,
            accept: list[str], how: list) -> list[tuple[bytes, dict[str, str]]]:
    """A PNG and a row of each slice; kind: nifti, of which `paths` is one, or dicom."""
    volume = (nifti.read(paths[0], modality, bytes.fromhex(salt), name, frame) if kind == "nifti"
              else series.read(paths, bytes.fromhex(salt), tuple(accept)))
    return [(images.png_bytes(grey), row)
            for grey, row in slices.cut(volume, slices.Cut(*how))]
