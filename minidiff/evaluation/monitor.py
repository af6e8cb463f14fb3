"""How good and how new are a run's images as training proceeds, and which checkpoint to take?

Every checkpoint makes the same images, of the same seeds and conditions, and is measured like a
finished set:

    quality   KD to validation images of the same mix of labels, its interval, and the floor of real
              against real
    copying   near share and ratio q to training images, beside validation images; the gap of the
              denoising losses (log.jsonl)

The rule: of the checkpoints with no sign of copying, the one of the lowest KD in the first space
that is not resolved to be worse than the best one in any space. Two checkpoints are compared by
the bootstrap of their difference, in which both meet the same validation patients and give up the
same seeds: far narrower than two intervals side by side. Where it holds 0 for any other candidate,
the choice is not resolved.

The lowest of several KDs is low partly by luck. So the checkpoint taken makes new images, from
other seeds, and these are measured against test images: neither had a part in the choice.

Sampling takes a diffusion model and comes in as a callable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff.data import images
from minidiff.data.dataset import Images, read_images
from minidiff.data.split import Row
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import Extractor, PixelPCA, PredictorFeatures
from minidiff.evaluation.format import Table, jsonable, num, percent, span
from minidiff.evaluation.metrics.copying import FEWEST, memorisation
from minidiff.evaluation.metrics.distances import kd_with_interval, kid, matched, same_mix
from minidiff.evaluation.metrics.pairwise import pixel_spaces
from minidiff.evaluation.metrics.report_rows import Side, between, joined
from minidiff.evaluation.pages import charts as figures
from minidiff.evaluation.sets import check_origin, judge_of
from minidiff.root import Reading, Rooted, reading_of
from minidiff.statistics import finite_percentile

Sample = Callable[[Path, Sequence[Row]], Tensor]  # folder of a model, rows → uint8 (n,3,S,S)


@dataclass(frozen=True)
class MonitorConfig(Reading, Rooted):
    data_of_root: ClassVar[bool] = False
    run: str = "ROOT/diffusion"          # diffusion run with its snapshots/
    data: tuple[str, ...] = ()           # real data sets; none: those the run was trained on
    classifier: str = "ROOT/classifier"  # its judge/ is the second space; may be absent
    out: str = "ROOT/monitor"            # monitor.json, monitor.png and seeds.png
    per_label: int = 40                  # images a label, from the same seeds for each checkpoint
    steps: int = 12                      # steps of the sampler
    guidance: float = 1.5                # as in sample.py
    repeats: int = 100                   # draws behind each floor
    seed: int = 0                        # of the first image, the draw of conditions, and resamples
    skip_bad: bool = False               # leave unreadable images out, listed and counted
    device: str = "auto"                 # auto, cpu, cuda, cuda:1 …


class Checkpoint(NamedTuple):
    step: int
    folder: Path


def checkpoints(run: str | Path) -> list[Checkpoint]:
    """The models kept by a run, each step once: snapshots/, best/ and the finished one."""
    run, found = Path(run), {}
    for folder in (run / "best", *sorted(run.glob("snapshots/*")), run):
        if (folder / "model.json").is_file():
            step = runs.read_json(folder / "model.json").get("step")
            found[runs.read_json(run / "config.json")["steps"] if step is None else step] = folder
    if not found:
        raise InputError(f"{run} holds no model: neither model.json nor best/ nor snapshots/")
    return [Checkpoint(step, folder) for step, folder in sorted(found.items())]


def run(cfg: MonitorConfig, rows: Sequence[Row], sample: Sample) -> dict:
    """Measure every checkpoint of a run on these rows, draw the curves, and choose one."""
    points = checkpoints(cfg.run)
    if len(points) < 2:
        raise InputError(f"{cfg.run} has kept 1 model, step {points[0].step}: train with "
                         "--snapshots 9 to have a curve")
    real = read(cfg.run, cfg)
    train, val, test = (real.part(split) for split in ("train", "val", "test"))
    judge = judge_of(cfg.classifier, train.table, cfg.device)
    extractors = [PixelPCA().fit(train.pixels)] + ([PredictorFeatures(judge)] if judge else [])
    hashes = {str(p.step): runs.sha256(p.folder / "model.safetensors") for p in points}
    out = runs.open_run(cfg.out, cfg, "monitor", free=("device",), models=hashes,
                        data=val.table.fingerprint, test=test.table.fingerprint)
    log = runs.read_log(Path(cfg.run) / "log.jsonl")
    made, labels = {p: sample(p.folder, rows) for p in points}, [row["label"] for row in rows]
    result = measure(made, labels, train, val, extractors, log, cfg.repeats, cfg.seed)
    other = [{**row, "seed": str(int(row["seed"]) + len(rows))} for row in rows]
    result["test"] = tested(
        next((p for p in points if p.step == result["choice"]["step"]), None), labels,
        lambda point: sample(point.folder, other), train, test, extractors, log, cfg.repeats,
        cfg.seed)
    result |= {"run": cfg.run, "models": hashes, "provenance": runs.provenance()}
    runs.write_json(out / "monitor.json", jsonable(result))
    runs.write_atomic(out / "monitor.png", figures.course_chart(result, log))
    some = np.linspace(0, len(rows) - 1, min(10, len(rows))).astype(int)
    sheet = torch.cat([x[some] for x in made.values()])
    images.write(out / "seeds.png", images.grid(sheet, columns=len(some)), quick=True)
    print(table(result).text())
    print(f"{out}: {result['choice']['text']}. {said(result['test'])}")
    return result


def read(run: str | Path, cfg: Any) -> Images:
    """The images of a run, split as it split them; InputError if it was trained on val or test."""
    config = runs.read_json(Path(run) / "config.json")
    facts = runs.read_json(checkpoints(run)[-1].folder / "model.json")
    real = read_images(cfg.data or config["data"], facts["size"],
                       cfg if cfg.data else reading_of(config), seed=config["seed"],
                       split_dir=Path(run).parent, skip_bad=cfg.skip_bad)
    check_origin(real.part("val", "test").table, {str(run): set(facts.get("trained_on", ()))})
    return real


def measure(made: dict[Checkpoint, Tensor], labels: Sequence[str], train: Images, heldout: Images,
            extractors: Sequence[Extractor], log: Sequence[dict], repeats: int = 100,
            seed: int = 0) -> dict:
    """Numbers of each checkpoint's images, uint8 (n,3,S,S) of these labels, and the choice.

    InputError where there are fewer than 20 images on a side.
    """
    known, unseen, own = sides(labels, train, heldout, seed)
    held, floors, draws = {}, {}, {e.name: [] for e in extractors}
    for e in extractors:
        held[e.name] = _side(e, heldout, unseen)
        pool = joined(_side(e, train, known), held[e.name])
        floors[e.name] = pool.floor(kid, len(unseen), len(own), repeats, seed)
    if not all(floors.values()):
        raise InputError(f"{len(known) + len(unseen)} real images are of too few patients to "
                         "compare real with real")
    near = {"train": pixel_spaces(train.pixels, *extractors[1:]),
            "heldout": pixel_spaces(heldout.pixels[unseen], *extractors[1:]),
            "patients": (train.table.column("patient"),
                         np.array(heldout.table.column("patient"))[unseen].tolist()),
            "random_split": train.table.random_split}
    points, names = [], np.array(labels)
    for point, pixels in tqdm(made.items(), desc="checkpoints", leave=False):
        distances = {}
        for e in extractors:
            fake = Side(e(pixels).double().numpy(), names, np.arange(len(pixels))).take(own)
            kd, drawn = kd_with_interval(**between(held[e.name], fake), seed=seed)
            draws[e.name].append(drawn)
            distances[e.name] = dict(zip(("value", "low", "high"), kd.values()))
        copying = memorisation(fake=pixel_spaces(pixels, *extractors[1:]), **near, seed=seed)
        logged = next((line for line in log
                       if line["step"] == point.step and line.get("val_loss") is not None), {})
        points.append({"step": point.step, "folder": str(point.folder), "n": len(unseen),
                       "m": len(own), "KD": distances, "copying": copying,
                       "loss": {name: logged.get(name) for name in ("val_loss", "gap", "gap_low")}})
    return {"points": points, "floors": floors, "choice": choose(points, draws)}


def sides(labels: Sequence[str], train: Images, heldout: Images,
          seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of training images, held-out images and images of a checkpoint in one mix of labels;
    InputError where they are few."""
    held = heldout.table.column("label")
    unseen, own = matched(held, labels, seed)
    known = same_mix(train.table.column("label"), [held[i] for i in unseen], seed)
    if min(len(own), len(known), len(unseen)) < FEWEST:
        split = " and ".join(dict.fromkeys(heldout.table.column("split"))) or "held-out"
        raise InputError(f"{len(own)} images of each checkpoint, {len(known)} training and "
                         f"{len(unseen)} {split} images of the same mix of labels: each side "
                         f"needs {FEWEST}")
    return known, unseen, own


def tested(point: Checkpoint | None, labels: Sequence[str], make: Callable[[Checkpoint], Tensor],
           train: Images, test: Images, *how) -> dict:
    """The checkpoint taken, by images that had no part in the choice: its point and floors.

    `make`: its images of these labels, from other seeds. {"why"} where it cannot be tested.
    """
    if not point:
        return {"why": "no checkpoint was taken"}
    try:
        sides(labels, train, test, 0)
        found = measure({point: make(point)}, labels, train, test, *how)
    except InputError as error:
        return {"why": str(error)}
    return {**found["points"][0], "floors": found["floors"]}


def said(test: dict) -> str:
    """What `tested` found, in a sentence."""
    if "why" in test:
        return f"Not tested: {test['why']}"
    (name, kd), *_ = test["KD"].items()
    return (f"On {test['n']} test images, which had no part in the choice, and {test['m']} images "
            f"of other seeds, its KD in {name} is {num(kd['value'])} "
            f"({span(kd['low'], kd['high'])}); {test['copying']['verdict']}")


def choose(points: Sequence[dict], draws: dict[str, Sequence[np.ndarray]]) -> dict:
    """The rule of this module's head: {"step", "resolved", "alike", "text"}; step None for none.

    points: dicts with step, KD {space: {"value"}} and copying {"suspected"}. draws: space → one
    array of bootstrap draws of KD a point, paired draw by draw.
    """
    clean = [i for i, p in enumerate(points) if p["copying"]["suspected"] is False]
    candidates, first = set(clean), next(iter(draws))

    def by_kd(i: int, space: str = first) -> tuple:
        return points[i]["KD"][space]["value"], points[i]["step"]

    for space, drawn in draws.items() if clean else ():
        best = min(clean, key=lambda i: by_kd(i, space))
        candidates &= {i for i in clean
                       if i == best or finite_percentile(drawn[i] - drawn[best])[0] <= 0}
    if not candidates:
        text = ("not resolved: the spaces disagree, and what is best in one is worse in another"
                if clean else "take none: at no checkpoint is copying excluded")
        return {"step": None, "resolved": False, "alike": [], "text": text}
    taken = min(candidates, key=by_kd)
    alike = [points[i]["step"] for i in sorted(candidates - {taken})]
    (value, step), left_out = by_kd(taken), len(points) - len(clean)
    text = (f"take step {step}, of the lowest KD in {first} ({num(value)}) among {len(clean)} "
            "checkpoints without sign of copying"
            + (f"; left out for theirs: {left_out}" if left_out else "")
            + (f". Not resolved: {', '.join(map(str, alike))} may be as good" if alike else ""))
    return {"step": step, "resolved": not alike, "alike": alike, "text": text}


def table(result: dict) -> Table:
    """KD, copying and the gap of the losses for each checkpoint on val, for the one that was taken
    on test, and the floors of KD."""
    rows, parts = [], [("val", result["points"], result["floors"])]
    if "why" not in result["test"]:
        parts.append(("test", [result["test"]], result["test"]["floors"]))
    for split, points, floors in parts:
        for p in points:
            s = p["copying"]["spaces"][0]
            kds = [f"{num(k['value'])} ({span(k['low'], k['high'])})" for k in p["KD"].values()]
            rows.append([p["step"], f"{split}, {p['n']}", *kds, percent(s["near_share"]),
                         percent(s["near_heldout_share"]), f"{s['q50']:.2f}",
                         percent(p["loss"]["gap"]), p["copying"]["verdict"]])
        rows.append(["floor", split, *(f"{num(f['median'])} ({span(f['low'], f['high'])})"
                                       for f in floors.values()), *[""] * 5])
    return Table(["step", "against, n", *(f"KD, {name}" for name in result["floors"]),
                  "near train", "near held-out", "q", "gap", "copying"], rows)


def _side(extractor: Extractor, part: Images, index: np.ndarray) -> Side:
    return Side(extractor(part.pixels[index]).double().numpy(),
                *(np.array(part.table.column(name))[index] for name in ("label", "patient")))
