"""An extractor for texture, without a network: an image's power at each spatial frequency.

Blur and noise hardly move the principal axes of small pixels, and a classifier may have learnt not
to see them; here they cannot hide. Generated images often differ from real ones in just this
(Durall et al. 2020).
"""

import torch
from torch import Tensor

from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import digest, grey


class Spectrum:
    """Log power in rings of the 2-D spectrum, each standardised over real training images.

    Beyond a few standard deviations the asinh grows like a logarithm: the kernel distance takes
    third powers, and one odd image would outweigh all others.
    """

    name = "spectrum"

    def __init__(self, rings: int = 32):
        self.rings = rings

    def fit(self, images: Tensor) -> "Spectrum":
        """Mean and standard deviation of every ring over real training images (N,C,H,W); N ≥ 2."""
        if len(images) < 2:
            raise InputError("a standard deviation needs at least 2 images, and there is "
                             f"{len(images)}")
        x = self._log_power(images)
        self.mean, self.std = x.mean(0), x.std(0).clamp(min=1e-6)
        self.identity = digest({"mean": self.mean, "std": self.std}, name=self.name,
                               rings=self.rings, window="hann")
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return ((self._log_power(images) - self.mean) / self.std).asinh().float()

    def _log_power(self, images: Tensor) -> Tensor:
        """uint8 (N,C,S,S) → float64 (N, rings), from 1 to S/2 cycles a side; at most S/2 − 1."""
        side = images.shape[-1]
        rings = min(self.rings, side // 2 - 1)
        # no edge of the image in its spectrum
        window = torch.hann_window(side, periodic=False, dtype=torch.float64)
        fy, fx = torch.fft.fftfreq(side)[:, None] * side, torch.fft.rfftfreq(side) * side
        ring = ((torch.hypot(fy, fx) - 1) / (side / 2 - 1) * rings).floor().long()
        inside = (ring >= 0) & (ring < rings)
        mean = torch.nn.functional.one_hot(ring[inside], rings).double()
        mean = mean / mean.sum(0).clamp(min=1)
        parts = []
        for part in images.split(128):
            x = grey(part).double()
            x = (x - x.mean((1, 2), keepdim=True)) * window * window[:, None]
            parts.append(torch.fft.rfft2(x).abs().square()[:, inside] @ mean)
        return (torch.cat(parts) + 1e-12).log()
