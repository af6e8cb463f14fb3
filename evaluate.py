"""Are the synthetic images like real ones, as asked for, and new? One page that says so with its numbers.

    python evaluate.py                                     the embedded demo → runs/demo/report/report.html
    python evaluate.py --data DIR --samples runs/x/samples --classifier runs/x/classifier --out runs/x/report
    python evaluate.py --data DIR --samples runs/x/samples --diffusion runs/x/diffusion --vae runs/x/vae --out runs/x/r2

Without a classifier run there is no judge and no second space; without vae and diffusion runs there are no curves. The
page says so. Held-out are val and test together. The same command again makes the page anew, from the same images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from minidiff import config, runs
from minidiff import variables as var
from minidiff.classification.agreement import agreement
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.dataset import load_pixels
from minidiff.data.split import check_unseen, trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation import report
from minidiff.evaluation.comparison import Side, compare
from minidiff.evaluation.features import PixelPCA, PredictorFeatures
from minidiff.evaluation.neighbours import memorisation, pixel_spaces
from minidiff.evaluation.within import within_label
from minidiff.variables import Labels

SMALLEST = 8  # px a side at which images are compared


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...] = ("runs/demo/phantom",)  # real data sets, with their splits
    samples: str = "runs/demo/samples"        # folder of synthetic images, of the same form as a data set
    classifier: str = "runs/demo/classifier"  # its judge/ reads images, its results are shown; may be absent
    vae: str = "runs/demo/vae"                # for its curve and reconstructions; may be absent
    diffusion: str = "runs/demo/diffusion"    # for its curve; may be absent
    out: str = "runs/demo/report"             # report.html and report.json
    size: int = 0                             # side at which images are compared, px; 0: that of the samples
    repeats: int = 100                        # draws behind each floor; twice as many FD halves if synthetic, else half
    shown: int = 16                           # pictures of each label and kind
    seed: int = 0                             # of draws, resamples, pictures; of the patient split where the data bring none
    skip_bad: bool = False                    # leave unreadable images out, listed and counted, instead of refusing


def run_report(cfg: Config) -> None:
    """Write the report."""
    tables, pixels = read(cfg)
    found = optional(cfg)
    judge = found.pop("judge")
    labels = asked(judge, tables)  # a cell that the judge does not know is refused before the work
    facts = {name: table.fingerprint for name, table in tables.items()}
    out = runs.open_run(cfg.out, cfg, "report", **facts)
    extractors = [PixelPCA().fit(pixels["train"])] + ([PredictorFeatures(judge)] if judge else [])
    features = {e.name: {name: e(x) for name, x in pixels.items()} for e in extractors}

    rows = []
    for name, values in features.items():
        columns = {k: [np.array(tables[k].column(c)) for c in ("label", "patient")] for k in values}
        sides = {k: Side(f.double().numpy(), *columns[k]) for k, f in values.items()}
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
                 "patients_assumed": tables["train"].patients_assumed, "notes": notes(tables)},
        "samples": {"folder": cfg.samples, "n": len(tables["synthetic"]),
                    "labels": counts(tables["synthetic"]), "fingerprint": facts["synthetic"]},
        "distances": rows, "neighbours": neighbours, "agreement": agree(judge, labels, tables, pixels),
        **{name: found[name] for name in ("classifier", "study", "vae")}, "provenance": runs.provenance(),
        "configs": {**found["configs"], cfg.out: runs.read_json(out / "config.json")},
    }
    pictures = {"grids": grids(cfg, tables, pixels), "pairs": pairs(neighbours["closest"], pixels), "logs": found["logs"]}
    drawn = Path(cfg.vae) / "reconstructions.png"
    if drawn.is_file():
        pictures["vae"] = drawn.read_bytes()
    path = report.write(out, result, pictures)
    for v in runs.read_json(out / "report.json")["verdict"]:
        print(f"{v['answer']:>12}  {v['question']}")
    print(path)


def read(cfg: Config) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pixels of train, heldout (val and test) and synthetic, after what can be refused is refused."""
    if cfg.repeats < 10 or cfg.shown < 1 or cfg.size < 0 or 0 < cfg.size < SMALLEST:
        raise InputError(f"repeats {cfg.repeats}, shown {cfg.shown}, size {cfg.size}: allowed are 10 and 1 or more, and a "
                         f"size of {SMALLEST} or more (0: that of the samples)")
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
    known = set(real.hashes.values())
    same = [file for file in made.column("file") if made.hashes[file] in known]
    if same:
        raise InputError(f"{cfg.samples} holds {len(same)} files of the real data, e.g. {same[0]}: these are not synthetic")
    unknown = check_origin(cfg, tables["heldout"])
    tables["heldout"] = replace(tables["heldout"], notes=[*real.notes, *unknown])
    size = cfg.size or next(filter(None, map(side, made.column("file"))), SMALLEST)
    loaded = {name: load_pixels(table, size, skip_bad=cfg.skip_bad) for name, table in tables.items()}
    return {name: table for name, (table, _) in loaded.items()}, {name: x for name, (_, x) in loaded.items()}


def check_origin(cfg: Config, heldout: Table) -> list[str]:
    """Raise InputError if generator or judge has seen a held-out image; a note for each of which that is unknown."""
    judge = Path(cfg.classifier) / "judge"
    listed = judge / "trained_on.json"
    seen = {"the generator": trained_on(cfg.samples)}
    if judge.is_dir():
        seen["the judge"] = set(runs.read_json(listed)) if listed.is_file() else None
    for who, hashes in seen.items():
        check_unseen(heldout.rows, heldout.hashes, hashes or set(), who)
    return [f"what {who} was trained on is unknown" for who, hashes in seen.items() if not hashes]


def side(file: str) -> int:
    """Shorter side of an image; 0 where it cannot be read."""
    try:
        return min(images.read(file).shape[1:])
    except InputError:
        return 0


def optional(cfg: Config) -> dict:
    """What other runs have left for the page: judge, results, curves and configs; a line is printed for what is absent."""
    classifier, vae, diffusion = (Path(f) for f in (cfg.classifier, cfg.vae, cfg.diffusion))
    expected = {classifier / "judge": "judge", classifier / "results.json": "results of a classifier",
                classifier / "summary.json": "summary of a study", vae / "vae.json": "quality of the autoencoder",
                vae / "reconstructions.png": "reconstructions", vae / "log.jsonl": "curve of the autoencoder",
                diffusion / "log.jsonl": "curve of the diffusion model"}
    for path, what in expected.items():
        if not path.exists():
            print(f"{path} is absent: the page has no {what}")
    return {
        "judge": Predictor.load(classifier / "judge") if (classifier / "judge").is_dir() else None,
        "classifier": read_json(classifier / "results.json"), "study": read_json(classifier / "summary.json"),
        "vae": read_json(vae / "vae.json"),
        "configs": {folder: read_json(Path(folder) / "config.json") or read_json(Path(folder) / "manifest.json")
                    for folder in (cfg.vae, cfg.diffusion, cfg.samples, cfg.classifier)},
        "logs": {folder.name: runs.read_log(folder / "log.jsonl") for folder in (vae, diffusion)},
    }


def asked(judge: Predictor | None, tables: dict[str, Table]) -> dict[str, Labels]:
    """Cells of held-out real and synthetic rows, of the variables that the samples were asked for and the judge reads."""
    wanted = [v for v in judge.variables if any(tables["synthetic"].column(v.name))] if judge else []
    return {name: var.encode(wanted, tables[name].rows) for name in ("heldout", "synthetic")}


def agree(judge: Predictor | None, labels: dict[str, Labels], tables: dict[str, Table],
          pixels: dict[str, Tensor]) -> list[dict]:
    """The judge on held-out real and on synthetic images, each attribute also within label."""
    rows = []
    for name, shown in (("heldout", "held-out real"), ("synthetic", "synthetic")) if judge else ():
        judged = judge.predict(pixels[name])
        read_once = SimpleNamespace(variables=judge.variables, predict=lambda _, judged=judged: judged)
        within = within_label(judge.variables, judged, labels[name], tables[name].column("label"))
        found = agreement(read_once, pixels[name], labels[name], shown)
        rows += [{**row, **within.get(row["variable"], {})} for row in found]
    return rows


def notes(tables: dict[str, Table]) -> list[str]:
    """What reading any of the tables remarked, once; that a synthetic image is a patient of its own goes without saying."""
    return list(dict.fromkeys(note for name, table in tables.items() for note in table.notes
                              if name != "synthetic" or "one image = one patient" not in note))


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
    return runs.read_json(path) if path.is_file() else None


VERBS = {"report": (Config, run_report)}

if __name__ == "__main__":
    config.main(VERBS, default="report", doc=__doc__)
