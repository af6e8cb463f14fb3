"""One folder for an experiment, its root: each script finds there what the one before left.

    runs/x/ vae/ diffusion/ samples/ classifier/ matrix/ report/ …

A Config that is `Rooted` says where, relative to the root: `run: str = "ROOT/diffusion"`. A path
given as a flag is used as it is.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minidiff.errors import InputError
from minidiff.runs import find_json

ANCHORS = ("out", "run", "samples", "model", "synthetic", "vae", "runs", "key")  # knobs: a run
DEMO = "runs/demo"  # the root if none is named; its data are phantoms, drawn if they are not there


@dataclass(frozen=True)
class Reading:
    """How the tables of real data are read: it belongs to the data, and goes where they go.

    A later command that names no other --data takes both from the root's runs.
    """

    columns: tuple[str, ...] = ()  # as your table names them: file_name=filename label=finding
    only_listed: bool = False      # leave images without row or label out, counted; else refuse
    same_patients: bool = False    # equal patient ids of two folders of data are one person
    distinct_patients: bool = False  # they are two persons: each folder numbers its own
    rehash: bool = False           # read every file again: distrust the SHA-256 that are kept


AS_WE_NAME = Reading()  # tables that have minidiff's own columns, a row for each image


@dataclass(frozen=True)
class Rooted:
    """A Config of one experiment. A default ROOT/x is x in the root.

    The root is --root, else the folder that holds the first run that was named, else the demo's.
    Without --data, the data are those of the root's runs.
    """

    data_of_root: ClassVar[bool] = True    # False: the command itself finds the data
    root: str = ""                         # folder; none: that of the named run, else runs/demo

    def __post_init__(self):
        named = [_first(getattr(self, name, "")) for name in ANCHORS]
        named = [path for path in named if path and not path.startswith("ROOT/")
                 and not path.endswith((".png", ".csv"))]  # these two may lie anywhere
        root = self.root or (_root_of(named[0]) if named else DEMO)
        data = getattr(self, "data", ())
        if data and not self.root and not named:  # the demo's root, which nobody asked for
            if _relative(data) != _relative(data_of(DEMO)):
                raise InputError(f"--data {' '.join(_relative(data))}: name the folder of this "
                                 "experiment, e.g. --root runs/x; without it, it would mix with "
                                 f"that of {DEMO}")
            object.__setattr__(self, "data", type(data)())  # they are the demo's, however written
        found = {name: _resolved(value, root) for name, value in vars(self).items()}
        run = found.get("run", "")
        if isinstance(self, Reading) and (not data or _is_of(data, root, run)):
            found |= {name: found[name] or value
                      for name, value in vars(reading_of(_saved(root, run)[0])).items()}
        if self.data_of_root and found.get("data", root) in ((), ""):
            known = data_of(root, run)
            if not known:
                raise InputError(f"--data is missing: no run in {root} says what it was trained on")
            found["data"] = known if isinstance(self.data, tuple) else known[0]
        for name, value in {**found, "root": root}.items():
            object.__setattr__(self, name, value)


def data_of(root: str, run: str = "") -> tuple[str, ...]:
    """The data folders in the config of a run, or of the first run in the root that names some."""
    saved, folder = _saved(root, run)
    if not saved:
        return (f"{DEMO}/phantom",) if os.path.relpath(root) == DEMO else ()
    base, then = _started_in(root, saved.get("root", "")), _started_in_then(folder)
    return tuple(data if os.path.isabs(data) else _here_or_there(root, data, base, then)
                 for data in saved["data"])


def _is_of(data: tuple[str, ...] | str, root: str, run: str) -> bool:
    """Are these the data of a run? Also where it was asked which of two folders is meant."""
    try:
        return _relative(data) == _relative(data_of(root, run))
    except InputError:
        return True


def reading_of(saved: Mapping[str, Any]) -> Reading:
    """How a run read its data, by its saved config."""
    return Reading(**{name: type(usual)(saved.get(name, usual))
                      for name, usual in vars(AS_WE_NAME).items()})


def _saved(root: str, run: str) -> tuple[dict[str, Any], Path]:
    """The config of a run, or of the first run in the root, that names data, and its folder; {} if
    none does."""
    for folder in (run or root, *(f"{root}/{name}"
                                  for name in ("diffusion", "vae", "classifier", "report"))):
        saved = find_json(Path(folder) / "config.json", {})
        if saved.get("data"):
            return saved, Path(folder)
    return {}, Path(root)


def _started_in(root: str, as_named: str) -> str:
    """The folder in which a root's runs were started, the base of their relative paths."""
    here, tail = os.path.abspath(root), os.sep + os.path.normpath(as_named)
    if not as_named or not here.endswith(tail):
        return os.getcwd()
    return here.removesuffix(tail) or os.sep


def _started_in_then(run: Path) -> str:
    """The folder in which a run was last trained, by its record; "" if that does not say."""
    sessions = find_json(run / "run.json", {}).get("sessions", [])
    return sessions[-1].get("folder", "") if sessions else ""


def _here_or_there(root: str, data: str, base: str, then: str) -> str:
    """Data named by a relative path: below `base`, else where they were when the root was begun.

    InputError where a copied root finds a folder in both places, for either may be meant; data
    inside the root were copied with it.
    """
    here, there = (os.path.normpath(os.path.join(folder, data)) for folder in (base, then or base))
    inside = Path(here).resolve().is_relative_to(Path(root).resolve())
    if inside or not os.path.isdir(there):
        return os.path.relpath(here)
    if os.path.isdir(here) and not os.path.samefile(here, there):
        raise InputError(f"{root} was begun in {then} with the data {there}, and there is "
                         f"{here}, too: name one of them by --data")
    return os.path.relpath(here if os.path.isdir(here) else there)


def then(script: str, cfg: Any, left: str) -> str:
    """A line with the next command of the demo's way, if this run lies where that looks for it."""
    if os.path.relpath(cfg.out) != os.path.relpath(f"{cfg.root}/{left}"):
        return ""
    root = "" if os.path.relpath(cfg.root) == DEMO else f" --root {cfg.root}"
    return f"next: python {script}.py{root}"


def _resolved(value: Any, root: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_resolved(item, root) for item in value)
    inside = isinstance(value, str) and value.startswith("ROOT/")
    return root + value.removeprefix("ROOT") if inside else value


def _first(value: Any) -> str:
    """The path in a knob: of several the first, of NAME=DIR the folder."""
    value = next(iter(value), "") if isinstance(value, tuple) else value
    return re.sub(r"^[A-Za-z]\w*=", "", value)


def _root_of(run: str) -> str:
    """runs/x of runs/x/diffusion, and of its best/, snapshots/…, averaged/… and key.json."""
    return str(Path(re.sub(r"/(best|(snapshots|averaged)/[^/]+|key\.json)/?$", "", run)).parent)


def _relative(data: Any) -> list[str]:
    return [os.path.relpath(folder) for folder in ([data] if isinstance(data, str) else data)]
