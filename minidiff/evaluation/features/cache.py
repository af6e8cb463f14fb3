"""Features kept between runs, by the content of an image and the identity of the extractor.

They are computed in batches of one fixed size, so that the features of an image do not depend on
which others were missing: from the cache or not, they are the same bytes (on one machine with one
PyTorch; elsewhere the same to about 1e-5 of their size).
"""

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from minidiff.errors import InputError
from minidiff.evaluation.features.backbones import BATCH
from minidiff.evaluation.features.extractor import Extractor, digest, filled
from minidiff.runs import save_tensors

SAVED = 64 * BATCH  # images after which features are written: a stopped run loses no more


class FeatureCache:
    """Called as (extractor, pixels) → float32 (N,d); one file `<name>.safetensors` an extractor.

    A file that is damaged, or of another identity under this name, is not used, and a line says so.
    `folder` None keeps nothing.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)

    def __call__(self, extractor: Extractor, pixels: Tensor) -> Tensor:
        """uint8 (N,3,H,W) → float32 (N,d), of which only those missing are computed, each once.

        Raises InputError where an extractor gives NaN or infinity.
        """
        names = [hashlib.sha256(key.encode()).digest() for key in content_keys(pixels)]
        features, row = self._read(extractor)
        first = {name: i for i, name in reversed(list(enumerate(names))) if name not in row}
        missing = sorted(first.items(), key=lambda item: item[1])
        with tqdm(total=len(missing), desc=extractor.name, unit=" images",
                  disable=len(missing) < 200) as bar:
            for start in range(0, len(missing), SAVED):
                parts = [] if features is None else [features]
                new = missing[start : start + SAVED]
                for at in range(0, len(new), BATCH):
                    index = [i for _, i in new[at : at + BATCH]]
                    parts.append(_compute(extractor, pixels, index))
                    bar.update(len(index))
                features = torch.cat(parts)
                row |= {name: len(row) + k for k, (name, _) in enumerate(new)}
                self._write(extractor, features, row)
        return extractor(pixels) if features is None else features[[row[name] for name in names]]

    def _path(self, extractor: Extractor) -> Path:
        return self.folder / f"{extractor.name}.safetensors"

    def _read(self, extractor: Extractor) -> tuple[Tensor | None, dict[bytes, int]]:
        """The stored features and the row of each name; none without a file to be trusted."""
        if self.folder is None or not self._path(extractor).is_file():
            return None, {}
        path = self._path(extractor)
        try:
            stored = safetensors.torch.load(path.read_bytes())
            made_by, checksum = (bytes(stored.pop(name).numpy()).hex()
                                 for name in ("identity", "sha256"))
            if checksum != digest(stored):
                raise ValueError("its content is not what was written")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            print(f"{path} is damaged ({str(error).splitlines()[0]}); its features are computed "
                  "anew")
            return None, {}
        if made_by != extractor.identity:
            print(f"{path} is stale: made by {extractor.name} {made_by[:12]}, and it is "
                  f"{extractor.identity[:12]} now; its features are computed anew")
            return None, {}
        return stored["features"], {bytes(x): i for i, x in enumerate(stored["names"].numpy())}

    def _write(self, extractor: Extractor, features: Tensor, row: dict[bytes, int]) -> None:
        if self.folder is None:
            return
        # rows stand in the order they came
        stored = {"features": features, "names": _bytes(b"".join(row)).view(-1, 32)}
        save_tensors(self._path(extractor),
                     {**stored, "identity": _bytes(bytes.fromhex(extractor.identity)),
                      "sha256": _bytes(bytes.fromhex(digest(stored)))})


def content_keys(pixels: Tensor) -> list[str]:
    """SHA-256 of each image of uint8 (N,C,H,W) and its shape, the same however grey is stored."""
    keys = []
    for image in pixels:
        grey = image.stride(0) == 0 or all(torch.equal(image[0], other) for other in image[1:])
        keys.append(digest({"pixels": image[:1] if grey else image}))
    return keys


def _compute(extractor: Extractor, pixels: Tensor, index: list[int]) -> Tensor:
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
