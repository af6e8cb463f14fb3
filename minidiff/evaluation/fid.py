"""FID and KID of any two sets of images: two folders, whatever lies in them, or two arrays.

    python evaluate.py fid REAL SYNTHETIC
    python evaluate.py fid REAL SYNTHETIC --extractor pixels

FID and KID are distances in Inception's features, and nothing else is called so: in other features
they are a Fréchet distance and a kernel distance. Each comes with the number of images on both
sides, the extractor, and its floor: what two disjoint parts of the real images score. FID falls as
1/n, so that beside its floor stands what it is between parts as small as those.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff.data import images
from minidiff.data.compression import compression, difference, told
from minidiff.data.folders import Left, image_files, is_data_set, refuse_unread
from minidiff.data.table import read_table
from minidiff.errors import InputError, count
from minidiff.evaluation.features.build import build, describe
from minidiff.evaluation.features.extractor import Extractor
from minidiff.evaluation.features.inception import weights
from minidiff.evaluation.format import distance_names
from minidiff.evaluation.metrics import distances
from minidiff.evaluation.metrics.distances import Spread, draw
from minidiff.training.device import pick_device

FETCH = "python -m minidiff.diffusion.public fetch inception"
BATCH = 64          # images in one pass of an extractor
FEWEST_HALF = 5     # images on each side of a floor
AT_MOST = 4000      # real images behind the floor of KID, which needs all their pairs at once
METRICS = {"FID": distances.fid, "KID": distances.kid}


class Distance(float):
    """A distance between two sets of images, and what it must not be read without."""

    name = extractor = ""
    sizes = (0, 0)                        # images of both sides
    about: ClassVar[dict] = {}            # the extractor, as `describe` has it
    floor: Spread | None = None           # real against real
    at_floor: float | None = None         # of a FID, between parts as small as those of the floor

    def __new__(cls, value: float, **facts):
        found = super().__new__(cls, value)
        vars(found).update(facts)
        return found

    def __repr__(self) -> str:
        if not self.name:  # a sum or a mean: a number like any other
            return float.__repr__(self)
        text = (f"{self.name} {float(self):.4g}, n = {self.sizes[0]:,} and {self.sizes[1]:,}, "
                f"{self.extractor}")
        if not (f := self.floor):
            return f"{text}; without a floor"
        at = "" if self.at_floor is None else f"this {self.at_floor:.4g}, "
        return (f"{text}; at n = {f.n:,} and {f.m:,}: {at}real against real {f.median:.4g} "
                f"({f.low:.4g} to {f.high:.4g})")

    def json(self) -> dict:
        return {"name": self.name, "value": float(self), "n": self.sizes, "extractor": self.about,
                "floor": self.floor and self.floor._asdict(), "at_floor": self.at_floor}


@dataclass(frozen=True)
class FIDConfig:
    writes: ClassVar[str] = ""      # one file
    positional: ClassVar[str] = "folders"
    folders: tuple[str, ...] = ()   # REAL SYNTHETIC: two folders of images; stand first, no flag
    extractor: str = "inception"    # inception, pixels, or NAME=FILE: docs/extractors.md
    draws: int = 20                 # behind the floor; 0: no floor
    seed: int = 0                   # of these draws
    out: str = ""                   # JSON file of the figures; none: they are only printed
    device: str = "auto"            # auto, cpu, cuda, cuda:1 …


def run_fid(cfg: FIDConfig) -> None:
    """FID and KID of two folders of images."""
    if len(cfg.folders) != 2:
        raise InputError("two folders of images are compared; named are "
                         f"{' '.join(cfg.folders) or 'none'}")
    found = measure(*cfg.folders, extractor=cfg.extractor, draws=cfg.draws, seed=cfg.seed,
                    device=cfg.device)
    for figure in found:
        print(repr(figure))
    sides = [compression(file for file, _ in files(folder)) for folder in cfg.folders]
    print("files: " + "; ".join(f"{folder}: {told(side)}"
                                for folder, side in zip(cfg.folders, sides)))
    remarks = list(filter(None, (mixes(*cfg.folders), difference(*sides, ("real", "synthetic")))))
    for remark in remarks:
        print(f"note: {remark}")
    print("extractor: " + ", ".join(f"{name} {value}" for name, value in found[0].about.items()))
    if cfg.out:
        runs.write_json(cfg.out,
                        {"folders": cfg.folders, "figures": [figure.json() for figure in found],
                         "files": sides, "note": "; ".join(remarks),
                         "provenance": runs.provenance()})


def measure(real, synthetic, *, extractor: str = "inception", draws: int = 20, seed: int = 0,
            device: str = "auto", metrics: Sequence[str] = tuple(METRICS)) -> list[Distance]:
    """The distances of two folders or arrays (uint8 (N,H,W), (N,H,W,C) or (N,C,H,W))."""
    named = files(real), files(synthetic)  # a folder that is not there is refused before the work
    spec = inception() if extractor == "inception" else extractor
    stacks, patients = load(real, named[0])
    if spec == "pixels" and len(stacks) > 1:
        sizes = ", ".join(f"{s.shape[3]} × {s.shape[2]}" for s in stacks[:4])
        raise InputError(f"extractor pixels compares images of one size; the real ones have "
                         f"{sizes}")
    network, = build([spec], train=stacks[0], device=pick_device(device))
    x = features(network, stacks)
    del stacks  # one set of images at a time in memory
    y = features(network, load(synthetic, named[1])[0])
    found, sizes, about = [], (len(x), len(y)), describe(network)
    names = dict(zip(("KID", "FID"), distance_names(network.name)))
    for name in metrics:
        metric, floor, at_floor = METRICS[name], None, None
        if draws and len(set(patients)) >= 2 * FEWEST_HALF:
            some = draw(np.arange(len(x)), AT_MOST if name == "KID" else len(x), seed)
            floor = distances.floor(metric, real=x[some], patients=[patients[i] for i in some],
                                    n=sizes[0], m=sizes[1], repeats=draws, seed=seed)
        if floor and name == "FID":   # falls as 1/n: the mean of random parts
            at_floor = float(np.mean([metric(real=draw(x, floor.n, seed + k),
                                             fake=draw(y, floor.m, seed + 100 + k))
                                      for k in range(10)]))
        found.append(Distance(metric(real=x, fake=y), name=names[name], extractor=network.name,
                              sizes=sizes, about=about, floor=floor, at_floor=at_floor))
    return found


def mixes(*folders: str) -> str:
    """A note if the labels of two folders are mixed differently, by 5 points or more; else ""."""
    if not all(is_data_set(Path(folder)) for folder in folders):
        return ""
    counts = [Counter(read_table(folder, split=False, check=False).column("label"))
              for folder in folders]
    shares = {label: [own[label] / own.total() for own in counts]
              for label in sorted(counts[0] | counts[1])}
    if max(abs(a - b) for a, b in shares.values()) < 0.05:
        return ""
    told = ", ".join(f"{label} {a:.0%} and {b:.0%}" for label, (a, b) in shares.items())
    return (f"the labels are mixed differently ({told}): part of each distance is due to that. "
            "evaluate.py compares equal mixes")


def inception() -> str:
    """The spec of Inception as pytorch-fid runs it; InputError where its weights are absent."""
    path = weights()
    if not path.is_file():
        raise InputError(f"FID and KID mean Inception's features, and {path} is not there. Fetch "
                         f"the public weights once: `{FETCH}`; or measure in other features, which "
                         "is no FID: --extractor pixels")
    return f"inception-pytorch-fid={path}"


def load(images_or_folder, named: Sequence[tuple[str, str]]) -> tuple[list[Tensor], list[str]]:
    """Stacks of images of one size, uint8 (N,3,H,W), of an array or `files`; patients in order."""
    if not isinstance(images_or_folder, (str, Path)):
        array = _array(images_or_folder)
        return [array], [str(k) for k in range(len(array))]
    pixels, patients, deep = defaultdict(list), defaultdict(list), 0
    for file, patient in tqdm(named, f"reading {images_or_folder}", unit=" images",
                              disable=len(named) < 200):
        image = images.read(file, deep=True)
        deep += image.dtype == np.uint16
        pixels[image.shape].append(images.in_depth(image, 8))
        patients[image.shape].append(patient)
    if deep:
        print(f"note: {images_or_folder}: {count(deep, 'image')} {images.AS_EIGHT}",
              file=sys.stderr)
    # a grey stack stays one channel in memory
    stacks = [torch.from_numpy(np.stack(own)).expand(-1, 3, -1, -1) for own in pixels.values()]
    return stacks, [patient for own in patients.values() for patient in own]


def files(images_or_folder) -> list[tuple[str, str]]:
    """(file, patient) of each image in a folder, two or more; none of an array."""
    if not isinstance(images_or_folder, (str, Path)):
        return []
    folder = Path(images_or_folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if is_data_set(folder):
        table = read_table(folder, split=False, check=False)
        found = list(zip(table.column("file"), table.column("patient")))
    else:
        left: Left = {}
        found = [(str(file), str(file)) for file in image_files(folder, left=left)]
        refuse_unread(left)
    if len(found) < 2:
        raise InputError(f"{folder}: {count(len(found), 'image')}; a distance needs "
                         "two or more")
    return found


def features(extractor: Extractor, stacks: Sequence[Tensor]) -> np.ndarray:
    """float64 (N,d), stack after stack."""
    parts = [part for stack in stacks for part in stack.split(BATCH)]
    bar = tqdm(parts, f"features, {extractor.name}", unit="batch", disable=len(parts) < 4)
    return torch.cat([extractor(part).cpu() for part in bar]).double().numpy()


def _array(value) -> Tensor:
    try:
        x = torch.tensor(np.ascontiguousarray(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"neither a folder nor an array of images: {error}") from None
    if x.dtype != torch.uint8 or x.ndim not in (3, 4) or len(x) < 2:
        raise InputError(f"an array of images is uint8 (N,H,W), (N,H,W,C) or (N,C,H,W) with N of 2 "
                         f"or more, not {x.dtype} {tuple(x.shape)}")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[1] not in (1, 3):
        x = x.permute(0, 3, 1, 2)
    if x.shape[1] not in (1, 3):
        raise InputError(f"images have 1 or 3 channels; the array is {tuple(np.shape(value))}")
    return x.expand(-1, 3, -1, -1)
