from itertools import combinations

import pytest
import torch

from minidiff.diffusion.denoiser import TABLE, Denoiser, octaves
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError

schedule = Schedule.scaled_linear()
PREDICTIONS = [*TABLE]


def oracle(prediction: str, z: torch.Tensor):
    """The F that knows z: whatever x_in and t it sees, it answers as if D = z."""
    def net(x_in, t, labels):
        if prediction == "flow":
            b = t.double().view(-1, 1, 1, 1) / 1000
            return (x_in.double() - z) / b  # x_in = (1 − s)·z + s·noise
        ac = 1 / (1 + schedule.sigma(t.double().cpu()) ** 2)
        a, b = (s.view(-1, 1, 1, 1) for s in (ac.sqrt(), (1 - ac).sqrt()))
        noise = (x_in.double() - a * z) / b
        return {"eps": noise, "v": a * noise - b * z, "x0": z.expand_as(noise)}[prediction]
    return net


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_inverts_every_parametrisation(prediction):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 3, 3, generator=g, dtype=torch.float64)
    denoiser = Denoiser(oracle(prediction, z), schedule, prediction)
    for sigma in schedule.sigma(torch.tensor([0, 1, 250, 999])):
        x = z + sigma * torch.randn(5, 4, 3, 3, generator=g, dtype=torch.float64)
        assert (denoiser(x, sigma) - z).abs().max() < 1e-5  # t reaches the network in float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_of_the_oracle_is_zero_and_of_nothing_is_its_target(prediction):
    g = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, 6, 4, 2, 2, generator=g, dtype=torch.float64)
    t = torch.tensor([0, 10, 300, 500, 900, 999])
    net = {"eps": lambda x, t, y: noise, "x0": lambda x, t, y: z, "v": oracle("v", z),
           "flow": lambda x, t, y: noise - z}[prediction]
    assert Denoiser(net, schedule, prediction).loss(z, t, noise).max() < 1e-10
    silent = Denoiser(lambda x, t, y: torch.zeros_like(x), schedule, prediction)
    ac = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = {"eps": noise, "x0": z, "v": ac.sqrt() * noise - (1 - ac).sqrt() * z,
              "flow": noise - z}[prediction]
    assert torch.allclose(silent.loss(z, t, noise), target.square().flatten(1).mean(1))


@pytest.mark.parametrize("prediction, weight",
                         [("eps", lambda s: min(s, 5) / s), ("v", lambda s: min(s, 5) / (s + 1)),
                          ("x0", lambda s: min(s, 5)),
                          ("flow", lambda s: min(s, 5) / (1 + s**0.5) ** 2)])
def test_min_snr_weights(prediction, weight):
    z, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(2),
                           dtype=torch.float64)
    t = torch.tensor([5, 400, 950])
    denoiser = Denoiser(lambda x, t, y: torch.zeros_like(x), schedule, prediction)
    snr = (1 / schedule.sigma(t) ** 2).tolist()
    expected = denoiser.loss(z, t, noise) * torch.tensor([weight(s) for s in snr])
    assert torch.allclose(denoiser.loss(z, t, noise, min_snr=5.0), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_process_is_exact_at_all_1000_levels_under_autocast(dtype):
    seen = {}

    def net(x_in, t, labels):
        seen.update(x=x_in, t=t)
        return torch.zeros_like(x_in)

    t = torch.arange(1000)
    z, noise = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    with torch.autocast("cpu", dtype):
        loss = Denoiser(net, schedule).loss(z, t, noise)
    assert loss.dtype == seen["x"].dtype == seen["t"].dtype == torch.float32
    exact = (1 - schedule.alphas_cumprod).sqrt().float()
    assert torch.equal(seen["x"].flatten(),
                       exact) and len(exact.unique()) == 1000 and exact.min() > 0
    assert torch.equal(seen["t"], t.float())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_kept_of_x_is_the_estimate_of_a_silent_network(prediction):
    x = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    silent = Denoiser(lambda x, t, y: torch.zeros_like(x), schedule, prediction)
    for sigma in (0.03, torch.tensor(2.0), torch.tensor([0.1, 1.0, 14.0])):
        assert torch.equal(silent.kept(x, sigma), silent(x, sigma))


def test_v_is_the_network_and_the_loss_of_edm():
    """Karras et al. 2022, table 1 with σ_data = 1: c_in, c_skip, c_out, and λ(σ)·c_out² = 1; the
    sign of F alone differs."""
    s = torch.logspace(-2, 2, 9, dtype=torch.float64)
    row = TABLE["v"]
    for ours, edm in ((1 / row.over(s), (s**2 + 1) ** -0.5), (row.c_skip(s), 1 / (s**2 + 1)),
                      (-row.c_out(s), s / (s**2 + 1) ** 0.5),
                      ((s**2 + 1) / s**2 * row.c_out(s) ** 2, torch.ones_like(s))):
        assert torch.allclose(ours, edm)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_what_gives_z_back(prediction):
    """At every level D = c_skip·x + c_out·target is z: the columns of a row belong together."""
    row, s = TABLE[prediction], torch.logspace(-2, 2, 9, dtype=torch.float64)[:, None]
    z, noise = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(4), dtype=s.dtype)
    a = 1 / row.over(s)
    made = row.c_skip(s) * (z + s * noise) + row.c_out(s) * row.target(z, noise, a, s * a)
    assert (made - z).abs().max() < 1e-12


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="'score' is not one of eps, v, x0, flow"):
        Denoiser(lambda x, t, y: x, schedule, "score")


def test_octaves_are_orthogonal_add_up_and_weigh_the_loss():
    g = torch.Generator().manual_seed(4)
    z, noise = torch.randn(2, 3, 4, 8, 8, generator=g, dtype=torch.float64)
    parts = octaves(z, 4)
    assert torch.allclose(sum(parts), z)
    assert all(abs((a * b).sum()) < 1e-12 for a, b in combinations(parts, 2))
    assert parts[-1].std((2, 3)).max() < 1e-12  # the mean, which is the offset of offset noise
    checkers = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4).expand(1, 1, 8, 8)
    assert torch.equal(octaves(checkers, 2)[0], checkers)

    t, silent = torch.tensor([3, 400, 999]), Denoiser(lambda x, t, y: 0 * x, schedule, "eps")
    plain = silent.loss(z, t, noise)
    assert torch.allclose(silent.loss(z, t, noise, bands=(1, 1, 1)), plain)
    each = [silent.loss(z, t, noise, bands=weights) for weights in ((1, 0), (0, 1))]
    assert torch.allclose(sum(each), plain)
    assert torch.allclose(silent.loss(z, t, noise, bands=(2, 5)), 2 * each[0] + 5 * each[1])
    with pytest.raises(InputError, match="5 octaves"):
        silent.loss(z, t, noise, bands=(1,) * 5)
