"""Pixels: uint8 0 … 255 ⇄ floats in [-1, 1], and colour → grey."""

import torch
from torch import Tensor

from minidiff.errors import TrainingFault


def to_float(pixels: Tensor) -> Tensor:
    """0 … 255 → [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → 0 … 255, rounded; a non-finite pixel is refused, not written as a black one."""
    require_finite(images.isfinite().all())
    return rounded(images)


def require_finite(finite: Tensor) -> None:
    """TrainingFault unless all of these are true; a GPU is waited for."""
    if not finite.all():
        raise TrainingFault("the model gave non-finite pixels, which are never written: untrained, "
                            "or --guidance too high")


def rounded(images: Tensor) -> Tensor:
    """[-1, 1] → 0 … 255 of pixels that are finite; asks a GPU nothing."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def at_once(side: int) -> int:
    """Images that the VAE takes at once: 32, or what 4 of 512 px hold: 32 of these take 22 GB."""
    return min(32, max(1, 4 * 512**2 // side**2))


def within(side: int) -> int:
    """Images of which a measure takes one part at a time: 2,048 of 64 px, whole batches of
    `at_once`; as doubles they take 64 MB."""
    return max(1, 2**23 // side**2 // at_once(side)) * at_once(side)


def to_grey(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) → (N, 1, H, W), the rounded mean of the channels."""
    if images.shape[1] == 1 or images.stride(1) == 0:  # an `.expand`ed grey image holds one channel
        return images[:, :1]
    return torch.cat([  # a whole data set as floats would take four times its memory
        part.float().mean(1, keepdim=True).round().to(torch.uint8) for part in images.split(256)])
