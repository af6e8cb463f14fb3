"""SHA-256 of files, kept in the user's cache: what has not changed since is not read again.

A file is known by its path, size, time of change and inode. It has one line: which file it is, its
SHA-256, and a check of both, so that a line that was cut, mixed or damaged is like none. Lines are
only added, by any number of processes at once; of several, the last holds.
"""

import hashlib
import os
import time
import zlib
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from minidiff.download import cache
from minidiff.runs import sha256, write_atomic

FILE = "sha256"      # in the cache folder
AT_ONCE = 1000       # files between two additions: what a kill may lose
YOUNG = 2 * 10**9    # ns: a file that changed so recently may change again unseen
LARGEST = 1 << 28    # bytes: 2.5 million lines; of more, the newer half is kept


def hashes_of(files: Iterable[str | Path], rehash: bool = False) -> dict[str, str]:
    """File → SHA-256 of its content; `rehash` reads all of them, whatever is kept."""
    keys = {os.fspath(file): _key(os.fspath(file)) for file in files}
    known = {} if rehash else _kept(set(keys.values()))
    found = {file: known.get(key, "") for file, key in keys.items()}
    unknown = [file for file, digest in found.items() if not digest]
    with (ThreadPoolExecutor() as pool,  # hashlib releases the interpreter's lock
          tqdm(desc="hashing", total=len(unknown), unit=" files", delay=5) as bar):
        for start in range(0, len(unknown), AT_ONCE):
            part = unknown[start : start + AT_ONCE]
            found |= zip(part, pool.map(sha256, part))
            _keep({keys[file]: found[file] for file in part if _settled(file, keys[file])})
            bar.update(len(part))
    return found


def cached_sha256(path: str | Path) -> str:
    return hashes_of([path])[os.fspath(path)]


def _key(file: str) -> bytes:
    stat, path = os.stat(file), os.fsencode(os.path.abspath(file))
    about = b"\0%d\0%d\0%d" % (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return hashlib.blake2b(path + about, digest_size=16).hexdigest().encode()


def _settled(file: str, key: bytes) -> bool:
    """Will this key always stand for what was hashed? Not if the file changed meanwhile or a moment
    ago: the next change may leave its time as it is, as git knows of its index."""
    stat = os.stat(file)
    return _key(file) == key and time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > YOUNG


def _line(key: bytes, digest: str) -> bytes:
    line = b"%s %s" % (key, digest.encode(errors="replace"))
    return b"%s %08x\n" % (line, zlib.crc32(line))


def _kept(wanted: Collection[bytes]) -> dict[bytes, str]:
    """Key → SHA-256, of the keys that have a whole line."""
    kept = {}
    with suppress(OSError), open(cache() / FILE, "rb") as file:
        for line in file:
            key, digest = line[:32], line[33:97].decode(errors="replace")
            if key in wanted and line == _line(key, digest):
                kept[key] = digest
    return kept


def _keep(new: dict[bytes, str]) -> None:
    path = cache() / FILE
    with suppress(OSError):  # a read-only home, a full disk: they are computed again next time
        if new and path.exists() and path.stat().st_size > LARGEST:
            write_atomic(path, path.read_bytes()[-LARGEST // 2 :], private=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            # behind a line that a kill cut short, a new one begins
            file.write(b"\n" + b"".join(_line(key, digest) for key, digest in new.items()))
