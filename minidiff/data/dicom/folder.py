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
from typing import ClassVar, Literal, NamedTuple

from tqdm import tqdm

import minidiff
from minidiff import runs
from minidiff.data.dicom import MAX_BYTES, REASONS, Refused, need_pydicom, reader, tags
from minidiff.data.dicom.guard import Guard
from minidiff.data.table import csv_text, write_table
from minidiff.errors import InputError

JOURNAL = "import.jsonl"
LABEL = re.compile(r"[^\W_][\w .+-]{0,63}")


@dataclass(frozen=True)
class ImportConfig:
    positional: ClassVar[str] = "source"
    source: str = ""                   # folder of DICOM files, or one file; first, without its flag
    out: str = ""                      # new folder of the data set
    label: str = ""                    # label of all images
    label_from: tuple[str, ...] = ()   # or: folders in the source whose names are labels
    window: Literal["auto", "file", "percentile", "lung", "soft", "bone"] = "auto"  # CT needs one
    frame: int = 0                     # which of several frames, from 1; 0 leaves such files out
    bits: Literal["8", "16"] = "8"     # of the PNG; training reads 8
    accept_burned_in: tuple[str, ...] = ()  # absent, yes: files that may have text in the pixels
    salt: str = ""                     # secret file; none: ~/.config/minidiff/dicom.salt
    workers: int = 2                   # processes that decode
    seconds: float = 60                # for one file


class Source(NamedTuple):
    path: str
    below: str  # path below the folder that was named
    name: str   # keyed hash of the content
    label: str


class Fate(NamedTuple):
    """What became of a file: the key of REASONS, or "imported"."""

    below: str
    name: str
    key: str
    detail: str = ""


def import_folder(cfg: ImportConfig) -> int:
    """Import what can be imported; 0, or 1 if files were quarantined or skipped.

    Raises InputError for settings that are not allowed, for another import in `out`, and where not
    one image is imported.
    """
    need_pydicom()
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    salt_file = Path(cfg.salt or home / "minidiff" / "dicom.salt")
    source, out = Path(cfg.source), Path(os.path.abspath(cfg.out))
    _check(cfg, source, out, salt_file)
    salt = tags.read_salt(salt_file)
    options = {"label": cfg.label, "label_from": list(cfg.label_from), "window": cfg.window,
               "frame": cfg.frame, "bits": int(cfg.bits),
               "source": tags.keyed(salt, "source", str(source.resolve())),
               "salt": tags.keyed(salt, "salt", "")}
    accepted = _claim(out, options, cfg.accept_burned_in)
    sources, fates = sift(source, salt, cfg.label, cfg.label_from)
    rows = {row["name"]: row for row in runs.read_log(out / JOURNAL)
            if (out / row["file_name"]).is_file()}
    todo = [one for one in sources if one.name not in rows]
    how = reader.Options(salt.hex(), cfg.window, cfg.frame, int(cfg.bits), cfg.accept_burned_in)
    for one, result in _convert_all(todo, out, how, cfg.workers, cfg.seconds):
        if isinstance(result, Refused):
            fates.append(Fate(one.below, one.name, *result.args))
        else:
            rows[one.name] = {"name": one.name, "file_name": f"images/{one.label}/{one.name}.png",
                              "label": one.label, **result}
            runs.append_log(out / JOURNAL, **rows[one.name])
    not_imported = fates
    fates = sorted(fates + [Fate(one.below, one.name, "imported") for one in sources
                            if one.name in rows])
    rows = [{key: cell for key, cell in row.items() if key != "name"}
            for _, row in sorted(rows.items())]
    counts = Counter(fate.key for fate in not_imported)
    names = out.with_name(out.name + ".names.csv")
    runs.write_atomic(names, csv_text([_named(fate) for fate in fates]), private=True)
    lines = sorted((tags.keyed(salt, "path", fate.below), *REASONS[fate.key])
                   for fate in not_imported)
    write_table(out / "not_imported.csv", [dict(zip(("source", "result", "reason"), line))
                                           for line in lines or [("", "", "")]])
    if rows:
        write_table(out / "metadata.csv", rows)
    _write_facts(out, options, accepted, images=len(rows), not_imported=dict(counts.most_common()))
    return _report(out, rows, counts, names, salt_file)


def sift(source: Path, salt: bytes, label: str,
         label_from: tuple[str, ...]) -> tuple[list[Source], list[Fate]]:
    """Tell the files that may be images from the rest, each content once, before anything is
    decoded."""
    found, fates = defaultdict(list), []

    def below_source(path: str) -> str:
        return os.path.relpath(path, source) if source.is_dir() else os.path.basename(path)

    def failed(error: OSError) -> None:
        fates.append(Fate(below_source(error.filename), "", "unreadable", str(error)))

    for path in tqdm(walk(source, failed), "looking", unit=" files"):
        below = below_source(path)
        top = below.split(os.sep)[0] if os.sep in below else ""
        try:
            name = tags.keyed(salt, "file", _content(path))
            if label_from and top not in label_from:
                raise Refused("label")
            found[name].append(Source(path, below, name, label or top))
        except Refused as refused:
            fates.append(Fate(below, "", *refused.args))
    chosen = []
    for same in found.values():
        if len({one.label for one in same}) > 1:
            fates += [Fate(one.below, one.name, "conflict") for one in same]
        else:
            chosen.append(same[0])
            fates += [Fate(one.below, one.name, "duplicate") for one in same[1:]]
    return chosen, fates


def walk(source: Path, failed: Callable[[OSError], None]) -> Iterator[str]:
    """All files below a folder, sorted, or the one file; links to folders are among them, and not
    followed."""
    if not source.is_dir():
        yield str(source)
        return
    for folder, below, files in os.walk(source, onerror=failed, followlinks=False):
        below.sort()
        links = [name for name in below if os.path.islink(os.path.join(folder, name))]
        yield from (os.path.join(folder, name) for name in sorted(files + links))


def _content(path: str) -> str:
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
            kind = reader.looks_like(file.read(512))
        if kind != "dicom":
            raise Refused(kind)
        if status.st_size > MAX_BYTES:
            raise Refused("huge")
        return runs.sha256(path)
    except OSError as error:
        raise Refused("unreadable", str(error)) from None


def _convert_all(todo: list[Source], out: Path, how: reader.Options, workers: int,
                 seconds: float) -> Iterator[tuple[Source, dict[str, str] | Refused]]:
    guards = [Guard(seconds) for _ in range(max(1, min(workers, len(todo))))]
    idle = SimpleQueue()
    for guard in guards:
        idle.put(guard)

    def convert(one: Source) -> dict[str, str] | Refused:
        guard = idle.get()
        try:
            image, row = guard.convert(one.path, how)
        except Refused as refused:
            return refused
        finally:
            idle.put(guard)
        runs.write_atomic(out / "images" / one.label / f"{one.name}.png", image, durable=False)
        return row

    pool = ThreadPoolExecutor(len(guards))
    try:
        yield from zip(todo, tqdm(pool.map(convert, todo), "importing", len(todo), unit=" files"))
    finally:
        pool.shutdown(cancel_futures=True)
        for guard in guards:
            guard.stop()


def _check(cfg: ImportConfig, source: Path, out: Path, salt: Path) -> None:
    if not cfg.source or not cfg.out:
        raise InputError("import needs a folder of DICOM files, and --out DATA")
    if cfg.frame < 0 or cfg.workers < 1 or cfg.seconds <= 0:
        raise InputError(f"--frame {cfg.frame} --workers {cfg.workers} --seconds {cfg.seconds}: "
                         "allowed are 0 or more, 1 or more, more than 0")
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if bool(cfg.label) == bool(cfg.label_from):
        raise InputError("import needs --label NAME for all images, or --label-from FOLDER FOLDER "
                         "… of the source")
    for name in (cfg.label, *cfg.label_from):
        if name and not LABEL.fullmatch(name):
            raise InputError(f"label {name!r}: allowed are letters, digits, space and .+-_, to 64, "
                             "a letter or digit first")
    if set(cfg.accept_burned_in) - {"absent", "yes"}:
        raise InputError(f"--accept-burned-in {' '.join(cfg.accept_burned_in)}: allowed are absent "
                         "and yes")
    if runs.nested(source, out):
        raise InputError(f"--out {out} and the source {source} lie within each other")
    if out.resolve() in salt.resolve().parents:
        raise InputError(f"--salt {salt} lies in --out {out}: whoever gets the images could find "
                         "out the patients")


def _claim(out: Path, options: dict, accept: tuple[str, ...]) -> list[str]:
    """Make the folder, or re-open one of the same settings; what was accepted in it so far."""
    before = {}
    if (out / "import.json").is_file():
        before = runs.read_json(out / "import.json")
        changed = [key for key in options if before.get("options", {}).get(key) != options[key]]
        if "salt" in changed:  # then the keyed source differs, too, and says nothing
            changed = ["salt"]
        if changed:
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
    below, detail = (re.sub(r"[^\S ]+", " ", cell.encode("utf-8", "backslashreplace").decode())
                     for cell in (fate.below, fate.detail))
    result, reason = REASONS.get(fate.key, ("imported", ""))
    return {"source": below, "image": fate.name, "result": result, "reason": reason,
            "detail": detail}


def _report(out: Path, rows: list[dict[str, str]], counts: Counter, names: Path, salt: Path) -> int:
    if counts:
        lines = [f"  {n} {': '.join(REASONS[key])}" for key, n in counts.most_common()]
        print(f"not imported, file by file in {names}:", *lines, sep="\n", file=sys.stderr)
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
    return int(any(REASONS[key][0] != "ignored" for key in counts))
