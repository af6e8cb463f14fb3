"""Samplers: pure functions of (denoise, x, sigmas) that yield (x, denoised) after every step.

x = z + σ·noise starts at √(1+σ₀²)·noise; `sigmas` descends over n+1 levels; the caller divides the last x by
√(1+σ_end²). No schedule, labels or guidance inside: `denoise(x, sigma)` holds them. Nothing of ours is imported.

    name       order   calls a step   source
    ddim       1       1              Song et al. 2021, eq. 12 (eta 0: the Euler step of dx/dσ; eta 1: ancestral)
    heun       2       2              Karras et al. 2022, algorithm 1 without churn
    dpmpp_2m   2       1              Lu et al. 2022, algorithm 2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Steps = Iterator[tuple[Tensor, Tensor]]


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, eta: float = 0.0, noise: Callable[[], Tensor] | None = None) -> Steps:
    """eta scales the fresh noise of each step, which `noise()` gives in the shape of x."""
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        up = eta * down / sigma * (sigma**2 - down**2).clamp(min=0).sqrt()  # eq. 16, times 1/√ᾱ of the next level
        x = denoised + (x - denoised) * ((down**2 - up**2).sqrt() / sigma).item()
        if up > 0:
            x = x + noise() * up.item()
        yield x, denoised


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Two calls a step; a last step that ends at σ = 0 is an Euler step."""
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma.item()
        ahead = x + slope * (down - sigma).item()
        if down > 0:
            slope = (slope + (ahead - denoise(ahead, down)) / down.item()) / 2
        x = x + slope * (down - sigma).item()
        yield x, denoised


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Second-order multistep in λ = −log σ; the first step, and one that ends at σ = 0, are first-order."""
    previous, h_last = None, None
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        h = (sigma / down).log()
        slope = denoised
        if previous is not None and down > 0:
            r = (h_last / h).item()
            slope = denoised + (denoised - previous) / (2 * r)
        x = x * (down / sigma).item() - slope * torch.expm1(-h).item()
        previous, h_last = denoised, h
        yield x, denoised


class SeededNoise:
    """Standard normal noise with one CPU generator per image: image k depends on its seed alone.

    Each call draws the next (N, *shape) float32 tensor; batch size, order and number of devices do not matter.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


SAMPLERS: dict[str, Callable[..., Steps]] = {"ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m}
