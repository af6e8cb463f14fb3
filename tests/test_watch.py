"""The loss at fixed times and noise, and the gap between held-out and training images."""

import contextlib
import math

import pytest
import torch

from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.watch import Probe, by_quarter, gap, is_open, validate

SCHEDULE = Schedule.scaled_linear()


def latents(n, seed):
    return torch.randn(n, 4, 2, 2, generator=torch.Generator().manual_seed(seed))


def knows(known):
    """A network for eps that knows these latents by heart, and guesses 0 for all others."""
    def net(x, t, labels):
        alpha = SCHEDULE.alphas_cumprod[t.long()].to(x)[:, None, None, None]
        # if it were image k
        noise = (x[:, None] - alpha.sqrt()[:, None] * known) / (1 - alpha).sqrt()[:, None]
        likely = (-noise.square().flatten(2).sum(2) / 2).softmax(1)
        return (likely[:, :, None, None, None] * noise).sum(1)

    return Denoiser(net, SCHEDULE, "eps")


def losses(net, probe):
    return probe.losses(net, contextlib.nullcontext, torch.device("cpu"), 7, 0.0)


def test_slots_of_two_probes_share_times_and_noise_and_batches_do_not_matter():
    a, b = (Probe.of(latents(n, n), {}, 40, 1000) for n in (10, 40))
    assert torch.equal(a.t, b.t) and torch.equal(a.noise, b.noise)
    assert torch.bincount((a.z[:, None] == latents(10, 10)[None]).flatten(2).all(2)
                          .nonzero()[:, 1]).tolist() == [4] * 10
    net = Denoiser(lambda x, t, labels: x * 0.5, SCHEDULE, "eps")
    one = a.losses(net, contextlib.nullcontext, torch.device("cpu"), 1, 5.0)
    assert torch.allclose(one, a.losses(net, contextlib.nullcontext, torch.device("cpu"), 40, 5.0))


def test_a_network_that_knows_its_images_by_heart_has_an_open_gap(capsys):
    train, held_out = latents(30, 1), latents(64, 2)
    probes = [Probe.of(z, {}, 64, 1000) for z in (train, held_out)]
    seen = validate(knows(train), probes, contextlib.nullcontext, torch.device("cpu"), 16, 0.0)
    assert seen["gap_low"] > 0.1 and "begun to copy" in capsys.readouterr().out
    assert {"val_loss", "val_loss_t0", "val_loss_t3", "gap"} <= set(seen)


def test_one_that_never_saw_either_has_none(capsys):
    nobody = knows(latents(30, 3))
    opened = 0
    for trial in range(40):
        probes = [Probe.of(latents(64, 100 + 2 * trial + side), {}, 64, 1000) for side in (0, 1)]
        opened += is_open(gap(*(losses(nobody, probe) for probe in probes)), 64)
    assert opened <= 2


def test_the_lower_bound_holds_in_19_of_20():
    generator = torch.Generator().manual_seed(0)
    below = 0
    for _ in range(2000):
        train = (3 * torch.randn(100, generator=generator)).exp()
        held_out = train * (0.2 + 0.5 * torch.randn(100, generator=generator)).exp()
        below += gap(train, held_out)["gap_low"] < math.expm1(0.2)
    assert 0.93 <= below / 2000 <= 0.97


def test_no_held_out_images_no_number():
    probes = [Probe.of(latents(5, 1), {}, 0, 1000), Probe.of(latents(0, 1), {}, 0, 1000)]
    assert validate(knows(latents(5, 1)), probes, contextlib.nullcontext, torch.device("cpu"), 4,
                0.0) == {"val_loss": None}
    assert not is_open({"gap": 9.0, "gap_low": 9.0}, 8)


def test_quarters():
    found = by_quarter(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 249, 999]), 1000)
    assert found == {"loss_t0": 1.5, "loss_t1": None, "loss_t2": None,
                     "loss_t3": pytest.approx(4.0)}
