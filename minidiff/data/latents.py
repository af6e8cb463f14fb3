"""The cache of latent moments: each image is encoded once, as mean and std, and re-sampled whenever
it is used.

Caching one sample in place of the moments would freeze noise that is a good part of the latent's
variance.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from minidiff import distributed
from minidiff.counted import AUGMENT, NOISE, OFFSET, VIEW, generators, normal, uniform
from minidiff.data.augmentation import augment
from minidiff.data.pixel_map import LARGE
from minidiff.overlap import send
from minidiff.pixels import at_once, to_float
from minidiff.runs import json_key, replacing, sync

SHARD = 32   # batches that a rank loses by a kill
SMALL = 4    # float16 must round the means by less than this part of the posterior's std
TYPES = {"F32": torch.float32, "F16": torch.float16}

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

    def draw(self, index: Sequence[int], slots: Sequence[int],
             offset: float = 0.0) -> tuple[Tensor, Tensor]:
        """Latents of the indexed images and the noise to put on them, (slots, 4, h, w) each:
        functions of the slots. `offset` is the standard deviation of what all cells of a channel
        share besides (offset noise, Guttenberg 2023)."""
        within, noise = send(normal(self.seed, slots, NOISE, (2, *self.mean.shape[2:])),
                             self.device).unbind(1)
        if self.live:
            x = to_float(send(self.pixels[index], self.device))
            x = augment(x, generators(self.seed, slots, AUGMENT), self.strength)
            mean, std = (m.float() for m in self.encode(x))
        else:
            view = (uniform(self.seed, slots, VIEW, 1)[:, 0] * len(self.mean)).long()
            mean, std = (send(m[view, index].float(), self.device) for m in (self.mean, self.std))
        if offset:
            shared = normal(self.seed, slots, OFFSET, (noise.shape[1], 1, 1))
            noise = noise + offset * send(shared, self.device)
        return mean + std * within, noise


def encoded(path: Path, key: str, encode: Encode, train: Tensor, val: Tensor, *, views: int,
            strength: float, seed: int,
            device: torch.device | str = "cpu") -> tuple[Source, Tensor]:
    """The latents of training images, and the means of the validation images' (N, 4, h, w); cached
    in `path` under the key (data, VAE) and the augmentation. views: how many of each training image
    are kept; 0 for live encoding. All ranks call it together, and share the work."""
    key = json_key(key=key, views=views, strength=strength, seed=seed)
    fits = _header(path).get("__metadata__", {}).get("key") == key
    if not distributed.gather(torch.tensor([fits])).all():
        _write(path, key, encode, {"train": (train, max(1, views)), "val": (val, 1)}, strength,
               seed, device)
    with safe_open(path, "pt") as file:  # mapped, not read
        kept = {name: file.get_tensor(name) for name in ("train", "val")}
    source = Source(train, *kept["train"], encode, views == 0, strength, seed, device)
    return source, kept["val"][0, 0]


def _write(path: Path, key: str, encode: Encode, sets: Mapping[str, tuple[Tensor, int]],
           strength: float, seed: int, device: torch.device | str) -> None:
    """Write the moments of some views of each set as safetensors, batch by batch.

    Until it is whole, the file has another name and a byte for each batch at its end, which says
    whether that is there: after a kill, the next command goes on.
    """
    part, n = path.with_name(f".{path.name}.part"), at_once(sets["train"][0].shape[-1])
    places = [(name, view, start) for name, (pixels, views) in sets.items()
              for view in range(views) for start in range(0, max(1, len(pixels)), n)]

    def made(number: int) -> Tensor:
        name, view, start = places[number]
        return _batch(sets[name][0], encode, view, start, n, strength, seed, device)

    ready = {}
    if distributed.rank() == 0 and _header(part, len(places)).get("__metadata__") != {"key": key}:
        _begin(part, key, ready.setdefault(0, made(0)), sets, len(places))
    distributed.wait()
    header = _header(part, len(places))
    end = header.pop("__end__")
    with open(part, "r+b") as file:
        done = os.pread(file.fileno(), len(places), end)
        todo = [k for k, there in enumerate(done) if not there]
        distributed.wait()  # until all have read what is to be done
        todo, written = todo[distributed.rank() :: distributed.world()], []
        for number in tqdm(todo, "encoding", unit="batch", leave=False,
                           disable=distributed.rank() > 0):
            name, view, start = places[number]
            known, each = header[name], ready.pop(number) if number in ready else made(number)
            _, views, images, *cells = known["shape"]
            dtype = TYPES[known["dtype"]]
            for k, values in enumerate(each.to(dtype)):
                place = ((k * views + view) * images + start) * math.prod(cells) * dtype.itemsize
                os.pwrite(file.fileno(), values.numpy().tobytes(),
                          end - header["val"]["data_offsets"][1] + known["data_offsets"][0] + place)
            written.append(number)
            if len(written) == SHARD or number == todo[-1]:
                sync(part)
                for number in written:
                    os.pwrite(file.fileno(), b"\1", end + number)
                written = []
    distributed.wait()
    if distributed.rank() == 0:
        os.truncate(part, end)
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    distributed.wait()


def _begin(part: Path, key: str, first: Tensor, sets: Mapping[str, tuple[Tensor, int]],
           batches: int) -> None:
    """The head of a file of which nothing is written yet; `first`: the moments of a batch.

    Many moments are stored as float16, if that rounds the means by less than the posterior's std.
    """
    shapes = {name: (2, views, len(pixels), *first.shape[2:])
              for name, (pixels, views) in sets.items()}
    mean, std = first
    half = (4 * sum(map(math.prod, shapes.values())) >= LARGE
            and bool(((mean.half() - mean).abs() <= std / SMALL).all()))
    head, at = {"__metadata__": {"key": key}}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * (2 if half else 4)
        head[name] = {"dtype": "F16" if half else "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(part, durable=False) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at + batches)


def _header(path: Path, more: int = 0) -> dict[str, Any]:
    """What the head of a safetensors file says, and where its data end; nothing unless it is whole
    and `more` bytes follow."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (n,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(n)) if n < size else {}
        end = 8 + n + head["val"]["data_offsets"][1]
        return {**head, "__end__": end} if end + more == size else {}
    except (FileNotFoundError, struct.error, ValueError, LookupError):
        return {}


def _batch(pixels: Tensor, encode: Encode, view: int, start: int, n: int, strength: float,
           seed: int, device: torch.device | str) -> Tensor:
    """n images from `start` on → (2, n, c, h, w) float32; view 0 is the image itself, the others
    augmented."""
    x = to_float(send(pixels[start : start + n], device))
    if view:
        slots = range(view * len(pixels) + start, view * len(pixels) + start + len(x))
        x = augment(x, generators(seed, slots, AUGMENT), strength)
    return torch.stack([m.float().cpu() for m in encode(x)])


def moments(pixels: Tensor, encode: Encode, views: int = 1, *, strength: float = 1.0, seed: int = 0,
            batch: int = 0, text: str = "encoding",
            device: torch.device | str = "cpu") -> Tensor:
    """uint8 (N, 3, S, S) → (2, views, N, c, h, w) float32: means and stds, in memory."""
    batch, made = batch or at_once(pixels.shape[-1]), None
    with tqdm(total=views * len(pixels), desc=text, unit="image", leave=False) as bar:
        for view in range(views):
            # no images: one empty batch, for the shapes
            for start in range(0, max(1, len(pixels)), batch):
                part = _batch(pixels, encode, view, start, batch, strength, seed, device)
                if made is None:
                    made = part.new_empty(2, views, len(pixels), *part.shape[2:])
                made[:, view, start : start + batch] = part
                bar.update(part.shape[1])
    return made
