"""Checkpoints: save and load whatever has a `state_dict`; safetensors and JSON, never a pickle.

A checkpoint is a folder `step_00000500/` with one safetensors file a part and, written last, `state.json`: the
non-tensor values and every file's SHA-256. The folder is filled under another name and renamed when whole, so that a
kill at any moment leaves either a valid checkpoint or none.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from minidiff import runs
from minidiff.errors import InputError

KEEP = 2  # full states kept: the newest, and the one before in case it is damaged


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


def save(path: str | Path, **parts: Stateful) -> None:
    """Write a checkpoint folder holding each part by name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        manifest = {}
        for name, part in parts.items():
            tensors: dict[str, Tensor] = {}
            tree = _to_tree(part.state_dict(), tensors, name)
            file = temporary / f"{name}.safetensors"
            runs.save_tensors(file, tensors)
            manifest[name] = {"tree": tree, "sha256": runs.sha256(file)}
        runs.write_json(temporary / "state.json", manifest)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        runs.sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, **parts: Stateful) -> None:
    """Load each named part from a checkpoint folder, which may hold more; strict about names and shapes."""
    manifest = _manifest(Path(path))
    for name, part in parts.items():
        if name not in manifest:
            raise InputError(f"{path} holds {', '.join(manifest)}, no {name}")
        tensors = load_file(Path(path) / f"{name}.safetensors")
        try:
            part.load_state_dict(_from_tree(manifest[name]["tree"], tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path} does not fit this {name}: {str(error).splitlines()[-1].strip()}") from None
        if isinstance(part, torch.optim.Optimizer):
            _match_strides(part)


def newest(folder: str | Path) -> Path | None:
    """The newest valid checkpoint in a folder; damaged ones are named on stderr and passed over."""
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        fault = check(path)
        if fault is None:
            return path
        print(f"{path} is not valid ({fault}); taking the checkpoint before it", file=sys.stderr)
    return None


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = _manifest(path)
        bad = [n for n, part in manifest.items() if runs.sha256(path / f"{n}.safetensors") != part["sha256"]]
    except (OSError, KeyError, TypeError, InputError) as error:
        return str(error)
    return f"{bad[0]}.safetensors has another SHA-256 than state.json says" if bad else None


def resume(run: Path, **parts: Stateful) -> int:
    """Load the newest valid checkpoint of a run, forget what was logged after it, and return the steps done (0: none)."""
    path = newest(run / "checkpoints")
    if path is None:
        runs.rewind_log(run / "log.jsonl", 0)
        return 0
    load(path, **parts)
    done = int(path.name.removeprefix("step_"))
    runs.rewind_log(run / "log.jsonl", done)
    return done


def checkpoint(run: Path, done: int, **parts: Stateful) -> None:
    """Save the state after `done` steps and drop the states that are no longer needed."""
    save(run / "checkpoints" / f"step_{done:08d}", **parts)
    prune(run / "checkpoints")


def prune(folder: str | Path) -> None:
    """Keep the newest states, and sweep up what a killed writer left."""
    for path in sorted(Path(folder).glob("step_*"))[:-KEEP]:
        shutil.rmtree(path)
    for path in Path(folder).glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


class Interrupt:
    """SIGTERM and Ctrl-C set `.requested` instead of killing, so that the loop ends after a whole step and saves."""

    def __enter__(self) -> Interrupt:
        self.requested = False
        self.before = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, signum, frame) -> None:
        self.requested = True

    def __exit__(self, *_) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def _manifest(path: Path) -> dict:
    try:
        return json.loads((path / "state.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is no checkpoint: it has no state.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}/state.json is damaged: {error}") from None


def _to_tree(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Nested dicts, lists, scalars → JSON; tensors are put aside under their path. Dict keys may be integers."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _to_tree(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_to_tree(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{name}: {type(value)} is not plain"
    return {"value": value}


def _from_tree(tree: dict, tensors: dict[str, Tensor]) -> Any:
    (kind, value), = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _from_tree(v, tensors) for k, v in value}
    return [_from_tree(v, tensors) for v in value] if kind == "list" else value


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory format of their parameters: fused kernels walk raw memory, and were silently wrong."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
