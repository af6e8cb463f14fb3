"""Anomaly maps and scores of held-out images by a model of normal images, against masks and labels.

    python evaluate.py anomalies --run runs/normal/diffusion --data DIR --masks DIR/masks/opacity

anomalies.json holds every number, anomalies.html shows images, counterfactuals and maps, and parts/
what the model made of each batch of images: a run that was stopped goes on after them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff.counted import order
from minidiff.data.audit import COLUMNS, SIDE
from minidiff.data.baselines import baselines, features
from minidiff.data.dataset import load_pixels
from minidiff.data.files import read_facts
from minidiff.data.split import check_unseen
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation.anomalies import maps, truth
from minidiff.evaluation.anomalies.collect import Batch, collect
from minidiff.evaluation.anomalies.page import page, said
from minidiff.evaluation.format import jsonable
from minidiff.root import Reading, Rooted

FREE = ("device", "shown", "masks", "within")   # change no counterfactual


@dataclass(frozen=True)
class AnomaliesConfig(Reading, Rooted):
    data: tuple[str, ...] = ()        # normal and other images, with splits; none: the root's
    run: str = "ROOT/diffusion"       # finished diffusion run, trained on normal images
    out: str = "ROOT/anomalies"       # anomalies.html and anomalies.json
    masks: str = ""                   # folder of masks, named as in images/; none: no pixel figures
    normal: str = ""                  # label of normal images; none: that of the training data
    split: tuple[str, ...] = ("test",)  # splits to look at; none of their patients was trained on
    images: int = 0                   # of each label at most so many; 0: all
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75)  # of SDEdit, rising; inversion has the last
    steps: int = 12                   # of the whole ladder, of which a strength is a share
    guidance: float = 3.0             # towards normal, where the model knows labels; 1: none
    likelihood: int = 10              # steps of the likelihood's integral; 0: none
    within: str = "source"            # column: AUROC also among images of one of its values
    batch: int = 32                   # images at a time
    shown: int = 12                   # images of each label on the page
    seed: int = 0                     # of noise, probes, resamples, and of a missing split
    skip_bad: bool = False            # leave unreadable images out, listed and counted
    device: str = "auto"              # auto, cpu, cuda, cuda:1 …

    def __post_init__(self):
        super().__post_init__()
        s = self.strengths
        if not s or list(s) != sorted(set(s)) or not 0 < s[0] <= s[-1] < 1:
            raise InputError(f"--strengths {' '.join(f'{x:g}' for x in s)}: one or more, rising, "
                             "above 0 and below 1")
        if self.batch < 1 or self.shown < 1 or min(self.images, self.likelihood) < 0:
            raise InputError(f"--batch {self.batch} --shown {self.shown}: 1 or more; --images "
                             f"{self.images} --likelihood {self.likelihood}: 0 or more")


class Maker(Protocol):
    """A model of normal images: facts of its model.json, and what it makes of a batch."""

    facts: dict[str, Any]

    def __call__(self, images: Tensor, rows: Sequence[dict[str, str]], normal_label: str,
                 seeds: Sequence[int]) -> dict[str, Tensor]: ...


def run(cfg: AnomaliesConfig, open_maker: Callable[[AnomaliesConfig], Maker]) -> dict:
    """Write anomalies.json and its page; returns what the JSON has."""
    maker = open_maker(cfg)
    table = read_table(cfg.data, cfg, seed=cfg.seed, split_dir=Path(cfg.root))
    normal = normal_label(cfg, maker.facts["rows"], table)
    some = chosen(table, cfg, normal)
    notes = check_unseen(some.rows, table.hashes, set(maker.facts.get("trained_on", ())),
                         "the model", table.patients)
    size = maker.facts["size"]
    grey = "yes" if maker.facts["grey"] else "no"
    some, pixels = load_pixels(some, size, skip_bad=cfg.skip_bad, grey=grey)
    masks = truth.read_masks(cfg.masks, some.rows, normal, size) if cfg.masks else None
    out = runs.open_run(cfg.out, cfg, "anomalies", free=FREE, data=some.fingerprint,
                        model=maker.facts["sha256"], images=in_order(some))
    batches = made(out / "parts", maker, pixels, some.rows, normal, cfg)
    train = table.select(split="train", label=normal)
    atlas = maps.Normal(load_pixels(train, size, skip_bad=True, grey=grey)[1]) if len(
        train) > 1 else None
    found = collect(batches, atlas, masks, shown(some, cfg.shown))
    patients, scores = some.column("patient"), found.scores
    by_pixel, pixel_answers = truth.pixels_of(found.counts, patients, cfg.seed)
    result = jsonable({
        "data": {"folders": list(cfg.data), "split": list(cfg.split), "normal": normal,
                 "n": {name: some.column("label").count(name) for name in some.labels},
                 "patients": len(set(patients)), "fingerprint": some.fingerprint,
                 "masks": cfg.masks, "abnormal_pixels":
                     None if masks is None else float(masks.mean()),
                 "notes": [*some.notes, *notes]},
        "run": {"folder": cfg.run, "sha256": maker.facts["sha256"],
                "n_train": len(maker.facts.get("trained_on", ())), "size": size},
        "primary": maps.PRIMARY, "within": cfg.within,
        "places": sorted(set(some.column(cfg.within)) - {""}),
        "pixels": by_pixel, "pixels_against": pixel_answers,
        "images": truth.images_of(scores, some.rows, normal, cfg.within, cfg.seed),
        "images_against": truth.images_against(scores, some.rows, normal, cfg.within, cfg.seed),
        "blurred": truth.blurred_against(found.blurred, scores, some.rows, normal, cfg.seed),
        "shortcuts": shortcuts(some, normal),
        "provenance": runs.provenance()})
    runs.write_json(out / "anomalies.json", result | {
        "scores": [{"file": row["file"], "label": row["label"],
                    **{name: float(own[k]) for name, own in scores.items()}}
                   for k, row in enumerate(some.rows)]})
    runs.write_atomic(out / "anomalies.html", page(result, some.rows, pixels, found, masks))
    print(said(result))
    print(out / "anomalies.html")
    return result


def normal_label(cfg: AnomaliesConfig, trained: Sequence[dict[str, str]], table: Table) -> str:
    """--normal, or the one label of the training images; InputError unless the data have it and
    another one."""
    known = sorted({row["label"] for row in trained})
    if not cfg.normal and len(known) != 1:
        raise InputError(f"{cfg.run} was trained on {', '.join(known)}: name the label of normal "
                         "images by --normal")
    normal, labels = cfg.normal or known[0], table.labels
    if normal not in labels or len(labels) < 2:
        raise InputError(f"--normal {normal}: the data have the labels {', '.join(labels)}; needed "
                         "are this one and another")
    if cfg.within not in ("", "source") and not any(table.column(cfg.within)):
        raise InputError(f"--within {cfg.within}: the data have no such column, or no value in it")
    return normal


def chosen(table: Table, cfg: AnomaliesConfig, normal: str) -> Table:
    """The images of the splits, at most --images of each label; InputError without both sides."""
    rows = table.select(split=cfg.split).rows
    if cfg.images:
        kept = []
        for label in table.labels:
            own = [i for i, row in enumerate(rows) if row["label"] == label]
            some = order(len(own), cfg.seed, range(len(own)))[: cfg.images] if own else []
            kept += [own[k] for k in some]
        rows = [rows[i] for i in sorted(kept)]
    sides = {row["label"] == normal for row in rows}
    if len(sides) < 2:
        raise InputError(f"{' '.join(cfg.data)}: split {' '.join(cfg.split)} has no "
                         f"{'image of another label than ' if True in sides else ''}{normal}")
    return replace(table, rows=rows)


def shown(table: Table, n: int) -> list[int]:
    """Places of n images of each label, evenly picked."""
    found = []
    for label in table.labels:
        own = [i for i, row in enumerate(table.rows) if row["label"] == label]
        found += [own[k] for k in np.unique(np.linspace(0, len(own) - 1, n).round().astype(int))]
    return found


def in_order(table: Table) -> str:
    """SHA-256 of the images and their cells one after another, for parts are named by place."""
    cells = [{k: v for k, v in row.items() if k not in ("file", "where", "file_name")}
             for row in table.rows]
    return sha256(runs.json_key(images=table.digests, rows=cells).encode()).hexdigest()


def made(folder: Path, maker: Maker, pixels: Tensor, rows: Sequence[dict[str, str]], normal: str,
         cfg: AnomaliesConfig) -> list[Batch]:
    """What the model makes of all images, a file a batch; those that are there already are kept."""
    folder.mkdir(exist_ok=True)
    batches: list[Batch] = []

    def loader(places: range, path: Path) -> Batch:
        return lambda: (places, pixels[places.start : places.stop],
                        safetensors.torch.load_file(path))

    with tqdm(total=len(rows), desc="counterfactuals", unit=" images") as bar:
        for start in range(0, len(rows), cfg.batch):
            places = range(start, min(start + cfg.batch, len(rows)))
            path = folder / f"{places.start:06d}-{places.stop:06d}.safetensors"
            if not path.is_file():
                few = slice(places.start, places.stop)
                runs.save_tensors(path, maker(pixels[few], rows[few], normal,
                                              [cfg.seed * 10**6 + i for i in places]))
            batches.append(loader(places, path))
            bar.update(len(places))
    return batches


def shortcuts(table: Table, normal: str) -> list[dict]:
    """AUROC of each label against normal from header, border, thumbnail and metadata alone, by
    regressions that have seen both: what an AUROC of an anomaly score has to be read against."""
    facts, found = read_facts(table.column("file"), SIDE)[0], []
    for label, _, index in truth.strata(table.rows, normal, ""):
        rows = [table.rows[i] for i in index]
        trivial = features([facts[i] for i in index], rows, COLUMNS)
        own = baselines(trivial, [row["label"] for row in rows], [row["patient"] for row in rows])
        found += [{**row, "label": label} for row in own]
    return found

