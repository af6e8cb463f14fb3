"""Can synthetic images be told from real ones? A trained discriminator, distances, and how they
differ.

All three compare held-out with synthetic images, as many of each label on both sides, in the spaces
of the report and in one more, "texture": the rings of the spectrum and the plain numbers of
`looks`, for blur, noise and colour hardly move the features of a network or of small pixels.

The discriminator is a classifier two-sample test (Lopez-Paz & Oquab 2017): kernel ridge regression
on the features of all spaces together, each space with equal weight, which scores every image with
what it learnt from other patients. Two sets of real images have an AUROC of 0.5. Images that share
a training set do not err independently; the interval by patient is widened for it (Nadeau & Bengio
2003).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.evaluation.features.extractor import Spectrum, grey
from minidiff.evaluation.metrics.distances import draw, kd_with_interval, kid, same_mix
from minidiff.evaluation.metrics.pairwise import patient_codes
from minidiff.evaluation.metrics.report_rows import Side, between, joined, too_few
from minidiff.statistics import auroc_by_patient

MOST = 1000      # images of a set: the discriminator inverts a matrix of its training images
FOLDS = 5
PENALTY = 0.005  # of the ridge, where the kernel of an image with itself is about 1
WIDER = math.sqrt(1 + FOLDS / (FOLDS - 1))  # times the interval of one fixed discriminator
LOOKS = ("fine detail", "texture", "colour", "contrast", "brightness")
LAPLACE = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
LEVEL = 100 / 255  # one level of grey, in per cent of the range


def measure(spaces: Mapping[str, Mapping[str, Side]], pixels: Mapping[str, Tensor], *,
            repeats: int = 100, seed: int = 0) -> dict:
    """Held-out against synthetic images: {"n" of each, "spaces", "auroc", "low", "high", "looks"}.

    spaces: name → set (train, heldout, synthetic) → Side; pixels: set → uint8 (N,3,S,S). Of each
    set a random draw of MOST images. Only {"n"} where there are too few.
    """
    kept = {name: draw(np.arange(len(x)), MOST, seed) for name, x in pixels.items()}
    spaces = {space: {name: side.take(kept[name]) for name, side in sides.items()}
              for space, sides in spaces.items()}
    sides = next(iter(spaces.values()))
    held, made = same_numbers(sides["heldout"].labels, sides["synthetic"].labels, seed)
    real, fake = sides["heldout"].take(held), sides["synthetic"].take(made)
    if too_few(real, fake):
        return {"n": len(held)}
    images = {name: _taken(x, kept[name]) for name, x in pixels.items()}
    seen = {name: looks(x) for name, x in images.items()}
    spaces["texture"] = {name: sides[name]._replace(features=x)
                         for name, x in texture(images, seen).items()}
    compared = {space: (of["heldout"].take(held), of["synthetic"].take(made),
                        joined(of["train"], of["heldout"])) for space, of in spaces.items()}
    scores = discriminate([(x.features, y.features) for x, y, _ in compared.values()],
                          real_patients=real.patients, fake_patients=fake.patients, seed=seed)
    found = auroc_of(scores, real, fake, seed)
    for end in ("low", "high"):
        wide = found["auroc"] + WIDER * (found[end] - found["auroc"])
        found[end] = min(max(wide, 0.0), 1.0)
    return {"n": len(held), **found,
            "spaces": [distance(space, *of, repeats, seed) for space, of in compared.items()],
            "looks": [_look(name, seen["heldout"][held, k], seen["synthetic"][made, k],
                            real, fake, seed) for k, name in enumerate(LOOKS)]}


def distance(space: str, real: Side, fake: Side, pool: Side, repeats: int, seed: int) -> dict:
    """KD of the two with its interval, and its floor: real images of the pool, in their labels."""
    pool = pool.take(same_mix(pool.labels.tolist(), fake.labels.tolist(), seed))
    return {"space": space, **kd_with_interval(**between(real, fake), seed=seed)[0],
            "KD_floor": pool.floor(kid, real.n, fake.n, repeats, seed)}


def _look(name: str, x: np.ndarray, y: np.ndarray, real: Side, fake: Side, seed: int) -> dict:
    low, middle, high = np.quantile(x, [0.05, 0.5, 0.95]).tolist()
    return {"name": name, "made": float(np.median(y)), "real": middle, "real_low": low,
            "real_high": high, **auroc_of(np.concatenate([x, y]), real, fake, seed)}


def same_numbers(real: Sequence[str], fake: Sequence[str],
                 seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of as many images of each label on both sides: the most there are on the smaller."""
    sides, found = [np.asarray(labels) for labels in (real, fake)], ([], [])
    for label in np.unique(sides[1]):
        own = [np.flatnonzero(labels == label) for labels in sides]
        for index, some, k in zip(found, own, range(2)):
            index.append(draw(some, min(map(len, own)), seed + k))
    return tuple(np.sort(np.concatenate(index)) for index in found)


def discriminate(features: Sequence[tuple[np.ndarray, np.ndarray]], *, real_patients: Sequence,
                 fake_patients: Sequence, seed: int = 0) -> np.ndarray:
    """How synthetic each image looks, real ones first, to a regression on other patients: (n+m,).

    features: the real (n,d) and synthetic (m,d) ones of each space.
    """
    rng, sides = np.random.default_rng(seed), (real_patients, fake_patients)
    codes = [patient_codes(names, len(names)) for names in sides]
    fold = np.concatenate([rng.permutation(p.max() + 1)[p] % FOLDS for p in codes])
    truth, scores = np.repeat([-1.0, 1.0], [len(p) for p in codes]), np.empty(len(fold))
    pools = [np.concatenate(both) for both in features]
    for k in range(FOLDS):
        known = fold != k
        kernel = np.zeros((len(fold), known.sum()))
        for x in pools:
            x = np.arcsinh((x - x[known].mean(0)) / x[known].std(0).clip(1e-9))
            kernel += x @ x[known].T / x.shape[1] / len(pools)
        target = truth[known] - truth[known].mean()
        ridge = PENALTY * len(target) * np.eye(len(target))
        scores[~known] = kernel[~known] @ np.linalg.solve(kernel[known] + ridge, target)
    return scores


def auroc_of(scores: np.ndarray, real: Side, fake: Side, seed: int = 0) -> dict[str, float]:
    """Are the scores of synthetic images above those of real ones, which come first? With 95 %."""
    patients = [f"real {p}" for p in real.patients] + [f"made {p}" for p in fake.patients]
    area, (low, high) = auroc_by_patient(scores, np.arange(len(scores)) >= real.n, patients,
                                         seed=seed)
    return {"auroc": area, "low": low, "high": high}


def looks(images: Tensor) -> np.ndarray:
    """LOOKS of each image in per cent, uint8 (N,3,S,S) → (N,5).

    Contrast and brightness: standard deviation and mean of grey, of the range. Colour: mean range
    of the channels. Fine detail: root mean square of what the neighbours do not predict (Immerkær
    1996), of the contrast. Texture: the same of means over 2 px less means over 8 px.
    """
    found = []
    for part in images.split(128):
        x, side = grey(part)[:, None], part.shape[-1]
        fine = F.conv2d(x, LAPLACE[None, None])
        two, eight = (F.interpolate(x, size=(max(1, side // step),) * 2, mode="area")
                      for step in (2, 8))
        middle = two - F.interpolate(eight, size=two.shape[2:], mode="bilinear")
        colour = (part.amax(1) - part.amin(1)).float().mean((1, 2)) / 255
        contrast = x.std((1, 2, 3))
        root = [v.square().mean((1, 2, 3)).sqrt() / contrast.clamp(min=LEVEL / 100)
                for v in (fine, middle)]
        found.append(torch.stack([*root, colour, contrast, x.mean((1, 2, 3))], 1))
    return 100 * torch.cat(found).double().numpy()


def texture(images: Mapping[str, Tensor], seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features of "texture" of each set: the spectrum, and `looks` relative to training images."""
    space = Spectrum().fit(images["train"])
    mean, sd = seen["train"].mean(0), seen["train"].std(0).clip(LEVEL)
    return {name: np.concatenate([space(x).double().numpy(),
                                  np.arcsinh((seen[name] - mean) / sd)], 1)
            for name, x in images.items()}


def _taken(images: Tensor, index: np.ndarray) -> Tensor:
    """Some of the images; grey ones stay one channel in memory."""
    if len(index) == len(images):
        return images
    one = images[:, :1] if images.stride(1) == 0 else images
    return one[torch.from_numpy(index)].expand(-1, images.shape[1], -1, -1)
