"""On Gaussian data the ideal denoiser is known, and so is where the ODE and the SDE end; the peers
are diffusers'.
"""

import importlib
import inspect
import math

import pytest
import torch

from minidiff.diffusion import samplers
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.samplers import NOISY, SAMPLERS, TABLE, SeededNoise
from minidiff.diffusion.schedule import Schedule

schedule = Schedule.scaled_linear()
MEAN, STD = 0.7, 0.5
# the order of convergence that each sampler claims; of a stochastic one, that of the standard
# deviation at the end
ORDER = {name: facts.order for name, facts in TABLE.items() if not facts.noisy}
WEAK_ORDER = {name: facts.order for name, facts in TABLE.items() if facts.noisy}


def denoise(x, sigma):
    """E[z | x] for z ~ N(MEAN, STD²)."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)


def exact(x, start, end):
    """The ODE keeps the quantile: (x − mean)/√(STD² + σ²) is constant."""
    return MEAN + (x - MEAN) * ((STD**2 + end**2) / (STD**2 + start**2)).sqrt()


def options(name, noise):
    return {"noise": noise} if name in NOISY else {}


def run(name, x, sigmas, noise=None, denoise=denoise):
    *_, (last, _) = SAMPLERS[name](denoise, x, sigmas, **options(name, noise))
    return last


def randn(seed=0, shape=(2, 4, 4, 4)):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g)


# --- the mathematics ---

def error(name, n, spacing):
    sigmas = schedule.ladder(n, spacing)
    x = sigmas[0] * torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)
    return (run(name, x, sigmas) - exact(x, sigmas[0], sigmas[-1])).abs().max().item()


@pytest.mark.parametrize("spacing", ["karras", "logsigma"])
@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name, spacing):
    order = math.log2(error(name, 80, spacing) / error(name, 320, spacing)) / 2
    assert order == pytest.approx(ORDER[name], abs=0.1)


def std_at_the_end(name, sigmas):
    """What the sampler makes of N(MEAN, STD² + σ₀²), without any chance: on Gaussian data each step
    is affine.

    The last x is a weighted sum of the start and of every step's noise. Row 0 starts at 1 and rows
    1 … n receive 1 as the noise of step k only, so the last x holds the weights.
    """
    unit, x = iter(torch.eye(len(sigmas), dtype=torch.float64)[1:]), torch.eye(
        len(sigmas), dtype=torch.float64)[0]
    weights = run(name, x, sigmas, lambda: next(unit), lambda x, s: STD**2 / (STD**2 + s**2) * x)
    return (weights[0] ** 2 * (STD**2 + sigmas[0] ** 2) + weights[1:].square().sum()).sqrt().item()


@pytest.mark.parametrize("spacing", ["karras", "logsigma"])
@pytest.mark.parametrize("name", sorted(NOISY))
def test_weak_order_of_the_stochastic_samplers(name, spacing):
    errors = []
    for n in (80, 320):
        sigmas = schedule.ladder(n, spacing)
        errors.append(abs(std_at_the_end(name,
                                         sigmas) / (STD**2 + sigmas[-1].item() ** 2) ** 0.5 - 1))
        mean = run(name, torch.full((1,), MEAN, dtype=torch.float64), sigmas,
                   lambda: torch.zeros(1))
        assert mean.item() == pytest.approx(MEAN, abs=1e-9)  # and the mean is right at every n
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(WEAK_ORDER[name], abs=0.15)


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("name", sorted(NOISY))
def test_mean_and_variance_of_drawn_samples(name, n):
    """20,000 values: four standard errors round what the sampler must make, and by n = 200 that is
    the data's own.
    """
    sigmas, noise, count = schedule.ladder(n, "logsigma"), SeededNoise(range(200),
                                                                       (1, 10, 10)), 20_000
    end = run(name, MEAN + noise() * (STD**2 + sigmas[0] ** 2).sqrt().item(), sigmas, noise)
    expected = std_at_the_end(name, sigmas)
    assert end.mean().item() == pytest.approx(MEAN, abs=4 * STD / count**0.5)
    assert end.std().item() == pytest.approx(expected, abs=4 * STD / (2 * count) ** 0.5)
    if n == 200:
        bias = 0.02 if WEAK_ORDER[name] == 1 else 0.001
        assert expected == pytest.approx((STD**2 + sigmas[-1].item() ** 2) ** 0.5, rel=bias)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_keeps_the_distribution(eta):
    sigmas, noise = schedule.ladder(200, "karras"), randn(shape=(20_000, 1, 1, 1))
    start = MEAN + noise() * (STD**2 + sigmas[0] ** 2).sqrt().item()
    *_, (x, _) = samplers.ddim(denoise, start, sigmas, eta, noise)
    assert x.mean().item() == pytest.approx(MEAN,
                                            abs=0.02) and x.std().item() == pytest.approx(STD,
                                                                                          abs=0.02)


def test_churn_keeps_the_distribution_and_raises_the_noise():
    """EDM's algorithm 2: with churn the end is normal noise as before, of the same mean and std."""
    sigmas, noise = schedule.ladder(60, "karras"), randn(shape=(20_000, 1, 1, 1))
    start, seen = MEAN + noise() * (STD**2 + sigmas[0] ** 2).sqrt().item(), []

    def watched(x, sigma):
        seen.append(sigma.item())
        return denoise(x, sigma)

    *_, (plain, _) = samplers.heun(denoise, start, sigmas)
    *_, (x, _) = samplers.heun(watched, start, sigmas, churn=20.0, noise=noise, within=(0.1, 5.0))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    assert torch.corrcoef(torch.stack([x, plain]).flatten(1))[0, 1] < 0.9
    for k, sigma in enumerate(sigmas[:-1].tolist()):  # each step's first call
        assert seen[2 * k] == pytest.approx(sigma * (1 + (1 / 3 if 0.1 <= sigma <= 5 else 0)))
    once = samplers.heun(lambda x, s: seen.append(s.item()) or x, start[:1], sigmas[:2],
                         churn=9.0, noise=lambda: noise()[:1])
    next(once)
    assert seen[-2] == pytest.approx(sigmas[0].item() * 2**0.5)  # at most


@pytest.mark.parametrize("spacing", ["leading", "karras"])
def test_four_names_are_two_formulas(spacing):
    """x = z + σ·noise takes the scaling out in which DDIM, Euler and the two ancestral samplers
    differ.
    """
    sigmas, start = schedule.ladder(25, spacing), 14 * randn(3)().double()
    noises = [randn(4 + k)().double() for k in range(25)]
    for ddim_eta, names in [(0.0, ["euler"]), (1.0, ["ddpm", "euler_ancestral"])]:
        given = iter(noises)
        *_, (x, _) = samplers.ddim(denoise, start, sigmas, ddim_eta,
                                   lambda given=given: next(given))
        for name in names:
            given = iter(noises)
            assert torch.allclose(run(name, start, sigmas, lambda given=given: next(given)), x,
                                  rtol=1e-10, atol=1e-10)
    first = [run(name, start, sigmas[:2], lambda: noises[0]) for name in ("ddpm", "dpmpp_2m_sde")]
    assert torch.allclose(*first, rtol=1e-10, atol=1e-10)


# --- the contract ---

@pytest.mark.parametrize("name", SAMPLERS)
def test_every_step_is_yielded_and_the_input_is_left_alone(name):
    sigmas, x = schedule.ladder(7, "trailing"), torch.ones(2, 4, 4, 4)
    before, calls = x.clone(), []
    steps = list(SAMPLERS[name](lambda x, s: calls.append(s) or denoise(x, s), x, sigmas,
                                **options(name, randn())))
    assert len(steps) == 7 and torch.equal(x, before) and all(len(s) == 2 for s in steps)
    assert all(x.dtype == torch.float32 == denoised.dtype for x, denoised in steps)
    assert len(calls) == 7 * TABLE[name].calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_ladder_may_end_at_zero_or_with_a_step_of_no_length(name):
    sigmas, noise = torch.cat([schedule.ladder(40, "karras"),
                               torch.zeros(1, dtype=torch.float64)]), randn()
    *_, (last, denoised) = SAMPLERS[name](denoise, 14 * noise(), sigmas, **options(name, noise))
    assert last.isfinite().all() and torch.allclose(last, denoised, atol=1e-5)
    sigmas = schedule.ladder(20, "linspace")
    assert sigmas[-1] == sigmas[-2] and run(name, 14 * noise(), sigmas, noise).isfinite().all()


def test_the_order_of_every_sampler_is_measured():
    assert {*ORDER, *WEAK_ORDER} == {*SAMPLERS} == {*TABLE} and set(WEAK_ORDER) == NOISY
    assert TABLE["unipc"].order == 3 and TABLE["heun"].calls == 2


def test_who_takes_noise_is_to_be_seen():
    for name, sampler in SAMPLERS.items():
        takes = "noise" in inspect.signature(sampler).parameters
        assert takes == (name in {*NOISY, "ddim", "heun"}), name
    for name in NOISY:
        with pytest.raises(TypeError, match="noise"):
            SAMPLERS[name](denoise, torch.ones(1, 1, 2, 2), schedule.ladder(3))
    for sampler, given in ((samplers.ddim, {"eta": 0.5}), (samplers.heun, {"churn": 9.0}),
                           (samplers.ddim, {"eta": 1.5, "noise": randn()})):
        with pytest.raises(AssertionError, match="eta|churn"):
            next(sampler(denoise, torch.ones(1, 1, 2, 2), schedule.ladder(3), **given))


def test_noise_of_an_image_is_a_function_of_its_seed():
    together, alone = SeededNoise([3, 4, 5], (4, 2, 2)), SeededNoise([4], (4, 2, 2))
    for _ in range(3):
        assert torch.equal(together()[1], alone()[0])
    again = SeededNoise([4], (4, 2, 2))
    assert not torch.equal(again(), again())


@pytest.mark.parametrize("name", [*sorted(NOISY), "ddim"])
def test_an_image_does_not_depend_on_its_batch(name):
    def image(seeds, k):
        noise, sigmas = SeededNoise(seeds, (4, 3, 3)), schedule.ladder(12, "karras")
        extra = {"eta": 0.7} if name == "ddim" else {}
        *_, (x, _) = SAMPLERS[name](denoise, 14 * noise(), sigmas, noise=noise, **extra)
        return x[k]

    alone = image([7], 0)
    assert torch.equal(image([1, 7, 2**40], 1), alone) and torch.equal(image([9, 8, 3, 7], 3),
                                                                       alone)
    assert not torch.equal(image([8], 0), alone)


# --- the same weights, timesteps and noise through diffusers' schedulers ---

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
AT_SIGMA_0 = {"final_sigmas_type": "sigma_min"}
# Where the peers differ by convention, so that like is compared with like:
# - DDIM ends at σ(0) as SD sets it up; all others at σ = 0 unless told (DDPM too: its last step has
#   ᾱ_{t−1} = 1);
# - DPM-Solver++ makes its last step first-order in runs of fewer than 15 steps, also at σ(0); we at
#   σ = 0 only;
# - n Karras levels and a 0 are our ladder of n − 1 steps and a 0. Euler and Heun ask the network at
#   the fractional t, as we do; DPM-Solver++ and UniPC round it, so they get whole timesteps here;
# - Euler starts a trailing ladder at σ₀·noise, we start each ladder at √(1+σ₀²)·noise: the start is
#   given;
# - UniPC's order 2 is its predictor's;
# - DPM-Solver++ has half the weight of the parabola's square, and in its SDE of order 3 subtracts a
#   half where it adds one in its ODE: 1 less.
PEERS = {
    "ddim": ("ddim", "DDIMScheduler", {**LEADING, "clip_sample": False, "set_alpha_to_one": False},
             50), "ddim eta 1": ("ddim", "DDIMScheduler",
                                 {**LEADING, "clip_sample": False, "set_alpha_to_one": False}, 50),
    "ddpm": ("ddpm", "DDPMScheduler",
             {**TRAILING, "clip_sample": False, "variance_type": "fixed_small"}, 20),
    "ddpm, all 1000": ("ddpm", "DDPMScheduler",
                       {"clip_sample": False, "variance_type": "fixed_small"}, 1000),
    "euler": ("euler", "EulerDiscreteScheduler", LEADING, 20),
    "euler to σ(0)": ("euler", "EulerDiscreteScheduler", {**TRAILING, **AT_SIGMA_0}, 20),
    "euler, karras": ("euler", "EulerDiscreteScheduler", {"use_karras_sigmas": True}, 20),
    "euler_ancestral": ("euler_ancestral", "EulerAncestralDiscreteScheduler", LEADING, 20),
    "heun": ("heun", "HeunDiscreteScheduler", LEADING, 20),
    "heun, karras": ("heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}, 20),
    "dpmpp_2m": ("dpmpp_2m", "DPMSolverMultistepScheduler", LEADING, 12),
    "dpmpp_2m to σ(0)": ("dpmpp_2m", "DPMSolverMultistepScheduler", {**TRAILING, **AT_SIGMA_0}, 20),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {**LEADING, **SDE}, 12),
    "dpmpp_2m_sde to σ(0)": ("dpmpp_2m_sde", "DPMSolverMultistepScheduler",
                             {**TRAILING, **SDE, **AT_SIGMA_0}, 20),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", "DPMSolverMultistepScheduler",
                     {**LEADING, **SDE, "solver_order": 3, "solver_type": "heun"}, 20),
    "unipc": ("unipc", "UniPCMultistepScheduler", {**LEADING, "solver_order": 2}, 12),
}


def network(x, t):
    """A formula with a mind of its own about x, its neighbours and t: (N, 4, h, w) → the same."""
    kernel = randn(11, (4, 4, 3, 3))() / 6
    mixed = torch.nn.functional.conv2d(x, kernel, padding=1)
    return torch.tanh(mixed * (1.2 + torch.cos(t / 150))) * 0.8 + 0.3 * torch.sin(t / 70 + 1) * x


def theirs(scheduler, monkeypatch, start, draw, eta):
    """The whole trajectory as a pipeline of diffusers runs it; each step takes the next noise of
    `draw`.
    """
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: draw())
    x = start / (
        1 + scheduler.levels[0] ** 2).sqrt().item() if scheduler.init_noise_sigma == 1 else start
    for t in scheduler.timesteps:
        F = network(scheduler.scale_model_input(x, t), t.float())
        x = scheduler.step(F, t, x, **({"eta": eta} if eta else {})).prev_sample
    return x


def as_published(monkeypatch, lower=0.0):
    """The weight of the parabola's square as in Lu et al.: half of the integral's."""
    exact = samplers._weights
    monkeypatch.setattr(samplers, "_weights", lambda h: (*exact(h)[:2], exact(h)[2] / 2 - lower))


@pytest.mark.parametrize("spacing", ["karras", "logsigma"])
def test_the_integral_of_the_parabola_errs_by_half(spacing, monkeypatch):
    sigmas = schedule.ladder(160, spacing)
    right = (STD**2 + sigmas[-1].item() ** 2) ** 0.5
    ours = abs(std_at_the_end("dpmpp_3m_sde", sigmas) - right)
    assert ours < abs(std_at_the_end("dpmpp_2m_sde", sigmas) - right) / 2
    as_published(monkeypatch)
    assert 1.8 < abs(std_at_the_end("dpmpp_3m_sde", sigmas) - right) / ours < 3


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("case", PEERS)
def test_diffusers_schedulers_end_where_we_do(case, prediction, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    name, kind, given, n = PEERS[case]
    if name == "dpmpp_3m_sde":
        as_published(monkeypatch, lower=1.0)
    words = {"eps": "epsilon", "v": "v_prediction"}
    peer = getattr(diffusers, kind)(prediction_type=words[prediction], **BETAS, **given)
    peer.set_timesteps(n)
    t = peer.timesteps.double()
    # each level but the first is listed twice
    t = torch.cat([t[:1], t[1::2]]) if name == "heun" else t
    end = None if name == "ddim" or "final_sigmas_type" in given else 0.0
    if "karras" in case:
        sigmas = torch.cat([schedule.ladder(n - 1, "karras"), torch.zeros(1, dtype=torch.float64)])
        assert torch.allclose(schedule.t(sigmas[:-1]), t, atol=2e-3)
    else:
        sigmas = schedule.sigmas(t, end)
    peer.levels = sigmas
    start = randn(5)() * (1 + sigmas[0] ** 2).sqrt().item()
    eta = 1.0 if case.endswith("eta 1") else 0.0
    other = theirs(peer, monkeypatch, start, randn(6), eta)

    denoiser = Denoiser(lambda x, t, labels: network(x, t[0]), schedule, prediction)
    extra = {"eta": eta, "noise": randn(6)} if eta else options(name, randn(6))
    *_, (x, _) = SAMPLERS[name](denoiser, start, sigmas, **extra)
    mine = x / (1 + sigmas[-1] ** 2).sqrt().item() if peer.init_noise_sigma == 1 else x
    relative = ((mine - other).norm() / other.norm()).item()
    print(f"{case:24}{prediction:4}{relative:.1e}")
    assert relative <= 2e-5
