"""An exponential moving average of a model's weights: it, not the last iterate, is what is
sampled.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from minidiff.distributed import assign, local


class EMA:
    """θ_ema ← d·θ_ema + (1−d)·θ, with d = min(1 − 1/horizon, (1+step)/(10+step)).

    `horizon` is the averaging time in steps; a tenth of the run's length lets even a short run
    forget its start (an average longer than the run samples noise). The second term is the usual
    warm-up. Frozen parameters are shared with the model, not copied.
    """

    def __init__(self, model: nn.Module, horizon: float):
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self.horizon = max(1.0, horizon)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(1 - 1 / self.horizon, (1 + step) / (10 + step))
        theirs = dict(model.named_parameters())
        torch._foreach_lerp_(local(self.state_dict().values()),
                             local(theirs[n] for n in self.names), 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        mine = dict(self.model.named_parameters())
        return {name: mine[name] for name in self.names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_named(self.state_dict(), state)


class Trained:
    """What training changes of a module, its parameters with gradients: the rest comes from where
    the run began.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_named(self.state_dict(), state)


def load_named(mine: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy tensors by name, strictly; ValueError names what does not fit."""
    odd = sorted(mine.keys() ^ state.keys())
    odd += [f"{name} {tuple(state[name].shape)} for {tuple(parameter.shape)}"
            for name, parameter in mine.items()
            if name in state and state[name].shape != parameter.shape]
    if odd:
        raise ValueError(f"{len(odd)} parameters do not fit: {', '.join(odd[:5])}")
    for name, parameter in mine.items():
        assign(parameter, state[name])
