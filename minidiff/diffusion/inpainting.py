"""Inpainting: a sampler's `(x, sigma) → denoised` that knows a part of the image already.

    keeping      D outside the mask is the known z, inside it the network's estimate; so the known
                 part of x runs along z + σ·noise, and the network sees it beside the new part
    resampled    each step taken several times, with fresh noise in between that leads back to
                 where it began (RePaint, Lugmayr et al. 2022, algorithm 1, with jumps of one step)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.diffusion.denoiser import Denoise
from minidiff.diffusion.samplers import Noise, Steps


def keeping(denoise: Denoise, known: Tensor, new: Tensor) -> Denoise:
    """`known` (N, C, h, w) wherever `new` (N, 1, h, w) is 0; where it is 1, what `denoise` gives.
    """
    return lambda x, sigma: torch.lerp(known, denoise(x, sigma), new)


def resampled(step: Callable[..., Steps], x: Tensor, sigmas: Tensor, times: int,
              noise: Noise) -> Steps:
    """A sampler, `step(x, sigmas)`, that takes each step of the ladder so many times.

    Each is a run of its own: samplers that look back a step are of first order then.
    """
    for pair in map(torch.stack, zip(sigmas, sigmas[1:])):
        again = (pair[0] ** 2 - pair[1] ** 2).sqrt().item()
        for k in range(times):
            *_, (x, denoised) = step(x + noise() * again if k else x, pair)
        yield x, denoised
