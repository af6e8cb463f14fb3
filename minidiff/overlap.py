"""Work beside the device: it computes behind the program that feeds it, and both should be busy.

On the CPU everything here runs in turn, for there a thread would take the cores that compute. What
is made ahead is a function of its place alone, so the results are the same.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Item, Made = TypeVar("Item"), TypeVar("Made")


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the device; the program does not wait for its way there from the CPU."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        x = x.contiguous().pin_memory()  # which an expanded grey image, one channel, cannot be
    return x.to(device, non_blocking=x.device.type == "cpu")


def ahead(make: Callable[[Item], Made], items: Iterable[Item],
          device: torch.device) -> Iterator[Made]:
    """make(item) for each item, begun while the one before is in use; on the CPU, in turn.

    A fault of `make` is raised where its item would have come.
    """
    if device.type == "cpu":
        yield from map(make, items)
        return
    waiting: Future | None = None
    with ThreadPoolExecutor(1) as thread:
        for item in items:
            begun = thread.submit(make, item)
            if waiting:
                yield waiting.result()
            waiting = begun
        if waiting:
            yield waiting.result()


class Behind:
    """One thread that runs jobs in order behind the program; on the CPU, they run at once."""

    def __init__(self, device: torch.device):
        self.pool = None if device.type == "cpu" else ThreadPoolExecutor(1)
        self.jobs: list[Future] = []

    @property
    def threaded(self) -> bool:
        return self.pool is not None

    def run(self, job: Callable[..., Any], *given: Any) -> None:
        """Begin a job when those before have ended; raises the fault of one that has."""
        if self.pool is None:
            job(*given)
            return
        while self.jobs and self.jobs[0].done():
            self.jobs.pop(0).result()
        self.jobs.append(self.pool.submit(job, *given))

    def wait(self) -> None:
        """Until all jobs are done; raises the first fault."""
        while self.jobs:
            self.jobs.pop(0).result()
