"""How many CPU threads compute, and how they wait. Every script imports this before torch.

libgomp runs torch's threads on Linux. A thread that has finished its part spins for about a
millisecond before it sleeps. If another program holds one of the cores, it spins in vain: on two
cores, one of them busy, the demo's training fell to a third of its speed. A thousand turns are
enough for threads that run, and cost little for those that do not. libgomp reads this setting once,
when torch is loaded.

OMP_NUM_THREADS, GOMP_SPINCOUNT and OMP_WAIT_POLICY, where the user has set them, stay as they are.

While a script still loads its modules, Ctrl-C ends it without a word; `config.main` takes over.
"""

import os
import signal
import sys
import time
from pathlib import Path

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

_program = getattr(sys.modules["__main__"], "__file__", None) or ""
if (Path(_program).resolve().parent == Path(__file__).resolve().parents[1]
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

STAT = Path("/proc/stat")
LOOK = 0.5  # seconds for which the other programs are watched


def use(threads: int = 0) -> int:
    """Let torch compute with this many threads, 0: one for each free core; returns the number.

    The last digits of a result depend on it, so it is chosen once and kept in run.json.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or free_cores())
    return torch.get_num_threads()


def announce(threads: int) -> None:
    """Say so if other programs leave fewer threads than cores: slower, and other last digits."""
    if threads < len(cores()) and "OMP_NUM_THREADS" not in os.environ:
        print(f"threads: {threads} of {len(cores())}, for other programs are at work")


def free_cores() -> int:
    """Cores that other programs leave idle, at least one; all, if the system does not say."""
    own = cores()
    if not STAT.exists():
        return len(own)
    before = worked(STAT.read_text(), own)
    time.sleep(LOOK)
    return max(1, len(own) - round((worked(STAT.read_text(), own) - before) / LOOK))


def cores() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def worked(stat: str, cores: set[int]) -> float:
    """Seconds for which these cores have worked, from the text of /proc/stat."""
    names = {f"cpu{core}" for core in cores}
    # user, nice, system; not idle, iowait; irq, softirq, steal
    ticks = sum(sum(map(int, cells[:3] + cells[5:8]))
                for name, *cells in map(str.split, stat.splitlines()) if name in names)
    return ticks / os.sysconf("SC_CLK_TCK")
