"""Tensors of a file → our networks, each taken once; whatever does not fit is refused by name."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.diffusion.clip import CLIP
from minidiff.diffusion.public.certificate import Part, refuse
from minidiff.diffusion.public.weights import Weights, to_float32
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass
class Contents:
    """What a public file or folder holds, before the choices of the user."""

    path: Path
    dialect: str
    version: str = "VAE"
    ema: str = "none in the file"
    unet: UNet | None = None
    vae: VAE | None = None
    clip: CLIP | None = None
    schedule: Schedule = field(default_factory=Schedule.scaled_linear)
    schedule_from: str = "Stable Diffusion's own, as the file has no table"
    prediction: str | None = None
    prediction_from: str = ""
    files: list[Path] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    not_used: Counter = field(default_factory=Counter)
    source_tensors: int = 0

    def add(self, reader: "Reader") -> None:
        reader.finish()
        self.parts |= reader.parts
        self.not_used += reader.not_used
        self.source_tensors += len(reader.weights.tensors)


class Reader:
    """The ledger of one file: `take` and `ignore` account for tensors, `finish` for the rest."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.left = dict(weights.tensors)
        self.parts: dict[str, Part] = {}
        self.not_used: Counter = Counter()
        self.missing: list[str] = []
        self.shapes: list[str] = []

    def take(self, part: str, net: nn.Module, names: Mapping[str, str | tuple[str, int]], *,
             matrices: bool = False) -> nn.Module:
        """Fill a network built on the meta device with the tensors {our name: name there}, as
        float32.

        A name (n, i) stands for the i-th third of tensor n. With `matrices`, a weight (a, b) may
        lie there as (a, b, 1, 1).
        """
        filled, sources, dtypes = {}, set(), Counter()
        for ours, expected in net.state_dict().items():
            name, third = names[ours] if isinstance(names[ours], tuple) else (names[ours], None)
            tensor = self.weights.tensors.get(name)
            if tensor is None:
                self.missing.append(name)
                continue
            whole = tuple(expected.shape) if third is None else (3 * expected.shape[0],
                                                                 *expected.shape[1:])
            if tuple(tensor.shape) not in (whole, (*whole, 1, 1) if matrices and len(whole) == 2
                                           else whole):
                self.shapes.append(f"{name} {tuple(tensor.shape)} for {whole}")
            else:
                value = to_float32(tensor, name, self.weights.path).reshape(whole)
                filled[ours] = value if third is None else value.chunk(3)[third].clone()
            if name not in sources:
                dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
            sources.add(name)
            self.left.pop(name, None)
        if not self.missing and not self.shapes:
            net.load_state_dict(filled, assign=True)
        self.parts[part] = Part(self.weights.path.name, len(sources),
                                sum(p.numel() for p in net.parameters()), dict(dtypes))
        return net.eval()

    def ignore(self, why: str, names: Iterable[str]) -> None:
        for name in list(names):
            if self.left.pop(name, None) is not None:
                self.not_used[why] += 1

    def finish(self) -> None:
        refuse(self.weights.path, set(self.missing), self.left, set(self.shapes))


class Uninitialised(TorchFunctionMode):
    """Inside, layers do not draw initial weights, which took half the time: the file's follow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__",
                               "") == "torch.nn.init" else func(*args, **(kwargs or {}))


def on_meta(network: Callable, config: object, path: Path) -> nn.Module:
    """A network without memory: a hostile config allocates nothing, the file's shapes judge it."""
    for f in fields(config):
        values = getattr(config, f.name)
        values = values if isinstance(values, tuple) else (values,)
        whole = all(v is None or (isinstance(v, int) and 0 <= v <= 1 << 17) for v in values)
        if not whole or len(values) > 8 or (f.name in ("blocks", "layers") and values[0] > 64):
            raise InputError(f"{path}: {f.name} {getattr(config, f.name)!r} is not possible")
    try:
        with torch.device("meta"), Uninitialised():
            net = network(config)
        for module in net.modules():
            if hasattr(module, "heads") and next(module.parameters()).shape[0] % module.heads:
                raise ValueError(f"{module.heads} heads do not divide "
                                 f"{next(module.parameters()).shape[0]} channels")
    except (ValueError, RuntimeError, ZeroDivisionError, TypeError, IndexError) as error:
        raise InputError(f"{path}: its configuration is not possible: {error}") from None
    return net


def finish_vae(vae: VAE, scale: float) -> VAE:
    """Give a VAE that was built on the meta device its latent scale, which no tensor carries."""
    vae.scale = torch.tensor(scale)
    return vae


def schedule_from(table: Tensor | None, path: Path) -> tuple[Schedule, str]:
    """The schedule of a table of ᾱ; close to Stable Diffusion's within rounding, the exact one."""
    if table is None:
        return Schedule.scaled_linear(), "Stable Diffusion's own, as the file has no table"
    standard = Schedule.scaled_linear()
    tolerance = TOLERANCE.get(
        table.dtype) if table.layout is torch.strided and table.device.type == "cpu" else None
    if tolerance and table.shape == standard.alphas_cumprod.shape:
        difference = (table.double() / standard.alphas_cumprod - 1).abs().max().item()
        if difference <= tolerance:
            return standard, f"alphas_cumprod, which is Stable Diffusion's own to {difference:.0e}"
    if not tolerance or table.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{path}: alphas_cumprod is {table.dtype}, too coarse for a schedule that "
                         "is not the usual one")
    table = table.double()
    if table.ndim != 1 or len(table) < 2 or not ((table.diff() < 0).all() and table[-1] > 0
                                                 and table[0] < 1):
        raise InputError(f"{path}: alphas_cumprod does not fall from below 1 to above 0, as it has "
                         "to")
    return Schedule(table), "alphas_cumprod in the file, not the usual one"
