"""Training, sampling, classifier and report on a device that is no CPU, and how often they wait.

The device is simulated (simdev.py), so this finds tensors that were left on the CPU and values that
are asked for too early. It says nothing of speed, of a GPU's own rounding, nor of what CUDA alone
has, where the program asks for `cuda` rather than for a device that is no CPU:

    auto as a device, the current device, peak of memory   training/device.py
    bf16 where it is native, TF32, cuDNN, determinism      training/precision.py
    whether compiling pays                                 training/compiling.py
    pinned memory                                          overlap.py, diffusion/samplers.py
    NCCL, and a device for each rank                       distributed.py
    names and versions in run.json                         runs.py
    float32 in Inception and its like                      evaluation/features/backbones.py

`pytest -m gpu` runs those. A GPU is busy while the program runs ahead of it: a training step asks
for values once, at its end, and a step of sampling never.
"""

import copy
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from minidiff import runs

ROOT = Path(__file__).parents[1]
ONCE = Counter(read=1)  # what a training step may wait for
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no private API by which Python can be a device")


def simulated(body: Callable[[Path, Path], None]) -> Callable:
    """A test that runs in a process of its own, which has the device. The body is given the tiny
    run and a folder to write into.
    """
    def test(tiny, tmp_path):
        code = (f"import simdev; simdev.start(); import test_accelerator; "
                f"test_accelerator.{body.__name__}.body({str(tiny)!r}, {str(tmp_path)!r})")
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={
            **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
        assert not ended.returncode, ended.stderr[-6000:]

    test.body = lambda tiny, out: body(Path(tiny), Path(out))
    test.__doc__ = body.__doc__
    return test


@contextmanager
def counted() -> Iterator[list[Counter]]:
    """What each training step waits for, once its batch is there and until the next is asked for.
    """
    import simdev

    from minidiff.training.checkpointer import Checkpointer
    steps, found = Checkpointer.steps, []

    def marked(self, make):
        for given in steps(self, make):
            before = simdev.waits.copy()
            yield given
            found.append(simdev.waits - before)

    Checkpointer.steps = marked
    yield found
    Checkpointer.steps = steps


def hold(found: list[Counter], allowed: Counter) -> None:
    """Each step waits for just what is allowed; the lines that make it wait are named."""
    assert found
    for step, waits in enumerate(found):
        lines = "\n".join(f"{n} × {kind} at {line}" for (kind, line), n in waits.items())
        assert Counter(kind for kind, _ in waits.elements()) == allowed, f"step {step}:\n{lines}"


def trained(tiny: Path, out: Path, pictures: bool = False, **knobs) -> Path:
    """A short diffusion training on the device, of which no step waits but once at its end."""
    import train
    if not pictures:
        train.draw_pictures = lambda *_, **__: None
    with counted() as found:
        train.train_diffusion(train.DiffusionConfig(**{
            "data": (str(tiny / "data"),), "vae": str(tiny / "vae"), "out": str(out), "steps": 6,
            "batch": 6, "views": 2, "log_every": 2, "save_every": 3, "snapshots": 0,
            "device": "sim", **knobs}))
    due = knobs.get("save_every", 3)
    hold([waits for step, waits in enumerate(found, 1) if step % due], ONCE)
    return out


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in runs.read_log(run / "log.jsonl")}


@simulated
def test_the_device_is_apart(tiny, out):
    """What a GPU refuses is refused, and each wait is named by its line."""
    import simdev
    x = torch.ones(3, 2).to("sim")
    assert x.device == torch.device("sim", 0) and (x + 1).device == x.device
    for mixed in (lambda: x + torch.ones(3, 2), lambda: torch.ones(3)[torch.arange(2).to("sim")],
                  lambda: torch.nn.Linear(2, 2)(x), x.numpy,
                  lambda: x.normal_(generator=torch.Generator())):
        with pytest.raises((RuntimeError, TypeError), match="device|CPU|cpu"):
            mixed()
    simdev.waits.clear()
    torch.ones(3, 2).to("sim", non_blocking=True)
    assert not simdev.waits
    assert x.sum().item() == 6
    (what, line), = simdev.waits
    assert what == "read" and line.startswith("tests/test_accelerator.py:")
    with torch.autocast("sim", torch.bfloat16):
        assert (x @ x.T).dtype == torch.bfloat16 and x.exp().dtype == torch.float32


@simulated
def test_training_in_bf16_waits_once_a_step(tiny, out):
    """The losses are those of the CPU but for rounding."""
    run, on_cpu = trained(tiny, out / "run", precision="bf16", save_every=6), tiny / "diffusion"
    assert losses(run) == pytest.approx({k: losses(on_cpu)[k] for k in losses(run)}, rel=0.02)
    assert runs.read_json(run / "run.json")["facts"]["precision"] == "bf16"


@simulated
def test_augmentation_sends_its_numbers_without_a_wait(tiny, out):
    """It runs in a thread beside training, whose waits are not counted there."""
    import simdev

    from minidiff.counted import AUGMENT, generators
    from minidiff.data.augmentation import augment, vary
    x, waits = torch.zeros(2, 1, 32, 32).to("sim"), simdev.waits.copy()
    for change in (augment, vary):
        assert change(x, generators(0, range(2), AUGMENT), 1.0).device == x.device
    hold([simdev.waits - waits], Counter())


@simulated
def test_no_sampler_waits_within_a_step(tiny, out):
    import simdev

    from minidiff.diffusion import norm
    from minidiff.diffusion.generate import Recipe
    from minidiff.diffusion.samplers import TABLE
    from minidiff.sampling.finished_run import open_pipeline
    from minidiff.sampling.plan import encode
    norm.LARGE = 0  # the norms of large tensors, for small ones
    pipeline, facts = open_pipeline(tiny / "diffusion", "sim", "bf16")
    labels = encode(pipeline.conditioner.variables, facts["rows"][:2])
    half = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    half[..., 16:] = True
    real = {"origin": torch.arange(6144).remainder(251).to(torch.uint8).view(2, 3, 32, 32)}
    for recipe, given in (
            *((Recipe(name, steps=4, rescale=0.5), {}) for name in TABLE),
            (Recipe("ddim", steps=4, eta=1.0, interval=(0.5, 4.0)), {}),
            (Recipe("euler", steps=4, scales={"label": 3.0}), {}),
            (Recipe("ddim", steps=4, invert=True), real),
            (Recipe("dpmpp_2m_sde", steps=4, resample=2), {**real, "mask": half})):
        found, before = [], simdev.waits.copy()
        for z in pipeline.latents(labels, [0, 1], recipe, **given):
            found.append(simdev.waits - before)
            assert z.device.type == "sim" and z.isfinite().all(), recipe
            before = simdev.waits.copy()
        hold(found[1:], Counter())  # the first sends labels, noise and original
    before = simdev.waits.copy()
    made, = pipeline.images(labels, [0, 1], Recipe(steps=2), batch=2)
    assert made.device.type == "cpu"
    hold([simdev.waits - before], Counter(read=2))


@simulated
def test_the_classifier_waits_once_a_step(tiny, out):
    """Its losses, answers and Grad-CAM are those of the CPU."""
    import simdev

    from minidiff.classification import predictor
    from minidiff.classification.gradcam import gradcam
    from minidiff.training.precision import Precision
    from minidiff.variables import Category, Number
    variables = [Category("label", ("a", "b", "c")), Number("age", 40.0, 10.0, 20.0, 60.0)]
    images = torch.randint(256, (24, 1, 32, 32), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    labels = {"label": torch.arange(24) % 3, "age": torch.linspace(20, 60, 24)}
    here = predictor.Predictor(variables, width=8, size=32, dropout=0.2)
    there, found, read = copy.deepcopy(here).to("sim"), [simdev.waits.copy()], Precision.read

    def marked(self, values, batch):
        values = read(self, values, batch)
        found.append(simdev.waits.copy())
        return values

    Precision.read = marked
    log, expected = (predictor.fit(
        one, images, labels, steps=5, batch=6, augment="strong", precision="fp32",
        weights=predictor.balance(variables[0], labels),
        sample_weight=torch.linspace(0.5, 1.5, 24)) for one in (there, here))
    hold([after - before for before, after in zip(found[:6], found[1:6])], ONCE)
    assert log[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-3)
    there.load_state_dict(here.state_dict())
    for name, p in here.predict(images).items():
        assert torch.allclose(there.predict(images)[name], p, atol=1e-4), name
    assert abs(gradcam(there, images[:4], 1) - gradcam(here, images[:4], 1)).max() < 1e-3


@pytest.mark.slow
@simulated
def test_fp16_with_scaler_micro_batches_checkpoints_and_live_views(tiny, out):
    run = trained(tiny, out / "run", precision="fp16", accumulate=2, checkpointing=True, views=0,
                  min_snr=5.0, steps=3)
    state = runs.read_json(run / "checkpoints/step_00000003/state.json")
    assert "scale" in str(state["precision"]) and all(map(math.isfinite, losses(run).values()))


@pytest.mark.slow
@simulated
def test_lora_and_its_pictures(tiny, out):
    """On the tiny run, whose own weights stay."""
    run = trained(tiny, out / "run", pictures=True, init=str(tiny / "diffusion"), vae="", rank=2,
                  precision="bf16", steps=3)
    assert (run / "lora.safetensors").exists() and list((run / "grids").iterdir())


@pytest.mark.slow
@simulated
def test_training_the_vae(tiny, out):
    import train
    with counted() as found:
        train.train_vae(train.VAEConfig(data=(str(tiny / "data"),), out=str(out / "vae"), size=32,
                                        steps=12, batch=4, precision="bf16", device="sim"))
    hold(found[:-1], ONCE)
    then, now = (runs.read_json(root / "vae/vae.json")["psnr"] for root in (tiny, out))
    assert now == pytest.approx(then, abs=0.5)


@pytest.mark.slow
@simulated
def test_a_resumed_run_equals_an_unbroken_one(tiny, out):
    """Weights, moments and log, byte for byte, where a run was stopped after its first state."""
    import shutil
    whole = trained(tiny, out / "whole", precision="bf16")
    shutil.copytree(whole, out / "broken")
    shutil.rmtree(out / "broken/checkpoints/step_00000006")
    (out / "broken/model.json").unlink()
    broken = trained(tiny, out / "broken", precision="bf16")
    files = [path.relative_to(whole) for path in (whole / "checkpoints").rglob("*.*")]
    for file in (*files, "log.jsonl", "model.safetensors", "model.json"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.slow
@simulated
def test_a_public_network_sees_there_what_it_sees_on_the_cpu(tiny, out):
    from safetensors.torch import save_file

    from minidiff.evaluation.features import backbones
    backbones.BATCH = 2
    row, file = backbones.BACKBONES["resnet18"], out / "resnet18.safetensors"
    save_file(row.make().state_dict(), file)
    images = torch.arange(3 * 32 * 32).remainder(251).to(torch.uint8).view(1, 3, 32, 32)
    here, there = (backbones.Network("resnet18", row, file, device=device)(images)
                   for device in ("cpu", "sim"))
    assert there.device.type == "cpu" and torch.allclose(here, there, atol=1e-4)


@pytest.mark.slow
@simulated
def test_samples_classifier_and_report(tiny, out):
    """From the tiny run to the page: samples and their check, classifier with judge and Grad-CAM,
    report with the membership audit.
    """
    import classify
    import evaluate
    import sample
    from minidiff.sampling import again
    shared = {"root": str(out), "device": "sim"}
    data, run = (str(tiny / "data"),), str(tiny / "diffusion")
    sample.sample(sample.SampleConfig(run=run, out=str(out / "samples"), per_label=8, steps=3,
                                      batch=12, precision="bf16", **shared))
    again.verify(again.VerifyConfig(out=str(out / "samples"), k=4, **shared))
    classify.run_study(classify.Config(
        data=data, synthetic=(), arms=("real",), out=str(out / "classifier"), size=32, width=8,
        steps=8, batch=8, seeds=1, primary="", precision="bf16", **shared))
    evaluate.run_report(evaluate.Config(
        data=data, samples=str(out / "samples"), classifier=str(out / "classifier"),
        vae=str(tiny / "vae"), diffusion=run, out=str(out / "report"), audit=20, repeats=10,
        shown=1, extractors=("pixels", "classifier", "vae"), **shared))
    report = runs.read_json(out / "report/report.json")
    assert report["membership"]["made"] and report["agreement"]
    assert {row["name"] for row in report["extractors"]} > {"classifier", "vae"}


@pytest.mark.slow
@simulated
def test_the_figures_of_explain_are_those_of_the_cpu(tiny, out):
    from minidiff.sampling import explain

    def close(a, b) -> None:
        if isinstance(a, dict | list):
            assert len(a) == len(b)
            for key in a if isinstance(a, dict) else range(len(a)):
                close(a[key], b[key])
        else:
            assert a == (pytest.approx(b, rel=1e-3, abs=1e-4) if isinstance(a, float) else b)

    here, there = (explain.run(explain.ExplainConfig(
        run=str(tiny / "diffusion"), data=(str(tiny / "data"),), out=str(out / device), images=6,
        steps=3, shown=2, labels=2, reference=4, device=device)) for device in ("cpu", "sim"))
    close(here["figures"], there["figures"])
