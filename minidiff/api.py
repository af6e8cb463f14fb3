"""minidiff from Python: sample from a finished experiment, and compare two sets of images.

    model = minidiff.load("runs/x")
    model.sample(label="covid", sex="F", age=70, n=4)   → uint8 (4, H, W), or (4, H, W, 3) in colour
    minidiff.fid("real", "synthetic")                   two folders, or two uint8 arrays
    minidiff.kid("real", "synthetic")
"""

from pathlib import Path

import numpy as np

from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.errors import InputError
from minidiff.evaluation.fid import Distance, measure
from minidiff.pixels import to_grey
from minidiff.sampling import plan
from minidiff.sampling.finished_run import make_images, open_pipeline
from minidiff.variables import ANY


class Model:
    """A finished diffusion model; `conditions`: name → its values, or its range in training."""

    def __init__(self, pipeline: Pipeline, facts: dict):
        self.pipeline, self.facts = pipeline, facts
        self.conditions = {v.name: v.values or (v.low, v.high)
                           for v in pipeline.conditioner.variables}

    def __repr__(self) -> str:
        return f"minidiff model of {self.pipeline.size} px images, conditioned on {self.conditions}"

    def sample(self, *, n: int = 1, seed: int = 0, guidance: float = Recipe.guidance,
               steps: int = Recipe.steps, sampler: str = Recipe.sampler, batch: int = 50,
               **conditions) -> np.ndarray:
        """n images: uint8 (n, S, S), or (n, S, S, 3) if training saw colour; image k has seed + k.

        Conditions that are not given are drawn jointly from the training rows, as in sample.py;
        None is unknown. InputError for a value that the model does not know.
        """
        if n < 1:
            raise InputError(f"n = {n}: 1 or more images")
        variables, label = self.pipeline.conditioner.variables, conditions.pop("label", None)
        given = [f"{name}={'' if value is None else value}" for name, value in conditions.items()]
        labels = [] if label is None else [str(label)]
        each = -(-n // len(labels or self.conditions.get("label", (ANY,))))
        rows = plan.plan(variables, self.facts["rows"], labels=labels, per_label=each, given=given,
                         seed=seed)
        made = make_images(self.pipeline, rows[:n], batch=min(batch, n), recipe=Recipe(
            sampler=sampler, steps=steps, guidance=guidance))
        if self.facts["grey"]:
            return to_grey(made)[:, 0].numpy()
        return made.permute(0, 2, 3, 1).numpy()


def load(root: str | Path, device: str = "auto") -> Model:
    """The finished diffusion model in a root, in its diffusion run, or in that run's best/."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of an experiment")
    folder = root if (root / "model.json").exists() else root / "diffusion"
    return Model(*open_pipeline(folder, device, "auto"))


def fid(real, synthetic, *, extractor: str = "inception", draws: int = 20,
        seed: int = 0) -> Distance:
    """Fréchet distance of two folders or uint8 arrays of images, FID in Inception's features.

    A float that also holds and prints `floor`, `sizes` and `extractor`. InputError if Inception's
    weights are missing: nothing is downloaded unasked.
    """
    return measure(real, synthetic, extractor=extractor, draws=draws, seed=seed, metrics=["FID"])[0]


def kid(real, synthetic, *, extractor: str = "inception", draws: int = 20,
        seed: int = 0) -> Distance:
    """Kernel distance, as `fid`; unbiased, so it may be below 0 if the two are alike."""
    return measure(real, synthetic, extractor=extractor, draws=draws, seed=seed, metrics=["KID"])[0]
