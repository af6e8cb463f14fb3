"""One folder for an experiment, its root: where each script finds what the one before left there.

    runs/x/ vae/ diffusion/ samples/ classifier/ matrix/ report/ …

A Config that is `Rooted` says where, relative to the root: `run: str = "ROOT/diffusion"`. Explicit
flags go before.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minidiff.errors import InputError
from minidiff.runs import read_json

# knobs that name a run of the experiment
ANCHORS = ("out", "run", "samples", "model", "synthetic", "vae", "runs", "key")
# the root where none is named; its data are phantoms, drawn when they are not there
DEMO = "runs/demo"


@dataclass(frozen=True)
class Rooted:
    """A Config of one experiment. A default ROOT/x is x in the root: --root, else the folder in
    which the first run that was named lies, else the demo's. Where no --data are named, they are
    those of the root's runs."""

    data_of_root: ClassVar[bool] = True    # False: the command itself finds them, by the run that it looks at
    root: str = ""                         # folder of the experiment; none: that of the named run, else runs/demo

    def __post_init__(self):
        named = [_first(getattr(self, name, "")) for name in ANCHORS]
        # may be put anywhere
        named = [x for x in named if x and not _in_root(x) and not x.endswith((".png", ".csv"))]
        root = self.root or next(map(_above, named), DEMO)
        data = getattr(self, "data", ())
        if data and not self.root and not named:  # the demo's root, which nobody asked for
            if _spelled(data) != _spelled(data_of(DEMO)):
                raise InputError(f"--data {' '.join(_spelled(data))}: name the folder of this "
                                 "experiment, e.g. --root runs/x; without it, it would mix with "
                                 f"that of {DEMO}")
            object.__setattr__(self, "data", type(data)())  # they are the demo's, however spelled
        found = {name: _rooted(value, root) for name, value in vars(self).items()} | {"root": root}
        if self.data_of_root and found.get("data", root) in ((), ""):
            known = data_of(root, found.get("run", ""))
            if not known:
                raise InputError(f"--data is missing: no run in {root} says what it was trained on")
            found["data"] = known if isinstance(self.data, tuple) else known[0]
        for name, value in found.items():
            object.__setattr__(self, name, value)


def data_of(root: str, run: str = "") -> tuple[str, ...]:
    """The data folders of a run or, if it names none, of its experiment, as the runs have written
    them down; the phantoms in the demo."""
    for folder in (run or root,
                   *(f"{root}/{name}" for name in ("diffusion", "vae", "classifier", "report"))):
        path = Path(folder) / "config.json"
        saved = read_json(path) if path.is_file() else {}
        if saved.get("data"):
            return tuple(_from_here(folder, _began_in(root, saved.get("root", "")))
                         for folder in saved["data"])
    return (f"{DEMO}/phantom",) if os.path.relpath(root) == DEMO else ()


def _began_in(root: str, as_named: str) -> str:
    """The folder in which the runs of a root were begun, to which their relative paths are: where
    runs/x is this root.
    """
    here, tail = os.path.abspath(root), os.sep + os.path.normpath(as_named)
    return here[: -len(tail)] or os.sep if as_named and here.endswith(tail) else os.getcwd()


def _from_here(folder: str, base: str) -> str:
    return folder if os.path.isabs(folder) else os.path.relpath(os.path.join(base, folder))


def then(script: str, cfg: Any, left: str) -> str:
    """The next command of the way through an experiment, where what it needs was left in its place;
    else nothing.
    """
    if os.path.relpath(cfg.out) != os.path.relpath(f"{cfg.root}/{left}"):
        return ""
    return f"next: python {script}.py" + (f" --root {cfg.root}" if os.path.relpath(cfg.root) != DEMO
                                          else "")


def _in_root(value: Any) -> bool:
    return any(str(x).startswith("ROOT/")
               for x in (value if isinstance(value, tuple) else (value,)))


def _rooted(value: Any, root: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_rooted(x, root) for x in value)
    return root + value[len("ROOT"):] if _in_root(value) else value


def _first(value: Any) -> str:
    value = next(iter(value), "") if isinstance(value, tuple) else value
    return re.sub(r"^[A-Za-z]\w*=", "", value)  # of NAME=DIR


def _above(path: str) -> str:
    """The root of a run's folder; of runs/x/diffusion/best and runs/x/diffusion/snapshots/step_…,
    too, it is runs/x.
    """
    return str(Path(re.sub(r"/(best|snapshots/step_\d+|key\.json)/?$", "", path)).parent)


def _spelled(data: Any) -> list[str]:
    return [os.path.relpath(folder) for folder in ([data] if isinstance(data, str) else data)]
