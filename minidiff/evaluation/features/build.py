"""The extractors by name, and how a list of them is made from what a user writes.

    python -m minidiff.evaluation.features.build convert densenet121-all.pt xrv.safetensors

`convert` takes the tensors out of a pickled model, such as TorchXRayVision's, and runs nothing that
is in the file.

A spec is `pixels`, `classifier`, `vae`, or `NAME=FILE` for the networks below. `NAME=FILE@SHA256`
holds the file to its hash; `inception-…=auto` downloads the public file, `inception-…=https://…`
the same file from elsewhere.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.errors import InputError
from minidiff.evaluation.features.backbones import BACKBONES, CONVERT, Backbone, load
from minidiff.evaluation.features.extractor import (
    Extractor,
    PixelPCA,
    PredictorFeatures,
    VAEFeatures,
)
from minidiff.evaluation.features.inception import INCEPTIONS, download
from minidiff.evaluation.features.pickled import read_pickled
from minidiff.runs import save_tensors, sha256

OWN = ("pixels", "classifier", "vae")  # need no file
NETWORKS: dict[str, Backbone] = {**BACKBONES, **INCEPTIONS}
EXTRACTORS = (*OWN, *NETWORKS)


def build(specs: Sequence[str], *, train: Tensor, judge: Any = None, vae: Any = None,
          folder: str | Path | None = None, device: str = "cpu") -> list[Extractor]:
    """The extractors of these specs, in their order; none given means pixels and, where there is a
    judge, classifier.

    `train`: real training images, uint8 (N,3,H,W), on which the axes of `pixels` are found.
    `judge`: the Predictor of `classifier`. `vae`: the generator's autoencoder, of `vae`, which is
    refused as the only one: it would be its own judge. `folder`: where downloads are kept. Raises
    InputError, for every spec before the first is worked on.
    """
    specs = list(specs) or ["pixels", *(["classifier"] if judge else [])]
    makers: dict[str, Callable[[], Extractor]] = {}
    for spec in specs:
        name, given, value = spec.partition("=")
        if name not in EXTRACTORS:
            near = difflib.get_close_matches(name, EXTRACTORS, 1)
            raise InputError(f"extractor {name!r} is not "
                             f"known{f', nearest: {near[0]}' if near else ''}; allowed are "
                             f"{', '.join(OWN)} and, as NAME=FILE, {', '.join(NETWORKS)}")
        if name in makers:
            raise InputError(f"extractor {name} is given twice; one file for each name")
        if name in NETWORKS:
            makers[name] = _network(name, value, folder, device)
        elif given:
            raise InputError(f"extractor {spec!r}: {name} takes no file")
        else:
            makers[name] = _own(name, train, judge, vae)
    if list(makers) == ["vae"]:
        raise InputError("the generator's own VAE cannot be the only extractor: what it does not "
                         "see, neither the samples nor the real images would show; add pixels, "
                         "classifier or NAME=FILE")
    return [make() for make in makers.values()]


def describe(extractor: Extractor) -> dict[str, Any]:
    """What a report says of an extractor: name, identity and, of a network, its file, hash and
    preprocessing.
    """
    return {"name": extractor.name, "identity": extractor.identity,
            **getattr(extractor, "source", {})}


def _own(name: str, train: Tensor, judge: Any, vae: Any) -> Callable[[], Extractor]:
    if name == "pixels":
        return lambda: PixelPCA().fit(train)
    model, lacks = {"classifier": (judge, "a classifier run with a judge"),
                    "vae": (vae, "a VAE run")}[name]
    if model is None:
        raise InputError(f"extractor {name} needs {lacks}, and there is none")
    return partial(PredictorFeatures if name == "classifier" else VAEFeatures, model)


def _network(name: str, value: str, folder: str | Path | None,
             device: str) -> Callable[[], Extractor]:
    row = NETWORKS[name]
    pinned = re.fullmatch(r"(.*)@([0-9a-fA-F]{64})", value)
    file, pin = pinned.groups() if pinned else (value, "")
    if not file:
        public = ", auto" if name in INCEPTIONS else ""
        raise InputError(f"extractor {name} needs its weights, as {name}=FILE{public}: "
                         f"{row.source}")
    fetched = file == "auto" or file.startswith(("https://", "http://"))
    if fetched and name not in INCEPTIONS:
        raise InputError(f"extractor {name}={file}: only Inception's file is downloaded; give the "
                         f"path of {row.source}")
    if not fetched and not Path(file).is_file():
        raise InputError(f"extractor {name}: there is no file {file}")

    def make() -> Extractor:
        path = Path(file) if not fetched else download(folder=folder,
                                                       **({} if file == "auto" else {"url": file}))
        return load(name, row, path, sha256=pin, device=device)

    return make


def convert(file: str | Path, out: str | Path) -> int:
    """Write the tensors of a pickled model or state dict as .safetensors; returns their number.
    Raises InputError.
    """
    out = Path(out)
    if out.exists() or out.suffix != ".safetensors":
        raise InputError(
            f"{out} {'exists already' if out.exists() else 'has not the ending .safetensors'}; "
            "give another")
    tensors = read_pickled(file)
    save_tensors(out, {name: x.clone() for name, x in tensors.items()})
    return len(tensors)


def main(words: Sequence[str]) -> int:
    if len(words) != 3 or words[0] != "convert":
        print(f"usage: {CONVERT} FILE.pt OUT.safetensors", file=sys.stderr)
        return 2
    try:
        n = convert(words[1], words[2])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{words[2]}: {n} tensors of {words[1]} (SHA-256 {sha256(words[1])}); its own SHA-256 is "
          f"{sha256(words[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
