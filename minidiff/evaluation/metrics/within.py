"""Agreement within a label. The attributes that a sample is asked for come from real rows of its
label, and where old people have one label and young ones another, a picture that shows the label
alone agrees with the age asked for, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from minidiff.statistics import group_ids, pearson, z_value
from minidiff.variables import Labels, Number, Variable


def within_label(variables: Sequence[Variable], judged: Mapping[str, Tensor], labels: Labels,
                 groups: Sequence[str]) -> dict[str, dict]:
    """Name → figures over the known cells of each variable in `labels` but the label itself;
    `groups` are its values.

    Number: correlation with each label's mean taken off both sides, Fisher's interval (within_r,
    within_low, within_high). Category: the accuracy of guessing the commonest value of each label
    (within_chance).
    """
    group, found = group_ids(groups), {}
    for v in variables:
        if v.name not in labels or v.name == "label":
            continue
        cells = labels[v.name]
        known = (torch.isfinite(cells) if isinstance(v, Number) else cells >= 0).numpy()
        own, cells = group[known], cells.numpy()[known]
        if not known.any():
            found[v.name] = {}
        elif isinstance(v, Number):
            r, low, high = _pooled(cells, judged[v.name].numpy()[known], own)
            found[v.name] = {"within_r": r, "within_low": low, "within_high": high}
        else:
            right = sum(max(Counter(cells[own == g].tolist()).values()) for g in set(own.tolist()))
            found[v.name] = {"within_chance": right / len(cells)}
    return found


def _pooled(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> tuple[float, float, float]:
    """Correlation within groups: (r, low, high); every mean taken off costs one degree of
    freedom.
    """
    _, group = np.unique(group, return_inverse=True)
    r, _, _ = pearson(_centred(x, group), _centred(y, group))
    free = len(x) - group.max() - 3
    if math.isnan(r) or free < 1:
        return math.nan, math.nan, math.nan
    centre, half = math.atanh(min(max(r, -1 + 1e-12), 1 - 1e-12)), z_value() / math.sqrt(free)
    return r, math.tanh(centre - half), math.tanh(centre + half)


def _centred(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    x = x.astype(float)
    rest = x - (np.bincount(group, x) / np.bincount(group))[group]
    # of equal values nothing is left, not a rounding
    return np.where(np.abs(rest) < 1e-9 * np.abs(x).max(), 0.0, rest)
