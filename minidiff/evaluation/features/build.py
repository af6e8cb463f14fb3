"""The extractors by name, and how a list of them is made from what a user writes.

A spec is `pixels`, `classifier`, `vae`, or `NAME=FILE` for the networks below. `NAME=FILE@SHA256`
holds the file to its hash; `inception-…=auto` downloads the public file, `inception-…=https://…`
the same file from elsewhere.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.errors import InputError
from minidiff.evaluation.features.backbones import BACKBONES, Backbone, load
from minidiff.evaluation.features.extractor import (
    Extractor,
    PixelPCA,
    PredictorFeatures,
    VAEFeatures,
)
from minidiff.evaluation.features.inception import INCEPTIONS, download

OWN = ("pixels", "classifier", "vae")  # need no file
NETWORKS: dict[str, Backbone] = {**BACKBONES, **INCEPTIONS}
EXTRACTORS = (*OWN, *NETWORKS)


def build(specs: Sequence[str], *, train: Tensor, judge: Any = None, vae: Any = None,
          folder: str | Path | None = None, device: str = "cpu") -> list[Extractor]:
    """The extractors of these specs, in their order; without specs, pixels and the judge's.

    `train`: real training images, uint8 (N,3,H,W), on which the axes of `pixels` are found.
    `judge`: the Predictor of `classifier`. `vae`: the generator's autoencoder; alone it is refused,
    for it would be its own judge. `folder`: where downloads are kept. Every spec is checked before
    the first is worked on, and refused by InputError.
    """
    own = {"pixels": lambda: PixelPCA().fit(train), "classifier": lambda: PredictorFeatures(judge),
           "vae": lambda: VAEFeatures(vae)}
    absent = {"classifier": "a classifier run with a judge" if judge is None else "",
              "vae": "a VAE run" if vae is None else ""}
    makers: dict[str, Callable[[], Extractor]] = {}
    for spec in specs or ["pixels", *(["classifier"] if judge else [])]:
        name, given, value = spec.partition("=")
        if name not in EXTRACTORS:
            near = difflib.get_close_matches(name, EXTRACTORS, 1)
            raise InputError(f"extractor {name!r} is not known"
                             f"{f', nearest: {near[0]}' if near else ''}; allowed are "
                             f"{', '.join(OWN)} and, as NAME=FILE, {', '.join(NETWORKS)}")
        if name in makers:
            raise InputError(f"extractor {name} is given twice; one file for each name")
        if name in OWN and given:
            raise InputError(f"extractor {spec!r}: {name} takes no file")
        if absent.get(name):
            raise InputError(f"extractor {name} needs {absent[name]}, and there is none")
        makers[name] = own[name] if name in OWN else _network(name, value, folder, device)
    if list(makers) == ["vae"]:
        raise InputError("the generator's own VAE cannot be the only extractor: what it does not "
                         "see, neither the samples nor the real images would show; add pixels, "
                         "classifier or NAME=FILE")
    return [make() for make in makers.values()]


def describe(extractor: Extractor) -> dict[str, Any]:
    """Name and identity of an extractor and, of a network, its file, hash and preprocessing."""
    return {"name": extractor.name, "identity": extractor.identity,
            **getattr(extractor, "source", {})}


def distance_name(metric: str, extractor: str) -> str:
    """What "FID" or "KID" is called in the features of an extractor, given by its name.

    Only in Inception's features are they FID and KID; the same formulas in others are a Fréchet
    distance and a kernel distance.
    """
    elsewhere = {"FID": "Fréchet distance", "KID": "kernel distance"}
    return metric if extractor in INCEPTIONS else elsewhere[metric]


def _network(name: str, value: str, folder: str | Path | None,
             device: str) -> Callable[[], Extractor]:
    row = NETWORKS[name]
    pinned = re.fullmatch(r"(.*)@([0-9a-fA-F]{64})", value)
    file, pin = pinned.groups() if pinned else (value, "")
    if not file:
        public = ", auto" if name in INCEPTIONS else ""
        raise InputError(f"extractor {name} needs its weights, as {name}=FILE{public}: "
                         f"{row.source}")
    url = re.match(r"auto$|https?://", file)
    if url and name not in INCEPTIONS:
        raise InputError(f"extractor {name}={file}: only Inception's file is downloaded; give the "
                         f"path of {row.source}")
    if not url and not Path(file).is_file():
        raise InputError(f"extractor {name}: there is no file {file}")

    def make() -> Extractor:
        path = Path(file)
        if url:
            mirror = {} if file == "auto" else {"url": file}
            path = download(folder=folder, **mirror)
        return load(name, row, path, sha256=pin, device=device)

    return make
