"""Averages of the weights of any width, chosen after training (Karras et al. 2024, EDM2, section 3
and appendix C).

A power-function average weighs the weights of step τ ≤ t by p(τ) = (γ+1)·τ^γ / t^(γ+1): the same
shape at every t, whose standard deviation is the share `width` of the run. A run keeps two of them
(`WIDTHS`) beside its snapshots; any other profile is the sum of those that were kept which differs
least from it in the integral of squares, and the weights are the same sum of weights.
"""

from collections.abc import Sequence

import numpy as np
from torch import nn

from minidiff.training.optim import EMA

WIDTHS = (0.05, 0.10)  # what is kept: EDM2's
NARROWEST = 0.02       # a narrower one cannot be put together from them …
FARTHEST = 0.2         # … nor one from which the nearest sum differs by a larger share
WIDEST = 0.25          # near the limit .289 of γ = 0, where all steps weigh the same


def gamma(width: float) -> float:
    """γ of a profile whose standard deviation is this share of the run; below .289."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


class PowerEMA(EMA):
    """θ ← β·θ_ema + (1−β)·θ with β = (1 − 1/t)^(γ+1), t = step + 1."""

    def __init__(self, model: nn.Module, width: float):
        super().__init__(model, 1)
        self.power = gamma(width) + 1

    def decay(self, step: int) -> float:
        return (1 - 1 / (step + 1)) ** self.power


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """∫ p_a(τ)·p_b(τ) dτ of two profiles (t, γ)."""
    (t, g), (u, h) = a, b
    m = min(t, u)
    return (g + 1) * (h + 1) / (g + h + 1) * (m / t) ** (g + 1) * (m / u) ** (h + 1) / m


def mixture(kept: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> tuple[
        np.ndarray, float]:
    """Weights of the kept profiles (t, γ) in the sum next to the wanted one, and by how much it
    differs: √∫(difference)² over √∫(wanted)²."""
    gram = np.array([[overlap(a, b) for b in kept] for a in kept])
    right = np.array([overlap(a, wanted) for a in kept])
    scale = 1 / np.sqrt(np.diag(gram))  # early profiles are tall: solve for those of norm 1
    weights = scale * np.linalg.lstsq(gram * np.outer(scale, scale), right * scale, rcond=1e-13)[0]
    left = overlap(wanted, wanted) - 2 * weights @ right + weights @ gram @ weights
    return weights, float(np.sqrt(max(left, 0) / overlap(wanted, wanted)))
