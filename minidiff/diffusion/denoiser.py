"""eps, v, x0 and flow: the only place that knows these four words.

Every network F is used as one denoiser D, an estimate of the clean z in x = z + σ·noise (Karras et
al. 2022, eq. 7):

    D(x; σ) = c_skip·x + c_out·F(c_in·x; t(σ))

    prediction   c_in        c_skip      c_out        t(σ)         F is trained towards
    eps          1/√(1+σ²)   1           −σ           schedule's   noise
    v            1/√(1+σ²)   1/(1+σ²)    −σ/√(1+σ²)   schedule's   √ᾱ·noise − √(1−ᾱ)·z
    x0           1/√(1+σ²)   0           1            schedule's   z
    flow         1/(1+σ)     1/(1+σ)     −σ/(1+σ)     T·σ/(1+σ)    noise − z

Sources: eps and x0 Ho et al. 2020, v Salimans & Ho 2022; flow: rectified flow, Liu et al. 2023, in
the time of Esser et al. 2024, where c_in·x = (1−s)·z + s·noise, s = σ/(1+σ). v with weight 1 is the
network and the loss of EDM (Karras et al. 2022) for data of standard deviation 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError
from minidiff.overlap import send
from minidiff.variables import Labels

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> denoised
Prediction = Literal["eps", "v", "x0", "flow"]


class Row(NamedTuple):
    """Of σ, a tensor of any shape; `target` of z, noise, and what c_in·x has of them, a and b."""

    over: Callable    # 1/c_in
    c_skip: Callable
    c_out: Callable
    t: Callable       # and of the schedule
    target: Callable


def _preserving(s: Tensor) -> Tensor:
    return (1 + s**2).sqrt()


def _of_schedule(s: Tensor, schedule: Schedule) -> Tensor:
    return schedule.t(s)


TABLE = {
    "eps": Row(_preserving, torch.ones_like, torch.neg, _of_schedule,
               lambda z, noise, a, b: noise),
    "v": Row(_preserving, lambda s: 1 / (1 + s**2), lambda s: -s / (1 + s**2).sqrt(), _of_schedule,
             lambda z, noise, a, b: a * noise - b * z),
    "x0": Row(_preserving, torch.zeros_like, torch.ones_like, _of_schedule,
              lambda z, noise, a, b: z),
    "flow": Row(lambda s: 1 + s, lambda s: 1 / (1 + s), lambda s: -s / (1 + s),
                lambda s, schedule: len(schedule) * s / (1 + s), lambda z, noise, a, b: noise - z),
}


@dataclass(frozen=True, eq=False)
class Denoiser:
    """D(x; σ) of any `net(x_in, t, labels) -> F`: a Model, DDP of one, its EMA, a formula."""

    net: Callable[[Tensor, Tensor, Any], Tensor]
    schedule: Schedule
    prediction: Prediction = "eps"

    def __post_init__(self):
        if self.prediction not in TABLE:
            raise ValueError(f"prediction {self.prediction!r} is not one of {', '.join(TABLE)}")

    @property
    def row(self) -> Row:
        return TABLE[self.prediction]

    def __call__(self, x: Tensor, sigma: Tensor | float, labels: Labels | None = None) -> Tensor:
        """The estimate of z in x (N, C, h, w) at sigma, a number or (N,); float32 or better.

        One level for all of them stays on the CPU: its factors go to the kernels as plain numbers.
        """
        sigma, x = _levels(sigma), x.to(_wide(x))
        t = self.row.t(sigma, self.schedule)
        t = (t.to(x.device, torch.float32) if t.ndim else
             torch.full((len(x),), t.item(), dtype=torch.float32, device=x.device))
        s = _column(sigma, x)
        out = self.net(x / self.row.over(s), t, labels).to(s.dtype)
        return self.row.c_skip(s) * x + self.row.c_out(s) * out

    def kept(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """c_skip·x: D(x; σ) without the part of the network's output F."""
        return self.row.c_skip(_column(_levels(sigma), x)) * x.to(_wide(x))

    def loss(self, z: Tensor, t: Tensor, noise: Tensor, labels: Labels | None = None,
             min_snr: float = 0.0, bands: Sequence[float] = (), *keep: Tensor) -> Tensor:
        """Mean squared error of F per image, (N,); z and noise (N, C, h, w), t (N,) on the CPU, of
        the schedule.

        t and noise are arguments: nothing random happens here. The forward process runs in float32
        or better under any autocast. min_snr is the γ of the min-SNR weights, min(1/σ², γ) of D's
        error (Hang et al. 2023, section 3.4), 0 for none. bands weigh the octaves of F's error, the
        finest first (see `octaves`); none: all alike. keep is the network's mask of dropout.
        """
        row, sigma = self.row, self.schedule.sigma(t)
        a = 1 / row.over(sigma)
        weight = (sigma**-2).clamp(max=min_snr) * row.c_out(sigma) ** 2 if min_snr else a**0
        # sent together and before the network runs: a later one would wait behind it
        numbers = torch.stack([a, sigma * a, weight, row.t(sigma, self.schedule)])
        a, b, weight, t = send(numbers.to(_wide(z)), z.device)
        a, b = a[:, None, None, None], b[:, None, None, None]
        z, noise = z.to(a.dtype), noise.to(a.dtype)
        out = self.net(a * z + b * noise, t.float(), labels, *keep).to(a.dtype)
        error = out - row.target(z, noise, a, b)
        if bands:
            error = sum(w**0.5 * part for w, part in zip(bands, octaves(error, len(bands))))
        return error.square().flatten(1).mean(1) * weight


def require_octaves(n: int, *sides: int) -> None:
    """InputError unless the sides of latents, in cells, are multiples of 2ⁿ⁻¹."""
    if any(side % 2 ** (n - 1) for side in sides):
        raise InputError(f"--bands has {n} octaves; latents of {' × '.join(map(str, sides))} cells "
                         f"would have to be multiples of {2 ** (n - 1)}")


def octaves(x: Tensor, n: int) -> list[Tensor]:
    """x (N, C, h, w) as a sum of n orthogonal parts, the finest first: what means over squares of
    1, 2, 4 … cells lose in the next step (Haar), and what is left. See `require_octaves`."""
    require_octaves(n, *x.shape[2:])
    means = [x] + [F.avg_pool2d(x, 2**k).repeat_interleave(2**k, 2).repeat_interleave(2**k, 3)
                   for k in range(1, n)]
    return [fine - coarse for fine, coarse in zip(means, means[1:])] + means[-1:]


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
