"""ResNet for grey images: torchvision's resnet18 in names and arithmetic, so that its weights load.

     layer     width 64    at 64 px   at 224 px
     conv1     7×7, /2        32         112        one input channel instead of three
     maxpool   3×3, /2        16          56
     layer1    2 × 64         16          56
     layer2    2 × 128         8          28
     layer3    2 × 256         4          14
     layer4    2 × 512         2           7
     avgpool   512             1           1        → features
     fc        outputs

He et al. 2016, arXiv 1512.03385; `width` (8 or more) scales every layer alike.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.convolution import LEAST, as_product, pointwise
from minidiff.errors import InputError, first_few


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution; on a CPU a matrix product where many channels meet few cells.

    So a training step of resnet18 at 64 px, with 512 channels at 2² cells, takes .7 of the time.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cells = len(x) * x.shape[2] * x.shape[3] // self.stride[0] ** 2
        if x.device.type != "cpu" or self.out_channels < 256 or cells > 2 * self.out_channels:
            return super().forward(x)
        return as_product(x, self.weight, None, self.stride[0])


class Block(nn.Module):
    """Two 3×3 convolutions and a skip; (N, in, H, W) → (N, out, H/stride, W/stride)."""

    def __init__(self, ch_in: int, ch_out: int, stride: int):
        super().__init__()
        self.conv1 = Conv3x3(ch_in, ch_out, stride)
        self.bn1 = nn.BatchNorm2d(ch_out)
        self.conv2 = Conv3x3(ch_out, ch_out)
        self.bn2 = nn.BatchNorm2d(ch_out)
        self.downsample = None
        if stride > 1 or ch_in != ch_out:
            self.downsample = nn.Sequential(pointwise(ch_in, ch_out, stride),
                                            nn.BatchNorm2d(ch_out))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)).add_(skip), inplace=True)


class ResNet(nn.Module):
    """Grey images (N,1,H,W) → (N, outputs); `features` stops before the last layer.

    The features are (N, 8·width).
    """

    def __init__(self, outputs: int, *, width: int = 64, blocks: tuple[int, ...] = (2, 2, 2, 2),
                 seed: int = 0):
        super().__init__()
        if width < LEAST:
            raise InputError(f"width {width} is not allowed: {LEAST} and more, for torch corrupts "
                             "memory with 4 channels in a 1×1 convolution of stride 2")
        # The constructors of torch draw weights from the global generator. Forking it leaves the
        # caller's stream alone, and `_initialise` then draws every one of those weights again from
        # the seed.
        with torch.random.fork_rng(devices=[]):
            self.conv1 = nn.Conv2d(1, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            widths = [width * 2**i for i in range(len(blocks))]
            for i, (n, ch_in, ch) in enumerate(zip(blocks, [width, *widths], widths)):
                layer = [Block(ch_in, ch, 1 if i == 0 else 2),
                         *(Block(ch, ch, 1) for _ in range(1, n))]
                self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
            self.fc = nn.Linear(widths[-1], outputs)
        self.layers = [f"layer{i + 1}" for i in range(len(blocks))]
        _initialise(self, torch.Generator().manual_seed(seed))

    def features(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N,   width, H/2,  W/2)
        h = F.max_pool2d(h, 3, 2, 1)             # (N,   width, H/4,  W/4)
        for layer in self.layers:
            h = getattr(self, layer)(h)          # (N, 8·width, H/32, W/32) after the last
        return h.mean((2, 3))                    # (N, 8·width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def load_torchvision(net: ResNet, state: Mapping[str, Tensor]) -> list[str]:
    """Copies a torchvision resnet18 state dict into `net`; returns the names left as they were.

    conv1 is summed over its three input channels: a grey image is three equal ones, so the answer
    is the same. fc is copied when its shape agrees (1000 classes seldom do). Anything else missing,
    unexpected or of another shape is an InputError that names it, and then `net` is untouched.
    """
    own, state = net.state_dict(), dict(state)
    if "conv1.weight" in state and state["conv1.weight"].shape[1:2] == (3,):
        state["conv1.weight"] = state["conv1.weight"].sum(1, keepdim=True)
    fc = ("fc.weight", "fc.bias")
    kept = [k for k in fc if any(k not in state or state[k].shape != own[k].shape for k in fc)]
    state = {k: x for k, x in state.items() if k not in kept}
    theirs, ours = ({k: str(tuple(x.shape)) for k, x in each.items() if k not in kept}
                    for each in (state, own))
    wrong = [f"{k} {theirs.get(k, 'missing')} for {ours.get(k, 'nothing')}"
             for k in {**ours, **theirs} if theirs.get(k) != ours.get(k)]
    if wrong:
        raise InputError("these weights are not a resnet18 of this size: " + first_few(wrong, 8))
    net.load_state_dict({**own, **state})
    return kept


def _initialise(net: nn.Module, generator: torch.Generator) -> None:
    """torchvision's start: He-normal by fan-out, fc uniform; BatchNorm is made with 1 and 0."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            nn.init.normal_(m.weight, 0.0, math.sqrt(2 / fan_out), generator=generator)
        elif isinstance(m, nn.Linear):
            bound = 1 / math.sqrt(m.in_features)
            nn.init.uniform_(m.weight, -bound, bound, generator=generator)
            nn.init.uniform_(m.bias, -bound, bound, generator=generator)
