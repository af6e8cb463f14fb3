"""Sample a set of images from a finished diffusion run: a folder of the same form as a data set.

    python sample.py                                            100 images a label of runs/demo/diffusion → runs/demo/samples
    python sample.py --run runs/x/diffusion --sets 10 --guidance 2 --out runs/x/samples
    python sample.py --label covid --given sex=F age=60:80 --per-label 20 --out runs/demo/women-of-60-to-80
    python sample.py --rows wanted.csv --out runs/demo/wanted   one image for each row of conditions
    python sample.py verify --out runs/demo/samples --k 8       make 8 of them again and compare
    python sample.py --origin DATA --strength .4 --out runs/x/like   begin at real images, keep much of them
    python sample.py trajectory --seed 17 --label covid --given sex=F --out way.png   one image's way from noise
    torchrun --nproc-per-node 8 -- sample.py --run runs/x/diffusion --sets 100 --out runs/x/samples

Each image is a function of its seed and its conditions alone. The same command again fills the
gaps.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import minidiff.threads  # noqa: F401  before torch, which it tells how its threads wait

import torch
from torch import Tensor
from tqdm import tqdm

import minidiff
from minidiff import config, distributed, runs
from minidiff.classification.predictor import Predictor
from minidiff.counted import seeded
from minidiff.data import images
from minidiff.data.dataset import read_images
from minidiff.data.table import read_csv, read_table, write_table
from minidiff.diffusion import plan as plans
from minidiff.diffusion import store
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.guidance import EVERYWHERE
from minidiff.diffusion.trajectory import TrajectoryConfig, trajectory
from minidiff.errors import InputError, count
from minidiff.evaluation.quick import Quick, recognised
from minidiff.root import Rooted, then
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision

Sampler = Literal["dpmpp_2m", "ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m_sde",
                  "unipc"]
# grey levels by which an image made again may differ: rounding, on other hardware or batch sizes
TOLERANCE = 1
TRIES = 10             # seeds for one image before the model or the filter is to blame …
RETRY = 10**9          # … each this far from the last: no image of any set has it
# knobs that do not change the images, unless --keep uses them
FREE = ("device", "compile", "real", "classifier")


@dataclass(frozen=True)
class SampleConfig(Rooted):
    run: str = "ROOT/diffusion"            # finished diffusion run, or its best/
    out: str = "ROOT/samples"              # folder of the new data set
    label: tuple[str, ...] = ()            # labels to make; none: all that the model knows
    per_label: int = 100                   # images a label
    sets: int = 0                          # sets of 100, all labels in each, in place of --per-label; 0: as that says
    given: tuple[str, ...] = ()            # fixed conditions: sex=F age=60:80, age= unknown, age=null dropped; else drawn
    independent: tuple[str, ...] = ()      # conditions of which the label is to tell nothing, e.g. source sex
    rows: str = ""                         # CSV of conditions, an image a row, in place of --label and --given
    like: tuple[str, ...] = ()             # data sets to draw conditions from; none: the model's training rows
    origin: tuple[str, ...] = ()           # data sets of real images to begin at, each with its own conditions
    strength: float = 0.5                  # share of the steps run from --origin: 0 keeps it, 1 keeps nothing of it
    sampler: Sampler = "dpmpp_2m"          # docs/samplers.md compares them
    ladder: Literal["logsigma", "karras", "leading", "trailing", "linspace"] = "logsigma"  # spacing of the noise levels
    steps: int = 12                        # steps of the sampler
    guidance: float = 1.5                  # 1: none; above, conditions are exaggerated and variety is lost
    scales: tuple[str, ...] = ()           # guidance by variable, e.g. label=3 age=1; the others have --guidance
    interval: tuple[float, ...] = ()       # noise levels σ low high that are guided; none: all
    rescale: float = 0.0                   # 0 … 1, share by which guidance keeps the contrast of the unguided estimate
    against: str = ""                      # run of a weaker model to guide by, in place of dropped conditions
    eta: float = 0.0                       # fresh noise in ddim: 0 none, 1 as much as the forward process had
    seed: int = 0                          # of the first image, the next ones count up; and of the draw of conditions
    batch: int = 50                        # images in one pass of the network
    keep: tuple[str, ...] = ()             # recognised, new: re-draw images that are not (needs --classifier, --real)
    real: tuple[str, ...] = ()             # real data for the quick numbers of each set; none: those the run was trained on
    classifier: str = ""                   # classifier run whose judge reads labels for the quick numbers
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the UNet; the VAE stays in fp32
    compile: bool = False                  # torch.compile: minutes at the start, faster steps
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def sample(cfg: SampleConfig) -> None:
    """Make sets of images whose conditions are given, or drawn label by label from real rows."""
    distributed.start()
    pipeline, facts = load(cfg)
    variables = pipeline.conditioner.variables
    rows = plan(cfg, variables, facts)
    recipe_of(cfg).scale([v.name for v in variables])
    if cfg.steps > len(pipeline.denoiser.schedule):
        raise InputError(f"--steps {cfg.steps} is more than the {len(pipeline.denoiser.schedule)} "
                         "levels of the schedule")
    watch = watcher(cfg, pipeline.size)
    model, out = runs.sha256(Path(cfg.run) / "model.safetensors"), Path(cfg.out)
    with distributed.rank0_first():
        if not distributed.rank():
            free = FREE if not cfg.keep else FREE[:2]
            runs.open_run(cfg.out, cfg, "samples", free=free, model=model, data=facts["data"])
            if not (out / "plan.json").exists():
                runs.write_json(out / "plan.json", rows)
            for row in runs.read_json(out / "plan.json"):
                if (path := out / row["file_name"]).exists() and not whole(path):
                    path.unlink()  # cut short: now, before a set seems complete
    # what was begun is finished as planned, also by a later version
    rows = runs.read_json(out / "plan.json")
    text = {"recipe": json.dumps(asdict(recipe_of(cfg))), "model": model,
            "minidiff": minidiff.__version__}

    # always the same batches,
    cells = [rows[start : start + cfg.batch] for start in range(0, len(rows), cfg.batch)]
    # for the last bits
    missing = [cell for cell in cells if any(not (out / row["file_name"]).exists() for row in cell)]
    mine = missing[distributed.rank() :: distributed.world()]
    # images drawn again come on top
    chroma, done, steps = [], set(), sum(map(len, mine)) * (recipe_of(cfg).taken + 1)
    with tqdm(total=steps, desc="sampling", unit="step", disable=bool(distributed.rank())) as bar:
        for cell in mine:
            chroma += make_cell(cfg, pipeline, cell, facts["grey"], text, watch, bar.update)
            if distributed.world() == 1:
                finish_sets(cfg, rows, watch, done)
    distributed.wait()
    if not distributed.rank():
        finish_sets(cfg, rows, watch, done)
        finish(cfg, rows, variables, model, facts)
        removed = f"; mean chroma {sum(chroma) / len(chroma):.2f} of 255 removed" if chroma and facts[
            "grey"] else ""
        print(f"{out}: {count(len(rows), 'image')}, in sets of {plans.SET}; "
              f"{sum(map(len, missing))} of them new{removed}\n{then('classify', cfg, 'samples')}")


def make_cell(cfg: SampleConfig, pipeline: Pipeline, cell: list[dict], grey: bool, text: dict,
              watch: Quick | None, progress: Callable[[int], object]) -> list[float]:
    """Make and write the images of one batch, re-drawing those that must not be kept; returns the
    chroma removed.
    """
    out, chroma = Path(cfg.out), []
    for attempt in range(TRIES):
        seeds = [int(row["seed"]) + attempt * RETRY for row in cell]
        pixels, finite = make(cfg, pipeline, cell, seeds, progress)
        reasons = check(cfg, pixels, finite, cell, watch)
        chroma += (pixels.amax(1) - pixels.amin(1)).float().mean((1, 2)).tolist()
        rejected = []
        for row, seed, image, reason in zip(cell, seeds, as_trained(pixels, grey), reasons):
            if reason:
                rejected.append(row)
                runs.append_log(out / f"rejects-{distributed.rank()}.jsonl",
                                file_name=row["file_name"], seed=seed, reason=reason)
            elif not (out / row["file_name"]).exists():
                images.write(out / row["file_name"], image, {**text, **row, "seed": str(seed)})
        if not rejected:
            return chroma
        cell = rejected
    why = next(filter(None, reasons))
    raise InputError(f"{cell[0]['file_name']}: {TRIES} seeds gave no image to keep, the last one "
                     f"was {why}: {cfg.run} is not trained far enough, or --keep asks for too much")


def make(cfg: SampleConfig, pipeline: Pipeline, cell: list[dict], seeds: list[int],
         progress: Callable[[int], object] = lambda n: None) -> tuple[Tensor, Tensor]:
    """uint8 (n, 3, S, S), and which of them are finite (n,)."""
    size, rejects = pipeline.size, []
    start = [torch.tensor(images.square(images.read(row["origin"]), size)) for row in cell
             if "origin" in row]
    origin = torch.stack([x.expand(3, -1, -1) for x in start]) if start else None
    labels = plans.encode(pipeline.conditioner.variables, cell)
    (pixels,) = pipeline.images(labels, seeds, recipe_of(cfg), batch=len(cell), origin=origin,
                                rejects=rejects, progress=progress)
    return pixels, torch.tensor([i not in rejects for i in range(len(cell))])


def check(cfg: SampleConfig, pixels: Tensor, finite: Tensor, cell: list[dict],
          watch: Quick | None) -> list[str]:
    """Why each image must not be kept; "" where it may."""
    found = {"not finite": ~finite,
             "of one grey": pixels.flatten(1).amax(1) == pixels.flatten(1).amin(1)}
    if "recognised" in cfg.keep:
        found["not recognised"] = ~recognised(watch.judge, pixels, [row["label"] for row in cell])
    if "new" in cfg.keep:
        found["a near-copy of a training image"] = watch.near_copies(pixels)
    return [next((why for why, bad in found.items() if bad[i]), "") for i in range(len(cell))]


def finish_sets(cfg: SampleConfig, rows: list[dict], watch: Quick | None, done: set[str]) -> None:
    """Contact sheets and quick numbers of the sets that are complete; a sheet that is there already
    is kept.
    """
    out = Path(cfg.out)
    for number in sorted({row["set"] for row in rows} - done, key=int):
        of_set = [row for row in rows if row["set"] == number]
        if not all((out / row["file_name"]).exists() for row in of_set):
            continue
        done.add(number)
        pixels = torch.stack([torch.tensor(images.read(out / row["file_name"])) for row in of_set])
        images.write(out / "sheets" / f"set_{int(number):04d}.png", images.grid(pixels, columns=10))
        if cfg.origin:  # generated beside original
            start = [torch.tensor(images.square(images.read(row["origin"]), pixels.shape[-1]))[:1]
                     for row in of_set]
            pairs = torch.stack([torch.stack(start).expand_as(pixels), pixels], 1).flatten(0, 1)
            images.write(out / "sheets" / f"pairs_{int(number):04d}.png",
                         images.grid(pairs, columns=10))
        if watch:
            numbers = watch(pixels.expand(-1, 3, -1, -1), [row["label"] for row in of_set])
            runs.write_json(out / "sheets" / f"set_{int(number):04d}.json", numbers)
            tqdm.write(f"set {number}: " + ", ".join(f"{name} {value:.3g}"
                                                     for name, value in numbers.items()))


def finish(cfg: SampleConfig, rows: list[dict], variables: list, model: str, facts: dict) -> None:
    """metadata.csv and manifest.json, of what lies there."""
    out, path = Path(cfg.out), Path(cfg.out) / "metadata.csv"
    # by other commands
    added = {row["file_name"]: {k: v for k, v in row.items() if k != "outside_training"}
             for row in (read_csv(path, ("file_name",)) if path.exists() else ())}
    rejects = {(line["file_name"], line["seed"]): line["reason"]
               for file in sorted(out.glob("rejects-*.jsonl")) for line in runs.read_log(file)}
    tries = Counter(file for file, _ in rejects)
    strange = [plans.outside(variables, row) for row in rows]
    if any(strange):
        names = sorted({name for some in strange for name in some})
        print(f"{sum(map(bool, strange))} images have {' and '.join(names)} outside what training "
              f"saw; metadata.csv marks them", file=sys.stderr)
    write_table(path, [{**added.get(row["file_name"], {}), **row,
                        "seed": int(row["seed"]) + tries[row["file_name"]] * RETRY,
                        "sampler": cfg.sampler, "steps": cfg.steps, "guidance": cfg.guidance,
                        **({"outside_training": " ".join(names)} if any(strange) else {})}
                       for row, names in zip(rows, strange)])
    hashes = {row["file_name"]: runs.sha256(out / row["file_name"]) for row in rows}
    hashes["metadata.csv"] = runs.sha256(out / "metadata.csv")
    runs.write_json(out / "manifest.json", {
        "model": model, "recipe": asdict(recipe_of(cfg)), "sha256": hashes,
        "trained_on": facts.get("trained_on", []),
        "rejects": dict(Counter(rejects.values())), "yield": len(rows) / (len(rows) + len(rejects)),
    })
    if rejects:
        shown = ", ".join(f"{n} {why}" for why, n in Counter(rejects.values()).items())
        print(f"{len(rows)} of {len(rows) + len(rejects)} images kept; re-drawn: {shown} "
              "(rejects-*.jsonl names them)")


@dataclass(frozen=True)
class VerifyConfig(Rooted):
    out: str = "ROOT/samples"              # folder of samples
    k: int = 8                             # images to make again
    seed: int = 0                          # of the choice
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def verify(cfg: VerifyConfig) -> None:
    """Check every file against the manifest, make a few images again from their own metadata and
    compare.
    """
    out = Path(cfg.out)
    saved = config.from_dict(SampleConfig,
                             {**config.load(out / "config.json"), "device": cfg.device})
    if not (out / "manifest.json").exists():
        raise InputError(f"{out} has no manifest.json: run `python sample.py` to its end first")
    manifest = runs.read_json(out / "manifest.json")
    hashes = manifest["sha256"]
    edited = [name for name, digest in hashes.items()
              if not (out / name).exists() or runs.sha256(out / name) != digest]
    if edited:
        raise InputError(f"{len(edited)} of {len(hashes)} files are not as they were written: "
                         f"{', '.join(edited[:5])}")
    if runs.sha256(Path(saved.run) / "model.safetensors") != manifest["model"]:
        raise InputError(f"{saved.run} holds another model now than the one that made {out}")
    pipeline, facts = load(saved)
    rows = read_table(out, split=False).rows
    rows = [rows[i]
            for i in torch.randperm(len(rows), generator=seeded(cfg.seed))[: cfg.k].sort().values]
    again, _ = make(saved, pipeline, rows, [int(row["seed"]) for row in rows])
    worst = 0
    for row, image in zip(rows, as_trained(again, facts["grey"])):
        worst = max(worst,
                    (image.int() - torch.tensor(images.read(row["file"])).int()).abs().max().item())
        if worst > TOLERANCE:
            raise InputError(f"{row['file']} differs by {worst} grey levels from what its seed "
                             "gives now")
    print(f"{out}: {count(len(hashes), 'file')} as written; {count(len(rows), 'image')} made "
          f"again, largest difference {worst} of 255 grey levels")


def plan(cfg: SampleConfig, variables: list, facts: dict) -> list[dict[str, str]]:
    """The rows to make: of a CSV, or drawn."""
    if cfg.rows:
        if cfg.label or cfg.given or cfg.independent or cfg.like or cfg.sets:
            raise InputError("--rows says all about the images: leave out --label, --given, "
                             "--independent, --like, --sets")
        return plans.plan_rows(cfg.rows, variables, cfg.seed)
    if cfg.origin:
        if cfg.independent:
            raise InputError("--origin: each image keeps its own conditions; leave out "
                             "--independent")
        return plans.plan_origin(read_table(cfg.origin, split=False).rows, variables, cfg.label,
                                 cfg.per_label, cfg.seed)
    known = read_table(cfg.like, split=False).rows if cfg.like else facts["rows"]
    return plans.plan(variables, known, labels=cfg.label, per_label=cfg.per_label, sets=cfg.sets,
                      given=cfg.given, independent=cfg.independent, seed=cfg.seed)


def watcher(cfg: SampleConfig, size: int) -> Quick | None:
    """What compares a set with real images, where these are at hand."""
    wrong = sorted(set(cfg.keep) - {"recognised", "new"})
    if wrong:
        raise InputError(f"--keep {wrong[0]}: allowed are recognised and new")
    if "recognised" in cfg.keep and not cfg.classifier:
        raise InputError("--keep recognised needs --classifier RUN")
    trained = Path(cfg.run) / "config.json"
    real = cfg.real or tuple(runs.read_json(trained)["data"] if trained.exists() else ())
    if not real or not all(Path(folder).is_dir() for folder in real):
        if cfg.real or "new" in cfg.keep:
            raise InputError(f"--real {' '.join(real) or 'none'}: no such data folder")
        return None
    data = read_images(real, size, seed=0, split_dir=Path(cfg.root), skip_bad=True)
    judge = Predictor.load(Path(cfg.classifier) / "judge") if cfg.classifier else None
    watch = Quick(data.part("train"), data.part("val", "test"), judge)
    # too few images to tell copies by are refused before the work
    _ = "new" in cfg.keep and watch.release
    return watch


def load(cfg: SampleConfig) -> tuple[Pipeline, dict]:
    pipeline, facts = store.load_pipeline(Path(cfg.run))
    device, net = pick_device(cfg.device), pipeline.denoiser.net
    net.to(device, memory_format=torch.channels_last), pipeline.vae.to(
        device, memory_format=torch.channels_last)
    if cfg.compile:
        net.unet = torch.compile(net.unet)
    if cfg.against:
        weaker, _ = store.load_pipeline(Path(cfg.against))
        weaker.denoiser.net.to(device, memory_format=torch.channels_last)
        pipeline = pipeline.guided_by(weaker)
    return replace(pipeline, autocast=Precision(cfg.precision, device).autocast), facts


def as_trained(batch: Tensor, grey: bool) -> Tensor:
    """Grey in, grey out: uint8 (n, 3, H, W) → (n, 1, H, W) by the mean of the channels, if training
    saw grey only.
    """
    return batch.float().mean(1, keepdim=True).round().to(torch.uint8) if grey else batch


def whole(path: Path) -> bool:
    """Is this image there and readable? One cut short is made again."""
    try:
        return images.read(path) is not None
    except InputError:
        return False


def recipe_of(cfg: SampleConfig) -> Recipe:
    """The recipe that these knobs spell."""
    if len(cfg.interval) not in (0, 2):
        raise InputError(f"--interval {' '.join(map(str, cfg.interval))}: give two noise levels, "
                         "the lower one first")
    try:
        scales = {name: float(value)
                  for name, _, value in (item.partition("=") for item in cfg.scales)}
    except ValueError:
        raise InputError(f"--scales {' '.join(cfg.scales)}: write name=number, e.g. "
                         f"label=3") from None
    return Recipe(cfg.sampler, cfg.ladder, cfg.steps, cfg.guidance, cfg.eta, cfg.interval
                  or EVERYWHERE, cfg.rescale, scales, cfg.strength if cfg.origin else 1.0)


VERBS = {"sample": (SampleConfig, sample), "verify": (VerifyConfig, verify),
         "trajectory": (TrajectoryConfig, trajectory)}

if __name__ == "__main__":
    config.main(VERBS, default="sample", doc=__doc__)
    distributed.stop()
