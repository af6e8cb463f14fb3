"""Batch by batch: scores, counts of pixels, and the pictures that are shown; no map is kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from minidiff.evaluation.anomalies import maps
from minidiff.evaluation.anomalies.truth import by_level, levels_of

DENSITIES = {"bits": "likelihood", "error": "denoising error"}   # of a part; high is abnormal
SHOWN = (maps.PRIMARY, f"{maps.VAE}, pixel × feature")   # maps on the page, and after them …
BRIGHT = 0.999      # quantile of a map that is white, one for all images
LOOKED_AT = 8       # batches, evenly picked, that say which values a map has

Part = Mapping[str, Tensor]                          # what a model made of a batch
Batch = Callable[[], tuple[Sequence[int], Tensor, Part]]   # loads: places, images, part


@dataclass
class Found:
    scores: dict[str, np.ndarray] = field(default_factory=dict)   # (N,), high is abnormal
    blurred: dict[str, np.ndarray] = field(default_factory=dict)  # the same of blurred images
    counts: dict[str, np.ndarray] = field(default_factory=dict)   # (N, 2, L), see `by_level`
    kept: dict[int, tuple[Part, maps.Maps]] = field(default_factory=dict)  # image → its pictures
    white: dict[str, float] = field(default_factory=dict)         # value of a map shown as white


def collect(batches: Sequence[Batch], atlas: maps.Normal | None, masks: np.ndarray | None,
            keep: Sequence[int]) -> Found:
    """What is needed of all batches; `keep`: places of the images whose pictures are shown."""
    def all_maps(images: Tensor, part: Part) -> maps.Maps:
        return maps.baseline_maps(images, atlas) | maps.model_maps(images, part)

    some = np.unique(np.linspace(0, len(batches) - 1, LOOKED_AT).round().astype(int))
    seen = [all_maps(*batches[k]()[1:]) for k in some]
    levels = {name: levels_of(np.concatenate([own[name] for own in seen])) for name in seen[0]}
    shown = (*SHOWN, maps.LINEAR if atlas else "blur residual")
    found = Found(white={name: max(float(np.quantile(np.concatenate([own[name] for own in seen]),
                                                     BRIGHT)), 1e-9) for name in shown})
    scores: list[dict[str, np.ndarray]] = []
    counts: list[dict[str, np.ndarray]] = []
    for load in batches:
        places, images, part = load()
        own = all_maps(images, part)
        scores.append({**{name: maps.image_scores(each) for name, each in own.items()},
                       **{key: part[key].double().numpy() for key in part if part[key].ndim == 1}})
        if masks is not None:
            counts.append({name: by_level(each, masks[places], levels[name])
                           for name, each in own.items()})
        for k, i in enumerate(places):
            if i in keep:
                found.kept[i] = ({name: part[name][k] for name in part if part[name].ndim == 4},
                                 {name: own[name][k] for name in shown})
    joined = {name: np.concatenate([each[name] for each in scores]) for name in scores[0]}
    found.scores = {DENSITIES.get(name, name): own for name, own in joined.items()
                    if not name.startswith(maps.BLURRED)}
    found.blurred = {DENSITIES[name.removeprefix(maps.BLURRED)]: own
                     for name, own in joined.items() if name.startswith(maps.BLURRED)}
    found.counts = {name: np.concatenate([each[name] for each in counts])
                    for name in (counts[0] if counts else ())}
    return found
