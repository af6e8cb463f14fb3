"""A toy world for the tests of the study: noise whose brightness or stripes are its label, as
images and as folders.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from minidiff.classification.arms import Images
from minidiff.data import images as files
from minidiff.statistics import patient_weights

LABELS = ("dark", "light", "striped")
SPLITS = ("train", "train", "train", "test", "val")
TINY = {"size": 32, "width": 8, "steps": 8, "batch": 8, "lr": 2e-3}


def toy(counts, seed, per_patient=1) -> Images:
    g = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = g.integers(0, 60, (len(labels), 1, 32,
                                32)) + np.array([30, 120, 60])[labels][:, None, None, None]
    pixels[labels == 2, :, ::4] += 90
    rows = [{"label": LABELS[k], "view": "AP" if i % 2 else "PA", "age": str(20 + i % 50),
             "file_name": f"{i}.png"} for i, k in enumerate(labels)]
    patients, hashes = ([f"{seed}-{i // k}" for i in range(len(labels))] for k in (per_patient, 1))
    return Images(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels), patients,
                  rows, hashes)


def write_set(folder: Path, images: Images, splits=None, findings=False) -> str:
    """A data set of these images; their splits in turn, or none and no patients."""
    lines = ["file_name,label,split,patient,view,age" + ",findings" * findings]
    for i, (x, row) in enumerate(zip(images.pixels, images.rows)):
        name = f"images/{row['label']}/{i:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        files.write(folder / name, x)
        split, patient = (splits[i % len(splits)], images.patients[i]) if splits else ("", "")
        several = f",{row['label']}|odd" if i % 3 == 0 else f",{row['label']}"
        lines.append(f"{name},{row['label']},{split},{patient},{row['view']},{row['age']}"
                     + several * findings)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def write_generator(root: Path, seed: int, saw, counts=(8, 8, 8), *, sampling=(), training=(),
                    model=(), vae="v", samples=0, bits="") -> str:
    """root/samples, beside the run root/diffusion that would have made them, with changed settings
    of sampling and training and facts of the model; `samples` is the seed of the images."""
    images, samples, run = toy(counts, 100 + seed + samples), root / "samples", root / "diffusion"
    write_set(samples, images)
    run.mkdir()
    weights = f"weights {seed} {vae} {bits}".encode()
    (run / "model.safetensors").write_bytes(weights)
    for path, value in {
            samples / "manifest.json": {"model": hashlib.sha256(weights).hexdigest(),
                                        "trained_on": list(saw)},
            samples / "config.json": {"root": str(root), "run": str(run), "seed": 0, "steps": 12,
                                      **dict(sampling)},
            run / "config.json": {"root": str(root), "seed": seed, "steps": 650, "init": "",
                                  **dict(training)},
            run / "run.json": {"facts": {"vae": vae}},
            run / "model.json": {"size": 32, "variables": ["label"], "trained_on": list(saw),
                                 **dict(model)},
            run / "vae.json": {"config": {"channels": [16]}}}.items():
        path.write_text(json.dumps(value))
    return str(samples)


def bootstrap_indices(groups, n_boot, seed):
    """The resamples of `patient_weights` as indices of images; a patient may come several times."""
    return [np.repeat(np.arange(len(groups)), weights.astype(int))
            for block in patient_weights(groups, n_boot, seed) for weights in block]


def write_world(root: Path) -> dict[str, tuple[str]]:
    """A real set, samples and an external set, under the names of a study's knobs."""
    return {"data": (write_set(root / "real", toy((30, 30, 30), 1), SPLITS, findings=True),),
            "synthetic": (write_set(root / "samples", toy((20, 20, 20), 2), findings=True),),
            "external": (write_set(root / "clinic", toy((4, 4, 0), 3), ("external",)),)}
