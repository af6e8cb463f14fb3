"""Stable Diffusion's autoencoder, whole: images in [-1, 1] ↔ latents at 1/8 of the side, already
scaled.

    SD: 128 × (1, 2, 4, 4) channels, 2 ResBlocks a level down and 3 up, one single-head attention in
    the middle, quant_conv 8→8 and post_quant_conv 4→4 (1×1). Every norm has eps 1e-6.

The latent scale belongs to the weights: 0.18215 for the public ones, 1/std of the training latents
for one trained here (`latent_scale`). Callers never see the factor. Attribute names are those of
diffusers' AutoencoderKL. Source: Rombach et al. 2022. Keep it out of fp16: activations overflow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidiff.diffusion.norm import GroupNorm
from minidiff.pixels import at_once


@dataclass(frozen=True)
class VAEConfig:
    channels: tuple[int, ...]     # per level, high resolution first; each but the last halves it
    blocks: int = 2               # ResBlocks a level in the encoder; one more in the decoder
    groups: int = 32              # of every GroupNorm
    latent_channels: int = 4


SD = VAEConfig((128, 256, 512, 512))
# Half of SD's channels: 21 M parameters. 1/8 of the side, for at 256 px a rib is about as wide as a
# cell, and a UNet on 32 × 32 cells takes a quarter of the time of one on 64 × 64.
SMALL = VAEConfig((64, 128, 256, 256))
TINY = VAEConfig((16, 32, 64), blocks=1, groups=8)  # 1/4 of the side: 1/8 of 64 px holds no ribs

TERMS = ("l1", "edges", "kl", "lpips")  # of the training loss


@dataclass(frozen=True)
class Moments:
    """A diagonal Gaussian over latents, scaled: mean and std (N, 4, h, w)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise

    def kl(self, scale: Tensor) -> Tensor:
        """KL to N(0, 1) of the unscaled latents in nats per image, (N,)."""
        mean, variance = self.mean.float() / scale, (self.std.float() / scale).square()
        return 0.5 * (mean.square() + variance - 1 - variance.log()).flatten(1).sum(1)


class VAE(nn.Module):
    def __init__(self, config: VAEConfig, scale: float = 0.18215):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.register_buffer("scale", torch.tensor(scale), persistent=False)  # saved as JSON

    @property
    def factor(self) -> int:
        """Pixels a latent cell: 8 for four levels."""
        return 2 ** (len(self.config.channels) - 1)

    def encode(self, images: Tensor) -> Moments:
        """(N, 3, H, W) in [-1, 1] → moments (N, 4, H/8, W/8), scaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Moments(self.scale * mean, self.scale * (0.5 * logvar.clamp(-30.0, 20.0)).exp())

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (N, 4, h, w) → images (N, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z / self.scale))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A training step: reconstructions of latents drawn with this noise, and their KL (N,)."""
        moments = self.encode(images)
        return self.decode(moments.sample(noise)), moments.kl(self.scale)


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        *upper, last = c.channels
        self.conv_in = nn.Conv2d(3, c.channels[0], 3, padding=1)
        inputs = [c.channels[0], *upper]
        self.down_blocks = nn.ModuleList([
            Level(c, i, o, c.blocks, "down" if k < len(upper) else "")
            for k, (i, o) in enumerate(zip(inputs, c.channels))])
        self.mid_block = Middle(c)
        self.conv_norm_out = GroupNorm(c.groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, 2 * c.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        *upper, last = c.channels[::-1]
        self.conv_in = nn.Conv2d(c.latent_channels, c.channels[-1], 3, padding=1)
        self.mid_block = Middle(c)
        inputs = [c.channels[-1], *upper]
        self.up_blocks = nn.ModuleList([
            Level(c, i, o, c.blocks + 1, "up" if k < len(upper) else "")
            for k, (i, o) in enumerate(zip(inputs, [*upper, last]))])
        self.conv_norm_out = GroupNorm(c.groups, last, eps=1e-6)
        self.conv_out = nn.Conv2d(last, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Level(nn.Module):
    """The ResBlocks of one resolution, and the convolution to the next: "down", "up" or none."""

    def __init__(self, c: VAEConfig, inputs: int, channels: int, blocks: int, resample: str):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(c, i, channels)
                                      for i in [inputs, *[channels] * (blocks - 1)]])
        self.resample = resample
        if resample == "down":
            self.downsamplers = nn.ModuleList([
                nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, stride=2)})])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([
                nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 3, padding=1)})])

    def forward(self, h: Tensor) -> Tensor:
        for block in self.resnets:
            h = block(h)
        if self.resample == "down":  # padded right and below only, as trained
            return self.downsamplers[0]["conv"](F.pad(h, (0, 1, 0, 1)))
        if self.resample == "up":
            return self.upsamplers[0]["conv"](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return h


class Middle(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        channels = c.channels[-1]
        self.resnets = nn.ModuleList([ResBlock(c, channels, channels) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(c, channels)])

    def forward(self, h: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](h)))


class ResBlock(nn.Module):
    def __init__(self, c: VAEConfig, inputs: int, channels: int):
        super().__init__()
        self.norm1 = GroupNorm(c.groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1)
        self.norm2 = GroupNorm(c.groups, channels, eps=1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, channels, 1) if inputs != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """One head over all cells; unlike the UNet's, q, k and v have biases."""

    def __init__(self, c: VAEConfig, channels: int):
        super().__init__()
        self.group_norm = GroupNorm(c.groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "n c h w -> n (h w) c")
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + rearrange(out, "n (h w) c -> n c h w", h=x.shape[2])


def latent_scale(unscaled: Moments) -> float:
    """1/std of latents drawn from these: the images' variance, and the encoder's own noise."""
    return (unscaled.mean.var(unbiased=False) + unscaled.std.square().mean()).rsqrt().item()


def training_terms(y: Tensor, x: Tensor, kl: Tensor,
                   lpips: Callable[[Tensor, Tensor], Tensor] | None) -> tuple[Tensor, ...]:
    """TERMS of reconstructions y of images x and their KL (N,): means over the images, float32."""
    y = y.float()
    perceptual = lpips(y, x).mean() if lpips else y.new_zeros(())
    return (y - x).abs().mean(), edge_error(y, x), kl.mean(), perceptual


def edge_error(y: Tensor, x: Tensor, scales: int = 3) -> Tensor:
    """L1 distance of horizontal and vertical differences at 1, 1/2, 1/4 of the size, averaged."""
    error = y.new_zeros(())
    for _ in range(scales):
        for dim in (2, 3):
            error = error + (y.diff(dim=dim) - x.diff(dim=dim)).abs().mean() / (2 * scales)
        y, x = F.avg_pool2d(y, 2), F.avg_pool2d(x, 2)
    return error


def encoder(vae: VAE) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Float images → (mean, std) of their latents, in float32: fp16 overflows. Large ones are
    encoded a few at a time."""
    @torch.no_grad()
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = x.to(vae.scale.device).split(at_once(x.shape[-1]))
        found = [vae.encode(part) for part in parts]
        return torch.cat([m.mean for m in found]), torch.cat([m.std for m in found])
    return encode
