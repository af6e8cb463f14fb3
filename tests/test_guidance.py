"""Guidance against its formulas, against diffusers, and by what it computes: which labels, how
often, in which batch.
"""

import pytest
import torch

from minidiff import variables as var
from minidiff.diffusion import model as models
from minidiff.diffusion import unet as unets
from minidiff.diffusion.denoiser import TABLE, Denoiser
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.guidance import (
    by_classifier,
    conditioned,
    guided,
    nested_sets,
    own_scales,
    rescaled,
)
from minidiff.diffusion.model import Model
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError

schedule = Schedule.scaled_linear()
VARIABLES = [var.Category("label", ("covid", "healthy")), var.Category("sex", ("F", "M")),
             var.Number("age", 50.0, 15.0, 20.0, 90.0)]
PREDICTIONS = ["eps", "v", "x0"]
N = 3
LABELS = {"a": torch.full((N,), 2), "b": torch.full((N,), 20), "c": torch.full((N,), 300)}
NULL = {name: torch.zeros(N, dtype=torch.int64) for name in LABELS}
x = torch.zeros(N, 4, 2, 2)


class Sum:
    """A network whose estimate is the sum of its labels, squared: what it adds for one depends on
    the others.
    """

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, labels):
        self.calls.append(len(x))
        total = sum(labels.values()).float()
        return (total**2).view(-1, 1, 1, 1).expand_as(x)


def summed(*names) -> float:
    return float(sum(LABELS[name][0].item() for name in names)) ** 2


def test_plain_guidance_is_one_batch_and_scale_1_is_one_call():
    net = Sum()
    denoiser, labels, null = Denoiser(net, schedule,
                                      "x0"), {"c": torch.full((N,), 2)}, {"c": torch.full((N,), -3)}
    assert (guided(denoiser, labels, null, 1.0)(x, 1.0) == 4).all()
    assert (guided(denoiser, labels, null, 2.5)(x, 1.0) == 9 + 2.5 * (4 - 9)).all()
    assert (guided(denoiser, labels, null, 0.0)(x, 1.0) == 9).all()
    assert net.calls == [N, 2 * N, N]


@pytest.mark.parametrize("scales, batches, expected", [
    ({"a": 3, "b": 3, "c": 3}, 2, 3 * summed("a", "b", "c")),
    ({"a": 1, "b": 1, "c": 1}, 1, summed("a", "b", "c")),
    ({"a": 3, "b": 1, "c": 1}, 2,
     summed("b", "c") + 3 * (summed("a", "b", "c") - summed("b", "c"))),
    ({"a": 3, "b": 1, "c": 0}, 2, summed("b") + 3 * (summed("a", "b") - summed("b"))),
    ({"a": 0, "b": 1, "c": 0}, 1, summed("b")), ({"a": 0, "b": 0, "c": 0}, 1, 0),
    ({"a": 3, "b": 2, "c": 1}, 3, summed("c") + 2 * (summed("b", "c") - summed("c"))
     + 3 * (summed("a", "b", "c") - summed("b", "c"))),
    ({"a": 3, "b": 2, "c": 4}, 4, 2 * summed("b") + 3 * (summed("a", "b") - summed("b"))
     + 4 * (summed("a", "b", "c") - summed("a", "b"))),
])
def test_a_scale_by_variable_costs_one_call_for_each_that_differs(scales, batches, expected):
    net = Sum()
    out = guided(Denoiser(net, schedule, "x0"), LABELS, NULL, scales)(x, 1.0)
    assert net.calls == [batches * N] and out.mean().item() == pytest.approx(expected)


def test_equal_scales_are_plain_guidance_bit_for_bit():
    model = trained()
    labels, null, noise = some_labels(model)
    denoiser = Denoiser(model, schedule)
    plain = guided(denoiser, labels, null, 2.3)(noise, 5.0)
    assert torch.equal(guided(denoiser, labels, null, dict.fromkeys(labels, 2.3))(noise, 5.0),
                       plain)
    with pytest.raises(AssertionError, match="one scale for each variable"):
        nested_sets(labels, null, {"label": 2.0})


def test_outside_the_interval_one_call_is_made():
    net = Sum()
    denoise = guided(Denoiser(net, schedule, "x0"), LABELS, NULL, {"a": 3, "b": 1, "c": 0},
                     interval=(0.3, 2.0))
    sigmas = torch.tensor([0.1, 0.3, 0.31, 2.0, 2.1], dtype=torch.float64)
    seen = [denoise(x, sigma).mean().item() for sigma in sigmas]
    without, within = summed("a", "b"), summed("b") + 3 * (summed("a", "b") - summed("b"))
    assert seen == [without, without, within, within, without]
    assert net.calls == [N, N, 2 * N, 2 * N, N]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rescaling_is_that_of_diffusers(prediction, share):
    pytest.importorskip("sd_peer")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    g = torch.Generator().manual_seed(0)
    # F of null and labels
    outputs = torch.randn(2, 4, 8, 8, generator=g) + torch.tensor([0.2, -0.3]).view(2, 1, 1, 1)
    noisy = 3 * torch.randn(N, 4, 8, 8, generator=g)
    denoiser = Denoiser(lambda x, t,
                        y: outputs[y["a"]] * x.flatten(1).norm(dim=1).view(-1, 1, 1, 1), schedule,
                        prediction)
    labels, null = ({"a": torch.full((N,), k)} for k in (1, 0))
    for sigma in schedule.sigma(torch.tensor([3, 250, 999])):
        mine = guided(denoiser, labels, null, 6.0, rescale=share)(noisy, sigma)
        norm = (noisy / (1 + sigma**2).sqrt()).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        conditional, unconditional = outputs[1] * norm, outputs[0] * norm
        cfg = rescale_noise_cfg(unconditional + 6.0 * (conditional - unconditional), conditional,
                                share)
        c_skip, c_out = (f(sigma.float()) for f in TABLE[prediction][1:3])
        theirs = c_skip * noisy + c_out * cfg
        assert ((mine - theirs).norm() / theirs.norm()).item() < 2e-6


def test_rescaling_leaves_the_output_of_an_untrained_network_alone():
    zero = torch.zeros(2, 4, 3, 3)
    assert torch.equal(rescaled(zero + 5, zero + 5, zero + 5, 0.7), zero + 5)
    g = torch.Generator().manual_seed(0)
    guided, unguided = 4 * torch.randn(5, 4, 9, 9, generator=g), torch.randn(5, 4, 9, 9,
                                                                             generator=g)
    std = rescaled(guided, unguided, zero[:1, :1, :1, :1], 1.0).std(dim=(1, 2, 3))
    assert torch.allclose(std, unguided.std(dim=(1, 2, 3)))


def test_guidance_by_a_weaker_model():
    net, weak = Sum(), Sum()
    denoiser, against = Denoiser(net, schedule, "x0"), Denoiser(lambda *a: 0.5 * weak(*a), schedule,
                                                                "x0")
    out = guided(denoiser, LABELS, NULL, 3.0, against=against, interval=(0.5, 9.0))
    full = summed("a", "b", "c")
    assert out(x, 1.0).mean().item() == pytest.approx(0.5 * full + 3 * 0.5 * full)
    assert out(x, 0.2).mean().item() == pytest.approx(full)
    assert guided(denoiser, LABELS, NULL, 1.0,
                  against=against)(x, 1.0).mean().item() == pytest.approx(full)
    assert net.calls == [N] * 3 and weak.calls == [N]
    with pytest.raises(InputError, match="one scale for all conditions"):
        guided(denoiser, LABELS, NULL, {"a": 2, "b": 1, "c": 1}, against=against)


def test_the_arrows_of_a_run_are_recorded():
    arrows = []
    denoise = guided(Denoiser(Sum(), schedule, "x0"), LABELS, NULL, 2.0, interval=(0.5, 9.0),
                     arrows=arrows)
    denoise(x, torch.tensor(1.0)), denoise(x, 0.1)
    assert [sigma for sigma, _ in arrows] == pytest.approx([1.0, 0.1])
    assert torch.allclose(arrows[0][1],
                          torch.full((N,), summed("a", "b", "c"))) and not arrows[1][1].any()
    unguided = []
    guided(Denoiser(Sum(), schedule, "x0"), LABELS, NULL, 1.0, arrows=unguided)(x, 1.0)
    assert not unguided[0][1].any()


def trained() -> Model:
    """A tiny model whose conditioner and output say something, as after training."""
    config = unets.UNetConfig((16, 32), (False, True), 16, heads=2, blocks=1, groups=8)
    model = models.from_scratch(config, VARIABLES, 0).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for p in (*model.conditioner.projections.parameters(), model.unet.conv_out.weight):
        p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


def some_labels(model):
    rows = [{"label": "covid", "sex": "F", "age": "71"}, {"label": "", "sex": "M", "age": ""},
            {"label": "healthy"}]
    noise = torch.randn(N, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    return var.encode(VARIABLES, rows), model.conditioner.null(N), noise


def test_the_context_of_a_model_is_computed_once():
    model, calls = trained(), []
    labels, null, noise = some_labels(model)
    model.conditioner.register_forward_hook(lambda *_: calls.append(1))
    once = conditioned(Denoiser(model, schedule), labels)
    steps = [once(noise, sigma) for sigma in (9.0, 3.0, 1.0)]
    assert len(calls) == 1
    assert all(torch.equal(a, Denoiser(model, schedule)(noise, sigma, labels))
               for a, sigma in zip(steps, (9.0, 3.0, 1.0)))
    calls.clear()
    denoise = guided(Denoiser(model, schedule), labels, null,
                     {"label": 3.0, "sex": 2.0, "age": 1.0})
    denoise(noise, 2.0), denoise(noise, 1.0)
    assert len(calls) <= 2


@pytest.mark.parametrize("wrap", ["module", "subclass", "callable", "compiled"])
def test_a_wrapped_model_is_called_whole(wrap):
    """DDP wraps a Model, FSDP2 turns it into a subclass, torch.compile returns another module:
    their call is theirs.
    """
    model, calls = trained(), []
    labels, null, noise = some_labels(model)
    expected = guided(Denoiser(model, schedule), labels, null, 2.0)(noise, 5.0)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *inputs):
            return self.module(*inputs)

    net = {"module": Wrapper(),
           "callable": lambda *inputs: (calls.append(1), model(*inputs))[1]}.get(wrap, model)
    if wrap == "compiled":
        net = torch.compile(model, backend="eager")
    if wrap == "subclass":
        model.__class__ = type("FSDPModel", (Model,), {})
    if wrap != "callable":
        net.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.allclose(guided(Denoiser(net, schedule), labels, null, 2.0)(noise, 5.0), expected,
                          atol=1e-6)
    assert len(calls) == 1


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_a_linear_classifier_on_gaussian_data_is_exact(scale):
    """p(z)·exp(s·a·Wz) of z ~ N(0, C) is N(s·C·Wᵀa, C), whose denoiser is known."""
    g = torch.Generator().manual_seed(0)
    root, decoder = torch.randn(2, 6, 6, generator=g, dtype=torch.float64)
    C, a = root @ root.T, torch.randn(6, generator=g, dtype=torch.float64)
    mean = scale * C @ decoder.T @ a

    def ideal(x, sigma, mean):
        gain = C @ torch.linalg.inv(C + sigma**2 * torch.eye(6, dtype=torch.float64))
        return mean.view(6, 1, 1) + torch.einsum("ij,njhw->nihw", gain, x - mean.view(6, 1, 1))

    moved = by_classifier(lambda x, sigma: ideal(x, sigma, 0 * mean),
                          lambda z: torch.einsum("i,ij,njhw->n", a, decoder, z), scale)
    points = torch.randn(4, 6, 1, 1, generator=g, dtype=torch.float64)
    for sigma in (0.03, 1.0, 14.6):
        with torch.no_grad():
            found = moved(points, torch.tensor(sigma, dtype=torch.float64))
        assert not found.requires_grad
        assert torch.allclose(found, ideal(points, sigma, mean), rtol=1e-9)


SEEN = var.Findings("seen", ("a", "b", "c"))


class Gaussian:
    """x given findings is N(mean of what is present, SPREAD²), and so is x without labels."""

    SPREAD, MEANS, NULL = 0.5, torch.tensor([1.0, -2.0, 4.0]), 0.3

    def __init__(self):
        self.calls = []

    def mean(self, cells):
        return torch.where(cells == var.NULL, self.NULL, SEEN.bits(cells).float() @ self.MEANS)

    def __call__(self, x, t, labels):
        """The mean of x0 given the noisy x, which comes scaled to unit variance."""
        self.calls.append(len(x))
        sigma, s = schedule.sigma(t.flatten()[0].item()), self.SPREAD
        x = x * (1 + sigma**2) ** 0.5
        mean = self.mean(labels["seen"]).view(-1, 1, 1, 1)
        return (s**2 * x + sigma**2 * mean) / (s**2 + sigma**2)


@pytest.mark.parametrize("guidance, scales, estimates", [
    (1.5, {"a": 4.0}, 3), (1.5, {"a": 4.0, "c": 0.0}, 4), (1.0, {"b": 3.0}, 2),
    (1.5, {"a": 1.5}, 3), (1.0, {"a": 2.0, "b": 3.0}, 3)])
def test_a_finding_of_its_own_scale_moves_gaussians_by_its_own_part(guidance, scales, estimates):
    """m(∅) + w·(m(y₀) − m(∅)) + Σ_f w_f·(m(y₀, f) − m(y₀)), the mean that f adds if it is there."""
    net, cells = Gaussian(), torch.tensor([0b001, 0b110, 0, var.UNKNOWN])
    labels, null = {"seen": cells}, {"seen": torch.full_like(cells, var.NULL)}
    own = own_scales([SEEN], guidance, scales)
    denoise = guided(Denoiser(net, schedule, "x0"), labels, null, guidance, own=own)
    x, x0 = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0)), {}
    for sigma in (0.5, 5.0):
        x0[sigma] = denoise(sigma * x, torch.tensor(sigma))
    assert net.calls == [4 * estimates] * 2
    there = SEEN.bits(cells).float()
    named = torch.tensor([name in scales for name in SEEN.values])
    mean = net.NULL + guidance * ((there * ~named) @ net.MEANS - net.NULL)
    mean = mean + there @ (net.MEANS * torch.tensor([scales.get(v, 0.0) for v in SEEN.values]))
    for sigma, found in x0.items():
        s, sigma = net.SPREAD, schedule.sigma(schedule.t(torch.tensor(sigma))).item()
        expected = (s**2 * sigma * x + sigma**2 * mean.view(-1, 1, 1, 1)) / (s**2 + sigma**2)
        assert torch.allclose(found, expected.float(), rtol=1e-4, atol=1e-3)


def test_scales_of_findings_are_refused_by_name():
    names = ["label", "seen"]
    recipe = Recipe(scales={"label": 2.0, "b": 3.0})
    assert recipe.scale(names, SEEN.values) == {"label": 2.0, "seen": 1.5}
    assert Recipe(scales={"b": 3.0}).scale(names, SEEN.values) == 1.5
    with pytest.raises(InputError, match="guidance of 'd': the model has no such condition or "
                       "finding; it has label, seen, a, b, c; nearest: "):
        Recipe(scales={"d": 3.0}).scale(names, SEEN.values)
    with pytest.raises(InputError, match="guidance of finding 'b': seen has scale 0"):
        own_scales([SEEN], {"seen": 0.0}, {"b": 3.0})
    with pytest.raises(InputError, match="no finding has its own"):
        guided(Denoiser(Gaussian(), schedule, "x0"), {}, {}, 2.0, own=[("seen", 0, 1.0)],
               against=Denoiser(Gaussian(), schedule, "x0"))
