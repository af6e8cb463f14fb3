"""One page that shows what a trained diffusion run does, each figure with the code that made it.

    python evaluate.py explain --root runs/x

explain.json holds every number and the code, explain.html is a function of it and of pictures. The
figures are those of `figures.FIGURES`, and their code is read off the functions that have just run.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff import variables as var
from minidiff.counted import order
from minidiff.data import images
from minidiff.data.dataset import load_pixels
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.samplers import SeededNoise
from minidiff.diffusion.schedule import Ladder
from minidiff.errors import InputError
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.pages.explain import page
from minidiff.evaluation.sets import HELD_OUT, check_origin, read_real
from minidiff.root import Reading, Rooted
from minidiff.sampling import plan
from minidiff.sampling.figures import FIGURES, Subject
from minidiff.sampling.finished_run import open_pipeline


@dataclass(frozen=True)
class ExplainConfig(Reading, Rooted):
    data: tuple[str, ...] = ()         # real images with their splits; none: the root's
    run: str = "ROOT/diffusion"        # finished diffusion run, its best/ or a snapshot
    out: str = "ROOT/explain"          # explain.html and explain.json
    images: int = 64                   # held-out images behind the loss and the latents
    labels: int = 4                    # labels of which one image is followed from noise, at most
    shown: int = 6                     # rungs of the ladder whose pictures are shown
    ladder: Ladder = Recipe.ladder     # spacing of the noise levels
    steps: int = Recipe.steps          # of the images that are followed
    guidance: float = Recipe.guidance  # of these; 1: none
    level: float = 1.0                 # σ near which attention is looked at
    reference: int = 200               # steps of heun that samplers are compared with
    seed: int = 0                      # of the noise, of the conditions, and of which images
    skip_bad: bool = False             # leave unreadable images out, listed and counted
    device: str = "auto"               # auto, cpu, cuda, cuda:1 …

    def __post_init__(self):
        super().__post_init__()
        if min(self.images, self.labels) < 1 or self.reference < 2 or not 0 < self.level < math.inf:
            raise InputError(f"--images {self.images} --labels {self.labels}: 1 or more; "
                             f"--reference {self.reference}: 2 or more; --level {self.level:g}: "
                             "above 0")


@torch.no_grad()
def run(cfg: ExplainConfig) -> dict:
    """Show what a trained run does, figure by figure, each with its code."""
    m, facts = opened(cfg)
    out = runs.open_run(cfg.out, cfg, "explain", free=("device",), model=facts["model"],
                        data=facts["data"])
    found, pictures = {}, {}
    for name, (figure, _) in (bar := tqdm(FIGURES.items(), "figures")):
        bar.set_postfix_str(name)
        numbers, pictures[name] = figure(m)
        found[name] = plain(numbers)
    result = jsonable({"run": cfg.run, **facts, "figures": found,
                       "code": {name: [source(each) for each in (own, *core)]
                                for name, (own, core) in FIGURES.items()},
                       "provenance": runs.provenance()})
    runs.write_json(out / "explain.json", result)
    runs.write_atomic(out / "explain.html", page(result, {
        name: [(title, [(row, images.png_bytes(images.grid(shots, len(shots))))
                        for row, shots in rows.items()]) for title, rows in strips]
        for name, strips in pictures.items()}))
    print(out / "explain.html")
    return result


def opened(cfg: ExplainConfig) -> tuple[Subject, dict[str, Any]]:
    """What the figures are of, and the facts for the page."""
    pipeline, facts = open_pipeline(cfg.run, cfg.device)
    place, variables = pipeline.vae.scale.device, pipeline.conditioner.variables
    recipe = Recipe(ladder=cfg.ladder, steps=cfg.steps, guidance=cfg.guidance)
    replace(recipe, steps=max(cfg.steps, cfg.reference)).require_levels(pipeline.denoiser.schedule)
    path = Path(cfg.run)
    home = next((folder for folder in (path, path.parent, path.parent.parent)
                 if (folder / "config.json").is_file()), path)
    trained = {"times": "uniform", "min_snr": 0.0, "seed": cfg.seed,
               **runs.read_json(home / "config.json")}
    log = [row for row in runs.read_log(home / "log.jsonl") if row.get("val_loss") is not None]
    log = [row for row in log if row["step"] == facts.get("step")] or log
    real = read_real(cfg.data, cfg, seed=trained["seed"], root=cfg.root)
    real = real.select(split=HELD_OUT)
    notes = check_origin(real, {cfg.run: set(facts.get("trained_on", ()))})
    some = [real.rows[i] for i in order(len(real), cfg.seed, range(min(cfg.images, len(real))))]
    real, pixels = load_pixels(replace(real, rows=some), facts["size"], skip_bad=cfg.skip_bad,
                               grey="yes" if facts["grey"] else "no")
    rows = plan.plan(variables, facts["rows"], per_label=1, seed=cfg.seed)[: cfg.labels]
    cells = pipeline.size // pipeline.vae.factor
    noise = SeededNoise([int(row["seed"]) for row in rows],
                        (pipeline.vae.config.latent_channels, cells, cells), place)()
    labels, own = ({name: each.to(place) for name, each in encode(variables, few).items()}
                   for encode, few in ((plan.encode, rows), (var.encode, real.rows)))
    names = [", ".join([row["label"], *(row.get(v.name, "") or f"{v.name} unknown"
                                        for v in variables if v.name != "label")]) for row in rows]
    subject = Subject(pipeline, facts["grey"], recipe, names, labels, noise,
                      pipeline.encode(pixels), own, trained,
                      [log[-1].get(f"val_loss_t{q}") for q in range(4)]
                      if log and "std" not in facts else [],  # of another average, it is not known
                      cfg.shown, cfg.level, cfg.reference)
    return subject, {
        "model": runs.sha256(Path(cfg.run) / "model.safetensors"), "data": real.fingerprint,
        "prediction": pipeline.denoiser.prediction, "size": pipeline.size,
        "latents": list(noise.shape[1:]), "conditions": [str(v) for v in variables],
        "weights": sum(x.numel() for x in pipeline.denoiser.net.parameters()),
        "steps": cfg.steps, "ladder": cfg.ladder, "guidance": cfg.guidance,
        "sampler": recipe.sampler, "notes": [*real.notes, *notes]}


def plain(value: Any) -> Any:
    """Numbers of a figure as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, Tensor) else value


def source(function: Callable) -> dict[str, str]:
    """A function's own code, and where it stands."""
    where = function.__module__.replace(".", "/")
    return {"name": f"{where}.py: {function.__qualname__}",
            "text": dedent(inspect.getsource(function)).rstrip()}
