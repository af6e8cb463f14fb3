"""Generators that a study pools as one synthetic source: trainings of one recipe with other seeds.

Any other difference between them would be taken for the effect of the seed. So generators of two
recipes are refused, and so is one that is given twice.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from minidiff.data.files import typical_side
from minidiff.data.split import trained_on
from minidiff.data.table import Table
from minidiff.errors import InputError, count
from minidiff.runs import find_json, sha256

# knobs that may differ: places, machine, what is kept of a run, judges of quick numbers
FREE = {"root", "out", "run", "vae", "data", "seed", "device", "compile", "real", "classifier",
        "log_every", "save_every", "snapshots", "checkpointing", "shard"}
PLACES = ("init", "against")  # of other runs, whose seeds may differ; not whether there are some
# of model.json: about the images, compared by `saw`; and what came of the seed
OUTCOMES = ("data", "trained_on", "rows", "bits", "windows", "val_loss")


@dataclass(frozen=True)
class Generator:
    """What is known of one, by a folder of its samples."""

    folder: str
    files: set[str]               # sha256 of its samples
    saw: set[str] | None          # sha256 of its training images; None: unknown
    model: str                    # sha256 of its weights, "" if unknown
    sampling: dict[str, Any]
    training: dict[str, Any]      # {}: its run is not where the samples say
    start: tuple | None           # seed and autoencoder


def check_one_recipe(folders: Sequence[str], tables: Sequence[Table]) -> list[str]:
    """Raise InputError unless these folders of samples are of as many generators of one recipe.

    Compared are the training images, the number and size of the samples, the settings of sampling,
    and those of training where the run is there; a note where it is not.
    """
    if len(folders) < 2:
        return []
    first, *others = made = list(map(_known, folders, tables))
    for other in others:
        differing = _difference(first, other)
        if differing:
            raise InputError(f"{other.folder} is of another recipe than {first.folder}, with which "
                             f"it is pooled: {differing}; they may differ in their seeds only")
    for a, b in combinations(made, 2):
        same = len(a.files & b.files)
        if same or (a.model and a.model == b.model) or (a.start and a.start == b.start):
            why = (f"{count(same, 'file')} of both are identical" if same else
                   "both have the same weights" if a.model == b.model else
                   "both have the same seed and autoencoder")
            raise InputError(f"{b.folder} and {a.folder} are of one generator: {why}; pool "
                             "generators that were trained with different seeds")
    return [f"{one.folder}: the run that made it was not found, so its training was not compared "
            "with that of the other generators" for one in made if not one.training]


def _difference(a: Generator, b: Generator) -> str:
    """What differs first; "" if nothing does."""
    if a.saw != b.saw:
        seen = [one.saw or set() for one in (b, a)]
        return (f"training images, {len(seen[0])} and {len(seen[1])}, of which "
                f"{len(seen[0] & seen[1])} are the same")
    pairs = [(a.sampling, b.sampling)]
    if a.training and b.training:
        pairs.append((a.training, b.training))
    return next((f"{name}, {str(there.get(name))[:60]} and {str(here.get(name))[:60]}"
                 for here, there in pairs for name in {**here, **there}
                 # a knob that a run does not name is newer than it; most such are 0 or none if off
                 if (here.get(name) or None) != (there.get(name) or None)), "")


def _known(folder: str, table: Table) -> Generator:
    manifest, saved = (find_json(Path(folder, name), {})
                       for name in ("manifest.json", "config.json"))
    run = _run(Path(folder), saved, manifest.get("model", ""))
    # best/ and snapshots/step_… have their config and their facts above them
    config, facts = (next(filter(None, (find_json(place / name, {}) for place in (
        run, run.parent, run.parent.parent))), {}) if run else {}
        for name in ("config.json", "run.json"))
    facts = facts.get("facts", {})
    model, vae = (find_json(run / name, {}) if run else {}
                  for name in ("model.json", "vae.json"))
    return Generator(
        folder, set(table.hashes.values()), trained_on(folder), manifest.get("model", ""),
        {"images of each label": dict(sorted(Counter(table.column("label")).items())),
         "px": typical_side(table.column("file"), 2048), **_knobs(saved)},
        {**_knobs(config), **{name: x for name, x in model.items() if name not in OUTCOMES},
         "autoencoder": vae.get("config"), "public files": (facts.get("init") or {}).get("files")}
        if run else {},
        (config["seed"], facts.get("vae")) if "seed" in config else None)


def _run(folder: Path, saved: Mapping, model: str) -> Path | None:
    """The run whose model made these samples, as it was named or at its place in their root."""
    if not model or "run" not in saved:
        return None
    places = [Path(saved["run"])]
    if saved.get("root") and places[0].is_relative_to(saved["root"]):
        places.append(folder.parent / places[0].relative_to(saved["root"]))
    weights = (place / "model.safetensors" for place in places)
    return next((path.parent for path in weights if path.is_file() and sha256(path) == model), None)


def _knobs(saved: Mapping) -> dict[str, Any]:
    return {name: bool(x) if name in PLACES else x for name, x in saved.items() if name not in FREE}
