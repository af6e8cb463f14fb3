"""Killed at twenty random moments, some of them inside a checkpoint's write, and resumed: the
unbroken run, bit for bit.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minidiff import runs

ROOT = Path(__file__).parents[1]
STEPS, PARTS = 12, ("model", "ema", "optimizer", "precision")
pytestmark = pytest.mark.slow


def start(cfg, processes: int) -> subprocess.Popen:
    saved = Path(cfg.out).with_suffix(".json")
    runs.write_json(saved, {**cfg.__dict__})
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                str(processes)] if processes > 1 else []
    words = [sys.executable, *launcher, str(ROOT / "train.py"), "diffusion", "--from", str(saved)]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said[-3000:]


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL to torchrun and all its processes, which lead sessions of their own."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    for pid in (process.pid, *map(int, children)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def begun(run: Path, process: subprocess.Popen) -> None:
    while not (run / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.005)


def contents(run: Path) -> dict:
    last = run / "checkpoints" / f"step_{STEPS:08d}"
    return {**{name: load_file(last / f"{name}.safetensors") for name in PARTS},
            "state": (last / "state.json").read_text(), "log": (run / "log.jsonl").read_text(),
            "finished": load_file(run / "model.safetensors"),
            "best": load_file(run / "best" / "model.safetensors")}


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_equals_unbroken(tiny, tmp_path, capsys, precision, processes):
    def cfg(name):
        return train.DiffusionConfig(data=(str(tiny / "data"),), vae=str(tiny / "vae"),
                                     out=str(tmp_path / name), steps=STEPS, batch=6, save_every=2,
                                     log_every=1, precision=precision)

    whole = start(cfg("unbroken"), processes)
    begun(tmp_path / "unbroken", whole)
    since = time.monotonic()
    finish(whole)
    duration = time.monotonic() - since
    expected = contents(tmp_path / "unbroken")
    draw, where = random.Random(f"{precision} {processes}"), []
    for trial in range(5):
        run = tmp_path / f"killed-{trial}"
        broken = start(cfg(run.name), processes)
        begun(run, broken)
        time.sleep(draw.uniform(0, 0.8 * duration))
        kill_group(broken)
        states = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
        half = bool(list((run / "checkpoints").glob(".step_*")))
        where.append(f"after "
                     f"{states[-1] if states else 'no state'}{', inside a write' if half else ''}")
        finish(start(cfg(run.name), processes))
        assert same(contents(run), expected), where[-1]
    with capsys.disabled():
        print(f"\n{precision}, {processes} processes, killed: {'; '.join(where)}")


def test_a_thousand_images_survive_ten_kills(demo, tmp_path, capsys):
    import csv

    import sample

    out = tmp_path / "samples"
    words = [sys.executable, str(ROOT / "sample.py"), "--run", str(demo / "diffusion"), "--sets",
             "10", "--out", str(out), "--batch", "20", "--real", str(demo / "phantom")]
    draw, counts = random.Random(0), []
    for kill in range(11):
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "2"},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = len(list(out.glob("images/*/*.png")))
        if kill < 10:
            while len(list(out.glob("images/*/*.png"))) < before + draw.randrange(20, 90):
                assert process.poll() is None, process.stderr.read().decode()[-2000:]
                time.sleep(0.01)
            process.kill()
            process.communicate()
            counts.append(len(list(out.glob("images/*/*.png"))))
        else:
            finish(process)
    rows = list(csv.DictReader((out / "metadata.csv").open()))
    assert len(rows) == len({row["seed"]
                             for row in rows}) == len(list(out.glob("images/*/*.png"))) == 1000
    assert len(list(out.glob("sheets/set_*.png"))) == len(list(out.glob("sheets/set_*.json"))) == 10
    sample.verify(sample.VerifyConfig(out=str(out), k=24))
    with capsys.disabled():
        print(f"\n1,000 images, killed with {', '.join(map(str, counts))} there")
