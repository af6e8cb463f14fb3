"""Inpainting: on a Gaussian, whose denoiser and conditional distribution are known in closed form;
what is kept, whatever the sampler and guidance; inverted originals.
"""

from dataclasses import replace

import pytest
import torch
from test_generate import SEEDS, SIZE, labels, last, pictures, pipeline  # noqa: F401

from minidiff.diffusion import vae as vaes
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.inpainting import keeping
from minidiff.diffusion.samplers import NOISY, SAMPLERS
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError

schedule = Schedule.scaled_linear()
N, MEAN = 200, 0.3
LINE = 0.9 ** (torch.arange(8.0)[:, None] - torch.arange(8.0)).abs().double()
COVARIANCE = torch.kron(LINE, LINE)  # of the 8 × 8 cells of a channel, .9 between neighbours
VARIANCES, AXES = torch.linalg.eigh(COVARIANCE)


def of_gaussian(x_in, t, _):
    """The ideal x0 network of latents that are drawn from that Gaussian."""
    s = schedule.sigma(t.double().cpu())[0]
    along = ((x_in.double() * (1 + s**2).sqrt() - MEAN).flatten(2)) @ AXES
    return (along * (VARIANCES / (VARIANCES + s**2)) @ AXES.T).view_as(x_in).float() + MEAN


@pytest.fixture(scope="module")
def ideal():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = vaes.VAE(vaes.TINY, 0.8).eval().requires_grad_(False)
    nothing = Conditioner([], torch.zeros(2, 16), torch.Generator())
    return Pipeline(Denoiser(of_gaussian, schedule, "x0"), nothing, vae, SIZE)


@pytest.fixture(scope="module")
def known():
    """One draw, and a mask of the right half."""
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (noise @ torch.linalg.cholesky(COVARIANCE).T).view(1, 4, 8, 8) + MEAN
    mask = torch.zeros(N, 1, SIZE, SIZE, dtype=torch.bool)
    mask[..., SIZE // 2:] = True
    return z, mask


def apart(z, known, mask) -> tuple[float, float, float]:
    """Draws z (N, 4, 8, 8) beside the exact conditional distribution: the error of the mean in
    standard deviations, the mean ratio of the deviations, and that of the jumps at the edge (rms).
    """
    new = mask[0, 0, ::4, ::4].flatten()
    gain = COVARIANCE[new][:, ~new] @ torch.linalg.inv(COVARIANCE[~new][:, ~new])
    mean = MEAN + (known.flatten(2)[0][:, ~new] - MEAN) @ gain.T                       # (4, 32)
    std = (COVARIANCE[new][:, new] - gain @ COVARIANCE[~new][:, new]).diag().sqrt()
    drawn = z.double().flatten(2)[:, :, new]
    edge, beside = z.double()[..., 4], known[..., 3]
    exact = (mean.view(4, 8, 4)[..., 0] - beside).square().mean() + std[::4].square().mean()
    return (((drawn.mean(0) - mean) / std).square().mean().sqrt().item(),
            (drawn.std(0) / std).mean().item(),
            ((edge - beside).square().mean() / exact).sqrt().item())


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun", "ddpm"])
def test_the_new_part_follows_the_known_one_and_resampling_brings_it_nearer(ideal, known, name):
    """Replacing alone leaves a seam: the new part sees the known one too late. Lugmayr's Fig. 3."""
    z, mask = known
    found = {}
    for times in (1, 3, 10):
        recipe = Recipe(name, "logsigma", 12, 1.0, resample=times)
        made = last(ideal.latents({}, range(N), recipe, origin=z.float().expand(N, -1, -1, -1),
                                  mask=mask))
        kept = ~mask[0, 0, ::4, ::4]
        assert (made[..., kept] - z[..., kept]).abs().max() < 1e-5
        found[times] = apart(made, z, mask)
    (error, _, jump), (less, _, smaller), (least, spread, smallest) = found.values()
    assert error > 1.2 * less > 1.2 * 1.5 * least and least < 0.3, found
    assert jump > 1.25 * smaller > 1.25 * smallest and jump > 1.4 and smallest < 1.15, found
    assert 0.8 < spread < 1.1, found  # ddpm in twelve steps draws too little, resampled or not


def test_keeping_is_a_closure_and_what_is_all_new_is_the_usual_sample(ideal, known):
    z, mask = known
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    new = torch.zeros(2, 1, 8, 8)
    new[..., 5:] = 1
    denoised = keeping(lambda x, sigma: x * sigma, z.float(), new)(x, 2.0)
    assert torch.equal(denoised[..., :5], z.float().expand(2, -1, -1, -1)[..., :5])
    assert torch.equal(denoised[..., 5:], 2 * x[..., 5:])
    recipe = Recipe("dpmpp_2m", steps=6, guidance=1.0)
    whole = last(ideal.latents({}, [0, 1], recipe, origin=z.float().expand(2, -1, -1, -1),
                               mask=torch.ones_like(mask[:2])))
    assert torch.allclose(whole, last(ideal.latents({}, [0, 1], recipe)), atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_what_is_outside_the_mask(
        pipeline, labels, pictures, name):  # noqa: F811
    """With guidance, part of the steps, resampling and an inversion; whatever the batch."""
    mask = torch.zeros(3, 1, SIZE, SIZE, dtype=torch.bool)
    mask[0, :, 3:9, 5:6] = mask[1, :, 20:] = mask[2, :, 31:, 31:] = True
    for knobs in ({"strength": 0.7}, {"resample": 2}, {"invert": True}):
        if knobs == {"invert": True} and name in NOISY:
            continue
        recipe = Recipe(name, "trailing", 3, 2.0, rescale=0.5, scales={"age": 1.0}, **knobs)
        given = {"origin": pictures, "mask": mask, "before": labels}
        whole, parts = (torch.cat(list(pipeline.images(labels, SEEDS, recipe, batch=n, **given)))
                        for n in (3, 2))
        assert (whole.int() - parts.int()).abs().max() <= 1
        away = ~mask.expand_as(pictures)
        assert torch.equal(whole[away], pictures[away])
        assert (whole[~away] != pictures[~away]).float().mean() > 0.5
        assert len(list(pipeline.latents(labels, SEEDS, recipe,
                                         **given))) == recipe.taken + 1


def test_an_inverted_original_comes_back_under_its_own_conditions_and_not_under_others(
        pipeline, labels, pictures):  # noqa: F811
    """Through a random network, taken for x0: see test_generate.py."""
    pipeline = replace(pipeline, denoiser=Denoiser(pipeline.denoiser.net, schedule, "x0"))
    z = pipeline.encode(pictures)
    recipe = Recipe("ddim", "logsigma", 32, 1.0, strength=0.6, invert=True)
    other = {**labels, "label": (labels["label"] + 1).clamp(0, 1)}

    def far(before, after, **knobs):
        made = last(pipeline.latents(after, SEEDS, replace(recipe, **knobs), origin=pictures,
                                     before=before))
        return ((made - z).norm() / z.norm()).item()

    same = far(labels, labels)
    assert far(None, labels) == same                          # none: those of the sample
    assert far(labels, other) > 1.02 * same < far(labels, labels, invert=False)
    assert far(labels, labels, strength=0.01) < 1e-5          # no step is left
    by_hand = pipeline.invert(z, labels, recipe)
    assert torch.equal(last(pipeline.latents(other, SEEDS, recipe, origin=z, before=labels)),
                       last(pipeline.latents(other, SEEDS, replace(recipe, invert=False),
                                             noise=by_hand)))


@pytest.mark.parametrize("strength", [0.5, 0.7, 1.0])
def test_a_mask_leaves_an_inverted_original_on_its_way(ideal, known, strength):
    """Nothing is changed, so that inside the mask the original comes back as without one."""
    recipe = Recipe("ddim", "logsigma", 32, 1.0, strength=strength, invert=True)
    z, mask = known[0].float(), known[1][:1]

    def far(**given):
        made = last(ideal.latents({}, [0], recipe, origin=z, before={}, **given))
        return (made - z)[..., 4:].square().mean().sqrt().item()

    assert far(mask=mask) < 1.2 * far()


def test_a_strength_that_leaves_no_step_gives_the_original_back(ideal, known):
    recipe = Recipe(steps=12, strength=0.05, resample=2)
    made = last(ideal.latents({}, [0], recipe, origin=known[0].float(), mask=known[1][:1]))
    assert (made - known[0]).abs().max() < 1e-5


@pytest.mark.parametrize("recipe, given, said", [
    (Recipe(invert=True), {}, "invert begins at a real image"),
    (Recipe(), {"mask": torch.ones(3, 1, SIZE, SIZE, dtype=torch.bool)}, "a mask says where"),
    (Recipe(resample=3), {"origin": torch.zeros(3, 4, 8, 8)}, "resample 3 joins what is new"),
])
def test_what_a_recipe_needs_is_named(pipeline, labels, recipe, given, said):  # noqa: F811
    with pytest.raises(InputError, match=said):
        list(pipeline.latents(labels, SEEDS, recipe, **given))


@pytest.mark.parametrize("knobs, said", [
    ({"invert": True, "sampler": "ddpm"}, "invert: ddpm draws fresh noise, .* choose one of ddim"),
    ({"invert": True, "sampler": "ddim", "eta": 0.5}, "invert: ddim of eta 0.5 draws fresh noise"),
    ({"resample": 0}, "resample 0: 1 or more"),
])
def test_recipes_that_make_no_sense(knobs, said):
    with pytest.raises(InputError, match=said):
        Recipe(**knobs)
