"""One untrusted DICOM file → a PNG and its row, or the reason why not. Runs behind `guard`."""

import io
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minidiff.data import images
from minidiff.data.dicom import MAX_BYTES, Dataset, Refused, labels, pixels, tags

IMAGE = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
DEFLATED = "1.2.840.10008.1.2.1.99"
SYNTHETIC = "SYNTHETIC"  # third value of ImageType in what `writer` makes
read_labels = lru_cache(maxsize=1)(labels.read)  # once in a process, which reads many files


class Options(NamedTuple):
    """How files are read; salt in hexadecimal."""

    salt: str
    window: str = "auto"
    frame: int = 0
    bits: int = 8
    accept: tuple[str, ...] = ()  # of absent, yes
    labels: str = ""              # table of labels, and which of its columns hold what
    columns: tuple[str, ...] = ()


def refusing(convert: Callable) -> Callable:
    """Whatever is wrong with a file, the function raises Refused."""
    @wraps(convert)
    def wrapped(*given):
        try:
            return convert(*given)
        except Refused:
            raise
        except MemoryError:
            raise Refused("memory") from None
        except OSError as error:
            raise Refused("damaged" if error.errno is None else "unreadable", str(error)) from None
        except Exception as error:  # a parser of broken files raises whatever it met first
            raise Refused("damaged", f"{type(error).__name__}: {error}") from None
    return wrapped


@refusing
def convert(path: str, options: Options) -> tuple[bytes, dict[str, str]]:
    """A PNG without metadata, and the facts of `tags`; with a table of labels, also the label and
    the id by which it was found."""
    options = Options(*options)
    ds, row = load(Path(path).read_bytes()), {}
    if options.labels:
        table = read_labels(options.labels, tuple(options.columns))
        row = dict(zip(("id", "label"), labels.find(ds, path, table)))
    check_burned_in(ds, options.accept)
    row |= tags.facts(ds, bytes.fromhex(options.salt))
    grey = pixels.grey(ds, frame=options.frame, window=options.window, bits=options.bits)
    # a slice of a CT may be all air; a radiograph that its window makes one grey is no image
    if np.ptp(grey) == 0 and row["modality"] != "CT" and np.ptp(
            pixels.grey(ds, frame=options.frame, window="percentile")):
        raise Refused("window_values", f"WindowCenter {pixels.text(ds, 'WindowCenter')}, "
                      f"WindowWidth {pixels.text(ds, 'WindowWidth')}: all its values become "
                      "one grey")
    return images.png_bytes(grey), row


def check_burned_in(ds: Dataset, accept: Sequence[str]) -> None:
    """Raises Refused for text in the pixels, stated or not ruled out, that is not accepted."""
    stated = pixels.text(ds, "BurnedInAnnotation").upper()
    burned = {"NO": "no", "YES": "yes"}.get(stated, "absent")
    if burned not in ("no", *accept):
        raise Refused(f"burned_{burned}")


def load(data: bytes, more: Sequence[str] = ()) -> Dataset:
    """The pixels and the few elements that are read of a file, and some more. Raises Refused, and
    whatever pydicom raises."""
    from pydicom import dcmread, uid

    _check_deflated(data)
    ds = dcmread(io.BytesIO(data), force=data[128:132] != b"DICM",
                 specific_tags=[*pixels.NEEDED, *tags.NEEDED, *labels.NEEDED, *IMAGE, *more])
    kind = uid.UID(str(ds.file_meta.get("MediaStorageSOPClassUID", "")))
    if kind == uid.MediaStorageDirectoryStorage:
        raise Refused("dicomdir")
    # of a file cut short, pydicom may give what came before, or nothing
    if not any(name in ds for name in IMAGE):
        cut = not len(ds) or "Rows" in ds or "Image" in kind.name
        raise Refused("damaged", "cut short before its pixels") if cut else Refused("pixelless")
    if "PixelData" not in ds:
        raise Refused("bits", "pixels in floating point")
    if SYNTHETIC in str(ds.get("ImageType")):
        raise Refused("synthetic")
    if "TransferSyntaxUID" not in ds.file_meta:  # a bare file: as pydicom found it to be
        implicit, little = ds.original_encoding
        plain = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        ds.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else plain
    return ds


def _check_deflated(data: bytes) -> None:
    """Refuse a deflated file that unpacks to more than MAX_BYTES: pydicom has no limit."""
    from pydicom.filereader import read_dataset, read_preamble

    file = io.BytesIO(data)
    read_preamble(file, force=True)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") == DEFLATED:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        unpacker.decompress(data[file.tell() :], MAX_BYTES)
        if not unpacker.eof:  # there is more to come, or it was cut off
            raise Refused("huge" if unpacker.unconsumed_tail else "damaged", "deflated")
