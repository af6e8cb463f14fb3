"""The reference matrix: real subsets × (synthetic sets, real yardsticks, controls that must
behave).

    python evaluate.py matrix                            the embedded demo → runs/demo/matrix/matrix.html
    python evaluate.py matrix --data DIR --samples runs/x/samples --external DIR --classifier runs/x/cls --out runs/x/m

matrix.json holds every number, matrix.html is for the reader; the same command again writes the
same bytes. The exit status is 1, after all is written, if a control was not caught (gates.py).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff.classification.predictor import Predictor
from minidiff.data import images, phantom
from minidiff.data.dataset import load_pixels
from minidiff.data.split import check_synthetic, check_unseen, trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError
from minidiff.evaluation.features.build import EXTRACTORS, build, describe
from minidiff.evaluation.features.cache import FeatureCache
from minidiff.evaluation.features.extractor import Extractor, PredictorFeatures
from minidiff.evaluation.features.spectrum import Spectrum
from minidiff.evaluation.matrix import cells, gates, matrix_page
from minidiff.evaluation.matrix.header import header_shortcuts
from minidiff.evaluation.matrix.subsets import (
    Judged,
    Subset,
    judged,
    real_subsets,
    synthetic_subsets,
)
from minidiff.evaluation.metrics.copying import FEWEST, memorisation
from minidiff.evaluation.metrics.pairwise import pixel_spaces
from minidiff.evaluation.pages.format import jsonable
from minidiff.evaluation.quick import recognised
from minidiff.evaluation.sets import judge_of, seen_by
from minidiff.root import DEMO, Rooted

PHANTOM = f"{DEMO}/phantom"    # the demo's data, with which go
# phantoms of another hospital: more noise, and views that go with the label
HOSPITAL = f"{DEMO}/hospital"
SMALLEST = 32                    # px a side at which images are compared


@dataclass(frozen=True)
class MatrixConfig(Rooted):
    data: tuple[str, ...] = ()                           # real data sets, with their splits; none: the root's
    samples: tuple[str, ...] = ("ROOT/samples",)         # folders of synthetic images
    external: tuple[str, ...] = ()                       # other hospitals, unseen by generator and judge; demo: its own
    classifier: str = "ROOT/classifier"                  # its judge/ reads labels and gives a space
    out: str = "ROOT/matrix"                             # matrix.html and matrix.json
    extractors: tuple[str, ...] = ("pixels", "classifier", "spectrum")  # spaces in which distances are measured
    size: int = 0                                        # side at which images are compared, px; 0: that of the samples
    n: int = 125                                         # images of a set, at most
    permutations: int = 1000                             # behind each p
    resamples: int = 1000                                # of patients, behind each interval
    repeats: int = 40                                    # draws behind what real scores against real
    by_set: bool = False                                 # each set of a folder of samples as a column of its own, too
    seed: int = 0                                        # of draws, resamples; of the patient split where there is none
    skip_bad: bool = False                               # leave unreadable images out, listed and counted


def run_matrix(cfg: MatrixConfig) -> None:
    """Compare synthetic sets with real ones of every source, between controls that must be
    caught.
    """
    cfg = with_hospital(cfg)
    check(cfg)
    tables, pixels = read(cfg)
    judge = load_judge(cfg, tables["real"])
    facts = {name: table.fingerprint for name, table in tables.items()}
    out = runs.open_run(cfg.out, cfg, "matrix", **facts)

    real, train = tables["real"], tables["real"].select(split="train")
    train_pixels = of(tables["real"], pixels["real"], split=("train",))
    spaces, cached = spaces_of(cfg, train_pixels, judge), FeatureCache(out / "features")
    rows, standards, columns = arrange(cfg, tables, pixels)
    used = dict.fromkeys([*rows, *columns, *(j.yardstick for j in standards if j.yardstick)])
    for e in spaces:
        for s in tqdm(used, f"features, {e.name}", unit="set", leave=False):
            s.features[e.name] = cached(e, s.pixels).double().numpy()

    grid, draws = measure(cfg, [e.name for e in spaces], rows, columns, standards)
    verdicts = judge_all(cfg, standards, draws, judge, tables, pixels)
    controls = gates.caught(verdicts)
    state, faults = gates.status(controls)
    result = jsonable({
        "status": state, "faults": faults, "controls": controls, "verdicts": verdicts,
        "extractors": [describe(e) for e in spaces],
        "rows": [about(s) for s in rows], "columns": [about(s) for s in columns], "cells": grid,
        "shortcuts": header_shortcuts(train, real.select(split=("val", "test"))),
        "data": {"folders": list(cfg.data), "external": list(cfg.external), "samples": list(cfg.samples),
                 "size": train_pixels.shape[-1], "fingerprints": facts},
        "notes": list(dict.fromkeys(n for t in tables.values() for n in t.notes if "one image = one patient" not in n)),
        "config": runs.read_json(out / "config.json"),
        "provenance": {k: v for k, v in runs.provenance().items() if k != "started"},   # equal commands, equal bytes
    })
    runs.write_json(out / "matrix.json", result)
    runs.write_atomic(out / "matrix.html", matrix_page.render(result))
    report(out, result)


def with_hospital(cfg: MatrixConfig) -> MatrixConfig:
    """The demo's phantoms get another hospital of phantoms, if no other was asked for."""
    return replace(cfg,
                   external=(HOSPITAL,)) if cfg.data == (PHANTOM,) and not cfg.external else cfg


def report(out: Path, result: dict) -> None:
    """Print the verdicts and the path; exit with status 1 if the matrix is invalid."""
    for v in result["verdicts"]:
        if v["kind"] == "synthetic":
            print(f"{v['label']} ({v['part']}): " + ", ".join(f"{k} {v[k]['answer']}"
                                                              for k in gates.VERDICTS if k in v)
                  + (f"{v['grey']}" if v["grey"] else ""))
    print(out / "matrix.html")
    if result["status"] == "INVALID":
        print("INVALID: " + "; ".join(result["faults"]), file=sys.stderr)
        raise SystemExit(1)


def check(cfg: MatrixConfig) -> None:
    """Refuse knobs and folders before any work."""
    least = {"n": FEWEST, "permutations": 100, "resamples": 100, "repeats": 10}
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise InputError(f"--{name} {getattr(cfg, name)} is not allowed: {low} or more")
    if cfg.size and cfg.size < SMALLEST:
        raise InputError(f"--size {cfg.size} is not allowed: {SMALLEST} or more, or 0, that of the "
                         "samples")
    if not cfg.samples:
        raise InputError("--samples names no folder")
    if len(set(cfg.extractors) - {Spectrum.name}) < 1 or len(set(cfg.extractors)) < 2:
        raise InputError(f"--extractors {' '.join(cfg.extractors) or 'none'}: at least two are "
                         "needed, for each is blind to something, and one besides "
                         f"{Spectrum.name}; there are {Spectrum.name}, {', '.join(EXTRACTORS)}")
    for folder in cfg.samples:
        if any(runs.nested(folder, real) for real in (*cfg.data, *cfg.external)):
            raise InputError(f"--samples {folder} is a folder of real data, or lies in one or "
                             "around one")


def read(cfg: MatrixConfig) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pixels: real (with splits), external, and each folder of samples by its name; in
    the order of content.
    """
    if cfg.external == (HOSPITAL,):
        phantom.write(HOSPITAL, n=600, seed=1, confounding=1.0, noise=0.05)
    real = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.root))
    real.select(split=("train",)).require("train")
    tables = {"real": real.select(split=("train", "val", "test"))}
    if not len(real.select(split=("val", "test"))):
        raise InputError(f"{' '.join(cfg.data)} has no image in split val or test")
    if cfg.external:
        other = read_table(cfg.external, split=False)
        tables["external"] = replace(other,
                                     rows=[{**row, "split": "external"} for row in other.rows])
    for folder in cfg.samples:
        name = Path(folder).resolve().name if len(cfg.samples) == 1 else os.path.normpath(folder)
        tables[name] = read_table(folder, split=False)
        strange = sorted(set(tables[name].labels) - set(real.labels))
        if strange:
            raise InputError(f"{folder}: the data have no label {', '.join(strange)}; they have "
                             f"{', '.join(real.labels)}")
    check_origin(cfg, tables)
    first = next(iter(list(tables.values())[-len(cfg.samples)].rows))["file"]
    size = cfg.size or max(SMALLEST, min(images.read(first).shape[1:]))
    loaded = {name: ordered(*load_pixels(table, size, skip_bad=cfg.skip_bad))
              for name, table in tables.items()}
    return {name: t for name, (t, _) in loaded.items()}, {name: x
                                                          for name, (_, x) in loaded.items()}


def check_origin(cfg: MatrixConfig, tables: dict[str, Table]) -> None:
    """Refuse samples that are real files, and a generator or judge that has seen what it is
    measured by.
    """
    real, made = [tables[k] for k in ("real", "external")
                  if k in tables], list(tables.values())[-len(cfg.samples):]
    known = {digest for table in real for digest in table.hashes.values()}
    for folder, table in zip(cfg.samples, made):
        check_synthetic(table.rows, table.hashes, known, folder)
    seen = {f"the generator of {folder}": trained_on(folder) for folder in cfg.samples}
    seen["the judge"] = seen_by(cfg.classifier)
    notes = [note for table in real for who, digests in seen.items() for note in check_unseen(
        [row for row in table.rows if row["split"] != "train"], table.hashes, digests, who)]
    tables["real"].notes.extend(dict.fromkeys(notes))


def load_judge(cfg: MatrixConfig, real: Table) -> Predictor:
    """The classifier run's judge; InputError where it does not read every label of the real
    data.
    """
    folder, train = Path(cfg.classifier) / "judge", real.select(split="train")
    judge = judge_of(cfg.classifier, train) or Predictor.load(folder)  # which says what is missing
    known = next((v.values for v in judge.variables if v.name == "label"), ())
    if missing := sorted(set(real.labels) - set(known)):
        raise InputError(f"{folder} does not read the label {', '.join(missing)}; it knows "
                         f"{', '.join(known) or 'none'}")
    return judge


def ordered(table: Table, pixels: Tensor) -> tuple[Table, Tensor]:
    """The same in the order of content: the order of files must not reach a number."""
    keys = [hashlib.sha256(np.ascontiguousarray(image)).digest() for image in pixels.numpy()]
    order = sorted(range(len(keys)), key=lambda i: (keys[i], table.rows[i]["patient"]))
    return replace(table, rows=[table.rows[i] for i in order]), pixels[order]


def of(table: Table, pixels: Tensor, **wanted: Sequence[str]) -> Tensor:
    """The pixels of the rows whose cells are as asked."""
    return pixels[[i for i, row in enumerate(table.rows)
                   if all(row[k] in values for k, values in wanted.items())]]


def spaces_of(cfg: MatrixConfig, train: Tensor, judge: Predictor) -> list[Extractor]:
    """The extractors asked for; `spectrum` is the matrix's own, the others are those of
    `extractors.build`.
    """
    named = [spec for spec in cfg.extractors if spec != Spectrum.name]
    own = [Spectrum().fit(train)] if Spectrum.name in cfg.extractors else []
    return [*build(named, train=train, judge=judge), *own]


def arrange(cfg: MatrixConfig, tables: dict[str, Table],
            pixels: dict[str, Tensor]) -> tuple[list[Subset], list[Judged], list[Subset]]:
    """Rows, the standards of each label, and columns: synthetic sets, controls, real sets."""
    real = tables["real"]
    parts = [name for name in ("real", "external") if name in tables]
    rows, wide = ([s for name in parts
                   for s in real_subsets(tables[name], pixels[name], n=n, seed=cfg.seed)]
                  for n in (cfg.n, 2 * cfg.n))
    sources = {label: real.select(split=("train",), label=label).column("source")
               for label in real.labels}
    made = [s for name in tables if name not in parts for s in synthetic_subsets(
        tables[name], pixels[name], sources, name=name, by_set=cfg.by_set, n=cfg.n, seed=cfg.seed)]
    trained = {label: of(real, pixels["real"], split=("train",), label=(label,))
               for label in real.labels}
    found = [judged(label, rows, wide, made, trained[label], n=cfg.n, seed=cfg.seed)
             for label in real.labels]
    standards = [j for j in found if j]
    controls = [s for j in standards for s in j.candidates if s.kind == "control"]
    return rows, standards, [*made, *controls, *rows]


def measure(cfg: MatrixConfig, spaces: Sequence[str], rows: Sequence[Subset],
            columns: Sequence[Subset], standards: Sequence[Judged]) -> tuple[list[dict], dict]:
    """All cells, and of those against held-out references cell and draws by (space, reference,
    column).
    """
    grid, kept = [], {}
    knobs = {"permutations": cfg.permutations, "resamples": cfg.resamples, "seed": cfg.seed}
    with tqdm(total=len(spaces) * len(rows) * len(columns), desc="cells", unit="cell") as bar:
        for space in spaces:
            for row in rows:
                kin = [s for s in rows
                       if (s.label, s.sources, s.kind) == (row.label, row.sources, row.kind)]
                null = cells.real_against_real(kin, space, repeats=cfg.repeats, seed=cfg.seed)
                measured = {}
                for s in columns:
                    measured[s] = cells.cell(row, s, space, null, **knobs)
                    bar.update()
                grid += [found for found, _ in measured.values()]
                for j in standards:
                    if row is j.reference:
                        more = {j.yardstick: cells.cell(row, j.yardstick, space, null,
                                                        **knobs)} if j.yardstick else {}
                        kept |= {(space, j.label, s): value
                                 for s, value in {**measured, **more}.items()}
    return grid, kept


def judge_all(cfg: MatrixConfig, standards: Sequence[Judged], draws: dict, judge: Predictor,
              tables: dict[str, Table], pixels: dict[str, Tensor]) -> list[dict]:
    """Verdicts on every candidate and, of fidelity and coverage, on the real training images."""
    trained = {label: set(tables["real"].select(split=("train",), label=label).column("source"))
               for label in tables["real"].labels}
    found = []
    for j in standards:
        held = of(tables["real"], pixels["real"], split=("val", "test"), label=(j.label,))
        real = recognised(judge, held, [j.label] * len(held)).tolist()
        known = near_spaces(of(tables["real"], pixels["real"], split=("train",), label=(j.label,)),
                            judge)
        unseen = near_spaces(held, judge)
        named = tuple(tables["real"].select(split=split, label=j.label).column("patient")
                      for split in ("train", ("val", "test")))
        alone = all(trained[j.label].isdisjoint(v) for label, v in trained.items()
                    if label != j.label)
        for s in tqdm([j.train, *j.candidates], f"verdicts, {j.label}", unit="set", leave=False):
            v = {**about(s), "reference": j.reference.name,
                 "yardstick": j.yardstick.name if j.yardstick else "",
                 "grey": s.grey or j.reference.grey, "label_confounded": alone and len(trained) > 1,
                 "yardstick_confounded": bool(j.yardstick
                                              and cells.confounded(j.reference, j.yardstick))}
            own = {space: draws[space, j.label, s] for space, label, t in draws
                   if label == j.label and t is s}
            if not v["grey"]:
                own = {space: value for space, value in own.items() if value[1] is not None}
                scores = {space: cells.rho(value, draws[space, j.label, j.yardstick])
                          for space, value in own.items()
                          if j.yardstick and draws[space, j.label, j.yardstick][1] is not None}
                v |= {"rho": scores, "FIDELITY": gates.fidelity(scores, j.another_source),
                      "COVERAGE": gates.coverage({space: c for space, (c, _) in own.items()}),
                      "C2ST": {space: [c["C2ST"], c["C2ST_low"], c["C2ST_high"]]
                               for space, (c, _) in own.items()}}
            if not v["grey"] and s is not j.train:
                copies = memorisation(fake=near_spaces(s.pixels, judge), train=known,
                                      heldout=unseen, patients=named, pairs=0, seed=cfg.seed)
                v |= {"LABEL": gates.label(recognised(judge, s.pixels, [j.label] * len(s)).tolist(),
                                           real),
                      "NOVELTY": gates.novelty(copies), "memorisation": copies}
            found.append(v)
    return found


def near_spaces(images: Tensor, judge: Predictor) -> dict[str, Tensor]:
    """The spaces in which copies are looked for."""
    return {**pixel_spaces(images), "classifier": PredictorFeatures(judge)(images)}


def about(s: Subset) -> dict:
    return {"name": s.name, "kind": s.kind, "label": s.label, "part": s.part,
            "sources": list(s.sources), "n": len(s), "patients": len(set(s.patients)),
            "content": s.content, "truth": s.truth, "grey": s.grey}
