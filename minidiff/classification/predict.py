"""What a finished study's classifier says of new images: one row an image, in CSV.

    python classify.py predict --model runs/x/classifier --data NEW --out new.csv

The probabilities are the mean over the seeds of one arm, at the temperature that fits validation.
`set`: the labels that are not ruled out. `entropy` and `disagreement` (mutual information of the
seeds), in nats: how unsure the classifier is. `typical`: the p that the image is like those of
validation; below .05 it is not. Not for diagnosis.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import safetensors
import safetensors.numpy

from minidiff.classification.calibration import pooled, probabilities
from minidiff.classification.lungs import kept_whole
from minidiff.classification.predictive_uncertainty import (
    Conformal,
    FeatureDistance,
    conformal_p,
    entropy,
    mutual_information,
)
from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import load_pixels
from minidiff.data.folders import is_mask, is_rubbish
from minidiff.data.images import EXTENSIONS, KINDS
from minidiff.data.table import Table, write_table
from minidiff.errors import InputError
from minidiff.root import Rooted
from minidiff.runs import read_json
from minidiff.training.device import pick_device


@dataclass(frozen=True)
class PredictConfig(Rooted):
    writes: ClassVar[str] = ""           # one file
    model: str = "ROOT/classifier"       # finished study
    arm: str = ""                        # none: the one with the lowest validation loss
    data: str = ""                       # folder of images, masks left out; none: the root's
    out: str = "ROOT/predictions.csv"    # table to write
    skip_bad: bool = False               # leave unreadable images out instead of refusing
    device: str = "auto"                 # auto, cpu, cuda, cuda:1 …


def predict(cfg: PredictConfig) -> None:
    """Write probabilities, conformal set and uncertainty of each image of a folder."""
    arm, out = pick(cfg), Path(cfg.out)
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(b"file_name,p_")):
        raise InputError(f"--out {out} exists and is no table of predictions; give another, "
                         "nothing there is overwritten")
    tuned, typical, of_validation = kept(arm)
    members = [Predictor.load(arm / str(seed)) for seed in tuned["seeds"]]
    target, size = members[0].variables[0], members[0].size
    table, pixels = load_pixels(listed(cfg.data), size, skip_bad=cfg.skip_bad)
    for note in kept_whole(members[0].lungs, {cfg.data: pixels}):
        print(note)
    exclusive = target.exclusive
    logits = np.stack([m.to(pick_device(cfg.device)).logits(pixels)[target.name].double().numpy()
                       for m in members])
    p = probabilities(logits, exclusive=exclusive)
    sets = tuned["conformal"].sets(p.mean(0))
    like = conformal_p(typical.distance(members[0].features(pixels).double().numpy()),
                       of_validation)
    scaled = probabilities(pooled(logits, exclusive), tuned["temperature"], exclusive)
    unsure, apart = entropy(p.mean(0), exclusive), mutual_information(p, exclusive)
    rows = [{"file_name": row["file_name"],
             **{f"p_{name}": f"{x:.6f}" for name, x in zip(target.values, scaled[i])},
             "set": "|".join(name for name, there in zip(target.values, sets[i]) if there),
             "entropy": f"{unsure[i]:.6f}", "disagreement": f"{apart[i]:.6f}",
             "typical": f"{like[i]:.6f}"} for i, row in enumerate(table.rows)]
    write_table(cfg.out, rows)
    odd = int((like < 0.05).sum())
    print(f"{cfg.out}: {len(rows)} images by {len(members)} classifiers of {arm.name}; {odd} are "
          f"unlike the validation images (p < .05; {0.05 * len(rows):.0f} by chance)")


def pick(cfg: PredictConfig) -> Path:
    """The folder of the arm to ask."""
    arms = {path.parent.name: path.parent
            for path in sorted(Path(cfg.model).glob("arms/*/tuned.json"))}
    if not arms or (cfg.arm and cfg.arm not in arms):
        raise InputError(f"--arm {cfg.arm or 'any'}: {cfg.model} has "
                         f"{', '.join(arms) or 'no finished study; classify.py makes one'}")
    return arms.get(cfg.arm) or min(arms.values(), key=lambda arm: kept(arm)[0]["val_loss"])


def kept(arm: Path) -> tuple[dict, FeatureDistance, np.ndarray]:
    """What a study keeps beside an arm: what was tuned, FeatureDistance, validation distances."""
    try:
        tuned, reference = (read_json(arm / f"{name}.json") for name in ("tuned", "distances"))
        typical = FeatureDistance(**safetensors.numpy.load_file(arm / "typical.safetensors"))
        tuned["conformal"] = Conformal.from_json(tuned["conformal"])
        return tuned, typical, np.array(reference, float)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{arm}: tuned.json, distances.json or typical.safetensors is missing or "
                         f"damaged ({error}); run the study's command again") from None


def listed(folder: str) -> Table:
    """Every image below a folder, in order of name."""
    root = Path(os.path.abspath(folder))
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS
                   and path.is_file() and not any(
                       part.startswith(".") or is_mask(part) or is_rubbish(part)
                       for part in path.relative_to(root).parts))
    if not files:
        raise InputError(f"--data {folder}: no {KINDS} files there")
    return Table([{"file": str(path), "where": str(path), "file_name": str(path.relative_to(root))}
                  for path in files])
