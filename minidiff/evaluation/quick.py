"""Quick numbers of one set of samples while the next is made, so that drift is seen early; and
which images may leave: those that are no near-copy of a training image.

The numbers are for watching, not for judging: `evaluate.py` measures all images together, in
several spaces, with intervals.

The nearest training image of a near-copy is nearer, by the standard of the copy's own neighbourhood
(`copying.calibrated`), than 99 % of held-out images have theirs. So 1 % of honest images are held
back, and more of those that are smoother than real ones (13 % of phantoms without noise where the
real ones have some): that is the price of a filter that judges images one by one, and no sign of
copying; whether a set holds copies is for `copying.memorisation` to say.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import Images
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics.agreement import reads, recognised
from minidiff.evaluation.metrics.copying import NEXT, calibrated
from minidiff.evaluation.metrics.distances import floor, kid, matched
from minidiff.evaluation.metrics.pairwise import equalised, nearest
from minidiff.evaluation.metrics.report_rows import FEWEST

QUANTILE = 0.01     # of held-out images, that lie as near to training images as a near-copy
ENOUGH = 2000       # held-out images, evenly picked: for a look at each set, more take too long


class Quick:
    """Held-out real images, and training images to look for copies of; `judge` reads labels."""

    def __init__(self, train: Images, held_out: Images, judge: Predictor | None = None):
        self.pca, self.judge = PixelPCA().fit(train.pixels), judge
        step = -(-len(held_out) // ENOUGH)
        real = held_out.pixels[::step]
        self.labels, self.patients = (np.array(held_out.table.column(name)[::step])
                                      for name in ("label", "patient"))
        self.features = self.pca(real).double().numpy()
        self.train, self.held_out = equalised(train.pixels), equalised(real)
        self.usual = self._to_train(self.held_out)
        self.floors: dict[tuple, float] = {}

    def __call__(self, pixels: Tensor, labels: Sequence[str]) -> dict[str, float]:
        """Numbers of uint8 (n, 3, H, W) and the labels asked for.

        KD to held-out images of the same mix of labels and its floor's 95 % point, from 20 images a
        side on; the median distance to the nearest training image by that of held-out images; the
        share recognised, if the judge knows the labels.
        """
        rows, own = matched(self.labels.tolist(), labels)
        numbers = {"n": len(own), "n_real": len(rows)}
        if min(len(own), len(rows)) >= FEWEST:
            numbers["KD"] = kid(real=self.features[rows],
                                fake=self.pca(pixels[own]).double().numpy(),
                                real_patients=self.patients[rows])
            numbers["KD_floor_95"] = self.floor(len(rows), len(own))
        numbers["nearest"] = self._to_train(equalised(pixels)) / self.usual
        if reads(self.judge, labels):
            numbers["recognised"] = recognised(self.judge, pixels, labels).float().mean().item()
        return numbers

    def _to_train(self, images: Tensor) -> float:
        return nearest(images, self.train, 1).median().item()

    def floor(self, n_real: int, n: int) -> float:
        """95 % point of the KD between two draws of held-out patients, half of them at most."""
        n, m = (min(size, len(self.features) // 2) for size in (n, n_real))
        if (n, m) not in self.floors:
            found = floor(kid, real=self.features, patients=self.patients, n=m, m=n)
            self.floors[n, m] = found.high if found else math.inf   # too few patients
        return self.floors[n, m]

    @cached_property
    def near_limit(self) -> float:
        """The calibrated distance below which an image is a near-copy; InputError where there are
        too few images to set it."""
        fewest = round(1 / QUANTILE)   # with fewer, the nearest 1 % of them is none
        if len(self.held_out) < fewest or len(self.train) <= NEXT:
            raise InputError(f"near-copies cannot be told apart with {len(self.held_out)} held-out "
                             f"and {len(self.train)} training images: needed are {fewest} and "
                             f"{NEXT + 1} or more")
        return max(self._calibrated(self.held_out).quantile(QUANTILE).item(), 1e-12)

    def near_copies(self, pixels: Tensor) -> Tensor:
        """Is each image a near-copy of a training image? (n,) bool."""
        return self._calibrated(equalised(pixels)) < self.near_limit

    def _calibrated(self, images: Tensor) -> Tensor:
        return calibrated(nearest(images, self.train, NEXT))[0]
