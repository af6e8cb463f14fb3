"""Names on a disk as text, labels as names of folders, and names with commas.

A disk holds bytes: a Mac writes é as two characters, an old archive as Latin-1. A table holds text:
composed characters (Unicode NFC), and \\xe9 for what is no UTF-8. A label may be any text; the name
of a folder may not.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache

UNSEEN = "\u200b\u200e\u200f\u2060\ufeff"  # characters without width: marks that editors leave
LONGEST = 120  # bytes of a folder's name: disks allow 255, with encryption 143
FORBIDDEN = '<>:"/\\|?*%'  # in names on Windows; % marks what is written as its code
DEVICES = {"con", "prn", "aux", "nul",  # no names of files on Windows, with an ending neither
           *(f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³")}


def text(name: str) -> str:
    """The name of a file, or any cell of a table, as the text that stands for it in all tables."""
    if name.isascii():  # nearly all, at a tenth of the time
        return name.strip()
    read = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", read).strip().strip(UNSEEN).strip()


def on_disk(path: str, folder: str | os.PathLike = "") -> str:
    """A path in a folder as the disk spells it, if it holds one of the same text; else unchanged.
    """
    above, name = os.path.split(path)
    if not name or os.path.lexists(os.path.join(folder, path)):
        return path
    above = on_disk(above, folder)
    where = os.path.join(folder, above) or "."
    with suppress(OSError):  # no such folder
        name = _entries(where, os.stat(where).st_mtime_ns).get(text(name), name)
    return os.path.join(above, name)


@lru_cache(maxsize=16)
def _entries(folder: str, changed: int) -> dict[str, str]:
    """Text → name of what lies in a folder, read again when that has changed."""
    return {text(name): name for name in os.listdir(folder)}


def folders(labels: Iterable[str]) -> dict[str, str]:
    """Label → the name of its folder: the label itself where every disk can hold that.

    Other characters are written as in addresses, / as %2F, so that urllib.parse.unquote gives the
    label back; of labels that a disk might take for one another, capitals and accents, too. A
    name of more than 120 bytes is cut and ends in %~ and a hash: its label stands in metadata.csv.
    """
    labels = list(dict.fromkeys(labels))
    alike = Counter(map(_folded, labels))
    return {label: _folder(label, alike[_folded(label)] > 1) for label in labels}


def rejoined(items: Sequence[str], known: Callable[[str], object]) -> list[str]:
    """Items of a flag, which the command line splits at commas: put together where that gives one
    that is known."""
    for n in range(len(items), 1, -1):
        for k in range(len(items) - n + 1):
            if known(whole := ",".join(items[k:k + n])):
                return [*rejoined(items[:k], known), whole, *rejoined(items[k + n:], known)]
    return list(items)


def _folded(label: str) -> str:
    return unicodedata.normalize("NFC", label).casefold()


def _folder(label: str, ambiguous: bool) -> str:
    def kept(place: int, c: str) -> bool:
        return (c.isprintable() and c not in FORBIDDEN
                and not (place == 0 and (c in ". " or label.split(".")[0].lower() in DEVICES))
                and not (place == len(label) - 1 and c in ". ")
                and not (ambiguous and (not c.isascii() or c.isupper())))

    parts = [c if kept(place, c) else "".join(f"%{b:02X}" for b in c.encode(errors="replace"))
             for place, c in enumerate(label)]
    if len("".join(parts).encode()) <= LONGEST:
        return "".join(parts) or "%"
    end = "%~" + hashlib.sha256(label.encode(errors="replace")).hexdigest()[:16]
    while len("".join(parts).encode()) + len(end) > LONGEST:
        parts.pop()
    return "".join(parts) + end
