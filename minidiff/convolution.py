"""Detours on a CPU: 3×3 convolutions as one matrix product, and 1×1 ones that are safe."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LEAST = 8  # channels into a 1×1 convolution with a stride: see `pointwise`


class Conv3x3(nn.Conv2d):
    """The UNet's 3×3 convolution, padding 1; on a CPU a product where many channels meet few cells.

    So a guided call of SD 1.5, with 1280 channels at 2² and 4² cells, takes .67 of the time at 64
    px, .84 at 256 px.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or 8 * len(x) * x.shape[2] * x.shape[3] > self.in_channels:
            return super().forward(x)
        return as_product(x, self.weight, self.bias, self.stride[0])


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """conv2d of x (n,c,h,w) with weight (o,c,3,3) and padding 1.

    A CPU's convolution reorders its weights on every call; where many channels meet few cells, this
    takes longer than the products.
    """
    patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)  # (n, c, h, w, 3, 3)
    patches = rearrange(patches, "n c h w i j -> n h w (i j c)")
    weight = rearrange(weight, "o c i j -> o (i j c)")                     # a view of channels_last
    return rearrange(F.linear(patches, weight, bias), "n h w c -> n c h w")


def pointwise(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 1×1 convolution without bias; ValueError with a stride and fewer than 8 channels in.

    With 4 of them in channels_last, torch 2.13 and 2.14 write beyond their memory on the way back
    on a CPU with AVX2 alone ("free(): invalid next size", at times much later). 3, 8, 12, 16 and 20
    channels are sound there; below 8, nothing is worth the risk.
    """
    if stride > 1 and inputs < LEAST:
        raise ValueError(f"a 1×1 convolution of stride {stride} needs {LEAST} channels or more, "
                         f"not {inputs}: with 4, torch corrupts memory on a CPU without AVX-512")
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)
