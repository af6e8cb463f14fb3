"""A folder of DICOM files → a data set of PNG and metadata.csv; the same command again goes on
where it stopped.

Inside the data set stands nothing of the source but pixels and the facts of `tags`: a file's name
is a keyed hash of its content, and so is the order of the rows. Which source became which image is
written beside the data set, for its owner's eyes, and stays where the source is.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from tqdm import tqdm

import minidiff
from minidiff import runs
from minidiff.data.dicom import MAX_BYTES, REASONS, Refused, reader, tags
from minidiff.data.dicom.guard import Guard
from minidiff.data.table import csv_text, write_table
from minidiff.errors import InputError

JOURNAL = "import.jsonl"
LABEL = re.compile(r"[^\W_][\w .+-]{0,63}")


class Source(NamedTuple):
    """One file: its path, that below the folder that was named, the name of its content, and its
    label.
    """

    path: str
    below: str
    name: str
    label: str


class Fate(NamedTuple):
    """What became of a file: the key of REASONS, or "imported"."""

    below: str
    name: str
    key: str
    detail: str = ""


def walk(source: Path, failed: Callable[[OSError], None]) -> Iterator[str]:
    """All files below a folder, sorted, or the one file; links to folders are among them, and not
    followed.
    """
    if not source.is_dir():
        yield str(source)
        return
    for folder, below, files in os.walk(source, onerror=failed, followlinks=False):
        below.sort()
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        yield from (os.path.join(folder, name) for name in sorted(files + links))


def sift(source: Path, salt: bytes, label: str,
         label_from: tuple[str, ...]) -> tuple[list[Source], list[Fate]]:
    """Tell the files that may be images from the rest, each content once, before anything is
    decoded.
    """
    found, fates = {}, []

    def below_source(path: str) -> str:
        return os.path.relpath(path, source) if source.is_dir() else os.path.basename(path)

    def failed(error: OSError) -> None:
        fates.append(Fate(below_source(error.filename), "", "unreadable", str(error)))

    for path in tqdm(walk(source, failed), "looking", unit=" files"):
        below = below_source(path)
        try:
            content = _content(path)
        except Refused as refused:
            fates.append(Fate(below, "", *refused.args))
            continue
        except OSError as error:
            fates.append(Fate(below, "", "unreadable", str(error)))
            continue
        top = below.split(os.sep)[0] if os.sep in below else ""
        if label_from and top not in label_from:
            fates.append(Fate(below, "", "label"))
        else:
            name = tags.keyed(salt, "file", content)
            found.setdefault(name, []).append(Source(path, below, name, label or top))
    chosen = []
    for same in found.values():
        clash = len({one.label for one in same}) > 1
        fates += [Fate(one.below, one.name, "conflict" if clash else "duplicate")
                  for one in same[not clash :]]
        chosen += [] if clash else same[:1]
    return chosen, fates


def import_folder(source: Path, out: Path, *, label: str, label_from: tuple[str, ...],
                  salt_file: Path, window: str, frame: int, bits: int, accept: tuple[str, ...],
                  workers: int, seconds: float) -> int:
    """Import what can be imported; 0, or 1 if files were quarantined or skipped.

    Raises InputError for settings that cannot be, another import in `out`, and where there is not
    one image.
    """
    names = out.with_name(out.name + ".names.csv")
    _check(source, out, label, label_from, accept, salt_file)
    salt = tags.read_salt(salt_file)
    options = {"label": label, "label_from": list(label_from), "window": window, "frame": frame,
               "bits": bits, "source": tags.keyed(salt, "source", str(source.resolve())),
               "salt": tags.keyed(salt, "salt", "")}
    accepted = _claim(out, options, accept)
    sources, fates = sift(source, salt, label, label_from)
    rows = {row["name"]: row for row in runs.read_log(out / JOURNAL)
            if (out / row["file_name"]).is_file()}
    todo = [one for one in sources if one.name not in rows]
    fates += [Fate(one.below, one.name, "imported") for one in sources if one.name in rows]
    how = reader.Options(salt.hex(), window, frame, bits, accept)
    for one, result in _convert_all(todo, out, how, workers, seconds):
        if isinstance(result, Refused):
            fates.append(Fate(one.below, one.name, *result.args))
            continue
        rows[one.name] = {"name": one.name, "file_name": f"images/{one.label}/{one.name}.png",
                          "label": one.label, **result}
        runs.append_log(out / JOURNAL, **rows[one.name])
        fates.append(Fate(one.below, one.name, "imported"))
    rows = [{key: cell for key, cell in row.items() if key != "name"}
            for _, row in sorted(rows.items())]
    counts = Counter(fate.key for fate in fates if fate.key != "imported")
    runs.write_atomic(names, csv_text([_named(fate) for fate in sorted(fates)]), private=True)
    left_out = [(tags.keyed(salt, "path", fate.below), *REASONS[fate.key]) for fate in fates
                if fate.key != "imported"]
    columns = ("source", "result", "reason")
    write_table(out / "not_imported.csv",
                [dict(zip(columns, line)) for line in [*sorted(left_out)] or [("", "", "")]])
    if rows:
        write_table(out / "metadata.csv", rows)
    _write_facts(out, options, accepted, images=len(rows), not_imported=dict(counts.most_common()))
    return _report(out, rows, counts, names, salt_file)


def _convert_all(todo: list[Source], out: Path, how: reader.Options, workers: int,
                 seconds: float) -> Iterator[tuple[Source, dict[str, str] | Refused]]:
    guards = SimpleQueue()
    every = [Guard(seconds) for _ in range(max(1, min(workers, len(todo))))]
    for guard in every:
        guards.put(guard)

    def convert(one: Source) -> dict[str, str] | Refused:
        guard = guards.get()
        try:
            image, row = guard.convert(one.path, how)
        except Refused as refused:
            return refused
        finally:
            guards.put(guard)
        runs.write_atomic(out / "images" / one.label / f"{one.name}.png", image, durable=False)
        return row

    pool = ThreadPoolExecutor(len(every))
    try:
        results = tqdm(pool.map(convert, todo), "importing", len(todo), unit=" files")
        yield from ((one, result) for result, one in zip(results, todo))
    finally:
        pool.shutdown(cancel_futures=True)
        for guard in every:
            guard.stop()


def _content(path: str) -> str:
    """sha256 of what may be an image. Raises Refused for what is none, before more than its head is
    read.
    """
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused("link")
    if status.st_size == 0:
        raise Refused("empty")
    if os.path.basename(path).upper() == "DICOMDIR":
        raise Refused("dicomdir")
    with open(path, "rb") as file:
        looks = reader.looks_like(file.read(512))
    if looks != "dicom":
        raise Refused(looks)
    if status.st_size > MAX_BYTES:
        raise Refused("huge")
    return runs.sha256(path)


def _check(source: Path, out: Path, label: str, label_from: tuple[str, ...],
           accept: tuple[str, ...], salt: Path) -> None:
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if bool(label) == bool(label_from):
        raise InputError("import needs --label NAME for all images, or --label-from FOLDER FOLDER "
                         "… of the source")
    for name in (label, *label_from):
        if name and not LABEL.fullmatch(name):
            raise InputError(f"label {name!r}: allowed are letters, digits, space and .+-_, to 64, "
                             "a letter or digit first")
    if set(accept) - {"absent", "yes"}:
        raise InputError(f"--accept-burned-in {' '.join(accept)}: allowed are absent and yes")
    if runs.nested(source, out):
        raise InputError(f"--out {out} and the source {source} lie within each other")
    if out.resolve() in salt.resolve().parents:
        raise InputError(f"--salt {salt} lies in --out {out}: whoever gets the images could find "
                         "out the patients")


def _claim(out: Path, options: dict, accept: tuple[str, ...]) -> list[str]:
    """Make the folder, or go on in one of the same settings; what burned-in annotations were
    accepted in it so far.
    """
    before = {}
    if (out / "import.json").is_file():
        before = runs.read_json(out / "import.json")
        changed = [key for key in options if before.get("options", {}).get(key) != options[key]]
        if changed:
            # which hides whether the source is the same
            changed = ["salt"] if "salt" in changed else changed
            raise InputError(f"{out} was imported with another {', '.join(changed)}; give another "
                             "--out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is no import; give another --out, nothing there is "
                         "overwritten")
    accepted = sorted({*accept, *before.get("accepted_burned_in", [])})
    _write_facts(out, options, accepted)
    return accepted


def _write_facts(out: Path, options: dict, accepted: list[str], **facts) -> None:
    runs.write_json(out / "import.json", {"minidiff": minidiff.__version__, "options": options,
                                          "accepted_burned_in": accepted, **facts})


def _named(fate: Fate) -> dict[str, str]:
    result, reason = ("imported", "") if fate.key == "imported" else REASONS[fate.key]
    plain = (cell.encode("utf-8", "backslashreplace").decode()
             for cell in (fate.below, fate.detail))
    below, detail = (re.sub(r"[^\S ]+", " ", cell) for cell in plain)
    return {"source": below, "image": fate.name, "result": result, "reason": reason,
            "detail": detail}


def _report(out: Path, rows: list[dict[str, str]], counts: Counter, names: Path, salt: Path) -> int:
    lines = [f"  {n} {REASONS[key][0]}: {REASONS[key][1]}" for key, n in counts.most_common()]
    if lines:
        print(f"not imported, file by file in {names}:", *lines, sep="\n", file=sys.stderr)
    if not rows:
        raise InputError(f"{out}: not one image of {counts.total()} files was imported")
    facts = ("patient", "age", "sex", "view", "modality")
    known = ", ".join(f"{name} of {sum(row[name] != '' for row in rows)}" for name in facts)
    patients = len({row["patient"] for row in rows} - {""})
    print(f"{out}: {len(rows)} images of {patients} patients; known: {known}\n"
          f"keep to yourself: {salt} (the salt) and {names} (which source became which image)")
    if patients == 1 < len(rows):
        print("all images have the same PatientID or study: is it a placeholder? Splits by patient "
              "cannot be made", file=sys.stderr)
    return int(any(REASONS[key][0] != "ignored" for key in counts))
