"""The likelihood of Gaussian data, whose denoiser, flow and density are known in closed form."""

import math

import pytest
import torch

from minidiff.diffusion.likelihood import bits_per_dimension, log_likelihood
from minidiff.diffusion.schedule import Schedule

SCHEDULE = Schedule.scaled_linear()
SHAPE = (4, 3, 2)
D = math.prod(SHAPE)


def gaussian(covariance):
    """The denoiser of N(0, covariance) data (d, d): E[z | z + σ·noise]."""
    def denoise(x, sigma):
        gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(D).double())
        return (x.flatten(1) @ gain.T).view_as(x)
    return denoise


def exact(covariance, z):
    """log p at the lowest level, where the flow ends at N(0, 1) of the highest one.

    Along each principal axis the flow only stretches: y_T = y_0·√(var_T/var_0), with the variances
    cos²θ·λ + sin²θ.
    """
    values, axes = torch.linalg.eigh(covariance)
    first, last = (1 / (1 + s**2) * values + s**2 / (1 + s**2)
                   for s in SCHEDULE.sigmas_table[[0, -1]])
    y = z.flatten(1) @ axes * (last / first).sqrt()
    return ((last / first).log() / 2 - (y**2 + math.log(2 * math.pi)) / 2).sum(1)


def signs(k, n, seed=0):
    bits = torch.randint(2, (k, n, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return 2.0 * bits.double() - 1


def drawn(covariance, n, seed=1):
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).double()
    return (noise @ torch.linalg.cholesky(covariance).T).view(n, *SHAPE)


def test_noise_is_exact_in_one_step():
    z, unit = drawn(torch.eye(D).double(), 5), torch.eye(D).double()
    found = log_likelihood(gaussian(unit), z, SCHEDULE.ladder(1, "logsigma"), signs(1, 5))
    normal = -0.5 * (z.flatten(1) ** 2 + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(found, normal)
    torch.testing.assert_close(found, exact(unit, z))


def test_independent_axes_need_one_probe_and_err_with_the_square_of_the_step():
    covariance = torch.diag(torch.linspace(0.1, 2.0, D).double())
    z = drawn(covariance, 6)
    errors = [(log_likelihood(gaussian(covariance), z, SCHEDULE.ladder(n, "logsigma"), signs(1, 6))
               - exact(covariance, z)).abs().max().item() for n in (20, 40, 80, 160)]
    assert errors[-1] < 0.01 * D / 24
    assert all(3.3 < a / b < 4.7 for a, b in zip(errors, errors[1:])), errors


def test_probes_are_unbiased_where_axes_are_correlated():
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(2)).double() / D**0.5
    covariance = mix @ mix.T + 0.2 * torch.eye(D).double()
    z, ladder = drawn(covariance, 1).expand(400, -1, -1, -1), SCHEDULE.ladder(60, "logsigma")
    found = log_likelihood(gaussian(covariance), z, ladder, signs(1, 400))
    every_axis = (D**0.5 * torch.eye(D)).double().view(D, 1, *SHAPE)  # the trace itself
    whole = log_likelihood(gaussian(covariance), z[:1], ladder, every_axis)
    assert whole.item() == pytest.approx(exact(covariance, z[:1]).item(), abs=0.02)
    assert found.std() > 0.5
    assert abs(found.mean() - whole) < 3 * found.std() / 400**0.5


def test_bits_of_a_standard_normal():
    """Its entropy is log2 √(2πe) = 2.047 bits a number."""
    z = torch.randn(4000, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    log_p = -0.5 * (z.flatten(1) ** 2 + math.log(2 * math.pi)).sum(1)
    bits = bits_per_dimension(log_p, D)
    assert bits.mean().item() == pytest.approx(0.5 * math.log2(2 * math.pi * math.e), abs=0.01)
    assert bits_per_dimension(log_p + 1, D)[0] < bits[0]
