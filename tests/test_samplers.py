"""On Gaussian data the ideal denoiser is known, and so is where the probability-flow ODE ends."""

import pytest
import torch

from minidiff.diffusion.samplers import SAMPLERS, SeededNoise, ddim
from minidiff.diffusion.schedule import Schedule

schedule = Schedule.scaled_linear()
MEAN, STD = 0.7, 0.5
ORDER = {"ddim": 1, "heun": 2, "dpmpp_2m": 2}


def denoise(x, sigma):
    """E[z | x] for z ~ N(MEAN, STD²)."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def exact(x, start, end):
    """The ODE keeps the quantile: (x − mean)/√(STD² + σ²) is constant."""
    return MEAN + (x - MEAN) * ((STD**2 + end**2) / (STD**2 + start**2)).sqrt()


def error(name, n, spacing):
    sigmas = schedule.ladder(n, spacing)
    x = sigmas[0] * torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    *_, (last, _) = SAMPLERS[name](denoise, x, sigmas)
    return (last - exact(x, sigmas[0], sigmas[-1])).abs().max().item()


@pytest.mark.parametrize("spacing", ["karras", "logsigma"])
@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name, spacing):
    coarse, fine = error(name, 80, spacing), error(name, 320, spacing)
    order = torch.tensor(coarse / fine).log2().item() / 2
    assert order == pytest.approx(ORDER[name], abs=0.25)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_yielded_and_the_input_is_left_alone(name):
    sigmas, x = schedule.ladder(7, "trailing"), torch.ones(2, 1, 2, 2)
    before = x.clone()
    steps = list(SAMPLERS[name](denoise, x, sigmas))
    assert len(steps) == 7 and torch.equal(x, before) and all(len(s) == 2 for s in steps)
    assert steps[-1][0].dtype == x.dtype


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_ladder_may_end_at_zero(name):
    sigmas = torch.cat([schedule.ladder(40, "karras"), torch.zeros(1, dtype=torch.float64)])
    start = 14 * torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    *_, (last, denoised) = SAMPLERS[name](denoise, start, sigmas)
    assert last.isfinite().all() and torch.allclose(last, denoised, atol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta_keeps_the_distribution(eta):
    sigmas = schedule.ladder(200, "karras")
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(20_000, 1, 1, 1, generator=g)  # noqa: E731
    *_, (x, _) = ddim(denoise, noise() * (1 + sigmas[0] ** 2).sqrt().item(), sigmas, eta, noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02) and x.std().item() == pytest.approx(STD, abs=0.02)


def test_noise_of_an_image_is_a_function_of_its_seed():
    together, alone = SeededNoise([3, 4, 5], (4, 2, 2)), SeededNoise([4], (4, 2, 2))
    for _ in range(3):
        assert torch.equal(together()[1], alone()[0])
    again = SeededNoise([4], (4, 2, 2))
    assert not torch.equal(again(), again())


def test_samplers_import_nothing_of_ours():
    import ast
    import inspect

    from minidiff.diffusion import samplers
    for node in ast.walk(ast.parse(inspect.getsource(samplers))):
        assert "minidiff" not in str(getattr(node, "module", "")), "samplers know neither schedule nor labels"
