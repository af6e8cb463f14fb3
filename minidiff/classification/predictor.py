"""One network that reads label, sex, age, view … off an image: classifier, regressor and feature extractor in one.

    uint8 (N,C,S,S) ─ grey ─▶ (N,1,S,S) in [-1,1] ─ standardise ─ ResNet ─▶ features (N,8·width) ─ fc ─▶ one block a variable

A Category has one logit for each of its values, a Number one output in standard deviations from its training mean.
A cell that is unknown has no part in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.classification.resnet import ResNet
from minidiff.counted import AUGMENT, generators, order
from minidiff.data import dataset
from minidiff.errors import InputError
from minidiff.runs import read_json, write_atomic, write_json
from minidiff.training.precision import Precision, cosine
from minidiff.variables import Category, Labels, Variable, from_json, to_json

# ImageNet's mean and deviation, averaged over the colours, on the scale of [-1,1]: the input torchvision's weights know.
MEAN, STD = 2 * 0.449 - 1, 2 * 0.226
DECAY, CLIP = 0.05, 5.0  # weight decay of AdamW; gradient norm, reached in the first steps only


class Predictor(nn.Module):
    """ResNet with one block of outputs for each variable; images of another size are resized to `size`."""

    def __init__(self, variables: Sequence[Variable], *, width: int = 16, size: int = 64, seed: int = 0):
        super().__init__()
        self.variables, self.width, self.size = list(variables), width, size
        self.outputs = {v.name: len(v.values) if isinstance(v, Category) else 1 for v in self.variables}
        self.net = ResNet(sum(self.outputs.values()), width=width, seed=seed)
        self.to(memory_format=torch.channels_last).eval()  # faster on a CPU, and the format decides the last bit

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Grey images (N,1,S,S) in [-1,1] → logits (N,k) of a Category, standardised value (N,) of a Number."""
        blocks = self.net((x - MEAN) / STD).split(list(self.outputs.values()), 1)
        return {v.name: y if isinstance(v, Category) else y[:, 0] for v, y in zip(self.variables, blocks)}

    def predict(self, images: Tensor, batch: int = 256) -> dict[str, Tensor]:
        """uint8 (N,C,H,W) → probabilities (N,k) of a Category, value (N,) of a Number in its own unit; float32, CPU."""
        out = self._in_batches(self, images, batch)
        columns = {v: torch.cat([o[v.name] for o in out]).float().cpu() for v in self.variables}
        return {v.name: y.softmax(1) if isinstance(v, Category) else y * v.std + v.mean for v, y in columns.items()}

    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        """uint8 (N,C,H,W) → what the last layer reads, float32 (N, 8·width), CPU."""
        return torch.cat(self._in_batches(lambda x: self.net.features((x - MEAN) / STD), images, batch)).float().cpu()

    @torch.no_grad()
    def _in_batches(self, function: Callable, images: Tensor, batch: int) -> list:
        mode, device = self.training, next(self.parameters()).device
        self.eval()
        out = [function(prepare(chunk, self.size).to(device)) for chunk in images.split(batch)]
        self.train(mode)
        return out

    def save(self, folder: str | Path) -> None:
        """Writes predictor.safetensors and predictor.json, each whole or not at all."""
        weights = {k: x.detach().cpu().contiguous() for k, x in self.net.state_dict().items()}
        write_json(Path(folder) / "predictor.json",
                   {"variables": to_json(self.variables), "width": self.width, "size": self.size})
        write_atomic(Path(folder) / "predictor.safetensors", safetensors.torch.save(weights))

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """The predictor that `save` wrote to this folder, on the CPU; InputError where there is none or half of one."""
        folder = Path(folder)
        for name in ("predictor.json", "predictor.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no predictor: {name} is missing")
        try:
            form = read_json(folder / "predictor.json")
            weights = safetensors.torch.load_file(folder / "predictor.safetensors")
            predictor = cls(from_json(form["variables"]), width=form["width"], size=form["size"])
            predictor.net.load_state_dict(weights)
        except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(f"{folder} holds no whole predictor: {str(error).splitlines()[0]}") from None
        return predictor


def grey(images: Tensor) -> Tensor:
    """uint8 (N,C,H,W) → uint8 (N,1,H,W), the mean of the channels; of equal channels that is the first."""
    if images.shape[1] == 1 or images.stride(1) == 0:  # an `.expand`ed grey image holds one channel
        return images[:, :1]
    parts = images.split(256)  # a whole data set as floats would take four times its memory
    return torch.cat([part.float().mean(1, keepdim=True).round().to(torch.uint8) for part in parts])


def prepare(images: Tensor, size: int) -> Tensor:
    """uint8 (N,C,H,W) → grey float32 (N,1,size,size) in [-1,1]."""
    x = dataset.to_float(grey(images))
    return x if x.shape[2:] == (size, size) else F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def loss(variables: Sequence[Variable], out: Mapping[str, Tensor], labels: Labels,
         weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Sum over variables of the mean over known cells: cross entropy, or squared error in standard deviations.

    `weights` may give the classes of a Category different weights, (k,); an unknown or null cell has none.
    """
    total = torch.zeros((), device=next(iter(out.values())).device)
    for v in variables:
        y, target = out[v.name].float(), labels[v.name].to(out[v.name].device)
        if isinstance(v, Category):
            known = target >= 0
            target = target.clamp(min=0)
            each = F.cross_entropy(y, target, reduction="none")
            known = known.float() * (weights[v.name].to(y)[target] if weights and v.name in weights else 1.0)
        else:
            known = target.isfinite().float()
            target = (target.nan_to_num(v.mean, v.mean, v.mean) - v.mean) / v.std  # masked before the difference:
            each = (y - target).square()                                          # 0 · NaN would still be NaN
        total = total + (each * known).sum() / known.sum().clamp(min=1e-8)
    return total


def balance(variable: Category, labels: Labels) -> Tensor:
    """Class weights (k,) with which every class weighs the same, however many images it has; mean 1 over images."""
    cells = labels[variable.name]
    counts = torch.bincount(cells[cells >= 0], minlength=len(variable.values)).float()
    return torch.where(counts > 0, counts.sum() / counts.clamp(min=1) / (counts > 0).sum(), 0.0)


def fit(predictor: Predictor, images: Tensor, labels: Labels, *, steps: int, batch: int = 64, lr: float = 3e-3,
        seed: int = 0, augment: bool = True, weights: Mapping[str, Tensor] | None = None, progress: str = "",
        precision: str = "auto") -> list[dict]:
    """Trains in place for a fixed number of steps on uint8 images (N,C,S,S); returns a log of step, loss and lr.

    AdamW with a rate that rises linearly and falls as a cosine. Order and augmentation are counted from (seed, slot),
    so equal calls on a CPU give equal weights. `weights` are those of `loss`. `progress` is the text of the bar, ""
    for none. `precision` auto is bf16 (or fp16) on a GPU and fp32 on a CPU.
    """
    if len(images) == 0:
        raise InputError("no images to train the classifier on")
    images, device = grey(images), next(predictor.parameters()).device
    amp = Precision(precision, device)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=DECAY)
    predictor.train()
    log, bar = [], tqdm(range(steps), desc=progress, unit="step", disable=not progress, dynamic_ncols=True)
    for step in bar:
        slots = range(step * batch, (step + 1) * batch)
        rows = torch.tensor(order(len(images), seed, slots))
        x = prepare(images[rows], predictor.size)
        if augment:
            x = dataset.augment(x, generators(seed, slots, AUGMENT))
        x = x.to(device).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, steps, lr, steps // 5)
        with amp.autocast():
            out = predictor(x)
        value = loss(predictor.variables, out, {name: cells[rows] for name, cells in labels.items()}, weights)
        amp.step(value, optimizer, predictor.parameters(), CLIP, f"images {rows.tolist()} of the training set")
        if step % 10 == 9 or step == steps - 1:
            log.append({"step": step + 1, "loss": value.item(), "lr": optimizer.param_groups[0]["lr"]})
            bar.set_postfix(loss=f"{value.item():.3f}")
    predictor.eval()
    return log
