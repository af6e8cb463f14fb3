"""The optimiser of both stages, and its learning rates."""

import math

import torch
from torch import nn


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
