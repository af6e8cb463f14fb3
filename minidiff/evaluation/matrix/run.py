"""The reference matrix: real subsets × (synthetic sets, real yardsticks, controls that must be
caught).

    python evaluate.py matrix           the embedded demo → runs/demo/matrix/matrix.html
    python evaluate.py matrix --data DIR --samples runs/x/samples --external DIR \
        --classifier runs/x/classifier --out runs/x/matrix

matrix.json holds every number, matrix.html is for the reader; the same command again writes the
same bytes. The exit status is 1, after all is written, if a control was not caught (gates.py).
"""

import hashlib
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff.classification.predictor import Predictor
from minidiff.data import baselines, images, phantom
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.files import read_facts
from minidiff.data.split import trained_on
from minidiff.data.table import Table, read_external, read_table
from minidiff.errors import InputError
from minidiff.evaluation import selection
from minidiff.evaluation.features.build import EXTRACTORS, FeatureCache, build, describe
from minidiff.evaluation.features.extractor import Extractor, PredictorFeatures, Spectrum
from minidiff.evaluation.format import jsonable
from minidiff.evaluation.matrix import cells, controls, gates
from minidiff.evaluation.matrix.cells import (
    Standard,
    Subset,
    real_subsets,
    standard,
    synthetic_subsets,
)
from minidiff.evaluation.metrics.agreement import recognised
from minidiff.evaluation.metrics.copying import FEWEST, memorisation
from minidiff.evaluation.metrics.pairwise import pixel_spaces
from minidiff.evaluation.pages import charts, render
from minidiff.evaluation.sets import (
    HELD_OUT,
    alike,
    check_origin,
    judge_of,
    read_real,
    read_synthetic,
    refuse_nested,
    seen_by,
    without_labels,
)
from minidiff.evaluation.verdicts import KINDS
from minidiff.pixels import Gathered, Pictures, each
from minidiff.root import DEMO, Reading, Rooted
from minidiff.training.device import pick_device

PHANTOM = f"{DEMO}/phantom"      # the demo's data, with which go …
HOSPITAL = f"{DEMO}/hospital"    # … phantoms with more noise, whose views go with the label
REAL = ("real", "external")       # names of sets that no folder of samples gets
SMALLEST = 32                    # px a side at which images are compared
LEAST = {"n": FEWEST, "permutations": 100, "resamples": 100, "repeats": 10}
ASSUMED = "one image = one patient"    # goes without saying of synthetic images


@dataclass(frozen=True)
class MatrixConfig(Reading, Rooted):
    data: tuple[str, ...] = ()                    # real data sets, with splits; none: the root's
    samples: tuple[str, ...] = ("ROOT/samples",)  # folders of synthetic images
    external: tuple[str, ...] = ()                # other hospitals, seen by no model; demo: its own
    classifier: str = "ROOT/classifier"           # its judge/ reads labels and gives a space
    out: str = "ROOT/matrix"                      # matrix.html and matrix.json
    extractors: tuple[str, ...] = ("pixels", "classifier", "spectrum")  # spaces of the distances
    size: int = 0               # side at which images are compared, px; 0: that of the samples
    n: int = 125                # images of a set, at most
    permutations: int = 1000    # behind each p
    resamples: int = 1000       # of patients, behind each interval
    repeats: int = 40           # draws behind what real scores against real
    by_set: bool = False        # each set of a folder of samples as a column of its own, too
    seed: int = 0               # of draws, resamples; of the patient split where there is none
    skip_bad: bool = False      # leave unreadable images out, listed and counted
    device: str = "auto"        # of all networks: auto, cpu, cuda, cuda:1 …


def run_matrix(cfg: MatrixConfig) -> None:
    """Compare synthetic sets with real ones of every source, between controls that must be
    caught."""
    cfg = with_hospital(cfg)
    check(cfg)
    if cfg.external == (HOSPITAL,):
        phantom.write(HOSPITAL, n=600, seed=1, confounding=1.0, noise=0.05)
    sets = read(cfg)
    judge = load_judge(cfg, sets["real"].table)
    facts = {name: s.table.fingerprint for name, s in sets.items()}
    out = runs.open_run(cfg.out, cfg, "matrix", free=("device",), **facts)

    spaces, cached = spaces_of(cfg, sets["real"], judge), FeatureCache(out / "features")
    rows, standards, columns = arrange(cfg, sets)
    used = dict.fromkeys([*rows, *columns, *(j.yardstick for j in standards if j.yardstick)])
    for e in spaces:
        for s in tqdm(used, f"features, {e.name}", unit="set", leave=False):
            s.features[e.name] = cached(e, s.pixels).double().numpy()

    grid, draws = measure(cfg, [e.name for e in spaces], rows, columns, standards)
    own_judge = judge and selection.fingerprint(Path(cfg.classifier) / "judge")
    filters = {named(folder, cfg.samples): selection.decided(
        selection.of(folder)["filters"], own_judge) for folder in cfg.samples}
    verdicts = [gates.of_selected(v, filters.get(v["part"].partition(", set ")[0], {}))
                for v in judge_all(cfg, standards, draws, judge, sets["real"])]
    caught = gates.caught(verdicts)
    unasked = [] if judge else ["LABEL"] + ["FIDELITY"] * (not any(j.yardstick for j in standards))
    state, faults = gates.status(caught, unasked)
    notes = dict.fromkeys(note for s in sets.values() for note in s.table.notes)
    provenance = runs.provenance()
    del provenance["started"]    # equal commands write equal bytes
    result = jsonable({
        "status": state, "faults": faults, "controls": caught, "verdicts": verdicts,
        "extractors": [describe(e) for e in spaces],
        "rows": [about(s) for s in rows], "columns": [about(s) for s in columns], "cells": grid,
        "shortcuts": shortcuts(sets["real"].table),
        "data": {"folders": cfg.data, "external": cfg.external, "samples": cfg.samples,
                 "size": sets["real"].size, "fingerprints": facts},
        "notes": [note for note in notes if ASSUMED not in note],
        "config": runs.read_json(out / "config.json"), "provenance": provenance,
    })
    runs.write_json(out / "matrix.json", result)
    runs.write_atomic(out / "matrix.html", page(result))
    for v in (v for v in result["verdicts"] if v["kind"] == "synthetic"):
        said = ", ".join(f"{k} {v[k]['answer']}" for k in gates.VERDICTS if k in v)
        print(f"{v['label']} ({v['part']}): {said or v['too_few']}")
    print(out / "matrix.html")
    if state == "INVALID":
        print("INVALID: " + "; ".join(faults), file=sys.stderr)
        raise SystemExit(1)


def with_hospital(cfg: MatrixConfig) -> MatrixConfig:
    """The demo's phantoms get another hospital of phantoms, if no other was asked for."""
    return replace(cfg, external=cfg.external or (HOSPITAL,)) if cfg.data == (PHANTOM,) else cfg


def page(result: Mapping) -> str:
    """matrix.html from the contents of matrix.json alone."""
    return render("matrix.html", **result, maps=charts.matrix_maps(result), kinds=KINDS,
                  names=gates.VERDICTS, known=controls.CONTROLS, blur=controls.BLUR,
                  noise=controls.NOISE, left=controls.LEFT, limit=gates.LIMIT)


def check(cfg: MatrixConfig) -> None:
    """Refuse knobs and folders before any work."""
    for name, least in {**LEAST, "size": SMALLEST if cfg.size else 0}.items():
        if getattr(cfg, name) < least:
            raise InputError(f"--{name} {getattr(cfg, name)} is not allowed: {least} or more")
    if not cfg.samples:
        raise InputError("--samples names no folder")
    if len(set(cfg.extractors)) < 2:    # of which one at most is the spectrum
        raise InputError(f"--extractors {' '.join(cfg.extractors) or 'none'}: at least two are "
                         f"needed, for each is blind to something; there are {Spectrum.name}, "
                         f"{', '.join(EXTRACTORS)}")
    for folder in cfg.samples:
        refuse_nested(folder, (*cfg.data, *cfg.external))


def read(cfg: MatrixConfig) -> dict[str, Images]:
    """The sets real (with splits), external, and each folder of samples by its name; each in the
    order of its content."""
    splits, picked = selection.held_out(cfg.samples)
    real = read_real(cfg.data, cfg, seed=cfg.seed, root=cfg.root, held_out=splits)
    real.notes.extend(picked)
    known = {"real": real}
    if cfg.external:
        read_other = read_external if cfg.distinct_patients else read_table
        other = read_other(cfg.external, cfg, split=False)
        known["external"] = replace(other, rows=[{**row, "split": "external"}
                                                 for row in other.rows])
    files = {digest for table in known.values() for digest in table.hashes.values()}
    made = {folder: read_synthetic(folder, real.labels, files) for folder in cfg.samples}
    for table in made.values():
        real.notes.extend(without_labels(known["real"], table))
        known = {name: alike(t, table) for name, t in known.items()}
    seen = {f"the generator of {folder}": trained_on(folder) for folder in made}
    for table in known.values():
        unseen = replace(table, rows=[row for row in table.rows if row["split"] != "train"])
        real.notes.extend(check_origin(
            unseen, {**seen, "the judge": seen_by(cfg.classifier)}, others=real))
    first = images.read(made[cfg.samples[0]].rows[0]["file"])
    size = cfg.size or max(SMALLEST, min(first.shape[1:]))
    for folder, table in made.items():
        known[named(folder, cfg.samples)] = table
    return {name: ordered(*load_pixels(table, size, skip_bad=cfg.skip_bad))
            for name, table in known.items()}


def load_judge(cfg: MatrixConfig, real: Table) -> Predictor | None:
    """The judge of the classifier run; InputError unless it reads every label of the data. None if
    there is one label."""
    if len(real.labels) == 1:
        return None
    folder = Path(cfg.classifier) / "judge"
    # where there is none, `load` says what is missing
    train = real.select(split="train")
    judge = judge_of(cfg.classifier, train, cfg.device) or Predictor.load(folder)
    known = next((v.values for v in judge.variables if v.name == "label" and v.exclusive), ())
    if not known and any(v.name == "label" for v in judge.variables):
        raise InputError(f"{folder} reads several findings off an image; the matrix takes labels "
                         "that exclude each other")
    if missing := sorted(set(real.labels) - set(known)):
        raise InputError(f"{folder} does not read the label {', '.join(missing)}; it knows "
                         f"{', '.join(known) or 'none'}")
    return judge


def named(folder: str, among: Sequence[str]) -> str:
    """What a folder of samples is called in the matrix."""
    name = os.path.normpath(folder) if len(among) > 1 else Path(folder).resolve().name
    return f"{name} (samples)" if name in REAL else name


def ordered(table: Table, pixels: Tensor) -> Images:
    """Images in the order of their content: the order of files must not reach a number."""
    keys = [hashlib.sha256(image.numpy().tobytes()).digest() for image in each(pixels)]
    order = sorted(range(len(keys)), key=lambda i: (keys[i], table.rows[i]["patient"]))
    return Images(replace(table, rows=[table.rows[i] for i in order]),
                  Gathered(pixels, index=order))


def training_sources(real: Table) -> dict[str, list[str]]:
    """Label → the sources of its training images."""
    return {label: real.select(split="train", label=label).column("source")
            for label in real.labels}


def spaces_of(cfg: MatrixConfig, real: Images, judge: Predictor | None) -> list[Extractor]:
    """The extractors asked for: the matrix's own `spectrum`, and others of `features.build`."""
    train = real.part("train").pixels
    absent = (Spectrum.name, *([] if judge else [PredictorFeatures.name]))
    others = build([spec for spec in cfg.extractors if spec not in absent], train=train,
                   judge=judge, device=pick_device(cfg.device))
    return [*others, Spectrum().fit(train)] if Spectrum.name in cfg.extractors else others


def arrange(cfg: MatrixConfig,
            sets: Mapping[str, Images]) -> tuple[list[Subset], list[Standard], list[Subset]]:
    """Rows, the standards of each label, and columns: synthetic sets, controls, real sets."""
    real, sources = sets["real"], training_sources(sets["real"].table)
    rows, wide = ([s for name in REAL if name in sets
                   for s in real_subsets(sets[name], n=n, seed=cfg.seed)]
                  for n in (cfg.n, 2 * cfg.n))
    made = [s for name, each in sets.items() if name not in REAL
            for s in synthetic_subsets(each, sources, name=name, by_set=cfg.by_set, n=cfg.n,
                                       seed=cfg.seed)]
    found = [standard(label, rows, wide, made, real.part("train", label=label).pixels, n=cfg.n,
                      seed=cfg.seed) for label in real.table.labels]
    standards = [j for j in found if j]
    spoilt = [s for j in standards for s in j.candidates if s.kind == "control"]
    return rows, standards, [*made, *spoilt, *rows]


def measure(cfg: MatrixConfig, spaces: Sequence[str], rows: Sequence[Subset],
            columns: Sequence[Subset], standards: Sequence[Standard]) -> tuple[list[dict], dict]:
    """All cells; and of those against held-out references {(label, column): {space: cell and
    draws}}."""
    grid, kept = [], defaultdict(dict)
    with tqdm(total=len(spaces) * len(rows) * len(columns), desc="cells", unit="cell") as bar:
        for space, row in itertools.product(spaces, rows):
            kin = [s for s in rows
                   if (s.label, s.sources, s.kind) == (row.label, row.sources, row.kind)]
            null = cells.real_against_real(kin, space, repeats=cfg.repeats, seed=cfg.seed)
            own = [j for j in standards if j.reference is row]
            for column in dict.fromkeys([*columns, *(j.yardstick for j in own if j.yardstick)]):
                found = cells.cell(row, column, space, null, permutations=cfg.permutations,
                                   resamples=cfg.resamples, seed=cfg.seed)
                if column in columns:
                    grid.append(found[0])
                    bar.update()
                for j in own:
                    kept[j.label, column][space] = found
    return grid, kept


def judge_all(cfg: MatrixConfig, standards: Sequence[Standard], draws: Mapping,
              judge: Predictor | None, real: Images) -> list[dict]:
    """Verdicts on every candidate and, of fidelity and coverage, on the real training images."""
    sources, found = training_sources(real.table), []
    for j in standards:
        others = {s for label, own in sources.items() if label != j.label for s in own}
        train, held = (real.part(*splits, label=j.label) for splits in (("train",), HELD_OUT))
        seen = judge and recognised(judge, held.pixels, [j.label] * len(held)).tolist()
        known = {"train": near_spaces(train.pixels, judge),
                 "heldout": near_spaces(held.pixels, judge), "pairs": 0, "seed": cfg.seed,
                 "patients": (train.table.column("patient"), held.table.column("patient")),
                 "random_split": real.table.random_split}
        for s in tqdm([j.train, *j.candidates], f"verdicts, {j.label}", unit="set", leave=False):
            v = {**about(s), "reference": j.reference.name,
                 "yardstick": j.yardstick.name if j.yardstick else "",
                 "too_few": s.too_few or j.reference.too_few,
                 "label_confounded": bool(others) and others.isdisjoint(sources[j.label]),
                 "yardstick_confounded": bool(j.yardstick
                                              and cells.confounded(j.reference, j.yardstick))}
            if not v["too_few"]:
                v |= distances(j, s, draws)
            if not v["too_few"] and s is not j.train:
                copies = memorisation(fake=near_spaces(s.pixels, judge), **known)
                v |= {"LABEL": gates.no_label(), "NOVELTY": gates.novelty(copies),
                      "memorisation": copies}
                if judge:
                    shown = recognised(judge, s.pixels, [j.label] * len(s)).tolist()
                    v["LABEL"] = gates.label(shown, seen, s.patients, held.table.column("patient"))
            found.append(v)
    return found


def distances(j: Standard, s: Subset, draws: Mapping) -> dict:
    """The verdicts that are read from distances, and what they are read from."""
    own, far = ({space: found for space, found in draws.get((j.label, column), {}).items()
                 if found[1] is not None} for column in (s, j.yardstick))
    scores = {space: cells.rho(own[space], far[space]) for space in own if space in far}
    return {"rho": scores, "FIDELITY": gates.fidelity(scores, j.another_source),
            "COVERAGE": gates.coverage({space: c for space, (c, _) in own.items()}),
            "C2ST": {space: [c["C2ST"], c["C2ST_low"], c["C2ST_high"]]
                     for space, (c, _) in own.items()}}


def near_spaces(images: Pictures, judge: Predictor | None) -> dict[str, Tensor]:
    """The spaces in which copies are searched for."""
    return pixel_spaces(images, *([PredictorFeatures(judge)] if judge else []))


def shortcuts(real: Table) -> list[dict]:
    """How well the headers of the files alone tell each label from the rest."""
    facts, _ = read_facts(real.column("file"), 8)
    header = baselines.features(facts, real.rows, ())["header"]
    return baselines.baselines({"header": header}, real.column("label"), real.column("patient"))


def about(s: Subset) -> dict:
    return {"name": s.name, "kind": s.kind, "label": s.label, "part": s.part,
            "sources": list(s.sources), "n": len(s), "patients": len(set(s.patients)),
            "content": s.content, "truth": s.truth, "too_few": s.too_few}
