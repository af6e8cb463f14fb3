"""Checkpoints, EMA and the optimiser step."""

import ctypes
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from minidiff import runs
from minidiff.errors import InputError, TrainingFault
from minidiff.overlap import Behind
from minidiff.training import checkpointer, state
from minidiff.training.checkpointer import Checkpointer
from minidiff.training.optim import EMA, Trained, cosine
from minidiff.training.precision import Precision

CPU = torch.device("cpu")


def toy(seed=0, width=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 1))


def take(precision, loss, optimizer, parameters, clip, batch=""):
    """A step of a batch without micro-batches: the norm of its gradient."""
    precision.backward(loss)
    precision.update(optimizer, parameters, clip)
    precision.read(loss.detach().reshape(1), batch)
    return precision.norm


def trained(steps=3, seed=0):
    model = toy(seed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    precision = Precision("fp32")
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        take(precision, model(torch.randn(8, 4, generator=g)).square().mean(), optimizer,
             model.parameters(), 1.0)
    return {"model": model, "optimizer": optimizer, "precision": precision}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_everything_comes_back_bit_for_bit(tmp_path):
    parts = trained()
    state.save(tmp_path / "step_00000003", **parts)
    fresh = trained(steps=0, seed=9)
    state.load(tmp_path / "step_00000003", **fresh)
    assert all(equal(parts[name].state_dict(), fresh[name].state_dict()) for name in parts)
    assert not list(tmp_path.glob("**/*.pt")) and not list(tmp_path.glob(".step*"))


def test_the_newest_valid_checkpoint_is_taken_and_the_damaged_one_named(tmp_path, capsys):
    for done in (1, 2, 3):
        state.checkpoint(tmp_path, done, Behind(CPU), **trained(done))
    folder = tmp_path / "checkpoints"
    # two are kept
    assert [p.name for p in sorted(folder.iterdir())] == ["step_00000002", "step_00000003"]
    weights = folder / "step_00000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    fresh = trained(0, seed=5)
    for step in (1, 2, 3):
        runs.append_log(tmp_path / "log.jsonl", step=step)
    assert state.resume(tmp_path, **fresh) == 2
    assert equal(fresh["model"].state_dict(), trained(2)["model"].state_dict())
    assert [line["step"] for line in runs.read_log(tmp_path / "log.jsonl")] == [1, 2]
    said = capsys.readouterr().err
    assert "step_00000003" in said and "taking the checkpoint before it" in said


@pytest.mark.parametrize("fail_at", ["save_file", "write_json", "replace"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, fail_at):
    state.checkpoint(tmp_path, 1, Behind(CPU), **trained(1))
    full = OSError(28, "No space left on device")
    if fail_at == "save_file":
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os "
                               "error 28)")
    target = {"save_file": runs, "write_json": runs, "replace": state.os}[fail_at]
    monkeypatch.setattr(target, fail_at, lambda *a, **k: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space left on device"):
        state.checkpoint(tmp_path, 2, Behind(CPU), **trained(2))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert state.resume(tmp_path, **trained(0)) == 1


def test_a_checkpoint_of_another_architecture_is_one_sentence(tmp_path):
    state.save(tmp_path / "step_1", **trained())
    with pytest.raises(InputError, match="step_1 does not fit this model: .*size mismatch"):
        state.load(tmp_path / "step_1", model=toy(width=5))
    with pytest.raises(InputError, match="holds model, optimizer, precision, no ema"):
        state.load(tmp_path / "step_1", ema=toy())


def test_ema_follows_its_formula_and_forgets_the_start():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = EMA(model, horizon=10)
    expected = 0.0
    for step in range(200):
        nn.init.constant_(model.weight, 1.0 + step)
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (1.0 + step)
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)
    # lags by the horizon, less one
    assert ema.model.weight.item() == pytest.approx(200 - 9, abs=0.1)


def test_non_finite_steps_are_skipped_counted_and_end_the_run_after_three():
    parts = trained()
    model, optimizer, precision = parts["model"], parts["optimizer"], parts["precision"]
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def step(value):
        return take(precision, model(torch.ones(2, 4)).sum() * value, optimizer, model.parameters(),
                    1.0, "a.png, b.png")

    step(float("nan")), step(float("inf"))
    assert equal(model.state_dict(), before) and precision.skipped == 2
    step(1.0)
    assert not equal(model.state_dict(), before) and precision.in_a_row == 0
    with pytest.raises(TrainingFault, match="3 steps in a row .* a.png, b.png"):
        for _ in range(3):
            step(float("nan"))


def test_fp16_overflow_halves_the_scale_and_recovers():
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    precision = Precision("fp16", "cpu")
    x, before = torch.ones(2, 4), model[2].weight.clone()
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    norm = take(precision, 1e3 * model(x).square().sum(), optimizer, model.parameters(), 1.0)
    assert not norm < float("inf") and torch.equal(model[2].weight, before)
    assert (precision.skipped, precision.in_a_row) == (1, 0)
    assert precision.scaler.get_scale() == 2.0**126
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    take(precision, model(x).square().sum(), optimizer, model.parameters(), 1.0)
    assert not torch.equal(model[2].weight, before)


def test_scaled_gradients_are_unscaled_before_clipping():
    norms = {}
    for name in ("fp32", "fp16"):
        model = toy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        norms[name] = take(Precision(name), model(torch.ones(2, 4)).sum(), optimizer,
                           model.parameters(), 1e-3)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=1e-4)


def test_bf16_autocast_keeps_master_weights_in_float32():
    model, precision = toy(), Precision("bf16")
    with precision.autocast():
        assert model(torch.ones(2, 4)).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_cosine_warms_up_and_ends_at_a_hundredth():
    rates = [cosine(s, 100, 2.0, 10) for s in range(101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[10] == 2.0 and rates[
        100] == pytest.approx(0.02)


def test_sigterm_finishes_the_step_saves_and_ends_with_status_130(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    interrupted = Checkpointer(tmp_path, CPU, steps=9, every=100, **trained())
    with pytest.raises(SystemExit) as stop, interrupted as run:
        for step, _ in run.steps(int):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            last = step
    assert stop.value.code == 130 and last == 4
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert signal.getsignal(signal.SIGTERM) == before
    with Checkpointer(tmp_path, CPU, steps=9, every=100, **trained()) as run:
        assert [step for step, _ in run.steps(int)] == [5, 6, 7, 8]


def test_a_state_is_saved_by_time_as_well_as_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer, "MINUTES", 0)
    saved = []
    monkeypatch.setattr(state, "checkpoint", lambda run, done, *_, **parts: saved.append(done))
    with Checkpointer(tmp_path, CPU, steps=3, every=100, **trained()) as run:
        list(run.steps(int))
    assert saved == [1, 2, 3]


def test_a_large_state_is_saved_by_the_clock_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpointer, "LARGE", 0)
    saved = []
    monkeypatch.setattr(state, "checkpoint", lambda run, done, *_, **parts: saved.append(done))
    with Checkpointer(tmp_path, CPU, steps=5, every=2, **trained()) as run:
        assert [step + 1 for step, _ in run.steps(int) if run.is_due(step + 1)] == [2, 4, 5]
    assert saved == [5] and "every 15 minutes, not every 2 steps" in capsys.readouterr().out


def test_three_faults_end_the_run_with_the_batch_and_the_last_good_state_named(tmp_path, capsys):
    parts = trained(0)
    said = r"c.png; the last good state: .*step_00000003"
    faulty = Checkpointer(tmp_path, CPU, steps=99, every=3, **parts)
    with pytest.raises(TrainingFault, match=said), faulty as run:
        for step, _ in run.steps(int):
            loss = parts["model"](torch.ones(2, 4)).sum() * (1.0 if step < 3 else float("nan"))
            take(parts["precision"], loss, parts["optimizer"], parts["model"].parameters(), 1.0,
                 "c.png")
    assert capsys.readouterr().err.count("step skipped, its loss is not finite; the batch: "
                                         "c.png") == 3


def test_the_lowest_loss_is_remembered_over_a_resume(tmp_path):
    with Checkpointer(tmp_path, CPU, steps=9, every=1, **trained()) as run:
        losses = (None, 3.0, 2.0, 2.0, 2.5)
        assert [run.is_best(loss) for loss in losses] == [False, True, True, False, False]
        for step, _ in run.steps(int):
            if step == 3:
                break
            run.log(step=step + 1, val_loss=losses[step])
    with Checkpointer(tmp_path, CPU, steps=9, every=1, **trained()) as run:
        assert not run.is_best(2.1) and run.is_best(1.9)


def test_the_disk_must_hold_three_states(tmp_path, monkeypatch):
    def free(number):
        monkeypatch.setattr(state.shutil, "disk_usage",
                            lambda path: type("usage", (), {"free": number}))

    size, _ = state.budget(toy())
    free(3 * size)
    state.require_space(tmp_path, toy())
    free(3 * size - 1)
    with pytest.raises(InputError, match="need 0.00 GB of disk"):
        state.require_space(tmp_path, toy())
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    free(size)
    state.require_space(tmp_path, toy())  # two of the three are there already


def test_the_budget_counts_weights_average_gradients_and_moments():
    model = toy()
    model[0].requires_grad_(False)
    whole, some = 4 * 3 + 3 + 3 + 1, 3 + 1
    size, text = state.budget(model)
    assert size == 16 * some and text.startswith(f"{some:,} of {whole:,} parameters are trained")
    optimizer = torch.optim.AdamW(model[2].parameters(), fused=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tensors = [t for part in (Trained(model), EMA(model, 9), optimizer)
               for t in leaves(part.state_dict())]
    assert sum(4 * t.numel() for t in tensors if t.ndim) == size


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return [t for value in inside for t in leaves(value)]


def test_frozen_weights_are_shared_with_the_average_and_left_out_of_the_state():
    model = toy()
    model[0].requires_grad_(False)
    ema = EMA(model, 10)
    assert ema.model[0].weight is model[0].weight and ema.model[2].weight is not model[2].weight
    assert set(ema.state_dict()) == set(Trained(model).state_dict()) == {"2.weight", "2.bias"}
    with pytest.raises(ValueError, match="1 parameters do not fit: 2.bias"):
        ema.load_state_dict({"2.weight": model[2].weight})


def test_micro_batches_add_up_to_the_batch():
    results = []
    for parts in (1, 4):
        model, x = toy(), torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        precision = Precision("fp32")
        for micro in x.chunk(parts):
            precision.backward(model(micro).square().sum() / len(x))
        precision.update(optimizer, model.parameters(), 1.0)
        results.append(model[0].weight.detach())
    assert torch.allclose(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept_and_not_fetched_anew():
    code = """if True:
        import resource, torch
        from minidiff.training.device import keep_memory
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for prepare in (lambda: None, keep_memory):
            prepare()
            torch.ones(2**24)
            before = faults()
            for _ in range(10):
                torch.ones(2**24)
            print(faults() - before)"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    usual, kept = map(int, done.stdout.split())
    # torch 2.13: none at all, unless the system takes pages back; torch 2.15: six of ten
    assert kept < 0.7 * usual
