"""Copies of one image: exact ones, and those that were flipped, cropped, compressed or brightened.

    hash     the 16 × 16 slowest cosine waves of an image, as in a perceptual hash (Zauner 2010),
             but with their values kept and weighted by frequency, and without what all images of a
             larger set share (else every chest is like every other); pairs whose hashes correlate
             are candidates. Every image is compared in 38 versions: enlarged up to a ninth at nine
             places, and flipped, which only changes signs of waves. From 5,000 images on a bound
             spares most of the products, and no pair is lost
    pixels   one image of a candidate is laid over the other by the affine map that least squares
             finds (Lucas & Kanade 1981); the distance is 1 − the correlation of their fine detail.
             Two images of one patient may have the same outline, and still differ in detail

The distance of a pair depends neither on brightness and contrast nor on the other images. An image
of one grey has no detail: it is like no other here, and only `exact_duplicates` finds its copies.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.data import images
from minidiff.data.files import typical_side
from minidiff.data.split import connected, equal_pairs
from minidiff.errors import InputError, count
from minidiff.pixels import Pictures, scratch

Pair = tuple[int, int, float]

SIDE, WAVES = 96, 16               # px a side of compared images; waves a side in the hash
ZOOMS = (1.055, 1.11)              # of the versions; least squares finds what is between
LARGER = 200                       # images from which the shared part is known well enough
ALIKE, ALIKE_PLAIN = 0.81, 0.90    # correlation of candidates, without the shared part and with
FILTERED, LEADING = 5000, 47       # images from which only leading numbers are compared at first
LOOKED_AT = 8                      # candidates of one image, at most: the most correlated
SAME, SAME_SMALL = 0.04, 0.25      # greatest distance of a copy; of a candidate at half the side
FINE, COARSE, LOCAL = 1.0, 3.0, 3.0  # px: detail lies between two blurs; a third evens its strength
ROUNDS = 6, 4                      # of least squares, at half the side and at the side
REACH = 0.15                       # how far its map may go from where it began
DARK, BRIGHT, INNER = 4, 250, 0.9  # grey values, and share of the half side, that are compared


def exact_duplicates(images: Pictures) -> list[Pair]:
    """Images of equal pixels (sha256): (first of its kind, later one, 0.0)."""
    keys = (hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images)
    return [(i, j, 0.0) for i, j in equal_pairs(keys)]


def near_duplicates(images: Pictures, *, at_most: float = SAME) -> list[Pair]:
    """Pairs of copies: uint8 (N,3,H,W) → (i, j, distance), i < j, the nearest first.

    The distance is 0 for equal pixels, below .04 for a copy as described above, and greater for
    another image. at_most is for images of 96 px or more; below, where images have less detail, it
    shrinks with the side. Of an image with more than nine copies not every pair is listed.
    """
    x = _squares(images)
    at_most = at_most * x.shape[-1] / SIDE
    found: dict[tuple[int, int], float] = {}
    bar = tqdm(total=len(x), desc="looking for duplicates", unit=" images", disable=len(x) < 2000)
    for asked, pairs, starts in _candidates(x):
        keys = list(map(tuple, pairs.sort(1).values.tolist()))
        new = torch.tensor([k for k, key in enumerate(keys) if key not in found], dtype=torch.long)
        for part in (new[k : k + 128] for k in range(0, len(new), 128)):
            i, j = pairs[part].unbind(1)
            distances = laid_over(x[i].float(), x[j].float(), starts[part])
            found |= zip((keys[k] for k in part.tolist()), distances.tolist())
        bar.update(asked)
    bar.close()
    return sorted(((i, j, d) for (i, j), d in found.items() if d <= at_most),
                  key=lambda pair: (pair[2], pair))


def near_copies(files: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of image files that show one film: re-encoded, resized, cropped, mirrored.

    Where most files have fewer than 96 px, in which different films look like one, only those of
    equal pixels. A file that cannot be read, which is refused later, is like no other.
    """
    squares = scratch((len(files), 1, SIDE, SIDE))

    def load(k: int) -> None:
        with suppress(InputError):
            grey = images.read(files[k]).mean(0, keepdims=True).astype(np.uint8)
            squares[k] = images.square(grey, SIDE)

    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(load, range(len(files))), "looking for copies", len(files),
                      unit=" images", disable=len(files) < 200):
            pass
    varied = [k for k, square in enumerate(squares) if square.min() < square.max()]
    compare = near_duplicates if typical_side(files, SIDE) == SIDE else exact_duplicates
    found = [(varied[i], varied[j]) for i, j, _ in compare(torch.from_numpy(only(squares, varied)))]
    if found:
        i, j = found[0]
        print(f"{count(len(found), 'pair')} of copies, kept on one side of the split, e.g. "
              f"{files[i]} and {files[j]}")
    return found


def by_patient(pairs: Sequence[Pair], patients: Sequence[str]) -> dict:
    """How many pairs there are, how many images to leave out so that no copy is left, and the pairs
    of two patients, which may put copies on both sides of a split."""
    group = connected(len(patients), [(i, j) for i, j, _ in pairs])
    return {"pairs": len(pairs), "surplus": len(group) - len(set(group.tolist())),
            "across_patients": [(i, j, d) for i, j, d in pairs if patients[i] != patients[j]]}


def small(images: Pictures, side: int = SIDE) -> Tensor:
    """uint8 (N,C,H,W) → grey of this side or less, by the mean over areas: float16 (N,1,side,side)
    in 0…255."""
    return torch.cat(list(_reduced(images, side))).half() if len(images) else torch.empty(
        0, 1, *[min(side, *images.shape[2:])] * 2, dtype=torch.float16)


def _reduced(images: Pictures, side: int) -> Iterator[Tensor]:
    """Grey of this side or less, by the mean over areas: float32, 256 images at a time."""
    side = min(side, *images.shape[2:])
    for part in images.split(256):
        yield F.interpolate(part.float().mean(1, keepdim=True), (side, side), mode="area")


def _squares(images: Pictures) -> Pictures:
    """`small` images to compare: those given where they are such; rounded to bytes if they are
    many, for 400,000 in float16 are 7.4 GB."""
    if images.shape[1] == 1 and images.shape[2] == images.shape[3] <= SIDE:
        return images
    if len(images) < FILTERED:
        return small(images)
    side, first = min(SIDE, *images.shape[2:]), 0
    squares = torch.from_numpy(scratch((len(images), 1, side, side)))
    for part in _reduced(images, side):
        squares[first : (first := first + len(part))] = part.round()
    return squares


def only(squares: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """These of the squares, in rising order, moved to the front in place: a copy would take as much
    memory again."""
    for k, i in enumerate(kept):
        squares[k] = squares[i]
    return squares[: len(kept)]


def _starts() -> Tensor:
    """The versions as maps (38,2,3) from places of the version to places of the image; the second
    half is flipped."""
    places = [(1.0, 0, 0)] + [(zoom, *at) for zoom in ZOOMS
                              for at in itertools.product((-1, 0, 1), repeat=2)]
    maps = torch.tensor([[[1 / z, 0, dx * (1 - 1 / z)], [0, 1 / z, dy * (1 - 1 / z)]]
                         for z, dy, dx in places])
    return torch.cat([maps, maps * torch.tensor([-1.0, 1, 1])])


def _waves(side: int) -> Tensor:
    """The slowest cosine waves along a side: (16,side), or fewer of a smaller side."""
    k = torch.arange(min(WAVES, side), dtype=torch.float32)
    return torch.cos(math.pi / side * k[:, None] * (torch.arange(side) + 0.5))


def _hash(strengths: Tensor) -> Tensor:
    """Strengths of the waves (…,16,16) → (…,255), of length 1; that of an image of one grey is
    0."""
    k = torch.arange(strengths.shape[-1], dtype=torch.float32)
    frequency = (k[:, None].square() + k.square()).sqrt()
    return F.normalize((strengths * frequency).flatten(-2)[..., 1:], dim=-1, eps=1e-3)


def _versions(x: Tensor, starts: Tensor) -> Tensor:
    """Hashes (k,n,255) of images (n,1,s,s) in k versions, which are not turned: so rows and columns
    are moved each for itself, and with them the waves, which are fewer than pixels."""
    side, moves = x.shape[-1], torch.cat([starts[:, 1, 1:], starts[:, 0, ::2]])
    moves, which = moves.unique(dim=0, return_inverse=True)
    maps = torch.eye(2, 3).repeat(len(moves), 1, 1)
    maps[:, 0, ::2] = moves
    moved = _warp(torch.eye(side).expand(len(maps), 1, side, side), maps)[:, 0]
    waves = (_waves(side) @ moved.mT).flatten(0, 1)
    every = (waves @ x[:, 0] @ waves.T).unflatten(1, (len(maps), -1)).unflatten(3, (len(maps), -1))
    rows, columns = which.view(2, -1)
    return _hash(every[:, rows, :, columns])


def _candidates(x: Pictures) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Pairs whose hashes correlate, by batches: (images of the batch, pairs (n,2), first maps
    (n,2,3)).

    The correlation of two hashes is at most that of their LEADING numbers and the product of the
    lengths of the rest (Cauchy & Schwarz): where that is too little, it is not computed.
    """
    starts, waves = _starts(), _waves(x.shape[-1])
    flip = torch.ones(len(waves), len(waves))
    flip[:, 1::2] = -1                                     # waves that are odd from left to right
    flip, half = flip.flatten()[1:], starts[: len(starts) // 2]
    hashes = torch.cat([_hash(waves @ part[:, 0].float() @ waves.T)
                        for part in x.split(1024)]) if len(x) else torch.empty(0, 1)
    special, alike = (_special(hashes), ALIKE) if len(x) >= LARGER else (lambda h: h, ALIKE_PLAIN)
    hashes = special(hashes)
    leading = _leading(hashes)
    for first in range(0, len(x), 32):
        versions = _versions(x[first : first + 32].float(), half)
        versions = special(torch.cat([versions, versions * flip])).transpose(0, 1)
        most = torch.ones(len(versions), len(x)) if len(x) < FILTERED else torch.cat(
            [(_leading(versions) @ part.T).amax(1) for part in leading.split(4096)], 1)
        pairs, maps = [], []
        for i, (own, bound) in enumerate(zip(versions, most), first):
            near = (bound > alike - 1e-3).nonzero()[:, 0]
            best, which = (own @ hashes[near].T).max(0)
            best[near == i] = 0                                                   # with itself
            best, j = best.topk(min(LOOKED_AT, len(near)))
            j = j[best > alike]
            pairs.append(F.pad(near[j, None], (1, 0), value=i))
            maps.append(starts[which[j]])
        yield len(versions), torch.cat(pairs), torch.cat(maps)


def _leading(hashes: Tensor) -> Tensor:
    """The numbers of greatest spread of hashes (…,255), and the length of all others: (…,48)."""
    rest = hashes[..., :-LEADING].norm(dim=-1, keepdim=True)
    return torch.cat([hashes[..., -LEADING:], rest], -1)


def _special(hashes: Tensor) -> Callable[[Tensor], Tensor]:
    """A map of hashes that removes their mean and takes the root of their spread along each
    principal axis."""
    mean, (values, axes) = hashes.mean(0), torch.linalg.eigh(torch.cov(hashes.T))
    weighted = axes * (values.clamp(min=0) + 0.1 * values.mean()) ** -0.25
    return lambda h: F.normalize((h - mean) @ weighted, dim=-1)


def laid_over(x: Tensor, y: Tensor, maps: Tensor) -> Tensor:
    """1 − correlation of the detail of x, laid over y: (n,1,s,s) in 0…255 each → (n,), at most 1.

    maps (n,2,3) say where in x a place of y is to be looked for at first, both in −1…1 (as in
    `affine_grid`). 1 where the two cannot be laid over each other, or are found too unlike at half
    the side to be worth it.
    """
    result, rest, begun = torch.ones(len(x)), torch.arange(len(x)), maps
    if x.shape[-1] >= 64:
        half = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        details = [*map(_detail, half)]
        maps = _lay(*details, maps, ROUNDS[0])
        keep = _apart(*half, details[1], maps) <= SAME_SMALL
        x, y, maps, rest = x[keep], y[keep], maps[keep], rest[keep]
    if len(rest):
        details = _detail(x), _detail(y)
        maps = _lay(*details, maps, ROUNDS[1])
        near = (maps - begun[rest]).abs().flatten(1).amax(1) <= REACH
        result[rest] = torch.where(near, _apart(x, y, details[1], maps), 1.0)
    return result


def _lay(x: Tensor, y: Tensor, maps: Tensor, rounds: int) -> Tensor:
    """Improve maps (n,2,3), so that x at map(place) is y at the place: Gauss–Newton steps on the
    squared difference."""
    side = x.shape[-1]
    u = (torch.arange(side) + 0.5) / side * 2 - 1
    u, v = u.expand(side, side), u[:, None].expand(side, side)
    for _ in range(rounds):
        w = _warp(x, maps)
        # per unit of place, of which a side has 2
        dx = F.pad(w[..., 2:] - w[..., :-2], (1, 1)) * side / 4
        dy = F.pad(w[..., 2:, :] - w[..., :-2, :], (0, 0, 1, 1)) * side / 4
        slopes = torch.cat([dx * u, dx * v, dx, dy * u, dy * v, dy], 1).flatten(2)
        normal = slopes @ slopes.mT
        normal = normal + 1e-3 * torch.diag_embed(normal.diagonal(dim1=1, dim2=2) + 1)
        step = torch.linalg.solve(
            normal, slopes @ (y - w).flatten(1)[..., None]).view(-1, 2, 3).clamp(-0.05, 0.05)
        step = step + torch.eye(3)[:2]
        maps = torch.cat([maps[..., :2] @ step[..., :2],
                          maps[..., :2] @ step[..., 2:] + maps[..., 2:]], 2)
    return maps


def _apart(x: Tensor, y: Tensor, y_detail: Tensor, maps: Tensor) -> Tensor:
    """1 − correlation of detail where both have some: inside, and neither black nor white. Times
    the whole area over this part, since small parts are more easily alike; at most 1."""
    places = F.affine_grid(maps, x.shape, align_corners=False)
    x = F.grid_sample(x, places, padding_mode="border", align_corners=False)
    inside = places.abs().amax(-1)[:, None] < 0.97
    inner = ((torch.arange(x.shape[-1]) + 0.5) / x.shape[-1] * 2 - 1).abs() < INNER
    use = inside & inner & inner[:, None] & (torch.minimum(x, y) > DARK) & (
        torch.maximum(x, y) < BRIGHT)
    n = use.sum((1, 2, 3)).clamp(min=1)
    a, b = (d - ((d * use).sum((1, 2, 3)) / n)[:, None, None, None]
            for d in (_detail(x), y_detail))
    a, b = a * use, b * use
    alike = (a * b).sum((1, 2, 3)) / (
        a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).clamp(min=1e-12).sqrt()
    return ((1 - alike) * inner.sum() ** 2 / n).clamp(0, 1)


def _detail(x: Tensor) -> Tensor:
    """What lies between two blurs, of even strength over the image: (n,1,s,s), variance 1."""
    d = _blur(x, FINE)
    d = d - _blur(d, COARSE)
    power = d.square()
    d = d / (_blur(power, LOCAL) + 0.05 * power.mean((2, 3), keepdim=True) + 1e-3).sqrt()
    return d / d.std((2, 3), keepdim=True).clamp(min=1e-6)


def _blur(x: Tensor, sigma: float) -> Tensor:
    rows, columns = (_blurring(side, sigma) for side in x.shape[-2:])
    return rows @ x @ columns.T


@lru_cache
def _blurring(side: int, sigma: float) -> Tensor:
    """A Gaussian blur as a matrix (side, side), which is faster than a convolution of so few
    pixels; edges are repeated."""
    radius = math.ceil(3 * sigma)
    at, reach = torch.arange(side)[:, None], torch.arange(-radius, radius + 1)
    weights = torch.exp(-reach.square() / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(side, -1)
    return torch.zeros(side, side).scatter_add_(1, (at + reach).clamp(0, side - 1), weights)


def _warp(x: Tensor, maps: Tensor) -> Tensor:
    return F.grid_sample(x, F.affine_grid(maps, x.shape, align_corners=False),
                         padding_mode="border", align_corners=False)
