import math

import pytest
import torch

from minidiff.diffusion.schedule import LADDERS, SCHEDULES, Schedule

schedule = Schedule.scaled_linear()


def test_public_values():
    ac = schedule.alphas_cumprod
    golden = {0: 0.99915, 1: 0.99829603, 499: 0.27766965, 500: 0.27633268, 999: 0.0046601}
    for t, value in golden.items():
        assert ac[t].item() == pytest.approx(value, abs=5e-9 if len(str(value)) > 9 else 5e-8)
    assert schedule.sigma(0).item() == pytest.approx(0.02916716, abs=5e-9)
    assert schedule.sigma(999).item() == pytest.approx(14.61464, abs=5e-6)


def test_t_of_sigma_is_exact_on_every_rung():
    t = torch.arange(1000)
    assert torch.equal(schedule.t(schedule.sigma(t)), t.double())


def test_inverse_between_rungs_and_monotone():
    t = torch.linspace(0, 999, 7919, dtype=torch.float64)
    assert (schedule.t(schedule.sigma(t)) - t).abs().max() < 1e-9
    assert (schedule.sigma(t).diff() > 0).all()


def test_timesteps_as_in_public_samplers():
    assert schedule.timesteps(50,
                              "leading").tolist()[:3] == [981, 961,
                                                          941] and schedule.timesteps(50)[-1] == 1
    assert schedule.timesteps(50, "trailing").tolist()[:2] == [999, 979] and schedule.timesteps(
        50, "trailing")[-1] == 19
    assert schedule.timesteps(50, "linspace").tolist()[:4] == [999, 979, 958, 938]
    assert schedule.timesteps(50, "linspace").tolist()[-2:] == [20, 0]


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_are_those_of_diffusers_for_every_n(spacing):
    diffusers = pytest.importorskip("diffusers")
    peer, known = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=1), []
    for n in range(1, 1001):
        peer.set_timesteps(n)
        mine, theirs = schedule.timesteps(n, spacing), peer.timesteps.double()
        # np.arange with a float step overshoots: 62 trailing timesteps of 61, the last of them −1
        if len(theirs) != n:
            assert spacing == "trailing" and len(theirs) == n + 1 and theirs[-1] == -1
            known, theirs = [*known, n], theirs[:-1]
        if spacing == "linspace" and n == 1:
            # theirs would take one step from t = 0; ours starts in noise
            assert theirs.item() == 0 and mine.item() == 999
        elif spacing == "leading" and n == 1000:
            assert theirs[0] == 1000 and mine[0] == 999  # with the offset theirs leaves the table
        else:
            i = (mine - theirs).nonzero().flatten().double()
            between = 1000 - i * 1000 / n if spacing == "trailing" else 999 - i * 999 / max(n - 1,
                                                                                            1)
            assert ((mine - theirs).abs() <= 1).all() and torch.allclose(between % 1,
                                                                         torch.full_like(i, 0.5))
    assert not set(known) & {5, 10, 16, 20, 25, 30, 40, 50, 100, 200, 250, 500}


@pytest.mark.parametrize("spacing, option, peers", [
    ("karras", "use_karras_sigmas",
     ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]),
    ("logsigma", "use_exponential_sigmas",
     ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]),
    ("logsigma", "use_lu_lambdas", ["DPMSolverMultistepScheduler"])])
def test_karras_and_logsigma_are_those_of_diffusers_ends_included(spacing, option, peers):
    diffusers = pytest.importorskip("diffusers")
    for name in peers:
        for n in (2, 10, 50):
            peer = getattr(diffusers, name)(**BETAS, **{option: True})
            peer.set_timesteps(n)
            mine = schedule.ladder(n - 1, spacing)
            assert torch.allclose(peer.sigmas[:-1].double(), mine, rtol=2e-5) and len(mine) == n
            assert mine[0].item() == pytest.approx(schedule.sigma(999).item(), rel=1e-14)
            assert mine[-1].item() == pytest.approx(schedule.sigma(0).item(), rel=1e-14)
            assert peer.sigmas[-1] == 0
            if name == "EulerDiscreteScheduler":  # the others round or cut the timestep
                assert torch.allclose(peer.timesteps.double(), schedule.t(mine), atol=5e-3)


@pytest.mark.parametrize("spacing", LADDERS)
def test_ladders_descend_to_sigma_of_0(spacing):
    sigmas = schedule.ladder(20, spacing)
    assert sigmas.shape == (21,) and sigmas.dtype == torch.float64
    assert sigmas[-1].item() == pytest.approx(schedule.sigma(0).item())
    assert (sigmas.diff() <= 0).all()


def test_unknown_ladder_is_named():
    with pytest.raises(ValueError, match="'cosine' is not one of leading"):
        schedule.ladder(10, "cosine")


def test_the_table_is_no_module_and_keeps_float64():
    half = Schedule(schedule.alphas_cumprod.float())
    assert half.alphas_cumprod.dtype == torch.float64
    assert not isinstance(schedule, torch.nn.Module)


@pytest.mark.parametrize("ours, theirs", [
    (Schedule.linear, {"beta_schedule": "linear"}),
    (Schedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    (Schedule.scaled_linear, BETAS), (SCHEDULES["zero-snr"], {**BETAS, "rescale": True})])
def test_tables_are_those_of_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    zero = theirs.pop("rescale", False)
    peer = diffusers.DDIMScheduler(**theirs, rescale_betas_zero_snr=zero).alphas_cumprod.double()
    mine = ours().alphas_cumprod
    assert ((mine - peer).abs() / mine)[: 999 if zero else None].max() < 2e-3  # theirs is float32


def test_a_shift_multiplies_every_sigma():
    """SNR at one eighth of the side: 64 cells of a patch are one there (Hoogeboom et al. 2023)."""
    small = schedule.shifted(1 / 8)
    assert torch.allclose(small.sigmas_table * 8, schedule.sigmas_table)
    snr = 1 / small.sigmas_table**2
    assert torch.allclose(snr.log(), (1 / schedule.sigmas_table**2).log() + 2 * math.log(8))


def test_align_your_steps_is_the_published_ladder_and_its_interpolation():
    peer = pytest.importorskip("diffusers.schedulers")
    known = peer.AysSchedules["StableDiffusionTimesteps"]
    assert schedule.t(schedule.ladder(10, "ays"))[:-1].round().tolist() == pytest.approx(known,
                                                                                        abs=1)
    assert torch.allclose(schedule.ladder(10, "ays")[1:-1], torch.tensor(
        peer.AysSchedules["StableDiffusionSigmas"][1:-1], dtype=torch.float64), atol=1e-12)
    fine = schedule.ladder(20, "ays").log()
    assert torch.allclose(fine[::2], schedule.ladder(10, "ays").log())
    assert torch.allclose(fine[1::2], (fine[:-1:2] + fine[2::2]) / 2)
