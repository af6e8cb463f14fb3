"""A folder of NIfTI files and DICOM series → a data set of slices; the same command continues an
import that was interrupted.

A volume's name is a keyed hash of its content, and its slices are images/LABEL/NAME_0017.png. Which
source became which volume is written beside the data set, for its owner's eyes.
"""

import os
import stat
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tqdm import tqdm

from minidiff import runs
from minidiff.data.dicom import REASONS, Refused, need_pydicom, tags
from minidiff.data.dicom.folder import (
    File,
    check_labels,
    claim,
    content,
    named,
    of_every_import,
    print_reasons,
    walk,
)
from minidiff.data.dicom.guard import Guard
from minidiff.data.table import csv_text, write_table
from minidiff.data.volumes import MODALITIES, nifti
from minidiff.data.volumes.slices import Cut
from minidiff.errors import InputError, count, refuse
from minidiff.names import folders

JOURNAL, RECORD = "import.jsonl", "import.json"
DESCRIBE, CONVERT = (f"minidiff.data.volumes.convert:{name}" for name in ("describe", "convert"))
ENDINGS = (".nii", ".nii.gz")


@dataclass(frozen=True)
class VolumesConfig:
    positional: ClassVar[str] = "source"
    source: str = ""                   # folder of NIfTI files and DICOM series, or one NIfTI file
    out: str = ""                      # new folder of the data set
    label: str = ""                    # label of all volumes
    label_from: tuple[str, ...] = ()   # or: folders in the source whose names are labels
    modality: Literal["", "CT", "MR"] = ""  # of NIfTI files, which do not say it
    plane: Literal["axial", "coronal", "sagittal"] = "axial"
    window: Literal["auto", "percentile", "lung", "soft", "bone", "wide"] = "auto"  # of CT
    slices: int = 0                    # so many of each volume, evenly spaced; 0: all
    between: tuple[float, ...] = (0.0, 1.0)  # share of the axis: from the feet, front or right
    bits: Literal["8", "16"] = "8"     # of the PNG, hence of training and samples
    frame: int = 0                     # which volume of 4-D files, from 1; 0 leaves such files out
    accept_burned_in: tuple[str, ...] = ()  # absent, yes: DICOM that may have text in its pixels
    salt: str = ""                     # secret file; none: ~/.config/minidiff/dicom.salt
    seconds: float = 300               # for one volume


def import_volumes(cfg: VolumesConfig) -> None:
    """Make a data set of PNG and metadata.csv of the volumes in a folder.

    Ends with exit status 1 if files were left out that may hold a volume. Raises InputError for
    settings that are not allowed, and where not one slice is imported.
    """
    salt_file = tags.salt_file(cfg.salt)
    source, out = Path(cfg.source), Path(os.path.abspath(cfg.out))
    _check(cfg, source, out, salt_file)
    salt = tags.read_salt(salt_file)
    how = Cut(cfg.plane, cfg.window, cfg.slices, *cfg.between, int(cfg.bits))
    facts = claim(out, cfg.accept_burned_in, {
        "label": cfg.label, "label_from": list(cfg.label_from), "modality": cfg.modality,
        "frame": cfg.frame, "cut": list(how), "salt": tags.keyed(salt, "salt", ""),
        "source": tags.keyed(salt, "source", str(source.resolve()))})
    rows: dict[str, list[dict[str, str]]] = {}
    for volume in runs.read_log(out / JOURNAL):
        if all((out / row["file_name"]).is_file() for row in volume["rows"]):
            rows[volume["name"]] = volume["rows"]
    guard = Guard(cfg.seconds)
    try:
        files, volumes = sift(source, salt, cfg.label, cfg.label_from, guard)
        for name, (kind, members) in tqdm(volumes.items(), "importing", unit=" volumes"):
            label = members[0].label
            try:
                if name not in rows:
                    found = guard.call(CONVERT, [file.path for file in members], kind, salt.hex(),
                                       name, cfg.modality, cfg.frame, cfg.accept_burned_in, how)
                    rows[name] = _write(out, name, label, found)
                    runs.append_log(out / JOURNAL, name=name, rows=rows[name])
                key = "imported" if rows[name] else "blank"
            except Refused as refused:
                key, detail = refused.args
                members = [file._replace(detail=detail) for file in members]
            files += [file._replace(key=key, name=name) for file in members]
    finally:
        guard.stop()
    for name in rows.keys() - volumes.keys():  # of a series that has more slices now
        for row in rows.pop(name):
            (out / row["file_name"]).unlink()
    _finish(out, facts, files, [row for name in sorted(rows) for row in rows[name]])


def sift(source: Path, salt: bytes, label: str, label_from: tuple[str, ...],
         guard: Guard) -> tuple[list[File], dict[str, tuple[str, list[File]]]]:
    """Files that hold no volume, and name → kind and files of each volume."""
    base = source if source.is_dir() else source.parent
    files, series, volumes, labels = [], defaultdict(dict), {}, defaultdict(set)
    for path in tqdm(walk(source, lambda error: None), "looking", unit=" files"):
        below = os.path.relpath(path, base)
        top = os.path.dirname(below).split(os.sep)[0]
        file = File(below, "", path=path, label=label or top)
        try:
            if label_from and top not in label_from:
                raise Refused("label")
            if not stat.S_ISREG(os.lstat(path).st_mode):
                raise Refused("link")
            if path.endswith(ENDINGS):
                name = tags.keyed(salt, "file", runs.sha256(path))
                if not nifti.is_nifti(path):
                    raise Refused("damaged", "no NIfTI file, though its name ends as one")
                labels[name].add(file.label)
                if name in volumes:
                    raise Refused("conflict" if len(labels[name]) > 1 else "duplicate")
                volumes[name] = "nifti", [file]
                continue
            digest = content(path)
            (_, found), = guard.call(DESCRIBE, path)
            labels[digest].add(file.label)
            members = series[found["key"], file.label]
            if digest in members:
                raise Refused("duplicate")
            members[digest] = file
        except Refused as refused:
            key, detail = refused.args
            files.append(file._replace(key=key, detail=detail))
        except OSError as error:
            files.append(file._replace(key="unreadable", detail=str(error)))
    for members in series.values():
        name = tags.keyed(salt, "volume", " ".join(sorted(members)))
        if any(len(labels[digest]) > 1 for digest in members):
            files += [file._replace(key="conflict") for file in members.values()]
        else:
            volumes[name] = "dicom", list(members.values())
    for name in [name for name in volumes if len(labels[name]) > 1]:
        files += [file._replace(key="conflict") for file in volumes.pop(name)[1]]
    return files, volumes


def _write(out: Path, name: str, label: str, found: list[tuple[bytes, dict[str, str]]]
           ) -> list[dict[str, str]]:
    rows = []
    folder = folders([label])[label]
    for k, (png, row) in enumerate(found):
        file_name = f"images/{folder}/{name}_{k:04d}.png"
        runs.write_atomic(out / file_name, png, durable=False)
        rows.append({"file_name": file_name, "label": label, **row, "volume": name})
    return rows


def _check(cfg: VolumesConfig, source: Path, out: Path, salt: Path) -> None:
    check_labels(cfg.label, *cfg.label_from)
    low, high = (*cfg.between, 0.0, 0.0)[:2]
    refuse({
        "import needs a folder of volumes, and --out DATA": not cfg.source or not cfg.out,
        f"{source}: no such file or folder": not source.exists(),
        "import needs --label NAME for all volumes, or --label-from FOLDER FOLDER … of the source":
            bool(cfg.label) == bool(cfg.label_from),
        f"--between {' '.join(f'{x:g}' for x in cfg.between)}: two shares of the axis, 0 to 1, the "
        "lower one first": len(cfg.between) != 2 or not 0 <= low < high <= 1,
        f"--slices {cfg.slices} --frame {cfg.frame} --seconds {cfg.seconds:g}: allowed are 0 or "
        "more, 0 or more, more than 0": cfg.slices < 0 or cfg.frame < 0 or cfg.seconds <= 0,
        f"--window {cfg.window}: CT needs lung, soft, bone or wide":
            cfg.modality == "CT" and cfg.window in ("auto", "percentile"),
        **of_every_import(cfg, source, out, salt)})
    kinds = {str(path).endswith(ENDINGS) for path in walk(source, lambda error: None)}
    if True in kinds:
        if not cfg.modality:
            raise InputError(f"{source} holds NIfTI files, which do not say what they are: give "
                             f"--modality {' or '.join(MODALITIES)}")
        try:
            import nibabel  # noqa: F401
        except ImportError:
            raise InputError("NIfTI needs nibabel: pip install 'minidiff[volumes]'") from None
    if False in kinds:
        need_pydicom()


def _finish(out: Path, facts: dict, files: list[File], rows: list[dict[str, str]]) -> None:
    names = out.with_name(out.name + ".names.csv")
    runs.write_atomic(names, csv_text([named(file) for file in sorted(files)]), private=True)
    counts = print_reasons([file for file in files if file.key != "imported"], names)
    if not rows:
        raise InputError(f"{out}: not one slice of {count(len(files), 'file')} was imported")
    write_table(out / "metadata.csv", rows)
    runs.write_json(out / RECORD, facts | {"images": len(rows),
                                           "not_imported": dict(counts.most_common())})
    patients, volumes = ({row[name] for row in rows} for name in ("patient", "volume"))
    if assumed := {row["volume"] for row in rows if row.get("unit")}:
        print(f"{count(len(assumed), 'volume')} of a header that names no unit of length: mm is "
              "assumed, as the column unit says")
    print(f"{out}: {count(len(rows), 'slice')} of {count(len(volumes), 'volume')} of "
          f"{count(len(patients), 'patient')}\nkeep to yourself: {names} (which source became "
          "which volume) and the salt")
    if any(REASONS[key][0] != "ignored" for key in counts):
        sys.exit(1)
