"""The pixels of a large data set as a mapped file: memory does not grow with the images.

    DIR/64px-1-v2-0123456789abcdef.pixels     N squares, N kinds, N SHA-256 of files, N of squares

It is made once, a shard at a time, by as many processes as there are cores. The kind of an image is
written when its square is on the disk, so that after a kill the next command goes on. Every command
shares it: a table finds its images by the content of their files in any map that holds them one
after another. A map may be deleted whenever no command starts; it is made again.
"""

import fcntl
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from minidiff.threads import cores

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff.data import images
from minidiff.data.split import Row
from minidiff.data.table import Table
from minidiff.download import CACHE, cache
from minidiff.errors import InputError, count
from minidiff.pixels import each, is_grey
from minidiff.runs import replacing, sync

LARGE = 2**30   # bytes of one channel from which on pixels are mapped
SHARD = 256     # images that a process loses by a kill
FORM = 2        # of the file, and of what `images` makes of an image: with another, another map
READ, COLOUR, CONSTANT, BAD, DEEP = 1, 2, 4, 8, 16  # the kind of an image; 0: not read yet
FORMS = {1: (1, "uint8"), 2: (1, "uint16"), 3: (3, "uint8")}  # bytes a pixel: channels, their type
MARKS = 1 + 32 + 32  # bytes of an image besides its square
NONE = bytes(32)     # the `content` of one of one grey
PACKAGE = Path(__file__).parents[2]


def is_mapped(n: int, size: int) -> bool:
    """Are n images this wide mapped? Below LARGE only if a folder was named for it, for in memory
    they are there sooner."""
    return n > 0 and (n * size**2 >= LARGE or CACHE in os.environ)


def read(table: Table, size: int, form: int) -> tuple[Tensor, np.ndarray, dict[str, str]]:
    """Squares (n, channels, size, size), in one of FORMS, of the rows that can be read; the kinds
    of all (N,); and what is wrong with the others, by file."""
    if is_mapped(len(table), size):
        return _mapped(table, size, form)
    channels, dtype = FORMS[form]
    pixels = np.empty((len(table), channels, size, size), dtype)
    kinds = np.zeros(len(table), np.uint8)

    def load(i: int) -> str | None:
        item, kinds[i] = _square(table.rows[i]["file"], size, form)
        if kinds[i] == BAD:
            return _named(table.rows[i], item)
        pixels[i] = item  # grey is repeated

    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it decodes
        said = list(tqdm(pool.map(load, range(len(table))), "reading images", len(table),
                         unit=" images", disable=len(table) < 200))
    faults = {row["file"]: text for row, text in zip(table.rows, said) if text}
    return torch.from_numpy(pixels[kinds != BAD] if faults else pixels), kinds, faults


def form_of(rows: Sequence[Row], grey: bool, deep: bool) -> int:
    """That of the first image: a guess at what the others have."""
    kind = _square(rows[0]["file"], 32, 3)[1] if rows else 0
    return 3 if kind & COLOUR and not grey else 2 if kind & DEEP and deep else 1


def content(picture: np.ndarray) -> bytes | None:
    """SHA-256 of the pixels of uint8 (C,S,S), None of one grey; three equal channels are one."""
    grey = not picture.strides[0] or (picture == picture[:1]).all()
    return None if picture.min() == picture.max() else sha256(
        picture[: 1 if grey else None].tobytes()).digest()


def contents(table: Table, pixels: Tensor) -> Iterator[bytes | None]:
    """`content` of each picture of a table's pixels; where they are mapped, as it was kept when
    they were read."""
    size, form = pixels.shape[-1], pixels.element_size() if is_grey(pixels) else 3
    known, start = None, 0
    if is_mapped(len(table), size):
        known, start, _ = _find([*map(bytes.fromhex, table.digests)], size, form)
    if not known:
        return (content(picture.numpy()) for picture in each(pixels))
    kept = known.digests[1, start : start + len(table)].tobytes()
    keys = (kept[k : k + 32] for k in range(0, len(kept), 32))
    return (None if key == NONE else key for key in keys)


def _square(file: str, size: int, form: int) -> tuple[np.ndarray | str, int]:
    """A picture and its kind; of a bad one what is wrong."""
    try:
        whole = images.read(file, deep=True)
    except InputError as error:
        return str(error), BAD
    item = images.square(images.in_depth(whole, 16 if form == 2 else 8), size)
    kind = (READ | COLOUR * (len(item) == 3) | CONSTANT * bool(item.min() == item.max())
            | DEEP * (whole.dtype == np.uint16))
    if len(item) > FORMS[form][0]:
        item = item.mean(0, keepdims=True).round().astype(item.dtype)
    return item, kind


def _named(row: Row, fault: str) -> str:
    return fault if row["where"] == row["file"] else f"{row['where']}: {fault}"


class Map(NamedTuple):
    """A file of n squares of `item` bytes each, open to be read."""

    path: Path
    data: mmap.mmap
    item: int

    @classmethod
    def open(cls, path: Path, item: int) -> "Map":
        with open(path, "rb") as file:
            return cls(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), item)

    @property
    def n(self) -> int:
        return len(self.data) // (self.item + MARKS)

    @property
    def kinds(self) -> np.ndarray:
        return np.frombuffer(self.data, np.uint8, self.n, self.n * self.item)

    @property
    def digests(self) -> np.ndarray:
        """SHA-256 of the files and `content` of the squares, 0 for None: (2, n, 32)."""
        end = self.n * (self.item + 1)
        return np.frombuffer(self.data, np.uint8, offset=end).reshape(2, -1, 32)

    def find(self, digests: Sequence[bytes]) -> int:
        """Where these files stand one after another, or -1."""
        first = self.n * (self.item + 1)
        return (self.data.find(b"".join(digests), first, first + 32 * self.n) - first) // 32


def _mapped(table: Table, size: int, form: int) -> tuple[Tensor, np.ndarray, dict[str, str]]:
    digests = [*map(bytes.fromhex, table.digests)]
    known, start, bad = _find(digests, size, form)
    is_good = np.array([digest not in bad for digest in digests])
    end = start + is_good.sum()
    if not known or not known.kinds[start:end].all():
        with _alone(_folder()):  # another process may have made it meanwhile
            _make(table, digests, size, form)
        return _mapped(table, size, form)
    kinds = np.full(len(table), BAD, np.uint8)
    kinds[is_good] = known.kinds[start:end]
    faults = {row["file"]: _named(row, _square(row["file"], size, form)[0])
              for row, good in zip(table.rows, is_good) if not good}
    with warnings.catch_warnings():  # of torch: nobody may write into the map, nor does
        warnings.simplefilter("ignore")
        pixels = torch.from_numpy(np.frombuffer(known.data, np.uint8, len(known.data)))
    channels, dtype = FORMS[form]
    pixels = pixels[start * known.item : end * known.item].view(getattr(torch, dtype))
    return pixels.view(-1, channels, size, size), kinds, faults


def _find(digests: Sequence[bytes], size: int,
          form: int) -> tuple[Map | None, int, set[bytes]]:
    """The map that holds these files one after another, bad ones apart; the place of the first;
    and the bad files that are known."""
    maps = [Map.open(path, form * size**2)
            for path in sorted(_folder().glob(f"{size}px-{form}-v{FORM}-*.pixels"))]
    bad = {digest.tobytes() for one in maps for digest in one.digests[0, one.kinds == BAD]}
    good = [digest for digest in digests if digest not in bad]
    for one in maps:
        if (start := one.find(good)) >= 0:
            return one, start, bad
    return None, 0, bad


def _make(table: Table, digests: Sequence[bytes], size: int, form: int) -> None:
    """Make the map of these files, or go on with it; bad files are brought to its end."""
    known, start, bad = _find(digests, size, form)
    good = [digest for digest in digests if digest not in bad]
    known = known or _begin(good, size, form)
    files = [file for file, digest in zip(table.column("file"), digests) if digest not in bad]
    kinds = known.kinds[start : start + len(files)]
    _fill(known.path, size, form, [(start + i, files[i])
                                       for i in np.flatnonzero(kinds == 0).tolist()])
    if (kinds == BAD).any():
        last = np.argsort(known.kinds == BAD, kind="stable")
        with replacing(known.path) as temporary, open(temporary, "wb") as file:
            for i in last.tolist():
                file.write(known.data[i * known.item : (i + 1) * known.item])
            file.write(known.kinds[last].tobytes() + known.digests[:, last].tobytes())
    there = sum(path.stat().st_size for path in _folder().glob("*.pixels"))
    print(f"pixels: {count(known.n, 'image')} in {known.path}, {len(known.data) / 1e9:.2f} GB; all "
          f"maps there take {there / 1e9:.2f} GB, and may be deleted")


def _begin(digests: Sequence[bytes], size: int, form: int) -> Map:
    """A map in which nothing is read yet."""
    key, item = sha256(b"".join(digests)).hexdigest()[:16], form * size**2
    path = _folder() / f"{size}px-{form}-v{FORM}-{key}.pixels"
    need = len(digests) * (item + MARKS)
    if (free := shutil.disk_usage(path.parent).free) < need:
        raise InputError(f"{path.parent} has {free / 1e9:.1f} GB free, and the pixels of "
                         f"{len(digests)} images take {need / 1e9:.1f}: name another folder by "
                         "--cache, or delete maps there")
    with replacing(path, durable=False) as temporary, open(temporary, "wb") as file:
        file.truncate(need)
        file.seek(len(digests) * (item + 1))
        file.write(b"".join(digests))
    return Map.open(path, item)


def _fill(path: Path, size: int, form: int, todo: Sequence[tuple[int, str]]) -> None:
    """Read the files into their places, shard by shard."""
    shards = [todo[i : i + SHARD] for i in range(0, len(todo), SHARD)]
    share = min(len(shards) - 1, len(cores()))
    if share < 1:
        list(_write_shards(path, size, form, shards))
        return
    read_end, write_end = os.pipe()
    words = [sys.executable, "-m", "minidiff.data.pixel_map"]
    known = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path])}
    workers = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=write_end, env=known,
                                process_group=0) for _ in range(share)]
    os.close(write_end)
    try:
        for k, worker in enumerate(workers):
            worker.stdin.write(json.dumps([str(path), size, form, shards[k::share]]).encode())
            worker.stdin.close()
        with open(read_end) as done, tqdm(desc="reading images", total=len(todo),
                                          unit=" images") as bar:
            for line in done:
                bar.update(int(line))
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.wait()
    if any(worker.returncode for worker in workers):
        raise InputError(f"{path}: a process that reads images into it has ended, for the reason "
                         "above; the same command goes on")


def _write_shards(path: str | Path, size: int, form: int,
                  shards: Sequence[Sequence[tuple[int, str]]]) -> Iterator[int]:
    """Write shards into a map, the kinds of their images last; gives the images of each."""
    item = form * size**2
    with open(path, "r+b") as file:
        n = os.fstat(file.fileno()).st_size // (item + MARKS)
        for shard in shards:
            kinds = []
            for place, name in shard:
                square, kind = _square(name, size, form)
                kinds.append((n * item + place, kind))
                if kind != BAD:
                    whole = np.broadcast_to(square, (FORMS[form][0], size, size))
                    os.pwrite(file.fileno(), whole.tobytes(), place * item)
                    os.pwrite(file.fileno(), content(square) or NONE,
                              n * (item + 33) + 32 * place)
            sync(Path(path))
            for place, kind in kinds:
                os.pwrite(file.fileno(), bytes([kind]), place)
            yield len(shard)


def _folder() -> Path:
    folder = Path(os.environ.get(CACHE) or cache() / "pixels")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes maps in a folder; the others wait. A disk may have no locks."""
    with open(folder / ".lock", "w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # it ends with the command that started it
    for n in _write_shards(*json.load(sys.stdin)):
        os.write(1, b"%d\n" % n)  # at once, for all processes write into one pipe
