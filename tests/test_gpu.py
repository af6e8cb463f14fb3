"""What only a GPU can show: `pytest -m gpu tests/test_gpu.py`.

MINIDIFF_DEVICE=cpu, or another device, rehearses it there; what is CUDA's alone is not asked then.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from minidiff import runs
from minidiff.data import images
from minidiff.diffusion import model as models
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.norm import GroupNorm
from minidiff.diffusion.samplers import SAMPLERS
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import TINY
from minidiff.sampling.finished_run import open_pipeline
from minidiff.sampling.plan import encode
from minidiff.training.checkpointer import Checkpointer
from minidiff.training.precision import Precision, set_cuda_flags
from minidiff.variables import Category

ROOT = Path(__file__).parents[1]
DEVICE = torch.device(os.environ.get("MINIDIFF_DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    CUDA and not torch.cuda.is_available(),
    reason="no CUDA device here; MINIDIFF_DEVICE=cpu rehearses these tests")]
STEPS = 8


@pytest.fixture(autouse=True)
def flags():
    """A Precision sets flags of the whole process."""
    yield
    if CUDA:
        set_cuda_flags(tf32=False, deterministic=False)


@contextlib.contextmanager
def waiting(how: str):
    """Inside, a wait for CUDA is an "error", or as usual, "default"."""
    before = torch.cuda.get_sync_debug_mode() if CUDA else 0
    if CUDA:
        torch.cuda.set_sync_debug_mode(how)
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.skipif(not CUDA, reason="CUDA alone tells when it is waited for")
def test_a_wait_is_an_error():
    x = torch.ones(3, device=DEVICE)
    for wait in (x.sum().item, x.nonzero, x.cpu, lambda: torch.ones(3).to(DEVICE)):
        with waiting("error"), pytest.raises(RuntimeError, match="synchron"):
            wait()


def vae_of(data: Path, out: Path, **more) -> train.VAEConfig:
    return train.VAEConfig(**{"data": (str(data),), "out": str(out), "size": 32, "steps": STEPS,
                              "batch": 4, "augment": 1.0, "device": str(DEVICE)} | more)


def diffusion_of(data: Path, vae: Path, out: Path, **more) -> train.DiffusionConfig:
    return train.DiffusionConfig(**{"data": (str(data),), "vae": str(vae), "out": str(out),
                                    "steps": STEPS, "batch": 6, "snapshots": 0, "compile": "no",
                                    "device": str(DEVICE)} | more)


@pytest.mark.parametrize("options", [
    {"precision": "bf16"}, {"precision": "fp32", "views": 0},
    {"precision": "fp16", "accumulate": 2, "checkpointing": True}, None],
    ids=["bf16", "fp32-live", "fp16-accumulate-checkpointing", "vae"])
def test_a_training_step_waits_once(tiny, tmp_path, monkeypatch, no_pictures, options):
    """Steps after the first two, in which libraries set themselves up, and before the last, which
    saves; the batch that is prepared in the meantime must not wait either.
    """
    reads, read, steps = [], Precision.read, Checkpointer.steps

    def counted(precision, *given):
        reads.append(len(reads))
        with waiting("default"):
            return read(precision, *given)

    def guarded(checkpointer, make):
        for step, batch in steps(checkpointer, make):
            with waiting("error" if 2 <= step < STEPS - 1 else "default"):
                yield step, batch

    monkeypatch.setattr(Precision, "read", counted)
    monkeypatch.setattr(Checkpointer, "steps", guarded)
    often = {"log_every": 100, "save_every": 100}
    if options is None:
        train.train_vae(vae_of(tiny / "data", tmp_path / "vae", **often))
    else:
        train.train_diffusion(diffusion_of(tiny / "data", tiny / "vae", tmp_path / "diffusion",
                                           **often, **options))
    assert len(reads) == STEPS


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_waits(tiny, name):
    """From the first step, before which noise and labels are sent, to the finished latents."""
    pipeline, facts = open_pipeline(tiny / "diffusion", DEVICE, "bf16")
    labels = encode(pipeline.conditioner.variables, facts["rows"][:4])
    recipe = Recipe(name, steps=6, guidance=2.0)
    for _ in range(2):  # in the first round libraries set themselves up
        made = pipeline.latents(labels, range(4), recipe)
        first = next(made)
        with waiting("error" if _ else "default"):
            rest = [*made]
    assert len(rest) == 6 and first.device.type == rest[-1].device.type == DEVICE.type
    assert rest[-1].isfinite().all() and rest[-1].dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_whole_way(tiny, tmp_path, no_pictures, capsys, precision):
    """Autoencoder (never fp16), diffusion model, samples, and these made again."""
    data, out = tiny / "data", tmp_path / "samples"
    train.train_vae(vae_of(data, tmp_path / "vae",
                           precision="auto" if precision == "fp16" else precision))
    train.train_diffusion(diffusion_of(data, tmp_path / "vae", tmp_path / "diffusion",
                                       precision=precision, save_every=4))
    sample.sample(sample.SampleConfig(run=str(tmp_path / "diffusion"), out=str(out), per_label=5,
                                      steps=4, batch=4, precision=precision, device=str(DEVICE)))
    sample.verify(sample.VerifyConfig(out=str(out), k=8))
    assert "largest difference" in capsys.readouterr().out
    losses = [line["loss"] for line in runs.read_log(tmp_path / "diffusion/log.jsonl")]
    assert losses and all(loss < 10 for loss in losses)
    assert runs.read_json(tmp_path / "diffusion/run.json")["facts"]["precision"] == precision
    manifest = runs.read_json(out / "manifest.json")
    made = manifest["made_on"]
    assert (made["precision"], made["device"]) == (precision, DEVICE.type)
    pictures = [images.read(out / name) for name in manifest["sha256"] if name != "metadata.csv"]
    assert len(pictures) == 15 and all(x.min() < x.max() for x in pictures)


def test_deterministic_runs_give_the_same_bytes(tiny, tmp_path):
    """Twice, and once more from a state half-way; each in a process of its own, for cuBLAS looks at
    the environment when it starts.
    """
    def run(name: str) -> bytes:
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), "diffusion", "--deterministic", "--data",
             str(tiny / "data"), "--vae", str(tiny / "vae"), "--out", str(tmp_path / name),
             "--steps", str(STEPS), "--save-every", str(STEPS // 2), "--batch", "6", "--views", "0",
             "--snapshots", "0", "--device", str(DEVICE)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("first")
    assert run("second") == whole
    shutil.rmtree(tmp_path / f"second/checkpoints/step_{STEPS:08d}")
    for file in (tmp_path / "second").glob("model.*"):
        file.unlink()
    assert run("second") == whole
    start = runs.read_log(tmp_path / "second/log.jsonl")
    assert [line["step"] for line in start] == [STEPS // 2, STEPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_norm_in_place_is_torch_s(dtype):
    """It is taken there for large tensors, keeps their layout, and errs no more than torch's."""
    g = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(4, 64, 256, 256, generator=g) * torch.rand(1, 64, 1, 1, generator=g)
    x = x.to(DEVICE, dtype, memory_format=torch.channels_last)
    norm = GroupNorm(32, 64).to(DEVICE, dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator(DEVICE).manual_seed(0))
    exact = torch.nn.GroupNorm.forward(norm.double(), x.double())
    norm.to(dtype)
    with torch.no_grad():
        made, native = norm(x), torch.nn.GroupNorm.forward(norm, x)
    assert made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    assert native.is_contiguous() == CUDA
    ours, theirs = ((y.double() - exact).norm() / exact.norm() for y in (made, native))
    assert ours <= 1.2 * theirs + 1e-6


def test_compiled_is_eager():
    """The loss and every gradient; on a CPU the graph alone, without minutes of a C++ compiler."""
    Precision("fp32", DEVICE)
    torch.compiler.reset()
    found, g = [], torch.Generator().manual_seed(0)
    variables = [Category("label", ("a", "b"))]
    z, noise = torch.randn(2, 4, 4, 8, 8, generator=g).to(DEVICE)
    t, labels = torch.tensor([10, 400, 700, 999]), {"label": torch.tensor([0, 1, 0, 1])}
    for compiled in (False, True):
        model = models.from_scratch(TINY, variables, 0).to(DEVICE,
                                                           memory_format=torch.channels_last)
        torch.nn.init.normal_(model.unet.conv_out.weight, std=0.1,
                              generator=torch.Generator(DEVICE).manual_seed(0))
        net = torch.compile(model, backend="inductor" if CUDA else "eager") if compiled else model
        loss = Denoiser(net, Schedule.scaled_linear(), "v").loss(
            z, t, noise, {name: value.to(DEVICE) for name, value in labels.items()}, 5.0)
        loss.mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), gradients))
    for eager, other in zip(*found):
        assert (other - eager).norm() <= 1e-4 * eager.norm()
    assert len(found[0][1]) > 1e6 and found[0][1].norm() > 0
