"""Are the synthetic images like real ones, as asked for, and new? One page that says so with its numbers.

    python evaluate.py                                     the embedded demo → runs/demo/report/report.html
    python evaluate.py --data DIR --samples runs/x/samples --classifier runs/x/classifier --out runs/x/report
    python evaluate.py --data DIR --samples runs/x/samples --diffusion runs/x/diffusion --vae runs/x/vae --out runs/x/r2

Without a classifier run there is no judge and no second space; without vae and diffusion runs there are no curves. The
page says so. Held-out are val and test together. The same command again makes the page anew, from the same images.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minidiff import config, runs
from minidiff import variables as var
from minidiff.classification.agreement import agreement
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.dataset import load_pixels
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation import report
from minidiff.evaluation.comparison import Side, compare
from minidiff.evaluation.features import PixelPCA, PredictorFeatures
from minidiff.evaluation.neighbours import memorisation, pixel_spaces


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...] = ("runs/demo/phantom",)  # real data sets, with their splits
    samples: str = "runs/demo/samples"        # folder of synthetic images, of the same form as a data set
    classifier: str = "runs/demo/classifier"  # its judge/ reads images, its results are shown; may be absent
    vae: str = "runs/demo/vae"                # for its curve and reconstructions; may be absent
    diffusion: str = "runs/demo/diffusion"    # for its curve; may be absent
    out: str = "runs/demo/report"             # report.html and report.json
    size: int = 0                             # side at which images are compared, px; 0: that of the samples
    repeats: int = 100                        # random draws behind each floor; twice as many halves behind each FD interval
    shown: int = 16                           # pictures of each label and kind
    seed: int = 0                             # of draws, resamples, pictures; of the patient split where the data bring none
    skip_bad: bool = False                    # leave unreadable images out, listed and counted, instead of refusing


def run_report(cfg: Config) -> None:
    """Write the report."""
    tables, pixels = read(cfg)
    facts = {name: table.fingerprint for name, table in tables.items()}
    out = runs.open_run(cfg.out, cfg, "report", **facts)
    judge = Predictor.load(Path(cfg.classifier) / "judge") if (Path(cfg.classifier) / "judge").is_dir() else None
    extractors = [PixelPCA().fit(pixels["train"])] + ([PredictorFeatures(judge)] if judge else [])
    features = {e.name: {name: e(x) for name, x in pixels.items()} for e in extractors}

    rows = []
    for name, found in features.items():
        columns = {k: [np.array(tables[k].column(c)) for c in ("label", "patient")] for k in found}
        sides = {k: Side(f.double().numpy(), *columns[k]) for k, f in found.items()}
        rows += compare(name, **sides, labels=tables["synthetic"].labels, repeats=cfg.repeats, seed=cfg.seed)
    print("nearest neighbours")
    spaces = {name: pixel_spaces(x, query=name != "train") for name, x in pixels.items()}
    if judge:
        spaces = {name: {**space, "classifier": features["classifier"][name]} for name, space in spaces.items()}
    neighbours = memorisation(fake=spaces["synthetic"], train=spaces["train"], heldout=spaces["heldout"], seed=cfg.seed)

    result = {
        "data": {"folders": list(cfg.data), "size": pixels["train"].shape[-1],
                 **{f"n_{k}": len(tables[k]) for k in ("train", "heldout")},
                 **{f"{k}_patients": len(set(tables[k].column("patient"))) for k in ("train", "heldout")},
                 **{f"{k}_labels": counts(tables[k]) for k in ("train", "heldout")},
                 **{f"{k}_fingerprint": facts[k] for k in ("train", "heldout")},
                 "patients_assumed": tables["train"].patients_assumed, "notes": tables["train"].notes},
        "samples": {"folder": cfg.samples, "n": len(tables["synthetic"]),
                    "labels": counts(tables["synthetic"]), "fingerprint": facts["synthetic"]},
        "distances": rows, "neighbours": neighbours, "agreement": agree(judge, tables, pixels),
        "classifier": read_json(Path(cfg.classifier) / "results.json"),
        "study": read_json(Path(cfg.classifier) / "summary.json"),
        "vae": read_json(Path(cfg.vae) / "vae.json"),
        "provenance": runs.provenance(),
        "configs": {folder: read_json(Path(folder) / "config.json") or read_json(Path(folder) / "manifest.json")
                    for folder in (cfg.vae, cfg.diffusion, cfg.samples, cfg.classifier, cfg.out)},
    }
    pictures = {"grids": grids(cfg, tables, pixels), "pairs": pairs(neighbours["closest"], pixels),
                "logs": {Path(f).name: runs.read_log(Path(f) / "log.jsonl") for f in (cfg.vae, cfg.diffusion)}}
    drawn = Path(cfg.vae) / "reconstructions.png"
    if drawn.is_file():
        pictures["vae"] = drawn.read_bytes()
    path = report.write(out, result, pictures)
    for v in json.loads((out / "report.json").read_text())["verdict"]:
        print(f"{v['answer']:>12}  {v['question']}")
    print(path)


def read(cfg: Config) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pixels of train, heldout (val and test) and synthetic, after what can be refused is refused."""
    if cfg.repeats < 10 or cfg.shown < 1 or cfg.size < 0:
        raise InputError(f"repeats {cfg.repeats}, shown {cfg.shown}, size {cfg.size}: allowed are 10, 1 and 0 or more")
    for folder in cfg.data:
        a, b = Path(folder).resolve(), Path(cfg.samples).resolve()
        if a == b or a in b.parents or b in a.parents:
            raise InputError(f"--samples {cfg.samples} is the folder of real data {folder}, or lies in it or around it")
    real = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.out).parent)
    made = read_table(cfg.samples, split=False)
    tables = {"train": real.select(split="train"), "heldout": real.select(split=("val", "test")), "synthetic": made}
    for name in ("train", "heldout"):
        if not len(tables[name]):
            raise InputError(f"{' '.join(cfg.data)} has no image in split {'train' if name == 'train' else 'val or test'}")
    strange = sorted(set(made.labels) - set(tables["train"].labels))
    if strange:
        known = ", ".join(tables["train"].labels)
        raise InputError(f"{cfg.samples}: the data have no label {', '.join(strange)}; they have {known}")
    same = {made.hashes[f] for f in made.column("file")} & set(real.hashes.values())
    if 2 * len(same) > len(made):
        raise InputError(f"{cfg.samples} holds {len(same)} files of the real data: these are not synthetic images")
    size = cfg.size or min(images.read(made.rows[0]["file"]).shape[1:])
    loaded = {name: load_pixels(table, size, skip_bad=cfg.skip_bad) for name, table in tables.items()}
    return {name: table for name, (table, _) in loaded.items()}, {name: x for name, (_, x) in loaded.items()}


def agree(judge: Predictor | None, tables: dict[str, Table], pixels: dict[str, Tensor]) -> list[dict]:
    """The judge on held-out real and on synthetic images, over the variables that the samples were asked for."""
    if judge is None:
        return []
    asked = [v for v in judge.variables if any(tables["synthetic"].column(v.name))]
    names = {"heldout": "held-out real", "synthetic": "synthetic"}
    return [row for name, shown in names.items()
            for row in agreement(judge, pixels[name], var.encode(asked, tables[name].rows), shown)]


def grids(cfg: Config, tables: dict[str, Table], pixels: dict[str, Tensor]) -> dict[str, tuple[bytes, bytes]]:
    """For each label, equally many held-out and synthetic images, drawn at random."""
    drawn = {}
    for label in tables["synthetic"].labels:
        rng = np.random.default_rng(cfg.seed)
        own = [np.flatnonzero(np.array(tables[name].column("label")) == label) for name in ("heldout", "synthetic")]
        n = min(cfg.shown, *map(len, own))
        if n:
            real, made = (torch.from_numpy(rng.permutation(i)[:n]) for i in own)
            drawn[label] = tuple(images.png_bytes(images.grid(pixels[name][i], 4))
                                 for name, i in (("heldout", real), ("synthetic", made)))
    return drawn


def pairs(closest: list[dict], pixels: dict[str, Tensor]) -> list[tuple[bytes, bytes, bytes]]:
    return [tuple(images.png_bytes(pixels[name][p[key]]) for name, key in
                  (("synthetic", "fake"), ("train", "train"), ("heldout", "heldout"))) for p in closest]


def counts(table: Table) -> dict[str, int]:
    return dict(sorted(Counter(table.column("label")).items()))


def read_json(path: Path):
    return json.loads(path.read_text()) if path.is_file() else None


VERBS = {"report": (Config, run_report)}

if __name__ == "__main__":
    config.main(VERBS, default="report", doc=__doc__)
