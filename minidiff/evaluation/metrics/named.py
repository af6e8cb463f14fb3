"""Which synthetic images are copies of a training image, named one by one.

A synthetic image is laid over the training images that it is most like, moved and mirrored ones,
too (`pairwise.overlaid`), and named where it agrees with one of them in fine detail better than two
different patients ever do. The rule needs no sample size and no random split. Its limit is .6 of
the distance below which 5 % of held-out images lie, and .09 at most. Of 1,124 real X-rays of 764
patients at 64 px, also moved and mirrored, none came so near to another patient's, and blurred, one
did; of 1,000 phantoms, which are drawings and more alike, less than one did
(docs/memorisation.md).

What the rule would have found is measured on the images at hand: *probes* are training images that
are turned, shifted, zoomed, mirrored, blurred and made noisy, as a generator may do. The share of
probes that the rule names says how many copies among n images it would have noticed.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.evaluation.metrics.pairwise import SHIFT, TURN, ZOOM, distances
from minidiff.statistics import wilson

MOST, PART, QUANTILE = 0.09, 0.6, 0.05
EQUAL = 1e-6   # above the rounding between an image and itself
KEPT = 100   # named images, of which the result keeps the numbers
POWER, CONFIDENCE = 0.8, 0.95
PROBES, BLUR, GRAIN, CONTRAST = 64, 0.7, 2.5, 0.1  # px at 64 px; grey values; share


def limit(heldout_to_train: Tensor) -> float:
    """The distance below which an image is a copy, from those of held-out images (m, T).

    An equal image is one even where held-out images, too, equal those of training.
    """
    return max(EQUAL, min(MOST, PART * float(heldout_to_train.amin(1).quantile(QUANTILE))))


def named(to_train: Tensor, heldout_to_train: Tensor, train: Tensor, seed: int = 0) -> dict:
    """The synthetic images that are copies, the nearest first; and what would have been found.

    to_train (n, T) and heldout_to_train (m, T) are distances by `overlaid`, train (T,1,s,s) the
    small training images. Held-out images are named by the same rule: any at all says that a
    patient, or one picture, stands on both sides of the split.
    """
    most = limit(heldout_to_train)
    nearest = to_train.min(1)
    found = (_probed(train, seed) < most).tolist()
    images = [{"fake": i, "train": int(nearest.indices[i]), "distance": float(nearest.values[i])}
              for i in nearest.values.argsort(stable=True).tolist() if nearest.values[i] < most]
    return {"limit": most, "n": len(to_train), "found": len(images), "images": images[:KEPT],
            "heldout": int((heldout_to_train < most).any(1).sum()),
            "probes": len(found), "probes_found": sum(found),
            **shares(len(to_train), sum(found), len(found))}


def shares(n: int, found: int, probes: int) -> dict[str, float | None]:
    """What it says that none of n images was named, by a rule that names so many of the probes.

    "seen": the smallest share of copies like the probes of which one at least would have been named
    with probability .8; "at_most": the share that is left possible (one-sided, 95 %), where
    the lower end of Wilson's interval stands for the share of probes that are named.
    """
    def share(chance: float, named: float) -> float | None:
        return min(1.0, (1 - chance ** (1 / n)) / named) if found else None

    return {"seen": share(1 - POWER, found / probes),
            "at_most": share(1 - CONFIDENCE, wilson(found, probes)[0])}


@lru_cache(maxsize=4)
def _probed(train: Tensor, seed: int) -> Tensor:
    """Distance of each probe to its nearest training image (k,)."""
    index = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:PROBES]
    return distances(probes(train[index], seed), train).amin(1)


def probes(images: Tensor, seed: int = 0) -> Tensor:
    """Copies of small images (k,1,s,s) in 0…255 as a generator may make them; every other mirrored.

    Turned, shifted and zoomed as far as by the augmentation of training, with other brightness and
    contrast, blurred as by a network, and noisy.
    """
    g = torch.Generator().manual_seed(seed)
    turn, dx, dy, zoom = (torch.rand(4, len(images), generator=g) * 2 - 1)
    angle, scale = turn.deg2rad() * TURN, 1 + ZOOM * zoom
    cos, sin = angle.cos() / scale, angle.sin() / scale
    mirror = 1 - 2.0 * (torch.arange(len(images)) % 2)
    maps = torch.stack([torch.stack([cos * mirror, -sin, 2 * SHIFT * dx], 1),
                        torch.stack([sin * mirror, cos, 2 * SHIFT * dy], 1)], 1)
    x = F.grid_sample(images.float(), F.affine_grid(maps, images.shape, align_corners=False),
                      padding_mode="border", align_corners=False)
    sigma = BLUR * images.shape[-1] / 64
    reach = torch.arange(-3, 4) / sigma
    wave = (-reach.square() / 2).exp() / (-reach.square() / 2).exp().sum()
    x = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), (wave[:, None] * wave)[None, None])
    gain, bias = ((torch.rand(2, len(images), 1, 1, 1, generator=g) * 2 - 1) * CONTRAST)
    x = x * (1 + gain) + 128 * bias + GRAIN * torch.randn(x.shape, generator=g)
    return x.clamp(0, 255).to(images.dtype)
