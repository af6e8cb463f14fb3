"""Pixels: 0 … 255 (uint8) or 0 … 65535 (uint16) ⇄ floats in [-1, 1], colour → grey, and many that
take little memory."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import TrainingFault

SCRATCH = 2**30  # bytes of small images, beyond which they lie in a file
TOP = {torch.uint8: 255, torch.uint16: 65535}  # white, by the type of the pixels


def to_float(pixels: Tensor) -> Tensor:
    """0 … 255, or 0 … 65535 of uint16, → [-1, 1], float32."""
    return pixels.float() / (TOP[pixels.dtype] / 2) - 1


def to_depth(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 or uint16 → the same greys in uint8, to the nearest of 256, or in uint16, exactly."""
    if pixels.dtype == dtype:
        return pixels
    scaled = pixels.float() / 257 if dtype == torch.uint8 else pixels.float() * 257
    return scaled.round().to(dtype)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → 0 … 255, rounded; a non-finite pixel is refused, not written as a black one."""
    return to_pixels(images, torch.uint8)


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in uint8 or uint16."""
    require_finite(images.isfinite().all())
    return rounded(images, dtype)


def require_finite(finite: Tensor) -> None:
    """TrainingFault unless all of these are true; a GPU is waited for."""
    if not finite.all():
        raise TrainingFault("the model gave non-finite pixels, which are never written: untrained, "
                            "or --guidance too high")


def rounded(images: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[-1, 1] → 0 … 255 of pixels that are finite, or 0 … 65535; asks a GPU nothing."""
    return ((images.clamp(-1, 1) + 1) * (TOP[dtype] / 2)).round().to(dtype)


def at_once(side: int) -> int:
    """Images that the VAE takes at once: 32, or what 4 of 512 px hold: 32 of these take 22 GB."""
    return min(32, max(1, 4 * 512**2 // side**2))


def within(side: int) -> int:
    """Images of which a measure takes one part at a time: 2,048 of 64 px, whole batches of
    `at_once`; as doubles they take 64 MB."""
    return max(1, 2**23 // side**2 // at_once(side)) * at_once(side)


def is_grey(images: Tensor) -> bool:
    """One channel in memory, which may be expanded to three?"""
    return images.shape[1] == 1 or images.stride(1) == 0


def to_grey(images: Tensor) -> Tensor:
    """uint8 or uint16 (N, C, H, W) → (N, 1, H, W), the rounded mean of the channels."""
    if is_grey(images):
        return images[:, :1]
    return torch.cat([  # a whole data set as floats would take four times its memory
        part.float().mean(1, keepdim=True).round().to(images.dtype) for part in images.split(256)])


class Gathered:
    """Pictures of several tensors read as one, uint8 (N,C,S,S), or uint16 if all are: a batch is
    copied when it is asked for, the whole never is.

    parts: (n,C,S,S) each, or one channel; index: places in the parts laid end to end, or all.
    """

    def __init__(self, *parts: "Pictures", index: Sequence[int] | None = None):
        ends = np.cumsum([len(part) for part in parts]).tolist()
        self.grey = all(is_grey(part[:1]) for part in parts)
        # of a tensor that holds one channel no other is ever copied
        self.parts = [(part[:, :1] if isinstance(part, Tensor) and self.grey else part, first, end)
                      for part, first, end in zip(parts, [0, *ends], ends)]
        self.dtype = parts[0].dtype
        self.places = torch.arange(ends[-1]) if index is None else torch.as_tensor(
            index, dtype=torch.long)
        self.shape = torch.Size((len(self.places), max(part.shape[1] for part in parts),
                                 *parts[0].shape[2:]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: "int | slice | Sequence[int] | Tensor") -> Tensor:
        places = self.places[index]
        if not places.ndim:
            return self[[index]][0]
        channels = 1 if self.grey else self.shape[1]
        found = torch.empty(len(places), channels, *self.shape[2:], dtype=self.dtype)
        for part, first, end in self.parts:
            own = ((places >= first) & (places < end)).nonzero()[:, 0]
            if len(own):
                found.numpy()[own] = part[places[own] - first][:, :channels]  # torch: no uint16
        return found.expand(-1, self.shape[1], -1, -1)

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches, one after another; of no pictures, an empty one."""
        return (self[start : start + size] for start in range(0, max(1, len(self)), size))


def each(pixels: "Pictures") -> Iterator[Tensor]:
    """One picture after another; a loop over the tensor would begin with views of all."""
    return (pixels[i] for i in range(len(pixels)))


Pictures = Tensor | Gathered  # what has a length and a shape, and gives pictures by index


def laid_in(found: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """Parts, written one after another into a tensor: `torch.cat` would hold all of them twice."""
    first = 0
    for part in parts if len(found) else ():
        found[first : (first := first + len(part))] = part
    return found


def scratch(shape: tuple[int, ...]) -> np.ndarray:
    """Black uint8 images; beyond SCRATCH in a nameless file of the temporary folder (TMPDIR)."""
    if math.prod(shape) <= SCRATCH:
        return np.zeros(shape, np.uint8)
    return np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)
