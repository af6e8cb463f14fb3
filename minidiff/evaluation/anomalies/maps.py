"""Anomaly maps: how far each pixel of an image is from its healthy counterfactual.

    pixel             |x − c|, blurred
    feature           squared distance of activations, each of unit length (LPIPS's form)
    pixel × feature   both must see it                            Bercea et al. 2023, AutoDDPM
    mean, harmonic    over the strengths of SDEdit; the harmonic mean is high only where every
                      strength sees something

Beside them maps for which no network is needed, or the autoencoder alone. A method that does not
beat these has found edges and bright pixels, or owes nothing to diffusion (Meissen et al. 2022).
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy
import torch
from torch import Tensor

from minidiff.evaluation.features.extractor import grey, principal

VAE, SDEDIT, INVERSION = "VAE", "SDEdit", "inversion"   # what made a counterfactual
MEAN, LINEAR = "distance from the mean", "64 principal components"   # of normal training images
BASELINES = ("intensity", "blur residual", MEAN, LINEAR, f"{VAE}, pixel", f"{VAE}, pixel × feature")
PRIMARY = f"{SDEDIT} harmonic, pixel × feature"  # the method that is judged, named before any look
SMOOTH = 1 / 64                 # σ of the blur of every map and of the residual, share of the side
FAINT = 1 / 128                 # of the blur that takes only the noise out of an image
AXES, AT_MOST = 64, 2**27       # principal components; pixels of normal images that they are of
TOP = 0.05                      # share of the pixels whose mean is the score of an image
FEATURE = "feature of "         # where a part holds the feature map of a counterfactual
BLURRED = "blurred: "           # where a part holds the density of a blurred normal image
FLOOR = 1e-6                    # added to what a harmonic mean is taken of

Maps = dict[str, np.ndarray]    # method → (N, S, S)


class Normal:
    """Normal training images, uint8 (N,3,S,S), without a network: their mean and spread at each
    pixel, and their principal components."""

    def __init__(self, images: Tensor):
        x = grey(images[:: -(-images[:, 0].numel() // AT_MOST)]).double()
        self.mean, self.std = x.mean(0).numpy(), x.std(0).numpy() + 0.01
        self.centre, self.axes = principal(x.flatten(1), AXES)

    def maps(self, x: Tensor) -> Maps:
        """Of grey float (N,S,S): standard deviations from the mean, and what the components lack.
        """
        off = x.flatten(1).double() - self.centre
        left = (off - off @ self.axes @ self.axes.T).view_as(x)
        return {MEAN: np.abs(x.numpy() - self.mean) / self.std, LINEAR: left.abs().numpy()}


def blurred(x: np.ndarray, share: float) -> np.ndarray:
    """Gaussian blur of (N, S, S) by this share of the side."""
    width = share * x.shape[-1]
    return scipy.ndimage.gaussian_filter(x, (0, width, width), mode="reflect")


def baseline_maps(images: Tensor, normal: Normal | None) -> Maps:
    """Maps of uint8 (N,3,S,S) that need no model, nor, where `normal` is None, normal images."""
    x = grey(images).numpy()
    found = {"intensity": x, "blur residual": np.abs(x - blurred(x, SMOOTH))}
    found |= normal.maps(torch.from_numpy(x)) if normal else {}
    return {name: smoothed(each) for name, each in found.items()}


def smoothed(x: np.ndarray) -> np.ndarray:
    return blurred(x.astype(np.float32), SMOOTH)


def model_maps(images: Tensor, part: Mapping[str, Tensor]) -> Maps:
    """Maps of uint8 (N,3,S,S) by their counterfactuals: `part` is what a `Maker` made of them."""
    x, found = grey(images), {}
    makers = [name for name in part if part[name].ndim == 4]
    for name in makers:
        pixel = smoothed((x - grey(part[name])).abs().numpy())
        feature = smoothed(part[FEATURE + name].float().numpy())
        found |= {f"{name}, pixel": pixel, f"{name}, feature": feature,
                  f"{name}, pixel × feature": pixel * feature}
    strengths = [name for name in makers if name.startswith(SDEDIT)]
    for kind in ("pixel", "feature", "pixel × feature"):
        levels = np.stack([found[f"{name}, {kind}"] for name in strengths])
        found |= {f"{SDEDIT} {how}, {kind}": over(levels) for how, over in MEANS.items()}
    return found


def harmonic(levels: np.ndarray) -> np.ndarray:
    """Harmonic mean over the first axis of maps ≥ 0: near the least of them."""
    return len(levels) / (1 / (levels + FLOOR)).sum(0) - FLOOR


MEANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda levels: levels.mean(0), "harmonic": harmonic}


def image_scores(maps: np.ndarray, top: float = TOP) -> np.ndarray:
    """One number an image of (N, S, S): the mean of its highest pixels."""
    flat = maps.reshape(len(maps), -1)
    k = max(1, round(top * flat.shape[1]))
    return np.partition(flat, -k, axis=1)[:, -k:].mean(1).astype(float)


def feature_map(x: Sequence[Tensor], y: Sequence[Tensor], side: int) -> Tensor:
    """Distance of two lists of activations (N, C, h, w), of unit length over C → (N, side, side),
    the mean over the layers."""
    parts = [torch.nn.functional.interpolate((a - b).square().sum(1, keepdim=True), (side, side),
                                             mode="bilinear") for a, b in zip(x, y)]
    return torch.cat(parts, 1).mean(1)
