"""Sets of images that a sound evaluation must reject, each by the verdict that is named beside it.

A table of distances may be blind: to copies (a copied training set has the best distances of all),
to blur, to a collapse. So these known failures stand among its columns, and where one is not
caught, the verdicts on real candidates are worth nothing. They are made of real training images of
one label; the last two are real images under a false name.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

BLUR = 2.0       # standard deviation, pixels
NOISE = 0.05     # standard deviation, of the range
LEFT = 5         # images that remain after the collapse
CROP = 0.04      # of a near-copy: largest share of the side that is cut off
GRAIN = 0.01     # of a near-copy: standard deviation of its noise, of the range

# training images, n → at most n images, uint8 (N,C,H,W)
Make = Callable[[Tensor, int, np.random.Generator], Tensor]


class Control(NamedTuple):
    verdict: str                # that must say no
    make: Make | None = None    # None: real images under a false name


def copycat(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Training images, drawn with replacement, at most as many as there are."""
    return train[torch.from_numpy(rng.integers(0, len(train), min(n, len(train))))]


def near_copy(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Training images, half of them mirrored, each cropped by up to 4 % and a little noisy."""
    x = copycat(train, n, rng).float() / 255
    n = len(x)
    zoom = 1 - rng.uniform(0, CROP, n)
    theta = np.zeros((n, 2, 3))
    theta[:, 0, 0] = zoom * np.where(rng.random(n) < 0.5, -1, 1)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = rng.uniform(-1, 1, (n, 2)) * (1 - zoom[:, None])       # the crop stays inside
    grid = F.affine_grid(torch.from_numpy(theta).float(), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return _with_noise(x, GRAIN, rng)


def blurred(train: Tensor, n: int, rng: np.random.Generator, sigma: float = BLUR) -> Tensor:
    """Training images through a Gaussian filter of `sigma` pixels."""
    x = scipy.ndimage.gaussian_filter(_drawn(train, n, rng).float().numpy(), (0, 0, sigma, sigma),
                                      mode="nearest")
    return torch.from_numpy(x).round().clamp(0, 255).byte()


def noisy(train: Tensor, n: int, rng: np.random.Generator, sigma: float = NOISE) -> Tensor:
    """Training images with white noise of `sigma` of the range."""
    return _with_noise(_drawn(train, n, rng).float() / 255, sigma, rng)


def collapsed(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Five training images over and over."""
    few = _drawn(train, LEFT, rng)
    return few[torch.arange(n) % len(few)]


def _drawn(train: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """n different images at random; all, where there are fewer."""
    return train[torch.from_numpy(rng.permutation(len(train))[:n])]


def _with_noise(x: Tensor, sigma: float, rng: np.random.Generator) -> Tensor:
    """The same noise in all channels: grey images stay grey."""
    noise = torch.from_numpy(rng.standard_normal((len(x), 1, *x.shape[2:]), dtype=np.float32))
    return ((x + sigma * noise) * 255).round().clamp(0, 255).byte()


CONTROLS: dict[str, Control] = {
    "copycat": Control("NOVELTY", copycat),
    "near-copy": Control("NOVELTY", near_copy),
    "blur": Control("FIDELITY", blurred),
    "noise": Control("FIDELITY", noisy),
    "collapse": Control("COVERAGE", collapsed),
    "wrong class": Control("LABEL"),       # held-out images of another label
    "wrong source": Control("FIDELITY"),   # images of the label from another source
}
OPTIONAL = ("wrong source",)   # the data may hold no images for it
