"""A procedural chest CT and a T1-like MRI of the same bodies, to show the whole way on slices.

Ellipsoids in normalised coordinates (x to the patient's left, y to the back, z to the head, −1..1)
are painted over each other in Hounsfield units, as in Shepp & Logan's head. About a dozen numbers
make a patient. `nodules` scatters some eighty solid nodules of 5 to 9 mm over both lungs, so that
almost every slice through them shows a few; `normal` has none. As MR, tissues have other values,
each volume in units of its own.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from minidiff.counted import seeded
from minidiff.errors import InputError
from minidiff.runs import write_atomic

LABELS = ("normal", "nodules")
SIDES = (340.0, 280.0, 240.0)  # mm of the box, across, deep and high
CT = {"air": -1000, "fat": -90, "muscle": 50, "lung": -840, "heart": 45, "bone": 500, "nodule": 30}
MR = {"air": 0, "fat": 900, "muscle": 350, "lung": 30, "heart": 250, "bone": 120, "nodule": 420}
NOISE = {"CT": 18.0, "MR": 25.0}
NODULES = 80


def volume(index: int, seed: int = 0, modality: str = "CT", shape: tuple[int, int, int] =
           (64, 52, 24)) -> tuple[np.ndarray, str]:
    """Values (x, y, z), int16, in LPS, of patient `index`, and the label."""
    rng = np.random.default_rng(seeded(seed, index).initial_seed())
    label, tissue = LABELS[index % 2], CT if modality == "CT" else MR
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    values = np.full(shape, tissue["air"], float)
    width, depth, tall = rng.uniform(0.9, 1.0), rng.uniform(0.88, 1.0), rng.uniform(0.75, 0.95)
    fat, heart, turn = rng.uniform(0.04, 0.14), rng.uniform(0.85, 1.2), rng.uniform(-0.06, 0.06)

    def paint(name: str, centre: tuple, radii: tuple) -> np.ndarray:
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip((x, y, z), centre, radii)) < 1
        values[inside] = tissue[name]
        return inside

    paint("fat", (0, 0, 0), (width, depth, 9))
    paint("muscle", (0, 0, 0), (width - fat, depth - fat, 9))
    lungs = [paint("lung", (side * 0.42 * width, 0.02 + turn * side, -0.05),
                   (0.33 * width, 0.62 * depth, tall)) for side in (-1, 1)]
    paint("heart", (0.12, -0.2, -0.35), (0.34 * heart, 0.34 * heart, 0.5))
    paint("heart", (0.1, 0.42, 0), (0.08, 0.1, 9))              # the aorta
    paint("bone", (0, 0.68 * depth, 0), (0.14, 0.17, 9))        # the spine
    paint("bone", (0, -0.82 * depth, 0.1), (0.1, 0.05, 0.7))    # the sternum
    for k in np.arange(-0.9, 1, 0.3):                           # ribs: a shell, in rings
        shell = (x / (width - fat - 0.03)) ** 2 + (y / (depth - fat - 0.03)) ** 2
        slope = z - k - 0.2 * y
        values[(abs(shell - 0.93) < 0.07) & (abs(slope) < 0.06) & (abs(x) > 0.1)] = tissue["bone"]
    aerated = np.argwhere((lungs[0] | lungs[1]) & (values == tissue["lung"]))
    if label == "nodules":
        at = aerated[rng.choice(len(aerated), NODULES)] / (np.array(shape) - 1) * 2 - 1
        for centre, mm in zip(at, rng.uniform(5, 9, NODULES)):
            paint("nodule", centre, tuple(2 * mm / side for side in SIDES))
    gain = rng.uniform(0.6, 1.6) if modality == "MR" else 1.0
    values = gain * (values + rng.normal(0, NOISE[modality], shape))
    return np.rint(values).astype(np.int16), label


@dataclass(frozen=True)
class PhantomConfig:
    out: str = ""                            # folder of the volumes
    n: int = 40                              # patients, half of them with nodules
    modality: Literal["CT", "MR"] = "CT"
    seed: int = 0


def write(cfg: PhantomConfig) -> None:
    """Write NIfTI files OUT/LABEL/patient_0000.nii.gz."""
    import nibabel

    if not cfg.out or cfg.n < 1:
        raise InputError(f"phantom needs --out FOLDER, and --n of 1 or more, not {cfg.n}")
    for index in tqdm(range(cfg.n), "drawing", unit=" volumes"):
        values, label = volume(index, cfg.seed, cfg.modality)
        spacing = [side / (k - 1) for side, k in zip(SIDES, values.shape)]
        image = nibabel.Nifti1Image(values, np.diag([-spacing[0], -spacing[1], spacing[2], 1]))
        image.header.set_xyzt_units("mm")
        packed = gzip.compress(image.to_bytes(), 1, mtime=0)
        write_atomic(Path(cfg.out) / label / f"patient_{index:04d}.nii.gz", packed, durable=False)
