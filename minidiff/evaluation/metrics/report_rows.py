"""The rows of the report: each function measures sets of images in one space, a dict a row.

    by_label     every distance of a label's synthetic images to held-out real ones, beside those of
                 training images of the label (other patients: what perfect looks like) and of
                 held-out images of every other label (how far a wrong picture is)
    growth       KD and FD at rising n, with real against real at the same n: how much of a distance
                 is due to the number alone
    conditions   synthetic images of one sex, age band, view … against held-out images of the same
    variety      Vendi and MS-SSIM of synthetic images beside those of as many held-out ones

All labels are compared with held-out images, at equal numbers where the data allow it: a classifier
has pushed the labels of its training images farther apart than those of any image it has not seen.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.metrics.by_condition import in_order
from minidiff.evaluation.metrics.distances import (
    Metric,
    disjoint_draws,
    draw,
    fid,
    fid_spread,
    floor,
    kd_with_interval,
    kid,
    kid_p,
    matched,
    mind,
    same_mix,
    spread_of,
)
from minidiff.evaluation.metrics.diversity import TAPS, ms_ssim, vendi
from minidiff.evaluation.metrics.neighbours import c2st, coverage_worth, prdc
from minidiff.statistics import clopper_pearson, finite_percentile

FEWEST = 20   # images on each side, below which nothing is measured; nor where all are of a patient
ALL = "all labels"
# KD and FD take all images of both sides; these are measured at the smaller number on both sides
AT_EQUAL_N = ("MIND", "precision", "recall", "density", "coverage", "C2ST")
NEIGHBOUR = 5               # whose distance is the radius of precision, recall, density, coverage
DRAWS = 20                  # of real against real behind the floors of AT_EQUAL_N
REPEATS = 20                # draws behind each range
SIZES, SMALLEST = 7, 10     # points of a curve; images at its first
PAIRS, AT_MOST = 250, 176   # of MS-SSIM: pairs of a set; px a side that give all its five scales


class Side(NamedTuple):
    """One set of images as an extractor sees it."""

    features: np.ndarray       # (N,d)
    labels: np.ndarray         # (N,) of str
    patients: np.ndarray       # (N,) of str; a synthetic image is a patient of its own

    @property
    def n(self) -> int:
        return len(self.features)

    def of(self, label: str) -> "Side":
        return self if label == ALL else self.take(np.flatnonzero(self.labels == label))

    def take(self, index: np.ndarray) -> "Side":
        return Side(*(column[index] for column in self))

    def floor(self, metric: Metric, n: int, m: int, repeats: int, seed: int) -> dict | None:
        """What these real images score against each other at n and m; None: too few patients."""
        found = floor(metric, real=self.features, patients=self.patients, n=n, m=m,
                      repeats=repeats, seed=seed)
        return found and found._asdict()


def joined(*sides: Side) -> Side:
    return Side(*map(np.concatenate, zip(*sides)))


def between(real: Side, fake: Side) -> dict[str, np.ndarray]:
    """Two sets as `kid` takes them."""
    return {"real": real.features, "fake": fake.features, "real_patients": real.patients,
            "fake_patients": fake.patients}


def one_mix(sides: Mapping[str, Side], seed: int) -> dict[str, np.ndarray]:
    """Set (train, heldout, synthetic) → the most images with which every label has the same share.

    A figure of all labels together must not measure how they are mixed.
    """
    labels = {name: side.labels.tolist() for name, side in sides.items()}
    held, made = matched(labels["heldout"], labels["synthetic"], seed)
    return {"train": same_mix(labels["train"], sides["heldout"].labels[held].tolist(), seed),
            "heldout": held, "synthetic": made}


def of_one_mix(train: Side, heldout: Side, synthetic: Side, seed: int) -> tuple[Side, ...]:
    sides = {"train": train, "heldout": heldout, "synthetic": synthetic}
    return tuple(sides[name].take(index) for name, index in one_mix(sides, seed).items())


def parts(labels: Sequence[str], *sides: Side) -> list[str]:
    """All labels together and each alone, unless all images have the same one."""
    return [ALL, *labels] if len(set(np.concatenate([s.labels for s in sides]))) > 1 else [ALL]


def too_few(*sides: Side) -> bool:
    return any(s.n < FEWEST or len(set(s.patients)) == 1 for s in sides)


def by_label(extractor: str, *, synthetic: Side, train: Side, heldout: Side, labels: Sequence[str],
             seed: int = 0, repeats: int = 100) -> list[dict]:
    """Rows of every distance with intervals, p and floors, one for each label and set."""
    rows = []
    for label in tqdm(parts(labels, synthetic, train, heldout), desc=f"distances, {extractor}",
                      unit="label", leave=False):
        known, reference, made = (side.of(label) for side in (train, heldout, synthetic))
        if label == ALL:
            known, reference, made = of_one_mix(known, reference, made, seed)
        rng = np.random.default_rng(seed)
        sets = {"synthetic": made, "real": _at_most(known, made.n, rng)}
        strangers = heldout.take(np.flatnonzero(~np.isin(heldout.patients, reference.patients)))
        for other in labels:
            if label not in (ALL, other):
                sets[f"real {other}"] = _at_most(strangers.of(other), made.n, rng)
        floors = _floors(joined(known, reference), reference.n, made.n, repeats, seed)
        draws = {}
        for name, side in sets.items():
            row = {"extractor": extractor, "label": label, "set": name, "n": reference.n,
                   "m": side.n, **floors, "too_few": too_few(reference, side)}
            rows.append(row)
            if row["too_few"]:
                continue
            found, draws[name] = kd_with_interval(**between(reference, side), seed=seed)
            row |= found | _at_equal_n(reference, side, seed)
            row["KD_p"] = kid_p(**between(reference, side), seed=seed)
            both = {"real": reference.features, "fake": side.features}
            halves = fid_spread(**both, repeats=2 * repeats if side is made else repeats // 2,
                                seed=seed)
            row |= {"FD": fid(**both), "FD_halves": halves.median, "FD_low": halves.low,
                    "FD_high": halves.high}
            if side is not made and "synthetic" in draws:
                # how much farther than the synthetic set; equal held-out patients draw by draw
                farther = draws[name] - draws["synthetic"]
                row["beyond_low"], row["beyond_high"] = finite_percentile(farther)
    return rows


def _at_equal_n(reference: Side, side: Side, seed: int, *, floor: bool = False) -> dict:
    """AT_EQUAL_N at n of each, with intervals of coverage and C2ST and the permutation p of C2ST.

    A floor needs values alone.
    """
    n = min(reference.n, side.n)
    real, fake = (Side(*(draw(column, n, seed + k) for column in s))
                  for k, s in enumerate((reference, side)))
    both = {"real": real.features, "fake": fake.features}
    found = {"equal_n": n, "MIND": mind(**both, directions=200 if floor else 1000, seed=seed)}
    if n > NEIGHBOUR:
        found |= prdc(**both, k=NEIGHBOUR)._asdict()
    if n > NEIGHBOUR and not floor:
        share = found["coverage"]
        worth = coverage_worth(share, **both, real_patients=real.patients, k=NEIGHBOUR, seed=seed)
        low, high = clopper_pearson(share * worth, worth)
        found |= {"coverage_worth": worth, "coverage_low": low, "coverage_high": high}
    test = c2st(**between(real, fake), permutations=1 if floor else 1000, seed=seed)
    return found | {"C2ST": test.accuracy, "C2ST_low": test.low, "C2ST_high": test.high,
                    "C2ST_p": test.p}


def _floors(pool: Side, n: int, m: int, repeats: int, seed: int) -> dict:
    """Real against real of one label, at the numbers at which each distance is measured.

    {"KD_floor": …}, without what cannot be compared for too few patients. FD_floor_halves stands
    beside FD_halves.
    """
    found = {"KD_floor": pool.floor(kid, n, m, repeats, seed),
             "FD_floor": pool.floor(fid, n, m, repeats, seed),
             "FD_floor_halves": pool.floor(fid, n // 2, m // 2, repeats, seed)}
    draws, n, m = disjoint_draws(pool.patients, min(n, m), min(n, m), DRAWS, seed)
    rows = [_at_equal_n(pool.take(a), pool.take(b), seed, floor=True)
            for a, b in draws]
    for name in AT_EQUAL_N if rows else ():
        values = [row.get(name, np.nan) for row in rows]
        found[f"{name}_floor"] = spread_of(values, n, m)._asdict()
    return {name: spread for name, spread in found.items() if spread}


def _at_most(side: Side, n: int, rng: np.random.Generator) -> Side:
    """At most n images, at random: FD depends on the number."""
    return side if side.n <= n else side.take(np.sort(rng.permutation(side.n)[:n]))


def growth(extractor: str, *, synthetic: Side, train: Side, heldout: Side, seed: int = 0,
           repeats: int = REPEATS) -> list[dict]:
    """KD and FD between n synthetic and n held-out images of one mix of labels, a row for each n.

    Median and 5–95 % over random draws of both sides; the floor's are draws of real patients of
    that mix. Draws of n among N images share images, so the curve ends at half of the smaller side,
    and the spread of the draws is multiplied by 1 / √(1 − n/N) to be that of n new images.
    """
    known, held, made = of_one_mix(train, heldout, synthetic, seed)
    pool, least = joined(known, held), min(held.n, made.n)
    most = min(least // 2, pool.n // 2)
    if most < FEWEST:
        return []
    x, y, rows = held.features, made.features, []
    for n in np.unique(np.geomspace(SMALLEST, most, SIZES).astype(int)).tolist():
        rng, wider = np.random.default_rng(seed), (1 - n / least) ** -0.5
        drawn = [(rng.permutation(held.n)[:n], rng.permutation(made.n)[:n])
                 for _ in range(repeats)]
        rows.append({
            "extractor": extractor, "n": n,
            "KD": _range([kid(real=x[a], fake=y[b], real_patients=held.patients[a])
                          for a, b in drawn], wider),
            "KD_floor": pool.floor(kid, n, n, repeats, seed),
            "FD": _range([fid(real=x[a], fake=y[b]) for a, b in drawn], wider),
            "FD_floor": pool.floor(fid, n, n, repeats, seed)})
    return rows


def conditions(extractor: str, groups: Mapping[str, Mapping[str, np.ndarray]],
               why: Mapping[str, str], *, synthetic: Side, train: Side, heldout: Side,
               seed: int = 0, repeats: int = REPEATS) -> list[dict]:
    """KD with interval and floor between images of each value of each condition, a row each, with
    the same mix of labels on both sides. `groups` and `why` are those of `by_condition.groups`."""
    rows = [{"extractor": extractor, "condition": name, "value": "", "n": 0, "m": 0,
             "too_few": True, "why": text} for name, text in why.items()]
    sides = {"synthetic": synthetic, "train": train, "heldout": heldout}
    for name, cells in groups.items():
        for value in in_order(cells["train"]):
            made, known, held = (s.take(np.flatnonzero(cells[side] == value))
                                 for side, s in sides.items())
            known, held, made = of_one_mix(known, held, made, seed)
            row = {"extractor": extractor, "condition": name, "value": value, "n": held.n,
                   "m": made.n, "too_few": too_few(held, made)}
            rows.append(row)
            asked = set(made.labels) - {""}
            if held.n and asked and not asked & set(held.labels):
                row |= {"too_few": True, "why": "no label in common"}
            if not row["too_few"]:
                row |= kd_with_interval(**between(held, made), seed=seed)[0]
                row["KD_floor"] = joined(known, held).floor(kid, held.n, made.n, repeats, seed)
    return rows


def variety(features: Mapping[str, Mapping[str, Side]], pixels: Mapping[str, Tensor],
            labels: Sequence[str], *, seed: int = 0, repeats: int = REPEATS) -> list[dict]:
    """Vendi and MS-SSIM of n synthetic, n held-out and draws of n real images, a row each by label.

    features: extractor → set → Side. pixels: set → uint8 (N,3,S,S), brought to 176 px where they
    are larger. The range is 5–95 % of the draws.
    """
    first, rows = next(iter(features.values())), []
    pixels = {name: _reduced(x) for name, x in pixels.items()}
    sides = {"synthetic": ("synthetic",), "real": ("heldout",), "range": ("heldout", "train")}

    def measure(name: str, images: Sequence[tuple[str, int]]) -> float:
        """Of images by set and number."""
        if name != "MS-SSIM":
            return vendi(np.stack([features[name][s].features[i] for s, i in images]))
        return ms_ssim([pixels[s][i] for s, i in images], pairs=PAIRS, seed=seed,
                       patients=[first[s].patients[i] for s, i in images])

    mixed, names = one_mix(first, seed), parts(labels, *first.values())
    for label in names:
        some = mixed if label == ALL else {name: np.flatnonzero(side.labels == label)
                                           for name, side in first.items()}
        own = {key: [(s, i) for s in among for i in some[s]] for key, among in sides.items()}
        n = min(len(own["synthetic"]), len(own["real"]))
        # across labels MS-SSIM says less than coverage
        seen = (label != ALL or names == [ALL]) and pixels["synthetic"].shape[-1] >= TAPS
        for name in [*features, *(["MS-SSIM"] if seen else [])]:
            row = {"label": label, "measure": name if name == "MS-SSIM" else f"Vendi, {name}",
                   "n": n, "too_few": n < FEWEST}
            rows.append(row)
            if not row["too_few"]:
                draws = repeats // 4 if name == "MS-SSIM" else repeats
                try:
                    row |= {key: measure(name, _some(own[key], n, seed))
                            for key in ("synthetic", "real")}
                    row["range"] = _range([measure(name, _some(own["range"], n, seed + k))
                                           for k in range(draws)])
                except InputError as error:   # all of one patient, or of one grey
                    row |= {"too_few": True, "why": str(error)}
    return rows


def _some(items: Sequence, n: int, seed: int) -> list:
    return [items[k] for k in draw(np.arange(len(items)), n, seed)]


def _reduced(x: Tensor) -> Tensor:
    if x.shape[-1] <= AT_MOST:
        return x
    small = [F.interpolate(part.float().mean(1, keepdim=True), (AT_MOST, AT_MOST),
                           mode="area").round().to(torch.uint8) for part in x.split(64)]
    return torch.cat(small).expand(-1, 3, -1, -1)


def _range(values: Sequence[float], wider: float = 1.0) -> dict:
    values = np.array(values)[np.isfinite(values)]
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95]) if len(values) else [np.nan] * 3
    low, high = (median + wider * (end - median) for end in (low, high))
    return {"median": float(median), "low": float(low), "high": float(high)}
