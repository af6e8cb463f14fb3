"""The showcase of gpu.py: the scripts one after the other on real chest X-rays, from scratch, in the
minutes that there are.
"""

import importlib
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from minidiff import config, runs
from minidiff.data import phantom
from minidiff.training.checkpointer import Checkpointer

TRIAL = 12                                    # steps, the first four apart, that tell what one takes
ORDER = ("vae", "diffusion", "sample", "classify", "evaluate")


class Showcase:
    """Each command gives a row; what there is to see is copied to `out`."""

    def __init__(self, data: str, root: Path, out: Path, seconds: float, tiny: bool):
        self.root, self.out, self.tiny, self.end = root, out, tiny, time.monotonic() + seconds
        self.seconds, self.size, self.data = seconds, 64 if tiny else 256, data
        if tiny or not Path(data, "metadata.csv").exists():
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
        def timed(checkpointer: Checkpointer) -> Iterator[int]:
            for step in real(checkpointer):
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
                         "--batch 32 --lr 1e-3 --views 4 --snapshots 0 --compile")
        return row | {"held-out loss": runs.read_log(self.root / "diffusion/log.jsonl")[-1]
                      ["val_loss"]}

    def sample(self) -> dict:
        spent = self.do("sample", f"--root {self.root} --precision bf16 --per-label "
                                  f"{4 if self.tiny else 100}")
        shutil.copy(min((self.root / "samples/sheets").glob("set_*.png")), self.out / "samples.png")
        return {"seconds": spent}

    def classify(self) -> dict:
        return {"seconds": self.do("classify", f"--root {self.root} --arms real --seeds 1 --steps "
                                               f"{TRIAL if self.tiny else 200}")}

    def evaluate(self) -> dict:
        spent = self.do("evaluate", f"--root {self.root}"
                                    f"{' --audit 20 --repeats 10' * self.tiny}")
        for name in ("report.html", "report.json"):
            shutil.copy(self.root / "report" / name, self.out)
        return {"seconds": spent, "answers": "; ".join(
            f"{v['question']} {v['answer']}"
            for v in runs.read_json(self.out / "report.json")["verdict"])}
