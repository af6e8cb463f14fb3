import math

import pytest
import torch
from scipy import stats

from minidiff.diffusion.schedule import SCHEDULES, Schedule
from minidiff.diffusion.times import TIMES

U = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
wide = Schedule.cosine()  # σ from .006 to more than any row asks for in earnest


def levels(name, schedule=wide):
    return schedule.sigma(TIMES[name](U, schedule))


def test_uniform_is_every_timestep_as_often():
    t = TIMES["uniform"](U, wide)
    assert t.dtype == torch.int64 and torch.equal(t.bincount(), torch.full((1000,), 20))


@pytest.mark.parametrize("name, mean, std", [("lognormal", math.log(2) - 1.2, 1.2),
                                             ("logit-normal", 0.0, 1.0)])
def test_the_logarithm_of_sigma_is_normal(name, mean, std):
    found = levels(name).log().numpy()
    assert stats.kstest(found, stats.norm(mean, std).cdf).statistic < 2e-3


def test_a_flow_trains_its_own_time_evenly_and_an_angle_its_angle():
    s = levels("flow")
    assert stats.kstest((s / (1 + s)).numpy(), stats.uniform(0, 1).cdf).statistic < 7e-3
    assert stats.kstest(levels("angle").atan().numpy(),
                        stats.uniform(0, math.pi / 2).cdf).statistic < 7e-3


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_row_stays_within_every_schedule(name, schedule):
    """Also at u = 0, where a quantile is infinite."""
    levels = SCHEDULES[schedule]()
    t = TIMES[name](torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64), levels)
    assert 0 <= t[0] < t[1] < t[2] <= 999
