"""Are the synthetic images like real ones, as asked for, and new? One page that says so with its
numbers.

    python evaluate.py                                     the embedded demo → runs/demo/report/report.html
    python evaluate.py --data DIR --samples runs/x/samples --classifier runs/x/classifier --out runs/x/report
    python evaluate.py --extractors pixels classifier inception-clean-fid=inception.pth --out runs/x/r2
    python evaluate.py fid REAL SYNTHETIC                  FID and KID of any two folders of images
    python evaluate.py matrix --external DIR               real subsets × synthetic sets, yardsticks, controls → its page
    python evaluate.py monitor --run runs/x/diffusion      the same numbers for every checkpoint; which one to take
    python evaluate.py uncertainty --samples runs/x/samples   how far the last checkpoints disagree about each image
    python evaluate.py verify --folder runs/x/report       from the report down to the data: does all still match?
    python evaluate.py audit --data DIR --out runs/x/audit   what is wrong with a data set, before anything learns it
    python evaluate.py card --root runs/x                    model card and datasheet from the files of its runs
    python evaluate.py readers plan --good .68             how many images a study with readers needs
    python evaluate.py readers make --out runs/x/readers --key runs/x/readers-key
    python evaluate.py readers score --answers a.jsonl b.jsonl --key runs/x/readers-key/key.json

Without a classifier run there is no judge and no second space; without vae and diffusion runs there
are no curves and no membership audit; without a matrix no heat map. The page says so. Held-out are
val and test together. The same command again makes the page anew, from the same images and the
features kept in OUT/features.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import minidiff.threads  # noqa: F401  before torch, which it tells how its threads wait

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import config, runs
from minidiff import variables as var
from minidiff.classification.predictor import Predictor, grey
from minidiff.counted import VALIDATE, normal
from minidiff.data.dataset import load_pixels
from minidiff.data.duplicates import by_patient, exact_duplicates, near_duplicates
from minidiff.data.glance import glance
from minidiff.data.table import Table
from minidiff.diffusion import store
from minidiff.diffusion.generate import Recipe
from minidiff.errors import InputError
from minidiff.evaluation import monitor, uncertainty
from minidiff.evaluation import verify as chain
from minidiff.evaluation.audit import AuditConfig, run_audit
from minidiff.evaluation.cards import CardConfig, run_card
from minidiff.evaluation.features.build import build, describe
from minidiff.evaluation.features.cache import FeatureCache
from minidiff.evaluation.features.extractor import PixelPCA
from minidiff.evaluation.fid import FIDConfig, run_fid
from minidiff.evaluation.judged import agree, asked, certainty
from minidiff.evaluation.matrix.run import MatrixConfig, run_matrix
from minidiff.evaluation.metrics import breakdown
from minidiff.evaluation.metrics.comparison import FEWEST, Side, compare
from minidiff.evaluation.metrics.membership import denoising_errors, membership
from minidiff.evaluation.metrics.neighbours import memorisation, pixel_spaces
from minidiff.evaluation.pages import pictures, report
from minidiff.evaluation.readers import make, plan, score
from minidiff.evaluation.sets import Config, notes, of_these_data, read
from minidiff.pixels import to_float
from minidiff.sampling import plan as plans
from minidiff.sampling.pipeline import make_images, open_pipeline


def run_report(cfg: Config) -> None:
    """Write the report."""
    tables, pixels = read(cfg)
    named, (cfg, elsewhere, left_out) = cfg, of_these_data(cfg, tables["train"])
    tables["heldout"].notes.extend(left_out)
    print(glance(cfg.data, tables, root=cfg.root))
    found = optional(cfg, tables)
    judge = found.pop("judge")
    labels = asked(judge, tables)  # a cell that the judge does not know is refused before the work
    vae = store.load_vae(Path(cfg.vae)) if "vae" in cfg.extractors else None
    extractors = build(cfg.extractors, train=pixels["train"], judge=judge, vae=vae)
    facts = {name: table.fingerprint for name, table in tables.items()}
    judged = {"judge": runs.sha256(
        Path(cfg.classifier) / "judge" / "predictor.safetensors")} if judge else {}
    out = runs.open_run(cfg.out, named, "report", free=("device", "matrix"), **facts, **judged)
    kept = FeatureCache(out / "features")
    sides = {e.name: {name: Side(kept(e, x).double().numpy(),
                                 *(np.array(tables[name].column(c)) for c in ("label", "patient")))
                      for name, x in pixels.items()} for e in extractors}

    known, copies = neighbours(cfg, tables, pixels, sides)
    groups, how = breakdown.groups(tables), {"seed": cfg.seed}
    rows, grown, conditions = [], [], []
    for name, own in sides.items():
        rows += compare(name, **own, labels=tables["synthetic"].labels, repeats=cfg.repeats, **how)
        grown += breakdown.growth(name, **own, **how)
        conditions += breakdown.conditions(name, groups, **own, **how)
    result = {
        "data": {"folders": list(cfg.data), "size": pixels["train"].shape[-1],
                 **{f"n_{k}": len(tables[k]) for k in ("train", "heldout")},
                 **{f"{k}_patients": len(set(tables[k].column("patient")))
                    for k in ("train", "heldout")},
                 **{f"{k}_labels": counts(tables[k]) for k in ("train", "heldout")},
                 **{f"{k}_fingerprint": facts[k] for k in ("train", "heldout")},
                 "patients_assumed": tables["train"].patients_assumed, "notes": notes(tables)},
        "samples": {"folder": cfg.samples, "n": len(tables["synthetic"]),
                    "of_other_data": elsewhere,
                    "labels": counts(tables["synthetic"]), "fingerprint": facts["synthetic"]},
        "extractors": [describe(e) for e in extractors], "distances": rows, "growth": grown,
        "conditions": conditions,
        "variety": breakdown.variety(sides, pixels, tables["synthetic"].labels, **how),
        "neighbours": known, "duplicates": copies, "membership": audit(cfg, tables),
        "agreement": agree(judge, labels, tables, pixels),
        **{name: found[name] for name in ("classifier", "study", "vae")},
        "provenance": runs.provenance(), "commands": commands(cfg),
        "configs": {**found["configs"], cfg.out: runs.read_json(out / "config.json")},
    }
    first = sides["classifier" if "classifier" in sides else extractors[0].name]
    sure = certainty(judge, tables["synthetic"].column("label"), pixels["synthetic"])
    drawn = pictures.draw(tables, pixels, first, known["closest"], groups, sure, shown=cfg.shown,
                          seed=cfg.seed)
    path = report.write(out, result,
                        {**drawn, **{name: found[name] for name in ("logs", "matrix", "rebuilt")}})
    for v in runs.read_json(out / "report.json")["verdict"]:
        print(f"{v['answer']:>12}  {v['question']}")
    print(path)


def neighbours(cfg: Config, tables: dict[str, Table], pixels: dict[str, Tensor],
               sides: Mapping[str, Mapping[str, Side]]) -> tuple[dict, dict]:
    """Are there copies of training images, and is the training set free of copies itself?"""
    print("nearest neighbours")
    spaces = {name: pixel_spaces(x) for name, x in pixels.items()}
    for name, own in sides.items():
        if name != PixelPCA.name:   # the pixels themselves are there already
            spaces = {side: {**space, name: torch.from_numpy(own[side].features).float()}
                      for side, space in spaces.items()}
    columns = {c: tuple(tables[side].column(c) for side in ("train", "heldout"))
               for c in ("patient", "label")}
    found = memorisation(fake=spaces["synthetic"], train=spaces["train"], heldout=spaces["heldout"],
                         patients=columns["patient"], labels=columns["label"], seed=cfg.seed)
    near = by_patient(near_duplicates(pixels["train"]), columns["patient"][0])
    return found, {"n": len(pixels["train"]), "exact": len(exact_duplicates(pixels["train"])),
                   "near": near["pairs"],
                   "surplus": near["surplus"], "across_patients": len(near["across_patients"])}


@torch.no_grad()
def audit(cfg: Config, tables: dict[str, Table]) -> dict | None:
    """Membership audit of the diffusion run; {"why"} where it cannot be made, None where there is
    no run.

    Every image has its own conditions, its latent mean, and the same noise at the same times.
    "made" says whether this model made the samples; None where their manifest does not tell.
    """
    if not cfg.audit or not (Path(cfg.diffusion) / "model.json").is_file():
        return None
    pipeline, facts = open_pipeline(cfg.diffusion, cfg.device)
    seen, variables = set(facts.get("trained_on", ())), pipeline.conditioner.variables
    device = pipeline.vae.scale.device

    def errors(side: str) -> tuple[Tensor, list[str]]:
        table = tables[side]
        rows = [row for row in table.rows
                if (table.hashes[row["file"]] in seen) == (side == "train")]
        order = np.random.default_rng(cfg.seed).permutation(len(rows))[: cfg.audit]
        if len(order) < FEWEST:
            raise InputError(f"of the images here {len(rows)} are known as {side} images of "
                             f"{cfg.diffusion}; {FEWEST} are needed")
        rows = [rows[i] for i in order]
        labels = var.encode(variables, rows)
        x = load_pixels(replace(table, rows=rows), facts["size"])[1]
        z = torch.cat([pipeline.vae.encode(to_float(part).to(device)).mean.float()
                       for part in x.split(16)])

        def losses(index: Tensor, t: int, seed: int) -> Tensor:   # images by their number
            noise = normal(seed, [0], VALIDATE, z.shape[1:]).to(device).expand(len(index), -1, -1,
                                                                               -1)
            own = {name: cells[index].to(device) for name, cells in labels.items()}
            return pipeline.denoiser.loss(z[index], torch.full((len(index),), t), noise, own)

        return denoising_errors(losses, torch.arange(len(z))), [row["patient"] for row in rows]

    try:
        (train, known), (held, unseen) = errors("train"), errors("heldout")
        found = membership(train, held, train_patients=known, heldout_patients=unseen,
                           seed=cfg.seed)._asdict()
    except InputError as error:
        return {"why": str(error)}
    made_by = (read_json(Path(cfg.samples) / "manifest.json") or {}).get("model")
    made = made_by and made_by == runs.sha256(Path(cfg.diffusion) / "model.safetensors")
    return {**found, "run": cfg.diffusion, "made": made}


def optional(cfg: Config, tables: dict[str, Table]) -> dict:
    """What other runs have left for the page: judge, results, curves, matrix and configs; what is
    absent is printed.
    """
    classifier, vae, diffusion = (Path(f) for f in (cfg.classifier, cfg.vae, cfg.diffusion))
    expected = {classifier / "judge": "judge",
                classifier / "results.json": "results of a classifier",
                classifier / "summary.json": "summary of a study",
                vae / "vae.json": "quality of the autoencoder",
                vae / "reconstructions.png": "reconstructions",
                vae / "log.jsonl": "curve of the autoencoder",
                diffusion / "log.jsonl": "curve of the diffusion model",
                Path(cfg.matrix) / "matrix.json": "heat map of a reference matrix"}
    for path, what in expected.items():
        # what was left out is named already
        if not path.exists() and Path(os.devnull) not in path.parents:
            print(f"{path} is absent: the page has no {what}")
    grid = read_json(Path(cfg.matrix) / "matrix.json")
    both = [tables[name] for name in ("train", "heldout")]
    real = replace(both[0], rows=[row for t in both for row in t.rows],
                   hashes={**both[0].hashes, **both[1].hashes})
    if grid and not {tables["synthetic"].fingerprint,
                     real.fingerprint} <= set(grid["data"]["fingerprints"].values()):
        print(f"{cfg.matrix} is of other samples or other real images: the page does not show it")
        grid = None
    return {
        "judge": Predictor.load(classifier / "judge") if (classifier / "judge").is_dir() else None,
        "classifier": read_json(classifier / "results.json"),
        "study": read_json(classifier / "summary.json"), "vae": read_json(vae / "vae.json"),
        "matrix": grid, "rebuilt": (vae / "reconstructions.png").read_bytes()
        if (vae / "reconstructions.png").is_file() else None,
        "configs": {folder: read_json(Path(folder) / "config.json") or read_json(
            Path(folder) / "manifest.json") for folder in (cfg.vae, cfg.diffusion, cfg.samples,
                                                           cfg.classifier) if folder != os.devnull},
        "logs": {folder.name: runs.read_log(folder / "log.jsonl") for folder in (vae, diffusion)},
    }


def commands(cfg: Config) -> dict[str, str]:
    """The command behind each part of the page, as its run recorded it."""
    found = {"report": f"python {runs.provenance()['command']}"}
    for name in ("samples", "classifier", "vae", "diffusion", "matrix"):
        record = read_json(Path(getattr(cfg, name)) / "run.json") or {}
        found[name] = f"python {record['sessions'][-1]['command']}" if record.get(
            "sessions") else ""
    return found


def counts(table: Table) -> dict[str, int]:
    return dict(sorted(Counter(table.column("label")).items()))


def read_json(path: Path):
    return runs.read_json(path) if path.is_file() else None


def run_monitor(cfg: monitor.MonitorConfig) -> None:
    """Measure every checkpoint of a run, draw the curves and say which one to take."""
    pipeline, facts = store.load_pipeline(monitor.checkpoints(cfg.run)[-1].folder)
    rows = plans.plan(pipeline.conditioner.variables, facts["rows"], per_label=cfg.per_label,
                      seed=cfg.seed)
    monitor.run(cfg, rows, sampler(Recipe(steps=cfg.steps, guidance=cfg.guidance), cfg.device))


def run_uncertainty(cfg: uncertainty.UncertaintyConfig) -> None:
    """Add to each sample how far the last checkpoints disagree about it."""
    uncertainty.run(cfg, as_made(Path(cfg.samples), cfg.device))


def run_verify(cfg: chain.VerifyConfig) -> None:
    """Walk from a report to its samples, model and data by their hashes, and say what no longer
    matches.
    """
    chain.verify(cfg, lambda folder, rows: as_made(folder, cfg.device)(
        chain.root_of(folder) / runs.read_json(folder / "config.json")["run"], rows))


def as_made(folder: Path, device: str) -> monitor.Sample:
    """What makes images by the recipe of a folder of samples."""
    saved, recipe = runs.read_json(folder / "config.json"), runs.read_json(
        folder / "manifest.json")["recipe"]
    against = saved.get("against") and chain.root_of(folder) / saved["against"]
    return sampler(Recipe(**recipe), device, saved["batch"], saved.get("precision", "fp32"),
                   against)


def sampler(recipe: Recipe, device: str, batch: int = 50, precision: str = "fp32",
            against: Path | str = "") -> monitor.Sample:
    """(folder of a model, rows of a plan) → uint8 (n,3,S,S), grey where training saw grey only."""
    def sample(folder: Path, rows: Sequence[Mapping[str, str]]) -> Tensor:
        pipeline, facts = open_pipeline(folder, device, precision, against)
        with tqdm(total=len(rows) * (recipe.taken + 1), desc=f"sampling, {folder.name}",
                  unit="step", leave=False) as bar:
            made = make_images(pipeline, rows, recipe, batch=batch, progress=bar.update)
        return grey(made).expand(-1, 3, -1, -1) if facts["grey"] else made

    return sample


VERBS = {"report": (Config, run_report), "matrix": (MatrixConfig, run_matrix),
         "monitor": (monitor.MonitorConfig, run_monitor),
         "uncertainty": (uncertainty.UncertaintyConfig, run_uncertainty),
         "verify": (chain.VerifyConfig, run_verify), "audit": (AuditConfig, run_audit),
         "card": (CardConfig, run_card),
         "fid": (FIDConfig, run_fid), "readers plan": (plan.Config, plan.run),
         "readers make": (make.Config, make.run), "readers score": (score.Config, score.run)}

if __name__ == "__main__":
    config.main(VERBS, default="report", doc=__doc__)
