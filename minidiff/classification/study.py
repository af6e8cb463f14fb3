"""Did synthetic images help? Arms that differ in their training images alone, and the figures to compare them by.

    arm                real images   and as many more
    real               all           –
    real+duplicates    all           repeats of real ones, label by label as many as synthetic: the same count, no news
    real+synthetic     all           synthetic ones
    synthetic          none          synthetic ones

Every arm has the same optimiser steps, augmentation, start and seeds, and each label weighs the same in its loss, so
that an arm gains nothing by more steps or by balance alone. `real+synthetic` has earned its keep where it is ahead of
`real+duplicates`. Finished (arm, seed) pairs are kept as files; the same call goes on from there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.classification.predictor import Predictor, balance, fit, grey
from minidiff.counted import order
from minidiff.errors import InputError
from minidiff.runs import read_json, write_json
from minidiff.statistics import (
    auroc,
    auroc_interval,
    bootstrap_indices,
    percentile,
    wilson,
)
from minidiff.variables import Category

ARMS = {  # real images?, and what is added
    "real": (True, None),
    "real+duplicates": (True, "duplicates"),
    "real+synthetic": (True, "synthetic"),
    "synthetic": (False, "synthetic"),
}
COMPARISONS = (  # the first minus the second
    ("real+synthetic", "real+duplicates"),
    ("real+synthetic", "real"),
    ("real+duplicates", "real"),
    ("synthetic", "real"),
)


class Images(NamedTuple):
    pixels: Tensor       # uint8 (N,C,S,S)
    labels: Tensor       # int64 (N,), indices into the values of the label
    patients: list[str]  # N, for the bootstrap


def training_set(arm: str, real: Images, synthetic: Images | None, *, classes: int, seed: int) -> Images:
    """The training images of an arm; duplicates are drawn label by label without replacement, in rounds."""
    with_real, added = ARMS[arm]
    if added is None:
        return real
    assert synthetic is not None, arm
    if added == "duplicates":
        counts = torch.bincount(synthetic.labels, minlength=classes).tolist()
        rows = []
        for label, count in enumerate(counts):
            own = torch.nonzero(real.labels == label).flatten()
            rows.append(own[torch.tensor(order(len(own), seed, range(count)), dtype=torch.int64)])
        extra = _take(real, torch.cat(rows))
    else:
        extra = synthetic
    return _join(real, extra) if with_real else extra


def train_arm(folder: Path, arm: str, seed: int, train: Images, tests: Mapping[str, Images], label: Category, *,
              size: int, width: int, steps: int, batch: int, lr: float, device: str = "cpu", progress: str = "") -> dict:
    """Trains one arm with one seed and writes its test probabilities to `folder`; a finished one is read instead."""
    path, trained_on = Path(folder) / f"{arm}_seed{seed}.json", fingerprint(train)
    tested_on = {name: fingerprint(test) for name, test in tests.items()}
    if path.exists():
        result = read_json(path)
        if result["trained_on"] != trained_on:
            raise InputError(f"{path} comes of other training images than these; give another --out")
        if result.get("tested_on", tested_on) != tested_on:  # the probabilities belong to images in this order
            raise InputError(f"{path} was tested on other images than these, or in another order; give another --out")
        return result
    predictor = Predictor([label], width=width, size=size, seed=seed).to(device)
    labels = {label.name: train.labels}
    log = fit(predictor, train.pixels, labels, steps=steps, batch=batch, lr=lr, seed=seed,
              weights={label.name: balance(label, labels)}, progress=progress)
    probabilities = {name: predictor.predict(test.pixels)[label.name].tolist() for name, test in tests.items()}
    result = {"arm": arm, "seed": seed, "n_train": len(train.pixels), "trained_on": trained_on, "tested_on": tested_on,
              "log": log, "probabilities": probabilities}
    write_json(path, result)
    return result


def score(probabilities: np.ndarray, test: Images, labels: Sequence[str]) -> dict:
    """Figures of one classifier on one test set; a label's figure is None where the set has no image to compute it.

    Intervals are at 95 %: Wilson's for accuracy and DeLong's for AUROC (one label against the rest). Both take images
    as independent; where patients have several, the differences of arms below are the honest ones.
    """
    p, truth = np.asarray(probabilities, float), test.labels.numpy()
    answer = p.argmax(1)
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (truth, answer), 1)
    right, n = int((answer == truth).sum()), len(truth)
    rows = confusion.sum(1)
    return {
        "n": n,
        "patients": len(set(test.patients)),
        "accuracy": right / n,
        "accuracy_interval": list(wilson(right, n)),
        "balanced_accuracy": balanced_accuracy(p, truth),
        "recall": {name: confusion[k, k] / rows[k] if rows[k] else None for k, name in enumerate(labels)},
        "auroc_macro": _json(macro_auroc(p, truth)),
        "auroc": {name: _json(auroc(p[:, k], truth == k)) for k, name in enumerate(labels)},
        "auroc_interval": {name: [_json(x) for x in auroc_interval(p[:, k], truth == k)] for k, name in enumerate(labels)},
        "confusion": confusion.tolist(),  # a row for each true label, a column for each answer
    }


def accuracy(p: np.ndarray, truth: np.ndarray) -> float:
    return float((p.argmax(1) == truth).mean())


def balanced_accuracy(p: np.ndarray, truth: np.ndarray) -> float:
    """Mean recall of the labels that the test set has."""
    right = p.argmax(1) == truth
    return float(np.mean([right[truth == k].mean() for k in np.unique(truth)]))


def macro_auroc(p: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the labels that the test set has of AUROC against the rest; nan with one label."""
    return float(np.mean([auroc(p[:, k], truth == k) for k in np.unique(truth)]))


METRICS = {"accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "auroc_macro": macro_auroc}


def differences(by_seed: Mapping[str, Sequence[np.ndarray]], test: Images, *, n_boot: int = 1000,
                seed: int = 0) -> list[dict]:
    """Arms against each other on the same images; `by_seed` has the probabilities (n,k) of each arm, one for each seed.

    The difference is that of the mean probabilities over seeds; its interval is the 2.5–97.5 % over resamples of whole
    patients, the same resamples for both arms. It is resolved where this interval leaves out 0 and the difference has the
    same sign with every single seed: the interval knows nothing of how much training varies from seed to seed. What is
    resolved holds for other patients, not for other generators and, with few seeds, not surely for other seeds.
    """
    probabilities = {arm: np.mean(each, 0) for arm, each in by_seed.items()}
    truth = test.labels.numpy()
    resamples = bootstrap_indices(test.patients, n_boot, seed)
    resamples = [i for i in resamples if len(np.unique(truth[i])) == len(np.unique(truth))]
    values = {arm: {name: np.array([f(p[i], truth[i]) for i in resamples]) for name, f in METRICS.items()}
              for arm, p in probabilities.items()}
    found = []
    for a, b in COMPARISONS:
        if a not in probabilities or b not in probabilities:
            continue
        for name, f in METRICS.items():
            d = f(probabilities[a], truth) - f(probabilities[b], truth)
            low, high = percentile(values[a][name] - values[b][name]) if resamples else (math.nan, math.nan)
            agree = sum(bool(np.sign(f(p, truth) - f(q, truth)) == np.sign(d)) for p, q in zip(by_seed[a], by_seed[b]))
            found.append({"arm": a, "against": b, "metric": name, "difference": _json(d),
                          "interval": [_json(low), _json(high)], "seeds": len(by_seed[a]), "seeds_agree": agree,
                          "resolved": bool((low > 0 or high < 0) and agree == len(by_seed[a]))})
    return found


def summarise(results: Sequence[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of each figure, an entry for each arm and test set."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for r in results:
        groups.setdefault((r["test_set"], r["arm"]), []).append(r)
    rows = []
    for (test_set, arm), group in groups.items():
        row = {"test_set": test_set, "arm": arm, "seeds": len(group), "n_train": group[0]["n_train"]}
        for name in METRICS:
            values = [g[name] for g in group if g[name] is not None]
            row[name] = float(np.mean(values)) if values else None
            row[name + "_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def check_labels(cells: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError for a split of one class only (train or test) and for labels of any set that train has not."""
    for split in ("train", "test"):
        if len(set(cells[split])) < 2:
            found = f"only {cells[split][0]!r}, {len(cells[split])} images" if cells[split] else "no image"
            raise InputError(f"a classifier needs two labels or more; the {split} split has {found}")
    for name in cells:
        unknown = sorted(set(cells[name]) - set(cells["train"]))
        if unknown:
            raise InputError(f"{name} has labels that the train split has not: {', '.join(unknown)}; "
                             f"train has {', '.join(sorted(set(cells['train'])))}")


def fingerprint(images: Images) -> str:
    """sha256 of pixels and labels, in order."""
    digest = hashlib.sha256(np.ascontiguousarray(grey(images.pixels).numpy()))
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()


def _take(images: Images, rows: Tensor) -> Images:
    return Images(images.pixels[rows], images.labels[rows], [images.patients[i] for i in rows.tolist()])


def _join(a: Images, b: Images) -> Images:
    pixels = torch.cat([grey(a.pixels), grey(b.pixels)])  # one channel each: a third of the memory
    return Images(pixels, torch.cat([a.labels, b.labels]), a.patients + b.patients)


def _json(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None  # JSON has no nan
