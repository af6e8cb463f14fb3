"""Validation during training: the loss at fixed times and noise, and the gap that shows copying.

The training loss of a step is mostly the luck of its times. Here every measurement uses the same
times and the same noise, so that two steps, two runs and two sets of images can be compared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import distributed
from minidiff.counted import VALIDATE, normal, order, stratified
from minidiff.diffusion.denoiser import Denoiser
from minidiff.overlap import send
from minidiff.variables import Labels

AT_MOST = 512       # slots of a probe: enough for the gap's interval, seconds on a GPU
FEWEST = 16         # slots below which no gap is called open
OPEN = 0.1          # the gap's lower bound above which the model copies


@dataclass(frozen=True, eq=False)
class Probe:
    """n slots that stay the same; slot i of two probes of one size has the same t and noise."""

    z: Tensor           # (n, 4, h, w)
    labels: Labels      # (n,) each
    t: Tensor           # (n,) int64
    noise: Tensor       # (n, 4, h, w)

    @classmethod
    def of(cls, latents: Tensor, labels: Labels, n: int, levels: int) -> "Probe":
        """n slots, filled in a fixed random order by the images (N, 4, h, w), once or in turns."""
        index = torch.tensor(order(len(latents), 0, range(n)), dtype=torch.long)
        return cls(latents[index].float(), {k: v[index] for k, v in labels.items()},
                   (stratified(0, 0, n) * levels).long(),
                   normal(0, range(n), VALIDATE, latents.shape[1:]) if n else latents[:0])

    @torch.no_grad()
    def losses(self, denoiser: Denoiser, autocast: Callable, device: torch.device, batch: int,
               min_snr: float) -> Tensor:
        """Loss of each slot, (n,), on the CPU."""
        losses = [torch.empty(0, device=device)]
        for part in torch.arange(len(self.t)).split(batch):
            z, noise, labels = (send(self.z[part], device), send(self.noise[part], device),
                                {k: send(v[part], device) for k, v in self.labels.items()})
            with autocast():
                losses.append(denoiser.loss(z, self.t[part], noise, labels, min_snr).float())
        return torch.cat(losses).cpu()


def by_quarter(losses: Tensor, t: Tensor, levels: int,
               name: str = "loss") -> dict[str, float | None]:
    """Mean loss in each quarter of t, from little noise (t0) to much (t3)."""
    parts = [losses[4 * t // levels == q] for q in range(4)]
    return {f"{name}_t{q}": part.mean().item() if len(part) else None
            for q, part in enumerate(parts)}


def gap(train: Tensor, held_out: Tensor) -> dict[str, float]:
    """The memorisation gap: the share by which held-out images lose more, and its 95 % lower bound.

    train and held_out (n,) are losses of paired slots (same t, same noise). A model that knows its
    images by heart denoises them better than those it never saw. The mean is that of the ratio's
    logarithm: times differ in loss by orders of magnitude, which cancel in the pairs.
    """
    ratio = (held_out.double().clamp(min=1e-12) / train.double().clamp(min=1e-12)).log()
    error = ratio.std().item() / len(ratio) ** 0.5 if len(ratio) > 1 else math.inf
    mean = ratio.mean().item()
    return {"gap": math.expm1(mean), "gap_low": math.expm1(mean - 1.645 * error)}


def validate(averaged: Denoiser, probes: Sequence[Probe], autocast: Callable,
             device: torch.device, batch: int, min_snr: float) -> dict[str, float | None]:
    """Held-out loss, also by quarter of t, and the gap; warns when the model begins to copy."""
    train, held_out = (probe.losses(averaged, autocast, device, batch, min_snr) for probe in probes)
    if not len(held_out):
        return {"val_loss": None}
    found = gap(train, held_out)
    if is_open(found, len(held_out)) and not distributed.rank():
        tqdm.write(f"WARNING: the model has begun to copy: its loss on held-out images is "
                   f"{found['gap']:.0%} above that on its training images; stop earlier, take "
                   "best/, or train fewer weights (--train lora)")
    return {"val_loss": held_out.mean().item(), **found,
            **by_quarter(held_out, probes[1].t, len(averaged.schedule), "val_loss")}


def is_open(gap: dict[str, float], n: int) -> bool:
    """Has the model begun to copy? A plain threshold, for a plain warning."""
    return n >= FEWEST and gap["gap_low"] > OPEN
