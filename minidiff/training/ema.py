"""An exponential moving average of a model's weights: it, not the last iterate, is what is sampled."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """θ_ema ← d·θ_ema + (1−d)·θ, with d = min(1 − 1/horizon, (1+step)/(10+step)).

    `horizon` is the averaging time in steps; a tenth of the run's length lets even a short run forget its start
    (an average longer than the run samples noise). The second term is the usual warm-up.
    """

    def __init__(self, model: nn.Module, horizon: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.horizon = max(1.0, horizon)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(1 - 1 / self.horizon, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
