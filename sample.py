"""Sample a set of images from a finished diffusion run: a folder of the same form as a data set.

    python sample.py                            100 images a label of the demo → runs/demo/samples
    python sample.py --run runs/x/diffusion --sets 10 --guidance 2 --out runs/x/samples
    python sample.py --label covid --given sex=F age=60:80 --per-label 20 --out runs/demo/women
    python sample.py --rows wanted.csv --out runs/demo/wanted    an image for each row of conditions
    python sample.py verify --out runs/demo/samples --k 8        make some of them again and compare
    python sample.py --origin DATA --strength .4 --out runs/x/like   begin at real images, near them
    python sample.py --origin DATA --change sex=other age=+30 --invert --strength 1 --out runs/x/if
    python sample.py --origin DATA --mask DIR --strength 1 --resample 4 --out runs/x/anew   in masks
    python sample.py trajectory --seed 17 --label covid --out way.png   one image's way from noise
    torchrun --nproc-per-node 8 -- sample.py --run runs/x/diffusion --sets 100 --out runs/x/samples

Each image is a function of its seed and its conditions alone. The same command again fills gaps.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import minidiff.threads  # noqa: F401  before torch, which it tells how its threads wait

import torch
from torch import Tensor
from tqdm import tqdm

import minidiff
from minidiff import config, distributed, runs
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.dataset import read_images
from minidiff.data.table import read_csv, read_table, write_table
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.guidance import EVERYWHERE
from minidiff.diffusion.samplers import Sampler
from minidiff.diffusion.schedule import Ladder
from minidiff.errors import InputError, count
from minidiff.evaluation import selection
from minidiff.evaluation.quick import Quick, recognised
from minidiff.evaluation.selection import REASONS
from minidiff.hashes import hashes_of
from minidiff.overlap import Behind
from minidiff.pixels import to_depth, to_grey
from minidiff.root import Reading, Rooted, then
from minidiff.sampling import edits
from minidiff.sampling import plan as plans
from minidiff.sampling.again import VerifyConfig, verify
from minidiff.sampling.finished_run import compiled, make_images, open_pipeline
from minidiff.sampling.plan import RETRY
from minidiff.sampling.sheets import as_written, finish_sets, unfinished
from minidiff.sampling.trajectory import TrajectoryConfig, trajectory
from minidiff.training.compiling import Compile
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision, PrecisionName

TRIES = 10             # seeds for one image before the model or the filter is to blame
WRITERS = 4            # threads that write files while a GPU makes the next batch
FREE = ("device", "compile", "real", "classifier")  # knobs that do not change images …
FREE_WITH_KEEP = FREE[:2]                           # … and those of them that --keep does not use


@dataclass(frozen=True)
class SampleConfig(Reading, Rooted):
    run: str = "ROOT/diffusion"            # finished diffusion run, or its best/
    out: str = "ROOT/samples"              # folder of the new data set
    label: tuple[str, ...] = ()            # labels to make, Edema|Mass of findings; none: all
    per_label: int = 100                   # images a label; of findings, times their number
    sets: int = 0                          # sets of 100, all labels in each; 0: --per-label
    given: tuple[str, ...] = ()            # sex=F age=60:80; age= unknown, age=null dropped
    balance: float = 0.0                   # of findings: 0 as in training, 1 all equally frequent
    independent: tuple[str, ...] = ()      # conditions that must not tell the label: source sex
    rows: str = ""                         # CSV of conditions, an image a row, in place of --label
    like: tuple[str, ...] = ()             # data sets to draw conditions from; none: training rows
    origin: tuple[str, ...] = ()           # data sets of real images to begin at, conditions too
    change: tuple[str, ...] = ()           # of --origin's conditions: label=covid age=+30 sex=other
    strength: float = 0.5                  # share of the steps run from --origin; 1 keeps nothing
    invert: bool = False                   # from the noise that ddim turns --origin into, backwards
    mask: str = ""                         # folder of --origin's masks: only white is made anew
    resample: int = Recipe.resample        # times each step is taken with --mask: fewer seams
    sampler: Sampler = Recipe.sampler      # docs/samplers.md compares them
    ladder: Ladder = Recipe.ladder         # spacing of the noise levels
    steps: int = Recipe.steps              # steps of the sampler
    guidance: float = Recipe.guidance      # 1: none; above, clearer conditions and less variety
    scales: tuple[str, ...] = ()           # guidance of each: label=3 age=1 Edema=4; or --guidance
    interval: tuple[float, ...] = ()       # noise levels σ low high that are guided; none: all
    rescale: float = Recipe.rescale        # 0 … 1, share of the unguided contrast that is kept
    against: str = ""                      # run of a weaker model to guide by (autoguidance)
    eta: float = Recipe.eta                # fresh noise in ddim: 0 none, 1 as the forward process
    churn: float = Recipe.churn            # noise renewed on the way in heun; 0 none, e.g. 40
    seed: int = 0                          # of the first image, counted up; and of drawn conditions
    batch: int = 50                        # images in one pass of the network
    keep: tuple[str, ...] = ()             # recognised (by --classifier), new: re-draw the others
    real: tuple[str, ...] = ()             # data for the quick numbers; none: the training data
    classifier: str = ""                   # classifier run that reads labels for quick numbers
    precision: PrecisionName = "auto"      # of the UNet; auto: bf16 or else fp16, fp32 on the CPU
    compile: Compile = "auto"              # the UNet, on CUDA: a minute at first, then faster
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def sample(cfg: SampleConfig) -> None:
    """Make sets of images whose conditions are given, or drawn label by label from real rows."""
    distributed.start()
    precision = Precision(cfg.precision, pick_device(cfg.device))
    cfg = replace(cfg, precision=precision.name)
    pipeline, facts = open_pipeline(cfg.run, precision.device, cfg.precision, cfg.against,
                                    deep=True)
    variables, recipe, out = pipeline.conditioner.variables, recipe_of(cfg), Path(cfg.out)
    rows = plans.in_windows(plan(cfg, variables, facts, pipeline.size), facts.get("windows", {}))
    pipeline.check_guidance(recipe)
    recipe.require_levels(pipeline.denoiser.schedule)
    watch = watcher(cfg, pipeline.size)
    model = runs.sha256(Path(cfg.run) / "model.safetensors")
    with distributed.rank0_first():
        if not distributed.rank():
            runs.open_run(cfg.out, cfg, "samples", free=FREE_WITH_KEEP if cfg.keep else FREE,
                          model=model, data=facts["data"], **precision.facts())
            if not (out / "plan.json").exists():
                runs.write_json(out / "plan.json", rows)
            whole = as_written(out, runs.read_json(out / "plan.json"), cfg.rehash)
    rows = runs.read_json(out / "plan.json")  # finished as it was planned, also by a later version
    cfg = replace(cfg, batch=min(cfg.batch, len(rows)))
    text = {"recipe": json.dumps(asdict(recipe)), "model": model, "minidiff": minidiff.__version__}

    before = runs.find_json(out / "manifest.json", {})
    absent = {name for row in rows if not (out / (name := row["file_name"])).exists()}
    batches = (rows[start : start + cfg.batch] for start in range(0, len(rows), cfg.batch))
    missing = [batch for batch in batches if any(row["file_name"] in absent for row in batch)]
    mine = missing[distributed.rank() :: distributed.world()]
    sets = {} if distributed.rank() else unfinished(out, rows, whole, watch)
    if watch and sets:
        watch.real  # noqa: B018 (now, so that a fault of the real data comes before any image)
    chroma, due, behind = [], set(sets), Behind(precision.device)
    pipeline = compiled(pipeline, cfg.compile, len(mine) * recipe.calls)
    steps = sum(map(len, mine)) * (recipe.taken + 1)  # images that are drawn again come on top
    with tqdm(total=steps, desc="sampling", unit="step", disable=bool(distributed.rank())) as bar:
        for batch in mine:
            chroma += make_batch(cfg, pipeline, batch, facts["grey"], text, watch, bar.update,
                                 behind)
            if distributed.world() == 1:
                behind.run(finish_sets, cfg, sets, due | {row["set"] for row in batch}, watch)
                due = set()  # from now on only a set of which images are made can be complete
    behind.wait()
    distributed.wait()
    if not distributed.rank():
        finish_sets(cfg, sets, set(sets), watch)
        here = {**runs.machine(), **precision.facts(), "device": precision.device.type}
        facts["made_on"] = here if absent or not before else before.get("made_on", {})
        finish(cfg, rows, variables, model, facts, watch)
        mean = sum(chroma) / max(len(chroma), 1)
        removed = f"; mean chroma {mean:.2f} of 255 removed" if chroma and facts["grey"] else ""
        removed += "" if variables or cfg.against else "; no conditions, so nothing was guided"
        # a classifier tells labels apart
        after = "classify" if any(v.name == "label" for v in variables) else "evaluate"
        print(f"{out}: {count(len(rows), 'image')}, in sets of {plans.SET}; "
              f"{len(absent)} of them new{removed}\n{then(after, cfg, 'samples')}")


def make_batch(cfg: SampleConfig, pipeline: Pipeline, rows: list[dict], grey: bool, text: dict,
               watch: Quick | None, progress: Callable[[int], object],
               behind: Behind) -> list[float]:
    """Write the images of one batch, re-drawing those not to be kept; returns their chroma."""
    out, chroma = Path(cfg.out), []
    for attempt in range(TRIES):
        seeds = [int(row["seed"]) + attempt * RETRY for row in rows]
        pixels, finite = make(cfg, pipeline, rows, seeds, progress)
        seen = to_depth(pixels, torch.uint8)
        reasons = check(cfg, seen, finite, rows, watch)
        chroma += (seen.amax(1) - seen.amin(1)).float().mean((1, 2)).tolist()
        found = to_grey(pixels) if grey else pixels
        files = []
        for row, seed, image, reason in zip(rows, seeds, found, reasons):
            if reason:
                runs.append_log(out / f"rejects-{distributed.rank()}.jsonl",
                                file_name=row["file_name"], seed=seed, reason=reason)
            elif not (out / row["file_name"]).exists():
                files.append((out / row["file_name"], image, {**text, **row, "seed": str(seed)}))
        behind.wait()  # at most one batch waits to be written
        behind.run(write_files, files, behind.threaded)
        rows = [row for row, reason in zip(rows, reasons) if reason]
        if not rows:
            return chroma
    raise InputError(f"{rows[0]['file_name']}: {TRIES} seeds gave no image to keep, the last one "
                     f"was {next(filter(None, reasons))}: {cfg.run} is not trained far enough, or "
                     "--keep asks for too much")


def write_files(files: Sequence[tuple[Path, Tensor, dict]], threaded: bool) -> None:
    """Each file whole or not at all; in turn, or by several threads."""
    with ThreadPoolExecutor(WRITERS) as pool:
        list((pool.map if threaded else map)(lambda file: images.write(*file), files))


def make(cfg: SampleConfig, pipeline: Pipeline, rows: list[dict], seeds: list[int],
         progress: Callable[[int], object] = lambda n: None) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, S, S), and which of them are finite (n,)."""
    rejects: list[int] = []
    pixels = make_images(pipeline, rows, recipe_of(cfg), seeds=seeds, batch=cfg.batch,
                         progress=progress, rejects=rejects)
    return pixels, torch.tensor([i not in rejects for i in range(len(rows))])


def check(cfg: SampleConfig, pixels: Tensor, finite: Tensor, rows: list[dict],
          watch: Quick | None) -> list[str]:
    """Why each image must not be kept; "" where it may."""
    faults = {"not finite": ~finite,
              "of one grey": pixels.flatten(1).amax(1) == pixels.flatten(1).amin(1)}
    if "recognised" in cfg.keep:
        labels = [row["label"] for row in rows]
        faults[REASONS["recognised"]] = ~recognised(watch.judge, pixels, labels)
    if "new" in cfg.keep:
        faults[REASONS["new"]] = watch.near_copies(pixels)
    return [next((why for why, bad in faults.items() if bad[i]), "") for i in range(len(rows))]


def finish(cfg: SampleConfig, rows: list[dict], variables: list, model: str, facts: dict,
           watch: Quick | None) -> None:
    """Write metadata.csv, with the columns that other commands added, and manifest.json."""
    out, path = Path(cfg.out), Path(cfg.out) / "metadata.csv"
    before = {row["file_name"]: row
              for row in (read_csv(path, ("file_name",)) if path.exists() else [])}
    rejects = {(line["file_name"], line["seed"]): line["reason"]
               for file in sorted(out.glob("rejects-*.jsonl")) for line in runs.read_log(file)}
    tries, reasons = Counter(file for file, _ in rejects), dict(Counter(rejects.values()))
    outside = [plans.outside(variables, row) for row in rows]
    marks = [{}] * len(rows)
    if any(outside):
        print(f"{sum(map(bool, outside))} images have {' and '.join(sorted(set().union(*outside)))}"
              " outside what training saw; metadata.csv marks them", file=sys.stderr)
        marks = [{"outside_training": " ".join(names)} for names in outside]
    write_table(path, [
        {**before.get(row["file_name"], {}), **row,
         "seed": int(row["seed"]) + tries[row["file_name"]] * RETRY, "sampler": cfg.sampler,
         "steps": cfg.steps, "guidance": cfg.guidance, **mark} for row, mark in zip(rows, marks)])
    names = [*(row["file_name"] for row in rows), "metadata.csv"]
    runs.write_json(out / "manifest.json", {
        "model": model, "recipe": asdict(recipe_of(cfg)),
        "sha256": dict(zip(names, hashes_of(out / name for name in names).values())),
        "trained_on": facts.get("trained_on", []), "checkpoint": facts.get("step"),
        "made_on": facts["made_on"],
        "filters": selection.record(cfg.keep, reasons, cfg.classifier, watch),
        "rejects": reasons, "yield": len(rows) / (len(rows) + len(rejects)),
    })
    if rejects:
        shown = ", ".join(f"{n} {why}" for why, n in reasons.items())
        print(f"{len(rows)} of {len(rows) + len(rejects)} images kept; re-drawn: {shown} "
              "(rejects-*.jsonl names them)")


def plan(cfg: SampleConfig, variables: list, facts: dict, size: int) -> list[dict[str, str]]:
    """The rows to make: of a CSV, of real images, or drawn."""
    edited = {"change": cfg.change, "invert": cfg.invert, "mask": cfg.mask,
              "resample": cfg.resample > 1}
    for name in edited:
        if edited[name] and not cfg.origin:
            raise InputError(f"--{name} needs --origin DATA, the real images to begin at")
    if cfg.invert and cfg.keep and cfg.resample == 1:
        raise InputError("--keep draws an image again, and one of --invert has nothing to draw; "
                         "leave out one of them")
    if cfg.resample > 1 and not cfg.mask:
        raise InputError(f"--resample {cfg.resample} needs --mask DIR, which says what is kept")
    if cfg.rows:
        if (cfg.label or cfg.given or cfg.independent or cfg.like or cfg.sets or cfg.origin
                or cfg.balance):
            raise InputError("--rows says all about the images: leave out --label, --given, "
                             "--independent, --like, --sets, --origin, --balance")
        return plans.plan_rows(cfg.rows, variables, facts["rows"], cfg.seed)
    if cfg.origin:
        for name in ("independent", "given", "balance"):
            if getattr(cfg, name):
                raise InputError("--origin: each image keeps its own conditions; leave out "
                                 f"--{name}, and name what becomes another by --change")
        known = read_table(cfg.origin, cfg, split=False).rows
        rows, said = edits.plan(known, variables, cfg.label, cfg.per_label, change=cfg.change,
                                mask=cfg.mask, size=size, seed=cfg.seed)
        if said and not distributed.rank():
            print(said, file=sys.stderr)
        return rows
    like = read_table(cfg.like, cfg, split=False).rows if cfg.like else None
    return plans.plan(variables, facts["rows"], like=like, labels=cfg.label,
                      per_label=cfg.per_label, sets=cfg.sets, given=cfg.given,
                      independent=cfg.independent, balance=cfg.balance, seed=cfg.seed)


def watcher(cfg: SampleConfig, size: int) -> Quick | None:
    """What compares a set with real images, where these are at hand."""
    wrong = sorted(set(cfg.keep) - set(REASONS))
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
    data = read_images(real, size, cfg, seed=0, split_dir=Path(cfg.root), skip_bad=True)
    judge = Predictor.load(Path(cfg.classifier) / "judge").to(
        pick_device(cfg.device)) if cfg.classifier else None
    watch = Quick(data.part("train"), data.part("val", "test"), judge)
    if "new" in cfg.keep:
        watch.near_limit  # noqa: B018 (refuses now if the images are too few to tell copies by)
    return watch


def recipe_of(cfg: SampleConfig) -> Recipe:
    """The recipe that these knobs spell."""
    try:
        scales = {name: float(value)
                  for name, _, value in (item.partition("=") for item in cfg.scales)}
    except ValueError:
        raise InputError(f"--scales {' '.join(cfg.scales)}: write name=number, e.g. label=3"
                         ) from None
    return Recipe(cfg.sampler, cfg.ladder, cfg.steps, cfg.guidance, cfg.eta,
                  cfg.interval or EVERYWHERE, cfg.rescale, scales,
                  cfg.strength if cfg.origin else 1.0, cfg.invert, cfg.resample, cfg.churn)


VERBS = {"sample": (SampleConfig, sample), "verify": (VerifyConfig, verify),
         "trajectory": (TrajectoryConfig, trajectory)}

if __name__ == "__main__":
    config.main(VERBS, default="sample", doc=__doc__)
    distributed.stop()
