"""A finished run, opened to sample from; and the images of the rows of a plan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minidiff.data import images
from minidiff.diffusion import store
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.names import on_disk
from minidiff.sampling.plan import Row, encode
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision


def open_pipeline(run: str | Path, device: str = "auto", precision: str = "",
                  against: str | Path = "", compile: bool = False) -> tuple[Pipeline, dict]:
    """The model of a run on its device, with the weaker run to guide by; and the facts beside it.

    `precision` is that of the UNet, "" for float32 with the process left as it is; the VAE stays in
    fp32.
    """
    (pipeline, facts), place = store.load_pipeline(Path(run)), pick_device(device)
    networks = [pipeline.denoiser.net, pipeline.vae]
    if against:
        weaker, _ = store.load_pipeline(Path(against))
        pipeline = pipeline.guided_by(weaker)
        networks.append(weaker.denoiser.net)
    for network in networks:
        network.to(place, memory_format=torch.channels_last)
    if compile:
        pipeline.denoiser.net.unet = torch.compile(pipeline.denoiser.net.unet)
    if precision:  # it allows TF32 in the whole process: only where a command asks for it
        pipeline = replace(pipeline, autocast=Precision(precision, place).autocast)
    return pipeline, facts


def make_images(pipeline: Pipeline, rows: Sequence[Row], recipe: Recipe, *,
                seeds: Sequence[int] | None = None, batch: int = 50,
                progress: Callable[[int], object] = lambda n: None,
                rejects: list[int] | None = None) -> Tensor:
    """uint8 (n, 3, S, S), an image a row: by its seed, or one of `seeds`, and from its origin."""
    squares = [torch.tensor(images.square(images.read(on_disk(row["origin"])), pipeline.size))
               for row in rows if row.get("origin")]
    origin = torch.stack([x.expand(3, -1, -1) for x in squares]) if squares else None
    return torch.cat(list(pipeline.images(
        encode(pipeline.conditioner.variables, rows), seeds or [int(row["seed"]) for row in rows],
        recipe, batch=batch, origin=origin, progress=progress, rejects=rejects)))
