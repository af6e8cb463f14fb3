"""How often each test of copying accuses when a known share of the synthetic images are copies;
the table of the docs.

    python benchmarks/memorisation.py                        phantoms of 64 px, 10 minutes
    python benchmarks/memorisation.py --data DIR [DIR …]     real X-rays of a data set

Each repeat draws three sets of images, no patient in two of them: training, held-out and
"synthetic" images, of which none has been copied. Some of the last are then replaced by copies of
training images. Copies are made as a generator might:

    noise       other brightness and contrast, fresh noise of .02 of the range, what a network blurs
                (0.7 px at 64 px)
    moved       the same after the turn, shift and zoom that training images are augmented with
                (`augment`, strength 1)
    mirrored    the same, every other one mirrored
    smooth      not copies, but every synthetic image blurred (1 px at 64 px): must not be accused

Distances of all pairs are computed once; a repeat picks rows and columns. An image is laid over the
32 of the whole pool that it is most like, so that some five of them are in any one training set.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.counted import generators  # noqa: E402
from minidiff.data import phantom  # noqa: E402
from minidiff.data.augmentation import augment  # noqa: E402
from minidiff.data.dataset import load_pixels  # noqa: E402
from minidiff.data.table import read_table  # noqa: E402
from minidiff.evaluation.metrics.copying import ALPHA, Space, copy_verdict  # noqa: E402
from minidiff.evaluation.metrics.pairwise import distances, overlaid, pixel_spaces  # noqa: E402
from minidiff.pixels import to_float  # noqa: E402

GRAIN, BLUR, SMOOTH = 0.02, 0.7, 1.0
AROUND, POOL = 32, 600
KINDS, SHARES = ("noise", "moved", "mirrored"), (0.0, 0.05, 0.1, 0.25)
TESTS = {"near": "near_p", "C_T": "copying_p", "closest": "closest_p", "calibrated": "calibrated_p",
         "AuthPct": "auth_p"}


def copies(images: Tensor, kind: str, seed: int = 0) -> Tensor:
    """uint8 (N,3,S,S) → the same, as the kinds above say; image k depends on k and the seed
    alone.
    """
    g = generators(seed, range(len(images)), 99)
    x = to_float(images[:, :1])
    if kind in ("moved", "mirrored"):
        x = augment(x, g)
    if kind == "mirrored":
        x = torch.where(torch.arange(len(x))[:, None, None, None] % 2 == 1, x.flip(-1), x)
    scale = images.shape[-1] / 64
    sigma = (SMOOTH if kind == "smooth" else BLUR) * scale
    x = torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest"))
    if kind != "smooth":
        gain, bias = torch.stack([torch.rand(2, generator=one)
                                  for one in g]).T[..., None, None, None] * 0.2 - 0.1
        x = x * (1 + gain) + bias + 2 * GRAIN * torch.stack([torch.randn(x.shape[1:], generator=one)
                                                             for one in g])
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def measured(pixels: Tensor, kinds=(*KINDS, "smooth"),
             progress: bool = False) -> dict[str, dict[str, Tensor]]:
    """Distances of images ("real") and of each kind of copies (N) to the images (N), in both pixel
    spaces.
    """
    real = pixel_spaces(pixels)
    sets = {kind: real if kind == "real"
            else pixel_spaces(copies(pixels, kind)) for kind in ("real", *kinds)}
    return {kind: {name: overlaid(x, real[name], AROUND) if x.ndim == 4
                   else distances(x, real[name]) for name, x in made.items()}
            for kind, made in tqdm(sets.items(), "distances", disable=not progress)}


def draw(patients: np.ndarray, sizes: tuple[int, int, int],
         rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of three sets of images, no patient in two."""
    order = np.argsort(rng.random(patients.max() + 1)[patients], kind="stable")
    sets, rest = [], order
    for size in sizes:
        sets.append(rest[:size])
        rest = rest[size:][patients[rest[size:]] != patients[sets[-1][-1]]]
    assert len(sets[-1]) == sizes[-1], f"{len(patients)} images are too few for {sizes}"
    return sets


def repeat(d: dict, patients: np.ndarray, kind: str, share: float, sizes: tuple[int, int, int],
           seed: int, permutations: int = 999) -> dict:
    """The verdict on one draw: "smooth", or a share of copies of that kind among synthetic
    images.
    """
    rng = np.random.default_rng(seed)
    train, heldout, fresh = draw(patients, sizes, rng)
    k = round(share * len(fresh))
    copied = rng.permutation(train)[:k]
    spaces = {}
    for name, real in d["real"].items():
        own = (d["smooth"] if kind == "smooth" else d["real"])[name][fresh[k:]]
        made = torch.cat([own, d[kind][name][copied]]) if k else own
        among = real[train][:, train].clone().fill_diagonal_(torch.inf)
        spaces[name] = Space(made[:, train], made[:, heldout], real[heldout][:, train],
                             among.amin(1))
    return copy_verdict(spaces, pairs=0, permutations=permutations, seed=seed,
                        patients=(patients[train].tolist(), patients[heldout].tolist()))


def rates(results: list[dict]) -> dict[str, float]:
    """Share of repeats in which each test is below .05 in some space (divided by the number of
    spaces, but for closest, whose p is over all spaces), and of each verdict."""
    found = {}
    for test, key in TESTS.items():
        limit = ALPHA if test == "closest" else ALPHA / len(results[0]["spaces"])
        found[test] = np.mean([min(s[key] for s in r["spaces"]) < limit for r in results])
    found["suspected"] = np.mean([r["suspected"] is True for r in results])
    found["open"] = np.mean([r["suspected"] is None for r in results])
    return found


def phantoms(n: int, size: int = 64) -> tuple[Tensor, np.ndarray]:
    drawn = [phantom.phantom(7, k, size) for k in range(n)]
    patients = [p.row["patient"] for p in drawn]
    pixels = torch.stack([torch.from_numpy(p.image) for p in drawn])[:, None].expand(-1, 3, -1, -1)
    return pixels, np.unique(patients, return_inverse=True)[1]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+",
                   help="real data sets, of which 600 images are used; without: 600 phantoms")
    p.add_argument("--repeats", type=int, default=200)
    p.add_argument("--sizes", type=int, nargs=3, action="append",
                   metavar=("TRAIN", "HELDOUT", "SYNTHETIC"))
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    if a.data:
        table, pixels = load_pixels(read_table(a.data), 64)
        patients = np.unique(table.column("patient"), return_inverse=True)[1]
        some = np.sort(np.random.default_rng(a.seed).permutation(len(pixels))[:POOL])
        pixels, patients = pixels[some], np.unique(patients[some], return_inverse=True)[1]
    else:
        pixels, patients = phantoms(POOL)
    d = measured(pixels, progress=True)
    columns = [*TESTS, "suspected", "open"]
    for sizes in a.sizes or [(125, 125, 125), (300, 100, 125)]:
        print(f"\n{len(pixels)} images of {patients.max() + 1} patients; {sizes[0]} training, "
              f"{sizes[1]} held-out, {sizes[2]} synthetic; {a.repeats} repeats\n\n| synthetic | "
              f"copies | {' | '.join(columns)} |\n{'|---' * 9}|")
        for kind, share in [(KINDS[0], 0.0), ("smooth", 0.0),
                            *((kind, s) for kind in KINDS for s in SHARES[1:])]:
            began = time.process_time()
            found = rates([repeat(d, patients, kind, share, tuple(sizes), a.seed + r)
                           for r in range(a.repeats)])
            name = {("noise", 0.0): "fresh"}.get((kind, share), kind)
            print(f"| {name} | {share:.0%} | " + " | ".join(f"{found[c]:.2f}" for c in columns)
                  + " |", flush=True)
            print(f"{time.process_time() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
