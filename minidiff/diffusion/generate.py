"""Labels + seeds → uint8 images: one path for train's grids, sample.py and its checks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser, guided
from minidiff.diffusion.samplers import SAMPLERS, SeededNoise
from minidiff.diffusion.vae import VAE
from minidiff.errors import TrainingFault
from minidiff.variables import Labels


@dataclass(frozen=True)
class Recipe:
    """How to sample; written into every image's metadata."""

    sampler: Literal["ddim", "heun", "dpmpp_2m"] = "dpmpp_2m"
    ladder: Literal["leading", "trailing", "linspace", "karras", "logsigma"] = "logsigma"
    steps: int = 16
    guidance: float = 1.0
    eta: float = 0.0

    def __post_init__(self):
        assert self.eta == 0 or self.sampler == "ddim", "eta belongs to ddim"


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What is needed to make images: a denoiser round a Model (its EMA), that model's conditioner, the VAE, the size."""

    denoiser: Denoiser
    conditioner: Conditioner
    vae: VAE
    size: int

    @torch.no_grad()
    def latents(self, labels: Labels, seeds: Sequence[int], recipe: Recipe) -> Iterator[Tensor]:
        """Denoised estimates after each step, the finished latents last: (N, 4, h, w).

        Image k depends on its seed and labels alone; `labels` are tensors (N,), one per variable.
        """
        device = next(self.vae.parameters()).device
        cells = self.size // self.vae.factor
        noise = SeededNoise(seeds, (self.vae.config.latent_channels, cells, cells), device)
        labels = {name: value.to(device) for name, value in labels.items()}
        denoise = guided(self.denoiser, labels, self.conditioner.null(len(seeds), device), recipe.guidance)
        sigmas = self.denoiser.schedule.ladder(recipe.steps, recipe.ladder)
        start = noise() * (1 + sigmas[0] ** 2).sqrt().item()
        options = {"eta": recipe.eta, "noise": noise} if recipe.eta else {}
        for x, denoised in SAMPLERS[recipe.sampler](denoise, start, sigmas, **options):  # noqa: B007 (x: used after the loop)
            yield denoised
        yield x / (1 + sigmas[-1] ** 2).sqrt().item()  # the public ladder ends at σ(0) = .029, not at 0

    @torch.no_grad()
    def images(self, labels: Labels, seeds: Sequence[int], recipe: Recipe, *, batch: int = 50,
               progress: Callable[[int], object] = lambda n: None) -> Iterator[Tensor]:
        """Yield uint8 (n, 3, size, size) on the CPU, micro-batch by micro-batch; `progress(n)` is told of each step."""
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            for z in self.latents({k: v[part] for k, v in labels.items()}, seeds[part], recipe):
                progress(len(z))
            yield to_uint8(self.vae.decode(z)).cpu()


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → 0 … 255, rounded; a non-finite pixel is refused, for it would become a black one."""
    if not images.isfinite().all():
        raise TrainingFault("the model gave non-finite pixels, which are never written: untrained, or --guidance too high")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
