"""A 3×3 convolution as one matrix product, for both networks on a CPU."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def as_product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """conv2d of x (n,c,h,w) with weight (o,c,3,3) and padding 1.

    A CPU's convolution brings its weights into another order on every call; of many channels that meet few cells, this
    takes longer than the products.
    """
    patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)                  # (n, c, h, w, 3, 3)
    weight = rearrange(weight, "o c i j -> o (i j c)")                                          # a view of channels_last
    return rearrange(F.linear(rearrange(patches, "n c h w i j -> n h w (i j c)"), weight, bias), "n h w c -> n c h w")
