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
from minidiff.pixels import to_depth
from minidiff.sampling import edits
from minidiff.sampling.plan import Row, encode
from minidiff.training.compiling import Compile, wanted
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision

WORTH = 500  # calls of the UNet that a minute of compiling is worth


def open_pipeline(run: str | Path, device: str | torch.device = "auto", precision: str = "",
                  against: str | Path = "", deep: bool = False) -> tuple[Pipeline, dict]:
    """The model of a run on its device, with the weaker run to guide by; and the facts beside it.

    It makes pixels of 8 bits, or with `deep` of as many as those that it was trained on.

    `precision`: "" for float32 with the process left as it is. In bf16 and fp16 the UNet's weights
    are cast once: autocast would cast them in each call, and lift every norm to float32. The
    context, computed once a batch, and the VAE stay in float32, on a GPU with TF32: on an H100 that
    moved pixels by a grey level at most, and bf16 by up to 9.
    """
    (pipeline, facts), place = store.load_pipeline(Path(run)), pick_device(device)
    models = [pipeline.denoiser.net]
    if against:
        weaker, _ = store.load_pipeline(Path(against))
        pipeline = pipeline.guided_by(weaker)
        models.append(weaker.denoiser.net)
    for network in (*models, pipeline.vae):
        network.to(place, memory_format=torch.channels_last)
    if precision:  # it sets how the whole process computes: only where a command asks for it
        dtype = Precision(precision, place).dtype
        for model in models:
            model.unet.to(dtype)
    return replace(pipeline, fill=place.type != "cpu", dtype=getattr(
        torch, f"uint{facts.get('bits', 8) if deep else 8}")), facts


def compiled(pipeline: Pipeline, choice: Compile, calls: int) -> Pipeline:
    """The pipeline for this many calls, its UNet compiled where that is said or pays."""
    place = pipeline.vae.scale.device
    if not wanted(choice, place, calls, WORTH):
        return pipeline
    # a shape of its own for guided and for unguided calls: one for all would be slower
    pipeline.denoiser.net.unet = torch.compile(pipeline.denoiser.net.unet, dynamic=False)
    return replace(pipeline, fill=True)


def make_images(pipeline: Pipeline, rows: Sequence[Row], recipe: Recipe, *,
                seeds: Sequence[int] | None = None, batch: int = 50,
                progress: Callable[[int], object] = lambda n: None,
                rejects: list[int] | None = None) -> Tensor:
    """Pixels (n, 3, S, S), an image a row: by its seed, or one of `seeds`, and from its origin, in
    its mask where it has one."""
    variables, size = pipeline.conditioner.variables, pipeline.size
    origins = [images.read(on_disk(row["origin"]), deep=True) for row in rows if row.get("origin")]
    squares = [to_depth(torch.tensor(images.square(origin, size)), pipeline.dtype).expand(3, -1, -1)
               for origin in origins]
    masks = [edits.read_mask(on_disk(row["mask"]), origin, size)
             for row, origin in zip(rows, origins) if row.get("mask")]
    return torch.cat(list(pipeline.images(
        encode(variables, rows), seeds or [int(row["seed"]) for row in rows], recipe, batch=batch,
        origin=torch.stack(squares) if squares else None,
        before=encode(variables, [edits.before(row) for row in rows]) if recipe.invert else None,
        mask=torch.stack(masks) if masks else None, progress=progress, rejects=rejects)))
