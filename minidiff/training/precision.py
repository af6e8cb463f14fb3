"""Mixed precision and the optimiser step: autocast, loss scaling, clipping, finite checks.

Master weights, EMA and the forward process stay float32; autocast lowers the matrix products inside
the network. bf16 has float32's range and needs no scaler; fp16 underflows without one (Micikevicius
et al. 2018).
"""

import math
import sys
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import distributed
from minidiff.errors import TrainingFault

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = 3  # non-finite steps in a row that end the run


class Precision:
    """Precision and device of a training run; its state (loss scale, skipped steps) is saved."""

    def __init__(self, name: PrecisionName = "auto", device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        if name == "auto" and self.device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        self.name = "fp32" if name == "auto" else name
        self.dtype = DTYPES[self.name]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
        self.skipped = self.in_a_row = 0
        self.finite = True  # all losses since the last step
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer,
             parameters: Iterable[nn.Parameter], clip: float, batch: str = "") -> float:
        """Backward and update: the optimiser step of a batch without micro-batches."""
        self.backward(loss)
        return self.update(optimizer, parameters, clip, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, scaled so that fp16 does not underflow."""
        self.finite &= math.isfinite(loss.item())
        self.scaler.scale(loss).backward()

    def update(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter],
               clip: float, batch: str = "") -> float:
        """Unscale and clip the gradients, step, clear them; returns their norm before clipping.

        A step whose loss or gradient is not finite is skipped and counted, and its `batch` is named
        on stderr. An fp16 overflow of a finite loss is no fault: the scaler halves its scale.
        Raises TrainingFault after three faults in a row.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(list(parameters), clip, foreach=True)
        norm = distributed.whole(norm).item()
        finite = not distributed.any_rank(not self.finite)
        taken = finite and math.isfinite(norm)
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
