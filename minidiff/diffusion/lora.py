"""Low-rank adapters on the UNet's transformers, and which part of a model is trained (Hu et al.
2021, "LoRA", eq. 3).

    y = W·x + b + (α/r)·U·D·x         D = lora_down (r, in), U = lora_up (out, r); W, b are frozen

U starts at zero, so that step 0 equals the base; D starts as in the authors' loralib and in peft,
uniform in ±1/√in. With α = r the scale is 1; a fixed α keeps the learning rate of one rank good for
another. On SD 1.5, rank 8 trains 3.0 M parameters in place of 860 M, and gradients and AdamW's
moments shrink likewise. The feed-forward layers are adapted as well as attention: attention alone
taught a small model its labels less well (52 % against 74 % recognised). `merge` gives plain
weights again, for saving, sampling and export.
"""

import copy
import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InputError

# the Linears that get an adapter, by diffusers' names
ADAPTED = re.compile(r"\b(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))$")
Part = Literal["all", "attention", "cross-attention", "lora"]
PARTS = {  # names of a part's parameters; attn1 is self-attention, attn2 cross-attention
    "all": r"",
    "attention": r"\battn[12]\.",
    "cross-attention": r"\battn2\.",
    "lora": r"\.lora_(down|up)$",
}


class Adapter(NamedTuple):
    """What is added to one weight: (α/r)·U·D."""

    down: Tensor     # D: (r, in), of a convolution (r, in, k, k)
    up: Tensor       # U: (out, r)
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)

    def onto(self, weight: Tensor) -> nn.Parameter:
        """weight + (α/r)·U·D, computed in float64 and rounded once; frozen."""
        added = self.scale * self.up.double() @ self.down.double().flatten(1)
        whole = weight.double() + added.view(weight.shape)
        return nn.Parameter(whole.to(weight.dtype), requires_grad=False)


class LoRALinear(nn.Linear):
    """A Linear with an adapter beside it, (…, in) → (…, out); its own weights are frozen."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.requires_grad_(False)
        self.alpha, self.scale = alpha, alpha / rank
        down = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5),
                                        generator=generator)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_down = nn.Parameter(down.to(base.weight.device, wide))
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device,
                                                dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(self.scale * F.linear(x, self.lora_down), self.lora_up)

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.lora_down.detach(), self.lora_up.detach(), self.alpha)

    def merged(self) -> nn.Linear:
        """A plain Linear with the adapter added to its weight; the bias is shared."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight, plain.bias = self.adapter.onto(self.weight), self.bias
        return plain.train(self.training)


def add(net: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> None:
    """Put an adapter beside the Linears of every transformer block of a UNet, and freeze them."""
    linears = {name: module for name, module in net.named_modules() if ADAPTED.search(name)}
    assert linears and not any(isinstance(x, LoRALinear)
                               for x in linears.values()), "no attention, or adapters already"
    largest = min(min(x.in_features, x.out_features) for x in linears.values())
    if not 1 <= rank <= largest:
        raise InputError(f"LoRA rank {rank} is not allowed: 1 to {largest}, the smallest side of "
                         "the adapted matrices")
    if not 0 < alpha < math.inf:
        raise InputError(f"LoRA alpha {alpha:g} is not allowed: a number above 0, mostly the rank "
                         "or twice as much")
    for name, linear in linears.items():
        _replace(net, name, LoRALinear(linear, rank, alpha, generator))


@torch.no_grad()
def merge(net: nn.Module) -> nn.Module:
    """The same network of plain Linears, the adapters added to them; names as before `add`.

    Only the adapted weights are new: all other tensors are shared with `net`, for two of SD's UNets
    may not fit.
    """
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    plain = copy.deepcopy(net, shared)  # what the memo holds counts as copied
    for name, module in [*net.named_modules()]:
        if isinstance(module, LoRALinear):
            _replace(plain, name, module.merged())
    return plain


@torch.no_grad()
def put_on(net: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Add adapters, by the name of their layer, to the weights of a network of plain layers."""
    for name, adapter in adapters.items():
        layer = net.get_submodule(name)
        layer.weight = adapter.onto(layer.weight).requires_grad_(layer.weight.requires_grad)


def adapters(net: nn.Module) -> dict[str, Adapter]:
    """The adapters of a network by the name of their layer; they need the same base."""
    return {name: layer.adapter for name, layer in net.named_modules()
            if isinstance(layer, LoRALinear)}


def set_trainable(model: nn.Module, part: Part, rank: int, alpha: float,
                  generator: torch.Generator) -> list[nn.Parameter]:
    """Freeze a Model but for one part of its UNet and the conditioner, which is always new.

    Returns the parameters to train. rank, alpha and generator serve "lora" alone, which adds the
    adapters first.
    """
    if part == "lora":
        add(model.unet, rank, alpha, generator)
    for name, parameter in model.unet.named_parameters():
        parameter.requires_grad_(re.search(PARTS[part], name) is not None)
    model.conditioner.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def _replace(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)
