"""The noise schedule: the table of ᾱ_t, σ(t) and t(σ) between its entries, and a sampler's ladder.

Notation (Karras et al. 2022): x = z + σ·noise with σ² = (1−ᾱ)/ᾱ. The network of a
variance-preserving model (Ho et al. 2020) sees x/√(1+σ²) = √ᾱ·z + √(1−ᾱ)·noise.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

ZERO_SNR = 2.0**-24  # in place of an ᾱ of 0, so that σ stays finite (4096); diffusers has the same
LADDERS = ("leading", "trailing", "linspace", "karras", "logsigma", "ays")
Ladder = Literal[LADDERS]  # as the type of a knob
# Align Your Steps (Sabour et al. 2024): the ten best steps of SD 1.5, found by optimisation
AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


class Schedule:
    """A float64 CPU table of ᾱ; never a Module, for `.half()` would merge its levels.

    `sigma` and `t` are inverse to each other: log σ is piecewise linear in t and exact at
    t = 0 … T−1. A last ᾱ of 0 (zero terminal SNR) is held at 2⁻²⁴.
    """

    def __init__(self, alphas_cumprod: Tensor):
        table = torch.as_tensor(alphas_cumprod, device="cpu").double().clone()
        if table.ndim != 1 or len(table) < 2:
            raise ValueError("a table of ᾱ has one axis and two levels or more")
        if table[-1] == 0:
            table[-1] = min(ZERO_SNR, table[-2].item() / 2)
        if not ((table.diff() < 0).all() and table[-1] > 0 and table[0] < 1):
            raise ValueError("ᾱ must fall from below 1 to above 0, or to 0 in its last step alone")
        self.alphas_cumprod = table
        self.sigmas_table = ((1 - table) / table).sqrt()
        self._log = self.sigmas_table.log()

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012,
                      steps: int = 1000) -> "Schedule":
        """Stable Diffusion's: √β is linear (LDM says "linear", diffusers "scaled_linear")."""
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0))

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> "Schedule":
        """β is linear (Ho et al. 2020)."""
        return cls((1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0))

    @classmethod
    def cosine(cls, steps: int = 1000) -> "Schedule":
        """√ᾱ is a cosine from just above 0 on, β at most .999 (Nichol & Dhariwal 2021, eq. 17)."""
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
        f = (angle * torch.pi / 2).cos() ** 2
        return cls((f[1:] / f[:-1]).clamp(min=1e-3).cumprod(0))

    def shifted(self, factor: float) -> "Schedule":
        """σ of every level times `factor`: where an image has 1/factor of the cells a side, it then
        loses its coarse shapes at the same t (Hoogeboom et al. 2023, section 3.1)."""
        return type(self)(1 / (1 + (factor * self.sigmas_table) ** 2))

    def to_zero_snr(self) -> "Schedule":
        """√ᾱ shifted and scaled so that its first stays and its last is 0 (Lin et al. 2024)."""
        root = self.alphas_cumprod.sqrt()
        return type(self)(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)

    @property
    def zero_snr(self) -> bool:
        """Does it end in pure noise? eps tells nothing about the image there; v and x0 do."""
        return self.alphas_cumprod[-1].item() <= ZERO_SNR

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def sigma(self, t: Tensor | float) -> Tensor:
        """σ at timestep t (any shape, fractional allowed); float64 on the CPU."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu").clamp(0, len(self) - 1)
        low = t.floor().long()
        high = (low + 1).clamp(max=len(self) - 1)
        log = torch.lerp(self._log[low], self._log[high], t - low)
        return torch.where(t == low, self.sigmas_table[low], log.exp())

    def t(self, sigma: Tensor | float) -> Tensor:
        """The timestep at which σ(t) = sigma, clamped to the table; float64 on the CPU."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        high = torch.searchsorted(self.sigmas_table, sigma.contiguous()).clamp(1, len(self) - 1)
        low = high - 1
        w = (sigma.log() - self._log[low]) / (self._log[high] - self._log[low])
        t = low + w.clamp(0, 1)
        in_table = self.sigmas_table[high] == sigma  # the logarithm may miss it by one ulp
        return torch.where(in_table, high.double(), t)

    def timesteps(self, n: int, spacing: str = "leading") -> Tensor:
        """n descending timesteps, leading, trailing or linspace, as diffusers names them.

        Stable Diffusion's own is leading with offset 1. A half is rounded to even; diffusers'
        floats may drift to the other neighbour. linspace ends at t = 0: its last step, to σ(0), has
        no length; it costs a call of the network and changes nothing.
        """
        T = len(self)
        assert 1 <= n <= T, f"steps must lie in 1 … {T}"
        if spacing == "leading":
            # steps_offset 1, unless the last step leaves no room for it
            offset = min(1, T - 1 - (n - 1) * (T // n))
            return (torch.arange(n) * (T // n)).flip(0).double() + offset
        if spacing == "trailing":
            return (T - torch.arange(n, dtype=torch.float64) * T / n).round() - 1
        return torch.linspace(T - 1, 0, n, dtype=torch.float64).round()

    def sigmas(self, timesteps: Tensor | Sequence[float], end: float | None = None) -> Tensor:
        """Descending σ at these timesteps, then `end`: (n+1,). SD ends at σ(0), not at 0."""
        last = torch.as_tensor(self.sigmas_table[0].item() if end is None else end,
                               dtype=torch.float64)
        return torch.cat([self.sigma(torch.as_tensor(timesteps)), last[None]])

    def ladder(self, n: int, spacing: str = "trailing") -> Tensor:
        """n+1 descending σ from near σ(T−1) to σ(0), spaced by timesteps, karras, logsigma or ays.

        karras (Karras et al. 2022, eq. 5, ρ = 7), logsigma and ays begin at σ(T−1) itself. ays is
        AYS, interpolated in log σ, and what lies outside the schedule is left out. diffusers'
        `use_karras_sigmas` and `use_exponential_sigmas` of n steps are our n−1 steps and one more,
        to σ = 0.
        """
        if spacing not in LADDERS:
            raise ValueError(f"ladder {spacing!r} is not one of {', '.join(LADDERS)}")
        high, low = self.sigmas_table[-1], self.sigmas_table[0]
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        if spacing == "karras":
            return (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        if spacing == "logsigma":
            return torch.exp(high.log() + u * (low.log() - high.log()))
        if spacing == "ays":
            inner = [s for s in AYS[1:-1] if low < s < high]
            known = torch.tensor([high, *inner, low], dtype=torch.float64).log()
            at = u * (len(known) - 1)
            left = at.long().clamp(max=len(known) - 2)
            return torch.lerp(known[left], known[left + 1], at - left).exp()
        return self.sigmas(self.timesteps(n, spacing))


SCHEDULES = {"scaled-linear": Schedule.scaled_linear, "linear": Schedule.linear,
             "cosine": Schedule.cosine,
             "zero-snr": lambda: Schedule.scaled_linear().to_zero_snr()}
ScheduleName = Literal[tuple(SCHEDULES)]
