"""The files of a data folder: which are images, which are known rubbish, and what is left out.

What is neither is handed back by name, to be listed: nothing disappears unseen.
"""

import os
import re
from collections import Counter
from collections.abc import Collection
from fnmatch import translate
from pathlib import Path

from minidiff.data.images import EXTENSIONS
from minidiff.data.split import SPLITS
from minidiff.errors import InputError, count, first_few

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
SYNONYMS = {"training": "train", "valid": "val", "validation": "val", "validate": "val",
            "dev": "val", "testing": "test", "eval": "test", "evaluation": "test",
            } | {s: s for s in SPLITS}
# Of desktops, file servers, archives and editors, in lower case: skipped silently.
RUBBISH = ("thumbs.db*", "ehthumbs*.db", "desktop.ini", "icon\r", ".ds_store", "._*", "__macosx",
           ".appledouble", ".spotlight-*", ".fseventsd", "*temporary*items", ".trash*", "~$*",
           "$recycle.bin", "recycler", "system volume information", "found.[0-9]*", "lost+found",
           "@eadir", "@tmp", "@recycle*", "@recently-snapshot", "*@__thumb", "#recycle",
           "#snapshot", ".snapshot*", ".nfs*", "*thumbnails", "thumbs", ".directory", ".git*",
           ".cache", "network trash folder", "__pycache__", ".ipynb_checkpoints", ".~lock*",
           ".*.tmp-[0-9]*")
IS_RUBBISH = re.compile("|".join(map(translate, RUBBISH)))
# Pictures that are not read: they count as images, so that reading refuses them by name.
PICTURES = (".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".ppm", ".pgm", ".pbm",
            ".pnm", ".tga", ".psd", ".npy", ".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
DICOM = (".dcm", ".dicom", ".ima")
MASKS = ("mask", "masks")  # how names of folders end that hold no images of a data set
DANGLING, DICOM_FILE = "dangling link", "DICOM file"
Left = dict[str, list[Path]]  # why → the files that are left out


def is_rubbish(name: str) -> bool:
    return bool(IS_RUBBISH.match(name.lower()))


def is_mask(name: str) -> bool:
    return name.lower().endswith(MASKS)


def is_file(folder: Path, name: str) -> bool:
    path = os.path.join(folder, name)  # isfile is faster, is_file raises where a path is forbidden
    return os.path.isfile(path) or Path(path).is_file()


def files_ending(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files in a folder whose names end so, in order."""
    names = (name for name in sorted(os.listdir(folder)) if name.lower().endswith(endings))
    return [path for path in map(folder.joinpath, names)
            if path.is_file() and not is_rubbish(path.name)]


def tables(folder: Path) -> list[Path]:
    """The tables that make a folder a data set: its own, or those of its split folders."""
    own = [folder / name for name in sorted(os.listdir(folder)) if name.lower() in METADATA]
    return own or [table for below in split_folders(folder) for table in tables(below)]


def is_data_set(folder: Path) -> bool:
    return bool(tables(folder))


def split_named(name: str) -> str:
    """The split that a folder or a cell is named after: Valid, test_images, Train set; "" if none.
    """
    return SYNONYMS.get(re.sub(r"[-_ ]?(set|data|images|imgs)$", "", name.strip().lower()), "")


def split_folders(folder: Path) -> dict[Path, str]:
    """Folders named after a split, in order → that split."""
    return {path: split for path in _folders(folder) if (split := split_named(path.name))}


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, in order; of a hundred thousand files beside them none is asked."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_symlink() or entry.is_dir()]
    return [path for path in map(folder.joinpath, sorted(names)) if path.is_dir()]


def image_files(folder: Path, deep: bool = True, left: Left | None = None) -> list[Path]:
    """The images in a folder and, if `deep`, below it, in order; without masks, hidden folders and
    other data sets.

    What is left out is added to `left`.
    """
    left = {} if left is None else left
    with os.scandir(folder) as entries:
        entries = sorted((entry for entry in entries if not is_rubbish(entry.name)),
                         key=lambda entry: entry.name)
    found = []
    for entry in entries:
        path, ending, why = folder / entry.name, entry.name.lower(), ""
        if entry.is_symlink() and not path.exists():
            why = DANGLING
        elif not (path.is_file() if entry.is_symlink() else entry.is_file()):
            continue
        elif ending.startswith("."):
            why = "hidden file"
        elif ending.endswith((*EXTENSIONS, *PICTURES)):
            found.append(path)
        else:
            is_dicom = ending.endswith(DICOM) or (not path.suffix and _is_dicom(path))
            why = DICOM_FILE if is_dicom else "other file"
        if why:
            left.setdefault(why, []).append(path)
    for path in subfolders(folder, left) if deep else ():
        found += image_files(path, left=left)
    return found


def subfolders(folder: Path, left: Left | None = None) -> list[Path]:
    """The folders in a folder that may hold its images, in order; the images of others are added to
    `left`."""
    left, kept = {} if left is None else left, []
    for path in _folders(folder):
        if is_rubbish(path.name):
            continue
        why = ("mask" if is_mask(path.name) else "image in a hidden folder"
               if path.name.startswith(".") else "image of another data set" if is_data_set(path)
               else "")
        if why:
            left.setdefault(why, []).extend(_pictures(path))
        elif path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            raise InputError(f"{path} is a link to a folder above it; remove it")
        else:
            kept.append(path)
    return kept


def refuse_unread(left: Left) -> None:
    """Raise InputError where images were left out that should be there: DICOM, dangling links."""
    for path in left.get(DANGLING, ()):
        raise InputError(f"{path} is a link to {path.readlink()}, which is not there: bring what "
                         "it points to, or remove the link")
    for path in left.get(DICOM_FILE, ()):
        raise InputError(f"{path} is a DICOM file: python -m minidiff.data.dicom import "
                         f"{path.parent} --out NEW makes a data set of such files")


def refuse_unsplit(folder: Path, labels: Collection[str]) -> None:
    """Raise InputError where a folder beside that of a split is laid out like it, and would be lost
    unseen: it has a table, too, or the labels, and train/ alone is no split."""
    splits = split_folders(folder)
    tabled, one = any(map(is_data_set, splits)), len(set(splits.values())) == 1
    for path in _folders(folder) if splits else ():
        if path in splits or is_rubbish(path.name):
            continue
        if (tabled and is_data_set(path)) or (
                one and any(below.name in labels for below in path.iterdir())):
            raise InputError(f"{path} is laid out like {next(iter(splits)).name} beside it, and "
                             f"its name is none of {', '.join(SPLITS)}: rename it, or move it away")


def said(left: Left, folder: Path) -> list[str]:
    """The remark on what was left out, with its number, or none."""
    parts = []
    for why, paths in left.items():
        first, _, rest = why.partition(" ")
        if why == "other file":
            endings = Counter(path.suffix.lower() or "no ending" for path in paths)
            names = ", ".join(f"{ending} {n}" for ending, n in sorted(endings.items()))
        else:
            names = first_few(str(path.relative_to(folder)) for path in paths)
        many = f"{first}s {rest}" if first in ("image", "folder", "picture") else f"{why}s"
        parts += [f"{count(len(paths), why, many.strip())} ({names})"] if paths else []
    return [f"left out: {'; '.join(parts)}"] if parts else []


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS
                  and not any(map(is_rubbish, path.relative_to(folder).parts)))


def _is_dicom(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
