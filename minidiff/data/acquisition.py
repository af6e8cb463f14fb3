"""Augmentation as between hospitals: what a detector, a film, a printer, a camera and a crop do to
a chest X-ray.

A classifier that sees every training image at another sharpness, brightness, frame and scale cannot
recognise a hospital by these (domain randomisation, Tobin et al. 2017). It can still recognise the
patients of a hospital.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION, SHIFT = 10.0, 0.08   # degrees; share of the side
ZOOM, ASPECT = 0.18, 0.15      # up to so much larger or smaller; wider than high or the reverse
GAMMA, GAIN, BIAS = 0.5, 0.3, 0.1  # exponents e^±.5; of the range
BLUR, NOISE = 0.010, 0.04      # standard deviations: share of the side; of the range
FRAME = 0.08                   # share of the side that may be black or white at each edge
DRAWS = 15


def vary(batch: Tensor, generators: Sequence[torch.Generator], strength: float = 1.0) -> Tensor:
    """float32 (N,C,S,S) in [-1,1] → the same, each as another hospital might have taken it.

    Image k depends on its own CPU generator alone, whatever else is in the batch.
    """
    n, _, side, _ = batch.shape
    if n == 0 or strength == 0:
        return batch
    draws = torch.stack([torch.rand(DRAWS, generator=g) for g in generators]).to(batch.device)
    u = strength * (2 * draws - 1)  # (N, draws) in ±strength
    x = _moved(batch, *u[:, :5].T)
    x = _blurred(x, BLUR * side * strength * draws[:, 5])
    x = ((x + 1) / 2).clamp(1e-4, 1) ** torch.exp(GAMMA * u[:, 6]).view(n, 1, 1, 1)
    x = (x - 0.5) * (1 + GAIN * u[:, 7]).view(n, 1, 1, 1) + 0.5 + BIAS * u[:, 8].view(n, 1, 1, 1)
    grain = torch.stack([torch.randn(1, side, side, generator=g)
                         for g in generators]).to(batch.device)
    x = x + NOISE * strength * draws[:, 9].square().view(n, 1, 1, 1) * grain  # mostly little
    return _framed(x.clamp(0, 1), FRAME * u[:, 10:14], (draws[:, 14] > 0.5).float()) * 2 - 1


def _moved(x: Tensor, angle: Tensor, dx: Tensor, dy: Tensor, zoom: Tensor,
           aspect: Tensor) -> Tensor:
    angle, scale = angle * math.radians(ROTATION), torch.exp(-ZOOM * zoom)
    wide = torch.exp(ASPECT * aspect)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos * wide, -sin, 2 * SHIFT * dx, sin * wide, cos, 2 * SHIFT * dy], 1)
    places = F.affine_grid(theta.view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, places, mode="bilinear", padding_mode="border", align_corners=False)


def _blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Each image by its own Gaussian (N,), in px."""
    n, c, side, _ = x.shape
    reach = max(1, math.ceil(2.5 * BLUR * side))
    offset = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.clamp(min=0.05)[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)
    y = F.pad(x.reshape(1, n * c, side, side), (reach,) * 4, mode="replicate")
    y = F.conv2d(F.conv2d(y, kernel[:, None, None, :], groups=n * c), kernel[:, None, :, None],
                 groups=n * c)
    return y.view_as(x)


def _framed(x: Tensor, widths: Tensor, shade: Tensor) -> Tensor:
    """A frame of one shade (N,) with four widths (N,4), shares of the side; below 0 is no frame."""
    side = x.shape[-1]
    place = (torch.arange(side, device=x.device) + 0.5) / side
    left, right, top, bottom = widths[:, :, None].unbind(1)                        # (N,1) each
    across, down = (place >= left) & (place <= 1 - right), (place >= top) & (place <= 1 - bottom)
    inside = (down[:, :, None] & across[:, None, :])[:, None]
    return torch.where(inside, x, shade.view(-1, 1, 1, 1))
