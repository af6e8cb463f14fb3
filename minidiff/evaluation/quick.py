"""Quick numbers of one set of samples while the next is made, so that drift is seen early.

They are for watching, not for judging: `evaluate.py` measures all images together, in several
spaces, with intervals.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from torch import Tensor

from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import Images
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics.agreement import recognised
from minidiff.evaluation.metrics.comparison import FEWEST
from minidiff.evaluation.metrics.distances import floor, kid, same_mix
from minidiff.evaluation.metrics.pairwise import distances, equalised
from minidiff.evaluation.metrics.release import ReleaseFilter


class Quick:
    """Held-out real images, and training images to look for copies of; `judge` reads labels."""

    def __init__(self, train: Images, held_out: Images, judge: Predictor | None = None,
                 seed: int = 0):
        self.pca, self.judge, self.seed = PixelPCA().fit(train.pixels), judge, seed
        self.labels, self.patients = (np.array(held_out.table.column(name))
                                      for name in ("label", "patient"))
        self.features = self.pca(held_out.pixels).double().numpy()
        self.train, self.held_out = equalised(train.pixels), equalised(held_out.pixels)
        self.usual = self._to_train(self.held_out)
        self.floors: dict[tuple, float] = {}

    def __call__(self, pixels: Tensor, labels: Sequence[str]) -> dict[str, float]:
        """Numbers of uint8 (n, 3, H, W) and the labels asked for.

        KD to held-out images of the same mix of labels and its floor's 95 % point, from 20 images a
        side on; the median distance to the nearest training image by that of held-out images; the
        share recognised.
        """
        rows = same_mix(self.labels, labels, self.seed)
        numbers = {"n": len(pixels), "n_real": len(rows)}
        if min(len(pixels), len(rows)) >= FEWEST:
            numbers["KD"] = kid(real=self.features[rows], fake=self.pca(pixels).double().numpy(),
                                real_patients=self.patients[rows])
            numbers["KD_floor_95"] = self.floor(len(rows), len(pixels))
        numbers["nearest"] = self._to_train(equalised(pixels)) / self.usual
        if self.judge:
            numbers["recognised"] = recognised(self.judge, pixels, labels).float().mean().item()
        return numbers

    def _to_train(self, images: Tensor) -> float:
        return distances(images, self.train).min(1).values.median().item()

    def floor(self, n_real: int, n: int) -> float:
        """95 % point of the KD between two draws of held-out patients, half of them at most."""
        n, m = (min(size, len(self.features) // 2) for size in (n, n_real))
        if (n, m) not in self.floors:
            try:
                self.floors[n, m] = floor(kid, real=self.features, patients=self.patients, n=m, m=n,
                                          seed=self.seed).high
            except InputError:  # too few patients
                self.floors[n, m] = float("inf")
        return self.floors[n, m]

    @cached_property
    def release(self) -> ReleaseFilter:
        """Finds near-copies of training images; InputError where too few images are held out."""
        return ReleaseFilter({"pixels": self.train}, {"pixels": self.held_out})

    def near_copies(self, pixels: Tensor) -> Tensor:
        """Is each image a near-copy of a training image? (n,) bool."""
        return ~self.release({"pixels": equalised(pixels)}).keep
