"""Which synthetic images may leave: those that are no near-copy of a training image.

The nearest training image of a near-copy is nearer, by the standard of the copy's own neighbourhood
(`copying.calibrated`), than 99 % of held-out images have theirs. So 1 % of honest images are held
back in each space, and more of those that are smoother than real ones (13 % of phantoms without
noise where the real ones have some): that is the price of a filter that judges images one by one,
and no sign of copying; whether a set holds copies is for `copying.memorisation` to say.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.errors import InputError
from minidiff.evaluation.metrics.copying import NEXT, calibrated
from minidiff.evaluation.metrics.pairwise import distances

QUANTILE = 0.01
FEWEST = round(1 / QUANTILE)   # held-out images: with fewer, the nearest 1 % of them is none


class Release(NamedTuple):
    """Which images may leave, and why others may not."""

    keep: Tensor          # (n,) bool
    reasons: list[str]    # "" where an image may leave
    nearest: Tensor       # (n,) int: the training image that it is most conspicuously near to
    relative: Tensor      # (n,): its calibrated distance by the limit there; near-copies < 1


class ReleaseFilter:
    """Training images and the limits that held-out images set; call it with synthetic images."""

    def __init__(self, train: Mapping[str, Tensor], heldout: Mapping[str, Tensor],
                 names: Sequence[str] | None = None):
        """Spaces as for `memorisation`; names are those of the training images, for the reasons.

        Raises InputError where there are too few images to set a limit.
        """
        n, m = (len(next(iter(side.values()))) for side in (train, heldout))
        if m < FEWEST or n <= NEXT:
            raise InputError(f"near-copies cannot be told apart with {m} held-out and {n} training "
                             f"images: needed are {FEWEST} and {NEXT + 1} or more")
        self.train, self.names = train, names
        self.limits = {name: calibrated(distances(x, train[name]))[0].quantile(QUANTILE).item()
                       for name, x in heldout.items()}

    def __call__(self, fake: Mapping[str, Tensor]) -> Release:
        """Synthetic images in the same spaces, or some of them."""
        found = {name: calibrated(distances(x, self.train[name])) for name, x in fake.items()}
        relative = torch.stack([value / max(self.limits[name], 1e-12)
                                for name, (value, _) in found.items()])
        least, where = relative.min(0)
        nearest = torch.stack([index for _, index in found.values()]).gather(0, where[None])[0]
        spaces = list(found)
        reasons = [self._reason(int(i), spaces[w], r) if r < 1 else "" for i, w, r in
                   zip(nearest, where.tolist(), least.tolist())]
        return Release(least >= 1, reasons, nearest, least)

    def _reason(self, i: int, space: str, relative: float) -> str:
        name = f"training image {i}" if self.names is None else self.names[i]
        return (f"a near-copy of {name} ({space}: {relative:.2f} of the limit that 1 % of held-out "
                "images are below)")
