"""Samples made again, as they were made: in whole batches, in the same precision, on the same kind
of device.

The last bits of an image depend on the batch that it was in, for libraries choose their kernels by
the shape. So batches are made again whole, as the plan has them. An image that was drawn again by
another seed came in a smaller batch, with those of its batch that were, too: its seed says at which
attempt, and that batch is made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff import runs
from minidiff.counted import seeded
from minidiff.data import images
from minidiff.data.table import read_table
from minidiff.diffusion.generate import Recipe
from minidiff.errors import InputError, count
from minidiff.evaluation import verify as chain
from minidiff.pixels import to_grey
from minidiff.root import Rooted
from minidiff.sampling.finished_run import make_images, open_pipeline
from minidiff.sampling.plan import RETRY, Row

# Grey levels by which an image may differ elsewhere: docs/sampling.md says what was measured.
TOLERANCE = {"fp32": 1, "tf32": 1, "fp16": 1, "bf16": 4}


@dataclass(frozen=True)
class VerifyConfig(Rooted):
    writes: ClassVar[str] = ""             # nothing
    out: str = "ROOT/samples"              # folder of samples
    k: int = 8                             # images to make again, or more: in whole batches
    seed: int = 0                          # of the choice
    device: str = "auto"                   # auto: the kind that made them; cpu, cuda, cuda:1 …


def verify(cfg: VerifyConfig) -> None:
    """Check every file against the manifest, and make a few batches again to compare."""
    out, manifest = Path(cfg.out), runs.read_json(Path(cfg.out) / "manifest.json")
    run, hashes = runs.read_json(out / "config.json")["run"], manifest["sha256"]
    edited = [name for name, digest in hashes.items()
              if not (out / name).exists() or runs.sha256(out / name) != digest]
    if edited:
        raise InputError(f"{len(edited)} of {len(hashes)} files are not as they were written: "
                         f"{', '.join(edited[:5])}")
    if runs.sha256(chain.root_of(out) / run / "model.safetensors") != manifest["model"]:
        raise InputError(f"{run} holds another model now than the one that made {out}")
    again = make_again(out, cfg)
    name, worst = max(again.apart.items(), key=lambda item: item[1])
    if worst > again.limit:
        raise InputError(f"{out / name} differs by {worst:g} grey levels from what its seed gives "
                         f"now, allowed are {again.limit} ({again.where})")
    print(f"{out}: {count(len(hashes), 'file')} as written; {count(len(again.apart), 'image')} "
          f"made again in whole batches, largest difference {worst:g} of 255 grey levels, allowed "
          f"{again.limit} ({again.where})")


def make_again(folder: Path, cfg: VerifyConfig | chain.VerifyConfig) -> chain.Again:
    """Batches of a folder of samples, drawn by cfg.seed until they hold cfg.k images, beside what
    its files show."""
    manifest, saved = (runs.read_json(folder / name) for name in ("manifest.json", "config.json"))
    root, folder, apart = chain.root_of(folder), folder.resolve(), {}
    made_on = {"precision": saved.get("precision", "fp32"), **manifest.get("made_on", {})}
    auto = "cpu" if made_on.get("device") == "cpu" else "auto"
    plan = runs.read_json(folder / "plan.json")
    size = min(saved["batch"], len(plan))
    cells = batches(folder, plan, size)
    with chain.inside(root):  # paths in its config and its table are relative to this
        pipeline, facts = open_pipeline(
            saved["run"], auto if cfg.device == "auto" else cfg.device, made_on["precision"],
            saved.get("against", ""), deep=True)
        for i in torch.randperm(len(cells), generator=seeded(cfg.seed)).tolist():
            rows, seeds = cells[i]
            if len(apart) >= cfg.k:
                break
            found = make_images(pipeline, rows, Recipe(**manifest["recipe"]), seeds=seeds,
                                batch=size, rejects=[])
            found = to_grey(found) if facts["grey"] else found
            apart |= {row["file_name"]: levels_apart(image, images.read(row["file"], deep=True))
                      for row, image, seed in zip(rows, found, seeds) if int(row["seed"]) == seed}
    return chain.Again(apart, TOLERANCE[made_on["precision"]], "made in {} on {}, checked on {}"
                       .format(made_on["precision"], made_on.get("machine", "an unknown machine"),
                               runs.machine()["machine"]))


def levels_apart(image: Tensor, file: np.ndarray) -> float:
    """The largest difference of two images of one depth, in grey levels of 255."""
    image = image.numpy()
    assert image.dtype == file.dtype, (image.dtype, file.dtype)
    worst = np.abs(image.astype(int) - file.astype(int)).max()
    return worst / (257 if file.dtype == np.uint16 else 1)


def batches(folder: Path, plan: Sequence[Row], size: int) -> list[tuple[list[Row], list[int]]]:
    """The batches in which the images of a folder came to be: their rows, and the seeds of that
    attempt, which are those in the rows where the image was kept."""
    first = {row["file_name"]: int(row["seed"]) for row in plan}
    made = {row["file_name"]: row for row in read_table(folder, split=False).rows}
    rows, found = [made[name] for name in first], []
    for start in range(0, len(rows), size):
        cell = rows[start : start + size]
        tries = [(int(row["seed"]) - first[row["file_name"]]) // RETRY for row in cell]
        for attempt in sorted(set(tries)):
            there = [row for row, last in zip(cell, tries) if last >= attempt]
            found.append((there, [first[row["file_name"]] + attempt * RETRY for row in there]))
    return found
