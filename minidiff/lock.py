"""One process at a time in a run folder: a file .lock, which says who is at work there since when.

The system holds the lock for the process and lets go of it when that ends, however it ends: after
`kill -9` or a power cut the file may still lie there, and means nothing. On a disk that has no
locks, the process that the file names is looked for.
"""

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minidiff.errors import InputError

FILE, BOOT = ".lock", Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def alone(folder: str | Path) -> Iterator[None]:
    """Within the body no other command writes into this folder; InputError if one is at work."""
    folder = Path(folder)
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # safetensors cannot open its files
        raise InputError(f"{folder}: the name of a folder to write in must be UTF-8") from None
    if folder.is_file():  # the command itself says what it needs
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    descriptor = _claim(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({
            "pid": os.getpid(), "host": platform.node(), "boot": _boot(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # a command that was refused leaves no empty folders
            for place in new:
                place.rmdir()


def _claim(path: Path) -> int:
    """The lock file, open and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held, more = True, ""
        except OSError:  # this disk has no locks
            held, more = _may_live(_holder(path)), f"; if it has ended, delete {path}"
        if not held:
            with suppress(FileNotFoundError):  # the holder before may have deleted it by now
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        os.close(descriptor)
        if held:
            raise InputError(f"{path.parent}: {_who(_holder(path))}; wait until it has ended, or "
                             f"give another --out{more}")


def _holder(path: Path) -> dict[str, Any]:
    """What the lock file says; nothing if it is just being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _may_live(holder: dict[str, Any]) -> bool:
    """May the process that wrote the file still be at work? On another host nobody can tell."""
    if not holder or holder["host"] != platform.node():
        return bool(holder)
    if holder["boot"] != _boot():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and somebody else's
        pass
    return True


def _who(holder: dict[str, Any]) -> str:
    return ("process {pid} on {host} has been at work here since {since} ({command})".format(
        **holder) if holder else "another process is at work here")


def _boot() -> str:
    """This start of the system, where it has a name."""
    return BOOT.read_text().strip() if BOOT.is_file() else ""
