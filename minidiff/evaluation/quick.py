"""Quick numbers of one set of samples while the next is made, so that drift is seen early:
distance, copies, labels.

They are for watching, not for judging: `evaluate.py` measures all images together, in several
spaces, with intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import Images
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.metrics.comparison import FEWEST
from minidiff.evaluation.metrics.distances import floor, kid, same_mix
from minidiff.evaluation.metrics.pairwise import distances, equalised
from minidiff.evaluation.metrics.release import ReleaseFilter


class Quick:
    """Held-out real images, and training images as the yardstick of copying; `judge` reads labels
    if it is given.
    """

    def __init__(self, train: Images, held_out: Images, judge: Predictor | None = None,
                 seed: int = 0):
        self.pca, self.judge, self.seed = PixelPCA().fit(train.pixels), judge, seed
        self.labels, self.patients = (np.array(held_out.table.column(name))
                                      for name in ("label", "patient"))
        self.features = self.pca(held_out.pixels).double().numpy()
        self.train, self.held_out = equalised(train.pixels), equalised(held_out.pixels)
        self.usual = distances(self.held_out, self.train).min(1).values.median().item()
        self.floors: dict[tuple, float] = {}

    def __call__(self, pixels: Tensor, labels: Sequence[str]) -> dict[str, float]:
        """uint8 (n, 3, H, W) and the labels asked for → KD to held-out images of the same mix of
        labels, its floor's 95 % point, the median distance to the nearest training image by that of
        held-out images, and the share recognised. With fewer than 20 images on a side there is no
        KD."""
        rows = same_mix(self.labels, labels, self.seed)
        numbers = {"n": len(pixels), "n_real": len(rows)}
        if min(len(pixels), len(rows)) >= FEWEST:
            made, real, patients = self.pca(pixels).double().numpy(), self.features[
                rows], self.patients[rows]
            numbers["KD"] = kid(real=real, fake=made, real_patients=patients)
            numbers["KD_floor_95"] = self.floor(len(rows), len(pixels))
        numbers["nearest"] = distances(equalised(pixels),
                                       self.train).min(1).values.median().item() / self.usual
        if self.judge:
            numbers["recognised"] = recognised(self.judge, pixels, labels).float().mean().item()
        return numbers

    def floor(self, n_real: int, n: int) -> float:
        """95 % point of the KD between two draws of held-out patients; at half their number, where
        the set is larger.
        """
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
        """Tells near-copies of training images from images that may leave; InputError where too few
        images are held out.
        """
        return ReleaseFilter({"pixels": self.train}, {"pixels": self.held_out})

    def near_copies(self, pixels: Tensor) -> Tensor:
        """Is each image a near-copy of a training image? (n,) bool."""
        return ~self.release({"pixels": equalised(pixels)}).keep


def recognised(judge: Predictor, pixels: Tensor, labels: Sequence[str]) -> Tensor:
    """Is each image read by the classifier as the label that was asked for? (n,) bool."""
    names = next(v.values for v in judge.variables if v.name == "label")
    unknown = sorted({label for label in labels if label not in names})
    if unknown:
        raise InputError(f"the classifier knows {', '.join(names)}, not {', '.join(unknown)}")
    return judge.predict(pixels)["label"].argmax(1) == torch.tensor([names.index(label)
                                                                     for label in labels])
