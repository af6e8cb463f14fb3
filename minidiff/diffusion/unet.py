"""Stable Diffusion's UNet, whole: F(x, t, context), written once for SD 1.x, SD 2.x and TINY.

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
and no convolution has to reorder its weights and inputs. `benchmarks/train.py` measures the gain.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff.convolution import Conv3x3
from minidiff.diffusion.norm import GroupNorm


@dataclass(frozen=True)
class UNetConfig:
    channels: tuple[int, ...]             # per level, high resolution first
    attention: tuple[bool, ...]           # per level: a Transformer after each ResBlock?
    context_dim: int                      # width of the context tokens
    heads: int | None = None              # heads everywhere (SD 1.x) …
    head_dim: int | None = None           # … or width of every head (SD 2.x)
    linear_projection: bool = False       # proj_in/out: 1×1 convolution (SD 1.x) or Linear (SD 2.x)
    float32_attention: bool = False       # SD 2.x overflows fp16 in the attention logits
    blocks: int = 2                       # ResBlocks a level on the way down; one more going up
    groups: int = 32                      # of every GroupNorm
    latent_channels: int = 4


SD15 = UNetConfig((320, 640, 1280, 1280), (True, True, True, False), 768, heads=8)
SD21 = UNetConfig((320, 640, 1280, 1280), (True, True, True, False), 1024, head_dim=64,
                  linear_projection=True, float32_attention=True)
TINY = UNetConfig((32, 64, 128), (False, False, True), 64, heads=4, blocks=1, groups=16)
SMALL = UNetConfig((96, 192, 288), (False, True, True), 128, heads=4, blocks=1)


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = c = config
        self.checkpointing = False  # keep the inputs of blocks alone, compute the rest again
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
                                          "" if last else "down"))
            skips += [channels] * (c.blocks + (not last))
        self.mid_block = Middle(c, channels, time_dim)
        below = channels
        for level in reversed(range(len(c.channels))):
            channels, attention = c.channels[level], c.attention[level]
            inputs = [below + skips.pop(), *[channels + skips.pop() for _ in range(c.blocks)]]
            self.up_blocks.append(Level(c, inputs, channels, time_dim, attention,
                                        "up" if level else ""))
            below = channels
        self.conv_norm_out = GroupNorm(c.groups, width, eps=1e-5)
        self.conv_out = nn.Conv2d(width, c.latent_channels, 3, padding=1)
        parts = (*self.down_blocks, self.mid_block, *self.up_blocks)
        # channels of each ResBlock, in the order in which they run
        self.widths = [block.conv2.in_channels for part in parts for block in part.resnets]

    def forward(self, x: Tensor, t: Tensor, context: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (N, 4, h, w), t (N,) timesteps 0 … 999, context (N or 1, K, d) → (N, 4, h, w).

        `keep` (N, Σ `widths`) is what the channels of each ResBlock are multiplied by.
        """
        dtype = self.conv_in.weight.dtype                    # 16 bits, if all weights have them
        x, context = x.to(dtype), context.to(dtype).expand(len(x), -1, -1)
        emb = timestep_embedding(t, self.config.channels[0]).to(x.dtype)
        emb = self.time_embedding.linear_2(F.silu(self.time_embedding.linear_1(emb)))
        emb = F.silu(emb)                                    # (N, 4·width); ResBlocks begin with it
        h = self.conv_in(x)                                  # (N, width, h, w)
        skips = [h]
        keeps = ([None] * len(self.widths) if keep is None else
                 [*keep.to(h.dtype).split(self.widths, 1)])
        run = recomputed if self.checkpointing and torch.is_grad_enabled() else direct
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                h = run(level.block, i, h, emb, context, None, keeps.pop(0))
                skips.append(h)
            if level.resample:
                h = level.downsamplers[0]["conv"](h)
                skips.append(h)
        h = run(self.mid_block, h, emb, context, keeps.pop(0), keeps.pop(0))
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                h = run(level.block, i, h, emb, context, skips.pop(), keeps.pop(0))
            if level.resample:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
                h = level.upsamplers[0]["conv"](h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


def direct(block: Callable[..., Tensor], *inputs) -> Tensor:
    return block(*inputs)


def recomputed(block: Callable[..., Tensor], *inputs) -> Tensor:
    """Activation checkpointing (Chen et al. 2016); dropout's masks are inputs, so no random state
    has to be kept."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


class Level(nn.Module):
    """The blocks of one resolution, and the convolution to the next."""

    def __init__(self, c: UNetConfig, inputs: list[int], channels: int, time_dim: int,
                 attention: bool, resample: str):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, i, channels, time_dim) for i in inputs])
        self.attentions = nn.ModuleList([Transformer(c, channels)
                                         for _ in inputs]) if attention else None
        if resample == "down":
            self.downsamplers = nn.ModuleList([
                nn.ModuleDict({"conv": Conv3x3(channels, channels, stride=2)})])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": Conv3x3(channels, channels)})])
        self.resample = resample

    def block(self, i: int, h: Tensor, emb: Tensor, context: Tensor,
              skip: Tensor | None, keep: Tensor | None) -> Tensor:
        h = self.resnets[i](h if skip is None else torch.cat([h, skip], 1), emb, keep)
        return h if self.attentions is None else self.attentions[i](h, context)


class Middle(nn.Module):
    def __init__(self, c: UNetConfig, channels: int, time_dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, channels, channels, time_dim) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(c, channels)])

    def forward(self, h: Tensor, emb: Tensor, context: Tensor, *keep: Tensor | None) -> Tensor:
        h = self.attentions[0](self.resnets[0](h, emb, keep[0]), context)
        return self.resnets[1](h, emb, keep[1])


class ResBlock(nn.Module):
    """h + conv2(keep·act(norm2(conv1(act(norm1(h))) + time))); `emb` has been through SiLU already.

    Dropout where Ho et al. 2020 have it, but of whole channels.
    """

    def __init__(self, c: UNetConfig, inputs: int, channels: int, time_dim: int):
        super().__init__()
        self.norm1 = GroupNorm(c.groups, inputs, eps=1e-5)
        self.conv1 = Conv3x3(inputs, channels)
        self.time_emb_proj = nn.Linear(time_dim, channels)
        self.norm2 = GroupNorm(c.groups, channels, eps=1e-5)
        self.conv2 = Conv3x3(channels, channels)
        self.conv_shortcut = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, keep: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = F.silu(self.norm2(h))
        h = h if keep is None else h * keep[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(h)


class Transformer(nn.Module):
    """Cells as tokens: self-attention, cross-attention to the context, feed-forward."""

    def __init__(self, c: UNetConfig, channels: int):
        super().__init__()
        self.linear = c.linear_projection
        self.norm = GroupNorm(c.groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in the ResBlocks
        project = nn.Linear if self.linear else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(c, channels)])
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = rearrange(h, "n c h w -> n (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
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

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        tokens = self.norm1(h)
        h = h + self.attn1(tokens, tokens)
        h = h + self.attn2(self.norm2(h), context)
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

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        q, k, v = map(self.split, (self.to_q(h), self.to_k(context), self.to_v(context)))
        if self.float32 and q.dtype == torch.float16:
            with torch.autocast(h.device.type, enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(out, "n heads t d -> n t (heads d)"))

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "n t (heads d) -> n heads t d", heads=self.heads)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020) with the exact erf GELU: net.2(x·gelu(gate)), 4 times as wide."""

    def __init__(self, channels: int):
        super().__init__()
        gate = nn.ModuleDict({"proj": nn.Linear(channels, 8 * channels)})
        self.net = nn.ModuleList([gate, nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, h: Tensor) -> Tensor:
        x, gate = self.net[0]["proj"](h).chunk(2, dim=-1)
        return self.net[2](x * F.gelu(gate))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t·exp(−ln 10000·i/half), half = width/2: (N,) → (N, width), ≥ float32."""
    t, half = t.to(torch.promote_types(t.dtype, torch.float32)), width // 2
    i = torch.arange(half, dtype=t.dtype, device=t.device)
    frequencies = torch.exp(-math.log(10000) / half * i)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
