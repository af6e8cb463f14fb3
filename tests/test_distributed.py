"""Two processes give what one gives: the same images, times and noise; gradients averaged by DDP,
or sharded by FSDP2.
"""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minidiff import distributed, runs
from minidiff.errors import InputError
from minidiff.training import state

ROOT = Path(__file__).parents[1]
DRIVER = """
import os
import sys
from functools import partial
from pathlib import Path

import torch

import train
from minidiff import config, distributed
from minidiff.diffusion import unet
from minidiff.stages import pictures


def embedding(t, width, embed=unet.timestep_embedding):
    assert t.dtype == torch.float32, "bfloat16 knows 256 of 1000 timesteps apart"
    return embed(t, width)


unet.timestep_embedding = embedding
pictures.Recipe = partial(pictures.Recipe, steps=1)
distributed.SIGHT = 0.2
draw = train.draw_pictures
for verb, saved in zip(sys.argv[1::2], sys.argv[2::2]):
    name = Path(saved).stem
    if name.startswith("blind") and os.environ["RANK"] == "1":
        os.chdir(Path(saved).parent / "elsewhere")
    # Of a sharded model, all ranks draw together.
    train.draw_pictures = draw if name.startswith("fsdp") else lambda *_, **__: None
    try:
        config.main(train.VERBS, default=["vae", "diffusion"], doc="", argv=[verb, "--from", saved])
    except SystemExit as stop:
        print(f"{saved}: status {stop.code}", file=sys.stderr)
"""


def diffusion(tiny, out, **knobs):
    given = {"steps": 5, "batch": 16, "save_every": 5, "log_every": 1, "lr": 1e-3, "snapshots": 0,
             **knobs}
    return train.DiffusionConfig(data=(str(tiny / "data"),), vae=str(tiny / "vae"), out=str(out),
                                 **given)


def vae(tiny, out):
    return train.VAEConfig(data=(str(tiny / "data"),), out=str(out), size=32, steps=4, batch=8,
                           log_every=1)


def relative(a: Path, b: Path) -> float:
    x, y = load_file(a), load_file(b)
    assert x.keys() == y.keys()
    error, size = (sum(v.double().square().sum() for v in d.values())
                   for d in ({k: x[k] - y[k] for k in x}, x))
    return (error / size).sqrt().item()


def rounding(run: Path, weights: str, terms: int = 1, depth: int = 50,
             unit: float = 2**-24) -> float:
    """How far float32 may drive two runs apart that add up the same gradients in another order,
    relative to the weights.

    A gradient is a sum of `terms` products. Each addition errs by u = 2⁻²⁴ of the partial sum; with
    errors of either sign, this is √terms · u of a gradient of the usual size, and √depth times as
    much after so many layers: ρ. Adam divides by the gradient's own size. What is left of a first
    step is its sign, ±lr, and the sign is open for the weights of which the gradient is below ρ of
    the usual size: of normal gradients, a share of √(2/π) · ρ. Each is off by 2 lr then, and the
    root of the mean square over all weights is 2 lr √(.8 ρ). Later steps err no more, and at worst
    in the same direction: the rates add up. bfloat16 rounds each term by itself, u = 2⁻⁹, and the
    sums stay float32: a gradient errs like one term.
    """
    rho = (depth * terms) ** 0.5 * unit
    rates = sum(line["lr"] for line in runs.read_log(run / "log.jsonl"))
    values = torch.cat([v.flatten() for v in load_file(run / weights).values()]).double()
    return rates * 2 * (0.8 * rho) ** 0.5 / values.square().mean().sqrt().item()


CELLS = 4 * 4  # of a latent; an image has 32 × 32 pixels


@pytest.fixture(scope="module")
def one(once, tiny):
    def make(root: Path) -> None:
        train.train_diffusion(diffusion(tiny, root / "diffusion"))
        train.train_diffusion(diffusion(tiny, root / "bf16", precision="bf16"))
        train.train_vae(vae(tiny, root / "vae"))
    return once("one-process", make)


@pytest.fixture(scope="module")
def two(once, tiny):
    """The same in two processes, which torchrun starts once for everything here; said.txt has their
    stderr.
    """
    def make(root: Path) -> None:
        (root / "driver.py").write_text(DRIVER)
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 "2"]
        words.append(str(root / "driver.py"))
        sharded = {"shard": True, "save_every": 3}  # and draw and validate half-way
        for cfg in (diffusion(tiny, root / "ddp"), diffusion(tiny, root / "fsdp", **sharded),
                    diffusion(tiny, root / "fsdp-bf16", precision="bf16", checkpointing=True,
                              **sharded),
                    vae(tiny, root / "vae"), diffusion(tiny, root / "odd", batch=15),
                    diffusion(tiny, root / "lora", shard=True, train="lora"),
                    diffusion(tiny, "blind"), vae(tiny, "blind-vae")):
            saved = (root / cfg.out).with_suffix(".json")
            runs.write_json(saved, {**cfg.__dict__})
            words += ["vae" if isinstance(cfg, train.VAEConfig) else "diffusion", str(saved)]
        (root / "elsewhere").mkdir()
        done = subprocess.run(words, cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        (root / "said.txt").write_text(done.stderr)
    return once("two-processes", make)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_with_8_images_each_equal_one_with_16(one, two, way):
    a, b = one / "diffusion", two / way
    bound = rounding(a, "model.safetensors", 16 * CELLS)
    last = Path("checkpoints") / "step_00000005"
    for name in (last / "model.safetensors", last / "ema.safetensors", Path("model.safetensors")):
        assert relative(a / name, b / name) <= bound
    mine, theirs = (runs.read_log(run / "log.jsonl") for run in (a, b))
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs],
                                                            rel=1e-5)
    assert mine[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], rel=1e-5)


def test_sharded_bf16_with_draws_half_way_equals_that_of_one(one, two):
    full, a, b = one / "diffusion", one / "bf16", two / "fsdp-bf16"
    name = "model.safetensors"
    assert relative(a / name, b / name) <= rounding(a, name, unit=2**-9)
    assert relative(full / name, b / name) > rounding(full, name, 16 * CELLS)  # it is bf16
    mine, theirs = (runs.read_log(run / "log.jsonl") for run in (a, b))
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs],
                                                            rel=2**-9)
    assert len(list((b / "grids").iterdir())) == 2
    assert any((v != v.bfloat16()).any() for v in load_file(b / name).values())  # no weight is


def test_the_bound_of_rounding_is_far_below_what_other_noise_does(tiny, one, tmp_path, no_pictures):
    train.train_diffusion(diffusion(tiny, tmp_path / "other", seed=1))
    a, b = (run / "model.safetensors" for run in (one / "diffusion", tmp_path / "other"))
    assert relative(a, b) > 100 * rounding(one / "diffusion", "model.safetensors", 16 * CELLS)


def test_the_state_of_two_sharded_processes_is_that_of_one(one, two):
    last, before = (two / "fsdp" / "checkpoints" / f"step_{step:08d}" for step in (5, 0))
    assert state.check(last) is None and not before.exists()
    mine, theirs = ({k: v.shape for k, v in load_file(
        run / "checkpoints" / last.name / "optimizer.safetensors").items()}
                    for run in (one / "diffusion", two / "fsdp"))
    assert mine == theirs


def test_micro_batches_and_checkpointing_change_nothing(tiny, one, tmp_path, no_pictures):
    train.train_diffusion(diffusion(tiny, tmp_path / "micro", accumulate=4, checkpointing=True))
    bound = rounding(one / "diffusion", "model.safetensors", 16 * CELLS)
    assert relative(one / "diffusion" / "model.safetensors",
                    tmp_path / "micro" / "model.safetensors") <= bound


def test_the_vae_stage_on_two_processes(one, two):
    bound = rounding(one / "vae", "vae.safetensors", 8 * 32 * 32)
    assert relative(one / "vae" / "vae.safetensors", two / "vae" / "vae.safetensors") <= bound


def test_bad_shares_are_refused(two):
    said = (two / "said.txt").read_text()
    for name, words in (("odd", "--batch 15 is not a multiple of 2 processes × 1 micro-batches"),
                        ("lora", "--shard spreads --train all"),
                        ("blind", "blind/run.json, which rank 0 wrote, is not there for all 2"),
                        ("blind-vae", "blind-vae/run.json, which rank 0 wrote")):
        assert words in said and said.count(f"{name}.json: status 2") == 2


def test_one_process_is_its_own_world():
    x = torch.arange(3)
    assert distributed.gather(x) is x and distributed.rank_slice(range(4, 8)) == range(4, 8)
    assert distributed.least(x) is x and distributed.micro_batches(6, 3) == [
        slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(InputError, match="--batch 7 is not a multiple"):
        distributed.require_equal_slices(7, 2)


@pytest.mark.parametrize("said, place", [
    ({}, (0, 1)), ({"WORLD_SIZE": ""}, (0, 1)), ({"WORLD_SIZE": "4"}, (0, 1)),
    ({"WORLD_SIZE": "4", "RANK": "0"}, (0, 1)), ({"WORLD_SIZE": "four", "RANK": "0"}, (0, 1)),
    ({"RANK": "", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (0, 1)),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (1, 2))])
def test_variables_that_an_earlier_job_left_make_no_rank(said, place, monkeypatch, capsys):
    for name in (*distributed.ADDRESS, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "")
    assert distributed.announced() == place and distributed.local_rank() == 0
    if place == (0, 1):
        distributed.start()
        assert distributed.world() == 1
        known = said.get("WORLD_SIZE") in (None, "")
        assert ("one process" in capsys.readouterr().err) != known


def test_ranks_that_never_come_are_named(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in zip(distributed.ADDRESS, ("0", "2", "localhost", port)):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "ARRIVAL", timedelta(seconds=1))
    with pytest.raises(InputError, match="RANK=0; WORLD_SIZE=2.*unset these variables"):
        distributed.start()
