"""Extractors: images to feature vectors, in which distances are measured.

Each has a `name` and is called as: uint8 (N,3,H,W) → float32 (N,d). Resizing and ranges are its own
business. Its `identity` is the SHA-256 of all that its features depend on besides the image: two
extractors that share it agree.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.errors import InputError
from minidiff.pixels import TOP, Pictures, laid_in, to_float, within
from minidiff.runs import json_key

SIDE, CELLS, RINGS = 32, 8, 32   # of PixelPCA and of VAEFeatures a side; of Spectrum
ROWS = 2**14                     # images of which PixelPCA holds doubles at once


class Extractor(Protocol):
    name: str
    identity: str  # SHA-256 of weights and preprocessing, 64 hex digits

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N,3,H,W) → float32 (N,d)."""


class PixelPCA:
    """Grey 32×32 pixels on the first 64 principal axes of the real training images: no network.

    The coordinates are divided by one number, so that their mean variance over the training images
    is 1: the kernel distance depends on scale, and this makes data sets of dim and of bright images
    comparable.
    """

    name = "pixels-pca64"

    def __init__(self, k: int = 64):
        self.k = k

    def fit(self, images: Tensor) -> "PixelPCA":
        """Find the axes of real training images (N,3,H,W), N ≥ 2; up to 64 images give N − 1."""
        x = grey(images, SIDE).flatten(1)
        self.mean, self.axes = principal(x, self.k)
        self.scale = self._along(x).var(0).mean().sqrt().clamp(min=1e-12)
        self.identity = digest({"mean": self.mean, "axes": self.axes, "scale": self.scale},
                               name=self.name, side=SIDE, resize="area", channels="mean")
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return (self._along(grey(images, SIDE).flatten(1)) / self.scale).float()

    def _along(self, x: Tensor) -> Tensor:
        return torch.cat([(part.double() - self.mean) @ self.axes for part in x.split(ROWS)])


class Spectrum:
    """Texture, without a network: log power in rings of the 2-D spectrum, each standardised over
    real training images.

    Blur and noise hardly move the principal axes of small pixels, and a classifier may have learnt
    not to see them; here they cannot hide. Generated images often differ from real ones in just
    this (Durall et al. 2020). Beyond a few standard deviations the asinh grows like a logarithm:
    the kernel distance takes third powers, and one odd image would outweigh all others.
    """

    name = "spectrum"

    def fit(self, images: Tensor) -> "Spectrum":
        """Mean and standard deviation of every ring over real training images (N,C,H,W); N ≥ 2."""
        if len(images) < 2:
            raise InputError("a standard deviation needs at least 2 images, and there is "
                             f"{len(images)}")
        x = log_power(images)
        self.mean, self.std = x.mean(0), x.std(0).clamp(min=1e-6)
        self.identity = digest({"mean": self.mean, "std": self.std}, name=self.name, rings=RINGS,
                               window="hann")
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return ((log_power(images) - self.mean) / self.std).asinh().float()


def log_power(images: Tensor, rings: int = RINGS) -> Tensor:
    """uint8 (N,C,S,S) → float64 (N, rings), from 1 to S/2 cycles a side; at most S/2 − 1."""
    side = images.shape[-1]
    rings = min(rings, side // 2 - 1)
    # no edge of the image in its spectrum
    window = torch.hann_window(side, periodic=False, dtype=torch.float64)
    fy, fx = torch.fft.fftfreq(side)[:, None] * side, torch.fft.rfftfreq(side) * side
    ring = ((torch.hypot(fy, fx) - 1) / (side / 2 - 1) * rings).floor().long()
    inside = (ring >= 0) & (ring < rings)
    mean = F.one_hot(ring[inside], rings).double()
    mean = mean / mean.sum(0).clamp(min=1)
    parts = []
    for part in images.split(128):
        x = grey(part).double()
        x = (x - x.mean((1, 2), keepdim=True)) * window * window[:, None]
        parts.append(torch.fft.rfft2(x).abs().square()[:, inside] @ mean)
    return (torch.cat(parts) + 1e-12).log()


class PredictorFeatures:
    """The penultimate layer of our own classifier, trained on real training patients only."""

    name = "classifier"

    def __init__(self, predictor):
        self.predictor = predictor

    @cached_property
    def identity(self) -> str:
        """Hashed once, on first use: the classifier is taken as trained to its end."""
        return digest(self.predictor.net.state_dict(), name=self.name, side=self.predictor.size)

    def __call__(self, images: Tensor) -> Tensor:
        return self.predictor.features(images)


class VAEFeatures:
    """The generator's own latent means on a grid of 8 × 8 cells; refused as the only extractor.

    What the autoencoder throws away is invisible here, in real and synthetic images alike.
    """

    name = "vae"

    def __init__(self, vae):
        self.vae = vae

    @cached_property
    def identity(self) -> str:
        return digest(self.vae.state_dict(), name=self.name, side=CELLS, resize="area")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        device = next(self.vae.parameters()).device
        means = (self.vae.encode(to_float(part.to(device))).mean.float().cpu()
                 for part in images.split(32))
        return torch.cat([F.adaptive_avg_pool2d(z, CELLS).flatten(1) for z in means])


def filled(batch: Tensor, size: int) -> Tensor:
    """A batch (n,…), 0 < n ≤ size, filled up to (size,…) with its last entry.

    The kernels that a library picks, and with them the last bits, depend on the size of a batch: of
    one size always, an image's features do not depend on its company.
    """
    n = len(batch)
    assert 0 < n <= size, (n, size)
    return torch.cat([batch, batch[-1:].expand(size - n, *batch.shape[1:])]) if n < size else batch


def digest(tensors: Mapping[str, Tensor], **facts: Any) -> str:
    """SHA-256 over facts and named tensors (name, dtype, shape, bytes; ordered by name)."""
    hashed = hashlib.sha256(json_key(**facts).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        hashed.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        hashed.update(x.reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def grey(images: Pictures, side: int | None = None) -> Tensor:
    """Pixels (N,C,H,W), uint8, uint16 or floats of 0 … 255 → grey float32 (N,side,side) in 0…1, by
    means over areas; None: same size."""
    parts = (part.float().mean(1, keepdim=True) / TOP.get(part.dtype, 255)
             for part in images.split(256))
    return laid_in(torch.empty(len(images), *((side, side) if side else images.shape[2:])),
                   ((F.interpolate(x, size=(side, side), mode="area") if side else x)[:, 0]
                    for x in parts))


def principal(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and first k principal axes (d,k) of the rows of x (n,d), in float64: the smaller of
    XᵀX, which is summed over blocks of rows, and XXᵀ."""
    n, d = x.shape
    if n < 2:
        raise InputError(f"principal axes need at least 2 images, and there is {n}")
    k, mean = min(k, n - 1, d), sum(part.double().sum(0) for part in x.split(ROWS)) / n
    centred = (part.double() - mean for part in x.split(ROWS))
    if d <= n:
        return mean, torch.linalg.eigh(sum(part.T @ part for part in centred)).eigenvectors[
            :, -k:].flip(1)
    x = torch.cat([*centred])
    axes = x.T @ torch.linalg.eigh(x @ x.T).eigenvectors[:, -k:].flip(1)
    return mean, axes / axes.norm(dim=0).clamp(min=1e-12)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, both in 0…1: (N,…), (N,…) → (N,)."""
    return -10 * ((images - others) ** 2).flatten(1).mean(1).clamp(min=1e-12).log10()


def pca_psnr(train: Tensor, test: Tensor, k: int = 64, limit: int = 2000) -> float:
    """Mean PSNR in dB of test images rebuilt from k principal components of training images.

    The yardstick for an autoencoder: what a linear code of k numbers an image keeps. uint8
    (N,C,H,W) both; at most `limit` training images, evenly picked, are used.
    """
    step = -(-len(train) // limit)
    mean, axes = principal(grey(train[::step]).flatten(1), k)
    parts = (grey(part).flatten(1).double() for part in test.split(within(test.shape[-1])))
    return torch.cat([psnr(y, (mean + (y - mean) @ axes @ axes.T).clamp(0, 1))
                      for y in parts]).mean().item()
