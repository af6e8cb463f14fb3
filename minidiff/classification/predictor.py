"""One network that reads label, sex, age, view … off an image, and gives features.

    uint8 (N,C,S,S) ─ grey ─ made alike (data/standardise.py) ─▶ (N,1,S,S) in [-1,1] ─ ResNet ─▶
    features (N,8·width) ─ fc ─▶ one block a variable

A Category has one logit for each of its values, Findings one for each that may be present, a Number
one output in standard deviations from its training mean. A cell that is unknown has no part in the
loss.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.classification.invariance import Invariance
from minidiff.classification.lungs import FILE, LungNet, finder
from minidiff.classification.resnet import ResNet, load_torchvision
from minidiff.counted import AUGMENT, DROPOUT, dropout, generators, order, seeded
from minidiff.data.augmentation import augment, vary
from minidiff.data.standardise import check, needs_lungs, standardised
from minidiff.errors import InputError
from minidiff.overlap import ahead, send
from minidiff.pixels import Gathered, Pictures, laid_in, to_float, to_grey, to_uint8
from minidiff.runs import in_its_place, read_json, save_tensors, write_json
from minidiff.training.optim import cosine, set_lr
from minidiff.training.precision import Precision
from minidiff.variables import Category, Labels, Variable, from_json, to_json

# ImageNet's mean and deviation, averaged over the colours, on the scale of [-1,1]: the input
# torchvision's weights know.
MEAN, STD = 2 * 0.449 - 1, 2 * 0.226
DECAY, CLIP = 0.05, 5.0  # weight decay of AdamW; gradient norm, reached in the first steps only
LOOKS = 8                # validations of a training, the best of which is kept
AUGMENTS = {"plain": None, "classic": augment, "strong": vary}


class Predictor(nn.Module):
    """ResNet with one block of outputs for each variable; other images are resized to `size`.

    `dropout` is the share of its features that a training step leaves out. Every picture is made
    like the others as `standardise` says, in training and whenever it is asked; `lungs` finds them.
    """

    def __init__(self, variables: Sequence[Variable], *, width: int = 16, size: int = 64,
                 dropout: float = 0.0, seed: int = 0, standardise: Sequence[str] = (),
                 lungs: LungNet | None = None):
        super().__init__()
        check(standardise)
        assert bool(lungs) == needs_lungs(standardise), standardise
        self.standardise = tuple(standardise)
        self.lungs = lungs.requires_grad_(False) if lungs else None
        self.variables, self.width, self.size, self.dropout = list(variables), width, size, dropout
        self.outputs = {v.name: len(v.values) or 1 for v in self.variables}
        self.net = ResNet(sum(self.outputs.values()), width=width, seed=seed)
        # faster on a CPU, and the format decides the last bit
        self.to(memory_format=torch.channels_last).eval()

    def forward(self, x: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Grey images (N,1,S,S) in [-1,1] → logits (N,k) of a Category and of Findings,
        standardised value (N,1) of a Number.

        `keep` (N or 1, 8·width) is what each feature is multiplied by: see `mask`.
        """
        return self.read(self.seen(x), keep)

    def seen(self, x: Tensor) -> Tensor:
        """Grey images (N,1,S,S) in [-1,1] → features (N,8·width)."""
        return self.net.features((x - MEAN) / STD)

    def read(self, features: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        return self._by_variable(self.net.fc(features if keep is None else features * keep))

    def _by_variable(self, y: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.outputs, y.split(list(self.outputs.values()), -1)))

    def standard(self, images: Tensor) -> Tensor:
        """uint8 (N,C,H,W) → (N,1,size,size), made alike; as they are where nothing is asked for."""
        if not self.standardise:
            return images
        x = to_grey(images)
        if x.shape[2:] != (self.size, self.size):
            x = to_uint8(prepare(x, self.size))
        return standardised(x, self.standardise, self.lungs and self.lungs.find)

    def made_alike(self, images: Pictures) -> Pictures:
        """`standard` of many, on the CPU."""
        device = next(self.parameters()).device
        return images if not self.standardise else laid_in(
            torch.empty(len(images), 1, self.size, self.size, dtype=torch.uint8),
            (self.standard(send(part, device)).cpu() for part in images.split(256)))

    def mask(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Dropout of the features, a row for each generator: see `counted.dropout`."""
        return send(dropout(generators, self.net.fc.in_features, self.dropout),
                    self.net.fc.weight.device)

    def predict(self, images: Pictures, batch: int = 256) -> dict[str, Tensor]:
        """uint8 (N,C,H,W) → probabilities (N,k) of a Category and of Findings, value (N,) of a
        Number in its own unit; float32, CPU."""
        out = self.logits(images, batch)
        return {v.name: v.read(out[v.name]) for v in self.variables}

    def logits(self, images: Pictures, batch: int = 256, *,
               alike: bool = False) -> dict[str, Tensor]:
        """uint8 (N,C,H,W) → the outputs of `forward`; float32, CPU. Are the images made alike?"""
        out = self._in_batches(self, images, batch, alike)
        return {v.name: torch.cat([o[v.name] for o in out]).float().cpu() for v in self.variables}

    @torch.no_grad()
    def under_dropout(self, images: Pictures, draws: int = 20, seed: int = 0) -> dict[str, Tensor]:
        """`predict` under each draw of dropout (Gal & Ghahramani 2016): (draws, N, …)."""
        features, fc = self.features(images), copy.deepcopy(self.net.fc).float().cpu()
        keep = self.mask([seeded(seed, k, DROPOUT) for k in range(draws)]).cpu()
        out = self._by_variable(torch.stack([fc(features * row) for row in keep]))
        return {v.name: v.read(out[v.name]) for v in self.variables}

    def features(self, images: Pictures, batch: int = 256) -> Tensor:
        """uint8 (N,C,H,W) → what the last layer reads, float32 (N, 8·width), CPU."""
        return torch.cat(self._in_batches(self.seen, images, batch)).float().cpu()

    @torch.no_grad()
    def _in_batches(self, function: Callable, images: Pictures, batch: int,
                    alike: bool = False) -> list:
        mode, device = self.training, next(self.parameters()).device
        self.eval()
        made = send if alike else (lambda chunk, device: self.standard(send(chunk, device)))
        out = [function(prepare(made(chunk, device), self.size)) for chunk in images.split(batch)]
        self.train(mode)
        return out

    def save(self, folder: str | Path) -> None:
        """Writes predictor.safetensors and predictor.json, each whole or not at all."""
        write_json(Path(folder) / "predictor.json",
                   {"variables": to_json(self.variables), "width": self.width, "size": self.size,
                    "dropout": self.dropout,
                    **({"standardise": self.standardise} if self.standardise else {})})
        if self.lungs:
            self.lungs.save(folder)
        save_tensors(Path(folder) / "predictor.safetensors", self.net.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> "Predictor":
        """The predictor that `save` wrote to this folder, on the CPU.

        InputError where there is none, or half of one.
        """
        try:
            form = read_json(Path(folder) / "predictor.json")
            weights = safetensors.torch.load_file(Path(folder) / "predictor.safetensors")
            alike = form.get("standardise", ())
            if needs_lungs(alike) and not (Path(folder) / FILE).is_file():
                raise ValueError(f"its {FILE} is not there; copy the whole folder")
            predictor = cls(from_json(form["variables"]), width=form["width"], size=form["size"],
                            dropout=form.get("dropout", 0.0), standardise=alike,
                            lungs=finder(alike, folder))
            predictor.net.load_state_dict(weights)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError,
                safetensors.SafetensorError) as error:
            raise InputError(f"{folder} holds no predictor, or half of one: "
                             f"{str(error).splitlines()[0]}") from None
        return predictor


def prepare(images: Tensor, size: int) -> Tensor:
    """uint8 (N,C,H,W) → grey float32 (N,1,size,size) in [-1,1]."""
    x = to_float(to_grey(images))
    return x if x.shape[2:] == (size, size) else F.interpolate(x, (size, size), mode="bilinear",
                                                               antialias=True)


def loss(variables: Sequence[Variable], out: Mapping[str, Tensor], labels: Labels,
         weights: Mapping[str, Tensor] | None = None,
         sample_weight: Tensor | None = None) -> Tensor:
    """Sum over variables of the mean over known cells.

    Cross entropy, of Findings the mean of one for each, or squared error in standard deviations.
    `weights` (k,) are of the classes of a Category, `sample_weight` (N,) of the images. An unknown
    or null cell counts nothing.
    """
    total = torch.zeros((), device=next(iter(out.values())).device)
    for v in variables:
        y, target = out[v.name].float(), labels[v.name].to(out[v.name].device)
        known = v.known(target).float()
        if weights and v.name in weights:
            known = known * weights[v.name].to(y)[target.clamp(min=0)]
        if sample_weight is not None:
            known = known * sample_weight.to(y)
        total = total + (v.error(y, target) * known).sum() / known.sum().clamp(min=1e-8)
    return total


def balance(variable: Category, labels: Labels) -> dict[str, Tensor]:
    """{name: class weights (k,)} by which every class of a Category weighs the same, with mean 1
    over images; {} of Findings, which have no classes."""
    if not variable.exclusive:
        return {}
    cells = labels[variable.name]
    counts = torch.bincount(cells[cells >= 0], minlength=len(variable.values)).float()
    return {variable.name: torch.where(
        counts > 0, counts.sum() / counts.clamp(min=1) / (counts > 0).sum(), 0.0)}


def fit(predictor: Predictor, images: Pictures, labels: Labels, *, steps: int, batch: int = 64,
        lr: float = 3e-3, seed: int = 0, augment: str = "classic",
        weights: Mapping[str, Tensor] | None = None, sample_weight: Tensor | None = None,
        validation: tuple[Pictures, Labels, Tensor | None] | None = None, progress: str = "",
        precision: str = "auto", start: int = 0, invariant: Invariance | None = None) -> list[dict]:
    """Trains in place on uint8 images (N,C,S,S); returns a log of step, loss and lr.

    AdamW with a rate that rises linearly and falls as a cosine. Order, augmentation (of AUGMENTS)
    and dropout are counted from (seed, slot), so equal calls on a CPU give equal weights. `weights`
    and `sample_weight` are those of `loss`. With `validation` images, labels and their weights, the
    state with the lowest loss on them is kept; the log has that loss as val_loss. `start`: steps
    that this network was trained before; order, augmentation and log continue from there.
    `invariant` is added to the loss. `progress` is the text of the bar, "" for none. `precision`
    auto is bf16 (or fp16) on a GPU, and fp32 on a CPU.
    """
    device, change = next(predictor.parameters()).device, AUGMENTS[augment]
    images, amp = Gathered(predictor.made_alike(images)), Precision(precision, device)
    if validation:
        validation = predictor.made_alike(validation[0]), *validation[1:]
    of_classes = {k: send(w, device) for k, w in (weights or {}).items()}
    optimizer = torch.optim.AdamW(predictor.net.parameters(), lr=lr, weight_decay=DECAY, fused=True)
    predictor.train()

    def make(step: int) -> tuple[list[int], Tensor, Tensor | None, Labels, Tensor | None]:
        slots = range((start + step - 1) * batch, (start + step) * batch)
        rows = order(len(images), seed, slots)
        x = prepare(send(to_grey(images[rows]), device), predictor.size)
        if change:
            x = change(x, generators(seed, slots, AUGMENT))
        return (rows, x.contiguous(memory_format=torch.channels_last),
                predictor.mask(generators(seed, slots, DROPOUT)) if predictor.dropout else None,
                {name: send(cells[rows], device) for name, cells in labels.items()},
                None if sample_weight is None else send(sample_weight[rows], device))

    looks = {round(steps * (k + 1) / LOOKS) for k in range(LOOKS)} if validation else ()
    best, state, log, todo = math.inf, predictor.state_dict(), [], range(1, steps + 1)
    bar = tqdm(todo, desc=progress, unit="step", disable=not progress, dynamic_ncols=True)
    for step, (rows, x, keep, truth, of_images) in zip(bar, ahead(make, todo, device)):
        rate = set_lr(optimizer, cosine(step - 1, steps, lr, steps // 5))
        with amp.autocast():
            features = predictor.seen(x)
            out = predictor.read(features, keep)
        value = loss(predictor.variables, out, truth, of_classes, of_images)
        if invariant:
            value = value + invariant(features, rows)
        amp.backward(value)
        amp.update(optimizer, predictor.net.parameters(), CLIP)
        # until here nothing has waited for a GPU
        value = amp.read(value.reshape(1), f"images {rows} of the training set").item()
        if step % 10 == 0 or step == steps or step in looks:
            log.append({"step": start + step, "loss": value, "lr": rate})
            bar.set_postfix(loss=f"{value:.3f}")
        if step in looks:
            log[-1]["val_loss"] = held_out = _held_out(predictor, *validation, weights)
            if held_out < best:
                best, state = held_out, copy.deepcopy(predictor.state_dict())
    predictor.load_state_dict(state)
    predictor.eval()
    return log


def _held_out(predictor: Predictor, pixels: Pictures, truth: Labels, of_images: Tensor | None,
              weights: Mapping[str, Tensor] | None) -> float:
    """The loss on validation images that were made alike before."""
    out = predictor.logits(pixels, alike=True)
    return loss(predictor.variables, out, truth, weights, of_images).item()


def begin(predictor: Predictor, path: str | Path) -> list[str]:
    """Take over the weights of another predictor's folder (arms/real/0 or judge of a run) or of a
    torchvision resnet18 file (.pth, .safetensors); returns the names that stay as they were: the
    last layer, if it has other outputs."""
    state, path = weights_of(path), Path(path)
    try:
        return load_torchvision(predictor.net, state)
    except InputError as error:
        raise InputError(f"{path}: {error} (--width {predictor.width}; resnet18 has 64)") from None


def weights_of(path: str | Path) -> dict[str, Tensor]:
    """Names → tensors of a folder or file; nothing in a pickle is run."""
    path = Path(path)
    if path.is_dir():
        return Predictor.load(path).net.state_dict()
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # whatever a damaged or hostile file makes torch and safetensors raise
    except Exception as error:
        raise InputError(f"--init {path}: no weights can be read from it "
                         f"({str(error).splitlines()[0][:200]}){in_its_place(path)}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"--init {path}: not a state dict, names with tensors")
    return state
