"""Variables → context tokens, without text.

The context starts from the null context of the public model (CLIP of the empty prompt). Each
variable adds a zero-initialised, bias-free projection of its embedding to all positions but the
first (BOS): at step 0 the output is the public unconditional context bit for bit, whatever the
labels. Null is a mask after the projection: it adds nothing, ever. Unknown has an embedding of its
own, learned from the rows where the value is missing.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minidiff.variables import UNKNOWN, Category, Findings, Labels, Number, Variable

# a number's Fourier features reach from a slow trend to about a tenth of a standard deviation
OCTAVES = 6


class Conditioner(nn.Module):
    """(labels of N images) → (N, K, d), or (1, K, d) without variables.

    null_context (K, d) is saved with the weights.
    """

    def __init__(self, variables: Sequence[Variable], null_context: Tensor,
                 generator: torch.Generator):
        super().__init__()
        width, scale = null_context.shape[1], null_context[1:].std().item() or 1.0
        self.variables = tuple(variables)
        self.register_buffer("null_context", null_context.clone())
        self.embeddings = nn.ModuleList([EMBEDDINGS[type(v)](v, width, scale, generator)
                                         for v in self.variables])
        self.projections = nn.ModuleList([nn.Linear(width, width, bias=False)
                                          for _ in self.variables])
        for projection in self.projections:
            nn.init.zeros_(projection.weight)

    def forward(self, labels: Labels) -> Tensor:
        if not self.variables:
            return self.null_context[None]
        added = 0
        for variable, embed, project in zip(self.variables, self.embeddings, self.projections):
            value = labels[variable.name]                                    # (N,)
            keep = (value != variable.null).unsqueeze(1)                     # (N, 1)
            added = added + torch.where(keep, project(embed(value)), 0)      # (N, d)
        context = self.null_context.expand(len(value), -1, -1)               # (N, K, d)
        return torch.cat([context[:, :1], context[:, 1:] + added.unsqueeze(1)], dim=1)

    def null(self, n: int, device: torch.device | str = "cpu") -> Labels:
        """Labels of n images with every variable dropped."""
        return {v.name: torch.full((n,), v.null, dtype=v.dtype, device=device)
                for v in self.variables}

    @torch.no_grad()
    def adopt(self, old: "Conditioner") -> None:
        """Take over the null context, and what a trained conditioner knows of the same variables.

        What it does not know adds nothing yet, as null does: a new variable by its zero projection,
        a new value of a category or a new finding by a zero row. So the output is the old one's for
        old labels, and with null for whatever is new.
        """
        self.null_context.copy_(old.null_context)
        names = [v.name for v in old.variables]
        for variable, embedding, projection in zip(self.variables, self.embeddings,
                                                   self.projections):
            if variable.name in names:
                i = names.index(variable.name)
                embedding.adopt(old.embeddings[i])
                projection.weight.copy_(old.projections[i].weight)


class CategoryEmbedding(nn.Module):
    """One learned vector a value; the last row is for unknown."""

    def __init__(self, variable: Category, width: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.values = variable.values
        self.weight = nn.Parameter(scale * torch.randn(len(self.values) + 1, width,
                                                       generator=generator))

    def forward(self, value: Tensor) -> Tensor:
        return self.weight[torch.where(value >= 0, value, len(self.weight) - 1)]

    def adopt(self, old: "CategoryEmbedding") -> None:
        """Rows by value, unknown's to unknown's; a new value starts at zero.

        A random row would reach the context through a trained projection, as noise. Unknown's row
        would do where cells were missing in the old data; elsewhere it was never trained. Null
        always was: conditions are dropped in every run.
        """
        rows = dict(zip((*old.values, None), old.weight))
        self.weight.copy_(torch.stack([rows.get(v, torch.zeros_like(old.weight[0]))
                                       for v in (*self.values, None)]))


class FindingsEmbedding(nn.Module):
    """The sum of one learned vector for each finding present; unknown and none have their own.

    Otherwise "none of them" would be a sum of nothing, the same as null.
    """

    def __init__(self, variable: Findings, width: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.variable = variable
        self.weight = nn.Parameter(scale * torch.randn(2 + len(variable.values), width,
                                                       generator=generator))

    def forward(self, value: Tensor) -> Tensor:
        alone = torch.stack([value == UNKNOWN, value == 0], dim=1)       # (N, 2)
        return torch.cat([alone, self.variable.bits(value)], dim=1).to(self.weight) @ self.weight

    def adopt(self, old: "FindingsEmbedding") -> None:
        """Rows by finding, which keep their places (variables.merge); a new one starts at zero."""
        rows = dict(zip(old.variable.values, old.weight[2:]))
        new = [rows.get(v, torch.zeros_like(old.weight[0])) for v in self.variable.values]
        self.weight.copy_(torch.stack([*old.weight[:2], *new]))


class NumberEmbedding(nn.Module):
    """A linear map of Fourier features of the standardised number; a learned vector for unknown."""

    def __init__(self, variable: Number, width: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.mean, self.std = variable.mean, variable.std or 1.0
        self.weight = nn.Parameter(scale * torch.randn(1 + 2 * OCTAVES, width,
                                                       generator=generator) / OCTAVES**0.5)
        self.unknown = nn.Parameter(scale * torch.randn(width, generator=generator))

    def forward(self, value: Tensor) -> Tensor:
        known = value.isfinite()
        x = torch.where(known, (value - self.mean) / self.std, 0)[:, None]          # (N, 1)
        octaves = 2 ** torch.arange(OCTAVES, device=x.device, dtype=x.dtype)
        angles = x * math.pi / 8 * octaves                                          # (N, OCTAVES)
        features = torch.cat([x, angles.sin(), angles.cos()], dim=1).to(self.weight.dtype)
        return torch.where(known[:, None], features @ self.weight, self.unknown)

    def adopt(self, old: "NumberEmbedding") -> None:
        """The old weights, which mean something under the old mean and standard deviation only."""
        same = (self.mean, self.std) == (old.mean, old.std)
        assert same, "another standardisation: variables.merge keeps the old one"
        self.load_state_dict(old.state_dict())


EMBEDDINGS = {Category: CategoryEmbedding, Findings: FindingsEmbedding, Number: NumberEmbedding}
