"""Two processes give what one gives: the same images, times and noise; gradients averaged by DDP, or sharded by FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minidiff import distributed, runs
from minidiff.errors import InputError
from minidiff.training import state

ROOT = Path(__file__).parents[1]


def torchrun(verb: str, cfg, processes: int = 2) -> subprocess.CompletedProcess:
    saved = Path(cfg.out).with_suffix(".json")
    runs.write_json(saved, {**cfg.__dict__})
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
             str(ROOT / "train.py"), verb, "--from", str(saved)]
    return subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def diffusion(tiny, out, **knobs):
    given = {"steps": 5, "batch": 16, "save_every": 5, "log_every": 1, "lr": 1e-3, **knobs}
    return train.DiffusionConfig(data=(str(tiny / "data"),), vae=str(tiny / "vae"), out=str(out), **given)


def relative(a: Path, b: Path) -> float:
    x, y = load_file(a), load_file(b)
    assert x.keys() == y.keys()
    error, size = (sum(v.double().square().sum() for v in d.values()) for d in ({k: x[k] - y[k] for k in x}, x))
    return (error / size).sqrt().item()


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("processes") / "one"
    train.train_diffusion(diffusion(tiny, out))
    return out


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_with_8_images_each_equal_one_with_16(tiny, one, tmp_path, shard):
    out = tmp_path / "two"
    done = torchrun("diffusion", diffusion(tiny, out, shard=shard))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("model", "ema"):
        last = Path("checkpoints") / "step_00000005" / f"{name}.safetensors"
        assert relative(one / last, out / last) <= 1e-5
    assert relative(one / "model.safetensors", out / "model.safetensors") <= 1e-5
    mine, theirs = (runs.read_log(run / "log.jsonl") for run in (one, out))
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert mine[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-5)


def test_a_state_of_two_sharded_processes_goes_on_in_one(tiny, one, tmp_path):
    out = tmp_path / "run"
    done = torchrun("diffusion", diffusion(tiny, out, shard=True))
    assert done.returncode == 0, done.stderr[-3000:]
    last, before = (out / "checkpoints" / f"step_{step:08d}" for step in (5, 0))
    assert state.check(last) is None and not before.exists()
    shapes = {k: v.shape for k, v in load_file(last / "optimizer.safetensors").items()}
    assert shapes == {k: v.shape for k, v in load_file(one / "checkpoints" / last.name / "optimizer.safetensors").items()}


def test_micro_batches_and_checkpointing_change_nothing(tiny, one, tmp_path):
    train.train_diffusion(diffusion(tiny, tmp_path / "micro", accumulate=4, checkpointing=True))
    assert relative(one / "model.safetensors", tmp_path / "micro" / "model.safetensors") <= 1e-5


def test_the_vae_stage_on_two_processes(tiny, tmp_path):
    for name, start in (("one", lambda verb, cfg: train.train_vae(cfg)), ("two", torchrun)):
        start("vae", train.VAEConfig(data=(str(tiny / "data"),), out=str(tmp_path / name), size=32, steps=4, batch=8))
    assert relative(tmp_path / "one" / "vae.safetensors", tmp_path / "two" / "vae.safetensors") <= 1e-5


def test_bad_shares_are_refused(tiny, tmp_path):
    done = torchrun("diffusion", diffusion(tiny, tmp_path / "odd", batch=15))
    assert done.returncode and "--batch 15 is not a multiple of 2 processes × 1 micro-batches" in done.stderr
    done = torchrun("diffusion", diffusion(tiny, tmp_path / "lora", shard=True, train="lora"))
    assert done.returncode and "--shard spreads --train all" in done.stderr


def test_one_process_is_its_own_world():
    x = torch.arange(3)
    assert distributed.gather(x) is x and distributed.share(range(4, 8)) == range(4, 8)
    assert distributed.anywhere(True) and not distributed.anywhere(False) and distributed.mean(torch.tensor(2.0)) == 2.0
    with pytest.raises(InputError, match="--batch 7 is not a multiple"):
        distributed.require_share(7, 2)
