"""Pictures of a study's errors: images of the label of interest that were found and missed, and
where the network looked.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from minidiff.classification.gradcam import gradcam, overlay
from minidiff.classification.inputs import Inputs
from minidiff.classification.predictor import Predictor
from minidiff.runs import read_json
from minidiff.variables import Category

SHOWN = 8  # of each kind


def gallery(data: Inputs, summary: dict,
            out: Path) -> dict[str, list[tuple[list[bytes], list[str]]]]:
    """"hits", "misses" and "alarms" of the label of interest: ((picture, Grad-CAM), lines) each.

    The classifier is the first seed's of the arm with the lowest validation loss; its likeliest
    label is the answer, and of findings, which may be there together, each from p ≥ .5. Misses and
    false alarms of which it was surest come first, from all test sets.
    """
    arms = {row["arm"]: read_json(out / "arms" / row["arm"] / "tuned.json")
            for row in summary["arms"]}
    arm = min(arms, key=lambda name: arms[name]["val_loss"])
    predictor = Predictor.load(out / "arms" / arm / str(arms[arm]["seeds"][0]))
    place, found = data.target.values.index(summary["positive"]), {"hits": [], "misses": [],
                                                                   "alarms": []}
    for name, images in data.tests.items():
        every, truth = predictor.predict(images.pixels)["label"].numpy(), data.truth(name)[
            :, place].numpy()
        p = every[:, place]
        called = every.argmax(1) == place if isinstance(data.target, Category) else p >= 0.5
        kinds = {"hits": (truth & called, -p), "misses": (truth & ~called, p),
                 "alarms": (~truth & called, -p)}
        for kind, (rows, key) in kinds.items():
            found[kind] += [(float(key[i]), name, int(i)) for i in np.flatnonzero(rows)]
    return {kind: _cards(data, predictor, place, sorted(some)[:SHOWN], arm, summary["positive"])
            for kind, some in found.items() if some}


def _cards(data: Inputs, predictor: Predictor, place: int, some: list[tuple[float, str, int]],
           arm: str, positive: str) -> list[tuple[list[bytes], list[str]]]:
    cards = []
    for key, name, i in some:
        images = data.tests[name].take([i])
        heat, row = gradcam(predictor, images.pixels, place), images.rows[0]
        pictures = [_png(images.pixels[0, 0].numpy()), _png(overlay(images.pixels, heat)[0])]
        cards.append((pictures, [f"{name}: {row['label']}", f"p({positive}) {abs(key):.2f}",
                                 row["file_name"], f"by {arm}"]))
    return cards


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
