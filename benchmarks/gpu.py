"""What a GPU makes of minidiff, by one command; beside diffusers where that is installed.

    python benchmarks/gpu.py --minutes 8                        all parts, in their order
    python benchmarks/gpu.py --minutes 6 --parts tests showcase --data ../shared/cxr
    python benchmarks/gpu.py --tiny --minutes 30                all of it at tiny size, on a CPU too

A part has a process and a share of the minutes; what it leaves goes to those after it. In each, the
most important cells come first. A cell that runs out of memory or time, or breaks, is a row that
says so, and the next one is measured, in a new process if need be. Ctrl-C keeps what there is.
OUT/results.json and results.md are written after each part (another call with the same --out adds
to them); log.txt holds all that the parts print, samples.png and report.html are the showcase's.

A share of the ceiling is that of the fastest matrix product of that precision; work is counted by
torch's FlopCounterMode, without what checkpointing computes again. Our loop is that of train.py,
draws and EMA included; diffusers' is that of train_text_to_image.py without EMA, text tower and
encoder, its AdamW fused, all of which makes it faster. Images to files are those of sample.py:
six batches less two. Weights are random, but for those that the showcase trains.
"""

import argparse
import contextlib
import functools
import gc
import importlib
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

# puts minidiff on the path, too
from peers import ROOT, VARIABLES, Task, load_peers, own_unet, seconds, their_unet, trainable
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# isort: split
from benchmarks.showcase import ORDER, Showcase
from benchmarks.train import ceiling, own_loop, product, their_loop, unet_step
from minidiff.diffusion import lora, store
from minidiff.diffusion import model as models
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.generate import DECODE, Recipe
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet
from minidiff.diffusion.vae import VAE
from minidiff.sampling.plan import encode
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision

Row = dict[str, str | float]
Cells = Iterator[tuple[Row, Callable[[], Row]]]  # what each is, and what measures it
TRAINED = [  # part, precision, compiled, checkpointing, batch: eight of ours, two compiled
    ("all", "bf16", True, False, 16), ("diffusers", "bf16", False, False, 16),
    ("all", "bf16", False, False, 16), ("all", "bf16", False, True, 16),
    ("lora", "bf16", False, False, 16), ("attention", "bf16", False, False, 16),
    ("all", "fp16", False, False, 16), ("all", "bf16", True, False, 32),
    ("all", "bf16", False, False, 4)]
STEPS, BATCH, GUIDANCE = 20, 16, 2.0             # of sampling
PERSON = {"label": "a", "sex": "f", "age": "60"}
LEVELS = 64  # standard deviation of an X-ray in grey levels: random weights give almost no contrast
DPM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
       "timestep_spacing": "trailing"}


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
        names, pixels, tokens = (("TINY", "TINY"), 64, 8) if self.tiny else (("SD15", "SD"), 512, 77)
        return Task(*names, part, min(batch, 4) if self.tiny else batch, pixels, tokens,
                    Precision(precision, self.device), **more)

    def pace(self, step: Callable) -> tuple[float, Row]:
        """Seconds a step, the median of three turns; those of the first, which compiles, and the
        highest memory.
        """
        first, once = seconds(step, self.device), seconds(step, self.device, 2)
        each = max(1, min(20, int(0.8 / once)))
        one = statistics.median(seconds(step, self.device, each) for _ in range(3))
        gpu = self.device.type == "cuda"
        return one, {"memory, GB": torch.cuda.max_memory_allocated() / 1e9 if gpu else "–",
                     "first, s": first}


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


def work_of(task: Task) -> int:
    """FLOPs of a training step, an image."""
    with torch.device("meta"):
        net = UNet(models.UNETS[task.architecture])
        x, t = torch.zeros(1, *task.latents), torch.zeros(1)
        context = torch.zeros(1, task.tokens, net.config.context_dim)
    if task.part == "lora":
        lora.add(net, 16, 16.0, torch.Generator())
    trainable(net, task.part)
    with FlopCounterMode(display=False) as counter:
        net(x, t, context).sum().backward()
    return counter.get_total_flops()


def of_train(bench: Bench) -> Cells:
    for part, precision, compiled, checkpointing, batch in TRAINED:
        def measure(part=part, **options) -> Row:
            if peer := part == "diffusers":
                load_peers("UNet2DConditionModel", "DDPMScheduler")
            task = bench.task("all" if peer else part, **options, ema=not peer)
            step = their_loop(task, encode=False, fused=True) if peer else own_loop(task)
            one, more = bench.pace(step)
            return {"images/s": task.batch / one,
                    "of the ceiling": task.batch * work_of(task) / one / ceiling(task), **more}
        yield ({"trained": part, "precision": precision, "compiled": "yes" if compiled else "",
                "checkpointing": "yes" if checkpointing else "", "batch": batch},
               partial(measure, batch=batch, precision=precision, compile=compiled,
                       checkpointing=checkpointing))


class Files:
    """sample.py on a run of random weights, which is read, and compiled, once."""

    def __init__(self, bench: Bench, compiled: bool):
        self.bench, self.compiled, self.n = bench, compiled, 0
        self.run, task, kept = bench.folder / "diffusion", bench.task(), []
        self.batch, self.sample = task.batch, importlib.import_module("sample")
        if not (self.run / "model.json").exists():
            context = torch.randn(task.tokens, models.UNETS[task.architecture].context_dim)
            model = models.Model(own_unet(task), Conditioner(VARIABLES, context, torch.Generator()))
            store.save_vae(self.run, VAE(models.VAES[task.vae]))
            store.save_model(self.run, model.cpu(), Schedule.scaled_linear(), "eps", data="",
                             size=task.pixels, grey=True, trained_on=[], rows=[PERSON])
        read = self.sample.open_pipeline
        def once(*args, **options):
            kept[:] = kept or [read(*args, **options)]
            return kept[0]
        self.sample.open_pipeline = once
        self.make(1)
        self.pipeline = kept[0][0]

    def make(self, batches: int) -> float:
        """Seconds of a command that makes so many."""
        self.n, begin = self.n + 1, time.perf_counter()
        self.sample.sample(self.sample.SampleConfig(
            run=str(self.run), out=str(self.bench.folder / f"{self.compiled}-{self.n}"),
            per_label=batches * self.batch, label=("a",), batch=self.batch, precision="bf16",
            steps=self.bench.steps, guidance=GUIDANCE, compile=self.compiled))
        return time.perf_counter() - begin

    def to_files(self) -> Row:
        self.make(2)
        return {"images/s": 4 * self.batch / (self.make(6) - self.make(2))}

    def latents(self, n: int) -> Row:
        """The guided loop of the UNet alone."""
        labels = encode(self.pipeline.conditioner.variables, [PERSON] * n)
        recipe = Recipe("dpmpp_2m", "trailing", self.bench.steps, GUIDANCE)
        one, more = self.bench.pace(lambda: [*self.pipeline.latents(labels, range(n), recipe)])
        return {"images/s": n / one, **more}

    @torch.no_grad()
    def decode(self, precision: str) -> Row:
        """Its rate, and the largest difference from float32 at the contrast of an X-ray."""
        device, z = self.bench.device, torch.randn(2 * DECODE, *self.bench.task().latents)
        def decoded(name: str) -> Tensor:
            with Precision(name, device).autocast():
                return torch.cat([self.pipeline.vae.decode(few.to(device))
                                  for few in z.split(DECODE)]).float()
        exact = decoded("fp32")
        far = (decoded(precision) - exact).abs().max() / exact.std() * LEVELS
        one, more = self.bench.pace(lambda: decoded(precision))
        return {"images/s": len(z) / one, "grey levels from fp32": far.item(), **more}


def their_latents(bench: Bench, compiled: bool, n: int) -> Row:
    """The loop of StableDiffusionPipeline: UNet, guidance, DPM-Solver++(2M); no text tower."""
    peers = load_peers("UNet2DConditionModel", "DPMSolverMultistepScheduler")
    task, device, scheduler = bench.task(batch=n), bench.device, peers.DPMSolverMultistepScheduler(
        **DPM)
    unet = their_unet(task).eval().requires_grad_(False).to(torch.bfloat16)
    net = torch.compile(unet) if compiled else unet
    states, noise = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in (
        (2 * task.batch, task.tokens, unet.config.cross_attention_dim),
        (task.batch, *task.latents)))
    @torch.no_grad()
    def loop() -> None:
        scheduler.set_timesteps(bench.steps, device=device)
        x = noise
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x] * 2), t)
            plain, told = net(both, t, encoder_hidden_states=states, return_dict=False)[0].chunk(2)
            x = scheduler.step(plain + GUIDANCE * (told - plain), t, x, return_dict=False)[0]
    one, more = bench.pace(loop)
    return {"images/s": task.batch / one, **more}


def of_sample(bench: Bench, compiled: bool = False) -> Cells:
    files = functools.cache(partial(Files, bench, compiled))
    how = f"{bench.steps} steps, bf16{', compiled' * compiled}"
    for n in (BATCH, 1, 4, 64)[:1 if compiled else 4]:
        n = min(n, 8) if bench.tiny else n
        yield {"what": f"minidiff's UNet, {how}", "batch": n}, lambda n=n: files().latents(n)
        if n == files().batch:
            yield {"what": f"minidiff to files, {how}", "batch": n}, files().to_files
        yield ({"what": f"diffusers' UNet, {how}", "batch": n},
               partial(their_latents, bench, compiled, n))
    for name in ("tf32", "bf16", "fp32")[:0 if compiled else 3]:
        yield {"what": f"decoder, {name}", "batch": DECODE}, lambda name=name: files().decode(name)


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
    for tokens, width in ((4096, 40), (1024, 80)):  # the two largest of SD 1.5 at 512 px
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
            def attention(name=name, tokens=64 if bench.tiny else tokens, width=width) -> Row:
                q, k, v = torch.randn(3, 16, 8, tokens, width, device=bench.device,
                                      dtype=torch.bfloat16, requires_grad=True)
                def step() -> None:
                    with sdpa_kernel(getattr(SDPBackend, name)):
                        F.scaled_dot_product_attention(q, k, v).sum().backward()
                return {"ms": 1000 * bench.pace(step)[0]}
            yield {"what": f"attention and its backward, batch 16, {tokens} tokens, {name}"}, attention
    for last, tuned in ((True, True), (True, False), (False, True), (False, False)):
        def unet(last=last, tuned=tuned) -> Row:
            task = bench.task(batch=4)
            torch.backends.cudnn.benchmark = tuned
            layout = torch.channels_last if last else torch.contiguous_format
            one, more = bench.pace(unet_step(task, lambda t: own_unet(t).to(memory_format=layout)))
            return {"ms": 1000 * one, **more}
        yield {"what": f"the UNet's step, batch 4, bf16, channels_last {'on' if last else 'off'}, "
                       f"cudnn.benchmark {'on' if tuned else 'off'}"}, unet


PARTS = {"ceiling": (0.3, of_ceiling), "train": (2.2, of_train), "sample": (1.1, of_sample),
         "sample-compiled": (1.1, partial(of_sample, compiled=True)), "tests": (0.6, of_tests),
         "showcase": (2.2, of_showcase), "kernels": (0.5, of_kernels)}  # with minutes of eight
SPAWN = multiprocessing.get_context("spawn")


def serve(pipe, part: str, bench: Bench, start: int) -> None:
    """The process of a part: its cells from `start` on, each announced, then measured."""
    os.setsid()                                  # a group with all that it starts; no Ctrl-C here
    with open(bench.out / "log.txt", "a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if bench.tiny:                               # the graphs, without minutes of a C++ compiler
        torch.compile = partial(torch.compile, backend="aot_eager")
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
        process, k, names, row = SPAWN.Process(target=serve, args=(other, part, bench, start)), -1, {}, {}
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


def text_of(value: str | float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write(out: Path, results: dict) -> None:
    """results.json, and results.md with a table for each part."""
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False))
    lines = [f"# {results['machine']}"]
    for part in (name for name in PARTS if name in results):
        rows = results[part]["rows"]
        columns = [*dict.fromkeys(name for row in rows for name in row)]
        cells = [columns, ["---"] * len(columns),
                 *([text_of(row.get(name)) for name in columns] for row in rows)]
        lines += [f"\n## {part}\n", *(f"| {' | '.join(row)} |" for row in cells),
                  f"\n{results[part]['ended']} after {results[part]['seconds']:.0f} s"]
    (out / "results.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together [8]")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], help="[all]")
    parser.add_argument("--data", default=str(ROOT.parent / "shared/cxr"),
                        help="X-rays of the showcase; phantoms if not there [../shared/cxr]")
    parser.add_argument("--tiny", action="store_true", help="small networks, few steps, phantoms")
    parser.add_argument("--out", default="runs/gpu", help="folder of the results [runs/gpu]")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, end = Path(args.out).absolute(), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    kept, name = out / "results.json", "a CPU"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    results["machine"] = f"{name}, torch {torch.__version__}{', tiny' * args.tiny}"
    print(results["machine"])
    chosen = [part for part in PARTS if part in args.parts]
    with tempfile.TemporaryDirectory() as folder:
        for i, part in enumerate(chosen):
            begin, rows = time.monotonic(), []
            share = PARTS[part][0] / sum(PARTS[p][0] for p in chosen[i:])
            bench = Bench(args.tiny, args.data, out, Path(folder), (end - begin) * share)
            found = results[part] = {"rows": rows, "ended": "stopped"}
            print(f"\n{part}, {bench.seconds:.0f} s", flush=True)
            try:
                for row in measured(part, bench):
                    rows.append(row)
                    print("  " + ", ".join(f"{k} {text_of(v)}" for k, v in row.items() if v != ""),
                          flush=True)
                found["ended"] = "ended"
            except KeyboardInterrupt:
                sys.exit(130)
            finally:
                found["seconds"] = time.monotonic() - begin
                write(out, results)


if __name__ == "__main__":
    main()
