"""How far the codec alone moves the distances: held-out X-rays as JPEG against themselves as PNG.

    python benchmarks/compression.py --cxr DIR [--classifier RUN] [--extractor NAME=FILE …]

Every held-out image is written as PNG and as JPEG of each quality, at its own size and as a square
of --size px, and read again. FD and KD of the two folders are those of one set of images, so that
without a codec both would be 0 (FD) and below 0 (KD counts no image twice). Beside them stands the
floor, real against real of other patients at the same n, and what a second set of other patients
scores against PNG and against JPEG: the codec's share of a distance that a generator would be
judged by. Pixels and texture are measured always, a classifier and networks if they are named.
Writes benchmarks/compression.json.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff import runs  # noqa: E402
from minidiff.classification.predictor import Predictor  # noqa: E402
from minidiff.data import images  # noqa: E402
from minidiff.data.compression import compression  # noqa: E402
from minidiff.data.table import read_table  # noqa: E402
from minidiff.evaluation.features.build import build, describe  # noqa: E402
from minidiff.evaluation.features.extractor import Spectrum  # noqa: E402
from minidiff.evaluation.metrics import distances  # noqa: E402

QUALITIES = (95, 90, 75, 50)
SAVED = Path(__file__).with_suffix(".json")
KINDS = {"JPEG": QUALITIES, "WEBP": (80,)}


def through(picture: np.ndarray, kind: str, quality: int, folder: Path) -> np.ndarray:
    """A picture (1,H,W) as it comes back from a file."""
    buffer, path = io.BytesIO(), folder / f"x{images.ENDINGS[kind][0]}"
    Image.fromarray(picture[0]).save(buffer, kind, quality=quality)
    path.write_bytes(buffer.getvalue())
    assert kind != "JPEG" or compression([path])["quality"][1] == quality
    return images.read(path)


def stack(pictures: list[np.ndarray], size: int) -> Tensor:
    """uint8 (N,3,S,S) of pictures of any size."""
    x = np.stack([images.square(picture, size)[:1] for picture in pictures])
    return torch.from_numpy(x).expand(-1, 3, -1, -1)


def grey(file: str) -> np.ndarray:
    return images.read(file).mean(0, keepdims=True).round().astype(np.uint8)


def measure(name: str, features: dict[str, np.ndarray], patients: list[str]) -> list[dict]:
    plain, n = features["PNG"], len(patients)
    draws, rows = distances.disjoint_draws(patients, n, n, 20, 0)[0], []
    for metric, call in (("FD", distances.fid), ("KD", distances.kid)):
        floor = distances.floor(call, real=plain, patients=patients, n=n, m=n, repeats=50, seed=0)
        for kind in features:
            other = features[kind]
            across = [call(real=plain[a], fake=other[b]) - call(real=plain[a], fake=plain[b])
                      for a, b in draws]
            rows.append({"extractor": name, "metric": metric, "files": kind, "n": n,
                         "itself": call(real=plain, fake=other), "floor": floor._asdict(),
                         "n_of_halves": len(draws[0][0]), "added": float(np.mean(across)),
                         "added_sd": float(np.std(across, ddof=1))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxr", required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--classifier", default="")
    parser.add_argument("--extractor", nargs="*", default=[])
    args = parser.parse_args()
    table = read_table(args.cxr)
    train, held = table.select(split="train"), table.select(split=("val", "test"))
    patients = held.column("patient")
    judge = Predictor.load(Path(args.classifier) / "judge") if args.classifier else None
    fitted = stack([grey(file) for file in train.column("file")], args.size)
    spaces = build(["pixels", *(["classifier"] if judge else []), *args.extractor], train=fitted,
                   judge=judge)
    spaces = [*spaces, Spectrum().fit(fitted)]
    raw = [grey(file) for file in held.column("file")]
    found = []
    with tempfile.TemporaryDirectory() as name:
        for when, pictures, size in (
                ("as they are, then resized", raw, args.size),
                ("as squares", [images.square(picture, args.size) for picture in raw], args.size)):
            coded = {"PNG": pictures} | {
                f"{kind} {quality}": [through(p, kind, quality, Path(name)) for p in
                                      tqdm(pictures, f"{kind} {quality}")]
                for kind, of_kind in KINDS.items() for quality in of_kind}
            for e in spaces:
                features = {kind: e(stack(of, size)).double().numpy() for kind, of in coded.items()}
                found += [{"compressed": when, "size": size, **row}
                          for row in measure(e.name, features, patients)]
    runs.write_json(SAVED, {
        "images": len(held), "patients": len(set(patients)),
        "sources": compression(held.column("file")), "fingerprint": held.fingerprint,
        "extractors": [describe(e) for e in spaces], "rows": found})
    for row in found:
        print(f"{row['compressed'][:10]:12}{row['extractor']:14}{row['metric']} {row['files']:8} "
              f"itself {row['itself']:9.4f}  floor {row['floor']['median']:8.4f} "
              f"({row['floor']['low']:.4f} to {row['floor']['high']:.4f}) "
              f"added {row['added']:8.4f} ± {row['added_sd']:.4f}")


if __name__ == "__main__":
    main()
