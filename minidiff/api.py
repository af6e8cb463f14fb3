"""minidiff from Python: a finished experiment that makes images, and the distance between two sets
of them.

    model = minidiff.load("runs/x")
    model.sample(label="covid", sex="F", age=70, n=4, seed=0, guidance=1.5)   → uint8 (4, H, W), or (4, H,
                                                                              W, 3) in colour
    minidiff.fid("real", "synthetic"), minidiff.kid("real", "synthetic")      two folders, or two uint8
                                                                              arrays
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.errors import InputError
from minidiff.evaluation.fid import Distance, measure
from minidiff.pixels import to_grey
from minidiff.sampling import plan
from minidiff.sampling.pipeline import make_images, open_pipeline
from minidiff.variables import Number


class Model:
    """A finished diffusion model. `conditions` names what it can be asked for: values, or the range
    that training saw.
    """

    def __init__(self, pipeline: Pipeline, facts: dict):
        self.pipeline, self.facts = pipeline, facts
        self.conditions = {v.name: (v.low, v.high) if isinstance(v, Number) else v.values
                           for v in pipeline.conditioner.variables}

    def __repr__(self) -> str:
        return f"minidiff model of {self.pipeline.size} px images, conditioned on {self.conditions}"

    def sample(self, *, n: int = 1, seed: int = 0, guidance: float = Recipe.guidance,
               steps: int = Recipe.steps, sampler: str = Recipe.sampler, batch: int = 50,
               **conditions) -> np.ndarray:
        """n images: uint8 (n, S, S), or (n, S, S, 3) where training saw colour; image k has the
        seed seed + k.

        Conditions that are not given follow the joint distribution of the training rows, as in
        sample.py; None is unknown. InputError for what the model does not know.
        """
        if n < 1:
            raise InputError(f"n = {n}: 1 or more images")
        variables, label = self.pipeline.conditioner.variables, conditions.pop("label", None)
        given = [f"{name}={'' if value is None else value}" for name, value in conditions.items()]
        labels = [str(label)] if label is not None else list(self.conditions.get("label", ("any",)))
        rows = plan.plan(variables, self.facts["rows"], labels=labels if "label" in self.conditions
                         or label else (), per_label=-(-n // len(labels)), given=given, seed=seed)
        recipe = Recipe(sampler=sampler, steps=steps, guidance=guidance)
        made = make_images(self.pipeline, rows[:n], recipe, batch=batch)
        if self.facts["grey"]:
            return to_grey(made)[:, 0].numpy()
        return made.permute(0, 2, 3, 1).numpy()


def load(root: str | Path, device: str = "auto") -> Model:
    """The finished diffusion model of an experiment: its root, the run itself, or a checkpoint such
    as its best/.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder of an experiment")
    folder = root if (root / "model.json").exists() else root / "diffusion"
    return Model(*open_pipeline(folder, device))


def fid(real, synthetic, *, extractor: str = "inception", draws: int = 20,
        seed: int = 0) -> Distance:
    """Fréchet distance of two folders or uint8 arrays of images, in Inception's features unless
    another extractor is named.

    A float that also holds `floor`, `sizes` and `extractor`, and prints them. InputError where
    Inception's weights are not at hand: nothing is downloaded unasked.
    """
    return measure(real, synthetic, extractor=extractor, draws=draws, seed=seed, metrics=["FID"])[0]


def kid(real, synthetic, *, extractor: str = "inception", draws: int = 20,
        seed: int = 0) -> Distance:
    """Kernel distance, as `fid`; unbiased, hence also below 0 where the two are alike."""
    return measure(real, synthetic, extractor=extractor, draws=draws, seed=seed, metrics=["KID"])[0]
