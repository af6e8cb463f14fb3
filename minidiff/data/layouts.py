"""How a data folder may be laid out, and its rows: one dict of text cells an image.

    metadata.csv         file_name,label[,split,patient,sex,…], paths relative to its folder
                         (Hugging Face imagefolder)
    <class>/…            class folders of PNG or JPEG (torchvision ImageFolder; Kaggle:
                         <class>/images, masks ignored)
    <split>/<class>/…    train, val, test above the class folders (Kaggle)

A folder inside that holds a metadata.csv of its own is another data set and is left alone. A folder
whose own split was drawn at random by patient says so with a file random-split.txt, which may be
empty; phantoms need none.
"""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from minidiff.data.images import EXTENSIONS
from minidiff.data.split import SPLITS, Row
from minidiff.errors import InputError, first_few

SYNONYMS = {"training": "train", "valid": "val", "validation": "val",
            "testing": "test"} | {s: s for s in SPLITS}
HIDDEN, MASKS = (".", "__MACOSX"), ("mask", "masks")  # how names of folders begin, or end, that
                                                      # hold no images of a data set
ADDED = ("file", "where")  # columns made by reading, never written
RANDOM_SPLIT, PHANTOM = "random-split.txt", "phantom.json"


def read_folder(folder: Path) -> tuple[list[Row], list[str]]:
    """The rows of a data folder in any of the layouts, and remarks on what was left out."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    rows, remarks = (_read_metadata if is_data_set(folder) else _read_classes)(folder)
    for row in rows:
        row["split"] = SYNONYMS.get(row.get("split", "").lower(), row.get("split", ""))
        row["file"] = os.path.normpath(folder / row["file_name"])
    without = [row["where"] for row in rows if not row["split"]]
    if 0 < len(without) < len(rows):
        raise InputError(f"{without[0]}: no split, nor have {len(without) - 1} other rows; give "
                         "every row one, or none")
    return rows, remarks


def _read_metadata(folder: Path) -> tuple[list[Row], list[str]]:
    path = folder / "metadata.csv"
    rows = read_csv(path, needed=("file_name", "label"))
    for row in rows:
        name = Path(row["file_name"])
        if not row["file_name"] or name.is_absolute() or ".." in name.parts:
            raise InputError(f"{row['where']}: file_name {row['file_name']!r} is not a path inside "
                             f"{folder}")
        if not row["label"]:
            raise InputError(f"{row['where']}: no label for {name}")
    absent = [f"{row['where']} {row['file_name']}" for row in rows
              if not (folder / row["file_name"]).is_file()]
    if absent:
        raise InputError(f"{len(absent)} row(s) without a file: {first_few(absent)}")
    named = {Path(os.path.normpath(row["file_name"])) for row in rows}
    tops = {name.parts[0] if len(name.parts) > 1 else "" for name in named}
    files = {file.relative_to(folder) for top in tops
             for file in image_files(folder / top, deep=bool(top))}
    orphans = sorted(map(str, files - named))
    if orphans:
        raise InputError(f"{path}: {len(orphans)} file(s) without a row: {first_few(orphans)}")
    return rows, []


def _read_classes(folder: Path) -> tuple[list[Row], list[str]]:
    tops = _subfolders(folder)
    splits = {top: SYNONYMS[top.name.lower()] for top in tops if top.name.lower() in SYNONYMS}
    left_out = [top for top in tops if top not in splits] if splits else []
    rows = []
    for base, split in (splits or {folder: ""}).items():
        base = base / "images" if (base / "images").is_dir() else base
        left_out += image_files(base, deep=False)
        for label in _subfolders(base):
            files = image_files(label)
            left_out += [] if files else [label]
            rows += [{"file_name": str(file.relative_to(folder)), "label": label.name,
                      "split": split, "where": str(file)} for file in files]
    if not rows:
        inside = [path.name for path in sorted(folder.iterdir()) if is_data_set(path)]
        hint = f"; data sets inside it: {first_few(inside)}" if inside else ""
        raise InputError(f"{folder}: no metadata.csv and no class folders of PNG or JPEG "
                         f"files{hint}")
    names = [str(path.relative_to(folder)) for path in left_out]
    return rows, [f"left out, in no class folder or without images: "
                  f"{first_few(names)}"] if names else []


def read_csv(path: str | Path, needed: Sequence[str]) -> list[Row]:
    """Rows of text cells; "where" is the place of each, to be named in an error.

    Raises InputError for a faulty table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader
                     if any(cells)]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table in UTF-8 ({error})") from None
    header = lines[0][1] if lines else []
    absent = [name for name in needed if name not in header]
    odd = [name for name in header if header.count(name) > 1 or name in ADDED]
    if absent:
        raise InputError(f"{path}: no column {absent[0]!r}; it has {', '.join(header) or 'none'}")
    if odd:
        raise InputError(f"{path}: column {odd[0]!r} is there twice or reserved; rename it")
    if len(lines) < 2:
        raise InputError(f"{path}: a header but no rows")
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} cells where the header has "
                             f"{len(header)}")
    return [{**dict(zip(header, cells)), "where": f"{path}:{number}"}
            for number, cells in lines[1:]]


def image_files(folder: Path, deep: bool = True) -> list[Path]:
    """The images in a folder and, if `deep`, below it, in order; without masks, hidden folders and
    other data sets."""
    files = sorted(path for path in folder.iterdir() if path.is_file()
                   and path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))
    return files + [file for below in _subfolders(folder) if deep for file in image_files(below)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_data_set(path)
                  and not path.name.startswith(HIDDEN)
                  and not path.name.lower().endswith(MASKS))


def random_split(folder: Path) -> bool:
    """Was the split that this folder brings drawn at random, as its own files say?"""
    return (folder / RANDOM_SPLIT).is_file() or (folder / PHANTOM).is_file()


def is_data_set(folder: Path) -> bool:
    """Has this folder a table of its own?"""
    return (folder / "metadata.csv").is_file()
