"""Distances broken down: by the number of images and by condition; and how varied each set is.

    growth       KD and FD at rising n, with real against real at the same n: how much of a distance
                 is due to the number alone
    conditions   synthetic images of one sex, age band, view … against held-out images of the same
    variety      Vendi and MS-SSIM of synthetic images beside those of as many held-out ones
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.evaluation.metrics.comparison import (
    ALL,
    FEWEST,
    Side,
    between,
    floor_of,
    joined,
    too_few,
)
from minidiff.evaluation.metrics.distances import equal, fid, kd_with_interval, kid, same_mix
from minidiff.evaluation.metrics.diversity import TAPS, ms_ssim, vendi
from minidiff.variables import RESERVED, Findings, Number, Variable, infer

REPEATS = 20                # draws behind each range
SIZES, SMALLEST = 7, 10     # points of a curve; images at its first
PAIRS, AT_MOST = 250, 176   # of MS-SSIM: pairs of a set; px a side that give all its five scales
NO_CONDITION = (*RESERVED, "label", "source")
MOST_VALUES = 8             # of a category that is shown by value


def growth(extractor: str, *, synthetic: Side, train: Side, heldout: Side, seed: int = 0,
           repeats: int = REPEATS) -> list[dict]:
    """KD and FD between n synthetic and n held-out images of one mix of labels, a row for each n.

    Median and 5–95 % over random draws of both sides; the floor's are draws of real patients of
    that mix.
    """
    wanted = synthetic.labels.tolist()
    held, known = (s.take(same_mix(s.labels.tolist(), wanted, seed)) for s in (heldout, train))
    pool = joined(known, held)
    most = min(held.n, synthetic.n, pool.n // 2)
    if most < FEWEST:
        return []
    rows = []
    for n in np.unique(np.geomspace(SMALLEST, most, SIZES).astype(int)).tolist():
        rng, drawn = np.random.default_rng(seed), {"KD": [], "FD": []}
        for _ in range(repeats):
            real, fake = (s.take(rng.permutation(s.n)[:n]) for s in (held, synthetic))
            both = {"real": real.features, "fake": fake.features}
            drawn["KD"].append(kid(**both, real_patients=real.patients))
            drawn["FD"].append(fid(**both))
        row = {"extractor": extractor, "n": n}
        for name, metric in (("KD", kid), ("FD", fid)):
            row[name] = _range(drawn[name])
            row[f"{name}_floor"] = floor_of(metric, pool, n, n, repeats, seed)
        rows.append(row)
    return rows


def groups(tables: Mapping[str, Table]) -> dict[str, dict[str, np.ndarray]]:
    """Condition → set (train, heldout, synthetic) → the value of each row as text, "" if unknown.

    Conditions are columns that synthetic and held-out rows share. Numbers are cut into thirds of
    the training rows, and of findings each of the commonest is a condition.
    """
    columns = {name: dict.fromkeys(table.rows[0] if len(table) else ())
               for name, table in tables.items()}
    found = {}
    for name in columns["synthetic"]:
        if name in NO_CONDITION or not all(name in known for known in columns.values()):
            continue
        cells = {side: np.array(table.column(name)) for side, table in tables.items()}
        try:
            v = infer(name, cells["train"].tolist())
        except InputError:   # one value, or none: nothing to break down by
            continue
        found |= _by_value(v, cells) if any(cells["synthetic"]) else {}
    return found


def _by_value(v: Variable, cells: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    if not v.exclusive:
        return _each_finding(v, cells)
    if not v.values:
        cells = _thirds(v, cells)
    return {v.name: cells} if len(set(cells["train"]) - {""}) <= MOST_VALUES else {}


def _thirds(v: Number, cells: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    numbers = {side: np.array([v.encode(c) for c in column]) for side, column in cells.items()}
    a, b = np.quantile(numbers["train"][np.isfinite(numbers["train"])], [1 / 3, 2 / 3])
    names = np.array([f"under {a:g}", f"{a:g} to {b:g}", f"{b:g} and over", ""])
    return {side: names[np.where(np.isfinite(x), (x >= a).astype(int) + (x >= b), 3)]
            for side, x in numbers.items()}


def _each_finding(v: Findings, cells: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    # the other sets may have a finding that training lacks
    v = infer(v.name, np.concatenate(list(cells.values())).tolist(), v)
    sets = {side: np.array([v.encode(c) for c in column]) for side, column in cells.items()}
    there = {side: v.bits(torch.from_numpy(x)).numpy() for side, x in sets.items()}
    commonest = np.argsort(-there["train"].sum(0), kind="stable")[:MOST_VALUES]
    return {f"{v.name}: {v.values[i]}": {side: np.where(x < 0, "", np.where(
        there[side][:, i], "yes", "no")) for side, x in sets.items()} for i in commonest}


def conditions(extractor: str, groups: Mapping[str, Mapping[str, np.ndarray]], *, synthetic: Side,
               train: Side, heldout: Side, seed: int = 0, repeats: int = REPEATS) -> list[dict]:
    """KD with interval and floor between images of each value of each condition, a row each."""
    rows, sides = [], {"synthetic": synthetic, "train": train, "heldout": heldout}
    for name, cells in groups.items():
        for value in in_order(cells["train"]):
            made, known, held = (s.take(np.flatnonzero(cells[side] == value))
                                 for side, s in sides.items())
            row = {"extractor": extractor, "condition": name, "value": value, "n": held.n,
                   "m": made.n, "too_few": too_few(held, made)}
            rows.append(row)
            if not row["too_few"]:
                row |= kd_with_interval(**between(held, made), seed=seed)[0]
                row["KD_floor"] = floor_of(kid, joined(known, held), held.n, made.n, repeats, seed)
    return rows


def in_order(cells: np.ndarray) -> list[str]:
    """The known values, bands of a number from low to high."""
    return sorted(set(cells.tolist()) - {""},
                  key=lambda text: (not text.startswith("under"), "over" in text, text))


def variety(features: Mapping[str, Mapping[str, Side]], pixels: Mapping[str, Tensor],
            labels: Sequence[str], *, seed: int = 0, repeats: int = REPEATS) -> list[dict]:
    """Vendi and MS-SSIM of n synthetic, n held-out and draws of n real images, a row each by label.

    features: extractor → set → Side. pixels: set → uint8 (N,3,S,S), brought to 176 px where they
    are larger. The range is 5–95 % of the draws.
    """
    first, rows = next(iter(features.values())), []
    pixels = {name: _at_most(x) for name, x in pixels.items()}
    sides = {"synthetic": ("synthetic",), "real": ("heldout",), "range": ("heldout", "train")}

    def measure(name: str, among: Sequence[str], index: np.ndarray) -> float:
        """Of images numbered through the sets in `among`, in rising order."""
        if name != "MS-SSIM":
            return vendi(np.concatenate([features[name][s].features for s in among])[index])
        starts = np.cumsum([0, *(len(first[s].labels) for s in among)])
        own = [index[(index >= a) & (index < b)] - a for a, b in zip(starts, starts[1:])]
        return ms_ssim(torch.cat([pixels[s][torch.from_numpy(i)] for s, i in zip(among, own)]),
                       pairs=PAIRS, seed=seed,
                       patients=np.concatenate([first[s].patients[i] for s, i in zip(among, own)]))

    for label in [ALL, *labels]:
        where = {key: np.flatnonzero((label == ALL)
                                     | (np.concatenate([first[s].labels for s in among]) == label))
                 for key, among in sides.items()}
        n = min(len(where["synthetic"]), len(where["real"]))
        # across labels MS-SSIM says less than coverage
        seen = label != ALL and pixels["synthetic"].shape[-1] >= TAPS
        for name in [*features, *(["MS-SSIM"] if seen else [])]:
            row = {"label": label, "measure": name if name == "MS-SSIM" else f"Vendi, {name}",
                   "n": n, "too_few": n < FEWEST}
            rows.append(row)
            if not row["too_few"]:
                draws = repeats // 4 if name == "MS-SSIM" else repeats
                row |= {key: measure(name, sides[key], equal(where[key], n, seed))
                        for key in ("synthetic", "real")}
                row["range"] = _range([measure(name, sides["range"], equal(
                    where["range"], n, seed + k)) for k in range(draws)])
    return rows


def _at_most(x: Tensor) -> Tensor:
    if x.shape[-1] <= AT_MOST:
        return x
    small = [F.interpolate(part.float().mean(1, keepdim=True), (AT_MOST, AT_MOST),
                           mode="area").round().to(torch.uint8) for part in x.split(64)]
    return torch.cat(small).expand(-1, 3, -1, -1)


def _range(values: Sequence[float]) -> dict:
    values = np.array(values)[np.isfinite(values)]
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95]) if len(values) else [np.nan] * 3
    return {"median": float(median), "low": float(low), "high": float(high)}
