"""What gpu.py does with the scripts themselves: images to files at full size, and the showcase."""

import importlib
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import VARIABLES, own_unet
from torch import Tensor

# isort: split
from benchmarks.sample import GUIDANCE
from minidiff import config, runs
from minidiff.data import phantom
from minidiff.diffusion import model as models
from minidiff.diffusion import store
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.generate import DECODE, Recipe
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.vae import VAE
from minidiff.sampling.plan import encode
from minidiff.training.checkpointer import Checkpointer
from minidiff.training.precision import Precision

LEVELS = 64  # standard deviation of an X-ray in grey levels: random weights give almost no contrast
PERSON = {"label": "a", "sex": "f", "age": "60"}
TRIAL = 12   # steps that tell what one takes
ORDER = ("vae", "diffusion", "sample", "classify", "evaluate")


class Files:
    """sample.py on a run of random weights, which is read and compiled once."""

    def __init__(self, bench, compiled: bool):
        self.bench, self.n, task = bench, 0, bench.task(batch=16)
        self.compiled, self.batch, self.run = compiled, task.batch, bench.folder / "diffusion"
        if not (self.run / "model.json").exists():
            context = torch.randn(task.tokens, models.UNETS[task.architecture].context_dim)
            model = models.Model(own_unet(task), Conditioner(VARIABLES, context, torch.Generator()))
            store.save_vae(self.run, VAE(models.VAES[task.vae]))
            store.save_model(self.run, model.cpu(), Schedule.scaled_linear(), "eps", data="",
                             size=task.pixels, grey=True, trained_on=[], rows=[PERSON])
        self.script = importlib.import_module("sample")
        for name in ("open_pipeline", "compiled"):
            setattr(self.script, name, once(getattr(self.script, name)))
        self.make(1)
        self.pipeline = self.script.compiled()

    def make(self, batches: int) -> float:
        """Seconds of a command that makes so many."""
        self.n, begin = self.n + 1, time.perf_counter()
        self.script.sample(self.script.SampleConfig(
            run=str(self.run), out=str(self.bench.folder / f"{self.compiled}-{self.n}"),
            per_label=batches * self.batch, label=("a",), batch=self.batch, precision="bf16",
            steps=self.bench.steps, guidance=GUIDANCE, compile="yes" if self.compiled else "no"))
        return time.perf_counter() - begin

    def to_files(self) -> dict:
        few = self.make(2)
        return {"images/s": 4 * self.batch / (self.make(6) - few)}

    def latents(self, n: int) -> dict:
        """The guided loop of the UNet alone."""
        labels = encode(self.pipeline.conditioner.variables, [PERSON] * n)
        recipe = Recipe("dpmpp_2m", "trailing", self.bench.steps, GUIDANCE)
        one, first = self.bench.pace(lambda: [*self.pipeline.latents(labels, range(n), recipe)])
        return {"images/s": n / one, "first, s": first}

    @torch.no_grad()
    def decode(self, precision: str) -> dict:
        """Its rate, and the largest difference from float32 at the contrast of an X-ray."""
        device, z = self.bench.device, torch.randn(2 * DECODE, *self.bench.task().latents)
        def decoded(name: str) -> Tensor:
            with Precision(name, device).autocast():
                return torch.cat([self.pipeline.vae.decode(few.to(device)).float()
                                  for few in z.split(DECODE)])
        exact = decoded("fp32")
        far = (decoded(precision) - exact).abs().max() / exact.std() * LEVELS
        one, _ = self.bench.pace(lambda: decoded(precision))
        return {"images/s": len(z) / one, "grey levels from fp32": far.item()}


def once(call: Callable) -> Callable:
    """What the first call gives, at every call."""
    kept = []
    def wrapped(*args, **options):
        kept[:] = kept or [call(*args, **options)]
        return kept[0]
    return wrapped


class Showcase:
    """Each command gives a row; what there is to see is copied to `out`."""

    def __init__(self, data: str, root: Path, out: Path, seconds: float, tiny: bool):
        self.root, self.out, self.tiny, self.end = root, out, tiny, time.monotonic() + seconds
        self.seconds, self.size, self.data = seconds, 64 if tiny else 256, data
        if not data:
            self.data = str(root.parent / "phantom")
            phantom.write(Path(self.data), n=72 if tiny else 1200, size=self.size)

    def do(self, script: str, words: str) -> float:
        """Run a command; returns its seconds."""
        begin, verbs = time.monotonic(), importlib.import_module(script).VERBS
        print(f"python {script}.py {words}", flush=True)
        for run, cfg in config.parse(verbs, next(iter(verbs)), "", shlex.split(words)):
            run(cfg)
        return time.monotonic() - begin

    def train(self, verb: str, left: float, options: str) -> dict:
        """A trial that tells what a step takes, then as many as leave this share of the time."""
        stamps, real = [], Checkpointer.steps
        def timed(checkpointer: Checkpointer, make: Callable) -> Iterator:
            for step in real(checkpointer, make):
                stamps.append(time.monotonic())
                yield step
        words = (f"{verb} --root {self.root} --data {self.data} --augment .3 --architecture "
                 f"{'TINY' if self.tiny else 'SMALL'} {options}")
        Checkpointer.steps = timed
        whole = self.do("train", f"{words} --steps {TRIAL} --out {self.root}/trial-{verb}")
        Checkpointer.steps = real
        one = (stamps[-1] - stamps[4]) / (TRIAL - 5)
        free = self.end - left * self.seconds - time.monotonic() - (whole - TRIAL * one)
        steps = TRIAL if self.tiny else max(50, int(free / one))
        spent = self.do("train", f"{words} --steps {steps} --save-every {steps}")
        return {"steps": steps, "images/s": int(re.search(r"--batch (\d+)", options)[1]) / one,
                "seconds": spent}

    def vae(self) -> dict:
        row = self.train("vae", 0.7, f"--size {self.size} --batch 8 --lr 1e-3")
        return row | {"PSNR, dB": runs.read_json(self.root / "vae/vae.json")["psnr"]}

    def diffusion(self) -> dict:
        row = self.train("diffusion", 0.3,
                         "--batch 32 --lr 1e-3 --views 4 --snapshots 0 --compile yes")
        return row | {"held-out loss": runs.read_log(self.root / "diffusion/log.jsonl")[-1]
                      ["val_loss"]}

    def sample(self) -> dict:
        spent = self.do("sample", f"--root {self.root} --precision bf16 --per-label "
                                  f"{4 if self.tiny else 100}")
        shutil.copy(min((self.root / "samples/sheets").glob("set_*.png")), self.out / "samples.png")
        return {"seconds": spent}

    def classify(self) -> dict:
        return {"seconds": self.do("classify", f"--root {self.root} --arms real --seeds 1 "
                                               "--near-copies drop --steps "
                                               f"{TRIAL if self.tiny else 200}")}

    def evaluate(self) -> dict:
        spent = self.do("evaluate", f"--root {self.root}"
                                    f"{' --audit 20 --repeats 10' * self.tiny}")
        for name in ("report.html", "report.json"):
            shutil.copy(self.root / "report" / name, self.out)
        return {"seconds": spent, "answers": "; ".join(
            f"{v['question']} {v['answer']}"
            for v in runs.read_json(self.out / "report.json")["verdict"])}
