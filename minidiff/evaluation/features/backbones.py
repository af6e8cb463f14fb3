"""Frozen public networks as extractors, of torchvision and TorchXRayVision.

A network is written here in the names of the public file, takes its tensors, and returns what its
last layer would read, averaged over the picture. The last layer is checked for its shape and left
out. All runs in float32: bfloat16 rounds by about as much as two images differ.

The whole picture is resized to the side of the input and nothing is cropped: torchvision's own
256 → 224 would cut the lungs.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from minidiff import runs
from minidiff.classification.resnet import Block
from minidiff.convolution import pointwise
from minidiff.errors import InputError, first_few
from minidiff.evaluation.features.extractor import digest, filled

BATCH = 32           # images a network sees at once; a smaller batch is filled up
CONVERT = "python tools/unpickle.py"


def bilinear(x: Tensor, side: int) -> Tensor:
    """PyTorch's resize without antialiasing, as pytorch-fid uses it."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


def bilinear_antialias(x: Tensor, side: int) -> Tensor:
    """A triangle filter that widens as the picture shrinks; no rounding to whole grey values."""
    return F.interpolate(x, (side, side), mode="bilinear", align_corners=False, antialias=True)


@dataclass(frozen=True)
class Input:
    """What a network expects: a square of `side`, resized at 0…255, then (x − mean) / std."""

    side: int
    resize: Callable[[Tensor, int], Tensor]
    mean: tuple[float, ...]  # at 0…255; one number for a network of grey images, else three
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 1 or 3, H, W) → float32 (N, channels, side, side).

        The only place where grey becomes three channels.
        """
        grey = images.shape[1] == 1 or images.stride(1) == 0  # one channel in memory: resized once
        x = (images[:, :1] if grey else images).float()
        if len(self.mean) == 1:
            x = x.mean(1, keepdim=True)
        x = self.resize(x, self.side).expand(-1, len(self.mean), -1, -1)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    @property
    def facts(self) -> dict:
        return {"side": self.side, "resize": self.resize.__name__, "mean": self.mean,
                "std": self.std}


@dataclass(frozen=True)
class Backbone:
    """A network in the table: how to build it, what it is fed, and how its public file is known."""

    make: Callable[[], nn.Module]  # with `.pooled(x) -> (N,d)` and a last layer
    input: Input
    d: int
    head: str                      # name of the last layer, (outputs, d)
    outputs: int | None            # its outputs in the public file; None takes any number
    source: str
    known: tuple[str, ...] = ()    # SHA-256 of the public files, or its first 8 digits
    ignored: tuple[str, ...] = ()  # tensors of the file that are no part of the network


class Network:
    """A frozen network as an extractor, with the weights of a file, .safetensors or PyTorch's own.

    `source` names the file and its SHA-256; `pin`, if given, must be this. A file that is not the
    public one is used, and its hash printed. InputError names the file and what does not fit.
    """

    def __init__(self, name: str, row: Backbone, path: str | Path, *, pin: str = "",
                 device: torch.device | str = "cpu"):
        state, found = read_state(path)
        if pin and found != pin.lower():
            raise InputError(f"{path}: its SHA-256 is {found}, not {pin.lower()} as asked for")
        known = found.startswith(row.known)
        if not (known or pin):
            print(f"{name}: weights of {path}, SHA-256 {found}"
                  + (", not the public file" if row.known else ""))
        with torch.device("meta"):  # shapes without memory, and no draw from the global generator
            net = row.make()
        state = fit(net, state, row, f"{path}: no {name}")
        self.name, self.prepare, self.d, self.device = name, row.input, row.d, device
        self.identity = digest(state, network=type(net).__name__, **row.input.facts)
        self.source = {"file": Path(path).name, "sha256": found, "public": known,
                       **row.input.facts}
        net = net.eval().requires_grad_(False)
        if hasattr(net, "fuse"):
            net.fuse()
        self.net = net.to(device=device, memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = [torch.empty(0, self.d)]
        for part in images.split(BATCH) if len(images) else ():
            x = filled(self.prepare(part), BATCH).to(self.device)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(
                    enabled=True, allow_tf32=False):
                parts.append(self.net.pooled(x)[:len(part)].float().cpu())
        return torch.cat(parts)


def fit(net: nn.Module, state: Mapping[str, Tensor], row: Backbone, what: str) -> dict[str, Tensor]:
    """Put tensors into a network on the meta device, but for its last layer; returns those used.

    Raises InputError, begun with `what`, that names the tensors missing, unexpected, of another
    shape or not finite.
    """
    counts = {k: torch.tensor(0) for k in net.state_dict() if k.endswith("num_batches_tracked")}
    expected = {k: tuple(x.shape) for k, x in net.state_dict().items() if k not in counts}
    # torchvision's densenet file says norm.1 where its code now says norm1
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", k): x
             for k, x in state.items()
             if not k.endswith("num_batches_tracked") and k not in row.ignored}
    last = state.get(f"{row.head}.weight")
    if row.outputs is None and last is not None:
        expected |= {f"{row.head}.weight": (len(last), row.d), f"{row.head}.bias": (len(last),)}
    faults = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "of another shape": [f"{k} {tuple(state[k].shape)}, it has {shape}"
                             for k, shape in expected.items()
                             if k in state and state[k].shape != shape],
        "not float32": [f"{k} ({x.dtype})" for k, x in state.items() if x.dtype != torch.float32],
        "not finite": [k for k, x in state.items() if not x.isfinite().all()],
    }
    if any(faults.values()):
        raise InputError(f"{what}. " + "; ".join(
            f"{fault}: {first_few(names, 4)}" for fault, names in faults.items() if names))
    setattr(net, row.head, None)
    used = {k: x for k, x in state.items() if not k.startswith(f"{row.head}.")}
    net.load_state_dict({**used, **counts}, assign=True)
    return used


def read_state(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by name and the SHA-256 of the bytes they come from; nothing in a file is run."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights")
    data = path.read_bytes()
    try:
        state = (safetensors.torch.load(data) if data[8:9] == b"{" else
                 torch.load(BytesIO(data), map_location="cpu", weights_only=True))
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short: {error}") from None
    except Exception as error:  # the loader of a hostile or broken pickle may raise anything
        if named := re.search(r"GLOBAL ([\w.]+\w)", str(error)):
            raise InputError(f"{path} is a pickled object ({named[1]}), no plain table of tensors, "
                             f"and loading it would run code: `{CONVERT} {path} "
                             f"{path.with_suffix('.safetensors')}` takes its tensors out without "
                             "running anything") from None
        raise InputError(f"{path} is damaged, or neither a .safetensors nor a PyTorch file of "
                         f"weights{runs.in_its_place(path)}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not (isinstance(state, dict) and state
            and all(isinstance(x, Tensor) for x in state.values())):
        raise InputError(f"{path} holds no table of tensors by name")
    return state, hashlib.sha256(data).hexdigest()


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions and a skip; (N, in, H, W) → (N, out, H/stride, W/stride)."""

    def __init__(self, ch_in: int, ch_out: int, stride: int):
        super().__init__()
        mid = ch_out // 4
        self.conv1, self.bn1 = nn.Conv2d(ch_in, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv2, self.bn2 = nn.Conv2d(mid, mid, 3, stride, 1, bias=False), nn.BatchNorm2d(mid)
        self.conv3, self.bn3 = nn.Conv2d(mid, ch_out, 1, bias=False), nn.BatchNorm2d(ch_out)
        self.downsample = nn.Identity()
        if stride > 1 or ch_in != ch_out:
            self.downsample = nn.Sequential(pointwise(ch_in, ch_out, stride),
                                            nn.BatchNorm2d(ch_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.downsample(x))


class ColourResNet(nn.Module):
    """torchvision's ResNet: (N,3,224,224) → (N, 512 or 2048). He et al. 2016, arXiv 1512.03385."""

    def __init__(self, block: type[nn.Module], depths: tuple[int, ...], width: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        ch = 64
        for i, n in enumerate(depths):
            out, stride = width * 2**i, 1 if i == 0 else 2
            rest = [block(out, out, 1) for _ in range(n - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(block(ch, out, stride), *rest))
            ch = out
        self.fc = nn.Linear(ch, 1000)

    def pooled(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(h)))).mean((2, 3))


class DenseLayer(nn.Module):
    """1×1 to 128 and 3×3 to 32 new channels, laid behind those that came in."""

    def __init__(self, ch: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(ch), nn.Conv2d(ch, 128, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(128), nn.Conv2d(128, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(h)))], 1)


class DenseNet121(nn.Module):
    """(N, channels, 224, 224) → pooled (N, 1024). Huang et al. 2017, arXiv 1608.06993.

         conv0 7×7 /2, pool /2     64 at 56 px
         denseblock1   6 layers   256 at 56 px → 128     each followed by a transition:
         denseblock2  12 layers   512 at 28 px → 256     BatchNorm, ReLU, 1×1 to half as
         denseblock3  24 layers  1024 at 14 px → 512     many channels, mean of 2 × 2
         denseblock4  16 layers  1024 at  7 px → norm5
    """

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        parts = OrderedDict(conv0=nn.Conv2d(channels, 64, 7, 2, 3, bias=False),
                            norm0=nn.BatchNorm2d(64), relu0=nn.ReLU(), pool0=nn.MaxPool2d(3, 2, 1))
        ch = 64
        for i, n in enumerate((6, 12, 24, 16), 1):
            parts[f"denseblock{i}"] = nn.Sequential(OrderedDict(
                (f"denselayer{j + 1}", DenseLayer(ch + 32 * j)) for j in range(n)))
            ch += 32 * n
            if i < 4:
                parts[f"transition{i}"] = nn.Sequential(OrderedDict(
                    norm=nn.BatchNorm2d(ch), relu=nn.ReLU(),
                    conv=nn.Conv2d(ch, ch // 2, 1, bias=False), pool=nn.AvgPool2d(2)))
                ch //= 2
        self.features = nn.Sequential(OrderedDict(parts, norm5=nn.BatchNorm2d(ch)))
        self.classifier = nn.Linear(ch, outputs)

    def pooled(self, x: Tensor) -> Tensor:
        return F.relu(self.features(x)).mean((2, 3))


IMAGENET = Input(224, bilinear_antialias, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
XRV = Input(224, bilinear_antialias, (127.5,), (127.5 / 1024,))  # to −1024…1024


def _imagenet(make: Callable[[], nn.Module], d: int, head: str, *known: str) -> Backbone:
    return Backbone(make, IMAGENET, d, head, None, "torchvision, ImageNet", known)


BACKBONES = {
    "resnet18": _imagenet(lambda: ColourResNet(Block, (2, 2, 2, 2), 64), 512, "fc", "f37072fd"),
    "resnet34": _imagenet(lambda: ColourResNet(Block, (3, 4, 6, 3), 64), 512, "fc", "b627a593"),
    "resnet50": _imagenet(lambda: ColourResNet(Bottleneck, (3, 4, 6, 3), 256), 2048, "fc",
                          "0676ba61", "11ad3fa6"),
    "densenet121": _imagenet(lambda: DenseNet121(3, 1000), 1024, "classifier", "a639ec97"),
    "xrv-densenet121": Backbone(
        lambda: DenseNet121(1, 18), XRV, 1024, "classifier", 18,
        "TorchXRayVision, chest X-rays, as .safetensors", ignored=("op_threshs",)),
}
