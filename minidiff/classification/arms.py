"""What each arm is trained on. All arms have the same steps, network, start and seeds.

    arm                       training images
    real                      all real images, with classic augmentation
    real+duplicates           and repeats of them: of each label as many as the first synthetic
                              folder has
    real+2xduplicates         and repeats: of each label 2 n, where n real images have the label of
                              interest
    real+synthetic            and all images of the synthetic folder
    real+.5xsynthetic         and synthetic images: of each label n / 2
    synthetic                 synthetic images alone
    synthetic-then-real       synthetic images in the first half of the steps, real ones in the
                              second; the rate warms up in each, and the second chooses the weights
    real-then-real            its control: real images in both halves, all else the same
    real@25+2xsynthetic       with only 25 real images of the label of interest, by whole patients,
                              and the same share of those of validation
    real@5%                   with only 5 % of the real patients of each label, at least one, drawn
                              anew by each network: its own 10 % hold its 5 %; and 5 % of those of
                              validation

Any `real` may have @25 or @5%. It may also be `real-plain` (no augmentation), `real-strong`
(augmentation as between hospitals, data/augmentation.py), `real-even` (images weighted so that the
label says nothing about the study's --even columns), `real-scratch` (from random weights, where the
others start at --init), or several of these: `real-strong-even`. `synthetic` may be the name of any
folder that the study was given, of other real images too, or of several folders, of as many
generators: network k of the arm is then trained on the images of generator k mod their number.
Synthetic images help only if they help more than as many duplicates, which add nothing new
(count-matched control).

Where labels are findings that stand together, Edema|Effusion, their combinations are too many to be
counted one by one: "of each label" is then "of all images", and n all real images, so that what is
added has the findings as often as its folder.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.counted import order
from minidiff.data.subset import first_patients, share_of_patients
from minidiff.errors import InputError
from minidiff.pixels import Gathered, Pictures
from minidiff.variables import AND, ANY

OWN = REAL, DUPLICATES = "real", "duplicates"
FORM = re.compile(r"""(?:(?P<first>[A-Za-z]\w*)-then-)?
                      real(?P<words>(?:-(?:plain|strong|even|scratch))*)
                      (?P<at>@(?:(?P<most>\d+)|(?P<share>\d*\.?\d+)%))?
                      (?:\+(?:(?P<factor>\d*\.?\d+)x)?(?P<added>[A-Za-z]\w*))?""", re.VERBOSE)


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures of one set, in one order; parts and sums of sets share theirs."""

    pixels: Pictures           # uint8 (N,C,S,S)
    labels: Tensor             # int64 (N,), as `variables` encodes the target
    patients: list[str]
    rows: list[dict[str, str]]
    hashes: list[str]          # sha256 of the files; of synthetic images, too

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Sequence[int]) -> "Images":
        index = list(index)
        return Images(Gathered(self.pixels, index=index), self.labels[index],
                      *([column[i] for i in index]
                        for column in (self.patients, self.rows, self.hashes)))

    def __add__(self, other: "Images") -> "Images":
        return Images(Gathered(self.pixels, other.pixels),
                      torch.cat([self.labels, other.labels]), self.patients + other.patients,
                      self.rows + other.rows, self.hashes + other.hashes)


@dataclass(frozen=True)
class Arm:
    """One name of the table above, taken apart."""

    name: str
    real: bool = True
    words: tuple[str, ...] = ()
    at: str = ""                 # @25 or @5%
    most: int | None = None      # real images of the label of interest
    share: float | None = None   # of the real patients
    added: str = ""              # duplicates, or the name of a folder
    factor: float | None = None  # of what is added; None: all of it
    first: str = ""              # real, or a folder, for the first half of the steps

    @property
    def base(self) -> str:
        """The arm of the same real images and nothing else."""
        return "-".join(("real", *self.words)) + self.at

    @property
    def start(self) -> str:
        """The arm with all real images."""
        return self.name.replace(self.at, "") if self.at else self.name

    @property
    def source(self) -> str:
        """The folder that it uses besides the real images, "" for none."""
        return next((name for name in (self.first, self.added)
                     if name not in ("", REAL, DUPLICATES)), "")


def parse(name: str, sources: Sequence[str]) -> Arm:
    """The arm of this name. `sources` are the names of synthetic folders and of other real ones."""
    if name in sources:
        return Arm(name, real=False, added=name)
    folders, match = ", ".join(sources) or "none given", FORM.fullmatch(name)
    if not match:
        raise InputError(f"arm {name!r}; allowed are real, real@25, real@5%, real-plain, "
                         "real-strong, real-even, real-scratch, real+duplicates, "
                         "real+2xduplicates, real-then-real, and with the name of a folder of "
                         f"--synthetic or --other ({folders}) NAME, real+NAME, real+2xNAME, "
                         "NAME-then-real")
    arm = Arm(name, words=tuple(filter(None, match["words"].split("-"))), at=match["at"] or "",
              most=int(match["most"]) if match["most"] else None,
              share=float(match["share"]) / 100 if match["share"] else None,
              added=match["added"] or "",
              factor=float(match["factor"]) if match["factor"] else None,
              first=match["first"] or "")
    if arm.source and arm.source not in sources:
        raise InputError(f"arm {name!r}: no folder is named {arm.source!r}; there are: {folders}")
    words = set(arm.words)
    if (arm.first and arm.added or len(words) < len(arm.words) or {"plain", "strong"} <= words
            or 0 in (arm.factor, arm.most, arm.share) or (arm.share or 0) >= 1):
        raise InputError(f"arm {name!r}: images before the real ones or beside them, plain or "
                         "strong, each word once, numbers above 0, and shares below 100 %, which "
                         f"is {arm.start}")
    return arm


def usual(sources: Sequence[str]) -> tuple[str, ...]:
    """The arms where none are named: with the folder "synthetic", or with the first one."""
    name = "synthetic" if "synthetic" in sources or not sources else sources[0]
    return "real", "real+1xduplicates", f"real+1x{name}"


def sources(synthetic: Sequence[str]) -> dict[str, list[str]]:
    """Name → folders of samples, one of each generator; one without a name joins the one before."""
    found: dict[str, list[str]] = {}
    for item in synthetic:
        match = re.fullmatch(r"(?:([A-Za-z]\w*)=)?(.+)", item)
        name = match[1] or next(reversed(found), "synthetic")
        if match[1] in found or name in OWN:
            who = "two folders are" if name in found else "a folder cannot be"
            raise InputError(f"--synthetic {item}: {who} named {name!r}; write NAME=DIR")
        found.setdefault(name, []).append(match[2])
    return found


def others(other: Sequence[str], taken: Collection[str]) -> dict[str, list[str]]:
    """Name → folder of other real images."""
    found: dict[str, list[str]] = {}
    for item in other:
        name, _, folder = item.partition("=")
        if (not re.fullmatch(r"[A-Za-z]\w*", name) or not folder
                or name in (*taken, *found, *OWN)):
            raise InputError(f"--other {item}: write NAME=DIR, with a name that no other folder "
                             f"has; taken are {', '.join([*taken, *found, *OWN])}")
        found[name] = [folder]
    return found


def as_many_as_there_are(arms: Sequence[str], real: Images, made: Images | None,
                         positive: str) -> tuple[str, ...]:
    """The usual arms, with a smaller factor where there are too few synthetic images."""
    several = _several(real)
    fewest = min(map(len, _by_label(made, several).values()), default=0) if made else 0
    n = len(_by_label(real, several).get(ANY if several else positive, ()))
    if not n or fewest >= n or fewest < 0.01 * n:
        return tuple(arms)
    factor = f"{int(100 * fewest / n) / 100:g}x"
    print(f"the synthetic images are {fewest}{' of the scarcest label' * (not several)}, where "
          f"training has {n}{f' of {positive}' * (not several)}: the arms add {factor} instead of "
          "1x")
    return tuple(name.replace("1x", factor) for name in arms)


def comparisons(arms: Sequence[Arm], others: Collection[str] = ()) -> list[tuple[str, str]]:
    """Pairs of arms to compare, the first minus the second; `others` names other real images.

    Synthetic images against the duplicates nearest in number beside the same real images, and
    NAME-then-real against real-then-real, of synthetic images also against other real ones; every
    arm against its real images alone; and these against `real`, or `real@25`, without further
    words.
    """
    pairs = []
    for arm in arms:
        controls = [other for other in arms if other.added == DUPLICATES and other.base == arm.base
                    and arm.source and arm.real and (other.factor is None) == (arm.factor is None)]
        controls.sort(key=lambda other: abs((other.factor or 0) - (arm.factor or 0)))
        base = arm.base
        if base == arm.name:
            base = f"real{arm.at}" if arm.words else "real"
        against = [*controls[:1], *(other for other in arms if other.name == base != arm.name)]
        if arm.source and arm.first:
            firsts = (REAL,) if arm.source in others else (REAL, *others)
            against += [other for other in arms if other.first in firsts and other.base == arm.base]
        pairs += [(arm.name, other.name) for other in against]
    return list(dict.fromkeys(pairs))


def training_set(arm: Arm, real: Images, sources: Mapping[str, Images], *, positive: str, seed: int,
                 subset_seed: int = 0) -> list[Images]:
    """The images of an arm, in one or two stages. Strata are the cells of the label column. The
    patients of real@25 follow from `subset_seed`, those of real@5% from `seed`.

    Duplicates and synthetic images are drawn label by label without replacement, duplicates in
    rounds. InputError where a synthetic folder has too few.
    """
    if arm.most is not None:
        real = real.take(first_patients(_alone(real, positive), real.patients,
                                        {positive: arm.most}, subset_seed))
    if arm.share is not None:
        real = part(real, arm.share, seed)
    if not arm.real:
        return [sources[arm.added]]
    if arm.first:
        return [real if arm.first == REAL else sources[arm.first], real]
    if not arm.added:
        return [real]
    several, pool = _several(real), real if arm.added == DUPLICATES else sources[arm.added]
    of_real = _by_label(real, several)
    if arm.factor is not None:
        n = max(1, round(arm.factor * len(of_real.get(ANY if several else positive, ()))))
        counts = dict.fromkeys(of_real, n)
    else:
        if not sources:
            raise InputError(f"arm {arm.name}: without a synthetic folder, say how many "
                             "duplicates: real+1xduplicates")
        whole = next(iter(sources.values())) if arm.added == DUPLICATES else pool
        counts = {label: len(index) for label, index in _by_label(whole, several).items()}
    extra, members = [], _by_label(pool, several)
    for label, count in counts.items():
        own = members.get(label, [])
        if len(own) < (count if arm.added != DUPLICATES else 1):
            raise InputError(f"arm {arm.name} needs {count} images of {label!r}; {arm.added} has "
                             f"{len(own)}: make more (sample.py --per-label), or take all with "
                             "--arms real real+duplicates real+synthetic")
        extra += [own[k] for k in order(len(own), seed, range(count))]
    return [real + pool.take(extra)]


def validation_set(arm: Arm, train: Images, val: Images, *, positive: str, seed: int) -> Images:
    """The validation images of an arm. For real@25 the label of interest, for real@5% each label,
    is cut to the same share as in training, by whole patients, at least one.

    Where images to train on are few, those to tune on are, too. The validation images of real@25
    are among those of real@50 of the same seed.
    """
    if arm.share is not None:
        return part(val, arm.share, seed)
    if arm.most is None:
        return val
    labels, there = _alone(val, positive), _alone(train, positive).count(positive)
    most = round(min(1, arm.most / max(1, there)) * labels.count(positive))
    return val.take(first_patients(labels, val.patients, {positive: most}, seed, at_least_one=True))


def part(images: Images, share: float, seed: int) -> Images:
    """This share of the patients of each label, or of each finding, at least one."""
    findings = [row["label"].split(AND) for row in images.rows]
    return images.take(share_of_patients(findings, images.patients, share, seed))


def _alone(images: Images, positive: str) -> list[str]:
    """Labels; a cell that names the positive label among several findings is that label."""
    return [positive if positive in row["label"].split(AND) else row["label"]
            for row in images.rows]


def even_weights(images: Images, columns: Sequence[str]) -> Tensor:
    """Weights (N,), mean 1, by which the label says nothing about these columns.

    Every label weighs the same and, within a label, so does every combination of cells; this takes
    that every label has every combination.
    """
    cells = [(row["label"], *(row.get(name, "") for name in columns)) for row in images.rows]
    images_of = Counter(cells)
    combinations_of = Counter(label for label, *_ in images_of)
    weights = torch.tensor([1 / (combinations_of[cell[0]] * images_of[cell]) for cell in cells])
    return weights * len(cells) / weights.sum()


def _several(images: Images) -> bool:
    return any(AND in row["label"] for row in images.rows)


def _by_label(images: Images, together: bool = False) -> dict[str, list[int]]:
    labels = [ANY if together else row["label"] for row in images.rows]
    return {label: [i for i, own in enumerate(labels) if own == label]
            for label in sorted(set(labels))}
