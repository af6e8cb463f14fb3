"""A run of ours → LDM file and diffusers folder: equal tensors back, and diffusers' own code makes
our images.
"""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, safe_open

from minidiff import config
from minidiff import variables as var
from minidiff.diffusion import model as models
from minidiff.diffusion import samplers, store
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.guidance import guided
from minidiff.diffusion.model import Model
from minidiff.diffusion.public import __main__ as public
from minidiff.diffusion.public import keys, ldm
from minidiff.diffusion.public.export import export
from minidiff.diffusion.public.load import load_sd
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError

sd = pytest.importorskip("sd_peer")
VARIABLES = [var.Category("label", ("covid", "healthy")), var.Number("age", 50.0, 15.0, 20.0, 90.0)]


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch, tmp_path):
    sd.ours(monkeypatch, tmp_path)


def pipeline_of(unet, vae, null_context, prediction="eps", schedule=None) -> Pipeline:
    """With projections that are no longer zero, as after training."""
    conditioner = Conditioner(VARIABLES, null_context, torch.Generator().manual_seed(0))
    sd.randomise(conditioner.projections, 5)
    model = Model(unet, conditioner).eval().requires_grad_(False)
    denoiser = Denoiser(model, schedule or Schedule.scaled_linear(), prediction)
    return Pipeline(denoiser, conditioner, vae.requires_grad_(False), 32)


def public_pipeline(version, prediction, tmp_path) -> tuple[Pipeline, dict]:
    state = sd.ldm_state(version, *sd.originals(version))
    parts = load_sd(sd.write_safetensors(tmp_path / "public.safetensors", state),
                    prediction=prediction)
    return pipeline_of(parts.unet, parts.vae, parts.null_context, prediction), state


@pytest.mark.parametrize("version", ["SD 1.x", "SD 2.x"])
def test_ldm_to_ours_to_ldm_gives_equal_tensors(version, tmp_path):
    pipeline, state = public_pipeline(version, "v", tmp_path)
    export(pipeline, "ldm", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in state.items():
        if name.startswith((keys.UNET, keys.VAE)):
            assert torch.equal(back.pop(name), tensor), name
    assert set(back) == {"alphas_cumprod", "betas"}
    assert torch.allclose(back["alphas_cumprod"], state["alphas_cumprod"])
    assert torch.allclose(back["betas"], state["betas"], atol=1e-7)
    again = load_sd(tmp_path / "out" / "model.safetensors",
                    null_context=str(tmp_path / "out" / "contexts.safetensors"))
    assert again.prediction == "v" and again.certificate.prediction_from == "the file's own header"
    assert torch.equal(again.null_context, pipeline.conditioner.null_context)


def test_a_hostile_header_is_refused(tmp_path):
    from safetensors.torch import save_file

    for text in ("{", "[]", '{"version": "x", "unet": {"channels": [1]}, "vae": {}}', json.dumps(
        {"version": "x", "unet": {"channels": [10**9] * 4, "attention": [True] * 4,
                                  "context_dim": 8, "heads": 4}, "vae": {"channels": [64, 64]}}),
                 json.dumps({"version": "x",
                             "unet": {"channels": [64, 64], "attention": [True], "context_dim": 8},
                             "vae": {"channels": [64, 64]}})):
        save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"minidiff": text})
        with pytest.raises(InputError, match="x.safetensors"):
            load_sd(tmp_path / "x.safetensors")


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
@pytest.mark.parametrize("config", ["TINY", "SMALL"])
def test_our_own_architectures_and_latent_scale_come_back(to, config, tmp_path):
    unet = sd.randomise(unets.UNet(models.UNETS[config]), 1)
    vae = sd.randomise(vaes.VAE(vaes.TINY, scale=0.7), 2)
    betas = torch.linspace(0.001, 0.02, 500, dtype=torch.float64)
    context = torch.randn(8, unet.config.context_dim, generator=torch.Generator().manual_seed(3))
    pipeline = pipeline_of(unet, vae, context, "x0", Schedule((1 - betas).cumprod(0)))
    export(pipeline, to, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors" if to == "ldm" else tmp_path / "out"
    parts = load_sd(path, null_context=str(tmp_path / "out" / "contexts.safetensors"))
    assert parts.prediction == "x0"
    assert torch.allclose(parts.schedule.alphas_cumprod, pipeline.denoiser.schedule.alphas_cumprod)
    assert parts.unet.config.channels == unet.config.channels
    assert parts.unet.config.attention == unet.config.attention
    assert all(torch.equal(a, b)
               for a, b in zip(parts.unet.state_dict().values(), unet.state_dict().values()))
    assert parts.vae.scale.item() == pytest.approx(0.18215 if to == "ldm" else 0.7)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():  # in an LDM file the scale is folded into the 1×1 convolutions
        image = vae.decode(z)
        assert torch.allclose(parts.vae.decode(z), image, atol=1e-5)
        mine, theirs = vae.encode(image), parts.vae.encode(image)
        assert torch.allclose(mine.mean, theirs.mean,
                              atol=1e-5) and torch.allclose(mine.std, theirs.std, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("version", ["SD 1.x", "SD 2.x"])
def test_diffusers_pipeline_makes_our_images_from_the_contexts(version, prediction, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipeline, _ = public_pipeline(version, prediction, tmp_path)
    rows = [{"label": "covid", "age": "71", "where": ""}, {"label": "", "age": "", "where": ""}]
    export(pipeline, "diffusers", tmp_path / "out", rows)
    contexts = load_file(tmp_path / "out" / "contexts.safetensors")
    assert set(contexts) == {"null", "label=covid", "label=healthy", "row_000000", "row_000001"}
    with safe_open(tmp_path / "out" / "contexts.safetensors", "pt") as file:
        assert json.loads(file.metadata()["rows"])["row_000000"] == {"label": "covid", "age": "71"}

    labels, seeds = var.encode(VARIABLES, [rows[0], rows[1], rows[0]]), [3, 4, 5]
    recipe = Recipe("ddim", "leading", steps=10, guidance=3.0)
    *_, mine = pipeline.latents(labels, seeds, recipe)
    peer = StableDiffusionPipeline.from_pretrained(tmp_path / "out", text_encoder=None,
                                                   tokenizer=None, local_files_only=True)
    peer.set_progress_bar_config(disable=True)
    prompt = torch.stack([contexts[k] for k in ("row_000000", "row_000001", "row_000000")])
    noise = samplers.SeededNoise(seeds, (4, 8, 8))()
    theirs = peer(prompt_embeds=prompt, negative_prompt_embeds=contexts["null"].expand_as(prompt),
                  latents=noise, guidance_scale=3.0, num_inference_steps=10, output_type="latent",
                  height=32, width=32).images
    assert sd.relative(mine, theirs) <= 1e-4
    with torch.no_grad():
        decoded = peer.vae.decode(theirs / peer.vae.config.scaling_factor).sample
        assert (pipeline.vae.decode(mine) - decoded).abs().max() <= 1e-3


@pytest.mark.parametrize("sampler, scheduler, steps",
                         [("ddim", "DDIMScheduler", 50),
                          ("dpmpp_2m", "DPMSolverMultistepScheduler", 20)])
@pytest.mark.parametrize("version, prediction", [("SD 1.x", "eps"), ("SD 2.x", "v")])
def test_whole_trajectories_at_the_public_settings(sampler, scheduler, steps, version, prediction,
                                                   tmp_path):
    """The same explicit timesteps, noise and weights: the end of the trajectory agrees, with
    guidance.
    """
    import diffusers

    pipeline, _ = public_pipeline(version, prediction, tmp_path)
    unet, vae, _ = sd.originals(version)
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    options = {k: v for k, v in sd.SCHEDULER.items()
               if sampler == "ddim" or k.startswith(("beta", "steps", "timestep"))}
    theirs = getattr(diffusers, scheduler)(prediction_type=kind, **options)
    theirs.set_timesteps(steps)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = var.encode(VARIABLES,
                        [{"label": "covid", "age": "30"}, {"label": "healthy", "age": ""}])
    null = pipeline.conditioner.null(2)
    both = torch.cat([pipeline.conditioner(labels), pipeline.conditioner(null)])
    x = noise * theirs.init_noise_sigma
    for t in theirs.timesteps:
        conditional, unconditional = unet(torch.cat([theirs.scale_model_input(x, t)] * 2), t,
                                          both).sample.chunk(2)
        x = theirs.step(unconditional + 2.0 * (conditional - unconditional), t, x).prev_sample

    schedule = pipeline.denoiser.schedule
    end = None if sampler == "ddim" else 0.0  # diffusers' DPM-Solver++ ends at σ = 0
    sigmas = schedule.sigmas(theirs.timesteps.double(), end)
    denoise = guided(pipeline.denoiser, labels, null, 2.0)
    *_, (mine, _) = samplers.SAMPLERS[sampler](denoise, noise * (1 + sigmas[0] ** 2).sqrt().item(),
                                               sigmas)
    mine = mine / (1 + sigmas[-1] ** 2).sqrt().item()
    assert sd.relative(mine, x) <= 1e-3, sd.relative(mine, x)


def test_export_of_a_trained_run_by_its_command(tiny, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    pipeline, _ = store.load_pipeline(tiny / "diffusion")
    category = next(v for v in pipeline.conditioner.variables if isinstance(v, var.Category))
    with open(rows, "w", newline="") as file:
        writer = csv.DictWriter(file, [category.name])
        writer.writeheader(), writer.writerow({category.name: category.values[0]})
    out = tmp_path / "out"
    public.export(public.ExportConfig(run=str(tiny / "diffusion"), to="diffusers", out=str(out),
                                      rows=str(rows)))
    contexts = load_file(out / "contexts.safetensors")
    assert "row_000000" in contexts and contexts[
        "null"].shape == pipeline.conditioner.null_context.shape
    for name in ("unet", "vae", "scheduler", "model_index.json", "conditioner.safetensors",
                 "conditioner.json"):
        assert (out / name).exists()
    assert "prompt_embeds" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists already"):
        public.export(public.ExportConfig(run=str(tiny / "diffusion"), to="ldm", out=str(out)))
    rows.write_text("colour\nred\n")
    with pytest.raises(InputError, match="no such condition: colour"):
        public.export(public.ExportConfig(run=str(tiny / "diffusion"), out=str(tmp_path / "b"),
                                          rows=str(rows)))


@pytest.mark.parametrize("whole", [False, True], ids=["VAE alone", "whole model"])
def test_the_latent_report(tiny, tmp_path, capsys, whole):
    vae = tmp_path / "vae.safetensors"
    unet, decoder, clip = sd.originals("SD 1.x")
    alone = sd.ldm_vae(decoder.state_dict(), 3, "")
    sd.write_safetensors(vae, sd.ldm_state("SD 1.x", unet, decoder, clip) if whole else alone)
    public.latents(public.LatentsConfig(file=str(vae), data=(str(tiny / "data"),), size=32, n=10,
                                        out=str(tmp_path / "out")))
    facts = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert facts["images"] == 10 and facts["scale"] == pytest.approx(ldm.SCALE)
    assert len(facts["mean"]) == len(facts["std"]) == 4
    assert (
        tmp_path / "out" / "reconstructions.png").exists() and "0.18215" in capsys.readouterr().out


@pytest.mark.parametrize("to, file", [("ldm", "model.safetensors"), ("diffusers", ""),
                                      ("diffusers", "vae")])
def test_the_latent_report_of_an_export_of_our_own(tiny, tmp_path, to, file):
    """Its VAE is a smaller one than the public one, with a scale of its own."""
    out = tmp_path / "out"
    public.export(public.ExportConfig(run=str(tiny / "diffusion"), to=to, out=str(out)))
    public.latents(public.LatentsConfig(file=str(out / file), data=(str(tiny / "data"),), size=32,
                                        n=4, out=str(tmp_path / "latents")))
    facts = json.loads((tmp_path / "latents" / "latents.json").read_text())
    vae = store.load_vae(tiny / "diffusion")
    own = ldm.SCALE if to == "ldm" else round(vae.scale.item(), 6)
    assert facts["images"] == 4 and facts["scale"] == pytest.approx(own, abs=1e-6)


def test_the_short_form_of_the_command_line():
    ((run, cfg),) = config.parse(public.VERBS, "show", "", ["show", "m.ckpt", "--json"])
    assert run is public.show and cfg == public.ShowConfig(file="m.ckpt", json=True)
    ((run, cfg),) = config.parse(public.VERBS, "show", "", ["export", "--run", "x", "--out", "y"])
    assert cfg == public.ExportConfig(run="x", out="y")
    with pytest.raises(InputError, match="a b: only one file is allowed"):
        config.parse(public.VERBS, "show", "", ["show", "a", "b"])
