"""Where are the lungs? A small U-Net learns it from drawings, whose lungs are known.

    python classify.py lungs --out runs/lungs                      three minutes of one CPU core

    phantoms, 64 px, with masks ─ randomise ─▶ ranks of the greys ─ LungNet ─▶ logit of lung
    X-rays, any size ─ resized ─▶ ranks of the greys ─ LungNet ─▶ plausible masks, or none

No X-ray has a mask here, so the network never sees one: every drawing is warped, lit, blurred,
marked and framed so differently that an X-ray is one more variation (domain randomisation, Tobin
et al. 2017). What it finds is checked against anatomy (`plausible`), and used only where it passes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minidiff.counted import AUGMENT, NOISE, generators, order
from minidiff.data.augmentation import developed, moved
from minidiff.data.phantom import phantom
from minidiff.data.standardise import equalise, needs_lungs, plausible
from minidiff.errors import InputError
from minidiff.overlap import send
from minidiff.pixels import Pictures, to_float, to_grey, to_uint8
from minidiff.root import Rooted
from minidiff.runs import open_run, save_tensors, write_json
from minidiff.training.device import pick_device
from minidiff.training.optim import cosine, set_lr

SIDE, WIDTHS = 64, (8, 16, 24, 32)  # px; channels at 64, 32, 16 and 8 px
FILE, FOUND = "lungs.safetensors", "plausible lungs were found in "
HELD_OUT = 200                       # fresh phantoms on which Dice is measured
TURN, MOVE, ZOOM, ASPECT, BEND = 12.0, 0.10, 0.30, 0.25, 0.04  # degrees; shares of the side
SHADE, CLOUD = 0.25, 0.9             # of the range: light that differs by place; opaque patches


@dataclass(frozen=True)
class Config(Rooted):
    data_of_root: ClassVar[bool] = False
    out: str = "ROOT/lungs"           # run folder
    n: int = 2000                     # phantoms to learn from
    steps: int = 600                  # optimiser steps
    batch: int = 16                   # phantoms a step
    lr: float = 3e-3                  # AdamW peak; 20 % warm-up, then cosine
    seed: int = 0                     # of start, order and variation; seed+1 of the phantoms
    device: str = "auto"              # auto, cpu, cuda, cuda:1 …


class LungNet(nn.Module):
    """Grey ranks (N,1,64,64) in [-1,1] → logits (N,64,64). No statistics of a batch or a data set
    are kept (GroupNorm), for those of drawings are not those of X-rays."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.down = nn.ModuleList(map(_pair, (1, *WIDTHS), WIDTHS))
            self.up = nn.ModuleList(_pair(a + b, b) for a, b in zip(WIDTHS[:0:-1], WIDTHS[-2::-1]))
            self.out = nn.Conv2d(WIDTHS[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = layer(F.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for layer, beside in zip(self.up, kept[-2::-1]):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), beside], 1))
        return self.out(x)[:, 0]

    @torch.no_grad()
    def find(self, images: Pictures) -> tuple[Tensor, Tensor]:
        """uint8 (N,C,H,W) → masks of both lungs, bool (N,64,64), and whether plausible ones were
        found, bool (N,), on the CPU; where none were, the mask is empty."""
        device = next(self.parameters()).device
        raw = torch.cat([self(look(send(part, device))).cpu() > 0 for part in images.split(256)])
        lungs = [plausible(mask) for mask in raw.numpy()]
        none = np.zeros((SIDE, SIDE), bool)
        masks = [none if own is None else own for own in lungs]
        return (torch.from_numpy(np.stack(masks) if masks else none[None][:0]),
                torch.tensor([own is not None for own in lungs], dtype=torch.bool))

    def save(self, folder: str | Path) -> None:
        save_tensors(Path(folder) / FILE, self.state_dict())

    @classmethod
    def load(cls, folder: str | Path) -> "LungNet":
        """Of a folder that `classify.py lungs`, or a classifier, wrote. InputError if there is
        none."""
        net = cls()
        try:
            net.load_state_dict(safetensors.torch.load_file(Path(folder) / FILE))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(f"{folder} has no lungs that can be read ({FILE}: "
                             f"{str(error).splitlines()[0]}); python classify.py lungs --out "
                             f"{folder} makes them") from None
        return net.eval()


def finder(names: Sequence[str], folder: str | Path) -> LungNet | None:
    """The network of a folder where these ways of making pictures alike need one."""
    return LungNet.load(folder) if needs_lungs(names) else None


def kept_whole(net: LungNet | None, sets: Mapping[str, Pictures]) -> list[str]:
    """A note of how many images of each set have lungs that pass, none without a network."""
    if not net:
        return []
    found = {name: net.find(pixels)[1] for name, pixels in sets.items()}
    return [FOUND + ", ".join(f"{int(there.sum())} of {len(there)} images of {name}"
                              for name, there in found.items()) + "; the others are kept whole"]


def _pair(ch_in: int, ch: int) -> nn.Sequential:
    return nn.Sequential(*(layer for k in (ch_in, ch) for layer in (
        nn.Conv2d(k, ch, 3, padding=1), nn.GroupNorm(4, ch), nn.ReLU(inplace=True))))


def look(images: Tensor) -> Tensor:
    """uint8 (N,C,H,W) → what the network sees, (N,1,64,64): ranks, whatever the film did."""
    x = to_grey(images).float()
    if x.shape[2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return to_float(equalise(x.round().to(torch.uint8)))


def randomise(x: Tensor, masks: Tensor, draws: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Drawings (N,1,S,S) in [-1,1] and masks (N,S,S), each as if of another body, detector and
    film: (N,1,S,S) in [-1,1] and bool (N,S,S)."""
    n, side, device = len(x), x.shape[-1], x.device
    u = torch.stack([torch.rand(40, generator=g) for g in draws])
    coarse = torch.stack([torch.randn(4, 6, 6, generator=g) for g in draws]).to(device)
    bend_x, bend_y, shade, cloud = F.interpolate(coarse, (side, side), mode="bicubic").unbind(1)
    angle, dx, dy, zoom, wide = (2 * u[:, :5] - 1).T
    both = moved(torch.cat([x, 2 * masks[:, None].float() - 1], 1), angle * math.radians(TURN),
                 MOVE * dx, MOVE * dy, torch.exp(-ZOOM * zoom), torch.exp(ASPECT * wide))
    # bodies of other forms: a smooth bend of the whole picture
    grid = F.affine_grid(torch.eye(2, 3, device=device).expand(n, 2, 3), [n, 1, side, side],
                         align_corners=False)
    both = F.grid_sample(both, grid + BEND * torch.stack([bend_x, bend_y], -1), mode="bilinear",
                         padding_mode="border", align_corners=False)
    x, masks, u = both[:, :1], both[:, 1] > 0, u.to(device)
    x = x + 2 * SHADE * u[:, 5].view(n, 1, 1, 1) * shade[:, None]
    # patches of white, in every second picture, as of effusion or consolidation
    dense = (u[:, 6] < 0.5).view(n, 1, 1, 1) * torch.sigmoid(6 * (cloud[:, None] - 0.9))
    x = x + (1 - x) * CLOUD * u[:, 7].view(n, 1, 1, 1) * dense
    x = _marked(x.clamp(-1, 1), u[:, 10:30].view(n, 4, 5))
    return developed(x, u[:, 30:40], draws), masks


def _marked(x: Tensor, u: Tensor) -> Tensor:
    """Letters, plates, wires and tubes: up to four bars an image, of any place, size and shade."""
    place = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    for left, top, wide, high, shade in (bar.T for bar in u.unbind(1)):
        across = (place - left[:, None]).abs() < 0.005 + 0.2 * wide[:, None] ** 4
        down = (place - top[:, None]).abs() < 0.005 + 0.2 * high[:, None] ** 4
        inside = (across[:, None, :] & down[:, :, None] & (shade > 0.4)[:, None, None])[:, None]
        x = torch.where(inside, (4 * shade - 3).clamp(-1, 1).view(-1, 1, 1, 1), x)
    return x


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Phantoms of all labels: uint8 (n,1,64,64) and their lungs, bool (n,64,64)."""
    made = [phantom(seed, k, SIDE) for k in tqdm(range(n), desc="drawing phantoms", unit="image")]
    return (torch.from_numpy(np.stack([p.image for p in made]))[:, None],
            torch.from_numpy(np.stack([p.lungs for p in made])))


def dice(found: Tensor, truth: Tensor) -> Tensor:
    """bool (N,S,S) each → 2·|both| / (|found| + |truth|), (N,)."""
    both = (found & truth).sum((1, 2))
    return 2 * both / (found.sum((1, 2)) + truth.sum((1, 2))).clamp(min=1)


def fit(net: LungNet, images: Tensor, masks: Tensor, *, steps: int, batch: int, lr: float,
        seed: int, progress: str = "lungs") -> None:
    """Train in place; cross entropy, and Dice of probabilities for the small share of lung."""
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    for step in tqdm(range(steps), desc=progress, unit="step", disable=not progress):
        slots = range(step * batch, (step + 1) * batch)
        rows = order(len(images), seed, slots)
        x, truth = randomise(send(to_float(images[rows]), device), send(masks[rows], device),
                             generators(seed, slots, AUGMENT))
        logits, truth = net(look(to_uint8(x))), truth.float()
        p = logits.sigmoid()
        overlap = 2 * (p * truth).sum((1, 2)) / (p + truth).sum((1, 2)).clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(logits, truth) + 1 - overlap.mean()
        set_lr(optimizer, cosine(step, steps, lr, steps // 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_lungs(cfg: Config) -> None:
    """Learn to find lungs, from phantoms alone; write the network and its Dice on fresh phantoms.
    """
    open_run(cfg.out, cfg, "lungs", free=("device",))
    out = Path(cfg.out)
    if not (out / "dice.json").exists():
        net = LungNet(cfg.seed).to(pick_device(cfg.device))
        fit(net, *drawn(cfg.n, cfg.seed + 1), steps=cfg.steps, batch=cfg.batch, lr=cfg.lr,
            seed=cfg.seed)
        net.save(out)
        write_json(out / "dice.json", measured(net.eval(), *drawn(HELD_OUT, cfg.seed + 2)))
    print(f"lungs: {out / FILE}; {(out / 'dice.json').read_text()}")


def measured(net: LungNet, images: Tensor, masks: Tensor) -> dict:
    """Dice of phantoms as drawn, and varied as in training; how many have plausible lungs."""
    x, truth = randomise(to_float(images), masks, generators(0, range(len(images)), NOISE))
    result = {"n": len(images)}
    for name, pictures, own in (("drawn", images, masks), ("varied", to_uint8(x), truth)):
        found, there = net.find(pictures)
        result[name] = {"dice": round(dice(found, own)[there].mean().item(), 4),
                        "plausible": int(there.sum())}
    return result
