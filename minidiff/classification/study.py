"""Trains the arms of a study: the same network on different images.

    sets, arms ─ pairs of (arm, seed), dealt to the ranks ─ train_pair ─▶
    arms/<arm>/<seed>/{predictor, result.json}

A pair is finished when its result.json is there; the same call then resumes with the next one. The
seed decides start, augmentation and order. The best of the validations of a training is kept; no
test image decides anything.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minidiff.classification import arms as kinds
from minidiff.classification.arms import Arm, Images
from minidiff.classification.inputs import Inputs
from minidiff.classification.invariance import Invariance
from minidiff.classification.lungs import finder
from minidiff.classification.predictor import Predictor, begin, fit
from minidiff.errors import InputError, count
from minidiff.pixels import to_grey
from minidiff.runs import read_json, write_json

DROPOUT = 0.2  # of the features; kept at prediction for the uncertainty of MC dropout


@dataclass(frozen=True)
class Recipe:
    """What all arms have in common."""

    size: int
    width: int
    steps: int
    batch: int
    lr: float
    positive: str                # label of interest
    even: tuple[str, ...] = ()   # columns of the arms real-even
    init: str = ""               # where all but real-scratch start
    precision: str = "auto"
    device: str = "cpu"
    standardise: tuple[str, ...] = ()  # how pictures are made alike
    lungs: str = ""              # folder of the network that finds them
    invariant: str = ""          # column over whose values the features of a label lie alike
    seed: int = 0                # the first; also of the choice of patients of real@25


def folder_of(out: str | Path, arm: str, seed: int) -> Path:
    return Path(out) / "arms" / arm / str(seed)


def as_given_to(arm: Arm, inputs: Inputs, recipe: Recipe) -> Inputs:
    """The inputs as an arm has them: its own validation set, and a note where that is smaller."""
    val = inputs.sets["val"]
    own = kinds.validation_set(arm, inputs.sets["train"], val, positive=recipe.positive,
                               seed=recipe.seed)
    if len(own) == len(val):
        return inputs
    given = replace(inputs, sets={**inputs.sets, "val": own})
    if arm.share is not None:
        note = f"{arm.name}: validation has {len(own)} of {count(len(val), 'image')}, its share too"
        return replace(given, notes=[*inputs.notes, note])
    place = inputs.labels.index(recipe.positive)
    n, of, trained = (int(one.truth(name)[:, place].sum()) for one, name in (
        (given, "val"), (inputs, "val"), (inputs, "train")))
    note = (f"{arm.name}: validation has {n} of the {of} images of {recipe.positive}, as training "
            f"has at most {arm.most} of {trained}")
    return replace(given, notes=[*inputs.notes, note])


def train_pair(folder: Path, arm: Arm, seed: int, inputs: Inputs, recipe: Recipe,
               progress: str = "") -> dict:
    """Train one arm with one seed and write predictor and logits, or read them if finished."""
    inputs, made = as_given_to(arm, inputs, recipe), inputs.made_for(seed - recipe.seed)
    stages = kinds.training_set(arm, inputs.sets["train"], made, positive=recipe.positive,
                                seed=seed, subset_seed=recipe.seed)
    held_out = {name: images for name, images in inputs.sets.items() if name != "train"}
    prints = {"trained_on": [fingerprint(images) for images in stages],
              "tested_on": {name: fingerprint(images) for name, images in held_out.items()}}
    if (folder / "result.json").exists():
        return check_result(read_json(folder / "result.json"), prints, folder, inputs)
    predictor = Predictor([inputs.target], width=recipe.width, size=recipe.size, dropout=DROPOUT,
                          seed=seed, standardise=recipe.standardise,
                          lungs=finder(recipe.standardise, recipe.lungs))
    if recipe.init and "scratch" not in arm.words:
        begin(predictor, recipe.init)
    predictor.to(recipe.device)
    augment = next((word for word in ("plain", "strong") if word in arm.words), "classic")
    columns = recipe.even if "even" in arm.words else ()
    ends = [recipe.steps] if len(stages) == 1 else [recipe.steps // 2, recipe.steps]
    val, log, start = inputs.sets["val"], [], 0
    val_weights = kinds.even_weights(val, ()) if inputs.exclusive else None
    for images, end in zip(stages, ends):
        weights = kinds.even_weights(images, columns) if inputs.exclusive else None
        invariant = Invariance(images.rows, recipe.invariant) if recipe.invariant else None
        part = fit(predictor, images.pixels, {"label": images.labels}, steps=end - start,
                   batch=recipe.batch, lr=recipe.lr, seed=seed, augment=augment,
                   sample_weight=weights, progress=progress, precision=recipe.precision,
                   validation=(val.pixels, {"label": val.labels}, val_weights), start=start,
                   invariant=invariant)
        last, start = [line for line in part if "val_loss" in line], end
        log += part
    predictor.save(folder)
    result = {"arm": arm.name, "seed": seed, "n_train": sum(map(len, stages)), **prints,
              "best_step": min(last, key=lambda line: line["val_loss"])["step"], "log": log,
              "logits": {name: predictor.logits(images.pixels)["label"].tolist()
                         for name, images in held_out.items()}}
    write_json(folder / "result.json", result)  # last: its presence says that the pair is finished
    return result


def check_result(result: dict, prints: Mapping, folder: Path, inputs: Inputs) -> dict:
    """A finished pair, if it belongs to these images in this order."""
    path = folder / "result.json"
    for key in [key for key in prints if result.get(key) != prints[key]]:
        raise InputError(f"{path} was {key.replace('_', ' ')} other images than these, or on these "
                         "in another order; give another --out")
    for name, logits in result["logits"].items():
        shape = (len(inputs.sets[name]), len(inputs.target.values))
        if np.shape(logits) != shape or not np.isfinite(logits).all():
            raise InputError(f"{path}: the logits of {name} are not {shape[0]} × {shape[1]} finite "
                             "numbers")
    return result


def fingerprint(images: Images) -> str:
    """sha256 of pixels and labels, in order."""
    digest = hashlib.sha256()
    for part in images.pixels.split(256):
        digest.update(np.ascontiguousarray(to_grey(part).numpy()))
    digest.update(images.labels.numpy().tobytes())
    return digest.hexdigest()
