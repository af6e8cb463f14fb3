"""Class folders: a folder for each label, and what only looks like that.

A label is the name of a folder, so a folder that a download, an archive or a patient is named after
is refused, and so is a tree in which either of two levels may be the labels.
"""

import re
from collections import Counter
from pathlib import Path
from statistics import median

from minidiff.data.folders import (
    Left,
    image_files,
    is_data_set,
    refuse_unread,
    said,
    split_folders,
    split_named,
    subfolders,
)
from minidiff.data.split import Row
from minidiff.errors import InputError, first_few
from minidiff.variables import ANY

# Names of folders that only hold files: images_001, files, data, train_images, part 2
WORDS = (r"(images?|imgs?|pictures?|pics|photos?|files?|allfiles|data|datasets?|dicoms?|pngs?|"
         r"jpe?gs?|raw|export|batch|part|chunk|(new |untitled )?folder|archive|downloads?|disc|cd)")
CONTAINER = re.compile(WORDS + r"[-_ ]*\(?\d*\)?|(\w+[-_ ])?(train|test|val|valid)(ing)?[-_ ]"
                       r"(images?|imgs?|data|set)(_png|_jpg)?", re.I)
HOLDS_FILES = re.compile(rf"(.*[-_ ])?{WORDS}([-_ \d].*)?", re.I)  # of the only folder: CXR_png
# … that name a patient, a study or a file of theirs: patient00001, sub-S03044, p10, 00000013, dates
IDENTITY = re.compile(
    r"(?i:patient|pat|pt|subject|subj|sub|person|pid|case|study|series|session|ses|exam|scan|visit|"
    r"accession|acc|mrn|id)[-_ #]*[A-Za-z]{0,2}\d+|[ps]\d{2,}|[A-Za-z]{0,3}[-_ ]?\d{3,}|"
    r"\d[\d.]{7,}|(19|20)\d\d[-_. ]\d\d?([-_. ]\d\d?)?|(?=.*\d)[0-9a-fA-F-]{16,}")
MANY, FEW = 5, 2  # so many folders of so few images each are no labels, whatever their names
FLAT = f"no table and no class folders: no image has a label, and all are called {ANY}"
TABLE = "write a metadata.csv with the columns file_name,label,patient"


class NoClassFolders(InputError):
    """What the folders are named after is no label: a table beside them may know more."""


def read_classes(folder: Path, hint: str = TABLE) -> tuple[list[Row], list[str]]:
    """The rows of class folders, and a remark on what was left out.

    hint: what to do where these are no class folders, which raises NoClassFolders.
    """
    left: Left = {}
    splits = split_folders(folder)
    tops = subfolders(folder, left if splits else {})
    for top in (top for top in tops if splits and top not in splits):
        left.setdefault("image in no class folder", []).extend(image_files(top))
    labels: dict[Path, list[Path]] = {}
    for base in [top for top in tops if top in splits] or [folder]:
        loose = image_files(base, deep=False, left=left)
        inner = base / "images"
        if inner.is_dir():
            loose += [file for other in subfolders(base, left) if other != inner
                      for file in image_files(other)]
            loose += image_files(inner, deep=False, left=left)
            base = inner
        left.setdefault("image in no class folder", []).extend(loose)
        for label in subfolders(base, left):
            files = image_files(label, left=left)
            labels |= {label: files} if files else {}
            left.setdefault("folder without images", []).extend([] if files else [label])
    refuse_unread(left)
    if not labels:
        inside = [path.name for path in sorted(folder.iterdir())
                  if path.is_dir() and is_data_set(path)]
        loose = left.pop("image in no class folder", [])
        if loose and not inside:
            return [{"file_name": str(file.relative_to(folder)), "label": ANY, "where": str(file)}
                    for file in loose], [FLAT, *said(left, folder)]
        inside = f"data sets inside it: {first_few(inside)}" if inside else ""
        raise NoClassFolders(f"{folder}: no metadata.csv and no class folders of images; "
                             f"{inside or '; '.join([hint, *said(left, folder)])}")
    for label, files in labels.items():
        _refuse_two_levels(label, files, labels)
    _refuse_no_labels(folder, labels, hint)
    rows = [{"file_name": str(file.relative_to(folder)), "label": label.name, "where": str(file)}
            for label, files in labels.items() for file in files]
    return rows, said(left, folder)


def _refuse_no_labels(folder: Path, labels: dict[Path, list[Path]], hint: str) -> None:
    container = CONTAINER if len(labels) > 1 else HOLDS_FILES
    for label in labels:
        if CONTAINER.fullmatch(label.name) or container.fullmatch(label.name):
            raise NoClassFolders(f"{label}: a folder of this name is no label; if the class "
                                 f"folders are in there, give --data {label}, else {hint}")
        if split_named(label.name):
            raise NoClassFolders(f"{label}: a folder named after a split is no label; give --data "
                                 f"{label.parent}")
    odd = [label for label in labels if IDENTITY.fullmatch(label.name)]
    numbers = [label for label in labels if label.name.isdecimal()]
    sizes = Counter()
    for label, files in labels.items():
        sizes[label.name] += len(files)
    if odd or len(numbers) > 10 or (len(sizes) >= MANY and median(sizes.values()) <= FEW):
        shown = first_few(label.name for label in odd or numbers or labels)
        raise NoClassFolders(f"{folder}: the folders {shown} look like patients or studies, not "
                             f"like labels; {hint}")


def _refuse_two_levels(label: Path, files: list[Path], labels: dict[Path, list[Path]]) -> None:
    """Refuse a class folder that holds splits of class folders, or what may be class folders."""
    inside = _inside(label, files)
    for path in (path for path in inside if len(path) > 1 and split_named(path[0])):
        raise NoClassFolders(f"{label} holds {path[0]}/{path[1]}: it is a data set of its "
                             f"own and no label; give --data {label}")
    inner = {path[0] for path in inside if path and not IDENTITY.fullmatch(path[0])
             and not split_named(path[0])}
    if () in inside or len(inner) < 2:
        return
    others = [other for other in labels if other.parent == label.parent and other != label]
    same = [other for other in others if inner & {
        path[0] for path in _inside(other, labels[other]) if path}]
    if same or not others:
        raise InputError(
            f"{' and '.join(str(path) for path in (label, *same[:1]))} hold the folders "
            f"{first_few(sorted(inner))}: if these are the labels, give --data {label}"
            f"{' ' + str(same[0]) if same else ''}; if {label.name} is one, {TABLE}")


def _inside(label: Path, files: list[Path]) -> list[tuple[str, ...]]:
    """The folders between a class folder and each of its files, but for those like images/."""
    return [tuple(part for part in file.relative_to(label).parts[:-1]
                  if not CONTAINER.fullmatch(part)) for file in files]
