"""The frame of a training loop: resume, save when due, log, and stop well at a signal."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import distributed, runs
from minidiff.errors import TrainingFault
from minidiff.overlap import Behind, ahead
from minidiff.training import state
from minidiff.training.device import peak_memory
from minidiff.training.state import Stateful

MINUTES = 15  # between two saves at most, for a step of a large model is long
LARGE = 2e9   # bytes of a state from which on it is saved by the clock alone


class Checkpointer:
    """Resumes a training run and saves its state by step, by time, at a signal and at the end.

        with Checkpointer(run, device, steps=…, every=…, text="VAE", model=…) as checkpointer:
            for step, batch in checkpointer.steps(make_batch):
                …                       train one step; afterwards the state is saved if it is due

    A GPU's batches are made one ahead, and its states written behind the next steps. SIGTERM and
    Ctrl-C finish the step and save the state; the process ends with status 130. A TrainingFault
    ends it with the last good state named.
    """

    def __init__(self, run: Path, device: torch.device, *, steps: int, every: int, text: str = "",
                 **parts: Stateful):
        self.run, self.total, self.every, self.parts = run, steps, every, parts
        self.device, self.writer = device, Behind(device)
        self.log_file = run / "log.jsonl"
        self.interrupted, self.saved_at = False, time.monotonic()
        self.flags = [False, False]  # of all ranks: a signal has come, a save is late
        self.start = state.resume(run, **parts)
        if self.start and distributed.rank() == 0:
            print(f"{run}: resuming at step {self.start}" if self.start < steps
                  else f"{run}: {steps} steps are done")
        losses = [line["val_loss"] for line in runs.read_log(self.log_file)
                  if line.get("val_loss") is not None]
        self.lowest_loss = min(filter(math.isfinite, losses), default=math.inf)
        if self.large and self.start < steps and distributed.rank() == 0:
            print(f"{run}: its states are large and saved every {MINUTES} minutes, not every "
                  f"{every} steps")
        self.bar = tqdm(total=steps, initial=self.start, desc=text, unit="step",
                        disable=distributed.rank() > 0)

    def __enter__(self) -> "Checkpointer":
        self.handlers = {number: signal.signal(number, self._interrupt)
                         for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _interrupt(self, number, frame) -> None:
        self.interrupted = True

    def steps(self, make: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
        """The steps that are left, each with the batch that `make` gives for it alone."""
        todo = range(self.start, self.total)
        for step, batch in zip(todo, ahead(make, todo, self.device)):
            yield step, batch
            done = step + 1
            self.bar.update()
            stop, late = self.flags if distributed.world() > 1 else self._flags()
            by_step = self.is_due(done) and (done == self.total or not self.large)
            if by_step or stop or late:
                state.checkpoint(self.run, done, self.writer, **self.parts)
                self.saved_at = time.monotonic()
            if stop and done < self.total:
                self.writer.wait()
                if distributed.rank() == 0:
                    tqdm.write(f"stopped at step {done} of {self.total}; the same command resumes")
                distributed.stop()
                raise SystemExit(130)  # as after any Ctrl-C: `train.py && sample.py` ends here

    @cached_property
    def large(self) -> bool:
        """Is a state so large that it is saved by the clock alone?"""
        trained = sum(x.numel() for x in self.parts["model"].state_dict().values())
        return 4 * 4 * trained > LARGE  # float32: weights, EMA and two moments

    def _flags(self) -> list[bool]:
        return [self.interrupted, time.monotonic() - self.saved_at > MINUTES * 60]

    def gather(self, values: Tensor) -> Tensor:
        """(n,) on the CPU of every rank → (world, n). The flags that `steps` looks at go with
        them: one message a step, for its cost is that of any message."""
        flags = torch.tensor(self._flags(), dtype=values.dtype)
        of_all = distributed.gather(torch.cat([values, flags])).view(distributed.world(), -1)
        self.flags = (of_all[:, -2:] > 0).any(0).tolist()
        return of_all[:, :-2]

    def is_due(self, done: int) -> bool:
        """Is it time for pictures, held-out losses and, unless it is large, a saved state?"""
        return done % self.every == 0 or done == self.total

    def log(self, **values: float | None) -> None:
        """One line of log.jsonl."""
        if distributed.rank() == 0:
            runs.append_log(self.log_file, **values)

    def is_best(self, val_loss: float | None) -> bool:
        """Is this held-out loss the lowest so far, also of the steps before a resume?"""
        best = val_loss is not None and val_loss < self.lowest_loss
        if best:
            self.lowest_loss = val_loss
        return best

    def show(self, images: int, **values: float) -> None:
        """Beside the bar: the values, images a second and the peak of memory."""
        rate = self.bar.format_dict["rate"]
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()},
                             images=f"{images * rate:.0f}/s" if rate else "…",
                             mem=f"{peak_memory() / 1e9:.1f}GB")

    def __exit__(self, kind, fault, _) -> None:
        self.bar.close()
        try:
            self.writer.wait()  # a signal must not cut off the last state
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if kind is TrainingFault:
            last = max((self.run / "checkpoints").glob("step_*"), default="none")
            raise TrainingFault(f"{fault}; the last good state: {last}") from None
