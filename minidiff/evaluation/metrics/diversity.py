"""How varied is one set of images? Two numbers, to be read beside those of held-out real images.

    Vendi     the effective number of different images, 1 … n, by the features' similarities
              (Friedman & Dieng 2023)
    MS-SSIM   mean similarity of random pairs, 0 … 1, lower = more varied (Odena et al. 2017, on
              Wang et al. 2003)

Both depend on n or on the size of the images: compare with as many held-out real images of the same
label and size.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import grey
from minidiff.evaluation.metrics.pairwise import check_finite, patient_codes

TAPS, SIGMA = 11, 1.5                                # the Gaussian window
C1, C2 = 0.01 ** 2, 0.03 ** 2                        # images in 0…1
# of the scales, finest first (Wang et al. 2003, section 3.2)
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
BATCH = 2 ** 20                                      # pixels of one batch of pairs


def vendi(features: np.ndarray) -> float:
    """The effective number of different images: n equal ones → 1, n orthogonal ones → n.

    exp of the entropy of the eigenvalues of K/n, K the cosines of all pairs of features (n,d).
    Computed from XXᵀ or XᵀX, which share their eigenvalues, whichever is smaller.
    """
    x = np.asarray(features, dtype=np.float64)
    assert x.ndim == 2, x.shape
    check_finite("", x)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not len(x) or not length.all():
        raise InputError(f"Vendi needs directions: {int((length == 0).sum())} of {len(x)} feature "
                         "vectors are 0")
    x = x / length
    values = np.linalg.eigvalsh(x @ x.T if len(x) <= x.shape[1] else x.T @ x) / len(x)
    values = values[values > 0]   # rounding puts some of the zeros below 0, where there is no log
    return float(np.exp(-(values * np.log(values)).sum()))


def ms_ssim(images: Sequence[Tensor], *, pairs: int = 1000, seed: int = 0,
            patients: Sequence | None = None) -> float:
    """Mean MS-SSIM of uint8 (N,3,H,W) over at most `pairs` random pairs of images: 0 … 1.

    Unordered pairs, none twice; all where there are fewer. Two images of one patient make
    no pair: follow-ups are alike, and would make real images look less varied than they are. Sizes
    below 176 px have fewer than five scales, see `scales`: two figures compare at equal size alone.
    """
    i, j = _pairs(len(images), pairs, seed, patient_codes(patients, len(images)))
    if not len(i):
        raise InputError("MS-SSIM needs a pair of images of different patients; there are "
                         f"{len(images)} images")
    used, places = np.unique([i, j], return_inverse=True)   # of many images only those in a pair
    x, (i, j) = grey(torch.stack([images[k] for k in used]))[:, None], places.reshape(2, -1)
    step = max(1, BATCH // x[0].numel())
    bar = tqdm(range(0, len(i), step), "MS-SSIM", unit="batch", leave=False,
               disable=len(i) <= step)
    values = [similarity(x[i[k : k + step]], x[j[k : k + step]]) for k in bar]
    return torch.cat(values).double().mean().item()


def scales(height: int, width: int) -> int:
    """How many scales have 11 px or more a side, at most five: 5 from 176 px on, 4 from 88."""
    count = sum(min(height, width) // 2 ** s >= TAPS for s in range(len(WEIGHTS)))
    if not count:
        raise InputError(f"SSIM needs images of at least {TAPS} px; these are {height} × {width}")
    return count


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM of images with images, both float (N,1,H,W) in 0…1 → (N,): Wang et al. 2003, eq. 7.

    Contrast and structure at every scale, luminance at the coarsest, windows inside the image only.
    With fewer than five scales the weights of those that there are are enlarged to the sum of all.
    Where structure is opposite, its mean is negative and has no such power: it counts as 0.
    """
    count, value = scales(*x.shape[2:]), 1.0
    for s in range(count):
        luminance, structure = _ssim(x, y)
        mean = (luminance * structure if s == count - 1 else structure).flatten(1).mean(1)
        value = value * mean.clamp(min=0) ** (WEIGHTS[s] * sum(WEIGHTS) / sum(WEIGHTS[:count]))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return value


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of luminance l and contrast · structure c·s (Wang et al. 2004, eq. 6 and 13)."""
    rows, columns = _window(x.shape[2], x.dtype), _window(x.shape[3], x.dtype)
    m, n, xx, yy, xy = (rows @ torch.cat([x, y, x * x, y * y, x * y]) @ columns.T).chunk(5)
    return ((2 * m * n + C1) / (m * m + n * n + C1),
            (2 * (xy - m * n) + C2) / (xx - m * m + yy - n * n + C2))


def _window(side: int, dtype: torch.dtype) -> Tensor:
    """Gaussian means of 11 neighbours as a matrix (side − 10, side): faster than a conv2d."""
    taps = torch.exp(-(torch.arange(TAPS, dtype=dtype) - TAPS // 2) ** 2 / (2 * SIGMA ** 2))
    return torch.stack([F.pad(taps / taps.sum(), (i, side - TAPS - i))
                        for i in range(side - TAPS + 1)])


def _pairs(n: int, pairs: int, seed: int, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs j < i of different groups: two arrays of at most `pairs` indices.

    Pair number k of all n(n−1)/2 has i = ⌊(1 + √(1 + 8k))/2⌋ and j = k − i(i−1)/2. Twenty times as
    many are drawn as are wanted, for the pairs within a patient that fall away.
    """
    total = n * (n - 1) // 2
    k = np.random.default_rng(seed).choice(total, min(total, 20 * pairs),
                                           replace=False) if total else np.zeros(0)
    i = ((1 + np.sqrt(1 + 8 * k)) / 2).astype(int)
    j = (k - i * (i - 1) // 2).astype(int)
    apart = group[i] != group[j]
    return i[apart][:pairs], j[apart][:pairs]
