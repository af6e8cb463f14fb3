import pytest
import torch

from minidiff.diffusion.schedule import LADDERS, Schedule

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
    assert schedule.timesteps(50, "leading").tolist()[:3] == [981, 961, 941] and schedule.timesteps(50)[-1] == 1
    assert schedule.timesteps(50, "trailing").tolist()[:2] == [999, 979] and schedule.timesteps(50, "trailing")[-1] == 19
    assert schedule.timesteps(50, "linspace").tolist()[:4] == [999, 979, 958, 938]
    assert schedule.timesteps(50, "linspace").tolist()[-2:] == [20, 0]


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
