"""Features that lie alike wherever an image is from, beside its label.

Of each label, the means of the features of its values of a column (source, view) are drawn
together, in units of the spread that images of one value have: a Fisher ratio, 0 where the means
are equal. Only values within a label are compared: where covid comes from another hospital than
all else, features that tell nothing of the hospital would tell nothing of covid. It is CORAL (Sun &
Saenko 2016, arXiv 1607.01719) for means: a batch has too few images of a label for covariances.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from minidiff.errors import InputError

STRENGTH = 1.0  # of the term, beside the loss of the labels


class Invariance:
    """For training images in the order of `rows`; InputError where no label has two values."""

    def __init__(self, rows: Sequence[Mapping[str, str]], column: str):
        self.cells = [(row["label"], row.get(column, "")) for row in rows]
        values = defaultdict(set)
        for label, value in self.cells:
            values[label] |= {value} - {""}
        if all(len(own) < 2 for own in values.values()):
            there = "; ".join(f"{label}: {', '.join(sorted(own)) or 'none'}"
                              for label, own in sorted(values.items()))
            raise InputError(f"--invariant {column}: no label of the training images has two "
                             f"values of it; there are {there}")

    def __call__(self, features: Tensor, rows: Sequence[int]) -> Tensor:
        """Features (N,d) of these training images → the mean ratio, over pairs of values that the
        batch has twice or more of one label, (); 0 without one."""
        places = defaultdict(list)
        for place, row in enumerate(rows):
            if self.cells[row][1]:
                places[self.cells[row]].append(place)
        groups = {cell: features[own].float() for cell, own in places.items() if len(own) > 1}
        ratios = [(a.mean(0) - b.mean(0)).square().sum() / (a.var(0) + b.var(0)).sum().clamp(1e-6)
                  for (one, a), (two, b) in combinations(groups.items(), 2) if one[0] == two[0]]
        return STRENGTH * torch.stack(ratios).mean() if ratios else features.sum() * 0
