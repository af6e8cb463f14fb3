"""At which noise levels to train: TIMES maps u, uniform in [0, 1), to timesteps of a schedule.

A level is written by σ, so that a row means the same for every prediction and schedule; what lies
outside the schedule is trained at its end. lognormal and logit-normal are one family: the time s =
σ/(1+σ) of a flow is the logistic function of ln σ, so that s is logit-normal where σ is lognormal.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from minidiff.diffusion.schedule import Schedule


def _levels(sigma: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Schedule], Tensor]:
    return lambda u, schedule: schedule.t(sigma(u))


TIMES: dict[str, Callable[[Tensor, Schedule], Tensor]] = {  # u (N,) float64, schedule → t (N,)
    # every timestep as often: Ho et al. 2020
    "uniform": lambda u, schedule: (u * len(schedule)).long(),
    # ln σ normal, mean −1.2 and standard deviation 1.2 at σ_data = 1/2: Karras et al. 2022, table 1
    "lognormal": _levels(lambda u: (math.log(2) - 1.2 + 1.2 * torch.special.ndtri(u)).exp()),
    # logit of s = σ/(1+σ) standard normal: Esser et al. 2024, eq. 19
    "logit-normal": _levels(lambda u: torch.special.ndtri(u).exp()),
    # s uniform: rectified flow, Liu et al. 2023
    "flow": _levels(lambda u: u / (1 - u)),
    # the angle arctan σ uniform: Hoogeboom et al. 2023, section 2, after Nichol & Dhariwal 2021
    "angle": _levels(lambda u: (math.pi / 2 * u).tan()),
}
Times = Literal[tuple(TIMES)]  # as the type of a knob
