"""What commands begin with: real, held-out, external and synthetic sets, and the judge.

What must not be compared is refused here: synthetic files that are real ones, labels that the data
do not have, a generator or judge that has seen the held-out images. The judge is the classifier
that was trained on real images alone and reads labels off pictures; of these data, or none.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff import runs
from minidiff.classification.predictor import Predictor
from minidiff.data import images
from minidiff.data.compression import compression, difference
from minidiff.data.dataset import Images, load_pixels
from minidiff.data.split import check_synthetic, check_unseen, of_other_data, trained_on
from minidiff.data.table import Table, read_table
from minidiff.errors import InputError, count
from minidiff.evaluation import selection
from minidiff.root import Reading, Rooted
from minidiff.training.device import pick_device
from minidiff.variables import AND, ANY, present

SMALLEST = 8      # px a side at which images are compared
FEWEST = 20       # images on each side of the membership audit
HELD_OUT = selection.FINISHED
ONE_LABEL = ("all real images have one label, {}: whether images show it, are nearer to it than "
             "to another, or help a classifier cannot be asked without a second label")
UNLABELLED = ("the samples have no label, for their model was told none: they are compared with "
              "the real images of all labels together, and nothing is said of labels")


@dataclass(frozen=True)
class Config(Reading, Rooted):
    data: tuple[str, ...] = ()           # real data sets, with their splits; none: the root's
    samples: str = "ROOT/samples"        # folder of synthetic images, of the form of a data set
    classifier: str = "ROOT/classifier"  # its judge/ reads images, its results are shown; or absent
    judge: str = ""                      # an independent judge: a run of classify.py, or its judge/
    vae: str = "ROOT/vae"                # for its curve and reconstructions; may be absent
    diffusion: str = "ROOT/diffusion"    # for its curve and the membership audit; may be absent
    reference: str = ""                  # run that saw none of these images; calibrates the audit
    matrix: str = "ROOT/matrix"          # of evaluate.py matrix, for its heat map; may be absent
    out: str = "ROOT/report"             # report.html and report.json
    extractors: tuple[str, ...] = ()     # pixels, classifier, vae, NAME=FILE; none: the first two
    size: int = 0                        # px a side to compare images at; 0: that of the samples
    audit: int = 500                     # images a side of the membership audit, 20 or more; or 0
    likelihood: int = 0                  # of these, so many get a second attack: by log p; 0: none
    repeats: int = 100                   # draws behind a floor; FD halves of real sets half as many
    shown: int = 16                      # pictures of each label and kind
    seed: int = 0                        # of draws, resamples, pictures, and of a missing split
    skip_bad: bool = False               # leave unreadable images out, listed and counted
    device: str = "auto"                 # of all networks: auto, cpu, cuda, cuda:1 …


def read(cfg: Config) -> tuple[dict[str, Table], dict[str, Tensor]]:
    """Tables and pixels of train, heldout (val and test) and synthetic, after what is refused."""
    if cfg.audit and cfg.audit < FEWEST:
        raise InputError(f"--audit {cfg.audit} is not allowed: {FEWEST} or more images on each "
                         "side, or 0 for none")
    if cfg.likelihood and not FEWEST <= cfg.likelihood <= cfg.audit:
        raise InputError(f"--likelihood {cfg.likelihood} is not allowed: {FEWEST} or more of the "
                         f"--audit {cfg.audit} images on each side, or 0 for none")
    if cfg.repeats < 10 or cfg.shown < 1 or cfg.size < 0 or 0 < cfg.size < SMALLEST:
        raise InputError(f"repeats {cfg.repeats}, shown {cfg.shown}, size {cfg.size}: allowed are "
                         f"10 and 1 or more, and a size of {SMALLEST} or more (0: that of the "
                         "samples)")
    refuse_nested(cfg.samples, cfg.data)
    splits, picked = selection.held_out([cfg.samples], cfg.diffusion)
    real = read_real(cfg.data, cfg, seed=cfg.seed, root=cfg.root, held_out=splits)
    made = read_synthetic(cfg.samples, real.select(split="train").labels, real.hashes.values())
    heldout = real.select(split=splits)
    seen = {"the generator": trained_on(cfg.samples)}
    if (Path(cfg.classifier) / "judge").is_dir():
        seen["the judge"] = seen_by(cfg.classifier)
    if cfg.judge:
        seen["the independent judge"] = seen_by(cfg.judge)
    unknown = check_origin(heldout, seen)
    size = cfg.size or next(filter(None, map(_side, made.column("file"))), SMALLEST)
    # real images are read together: whether they are grey is decided once
    whole = Images(*load_pixels(real, size, skip_bad=cfg.skip_bad))
    made = Images(*load_pixels(made, size, skip_bad=cfg.skip_bad))
    sets = {"train": whole.part("train"), "heldout": whole.part(*splits), "synthetic": made}
    tables = {name: part.table for name, part in sets.items()}
    for name in ("train", "heldout"):
        tables[name] = replace(tables[name], notes=[*tables[name].notes, *unknown])
    tables["heldout"].notes.extend([*picked, *_mixed(tables["heldout"], size, "real")])
    tables["synthetic"].notes.extend(_mixed(tables["synthetic"], size, "synthetic"))
    sides = [compression(tables[name].column("file")) for name in ("heldout", "synthetic")]
    told_apart = difference(*sides, ("held-out", "synthetic"))
    tables["synthetic"].notes.extend([told_apart] if told_apart else [])
    tables["synthetic"].notes.extend(without_labels(real, made.table))
    return tables, {name: part.pixels for name, part in sets.items()}


def read_real(folders: Sequence[str], reading: Reading, *, seed: int, root: str | Path,
              held_out: Sequence[str] = HELD_OUT) -> Table:
    """Real data with their splits; InputError unless some are for training and some held out."""
    real = read_table(folders, reading, seed=seed, split_dir=Path(root))
    real = real.select(split=("train", *held_out))
    for splits in (("train",), held_out):
        if not len(real.select(split=splits)):
            raise InputError(f"{' '.join(folders)} has no image in split {' or '.join(splits)}")
    return real


def read_synthetic(folder: str, labels: Sequence[str], real: Collection[str]) -> Table:
    """A folder of samples; InputError for a label not among `labels` or a file with a real hash.

    All may be without a label: of a model that was told none.
    """
    made = read_table(folder, split=False)
    strange = set(made.labels) - set(labels)
    if any(AND in label for label in labels):  # findings, which may stand together as never before
        said, known = (frozenset().union(*(present("label", label) for label in some))
                       for some in (strange, labels))
        strange = said - known
    if strange and not unlabelled(made):
        raise InputError(f"{folder}: the data have no label {', '.join(sorted(strange))}; they "
                         f"have {', '.join(labels)}")
    check_synthetic(made.rows, made.hashes, real, folder)
    return made


def unlabelled(samples: Table) -> bool:
    return samples.labels == [ANY]


def alike(table: Table, samples: Table) -> Table:
    """The table as figures go by label: without, if the samples have none."""
    rows = [{**row, "label": ANY} for row in table.rows]
    return replace(table, rows=rows) if unlabelled(samples) else table


def without_labels(real: Table, samples: Table) -> list[str]:
    """A note on what is left out where there are no two labels."""
    if len(real.labels) == 1:
        return [ONE_LABEL.format(*real.labels)]
    return [UNLABELLED] if unlabelled(samples) else []


def refuse_nested(samples: str, real: Sequence[str]) -> None:
    for folder in real:
        if runs.nested(folder, samples):
            raise InputError(f"--samples {samples} is the folder of real data {folder}, or lies in "
                             "it or around it")


def check_origin(heldout: Table, seen: dict[str, set[str] | None],
                 others: Table | None = None) -> list[str]:
    """InputError if one of these was trained on a held-out image or on a held-out patient; a note
    for each whose training images are unknown.

    seen: who → SHA-256 of what it was trained on, None where that is not written down. others: data
    that may hold further images of the patients.
    """
    tables = [heldout, *([others] if others else [])]
    hashes, patients = ({file: value for table in tables for file, value in of(table).items()}
                        for of in (lambda t: t.hashes, lambda t: t.patients))
    return [note for who, known in seen.items()
            for note in check_unseen(heldout.rows, hashes, known, who, patients)]


def judge_folder(classifier: str | Path) -> Path:
    """The judge/ of a classifier run, or the folder itself where it has none."""
    inner = Path(classifier) / "judge"
    return inner if inner.is_dir() else Path(classifier)


def seen_by(classifier: str | Path) -> set[str] | None:
    """SHA-256 of the images that the judge was trained on; None where that is not written down."""
    path = judge_folder(classifier) / "trained_on.json"
    return set(runs.read_json(path)) if path.is_file() else None


def check_reference(run: str, tables: dict[str, Table]) -> None:
    """InputError unless a reference run says that it was trained on none of these images."""
    seen = set(runs.find_json(Path(run) / "model.json", {}).get("trained_on", ()))
    if not seen:
        raise InputError(f"--reference {run}: no finished diffusion run that says which images it "
                         "was trained on")
    known = {table.hashes[row["file"]] for name in ("train", "heldout")
             for table in [tables[name]] for row in table.rows}
    if seen & known:
        raise InputError(f"--reference {run} was trained on {count(len(seen & known), 'image')} of "
                         "these data; a reference must have seen none of them")


def judge_of(classifier: str | Path, train: Table, device: str) -> Predictor | None:
    """The judge of a classifier run, or None; InputError if it was trained on other images."""
    folder = Path(classifier) / "judge"
    if not folder.is_dir():
        return None
    if of_other_data(seen_by(classifier), train.rows, train.hashes):
        raise InputError(f"{folder} was trained on other images than these training images, and "
                         "cannot judge for them: name the --classifier of these data, or one that "
                         "does not exist to go without a judge")
    return Predictor.load(folder).to(pick_device(device))


def of_these_data(cfg: Config, train: Table) -> tuple[Config, bool, list[str]]:
    """The config without runs that were trained on other images, and a note for each of them.

    Between them: whether the samples' generator was. Of its own training images nothing is known
    then; that is noted, too, for no copy of them can be seen.
    """
    saw = {"classifier": seen_by(cfg.classifier),
           "vae": runs.find_json(Path(cfg.vae) / "vae.json", {}).get("trained_on"),
           "diffusion": runs.find_json(Path(cfg.diffusion) / "model.json", {}).get("trained_on")}
    strange = [name for name, seen in saw.items() if of_other_data(seen, train.rows, train.hashes)]
    notes = [f"{getattr(cfg, name)} was trained on other images than these: the page leaves it "
             "out" for name in strange]
    elsewhere = of_other_data(trained_on(cfg.samples), train.rows, train.hashes)
    if elsewhere:
        notes.append(f"{cfg.samples}: its generator was trained on other images than these, of "
                     "which it may hold copies; none can be seen here")
    return replace(cfg, **dict.fromkeys(strange, os.devnull)), elsewhere, notes


def other_runs(cfg: Config, tables: dict[str, Table]) -> dict[str, Any]:
    """What other runs have left for the page: results, curves, matrix, configs; or None.

    What is absent is printed.
    """
    classifier, vae, diffusion = (Path(f) for f in (cfg.classifier, cfg.vae, cfg.diffusion))
    matrix, rebuilt = Path(cfg.matrix) / "matrix.json", vae / "reconstructions.png"
    expected = {classifier / "judge": "judge",
                classifier / "results.json": "results of a classifier",
                classifier / "summary.json": "summary of a study",
                vae / "vae.json": "quality of the autoencoder",
                rebuilt: "reconstructions",
                vae / "loss.png": "curve of the autoencoder",
                diffusion / "loss.png": "curve of the diffusion model",
                matrix: "heat map of a reference matrix"}
    for path, what in expected.items():
        if not path.exists() and Path(os.devnull) not in path.parents:  # a run left out is noted
            print(f"{path} is absent: the page has no {what}")
    grid = runs.find_json(matrix)
    train, heldout = tables["train"], tables["heldout"]
    real = replace(train, rows=train.rows + heldout.rows, hashes=train.hashes | heldout.hashes)
    real = alike(real, tables["synthetic"])  # as the matrix has them
    if grid and not {tables["synthetic"].fingerprint,
                     real.fingerprint} <= set(grid["data"]["fingerprints"].values()):
        print(f"{cfg.matrix} is of other samples or other real images: the page does not show it")
        grid = None
    return {
        "classifier": runs.find_json(classifier / "results.json"),
        "study": runs.find_json(classifier / "summary.json"),
        "vae": runs.find_json(vae / "vae.json"), "matrix": grid,
        "rebuilt": rebuilt.read_bytes() if rebuilt.is_file() else None,
        "configs": {folder: runs.find_json(Path(folder) / "config.json")
                    or runs.find_json(Path(folder) / "manifest.json")
                    for folder in (cfg.vae, cfg.diffusion, cfg.samples, cfg.classifier)
                    if folder != os.devnull},
        "losses": {folder.name: (folder / "loss.png").read_bytes() for folder in (vae, diffusion)
                   if (folder / "loss.png").is_file()},
    }


def commands(cfg: Config) -> dict[str, str]:
    """The command behind each part of the page, as its run recorded it."""
    records = {name: runs.find_json(Path(getattr(cfg, name)) / "run.json", {})
               for name in ("samples", "classifier", "vae", "diffusion", "matrix")}
    return {"report": f"python {runs.provenance()['command']}", **{
        name: f"python {run['sessions'][-1]['command']}" if run.get("sessions") else ""
        for name, run in records.items()}}


def about(tables: dict[str, Table]) -> dict[str, Any]:
    """What a report says of its real data: counts, labels, fingerprints, formats of
    the files and notes."""
    found: dict[str, Any] = {"patients_assumed": tables["train"].patients_assumed,
                             "random_split": tables["train"].random_split,
                             "notes": notes(tables)}
    for name in ("train", "heldout"):
        table = tables[name]
        found |= {f"n_{name}": len(table), f"{name}_patients": len(set(table.column("patient"))),
                  f"{name}_labels": counts(table), f"{name}_fingerprint": table.fingerprint,
                  f"{name}_files": compression(table.column("file"))}
    return found


def counts(table: Table) -> dict[str, int]:
    return dict(sorted(Counter(table.column("label")).items()))


def notes(tables: dict[str, Table]) -> list[str]:
    """What reading the tables remarked, each once; synthetic images need no patients."""
    return list(dict.fromkeys(note for name, table in tables.items() for note in table.notes
                              if name != "synthetic" or "one image = one patient" not in note))


def _side(file: str) -> int:
    """Shorter side of an image; 0 where it cannot be read."""
    try:
        return min(images.read(file).shape[1:])
    except InputError:
        return 0


def _mixed(table: Table, size: int, name: str, at_most: int = 200) -> list[str]:
    """Notes where the first images differ among themselves in size or mode, or are enlarged."""
    shapes = [images.read(file).shape for file in table.column("file")[:at_most]]
    sides = [min(shape[1:]) for shape in shapes]
    enlarged = sum(side < size for side in sides)
    colour = sum(shape[0] == 3 for shape in shapes)
    found = {
        f"{name} images have shorter sides from {min(sides)} to {max(sides)} px; all were brought "
        f"to {size} px": len(set(sides)) > 1,
        f"{enlarged} of {len(shapes)} {name} images are smaller than {size} px and were enlarged, "
        "which blurs them": enlarged,
        f"{colour} of {len(shapes)} {name} images are in colour, the others grey":
            0 < colour < len(shapes)}
    return [note for note, holds in found.items() if holds]
