"""Augmentation: as a careful radiographer varies, and as hospitals differ in detector, film,
printer, camera and crop.

A classifier that sees every training image at another sharpness, brightness, frame and scale cannot
recognise a hospital by these (domain randomisation, Tobin et al. 2017). It can still recognise the
patients of a hospital.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.overlap import send

# Of `augment`. No horizontal flip: a heart on the right is a rare disease (situs inversus), not a
# variation.
ROTATION, SHIFT, SCALE = 5.0, 0.04, 0.06  # degrees; share of the side; larger or smaller
GAIN, BIAS = 0.10, 0.05                   # bias: of the range
# Of `vary`, between hospitals
TURN, MOVE = 10.0, 0.08          # degrees; share of the side
ZOOM, ASPECT = 0.18, 0.15        # up to so much larger or smaller; wider than high or the reverse
GAMMA, CONTRAST, LIGHT = 0.5, 0.3, 0.1  # exponents e^±.5; of the range
BLUR, NOISE = 0.010, 0.04        # standard deviations: share of the side; of the range
FRAME = 0.08                     # share of the side that may be black or white at each edge


def augment(batch: Tensor, generators: Sequence[torch.Generator], strength: float = 1.0) -> Tensor:
    """Small rotation, shift, scale, gain and bias of float32 (N,C,S,S) in [-1,1]; the same out.

    Image k depends on its own CPU generator alone, of which it takes six numbers, whatever else is
    in the batch.
    """
    n, _, height, width = batch.shape
    assert len(generators) == n and height == width, (len(generators), batch.shape)
    if n == 0 or strength == 0:
        return batch
    draws = torch.stack([torch.rand(6, generator=g, dtype=torch.float64) for g in generators])
    angle, dx, dy, zoom, gain, bias = (strength * (2 * draws - 1)).T
    placed = moved(batch, angle * math.radians(ROTATION), SHIFT * dx, SHIFT * dy,
                   1 / (1 + zoom * SCALE))
    gain, bias = send(torch.stack([1 + GAIN * gain, 2 * BIAS * bias]).to(batch.dtype), batch.device)
    return (placed * gain.view(n, 1, 1, 1) + bias.view(n, 1, 1, 1)).clamp(-1, 1)


def vary(batch: Tensor, generators: Sequence[torch.Generator], strength: float = 1.0) -> Tensor:
    """float32 (N,C,S,S) in [-1,1] → the same, each as another hospital might have taken it.

    Image k depends on its own CPU generator alone, whatever else is in the batch.
    """
    n = len(batch)
    if n == 0 or strength == 0:
        return batch
    draws = send(torch.stack([torch.rand(15, generator=g) for g in generators]), batch.device)
    u = strength * (2 * draws - 1)  # (N, draws) in ±strength
    angle, dx, dy, zoom, aspect = u[:, :5].T
    x = moved(batch, angle * math.radians(TURN), MOVE * dx, MOVE * dy, torch.exp(-ZOOM * zoom),
              torch.exp(ASPECT * aspect))
    return developed(x, draws[:, 5:], generators, strength)


def developed(x: Tensor, draws: Tensor, generators: Sequence[torch.Generator],
              strength: float = 1.0) -> Tensor:
    """Detector, film, printer and frame of another hospital; ten numbers in 0 … 1 an image (N,10),
    and grain of its generator."""
    n, side, u = len(x), x.shape[-1], strength * (2 * draws - 1)
    x = _blurred(x, BLUR * side * strength * draws[:, 0])
    x = ((x + 1) / 2).clamp(1e-4, 1) ** torch.exp(GAMMA * u[:, 1]).view(n, 1, 1, 1)
    contrast, light = (1 + CONTRAST * u[:, 2]), LIGHT * u[:, 3]
    x = (x - 0.5) * contrast.view(n, 1, 1, 1) + 0.5 + light.view(n, 1, 1, 1)
    grain = send(torch.stack([torch.randn(1, side, side, generator=g) for g in generators]),
                 x.device)
    x = x + NOISE * strength * draws[:, 4].square().view(n, 1, 1, 1) * grain  # mostly little
    return _framed(x.clamp(0, 1), FRAME * u[:, 5:9], (draws[:, 9] > 0.5).float()) * 2 - 1


def moved(x: Tensor, angle: Tensor, dx: Tensor, dy: Tensor, scale: Tensor,
           wide: Tensor | float = 1.0) -> Tensor:
    """Turned by radians, shifted by shares of the side, and taken from a part `scale` times as
    large and `wide` times as wide; (N,) each."""
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # maps places of the result to places of the input; coordinates run from -1 to 1, so a shift
    # counts twice
    theta = torch.stack([cos * wide, -sin, 2 * dx, sin * wide, cos, 2 * dy], 1)
    theta = send(theta.view(-1, 2, 3).to(x.dtype), x.device)
    places = F.affine_grid(theta, x.shape, align_corners=False)
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
