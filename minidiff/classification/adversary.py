"""Features that do not tell where an image is from, beside its label.

A second head reads a column (source, view) off the features, and what it learns is turned round on
its way back: the head descends its loss and the network climbs it (gradient reversal, Ganin et al.
2016, arXiv 1505.07818). It is told the label, and tells apart only the column's values within that
label (Li et al. 2018, conditional invariance): where covid comes from another hospital than all
else, features that tell nothing of the hospital would tell nothing of covid.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.errors import InputError

HIDDEN = 32
STRENGTH = 1.0  # of the reversed gradient, beside that of the labels' loss


class Adversary(nn.Module):
    """For training images in the order of `rows`; InputError where no label has two values."""

    def __init__(self, rows: Sequence[Mapping[str, str]], column: str, features: int,
                 seed: int = 0):
        super().__init__()
        cells = [(row["label"], row[column]) if row.get(column, "") else None for row in rows]
        pairs = sorted(set(cells) - {None})
        beside = {pair: [other[0] == pair[0] for other in pairs] for pair in pairs}
        told = {pair for pair in pairs if sum(beside[pair]) > 1}
        if not told:
            raise InputError(f"--adversary {column}: no label of the training images has two "
                             f"values of it; there are {', '.join(map('/'.join, pairs)) or 'none'}")
        self.truth = torch.tensor([pairs.index(c) if c in told else -1 for c in cells])
        self.register_buffer("beside", torch.tensor([beside[pair] for pair in pairs]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(),
                                      nn.Linear(HIDDEN, len(pairs)))

    def forward(self, features: Tensor, rows: Sequence[int]) -> Tensor:
        """Features (N,d) of these training images → the head's loss, ()."""
        truth = self.truth[list(rows)].to(features.device)
        logits = self.head(reversed_gradient(features.float()))
        logits = logits.masked_fill(~self.beside[truth.clamp(min=0)], -torch.inf)
        known = truth >= 0
        each = F.cross_entropy(logits, truth.clamp(min=0), reduction="none")
        return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def reversed_gradient(x: Tensor, strength: float = STRENGTH) -> Tensor:
    """x; its gradient is times −strength."""
    return (1 + strength) * x.detach() - strength * x
