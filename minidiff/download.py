"""A public file from the network, whole and right or not at all. Only commands that were asked to
fetch come here.
"""

from __future__ import annotations

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
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", 95_628_359)


def cache() -> Path:
    """Where files go if no folder is named: $XDG_CACHE_HOME/minidiff, or ~/.cache/minidiff."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minidiff"


def retrieve(url: str, path: Path, digest: str, size: int, advice: str,
             headers: Mapping[str, str] | None = None) -> Path:
    """Fetch a public file into PATH.part, going on where an earlier try was cut off, and rename it
    when it is right.

    No more than `size` bytes are read, and nothing is kept whose SHA-256 is not `digest`.
    InputError when it fails.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        _stream(url, part, size, headers or {})
    # offline, refused, cut off, not a URL
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = "another process is at it" if isinstance(error,
                                                       BlockingIOError) else getattr(error,
                                                                                     "reason",
                                                                                     error)
        raise InputError(f"{url} cannot be fetched ({why}); {advice}") from None
    from minidiff.runs import sha256, sync  # only now: runs imports torch
    found, length = sha256(part), part.stat().st_size
    if found != digest:
        part.unlink()
        with contextlib.suppress(OSError):  # a folder that was made for this file alone
            part.parent.rmdir()
        more = "or more " if length > size else ""
        raise InputError(f"{url}: {length} bytes {more}with SHA-256 {found}; the public file has "
                         f"{size} and {digest}. Nothing was kept; {advice}")
    os.replace(part, path)
    sync(path.parent)
    return path


def _stream(url: str, part: Path, size: int, headers: Mapping[str, str]) -> None:
    at = part.stat().st_size if part.is_file() else 0
    if at >= size:  # an earlier process was killed between the last byte and the rename
        return
    request = urllib.request.Request(url, headers={"User-Agent": "minidiff",
                                                   **({"Range": f"bytes={at}-"} if at else {})})
    request.unredirected_hdrs.update(headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        # 200: the server knows no ranges, and sends it all anew
        at = at if reply.status == 206 else 0
        part.parent.mkdir(parents=True, exist_ok=True)
        with (open(part, "ab") as file, tqdm(total=size, initial=at, desc=part.stem, unit="B",
                                             unit_scale=True, dynamic_ncols=True) as bar):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two processes would mix their bytes
            file.truncate(at)
            while at <= size and (block := reply.read(min(1 << 20, size + 1 - at))):
                file.write(block)
                at += len(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        if at < size and reply.length:
            raise ConnectionError(f"cut off after {at:,} of {size:,} bytes; the same command goes "
                                  "on from there")
