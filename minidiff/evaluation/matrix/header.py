"""Can the label be told without looking at the picture? From what a file is: its shape, side, bytes
and kind.

In public collections the labels often come from different hospitals, which export differently; then
a header alone "recognises" the disease, and every figure about labels is to be read with this in
mind (DeGrave et al. 2021).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from minidiff.data import images
from minidiff.data.table import Row, Table
from minidiff.statistics import auroc, auroc_interval

FACTS = ("how far from square", "shorter side", "bytes per pixel", "colour", "JPEG")


def header_shortcuts(train: Table, heldout: Table) -> list[dict]:
    """For each label, the one fact that tells it best from the rest: chosen, with its direction, on
    training files, measured on held-out ones. AUROC .5 is guessing, 1 a perfect give-away; none
    where a side is empty."""
    seen, unseen = (np.array([_facts(row) for row in table.rows]) for table in (train, heldout))
    rows = []
    for label in heldout.labels:
        ours, theirs = (np.array(table.column("label")) == label for table in (train, heldout))
        if not (ours.any() and not ours.all() and theirs.any() and not theirs.all()):
            continue
        areas = [auroc(seen[:, k], ours) for k in range(len(FACTS))]
        best = int(np.argmax([abs(a - 0.5) for a in areas]))
        scores = unseen[:, best] if areas[best] >= 0.5 else -unseen[:, best]
        low, high = auroc_interval(scores, theirs)
        rows.append({"label": label, "fact": FACTS[best], "auroc": auroc(scores, theirs), "low":
                     low, "high": high, "n": int(theirs.sum()), "n_rest": int((~theirs).sum())})
    return rows


def _facts(row: Row) -> Sequence[float]:
    channels, height, width = images.read(row["file"]).shape
    size = os.path.getsize(row["file"])
    jpeg = row["file"].lower().endswith(("jpg", "jpeg"))
    return abs(np.log(width / height)), min(height, width), size / (height * width), channels, jpeg
