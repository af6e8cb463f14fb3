"""Sets of images that a sound evaluation must condemn, each by the verdict that is named beside it.

A table of distances may be blind: to copies (a copied training set has the best distances of all),
to blur, to a collapse. So these known frauds stand among its columns, and where one is not caught,
what is said of the real candidates is worth nothing. All are made of real training images of one
label; the last two are real images under a false name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 2.0       # pixels, standard deviation
NOISE = 0.05     # of the range, standard deviation
LEFT = 5         # images that remain after the collapse
# of a near-copy: share of the side that is cut off, at most; noise, of the range
CROP, GRAIN = 0.04, 0.01

# training images, n → at most n images, uint8 (N,C,H,W)
Make = Callable[[Tensor, int, np.random.Generator], Tensor]


class Control(NamedTuple):
    verdict: str         # that must say no
    what: str
    make: Make | None    # None: real images under a false name


def copycat(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Training images, drawn with replacement, at most as many as there are."""
    return train[torch.from_numpy(rng.integers(0, len(train), min(n, len(train))))]


def near_copy(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Training images, half of them mirrored, each cropped by up to 4 % at a random place, with a
    little noise.
    """
    x = copycat(train, n, rng).float() / 255
    n = len(x)
    zoom = 1 - rng.uniform(0, CROP, n)
    theta = np.zeros((n, 2, 3))
    theta[:, 0, 0], theta[:, 1, 1] = zoom * np.where(rng.random(n) < 0.5, -1, 1), zoom
    theta[:, :, 2] = rng.uniform(-1, 1, (n, 2)) * (1 - zoom[:, None])       # the crop stays inside
    grid = F.affine_grid(torch.from_numpy(theta).float(), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return _noisy(x, GRAIN, rng)


def blurred(train: Tensor, n: int, rng: np.random.Generator, sigma: float = BLUR) -> Tensor:
    """Training images through a Gaussian filter of `sigma` pixels."""
    x = scipy.ndimage.gaussian_filter(_some(train, n, rng).float().numpy(), (0, 0, sigma, sigma),
                                      mode="nearest")
    return torch.from_numpy(x).round().clamp(0, 255).byte()


def noisy(train: Tensor, n: int, rng: np.random.Generator, sigma: float = NOISE) -> Tensor:
    """Training images with white noise of `sigma` of the range."""
    return _noisy(_some(train, n, rng).float() / 255, sigma, rng)


def collapsed(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Five training images over and over."""
    few = _some(train, LEFT, rng)
    return few[torch.arange(n) % len(few)]


def _some(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """n different images at random; all, where there are fewer."""
    return train[torch.from_numpy(rng.permutation(len(train))[:n])]


def _noisy(x: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    # grey stays grey
    noise = torch.from_numpy(rng.standard_normal((len(x), 1, *x.shape[2:]), dtype=np.float32))
    return ((x + sigma * noise) * 255).round().clamp(0, 255).byte()


CONTROLS: dict[str, Control] = {
    "copycat": Control("NOVELTY", "training images, drawn with replacement", copycat),
    "near-copy": Control("NOVELTY", "training images, half mirrored, slightly cropped, a little "
                         "noise", near_copy),
    "blur": Control("FIDELITY", f"training images, blurred with σ = {BLUR:g} px", blurred),
    "noise": Control("FIDELITY", f"training images with noise, σ = {NOISE:g} of the range", noisy),
    "collapse": Control("COVERAGE", f"{LEFT} training images, over and over", collapsed),
    "wrong class": Control("LABEL", "held-out images of another label", None),
    "wrong source": Control("FIDELITY", "real images of the label from another source", None),
}
