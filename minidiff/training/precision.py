"""Mixed precision and the optimiser step: autocast, loss scaling, clipping, finite checks.

Master weights, EMA and the forward process stay float32; autocast lowers the matrix products inside
the network. bf16 has float32's range and needs no scaler; fp16 underflows without one (Micikevicius
et al. 2018). `fp32` is float32 throughout; `tf32` lets a GPU's matrix products round their inputs
to 10 bits of mantissa, and so do bf16 and fp16 for what they leave in float32.

A GPU works behind the program that feeds it, unless that asks for a value. So a step asks once, at
its end: `update` decides on the device whether it is taken, and `read` brings the flags over along
with the losses.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import distributed
from minidiff.errors import TrainingFault

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}
PATIENCE = 3  # non-finite steps in a row that end the run


class Precision:
    """Precision and device of a run; its state (loss scale, skipped steps) is saved.

    auto is bf16 on a GPU that has it natively, else fp16 or, where `fp16` is not allowed, fp32; and
    fp32 on the CPU. The process's flags for CUDA are set here and nowhere else.
    """

    def __init__(self, name: PrecisionName = "auto", device: torch.device | str = "cpu", *,
                 fp16: bool = True, deterministic: bool = False):
        self.device = torch.device(device)
        if name == "auto" and self.device.type != "cpu":
            native = self.device.type != "cuda" or torch.cuda.is_bf16_supported(
                including_emulation=False)
            name = "bf16" if native else "fp16" if fp16 else "fp32"
        self.name = "fp32" if name == "auto" else name
        self.dtype = DTYPES[self.name]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
        self.skipped = self.in_a_row = 0
        self.norm = 0.0             # of the last gradient, before clipping
        self.losses: Tensor | float = 0.0  # sum since the last step: finite if all of them are
        self.flags = torch.zeros(3)  # norm, is it finite, are the losses; on the device
        self.deterministic = deterministic
        if self.device.type == "cuda":
            set_cuda_flags(self.name != "fp32", deterministic)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def facts(self) -> dict[str, Any]:
        """What a run or a folder of samples records, and what another precision must not resume."""
        return {"precision": self.name, **({"deterministic": True} if self.deterministic else {})}

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, scaled so that fp16 does not underflow."""
        self.losses = self.losses + loss.detach()
        self.scaler.scale(loss).backward()

    def update(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter],
               clip: float) -> None:
        """Unscale and clip the gradients, step, clear them; waits for nothing.

        A step whose loss or gradient is not finite changes no weight and no moment: the fused
        kernel looks at `found_inf`, as it does for a GradScaler.
        """
        assert optimizer.defaults["fused"], "the other kernels do not look at found_inf"
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(list(parameters), clip, foreach=True)
        norm = distributed.whole(norm).detach().float()
        finite = distributed.least(torch.stack([norm.isfinite(), self.losses.isfinite()]).float())
        optimizer.found_inf = 1 - finite.amin()
        optimizer.step()
        del optimizer.found_inf
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.flags, self.losses = torch.cat([norm.reshape(1), finite]), 0.0

    def read(self, values: Tensor, batch: str = "") -> Tensor:
        """(k,) values of this step on the CPU, float32: the one time that a step waits.

        A step that was skipped is counted, and its `batch` is named on stderr. An fp16 overflow of
        a finite loss is no fault: the scaler halves its scale. Raises TrainingFault after three
        faults in a row.
        """
        everything = torch.cat([values.detach().float(), self.flags.to(values.device)]).cpu()
        self.norm, finite_norm, finite_loss = everything[-3:].tolist()
        taken = finite_norm and finite_loss
        overflow = self.scaler.is_enabled() and finite_loss
        self.skipped += not taken
        self.in_a_row = 0 if taken or overflow else self.in_a_row + 1
        if self.in_a_row:
            what = "gradient" if finite_loss else "loss"
            tqdm.write(f"step skipped, its {what} is not finite; the batch: {batch}", sys.stderr)
        if self.in_a_row == PATIENCE:
            raise TrainingFault(f"{PATIENCE} steps in a row gave a non-finite loss or gradient; "
                                f"the last batch was {batch}")
        return everything[:-3]

    def state_dict(self) -> dict:
        return {"scaler": self.scaler.state_dict(), "skipped": self.skipped,
                "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def set_cuda_flags(tf32: bool, deterministic: bool) -> None:
    """How CUDA computes, for the whole process: rounding of products, choice of kernels.

    Deterministic kernels are slower, and cuDNN then may not time its kernels to choose among them.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:  # cuBLAS reads this when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def measure_exactly() -> None:
    """From here on no TF32 and no timed kernels, whatever the process did before: as evaluation
    computes, for the features of an image must not depend on what was sampled first."""
    set_cuda_flags(tf32=False, deterministic=False)
    torch.backends.cudnn.benchmark = False
