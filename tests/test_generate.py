"""The pipeline: equal to its plain form bit for bit, JSON recipes, real images as a beginning, and
back to noise.
"""

import copy
import json
from dataclasses import asdict, replace
from typing import get_args, get_type_hints

import pytest
import torch
from test_guidance import LABELS, VARIABLES, some_labels, trained

from minidiff.diffusion import vae as vaes
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.model import Model
from minidiff.diffusion.samplers import SAMPLERS, SeededNoise
from minidiff.diffusion.schedule import LADDERS, Schedule
from minidiff.errors import InputError, TrainingFault
from minidiff.pixels import to_uint8

schedule = Schedule.scaled_linear()
SEEDS = [5, 6, 7]
SIZE = 32
PLAIN = Recipe(steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = vaes.VAE(vaes.TINY, 0.8).eval().requires_grad_(False)
    model = trained()
    return Pipeline(Denoiser(model, schedule), model.conditioner, vae, SIZE)


@pytest.fixture(scope="module")
def labels(pipeline):
    return some_labels(pipeline.denoiser.net)[0]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(8),
                         dtype=torch.uint8)


def last(steps) -> torch.Tensor:
    *_, z = steps
    return z


def plain(pipeline: Pipeline, labels, seeds, recipe) -> torch.Tensor:
    """Sampling as the formulas have it: the whole model, conditioner included, in every step; one
    pass of the VAE.
    """
    null = pipeline.conditioner.null(len(seeds))
    both = {name: torch.cat([labels[name], null[name]]) for name in labels}

    def denoise(x, sigma):
        if recipe.guidance == 1:
            return pipeline.denoiser(x, sigma, labels)
        conditional, unconditional = pipeline.denoiser(x.repeat(2, 1, 1, 1), sigma, both).chunk(2)
        return unconditional + recipe.guidance * (conditional - unconditional)

    noise = SeededNoise(seeds, (4, 8, 8))
    sigmas = schedule.ladder(recipe.steps, recipe.ladder)
    options = {"eta": recipe.eta, "noise": noise} if recipe.eta else {}
    if recipe.churn:
        options = {"churn": recipe.churn, "noise": noise}
    with torch.no_grad():
        x = noise() * (1 + sigmas[0] ** 2).sqrt().item()
        *_, (x, _) = SAMPLERS[recipe.sampler](denoise, x, sigmas, **options)
        return x / (1 + sigmas[-1] ** 2).sqrt().item()


@pytest.mark.parametrize("recipe", [
    Recipe(guidance=1.0), Recipe(guidance=2.0, steps=6), Recipe("ddim", "leading", 5, 1.5, 1.0),
    Recipe("heun", "karras", 4, 3.0), Recipe("heun", "ays", 4, 3.0, churn=1.5),
])
def test_images_are_those_of_the_plain_form_bit_for_bit(pipeline, labels, recipe):
    z = plain(pipeline, labels, SEEDS, recipe)
    assert torch.equal(last(pipeline.latents(labels, SEEDS, recipe)), z)
    whole = torch.cat(list(pipeline.images(labels, SEEDS, recipe)))
    assert torch.equal(whole, to_uint8(pipeline.vae.decode(z)))
    sliced = torch.cat(list(pipeline.images(labels, SEEDS, recipe, decode_batch=1)))
    assert (whole.int() - sliced.int()).abs().max() <= 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_begins_anywhere_and_does_not_depend_on_the_batch(pipeline, labels, pictures,
                                                                        name):
    recipe = Recipe(name, "trailing", 6, 2.0, strength=0.5, rescale=0.7, scales={"age": 1.0},
                    interval=(0.1, 2.0))
    whole = torch.cat(list(pipeline.images(labels, SEEDS, recipe, origin=pictures)))
    parts = torch.cat(list(pipeline.images(labels, SEEDS, recipe, origin=pictures, batch=2)))
    assert whole.shape == (3, 3, SIZE, SIZE) and (whole.int() - parts.int()).abs().max() <= 1
    assert len(list(pipeline.latents(labels, SEEDS, recipe,
                                     origin=pictures))) == recipe.taken + 1 == 4


def test_a_recipe_is_plain_json_and_names_what_there_is():
    recipe = Recipe("unipc", "karras", 9, 2.0, interval=(0.2, float("inf")),
                    scales={"label": 3, "age": 1}, strength=0.5)
    assert Recipe(**json.loads(json.dumps(asdict(recipe), allow_nan=False))) == recipe
    assert Recipe(**json.loads(json.dumps(asdict(Recipe()), allow_nan=False))) == Recipe()
    hints = get_type_hints(Recipe)
    assert set(get_args(hints["sampler"])) == set(SAMPLERS) and set(
        get_args(hints["ladder"])) == set(LADDERS)
    assert len({Recipe(), Recipe(), recipe}) == 2
    assert recipe.scale(["label", "sex", "age"]) == {"label": 3.0, "sex": 2.0, "age": 1.0}
    assert Recipe(guidance=1.5).scale(["label"]) == 1.5


@pytest.mark.parametrize("knobs, said", [
    ({"guidance": -1.0}, "guidance -1"), ({"guidance": float("nan")}, "guidance nan"),
    ({"steps": 0}, "steps 0"), ({"rescale": 1.5}, "rescale 1.5: 0 to 1"),
    ({"rescale": -0.1}, "rescale -0.1"), ({"strength": 0.0}, "strength 0"),
    ({"strength": 1.1}, "strength 1.1"), ({"strength": float("nan")}, "strength nan"),
    ({"eta": 0.5}, "belongs to the sampler"), ({"eta": 2.0, "sampler": "ddim"}, "eta 2: 0 to 1"),
    ({"churn": 9.0}, "belongs to the sampler heun"),
    ({"churn": -1.0, "sampler": "heun"}, "churn -1: 0 or more"),
    ({"interval": (2.0, 1.0)}, "interval 2 to 1"), ({"interval": (-1.0, 1.0)}, "interval -1"),
    ({"scales": {"age": -2}}, "scale age=-2"), ({"scales": {"age": float("inf")}}, "scale age=inf"),
    ({"sampler": "plms"}, "sampler 'plms': choose one of ddim"),
    ({"interval": (0.0, float("nan"))}, "interval 0 to nan"),
    ({"interval": (1.0,)}, "interval 1: two noise levels"),
    ({"ladder": "cosine"}, "ladder 'cosine': choose one of leading"),
])
def test_nonsense_is_no_recipe(knobs, said):
    with pytest.raises(InputError, match=said):
        Recipe(**knobs)


def test_an_unknown_variable_and_a_strength_without_an_image_are_refused(pipeline, labels):
    with pytest.raises(InputError, match="'agee': the model has no such condition; it has label, "
                       "sex, age; nearest: age"):
        list(pipeline.latents(labels, SEEDS, Recipe(scales={"agee": 2.0})))
    with pytest.raises(InputError, match="strength 0.5 is the share of steps from a real image, "
                       "and there is none"):
        list(pipeline.latents(labels, SEEDS, Recipe(strength=0.5)))


@pytest.mark.parametrize("n", [1, 7, 20, 50])
def test_strength_takes_the_steps_that_diffusers_takes(n):
    pytest.importorskip("sd_peer")
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    class Peer:
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                  steps_offset=1)

    Peer.scheduler.set_timesteps(n)
    for percent in range(1, 101):
        strength = percent / 100
        theirs, steps = StableDiffusionImg2ImgPipeline.get_timesteps(Peer, n, strength, "cpu")
        recipe = Recipe(steps=n, strength=strength)
        assert recipe.taken == steps == len(theirs)
        assert torch.equal(schedule.timesteps(n, "leading")[n - recipe.taken:].long(), theirs)


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.95])
def test_from_an_image_as_diffusers_does_it(strength, monkeypatch, tmp_path):
    """Whole runs on the same random networks: the same latents, strength, seeds, contexts and
    guidance.
    """
    sd = pytest.importorskip("sd_peer")
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    from minidiff.diffusion.public.load import load_sd

    sd.ours(monkeypatch, tmp_path)
    unet, vae, clip = sd.peers("SD 1.x")
    parts = load_sd(sd.write_safetensors(tmp_path / "sd.safetensors",
                                         sd.ldm_state("SD 1.x", unet, vae, clip)), prediction="eps")
    conditioner = Conditioner(VARIABLES, parts.null_context, torch.Generator().manual_seed(0))
    sd.randomise(conditioner.projections, 5)
    model = Model(parts.unet, conditioner).eval().requires_grad_(False)
    ours = Pipeline(Denoiser(model, parts.schedule), conditioner, parts.vae.requires_grad_(False),
                    32)
    labels, null, _ = some_labels(model)
    z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    recipe = Recipe("ddim", "leading", 20, 3.0, strength=strength)
    mine = last(ours.latents(labels, SEEDS, recipe, origin=z))

    peer = StableDiffusionImg2ImgPipeline(vae, None, None, unet, DDIMScheduler(**sd.SCHEDULER),
                                          None, None, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    theirs = peer(image=z, strength=strength, num_inference_steps=20, guidance_scale=3.0,
                  output_type="latent",
                  prompt_embeds=conditioner(labels), negative_prompt_embeds=conditioner(null),
                  generator=[torch.Generator().manual_seed(seed) for seed in SEEDS]).images
    assert sd.relative(mine, theirs) < 1e-5


def test_strength_runs_from_the_reconstruction_to_the_usual_sample(pipeline, labels, pictures):
    z = pipeline.encode(pictures)
    assert torch.equal(z, pipeline.vae.encode(pictures.float() / 127.5 - 1).mean)
    assert torch.equal(pipeline.encode(pictures[:, :1]),
                       pipeline.encode(pictures[:, :1].expand(-1, 3, -1, -1)))
    assert torch.equal(pipeline.encode(z), z)
    strengths = (0.01, 0.1, 0.5, 1)
    made = {s: last(pipeline.latents(labels, SEEDS, Recipe(steps=10, strength=s), origin=pictures))
            for s in strengths}
    assert torch.allclose(made[0.01], z, atol=1e-6)
    far = [(made[s] - z).norm().item() for s in strengths]
    assert far == sorted(far) and far[1] > 0
    assert torch.equal(made[1], last(pipeline.latents(labels, SEEDS, Recipe(steps=10))))
    with pytest.raises(InputError, match=r"images of \(3, 16, 16\): the model takes \(3, 32, 32\)"):
        pipeline.encode(pictures[:, :, :16, :16])
    with pytest.raises(InputError, match=r"latents of \(4, 16, 16\): the model takes \(4, 8, 8\)"):
        pipeline.encode(torch.zeros(1, 4, 16, 16))


MODES = torch.tensor([-1.0, 1.5])


def two_modes(x_in, t, labels):
    """The ideal x0 network of latents whose every number is −1 or 1.5, give or take .3: what
    training would find.
    """
    s = schedule.sigma(t.double().cpu()).float().view(-1, 1, 1, 1)
    x, variance = x_in * (1 + s**2).sqrt(), 0.3**2 + s**2
    weights = torch.stack([-(x - m) ** 2 / (2 * variance) for m in MODES]).softmax(0)
    return sum(w * (m + 0.3**2 / variance * (x - m)) for w, m in zip(weights, MODES))


def test_inversion_and_ddim_bring_the_latents_back(pipeline):
    ideal = replace(pipeline, denoiser=Denoiser(two_modes, schedule, "x0"))
    g = torch.Generator().manual_seed(6)
    z = MODES[torch.randint(0, 2, (40, 4, 8, 8), generator=g)] + 0.3 * torch.randn(40, 4, 8, 8,
                                                                                   generator=g)
    labels = {name: value[:1].expand(40) for name, value in LABELS.items()}
    ideal = replace(ideal, conditioner=Conditioner(VARIABLES, torch.zeros(2, 16), g))
    errors = {}
    for n in (10, 40, 160, 640):
        recipe = Recipe("ddim", "logsigma", n, 1.0)
        noise = ideal.invert(z, labels, recipe)
        errors[n] = last(ideal.latents(labels, range(40), recipe,
                                       noise=noise)).sub(z).norm().item() / z.norm().item()
    assert errors[10] > 2 * errors[40] > 4 * errors[160] > 8 * errors[640] and errors[
        640] < 0.01, errors
    assert noise.std().item() == pytest.approx(1, abs=0.05) and abs(noise.mean().item()) < 0.1
    half = Recipe("ddim", "logsigma", 160, 1.0, strength=0.5)
    back = last(ideal.latents(labels, range(40), half, noise=ideal.invert(z, labels, half)))
    assert (back - z).norm() / z.norm() < errors[160] * 1.01


def test_inversion_through_a_network_and_the_vae(pipeline, labels, pictures):
    """As x0, for a random network that is taken for eps or v is no denoiser: its ODE is too stiff
    to go back on.
    """
    pipeline = replace(pipeline, denoiser=Denoiser(pipeline.denoiser.net, schedule, "x0"))
    z, errors = pipeline.encode(pictures), []
    for n in (8, 32, 128):
        recipe = Recipe("ddim", "logsigma", n, 1.0)
        # there is none on the way up
        noise = pipeline.invert(pictures, labels, replace(recipe, guidance=3.0))
        errors.append((last(pipeline.latents(labels, SEEDS, recipe, noise=noise))
                       - z).norm().item() / z.norm().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.6, errors


def test_autocast_is_the_networks_alone(pipeline, labels):
    seen = {"unet": [], "vae": []}
    lower = replace(pipeline, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    hooks = [pipeline.denoiser.net.unet.conv_in.register_forward_hook(
        lambda m, i, o: seen["unet"].append(o.dtype)),
             pipeline.vae.decoder.conv_in.register_forward_hook(lambda m, i,
                                                                o: seen["vae"].append(o.dtype))]
    try:
        for z in lower.latents(labels, SEEDS, Recipe(steps=3, guidance=2.0)):
            assert not torch.is_autocast_enabled("cpu") and z.dtype == torch.float32
        list(lower.images(labels, SEEDS, Recipe(steps=3, guidance=1.0)))
    finally:
        for hook in hooks:
            hook.remove()
    assert set(seen["unet"]) == {torch.bfloat16} and set(seen["vae"]) == {torch.float32}
    full = last(pipeline.latents(labels, SEEDS, Recipe(steps=3, guidance=2.0)))
    assert 0 < (z - full).norm() / full.norm() < 0.05


def test_a_run_computes_each_context_once_and_decodes_in_slices(pipeline, labels):
    contexts, slices = [], []
    hooks = [pipeline.conditioner.register_forward_hook(lambda m, i, o: contexts.append(len(o))),
             pipeline.vae.decoder.register_forward_hook(lambda m, i, o: slices.append(len(o)))]
    try:
        list(pipeline.latents(labels, SEEDS, Recipe(steps=7, guidance=1.0)))
        assert contexts == [3]
        many = {name: value.repeat(7) for name, value in labels.items()}
        made = torch.cat(list(pipeline.images(many, range(21), PLAIN, batch=20)))
        assert slices == [8, 8, 4, 1] and len(made) == 21
    finally:
        for hook in hooks:
            hook.remove()


def test_a_weaker_model_guides(pipeline, labels):
    weaker = replace(pipeline, against=Denoiser(lambda x, t,
                                                y: 0.9 * pipeline.denoiser.net(x, t, y), schedule))
    a, b = (last(p.latents(labels, SEEDS, Recipe(steps=4, guidance=1.5)))
            for p in (weaker, pipeline))
    assert a.isfinite().all() and not torch.allclose(a, b)
    same = pipeline.guided_by(pipeline)
    assert torch.equal(last(same.latents(labels, SEEDS, Recipe(steps=4, guidance=3.0))),
                       last(pipeline.latents(labels, SEEDS, Recipe(steps=4, guidance=1.0))))


def test_a_weaker_model_of_other_conditions_or_latents_is_refused(pipeline):
    other = Conditioner([replace(VARIABLES[0], values=("x", "y")), *VARIABLES[1:]],
                        pipeline.conditioner.null_context, torch.Generator())
    with pytest.raises(InputError, match="same conditions and values: .*'x', 'y'"):
        pipeline.guided_by(replace(pipeline, conditioner=other))
    with pytest.raises(InputError, match="its VAE is another one"):
        pipeline.guided_by(replace(pipeline, vae=vaes.VAE(vaes.TINY, 0.7)))


def test_the_arrows_of_a_run(pipeline, labels):
    arrows = []
    list(pipeline.latents(labels, SEEDS, Recipe(steps=5, guidance=2.0, interval=(0.05, 5.0)),
                          arrows=arrows))
    assert [sigma
            for sigma, _ in arrows] == pytest.approx(schedule.ladder(5, "logsigma")[:-1].tolist())
    assert [bool(norm.any()) for _, norm in arrows] == [0.05 < sigma <= 5 for sigma, _ in arrows]
    assert all(norm.shape == (3,) for _, norm in arrows)


def test_non_finite_images_are_named_or_end_the_run(pipeline, labels):
    bad = (4, 11)  # by their seeds: the network is told by its input alone
    many = {name: value.repeat(4) for name, value in labels.items()}
    noise = SeededNoise(range(12), (4, 8, 8))()
    noise[list(bad)] = float("nan")
    with pytest.raises(TrainingFault, match="non-finite pixels"):
        list(pipeline.images(many, range(12), PLAIN, noise=noise))
    rejects, seen = [], []
    for made in pipeline.images(many, range(12), PLAIN, noise=noise, batch=10,
                                decode_batch=3, rejects=rejects):
        seen.append(list(rejects))
        assert made.dtype == torch.uint8
    assert seen == [[4], [4, 11]]
    whole = torch.cat(list(pipeline.images(many, range(12), PLAIN, rejects=(none := []))))
    kept = torch.cat(list(pipeline.images(many, range(12), PLAIN, noise=noise,
                                          rejects=[])))
    good = [i for i in range(12) if i not in bad]
    assert not none and torch.equal(whole[good], kept[good])


def test_a_last_batch_is_filled_up_to_one_shape(pipeline, labels):
    """What is added is thrown away: 7 images by 5 are those of 10 whose last three repeat the
    seventh.
    """
    shapes, many = [], {name: value.repeat(3)[:7] for name, value in labels.items()}
    filled, told, rejects = replace(pipeline, fill=True), [], []
    hook = pipeline.denoiser.net.unet.register_forward_pre_hook(
        lambda m, given: shapes.append(len(given[0])))
    try:
        parts = list(filled.images(many, range(7), PLAIN, batch=5, progress=told.append,
                                   rejects=rejects))
    finally:
        hook.remove()
    assert set(shapes) == {5} and [len(part) for part in parts] == [5, 2] and not rejects
    assert sum(told) == 7 * (PLAIN.taken + 1)  # progress counts the images that are kept
    whole = {name: torch.cat([value, value[-1:].expand(3)]) for name, value in many.items()}
    expected = torch.cat(list(pipeline.images(whole, [*range(7), 6, 6, 6], PLAIN, batch=5)))
    assert torch.equal(torch.cat(parts)[:5], expected[:5])
    # the VAE decodes two images alone, or with the three that are thrown away
    assert (torch.cat(parts).int() - expected[:7].int()).abs().max() <= 1
    assert len(list(pipeline.images(many, range(7), PLAIN, batch=5))[1]) == 2
    noise = SeededNoise(range(7), (4, 8, 8))()
    noise[6] = float("nan")
    list(filled.images(many, range(7), PLAIN, batch=5, noise=noise, rejects=rejects))
    assert rejects == [6]  # once, not again for each that is thrown away


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_weights_make_nearly_the_same_images(pipeline, labels, dtype):
    """The UNet's weights alone, or the conditioner's too: the context is what it was but for
    rounding.
    """
    recipe = Recipe(steps=3, guidance=2.0)
    full = last(pipeline.latents(labels, SEEDS, recipe))
    for whole in (False, True):
        model = copy.deepcopy(pipeline.denoiser.net)
        (model if whole else model.unet).to(dtype)
        lower = replace(pipeline, denoiser=replace(pipeline.denoiser, net=model),
                        conditioner=model.conditioner)
        z = last(lower.latents(labels, SEEDS, recipe))
        assert z.dtype == torch.float32 and 0 < (z - full).norm() / full.norm() < 0.05
        context, expected = (p.conditioner(labels) for p in (lower, pipeline))
        assert context.dtype == (dtype if whole else torch.float32)
        assert (context - expected).norm() / expected.norm() < 0.01
