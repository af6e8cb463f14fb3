"""Checkpoints as trainings leave them: diffusers' folders, Lightning's files, zero SNR."""

import argparse
import collections
import datetime
import json
import pathlib
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff.diffusion import samplers, store
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Recipe
from minidiff.diffusion.public import __main__ as public
from minidiff.diffusion.public.load import load_sd
from minidiff.diffusion.public.weights import read_weights
from minidiff.diffusion.schedule import ZERO_SNR, Schedule
from minidiff.errors import InputError

sd = pytest.importorskip("sd_peer")
SD1, SD2 = "SD 1.x", "SD 2.x"


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch, tmp_path):
    sd.ours(monkeypatch, tmp_path)


# Text towers.

OPENCLIP, HF = "cond_stage_model.model.", "cond_stage_model.transformer."


@pytest.mark.parametrize("name", [
    HF + "text_model.embeddings.position_ids", HF + "embeddings.position_ids",
    OPENCLIP + "transformer.text_model.embeddings.position_ids"])
@pytest.mark.parametrize("version", [SD1, SD2])
def test_position_ids_under_any_name_are_accounted_for(version, name, tmp_path):
    state = sd.ldm_state(version, *sd.originals(version))
    plain = load_sd(sd.write_safetensors(tmp_path / "a.safetensors", state), prediction="v")
    more = {**state, name: torch.arange(77)[None]}
    found = load_sd(sd.write_safetensors(tmp_path / "b.safetensors", more), prediction="v")
    assert torch.equal(found.null_context, plain.null_context)
    assert found.certificate.source_tensors == len(more)


@pytest.mark.parametrize("unused", [False, True])
def test_sd2_with_the_tower_in_transformers_names(unused, tmp_path):
    """As some trainers write it, also with the last layer, which SD 2.x does not run."""
    nets = sd.originals(SD2)
    state = sd.ldm_state(SD2, *nets)
    expected = load_sd(sd.write_safetensors(tmp_path / "a.safetensors", state), prediction="v")
    state = {n: t for n, t in state.items() if not n.startswith("cond_stage_model.")}
    tower = {HF + "text_model." + n.removeprefix("text_model."): t
             for n, t in nets[2].state_dict().items()}
    if unused:
        tower |= {n.replace("layers.2.", "layers.3."): t + 1 for n, t in tower.items()
                  if "layers.2." in n}
    found = load_sd(sd.write_safetensors(tmp_path / "b.safetensors", state | tower), prediction="v")
    assert torch.equal(found.null_context, expected.null_context)


# Folders of diffusers' training scripts.

def other_unet(version=SD1):
    return sd.make_unet(sd.TINY[version]["unet"], seed=5)


@pytest.fixture
def trained(tmp_path):
    """(the model, checkpoint-500 with unet/, unet_ema/ and what accelerate adds, both UNets)."""
    from diffusers.training_utils import EMAModel

    base = sd.write_folder(tmp_path / "base", *sd.originals(SD1))
    checkpoint, last, average = tmp_path / "out" / "checkpoint-500", other_unet(), other_unet()
    with torch.no_grad():
        average.conv_in.bias += 1
    last.save_pretrained(checkpoint / "unet")
    EMAModel(average.parameters(), model_cls=type(average), model_config=average.config,
             use_ema_warmup=True).save_pretrained(checkpoint / "unet_ema")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (checkpoint / name).write_bytes(b"\x80\x02.")
    return base, checkpoint, last, average


@pytest.mark.parametrize("at, ema, is_average", [
    ("", "auto", True), ("", "yes", True), ("", "no", False), ("unet", "auto", False),
    ("unet_ema", "auto", True), ("unet/diffusion_pytorch_model.safetensors", "auto", False)])
def test_a_checkpoint_of_a_training_is_put_on_its_model(trained, at, ema, is_average):
    base, checkpoint, last, average = trained
    parts = load_sd(base, unet=checkpoint / at, ema=ema)
    assert torch.equal(parts.unet.conv_in.bias, (average if is_average else last).conv_in.bias)
    assert torch.equal(parts.null_context, load_sd(base).null_context)
    c = parts.certificate
    assert c.not_used["the model's own UNet: another is put on top"] == c.parts["UNet"].tensors
    assert c.parts["UNet"].tensors == len(last.state_dict())
    assert c.ema == (("taken" if is_average else "in the folder, not taken") if not at else
                     "as the file has it" if "." in at else "as the folder has it")


def test_a_unet_alone_names_the_way_out(trained, tmp_path):
    base, checkpoint, last, _ = trained
    for path in (checkpoint, checkpoint / "unet"):
        with pytest.raises(InputError, match=rf"holds no VAE.*--unet {path}$"):
            load_sd(path, prediction="eps")
    with pytest.raises(InputError, match="name one of its checkpoint-1000, checkpoint-500"):
        (checkpoint.parent / "checkpoint-1000").mkdir()
        load_sd(checkpoint.parent)
    shutil.rmtree(checkpoint / "unet")
    with pytest.raises(InputError, match=r"unet/config.json is missing"):
        load_sd(base, unet=checkpoint, ema="no")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"")
    for name in (lora, base):
        with pytest.raises(InputError, match="is a LoRA file; .* by --lora"):
            load_sd(name, unet=lora)
    with pytest.raises(InputError, match="'AutoencoderKL', not of a UNet"):
        load_sd(base / "vae")
    with pytest.raises(InputError, match="is a UNet of another architecture"):
        load_sd(sd.write_folder(tmp_path / "sd2", *sd.originals(SD2)), unet=checkpoint)


@pytest.mark.parametrize("form", ["accelerate", "accelerate bin", "LDM", "LDM with EMA", "LDM all"])
def test_weights_without_a_config_take_that_of_the_model(trained, form, tmp_path):
    base, _, last, _ = trained
    path = tmp_path / "weights"
    path.mkdir()
    state, ldm = last.state_dict(), sd.ldm_unet(last.state_dict(), 3)
    if form == "accelerate":
        sd.write_safetensors(path / "model.safetensors", state)
    elif form == "accelerate bin":
        torch.save(state, path / "pytorch_model.bin")
    else:
        path = path / "x.safetensors"
        if form == "LDM with EMA":
            ldm = {n: t + 1 for n, t in ldm.items()} | {
                "model_ema." + n.removeprefix("model.").replace(".", ""): t for n, t in ldm.items()}
        whole = sd.ldm_state(SD1, *sd.originals(SD1)) if form == "LDM all" else {}
        sd.write_safetensors(path, whole | ldm)
    parts = load_sd(base, unet=path)
    assert all(torch.equal(t, state[name]) for name, t in parts.unet.state_dict().items())
    torch.save({"unet.conv_in.weight": torch.ones(3)}, tmp_path / "y.bin")
    with pytest.raises(InputError, match="y.bin: .*missing"):
        load_sd(base, unet=tmp_path / "y.bin")


def test_a_unet_alone_with_a_vae_run_and_a_context(trained, tmp_path, no_pictures):
    import train
    from minidiff.data import phantom

    _, checkpoint, _, average = trained
    phantom.write(tmp_path / "data", n=48, size=32)
    store.save_vae(tmp_path / "vae", load_sd(trained[0]).vae, size=32)
    knobs = {"data": (str(tmp_path / "data"),), "init": str(checkpoint), "steps": 1, "batch": 4,
             "vae": str(tmp_path / "vae"), "snapshots": 0, "lr": 1e-9, "device": "cpu"}
    with pytest.raises(InputError, match="holds no text tower.*--null-context zeros or FILE"):
        train.train_diffusion(train.DiffusionConfig(**knobs, prediction="eps", out=str(
            tmp_path / "x")))
    train.train_diffusion(train.DiffusionConfig(**knobs, prediction="eps", null_context="zeros",
                                                out=str(tmp_path / "run")))
    pipeline, _ = store.load_pipeline(tmp_path / "run")
    assert not pipeline.conditioner.null_context.any()
    assert torch.equal(pipeline.denoiser.net.unet.conv_in.bias, average.conv_in.bias)


def test_a_unet_on_top_may_predict_something_else(trained):
    base, checkpoint, *_ = trained
    assert load_sd(base, unet=checkpoint).prediction == "eps"
    parts = load_sd(base, unet=checkpoint, prediction="v")
    assert parts.prediction == "v" and parts.certificate.prediction_from == "--prediction"


def test_training_begins_at_a_checkpoint_and_a_lora(trained, tmp_path, capsys, no_pictures):
    """The whole way: in by --unet and --lora, out by export --to lora, and in again."""
    import train
    from minidiff.data import phantom
    from minidiff.diffusion import lora
    from minidiff.diffusion.public.lora import read_lora, write_lora

    base, checkpoint, _, average = trained
    phantom.write(tmp_path / "data", n=48, size=32)
    with torch.no_grad():
        weight = average.mid_block.resnets[0].conv1.weight
        given = {"mid_block.resnets.0.conv1": lora.Adapter(0.1 + 0 * weight[:2], torch.ones(
            len(weight), 2), 4.0)}
    write_lora(tmp_path / "given.safetensors", given, "kohya")
    knobs = {"data": (str(tmp_path / "data"),), "init": str(base), "unet": str(checkpoint),
             "lora": (str(tmp_path / "given.safetensors"),), "size": 32, "batch": 4, "steps": 2,
             "save_every": 2, "snapshots": 0, "lr": 1e-3, "device": "cpu", "rank": 2, "alpha": 6.0,
             "out": str(tmp_path / "run")}
    train.train_diffusion(train.DiffusionConfig(**knobs))
    assert "LoRA of 1 layer of the UNet, 1 of them convolutions; rank 2" in capsys.readouterr().out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts["lora"][0]["layers"] == 1 and len(facts["init"]["files"]) == 4
    pipeline, _ = store.load_pipeline(tmp_path / "run")
    begun = average.state_dict()
    begun["mid_block.resnets.0.conv1.weight"] = weight + 0.1 * 2 * 2
    mine = pipeline.denoiser.net.unet.state_dict()
    assert all(torch.allclose(mine[n], begun[n], atol=1e-6) == (not lora.ADAPTED.search(
        n.removesuffix(".weight"))) or n.endswith("bias") for n in begun)
    for to, name in (("lora", "pytorch_lora_weights"), ("lora-kohya", "lora")):
        public.export(public.ExportConfig(run=str(tmp_path / "run"), to=to,
                                          out=str(tmp_path / to)))
        assert f"it goes on {checkpoint} + " in capsys.readouterr().out
        assert (tmp_path / to / "contexts.safetensors").exists()
        file = tmp_path / to / f"{name}.safetensors"
        made = read_lora(file, pipeline.denoiser.net.unet).adapters
        assert len(made) == 10 * 11 and {len(a.down) for a in made.values()} == {2}
        for layer, a in made.items():  # base + adapters is the model that was saved
            assert torch.allclose(a.onto(begun[f"{layer}.weight"]), mine[f"{layer}.weight"],
                                  atol=1e-6)
    public.show(public.ShowConfig(file=str(base), lora=(str(file),), json=True))
    shown = json.loads(capsys.readouterr().out)
    assert shown["lora"][0]["layers"] == 110 and "UNet" in shown["parts"]
    train.train_diffusion(train.DiffusionConfig(**{**knobs, "train": "all", "unet": "", "lora": (),
                                                   "out": str(tmp_path / "all")}))
    with pytest.raises(InputError, match="lora.safetensors is missing: .* not trained by --train"):
        public.export(public.ExportConfig(run=str(tmp_path / "all"), to="lora", out="x"))
    for change, match in (({"init": ""}, "name that by --init"),
                          ({"init": str(tmp_path / "run")}, "--unet .* of a public model"),
                          ({"init": str(tmp_path / "run"), "unet": "", "null_context": "zeros"},
                           "--null-context zeros is part of a public"),
                          ({"init": "", "unet": ""}, "--lora .*--init")):
        with pytest.raises(InputError, match=match):
            train.train_diffusion(train.DiffusionConfig(
                **{**knobs, "vae": str(tmp_path / "run"), "out": str(tmp_path / "x"), **change}))


# Lightning's files.

class Bag(dict):
    """Named in a file as Lightning's own dictionary of hyperparameters is."""


Bag.__module__, Bag.__qualname__ = "lightning_fabric.utilities.data", "AttributeDict"

SETTINGS = {
    "argparse": lambda: argparse.Namespace(lr=1e-4, data=pathlib.Path("x"),
                                           more=[argparse.Namespace(a=1)]),
    "SimpleNamespace": lambda: types.SimpleNamespace(a={"b": 1}),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "AttributeDict": lambda: Bag(a=1, b=Bag(c=2)),
    "times": lambda: [datetime.datetime(2024, 1, 1), datetime.timedelta(1), datetime.date.min],
    "sets": lambda: [frozenset([1]), slice(1, 2), range(3), {1, 2}, torch.__version__],
    "numpy": lambda: [sd.np.ones(3), sd.np.float32(1), sd.np.dtype("int8")],
    "omegaconf": lambda: pytest.importorskip("omegaconf").OmegaConf.create(
        {"a": 1, "b": [1, {"c": "x"}], "d": None, "e": 2.5, "f": True, "g": "${a}"}),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_beside_the_weights_are_passed_over(kind, legacy, tmp_path, monkeypatch):
    for name in ("lightning_fabric", "lightning_fabric.utilities", Bag.__module__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[Bag.__module__].AttributeDict = Bag
    path = sd.write_ckpt(tmp_path / "x.ckpt", {"a": torch.ones(3)}, legacy=legacy,
                         extra={"hyper_parameters": SETTINGS[kind]()})
    assert torch.equal(read_weights(path).tensors["a"], torch.ones(3))


class Own:
    def __init__(self):
        self.a = 1


def test_a_class_of_ones_own_is_refused_with_a_way_out(tmp_path):
    path = sd.write_ckpt(tmp_path / "x.ckpt", {"a": torch.ones(3)}, extra={"config": Own()})
    with pytest.raises(InputError, match=r"test_checkpoints.Own; nothing .* is run, so it is "
                       r"refused: take a .safetensors file .* or save its state_dict alone"):
        read_weights(path)


# Zero terminal SNR.

def with_schedule(root, prediction="v_prediction", **change):
    path = sd.write_folder(root, *sd.originals(SD2), prediction=prediction)
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "timestep_spacing": "trailing",
                                "rescale_betas_zero_snr": True, **change}))
    return path


def test_the_rescaled_schedule_is_that_of_diffusers(tmp_path):
    from diffusers import DDIMScheduler

    path = with_schedule(tmp_path / "f")
    parts = load_sd(path)
    theirs = DDIMScheduler.from_pretrained(path / "scheduler").alphas_cumprod.double()
    mine = parts.schedule.alphas_cumprod
    assert (mine[:-1] - theirs[:-1]).abs().max() < 1e-6 and theirs[-1] == 0
    assert mine[-1] == ZERO_SNR and parts.schedule.sigmas_table[-1].item() == pytest.approx(4096)
    assert "ends at zero SNR" in parts.certificate.text() and parts.prediction == "v"
    state = sd.ldm_state(SD2, *sd.originals(SD2)) | {"alphas_cumprod": theirs.float()}
    state.pop("betas")
    file = sd.write_safetensors(tmp_path / "x.safetensors", state)
    assert load_sd(file, prediction="v").schedule.zero_snr  # an LDM file holds the table itself
    assert "ends at zero SNR" in load_sd(file, prediction="x0").certificate.text()
    for at in (file, with_schedule(tmp_path / "eps", "epsilon")):
        with pytest.raises(InputError, match="zero SNR.* v .*is needed there, not eps"):
            load_sd(at, prediction="eps")


@pytest.mark.parametrize("change", [{"beta_schedule": "linear"}, {"num_train_timesteps": 50},
                                    {"beta_start": 0.001, "beta_end": 0.02}])
def test_any_schedule_may_be_rescaled(tmp_path, change):
    from diffusers import DDIMScheduler

    path = with_schedule(tmp_path / "f", **change)
    theirs = DDIMScheduler.from_pretrained(path / "scheduler").alphas_cumprod.double()
    assert (load_sd(path).schedule.alphas_cumprod - theirs).abs().max() < 1e-5  # theirs is float32


@pytest.mark.parametrize("betas", [[0.9] * 4000, [0.5, 1.0, 0.5], [[0.1]], [0.1]])
def test_a_schedule_that_cannot_be_is_refused(tmp_path, betas):
    path = with_schedule(tmp_path / "f", trained_betas=betas, rescale_betas_zero_snr=False)
    with pytest.raises(InputError, match="scheduler_config.json: its configuration is not possib"):
        load_sd(path)


def test_diffusers_ddim_from_pure_noise(tmp_path):
    """The same latents as diffusers', from a ladder that begins at the last level."""
    from diffusers import DDIMScheduler

    parts, peer = load_sd(with_schedule(tmp_path / "f")), sd.originals(SD2)[0]
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "f" / "scheduler")
    generator = torch.Generator().manual_seed(0)
    noise, context = (torch.randn(shape, generator=generator) for shape in
                      ((1, 4, 8, 8), (1, 77, 40)))
    scheduler.set_timesteps(20)
    ladder = parts.schedule.sigmas(scheduler.timesteps.double())
    assert torch.equal(ladder, parts.schedule.ladder(20, "trailing"))
    denoiser = Denoiser(lambda x, t, labels: parts.unet(x, t, context), parts.schedule, "v")
    with torch.no_grad():
        theirs = noise
        for t in scheduler.timesteps:
            theirs = scheduler.step(peer(theirs, t, context).sample, t, theirs).prev_sample
        *_, (x, _) = samplers.ddim(denoiser, noise * (1 + ladder[0] ** 2).sqrt().item(), ladder)
    mine = x / (1 + ladder[-1] ** 2).sqrt().item()
    assert sd.relative(mine, theirs) < 3e-4


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("ladder", ["trailing", "karras", "logsigma"])
def test_every_sampler_is_finite_there(name, ladder):
    """And exact where the answer is: x0 = 0.5 everywhere, told by v."""
    schedule = Schedule.scaled_linear().to_zero_snr()

    def v(x, t, labels):
        s = schedule.sigma(t.double())[:, None, None, None].float()
        a, b = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
        return (a * (x - a * 0.5) / b) - b * 0.5  # √ᾱ·noise − √(1−ᾱ)·z

    generator = torch.Generator().manual_seed(0)
    sigmas = schedule.ladder(12, ladder)
    x = torch.randn(1, 4, 8, 8, generator=generator) * (1 + sigmas[0] ** 2).sqrt().item()
    options = {"noise": lambda: torch.randn(1, 4, 8, 8, generator=generator)} if (
        name in samplers.NOISY) else {}
    *_, (_, denoised) = samplers.SAMPLERS[name](Denoiser(v, schedule, "v"), x, sigmas, **options)
    assert (denoised - 0.5).abs().max() < 1e-2


@pytest.mark.parametrize("to", ["ldm", "diffusers"])
def test_it_is_exported_as_what_it_is(to, tmp_path):
    from diffusers import DDIMScheduler
    from test_export import pipeline_of

    from minidiff.diffusion.public.export import export

    parts = load_sd(with_schedule(tmp_path / "f"))
    pipeline = pipeline_of(parts.unet, parts.vae, parts.null_context, "v", parts.schedule)
    export(pipeline, to, tmp_path / "out")
    path = tmp_path / "out" / ("model.safetensors" if to == "ldm" else "")
    again = load_sd(path, null_context=str(tmp_path / "out" / "contexts.safetensors"))
    assert again.schedule.zero_snr
    assert torch.allclose(again.schedule.alphas_cumprod, parts.schedule.alphas_cumprod, atol=1e-7)
    if to == "diffusers":
        scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
        assert scheduler.alphas_cumprod[-1] == 0
        assert scheduler.config.timestep_spacing == "trailing"


def test_a_ladder_that_wastes_steps_there_is_named(capsys):
    for zero in (True, False):
        usual = Schedule.scaled_linear()
        schedule = usual.to_zero_snr() if zero else usual
        for ladder, named in (("logsigma", zero), ("trailing", False)):
            Recipe(ladder=ladder).require_levels(schedule)
            assert ("--ladder trailing does not" in capsys.readouterr().out) == named


# What lies in the place of a file.

def readers_of_weights(tmp_path):
    from minidiff.classification.predictor import weights_of
    from minidiff.evaluation.features.backbones import read_state

    run = tmp_path / "run"
    run.mkdir()
    vae = {"config": {"channels": [32, 64], "latent_channels": 4}, "scale": 1.0}
    (run / "vae.json").write_text(json.dumps(vae))
    return {"a public file": (tmp_path / "x.safetensors", load_sd),
            "a .ckpt": (tmp_path / "x.ckpt", load_sd),
            "an extractor": (tmp_path / "x.pth", read_state),
            "a classifier": (tmp_path / "resnet18.pth", weights_of),
            "a run": (run / "vae.safetensors", lambda path: store.load_vae(path.parent))}


@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page saved under this name"),
    (b"Entry not found", "text, which begins 'Entry not found'")])
def test_a_page_or_a_pointer_is_named_by_every_reader_of_weights(content, says, tmp_path):
    for path, read in readers_of_weights(tmp_path).values():
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{path}.*; it is .*{says}"):
            read(path)


def test_a_lora_file_in_the_place_of_a_model(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="a LoRA file is not supported.*--lora puts this file on"):
        load_sd(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")


# Names, numbers and places that are nearly right.

@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("form", ["state_dict", "model", "", "shards"])
def test_wrapped_networks_are_unwrapped(wrap, form, tmp_path):
    base = sd.write_folder(tmp_path / "base", *sd.originals(SD1))
    path = base / "unet/diffusion_pytorch_model.safetensors"
    plain, state = load_sd(base).unet.state_dict(), load_file(path)
    state = {wrap + name: tensor for name, tensor in state.items()}
    path.unlink()
    if form == "shards":
        names = [f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        for k, name in enumerate(names):
            save_file({n: t for i, (n, t) in enumerate(state.items()) if i % 2 == k},
                      path.parent / name)
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({
            "weight_map": {n: names[i % 2] for i, n in enumerate(state)}}))
    else:
        torch.save({form: state, "epoch": 3} if form else state, path.with_suffix(".bin"))
    found = load_sd(base).unet.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())


def test_two_networks_in_one_file_are_not_guessed(tmp_path):
    torch.save({"model": {"a": torch.ones(1)}, "average": {"a": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="no tensors by name; it has them in model, average"):
        read_weights(tmp_path / "x.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    base = sd.write_folder(tmp_path / "base", *sd.originals(SD1))
    path = base / "unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "conv_in.bias": load_file(path)["conv_in.bias"] / 0}, path)
    with pytest.raises(InputError, match="conv_in.bias holds other than finite numbers"):
        load_sd(base)


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    base = sd.write_folder(tmp_path / "hub" / "snapshots" / "0abc", *sd.originals(SD1))
    with pytest.raises(InputError, match="name one of its snapshots/0abc"):
        load_sd(tmp_path / "hub")
    path = base / "unet/diffusion_pytorch_model.safetensors"
    path.unlink()
    path.symlink_to("../../../blobs/1f")
    with pytest.raises(InputError, match=f"{path.name} is a link to ../../../blobs/1f, which is"):
        load_sd(base)
    (base / "unet/config.json").write_text("<!doctype html>Log in")
    with pytest.raises(InputError, match="config.json is damaged: .*; it is a web page"):
        load_sd(base)
