"""log p of latents under the model: the probability-flow ODE and Hutchinson's trace.

In the angle θ = arctan σ the path of a variance-preserving model has unit speed
(Salimans & Ho 2022, appendix D):

    y = x/√(1+σ²) = cos θ·z + sin θ·noise
    dy/dθ = v(y, θ) = (y − √(1+σ²)·D(x; σ))/σ          the ODE, Song et al. 2021 (eq. 13)
    log p(z) = log N(y_T; 0, 1) + ∫ tr(∂v/∂y) dθ       change of variables, Chen et al. 2018
    tr(∂v/∂y) = E[εᵀ (∂v/∂y) ε],  ε = ±1               Hutchinson 1990; Grathwohl et al. 2019

v is 0 for standard normal data: what is integrated is only how the latents differ from noise. It is
Heun's rule, of second order in the steps.

The number is the density of the latents at the schedule's lowest level, in units of the latents: it
compares images under one model, and no models with each other. A high density does not make an
image normal: smooth images have one under models that never saw the like (Nalisnick et al. 2019).
"""

import math

import torch
from torch import Tensor

from minidiff.diffusion.denoiser import Denoise


def log_likelihood(denoise: Denoise, z: Tensor, sigmas: Tensor, probes: Tensor) -> Tensor:
    """log p of latents z (N, C, h, w) in nats, float64 (N,).

    `denoise(x, sigma)` of these N images, `sigmas` a ladder (n+1,), descending; two calls and a
    backward pass for each probe in each of its n steps. `probes` (K, N, C, h, w) of ±1 stay the
    same on all of the way, so that the integral is of one smooth function; the trace is their mean.
    """
    def flow(y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        sigma, wide = angle.tan(), 1 / angle.cos().item()
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            v = (y - wide * denoise(wide * y, sigma)) / sigma.item()
            back = [torch.autograd.grad(v, y, probe, retain_graph=k + 1 < len(probes))[0]
                    for k, probe in enumerate(probes)]
        traces = [(probe * part).flatten(1).sum(1) for probe, part in zip(probes, back)]
        return v.detach(), torch.stack(traces).double().mean(0)

    angles, y = sigmas.double().flip(0).atan(), z
    total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    for angle, further in zip(angles, angles[1:]):
        step = (further - angle).item()
        v, trace = flow(y, angle)
        ahead, trace_ahead = flow(y + step * v, further)
        y = y + step / 2 * (v + ahead)
        total += step / 2 * (trace + trace_ahead)
    squares = y.double().square().flatten(1)
    return total - (squares + math.log(2 * math.pi)).sum(1) / 2


def bits_per_dimension(log_p: Tensor, dimensions: int) -> Tensor:
    """Nats of an image → bits a number of its latents; lower is likelier."""
    return -log_p / (dimensions * math.log(2))
