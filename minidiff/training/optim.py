"""The optimiser of both stages, its learning rates, the trained weights and their average."""

import copy
import math

import torch
from torch import Tensor, nn

from minidiff.distributed import assign, local_shard


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def adamw(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) of the trainable parameters."""
    return torch.optim.AdamW(trainable(module), lr=lr, betas=(0.9, 0.99),
                             weight_decay=weight_decay, fused=True)


def constant(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate of this step: linear warm-up, then constant."""
    return lr * min(1.0, (step + 1) / max(1, warmup))


def cosine(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate of this step: linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return constant(step, steps, lr, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


SCHEDULES = {"cosine": cosine, "constant": constant}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


class Trained:
    """The trainable parameters of a model, by name; all others are as they were at step 0."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy tensors by name; ValueError lists the names and shapes that do not fit."""
        own = self.state_dict()
        misfits = sorted(own.keys() ^ state.keys())
        misfits += [f"{name} {tuple(state[name].shape)} for {tuple(parameter.shape)}"
                    for name, parameter in own.items()
                    if name in state and state[name].shape != parameter.shape]
        if misfits:
            raise ValueError(f"{len(misfits)} parameters do not fit: {', '.join(misfits[:5])}")
        for name, parameter in own.items():
            assign(parameter, state[name])


class EMA(Trained):
    """An exponential moving average of the weights: samples are drawn with it.

    θ_ema ← d·θ_ema + (1−d)·θ, with d = min(1 − 1/horizon, (1+step)/(10+step)). `horizon` is the
    averaging time in steps; a tenth of the run lets even a short run forget its start (a longer
    average samples noise). The second term is the usual warm-up. `model` is a copy that shares the
    frozen parameters.
    """

    def __init__(self, model: nn.Module, horizon: float):
        super().__init__(model)
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self.horizon = max(1.0, horizon)
        self.pairs: tuple | None = None  # the model last averaged, the averages and its weights

    def decay(self, step: int) -> float:
        return min(1 - 1 / self.horizon, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = self.decay(step)
        if self.pairs is None or self.pairs[0] is not model:  # to look them up takes milliseconds
            new = dict(model.named_parameters())
            self.pairs = (model, [*self.state_dict().values()], [new[name] for name in self.names])
        _, averages, weights = self.pairs
        torch._foreach_lerp_([*map(local_shard, averages)], [*map(local_shard, weights)], 1 - decay)
