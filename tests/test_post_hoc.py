"""Averages chosen after training: the profiles against sums, the weights against a run's own."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sample
import train
from minidiff.errors import InputError
from minidiff.stages.average import AverageConfig, average
from minidiff.training.post_hoc import WIDTHS, PowerEMA, gamma, mixture, overlap


def profile(t: float, width: float, times: np.ndarray) -> np.ndarray:
    g = gamma(width)
    return np.where(times <= t, (g + 1) * (times / t) ** g / t, 0)


@pytest.mark.parametrize("width", [0.02, *WIDTHS, 0.2, 0.28])
def test_gamma_gives_a_profile_of_this_standard_deviation(width):
    times = (np.arange(200_000) + 0.5) / 200_000
    p = profile(1, width, times) / len(times)
    mean = (p * times).sum()
    assert p.sum() == pytest.approx(1, abs=1e-6)
    assert (p * (times - mean) ** 2).sum() ** 0.5 == pytest.approx(width, rel=1e-4)


def test_overlap_is_the_integral_of_the_product():
    times = (np.arange(400_000) + 0.5) / 400_000 * 900
    a, b = profile(500, 0.05, times), profile(900, 0.1, times)
    found = overlap((500, gamma(0.05)), (900, gamma(0.1)))
    assert found == pytest.approx((a * b).sum() * 900 / len(times), rel=1e-4)


def test_the_average_is_the_sum_over_its_profile():
    model, seen = nn.Linear(1, 1, bias=False), []
    ema = PowerEMA(model, 0.1)
    for step in range(400):
        seen.append(float(np.sin(step / 30)))
        nn.init.constant_(model.weight, seen[-1])
        ema.update(model, step)
    p = profile(400, 0.1, np.arange(400) + 0.5)
    assert ema.model.weight.item() == pytest.approx((p * seen).sum() / p.sum(), abs=2e-3)


@pytest.mark.parametrize("width, bound", [(0.03, 0.05), *((w, 1e-6) for w in WIDTHS), (0.07, 0.005),
                                          (0.15, 0.01), (0.2, 0.03), (0.25, 0.08)])
def test_any_width_is_a_sum_of_what_is_kept(width, bound):
    kept = [(650 * k / 16, w) for k in range(1, 17) for w in WIDTHS]
    weights, error = mixture([(t, gamma(w)) for t, w in kept], (650, gamma(width)))
    times = (np.arange(100_000) + 0.5) / 100_000 * 650
    wanted = profile(650, width, times)
    found = sum(x * profile(t, w, times) for x, (t, w) in zip(weights, kept))
    measured = ((found - wanted) ** 2).sum() ** 0.5 / (wanted**2).sum() ** 0.5
    assert error <= bound and measured == pytest.approx(error, rel=0.02, abs=1e-3)
    assert weights.sum() == pytest.approx(1, abs=0.05)


def test_a_run_keeps_averages_of_which_others_are_made(tiny, tmp_path, no_pictures, capsys):
    knobs = {"data": (str(tiny / "data"),), "vae": str(tiny / "vae"), "batch": 4, "views": 1,
             "steps": 16, "snapshots": 3, "save_every": 20}
    run, plain = tmp_path / "run", tmp_path / "plain"
    train.train_diffusion(train.DiffusionConfig(out=str(run), post_hoc=True, **knobs))
    train.train_diffusion(train.DiffusionConfig(out=str(plain), **knobs))
    assert (run / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="kept no averages"):
        average(AverageConfig(run=str(plain)))

    for k, width in enumerate(WIDTHS):
        average(AverageConfig(run=str(run), std=width))
        found = load_file(run / f"averaged/std_{width:g}/model.safetensors")
        own = {name.partition("/")[2]: x for name, x in load_file(
            run / "averages.safetensors").items() if name.startswith(f"{k}/")}
        assert own and all(torch.allclose(found[name], x, atol=1e-6) for name, x in own.items())
        assert found.keys() == load_file(run / "model.safetensors").keys()
    assert "to within 0.0%" in capsys.readouterr().out
    for knobs, words in (({"std": 0.3}, "--std 0.3"), ({"step": 2}, "--step 2")):
        with pytest.raises(InputError, match=words):
            average(AverageConfig(run=str(run), **knobs))
    sample.sample(sample.SampleConfig(run=str(run / "averaged/std_0.1"), out=str(tmp_path / "out"),
                                      per_label=1, steps=2, batch=8))
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 3
