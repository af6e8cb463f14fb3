"""The rows and columns of the reference matrix, and what a column scores against a row.

    real        label × source × train / held-out (val and test) / external; a label of several
                sources also pooled
    synthetic   what a generator made when asked for a label; by number of the set, if asked
    control     known failures and real images under a false name (controls.py)

Each is a set of images of one label. It is cut to n images by a draw that the seed and the pixels
decide, and lies in the order of that draw: neither the order of files nor how they are packed
changes a number.

In a cell, KD needs no equal numbers and takes all images of both sides; FD, MIND, density, coverage
and C2ST depend on the number, and are measured at the smaller n on both sides. Beside FD, MIND and
coverage stands what real against real of the same label scores at that n: a bare FD measures n.

The headline of a candidate S against held-out images H, where the real images O say how far is far:

    ρ = KD(S, H) / KD(O, H)      0: another sample of the same hospital; 1: as far as O; above 1:
                                 farther

Its interval is a bootstrap by patient in which numerator and denominator share the draws of H.
Where the interval of the denominator holds 0 there is no ρ. Whether ρ keeps a limit is read from
KD(S, H) − limit · KD(O, H), which needs no division.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from minidiff.data.dataset import Images
from minidiff.errors import InputError
from minidiff.evaluation.matrix.controls import CONTROLS
from minidiff.evaluation.metrics.copying import FEWEST
from minidiff.evaluation.metrics.distances import fid, floor, kd_with_interval, kid_p, mind
from minidiff.evaluation.metrics.neighbours import c2st, coverage_worth, prdc
from minidiff.statistics import clopper_pearson, finite_percentile

LIMIT = 0.5  # of ρ, up to which a set passes
TRAIN, HELD_OUT, EXTERNAL = "train", "held-out", "external"
PARTS = {"train": TRAIN, "val": HELD_OUT, "test": HELD_OUT, "external": EXTERNAL}  # by split
Null = Callable[[int], dict]


@dataclass(frozen=True, eq=False)
class Subset:
    """One row or column; `part`: train, held-out, external, a folder of samples or a control."""

    kind: str                      # real, synthetic, control
    label: str                     # that the images have or are said to have
    part: str
    sources: tuple[str, ...]       # of a synthetic set: those of the training images of its label
    pixels: Tensor                 # uint8 (n,3,S,S)
    patients: np.ndarray           # (n,) of str; a synthetic image is a patient of its own
    content: str                   # sha256 over pixels and patients
    truth: str = ""                # the label that real images have, where `label` is a false name
    features: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # space → (n,d)

    @property
    def name(self) -> str:
        where = " + ".join(self.sources) if self.kind == "real" else ""
        return " · ".join(filter(None, (self.label, self.part, where)))

    @property
    def too_few(self) -> str:
        """Why nothing is said of this set; "" where it has enough images and patients."""
        if len(self) < FEWEST:
            return f"{len(self)} images; {FEWEST} are needed"
        return "all images of one patient" if len(set(self.patients)) == 1 else ""

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, index: np.ndarray) -> "Subset":
        return replace(self, pixels=self.pixels[torch.from_numpy(index)],
                       patients=self.patients[index],
                       features={name: x[index] for name, x in self.features.items()})

    def without(self, patients: np.ndarray) -> "Subset":
        """The images of other patients; itself, where there is none to leave out."""
        keep = np.flatnonzero(~np.isin(self.patients, patients))
        return self if len(keep) == len(self) else self.take(keep)


@dataclass(frozen=True)
class Standard:
    """What the candidates of one label are measured by."""

    label: str
    reference: Subset              # held-out images of the label, all sources of the data together
    train: Subset
    yardstick: Subset | None       # how far is far: another source of the label, else another label
    another_source: bool
    candidates: list[Subset]       # columns that get verdicts: synthetic sets and controls


def subset(kind: str, label: str, part: str, sources: Sequence[str], pixels: Tensor,
           patients: Mapping[int, str], *, n: int, seed: int) -> Subset:
    """At most n images, drawn by seed and pixels, in the order of the draw.

    `patients` names the patient of each image, by its place in `pixels`, that may be drawn."""
    keys = {i: hashlib.sha256(str(seed).encode() + pixels[i].numpy().tobytes()).hexdigest()
            for i in patients}
    drawn = sorted(keys, key=lambda i: (keys[i], patients[i]))[:n]
    content = hashlib.sha256("\n".join(f"{keys[i]} {patients[i]}" for i in drawn).encode())
    return Subset(kind, label, part, tuple(sorted(set(sources))), pixels[drawn],
                  np.array([patients[i] for i in drawn]), content.hexdigest())


def real_subsets(images: Images, *, n: int, seed: int) -> list[Subset]:
    """Every label × part × source, and each label of several sources once more, pooled."""
    found = []
    for label, part in itertools.product(images.table.labels, (TRAIN, HELD_OUT, EXTERNAL)):
        rows = {i: row for i, row in enumerate(images.table.rows)
                if row["label"] == label and PARTS[row["split"]] == part}
        sources = sorted({row["source"] for row in rows.values()})
        pooled = [sources] if len(sources) > 1 else []
        for chosen in (*pooled, *([source] for source in sources)):
            patients = {i: row["patient"] for i, row in rows.items() if row["source"] in chosen}
            found.append(subset("real", label, part, chosen, images.pixels, patients, n=n,
                                seed=seed))
    return found


def synthetic_subsets(images: Images, sources: Mapping[str, Sequence[str]], *, name: str,
                      by_set: bool, n: int, seed: int) -> list[Subset]:
    """One for each label of a folder of samples; `by_set`: and for each of its several sets."""
    found = []
    for label in images.table.labels:
        rows = {i: row for i, row in enumerate(images.table.rows) if row["label"] == label}
        numbers = sorted({row.get("set", "") for row in rows.values()},
                         key=lambda number: (len(number), number))
        parts = {name: numbers}
        if by_set and len(numbers) > 1:
            parts |= {f"{name}, set {number or '?'}": [number] for number in numbers}
        for part, chosen in parts.items():
            patients = {i: f"{name}/{row['file_name']}" for i, row in rows.items()
                        if row.get("set", "") in chosen}
            found.append(subset("synthetic", label, part, sources[label], images.pixels, patients,
                                n=n, seed=seed))
    return found


def standard(label: str, real: Sequence[Subset], wide: Sequence[Subset],
             synthetic: Sequence[Subset], train: Tensor, *, n: int, seed: int) -> Standard | None:
    """The standards, candidates and controls of a label; `train` are all its training images.

    `wide` are the same sets as `real` with up to 2n images, of which two halves make a yardstick
    and a control. None where the data have no held-out or no training image of the label.
    """
    reference, trained = (max((s for s in real if (s.label, s.part) == (label, part)),
                              key=lambda s: len(s.sources), default=None)
                          for part in (HELD_OUT, TRAIN))
    if reference is None or trained is None:
        return None
    own = {*reference.sources, *trained.sources}
    elsewhere = [s for s in wide if s.label == label and s.part != TRAIN and not s.too_few
                 and len(s.sources) == 1 and not set(s.sources) & own]
    other_labels = [s.without(reference.patients) for s in real
                    if s.label != label and s.part != TRAIN]
    wrong_class = max((s for s in other_labels if not s.too_few), default=None, key=lambda s: (
        bool(set(s.sources) & own), s.part == HELD_OUT, len(s)))
    yardstick, wrong_source = wrong_class, None
    if elsewhere:
        yardstick, wrong_source = _halves(max(elsewhere, key=len), n)
    candidates = [s for s in synthetic if s.label == label]
    for number, (name, control) in enumerate(CONTROLS.items()):
        false = {"wrong class": wrong_class, "wrong source": wrong_source}.get(name)
        if control.make:
            pixels = control.make(train, n, np.random.default_rng((seed, number)))
            candidates.append(subset("control", label, name, trained.sources, pixels, {
                i: f"{name} {i}" for i in range(len(pixels))}, n=n, seed=seed))
        elif false is not None:
            candidates.append(replace(false, kind="control", label=label, part=name,
                                      truth=false.label))
    return Standard(label, reference, trained, yardstick, bool(elsewhere), candidates)


def _halves(other: Subset, n: int) -> tuple[Subset, Subset]:
    """Two halves by patient, a yardstick and what is passed off as ours; the whole as both, if a
    half were too small."""
    # by name: patients of many images are drawn first
    first = np.isin(other.patients, sorted(set(other.patients))[::2])
    one, two = (replace(other.take(np.flatnonzero(mask)[:n]), part=f"{other.part}, one half")
                for mask in (first, ~first))
    whole = other.take(np.arange(min(n, len(other))))
    return (whole, whole) if one.too_few or two.too_few else (one, two)


def cell(row: Subset, column: Subset, space: str, null: Null, *, permutations: int = 1000,
         resamples: int = 1000, seed: int = 0) -> tuple[dict, np.ndarray | None]:
    """Numbers of one cell and the bootstrap draws of its KD; {"too_few": why} and None where there
    are too few images. Images of a column whose patients are in the row are left out."""
    others = column.without(row.patients)
    found = {"row": row.name, "column": column.name, "extractor": space, "n_r": len(row),
             "n_s": len(others), "data": [row.content[:12], column.content[:12]],
             "confounded": confounded(row, column)}
    too_few = row.too_few or others.too_few
    if len(others) < FEWEST <= len(column):
        too_few = f"{len(others)} images of other patients; {FEWEST} are needed"
    if too_few:
        return {**found, "too_few": too_few}, None
    x, y = row.features[space], others.features[space]
    both = {"real": x, "fake": y, "real_patients": row.patients, "fake_patients": others.patients}
    kd, draws = kd_with_interval(**both, n_boot=resamples, seed=seed)
    n = min(len(x), len(y))
    equal = {"real": x[:n], "fake": y[:n]}  # subsets lie in random order: the first n are a draw
    spread = prdc(**equal)
    worth = coverage_worth(spread.coverage, **equal, real_patients=row.patients[:n], seed=seed)
    reached = clopper_pearson(spread.coverage * worth, worth)
    told = c2st(**equal, real_patients=row.patients[:n], fake_patients=others.patients[:n],
                permutations=1, seed=seed)  # its interval says enough: no p
    return {**found, "n": n, **kd,
            "KD_p": kid_p(**both, permutations=permutations, seed=seed), "FD": fid(**equal),
            "MIND": mind(**equal, seed=seed), "density": spread.density,
            "coverage": spread.coverage, "coverage_low": reached[0], "coverage_high": reached[1],
            "coverage_worth": worth,
            "C2ST": told.accuracy, "C2ST_low": told.low, "C2ST_high": told.high, **null(n)}, draws


def real_against_real(pool: Sequence[Subset], space: str, *, repeats: int, seed: int = 0) -> Null:
    """n → FD, MIND and coverage between two draws of n real images of different patients.

    A pool too small for two draws of n gives smaller ones: `null_n` says of how many. A pool of too
    few patients gives nothing.
    """
    features = np.concatenate([s.features[space] for s in pool])
    patients = np.concatenate([s.patients for s in pool])
    metrics = {"FD": fid, "MIND": functools.partial(mind, directions=200), "coverage": _coverage}

    @functools.cache
    def null(n: int) -> dict:
        try:
            drawn = {name: floor(metric, real=features, patients=patients, n=n, m=n,
                                 repeats=repeats, seed=seed) for name, metric in metrics.items()}
        except InputError:  # too few images for the balls of coverage
            return {}
        if not all(drawn.values()):
            return {}
        return {key: value for name, d in drawn.items() for key, value in (
            (f"{name}_null", d.median), (f"{name}_null_low", d.low), (f"{name}_null_high", d.high),
            ("null_n", d.n))}

    return null


def rho(made: tuple[dict, np.ndarray], yardstick: tuple[dict, np.ndarray]) -> dict:
    """ρ with its interval where the yardstick is resolved, and whether ρ keeps the limit.

    within is True where all of the interval of KD(S,H) − ½ KD(O,H) is at most 0 and the yardstick
    is resolved, False where all of it, and of KD(S,H), is above 0, else None.
    """
    (s, s_draws), (o, o_draws) = made, yardstick
    contrast = finite_percentile(s_draws - LIMIT * o_draws)
    resolved, within = bool(o["KD_low"] > 0), None
    if resolved and contrast[1] <= 0:
        within = True
    elif contrast[0] > 0 and s["KD_low"] > 0:
        within = False
    found = {"KD": s["KD"], "KD_low": s["KD_low"], "KD_high": s["KD_high"], "n": s["n_s"],
             "n_r": s["n_r"], "yardstick_KD": o["KD"], "yardstick_low": o["KD_low"],
             "yardstick_high": o["KD_high"], "yardstick_n": o["n_s"], "resolved": resolved,
             "within": within}
    if resolved:
        low, high = finite_percentile(s_draws / np.where(o_draws > 0, o_draws, np.nan))
        found |= {"rho": s["KD"] / o["KD"], "rho_low": low, "rho_high": high}
    return found


def confounded(row: Subset, column: Subset) -> bool:
    """Do label and source both differ, so that nobody can say which of the two is seen?"""
    return row.label != (column.truth or column.label) and not (
        set(row.sources) & set(column.sources))


def _coverage(real: np.ndarray, fake: np.ndarray) -> float:
    n = min(len(real), len(fake))  # the patient at the border of two draws may leave one smaller
    return prdc(real=real[:n], fake=fake[:n]).coverage
