"""Precision, recall, density and coverage: which images lie where the other set's images lie.

Around each image of a set there is a ball that reaches to the k-th nearest other image of the same
set.

    precision   share of synthetic images inside any real image's ball (Kynkäänniemi et al. 2019):
                is it plausible?
    recall      share of real images inside any synthetic image's ball: could it all have been made?
    density     how many real balls a synthetic image is in, divided by k (Naeem et al. 2020): one
                far-off real image with a huge ball does not count for much
    coverage    share of real images with a synthetic image inside their ball: collapse shows here

Two samples of one distribution do not score 1: 1,000 normal variables give about .53, .53, 1.0 and
.97 at n = 3,000, and the density of three pairs of samples ran from .98 to 1.10. So all four stand
beside real against real at the same n, with as many images on each side.
"""

from typing import NamedTuple

import numpy as np
import torch

from minidiff.errors import InputError
from minidiff.evaluation.metrics.pairwise import (
    ROWS,
    checked,
    distances,
    nearest_other_distance,
)


class PRDC(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(*, real: np.ndarray, fake: np.ndarray, k: int = 5) -> PRDC:
    """All four at the k-th neighbour, features (n,d) and (m,d); both sides need more than k images.

    k = 5 and "inside" = nearer than the radius, as the density and coverage paper has it. With k =
    3 the first two are those of Kynkäänniemi et al., who also count the border ("≤"): the same but
    where distances tie.
    """
    x, y = (torch.from_numpy(f) for f in checked(real, fake))
    for name, f in (("real", x), ("fake", y)):
        if len(f) <= k:
            raise InputError(f"balls to neighbour {k} need at least {k + 1} images; the {name} "
                             f"side has {len(f)}")
    radius, radius_fake = nearest_other_distance(x, k), nearest_other_distance(y, k)
    plausible, reached, covered, inside = torch.zeros(len(y), dtype=torch.bool), 0, 0, 0
    for part, r in zip(x.split(ROWS), radius.split(ROWS)):   # not all pairs at a time
        d = distances(part, y)
        balls = d < r[:, None]
        plausible |= balls.any(0)
        inside += int(balls.sum())
        covered += int(balls.any(1).sum())
        reached += int((d < radius_fake).any(1).sum())
    return PRDC(plausible.double().mean().item(), reached / len(x), inside / (k * len(y)),
                covered / len(x))
