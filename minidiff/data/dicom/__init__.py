"""DICOM in and out: from a hospital's export to a data set, and from samples to a viewer.

    folder ─ folder.sift ─▶ guard (a process with limits) ─ reader ─▶ pixels, tags
                                                               ─▶ PNG, metadata.csv
    samples ─ writer ─▶ Secondary Capture files that say of themselves that they are synthetic

Only what `tags` lists leaves a file. A file that is not imported has one of the reasons below. Only
these words go into the data set, since the message of an error may quote a name. Needs pydicom 3
(the extra `dicom`).
"""

from pathlib import Path
from typing import Any

from minidiff.errors import InputError
from minidiff.runs import occupied

Dataset = Any             # pydicom's, which is imported only where it is needed
MAX_BYTES = 512 * 2**20  # of a file, and of what a deflated file may hold
MAX_FRAMES = 10_000

# What became of a file, and why. With quarantined or skipped files the import ends with status 1.
_REASONS = {
    "ignored": {
        "dicomdir": "a DICOMDIR, the index of a medium",
        "foreign": "not a DICOM file",
        "pixelless": "DICOM without an image: a report, a plan, a waveform, a presentation state",
        "duplicate": "the same bytes as another file here",
        "absent": "a row of --labels of which no image came in",
    },
    "quarantined": {
        "burned_yes": "BurnedInAnnotation is YES: text in the pixels",
        "burned_absent": "BurnedInAnnotation is absent, which is not NO: there may be text in the "
                         "pixels",
    },
    "skipped": {
        "link": "a link, a pipe or a device; only plain files are opened",
        "unreadable": "may not be read, or went away",
        "empty": "empty (0 bytes)",
        "huge": f"larger than {MAX_BYTES // 2**20} MiB, or unpacks to more",
        "archive": "an archive; nothing is unpacked here, unpack it first",
        "label": "in no folder that --label-from names",
        "unlisted": "not in the table of --labels, or without a label there",
        "conflict": "the same bytes under two labels",
        "synthetic": "says of itself that it is synthetic; not to be taken for a patient's",
        "modality": "its Modality is none whose values are grey levels",
        "colour": "in colour: a photograph or a screen",
        "bits": "not 8 to 16 bits, lowest bit first",
        "frames": "several frames; --frame K takes the K-th, counted from 1",
        "size": "more than 64 megapixels, a side above 8192, or no pixel at all",
        "stretched": "its pixels are not square",
        "window": "the window does not fit it: CT needs lung, soft, bone or file; others none of "
                  "these three",
        "window_values": "its window has values that no window can have; --window percentile does "
                         "without it",
        "blank": "a volume of which every slice asked for is all of one grey",
        "scout": "a localizer, no slice of a volume",
        "geometry": "its place or orientation in the patient is not known",
        "doubled": "several slices of a volume at one place",
        "gap": "slices are missing or the gantry was tilted: it may be cut along its slices alone",
        "tilted": "its axes are not at right angles",
        "labels": "a segmentation: its values are names of tissues, not grey levels",
        "complex": "complex numbers, which are no grey levels",
        "scale": "its scale of values is not a number, or that of a CT not Hounsfield's",
        "sense": "MONOCHROME2 and INVERSE contradict each other: is bright dense or not?",
        "codec": "compressed in a way for which no decoder is installed",
        "mismatch": "its compressed image has another size than its header says",
        "memory": "asks for more memory than is allowed",
        "time": "takes more time than is allowed",
        "crash": "breaks the decoder",
        "damaged": "damaged, cut short or not according to the standard",
    },
}
REASONS = {key: (result, reason) for result, reasons in _REASONS.items()
           for key, reason in reasons.items()}


class Refused(Exception):
    """A file is not imported: a key of REASONS, and a detail that stays out of the data set."""

    def __init__(self, key: str, detail: str = ""):
        assert key in REASONS, key
        super().__init__(key, detail)
        self.key, self.detail = key, detail


def need_pydicom() -> None:
    """Raise InputError unless pydicom 3 or later can be imported."""
    try:
        import pydicom
    except ImportError:
        raise InputError("DICOM needs pydicom: pip install 'minidiff[dicom]'") from None
    if int(pydicom.__version__.split(".")[0]) < 3:
        raise InputError(f"DICOM needs pydicom 3 or later, found {pydicom.__version__}: pip "
                         "install 'minidiff[dicom]'")


def claim_out(out: Path, record: str, what: str) -> None:
    """Raise InputError for a folder that holds something, but not the record of an earlier run."""
    if occupied(out) and not (out / record).is_file():
        raise InputError(f"{out} exists and is no {what}; give another --out, nothing there is "
                         "overwritten")
