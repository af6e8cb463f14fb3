"""How sure is the generator of each image? Its spread over the last checkpoints of training.

A checkpoint is a draw of what training might have ended with. From one seed and one set of
conditions it makes nearly the same image wherever the data have settled it, and another one
wherever they have not. With f_k the features of an image from checkpoint k of K, its uncertainty is
the trace of their covariance in units of that of real training images,

    u = Σ_k |f_k − f̄|² / (K − 1) / tr Cov(real)       0: every checkpoint makes the same; 1: as
                                                       different as two patients

in the spirit of the feature-space ensembles of Jazbec et al. (2025, arXiv 2502.20946), at the price
of no further training. It goes into metadata.csv as the column `uncertainty`, where it can be
filtered by; its rank correlations with the judge's probability of the label asked for, and with the
distances to training and held-out images, say what it is worth.
"""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import scipy
import torch
from torch import Tensor

from minidiff import runs
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.table import csv_text, read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import Extractor, PixelPCA, PredictorFeatures
from minidiff.evaluation.format import jsonable, num, span
from minidiff.evaluation.metrics.agreement import certainty
from minidiff.evaluation.metrics.pairwise import check_finite, distances, equalised
from minidiff.evaluation.monitor import Sample, checkpoints, read
from minidiff.evaluation.sets import judge_of
from minidiff.root import Reading, Rooted
from minidiff.statistics import NONE, fisher_interval, pearson, z_value

FEWEST_MODELS = 5
COLUMN = "uncertainty"


@dataclass(frozen=True)
class UncertaintyConfig(Reading, Rooted):
    writes: ClassVar[str] = "samples"    # not `out`
    data_of_root: ClassVar[bool] = False
    samples: str = "ROOT/samples"        # finished folder of samples; metadata.csv gains a column
    run: str = ""                        # diffusion run with snapshots/; none: that of the samples
    data: tuple[str, ...] = ()           # real data sets; none: those the run was trained on
    classifier: str = "ROOT/classifier"  # its judge/ is the space of the column; absent: pixels
    k: int = 5                           # last checkpoints to compare, 5 or more
    skip_bad: bool = False               # leave unreadable real images out, listed and counted
    device: str = "auto"                 # auto, cpu, cuda, cuda:1 …


def uncertainty(features: np.ndarray, real: np.ndarray) -> np.ndarray:
    """u of each image (N,) from its features over checkpoints (K,N,d), in units of real (M,d)."""
    x, y = np.asarray(features, np.float64), np.asarray(real, np.float64)
    check_finite("fake", x.reshape(len(x), -1))
    check_finite("real", y)
    unit = y.var(0, ddof=1).sum()
    if not unit:
        raise InputError("the real images are all alike in this space: a spread has no unit")
    return x.var(0, ddof=1).sum(1) / unit


def spearman(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Rank correlation with its interval (r, low, high); nan with under 4 pairs or no spread.

    Fisher's z with variance (1 + r²/2)/(n − 3), which holds for ranks where 1/(n − 3) is too small
    (Bonett & Wright 2000).
    """
    r, *_ = pearson(scipy.stats.rankdata(x), scipy.stats.rankdata(y))
    if math.isnan(r):
        return math.nan, *NONE
    return r, *fisher_interval(r, z_value() * math.sqrt((1 + r * r / 2) / (len(x) - 3)))


def run(cfg: UncertaintyConfig, sample: Sample) -> dict:
    """Write the column, uncertainty.json and a sheet of the least and the most certain images.

    `sample` makes images by the recipe of the folder. Returns what the JSON has.
    """
    folder, written = Path(cfg.samples), check_written(cfg.samples)
    source = made_by(cfg)
    points = checkpoints(source)[-cfg.k:]
    if len(points) < FEWEST_MODELS:
        raise InputError(f"models kept by {source}: {len(checkpoints(source))}, --k {cfg.k}; "
                         f"{FEWEST_MODELS} or more are compared: train with --snapshots 9")
    real = read(source, cfg)
    train, heldout = real.part("train"), real.part("val", "test")
    judge = judge_of(cfg.classifier, train.table, cfg.device)
    extractors = ([PredictorFeatures(judge)] if judge else []) + [PixelPCA().fit(train.pixels)]
    table, pixels = load_pixels(read_table(folder, split=False), train.size)
    made = [sample(point.folder, table.rows) for point in points]
    found = {e.name: uncertainty(np.stack([e(x).double().numpy() for x in made]),
                                 e(train.pixels).double().numpy()) for e in extractors}
    lead = extractors[0]
    u, labels = found[lead.name], table.column("label")
    qualities = per_image(pixels, labels, train.pixels, heldout, lead, judge)
    result = {
        "samples": cfg.samples, "column": lead.name, "n": len(table), "k": len(points),
        "checkpoints": [{"step": p.step, "folder": str(p.folder),
                         "sha256": runs.sha256(p.folder / "model.safetensors")} for p in points],
        "quantiles": {name: dict(zip(("q05", "q50", "q95"),
                                     np.quantile(values, [0.05, 0.5, 0.95]).tolist()))
                      for name, values in found.items()},
        "correlations": [{"space": name, "with": what,
                          **dict(zip(("r", "low", "high"), spearman(values, others)))}
                         for name, values in found.items() for what, others in qualities.items()],
        "provenance": runs.provenance(),
    }
    write_column(folder, dict(zip(table.column("file_name"), (f"{x:.6g}" for x in u))), written)
    runs.write_json(folder / "uncertainty.json", jsonable(result))
    ends = sorted({*range(len(u))[:5], *range(len(u))[-5:]})
    shown = np.argsort(u, kind="stable")[ends]
    sheet = torch.cat([x[torch.from_numpy(shown)] for x in made])
    images.write(folder / "sheets" / "uncertainty.png", images.grid(sheet, columns=len(shown)),
                 quick=True)
    for c in result["correlations"]:
        print(f"uncertainty in {c['space']} and {c['with']}: rank correlation {num(c['r'])} "
              f"({span(c['low'], c['high'])}; n = {len(table)})")
    print(f"{folder}: {len(table)} images over {len(points)} checkpoints, steps {points[0].step} "
          f"to {points[-1].step}; column {COLUMN} is of {lead.name}, median "
          f"{num(result['quantiles'][lead.name]['q50'])}")
    return result


def made_by(cfg: UncertaintyConfig) -> Path:
    """The run of the snapshots; InputError unless one of its models made the samples."""
    folder = Path(cfg.samples)
    source = Path(cfg.run or runs.read_json(folder / "config.json")["run"])
    if not (cfg.run or (source / "snapshots").is_dir()) and (source.parent / "snapshots").is_dir():
        source = source.parent   # the samples are of its best/
    model = runs.read_json(folder / "manifest.json")["model"]
    if not any(runs.sha256(p.folder / "model.safetensors") == model for p in checkpoints(source)):
        raise InputError(f"{source} holds no model that made {folder} (sha256 {model[:12]}): they "
                         "say nothing of it")
    return source


def per_image(pixels: Tensor, labels: Sequence[str], train: Tensor, heldout: Images,
              extractor: Extractor, judge: Predictor | None) -> dict[str, np.ndarray]:
    """Other numbers of each image (N,): the judge's probability, distances to real images."""
    sure = certainty(judge, labels, pixels)
    found = {} if sure is None else {"probability of the label asked for": sure}
    nearest = distances(equalised(pixels), equalised(train)).min(1).values
    found["distance to the nearest training image"] = nearest.numpy()
    real, made = (extractor(x).double().numpy() for x in (heldout.pixels, pixels))
    of = np.array(heldout.table.column("label"))
    if set(labels) <= set(of):
        centre = np.stack([real[of == label].mean(0) for label in labels])
        found["distance to the held-out mean of its label"] = np.linalg.norm(made - centre, axis=1)
    return found


def check_written(folder: str | Path) -> list[dict[str, str]]:
    """The rows of metadata.csv without the column; InputError unless they are the manifest's.

    A crash in `write_column` leaves a table with the column and a manifest that does not know of
    it. That is no edit: without the column, the table still is what the manifest says.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{folder} has no manifest.json: run `python sample.py` to its end first")
    then = runs.read_json(folder / "manifest.json")["sha256"]["metadata.csv"]
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    bare = [{name: cell for name, cell in row.items() if name != COLUMN} for row in rows]
    if then not in (runs.sha256(folder / "metadata.csv"), digest(bare)):
        raise InputError(f"{folder / 'metadata.csv'} is not as it was written: manifest.json has "
                         "another SHA-256")
    return bare


def write_column(folder: Path, values: Mapping[str, str],
                 rows: Sequence[Mapping[str, str]]) -> None:
    """metadata.csv with the column, file_name → cell, and its hash in the manifest.

    Two files cannot change as one. The manifest first names the table without the column, which is
    what `check_written` finds whether the new table is there by then or not.
    """
    manifest = runs.read_json(folder / "manifest.json")
    whole = [{**row, COLUMN: values[row["file_name"]]} for row in rows]
    manifest["sha256"]["metadata.csv"] = digest(rows)
    runs.write_json(folder / "manifest.json", manifest)
    write_table(folder / "metadata.csv", whole)
    manifest["sha256"]["metadata.csv"] = digest(whole)
    runs.write_json(folder / "manifest.json", manifest)


def digest(rows: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of these rows as a file."""
    return hashlib.sha256(csv_text(rows).encode()).hexdigest()
