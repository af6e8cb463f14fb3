"""Samplers: pure functions of (denoise, x, sigmas) that yield (x, denoised) after every step.

x = z + σ·noise starts at √(1+σ₀²)·noise; `sigmas` descends over n+1 levels; the caller divides the
last x by √(1+σ_end²). `denoise(x, sigma)` holds the schedule, the labels and guidance. Nothing of
ours is imported. TABLE, at the end, holds what is known of each.

A new one has to allow a last level of 0 and a step between equal levels, leaves x as it was given,
and keeps its type: `sigmas` are float64, so factors go through `.item()`.

Four samplers are two formulas: divided by √ᾱ, euler is ddim with eta 0; ddpm and euler_ancestral
are ddim with eta 1. Each is written as in its paper, and a test holds them equal. `noise()` gives
fresh standard normal noise in the shape of x.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[], Tensor]
Steps = Iterator[tuple[Tensor, Tensor]]


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, eta: float = 0.0,
         noise: Noise | None = None) -> Steps:
    """eta scales the fresh noise of each step: 0 none, 1 as much as the forward process has."""
    assert 0 <= eta <= 1 and (noise or not eta), "eta lies in 0 … 1, and above 0 it needs noise"
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        # eq. 16, times 1/√ᾱ of the next level
        up = eta * down / sigma * (sigma**2 - down**2).clamp(min=0).sqrt()
        x = denoised + (x - denoised) * ((down**2 - up**2).sqrt() / sigma).item()
        if up > 0:
            x = x + noise() * up.item()
        yield x, denoised


def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Draw from the posterior q(x_{t−1} | x_t, x_0 = denoised): mean μ̃ and variance β̃ of eq. 7.

    Between levels that are not neighbours, β = 1 − ᾱ_t/ᾱ_{t−1} covers all steps in between.
    """
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        a, a_down = 1 / (1 + sigma**2), 1 / (1 + down**2)  # ᾱ_t, ᾱ_{t−1}
        beta = 1 - a / a_down
        mean = denoised * (a_down.sqrt() * beta / (1 - a)).item()
        # √ᾱ_t·x is the paper's x_t
        mean = mean + x * (a.sqrt() * (1 - beta).sqrt() * (1 - a_down) / (1 - a)).item()
        variance = (1 - a_down) / (1 - a) * beta
        if variance > 0:
            mean = mean + noise() * variance.sqrt().item()
        x = mean / a_down.sqrt().item()
        yield x, denoised


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Follow the probability-flow ODE dx/dσ = (x − D(x; σ))/σ along its tangent."""
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma.item()
        x = x + slope * (down - sigma).item()
        yield x, denoised


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """x + (σ² − σ_down²)·score + noise of variance σ_down²(σ² − σ_down²)/σ²; score = (D − x)/σ²."""
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        score = (denoised - x) / (sigma**2).item()
        variance = down**2 * (sigma**2 - down**2) / sigma**2
        x = x + score * (sigma**2 - down**2).item()
        if variance > 0:
            x = x + noise() * variance.sqrt().item()
        yield x, denoised


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, churn: float = 0.0,
         noise: Noise | None = None, within: tuple[float, float] = (0.0, math.inf),
         inflate: float = 1.0) -> Steps:
    """Two calls a step; a last step that ends at σ = 0 is an Euler step.

    Before each step σ is raised by a share of churn/steps, √2 − 1 at most, where it lies `within`,
    by fresh noise of standard deviation `inflate`: S_churn, S_min and S_max, S_noise of the paper.
    """
    assert churn >= 0 and (noise or not churn), "churn is 0 or more, and above 0 it needs noise"
    for sigma, down in zip(sigmas, sigmas[1:]):
        if churn and within[0] <= sigma <= within[1]:
            up = sigma * (1 + min(churn / (len(sigmas) - 1), 2**0.5 - 1))
            x, sigma = x + noise() * (inflate * (up**2 - sigma**2).sqrt()).item(), up
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma.item()
        ahead = x + slope * (down - sigma).item()
        if down > 0:
            slope = (slope + (ahead - denoise(ahead, down)) / down.item()) / 2
        x = x + slope * (down - sigma).item()
        yield x, denoised


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """Second-order multistep in λ = −log σ; first order in the first step and one to σ = 0."""
    previous, h_last = None, None
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        h = (sigma / down).log()
        slope = _extrapolated(denoised, previous, h, h_last, down)
        x = x * (down / sigma).item() - slope * torch.expm1(-h).item()
        previous, h_last = denoised, h
        yield x, denoised


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The reverse SDE, midpoint form: e^(−2h) where dpmpp_2m has e^(−h), and noise.

    The first step, and one to σ = 0, are of first order and equal ddpm's.
    """
    previous, h_last = None, None
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        h = (sigma / down).log()
        slope = _extrapolated(denoised, previous, h, h_last, down)
        fresh = -torch.expm1(-2 * h)  # 1 − e^(−2h), the share of the variance that is drawn anew
        x = x * (down / sigma * torch.exp(-h)).item() + slope * fresh.item()
        if down > 0 and fresh > 0:
            x = x + noise() * (down * fresh.sqrt()).item()
        previous, h_last = denoised, h
        yield x, denoised


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The reverse SDE, D(s) the parabola through the last three estimates, integrated exactly.

    The paper and the programs that follow it give its square half this weight, which doubles the
    error. The first step has one estimate, the second two; a step to σ = 0 takes the last alone.
    """
    past: list[tuple[Tensor, Tensor]] = []  # the estimates before, and the steps from them
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        h = (sigma / down).log()
        m0, m1, m2 = _weights(2 * h)
        x = x * torch.exp(-2 * h).item() + denoised * m0.item()
        if past and down > 0 and h > 0:
            (previous, h_last), *rest = past
            slope = (denoised - previous) / (h_last / h).item()
            x = x + slope * m1.item()
            for before, h_before in rest:
                bend = slope - (previous - before) / (h_before / h).item()
                bend = bend / ((h_last + h_before) / h).item()
                x = x + bend * (m2 + m1 * h_last / h).item()
        if down > 0 and m0 > 0:
            x = x + noise() * (down * m0.sqrt()).item()
        past = [(denoised, h), *past[:1]]
        yield x, denoised


def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Steps:
    """UniP-2 is dpmpp_2m's step; UniC-2 corrects it with the call that the next step needs anyway.

    The last step is not corrected: that would take one more call.
    """
    start = before = previous = h_last = r = None  # start: the corrected x, one level back
    for sigma, down in zip(sigmas, sigmas[1:]):
        denoised = denoise(x, sigma)
        if previous is not None:
            x = _correct(start, h_last, r, before, previous, denoised)
        h = (sigma / down).log()
        r = None if previous is None else (h_last / h).item()
        slope = _extrapolated(denoised, previous, h, h_last, down)
        start, before, previous, h_last = x, previous, denoised, h
        x = x * (down / sigma).item() - slope * torch.expm1(-h).item()
        yield x, denoised


def _extrapolated(denoised: Tensor, previous: Tensor | None, h: Tensor, h_last: Tensor | None,
                  down: Tensor) -> Tensor:
    """D half a step ahead, D + (D − D_previous)/(2r) with r = h_last/h; D itself at an end."""
    if previous is None or not down > 0:
        return denoised
    r = (h_last / h).item()
    return denoised + (denoised - previous) / (2 * r)


def _correct(x: Tensor, h: Tensor, r: float | None, before: Tensor | None, here: Tensor,
             ahead: Tensor) -> Tensor:
    """e^(−h)·x + ∫₀¹ h·e^(h(s−1))·D(s) ds: a step h of λ, D(s) the parabola through s = −r, 0, 1.

    This solves the linear system of UniC-2, in which B(h) cancels. Without a point at −r, half the
    rise is added: B(h) = e^(−h) − 1.
    """
    m0, m1, m2 = _weights(h)
    x, rise = x * torch.exp(-h).item() + here * m0.item(), ahead - here
    if before is None:
        return x + rise * (m0 / 2).item()
    bend = (rise - (here - before) / r) / (1 + r)
    return x + (rise - bend) * m1.item() + bend * m2.item()


def _weights(h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """∫₀¹ h·e^(h(s−1))·s^k ds for k = 0, 1, 2."""
    m0 = -torch.expm1(-h)
    m1 = 1 - m0 / h
    return m0, m1, 1 - 2 * m1 / h


class SeededNoise:
    """Standard normal noise, (N, *shape) float32 a call, with one CPU generator for each image.

    So image k depends on its seed alone, whatever the batch, the order and the number of devices.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int],
                 device: torch.device | str = "cpu"):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), torch.device(device)

    def __call__(self) -> Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        if self.device.type == "cuda":  # from pinned memory, for which the program need not wait
            noise = noise.pin_memory()
        return noise.to(self.device, non_blocking=True)


class Facts(NamedTuple):
    """What is known of a sampler."""

    step: Callable[..., Steps]
    order: int           # of convergence; where noise is drawn, of the standard deviation
    calls: int = 1       # calls of `denoise` in one step
    noisy: bool = False  # takes `noise`; ddim does where eta > 0, heun where churn > 0


TABLE = {
    "ddim": Facts(ddim, 1),                # Song, Meng & Ermon 2021, eq. 12 and 16
    "ddpm": Facts(ddpm, 1, noisy=True),    # Ho et al. 2020, eq. 7
    "euler": Facts(euler, 1),              # Karras et al. 2022, algorithm 1, lines 4 and 5
    "euler_ancestral": Facts(euler_ancestral, 1, noisy=True),  # score SDE: Song et al. 2021, app. F
    "heun": Facts(heun, 2, calls=2),       # Karras et al. 2022, algorithms 1 and 2
    "dpmpp_2m": Facts(dpmpp_2m, 2),        # Lu et al. 2022 (DPM-Solver++), algorithm 2
    "dpmpp_2m_sde": Facts(dpmpp_2m_sde, 2, noisy=True),        # the same, SDE-DPM-Solver++(2M)
    "dpmpp_3m_sde": Facts(dpmpp_3m_sde, 2, noisy=True),        # the same, 3M but for a weight
    "unipc": Facts(unipc, 3),              # Zhao et al. 2023, UniPC-2 in data prediction
}
SAMPLERS = {name: facts.step for name, facts in TABLE.items()}
NOISY = frozenset(name for name, facts in TABLE.items() if facts.noisy)
Sampler = Literal[tuple(TABLE)]  # as the type of a knob
