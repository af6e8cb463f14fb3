"""What a GPU makes of minidiff, by one command; beside diffusers where that is installed.

    python benchmarks/gpu.py --minutes 8                all parts; time enough for all cells is …
    python benchmarks/gpu.py --minutes 8 --parts ceiling train sample sample-compiled kernels
    python benchmarks/gpu.py --minutes 6 --parts tests showcase --data XRAYS     … in two
    python benchmarks/gpu.py --minutes 30 --tiny        all of it at tiny size, on a CPU too

A part has a process and a share of the minutes; what it leaves goes to those after it, and the most
important cells come first. One that runs out of memory or time, or breaks, is a row that says so,
and the next is measured, in a new process if need be. Ctrl-C keeps what there is. OUT/results.json
and results.md are written after each part (another call with the same --out adds to them); log.txt
holds all that the parts print, samples.png, report.html and report.json are the showcase's.

A share of the ceiling is that of the fastest matrix product of that precision; work is counted
without what checkpointing computes again. Our loop is that of train.py,
draws and EMA included; diffusers' is that of train_text_to_image.py without EMA, text tower and
encoder, its AdamW fused, all of which makes it faster. Images to files are those of sample.py:
six batches less two. Weights are random, but for those that the showcase trains.
"""

import argparse
import contextlib
import functools
import gc
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

# puts minidiff on the path, too
from peers import ROOT, Task, load_peers, own_unet, seconds, work_of
from torch.nn.attention import SDPBackend, sdpa_kernel

# isort: split
from benchmarks.sample import PEERS, theirs
from benchmarks.scripts import ORDER, Files, Showcase
from benchmarks.train import ceiling, own_loop, product, their_loop, unet_step
from minidiff.diffusion.generate import DECODE
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision, set_cuda_flags

Row = dict[str, str | float]
Cells = Iterator[tuple[Row, Callable[[], Row]]]  # what each is, and what measures it
TRAINED = [  # part, precision, compiled, checkpointing, batch: eight of ours, two compiled
    ("all", "bf16", False, False, 16), ("diffusers", "bf16", False, False, 16),
    ("all", "bf16", True, False, 16), ("all", "bf16", False, True, 16),
    ("lora", "bf16", False, False, 16), ("attention", "bf16", False, False, 16),
    ("all", "fp16", False, False, 16), ("all", "bf16", True, False, 32),
    ("all", "bf16", False, False, 4)]
BATCH, STEPS = 16, 20                            # STEPS: of sampling


@dataclass(frozen=True)
class Bench:
    tiny: bool
    data: str
    out: Path
    folder: Path                                 # of the networks' files, gone afterwards
    seconds: float = 0.0                         # of this part

    @property
    def device(self) -> torch.device:
        return pick_device()

    @property
    def steps(self) -> int:
        return 3 if self.tiny else STEPS

    def task(self, part: str = "all", batch: int = BATCH, precision: str = "bf16", **more) -> Task:
        way = Precision(precision, self.device)
        return (Task("TINY", "TINY", part, min(batch, 4), 64, 8, way, **more) if self.tiny else
                Task("SD15", "SD", part, batch, 512, 77, way, **more))

    def pace(self, step: Callable) -> tuple[float, float]:
        """Seconds of a step, the median of some turns; and of the first, which compiles."""
        first, once = (seconds(step, self.device) for _ in range(2))
        each, turns = max(1, min(20, int(0.8 / once))), 3 if once < 1 else 1
        return statistics.median(seconds(step, self.device, each) for _ in range(turns)), first

    @property
    def memory(self) -> float | str:
        """The most of the device's that this cell has held, GB."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else "–"


def of_ceiling(bench: Bench) -> Cells:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)):
        for n in (256, 512) if bench.tiny else (4096, 8192, 16384):
            def multiply(name=name, dtype=dtype, n=n) -> Row:
                Precision("tf32", bench.device)
                return {"TFLOP/s": product(n, dtype, bench.device) / 1e12}
            yield {"what": f"product of two {n}² matrices, {name}"}, multiply
    for pinned in (True, False) if bench.device.type == "cuda" else (False,):
        for way in ("to the device", "to the host"):
            def copy(pinned=pinned, way=way) -> Row:
                here = torch.empty(2**20 if bench.tiny else 2**28, pin_memory=pinned)
                ends = torch.empty_like(here, device=bench.device), here
                a, b = ends if way == "to the device" else ends[::-1]
                return {"GB/s": 4e-9 * len(a) / bench.pace(
                    lambda: a.copy_(b, non_blocking=pinned))[0]}
            yield {"what": f"copy {way}, {'pinned' if pinned else 'pageable'} memory"}, copy


def of_train(bench: Bench) -> Cells:
    for part, precision, compiled, checkpointing, batch in TRAINED:
        def measure(part=part, **options) -> Row:
            if peer := part == "diffusers":
                load_peers("UNet2DConditionModel", "DDPMScheduler")
            task = bench.task("all" if peer else part, **options, ema=not peer)
            torch.compiler.reset()
            step = their_loop(task, encode=False, fused=True) if peer else own_loop(task)
            one, first = bench.pace(step)
            return {"images/s": task.batch / one, "memory, GB": bench.memory, "first, s": first,
                    "of the ceiling": task.batch * work_of(task) / one / ceiling(task)}
        yield ({"trained": part, "precision": precision, "compiled": "yes" if compiled else "",
                "checkpointing": "yes" if checkpointing else "", "batch": batch},
               partial(measure, batch=batch, precision=precision, compile=compiled,
                       checkpointing=checkpointing))


def their_latents(bench: Bench, compiled: bool, n: int) -> Row:
    """The loop of StableDiffusionPipeline without its text tower."""
    task, name = bench.task(batch=n, compile=compiled), "DPM-Solver++(2M)"
    load_peers(*PEERS)
    with torch.no_grad():
        one, first = bench.pace(theirs(task, {name: bench.steps})[f"{name}, {bench.steps} steps"])
    return {"images/s": task.batch / one, "first, s": first}


def of_sample(bench: Bench, compiled: bool = False) -> Cells:
    files = functools.cache(partial(Files, bench, compiled))
    how = f"{bench.steps} steps, bf16{', compiled' * compiled}"
    for n in (BATCH,) if compiled else (BATCH, 1, 64, 4):
        yield {"what": f"minidiff's UNet, {how}", "batch": n}, lambda n=n: files().latents(n)
        if n == BATCH:
            yield {"what": f"minidiff to files, {how}", "batch": n}, lambda: files().to_files()
        yield ({"what": f"diffusers' UNet, {how}", "batch": n},
               partial(their_latents, bench, compiled, n))
        for name in ("tf32", "bf16", "fp32") if n == BATCH and not compiled else ():
            yield ({"what": f"decoder, {name}", "batch": DECODE},
                   lambda name=name: files().decode(name))


def of_tests(bench: Bench) -> Cells:
    def measure() -> Row:
        marked = [str(p) for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text()]
        done = subprocess.run([sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rfE", "-m",
                               "gpu", *marked], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              env=os.environ | {"MINIDIFF_DEVICE": bench.device.type})
        print(done.stdout)
        failed = re.findall(r"^(?:FAILED|ERROR) (.{,200})", done.stdout, re.M)
        return {"result": (done.stdout.splitlines() or ["no pytest"])[-1].strip("= "),
                "failed": "; ".join(failed)}
    yield {"what": "pytest -m gpu"}, measure


def of_showcase(bench: Bench) -> Cells:
    showcase = Showcase(bench.data, bench.folder / "showcase", bench.out, bench.seconds, bench.tiny)
    for name in ORDER:
        yield {"what": f"{name}, {showcase.size} px"}, getattr(showcase, name)


def of_kernels(bench: Bench) -> Cells:
    # the two largest of SD 1.5 at 512 px
    for tokens, width in ((64, 40), (16, 80)) if bench.tiny else ((4096, 40), (1024, 80)):
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            def attention(name=name, tokens=tokens, width=width) -> Row:
                q, k, v = torch.randn(3, 16, 8, tokens, width, device=bench.device,
                                      dtype=torch.bfloat16, requires_grad=True)
                def step() -> None:
                    with sdpa_kernel(getattr(SDPBackend, name)):
                        F.scaled_dot_product_attention(q, k, v).sum().backward()
                try:
                    return {"ms": 1000 * bench.pace(step)[0]}
                except RuntimeError as error:    # of the shape, precision or device
                    if not re.match("No (available|viable)", str(error)):
                        raise
                    return {"note": "not available"}
            yield {"what": f"attention and its backward, {tokens} tokens, {name}"}, attention
    for last, tuned, same in ((1, 1, 0), (1, 0, 0), (0, 1, 0), (1, 0, 1)):
        def unet(last=last, tuned=tuned, same=same) -> Row:
            task = bench.task(batch=4)
            set_cuda_flags(True, bool(same))
            torch.backends.cudnn.benchmark = bool(tuned)
            layout = torch.channels_last if last else torch.contiguous_format
            one, _ = bench.pace(unet_step(task, lambda t: own_unet(t).to(memory_format=layout)))
            return {"ms": 1000 * one, "memory, GB": bench.memory}
        yield {"what": f"the UNet's step, batch 4, bf16{', channels_last' * last}"
                       f"{', cudnn.benchmark' * tuned}{', deterministic' * same}"}, unet


PARTS = {"ceiling": (0.2, of_ceiling), "train": (2.2, of_train), "sample": (1.5, of_sample),
         "sample-compiled": (1.2, partial(of_sample, compiled=True)), "tests": (0.8, of_tests),
         "showcase": (1.7, of_showcase), "kernels": (0.4, of_kernels)}  # with minutes of eight
SPAWN = multiprocessing.get_context("spawn")


def serve(pipe, part: str, bench: Bench, start: int) -> None:
    """The process of a part: its cells from `start` on, each announced, then measured."""
    os.setsid()                                  # a group with all that it starts; no Ctrl-C here
    with open(bench.out / "log.txt", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if part == "kernels":                        # read at the first product, for "deterministic"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    if bench.tiny:                               # the graphs, without minutes of a C++ compiler
        torch.compile = partial(torch.compile, backend="eager")
    for k, (names, measure) in enumerate(PARTS[part][1](bench)):
        if k < start:
            continue
        pipe.send((k, names, {}))
        if bench.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            pipe.send((k, names, measure()))
        except torch.OutOfMemoryError:
            pipe.send((k, names, {"note": "out of memory"}))
        except ImportError as error:
            pipe.send((k, names, {"note": f"not measured: {error}"}))
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            pipe.send((k, names, {"note": f"{type(error).__name__}: {str(error)[:200]}"}))
            sys.exit(1)                          # CUDA may be of no more use to this process


def measured(part: str, bench: Bench) -> Iterator[Row]:
    """The rows of a part, as they come."""
    start, until = 0, time.monotonic() + bench.seconds
    while True:
        ours, other = SPAWN.Pipe()
        process = SPAWN.Process(target=serve, args=(other, part, bench, start))
        k, names, row = -1, {}, {}
        process.start()
        other.close()
        try:
            while ours.poll(max(0.0, until - time.monotonic())):
                k, names, row = ours.recv()
                if row:
                    yield names | row
            yield ({} if row else names) | {"note": "out of time"}
            return
        except EOFError:
            process.join()
            if process.exitcode == 0:
                return
            if not row:
                yield names | {"note": f"its process ended with {process.exitcode}: see log.txt"}
            if k < 0:
                return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        start = k + 1


def text_of(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(out: Path, results: dict) -> None:
    """results.json, and results.md with a table for each part."""
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    lines = [f"# {results['machine']}"]
    for part in (name for name in PARTS if name in results):
        rows = results[part]["rows"]
        columns = [*dict.fromkeys(name for row in rows for name in row)]
        cells = [columns, ["---"] * len(columns),
                 *([text_of(row.get(name, "")) for name in columns] for row in rows)]
        lines += [f"\n## {part}\n", *(f"| {' | '.join(row)} |" for row in cells),
                  f"\n{results[part]['ended']} after {results[part]['seconds']:.0f} s"]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together [8]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="[all]")
    parser.add_argument("--data", default="", help="X-rays of the showcase [phantoms]")
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps, phantoms")
    parser.add_argument("--out", default="runs/gpu", help="folder of the results [runs/gpu]")
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell's `&` ignores Ctrl-C
        signal.signal(number, signal.default_int_handler)
    out, end = Path(args.out).absolute(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    kept, cards = out / "results.json", range(torch.cuda.device_count())
    machine = ", ".join([*map(torch.cuda.get_device_name, cards), f"torch {torch.__version__}",
                         f"cuDNN {torch.backends.cudnn.version()}", *["tiny"] * args.tiny])
    results = (json.loads(kept.read_text()) if kept.exists() else {}) | {"machine": machine}
    print(machine)
    chosen = [part for part in PARTS if part in args.parts]
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(chosen):
            begin, rows = time.monotonic(), []
            share = PARTS[part][0] / sum(PARTS[p][0] for p in chosen[i:])
            bench = Bench(args.tiny, args.data, out, Path(folder), (end - begin) * share)
            found = results[part] = {"rows": rows, "ended": "stopped"}
            print(f"\n{part}, {bench.seconds:.0f} s", flush=True)
            try:
                with contextlib.closing(measured(part, bench)) as cells:
                    for row in cells:
                        rows.append(row)
                        shown = (f"{name} {text_of(v)}" for name, v in row.items() if v != "")
                        print("  " + ", ".join(shown), flush=True)
                found["ended"] = "ended"
            except KeyboardInterrupt:
                sys.exit(130)
            finally:
                found["seconds"] = time.monotonic() - begin
                write(out, results)


if __name__ == "__main__":
    main()
