"""Write your own sampler: the explicit midpoint rule in log σ, beside those that are there.

    python examples/own_sampler.py
"""

import torch

from minidiff.diffusion.samplers import SAMPLERS, Denoise, Steps
from minidiff.diffusion.schedule import Schedule

MEAN, STD = 0.7, 0.5  # the data: a Gaussian, whose best denoiser is a formula


def midpoint(denoise: Denoise, x: torch.Tensor, sigmas: torch.Tensor) -> Steps:
    """dx/dσ = (x − D)/σ, with the slope of half a step ahead: two calls a step, of order 2."""
    for sigma, down in zip(sigmas, sigmas[1:]):
        half = (sigma * down).sqrt()
        denoised = denoise(x, sigma)
        ahead = x + (x - denoised) / sigma * (half - sigma)
        x = x + (ahead - denoise(ahead, half)) / half * (down - sigma)
        yield x, denoised


def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


start = torch.linspace(-30, 30, 9, dtype=torch.float64)
print("steps  " + "  ".join(f"{name:>9}" for name in ("midpoint", "euler", "heun")))
for n in (10, 20, 40, 80):
    sigmas = Schedule.scaled_linear().ladder(n, "karras")
    exact = MEAN + (start - MEAN) * ((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2)).sqrt()
    errors = []
    for sampler in (midpoint, SAMPLERS["euler"], SAMPLERS["heun"]):
        *_, (x, _) = sampler(denoise, start, sigmas)
        errors.append((x - exact).abs().max())
    print(f"{n:5}  " + "  ".join(f"{error:9.2e}" for error in errors))
