"""Did synthetic images help? Train the same classifier on real, real + duplicated and real + synthetic images.

    python classify.py                                     the embedded demo → runs/demo/classifier
    python classify.py --data DIR --synthetic runs/x/samples --external DIR2 --size 128 --steps 600 --out runs/x/classifier
    python classify.py --data DIR --arms real --out runs/x/baseline          no synthetic images needed

Finished (arm, seed) pairs are kept: to resume, or to add --arms or --seeds, run the command again with the same --out.
Out come arms/ (test probabilities), results.json, summary.json, and judge/: a predictor of label and conditions trained
on real training patients only, with which evaluate.py asks whether samples show what they were asked to show.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from minidiff import config, runs
from minidiff import variables as var
from minidiff.classification import study
from minidiff.classification.agreement import agreement
from minidiff.classification.predictor import Predictor, fit
from minidiff.data.audit import check_pictures
from minidiff.data.dataset import load_pixels
from minidiff.data.split import SPLITS, check_leakage, check_unseen, trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.training.precision import pick_device

FREE = ("arms", "seeds", "device")  # knobs that do not change what is finished


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...] = ("runs/demo/phantom",)  # real data sets, with their splits: trained on train, tested on test
    synthetic: str = "runs/demo/samples"   # folder of samples, of the same form as a data set
    external: tuple[str, ...] = ()         # further test sets, each used whole; patients or files of training are refused
    out: str = "runs/demo/classifier"      # run folder
    arms: tuple[str, ...] = ("real", "real+duplicates", "real+synthetic")  # these or also "synthetic"
    condition: tuple[str, ...] = ("label", "sex", "age", "view")  # what the judge reads off an image
    size: int = 64                         # side to which all images are brought, px
    width: int = 16                        # channels of the first layer; resnet18 has 64
    steps: int = 120                       # optimiser steps, the same for every arm
    batch: int = 64                        # images a step
    lr: float = 4e-3                       # AdamW peak; 20 % warm-up, then cosine
    seeds: int = 2                         # classifiers an arm; 5 or more for a result to be published
    seed: int = 0                          # the first of them; also of the patient split where the data bring none
    skip_bad: bool = False                 # leave unreadable images out, listed and counted, instead of refusing
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def run_study(cfg: Config) -> None:
    """Compare the arms on held-out patients, after training the judge."""
    check(cfg)
    tables, pixels = read(cfg)
    train = tables["train"]
    tests = {name: table for name, table in tables.items() if name not in ("train", "synthetic")}
    study.check_labels({name: table.column("label") for name, table in tables.items()})
    label = var.Category("label", tuple(train.labels))
    sets = {name: study.Images(pixels[name], var.encode([label], table.rows)["label"], table.column("patient"))
            for name, table in tables.items()}
    variables = [label] + [var.infer(name, train.column(name)) for name in cfg.condition if name != "label"]
    truth = var.encode(variables, train.rows), var.encode(variables, tests["test"].rows)
    prints = {name: table.fingerprint for name, table in (("train", train), *tests.items())}
    out = runs.open_run(cfg.out, cfg, "classifier", free=FREE, data=prints)

    judge = train_judge(cfg, out / "judge", variables, (pixels["train"], pixels["test"]), truth,
                        [train.hashes[file] for file in train.column("file")])
    held_out = {name: sets[name] for name in tests}
    results, by_seed = [], {name: {} for name in tests}
    for arm in cfg.arms:
        found = []
        for seed in range(cfg.seed, cfg.seed + cfg.seeds):
            images = study.training_set(arm, sets["train"], sets.get("synthetic"), classes=len(label.values), seed=seed)
            found.append(study.train_arm(out / "arms", arm, seed, images, held_out, label, size=cfg.size, width=cfg.width,
                                         steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, device=pick_device(cfg.device),
                                         progress=f"{arm}, seed {seed}"))
        for name, test in held_out.items():
            probabilities = [np.array(f["probabilities"][name]) for f in found]
            by_seed[name][arm] = probabilities
            results += [{"arm": arm, "seed": f["seed"], "test_set": name, "n_train": f["n_train"],
                         **study.score(p, test, label.values)} for f, p in zip(found, probabilities)]
    summary = {
        "labels": list(label.values),
        "images": {name: Counter(table.column("label")) for name, table in tables.items()},
        "patients_assumed": any(table.patients_assumed for name, table in tables.items() if name != "synthetic"),
        "notes": list(dict.fromkeys(note for table in tables.values() for note in table.notes)),
        "arms": study.summarise(results),
        "differences": {name: study.differences(by_seed[name], test) for name, test in held_out.items()},
        "judge": judge,
    }
    runs.write_json(out / "results.json", results)
    runs.write_json(out / "summary.json", summary)
    print(report(summary))


def check(cfg: Config) -> None:
    """What can be refused before anything is read."""
    unknown = [arm for arm in cfg.arms if arm not in study.ARMS]
    if unknown or not cfg.arms:
        raise InputError(f"arms {', '.join(unknown) or 'none'}; allowed are {', '.join(study.ARMS)}")
    if len(set(cfg.arms)) < len(cfg.arms):
        raise InputError(f"arms {', '.join(cfg.arms)}: name each of them once")
    var.check_names(cfg.condition)
    for name, least in {"size": 1, "width": 1, "steps": 1, "batch": 2, "seeds": 1}.items():  # one image has no batch norm
        if getattr(cfg, name) < least:
            raise InputError(f"{name} is {getattr(cfg, name)}; allowed are {least} and more")
    if needs_synthetic(cfg) and not Path(cfg.synthetic).is_dir():
        raise InputError(f"{cfg.synthetic}: no such folder of samples; run sample.py first, or ask for --arms real")


def needs_synthetic(cfg: Config) -> bool:
    return any(study.ARMS[arm][1] for arm in cfg.arms)


def read(cfg: Config) -> tuple[dict[str, Table], dict[str, torch.Tensor]]:
    """Tables and pixels by name: train, test, each external set by its folder, and synthetic."""
    real = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.out).parent)
    real.select(split=SPLITS).require("train", "test")
    tables = {name: real.select(split=name) for name in ("train", "test")}
    for folder in cfg.external:
        name = Path(folder).resolve().name
        if name in ("train", "test", "synthetic") or name in tables:
            raise InputError(f"--external {folder}: a set named {name!r} is there already; rename its folder")
        tables[name] = read_external(folder)
        rows = [{**row, "split": name} for row in tables[name].rows]
        check_leakage([*tables["train"].rows, *rows], {**real.hashes, **tables[name].hashes})
    if needs_synthetic(cfg):
        hashes = {file: digest for table in (real, *tables.values()) for file, digest in table.hashes.items()}
        held_out = [row for name, table in tables.items() if name != "train" for row in table.rows]
        tables["synthetic"] = read_synthetic(cfg.synthetic, held_out, hashes)
    loaded = {name: load_pixels(table, cfg.size, skip_bad=cfg.skip_bad) for name, table in tables.items()}
    real_sets = [name for name in loaded if name != "synthetic"]
    check_pictures([{**row, "split": name} for name in real_sets for row in loaded[name][0].rows],
                   (picture for name in real_sets for picture in loaded[name][1]))
    kept = [row for name in ("train", "test") for row in loaded[name][0].rows]  # --skip-bad may have taken a label away
    Table(kept).require("train", "test")
    return {name: table for name, (table, _) in loaded.items()}, {name: pixels for name, (_, pixels) in loaded.items()}


def read_external(folder: str) -> Table:
    """A further test set; its assumed patients are told apart from those of a training folder that has the same name."""
    table, prefix = read_table(folder, split=False), os.path.basename(os.path.abspath(folder))
    rows = [{**row, "patient": f"external {row['patient']}"} if row["patient"] == f"{prefix}/{row['file_name']}" else row
            for row in table.rows]
    return replace(table, rows=rows)


def read_synthetic(folder: str, held_out: list[dict[str, str]], hashes: dict[str, str]) -> Table:
    """Samples; refused if one is a copy of a real file, or if the generator was trained on a held-out image.

    `held_out` are the rows of all test sets, `hashes` (file → sha256) those of all real files, whatever their split.
    """
    table, real = read_table(folder, split=False), set(hashes.values())
    copies = [file for file in table.column("file") if table.hashes[file] in real]
    if copies:
        raise InputError(f"{folder}: {len(copies)} of {len(table)} files are real images of --data or --external, not "
                         f"synthetic ones, e.g. {copies[0]}")
    seen = trained_on(folder)
    if seen is None:
        return replace(table, notes=[*table.notes, f"{folder} does not say what its generator was trained on: it is unknown "
                                                   "whether test images were among it"])
    check_unseen(held_out, hashes, seen, "the generator")
    return table


def train_judge(cfg: Config, folder: Path, variables: list[var.Variable], pixels: tuple[torch.Tensor, torch.Tensor],
                labels: tuple[var.Labels, var.Labels], files: list[str]) -> list[dict]:
    """Train and save the judge on the first of `pixels` and `labels`, or read a finished one; agreement with the second.

    `files`, the sha256 of its training files, are kept beside it: no image that it is asked to judge should be among them.
    """
    runs.write_json(folder / "trained_on.json", sorted(set(files)))
    if (folder / "agreement.json").exists():
        return runs.read_json(folder / "agreement.json")
    judge = Predictor(variables, width=cfg.width, size=cfg.size, seed=cfg.seed).to(pick_device(cfg.device))
    log = fit(judge, pixels[0], labels[0], steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, seed=cfg.seed, progress="judge")
    found = agreement(judge, pixels[1], labels[1], "held-out real")
    judge.save(folder)
    runs.write_json(folder / "log.json", log)
    runs.write_json(folder / "agreement.json", found)  # last: its presence says that the judge is finished
    return found


def report(summary: dict) -> str:
    """summary.json as text: a table for each test set, then the differences."""
    lines = ["judge on held-out patients: " + ", ".join(
        f"{a['variable']} {percent(a['accuracy'])}" if "accuracy" in a else f"{a['variable']} r = {number(a.get('r'))}"
        for a in summary["judge"])]
    for name, differences in summary["differences"].items():
        counts = summary["images"][name]
        lines += ["", f"{name}: {sum(counts.values())} images ({', '.join(f'{n} {k}' for k, n in sorted(counts.items()))})",
                  f"  {'arm':<16}{'trained on':>11}{'accuracy ± SD':>18}{'balanced':>10}{'AUROC':>8}"]
        for row in summary["arms"]:
            if row["test_set"] == name:
                spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.1f}"
                lines.append(f"  {row['arm']:<16}{row['n_train']:>11}{percent(row['accuracy']) + spread:>18}"
                             f"{percent(row['balanced_accuracy']):>10}{number(row['auroc_macro']):>8}")
        for d in differences:
            if d["metric"] == "balanced_accuracy" and d["interval"][0] is not None:
                low, high = (100 * x for x in d["interval"])
                lines.append(f"  {d['arm']} − {d['against']}: balanced accuracy {100 * d['difference']:+.1f} points "
                             f"({low:+.1f} to {high:+.1f}; of this sign with {d['seeds_agree']} of {d['seeds']} seeds), "
                             f"{'resolved' if d['resolved'] else 'not resolved'}")
    notes = [textwrap.shorten(f"note: {note}", 240, placeholder=" …") for note in summary["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3f}"


VERBS = {"study": (Config, run_study)}

if __name__ == "__main__":
    config.main(VERBS, default="study", doc=__doc__)
