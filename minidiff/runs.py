"""Run folders: config.json (knobs), run.json (provenance), log.jsonl; and atomic writes.

A folder belongs to one kind of run with one config. The same command again resumes it; another
config, or a folder that holds something else, is refused and nothing in it is touched.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import minidiff
from minidiff import threads
from minidiff.errors import InputError

# How a file begins that was saved in the place of another, and what it is.
IN_PLACE_OF_FILES = (
    (rb"(\xef\xbb\xbf)?\s*(<!|<\?xml|<html|<head|<body|<script|<error)",
     "a web page saved under this name; download the file again, logged in where that is asked"),
    (rb"version https://git-lfs\.github\.com/", "a Git-LFS pointer, which only names the file; "
     "`git lfs pull` in its repository fetches it"),
    (rb"(\.\./)*(\.git)?/annex/objects/", "a git-annex pointer, which only names the file; `git "
     "annex get` in its repository fetches it"),
    (rb"GIF8", "a GIF; save it as PNG"), (rb"%PDF", "a PDF"),
    (rb".{4}ftyp(heic|heix|hevc|mif1|avif)", "HEIC or AVIF; save it as PNG"),
    (rb".{128}DICM", "a DICOM file; `python -m minidiff.data.dicom import FOLDER --out DATA` makes "
     "PNG files and a table of a folder of these"),
    (rb"\0{256}", "nothing but zero bytes: the copy or the download broke off"),
)
DATA = ("data", "prior", "external")  # knobs: folders that may lie elsewhere; their content counts
UNSAVED = ("rehash",)  # knobs of one start, which no run records
SCHEDULE = ("steps", "lr", "decay")   # knobs of a training that is planned up to its last step
UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


def open_run(folder: str | Path, cfg: Any, kind: str, *, free: Iterable[str] = (),
             **facts: Any) -> Path:
    """Create or re-open a run folder; `free` names the knobs that may differ, for they change no
    result.

    `facts` (fingerprints of data, hashes of models it starts from) are kept in run.json and must
    not differ either, except for `notes`. Data that were moved are the same data.
    """
    folder = Path(folder)
    knobs, facts = refuse_other(folder, cfg, kind, free), json.loads(json.dumps(facts))
    past = find_json(folder / "run.json", {})
    if (folder / "config.json").exists():
        _refuse_changed(folder, facts | past.get("facts", {}), facts, (*free, "notes"))
    folder.mkdir(parents=True, exist_ok=True)
    sessions = past.get("sessions", [])
    if sessions:  # the last digits depend on the number of threads, so it stays
        threads.use(sessions[0].get("threads", 0))
    write_json(folder / "run.json",
               {"kind": kind, "facts": facts,
                "sessions": [*sessions, {**provenance(), "folder": os.getcwd()}]})
    write_json(folder / "config.json", knobs)  # last: with it, the folder is a run
    return folder


def refuse_other(folder: str | Path, cfg: Any, kind: str,
                 free: Iterable[str] = ()) -> dict[str, Any]:
    """The knobs as they will be saved; InputError if the folder holds another run, or no run.

    It is quick, so that scripts can call it before they read any image.
    """
    folder, knobs = Path(folder), json.loads(json.dumps({"kind": kind, **asdict(cfg)}))
    knobs = {name: value for name, value in knobs.items() if name not in UNSAVED}
    if (folder / "config.json").exists():
        defaults = {f.name: f.default for f in fields(cfg)}  # of knobs newer than that run
        _refuse_changed(folder, json.loads(json.dumps(defaults, default=str))
                        | read_json(folder / "config.json"), knobs, (*free, *DATA, *UNSAVED))
    elif folder.exists() and not (folder.is_dir() and all(
            path.name.startswith((".", "run.json")) for path in folder.iterdir())):
        raise InputError(f"{folder} exists and is no {kind} run; give another --out, nothing "
                         "there is overwritten")
    return knobs


def _refuse_changed(folder: Path, before: dict, now: dict, free: Iterable[str]) -> None:
    changed = [name for name in {**before, **now} if name not in ("out", "root", *free)
               and _plain(before.get(name), before.get("root"))
               != _plain(now.get(name), now.get("root"))]
    if changed:
        shown = "; ".join(f"{name}: {_short(before.get(name))} there, {_short(now.get(name))} now"
                          for name in changed[:5])
        more = ""
        if set(changed) <= set(SCHEDULE) and now.get("kind") in ("vae", "diffusion"):
            more = f", or go on from it{_way_on(folder, before, now, changed)}"
        elif "data" in changed:
            more = ("; images, labels, patients or splits are others, or, where no patients are "
                    "known, the name of the folder")
        raise InputError(f"{folder} holds a run with other settings ({shown}); give another --root "
                         f"or --out{more}")


def _way_on(folder: Path, before: dict, now: dict, changed: list[str]) -> str:
    """How to train longer than was planned: another run that begins with the finished model."""
    last = folder / {"vae": "vae.json", "diffusion": "model.json"}[now["kind"]]
    first = "" if last.exists() else f", once it has ended after {before['steps']} steps"
    steps = now["steps"] - before["steps"]
    knobs = {"steps": steps if steps > 0 else now["steps"],
             **{name: now[name] for name in changed if name != "steps"}}
    if not before.get("init") and before.get("train", "auto") == "auto":
        knobs["train"] = "all"  # as before; by itself, --init trains a part only
    flags = " ".join(f"--{name} {value}" for name, value in knobs.items())
    saved, run, new = (shlex.quote(f"{folder}{end}") for end in ("/config.json", "", "-2"))
    return f"{first}: python train.py {now['kind']} --from {saved} --init {run} {flags} --out {new}"


def _short(value: Any) -> str:
    """A value for a message, a SHA-256 by its first digits."""
    text = repr(value)
    return f"{text[:13]}…'" if isinstance(value, str) and len(value) == 64 else text


def _plain(value: Any, root: str | None = None) -> Any:
    """For comparison: paths in full or from the root on, however written; empty values as None."""
    if isinstance(value, list):
        return [_plain(item, root) for item in value] or None
    if isinstance(value, str) and "/" in value:
        path = os.path.abspath(value)
        inside = os.path.relpath(path, root) if root else ".."
        return path if inside.startswith("..") else f"ROOT/{inside}"
    return None if value == "" else value


def occupied(path: Path) -> bool:
    """Does something lie here, other than hidden files and an empty folder?"""
    return path.exists() and (not path.is_dir() or any(
        not inside.name.startswith(".") for inside in path.iterdir()))


def provenance() -> dict[str, Any]:
    """Who computed: command, code, libraries, machine, time."""
    changes = "+changes" if _git("status", "--porcelain", "-uno") else ""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "minidiff": minidiff.__version__, "commit": _git("rev-parse", "HEAD") + changes,
        "python": platform.python_version(), "threads": torch.get_num_threads(), **machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def machine() -> dict[str, Any]:
    """What computes: the GPU, if this process uses one, and what its results depend on."""
    if not torch.cuda.is_initialized():
        return {"torch": torch.__version__, "machine": f"{platform.machine()} CPU"}
    return {"torch": torch.__version__, "machine": torch.cuda.get_device_name(),
            "device": f"cuda:{torch.cuda.current_device()}", "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "tf32": torch.backends.cudnn.allow_tf32}


def _git(*words: str) -> str:
    """What git says of this code; nothing without git or outside a repository."""
    try:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def of_other_images(seen: Iterable[str] | None, here: Iterable[str]) -> bool:
    """Was something trained on other images (SHA-256) than these?

    Not if the two sets share half of the smaller one, and not if it is unknown what was seen.
    """
    seen, here = set(seen or ()), set(here)
    return bool(seen) and 2 * len(seen & here) < min(len(seen), len(here))


def nested(a: str | Path, b: str | Path) -> bool:
    """Are two folders the same, or does one lie in the other?"""
    a, b = Path(a).resolve(), Path(b).resolve()
    return a.is_relative_to(b) or b.is_relative_to(a)


def beside(path: Path) -> Path:
    """The hidden name of a file or folder until it is whole: one for each process of each host, for
    two hosts that share a disk may count their processes alike."""
    host = zlib.crc32(platform.node().encode())
    return path.with_name(f".{path.name}.tmp-{host:08x}-{os.getpid()}")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the body has written it.

    `durable`: it also survives a power cut, and not only a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_atomic(path: str | Path, data: bytes | str, *, durable: bool = True,
                 private: bool = False) -> None:
    """Write a file completely or not at all; `private`: only its owner may read it."""
    mode = 0o600 if private else 0o666
    with (replacing(Path(path), durable) as temporary,
          open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file):
        # a file name that is no UTF-8 is written as JSON writes it
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor],
                 metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file completely or not at all, without a second copy in memory."""
    with replacing(Path(path)) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; safetensors writes for its owner alone
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()},
                      temporary, metadata)
        except SafetensorError as error:  # it wraps the system's errors
            code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        temporary.chmod(mode)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk, where the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSYNCED:
            raise


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged, not JSON: {error}") from None


def find_json(path: str | Path, otherwise: Any = None) -> Any:
    """What `read_json` gives, or `otherwise` where there is no such file."""
    return read_json(path) if Path(path).is_file() else otherwise


def append_log(path: str | Path, **values: Any) -> None:
    """One JSON line; floats in full, so that two equal runs write equal logs."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log; a last line that a crash cut short is left out."""
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rewind_log(path: str | Path, step: int) -> None:
    """Drop what was logged after `step`, the step of the checkpoint that is resumed."""
    if Path(path).exists():
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in read_log(path)
                                   if line["step"] <= step))


def in_its_place(path: str | Path) -> str:
    """"; it is …": what lies in the place of a file, for a message; "" where that is unknown."""
    try:
        with open(path, "rb") as file:
            what = what_it_is(file.read(256))
    except OSError:
        return ""
    return f"; it is {what}" if what else ""


def json_key(**facts: Any) -> str:
    """One string for a set of facts, to tell whether a cache still fits."""
    return json.dumps(facts, sort_keys=True)


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def what_it_is(first_bytes: bytes) -> str:
    """What lies in the place of an image or of weights, and the way out; "" where that is unknown.

    Give it the first 256 bytes of a file, or more. Text is quoted, for a server's answer ("Entry
    not found") says what went wrong.
    """
    for begins, what in IN_PLACE_OF_FILES:
        if re.match(begins, first_bytes, re.IGNORECASE | re.DOTALL):
            return what
    words = " ".join(first_bytes[:256].decode("ascii", "replace").split())
    plain = words and words.isascii() and words.isprintable()
    return f"text, which begins {words[:40]!r}" if plain else ""
