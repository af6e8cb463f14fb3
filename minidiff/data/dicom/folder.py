"""A folder of DICOM files → a data set of PNG and metadata.csv; the same command continues an
import that was interrupted.

The data set holds nothing of the source but pixels and the facts of `tags`: a file's name is a
keyed hash of its content, and the rows are sorted by it. Which source became which image is written
beside the data set, for its owner's eyes, and stays where the source is.
"""

import os
import re
import stat
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, NamedTuple

from tqdm import tqdm

import minidiff
from minidiff import runs
from minidiff.data.dicom import (
    MAX_BYTES,
    REASONS,
    Refused,
    claim_out,
    labels,
    need_pydicom,
    reader,
    tags,
)
from minidiff.data.dicom.guard import Guard
from minidiff.data.table import csv_text, write_table
from minidiff.errors import InputError, refuse
from minidiff.names import folders

JOURNAL, RECORD = "import.jsonl", "import.json"
BARE = (b"\x08\x00", b"\x00\x08", b"\x02\x00")  # first group of a file without "DICM"
PACKED = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!",
          b"\x28\xb5\x2f\xfd")  # archives
# The detail of these is a number or a word of ours: it may be printed, others may hold a name.
PLAIN = ("bits", "frames", "size", "stretched", "window", "window_values", "codec", "mismatch",
         "gap", "doubled", "geometry", "scale")
LABEL = re.compile(r"[^\W_][\w .+-]{0,63}")


@dataclass(frozen=True)
class ImportConfig:
    positional: ClassVar[str] = "source"
    source: str = ""                   # folder of DICOM files, or one file; first, without its flag
    out: str = ""                      # new folder of the data set
    label: str = ""                    # label of all images
    label_from: tuple[str, ...] = ()   # or: folders in the source whose names are labels
    labels: str = ""                   # or: a CSV table of labels by patient, study, series, image
    columns: tuple[str, ...] = ()      # of that table, e.g. patient=patientId label=Target
    window: Literal["auto", "file", "percentile", "lung", "soft", "bone", "wide"] = "auto"  # of CT
    frame: int = 0                     # which of several frames, from 1; 0 leaves such files out
    bits: Literal["8", "16"] = "8"     # of the PNG; training keeps them
    accept_burned_in: tuple[str, ...] = ()  # absent, yes: files that may have text in the pixels
    salt: str = ""                     # secret file; none: ~/.config/minidiff/dicom.salt
    workers: int = 2                   # processes that decode
    seconds: float = 60                # for one file


class File(NamedTuple):
    """A file of the source, and what became of it."""

    below: str     # path below the folder that was named
    name: str      # keyed hash of its content, where that was read
    key: str = ""  # of REASONS, or "imported"; "" while it may be an image
    detail: str = ""
    path: str = ""
    label: str = ""


def import_folder(cfg: ImportConfig) -> None:
    """Make a data set of PNG and metadata.csv of a folder of DICOM files.

    Ends with exit status 1 if files were quarantined or skipped. Raises InputError for settings
    that are not allowed, for another import in `out`, and where not one image is imported.
    """
    need_pydicom()
    salt_file = tags.salt_file(cfg.salt)
    source, out = Path(cfg.source), Path(os.path.abspath(cfg.out))
    _check(cfg, source, out, salt_file)
    given = labels.read(cfg.labels, cfg.columns) if cfg.labels else labels.Labels()
    salt = tags.read_salt(salt_file)
    facts = claim(out, cfg.accept_burned_in, {
        "label": cfg.label, "label_from": list(cfg.label_from), "window": cfg.window,
        "frame": cfg.frame, "bits": int(cfg.bits),
        "source": tags.keyed(salt, "source", str(source.resolve())),
        "salt": tags.keyed(salt, "salt", ""),
        **({"labels": tags.keyed(salt, "labels", repr(given))} if cfg.labels else {})})
    rows = {row["name"]: row for row in runs.read_log(out / JOURNAL)
            if (out / row["file_name"]).is_file()}
    sifted = sift(source, salt, cfg.label, cfg.label_from, given)
    files = [file if file.key else file._replace(key="imported") for file in sifted
             if file.key or file.name in rows]
    todo = [file for file in sifted if not file.key and file.name not in rows]
    how = reader.Options(salt.hex(), cfg.window, cfg.frame, int(cfg.bits), cfg.accept_burned_in,
                         cfg.labels, cfg.columns)
    for file, row in _convert_all(todo, out, how, cfg.workers, cfg.seconds):
        files.append(file)
        if row:
            rows[file.name] = row
            runs.append_log(out / JOURNAL, **row)
    found = {row.get("id") for row in rows.values()}
    files += [File(f"{cfg.labels}: {name}", "", "absent") for name in given.of
              if tags.keyed(salt, "id", name) not in found]
    table = [{key: cell for key, cell in row.items() if key not in ("name", "id")}
             for _, row in sorted(rows.items())]
    names = out.with_name(out.name + ".names.csv")
    runs.write_atomic(names, csv_text([named(file) for file in sorted(files)]), private=True)
    left_out = [file for file in files if file.key != "imported"]
    lines = sorted((tags.keyed(salt, "path", file.below), *REASONS[file.key]) for file in left_out)
    write_table(out / "not_imported.csv", [dict(zip(("source", "result", "reason"), line))
                                           for line in lines or [("", "", "")]])
    if table:
        write_table(out / "metadata.csv", table)
    counts = Counter(file.key for file in left_out)
    runs.write_json(out / RECORD, facts | {"images": len(table),
                                           "not_imported": dict(counts.most_common())})
    _report(out, table, left_out, names, salt_file)
    if any(REASONS[key][0] != "ignored" for key in counts):
        sys.exit(1)


def sift(source: Path, salt: bytes, label: str, label_from: tuple[str, ...],
         given: labels.Labels) -> list[File]:
    """Tell the files that may be images from the rest, each content once, before anything is
    decoded. Their label is that of all, their folder's or, where `given` lists names, their name's.
    """
    base = source if source.is_dir() else source.parent
    files, same, failed = [], defaultdict(list), []
    for path in tqdm(walk(source, failed.append), "looking", unit=" files"):
        below = os.path.relpath(path, base)
        top = os.path.dirname(below).split(os.sep)[0]
        try:
            name = tags.keyed(salt, "file", content(path))
            if label_from and top not in label_from:
                raise Refused("label")
            own = top if label_from else given.of_name(path)
            same[name].append(File(below, name, path=path, label=label or own))
        except Refused as refused:
            files.append(File(below, "", *refused.args))
    files += [File(os.path.relpath(error.filename, base), "", "unreadable", str(error))
              for error in failed]
    labels.check_names((own[0].path for own in same.values()), given)
    for first, *others in same.values():
        conflict = any(other.label != first.label for other in others)
        files.append(first._replace(key="conflict" if conflict else ""))
        files += [other._replace(key="conflict" if conflict else "duplicate") for other in others]
    return files


def walk(source: Path, failed: Callable[[OSError], None]) -> Iterator[str]:
    """All files below a folder, sorted, or the one file; links to folders are among them, and not
    followed."""
    if not source.is_dir():
        yield str(source)
    for folder, below, files in os.walk(source, onerror=failed):
        below.sort()
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        yield from (os.path.join(folder, name) for name in sorted(files + links))


def content(path: str) -> str:
    """sha256 of a file that may be an image. Raises Refused for others after reading their head."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Refused("link")
        if status.st_size == 0:
            raise Refused("empty")
        if os.path.basename(path).upper() == "DICOMDIR":
            raise Refused("dicomdir")
        with open(path, "rb") as file:
            head = file.read(512)
        if head[128:132] != b"DICM" and not head.startswith(BARE):
            packed = head.startswith(PACKED) or head[257:262] == b"ustar"
            raise Refused("archive" if packed else "foreign")
        if status.st_size > MAX_BYTES:
            raise Refused("huge")
        return runs.sha256(path)
    except OSError as error:
        raise Refused("unreadable", str(error)) from None


def _convert_all(todo: list[File], out: Path, how: reader.Options, workers: int,
                 seconds: float) -> Iterator[tuple[File, dict[str, str]]]:
    """Each file with what became of it, and its row if it is imported."""
    guards, idle = [Guard(seconds) for _ in range(workers)], SimpleQueue()
    folder = folders(file.label for file in todo)
    for guard in guards:
        idle.put(guard)

    def convert(file: File) -> tuple[File, dict[str, str]]:
        guard = idle.get()
        try:
            image, row = guard.convert(file.path, how)
        except Refused as refused:
            return file._replace(key=refused.key, detail=refused.detail), {}
        finally:
            idle.put(guard)
        # a label of a table need not be fit for a folder's name
        name = (f"images/{file.name}.png" if how.labels
                else f"images/{folder[file.label]}/{file.name}.png")
        runs.write_atomic(out / name, image, durable=False)
        if "id" in row:  # it may name the patient
            row["id"] = tags.keyed(bytes.fromhex(how.salt), "id", row["id"])
        return file._replace(key="imported"), {"name": file.name, "file_name": name,
                                               "label": file.label, **row}

    pool = ThreadPoolExecutor(workers)
    try:
        yield from tqdm(pool.map(convert, todo), "importing", len(todo), unit=" files")
    finally:
        pool.shutdown(cancel_futures=True)
        for guard in guards:
            guard.stop()


def _check(cfg: ImportConfig, source: Path, out: Path, salt: Path) -> None:
    check_labels(cfg.label, *cfg.label_from)
    refuse({
        "import needs a folder of DICOM files, and --out DATA": not cfg.source or not cfg.out,
        f"--frame {cfg.frame} --workers {cfg.workers} --seconds {cfg.seconds}: allowed are 0 or "
        "more, 1 or more, more than 0": cfg.frame < 0 or cfg.workers < 1 or cfg.seconds <= 0,
        f"{source}: no such file or folder": not source.exists(),
        "import needs --label NAME for all images, or --label-from FOLDER FOLDER … of the source, "
        "or --labels CSV": sum(map(bool, (cfg.label, cfg.label_from, cfg.labels))) != 1,
        "--columns are those of the table of --labels": cfg.columns and not cfg.labels,
        **of_every_import(cfg, source, out, salt)})


def of_every_import(cfg: Any, source: Path, out: Path, salt: Path) -> dict[str, Any]:
    """Faults of the knobs that all imports have, for `errors.refuse`."""
    return {
        f"--accept-burned-in {' '.join(cfg.accept_burned_in)}: allowed are absent and yes":
            set(cfg.accept_burned_in) - {"absent", "yes"},
        f"--out {out} and the source {source} lie within each other": runs.nested(source, out),
        f"--salt {salt} lies in --out {out}: whoever gets the images could find out the patients":
            out.resolve() in salt.resolve().parents}


def check_labels(*named: str) -> None:
    """Labels become names of folders."""
    odd = [name for name in named if name and not LABEL.fullmatch(name)]
    if odd:
        raise InputError(f"label {', '.join(map(repr, odd))}: allowed are letters, digits, space "
                         "and .+-_, to 64, a letter or digit first")


def claim(out: Path, accept: tuple[str, ...], options: dict) -> dict:
    """Make the folder, or re-open one of the same settings; what is written down of it."""
    claim_out(out, RECORD, "import")
    before = runs.find_json(out / RECORD, {"options": options})
    changed = [key for key in options if before["options"].get(key) != options[key]]
    if changed:
        # with another salt the keyed source differs, too, and says nothing
        named = "salt" if "salt" in changed else ", ".join(changed)
        raise InputError(f"{out} was imported with another {named}; give another --out")
    facts = {"minidiff": minidiff.__version__, "options": options,
             "accepted_burned_in": sorted({*accept, *before.get("accepted_burned_in", [])})}
    runs.write_json(out / RECORD, facts)
    return facts


def named(file: File) -> dict[str, str]:
    below, detail = (re.sub(r"[^\S ]+", " ", cell.encode("utf-8", "backslashreplace").decode())
                     for cell in (file.below, file.detail))
    result, reason = REASONS.get(file.key, ("imported", ""))
    return {"source": below, "image": file.name, "result": result, "reason": reason,
            "detail": detail}


def print_reasons(left_out: list[File], names: Path) -> Counter[str]:
    """Why files were not imported, on stderr; how many for each of REASONS."""
    counts = Counter(file.key for file in left_out)
    details = {file.key: f" (e.g. {file.detail})" for file in reversed(left_out)
               if file.detail and file.key in PLAIN}
    if counts:
        lines = [f"  {n} {': '.join(REASONS[key])}{details.get(key, '')}"
                 for key, n in counts.most_common()]
        print(f"not imported, file by file in {names}:", *lines, sep="\n", file=sys.stderr)
    return counts


def _report(out: Path, rows: list[dict[str, str]], left_out: list[File], names: Path,
            salt: Path) -> None:
    counts = print_reasons(left_out, names)
    if not rows:
        raise InputError(f"{out}: not one image of {counts.total()} files was imported")
    known = ", ".join(f"{name} of {sum(row[name] != '' for row in rows)}"
                      for name in ("patient", "age", "sex", "view", "modality"))
    patients = len({row["patient"] for row in rows} - {""})
    print(f"{out}: {len(rows)} images of {patients} patients; known: {known}\n"
          f"keep to yourself: {salt} (the salt) and {names} (which source became which image)")
    if patients == 1 < len(rows):
        print("all images have the same PatientID or study: is it a placeholder? Splits by patient "
              "cannot be made", file=sys.stderr)
