"""The rows and columns of the reference matrix: named sets of images, of one label each.

    real        label × source × train / held-out (val and test) / external; a label of several
                sources also pooled
    synthetic   what a generator made when asked for a label; by number of the set, if asked
    control     known frauds and real images under a false name (controls.py)

A set is cut to n images by a draw that the seed and the pixels decide, and lies in the order of
that draw: neither the order of files nor how they are packed changes a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minidiff.data.table import Row, Table
from minidiff.evaluation.matrix.controls import CONTROLS
from minidiff.evaluation.metrics.copying import FEWEST

TRAIN, HELD_OUT, EXTERNAL = "train", "held-out", "external"


@dataclass(frozen=True, eq=False)
class Subset:
    """One set as a row or a column; `part` is train, held-out, external, the folder of samples or
    the control's name.
    """

    kind: str                      # real, synthetic, control
    label: str                     # that the images have or are said to have
    part: str
    sources: tuple[str, ...]       # of a synthetic set: those of the training images of its label
    pixels: Tensor                 # uint8 (n,3,S,S)
    patients: np.ndarray           # (n,) of str; a synthetic image is a patient of its own
    content: str                   # sha256 over pixels and patients
    truth: str = ""                # the label that real images have, where `label` is a false name
    features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # extractor → (n,d) float64

    @property
    def name(self) -> str:
        where = " + ".join(self.sources) if self.kind == "real" else ""
        return " · ".join(filter(None, (self.label, self.part, where)))

    @property
    def grey(self) -> str:
        """Why nothing is said of this set; "" where all is well."""
        if len(self.pixels) < FEWEST:
            return f"{len(self.pixels)} images; {FEWEST} are needed"
        return "all images of one patient" if len(set(self.patients)) == 1 else ""

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: np.ndarray) -> Subset:
        return replace(self, pixels=self.pixels[torch.from_numpy(index)],
                       patients=self.patients[index],
                       features={name: x[index] for name, x in self.features.items()})

    def without(self, patients: np.ndarray) -> Subset:
        """The images of other patients; itself, where there is none to leave out."""
        keep = np.flatnonzero(~np.isin(self.patients, patients))
        return self if len(keep) == len(self) else self.take(keep)


@dataclass(frozen=True)
class Judged:
    """What the candidates of one label are measured by."""

    label: str
    reference: Subset              # held-out images of the label, all sources of the data together
    train: Subset
    yardstick: Subset | None       # how far is far: another source of the label, else another label
    another_source: bool
    candidates: list[Subset]       # columns that get verdicts: synthetic sets and controls


def subset(kind: str, label: str, part: str, sources: Sequence[str], pixels: Tensor,
           index: Sequence[int], patients: Sequence[str], *, n: int, seed: int) -> Subset:
    """At most n of the images pixels[index] and their patients, drawn by seed and pixels, in the
    order of the draw.
    """
    start = hashlib.sha256(str(seed).encode())
    keys = []
    for i in index:
        key = start.copy()
        key.update(np.ascontiguousarray(pixels[i].numpy()))
        keys.append(key.hexdigest())
    order = sorted(range(len(keys)), key=lambda k: (keys[k], patients[k]))[:n]
    content = hashlib.sha256("\n".join(f"{keys[k]} {patients[k]}"
                                       for k in order).encode()).hexdigest()
    return Subset(kind, label, part, tuple(sorted(set(sources))), pixels[[index[k] for k in order]],
                  np.array([patients[k] for k in order]), content)


def real_subsets(table: Table, pixels: Tensor, *, n: int, seed: int) -> list[Subset]:
    """Every label × source × part of the rows, parts by split, and each label of several sources
    once more, pooled.
    """
    part = {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT}
    found = []
    for label in table.labels:
        rows = [(i, row) for i, row in enumerate(table.rows) if row["label"] == label]
        for name in (TRAIN, HELD_OUT, EXTERNAL):
            here = [(i, row) for i, row in rows if part.get(row["split"], EXTERNAL) == name]
            sources = sorted({row["source"] for _, row in here})
            for chosen in ([sources] if len(sources) > 1
                           else []) + [[source] for source in sources]:
                own = [(i, row) for i, row in here if row["source"] in chosen]
                found.append(subset("real", label, name, chosen, pixels, [i for i, _ in own],
                                    [row["patient"] for _, row in own], n=n, seed=seed))
    return found


def synthetic_subsets(table: Table, pixels: Tensor, sources: dict[str, list[str]], *, name: str,
                      by_set: bool, n: int, seed: int) -> list[Subset]:
    """One for each label of a folder of samples, and for each of its sets if asked and there are
    several.
    """
    found = []
    for label in table.labels:
        rows = [(i, row) for i, row in enumerate(table.rows) if row["label"] == label]
        numbers = sorted({row.get("set", "") for _, row in rows}, key=lambda s: (len(s), s))
        for number in [None, *(numbers if by_set and len(numbers) > 1 else [])]:
            own: list[tuple[int, Row]] = [(i, r) for i, r in rows
                                          if number in (None, r.get("set", ""))]
            part = name if number is None else f"{name}, set {number or '?'}"
            found.append(subset("synthetic", label, part, sources[label], pixels,
                                [i for i, _ in own],
                                [f"{name}/{r['file_name']}" for _, r in own], n=n, seed=seed))
    return found


def judged(label: str, real: Sequence[Subset], wide: Sequence[Subset], synthetic: Sequence[Subset],
           train: Tensor, *, n: int, seed: int) -> Judged | None:
    """The standards, candidates and controls of a label; `train` are all its training images.

    `wide` are the same sets as `real` with up to 2n images, of which two halves make a yardstick
    and a control. None where the data have no held-out or no training image of the label.
    """
    own = {part: max((s for s in real if (s.label, s.part) == (label, part)),
                     key=lambda s: len(s.sources), default=None) for part in (TRAIN, HELD_OUT)}
    reference, trained = own[HELD_OUT], own[TRAIN]
    if reference is None or trained is None:
        return None
    known = {*reference.sources, *trained.sources}
    others = [s for s in wide if s.label == label and s.part != TRAIN and not s.grey
              and len(s.sources) == 1 and not set(s.sources) & known]
    strangers = [s.without(reference.patients) for s in real
                 if s.label != label and s.part != TRAIN]
    strangers = [s for s in strangers if not s.grey]
    wrong = max(strangers, key=lambda s: (bool(set(s.sources) & known), s.part == HELD_OUT, len(s)),
                default=None)
    other = max(others, key=len, default=None)
    yardstick, disguised = _halves(other, n) if other else (wrong, None)
    candidates = [s for s in synthetic if s.label == label]
    for number, (name, control) in enumerate(CONTROLS.items()):
        truth = {"wrong class": wrong, "wrong source": disguised}.get(name)
        if control.make:
            pixels = control.make(train, n, np.random.default_rng((seed, number)))
            candidates.append(subset("control", label, name, trained.sources, pixels,
                                     range(len(pixels)),
                                     [f"{name} {i}" for i in range(len(pixels))], n=n, seed=seed))
        elif truth is not None:
            candidates.append(replace(truth, kind="control", label=label, part=name,
                                      truth=truth.label))
    return Judged(label, reference, trained, yardstick, other is not None, candidates)


def _halves(other: Subset, n: int) -> tuple[Subset, Subset]:
    """Two halves by patient, a yardstick and what is passed off as ours; the whole as both, if a
    half were too small.
    """
    # by name: patients of many images are drawn first
    first = np.isin(other.patients, sorted(set(other.patients))[::2])
    one, two = (replace(other.take(np.flatnonzero(mask)[:n]), part=f"{other.part}, one half")
                for mask in (first, ~first))
    whole = other.take(np.arange(min(n, len(other))))
    return (whole, whole) if one.grey or two.grey else (one, two)
