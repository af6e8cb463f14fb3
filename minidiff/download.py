"""Fetch a public file completely and with the right hash, or not at all.

Only commands that the user asked to fetch come here.
"""

import contextlib
import fcntl
import http.client
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from minidiff.errors import InputError

INCEPTION = (  # the weights of FID: address, SHA-256 and bytes
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359)
CACHE = "MINIDIFF_CACHE"  # environment: folder of the maps of pixels; set by --cache


def cache() -> Path:
    """Where files go by default: $XDG_CACHE_HOME/minidiff, else ~/.cache/minidiff."""
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "minidiff"


def home() -> Path:
    """The user's own folder; the working folder for a user who has none, as in a container."""
    try:
        return Path.home()
    except RuntimeError:
        return Path()


def retrieve(url: str, path: Path, digest: str, size: int, advice: str,
             headers: Mapping[str, str] | None = None) -> Path:
    """Fetch a public file into PATH.part, resuming an earlier try, and rename it if it is right.

    No more than `size` bytes are read, and only a file with the SHA-256 `digest` is kept.
    InputError, with `advice`, if it fails.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        _stream(url, part, size, headers or {})
    except (OSError, ValueError, http.client.HTTPException) as error:  # offline, cut off, no URL
        why = getattr(error, "reason", error)
        if isinstance(error, BlockingIOError):
            why = "another process is fetching it"
        raise InputError(f"{url} cannot be fetched ({why}); {advice}") from None
    from minidiff.runs import sha256, sync  # only now: runs imports torch
    found, length = sha256(part), part.stat().st_size
    if found != digest:
        part.unlink()
        with contextlib.suppress(OSError):  # it may hold other files
            part.parent.rmdir()
        more = "or more " if length > size else ""
        raise InputError(f"{url}: {length} bytes {more}with SHA-256 {found}; the public file has "
                         f"{size} and {digest}. Nothing was kept; {advice}")
    sync(part)
    os.replace(part, path)
    sync(path.parent)
    return path


def _stream(url: str, part: Path, size: int, headers: Mapping[str, str]) -> None:
    at = part.stat().st_size if part.is_file() else 0
    if at >= size:  # killed between the last byte and the rename
        return
    request = urllib.request.Request(url, headers={"User-Agent": "minidiff"})
    if at:
        request.add_header("Range", f"bytes={at}-")
    request.unredirected_hdrs.update(headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        at = at if reply.status == 206 else 0  # 200: the server sends all of it again
        part.parent.mkdir(parents=True, exist_ok=True)
        with (open(part, "ab") as file, tqdm(total=size, initial=at, desc=part.stem, unit="B",
                                             unit_scale=True, dynamic_ncols=True) as bar):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two processes would mix their bytes
            file.truncate(at)
            while at <= size and (block := reply.read(min(1 << 20, size + 1 - at))):
                file.write(block)
                at += len(block)
                bar.update(len(block))
        if at < size and reply.length:
            raise ConnectionError(f"cut off after {at:,} of {size:,} bytes; the same command "
                                  "resumes")
