"""Checkpoints: save and load whatever has a `state_dict`; safetensors and JSON, never a pickle.

A checkpoint is a folder `step_00000500/` with one safetensors file per part and, written last,
`state.json`: all values that are no tensors, and the SHA-256 of each file. The folder is filled
under another name and renamed when complete, so that a kill at any moment leaves a valid
checkpoint or none. All ranks hand in their shards; rank 0 writes.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff import distributed, runs
from minidiff.errors import InputError
from minidiff.overlap import Behind
from minidiff.training.optim import trainable

STATES = 2  # saved states of a run: the newest, and the one before in case it is damaged


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


def save(path: str | Path, writer: Behind | None = None, **parts: Stateful) -> None:
    """Write a checkpoint folder that holds each part by name; with a threaded `writer`, copy the
    state to the host's memory and let that write it while training goes on."""
    contents, copy = {}, writer is not None and writer.threaded
    for name, part in parts.items():
        tensors: dict[str, Tensor] = {}
        contents[name] = _to_tree(part.state_dict(), tensors, name, copy), tensors
    if distributed.rank() == 0:
        (writer or Behind(torch.device("cpu"))).run(_write, Path(path), contents)


def _write(path: Path, contents: dict[str, tuple[dict, dict[str, Tensor]]]) -> None:
    temporary, manifest = runs.beside(path), {}
    try:
        for name, (tree, tensors) in contents.items():
            file = temporary / f"{name}.safetensors"
            runs.save_tensors(file, tensors)
            manifest[name] = {"tree": tree, "sha256": runs.sha256(file)}
        runs.write_json(temporary / "state.json", manifest)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        runs.sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, **parts: Stateful) -> None:
    """Load the named parts of a checkpoint, which may hold more; names and shapes must fit."""
    manifest = runs.read_json(Path(path) / "state.json")
    for name, part in parts.items():
        if name not in manifest:
            raise InputError(f"{path} holds {', '.join(manifest)}, no {name}")
        tensors = load_file(Path(path) / f"{name}.safetensors")
        try:
            part.load_state_dict(_from_tree(manifest[name]["tree"], tensors))
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"{path} does not fit this {name}: "
                             f"{str(error).splitlines()[-1].strip()}") from None
        if isinstance(part, torch.optim.Optimizer):
            _lay_out_like_parameters(part)


def newest(folder: str | Path) -> Path | None:
    """The newest valid checkpoint in a folder; damaged ones are named on stderr."""
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        fault = check(path)
        if fault is None:
            return path
        print(f"{path} is not valid ({fault}); taking the checkpoint before it", file=sys.stderr)
    return None


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        wrong = [name for name, part in runs.read_json(path / "state.json").items()
                 if runs.sha256(path / f"{name}.safetensors") != part["sha256"]]
    except (OSError, KeyError, TypeError, AttributeError, InputError) as error:
        return str(error)
    return f"{wrong[0]}.safetensors has another SHA-256 than state.json says" if wrong else None


def resume(run: Path, **parts: Stateful) -> int:
    """Load the newest valid checkpoint of a run, cut the log back to it, return the steps done."""
    with distributed.rank0_first():
        path = newest(run / "checkpoints")
        done = int(path.name.removeprefix("step_")) if path else 0
        if distributed.rank() == 0:
            runs.rewind_log(run / "log.jsonl", done)
    if path:
        load(path, **parts)
    return done


def checkpoint(run: Path, done: int, writer: Behind, **parts: Stateful) -> None:
    """Save the state after `done` steps; delete older states and what a killed save left."""
    folder = run / "checkpoints"
    writer.wait()  # one copy of the state at most, and a fault of the disk is not passed over
    save(folder / f"step_{done:08d}", writer, **parts)
    if distributed.rank() == 0:
        writer.run(_tidy, folder)


def _tidy(folder: Path) -> None:
    for path in [*sorted(folder.glob("step_*"))[:-STATES], *folder.glob(".step_*.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def budget(model: nn.Module, averages: int = 0) -> tuple[int, str]:
    """Bytes of one saved state; and in words what is trained and what it takes. averages: how many
    are kept besides the EMA."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in trainable(model))
    memory = 4 * (total + (4 + averages) * trained)  # weights; gradients, EMA, moments of AdamW
    disk = 4 * (4 + averages) * trained              # weights, EMA and two moments
    return disk, (f"{trained:,} of {total:,} parameters are trained; {memory / 1e9:.2f} GB of "
                  f"memory and the activations; {(STATES + 1) * disk / 1e9:.2f} GB of disk for "
                  "states")


def require_space(run: Path, model: nn.Module, snapshots: int = 0, averages: int = 0) -> None:
    """Print the budget; raise InputError if the disk lacks room for states and snapshots to come.

    One state more than stay, for a new one is complete before the oldest is deleted.
    """
    size, text = budget(model, averages)
    print(f"{run}: {text}")
    snapshot = 4 * (sum(p.numel() for p in model.parameters())
                    + averages * sum(p.numel() for p in trainable(model)))
    states = STATES + 1 - min(STATES, len(list(run.glob("checkpoints/step_*"))))
    missing = max(0, snapshots - len(list(run.glob("snapshots/*/model.json"))))
    needed, free = states * size + missing * snapshot, shutil.disk_usage(run).free
    if free < needed:
        more = f" and {snapshots} snapshots of {snapshot / 1e9:.2f} GB" if snapshots else ""
        raise InputError(f"{run}: states of {size / 1e9:.2f} GB{more} need {needed / 1e9:.2f} GB "
                         f"of disk, {free / 1e9:.2f} GB are free; name another --out, train fewer "
                         "weights or keep fewer --snapshots")


def _to_tree(value: Any, tensors: dict[str, Tensor], name: str, copy: bool = False) -> Any:
    """Dicts (also with integer keys), lists and scalars → JSON; tensors go to `tensors` by name."""
    if isinstance(value, Tensor):
        tensors[name] = distributed.gather_full(value, copy)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _to_tree(v, tensors, f"{name}.{k}", copy)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_to_tree(v, tensors, f"{name}.{i}", copy) for i, v in enumerate(value)]}
    assert isinstance(value, (bool, int, float, str, type(None))), f"{name}: {type(value)}"
    return {"value": value}


def _from_tree(tree: dict, tensors: dict[str, Tensor]) -> Any:
    (kind, value), = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _from_tree(v, tensors) for k, v in value}
    return [_from_tree(v, tensors) for v in value] if kind == "list" else value


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory format and the shards of their parameters.

    Fused kernels walk through raw memory: with another format they are silently wrong.
    """
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype)
                distributed.assign(moments[name], value)
