"""The cache of latent moments: each image is encoded once, as mean and std, and re-sampled whenever it is used.

Caching one sample in place of the moments would freeze noise that is a good part of the latent's variance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from minidiff.counted import AUGMENT, generators
from minidiff.data import dataset
from minidiff.runs import write_atomic

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # float (n, 3, S, S) in [-1, 1] -> mean, std (n, c, h, w)


def moments(pixels: Tensor, encode: Encode, views: int = 1, *, strength: float = 1.0, seed: int = 0, batch: int = 32,
            text: str = "encoding") -> Tensor:
    """uint8 (N, 3, S, S) → (2, views, N, c, h, w) float32: means and stds.

    View 0 is the image itself, the others augmented.
    """
    parts = []
    with tqdm(total=views * len(pixels), desc=text, unit="image", leave=False) as bar:
        for view in range(views):
            for start in range(0, max(1, len(pixels)), batch):  # no images: one empty batch, for the shapes
                x = dataset.to_float(pixels[start : start + batch])
                if view:
                    slots = range(view * len(pixels) + start, view * len(pixels) + start + len(x))
                    x = dataset.augment(x, generators(seed, slots, AUGMENT), strength)
                parts.append(torch.stack([m.float().cpu() for m in encode(x)]))
                bar.update(len(x))
    return torch.cat(parts, 1).unflatten(1, (views, len(pixels)))


def cached(path: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path` if they were stored under this key (content, VAE and geometry), else made and stored."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open has no __iter__)
    except (FileNotFoundError, SafetensorError):
        pass  # none yet, or cut short by a crash: it is made again
    tensors = make()
    write_atomic(path, save(tensors, {"key": key}))
    return tensors
