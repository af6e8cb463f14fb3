"""Sample a set of images from a finished diffusion run: a folder of the same form as a data set.

    python sample.py                                            100 images a label of runs/demo/diffusion → runs/demo/samples
    python sample.py --run runs/x/diffusion --per-label 200 --guidance 2 --out runs/x/samples
    python sample.py --label covid --given sex=F age=70 --per-label 20 --out runs/demo/women-of-70
    python sample.py verify --out runs/demo/samples --k 8       make 8 of them again and compare

Each image is a function of its seed and its conditions alone. The same command again fills the gaps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import minidiff
from minidiff import config, runs
from minidiff import variables as var
from minidiff.counted import ROWS, seeded
from minidiff.data import images
from minidiff.data.table import write_table
from minidiff.diffusion import store
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.errors import InputError
from minidiff.training.precision import pick_device

SET = 100              # images a set, each with its contact sheet
TOLERANCE = 1          # grey levels by which an image made again may differ: rounding, on other hardware or batch sizes


@dataclass(frozen=True)
class SampleConfig:
    run: str = "runs/demo/diffusion"       # finished diffusion run
    out: str = "runs/demo/samples"         # folder of the new data set
    label: tuple[str, ...] = ()            # labels to make; none: all that the model knows
    per_label: int = 100                   # images a label
    given: tuple[str, ...] = ()            # fixed conditions, e.g. sex=F age=70 (age= for unknown); the others are drawn
    sampler: Literal["dpmpp_2m", "ddim", "heun"] = "dpmpp_2m"  # see minidiff/diffusion/samplers.py
    ladder: Literal["logsigma", "karras", "leading", "trailing", "linspace"] = "logsigma"  # spacing of the noise levels
    steps: int = 16                        # steps of the sampler
    guidance: float = 1.5                  # 1: none; above, conditions are exaggerated and variety is lost
    eta: float = 0.0                       # fresh noise in ddim: 0 none, 1 as much as the forward process had
    seed: int = 0                          # of the first image, the next ones count up; and of the draw of conditions
    batch: int = 50                        # images in one pass of the network; only memory and speed depend on it
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def sample(cfg: SampleConfig) -> None:
    """Make a balanced set whose other conditions are drawn, label by label, from the training rows."""
    pipeline, facts = load(cfg)
    rows = plan(cfg, pipeline.conditioner.variables, facts["rows"])
    if cfg.eta and cfg.sampler != "ddim":
        raise InputError(f"--eta {cfg.eta:g} belongs to --sampler ddim, not to {cfg.sampler}")
    if cfg.steps > len(pipeline.denoiser.schedule):
        raise InputError(f"--steps {cfg.steps} is more than the {len(pipeline.denoiser.schedule)} levels of the schedule")
    recipe = recipe_of(cfg)
    model = runs.sha256(Path(cfg.run) / "model.safetensors")
    out = runs.open_run(cfg.out, cfg, "samples", free=("batch", "device"), model=model, data=facts["data"])
    if not (out / "plan.json").exists():
        runs.write_json(out / "plan.json", rows)
    rows = runs.read_json(out / "plan.json")  # what was begun is finished as planned, also by a later version
    missing = [row for row in rows if not whole(out / row["file_name"])]
    text = {"recipe": json.dumps(asdict(recipe)), "model": model, "minidiff": minidiff.__version__}

    labels = var.encode(pipeline.conditioner.variables, missing)
    chroma = []
    with tqdm(total=len(missing) * (cfg.steps + 1), desc=f"sampling {len(missing)} images", unit="image-step") as bar:
        made = pipeline.images(labels, [int(row["seed"]) for row in missing], recipe, batch=cfg.batch, progress=bar.update)
        for start, batch in zip(range(0, len(missing), cfg.batch), made):
            chroma.append((batch.amax(1) - batch.amin(1)).float().mean().item())
            for row, image in zip(missing[start : start + cfg.batch], as_trained(batch, facts["grey"])):
                if image.min() == image.max():
                    raise InputError(f"seed {row['seed']} gave an image of one grey: {cfg.run} is not trained far enough")
                images.write(out / row["file_name"], image, {**text, **row})

    for number in sorted({row["set"] for row in rows}, key=int):
        of_set = np.stack([images.read(out / row["file_name"]) for row in rows if row["set"] == number])
        images.write(out / "sheets" / f"set_{int(number):04d}.png", images.grid(of_set, columns=10))
    hashes = {row["file_name"]: runs.sha256(out / row["file_name"]) for row in rows}
    write_table(out / "metadata.csv", metadata(cfg, rows))
    hashes["metadata.csv"] = runs.sha256(out / "metadata.csv")
    runs.write_json(out / "manifest.json", {"model": model, "recipe": asdict(recipe), "sha256": hashes,
                                            "trained_on": facts.get("trained_on", [])})
    print(f"{out}: {len(rows)} images in {rows[-1]['set']} sets, {len(missing)} of them new"
          + (f"; mean chroma {np.mean(chroma):.2f} of 255 grey levels removed" if chroma and facts["grey"] else ""))


@dataclass(frozen=True)
class VerifyConfig:
    out: str = "runs/demo/samples"         # folder of samples
    k: int = 8                             # images to make again
    seed: int = 0                          # of the choice
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def verify(cfg: VerifyConfig) -> None:
    """Check every file against the manifest, make a few images again from their plan and compare."""
    out = Path(cfg.out)
    saved = config.from_dict(SampleConfig, {**config.load(out / "config.json"), "device": cfg.device})
    if not (out / "manifest.json").exists():
        raise InputError(f"{out} has no manifest.json: run `python sample.py` to its end first")
    manifest = runs.read_json(out / "manifest.json")
    hashes = manifest["sha256"]
    edited = [name for name, digest in hashes.items() if not (out / name).exists() or runs.sha256(out / name) != digest]
    if edited:
        raise InputError(f"{len(edited)} of {len(hashes)} files are not as they were written: {', '.join(edited[:5])}")
    if runs.sha256(Path(saved.run) / "model.safetensors") != manifest["model"]:
        raise InputError(f"{saved.run} holds another model now than the one that made {out}")
    pipeline, facts = load(saved)
    rows = runs.read_json(out / "plan.json")
    rows = [rows[i] for i in torch.randperm(len(rows), generator=seeded(cfg.seed))[: cfg.k].sort().values]
    labels = var.encode(pipeline.conditioner.variables, rows)
    again = torch.cat(list(pipeline.images(labels, [int(row["seed"]) for row in rows], recipe_of(saved))))
    again = as_trained(again, facts["grey"])
    worst = 0
    for row, image in zip(rows, again):
        there = torch.tensor(images.read(out / row["file_name"]))
        worst = max(worst, (image.int() - there.int()).abs().max().item())
        if worst > TOLERANCE:
            raise InputError(f"{out / row['file_name']} differs by {worst} grey levels from what its seed gives now")
    print(f"{out}: {len(hashes)} files as written; {len(rows)} images made again, "
          f"largest difference {worst} of 255 grey levels")


def load(cfg: SampleConfig) -> tuple[Pipeline, dict]:
    pipeline, facts = store.load_pipeline(Path(cfg.run))
    device = pick_device(cfg.device)
    pipeline.denoiser.net.to(device, memory_format=torch.channels_last), pipeline.vae.to(device)
    return pipeline, facts


def as_trained(batch: torch.Tensor, grey: bool) -> torch.Tensor:
    """Grey in, grey out: uint8 (n, 3, H, W) → (n, 1, H, W) by the mean of the channels, if training saw grey only."""
    return batch.float().mean(1, keepdim=True).round().to(torch.uint8) if grey else batch


def whole(path: Path) -> bool:
    """Is this image there and readable? One cut short is made again."""
    try:
        return images.read(path) is not None
    except InputError:
        return False


def metadata(cfg: SampleConfig, rows: list[dict[str, str]]) -> list[dict]:
    return [{**row, "sampler": cfg.sampler, "steps": cfg.steps, "guidance": cfg.guidance} for row in rows]


def recipe_of(cfg: SampleConfig) -> Recipe:
    return Recipe(cfg.sampler, cfg.ladder, cfg.steps, cfg.guidance, cfg.eta)


def plan(cfg: SampleConfig, variables: list[var.Variable], known: list[dict]) -> list[dict[str, str]]:
    """One row an image: file name, label, set, seed and conditions.

    The conditions of an image are those of one training row of its label, unknown cells included. The rows are drawn by
    systematic sampling: sorted by their conditions, every (rows / images)th is taken from a random start, so that
    synthetic patients have the joint distribution of age, sex and view that the real ones have, without the luck of the
    draw (independent draws gave 60 of 100 AP where the training rows have 53). Then they are shuffled among the sets.
    """
    by_name = {v.name: v for v in variables}
    fixed = dict(item.partition("=")[::2] for item in cfg.given)
    for item, (name, cell) in zip(cfg.given, fixed.items()):
        if "=" not in item or name == "label":
            raise InputError(f"--given {item}: " + ("choose labels by --label" if name == "label" else "write name=value"))
        if name not in by_name:
            raise InputError(f"--given {name}={cell}: the model has no such condition; it has {', '.join(by_name)}")
        by_name[name].encode(cell, "--given")
    coarse_first = sorted(variables, key=lambda v: isinstance(v, var.Number))

    def place(row: dict) -> list[tuple]:
        return [(row[v.name] == "", v.encode(row[v.name]) if row[v.name] else 0) for v in coarse_first]

    if cfg.label and "label" not in by_name:
        raise InputError(f"--label {' '.join(cfg.label)}: the model is not conditioned on label but on {', '.join(by_name)}")
    labels = cfg.label or (by_name["label"].values if "label" in by_name else ("any",))
    rows = []
    for label in labels:
        if "label" in by_name:
            by_name["label"].encode(label, "--label")
        if list(labels).count(label) > 1:
            raise InputError(f"--label {label}: named twice")
        if Path(label).name != label:
            raise InputError(f"label {label!r} cannot name a folder")
        pool = sorted((row for row in known if row.get("label", label) == label), key=place)
        generator = seeded(cfg.seed, len(rows), ROWS)
        start = torch.rand((), generator=generator).item()
        for i in torch.randperm(cfg.per_label, generator=generator).tolist():
            drawn, number = pool[int((i + start) * len(pool) / cfg.per_label)], len(rows)
            rows.append({"file_name": f"images/{label}/{number:06d}.png", "label": label, "set": str(number // SET + 1),
                         "seed": str(cfg.seed + number), **{k: v for k, v in {**drawn, **fixed}.items() if k != "label"}})
    return rows


VERBS = {"sample": (SampleConfig, sample), "verify": (VerifyConfig, verify)}

if __name__ == "__main__":
    config.main(VERBS, default="sample", doc=__doc__)
