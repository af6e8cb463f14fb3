"""Pictures of different hospitals made alike, before a classifier is trained on them or asked.

    name      what it does                                      what it takes away
    equalise  each grey becomes its mid-rank in the picture     any rising map of greys, e.g. gamma
    local     less the local mean, by the local deviation       gain, offset, and shading
    lungs     the box round both lungs fills the picture        zoom, position, what lies beside
    masked    the same, and black outside the lungs             the body round them, its letters too

Each takes uint8 (N,1,S,S) to the same. Where no plausible lungs are found, `lungs` and `masked`
leave the whole picture, and `plausible` says what that means.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from minidiff.errors import InputError

RADIUS = 0.08        # of the window of `local`, share of the side; it is averaged over twice
REACH, FLOOR = 3.0, 0.1  # local deviations from black to white; at least so much of the picture's
MARGIN, GROWN = 0.04, 0.03  # round the lungs: of their box, and of their mask; shares of the side
# of a plausible mask: area of each lung, share of the picture; the smaller to the larger; how far
# apart their centres are across, and down at most, shares of the side; shares of the mask that the
# two hold, and of the lower lung's height that the two have in common
AREA, RATIO, ACROSS, DOWN, TWO, COMMON = (0.025, 0.35), 0.3, (0.2, 0.7), 0.2, 0.9, 0.5
Find = Callable[[Tensor], tuple[Tensor, Tensor]]  # pictures → masks bool (N,S,S), found bool (N,)


def equalise(x: Tensor) -> Tensor:
    """Each grey becomes its mid-rank among the picture's pixels, 0 … 255."""
    flat = x.flatten(1).long()
    counts = torch.zeros(len(x), 256, device=x.device, dtype=torch.float64)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    rank = (counts.cumsum(1) - counts / 2) / flat.shape[1]
    return (255 * rank).round().to(torch.uint8).gather(1, flat).view_as(x)


def local(x: Tensor) -> Tensor:
    """Deviation from the local mean, in local standard deviations; grey where there is none."""
    y = x.float()
    off = y - _smooth(y)
    whole = FLOOR * y.std((1, 2, 3), keepdim=True)
    z = off / (_smooth(off.square()).sqrt() + whole).clamp(min=1e-3)
    return ((z / REACH).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def _smooth(y: Tensor) -> Tensor:
    """Mean of a square window within the picture, twice; rows and columns in turn, for speed."""
    r = max(1, round(RADIUS * y.shape[-1]))
    for window, pad in 2 * (((2 * r + 1, 1), (r, 0)), ((1, 2 * r + 1), (0, r))):
        y = F.avg_pool2d(y, window, 1, pad, count_include_pad=False)
    return y


def onto_lungs(x: Tensor, masks: Tensor, found: Tensor, *, outside: bool) -> Tensor:
    """The box round the lungs, stretched to the whole picture; without their `outside`, if so
    asked. Pictures without lungs stay as they are."""
    y, side = x.float(), x.shape[-1]
    own = F.interpolate(masks[:, None].float().to(x.device), x.shape[2:], mode="bilinear")
    if not outside:
        reach = max(1, round(GROWN * side))
        y = y * (F.max_pool2d(own, 2 * reach + 1, 1, reach) > 0.5)
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    for i in found.nonzero()[:, 0].tolist():
        for axis, over in ((0, 0), (1, 1)):  # x, then y
            there = masks[i].any(over).nonzero()[:, 0].tolist()
            low = max(0.0, there[0] / masks.shape[-1] - MARGIN)
            high = min(1.0, (there[-1] + 1) / masks.shape[-1] + MARGIN)
            theta[i, axis, axis], theta[i, axis, 2] = high - low, low + high - 1
    places = F.affine_grid(theta.to(x.device), list(x.shape), align_corners=False)
    near = F.grid_sample(y, places, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(found.to(x.device)[:, None, None, None], near.round().to(torch.uint8), x)


GREYS = {"equalise": equalise, "local": local}
FIELDS = {"lungs": True, "masked": False}  # is the outside of the lungs shown?


def needs_lungs(names: Sequence[str]) -> bool:
    return any(name in FIELDS for name in names)


def check(names: Sequence[str]) -> None:
    """InputError for a name that is none, or in a place where it cannot work."""
    for name in names:
        if name not in (*GREYS, *FIELDS):
            raise InputError(f"--standardise {name}; allowed are {', '.join((*GREYS, *FIELDS))}")
    if len(set(names)) < len(names) or needs_lungs(names[1:]):
        raise InputError(f"--standardise {' '.join(names)}: each once, and lungs or masked first, "
                         "for lungs are looked for in the picture as it came")


def standardised(x: Tensor, names: Sequence[str], find: Find | None = None) -> Tensor:
    """uint8 (N,1,S,S) → the same, by these names in turn; `find` finds the lungs."""
    for name in names:
        x = GREYS[name](x) if name in GREYS else onto_lungs(x, *find(x), outside=FIELDS[name])
    return x


def plausible(mask: np.ndarray) -> np.ndarray | None:
    """The two lungs of a mask, bool (S,S), or None where they cannot be lungs.

    Two parts hold nearly all of it, of like area, side by side at like height.
    """
    parts, n = ndimage.label(mask)
    if n < 2:
        return None
    areas = np.bincount(parts.ravel(), minlength=3)[1:]
    two = np.argsort(-areas, kind="stable")[:2]
    own = areas[two] / mask.size
    (y1, x1), (y2, x2) = (np.array(ndimage.center_of_mass(parts == k + 1)) / len(mask) for k in two)
    rows = [np.flatnonzero((parts == k + 1).any(1)) for k in two]
    high = min(r[-1] for r in rows) - max(r[0] for r in rows)
    common = (high + 1) / (min(map(np.ptp, rows)) + 1)
    good = (own.sum() >= TWO * mask.mean() and own.min() >= max(AREA[0], RATIO * own.max())
            and own.max() <= AREA[1] and ACROSS[0] <= abs(x1 - x2) <= ACROSS[1]
            and abs(y1 - y2) <= DOWN and common >= COMMON)
    return np.isin(parts, two + 1) if good else None
