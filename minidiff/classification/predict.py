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

import numpy as np
import safetensors
import safetensors.torch

from minidiff.classification.calibration import pooled, probabilities
from minidiff.classification.predictive_uncertainty import (
    Conformal,
    FeatureDistance,
    conformal_p,
    entropy,
    mutual_information,
)
from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import load_pixels
from minidiff.data.images import EXTENSIONS
from minidiff.data.table import Table, write_table
from minidiff.errors import InputError
from minidiff.root import Rooted
from minidiff.runs import read_json
from minidiff.training.device import pick_device


@dataclass(frozen=True)
class PredictConfig(Rooted):
    model: str = "ROOT/classifier"       # finished study
    arm: str = ""                        # none: the one with the lowest validation loss
    data: str = ""                       # folder of images, masks left out; none: the root's
    out: str = "ROOT/predictions.csv"    # table to write
    skip_bad: bool = False               # leave unreadable images out instead of refusing
    device: str = "auto"                 # auto, cpu, cuda, cuda:1 …


def predict(cfg: PredictConfig) -> None:
    """Write probabilities, conformal set and uncertainty of each image of a folder."""
    arm = pick(cfg)
    check_out(cfg.out)
    tuned, typical, of_validation = kept(arm)
    members = [Predictor.load(arm / str(seed)) for seed in tuned["seeds"]]
    target, size = members[0].variables[0], members[0].size
    table, pixels = load_pixels(listed(cfg.data), size, skip_bad=cfg.skip_bad)
    exclusive = target.exclusive
    logits = np.stack([m.to(pick_device(cfg.device)).logits(pixels)[target.name].double().numpy()
                       for m in members])
    p, mean = probabilities(logits, exclusive=exclusive), pooled(logits, exclusive)
    sets = Conformal.from_json(tuned["conformal"]).sets(p.mean(0))
    distance = typical.distance(members[0].features(pixels).double().numpy())
    like = conformal_p(distance, of_validation)
    scaled = probabilities(mean, tuned["temperature"], exclusive)
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


def check_out(path: str) -> None:
    """Raise InputError where anything but an earlier table of predictions would be lost."""
    if not os.path.exists(path):
        return
    if not os.path.isfile(path) or not Path(path).read_bytes().startswith(b"file_name,p_"):
        raise InputError(f"--out {path} exists and is no table of predictions; give another, "
                         "nothing there is overwritten")


def pick(cfg: PredictConfig) -> Path:
    """The folder of the arm to ask."""
    arms = {path.parent.name: path.parent
            for path in sorted(Path(cfg.model).glob("arms/*/tuned.json"))}
    if not arms:
        raise InputError(f"{cfg.model}: no finished study; classify.py makes one")
    if cfg.arm and cfg.arm not in arms:
        raise InputError(f"--arm {cfg.arm}: {cfg.model} has {', '.join(arms)}")
    return arms[cfg.arm] if cfg.arm else min(arms.values(),
                                             key=lambda arm: kept(arm)[0]["val_loss"])


def kept(arm: Path) -> tuple[dict, FeatureDistance, np.ndarray]:
    """What a study keeps beside an arm: what was tuned, FeatureDistance, validation distances."""
    tuned, again = read_json(arm / "tuned.json"), "run the study's command again"
    if not isinstance(tuned, dict) or not {"seeds", "temperature", "conformal",
                                           "val_loss"} <= set(tuned):
        raise InputError(f"{arm / 'tuned.json'} is damaged; {again}")
    path = arm / "typical.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing, for the study is not finished; {again}")
    try:
        typical = FeatureDistance.from_state(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, KeyError):
        raise InputError(f"{path} is damaged; {again}") from None
    return tuned, typical, np.array(read_json(arm / "distances.json"))


def listed(folder: str) -> Table:
    """Every image below a folder, in order of name."""
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise InputError(f"--data {folder}: no such folder")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS
                   and path.is_file() and not any(part.startswith(".") or part == "masks"
                                                  for part in path.relative_to(root).parts))
    if not files:
        raise InputError(f"--data {folder}: no PNG or JPEG files in it")
    return Table([{"file": str(path), "where": str(path), "file_name": str(path.relative_to(root))}
                  for path in files])
