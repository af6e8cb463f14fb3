"""Take the tensors out of a pickled PyTorch model, without running anything that the file names.

    python tools/unpickle.py densenet121-all.pt xrv.safetensors

A pickle is a small program that calls what it names. Here every name is answered by a class that
does nothing, save the few below, which do not reach outside either: the program runs to its end and
leaves a tree of tables, from which the tensors are picked. This is the way of Python's manual
("Restricting Globals" under pickle). PyTorch's own weights-only loader cannot serve: it refuses
models saved before its version 1.6, as TorchXRayVision's are.
"""

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InputError
from minidiff.runs import save_tensors, sha256

USAGE = "usage: python tools/unpickle.py FILE.pt OUT.safetensors"
MAGIC = 0x1950A86A20F9469CFC6C  # first in a file before version 1.6: PyTorch's serialization.py
MAX_FILE = 2 << 30              # bytes; the largest of the public files has 0.1 GB
DTYPES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16,
          "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
          "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}
STORAGES = {f"{name}Storage": dtype for name, dtype in DTYPES.items()}


class Stub:
    """Stands for whatever a pickle names: takes arguments, state and items, and does nothing."""

    state: Any = None

    def __new__(cls, *_: object, **__: object) -> "Stub":
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def ignore(self, *_: object) -> None:
        pass

    append = extend = add = __setitem__ = ignore


class View(NamedTuple):
    """A tensor whose bytes are read later: which part of which storage."""

    storage: tuple[torch.dtype, str, int]  # type, key and number of elements
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


HARMLESS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,  # as protocol 2, PyTorch's, calls it
    ("torch._utils", "_rebuild_tensor"): View,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *args: View(*args[:4]),
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


class Inert(pickle.Unpickler):
    """Runs a pickle in which every name is a `Stub`, but for HARMLESS and the storage types."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.itemsize: dict[str, int] = {}  # bytes an element of each storage

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        return HARMLESS.get((module, name), Stub)

    def persistent_load(self, pid: tuple) -> Any:
        if pid[0] == "module":  # a class, with its source code, which is left alone
            return pid[1]
        kind, dtype, key, _, n, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or any(view):
            raise pickle.UnpicklingError(f"a storage of an unknown kind, {pid[0]!r}")
        self.itemsize[str(key)] = dtype.itemsize
        return dtype, str(key), n


def convert(file: str | Path, out: str | Path) -> int:
    """Write the tensors of a pickled module or state dict as .safetensors; returns their number."""
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out} has not the ending .safetensors; give another")
    if out.exists():
        raise InputError(f"{out} exists already; give another")
    tensors = read_pickled(file)
    save_tensors(out, {name: x.clone() for name, x in tensors.items()})
    return len(tensors)


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a pickled module or state dict by the names of its state_dict."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights")
    if path.stat().st_size > MAX_FILE:
        raise InputError(f"{path}: {path.stat().st_size >> 20} MB; a file of weights here has at "
                         f"most {MAX_FILE >> 20} MB")
    data = path.read_bytes()
    try:
        content, storages = _zipped(data) if data.startswith(b"PK\x03\x04") else _legacy(data)
        content = content.get("state_dict", content) if isinstance(content, dict) else content
        tensors = {name: _tensor(view, storages) for name, view in _views(content)}
    except Exception as error:  # a hostile or broken pickle may raise anything
        raise InputError(f"{path} is damaged, or no pickled PyTorch model "
                         f"({str(error) or type(error).__name__})") from None
    if not tensors:
        raise InputError(f"{path} holds no tensors by name")
    return tensors


def _zipped(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """Since PyTorch 1.6: <root>/data.pkl and the storages as <root>/data/<key>, uncompressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("a compressed zip file, which PyTorch never writes")
        root = next(name for name in archive.namelist()
                    if name.endswith("/data.pkl")).removesuffix("data.pkl")
        start = f"{root}data/"
        return Inert(io.BytesIO(archive.read(f"{root}data.pkl"))).load(), {
            name.removeprefix(start): archive.read(name) for name in archive.namelist()
            if name.startswith(start)}


def _legacy(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """Before: pickles of magic, version, machine, model and keys, then each storage and its length.
    """
    file = io.BytesIO(data)
    if Inert(file).load() != MAGIC:
        raise ValueError("it does not begin as such a file does")
    Inert(file).load()
    if not Inert(file).load().get("little_endian"):
        raise ValueError("written on a big-endian machine")
    reader = Inert(file)
    content = reader.load()
    storages = {}
    for key in Inert(file).load():
        length = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(length * reader.itemsize[key])
    return content, storages


def _views(module: Any, prefix: str = "") -> Iterator[tuple[str, View]]:
    """The state dict of a module that was unpickled as a Stub, or a state dict as it is."""
    if isinstance(module, dict):
        yield from ((str(name), x) for name, x in module.items() if isinstance(x, View))
    elif isinstance(module, Stub) and isinstance(module.state, dict):
        passing = module.state.get("_non_persistent_buffers_set") or ()
        for name, x in {**module.state.get("_parameters", {}),
                        **module.state.get("_buffers", {})}.items():
            if isinstance(x, View) and name not in passing:
                yield prefix + name, x
        for name, child in module.state.get("_modules", {}).items():
            yield from _views(child, f"{prefix}{name}.")


def _tensor(view: View, storages: dict[str, bytes]) -> Tensor:
    dtype, key, n = view.storage
    if len(storages[key]) != n * dtype.itemsize:
        raise ValueError(f"{len(storages[key])} bytes where {n * dtype.itemsize} should be")
    if math.prod(view.size) == 0:
        return torch.empty(view.size, dtype=dtype)
    whole = torch.frombuffer(bytearray(storages[key]), dtype=dtype)
    return torch.as_strided(whole, view.size, view.stride, view.offset).contiguous()


def main(words: list[str]) -> int:
    if len(words) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    file, out = words
    try:
        n = convert(file, out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{out}: {n} tensors of {file} (SHA-256 {sha256(file)}); its own SHA-256 is "
          f"{sha256(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
