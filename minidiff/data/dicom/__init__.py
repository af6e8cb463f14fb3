"""DICOM in and out: what stands between a hospital's export and training, and how a synthetic set
goes to a viewer.

    folder ─ files.sift ─▶ guard (a process with limits) ─ reader ─▶ pixels | tags ─▶ PNG +
    metadata.csv
    sample folder ─ writer ─▶ Secondary Capture files that say of themselves that they are synthetic

Only what `tags` lists leaves a file. What is not imported has one of the reasons below; these words
alone go into the data set, for the message of an error may quote a name. Needs pydicom 3 (the extra
`dicom`).
"""

from __future__ import annotations

from minidiff.errors import InputError

MAX_BYTES = 512 * 2**20  # of a file, and of what a deflated file may hold
MAX_FRAMES = 10_000

REASONS = {  # key: (what became of the file, why); only quarantined and skipped files let the import end with status 1
    "dicomdir": ("ignored", "a DICOMDIR, the index of a medium"),
    "foreign": ("ignored", "not a DICOM file"),
    "pixelless": ("ignored", "DICOM without an image: a report, a plan, a waveform, a presentation state"),
    "duplicate": ("ignored", "the same bytes as another file here"),
    "burned_yes": ("quarantined", "BurnedInAnnotation is YES: text in the pixels"),
    "burned_absent": ("quarantined", "BurnedInAnnotation is absent, which is not NO: there may be text in the pixels"),
    "link": ("skipped", "a link, a pipe or a device; only plain files are opened"),
    "unreadable": ("skipped", "may not be read, or went away"),
    "empty": ("skipped", "empty (0 bytes)"),
    "huge": ("skipped", f"larger than {MAX_BYTES // 2**20} MiB, or unpacks to more"),
    "archive": ("skipped", "an archive; nothing is unpacked here, unpack it first"),
    "label": ("skipped", "in no folder that --label-from names"),
    "conflict": ("skipped", "the same bytes under two labels"),
    "synthetic": ("skipped", "says of itself that it is synthetic; not to be taken for a patient's"),
    "modality": ("skipped", "its Modality is none whose values are grey levels"),
    "colour": ("skipped", "in colour: a photograph or a screen"),
    "bits": ("skipped", "not 8 to 16 bits, lowest bit first"),
    "frames": ("skipped", "several frames; --frame K takes the K-th, counted from 1"),
    "size": ("skipped", "more than 64 megapixels, a side above 8192, or no pixel at all"),
    "stretched": ("skipped", "its pixels are not square"),
    "window": ("skipped", "the window does not fit it: CT needs lung, soft, bone or file; others none of these three"),
    "sense": ("skipped", "MONOCHROME2 and INVERSE contradict each other: is bright dense or not?"),
    "codec": ("skipped", "compressed in a way for which no decoder is installed"),
    "mismatch": ("skipped", "its compressed image has another size than its header says"),
    "memory": ("skipped", "asks for more memory than is allowed"),
    "time": ("skipped", "takes more time than is allowed"),
    "crash": ("skipped", "breaks the decoder"),
    "damaged": ("skipped", "damaged, cut short or not according to the standard"),
}


class Refused(Exception):
    """A file that is not imported: a key of REASONS, and a detail that stays out of the data
    set.
    """

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
