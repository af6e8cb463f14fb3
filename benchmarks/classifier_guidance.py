"""What does a classifier take for covid? Guidance by its gradient, through the decoder, draws it.

    python benchmarks/classifier_guidance.py --root runs/guidance

A known shortcut, a bright square of MARK in a corner of phantoms of 64 px:

    generator    the demo's model, trained further on its phantoms, of which every other one of each
                 label has the marker: it can draw the marker, and knows nothing of what it means
    classifiers  covid or not, of 1,600 phantoms: `clean` has never seen the marker; `shortcut` saw
                 it on every image of covid and on no other. `judge` is as clean, of other phantoms
    images       100 without any condition, from the same noise in every cell: unguided, and guided
                 towards covid by either classifier at three scales
    marked       the share whose corner is LIMIT brighter than what lies around it
    covid        the share that the judge reads as covid; `own`, that its guide does

Intervals are Wilson's. `gained` and `lost`: images that have the marker with guidance alone, and
without it alone. Everything is kept in --root; it writes classifier_guidance.json and
docs/classifier_guidance.png.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from benchmarks import rare  # noqa: E402
from minidiff import runs  # noqa: E402
from minidiff.classification.predictor import Predictor, fit  # noqa: E402
from minidiff.data import images, phantom  # noqa: E402
from minidiff.data.table import read_table, write_table  # noqa: E402
from minidiff.diffusion.generate import Pipeline  # noqa: E402
from minidiff.diffusion.guidance import by_classifier, conditioned  # noqa: E402
from minidiff.diffusion.samplers import SeededNoise, ddim  # noqa: E402
from minidiff.pixels import to_grey, to_uint8  # noqa: E402
from minidiff.sampling.finished_run import open_pipeline  # noqa: E402
from minidiff.statistics import wilson  # noqa: E402
from minidiff.variables import Category  # noqa: E402

FILE, SHEET = (Path(__file__).parents[1] / name for name in (
    "benchmarks/classifier_guidance.json", "docs/classifier_guidance.png"))
MARK, WHITE, AROUND, LIMIT = slice(3, 9), 255, slice(0, 12), 100  # rows and columns; grey levels
PROTOCOL = {"images": 100, "scales": [1.0, 3.0, 10.0], "shown": 3.0, "steps": 24,
            "generator steps": 400, "classifier steps": 300, "checked": 200, "limit": LIMIT}
SHOWN = 12   # images in a row of the sheet
SEEDS = {"clean": rare.ORACLE, "shortcut": rare.ORACLE, "judge": rare.TRAIN}  # of their phantoms
LogP = Callable[[Tensor], Tensor]


def marked(pixels: Tensor) -> Tensor:
    """A copy of uint8 (…, H, W) with the marker."""
    pixels = pixels.clone()
    pixels[..., MARK, MARK] = WHITE
    return pixels


def has_marker(pixels: Tensor) -> Tensor:
    """Which of uint8 (N, C, H, W) have it, (N,) bool."""
    x = to_grey(pixels)[:, 0].double()
    inside, area = x[:, MARK, MARK], x[:, AROUND, AROUND]
    n, m = inside[0].numel(), area[0].numel()
    around = (area.sum((1, 2)) - inside.sum((1, 2))) / (m - n)
    return inside.mean((1, 2)) - around > LIMIT


def phantoms(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 (n, 1, 64, 64), every other one of covid, and which are."""
    covid = torch.arange(n) % 2 == 1
    labels = ("normal", "covid", "pneumonia", "covid")
    drawn = [phantom.phantom(seed, 10 * k, label=labels[k % 4]) for k in range(n)]
    return torch.stack([torch.from_numpy(p.image) for p in drawn])[:, None], covid


def classifier(root: Path, name: str) -> Predictor:
    if not (root / name / "predictor.safetensors").exists():
        x, covid = phantoms(1600, SEEDS[name])
        x = torch.where(covid[:, None, None, None], marked(x), x) if name == "shortcut" else x
        made = Predictor([Category("label", ("other", "covid"))], width=16, size=64, seed=0)
        fit(made, x, {"label": covid.long()}, steps=PROTOCOL["classifier steps"], lr=2e-3, batch=32,
            augment="plain", progress=name)
        made.save(root / name)
    return Predictor.load(root / name).requires_grad_(False)


def generator(root: Path) -> Pipeline:
    base, _ = rare.base(root)
    rows, data = read_table(root / "base-data").rows, root / "marked-data"
    if not (data / "metadata.csv").exists():
        for k, row in enumerate(sorted(rows, key=lambda row: (row["label"], row["file_name"]))):
            x = torch.from_numpy(images.read(row["file"]))
            images.write(data / row["file_name"], (marked(x) if k % 2 else x).numpy())
        write_table(data / "metadata.csv", [{k: v for k, v in row.items() if k != "file"}
                                            for row in rows])
    if not (root / "diffusion/model.json").exists():
        train.train_diffusion(train.DiffusionConfig(
            data=(str(data),), root=str(root), init=base, train="all", snapshots=0,
            steps=PROTOCOL["generator steps"]))
    return open_pipeline(root / "diffusion", "cpu")[0]


def log_covid(pipeline: Pipeline, guide: Predictor) -> LogP:
    def log_p(z: Tensor) -> Tensor:
        return guide(pipeline.vae.decode(z).mean(1, keepdim=True))["label"].log_softmax(1)[:, 1]
    return log_p


@torch.no_grad()
def sampled(pipeline: Pipeline, n: int, log_p: LogP | None = None, scale: float = 0.0,
            steps: int = PROTOCOL["steps"]) -> Tensor:
    """uint8 (n, 1, S, S) without any condition, from seeds 0 … n − 1."""
    vae, made = pipeline.vae, []
    sigmas = pipeline.denoiser.schedule.ladder(steps, "logsigma")
    shape = vae.config.latent_channels, *[pipeline.size // vae.factor] * 2
    for seeds in torch.arange(n).split(25):
        null = pipeline.conditioner.null(len(seeds), vae.scale.device)
        denoise = conditioned(pipeline.denoiser, null)
        denoise = by_classifier(denoise, log_p, scale) if log_p else denoise
        noise = SeededNoise(seeds.tolist(), shape, vae.scale.device)()
        for x, _ in ddim(denoise, noise * (1 + sigmas[0] ** 2).sqrt().item(), sigmas):  # noqa: B007
            pass
        made.append(to_uint8(vae.decode(x / (1 + sigmas[-1] ** 2).sqrt().item())).cpu())
    return to_grey(torch.cat(made))


def share(hits: Tensor) -> list[float]:
    return [hits.double().mean().item(), *wilson(int(hits.sum()), len(hits))]


def reads(predictor: Predictor, pixels: Tensor) -> Tensor:
    return predictor.predict(pixels)["label"].argmax(1) == 1


@torch.no_grad()
def detector(pipeline: Pipeline | None = None) -> dict[str, float]:
    """The share of fresh phantoms that are found to be marked; also as the VAE gives them back."""
    plain, _ = phantoms(PROTOCOL["checked"], rare.TEST)
    sets = {"unmarked": plain, "marked": marked(plain)}
    if pipeline:
        sets |= {f"{name}, by the VAE": to_uint8(torch.cat([
            pipeline.vae.decode(pipeline.encode(part)) for part in x.split(25)])).cpu()
            for name, x in sets.items()}
    return {name: has_marker(x).double().mean().item() for name, x in sets.items()}


def cell(pixels: Tensor, before: Tensor, read: dict[str, Predictor], guide: str,
         scale: float) -> dict:
    now, there = has_marker(pixels), has_marker(before)
    found = {"guide": guide, "scale": scale, "marked": share(now),
             "covid": share(reads(read["judge"], pixels))}
    return found if guide == "none" else {
        **found, "gained": int((now & ~there).sum()), "lost": int((there & ~now).sum()),
        "own": share(reads(read[guide], pixels))}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/guidance"))
    root, n = p.parse_args().root, PROTOCOL["images"]
    train.draw_pictures = lambda *_, **__: None  # nobody looks at them
    pipeline, read = generator(root), {name: classifier(root, name) for name in SEEDS}
    fresh, covid = phantoms(PROTOCOL["checked"], rare.TEST)
    accuracy = {f"{name}, {what}": share(reads(guide, x) == covid) for name, guide in read.items()
                for what, x in (("unmarked", fresh), ("marked", marked(fresh)))}
    made = {("none", 0.0): sampled(pipeline, n)} | {
        (name, scale): sampled(pipeline, n, log_covid(pipeline, read[name]), scale)
        for name in ("clean", "shortcut") for scale in PROTOCOL["scales"]}
    plain = made["none", 0.0]
    runs.write_json(FILE, {
        "protocol": PROTOCOL, "detector": detector(pipeline), "accuracy": accuracy,
        "cells": [cell(x, plain, read, *key) for key, x in made.items()]})
    shown = [plain, *(made[name, PROTOCOL["shown"]] for name in ("clean", "shortcut"))]
    images.write(SHEET, images.grid(torch.cat([x[:SHOWN] for x in shown]), columns=SHOWN))


if __name__ == "__main__":
    main()
