"""Can the label be predicted without the lungs? Small logistic regressions on trivial features, by
patient.

If the header, the border, a thumbnail of 8 × 8 or age and sex predict a label, then a classifier
may use these alone, and its figures say nothing about disease (DeGrave et al. 2021; Maguolo & Nanni
2021).
"""

from collections.abc import Sequence

import numpy as np

from minidiff import variables as var
from minidiff.cells import number
from minidiff.data.files import Facts
from minidiff.data.table import Row
from minidiff.errors import InputError
from minidiff.statistics import auroc_by_patient

FOLDS, SEED = 5, 0
FEWEST = 10                 # patients on each side, below which nothing can be learned
SHORTCUT, SURE = 0.9, 0.75  # a shortcut from this AUROC on, or from this lower end of the interval
THUMBNAIL = "thumbnail"     # never called a shortcut: it shows the lungs, and a large disease


def logistic(x: np.ndarray, positive: Sequence[bool], ridge: float = 1.0) -> np.ndarray:
    """Weights (d+1,) of P(positive) = sigmoid(x·w + b), b last: the minimum of log loss +
    ridge/2·|w|², without a penalty on b.

    x (N,d) should be of about unit variance. Newton's method (iteratively reweighted least
    squares), step halved while the objective does not fall; it is convex, and with a ridge strictly
    so in w.
    """
    x, y = np.column_stack([np.asarray(x, float), np.ones(len(x))]), np.asarray(positive, float)
    penalty = np.append(np.full(x.shape[1] - 1, float(ridge)), 1e-9)
    w = np.zeros(x.shape[1])

    def objective(w: np.ndarray) -> float:
        z = x @ w
        return float(np.logaddexp(0, z).sum() - y @ z + penalty @ w**2 / 2)

    best = objective(w)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -35, 35)))
        slope = x.T @ (p - y) + penalty * w
        step = np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty + 1e-9), slope)
        size = 1.0
        while size > 1e-6 and objective(w - size * step) > best:
            size /= 2
        w, before, best = w - size * step, best, min(best, objective(w - size * step))
        if before - best < 1e-9 * max(1.0, best):
            break
    return w


def fold_of(labels: Sequence[str], patients: Sequence[str], folds: int = FOLDS,
            seed: int = SEED) -> np.ndarray:
    """Fold (N,) of each image: a patient in one fold, the patients of a label evenly in all."""
    of = dict(sorted(zip(patients, labels), reverse=True))  # a patient's least label
    rng, dealt = np.random.default_rng(seed), []
    for label in sorted(set(of.values())):
        members = sorted(p for p in of if of[p] == label)
        dealt += [members[k] for k in rng.permutation(len(members))]
    fold = {patient: k % folds for k, patient in enumerate(dealt)}
    return np.array([fold[p] for p in patients])


def out_of_fold(x: np.ndarray, positive: Sequence[bool], fold: np.ndarray,
                ridge: float = 1.0) -> np.ndarray:
    """Log odds (N,) that each image is positive, from a regression trained without its fold."""
    x, positive = np.asarray(x, float), np.asarray(positive, bool)
    scores = np.zeros(len(x))
    for k in np.unique(fold):
        seen = fold != k
        mean, std = x[seen].mean(0), x[seen].std(0)
        z = (x - mean) / np.where(std > 1e-9, std, 1.0)
        z = np.clip(z * (std > 1e-9), -8, 8)  # a constant column is 0; outliers end at 8 deviations
        w = logistic(z[seen], positive[seen], ridge)
        scores[~seen] = z[~seen] @ w[:-1] + w[-1]
    return scores


def features(facts: Sequence[Facts], rows: Sequence[Row],
             columns: Sequence[str]) -> dict[str, np.ndarray]:
    """What a trivial classifier may look at: name → (N,d)."""
    size = np.log([[f.width, f.height, f.bytes] for f in facts])
    wide, high, heavy = size.T
    kinds = [_one_hot([str(getattr(f, name)) for f in facts])
             for name in ("mode", "format", "bits", "channels", "carries", "turned")]
    found = {"header": np.column_stack([size, abs(wide - high), wide == high,
                                        np.minimum(wide, high), heavy - wide - high, *kinds]),
             "border": np.stack([f.border for f in facts]),
             THUMBNAIL: np.stack([f.thumbnail for f in facts])}
    known = [block for name in columns if (block := _column(name, rows)) is not None]
    return found | ({"metadata": np.column_stack(known)} if known else {})


def baselines(found: dict[str, np.ndarray], labels: Sequence[str],
              patients: Sequence[str]) -> list[dict]:
    """For each kind of features and each label, how well it is predicted against the rest by 5-fold
    cross-validation over patients: AUROC, its interval, n. A label is left out where it, or the
    rest, has fewer than 10 patients."""
    labels, patients, result = np.asarray(labels), np.asarray(patients), []
    fold, of_each = fold_of(labels, patients), var.labels_in(labels.tolist())
    names = sorted({name for own in of_each for name in own})
    two = len(names) == 2 and all(len(own) == 1 for own in of_each)
    for label in names[:1] if two else names:  # of two, both have the same numbers
        ours = np.array([label in own for own in of_each])
        if min(len(set(patients[ours])), len(set(patients[~ours]))) < FEWEST:
            continue
        for name, x in found.items():
            area, (low, high) = auroc_by_patient(out_of_fold(x, ours, fold), ours, patients)
            result.append({"features": name, "label": str(label), "auroc": area, "low": low,
                           "high": high, "n": int(ours.sum()), "n_rest": int((~ours).sum()),
                           "patients": len(set(patients)),
                           "shortcut": is_shortcut(name, area, low)})
    return result


def is_shortcut(features: str, area: float, low: float) -> bool:
    """Is the label predicted so well that a classifier might use this trivial feature alone?"""
    return features != THUMBNAIL and (area >= SHORTCUT or low >= SURE)


def _column(name: str, rows: Sequence[Row]) -> np.ndarray | None:
    """A column as features: a number (the mean where it is unknown) and whether it is unknown, a
    category or findings as 0 and 1."""
    cells = [row.get(name, "") for row in rows]
    try:
        variable = var.infer(name, cells)
    except InputError:  # no value, only one, or a hundred: all it can show is where it is empty
        known = np.array([[cell != ""] for cell in cells], float)
        return known if "" in cells and any(cells) else None
    if variable.values and variable.exclusive:
        return _one_hot(cells)
    if variable.values:
        sets = var.encode([variable], rows)[name]
        return np.column_stack([variable.bits(sets), sets < 0]).astype(float)
    values = np.array([number(name, cell) for cell in cells])
    unknown = np.isnan(values)
    return np.column_stack([np.where(unknown, variable.mean, values), unknown])


def _one_hot(cells: Sequence[str]) -> np.ndarray:
    kinds = sorted(set(cells))
    return np.array([[cell == kind for kind in kinds] for cell in cells], float)
