"""What ten images of a finding are worth that a base model never saw: phantoms, whose truth is
known.

    python benchmarks/rare.py --root runs/rare                  pneumothorax, 10, 5 and 25 images
    python benchmarks/rare.py --root runs/rare --finding nodule
    python benchmarks/rare.py --root runs/rare --finding south --images 10   a control that is easy
    python benchmarks/rare.py --gate                whom the rule for copies names; a slow test

The base is the demo's (normal, pneumonia, few covid). For each number of images, one a patient:

    steps        `train.py rare` with its own settings chooses the number of steps by leaving
                 patients out, once; three generators (seeds) are trained for it, and each is asked
                 for copies. All take the last step at which none of them copies
    recognised   100 images of each, read by an oracle: a classifier of 2,400 phantoms of all
                 labels; beside 100 fresh phantoms of the finding, these as the autoencoder gives
                 them back, and 100 images of the last step that was trained
    diversity    Vendi in pixels and in the oracle's features, MS-SSIM; beside 100 fresh phantoms of
                 the finding, and beside the n images themselves
    copies       images named as copies of one of the n; of 100 fresh phantoms as many are named
                 wrongly; and the median distance of both to the nearest of the n
    classifier   the pooled study, 3 generators × 5 classifiers: the base's images and the n ones
                 with 100 synthetic ones, against as many duplicates; tested on 800 phantoms

Everything is kept in --root, and the same command goes on. It writes rare.json, a part for each
finding and number of images.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import classify  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from benchmarks.memorisation import KINDS, copies  # noqa: E402
from benchmarks.transfer import drawn  # noqa: E402
from minidiff import config, runs  # noqa: E402
from minidiff.classification.predictor import Predictor, fit  # noqa: E402
from minidiff.data import images, phantom  # noqa: E402
from minidiff.data.dataset import load_pixels  # noqa: E402
from minidiff.data.subset import write_rows  # noqa: E402
from minidiff.data.table import read_table, write_table  # noqa: E402
from minidiff.evaluation.features.extractor import PixelPCA, PredictorFeatures  # noqa: E402
from minidiff.evaluation.metrics.diversity import ms_ssim, vendi  # noqa: E402
from minidiff.evaluation.metrics.named import limit, named  # noqa: E402
from minidiff.evaluation.metrics.pairwise import distances, pixel_spaces  # noqa: E402
from minidiff.evaluation.monitor import checkpoints  # noqa: E402
from minidiff.stages import rare  # noqa: E402
from minidiff.statistics import wilson  # noqa: E402
from minidiff.variables import Category, encode  # noqa: E402

FILE = Path(__file__).with_suffix(".json")
GENERATORS, CLASSIFIERS, MADE = 3, 5, 100  # classifiers of each generator; images of it
TRAIN, TEST, ORACLE = 7, 8, 9   # seeds of phantoms; the base's is 0
PRIOR = {"train": 80, "val": 40}   # images of each label beside the rare ones, to save time


def draw(folder: Path, seed: int, wanted: dict[str, range], split: str = "") -> str:
    """Phantoms of these labels, one image a patient; no patient has two labels. "south" are normal
    ones as another hospital shows them."""
    if not (folder / "metadata.csv").exists():
        rows = []
        for place, (label, patients) in enumerate(wanted.items()):
            for k in patients:
                index, normal = 10 * (10 * k + place), label == "south"
                p = phantom.phantom(seed, index, label="normal" if normal else label)
                rows.append({"file_name": f"images/{label}/{k}.png", "split": split, **p.row,
                             "label": label})
                images.write(folder / rows[-1]["file_name"],
                             drawn(seed, index, "south", label="normal") if normal else p.image)
        write_table(folder / "metadata.csv", rows)
    return str(folder)


def pixels(folder: str, split: str = "") -> torch.Tensor:
    table = read_table(folder, split=False)
    return load_pixels(table.select(split=split) if split else table, 64)[1]


def base(root: Path) -> tuple[str, str]:
    """The demo's model, and some of its images as the prior."""
    data, prior = root / "base-data", root / "prior"
    phantom.write(data, scarce=phantom.SCARCE)
    for verb, last in (("vae", "vae.json"), ("diffusion", "model.json")):
        cls, run = train.VERBS[verb]
        if not (root / "base" / verb / last).exists():
            run(cls(data=(str(data),), root=str(root / "base")))
    if not (prior / "metadata.csv").exists():
        table = read_table(data)
        write_rows(prior, [row for label in table.labels for split, n in PRIOR.items()
                           for row in table.select(label=label, split=split).rows[:n]])
    return str(root / "base/diffusion"), str(prior)


def oracle(root: Path, labels: tuple[str, ...], test: str) -> tuple[Predictor, dict]:
    """A classifier of plenty of phantoms, and how well it reads others."""
    folder, variable = root / "oracle", Category("label", labels)

    def of(data: str) -> dict:
        return encode([variable], read_table(data, split=False).rows)

    if not (folder / "predictor.safetensors").exists():
        data = draw(root / "oracle-data", ORACLE, dict.fromkeys(labels, range(2400 // len(labels))))
        made = Predictor([variable], width=16, size=64, seed=0)
        fit(made, pixels(data), of(data), steps=500, lr=2e-3, batch=32, seed=0, augment="plain")
        made.save(folder)
    read, truth = Predictor.load(folder), of(test)["label"]
    said = read.predict(pixels(test))["label"].argmax(1)
    return read, {label: (said[truth == k] == k).double().mean().item()
                  for k, label in enumerate(labels)}


def generators(root: Path, few: str, init: str, prior: str,
               n: int) -> tuple[dict, list[dict], int, list]:
    """rare.json of the first, the looks for copies of all, the step taken, and their folders."""
    cls, run = train.VERBS["rare"]
    cfg = cls(data=(few,), init=init, prior=(prior,), root=str(root))
    if not (root / "rare/rare.json").exists():
        run(cfg)
    chosen = runs.read_json(root / "rare/rare.json")
    saved = config.load(root / "rare/all/config.json")
    all_runs = [root / "rare/all", *(root / f"rare-{seed}" for seed in range(1, n))]
    for seed, out in enumerate(all_runs):
        if not (out / "model.json").exists():
            train.train_diffusion(config.from_dict(train.DiffusionConfig,
                                                   {**saved, "seed": seed, "out": str(out)}))
    few, table, new = rare.read(cfg)
    if not (root / "looks.json").exists():
        looks = []
        for step in sorted((s for s in chosen["steps"] if s <= chosen["choice"]["step"]),
                           reverse=True):
            for seed, out in enumerate(all_runs):
                point = next(p for p in checkpoints(out) if p.step == step)
                found = rare.copies_of(point.folder, few, table, new, replace(cfg, seed=seed))
                looks.append({"seed": seed, "step": step, **found})
            if not any(look["found"] for look in looks if look["step"] == step):
                break
        runs.write_json(root / "looks.json", looks)
    looks = runs.read_json(root / "looks.json")
    clean = [s for s in {look["step"] for look in looks}
             if not any(look["found"] for look in looks if look["step"] == s)]
    step = max(clean, default=chosen["choice"]["step"])
    return chosen, looks, step, [next(p.folder for p in checkpoints(out) if p.step == step)
                                 for out in all_runs]


def gate(n: int, fresh: int = 400) -> dict:
    """How many of fresh phantoms the rule names as copies of one of n, and how many true copies of
    these; beside 240 held-out phantoms of other labels."""
    def drawn(seed: int, index: range, label: str | None) -> torch.Tensor:
        return torch.stack([torch.from_numpy(phantom.phantom(seed, 10 * k, label=label).image)
                            for k in index])[:, None].expand(-1, 3, -1, -1)

    def small(x: torch.Tensor) -> torch.Tensor:
        return pixel_spaces(x)[rare.SPACE]

    few = drawn(TRAIN, range(n), "pneumothorax")
    real, held = small(few), small(drawn(ORACLE, range(240), None))
    sets = {"fresh": drawn(TEST, range(fresh), "pneumothorax"),
            **{kind: copies(few, kind) for kind in KINDS}}
    to_real = distances(held, real)
    return {"images": n, "limit": limit(to_real), **{
        kind: [named(distances(small(x), real), to_real, real)["found"], len(x)]
        for kind, x in sets.items()}}


def varied(x: torch.Tensor, extractors: list) -> dict[str, float]:
    return {**{f"Vendi, {e.name}": vendi(e(x).double().numpy()) for e in extractors},
            "MS-SSIM": ms_ssim(x)}


def samples(run: Path, out: Path, finding: str, seed: int) -> str:
    sample.sample(sample.SampleConfig(run=str(run), out=str(out), root=str(out.parent),
                                      label=(finding,), per_label=MADE, seed=seed * 10_000))
    return str(out)


def study(root: Path, init: str, few: str, made: list[str], finding: str, test: str) -> dict:
    """The pooled study of these folders of samples."""
    n, data = len(read_table(few, split=False)), root / "study-data"
    val = draw(root / "val", TRAIN, {finding: range(1000, 1000 + max(1, n // 5))}, "val")
    if not (data / "metadata.csv").exists():
        known = read_table(runs.read_json(f"{init}/config.json")["data"])
        rows = [*known.select(split=("train", "val")).rows, *(
            {**row, "split": split} for folder, split in ((few, "train"), (val, "val"),
                                                          (test, "test"))
            for row in read_table(folder, split=False).rows)]
        write_rows(data, rows)
    cfg = classify.Config(
        data=(str(data),), root=str(root), out=str(root / "classifier"), size=64, steps=150,
        synthetic=(f"synthetic={made[0]}", *made[1:]), positive=finding, condition=("label",),
        arms=("real+duplicates", "real+synthetic"), near_copies="drop",
        seeds=GENERATORS * CLASSIFIERS)
    classify.run_study(cfg)
    summary = runs.read_json(root / "classifier/summary.json")
    return {"arms": {arm["arm"]: {name: arm[name] for name in (
        "n_train", "balanced_accuracy", "auroc_positive")} for arm in summary["arms"]},
        **{name: summary[name] for name in ("images", "primary")}}


def measure(root: Path, finding: str, n: int, made_by: int) -> None:
    labels = (*phantom.LABELS, finding)
    init, prior = base(root)
    own = root / finding
    test = draw(own / "test", TEST, dict.fromkeys(labels, range(200)), "test")
    read, accuracy = oracle(own, labels, test)
    fresh = pixels(draw(own / "fresh", TEST, {finding: range(1000, 1000 + MADE)}))
    few = draw(own / f"{n}/few", TRAIN, {finding: range(n)})
    chosen, looks, step, folders = generators(own / str(n), few, init, prior, made_by)
    last = [own / str(n) / name for name in ("rare/all", *(f"rare-{k}"
                                                           for k in range(1, made_by)))]
    made = {name: [samples(folder, own / f"{n}/{name}-{seed}", finding, seed)
                   for seed, folder in enumerate(runs_of)]
            for name, runs_of in (("samples", folders), ("last", last))}
    real, extractors = pixels(few), [PixelPCA().fit(pixels(prior)), PredictorFeatures(read)]
    place, small = labels.index(finding), pixel_spaces(real)[rare.SPACE]
    bound = limit(distances(pixel_spaces(pixels(prior, "val"))[rare.SPACE], small))

    def seen(x: torch.Tensor) -> dict:
        said = read.predict(x)["label"].argmax(1)
        near = distances(pixel_spaces(x)[rare.SPACE], small).amin(1)
        k = int((said == place).sum())
        return {"n": len(x), "recognised": k / len(x), "interval": wilson(k, len(x)),
                "read as": np.bincount(said, minlength=len(labels)).tolist(),
                "copies": int((near < bound).sum()), "nearest": float(near.median()),
                **varied(x, extractors)}

    figures = {"fresh": seen(fresh), "rebuilt": seen(rare.rebuilt(fresh, init)),
               "generators": [seen(pixels(folder)) for folder in made["samples"]],
               "last step": [seen(pixels(folder)) for folder in made["last"]]}
    found = {"finding": finding, "images": n, "labels": labels, "oracle": accuracy, "step": step,
            "choice": chosen["choice"], "steps": chosen["steps"],
             "text": chosen["text"].replace(f"{own / str(n)}/", ""),
            "looks": [{k: v for k, v in look.items() if k != "images"} for look in looks],
            "limit": bound, **figures,
            "the n images": varied(real, extractors)}
    keep(f"{finding}, {n} images", found)
    if made_by == GENERATORS:
        found["study"] = study(own / str(n), init, few, made["samples"], finding, test)
        keep(f"{finding}, {n} images", found)


def keep(part: str, found: object) -> None:
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {}
    runs.write_json(FILE, kept | {part: found})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--root", type=Path, default=Path("runs/rare"))
    p.add_argument("--generators", type=int, default=GENERATORS, help="with fewer, no study")
    p.add_argument("--gate", action="store_true")
    p.add_argument("--finding", default="pneumothorax")
    p.add_argument("--images", type=int, nargs="+", default=[10, 5, 25])
    a = p.parse_args()
    if a.gate:
        keep("gate", [gate(n) for n in (5, 10, 25)])
        return
    train.draw_pictures = lambda *_, **__: None  # nobody looks at them
    for n in a.images:
        measure(a.root, a.finding, n, a.generators)


if __name__ == "__main__":
    main()
