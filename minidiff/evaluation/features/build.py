"""The extractors by name, how a list of them is made from what a user writes, and their cache.

A spec is `pixels`, `classifier`, `vae`, or `NAME=FILE` for the networks below. `NAME=FILE@SHA256`
holds the file to its hash; `inception-…=auto` downloads the public file, `inception-…=https://…`
the same file from elsewhere.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import InputError, refuse
from minidiff.evaluation.features.backbones import BACKBONES, BATCH, Backbone, Network
from minidiff.evaluation.features.extractor import (
    Extractor,
    PixelPCA,
    PredictorFeatures,
    VAEFeatures,
    digest,
    filled,
)
from minidiff.evaluation.features.inception import INCEPTIONS, download
from minidiff.runs import save_tensors

SAVED = 64 * BATCH  # images after which features are written: a stopped run loses no more
OWN = ("pixels", "classifier", "vae")  # need no file
NETWORKS: dict[str, Backbone] = {**BACKBONES, **INCEPTIONS}
EXTRACTORS = (*OWN, *NETWORKS)


def build(specs: Sequence[str], *, train: Tensor, judge: Any = None, vae: Any = None,
          device: torch.device | str = "cpu") -> list[Extractor]:
    """The extractors of these specs, in their order; without specs, pixels and the judge's.

    `train`: real training images, uint8 (N,3,H,W), on which the axes of `pixels` are found.
    `judge`: the Predictor of `classifier`. `vae`: the generator's autoencoder; alone it is refused,
    for it would be its own judge. Every spec is checked before the first is worked on, and refused
    by InputError.
    """
    own = {"pixels": lambda: PixelPCA().fit(train), "classifier": lambda: PredictorFeatures(judge),
           "vae": lambda: VAEFeatures(vae)}
    absent = {"classifier": "a classifier run with a judge" if judge is None else "",
              "vae": "a VAE run" if vae is None else ""}
    makers: dict[str, Callable[[], Extractor]] = {}
    for spec in specs or ["pixels", *(["classifier"] if judge else [])]:
        name, given, value = spec.partition("=")
        near = difflib.get_close_matches(name, EXTRACTORS, 1)
        refuse({
            f"{name!r} is not known{f', nearest: {near[0]}' if near else ''}; allowed are "
            f"{', '.join(OWN)} and, as NAME=FILE, {', '.join(NETWORKS)}": name not in EXTRACTORS,
            f"{name} is given twice; one file for each name": name in makers,
            f"{spec!r}: {name} takes no file": name in OWN and given,
            f"{name} needs {absent.get(name)}, and there is none": absent.get(name)}, "extractor ")
        makers[name] = own[name] if name in OWN else _network(name, value, device)
    if list(makers) == ["vae"]:
        raise InputError("the generator's own VAE cannot be the only extractor: what it does not "
                         "see, neither the samples nor the real images would show; add pixels, "
                         "classifier or NAME=FILE")
    return [make() for make in makers.values()]


def describe(extractor: Extractor) -> dict[str, Any]:
    """Name and identity of an extractor and, of a network, its file, hash and preprocessing."""
    return {"name": extractor.name, "identity": extractor.identity,
            **getattr(extractor, "source", {})}


def _network(name: str, value: str, device: torch.device | str) -> Callable[[], Extractor]:
    row = NETWORKS[name]
    file, pin = re.fullmatch(r"(?s)(.*?)(?:@([0-9a-fA-F]{64}))?", value).groups()
    url = re.match(r"auto$|https?://", file)
    refuse({
        f"{name} needs its weights, as {name}=FILE{', auto' if name in INCEPTIONS else ''}: "
        f"{row.source}": not file,
        f"{name}={file}: only Inception's file is downloaded; give the path of "
        f"{row.source}": url and name not in INCEPTIONS,
        f"{name}: there is no file {file}": not url and not Path(file).is_file()}, "extractor ")

    def make() -> Extractor:
        mirror = {} if file == "auto" else {"url": file}
        return Network(name, row, download(**mirror) if url else file, pin=pin or "",
                       device=device)

    return make


class FeatureCache:
    """Features kept between runs, by the content of an image and the identity of the extractor.

    Called as (extractor, pixels) → float32 (N,d); one file `<name>.safetensors` an extractor. A
    file that is damaged, or of another identity under this name, is not used, and a line says so.
    `folder` None keeps nothing.

    Features are computed in batches of one fixed size, so that those of an image do not depend on
    which others were missing: from the cache or not, they are the same bytes (on one machine with
    one PyTorch; elsewhere the same to about 1e-5 of their size).
    """

    def __init__(self, folder: str | Path | None):
        self.folder = folder

    def __call__(self, extractor: Extractor, pixels: Tensor) -> Tensor:
        """uint8 (N,3,H,W) → float32 (N,d), of which only those missing are computed, each once.

        Raises InputError where an extractor gives NaN or infinity.
        """
        path = self.folder and Path(self.folder) / f"{extractor.name}.safetensors"
        names = [hashlib.sha256(key.encode()).digest() for key in content_keys(pixels)]
        features, row = _kept(path, extractor) if path else (None, {})
        first: dict[bytes, int] = {}
        for i, name in enumerate(names):
            if name not in row:
                first.setdefault(name, i)
        missing = list(first.items())
        with tqdm(total=len(missing), desc=extractor.name, unit=" images",
                  disable=len(missing) < 200) as bar:
            for start in range(0, len(missing), SAVED):
                parts, new = [] if features is None else [features], missing[start : start + SAVED]
                for at in range(0, len(new), BATCH):
                    index = [i for _, i in new[at : at + BATCH]]
                    parts.append(_computed(extractor, pixels, index))
                    bar.update(len(index))
                features = torch.cat(parts)
                row |= {name: len(row) + k for k, (name, _) in enumerate(new)}
                if path:   # rows stand in the order they came
                    stored = {"features": features, "names": _bytes(b"".join(row)).view(-1, 32)}
                    save_tensors(path, {**stored, **{
                        name: _bytes(bytes.fromhex(of)) for name, of in (
                            ("identity", extractor.identity), ("sha256", digest(stored)))}})
        return extractor(pixels) if features is None else features[[row[name] for name in names]]


def _kept(path: Path, extractor: Extractor) -> tuple[Tensor | None, dict[bytes, int]]:
    """The stored features and the row of each name; none without a file to be trusted."""
    if not path.is_file():
        return None, {}
    try:
        stored = safetensors.torch.load(path.read_bytes())
        made_by, checksum = (bytes(stored.pop(name).numpy()).hex()
                             for name in ("identity", "sha256"))
        if checksum != digest(stored):
            raise ValueError("its content is not what was written")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        print(f"{path} is damaged ({str(error).splitlines()[0]}); its features are computed anew")
        return None, {}
    if made_by != extractor.identity:
        print(f"{path} is stale: made by {extractor.name} {made_by[:12]}, and it is "
              f"{extractor.identity[:12]} now; its features are computed anew")
        return None, {}
    return stored["features"], {bytes(x): i for i, x in enumerate(stored["names"].numpy())}


def content_keys(pixels: Tensor) -> list[str]:
    """SHA-256 of each image of uint8 (N,C,H,W) and its shape, the same however grey is stored."""
    keys = []
    for image in pixels:
        grey = image.stride(0) == 0 or all(torch.equal(image[0], other) for other in image[1:])
        keys.append(digest({"pixels": image[:1] if grey else image}))
    return keys


def _computed(extractor: Extractor, pixels: Tensor, index: list[int]) -> Tensor:
    grey = pixels.stride(1) == 0  # one channel in memory: kept so, for it is resized once then
    batch = filled((pixels[:, :1] if grey else pixels)[index], BATCH)
    features = extractor(batch.expand(-1, pixels.shape[1], -1, -1))[: len(index)]
    assert features.dtype == torch.float32 and features.shape[:-1] == (len(index),), features.shape
    if not features.isfinite().all():
        raise InputError(f"{extractor.name} gives NaN or infinity for these images: its weights "
                         "are at fault")
    return features


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
