"""How a data folder may be laid out, and its rows: one dict of text cells an image.

    metadata.csv       file_name,label[,split,patient,sex,…], paths relative to its folder; or .tsv,
                       .jsonl; or one in each of train/, val/, test/ (Hugging Face imagefolder)
    ANY.csv            a table that has these columns as --columns says, or that is known (NIH,
                       CheXpert, …); train.csv and valid.csv together are one
    <class>/…          class folders of images (torchvision ImageFolder; Kaggle: <class>/images,
                       masks left out), with train, val, test above or below them
    a flat folder      images in no class folder, if that is all: without a label, `any`

A folder inside that has a table of its own is another data set and is left alone. A folder whose
own split was drawn at random by patient says so with a file random-split.txt, which may be empty;
phantoms need none. docs/data.md lists what is read, and what is refused.
"""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from minidiff.cells import is_unknown
from minidiff.data import dialects, folders
from minidiff.data.classes import TABLE, NoClassFolders, read_classes
from minidiff.data.images import EXTENSIONS
from minidiff.data.split import Row
from minidiff.errors import InputError, count, first_few
from minidiff.names import on_disk, text
from minidiff.root import AS_WE_NAME, Reading
from minidiff.variables import ANY

RANDOM_SPLIT, PHANTOM, MANIFEST = "random-split.txt", "phantom.json", "manifest.json"
# A folder that is one patient's: patient00001, sub-S03044, subject_7, p10000032
PATIENT = re.compile(r"(patient|pat|subject|subj|sub|person|pid)[-_ ]?[a-z]{0,2}\d+|p\d{5,}", re.I)
UNREAD = (".xlsx", ".xls", ".ods", ".parquet", ".arrow", ".json", ".gz")  # tables of other programs


def read_folder(folder: Path, reading: Reading = AS_WE_NAME) -> tuple[list[Row], list[str]]:
    """The rows of a data folder in any of the layouts, and remarks on how they were read and on
    what was left out."""
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the folder that it describes or holds"
                         if folder.is_file() else f"{folder}: no such folder")
    dialects.parse(reading.columns)
    found = folders.tables(folder) or _other_tables(folder, reading)
    if found:
        rows, remarks = _read_tables(folder, found, reading)
    else:
        try:
            rows, remarks = read_classes(folder, _advice(folder))
        except NoClassFolders as error:
            raise InputError(_fault(folder) or str(error)) from None
        _refuse_hidden_tables(folder, rows)
        remarks += ["--columns says nothing here: no table"] if reading.columns else []
    folders.refuse_unsplit(folder, {row["label"] for row in rows})
    own = any("split" in row for row in rows)
    for row in rows:
        row["split"] = folders.split_named(row.get("split", "")) or row.get("split", "")
        row["file"] = os.path.normpath(os.path.join(folder, row["file_name"]))
        row |= {name: text(cell) for name, cell in row.items() if name not in dialects.ADDED}
    if not any(row["split"] for row in rows):
        remarks += (_splits_of_lists(folder, rows) or ([] if own else _splits_of_column(rows))
                    or _splits_of_folders(rows))
    remarks += _patients_of_folders(rows)
    without = [row["where"] for row in rows if not row["split"]]
    if 0 < len(without) < len(rows):
        raise InputError(f"{without[0]}: no split, nor have {len(without) - 1} other rows; give "
                         "every row one, or none")
    return rows, remarks


def _read_tables(folder: Path, found: list[Path], reading: Reading) -> tuple[list[Row], list[str]]:
    """The rows of one table, or of one for each split."""
    if (len(found) > 1 and found[0].parent == found[1].parent
            and found[0].name.lower() in folders.METADATA):
        raise InputError(f"{found[0]} and {found[1].name}: keep the one that holds")
    bare = [path for path in folders.split_folders(folder)
            if not folders.tables(path) and folders.image_files(path)]
    if bare and found[0].parent not in (folder, *bare):
        raise InputError(f"{bare[0]} has images and no table, unlike {found[0].parent}; give it "
                         f"a {found[0].name}, too")
    rows, remarks = [], []
    for path in found:
        header, lines = dialects.read_lines(path)
        part = dialects.to_rows(path, header, lines, ("file_name", "label"), reading.columns)
        part = [{name: "" if name in ("label", "split") and is_unknown(cell, name) else cell
                 for name, cell in row.items()} for row in part]
        unlabelled = [row for row in part if not row["label"]]
        if unlabelled and (not reading.only_listed or len(unlabelled) == len(part)):
            raise InputError(f"{unlabelled[0]['where']}: no label for "
                             f"{unlabelled[0]['file_name']}, nor in {len(unlabelled) - 1} other "
                             "rows; --only-listed leaves such rows out")
        for row in part if len(found) > 1 and path.parent == folder else ():
            row["split"] = row.get("split") or _split_of(path)
        part, said_of_files = _locate(path.parent, part, reading.only_listed)
        remarks += said_of_files
        top = path.parent.relative_to(folder)
        for row in part:  # no copies: of 100,000 rows they take 50 MB
            row["file_name"] = os.path.normpath(os.path.join(top, row["file_name"]))
        rows += part
        known = dialects.known_as(header)
        remarks += [f"{path.name} is read as {known}"] if known else []
    orphans, left = _without_rows(folder, rows)
    if orphans and not reading.only_listed:
        raise InputError(f"{found[0]}: {len(orphans)} file(s) without a row: {first_few(orphans)}; "
                         "--only-listed leaves such files out")
    left["image that no row names"] += [folder / name for name in orphans]
    left["image without a label"] = [folder / row["file_name"] for row in rows if not row["label"]]
    return [row for row in rows if row["label"]], [*remarks, *folders.said(left, folder)]


def _locate(folder: Path, rows: list[Row], only_listed: bool) -> tuple[list[Row], list[str]]:
    """The rows with their file's path from the folder, which must be there; remarks where the table
    names files otherwise, and on rows left out.

    Names are paths from the folder, or from the one above it, or the ends of such paths. It is the
    same for all rows of a table, so that a missing file is never found elsewhere.
    """
    for row in rows:
        row["file_name"] = on_disk(row["file_name"], folder)
        name = row["file_name"].replace("\\", "/")
        if not name or name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{row['where']}: file_name {row['file_name']!r} is not a path inside "
                             f"{folder}")

    def some(tried: list[str]) -> list[str]:
        return tried if any(folders.is_file(folder, name) for name in tried) else []

    names = [row["file_name"] for row in rows]
    if any("\\" in name for name in names) and not some(names):
        names = [name.replace("\\", "/") for name in names]
    located = (some(names) or some([name.partition("/")[2] for name in names])
               or some(_by_end(folder, names, rows)) or names)
    there = [bool(name) and folders.is_file(folder, name) for name in located]
    absent = [f"{row['where']} {row['file_name']}" for row, ok in zip(rows, there) if not ok]
    if absent and not (only_listed and any(there)):
        raise InputError(f"{len(absent)} row(s) without a file: {first_few(absent)}"
                         + "; --only-listed leaves such rows out" * any(there))
    remarks = [f"left out: {count(len(absent), 'row')} without a file ({first_few(absent)})"
               ] if absent else []
    example = next((f"{name} of the table is the file {file}, and so on" for name, file, ok
                    in zip(names, located, there) if ok and name != file), "")
    return [{**row, "file_name": name} for row, name, ok in zip(rows, located, there) if ok], [
        *filter(None, [example]), *remarks]


def _by_end(folder: Path, names: list[str], rows: list[Row]) -> list[str]:
    """The one image below the folder whose path ends in each name, with or without its ending, if
    need be in a folder of the row's split; "" where there is none."""
    index = defaultdict(list)
    for file in folders.image_files(folder):
        path = file.relative_to(folder).as_posix()
        index[file.name].append((path, path))
        index[file.stem].append((path, path.removesuffix(file.suffix)))
    found = []
    for name, row in zip(names, rows):
        paths = [path for path, end in index[name.rpartition("/")[2]]
                 if f"/{end}".endswith(f"/{name}")]
        if len(paths) > 1 and (split := folders.split_named(row.get("split", ""))):
            paths = [path for path in paths if _split_in(os.path.dirname(path)) == split] or paths
        if len(paths) > 1:
            raise InputError(f"{row['where']}: file_name {name!r} may be {' or '.join(paths[:2])}; "
                             "write the folder into file_name")
        found.append(paths[0] if paths else "")
    return found


def _without_rows(folder: Path, rows: list[Row]) -> tuple[list[str], folders.Left]:
    """Images that no row names, in the folders of the others; and what else is there, but for the
    contact sheets of our own samples."""
    named = {os.path.normpath(row["file_name"]) for row in rows}
    tops = {name.rpartition("/")[0].partition("/")[0] for name in named}
    left: folders.Left = {}
    above = len(os.path.join(folder, ""))
    files = {str(file)[above:] for top in tops
             for file in folders.image_files(folder / top, deep=bool(top), left=left)}
    orphans = sorted(files - named)
    aside = [] if (folder / MANIFEST).is_file() else [
        file for path in folders.subfolders(folder) if path.name not in tops
        for file in folders.image_files(path)]
    aside += [] if "" in tops else folders.image_files(folder, deep=False)
    read = [name for name in orphans if name.lower().endswith(EXTENSIONS)]
    return read, {"image that no row names": aside,
                  "picture that is not read": [folder / name for name in orphans
                                               if name not in read],
                  **{why: left.get(why, []) for why in (folders.DICOM_FILE, folders.DANGLING)}}


def _other_tables(folder: Path, reading: Reading) -> list[Path]:
    """Tables of other names that name files and labels: one, or one for each split; or none."""
    there = folders.files_ending(folder, dialects.ENDINGS)
    found = [path for path in there if dialects.fits(path, reading.columns)]
    if len(found) > 1 and len({_split_of(path) for path in found} - {""}) < len(found):
        raise InputError(f"{folder}: {' and '.join(path.name for path in found[:2])} both name "
                         "files and labels; call the one that holds metadata.csv")
    if reading.columns and len(there) == 1:
        dialects.read_csv(there[0], ("file_name", "label"), reading.columns)  # its fault, if any
    elif reading.columns and there and not found:
        raise InputError(f"{folder}: no table has the columns of --columns "
                         f"{','.join(reading.columns)}; "
                         f"{_fault(folder, reading.columns) or _advice(folder)}")
    return found


def _refuse_hidden_tables(folder: Path, rows: list[Row]) -> None:
    """Raise InputError where a table beside class folders knows more of the images, and where no
    folder tells labels apart, and a table somewhere below may."""
    for path in folders.files_ending(folder, dialects.ENDINGS):
        if more := {"patient", "split"} & dialects.known_of_images(path):
            raise InputError(f"{path} knows the {' and '.join(sorted(more))} of images, which lie "
                             "in class folders: give it a column label, or move it away")
    label = rows[0]["label"]
    found = [] if any(row["label"] != label for row in rows) else [
        path for path in sorted(folder.rglob("*")) if _may_label(path, flat=label == ANY)
        and not any(part.startswith(".") or folders.is_rubbish(part)
                    for part in path.relative_to(folder).parts)]
    if found:
        names = first_few(str(path.relative_to(folder)) for path in found)
        raise InputError(_fault(folder) or (
            f"{folder}: the folders give one label only, {label!r}, and {names} may know more; if "
            f"so, {_advice(folder)}, or give --data the folder of the table; else move it away"))


def _may_label(path: Path, flat: bool) -> bool:
    """Is it a table, beside images without any label; or one that names images? Lists of files have
    no labels."""
    if path.name.lower().endswith(".txt"):
        with suppress(OSError), open(path, errors="replace") as file:
            words = file.readline().replace(",", " ").split()
            return len(words) > 1 and any(word.lower().endswith(EXTENSIONS) for word in words)
    if path.name.lower().endswith(dialects.ENDINGS) and not flat:
        return bool(dialects.known_of_images(path))
    return flat and path.name.lower().endswith((*dialects.ENDINGS, *UNREAD)) and path.is_file()


def _fault(folder: Path, columns: Sequence[str] = ()) -> str:
    """What is wrong with the first table that names images; "" without one."""
    for path in folders.files_ending(folder, dialects.ENDINGS):
        try:
            if dialects.naming_images(*dialects.read_lines(path)):
                dialects.read_csv(path, ("file_name", "label"), columns)
        except InputError as error:
            return str(error)
    return ""


def _advice(folder: Path) -> str:
    """What to do where there are no labels, and which tables there are."""
    names = first_few(path.name for path in folders.files_ending(folder, dialects.ENDINGS))
    unread = first_few(path.name for path in folders.files_ending(folder, UNREAD))
    return (TABLE + (f", or name the columns of {names} by --columns" if names else "")
            + (f" ({unread}: not read)" if unread else ""))


def _split_of(path: Path) -> str:
    """The split that a file is named after: valid.csv, test_list.txt; "" for others."""
    return folders.split_named(re.split(r"[-_. ]", path.name)[0])


@lru_cache(maxsize=16)  # the next file lies in the same folder
def _split_in(path: str) -> str:
    """The split that a folder in a path is named after; "" for none."""
    return next(filter(None, map(folders.split_named, Path(path).parts)), "")


def _splits_of_lists(folder: Path, rows: list[Row]) -> list[str]:
    """Fill in the splits of lists beside the images: train.csv, test_list.txt (NIH)."""
    split = {}
    for path in filter(_split_of, folders.files_ending(folder, (".txt", ".csv", ".tsv"))):
        for name in re.split(r"[\s,;]+", path.read_text(errors="replace")):
            split.setdefault(Path(name).name, set()).add(_split_of(path))
    found = [split.get(Path(row["file_name"]).name, set()) for row in rows] if split else []
    if len(set().union(*found)) < 2:
        return []
    for row, names in zip(rows, found):
        if len(names) != 1:
            raise InputError(f"{row['where']}: {row['file_name']} is in {len(names)} of the lists "
                             f"of splits in {folder}; it must be in one")
        row["split"] = next(iter(names))
    return ["splits are those of the lists of files beside the images"]


def _splits_of_column(rows: list[Row]) -> list[str]:
    """Fill in the splits of a column of another name that says nothing else: Dataset_type."""
    found = {name: [folders.split_named(row.get(name, "")) for row in rows] for name in rows[0]
             if name not in (*dialects.ADDED, *dialects.COLUMNS)}
    found = {name: splits for name, splits in found.items()
             if "" not in splits and len(set(splits)) > 1}
    if len(set(map(tuple, found.values()))) > 1:
        raise InputError(f"the columns {' and '.join(found)} may each be the split: choose, "
                         f"--columns split={next(iter(found))}")
    name, splits = next(iter(found.items()), ("", ()))
    for row, split in zip(rows, splits):
        row["split"] = split
    return [f"splits are those of the column {name!r}; a column split, be it empty, goes before it"
            ] if found else []


def _splits_of_folders(rows: list[Row]) -> list[str]:
    """Fill in the splits that folders are named after, if they are two or more."""
    found = [_split_in(os.path.dirname(row["file_name"])) for row in rows]
    if len(set(found) - {""}) == 1:
        return [f"all images lie in folders named {found[0]}, which is taken for no split"] * all(
            found)
    for row, split in zip(rows, found):
        row["split"] = split
    return []


def _patients_of_folders(rows: list[Row]) -> list[str]:
    """Fill in the patients that folders are named after, where no row names any."""
    if any(row.get("patient") for row in rows):
        return []
    found = [next(filter(PATIENT.fullmatch, Path(row["file_name"]).parts[:-1]), "") for row in rows]
    for row, patient in zip(rows, found):
        row |= {"patient": patient} if patient else {}
    known = sorted(set(found) - {""})
    return [f"patients are read off the folders {first_few(known)}"] if known else []


def random_split(folder: Path) -> bool:
    """Was the split that this folder brings drawn at random, as its own files say?"""
    return (folder / RANDOM_SPLIT).is_file() or (folder / PHANTOM).is_file()
