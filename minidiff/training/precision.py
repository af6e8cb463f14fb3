"""Mixed precision and the optimiser step: autocast, loss scaling, clipping, finite checks.

Master weights, EMA and the forward process stay float32; autocast lowers the matrix products inside
the network. bf16 has float32's range and needs no scaler; fp16 underflows without one (Micikevicius
et al. 2018).
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import distributed
from minidiff.errors import InputError, TrainingFault

Name = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 3  # non-finite steps in a row that end the run
# glibc's names of two limits of its allocator, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (mallopt(3))
TRIM, MMAP = -1, -3


class Precision:
    """The precision of one training run on one device; its state (the loss scale, the skips)
    belongs to a checkpoint.
    """

    def __init__(self, name: Name = "auto", device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        if name == "auto":
            gpu = self.device.type == "cuda"
            name = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if gpu else "fp32"
        self.name, self.dtype = name, DTYPES[name]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=name == "fp16")
        self.skipped = self.in_a_row = 0
        self.finite = True  # all losses since the last step
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer,
             parameters: Iterable[nn.Parameter], clip: float, batch: str = "") -> float:
        """Backward and update: the optimiser step of a batch that is computed in one piece."""
        self.backward(loss)
        return self.update(optimizer, parameters, clip, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled against fp16's underflow, to those of the
        micro-batches before it.
        """
        self.finite &= math.isfinite(loss.item())
        self.scaler.scale(loss).backward()

    def update(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter],
               clip: float, batch: str = "") -> float:
        """Unscale, clip to norm `clip`, step and clear the gradients; returns the norm before
        clipping.

        A step whose loss or gradient is not finite is skipped, counted and named on stderr by its
        `batch`: the weights stay as they are. An fp16 overflow of a finite loss is the scaler's to
        mend (it halves the scale), not a fault. Raises TrainingFault after three faults in a row.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(list(parameters), clip, foreach=True)
        norm = distributed.full(norm).item()
        finite = not distributed.anywhere(not self.finite)
        taken = math.isfinite(norm) and finite
        if taken:
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.finite = True
        overflow = self.scaler.is_enabled() and finite
        self.skipped += not taken
        self.in_a_row = 0 if taken or overflow else self.in_a_row + 1
        if self.in_a_row:
            tqdm.write(f"step skipped, its {'gradient' if finite else 'loss'} is not finite; the "
                       f"batch: {batch}", sys.stderr)
        if self.in_a_row == PATIENCE:
            raise TrainingFault(f"{PATIENCE} steps in a row gave a non-finite loss or gradient; "
                                f"the last batch was {batch}")
        return norm

    def state_dict(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped,
                "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def cosine(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate of this step: linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return constant(step, steps, lr, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def constant(step: int, steps: int, lr: float, warmup: int) -> float:
    """Learning rate of this step: linear warm-up, then the same."""
    return lr * min(1.0, (step + 1) / max(1, warmup))


SCHEDULES = {"cosine": cosine, "constant": constant}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def keep_memory() -> None:
    """Let the C library keep the memory that tensors free; without glibc, nothing happens.

    Else each large tensor's pages go back to the system and are fetched and zeroed anew for the
    next one: a third of the time of a UNet call at SD 1.5's size on a CPU (`benchmarks/sample.py`,
    "as it comes").
    """
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP, 2**30)
        libc.mallopt(TRIM, 2**31 - 1)


def pick_device(name: str = "auto") -> torch.device:
    """auto: the GPU if there is one (under torchrun, the one of this rank), else the CPU, which
    then keeps its memory.
    """
    keep_memory()
    if name == "auto":
        return torch.device(
            "cuda", distributed.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} is not here; CUDA devices found: "
                         f"{torch.cuda.device_count()}") from None
    return device
