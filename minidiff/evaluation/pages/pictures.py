"""The pictures of the report. Each is chosen by a rule that the page states, none by hand."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data import images
from minidiff.data.table import Table
from minidiff.evaluation.metrics.by_condition import in_order
from minidiff.evaluation.metrics.pairwise import distances, equalised, nearest
from minidiff.evaluation.metrics.report_rows import Side

BEST = 12         # images of the sheets of best and worst, in equal parts of each label
BESIDE = 8        # images beside their nearest real ones
NAMED = 12        # copies beside the training image that they equal, the nearest
STRIP = 6         # images in a row
NEAREST = 5       # held-out images whose mean distance says how far an image lies
TILE, LARGE = 128, 256   # pixels a side: the least of an image on a strip, and of one reduced


def draw(tables: Mapping[str, Table], pixels: Mapping[str, Tensor], sides: Mapping[str, Side],
         copies: Mapping, groups: Mapping[str, Mapping[str, np.ndarray]],
         probabilities: np.ndarray | None, *, shown: int, seed: int = 0) -> dict:
    """All that shows images: "labels", "grids", "best", "worst", "beside", "pairs", "named",
    "collection".

    sides: synthetic and heldout in one space. copies: of `copying.memorisation`. groups:
    `by_condition.groups`. probabilities (n,): the judge's of the label asked for, if there is one.
    """
    order, facts = ranked(sides["synthetic"], sides["heldout"], probabilities)
    names, sheets = tables["synthetic"].labels, {}
    for key, way in (("best", order), ("worst", order[::-1])):
        own = [[i for i in way if facts[i]["label"] == name][: max(1, BEST // len(names))]
               for name in names]
        sheets[key] = [{"png": images.png_bytes(reduced(pixels["synthetic"][i])), **facts[i]}
                       for i in itertools.chain(*own)]
    labels = {"label": {name: np.array(tables[name].column("label")) for name in tables}}
    return {"labels": strips(labels, pixels, STRIP, seed),
            "grids": strips(labels, pixels, shown, seed), **sheets,
            "beside": beside(pixels, seed), "pairs": pairs(copies["closest"], pixels),
            "named": pairs(((copies["named"] or {}).get("images") or [])[:NAMED], pixels),
            "collection": strips(groups, pixels, STRIP, seed)}


def ranked(made: Side, real: Side,
           probabilities: np.ndarray | None) -> tuple[list[int], list[dict]]:
    """Synthetic images from best to worst, and of each its label, probability p and distance d.

    d is the mean distance to the 5 nearest held-out images of its label, by its median over
    held-out images themselves. The order within a label is that of the sum of two ranks, p from
    high and d from low; of d alone without a judge.
    """
    d, rank = np.full(len(made.labels), np.nan), np.zeros(len(made.labels))
    for label in np.unique(made.labels):
        own, held = made.labels == label, torch.from_numpy(real.of(label).features)
        if len(held) > NEAREST:
            usual = nearest(held, held, NEAREST + 1)[:, 1:].mean(1).median().clamp(min=1e-12)
            near = nearest(torch.from_numpy(made.features[own]), held, NEAREST).mean(1)
            d[own] = (near / usual).numpy()
        rank[own] = scipy.stats.rankdata(np.nan_to_num(d[own], nan=np.inf))
        if probabilities is not None:
            rank[own] += scipy.stats.rankdata(-np.round(probabilities[own], 6))
    p = [None] * len(d) if probabilities is None else probabilities.tolist()
    facts = [{"label": label, "d": x, "p": sure}
             for label, x, sure in zip(made.labels.tolist(), d.tolist(), p)]
    return np.argsort(rank, kind="stable").tolist(), facts


def strips(groups: Mapping[str, Mapping[str, np.ndarray]], pixels: Mapping[str, Tensor],
           shown: int, seed: int) -> list[dict]:
    """For each value of each group, equally many real and synthetic images, drawn at random."""
    found = []
    for name, cells in groups.items():
        for value in in_order(cells["synthetic"]):
            rng = np.random.default_rng(seed)
            own = {side: np.flatnonzero(cells[side] == value) for side in ("heldout", "synthetic")}
            n = min(shown, *map(len, own.values()))
            if n:
                found.append({"condition": name, "value": str(value), "n": len(own["heldout"]),
                              "m": len(own["synthetic"]), "shown": n,
                              **{side: sheet(pixels[side][rng.permutation(index)[:n]])
                                 for side, index in own.items()}})
    return found


def sheet(x: Tensor) -> bytes:
    """PNG of uint8 (N,C,S,S) in rows of STRIP; small images are enlarged and large ones reduced."""
    x, more = reduced(x), -(-TILE // x.shape[-1])
    x = x.repeat_interleave(more, -1).repeat_interleave(more, -2)
    return images.png_bytes(images.grid(x, STRIP, pad=4))


def reduced(x: Tensor) -> Tensor:
    """uint8 (…,S,S), of S ≥ 512 with 256 to 384 pixels a side: means of squares of pixels."""
    less = reduction(x.shape[-1])
    return x if less == 1 else F.avg_pool2d(x.float(), less).round().byte()


def reduction(size: int) -> int:
    """By how much an image of that side is reduced on a page."""
    return max(1, size // LARGE)


def beside(pixels: Mapping[str, Tensor], seed: int) -> list[tuple[bytes, bytes, bytes]]:
    """Synthetic images drawn at random, each with its nearest training and held-out image."""
    some = torch.from_numpy(
        np.random.default_rng(seed).permutation(len(pixels["synthetic"]))[:BESIDE])
    made = equalised(pixels["synthetic"][some])
    near = {name: distances(made, equalised(pixels[name])).argmin(1)
            for name in ("train", "heldout")}
    return pairs([{"fake": i, "train": a, "heldout": b}
                  for i, a, b in zip(some, near["train"], near["heldout"])], pixels)


def pairs(rows: Sequence[dict], pixels: Mapping[str, Tensor]) -> list[tuple[bytes, ...]]:
    """Synthetic, training and, if it has one, held-out image of each row of numbers."""
    return [tuple(images.png_bytes(reduced(pixels[name][p[key]])) for name, key in (
        ("synthetic", "fake"), ("train", "train"), ("heldout", "heldout")) if key in p)
            for p in rows]
