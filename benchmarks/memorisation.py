"""How often copies are noticed, and the innocent accused, when a known share of the synthetic
images are copies; the table of the docs.

    python benchmarks/memorisation.py                        phantoms of 64 px
    python benchmarks/memorisation.py --data DIR [DIR …]     real X-rays of a data set
    python benchmarks/memorisation.py --fixed                the small part that a slow test repeats
    python benchmarks/memorisation.py --many 20000           a few copies among so many images

Each writes its part of memorisation.json. Each repeat draws three sets of images, no patient in two
of them: training, held-out and "synthetic" images, of which none has been copied. Some of the last
are then replaced by copies of training images:

    exact       bit for bit
    mirrored    exact but for left and right
    moved       after the turn, shift and zoom that training images are augmented with (`augment`)
    noisy       other brightness and contrast, fresh noise of .02 of the range, what a network blurs
                (0.7 px at 64 px)
    all         moved and noisy, every other one mirrored
    smooth      not copies, but every synthetic image blurred (1 px at 64 px): must not be accused

Distances of all pairs are computed once; a repeat picks rows and columns. An image is laid over the
32 of the whole pool that it is most like, so that some ten of them are in any one training set.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
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
from minidiff.evaluation.metrics.copying import Space, copy_verdict  # noqa: E402
from minidiff.evaluation.metrics.named import limit  # noqa: E402
from minidiff.evaluation.metrics.pairwise import distances, overlaid, pixel_spaces  # noqa: E402
from minidiff.pixels import to_float  # noqa: E402
from minidiff.runs import write_json  # noqa: E402

GRAIN, BLUR, SMOOTH = 0.02, 0.7, 1.0
AROUND, POOL = 32, 800
KINDS = ("exact", "mirrored", "moved", "noisy", "all")
SHARES = (0.01, 0.02, 0.05, 0.1)
SIZES = {"1:1": (200, 200, 200), "2:1": (266, 134, 200), "3:1": (300, 100, 200)}
FIXED = {"pool": 160, "sizes": (60, 45, 40), "kinds": ("exact", "noisy"), "shares": (0.02, 0.1),
         "repeats": 40}
FILE = Path(__file__).with_suffix(".json")


def copies(images: Tensor, kind: str, seed: int = 0) -> Tensor:
    """uint8 (N,3,S,S) → the same, as the kinds above say; image k depends on k and the seed
    alone.
    """
    if kind == "exact":
        return images
    g = generators(seed, range(len(images)), 99)
    x = to_float(images[:, :1])
    if kind in ("moved", "all"):
        x = augment(x, g)
    if kind in ("mirrored", "all"):
        some = torch.arange(len(x)) % 2 == 1 if kind == "all" else torch.ones(len(x)).bool()
        x = torch.where(some[:, None, None, None], x.flip(-1), x)
    if kind in ("noisy", "all", "smooth"):
        sigma = (SMOOTH if kind == "smooth" else BLUR) * images.shape[-1] / 64
        x = torch.from_numpy(ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma),
                                                     mode="nearest"))
    if kind in ("noisy", "all"):
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
    found = {}
    for kind in tqdm(["real", *kinds], "distances", disable=not progress):
        made = real if kind in ("real", "exact") else pixel_spaces(copies(pixels, kind))
        found[kind] = found["real"] if kind == "exact" else {
            name: overlaid(x, real[name], AROUND) if x.ndim == 4 else distances(x, real[name])
            for name, x in made.items()}
    return found


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
           seed: int, permutations: int = 499) -> dict:
    """The verdict on one draw: "smooth", or a share of copies of that kind among synthetic
    images; and how many copies and others were named one by one.
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
    own = spaces["pixels, moved"]
    hit = (own.to_train.amin(1) < limit(own.heldout_to_train)).numpy()
    found = copy_verdict(spaces, pairs=0, permutations=permutations, seed=seed,
                         patients=(patients[train].tolist(), patients[heldout].tolist()))
    return {**found, "copies": k, "copies_named": int(hit[len(hit) - k:].sum()),
            "others_named": int(hit[: len(hit) - k].sum())}


def rates(results: list[dict]) -> dict[str, float]:
    """Of repeats: "named", at least one image; "suspected" and "open", by all images together;
    "either", named or suspected. Of images: copies, and others in 1,000, that were named."""
    named = np.array([r["copies_named"] + r["others_named"] > 0 for r in results])
    suspected = np.array([r["suspected"] is True for r in results])
    copied = sum(r["copies"] for r in results)
    others = sum(r["spaces"][0]["n"] - r["copies"] for r in results)
    return {"named": named.mean(), "suspected": suspected.mean(),
            "either": (named | suspected).mean(),
            "open": np.mean([r["suspected"] is None for r in results]),
            "of_copies": sum(r["copies_named"] for r in results) / copied if copied else None,
            "of_1000_others": 1000 * sum(r["others_named"] for r in results) / others}


def table(d: dict, patients: np.ndarray, sizes: dict, kinds: Sequence[str], shares: Sequence[float],
          repeats: int, seed: int = 0) -> list[dict]:
    """A row for each split, kind and share of copies; the innocent first, with twice the
    repeats."""
    rows = []
    for split, size in sizes.items():
        for kind, share in [(kind, 0.0) for kind in ("exact", "smooth") if kind in d] + [
                (kind, share) for kind in kinds for share in shares]:
            times = repeats if share else 2 * repeats
            found = rates([repeat(d, patients, kind, share, size, seed + r)
                           for r in range(times)])
            rows.append({"split": split, "share": share, "repeats": times,
                         "synthetic": kind if share or kind == "smooth" else "fresh",
                         **{k: v if v is None else round(float(v), 3) for k, v in found.items()}})
            print(" | ".join(str(x) for x in rows[-1].values()), flush=True)
    return rows


def phantoms(n: int, size: int = 64) -> tuple[Tensor, np.ndarray]:
    drawn = [phantom.phantom(7, k, size) for k in range(n)]
    patients = [p.row["patient"] for p in drawn]
    pixels = torch.stack([torch.from_numpy(p.image) for p in drawn])[:, None].expand(-1, 3, -1, -1)
    return pixels, np.unique(patients, return_inverse=True)[1]


def fixed() -> list[dict]:
    """The part of the table that is computed again by a slow test."""
    pixels, patients = phantoms(FIXED["pool"])
    return table(measured(pixels, FIXED["kinds"]), patients, {"4:3": FIXED["sizes"]},
                 FIXED["kinds"], FIXED["shares"], FIXED["repeats"])


def fields(n: int, seed: int, side: int = 16) -> Tensor:
    """Smooth noise, no two alike: uint8 (n,3,side,side)."""
    x = np.random.default_rng(seed).standard_normal((n, side, side))
    x = ndimage.gaussian_filter(x, (0, 1, 1), mode="wrap")
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    x = np.clip(np.rint(128 + 45 * x), 0, 255).astype(np.uint8)
    return torch.from_numpy(x)[:, None].expand(-1, 3, -1, -1)


def many(n: int, train: int = 1000, heldout: int = 500, each: int = 4) -> list[dict]:
    """`each` copies of every kind among n fields: who is named, and what all images together
    (equalised pixels) say of all and of draws of a half and a quarter."""
    real, held = fields(train, 0), fields(heldout, 1)
    planted = torch.cat([copies(real[each * k :][:each], kind) for k, kind in enumerate(KINDS)])
    made = pixel_spaces(torch.cat([planted, fields(n - len(planted), 2)]))
    real, held, k = pixel_spaces(real), pixel_spaces(held), len(planted)
    most = limit(overlaid(held["pixels, moved"], real["pixels, moved"]))
    parts = made["pixels, moved"].split(500)
    near = torch.cat([overlaid(x, real["pixels, moved"]).amin(1) for x in tqdm(parts, "naming")])
    rows = [{"n": n, "train": train, "heldout": heldout, "limit": most,
             "named": dict(zip(KINDS, (near[:k] < most).view(-1, each).sum(1).tolist())),
             "others_named": int((near[k:] < most).sum()), "nearest_other": float(near[k:].min())}]
    own, other, of_held = (distances(a["pixels"], b["pixels"]) for a, b in (
        (made, real), (made, held), (held, real)))
    among = distances(real["pixels"], real["pixels"]).fill_diagonal_(torch.inf).amin(1)
    for size in (n, n // 2, n // 4):
        some = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(n)[:size]))
        found = copy_verdict({"pixels": Space(own[some], other[some], of_held, among)}, pairs=k)
        space = found["spaces"][0]
        rows.append({"seen": size, "copies": int((some < k).sum()), "verdict": found["verdict"],
                     "copies_among_nearest": sum(int(some[p["fake"]]) < k
                                                 for p in found["closest"]),
                     **{name: space[name] for name in ("near_p", "copying_p", "closest_p")}})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+",
                   help=f"real data sets, of which {POOL} images are used; without: as many "
                        "phantoms")
    p.add_argument("--fixed", action="store_true")
    p.add_argument("--many", type=int, metavar="N")
    p.add_argument("--repeats", type=int, default=100)
    a = p.parse_args()
    began = time.time()
    if a.fixed:
        name, rows = "fixed", fixed()
    elif a.many:
        name, rows = "many", many(a.many)
        print(json.dumps(rows, indent=1))
    else:
        if a.data:
            name, (read, pixels) = "X-rays", load_pixels(read_table(a.data), 64)
            patients = np.unique(read.column("patient"), return_inverse=True)[1]
            some = np.sort(np.random.default_rng(0).permutation(len(pixels))[:POOL])
            pixels, patients = pixels[some], np.unique(patients[some], return_inverse=True)[1]
        else:
            name, (pixels, patients) = "phantoms", phantoms(POOL)
        print(f"{name}: {len(pixels)} images of {patients.max() + 1} patients", flush=True)
        rows = table(measured(pixels, progress=True), patients, SIZES, KINDS, SHARES, a.repeats)
    print(f"{time.time() - began:.0f} s", file=sys.stderr)
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
    write_json(FILE, kept | {name: rows})


if __name__ == "__main__":
    main()
