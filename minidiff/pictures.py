"""The pictures of a training run: loss.png, grids/ and strips/ of samples, reconstructions.png."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff import distributed, runs
from minidiff import variables as var
from minidiff.counted import ROWS, uniform
from minidiff.data import images
from minidiff.data.dataset import Images
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.evaluation.metrics.neighbours import distances, equalised


def draw_losses(run: Path, names: Sequence[str]) -> None:
    """loss.png from log.jsonl."""
    log = runs.read_log(run / "log.jsonl")
    if log and distributed.rank() == 0:
        runs.write_atomic(run / "loss.png", curves(log, names, f"{run.parent.name} / {run.name}"))


def curves(log: Sequence[dict], names: Sequence[str], title: str) -> bytes:
    """PNG of logged losses over the steps, on a log scale; below, the memorisation gap, if any."""
    from matplotlib.figure import Figure  # here, for it takes half a second that --help can spare

    def points(name: str) -> list[tuple[int, float]]:
        return [(line["step"], line[name]) for line in log if line.get(name) is not None]

    def plot(axes, name: str, label: str, **style) -> None:
        marker = "." if len(points(name)) < 15 else None
        axes.plot(*zip(*points(name)), label=label, linewidth=1.3, marker=marker, **style)

    heights = [3, 1] if points("gap") else [1]
    figure = Figure(figsize=(6, 4.2 if points("gap") else 3.2), dpi=120, layout="constrained")
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for name in filter(points, names):
        plot(axes[0], name, name.replace("_", " "))
    axes[0].set(yscale="log", title=title)
    axes[0].grid(alpha=0.25, which="both")
    axes[0].legend(frameon=False)
    if points("gap"):
        label = "held-out loss / training loss − 1"
        plot(axes[1], "gap", label, color="black")
        steps, lower = zip(*points("gap_low"))
        axes[1].fill_between(steps, lower, [gap for _, gap in points("gap")], alpha=0.25,
                             color="black", label="to its 95 % lower bound")
        axes[1].axhline(0, color="grey", linewidth=0.8)
        axes[1].set(ylabel=label)
        axes[1].legend(frameon=False, fontsize=7)
    axes[-1].set(xlabel="step")
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def draw_pictures(run: Path, done: int, pipeline: Pipeline, train: Images, *, guidance: float,
                  seed: int) -> None:
    """loss.png, and samples after `done` steps; all ranks take part, for the model may be sharded.

    grids/ has eight samples a label, always with the same seeds and the same training rows;
    strips/ some of them above the training image that each is nearest to.
    """
    chosen = []
    for k, label in enumerate(train.table.labels):
        rows = train.table.select(label=label).rows
        chosen += [rows[int(u * len(rows))] for u in uniform(seed, [k], ROWS, 8)[0].tolist()]
    labels = var.encode(pipeline.conditioner.variables, chosen)
    batches = pipeline.images(labels, range(len(chosen)), Recipe(guidance=guidance))
    made = torch.cat(list(batches))
    draw_losses(run, ["loss", "val_loss", *(f"val_loss_t{quarter}" for quarter in range(4))])
    if distributed.rank() == 0:
        name = f"step_{done:08d}.png"
        images.write(run / "grids" / name, images.grid(made, columns=8))
        some = made[torch.linspace(0, len(made) - 1, 8).long()]
        nearest = distances(equalised(some), equalised(train.pixels)).argmin(1)
        pairs = torch.cat([some, train.pixels[nearest]])
        images.write(run / "strips" / name, images.grid(pairs, columns=8))


def draw_reconstructions(run: Path, real: Tensor, reconstructed: Tensor) -> None:
    """reconstructions.png: eight images above what the autoencoder makes of them."""
    pairs = torch.cat([real[:8], reconstructed[:8]])
    images.write(run / "reconstructions.png", images.grid(pairs, len(reconstructed[:8])))
