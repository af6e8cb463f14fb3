"""Does a picture show what was asked for? A judge trained on real patients reads it.

On held-out real images the judge is measured against the truth, on synthetic ones the request is
measured by the judge: the second can be no better than the first, so the two stand side by side.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from minidiff.classification.predictor import Predictor
from minidiff.rating import effective_n, share_interval
from minidiff.statistics import auroc, auroc_interval, pearson
from minidiff.variables import Labels, Variable


def judge_agreement(judge: Predictor, images: Tensor, labels: Labels, which: str,
                    patients: Sequence | None = None) -> list[dict]:
    """One row for each variable of the judge that `labels` knows; `which` names the set.

    Category: share judged as labelled with Wilson's interval (as `rating.share_interval` has it;
    without patients, each image is of another one), the same by value, AUROC if there are two
    values. Findings: share with every finding judged as labelled (at probability .5), and of
    those that have one the share in which it is seen, of those without it the same, with its AUROC.
    Number: Pearson's r with Fisher's interval, slope of judged on labelled, mean absolute error in
    its own unit.
    """
    judged, rows = judge.predict(images), []
    patients = np.array(range(len(images)) if patients is None else patients)
    for v in [v for v in judge.variables if v.name in labels]:
        cells, known = labels[v.name], v.known(labels[v.name])
        row = {"variable": v.name, "set": which, "n": int(known.sum())}
        if row["n"]:
            known_cells = judged[v.name][known].double(), cells[known]
            row |= {"kind": v.kind, **(_named(v, *known_cells, patients[known.numpy()]) if v.values
                                       else _number(v, *known_cells))}
        rows.append(row)
    return rows


def _named(v: Variable, probabilities: Tensor, cells: Tensor, patients: np.ndarray) -> dict:
    there, seen = v.bits(cells).numpy(), v.seen(probabilities).numpy()
    scores = probabilities.numpy()
    row = {**_share((seen == there).all(1), patients), "by_value": []}
    for i, value in enumerate(v.values):
        own = there[:, i]
        if own.any():
            area = {} if v.exclusive else {**_area(scores[:, i], own), **_without(
                seen[~own, i], patients[~own])}
            row["by_value"].append({"value": value, "n": int(own.sum()),
                                    **_share(seen[own, i], patients[own]), **area})
    if v.exclusive and len(v.values) == 2:
        row |= _area(scores[:, 1], there[:, 1])
    return row


def _number(v: Variable, judged: Tensor, cells: Tensor) -> dict:
    values, cells = judged.numpy(), cells.numpy()
    r, low, high = pearson(cells, values)
    spread = cells.std() if len(cells) > 1 else 0.0
    slope = float(np.polyfit(cells.astype(float), values, 1)[0]) if spread > 0 else math.nan
    return {"r": r, "low": low, "high": high, "slope": slope,
            "mae": float(np.abs(values - cells).mean()), "labelled_std": float(spread)}


def _area(scores: np.ndarray, positive: np.ndarray) -> dict:
    low, high = auroc_interval(scores, positive)
    return {"auroc": auroc(scores, positive), "auroc_low": low, "auroc_high": high}


def _without(seen: np.ndarray, patients: np.ndarray) -> dict:
    """How often a finding is seen where it is not, of as many."""
    low, high = share_interval(seen, patients) if len(seen) else (math.nan, math.nan)
    return {"n_without": len(seen), "without": float(seen.mean()) if len(seen) else math.nan,
            "without_low": low, "without_high": high}


def _share(right: np.ndarray, patients: np.ndarray) -> dict:
    low, high = share_interval(right, patients)
    return {"accuracy": float(right.mean()), "low": low, "high": high,
            "worth": effective_n(right, patients)}
