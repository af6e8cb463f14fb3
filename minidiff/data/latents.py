"""The cache of latent moments: each image is encoded once, as mean and std, and re-sampled whenever
it is used.

Caching one sample in place of the moments would freeze noise that is a good part of the latent's
variance.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from minidiff.counted import AUGMENT, NOISE, VIEW, generators, normal, uniform
from minidiff.data.augmentation import augment
from minidiff.overlap import send
from minidiff.pixels import at_once, to_float
from minidiff.runs import json_key, write_atomic

# float (n, 3, S, S) in [-1, 1] → mean, std (n, c, h, w), on the device of the encoder
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Source:
    """Latents of images, drawn anew from their moments at each use."""

    pixels: Tensor      # uint8 (N, 3, S, S)
    mean: Tensor        # (views, N, 4, h, w); with live encoding, one plain view
    std: Tensor
    encode: Encode
    live: bool          # augment and encode at each use, in place of the cached views
    strength: float
    seed: int
    device: torch.device | str = "cpu"  # of `encode` and of what is drawn

    def draw(self, index: Sequence[int], slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents of the indexed images and the noise to put on them, (slots, 4, h, w) each:
        functions of the slots.
        """
        within, noise = send(normal(self.seed, slots, NOISE, (2, *self.mean.shape[2:])),
                             self.device).unbind(1)
        if self.live:
            x = to_float(send(self.pixels[index], self.device))
            x = augment(x, generators(self.seed, slots, AUGMENT), self.strength)
            mean, std = (m.float() for m in self.encode(x))
        else:
            view = (uniform(self.seed, slots, VIEW, 1)[:, 0] * len(self.mean)).long()
            mean, std = (send(m[view, index], self.device) for m in (self.mean, self.std))
        return mean + std * within, noise


def encoded(path: Path, key: str, encode: Encode, train: Tensor, val: Tensor, *, views: int,
            strength: float, seed: int,
            device: torch.device | str = "cpu") -> tuple[Source, Tensor]:
    """The latents of training images, and the means of the validation images' (N, 4, h, w); cached
    in `path` under the key (data, VAE) and the augmentation. views: how many of each training image
    are kept; 0 for live encoding."""
    key, kept = json_key(key=key, views=views, strength=strength, seed=seed), {}
    # a missing file, or one that a crash cut short, is encoded anew
    with suppress(FileNotFoundError, SafetensorError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("key") == key:
            kept = {name: file.get_tensor(name) for name in ("train", "val")}
    if not kept:
        kept = {"train": moments(train, encode, max(1, views), strength=strength, seed=seed,
                                 device=device),
                "val": moments(val, encode, device=device)}
        write_atomic(path, save(kept, {"key": key}))
    source = Source(train, *kept["train"], encode, views == 0, strength, seed, device)
    return source, kept["val"][0, 0]


def moments(pixels: Tensor, encode: Encode, views: int = 1, *, strength: float = 1.0, seed: int = 0,
            batch: int = 0, text: str = "encoding",
            device: torch.device | str = "cpu") -> Tensor:
    """uint8 (N, 3, S, S) → (2, views, N, c, h, w) float32: means and stds.

    View 0 is the image itself, the others augmented.
    """
    parts, batch = [], batch or at_once(pixels.shape[-1])
    with tqdm(total=views * len(pixels), desc=text, unit="image", leave=False) as bar:
        for view in range(views):
            # no images: one empty batch, for the shapes
            for start in range(0, max(1, len(pixels)), batch):
                x = to_float(send(pixels[start : start + batch], device))
                if view:
                    slots = range(view * len(pixels) + start, view * len(pixels) + start + len(x))
                    x = augment(x, generators(seed, slots, AUGMENT), strength)
                parts.append(torch.stack([m.float().cpu() for m in encode(x)]))
                bar.update(len(x))
    return torch.cat(parts, 1).unflatten(1, (views, len(pixels)))
