"""Where a CPU's time goes, beside diffusers with equal weights: by kind of work, in one thread.

    OMP_NUM_THREADS=1 python benchmarks/cpu_profile.py --out benchmarks/cpu_profile.json
    OMP_NUM_THREADS=1 python benchmarks/cpu_profile.py --size sd15 --isa native --repeats 5

A guided call of the UNet, and its training step: forward, loss, backward, optimiser. Each row has a
process of its own; they work in turn, every other turn backwards, and figures are medians of the
turns. The whole is CPU time without the profiler; kinds of work are the shares of the time that
their operations themselves take in a profiled run. "Dispatch" is the rest: Python, autograd, and
operations that only call others. `native` is the widest instruction set that the CPU has.
"""

import argparse
import itertools
import json
import os
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

# puts minidiff on the path, too
from peers import Parts, Row, Task, load_peers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

# isort: split
from benchmarks import sample, train
from minidiff.training.precision import Precision

KINDS = {  # of work: names of operations; the first kind that fits
    "convolution": "convolution_backward|mkldnn_convolution|_slow_conv2d",
    "matrix products": "::(add|ba?dd)?b?mm$|mkl_linear",
    "attention": "scaled_dot_product.*cpu|softmax",
    "norms": "native_(group|layer)_norm",
    "copies, layout": "::(copy_|cat|fill_|zero_|upsample_nearest2d(_backward)?|empty.*|repeat)$",
    "elementwise": "_fused_adamw_|::(add|sub|mul|div|addc(mul|div)|lerp|s(um|in|qrt)|mean|cos|exp|"
                   "r?sqrt|clamp|square|pow|((silu|gelu|mse_loss)(_backward)?))_?$",
    "dispatch": ""}
ISAS = {"native": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                               "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
DEMO, SD15 = ("TINY", "TINY", "all"), ("SD15", "SD", "attention")
TASKS = {"demo": {"call": (*DEMO, 50, 64, 8), "step": (*DEMO, 32, 64, 8)},
         "sd15": {"call": (*SD15, 1, 64, 77), "step": (*SD15, 1, 64, 77)}}
CALLS = {"minidiff": sample.own, "diffusers as it comes": sample.theirs,
         "diffusers at its best": partial(sample.theirs, last=True)}
STEPS = dict(zip(CALLS, train.STEPS.values()))


def parts(task: Task, what: str, row: str) -> Parts:
    run = CALLS[row](task, {})["call"] if what == "call" else STEPS[row](task)
    return {"run": run, "shares": partial(shares, run)}


def shares(run: Callable) -> Tensor:
    """The share of each kind of work in one profiled run."""
    with profile(activities=[ProfilerActivity.CPU]) as watched, record_function("whole"):
        run()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in watched.key_averages():
        kind = next(k for k, names in KINDS.items() if re.search(names, event.key))
        spent[kind] += event.self_cpu_time_total
    return torch.tensor(list(spent.values())) / sum(spent.values())


def measured(task: Task, what: str, repeats: int) -> dict[str, dict]:
    """{row: {"ms": of the whole, "ratio": to minidiff's, "kinds": {kind: ms}}}."""
    sides = {row: Row(row, partial(parts, what=what, row=row), task, sample.PEERS) for row in CALLS}
    first, *_ = [side.seconds("run", 1) and side.seconds("run", 1) for side in sides.values()]
    each = max(1, min(20, int(0.3 / first)))
    turns = [{row: (1e3 * sides[row].seconds("run", each), sides[row].output("shares"))
              for row in list(CALLS)[:: -1 if turn % 2 else 1]} for turn in range(repeats)]
    found = {}
    for row in CALLS:
        sides[row].end()
        ms = statistics.median(turn[row][0] for turn in turns)
        ratio = statistics.median(turn[row][0] / turn["minidiff"][0] for turn in turns)
        share = torch.stack([turn[row][1] for turn in turns]).median(0).values
        kinds = dict(zip(KINDS, (share / share.sum() * ms).tolist()))
        found[row] = {"ms": round(ms, 1), "ratio": round(ratio, 3),
                      "kinds": {kind: round(spent, 1) for kind, spent in kinds.items()}}
    return found


def table(found: dict[str, dict]) -> str:
    rows = [["ms (share)", *found], ["---"] * (len(found) + 1)]
    rows += [[kind, *(f"{side['kinds'][kind]:.1f} ({side['kinds'][kind] / side['ms']:.0%})"
                      for side in found.values())] for kind in KINDS]
    rows += [["whole", *(f"{side['ms']:.1f}, {side['ratio']:.2f}×" for side in found.values())]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", default=["demo"], choices=list(TASKS))
    parser.add_argument("--isa", nargs="*", default=list(ISAS), choices=list(ISAS))
    parser.add_argument("--repeats", type=int, default=7, help="turns of each [7]")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, found = parser.parse_args(), {}
    diffusers = load_peers(*sample.PEERS)
    for isa, size, what in itertools.product(args.isa, args.size, ("call", "step")):
        name, task = f"{size}, {what}, {isa}", Task(*TASKS[size][what], Precision("fp32", "cpu"))
        with mock.patch.dict(os.environ, ISAS[isa]):  # read by a Row's process
            found[name] = measured(task, what, args.repeats)
        print(f"\n{name}\n\n{table(found[name])}", flush=True)
    cpu = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    facts = {"cpu": cpu and cpu[1], "native": torch.backends.cpu.get_cpu_capability(), "threads": 1,
             "torch": torch.__version__, "diffusers": diffusers.__version__}
    if args.out:
        args.out.write_text(json.dumps({**facts, "repeats": args.repeats, **found}, indent=1))


if __name__ == "__main__":
    main()
