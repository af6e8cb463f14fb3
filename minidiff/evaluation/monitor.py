"""How good and how new are a run's images as training goes on, and which checkpoint is to be taken?

Every checkpoint makes the same images, of the same seeds and conditions, and is measured like a
finished set:

    quality   KD to held-out images of the same mix of labels, its interval, and the floor of real
              against real
    copying   near share and ratio q to training images, beside held-out images; the gap of the
              denoising losses (log.jsonl)

The rule: of the checkpoints with no sign of copying, the one of the lowest KD in the first space
that is in no space resolved to be worse than the best one there. Two checkpoints are compared by
the bootstrap of their difference, in which both meet the same held-out patients and give up the
same seeds: far narrower than two intervals side by side. Where it holds 0 for any other candidate,
the choice is not resolved.

Sampling takes a diffusion model and comes in as a callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff.data import images
from minidiff.data.dataset import Images, read_images
from minidiff.data.split import Row, check_unseen
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import Extractor, PixelPCA, PredictorFeatures
from minidiff.evaluation.metrics.comparison import Side, joined
from minidiff.evaluation.metrics.copying import FEWEST, memorisation
from minidiff.evaluation.metrics.distances import finite_percentile, floor, kid, kid_draws, same_mix
from minidiff.evaluation.metrics.pairwise import pixel_spaces
from minidiff.evaluation.pages import charts as figures
from minidiff.evaluation.pages.format import jsonable, num, percent, span
from minidiff.evaluation.sets import judge_of
from minidiff.root import Rooted

Sample = Callable[[Path, Sequence[Row]], Tensor]  # folder of a model, rows → uint8 (n,3,S,S)


@dataclass(frozen=True)
class MonitorConfig(Rooted):
    data_of_root: ClassVar[bool] = False
    run: str = "ROOT/diffusion"               # diffusion run with its snapshots/
    data: tuple[str, ...] = ()                # real data sets; none: those the run was trained on
    classifier: str = "ROOT/classifier"       # its judge/ is the second space; may be absent
    out: str = "ROOT/monitor"                 # monitor.json, monitor.png and seeds.png
    per_label: int = 40                       # images a label, made by each checkpoint from the same seeds
    steps: int = 12                           # steps of the sampler
    guidance: float = 1.5                     # as in sample.py
    repeats: int = 100                        # draws behind each floor
    seed: int = 0                             # of the first image, the draw of conditions, and resamples
    skip_bad: bool = False                    # leave unreadable images out, listed and counted, instead of refusing
    device: str = "auto"                      # auto, cpu, cuda, cuda:1 …


class Checkpoint(NamedTuple):
    step: int
    folder: Path


def checkpoints(run: str | Path) -> list[Checkpoint]:
    """The models that a diffusion run has kept, by step: snapshots/, best/ and the finished one;
    each step once.
    """
    run, found = Path(run), {}
    for folder in (run / "best", *sorted(run.glob("snapshots/*")), run):
        if (folder / "model.json").is_file():
            step = runs.read_json(folder / "model.json").get("step")
            found[runs.read_json(run / "config.json")["steps"] if step is None else step] = folder
    if not found:
        raise InputError(f"{run} holds no model: neither model.json nor best/ nor snapshots/")
    return [Checkpoint(step, folder) for step, folder in sorted(found.items())]


def run(cfg: MonitorConfig, rows: Sequence[Row], sample: Sample) -> dict:
    """Measure every checkpoint of a run on these rows; writes monitor.json, monitor.png and
    seeds.png.
    """
    points = checkpoints(cfg.run)
    if len(points) < 2:
        raise InputError(f"{cfg.run} has kept 1 model, step {points[0].step}: train with "
                         "--snapshots 9 to have a curve")
    train, heldout = read(cfg.run, cfg.data, cfg.skip_bad)
    judge = judge_of(cfg.classifier, train.table)
    extractors = [PixelPCA().fit(train.pixels)] + ([PredictorFeatures(judge)] if judge else [])
    hashes = {str(p.step): runs.sha256(p.folder / "model.safetensors") for p in points}
    facts = {"data": heldout.table.fingerprint, "models": hashes}
    out = runs.open_run(cfg.out, cfg, "monitor", free=("device",), **facts)
    log = runs.read_log(Path(cfg.run) / "log.jsonl")
    made = {p: sample(p.folder, rows) for p in points}
    result = measure(made, [row["label"] for row in rows], train, heldout, extractors, log,
                     cfg.repeats, cfg.seed)
    result |= {"run": cfg.run, "models": hashes, "provenance": runs.provenance()}
    runs.write_json(out / "monitor.json", jsonable(result))
    runs.write_atomic(out / "monitor.png", figures.course_chart(result, log))
    some = np.linspace(0, len(rows) - 1, min(10, len(rows))).astype(int)
    sheet = torch.stack([x[some] for x in made.values()])
    images.write(out / "seeds.png", images.grid(sheet.flatten(0, 1), columns=len(some)))
    print(table(result))
    print(f"{out}: {result['choice']['text']}")
    return result


def read(run: str | Path, data: Sequence[str], skip_bad: bool) -> tuple[Images, Images]:
    """Training and held-out images as the run knows them; InputError where it was trained on a
    held-out one.
    """
    trained, facts = runs.read_json(Path(run) / "config.json"), runs.read_json(
        checkpoints(run)[-1].folder / "model.json")
    real = read_images(data or trained["data"], facts["size"], seed=trained["seed"],
                       split_dir=Path(run).parent, skip_bad=skip_bad)
    train, heldout = real.part("train"), real.part("val", "test")
    check_unseen(heldout.table.rows, heldout.table.hashes, set(facts.get("trained_on", ())),
                 str(run))
    return train, heldout


def measure(made: dict[Checkpoint, Tensor], labels: Sequence[str], train: Images, heldout: Images,
            extractors: Sequence[Extractor], log: Sequence[dict], repeats: int = 100,
            seed: int = 0) -> dict:
    """Numbers of each checkpoint's images, uint8 (n,3,S,S) of these labels, and the choice among
    the checkpoints.

    InputError where there are fewer than 20 images on a side.
    """
    rows = {name: same_mix(side.table.column("label"), labels, seed)
            for name, side in (("train", train), ("held", heldout))}
    if min(len(labels), *map(len, rows.values())) < FEWEST:
        raise InputError(f"{len(labels)} images of each checkpoint, {len(rows['train'])} training "
                         f"and {len(rows['held'])} held-out images of the same mix of labels: each "
                         f"side needs {FEWEST}")
    real = {name: [Side(e(side.pixels[rows[name]]).double().numpy(),
                        np.array(side.table.column("label"))[rows[name]],
                        np.array(side.table.column("patient"))[rows[name]]) for e in extractors]
            for name, side in (("train", train), ("held", heldout))}
    pools = [joined(train, held) for train, held in zip(*real.values())]
    floors = [floor(kid, real=pool.features, patients=pool.patients, n=len(rows["held"]),
                    m=len(labels), repeats=repeats, seed=seed)._asdict() for pool in pools]
    spaces = {name: _spaces(side.pixels[rows[name]] if name == "held" else side.pixels,
                            extractors[1:]) for name, side in (("train", train), ("held", heldout))}
    points, draws = [], {e.name: [] for e in extractors}
    for point, pixels in tqdm(made.items(), desc="checkpoints", leave=False):
        found = {"step": point.step, "folder": str(point.folder), "n": len(rows["held"]),
                 "m": len(pixels), "KD": {}}
        for extractor, held in zip(extractors, real["held"]):
            both = {"real": held.features, "fake": extractor(pixels).double().numpy(),
                    "real_patients": held.patients}
            draws[extractor.name].append(kid_draws(**both, seed=seed))
            low, high = finite_percentile(draws[extractor.name][-1])
            found["KD"][extractor.name] = {"value": kid(**both), "low": low, "high": high}
        found["copying"] = memorisation(fake=_spaces(pixels, extractors[1:]), train=spaces["train"],
                                        heldout=spaces["held"], seed=seed)
        logged = next((line for line in log
                       if line["step"] == point.step and line.get("val_loss") is not None), {})
        found["loss"] = {name: logged.get(name) for name in ("val_loss", "gap", "gap_low")}
        points.append(found)
    return {"points": points, "floors": {e.name: f for e, f in zip(extractors, floors)},
            "choice": choose(points, draws)}


def choose(points: Sequence[dict], draws: dict[str, Sequence[np.ndarray]]) -> dict:
    """The rule of this module's head: {"step", "resolved", "alike", "text"}; step is None where
    nothing can be taken.

    points: dicts with step, KD {space: {"value"}} and copying {"suspected"}. draws: space → one
    array of bootstrap draws of KD a point, paired draw by draw.
    """
    clean = [i for i, p in enumerate(points) if p["copying"]["suspected"] is False]
    if not clean:
        return {"step": None, "resolved": False, "alike": [],
                "text": "take none: at no checkpoint is copying excluded"}
    candidates, value = set(clean), lambda i, space: points[i]["KD"][space]["value"]
    for space, drawn in draws.items():
        best = min(clean, key=lambda i: value(i, space))
        candidates &= {i for i in clean
                       if i == best or finite_percentile(drawn[i] - drawn[best])[0] <= 0}
    first = next(iter(draws))
    if not candidates:
        return {"step": None, "resolved": False, "alike": [], "text": "not resolved: the spaces "
                "disagree, and what is best in one is worse in another"}
    taken = min(candidates, key=lambda i: (value(i, first), points[i]["step"]))
    alike = [points[i]["step"] for i in sorted(candidates - {taken})]
    step, left_out = points[taken]["step"], len(points) - len(clean)
    text = (f"take step {step}, of the lowest KD in {first} ({num(value(taken, first))}) among "
            f"{len(clean)} checkpoints without sign of "
            f"copying" + (f"; left out for theirs: {left_out}" if left_out else ""))
    if alike:
        text += f". Not resolved: {', '.join(map(str, alike))} may be as good"
    return {"step": step, "resolved": not alike, "alike": alike, "text": text}


def table(result: dict) -> str:
    """The numbers as lines of text."""
    lines = [f"{'step':>8}  " + "  ".join(f"{'KD, ' + name:<30}" for name in result["floors"])
             + "  near train / held-out  q     gap    copying"]
    for p in result["points"]:
        kds = "  ".join(f"{num(k['value']) + ' (' + span(k['low'], k['high']) + ')':<30}"
                        for k in p["KD"].values())
        s, gap = p["copying"]["spaces"][0], p["loss"]["gap"]
        lines.append(f"{p['step']:>8}  {kds}  {percent(s['near_share']):>10} / "
                     f"{percent(s['near_heldout_share']):<9}  {s['q50']:.2f}  {percent(gap):>6}  "
                     f"{p['copying']['verdict']}")
    floors = "  ".join(f"{num(f['median']) + ' (' + span(f['low'], f['high']) + ')':<30}"
                       for f in result["floors"].values())
    return "\n".join([*lines, f"{'floor':>8}  {floors}"])


def _spaces(pixels: Tensor, extractors: Sequence[Extractor]) -> dict[str, Tensor]:
    return {**pixel_spaces(pixels), **{e.name: e(pixels) for e in extractors}}
