"""Features kept between runs, by the content of an image and the identity of the extractor; and
features of files.

Both compute in batches of one fixed size, so that the features of an image do not depend on which
others were missing: what comes from a cache and what is computed without one are the same bytes (on
one machine with one PyTorch; elsewhere the same to about 1e-5 of their size).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from minidiff.data import images
from minidiff.errors import InputError
from minidiff.evaluation.features.backbones import BATCH, Network
from minidiff.evaluation.features.extractor import Extractor, digest, filled
from minidiff.runs import save_tensors

# images after which what has been computed is written, so that a long run that is stopped goes on
SAVED = 64 * BATCH


class FeatureCache:
    """Called as (extractor, pixels, keys) → float32 (N,d); one file an extractor,
    `<folder>/<name>.safetensors`.

    A file that is damaged, or was made by another identity under this name, is not used, and a line
    says so. `folder` None keeps nothing.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)

    def __call__(self, extractor: Extractor, pixels: Tensor,
                 keys: Sequence[str] | None = None) -> Tensor:
        """uint8 (N,3,H,W) → float32 (N,d), of which only those missing are computed, each different
        image once.

        `keys` name the content of the very pixels, size included; None takes their SHA-256. Raises
        InputError where an extractor gives other than finite numbers.
        """
        keys = content_keys(pixels) if keys is None else keys
        assert len(keys) == len(pixels), (len(keys), len(pixels))
        names = [hashlib.sha256(key.encode()).digest() for key in keys]
        features, row = self._read(extractor)
        missing = {}
        for i, name in enumerate(names):
            if name not in row:
                missing.setdefault(name, i)
        index, new = list(missing.values()), list(missing)
        with tqdm(total=len(index), desc=extractor.name, unit=" images",
                  disable=len(index) < 200) as bar:
            for start in range(0, len(index), SAVED):
                parts = [] if features is None else [features]
                for at in range(start, min(start + SAVED, len(index)), BATCH):
                    part = index[at : min(at + BATCH, start + SAVED)]
                    parts.append(_compute(extractor, pixels, part))
                    bar.update(len(part))
                features = torch.cat(parts)
                row |= {name: len(row) + k for k, name in enumerate(new[start : start + SAVED])}
                self._write(extractor, features, row)
        return extractor(pixels) if features is None else features[[row[name] for name in names]]

    def _path(self, extractor: Extractor) -> Path:
        return self.folder / f"{extractor.name}.safetensors"

    def _read(self, extractor: Extractor) -> tuple[Tensor | None, dict[bytes, int]]:
        """The stored features and the row of each name; none where there is no file to be
        trusted.
        """
        if self.folder is None or not self._path(extractor).is_file():
            return None, {}
        path = self._path(extractor)
        try:
            stored = safetensors.torch.load(path.read_bytes())
            made_by, checksum = (bytes(stored.pop(name).numpy()).hex()
                                 for name in ("identity", "sha256"))
            whole = checksum == digest(stored)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            fault = f"is damaged ({str(error).splitlines()[0]})"
        else:
            if not whole:
                fault = "is damaged: its content is not what was written"
            elif made_by != extractor.identity:
                fault = f"is stale: made by {extractor.name} {made_by[:12]}, and it is {extractor.identity[:12]} now"
            else:
                return stored["features"], {bytes(x): i
                                            for i, x in enumerate(stored["names"].numpy())}
        print(f"{path} {fault}; its features are computed anew")
        return None, {}

    def _write(self, extractor: Extractor, features: Tensor, row: dict[bytes, int]) -> None:
        if self.folder is None:
            return
        # rows stand in the order they came
        stored = {"features": features, "names": _bytes(b"".join(row)).view(-1, 32)}
        save_tensors(self._path(extractor),
                     {**stored, "identity": _bytes(bytes.fromhex(extractor.identity)),
                      "sha256": _bytes(bytes.fromhex(digest(stored)))})


def content_keys(pixels: Tensor) -> list[str]:
    """SHA-256 of each image of uint8 (N,C,H,W), its shape included; a grey image has one key,
    however it is stored.
    """
    keys = []
    for image in pixels:
        grey = image.stride(0) == 0 or all(torch.equal(image[0], other) for other in image[1:])
        keys.append(digest({"pixels": image[:1] if grey else image}))
    return keys


def stream(network: Network, files: Sequence[str | Path], *, workers: int = 2,
           faults: list[str] | None = None) -> Iterator[tuple[list[Path], Tensor]]:
    """Image files of any sizes and modes → (files, features (n,d)) batch after batch, decoded while
    the network runs.

    The features are those of `network(pixels)`, bit for bit, and no more than three batches are in
    memory. A file that cannot be read raises InputError; with a list for `faults` it is left out
    and its message goes there.
    """

    def prepared(path: Path) -> Tensor:
        return network.prepare(torch.tensor(images.read(path)[None]))[0]

    waiting, todo = deque(), iter([Path(file) for file in files])
    # Pillow and PyTorch let go of the interpreter while they work
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            batch = []
            while len(batch) < BATCH:
                while len(waiting) < 2 * BATCH and (path := next(todo, None)):
                    waiting.append((path, pool.submit(prepared, path)))
                if not waiting:
                    break
                path, result = waiting.popleft()
                try:
                    batch.append((path, result.result()))
                except InputError as error:
                    if faults is None:
                        raise
                    faults.append(str(error))
            if not batch:
                return
            yield [path for path, _ in batch], network.run(torch.stack([x for _, x in batch]))
    finally:
        pool.shutdown(cancel_futures=True)


def _compute(extractor: Extractor, pixels: Tensor, index: list[int]) -> Tensor:
    grey = pixels.stride(1) == 0  # one channel in memory: kept so, for it is resized once then
    batch = filled((pixels[:, :1] if grey else pixels)[index], BATCH)
    features = extractor(batch.expand(-1, pixels.shape[1], -1, -1))[: len(index)]
    assert features.dtype == torch.float32 and features.ndim == 2 and len(features) == len(
        index), features.shape
    if not features.isfinite().all():
        raise InputError(f"{extractor.name} gives other than finite numbers for these images: its "
                         "weights are at fault")
    return features


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
