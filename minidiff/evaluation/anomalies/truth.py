"""Masks and labels against anomaly maps and scores: areas, precision, Dice, with intervals.

Pixels of all images are pooled, those of normal images included: what lights up there is a false
alarm. The positives of a pixel's figures are the pixels under the masks. Intervals are over
patients, by whole images: the pixels of one are anything but independent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minidiff.data import images
from minidiff.errors import InputError, count, first_few
from minidiff.evaluation.anomalies.maps import BASELINES, PRIMARY
from minidiff.statistics import (
    auroc_by_patient,
    group_ids,
    patient_weights,
    percentile,
    weighted_auroc,
    weighted_precision,
)

QUANTILES = np.r_[np.linspace(0, 0.99, 991)[1:], 1 - np.geomspace(0.01, 1e-6, 500)[1:]]
SEEN = 4_000_000    # pixels whose quantiles are the levels, at most
RESAMPLES = 500
FEWEST = 5          # images on each side of an image's AUROC


def read_masks(folder: str, rows: Sequence[Mapping[str, str]], normal: str,
               size: int) -> np.ndarray:
    """Masks bool (N, size, size), white is abnormal: of images/<path> that of folder/<path>.

    A PNG may stand for the mask of a JPEG. A normal image needs none. InputError for an abnormal
    image without.
    """
    found, absent = np.zeros((len(rows), size, size), bool), []
    for k, row in enumerate(rows):
        inside = Path(row["file_name"].removeprefix("images/"))
        files = [Path(folder, inside), Path(folder, inside).with_suffix(".png")]
        file = next(filter(Path.is_file, files), None)
        if file:
            found[k] = images.square(images.read(file).max(0, keepdims=True), size)[0] > 127
        elif row["label"] != normal:
            absent.append(str(files[0]))
    if absent:
        raise InputError(f"--masks {folder}: {count(len(absent), 'abnormal image')} without a "
                         f"mask: {first_few(absent)}")
    if not found.any():
        raise InputError(f"--masks {folder}: no mask of these images has a white pixel")
    return found


def levels_of(maps: np.ndarray) -> np.ndarray:
    """Values between which pixels count as equal: quantiles of some maps, the highest ones close.

    The order of two pixels is lost only where no quantile lies between them.
    """
    step = max(1, maps.size // SEEN)
    return np.unique(np.quantile(maps.ravel()[::step], QUANTILES))


def by_level(maps: np.ndarray, masks: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Maps and masks (N, S, S) → counts (N, 2, L) of pixels at each level: under the mask, and
    elsewhere."""
    n = len(levels) + 1
    return np.stack([[np.bincount(np.searchsorted(levels, own[side], "right"), minlength=n)
                      for side in (mask, ~mask)] for own, mask in zip(maps, masks)])


def areas(counts: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC and average precision of the pixels, of b resamples of images, weights (b, N)."""
    n = counts.shape[2]
    pixels = (weights @ counts.reshape(len(counts), -1))
    level, under = np.tile(np.arange(n), 2), np.repeat([True, False], n)
    return {"auroc": weighted_auroc(level, under, pixels),
            "auprc": weighted_precision(level, under, pixels)}


def overlaps(counts: np.ndarray) -> np.ndarray:
    """(N, 3, L): true positives, false positives and pixels of the mask, for each level from which
    on a pixel is called abnormal."""
    above = counts[:, :, ::-1].cumsum(2)[:, :, ::-1]
    return np.stack([above[:, 0], above[:, 1], np.broadcast_to(above[:, 0, :1], above[:, 0].shape)],
                    1)


def dice(overlap: np.ndarray) -> np.ndarray:
    """2·TP/(TP + FP + mask) along the second last axis."""
    hits, alarms, mask = np.moveaxis(overlap, -2, 0)
    return 2 * hits / np.maximum(hits + alarms + mask, 1e-12)


def pixel_figures(counts: np.ndarray, patients: Sequence, seed: int) -> dict:
    """Areas and Dice with their intervals, and the resamples behind the areas for comparisons.

    dice: half of the patients choose the threshold for the other half. best_dice: with the one
    threshold that suits these masks best, as papers report it; nobody has it beforehand.
    """
    overlap = overlaps(counts)
    group = group_ids(patients)
    half = np.random.default_rng(seed).permutation(group.max() + 1)[group] % 2
    at = np.empty((len(counts), 3))
    for side in (0, 1):
        level = dice(overlap[half != side].sum(0)).argmax()
        at[half == side] = overlap[half == side][:, :, level]
    best = dice(overlap.sum(0)).max()
    whole = areas(counts, np.ones((1, len(counts))))
    drawn: dict[str, list] = {"auroc": [], "auprc": [], "dice": []}
    for weights in patient_weights(patients, RESAMPLES, seed):
        for name, values in areas(counts, weights).items():
            drawn[name].append(values)
        drawn["dice"].append(dice((weights @ at)[..., None])[..., 0])
    resampled = {name: np.concatenate(parts) for name, parts in drawn.items()}
    figures = {**{name: float(value[0]) for name, value in whole.items()},
               "dice": float(dice(at.sum(0)[:, None])[0])}
    return {**{name: {"value": value, "interval": ends(resampled[name])}
               for name, value in figures.items()},
            "best_dice": float(best), "resampled": resampled}


def ends(values: np.ndarray) -> list[float] | None:
    known = values[~np.isnan(values)]
    return list(percentile(known)) if len(known) else None


def pixels_of(counts: Mapping[str, np.ndarray], patients: Sequence,
              seed: int) -> tuple[list[dict], list[dict]]:
    """Figures of each method from its counts `by_level`; and the primary one against each baseline:
    difference of average precision with its interval, of the same resamples of patients."""
    found = {name: pixel_figures(own, patients, seed) for name, own in counts.items()}
    against = []
    for name in BASELINES:
        if name in found:
            ours, theirs = found[PRIMARY], found[name]
            against.append({"baseline": name, **compared(
                ours["auprc"]["value"] - theirs["auprc"]["value"],
                ours["resampled"]["auprc"] - theirs["resampled"]["auprc"])})
    return [{"method": name, **{k: v for k, v in own.items() if k != "resampled"}}
            for name, own in found.items()], against


def compared(difference: float, resampled: np.ndarray) -> dict:
    """better, worse, or not resolved where the interval holds 0."""
    interval = ends(resampled)
    answer = "not resolved"
    if interval and (interval[0] > 0 or interval[1] < 0):
        answer = "better" if interval[0] > 0 else "worse"
    return {"difference": float(difference), "interval": interval, "answer": answer}


def strata(rows: Sequence[Mapping[str, str]], normal: str,
           column: str) -> list[tuple[str, str, list[int]]]:
    """(label, value of the column or "", images) of each comparison of a label with normal: of all
    images, and within each of several values of the column that has both."""
    found, values = [], sorted({row.get(column, "") for row in rows} - {""})
    for label in sorted({row["label"] for row in rows} - {normal}):
        both = [i for i, row in enumerate(rows) if row["label"] in (label, normal)]
        found.append((label, "", both))
        for value in values if len(values) > 1 else ():
            own = [i for i in both if rows[i].get(column, "") == value]
            n = sum(rows[i]["label"] == label for i in own)
            if min(n, len(own) - n) >= FEWEST:
                found.append((label, value, own))
    return found


def images_of(scores: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, str]], normal: str,
              column: str, seed: int) -> list[dict]:
    """AUROC of each score, of each label against normal, with an interval over patients."""
    found = []
    for label, value, index in strata(rows, normal, column):
        positive = [rows[i]["label"] == label for i in index]
        patients = [rows[i]["patient"] for i in index]
        for name, own in scores.items():
            area, interval = auroc_by_patient(own[index], positive, patients,
                                              resamples=RESAMPLES, seed=seed)
            found.append({"label": label, "within": value, "method": name, "auroc": area,
                          "interval": list(interval), "n": sum(positive),
                          "n_normal": len(positive) - sum(positive)})
    return found


def images_against(scores: Mapping[str, np.ndarray], rows: Sequence[Mapping[str, str]],
                   normal: str, column: str, seed: int) -> list[dict]:
    """The primary score against each baseline's: difference of AUROC with its interval."""
    found = []
    for label, value, index in strata(rows, normal, column):
        positive = np.array([rows[i]["label"] == label for i in index])
        patients = [rows[i]["patient"] for i in index]
        one = np.ones((1, len(index)))
        weights = np.concatenate(list(patient_weights(patients, RESAMPLES, seed)))
        ours = [weighted_auroc(scores[PRIMARY][index], positive, w) for w in (one, weights)]
        for name in filter(scores.__contains__, BASELINES):
            theirs = [weighted_auroc(scores[name][index], positive, w) for w in (one, weights)]
            found.append({"label": label, "within": value, "baseline": name,
                          **compared(ours[0][0] - theirs[0][0], ours[1] - theirs[1])})
    return found


def blurred_against(blurred: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray],
                    rows: Sequence[Mapping[str, str]], normal: str, seed: int) -> list[dict]:
    """AUROC of normal images that are blurred a little, so that their noise is gone, against the
    same images as they are, by each density. No such images were trained on; below .5 the model
    holds them for the more normal ones."""
    found, index = [], [i for i, row in enumerate(rows) if row["label"] == normal]
    patients = [rows[i]["patient"] for i in index] * 2
    for name, own in blurred.items():
        both = np.concatenate([own[index], scores[name][index]])
        area, interval = auroc_by_patient(both, np.arange(len(both)) < len(index), patients,
                                          resamples=RESAMPLES, seed=seed)
        found.append({"method": name, "auroc": area, "interval": list(interval), "n": len(index)})
    return found
