"""The pictures of a training run: loss.png, grids/ and strips/ of samples, reconstructions.png."""

import io
from collections import Counter
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
from minidiff.evaluation.metrics.pairwise import distances, equalised
from minidiff.names import text
from minidiff.pixels import to_depth, within

ROWS_AT_MOST = 16  # labels of a grid: findings stand together in hundreds of ways


def draw_losses(run: Path, names: Sequence[str]) -> None:
    """loss.png from log.jsonl: losses over the steps; below, the memorisation gap, if any."""
    from matplotlib.figure import Figure  # here, for it takes half a second that --help can spare

    log = runs.read_log(run / "log.jsonl")
    if not log or distributed.rank() > 0:
        return
    panels = [({name: name.replace("_", " ") for name in names},
               {"yscale": "log", "title": text(f"{run.parent.name} / {run.name}")})]
    if any("gap" in line for line in log):
        panels.append(({"gap": "gap", "gap_low": "its 95 % lower bound"},
                       {"title": "memorisation: held-out loss / training loss − 1"}))
    figure = Figure(figsize=(7, 2 + 1.4 * len(panels)), dpi=120, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False,
                           height_ratios=[5, 2][:len(panels)])[:, 0]
    for part, (labels, settings) in zip(axes, panels):
        for name, label in labels.items():
            points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
            if points:
                part.plot(*zip(*points), label=label, marker="." if len(points) < 15 else None)
        part.set(**settings)
        part.spines[["top", "right"]].set_visible(False)
        part.grid(alpha=0.25)
        part.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    axes[-1].set(xlabel="step")
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    runs.write_atomic(run / "loss.png", png.getvalue())


def draw_pictures(run: Path, done: int, pipeline: Pipeline, train: Images, *, guidance: float,
                  seed: int) -> None:
    """loss.png, and samples after `done` steps; all ranks take part, for the model may be sharded.

    grids/ has eight samples of each of the commonest labels, always with the same seeds and
    the same training rows; strips/ some of them above the training image that each is nearest to.
    """
    chosen, labels = [], Counter(train.table.column("label")).most_common(ROWS_AT_MOST)
    for k, label in enumerate(sorted(dict(labels))):
        rows = train.table.select(label=label).rows
        chosen += [rows[int(u * len(rows))] for u in uniform(seed, [k], ROWS, 8)[0].tolist()]
    labels = var.encode(pipeline.conditioner.variables, chosen)
    batches = pipeline.images(labels, range(len(chosen)), Recipe(guidance=guidance))
    made = torch.cat(list(batches))
    draw_losses(run, ["loss", "val_loss", *(f"val_loss_t{quarter}" for quarter in range(4))])
    if distributed.rank() == 0:
        name = f"step_{done:08d}.png"
        images.write(run / "grids" / name, images.grid(made, columns=8), quick=True)
        some = made[torch.linspace(0, len(made) - 1, 8).long()]
        real = to_depth(train.pixels[nearest(some, train.pixels)], torch.uint8)
        pairs = torch.cat([some, real])
        images.write(run / "strips" / name, images.grid(pairs, columns=8), quick=True)


def nearest(some: Tensor, pixels: Tensor) -> Tensor:
    """Which of the images (N,3,S,S) is nearest to each of some (n,3,S,S), after equalisation: (n,).

    They come in parts, for 100,000 equalised images take 5 GB on the way.
    """
    own, parts = equalised(some), pixels.split(within(pixels.shape[-1]))
    return torch.cat([distances(own, equalised(part)) for part in parts], 1).argmin(1)


def draw_reconstructions(run: Path, real: Tensor, reconstructed: Tensor) -> None:
    """reconstructions.png: eight images above what the autoencoder makes of them."""
    pairs = to_depth(torch.cat([real[:8], reconstructed[:8]]), torch.uint8)
    images.write(run / "reconstructions.png", images.grid(pairs, len(reconstructed[:8])))
