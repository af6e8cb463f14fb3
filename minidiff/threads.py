"""How many CPU threads compute, and how they wait for one another. Every script imports this before
torch.

libgomp, torch's pool of threads on Linux, lets a thread that has done its part spin for about a
millisecond before it sleeps. Where another program holds one of the cores, it spins for a thread
that is not scheduled: on two cores, one of them busy, training at the demo's size fell to about a
third of its speed. A thousand turns are long enough for threads that run, and short enough for
those that do not. libgomp reads this once, when torch is loaded.

What the user has set goes first: OMP_NUM_THREADS, GOMP_SPINCOUNT, OMP_WAIT_POLICY.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

STAT = Path("/proc/stat")
LOOK = 0.5  # seconds for which the other programs are watched


def use(threads: int = 0) -> int:
    """Let torch compute with so many threads, or with one for each core that is free; returns the
    number in use.

    The last digits of a result depend on the number, so it is chosen once, at the start, and kept
    in run.json.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or free_cores())
    return torch.get_num_threads()


def announce(threads: int) -> None:
    """Say so where other programs leave fewer threads than there are cores: it is slower, and its
    last digits differ.
    """
    if threads < len(cores()) and "OMP_NUM_THREADS" not in os.environ:
        print(f"threads: {threads} of {len(cores())}, for other programs are at work")


def free_cores() -> int:
    """Cores this process may use less those that others keep busy, at least one; all of them where
    nobody can tell.
    """
    own = cores()
    if not STAT.exists():
        return len(own)
    before = worked(STAT.read_text(), own)
    time.sleep(LOOK)
    busy = (worked(STAT.read_text(), own) - before) / LOOK
    return max(1, len(own) - round(busy))


def cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()
                                                                                      or 1))


def worked(stat: str, cores: set[int]) -> float:
    """Seconds for which these cores have not been idle, from the text of /proc/stat."""
    names = {f"cpu{core}" for core in cores}
    ticks = 0
    for name, *cells in map(str.split, stat.splitlines()):
        if name in names:
            user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, cells[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
