"""The pictures of the report, each chosen by a rule that is printed below it; none is picked by
hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy
import torch
from torch import Tensor

from minidiff.data import images
from minidiff.data.table import Table
from minidiff.evaluation.metrics.breakdown import in_order
from minidiff.evaluation.metrics.comparison import Side
from minidiff.evaluation.metrics.pairwise import distances, equalised

BEST = 12         # images of the sheets of best and worst, in equal parts of each label
BESIDE = 8        # images beside their nearest real ones
STRIP = 6         # of one value of a condition, real and synthetic
NEAREST = 5       # held-out images whose mean distance says how far an image lies


def draw(tables: Mapping[str, Table], pixels: Mapping[str, Tensor], sides: Mapping[str, Side],
         closest: Sequence[dict], groups: Mapping[str, Mapping[str, np.ndarray]],
         probabilities: np.ndarray | None, *, shown: int, seed: int = 0) -> dict:
    """All that shows images: "grids", "best", "worst", "beside", "pairs", "collection".

    sides: synthetic and heldout in one space. closest: pairs of `copying.memorisation`. groups:
    those of `breakdown`. probabilities (n,): the judge's of the label asked for, if there is one.
    """
    order, facts = ranked(sides["synthetic"], sides["heldout"], probabilities)
    sheets = {}
    for key, way in (("best", order), ("worst", order[::-1])):
        of = {label: [i for i in way if facts[i]["label"] == label]
              for label in tables["synthetic"].labels}
        sheets[key] = [{"png": images.png_bytes(pixels["synthetic"][i]), **facts[i]}
                       for own in of.values() for i in own[: max(1, BEST // len(of))]]
    return {"grids": grids(tables, pixels, shown, seed), **sheets,
            "beside": beside(pixels, seed), "pairs": pairs(closest, pixels),
            "collection": collection(groups, pixels, seed)}


def ranked(made: Side, real: Side,
           probabilities: np.ndarray | None) -> tuple[list[int], list[dict]]:
    """Synthetic images from best to worst, and of each its label, probability p and distance d.

    d is the mean distance to the 5 nearest held-out images of its label, by its median over
    held-out images themselves. The order within a label is that of the sum of two ranks, p from
    high and d from low; of d alone without a judge.
    """
    d = np.full(len(made.labels), np.nan)
    for label in np.unique(made.labels):
        own, held = made.labels == label, torch.from_numpy(real.of(label).features)
        if len(held) > NEAREST:
            usual = distances(held, held).topk(
                NEAREST + 1, largest=False).values[:, 1:].mean(1).median().clamp(min=1e-12)
            near = distances(torch.from_numpy(made.features[own]),
                             held).topk(NEAREST, largest=False).values.mean(1)
            d[own] = (near / usual).numpy()
    scores = [np.nan_to_num(d, nan=np.inf)] + ([-np.round(probabilities, 6)]
                                               if probabilities is not None else [])
    rank = np.zeros(len(d))
    for own in (made.labels == label for label in np.unique(made.labels)):
        rank[own] = sum(scipy.stats.rankdata(score[own]) for score in scores)
    facts = [{"label": str(label), "d": float(x), "p": None if probabilities is None
              else float(probabilities[i])} for i, (label, x) in enumerate(zip(made.labels, d))]
    return np.argsort(rank, kind="stable").tolist(), facts


def grids(tables: Mapping[str, Table], pixels: Mapping[str, Tensor], shown: int,
          seed: int) -> dict[str, tuple]:
    """For each label, equally many held-out and synthetic images, drawn at random: PNG and PNG."""
    drawn = {}
    for label in tables["synthetic"].labels:
        rng = np.random.default_rng(seed)
        own = [np.flatnonzero(np.array(tables[name].column("label")) == label)
               for name in ("heldout", "synthetic")]
        n = min(shown, *map(len, own))
        if n:
            real, made = (torch.from_numpy(rng.permutation(i)[:n]) for i in own)
            drawn[label] = tuple(images.png_bytes(images.grid(pixels[name][i], 4))
                                 for name, i in (("heldout", real), ("synthetic", made)))
    return drawn


def collection(groups: Mapping[str, Mapping[str, np.ndarray]], pixels: Mapping[str, Tensor],
               seed: int) -> list[dict]:
    """For each value of each condition (and of the label) a strip of real and one of synthetic
    images, drawn at random.
    """
    found = []
    for name, cells in groups.items():
        for value in in_order(cells["synthetic"]):
            rng = np.random.default_rng(seed)
            own = {side: np.flatnonzero(cells[side] == value) for side in ("heldout", "synthetic")}
            n = min(STRIP, *map(len, own.values()))
            if n:
                strips = {side: images.png_bytes(
                    images.grid(pixels[side][torch.from_numpy(rng.permutation(i)[:n])], n))
                          for side, i in own.items()}
                found.append({"condition": name, "value": value, "n": len(own["heldout"]),
                              "m": len(own["synthetic"]), "shown": n, **strips})
    return found


def beside(pixels: Mapping[str, Tensor], seed: int) -> list[tuple[bytes, bytes, bytes]]:
    """Synthetic images drawn at random, each with its nearest training and its nearest held-out
    image.
    """
    some = torch.from_numpy(
        np.random.default_rng(seed).permutation(len(pixels["synthetic"]))[:BESIDE])
    made = equalised(pixels["synthetic"][some])
    near = {name: distances(made, equalised(pixels[name])).argmin(1)
            for name in ("train", "heldout")}
    return [tuple(map(images.png_bytes,
                      (pixels["synthetic"][i], pixels["train"][a], pixels["heldout"][b])))
            for i, a, b in zip(some, near["train"], near["heldout"])]


def pairs(closest: Sequence[dict],
          pixels: Mapping[str, Tensor]) -> list[tuple[bytes, bytes, bytes]]:
    return [tuple(images.png_bytes(pixels[name][p[key]]) for name, key in (
        ("synthetic", "fake"), ("train", "train"), ("heldout", "heldout"))) for p in closest]
