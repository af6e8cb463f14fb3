"""Tensors of a file → our networks, each taken once; whatever does not fit is refused by name."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.diffusion.clip import CLIP
from minidiff.diffusion.public.weights import Weights, to_float32
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError, first_few

# what rounding may change in a table of ᾱ; any other type is refused
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FOREIGN = {  # part of a tensor's name: what such a file is
    "conditioner.embedders.": "SDXL", "model.diffusion_model.label_emb.": "SDXL",
    "add_embedding.": "SDXL", "joint_blocks.": "SD3", "double_blocks.": "Flux",
    "double_stream_modulation": "Flux", "lora": "a LoRA file", "hada_w1": "a LoRA file",
    "lokr_w1": "a LoRA file",
    "control_model.": "ControlNet", "controlnet_cond_embedding.": "ControlNet",
    "emb_params": "a textual inversion", "string_to_param": "a textual inversion",
}


@dataclass(frozen=True)
class Part:
    """One network: where it was read, how many tensors and numbers, in which types."""

    source: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass
class Contents:
    """What a public file or folder holds, before the choices of the user."""

    path: Path
    dialect: str
    readers: list["Reader"]
    version: str = "VAE"
    ema: str = "none in the file"
    unet: UNet | None = None
    vae: VAE | None = None
    clip: CLIP | None = None
    schedule: Schedule = field(default_factory=Schedule.scaled_linear)
    schedule_from: str = "Stable Diffusion's own, as the file has no table"
    prediction: str | None = None
    prediction_from: str = ""

OTHER_TASKS = {  # input channels of a UNet: what it is for, and what does that here
    5: ("depth", ""), 7: ("enlarging", ""),
    8: ("editing by instructions", ", and edit by `sample.py --origin DATA --change`"),
    9: ("inpainting", ", and inpaint by `sample.py --origin DATA --mask DIR`"),
}


class Reader:
    """The ledger of one file: `take` and `ignore` account for tensors, `finish` for the rest."""

    def __init__(self, weights: Weights):
        if not weights.tensors:
            raise InputError(f"{weights.path} holds no tensors")
        for part, what in FOREIGN.items():
            if name := next((name for name in weights.tensors if part in name), None):
                more = ("; a model is needed here, and --lora puts this file on it"
                        if "LoRA" in what else "; SD 1.x and 2.x are")
                raise InputError(f"{weights.path}: {what} is not supported (it holds {name}){more}")
        self.weights = weights
        self.left = dict(weights.tensors)
        self.parts: dict[str, Part] = {}
        self.not_used: Counter = Counter()
        self.missing: set[str] = set()
        self.shapes: set[str] = set()

    def take(self, part: str, net: nn.Module, names: Mapping[str, str | tuple[str, int]], *,
             matrices: bool = False) -> nn.Module:
        """Fill a network built on the meta device with the tensors {our name: name there}, as
        float32.

        A name (n, i) stands for the i-th third of tensor n. With `matrices`, a weight (a, b) may
        lie there as (a, b, 1, 1).
        """
        first = self.weights.tensors.get(names.get("conv_in.weight"))  # of a UNet
        if first is not None and first.ndim == 4:
            require_plain(first.shape[1], self.weights.path)
        filled, used = {}, {}
        for ours, expected in net.state_dict().items():
            name, third = names[ours] if isinstance(names[ours], tuple) else (names[ours], None)
            tensor, whole = self.weights.tensors.get(name), tuple(expected.shape)
            if tensor is None:
                self.missing.add(name)
                continue
            used[name] = str(tensor.dtype).removeprefix("torch.")
            if third is not None:
                whole = (3 * whole[0], *whole[1:])
            if tensor.shape == whole or (matrices and len(whole) == 2
                                         and tensor.shape == (*whole, 1, 1)):
                value = to_float32(tensor, name, self.weights.path).reshape(whole)
                if not value.isfinite().all():
                    raise InputError(f"{self.weights.path}: {name} holds other than finite "
                                     "numbers: its training failed, or it is too large for 16 bits")
                filled[ours] = value if third is None else value.chunk(3)[third].clone()
            else:
                self.shapes.add(f"{name} {tuple(tensor.shape)} for {whole}")
        for name in used:
            self.left.pop(name, None)
        if not self.missing and not self.shapes:
            net.load_state_dict(filled, assign=True)
        self.parts[part] = Part(self.weights.path.name, len(used),
                                sum(p.numel() for p in net.parameters()),
                                dict(Counter(used.values())))
        return net.eval()

    def ignore(self, why: str, *names: str, starts: tuple[str, ...] = (),
               ends: tuple[str, ...] = ()) -> None:
        """Account for these names, and all that start or end so, as not used; those there are."""
        unused = [n for n in self.left
                  if n in names or n.startswith(starts) or n.endswith(ends)]
        self.not_used += Counter({why: len(unused)})
        for name in unused:
            del self.left[name]

    def finish(self) -> None:
        """Raise one InputError that counts each kind of fault and names its first ten."""
        kinds = {"missing": self.missing, "unexpected": self.left, "of another shape": self.shapes}
        faults = [f"{len(names)} {what}: {first_few(sorted(names), 10)}"
                  for what, names in kinds.items() if names]
        if faults:
            raise InputError(f"{self.weights.path}: the tensors are not those of this model; "
                             f"{'; '.join(faults)}")


def require_plain(channels: object, path: Path) -> None:
    """Refuse a UNet that is given more than the noisy latents: that of another task."""
    for known, (task, instead) in OTHER_TASKS.items():
        if channels == known:
            raise InputError(f"{path}: {known} input channels, a UNet for {task}, are not "
                             f"supported; name the model of 4 that it was made from{instead}")


class Uninitialised(TorchFunctionMode):
    """Inside, layers do not draw initial weights, which took half the time: the file's follow."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return None if getattr(func, "__module__",
                               "") == "torch.nn.init" else func(*args, **(kwargs or {}))


@contextmanager
def possible(path: Path) -> Iterator[None]:
    """Turn what a hostile configuration raises inside into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:
        raise InputError(f"{path}: its configuration is not possible: {error}") from None


def on_meta(network: Callable, config: object, path: Path) -> nn.Module:
    """A network without memory: a hostile config allocates nothing, the file's shapes judge it."""
    for name, value in vars(config).items():
        values = value if isinstance(value, tuple) else (value,)
        whole = all(v is None or (isinstance(v, int) and 0 <= v <= 1 << 17) for v in values)
        if not whole or len(values) > 8 or (name in ("blocks", "layers") and values[0] > 64):
            raise InputError(f"{path}: {name} {value!r} is not possible")
    with possible(path), torch.device("meta"), Uninitialised():
        net = network(config)
        for module in net.modules():
            channels = next(module.parameters()).shape[0] if hasattr(module, "heads") else 0
            if channels and channels % module.heads:
                raise ValueError(f"{module.heads} heads do not divide {channels} channels")
    return net


def schedule_from(table: Tensor | None, path: Path) -> tuple[Schedule, str]:
    """The schedule of a table of ᾱ; close to Stable Diffusion's within rounding, the exact one."""
    standard = Schedule.scaled_linear()
    if table is None:
        return standard, "Stable Diffusion's own, as the file has no table"
    plain = table.layout is torch.strided and table.device.type == "cpu"
    tolerance, ac = TOLERANCE.get(table.dtype, 0) if plain else 0, table.double()
    if tolerance and ac.shape == standard.alphas_cumprod.shape:
        difference = (ac / standard.alphas_cumprod - 1).abs().max().item()
        if difference <= tolerance:
            return standard, f"alphas_cumprod, which is Stable Diffusion's own to {difference:.0e}"
    if not 0 < tolerance <= TOLERANCE[torch.float32]:
        raise InputError(f"{path}: alphas_cumprod is {table.dtype}, too coarse for a schedule that "
                         "is not the usual one")
    try:
        return Schedule(ac), "alphas_cumprod in the file, not the usual one"
    except (ValueError, IndexError) as error:
        raise InputError(f"{path}: alphas_cumprod does not fall as it has to: {error}") from None
