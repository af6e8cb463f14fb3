"""Some cells of a finished report or matrix once more, from the files as they are now; for `chain`.

Each yields (cell, the number as it stands there, the number now), for a choice of k cells by seed.
Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from minidiff import config, runs
from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import load_pixels
from minidiff.data.table import Table
from minidiff.evaluation.features.extractor import PixelPCA, PredictorFeatures
from minidiff.evaluation.matrix import cells
from minidiff.evaluation.matrix import run as matrix
from minidiff.evaluation.metrics.comparison import Side
from minidiff.evaluation.metrics.distances import fid, kid

Cell = tuple[str, float, float]


def report_cells(folder: Path, root: Path, tables: dict[str, Table], k: int,
                 seed: int) -> Iterator[Cell]:
    """KD and FD of synthetic sets of a report, in the spaces that need nothing but the data and the
    judge.

    root: where the paths of the config are meant from. tables: train, heldout and synthetic, as
    they are now.
    """
    cfg, result = runs.read_json(folder / "config.json"), runs.read_json(folder / "report.json")
    loaded = {name: load_pixels(tables[name], result["data"]["size"])
              for name in ("train", "heldout", "synthetic")}
    judge = root / cfg["classifier"] / "judge"
    known = {PixelPCA.name: lambda: PixelPCA().fit(loaded["train"][1]),
             PredictorFeatures.name: lambda: PredictorFeatures(Predictor.load(judge))}
    rows = [r for r in result["distances"] if r["set"] == "synthetic" and r["extractor"] in known]
    sides: dict[str, dict[str, Side]] = {}
    for row in chosen([r for r in rows if r.get("KD") is not None], k, seed):
        if row["extractor"] not in sides:
            extract = known[row["extractor"]]()
            sides[row["extractor"]] = {name: Side(
                extract(x).double().numpy(), *(np.array(t.column(c)) for c in ("label", "patient")))
                                       for name, (t, x) in loaded.items() if name != "train"}
        real, made = (sides[row["extractor"]][name].of(row["label"])
                      for name in ("heldout", "synthetic"))
        both, where = {"real": real.features,
                       "fake": made.features}, f"{row['extractor']}, {row['label']}"
        yield f"KD, {where}", row["KD"], kid(**both, real_patients=real.patients,
                                             fake_patients=made.patients)
        yield f"FD, {where}", row["FD"], fid(**both)


def matrix_cells(folder: Path, root: Path, tables: dict[str, Table], k: int,
                 seed: int) -> Iterator[Cell]:
    """KD and FD of cells of a matrix; `tables` are real, external and the folders of samples, as
    they are now.
    """
    cfg = config.from_dict(matrix.MatrixConfig, config.load(folder / "config.json"))
    cfg = replace(cfg, classifier=str(root / cfg.classifier))
    result = runs.read_json(folder / "matrix.json")
    loaded = {name: matrix.ordered(*load_pixels(t, result["data"]["size"]))
              for name, t in tables.items()}
    tables, pixels = ({name: pair[i] for name, pair in loaded.items()} for i in (0, 1))
    judge = Predictor.load(Path(cfg.classifier) / "judge")
    spaces = matrix.spaces_of(cfg, matrix.of(tables["real"], pixels["real"], split=("train",)),
                              judge)
    spaces = {e.name: e for e in spaces}
    rows, _, columns = matrix.arrange(cfg, tables, pixels)
    rows, columns = ({s.name: s for s in reversed(some)} for some in (rows, columns))
    for then in chosen([c for c in result["cells"] if c.get("KD") is not None], k, seed):
        sets, space = [rows.get(then["row"]), columns.get(then["column"])], then["extractor"]
        where = f"{space}, {then['row']} × {then['column']}"
        if None in sets or space not in spaces:
            yield f"KD, {where}", then["KD"], math.nan
            continue
        for s in sets:
            if space not in s.features:
                s.features[space] = spaces[space](s.pixels).double().numpy()
        now, _ = cells.cell(*sets, space, lambda n: {}, permutations=1, resamples=2, seed=cfg.seed)
        for name in ("KD", "FD"):
            yield f"{name}, {where}", then[name], now.get(name, math.nan)


def chosen(rows: list[dict], k: int, seed: int) -> list[dict]:
    return [rows[i] for i in np.sort(np.random.default_rng(seed).permutation(len(rows))[:k])]


CELLS = {"report.json": report_cells, "matrix.json": matrix_cells}
