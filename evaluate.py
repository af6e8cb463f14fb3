"""Are the synthetic images like real ones, as asked for, and new? One page that says so in numbers.

    python evaluate.py                                     the embedded demo → runs/demo/report
    python evaluate.py --root runs/x --data DIR            your own data and the runs of a root
    python evaluate.py --extractors pixels classifier inception-clean-fid=FILE --out runs/x/r2
    python evaluate.py --judge runs/x/classifier2          an independent judge beside the own one
    python evaluate.py --reference runs/other/diffusion    membership, calibrated by a second run
    python evaluate.py --likelihood 100                    membership, by the likelihood as well
    python evaluate.py page --folder runs/x/report         its page again, from its report.json
    python evaluate.py fid REAL SYNTHETIC                  FID and KID of any two folders of images
    python evaluate.py matrix --external DIR               real subsets × synthetic sets, controls
    python evaluate.py monitor --run runs/x/diffusion      every checkpoint, and which one to take
    python evaluate.py uncertainty --samples runs/x/samples   how far the last checkpoints disagree
    python evaluate.py verify --folder runs/x/report       do samples, model and data still match?
    python evaluate.py audit --data DIR --out runs/x/audit   what is wrong with a data set
    python evaluate.py anomalies --run runs/normal/diffusion --data DIR --masks DIR/masks/opacity
    python evaluate.py explain --root runs/x               how a model works, with the code of it
    python evaluate.py card --root runs/x                  model card and datasheet from its runs
    python evaluate.py readers plan --good .68             how many images a reading study needs
    python evaluate.py readers make --out runs/x/readers --key runs/x/readers-key
    python evaluate.py readers score --answers a.jsonl b.jsonl --key runs/x/readers-key/key.json

Without a classifier run there is no judge and no second space; without vae and diffusion runs there
are no curves and no membership audit; without a matrix no heat map. The page says so. Held-out are
val and test together. The same command again makes the page anew, from the same images and the
features kept in OUT/features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import minidiff.threads  # noqa: F401  before torch, which it tells how its threads wait

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import config, runs
from minidiff import variables as var
from minidiff.data.compression import compression
from minidiff.data.dataset import glance, load_pixels
from minidiff.data.duplicates import by_patient, exact_duplicates, near_duplicates
from minidiff.data.table import Table
from minidiff.diffusion import store
from minidiff.diffusion.generate import Recipe
from minidiff.evaluation import judges, monitor, selection, sets, uncertainty
from minidiff.evaluation import verify as chain
from minidiff.evaluation.anomalies import run as anomalies
from minidiff.evaluation.audit import AuditConfig, run_audit
from minidiff.evaluation.cards import CardConfig, run_card
from minidiff.evaluation.features.build import FeatureCache, build, describe
from minidiff.evaluation.features.extractor import Extractor, PixelPCA
from minidiff.evaluation.fid import FIDConfig, run_fid
from minidiff.evaluation.matrix.run import MatrixConfig, run_matrix
from minidiff.evaluation.metrics import by_condition, realism, report_rows
from minidiff.evaluation.metrics.agreement import agree, certainty
from minidiff.evaluation.metrics.copying import memorisation
from minidiff.evaluation.metrics.membership import (
    DENOISING,
    LIKELIHOOD,
    Errors,
    audit,
    denoising_errors,
)
from minidiff.evaluation.metrics.pairwise import pixel_spaces
from minidiff.evaluation.metrics.report_rows import Side
from minidiff.evaluation.pages import pictures, report, sentence
from minidiff.evaluation.readers import make, plan, score
from minidiff.evaluation.sets import Config
from minidiff.pixels import to_grey
from minidiff.sampling import plan as plans
from minidiff.sampling.again import make_again
from minidiff.sampling.counterfactuals import Counterfactuals, losses, perplexities
from minidiff.sampling.explain import ExplainConfig
from minidiff.sampling.explain import run as run_explain
from minidiff.sampling.finished_run import make_images, open_pipeline
from minidiff.training.device import pick_device
from minidiff.training.precision import measure_exactly


def run_report(cfg: Config) -> None:
    """Write the report."""
    tables, pixels = sets.read(cfg)
    named = cfg
    cfg, elsewhere, left_out = sets.of_these_data(cfg, tables["train"])
    tables["heldout"].notes.extend(left_out)
    print(glance(cfg.data, tables, root=cfg.root))
    if cfg.reference:
        sets.check_reference(cfg.reference, tables)
    found = sets.other_runs(cfg, tables)
    panel = judges.of(cfg, tables)  # a cell that one does not know is refused before the work
    judge = panel[judges.OWN].predictor if judges.OWN in panel else None
    device = pick_device(cfg.device)
    vae = store.load_vae(Path(cfg.vae)).to(device) if "vae" in cfg.extractors else None
    extractors = build(cfg.extractors, train=pixels["train"], judge=judge, vae=vae, device=device)
    facts = {name: table.fingerprint for name, table in tables.items()}
    facts |= {"judge" if name == judges.OWN else f"{name} judge": j.facts["sha256"]
              for name, j in panel.items()}
    out = runs.open_run(cfg.out, named, "report", free=("device", "matrix"), **facts)

    shown = {name: sets.alike(table, tables["synthetic"]) for name, table in tables.items()}
    spaces = seen_by(extractors, shown, pixels, FeatureCache(out / "features"))
    copies = find_copies(cfg, tables, pixels, spaces)
    (groups, why), made = by_condition.groups(tables), tables["synthetic"]
    distances, growth, conditions = [], [], []
    for name, side in spaces.items():
        distances += report_rows.by_label(name, **side, labels=made.labels, repeats=cfg.repeats,
                                          seed=cfg.seed)
        growth += report_rows.growth(name, **side, seed=cfg.seed)
        conditions += report_rows.conditions(name, groups, why, **side, seed=cfg.seed)
    result = {
        "data": {"folders": list(cfg.data), "size": pixels["train"].shape[-1],
                 **sets.about(tables)},
        "samples": {"folder": cfg.samples, "n": len(made), "of_other_data": elsewhere,
                    "labels": sets.counts(made), "fingerprint": facts["synthetic"],
                    "files": compression(made.column("file")), **selection.of(cfg.samples)},
        "judges": [{"judge": name, **j.facts} for name, j in panel.items()],
        "extractors": [describe(e) for e in extractors],
        "distances": distances, "growth": growth, "conditions": conditions,
        "variety": report_rows.variety(spaces, pixels, made.labels, seed=cfg.seed),
        "realism": realism.measure(spaces, pixels, repeats=cfg.repeats, seed=cfg.seed),
        "neighbours": copies, "duplicates": find_duplicates(tables["train"], pixels["train"]),
        "membership": membership_audit(cfg, tables),
        "agreement": [{**row, "judge": name} for name, j in panel.items()
                      for row in agree(j.predictor, j.asked, j.unreadable, shown, pixels)],
        **{name: found[name] for name in ("classifier", "study", "vae")},
        "provenance": runs.provenance(), "commands": sets.commands(cfg),
        "configs": {**found["configs"], cfg.out: runs.read_json(out / "config.json")},
    }

    first = spaces["classifier" if "classifier" in spaces else extractors[0].name]
    sure = certainty(judge, made.column("label"), pixels["synthetic"])
    drawn = pictures.draw(shown, pixels, first, copies, groups, sure, shown=cfg.shown,
                          seed=cfg.seed)
    tell(report.write(out, result, drawn | {name: found[name]
                                            for name in ("losses", "matrix", "rebuilt")}))


def seen_by(extractors: Sequence[Extractor], tables: Mapping[str, Table],
            pixels: Mapping[str, Tensor], cached: FeatureCache) -> dict[str, dict[str, Side]]:
    """Extractor → set → its images as the extractor sees them."""
    return {e.name: {name: Side(cached(e, x).double().numpy(),
                                *(np.array(tables[name].column(c)) for c in ("label", "patient")))
                     for name, x in pixels.items()} for e in extractors}


def tell(page: Path) -> None:
    """Print the answers of a report, and what filtered its samples."""
    result = runs.read_json(page.with_name("report.json"))
    if result["samples"]["filters"]:
        print(sentence("verdicts.txt", "filtered", samples=result["samples"]))
    for v in result["verdict"]:
        print(f"{v['answer']:>12}  {v['question']}")
    print(page)


def find_copies(cfg: Config, tables: Mapping[str, Table], pixels: Mapping[str, Tensor],
                spaces: Mapping[str, Mapping[str, Side]]) -> dict:
    """Copies of training images, looked for in pixels and in the space of each extractor."""
    print("nearest neighbours")
    found = {name: pixel_spaces(x) for name, x in pixels.items()}
    for extractor, sides in spaces.items():
        if extractor != PixelPCA.name:   # the pixels themselves are there already
            for name, side in sides.items():
                found[name][extractor] = torch.from_numpy(side.features).float()
    patients, labels = (tuple(tables[name].column(column) for name in ("train", "heldout"))
                        for column in ("patient", "label"))
    return memorisation(fake=found["synthetic"], train=found["train"], heldout=found["heldout"],
                        patients=patients, labels=labels, seed=cfg.seed,
                        random_split=tables["train"].random_split)


def find_duplicates(table: Table, pixels: Tensor) -> dict:
    """How many copies the training set holds of its own images."""
    near = by_patient(near_duplicates(pixels), table.column("patient"))
    return {"n": len(pixels), "exact": len(exact_duplicates(pixels)), "near": near["pairs"],
            "surplus": near["surplus"], "across_patients": len(near["across_patients"])}


@torch.no_grad()
def membership_audit(cfg: Config, tables: Mapping[str, Table]) -> dict | None:
    """Membership audit of the diffusion run, or None where there is no run.

    "made" says whether this model made the samples; None where their manifest does not tell.
    """
    if not cfg.audit or not (Path(cfg.diffusion) / "model.json").is_file():
        return None
    facts = runs.read_json(Path(cfg.diffusion) / "model.json")
    found = audit(tables, set(facts.get("trained_on", ())), attacks_of(cfg.diffusion, cfg),
                  references=attacks_of(cfg.reference, cfg) if cfg.reference else None,
                  images={DENOISING: cfg.audit, LIKELIHOOD: cfg.likelihood}, run=cfg.diffusion,
                  seed=cfg.seed)
    made_by = runs.find_json(Path(cfg.samples) / "manifest.json", {}).get("model")
    if "why" not in found:
        found |= {"run": cfg.diffusion, "reference": cfg.reference or None,
                  "made": made_by and made_by == runs.sha256(
                      Path(cfg.diffusion) / "model.safetensors")}
    return found


def attacks_of(run: str, cfg: Config) -> dict[str, Errors]:
    """Errors of a run on the images of a table, each with its own conditions and latent mean."""
    pipeline, facts = open_pipeline(run, cfg.device, "fp32")

    def seen(table: Table) -> tuple[Tensor, var.Labels]:
        return (pipeline.encode(load_pixels(table, facts["size"])[1]),
                var.encode(pipeline.conditioner.variables, table.rows))

    return {DENOISING: lambda table: denoising_errors(losses(pipeline, *seen(table)),
                                                      torch.arange(len(table))),
            LIKELIHOOD: lambda table: perplexities(pipeline, *seen(table), cfg.seed)}


def run_monitor(cfg: monitor.MonitorConfig) -> None:
    """Measure every checkpoint of a run, draw the curves and say which one to take."""
    pipeline, facts = store.load_pipeline(monitor.checkpoints(cfg.run)[-1].folder)
    rows = plans.plan(pipeline.conditioner.variables, facts["rows"], per_label=cfg.per_label,
                      seed=cfg.seed)
    monitor.run(cfg, rows, sampler(Recipe(steps=cfg.steps, guidance=cfg.guidance), cfg.device))


def run_anomalies(cfg: anomalies.AnomaliesConfig) -> None:
    """Where do images differ from what a model of normal images makes of them?"""
    anomalies.run(cfg, Counterfactuals)


def run_uncertainty(cfg: uncertainty.UncertaintyConfig) -> None:
    """Add to each sample how far the last checkpoints disagree about it."""
    uncertainty.run(cfg, as_made(Path(cfg.samples), cfg.device))


def run_verify(cfg: chain.VerifyConfig) -> None:
    """Check a report, its samples, model and data by their hashes, and say what does not match."""
    chain.verify(cfg, make_again)


def as_made(folder: Path, device: str) -> monitor.Sample:
    """What makes images by the recipe of a folder of samples."""
    saved = runs.read_json(folder / "config.json")
    recipe = runs.read_json(folder / "manifest.json")["recipe"]
    against = saved.get("against") and chain.root_of(folder) / saved["against"]
    return sampler(Recipe(**recipe), device, saved["batch"], saved.get("precision", "fp32"),
                   against)


def sampler(recipe: Recipe, device: str, batch: int = 50, precision: str = "auto",
            against: Path | str = "") -> monitor.Sample:
    """(folder of a model, rows of a plan) → uint8 (n,3,S,S), grey where training saw grey only."""
    def sample(folder: Path, rows: Sequence[Mapping[str, str]]) -> Tensor:
        pipeline, facts = open_pipeline(folder, device, precision, against)
        with tqdm(total=len(rows) * (recipe.taken + 1), desc=f"sampling, {folder.name}",
                  unit="step", leave=False) as bar:
            made = make_images(pipeline, rows, recipe, batch=min(batch, len(rows)),
                               progress=bar.update)
        measure_exactly()
        return to_grey(made).expand(-1, 3, -1, -1) if facts["grey"] else made

    return sample


VERBS = {"report": (Config, run_report), "page": (report.PageConfig, report.run_page),
         "matrix": (MatrixConfig, run_matrix),
         "monitor": (monitor.MonitorConfig, run_monitor),
         "uncertainty": (uncertainty.UncertaintyConfig, run_uncertainty),
         "verify": (chain.VerifyConfig, run_verify), "audit": (AuditConfig, run_audit),
         "anomalies": (anomalies.AnomaliesConfig, run_anomalies),
         "explain": (ExplainConfig, run_explain), "card": (CardConfig, run_card),
         "fid": (FIDConfig, run_fid), "readers plan": (plan.Config, plan.run),
         "readers make": (make.Config, make.run), "readers score": (score.Config, score.run)}

if __name__ == "__main__":
    measure_exactly()
    config.main(VERBS, default="report", doc=__doc__)
