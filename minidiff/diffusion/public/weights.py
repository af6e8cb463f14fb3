"""Files of tensors, all untrusted: .safetensors and torch's .ckpt. Content decides, not the name.

Nothing in a file is ever run. A .ckpt goes through torch's weights-only loader with inert stubs for
exactly the classes that public files carry; whatever else it names is refused. Tensors stay mapped
to the file (copy on write) where they can.
"""

import json
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidiff import runs
from minidiff.errors import InputError

# bytes of a JSON file or a .ckpt's pickle; those of public files have 0.1 to 0.5 MB
LARGEST = 16 << 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Inert:
    """Stands for a class named in a .ckpt: takes whatever it is given and does nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def empty(*args: object) -> dict:
    """Stands for a function or class that makes a dictionary, which the loader fills."""
    return {}


LIGHTNING = ("pytorch_lightning", "lightning.pytorch")
STUBS = {  # what public files and trainings name beside their weights, and what stands in for it
    # the key of `callbacks` in SD 1.x files, and its best score
    **{f"{where}.callbacks.model_checkpoint.ModelCheckpoint": Inert for where in LIGHTNING},
    **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
                     "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
                     "numpy.ndarray"), Inert),
    # the settings of a training: hyper_parameters, args, config
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace", "typing.Any",
                     "jsonargparse.namespace.Namespace", "jsonargparse._namespace.Namespace"),
                    Inert),
    **{f"omegaconf.{name}": Inert for name in
       ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata",
        *(f"nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "String", "Boolean", "Bytes",
                                           "Path", "Enum")))},
    **{f"{where}.{kind}": Inert for where in ("pathlib", "pathlib._local")
       for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")},
    **{f"datetime.{kind}": Inert for kind in ("datetime", "date", "timedelta")},
    **{f"builtins.{kind}": Inert for kind in  # made, or named as types, by omegaconf
       ("dict", "list", "tuple", "frozenset", "slice", "range", "int", "float", "str", "bool")},
    "torch.torch_version.TorchVersion": Inert,
    # dictionaries under another name, which the loader fills
    **{f"{where}.AttributeDict": dict for where in
       (*(f"{name}.utilities.parsing" for name in LIGHTNING),
        "lightning_fabric.utilities.data", "lightning.fabric.utilities.data")},
    "collections.defaultdict": empty,
}


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and the strings that a safetensors header carries."""

    path: Path                       # for messages: the file, or the index of several
    tensors: dict[str, Tensor]
    files: list[Path]
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(path: str | Path) -> Weights:
    """The tensors of a .safetensors or .ckpt file, unwrapped. Raises InputError, which names the
    file."""
    return unwrapped(read_file(Path(path)))


def unwrapped(weights: Weights) -> Weights:
    """Without what torch.compile and parallel trainings put before the names of a network."""
    tensors = {name.replace("_orig_mod.", ""): t for name, t in weights.tensors.items()}
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return replace(weights, tensors=tensors)


def read_file(path: Path) -> Weights:
    """As `read_weights`, with all names as they stand."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return _read_ckpt(path, zipped=start.startswith(b"PK"))
    if start[8:9] == b"{":
        return _read_safetensors(path)
    raise InputError(f"{path} ({path.stat().st_size} bytes) is neither a safetensors file nor a "
                     f"torch checkpoint{runs.in_its_place(path)}")


def read_json(path: Path) -> dict:
    """A small JSON object. Raises InputError."""
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise InputError(f"{path} is missing, or larger than {LARGEST >> 20} MB")
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, path: Path) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {str(error) or 'JSON nested too deeply'}"
                         + runs.in_its_place(path)) from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object")
    return value


def to_float32(tensor: Tensor, name: str, path: Path) -> Tensor:
    """float32 as it is (mapped to the file), 16-bit widened; anything else is refused by name."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    if tensor.dtype not in DTYPES or not plain:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise InputError(f"{path}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}; "
                         f"allowed are {allowed}")
    return tensor.detach().float().contiguous()


def _read_safetensors(path: Path) -> Weights:
    try:  # safetensors itself refuses a header above 100 MB, and one longer than the file
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Weights(path, tensors, [path], file.metadata() or {})
    except (SafetensorError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged or cut short: {str(error).splitlines()[0]}") from None


def _read_ckpt(path: Path, *, zipped: bool) -> Weights:
    try:
        if zipped:
            _check_zip(path)
        stubs = torch.serialization.safe_globals([(stub, name) for name, stub in STUBS.items()])
        with stubs, open(path, "rb") as file:
            mapped = zipped and path.suffix != ".safetensors"  # torch.load goes by that name
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True,
                                 mmap=mapped)
    except InputError:
        raise
    except Exception as error:  # the loader of a hostile or broken pickle may raise anything
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        if named := re.search(r"GLOBAL ([\w.]+\w)", text):
            raise InputError(f"{path} wants to run {named[1]}; nothing in a checkpoint is run, so "
                             "it is refused: take a .safetensors file of the same model, or save "
                             "its state_dict alone where it was made") from None
        says = text and "weights_only" not in text
        reason = text.splitlines()[0][:200] if says else type(error).__name__
        raise InputError(f"{path} is damaged or not a checkpoint: {reason}") from None
    content = content if isinstance(content, dict) else {}
    found = {name: tensors for name, state in {"": content, **content}.items()
             if isinstance(state, dict) and (tensors := {
                 str(key): t for key, t in state.items() if isinstance(t, Tensor)})}
    state = found.get("state_dict") or found.get("") or (
        next(iter(found.values())) if len(found) == 1 else {})
    if not state:
        several = f"; it has them in {', '.join(map(str, found))}: save one alone" if found else ""
        raise InputError(f"{path} holds no tensors by name{several}")
    return Weights(path, state, [path])


def _check_zip(path: Path) -> None:
    """Refuse what unpacks to more than the file has, before torch unpacks it."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path} is a compressed zip file, which torch never writes")
    largest = max((e.file_size for e in entries if e.filename.endswith("/data.pkl")),
                  default=0)
    if largest > LARGEST:
        raise InputError(f"{path}: a pickle of {largest >> 20} MB is no table of tensors")
