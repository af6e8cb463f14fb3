"""Stable Diffusion's UNet, whole: ε(x, t, context), written once for SD 1.x, SD 2.x and TINY.

    SD 1.x at 512 px                     x (N, 4, 64, 64), t (N,), context (N, 77, 768)
    level   cells   channels   blocks                          then
    0       64²     320        2 × [ResBlock + Transformer]    stride-2 conv
    1       32²     640        2 × [ResBlock + Transformer]    stride-2 conv
    2       16²     1280       2 × [ResBlock + Transformer]    stride-2 conv
    3       8²      1280       2 × [ResBlock]
    middle  8²      1280       ResBlock + Transformer + ResBlock
    and back up with 3 blocks a level, each fed the skip connection of its mirror image.

Attribute names are those of diffusers' UNet2DConditionModel, so that its files load as they are.
Sources: Rombach et al. 2022 (latent diffusion), CompVis/stable-diffusion `openaimodel.py`,
Stability-AI/stablediffusion for 2.x.

Keep it in `torch.channels_last`, on a CPU too: cells and tokens are then views of the same memory,
and no convolution has to bring its weights and inputs into that order first. `benchmarks/train.py`
measures what that is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff.convolution import as_product


@dataclass(frozen=True)
class UNetConfig:
    channels: tuple[int, ...]             # per level, high resolution first
    attention: tuple[bool, ...]           # per level: a Transformer after each ResBlock?
    context_dim: int                      # width of the context tokens
    heads: int | None = None              # heads everywhere (SD 1.x) …
    head_dim: int | None = None           # … or width of every head (SD 2.x)
    linear_projection: bool = False       # proj_in/out: 1×1 convolutions (SD 1.x) or Linear (SD 2.x)
    float32_attention: bool = False       # SD 2.x overflows fp16 in the attention logits
    blocks: int = 2                       # ResBlocks a level on the way down; one more on the way up
    groups: int = 32                      # of every GroupNorm
    latent_channels: int = 4


SD15 = UNetConfig((320, 640, 1280, 1280), (True, True, True, False), 768, heads=8)
SD21 = UNetConfig((320, 640, 1280, 1280), (True, True, True, False), 1024, head_dim=64,
                  linear_projection=True, float32_attention=True)
TINY = UNetConfig((32, 64, 128), (False, False, True), 64, heads=4, blocks=1, groups=16)
SMALL = UNetConfig((96, 192, 288), (False, True, True), 128, heads=4, blocks=1)

# attention layer → its probabilities; None: they are not computed
Taps = dict[nn.Module, Tensor] | None


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        # keep the inputs of blocks alone and compute the rest again on the way back
        self.checkpointing = False
        width, time_dim = c.channels[0], 4 * c.channels[0]
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(width, time_dim), "linear_2": nn.Linear(time_dim, time_dim)}
        )
        self.conv_in = nn.Conv2d(c.latent_channels, width, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()

        skips = [width]  # channels of every tensor the way down leaves for the way up
        for level, (channels, attention) in enumerate(zip(c.channels, c.attention)):
            last = level == len(c.channels) - 1
            inputs = [skips[-1], *[channels] * (c.blocks - 1)]
            self.down_blocks.append(Level(c, inputs, channels, time_dim, attention,
                                          None if last else "down"))
            skips += [channels] * (c.blocks + (not last))
        self.mid_block = Middle(c, channels, time_dim)
        below = channels
        for level in reversed(range(len(c.channels))):
            channels, attention = c.channels[level], c.attention[level]
            inputs = [below + skips.pop(), *[channels + skips.pop() for _ in range(c.blocks)]]
            self.up_blocks.append(Level(c, inputs, channels, time_dim, attention,
                                        "up" if level else None))
            below = channels
        self.conv_norm_out = nn.GroupNorm(c.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor,
                taps: dict[str, Tensor] | None = None) -> Tensor:
        """x (N, 4, h, w), t (N,) timesteps 0 … 999, context (N, K, context_dim) → (N, 4, h, w).

        A dict given as `taps` is filled with what every attention layer looks at: under
        `mid_block.attentions.0.attn1` (self) and `….attn2` (cross) the probabilities, the mean of
        the heads, (N, cells, tokens) float32 on the CPU.
        """
        emb = timestep_embedding(t, self.config.channels[0]).to(x.dtype)                # (N, width)
        # (N, 4·width)
        emb = self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(emb)))
        # every ResBlock begins with it
        emb = F.silu(emb)
        # (N, width, h, w)
        h = self.conv_in(x)
        skips = [h]
        run = recomputed if self.checkpointing and torch.is_grad_enabled() else direct
        # by layer; named at the end
        seen = None if taps is None else {}
        for level in self.down_blocks:
            h = level.down(run, h, emb, context, skips, seen)
        h = run(self.mid_block, h, emb, context, seen)
        for level in self.up_blocks:
            h = level.up(run, h, emb, context, skips, seen)
        if taps is not None:
            names = {layer: name for name, layer in self.named_modules() if layer in seen}
            taps.update((names[layer].replace(".transformer_blocks.0", ""), seen[layer])
                        for layer in seen)
        # (N, 4, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def direct(block: Callable[..., Tensor], *inputs) -> Tensor:
    return block(*inputs)


def recomputed(block: Callable[..., Tensor], *inputs) -> Tensor:
    """Activation checkpointing (Chen et al. 2016). There is no dropout, so no state of a generator
    to keep.
    """
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


class Level(nn.Module):
    """The blocks of one resolution, on the way down (they leave skips) or up (they take them)."""

    def __init__(self, c: UNetConfig, inputs: list[int], channels: int, time_dim: int,
                 attention: bool, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, i, channels, time_dim) for i in inputs])
        self.attentions = nn.ModuleList([Transformer(c, channels)
                                         for _ in inputs]) if attention else None
        if resample == "down":
            self.downsamplers = nn.ModuleList([Resample(channels, stride=2)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Resample(channels, stride=1)])
        self.resample = resample

    def block(self, i: int, h: Tensor, emb: Tensor, context: Tensor, skip: Tensor | None,
              taps: Taps) -> Tensor:
        h = self.resnets[i](h if skip is None else torch.cat([h, skip], 1), emb)
        return h if self.attentions is None else self.attentions[i](h, context, taps)

    def down(self, run: Callable[..., Tensor], h: Tensor, emb: Tensor, context: Tensor,
             skips: list[Tensor], taps: Taps) -> Tensor:
        for i in range(len(self.resnets)):
            h = run(self.block, i, h, emb, context, None, taps)
            skips.append(h)
        if self.resample:
            h = self.downsamplers[0].conv(h)
            skips.append(h)
        return h

    def up(self, run: Callable[..., Tensor], h: Tensor, emb: Tensor, context: Tensor,
           skips: list[Tensor], taps: Taps) -> Tensor:
        for i in range(len(self.resnets)):
            h = run(self.block, i, h, emb, context, skips.pop(), taps)
        if self.resample:
            h = self.upsamplers[0].conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class Middle(nn.Module):
    def __init__(self, c: UNetConfig, channels: int, time_dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, channels, channels, time_dim) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(c, channels)])

    def forward(self, h: Tensor, emb: Tensor, context: Tensor, taps: Taps) -> Tensor:
        h = self.attentions[0](self.resnets[0](h, emb), context, taps)
        return self.resnets[1](h, emb)


class Resample(nn.Module):
    """One 3×3 convolution: stride 2 with symmetric padding down, stride 1 after nearest ×2 up."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels, stride)


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution with padding 1; on a CPU, where many channels meet few cells, one matrix
    product does its work.

    So a guided call of SD 1.5, with 1280 channels at 2² and 4² cells, takes .67 of the time at 64
    px, .84 at 256 px.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__(inputs, outputs, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or 8 * len(x) * x.shape[2] * x.shape[3] > self.in_channels:
            return super().forward(x)
        return as_product(x, self.weight, self.bias, self.stride[0])


class ResBlock(nn.Module):
    """h + conv2(act(norm2(conv1(act(norm1(h))) + time))); `emb` has been through SiLU already."""

    def __init__(self, c: UNetConfig, inputs: int, channels: int, time_dim: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(c.groups, inputs, eps=1e-5)
        self.conv1 = Conv3x3(inputs, channels)
        self.time_emb_proj = nn.Linear(time_dim, channels)
        self.norm2 = nn.GroupNorm(c.groups, channels, eps=1e-5)
        self.conv2 = Conv3x3(channels, channels)
        self.conv_shortcut = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Transformer(nn.Module):
    """SpatialTransformer: cells as tokens; self-attention, cross-attention to the context,
    feed-forward.
    """

    def __init__(self, c: UNetConfig, channels: int):
        super().__init__()
        self.linear = c.linear_projection
        self.norm = nn.GroupNorm(c.groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the ResBlocks
        project = (lambda: nn.Linear(channels, channels)) if self.linear else (
            lambda: nn.Conv2d(channels, channels, 1))
        self.proj_in = project()
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, channels)])
        self.proj_out = project()

    def forward(self, x: Tensor, context: Tensor, taps: Taps) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "n c h w -> n (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context, taps)
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "n (h w) c -> n c h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))


class TransformerBlock(nn.Module):
    def __init__(self, c: UNetConfig, channels: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(c, channels, channels)
        self.attn2 = Attention(c, channels, c.context_dim)
        self.ff = FeedForward(channels)

    def forward(self, h: Tensor, context: Tensor, taps: Taps) -> Tensor:
        own = self.norm1(h)
        h = h + self.attn1(own, own, taps)
        h = h + self.attn2(self.norm2(h), context, taps)
        return h + self.ff(self.norm3(h))


class Attention(nn.Module):
    """softmax(q·kᵀ/√d_head)·v; q, k, v without bias, the output with."""

    def __init__(self, c: UNetConfig, channels: int, context_dim: int):
        super().__init__()
        self.heads = c.heads or channels // c.head_dim
        self.float32 = c.float32_attention
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, h: Tensor, context: Tensor, taps: Taps = None) -> Tensor:
        q, k, v = (rearrange(x, "n t (heads d) -> n heads t d", heads=self.heads)
                   for x in (self.to_q(h), self.to_k(context), self.to_v(context)))
        if taps is not None:
            taps[self] = probabilities(q, k)
        if self.float32:
            with torch.autocast(h.device.type, enabled=False):
                wide = torch.promote_types(q.dtype, torch.float32)
                out = F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide)).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(out, "n heads t d -> n t (heads d)"))


@torch.no_grad()
def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """The mean of the heads' softmax(q·kᵀ/√d_head), beside the fused kernel, which never holds
    them: for `taps` alone.

    q (N, heads, cells, d), k (N, heads, tokens, d) → (N, cells, tokens) float32 on the CPU. One
    head at a time: at 64² cells one map of one image is 64 MiB.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float() / math.sqrt(q.shape[-1]), k.float()
        return (sum((a @ b.mT).softmax(-1)
                    for a, b in zip(q.unbind(1), k.unbind(1))) / q.shape[1]).cpu()


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020) with the exact erf GELU: net.2(x·gelu(gate)), four times as wide
    inside.
    """

    def __init__(self, channels: int):
        super().__init__()
        gate = nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)})
        self.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, h: Tensor) -> Tensor:
        x, gate = self.net[0]["proj"](h).chunk(2, dim=-1)
        return self.net[2](x * F.gelu(gate))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t·exp(−ln 10000·i/half), half = width/2: (N,) → (N, width), at least
    float32.
    """
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequencies = torch.exp(
        -math.log(10000) / (width // 2) * torch.arange(width // 2, dtype=t.dtype, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
