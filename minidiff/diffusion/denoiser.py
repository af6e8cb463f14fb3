"""eps, v and x0: the only place that knows these three words.

Every network F is used as one denoiser D, an estimate of the clean z in x = z + σ·noise (Karras et
al. 2022, eq. 7):

    D(x; σ) = c_skip·x + c_out·F(c_in·x; t(σ)),    c_in = 1/√(1+σ²)

    prediction   c_skip     c_out         F is trained towards           source
    eps          1          −σ            noise                          Ho et al. 2020
    v            1/(1+σ²)   −σ/√(1+σ²)    √ᾱ·noise − √(1−ᾱ)·z           Salimans & Ho 2022
    x0           0          1             z                              Ho et al. 2020
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minidiff.diffusion.schedule import Schedule
from minidiff.overlap import send
from minidiff.variables import Labels

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> denoised
Prediction = Literal["eps", "v", "x0"]

COEFFICIENTS: dict[str, Callable] = {  # σ → c_skip, c_out
    "eps": lambda s: (torch.ones_like(s), -s),
    "v": lambda s: (1 / (1 + s**2), -s / (1 + s**2).sqrt()),
    "x0": lambda s: (torch.zeros_like(s), torch.ones_like(s)),
}
TARGETS: dict[str, Callable] = {  # z, noise, √ᾱ, √(1−ᾱ) → what F should give
    "eps": lambda z, noise, a, b: noise,
    "v": lambda z, noise, a, b: a * noise - b * z,
    "x0": lambda z, noise, a, b: z,
}
# min-SNR-γ (Hang et al. 2023, section 3.4): snr, γ → weight of |F − target|²
LOSS_WEIGHTS: dict[str, Callable] = {
    "eps": lambda snr, gamma: snr.clamp(max=gamma) / snr,
    "v": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "x0": lambda snr, gamma: snr.clamp(max=gamma),
}


@dataclass(frozen=True, eq=False)
class Denoiser:
    """D(x; σ) of any `net(x_in, t, labels) -> F`: a Model, DDP of one, its EMA, a formula."""

    net: Callable[[Tensor, Tensor, Any], Tensor]
    schedule: Schedule
    prediction: Prediction = "eps"

    def __post_init__(self):
        if self.prediction not in COEFFICIENTS:
            raise ValueError(f"prediction {self.prediction!r} is not one of "
                             f"{', '.join(COEFFICIENTS)}")

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Labels | None = None) -> Tensor:
        """The estimate of z in x (N, C, h, w) at sigma, a number or (N,); float32 or better.

        One level for all of them stays on the CPU: its factors go to the kernels as plain numbers.
        """
        sigma, x = _levels(sigma), x.to(_wide(x))
        t = self.schedule.t(sigma)
        t = (t.to(x.device, torch.float32) if t.ndim else
             torch.full((len(x),), t.item(), dtype=torch.float32, device=x.device))
        s = _column(sigma, x)
        c_skip, c_out = COEFFICIENTS[self.prediction](s)
        return c_skip * x + c_out * self.net(x / (1 + s**2).sqrt(), t, labels).to(s.dtype)

    def kept(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """c_skip·x: D(x; σ) without the part of the network's output F."""
        c_skip, _ = COEFFICIENTS[self.prediction](_column(_levels(sigma), x))
        return c_skip * x.to(_wide(x))

    def loss(self, z: Tensor, t: Tensor, noise: Tensor, labels: Labels | None = None,
             min_snr: float = 0.0) -> Tensor:
        """Mean squared error of F per image, (N,); z and noise (N, C, h, w), t (N,) on the CPU.

        t and noise are arguments: nothing random happens here. The forward process runs in float32
        or better under any autocast. min_snr is the γ of the min-SNR weights, 0 for none.
        """
        alpha_bar = 1 / (1 + self.schedule.sigma(t) ** 2)
        snr = alpha_bar / (1 - alpha_bar)
        weight = LOSS_WEIGHTS[self.prediction](snr, min_snr) if min_snr else torch.ones_like(snr)
        # sent together and before the network runs: a later one would wait behind it
        numbers = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), weight, t.to(snr.dtype)])
        a, b, weight, t = send(numbers.to(_wide(z)), z.device)
        a, b = a[:, None, None, None], b[:, None, None, None]
        z, noise = z.to(a.dtype), noise.to(a.dtype)
        F = self.net(a * z + b * noise, t.float(), labels).to(a.dtype)
        error = (F - TARGETS[self.prediction](z, noise, a, b)).square().flatten(1).mean(1)
        return error * weight


def _levels(sigma: Tensor | float) -> Tensor:
    """A number or (N,), float64 on the CPU."""
    return torch.as_tensor(sigma, dtype=torch.float64, device="cpu")


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(N,) on the CPU → (N, 1, 1, 1) on the device of `like`, in its dtype or float32; a single
    number stays on the CPU."""
    values = values.to(_wide(like))
    return values.to(like.device)[:, None, None, None] if values.ndim else values
