"""Checkpoints: save and load whatever has a `state_dict`; safetensors and JSON, never a pickle.

A checkpoint is a folder `step_00000500/` with one safetensors file a part and, written last,
`state.json`: the non-tensor values and every file's SHA-256. The folder is filled under another
name and renamed when whole, so that a kill at any moment leaves either a valid checkpoint or none.
All ranks hand in their shards; rank 0 writes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from minidiff import distributed, runs
from minidiff.errors import InputError, TrainingFault

MINUTES = 15  # between saves, at the most: a step of a large model is long
KEEP = 2  # full states kept: the newest, and the one before in case it is damaged


class Stateful(Protocol):
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> Any: ...


def save(path: str | Path, **parts: Stateful) -> None:
    """Write a checkpoint folder holding each part by name."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    if not distributed.rank():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        manifest = {}
        for name, part in parts.items():
            tensors: dict[str, Tensor] = {}
            tree = _to_tree(part.state_dict(), tensors, name)
            if not distributed.rank():
                file = temporary / f"{name}.safetensors"
                runs.save_tensors(file, tensors)
                manifest[name] = {"tree": tree, "sha256": runs.sha256(file)}
        if not distributed.rank():
            runs.write_json(temporary / "state.json", manifest)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            runs.sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(path: str | Path, **parts: Stateful) -> None:
    """Load each named part from a checkpoint folder, which may hold more; strict about names and
    shapes.
    """
    manifest = _manifest(Path(path))
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
            _lay_like_parameters(part)


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
        bad = [n for n, part in manifest.items()
               if runs.sha256(path / f"{n}.safetensors") != part["sha256"]]
    except (OSError, KeyError, TypeError, InputError) as error:
        return str(error)
    return f"{bad[0]}.safetensors has another SHA-256 than state.json says" if bad else None


def resume(run: Path, **parts: Stateful) -> int:
    """Load the newest valid checkpoint of a run, forget what was logged after it, and return the
    steps done (0: none).
    """
    with distributed.first():
        path = newest(run / "checkpoints")
        done = int(path.name.removeprefix("step_")) if path else 0
        if not distributed.rank():
            runs.rewind_log(run / "log.jsonl", done)
    if path:
        load(path, **parts)
    return done


def checkpoint(run: Path, done: int, **parts: Stateful) -> None:
    """Save the state after `done` steps and drop the states that are no longer needed."""
    save(run / "checkpoints" / f"step_{done:08d}", **parts)
    if not distributed.rank():
        prune(run / "checkpoints")


def prune(folder: str | Path) -> None:
    """Keep the newest states, and sweep up what a killed writer left."""
    for path in sorted(Path(folder).glob("step_*"))[:-KEEP]:
        shutil.rmtree(path)
    for path in Path(folder).glob(".step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


class Keeper:
    """Keeps a training run: goes on from its newest state and saves it by step, by time, at a
    signal and at the end.

        with Keeper(run, steps, save_every, model=…, optimizer=…) as keeper:
            for step in keeper.steps():
                …                       one step; `step + 1` are done at its end, and then the state
                                        is saved if it is due

    SIGTERM and Ctrl-C do not kill: the step is finished, the state saved, and the process ends with
    status 130. A fault of the training ends it with the last good state named.
    """

    def __init__(self, run: Path, steps: int, every: int, text: str = "", **parts: Stateful):
        self.run, self.total, self.every, self.parts = run, steps, every, parts
        self.requested, self.saved_at = False, time.monotonic()
        self.start = resume(run, **parts)
        if self.start and not distributed.rank():
            print(f"{run}: " + (f"resuming at step {self.start}" if self.start < steps
                                else f"{steps} steps are done"))
        self.lows: dict[str, float] = {}
        for line in runs.read_log(run / "log.jsonl"):
            for name, value in line.items():
                self.lowest(name, value)
        self.bar = tqdm(total=steps, initial=self.start, desc=text, unit="step",
                        disable=bool(distributed.rank()))

    def __enter__(self) -> Keeper:
        self.before = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _request(self, signum, frame) -> None:
        self.requested = True

    def steps(self) -> Iterator[int]:
        for step in range(self.start, self.total):
            yield step
            done = step + 1
            self.bar.update()
            stop = distributed.anywhere(self.requested)
            late = distributed.anywhere(not distributed.rank()
                                        and time.monotonic() - self.saved_at > MINUTES * 60)
            if done % self.every == 0 or done == self.total or stop or late:
                checkpoint(self.run, done, **self.parts)
                self.saved_at = time.monotonic()
            if stop and done < self.total:
                if not distributed.rank():
                    tqdm.write(f"stopped at step {done} of {self.total}; the same command goes on "
                               "from here")
                distributed.stop()
                # as after any Ctrl-C, so that `train.py && sample.py` stops here
                raise SystemExit(130)

    def log(self, **values: float | None) -> None:
        """One line of log.jsonl."""
        if not distributed.rank():
            runs.append_log(self.run / "log.jsonl", **values)

    def lowest(self, name: str, value: float | None) -> bool:
        """Is this the lowest value of its name so far, in this run and before it was resumed?"""
        if value is None or value >= self.lows.get(name, float("inf")):
            return False
        self.lows[name] = value
        return True

    def show(self, images: int, **values: float) -> None:
        """The line beside the bar: the values, images a second and the peak of memory."""
        rate = self.bar.format_dict["rate"]
        shown = {name: f"{value:.4g}" for name, value in values.items()}
        self.bar.set_postfix(**shown, images=f"{images * rate:.0f}/s" if rate else "…",
                             mem=f"{peak_memory() / 1e9:.1f}GB")

    def __exit__(self, kind, fault, _) -> None:
        self.bar.close()
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if kind is TrainingFault:
            last = next(iter(sorted((self.run / "checkpoints").glob("step_*"), reverse=True)),
                        "none")
            raise TrainingFault(f"{fault}; the last good state: {last}") from None


def peak_memory() -> int:
    """Bytes held at the most so far: of the GPU where there is one, else resident in this
    process.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin"
                                                                 else 1024)


def budget(model: nn.Module) -> tuple[int, str]:
    """Bytes of one saved state, and in words what is trained and what that takes, activations
    apart.
    """
    whole = sum(p.numel() for p in model.parameters())
    some = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # weights; EMA, gradients, two moments. weights, EMA, moments
    memory, disk = 4 * (whole + 4 * some), 4 * 4 * some
    return disk, (f"{some:,} of {whole:,} parameters are trained; {memory / 1e9:.2f} GB of memory "
                  f"and the activations; {(KEEP + 1) * disk / 1e9:.2f} GB of disk for states")


def require_space(run: Path, size: int, snapshots: int = 0, whole: int = 0) -> None:
    """Raise InputError unless the disk has room for the two states that are kept, the one being
    written, and those snapshots, of `whole` bytes each, that are still to come."""
    there, made = len(list((run / "checkpoints").glob("step_*"))), len(
        list(run.glob("snapshots/*/model.json")))
    wanted = (KEEP + 1 - min(there, KEEP)) * size + max(0, snapshots - made) * whole
    free = shutil.disk_usage(run).free
    if free < wanted:
        more = f" and {snapshots} snapshots of {whole / 1e9:.2f} GB" if snapshots else ""
        raise InputError(f"{run}: states of {size / 1e9:.2f} GB{more} need {wanted / 1e9:.2f} GB "
                         f"of disk, {free / 1e9:.2f} GB are free; name another --out, train fewer "
                         "weights or keep fewer --snapshots")


def _manifest(path: Path) -> dict:
    try:
        return json.loads((path / "state.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is no checkpoint: it has no state.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}/state.json is damaged: {error}") from None


def _to_tree(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Nested dicts, lists, scalars → JSON; tensors are put aside under their path. Dict keys may be
    integers.
    """
    if isinstance(value, Tensor):
        tensors[name] = distributed.full(value)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _to_tree(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_to_tree(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    assert value is None or isinstance(value, (bool, int, float,
                                               str)), f"{name}: {type(value)} is not plain"
    return {"value": value}


def _from_tree(tree: dict, tensors: dict[str, Tensor]) -> Any:
    (kind, value), = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {k: _from_tree(v, tensors) for k, v in value}
    return [_from_tree(v, tensors) for v in value] if kind == "list" else value


def _lay_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory format and the shards of their parameters: fused kernels walk raw
    memory, and were silently wrong."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype)
                distributed.assign(state[name], value)
