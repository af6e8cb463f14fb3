"""A rare disease from ten images: a label that a base model never saw, learned by adapters beside
images of the base (`--prior`), for as many steps as patients left out bear, and stopped before it
copies.

    new value    starts as null does, at zero (CategoryEmbedding.adopt); the base's labels stay
    how long     the patients are left out in turn, in --folds groups. Each training, of the same
                 settings, is asked at --snapshots + 1 numbers of steps for its loss on all images,
                 at many times and noises that never change. Of the numbers of steps the fewest is
                 taken whose held-out loss is within a standard error of the lowest one (Breiman et
                 al. 1984), by differences patient by patient: fewer steps copy less.
    then         one training on all images, of the same settings: what was compared are models at
                 these steps of such a training, not of a shorter one
    first        rebuilt.png: what the base's autoencoder makes of the new images. What is gone
                 there, no adapter brings back
    copies       from the steps taken downwards, the first model that makes no copy of one of the
                 new images (`named`, which needs neither many images nor a random split) is kept

A fold leaves its losses alone behind; a command that was stopped goes on with the next one.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy
import torch

from minidiff import distributed, runs
from minidiff import variables as var
from minidiff.counted import order
from minidiff.data import images
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.subset import write_rows
from minidiff.data.table import Table, read_table
from minidiff.diffusion import store
from minidiff.diffusion.begin import is_run
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.watch import AT_MOST, Probe
from minidiff.errors import InputError, count
from minidiff.evaluation.metrics.named import named
from minidiff.evaluation.metrics.pairwise import distances, pixel_spaces
from minidiff.evaluation.monitor import checkpoints
from minidiff.evaluation.sets import HELD_OUT, check_origin
from minidiff.pixels import to_float, to_grey, to_uint8
from minidiff.root import AS_WE_NAME, data_of, reading_of
from minidiff.sampling.finished_run import make_images, open_pipeline
from minidiff.sampling.plan import plan

DRAWS, FEWEST_DRAWS = 256, 8  # of times and noise for the losses of all images; for each of many
BATCH = 32                    # of them at once
SPACE = "pixels, moved"
SHOWN = 10                    # images of rebuilt.png
DECIDE = {"snapshots", "guidance"}  # of a diffusion run only its pictures and what is kept of it


@dataclass(frozen=True)
class Knobs:
    """What differs from, or is added to, the knobs of train.py diffusion."""

    data: tuple[str, ...] = ()       # images of the new label alone, without split or for training
    init: str = ""                   # finished diffusion run that never saw this label
    prior: tuple[str, ...] = ()      # images of the labels that it knows; none: --init's own
    out: str = "ROOT/rare"           # rare.json, fold-0 …, and all/ with the model that is kept
    folds: int = 5                   # groups of patients left out in turn, 2 or more
    per_label: int = 100             # images of each new label in which copies are looked for
    steps: int = 200                 # the most; --snapshots + 1 numbers of steps are compared
    batch: int = 8                   # images a step, on all GPUs together
    lr: float = 1e-3                 # AdamW peak after 5 % warm-up; 1e-4 on a base of SD's size
    decay: Literal["cosine", "constant"] = "constant"  # of the rate: any step may be the last


def verb(base: type, train: Callable[[Any], None], free: Sequence[str]) -> tuple[type, Callable]:
    """The verb of train.py, from the Config and the function of a diffusion run."""
    @dataclass(frozen=True)
    class RareConfig(Knobs, base):
        pass

    def rare(cfg: RareConfig) -> None:
        """Learn a rare label from a few images on a base model; stop before copying."""
        run(cfg, lambda data, out: train(base(**{
            **{f.name: getattr(cfg, f.name) for f in fields(base)}, **vars(AS_WE_NAME),
            "data": (str(data),), "prior": (f"{cfg.out}/prior",), "out": str(out)})), free)

    return RareConfig, rare


def run(cfg: Any, train: Callable[[Path, Path], None], free: Sequence[str]) -> dict:
    """Choose the number of steps, train on all images, and name the model to keep: rare.json.

    `train(data, out)` trains a diffusion run of these settings.
    """
    if distributed.announced()[1] > 1:
        raise InputError("train.py rare makes several small trainings in turn: start it without "
                         "torchrun")
    few, prior, new = read(cfg)
    groups = folds(few.table.column("label"), few.table.column("patient"), cfg.folds, cfg.seed)
    out = runs.open_run(cfg.out, cfg, "rare", free={*free} - DECIDE, data=few.table.fingerprint,
                        prior=prior.fingerprint, init=store.identity(Path(cfg.init)))
    some = few.pixels[:SHOWN]
    images.write(out / "rebuilt.png", images.grid(torch.cat([some, rebuilt(some, cfg.init)]),
                                                  columns=len(some)), quick=True)
    write_rows(out / "prior", prior.select(split="train").rows)
    patients, of, by_fold = few.table.column("patient"), np.zeros(len(few), int), []
    for k, group in enumerate(groups):
        of[[patient in group for patient in patients]] = k
        by_fold.append(losses_of_fold(out / f"fold-{k}", few, group, cfg, train))
    steps = [int(step) for step in by_fold[0]]
    found = np.array([[*fold.values()] for fold in by_fold])              # (F, R, N)
    held = found[of, :, range(len(of))]                                   # (N, R)
    rest = (found.sum(0).T - held) / (len(found) - 1)
    base = losses(Path(cfg.init), few, cfg)[:, None]
    choice = choose(steps, *(of_patients(x, patients) for x in (held, rest, base)))

    # of few images none can be spared: what the prior holds out stands in
    write_rows(out / "data", [*({**row, "split": "train"} for row in few.table.rows),
                              *prior.select(split=HELD_OUT).rows])
    train(out / "data", out / "all")
    copies = []
    for point in reversed([p for p in checkpoints(out / "all")
                           if p.step in steps and p.step <= choice["step"]]):
        copies.append({"step": point.step, "folder": str(point.folder),
                       **copies_of(point.folder, few, prior, new, cfg)})
        if not copies[-1]["found"]:
            break
    result = {"labels": new, "images": len(few), "patients": len(set(patients)), "steps": steps,
              "folds": [{"patients": sorted(group), "losses": fold}
                        for group, fold in zip(groups, by_fold)],
              "choice": choice, "copies": copies,
              "kept": None if copies[-1]["found"] else copies[-1]["folder"],
              "provenance": runs.provenance()}
    result["text"] = text(result)
    runs.write_json(out / "rare.json", result)
    print(f"{out}: {result['text']}")
    if result["kept"]:
        print(f"next: python sample.py --root {cfg.root} --run {result['kept']} --label "
              f"{' '.join(new)}")
    return result


def read(cfg: Any) -> tuple[Images, Table, list[str]]:
    """The new images, those of the base with their splits, and the new labels."""
    if not is_run(cfg.init):
        raise InputError(f"--init {cfg.init or 'is missing'}: give a finished diffusion run; the "
                         "base is trained first (train.py diffusion)")
    facts = runs.read_json(Path(cfg.init, "model.json"))
    config = runs.find_json(Path(cfg.init, "config.json"), {})
    if "condition" not in config:
        raise InputError(f"--init {cfg.init}: give the folder of a whole diffusion run, not its "
                         "best/, a snapshot, or what train.py average made of it")
    where = Path(cfg.init).parent
    own = cfg.prior or data_of(str(where), cfg.init)
    prior = read_table(own, cfg if cfg.prior else reading_of(config), seed=config["seed"],
                       split_dir=where).select(split=("train", *HELD_OUT))
    for splits in (("train",), HELD_OUT):
        if not len(prior.select(split=splits)):
            raise InputError(f"--prior {' '.join(own)} has no image in split "
                             f"{' or '.join(splits)}")
    check_origin(prior.select(split=HELD_OUT), {cfg.init: set(facts.get("trained_on", ()))})
    table = read_table(cfg.data, cfg, split=False)
    table = replace(table, rows=[row for row in table.rows if row["split"] in ("", "train")])
    if table.patients_assumed or cfg.distinct_patients:
        table = replace(table, rows=[{**row, "patient": f"new {row['patient']}"}
                                     for row in table.rows])
    check_origin(table, {cfg.init: set(facts.get("trained_on", ()))})
    new = new_labels(table.column("label"), facts["variables"], prior.labels, cfg)
    if shared := sorted({*table.column("patient")} & {*prior.column("patient")}):
        raise InputError(f"patient {shared[0]} of --data is one of --prior, too, and could never "
                         "be left out; take him out of one of them, or give --distinct-patients "
                         "if each numbers its own")
    return (Images(*load_pixels(table, facts["size"], skip_bad=cfg.skip_bad, grey=cfg.grey)),
            prior, new)


@torch.no_grad()
def rebuilt(pixels: torch.Tensor, init: str) -> torch.Tensor:
    """Images (N, 3, S, S) as the autoencoder of a run gives them back: adapters draw no more."""
    vae = store.load_vae(Path(init))
    return to_uint8(torch.cat([vae.decode(vae.encode(to_float(part)).mean)
                               for part in pixels.split(BATCH)]))


def new_labels(cells: Sequence[str], variables: Sequence[dict], prior: Sequence[str],
               cfg: Any) -> list[str]:
    """The labels of the new images, none of which the base or the prior images know."""
    known = next((v for v in var.from_json(variables) if v.name == "label"),
                 var.Category("label", ()))
    merged = known.merged(var.Category("label", tuple(sorted({*known.values, *cells, *prior}))))
    named = {merged.values[merged.encode(cell)] for cell in cells}
    others = {merged.values[merged.encode(cell)] for cell in prior}
    if old := sorted(named & {*known.values}):
        raise InputError(f"--data holds {old[0]!r}, which {cfg.init} knows: give new labels alone "
                         "here and the others as --prior; train.py diffusion --init goes on with "
                         "known ones")
    if both := sorted(named & others):
        raise InputError(f"--prior holds {both[0]!r}, the new label: its images belong into --data")
    if not named:
        raise InputError(f"--data {' '.join(cfg.data)} has no image to train on, without split or "
                         "in train")
    return sorted(named)


def folds(labels: Sequence[str], patients: Sequence[str], most: int, seed: int) -> list[set[str]]:
    """At most `most` groups of patients, dealt label by label in a random order of their sorted
    names. InputError where a label could not be left out, for one group has all of its patients."""
    of = {label: {p for own, p in zip(labels, patients) if own == label} for label in labels}
    groups = [set() for _ in range(min(most, len(set(patients))))]
    dealt: list[str] = []
    for label in sorted(of):
        names = sorted(of[label] - {*dealt})
        dealt += [names[k] for k in order(len(names), seed, range(len(names)))]
    for place, patient in enumerate(dealt):
        groups[place % len(groups)].add(patient)
    for label, own in of.items():
        if any(own <= group for group in groups):
            raise InputError(f"{label!r} has {count(len(own), 'patient')} in {len(groups)} "
                             "--folds: it takes two of each, one to train on and one to leave out")
    return groups


def losses_of_fold(folder: Path, few: Images, group: set[str], cfg: Any,
                   train: Callable[[Path, Path], None]) -> dict[str, list[float]]:
    """Step → the loss on each of the new images (N,) of a training that never saw this group."""
    if not (folder / "losses.json").exists():
        write_rows(folder / "data",
                   [{**row, "split": "val" if row["patient"] in group else "train"}
                    for row in few.table.rows])
        train(folder / "data", folder / "run")
        points = [p for p in checkpoints(folder / "run") if p.folder.name != "best"]
        runs.write_json(folder / "losses.json",
                        {p.step: losses(p.folder, few, cfg).tolist() for p in points})
    for name in ("run/snapshots", "run/best", "run/checkpoints"):  # gigabytes of a large model
        shutil.rmtree(folder / name, ignore_errors=True)
    return runs.read_json(folder / "losses.json")


@torch.no_grad()
def losses(folder: Path, few: Images, cfg: Any) -> np.ndarray:
    """Mean loss of a model on each image (N,), at times and noise that are the same for all models.

    A label that the model does not know is null.
    """
    pipeline, _ = open_pipeline(folder, cfg.device)
    device, rows = pipeline.vae.scale.device, few.table.rows
    variables = pipeline.conditioner.variables
    z = pipeline.encode(few.pixels).cpu()
    labels = var.encode(variables, [{**row, "label": known_label(variables, row)} for row in rows])
    if "label" in labels:
        unknown = torch.tensor([not known_label(variables, row) for row in rows])
        labels["label"] = labels["label"].masked_fill(unknown, var.NULL)
    n = len(rows) * max(FEWEST_DRAWS, DRAWS // len(rows))
    probe = Probe.of(z, labels, n, len(pipeline.denoiser.schedule))
    found = probe.losses(pipeline.denoiser, nullcontext, device, BATCH, cfg.min_snr)
    return np.bincount(order(len(rows), 0, range(n)), found.double()) / (n // len(rows))


def known_label(variables: Sequence[var.Variable], row: dict[str, str]) -> str:
    """A row's label, "" where the model has no such value."""
    values = next((v.values for v in variables if v.name == "label"), ())
    return row["label"] if row["label"] in values else ""


def of_patients(x: np.ndarray, patients: Sequence[str]) -> np.ndarray:
    """Means of each patient's images: (N, R) → (P, R)."""
    codes = np.unique(patients, return_inverse=True)[1]
    return np.stack([x[codes == k].mean(0) for k in range(codes.max() + 1)])


def choose(steps: Sequence[int], held_out: np.ndarray, trained: np.ndarray,
           base: np.ndarray) -> dict:
    """How many steps, by the held-out losses of P patients at R numbers of steps (P, R).

    trained (P, R): of the folds that had the patient; base (P, 1): of the base without the label.
    "alike": other steps whose loss is not resolved from the lowest (t, 95 %); "gain": by which
    share the loss falls below the base's, with its interval, which is that of one number of steps
    and not corrected for choosing it: without a gain it lies above 0 in up to 10 %; "gap": by which
    held-out images lose more than they do where they were trained on.
    """
    best = int(held_out.mean(0).argmin())
    more = held_out - held_out[:, [best]]
    error = more.std(0, ddof=1) / len(more) ** 0.5
    at = int((more.mean(0) <= error).argmax())
    reach = float(scipy.stats.t.ppf(0.975, len(more) - 1))
    alike = [step for k, step in enumerate(steps)
             if k != best and more.mean(0)[k] <= reach * error[k]]
    less = (base[:, 0] - held_out[:, at]) / base.mean()
    half = reach * less.std(ddof=1) / len(less) ** 0.5
    return {"step": steps[at], "lowest": steps[best], "alike": alike,
            "held_out": held_out.mean(0).tolist(), "trained": trained.mean(0).tolist(),
            "base": float(base.mean()), "gap": float(held_out[:, at].mean()
                                                     / trained[:, at].mean() - 1),
            "gain": [float(x) for x in (less.mean(), less.mean() - half, less.mean() + half)]}


@torch.no_grad()
def copies_of(folder: Path, few: Images, prior: Table, new: Sequence[str], cfg: Any) -> dict:
    """Which of --per-label images of each new label are copies of one of the new images."""
    pipeline, facts = open_pipeline(folder, cfg.device, cfg.precision)
    rows = plan(pipeline.conditioner.variables, facts["rows"], labels=new,
                per_label=cfg.per_label, seed=cfg.seed)
    made = make_images(pipeline, rows, Recipe(guidance=cfg.guidance))
    made = to_grey(made).expand(-1, 3, -1, -1) if facts["grey"] else made
    held = prior.select(split=HELD_OUT)
    held = replace(held, rows=held.rows[:: max(1, len(held) // AT_MOST)])
    fake, real, others = (pixel_spaces(x)[SPACE] for x in (
        made, few.pixels, load_pixels(held, facts["size"], grey=cfg.grey)[1]))
    return named(distances(fake, real), distances(others, real), real, cfg.seed)


def text(result: dict) -> str:
    """The answer, in a line."""
    choice, copies, steps = result["choice"], result["copies"], result["steps"]
    gain, low, high = choice["gain"]
    said = (f"{' and '.join(result['labels'])}, {count(result['images'], 'image')} of "
            f"{count(result['patients'], 'patient')}: {choice['step']} steps (of {steps[0]} to "
            f"{steps[-1]}), the fewest within a standard error of the lowest held-out loss, at "
            f"{choice['lowest']}")
    if choice["alike"]:
        said += f"; not resolved from it: {', '.join(map(str, choice['alike']))}"
    said += (f". Held-out loss against the base's: {-100 * gain:+.1f} % ({-100 * high:+.1f} to "
             f"{-100 * low:+.1f})" + (": not resolved that anything was learned" * (low <= 0)))
    for look in copies:
        seen = "none of the probes, so copies could not be seen" if look["seen"] is None else (
            f"{look['probes_found']} of {look['probes']} probes")
        said += (f". Step {look['step']}: {look['found']} of {look['n']} samples are copies of a "
                 f"new image (the rule finds {seen})")
    return f"{said}. " + ("Kept: " + result["kept"] if result["kept"] else
                          "Keep none: at every step there are copies")
