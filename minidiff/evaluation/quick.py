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

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import minidiff
from minidiff import runs
from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import Images
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import PixelPCA, PredictorFeatures
from minidiff.evaluation.metrics.agreement import reads, recognised
from minidiff.evaluation.metrics.copying import NEXT, calibrated
from minidiff.evaluation.metrics.distances import floor, kid, matched
from minidiff.evaluation.metrics.pairwise import blocks, distances, equalised, nearest
from minidiff.evaluation.metrics.report_rows import FEWEST

QUANTILE = 0.01     # of held-out images, that lie as near to training images as a near-copy
ENOUGH = 2000       # held-out images, evenly picked: for a look at each set, more take too long


class Real(NamedTuple):
    """What a set is compared with."""

    pca: PixelPCA
    features: np.ndarray   # (H,64) of held-out images
    train: Tensor          # (T,s²), equalised
    held_out: Tensor       # (H,s²), equalised
    usual: float           # median distance of held-out images to the nearest training image


class Quick:
    """Held-out real images, and training images to look for copies of; `judge` reads labels."""

    def __init__(self, train: Images, held_out: Images, judge: Predictor | None = None):
        self.judge, self.tables = judge, (train.table, held_out.table)
        step = max(1, -(-len(held_out) // ENOUGH))
        self.pixels = [train.pixels, held_out.pixels[::step]]
        self.labels, self.patients = (np.array(held_out.table.column(name)[::step])
                                      for name in ("label", "patient"))
        self.floors: dict[tuple, float] = {}

    @cached_property
    def real(self) -> Real:
        """Measured when it is first asked for: where every set has its numbers, nothing is."""
        pca = PixelPCA().fit(self.pixels[0])
        features = pca(self.pixels[1]).double().numpy()
        train, held_out = map(equalised, self.pixels)
        self.pixels.clear()  # the memory is for sampling
        return Real(pca, features, train, held_out,
                    nearest(held_out, train, 1).median().item())

    def __call__(self, pixels: Tensor, labels: Sequence[str]) -> dict[str, float]:
        """Numbers of uint8 (n, 3, H, W) and the labels asked for.

        KD to held-out images of the same mix of labels and its floor's 95 % point, from 20 images a
        side on; the median distance to the nearest training image by that of held-out images; the
        share recognised, if the judge knows the labels.
        """
        rows, own = matched(self.labels.tolist(), labels)
        numbers = {"n": len(own), "n_real": len(rows)}
        if min(len(own), len(rows)) >= FEWEST:
            numbers["KD"] = kid(real=self.real.features[rows],
                                fake=self.real.pca(pixels[own]).double().numpy(),
                                real_patients=self.patients[rows])
            numbers["KD_floor_95"] = self.floor(len(rows), len(own))
        to_train = nearest(equalised(pixels), self.real.train, 1).median().item()
        numbers["nearest"] = to_train / self.real.usual
        if reads(self.judge, labels):
            numbers["recognised"] = recognised(self.judge, pixels, labels).float().mean().item()
        return numbers

    def key(self, digests: Sequence[str]) -> str:
        """SHA-256 of all that the numbers of images with these SHA-256 depend on."""
        return hashlib.sha256(runs.json_key(
            images=digests, minidiff=minidiff.__version__, **self._real_and_judge).encode()
            ).hexdigest()

    @cached_property
    def _real_and_judge(self) -> dict[str, Any]:
        return {"real": [table.fingerprint for table in self.tables],
                "judge": self.judge and PredictorFeatures(self.judge).identity}

    def floor(self, n_real: int, n: int) -> float:
        """95 % point of the KD between two draws of held-out patients, half of them at most."""
        n, m = (min(size, len(self.patients) // 2) for size in (n, n_real))
        if (n, m) not in self.floors:
            found = floor(kid, real=self.real.features, patients=self.patients, n=m, m=n)
            self.floors[n, m] = found.high if found else math.inf   # too few patients
        return self.floors[n, m]

    @cached_property
    def near_limit(self) -> float:
        """The calibrated distance below which an image is a near-copy; InputError where there are
        too few images to set it."""
        fewest = round(1 / QUANTILE)   # with fewer, the nearest 1 % of them is none
        n, m = len(self.tables[0]), len(self.patients)
        if m < fewest or n <= NEXT:
            raise InputError(f"near-copies cannot be told apart with {m} held-out and {n} training "
                             f"images: needed are {fewest} and {NEXT + 1} or more")
        train, held_out = self.real.train, self.real.held_out
        near = torch.cat([calibrated(distances(held_out[rows], train))[0]
                          for rows in blocks(m, n)])
        return max(near.quantile(QUANTILE).item(), 1e-12)

    def near_copies(self, pixels: Tensor) -> Tensor:
        """Is each image a near-copy of a training image? (n,) bool."""
        return calibrated(distances(equalised(pixels), self.real.train))[0] < self.near_limit
