"""Run folders: config.json (the knobs), run.json (provenance), log.jsonl (what happened), and
atomic writes.

A folder belongs to one kind of run with one config. The same command again goes on where it
stopped; another config, or a folder that holds something else, is refused and nothing in it is
touched.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
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


def open_run(folder: str | Path, cfg: Any, kind: str, *, free: Iterable[str] = (),
             **facts: Any) -> Path:
    """Create or re-open a run folder; knobs named in `free` may differ, for they do not change the
    result.

    `facts` (data fingerprints, hashes of the models it starts from) are held to the same rule and
    kept in run.json.
    """
    folder = Path(folder)
    knobs, facts = refuse_other(folder, cfg, kind, free), json.loads(json.dumps(facts))
    if (folder / "config.json").exists():
        _refuse_changed(folder, read_json(folder / "run.json").get("facts", {}), facts,
                        (*free, "notes"))
    folder.mkdir(parents=True, exist_ok=True)
    past = read_json(folder / "run.json")["sessions"] if (folder / "run.json").exists() else []
    if past:  # the last digits depend on the number of threads: go on with as many as it began with
        threads.use(past[0].get("threads", 0))
    write_json(folder / "run.json",
               {"kind": kind, "facts": facts, "sessions": [*past, provenance()]})
    write_json(folder / "config.json", knobs)  # last: its presence says that the folder is a run
    return folder


def refuse_other(folder: str | Path, cfg: Any, kind: str,
                 free: Iterable[str] = ()) -> dict[str, Any]:
    """The knobs as they will be kept; InputError where the folder holds a run with others, or
    something else. Cheap, so that it can be asked before any image is read."""
    folder, knobs = Path(folder), json.loads(json.dumps({"kind": kind, **asdict(cfg)}))
    if (folder / "config.json").exists():
        # knobs newer than that run
        before = {f.name: f.default for f in fields(cfg)} | read_json(folder / "config.json")
        _refuse_changed(folder, json.loads(json.dumps(before, default=str)), knobs, free)
    elif folder.exists() and not (folder.is_dir() and all(p.name.startswith((".", "run.json"))
                                                          for p in folder.iterdir())):
        raise InputError(f"{folder} exists and is no {kind} run; give another --out, nothing there "
                         "is overwritten")
    return knobs


def _refuse_changed(folder: Path, before: dict, now: dict, free: Iterable[str]) -> None:
    held = [k for k in {**before, **now} if k not in ("out", "root", *free)]
    changed = [k for k in held if _plain(before.get(k)) != _plain(now.get(k))]
    if not changed:
        return
    shown = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} now" for k in changed[:5])
    more = f", or go on from it by --init {folder}" if changed == ["steps"] and now["kind"] in (
        "vae", "diffusion") else ""
    raise InputError(f"{folder} holds a run with other settings ({shown}); give another --root or "
                     f"--out{more}")


def _plain(value: Any) -> Any:
    """A path however spelled: ./runs/x/ is runs/x; and nothing, as a knob has it that an older run
    did not know.
    """
    if value in ([], ""):
        return None
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return os.path.abspath(value) if isinstance(value, str) and "/" in value else value


def provenance() -> dict[str, Any]:
    """Who computed: command, code, libraries, machine, time."""
    def git(*words: str) -> str:
        try:
            got = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                                 text=True)
        except OSError:  # no git on this machine
            return ""
        return got.stdout.strip() if got.returncode == 0 else ""

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "minidiff": minidiff.__version__, "commit": git("rev-parse", "HEAD")
        + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "python": platform.python_version(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available() else platform.machine() + " CPU",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def of_other_images(seen: Iterable[str] | None, here: Iterable[str]) -> bool:
    """Was something trained on other images (SHA-256) than these? Not if it shares at least half of
    the fewer images; and where what it was trained on is unknown, nobody can say, and the answer is
    no."""
    seen, here = set(seen or ()), set(here)
    return bool(seen) and 2 * len(seen & here) < min(len(seen), len(here))


def nested(a: str | Path, b: str | Path) -> bool:
    """Are two folders the same, or does one lie in the other?"""
    a, b = Path(a).resolve(), Path(b).resolve()
    return a == b or a in b.parents or b in a.parents


UMASK = os.umask(0)
os.umask(UMASK)  # asking sets it: so once, before there are threads


def write_atomic(path: str | Path, data: bytes | str, *, durable: bool = True,
                 private: bool = False) -> None:
    """Write the whole file or nothing: temporary file beside it, fsync, rename, fsync of the
    folder.

    Without `durable` the fsyncs are left out: whole after a kill, not after a power cut; for images
    by the thousand. What is `private` its owner alone may read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb", opener=lambda name,
                  how: os.open(name, how, 0o600 if private else 0o666)) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all, straight from the tensors: no second copy of
    them in memory.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        os.chmod(temporary, 0o666 & ~UMASK)  # safetensors writes for its owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # its own wrapping of an operating system's fault
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_log(path: str | Path, **values: Any) -> None:
    """One JSON line; floats in full, so that two equal runs write equal logs."""
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log; a last line cut short by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")]


def rewind_log(path: str | Path, step: int) -> None:
    """Forget what was logged after `step`, the step of the checkpoint from which the run goes
    on.
    """
    if Path(path).exists():
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in read_log(path)
                                   if line["step"] <= step))


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; InputError that names the file where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged, not JSON: {error}") from None


def json_key(**facts: Any) -> str:
    """One string for a set of facts, to tell whether a cache still fits."""
    return json.dumps(facts, sort_keys=True)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (
            3, 11) else _digest(file)


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
