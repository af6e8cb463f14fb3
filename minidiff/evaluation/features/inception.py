"""The Inception-v3 of FID, with the three resizers in use, and the download of its weights.

It is TensorFlow's network of 2015-12-05 in the names of pytorch-fid's file. It differs from the
published one, and from torchvision's: averages leave the padding out, and the last block takes a
maximum where it should average. That is kept: an FID is a number of this network, faults and all.
Szegedy et al. 2015, arXiv 1512.00567; Heusel et al. 2017, arXiv 1706.08500, appendix.

The resizers give features that differ by more than generators do (Parmar et al. 2022, arXiv
2104.11222), so that each is an extractor of its own name, and no FID goes without it.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from minidiff.download import INCEPTION, cache, retrieve
from minidiff.evaluation.features.backbones import Backbone, Input, bilinear
from minidiff.runs import sha256

URL, SHA256, SIZE = INCEPTION

# A layer is "HxW:channels": a convolution that keeps the size, BatchNorm and ReLU. /2 halves the
# size and v keeps to whole windows, both without padding; avg and max are 3×3 pools; | lays two
# layers side by side.
STEM = {"Conv2d_1a_3x3": "3x3/2:32", "Conv2d_2a_3x3": "3x3v:32", "Conv2d_2b_3x3": "3x3:64",
        "pool1": "max/2", "Conv2d_3b_1x1": "1x1:80", "Conv2d_4a_3x3": "3x3v:192", "pool2": "max/2"}


def _a(pool: int) -> dict[str, str]:
    return {"branch1x1": "1x1:64", "branch5x5": "1x1:48 5x5:64",
            "branch3x3dbl": "1x1:64 3x3:96 3x3:96", "branch_pool": f"avg 1x1:{pool}"}


def _c(ch: int) -> dict[str, str]:
    return {"branch1x1": "1x1:192", "branch7x7": f"1x1:{ch} 1x7:{ch} 7x1:192",
            "branch7x7dbl": f"1x1:{ch} 7x1:{ch} 1x7:{ch} 7x1:{ch} 1x7:192",
            "branch_pool": "avg 1x1:192"}


def _e(pool: str) -> dict[str, str]:
    return {"branch1x1": "1x1:320", "branch3x3": "1x1:384 1x3:384|3x1:384",
            "branch3x3dbl": "1x1:448 3x3:384 1x3:384|3x1:384", "branch_pool": f"{pool} 1x1:192"}


MIXED = {  # block: branch: layers; the branches are laid side by side                # channels, px
    "Mixed_5b": _a(32),                                                               # 256, 35
    "Mixed_5c": _a(64), "Mixed_5d": _a(64),                                           # 288
    "Mixed_6a": {"branch3x3": "3x3/2:384", "branch3x3dbl": "1x1:64 3x3:96 3x3/2:96",
                 "branch_pool": "max/2"},                                             # 768, 17
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": {"branch3x3": "1x1:192 3x3/2:320",
                 "branch7x7x3": "1x1:192 1x7:192 7x1:192 3x3/2:192",
                 "branch_pool": "max/2"},                                             # 1280, 8
    "Mixed_7b": _e("avg"), "Mixed_7c": _e("max"),                                     # 2048
}


class Conv(nn.Module):
    """Convolution, BatchNorm with ε = .001, ReLU: (N, in, H, W) → (N, out, H', W')."""

    def __init__(self, ch_in: int, layer: str):
        super().__init__()
        height, width, kind, out = re.fullmatch(r"(\d)x(\d)(v|/2|):(\d+)", layer).groups()
        kernel, self.out = (int(height), int(width)), int(out)
        padding = 0 if kind else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(ch_in, self.out, kernel, 2 if kind == "/2" else 1, padding,
                              bias=False)
        self.bn = nn.BatchNorm2d(self.out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fuse(self) -> None:
        """Put BatchNorm, of a trained network a factor and an offset, into the convolution."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval()), nn.Identity()


POOLS = {
    "avg": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "max/2": lambda x: F.max_pool2d(x, 3, 2),
}


def through(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    return functools.reduce(lambda h, step: step(h), steps, x)


def beside(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    return torch.cat([step(x) for step in steps], 1)


class Mixed(nn.Module):
    """Branches side by side: (N, in, H, W) → (N, out, H', W')."""

    def __init__(self, ch_in: int, branches: dict[str, str]):
        super().__init__()
        self.branches, self.out = [], 0
        for branch, row in branches.items():
            steps, ch, n = [], ch_in, 0
            for word in row.split():
                if word in POOLS:
                    steps.append(POOLS[word])
                    continue
                n += 1
                convs = [Conv(ch, layer) for layer in word.split("|")]
                for letter, conv in zip("ab" if "|" in word else [""], convs):
                    number = f"_{n}" if row.count(":") > 1 else ""
                    self.add_module(f"{branch}{number}{letter}", conv)
                steps += convs if len(convs) == 1 else [functools.partial(beside, convs)]
                ch = sum(conv.out for conv in convs)
            self.branches.append(functools.partial(through, steps))
            self.out += ch

    def forward(self, x: Tensor) -> Tensor:
        return beside(self.branches, x)


class Inception(nn.Module):
    """(N,3,299,299) in -1…1 → `pooled` (N,2048), FID's pool3; the last layer is not used."""

    def __init__(self):
        super().__init__()
        self.steps, ch = [], 3
        for name, row in (STEM | MIXED).items():
            if isinstance(row, str) and row in POOLS:
                self.steps.append(POOLS[row])
                continue
            self.add_module(name, part := (Conv if name in STEM else Mixed)(ch, row))
            self.steps.append(part)
            ch = part.out
        self.fc = nn.Linear(ch, 1008)

    def pooled(self, x: Tensor) -> Tensor:
        return through(self.steps, x).mean((2, 3))

    def fuse(self) -> None:
        for part in self.modules():
            if isinstance(part, Conv):
                part.fuse()


def tensorflow_bilinear(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's resize, without antialiasing; it shifts the picture by up to half a pixel.

    Pixel i of the result lies at i · in / out of the input: others add half pixels. First along x.
    """
    for dim in (3, 2):
        n = x.shape[dim]
        at = torch.arange(side, dtype=torch.float32) * torch.tensor(n / side, dtype=torch.float32)
        low = at.long().clamp(max=n - 1)
        part = (at - low).view(-1, *[1] * (3 - dim))
        a, b = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = a + (b - a) * part
    return x


def pillow_bicubic(x: Tensor, side: int) -> Tensor:
    """Pillow's antialiased bicubic on float channels, cut to 0…255, not rounded, as clean-fid's."""
    out = np.empty((len(x), x.shape[1], side, side), np.float32)
    for image, place in zip(x.numpy(), out):
        for channel, result in zip(image, place):
            result[:] = Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(out.clip(0, 255))


INCEPTIONS = {
    name: Backbone(Inception, Input(299, resize, (half,) * 3, (half,) * 3), 2048, "fc", 1008,
                   Path(URL).name, (SHA256,))
    for name, resize, half in (
        ("inception-pytorch-fid", bilinear, 127.5),               # 2 · x/255 − 1
        ("inception-torch-fidelity", tensorflow_bilinear, 128.0),
        ("inception-clean-fid", pillow_bicubic, 128.0))
}


def weights() -> Path:
    """Where the public file lies once it was fetched."""
    return cache() / Path(URL).name


def download(url: str = URL, *, digest: str = SHA256, size: int = SIZE) -> Path:
    """The public file of weights, fetched unless it is there already, whole and right."""
    path = weights()
    if path.is_file():
        if sha256(path) == digest:
            return path
        print(f"{path} is damaged: it is fetched anew")
    return retrieve(url, path, digest, size, "where there is no network, copy the file here by "
                    f"hand and give its path instead of auto; it is {URL}")
