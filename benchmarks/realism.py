"""How often real and spoilt images are called told from real ones, and with which words.

    python benchmarks/realism.py             phantoms → their rows of benchmarks/realism.json
    python benchmarks/realism.py --cxr DIR   real chest X-rays of that folder → theirs

Every draw divides the patients anew: training, held-out and "synthetic" images are real images of
different patients, and the synthetic ones stay as they are or are spoilt. The spaces are pixels and
texture, which every report has.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff import runs  # noqa: E402
from minidiff.data import phantom  # noqa: E402
from minidiff.data.dataset import load_pixels  # noqa: E402
from minidiff.data.table import read_table  # noqa: E402
from minidiff.evaluation.features.extractor import PixelPCA  # noqa: E402
from minidiff.evaluation.matrix.controls import NOISE, blurred, noisy  # noqa: E402
from minidiff.evaluation.metrics.realism import measure  # noqa: E402
from minidiff.evaluation.metrics.report_rows import Side  # noqa: E402
from minidiff.evaluation.verdicts import verdicts  # noqa: E402
from minidiff.statistics import group_ids  # noqa: E402

SIZES, SIDE, DRAWN = (100, 300), 64, 1000
SAVED = Path(__file__).with_suffix(".json")
Change = Callable[[Tensor, np.random.Generator], Tensor]
Pool = tuple[Tensor, np.ndarray, np.ndarray]  # uint8 (N,1,S,S), labels, patients


def colour_noise(x: Tensor, rng: np.random.Generator, sigma: float = NOISE) -> Tensor:
    """White noise, another one in each channel."""
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
    return (x + 255 * sigma * noise).round().clamp(0, 255).byte()


def nothing_but_noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, x.shape, dtype=np.uint8))


def textured(x: Tensor, rng: np.random.Generator) -> Tensor:
    """A grain of some pixels' width on top."""
    grey = torch.full_like(x, 128)
    grain = blurred(noisy(grey, len(x), rng, sigma=0.4), len(x), rng, sigma=1.0).float() - 128
    return (x + grain).round().clamp(0, 255).byte()


def of_contrast(x: Tensor, rng: np.random.Generator) -> Tensor:
    return (128 + 0.8 * (x.float() - 128)).round().byte()


CHANGES: dict[str, Change] = {
    "real": lambda x, rng: x,
    "blur": lambda x, rng: blurred(x, len(x), rng),
    "noise": lambda x, rng: noisy(x, len(x), rng),
    "colour": colour_noise,
    "texture": textured,
    "contrast": of_contrast,
    "brightness": lambda x, rng: (x.int() + 20).clamp(max=255).byte(),
    "nothing but noise": nothing_but_noise,
}


def phantoms(n: int = DRAWN, side: int = SIDE) -> Pool:
    drawn = [phantom.phantom(7, i, side) for i in range(n)]
    pixels = torch.stack([torch.from_numpy(p.image) for p in drawn])[:, None]
    return pixels, *(np.array([p.row[name] for p in drawn]) for name in ("label", "patient"))


def of_folder(folder: str, side: int = SIDE) -> Pool:
    table, pixels = load_pixels(read_table(folder), side)
    return pixels[:, :1], *(np.array(table.column(name)) for name in ("label", "patient"))


def answer(pool: Pool, n: int, change: Change, seed: int) -> dict:
    """The answer on n images of some patients beside n held-out and other images of others."""
    pixels, labels, patients = pool
    rng = np.random.default_rng(seed)
    group = group_ids(patients)
    order, taken = rng.permutation(group.max() + 1)[group].argsort(kind="stable"), {}
    for name in ("synthetic", "heldout", "train"):  # patient by patient
        taken[name], order = order[:n], order[n:]
        order = order[group[order] != group[taken[name][-1]]]
    images = {name: pixels[torch.from_numpy(i)].expand(-1, 3, -1, -1) for name, i in taken.items()}
    images["synthetic"] = change(images["synthetic"], rng)
    space = PixelPCA().fit(images["train"])
    sides = {name: Side(space(x).double().numpy(), labels[taken[name]], patients[taken[name]])
             for name, x in images.items()}
    found = measure({space.name: sides}, images, seed=seed)
    return verdicts({"distances": [], "realism": found})[0]


def shares(pool: Pool, n: int, change: Change, draws: int) -> dict:
    """Answers of so many draws, and how often each word that says how came first, or at all."""
    found = [answer(pool, n, change, seed) for seed in range(draws)]
    ways = [[(x["name"], x["more"]) for x in v["ways"]] for v in found]
    return {"draws": draws, **{word: sum(v["answer"] == word for v in found)
                               for word in ("yes", "no", "not resolved")},
            **{key: _counted(some) for key, some in (
                ("first", [w[:1] for w in ways]), ("named", ways))}}


def _counted(ways: list[list[tuple[str, bool]]]) -> Mapping[str, int]:
    names = [f"{name} {'+' if more else '-'}" for some in ways for name, more in some]
    return {name: names.count(name) for name in sorted(set(names))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cxr", default="", help="a folder of real chest X-rays")
    parser.add_argument("--draws", type=int, default=100, help="of real images")
    parser.add_argument("--spoilt", type=int, default=20, help="draws of each control")
    args, rows = parser.parse_args(), []
    data, pool = ("cxr", of_folder(args.cxr)) if args.cxr else ("phantom", phantoms())
    for n, name in tqdm([(n, name) for n in SIZES for name in CHANGES]):
        draws = args.draws if name == "real" else args.spoilt
        rows.append({"data": data, "n": n, "change": name, **shares(pool, n, CHANGES[name], draws)})
        print(rows[-1], flush=True)
    kept = runs.read_json(SAVED)["rows"] if SAVED.is_file() else []
    rows += [row for row in kept if row["data"] != data]
    runs.write_json(SAVED, {"rows": sorted(rows, key=lambda row: row["data"])})


if __name__ == "__main__":
    main()
