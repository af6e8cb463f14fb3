"""load_sd against diffusers and transformers at tiny shapes: every dialect and every choice."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from minidiff import variables as var
from minidiff.diffusion.clip import EOS, empty_prompt
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.model import Model
from minidiff.diffusion.public import __main__ as public
from minidiff.diffusion.public import load
from minidiff.diffusion.public.load import load_sd
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError

sd = pytest.importorskip("sd_peer")
SD1, SD2 = "SD 1.x", "SD 2.x"


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch, tmp_path):
    sd.ours(monkeypatch, tmp_path)


def folder(root, nets, **options):
    return sd.write_folder(root / "folder", *nets, **options)


def old_names(rank):
    def write(root, nets, version):
        path = folder(root, nets)
        sd.old_vae_names(path / "vae", rank)
        return path
    return write


def no_text_model(root, nets, version):
    path = folder(root, nets)
    file = path / "text_encoder" / "model.safetensors"
    state = {name.removeprefix("text_model."): t for name, t in load_file(file).items()}
    sd.write_safetensors(file, state)
    return path


def with_text_model(root, nets, version):
    path = no_text_model(root, nets, version)
    file = path / "text_encoder" / "model.safetensors"
    state = {"text_model." + name: t for name, t in load_file(file).items()}
    sd.write_safetensors(file,
                         {**state, "text_model.embeddings.position_ids": torch.arange(77)[None]})
    return path


def torch_bin(root, nets, version):
    path = folder(root, nets)
    for part in ("unet", "vae", "text_encoder"):
        file = next((path / part).glob("*.safetensors"))
        torch.save(load_file(file),
                   file.with_name(f"{'pytorch_' * (part[0] == 't')}{file.stem}.bin"))
        file.unlink()
    return path


def ldm(kind, dtype=torch.float32, **options):
    def write(root, nets, version):
        state = {k: t.to(dtype) if t.is_floating_point()
                 else t for k, t in sd.ldm_state(version, *nets).items()}
        path = root / f"model.{kind}"
        return sd.write_ckpt(path, state,
                             **options) if kind == "ckpt" else sd.write_safetensors(path, state)
    return write


DIALECTS = {
    "ldm ckpt": ldm("ckpt"), "ldm ckpt legacy": ldm("ckpt", legacy=True),
    "ldm ckpt fp16": ldm("ckpt", torch.float16), "ldm safetensors": ldm("safetensors"),
    "ldm safetensors fp16": ldm("safetensors", torch.float16),
    "ldm safetensors bf16": ldm("safetensors", torch.bfloat16),
    "folder": lambda root, nets, version: folder(root, nets), "folder sharded": lambda root, nets,
    version: folder(root, nets, max_shard_size="3MB"), "folder fp16": lambda root, nets,
    version: folder(root, sd.rounded(version, torch.float16), variant="fp16"),
    "folder old VAE": old_names(2), "folder old VAE 4-D": old_names(4),
    "folder text_model": with_text_model,
    "folder no text_model": no_text_model, "folder bin": torch_bin,
}


def parts_and_peers(dialect, version, tmp_path):
    """What load_sd makes of a file in this dialect, and the peers with the same weights; all in
    float64.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dialect.split()[-1])
    through = (dtype, torch.float32) if dtype else ()
    path = DIALECTS[dialect](tmp_path, sd.rounded(version, *through), version)
    parts = load_sd(path, prediction="eps")
    parts.unet.double(), parts.vae.double()
    return parts, sd.rounded(version, *through, torch.float64)


def inputs(parts):
    generator = torch.Generator().manual_seed(9)
    x, context, images = (torch.randn(shape, generator=generator, dtype=torch.float64)
                          for shape in ((2, 4, 8, 8), (2, 77, parts.unet.config.context_dim),
                                        (2, 3, 32, 32)))
    return x, torch.tensor([3.0, 999.0]), context, images.tanh()


@torch.no_grad()
def distances(parts, peers) -> dict[str, float]:
    x, t, context, images = inputs(parts)
    moments, theirs = parts.vae.encode(images), peers[1].encode(images).latent_dist
    return {
        "unet": sd.relative(parts.unet(x, t, context), peers[0](x, t, context).sample),
        "encode": sd.relative(moments.mean, theirs.mean * 0.18215),
        "std": sd.relative(moments.std, theirs.std * 0.18215),
        "decode": sd.relative(parts.vae.decode(x), peers[1].decode(x / 0.18215).sample),
    }


@pytest.mark.parametrize("version", [SD1, SD2])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_parity_in_every_dialect(dialect, version, tmp_path):
    parts, peers = parts_and_peers(dialect, version, tmp_path)
    found = distances(parts, peers)
    tokens = empty_prompt(EOS if version == SD1 else 0)[None]
    found["context"] = sd.relative(parts.null_context, peers[2](tokens).last_hidden_state[0])
    assert max(v for k, v in found.items() if k != "context") <= 1e-7, found
    assert found["context"] <= 2e-6, found          # the tower is run in float32
    c = parts.certificate
    assert c.version == version and c.dialect == dialect.split()[0].replace("ldm", "LDM").replace(
        "folder", "diffusers")
    assert c.parts["UNet"].tensors == len(peers[0].state_dict()) and c.parts["VAE"].tensors == len(
        peers[1].state_dict())
    assert c.alphas_cumprod == pytest.approx((0.99915, 0.0046601), abs=1e-7)
    assert all(len(f["sha256"]) == 64 and f["known"] is None for f in c.files)
    assert json.loads(json.dumps(c.json()))["parts"]["UNet"]["parameters"] == sum(
        p.numel() for p in peers[0].parameters())
    assert "each accounted for once" in c.text()


def with_ema(state: dict, shift: float = 1.0) -> dict:
    """Add the average as LitEma keeps it: names without dots, and two counters."""
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): t + shift
           for k, t in state.items() if k.startswith("model.diffusion_model.")}
    counters = {"model_ema.decay": torch.tensor(0.9999),
                "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return {**state, **ema, **counters}


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_the_average_is_taken_when_there_choosable_and_reported(tmp_path, kind):
    nets = sd.originals(SD1)
    write = sd.write_ckpt if kind == "ckpt" else sd.write_safetensors
    path = write(tmp_path / f"m.{kind}", with_ema(sd.ldm_state(SD1, *nets)))
    plain = write(tmp_path / f"plain.{kind}", sd.ldm_state(SD1, *nets))
    live = nets[0].conv_in.bias
    choices = ("auto", live + 1, "taken"), ("yes", live + 1, "taken"), ("no", live,
                                                                        "in the file, not taken")
    for ema, expected, reported in choices:
        parts = load_sd(path, prediction="eps", ema=ema)
        assert torch.equal(parts.unet.conv_in.bias, expected) and parts.certificate.ema == reported
        assert parts.certificate.source_tensors == len(with_ema(sd.ldm_state(SD1, *nets)))
    assert load_sd(plain, prediction="eps").certificate.ema == "none in the file"
    with pytest.raises(InputError, match="no EMA"):
        load_sd(plain, prediction="eps", ema="yes")
    state = with_ema(sd.ldm_state(SD1, *nets))
    del state["model_ema.diffusion_modelinput_blocks00bias"]
    with pytest.raises(InputError, match="1 missing: model_ema.diffusion_modelinput_blocks00bias"):
        load_sd(write(tmp_path / f"half.{kind}", state), prediction="eps")


def test_prediction_is_never_guessed(tmp_path, monkeypatch):
    nets = sd.originals(SD2)
    file = sd.write_safetensors(tmp_path / "m.safetensors", sd.ldm_state(SD2, *nets))
    with pytest.raises(InputError, match="cannot be told from the weights; give --prediction"):
        load_sd(file)
    assert load_sd(file, prediction="v").certificate.prediction_from == "--prediction"
    monkeypatch.setitem(load.KNOWN, load.cached_sha256(file), ("v2-1.ckpt", SD2, "v"))
    parts = load_sd(file)
    assert parts.prediction == "v"
    assert parts.certificate.prediction_from == "the known hash of v2-1.ckpt"
    assert parts.certificate.files[0]["known"] == "v2-1.ckpt"
    with pytest.raises(InputError, match="--prediction eps contradicts"):
        load_sd(file, prediction="eps")
    described = sd.write_folder(tmp_path / "v", *nets, prediction="v_prediction")
    assert load_sd(described).prediction == "v"
    silent = sd.write_folder(tmp_path / "silent", *nets, prediction=None)
    with pytest.raises(InputError, match="cannot be told"):
        load_sd(silent)
    old = sd.write_folder(tmp_path / "old", *sd.originals(SD1), prediction=None)
    assert load_sd(old).prediction == "eps"  # SD 1.x folders of 2022 name none, which means eps


def test_null_context_is_the_towers_or_asked_for(tmp_path):
    state = sd.ldm_state(SD1, *sd.originals(SD1))
    bare = {k: t for k, t in state.items() if not k.startswith("cond_stage_model.")}
    file = sd.write_safetensors(tmp_path / "m.safetensors", bare)
    with pytest.raises(InputError, match="no text tower"):
        load_sd(file, prediction="eps")
    parts = load_sd(file, prediction="eps", null_context="zeros")
    assert not parts.null_context.any() and parts.null_context.shape == (77, 48)
    own = sd.write_safetensors(tmp_path / "contexts.safetensors", {"null": torch.ones(77, 48)})
    assert load_sd(file, prediction="eps", null_context=str(own)).null_context.all()


@pytest.mark.parametrize("form", ["ldm", "ldm prefixed", "ckpt with losses", "diffusers file",
                                  "old diffusers file", "folder"])
def test_another_vae_on_top(tmp_path, form):
    nets = sd.originals(SD1)
    model = sd.write_safetensors(tmp_path / "m.safetensors", sd.ldm_state(SD1, *nets))
    other = sd.make_vae(sd.TINY["vae"], seed=77)
    path = tmp_path / "vae.safetensors"
    if form == "ckpt with losses":
        extra = {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0": torch.zeros(3)}
        sd.write_ckpt(path, {**sd.ldm_vae(other.state_dict(), 3, ""), **extra})
    elif "diffusers" in form or form == "folder":
        other.save_pretrained(tmp_path / "vae")
        if form == "old diffusers file":
            sd.old_vae_names(tmp_path / "vae")
        path = tmp_path / "vae" / ("" if form == "folder"
                                   else "diffusion_pytorch_model.safetensors")
    else:
        sd.write_safetensors(path, sd.ldm_vae(other.state_dict(), 3,
                                              "first_stage_model." if "pre" in form else ""))
    parts = load_sd(model, prediction="eps", vae=path)
    assert torch.equal(parts.vae.decoder.mid_block.attentions[0].to_k.weight,
                       other.decoder.mid_block.attentions[0].to_k.weight)
    assert parts.certificate.not_used["the model's own VAE: another is put on top"] == 200
    if form != "folder":
        with pytest.raises(InputError, match="only a VAE|no Stable Diffusion UNet"):
            load_sd(path, prediction="eps")


def test_the_schedule_comes_from_the_file(tmp_path):
    state = sd.ldm_state(SD1, *sd.originals(SD1))
    usual = load_sd(sd.write_safetensors(tmp_path / "a.safetensors", state),
                    prediction="eps").schedule
    assert torch.equal(usual.alphas_cumprod, Schedule.scaled_linear().alphas_cumprod)
    betas = torch.linspace(1e-4, 0.02, 1000)
    state["alphas_cumprod"] = (1 - betas).cumprod(0)
    parts = load_sd(sd.write_safetensors(tmp_path / "b.safetensors", state), prediction="eps")
    assert torch.equal(parts.schedule.alphas_cumprod.float(), state["alphas_cumprod"])
    assert "not the usual" in parts.certificate.schedule_from
    for bad, message in ((state["alphas_cumprod"].half(), "too coarse"),
                         (torch.zeros(1000), "does not fall")):
        with pytest.raises(InputError, match=message):
            load_sd(sd.write_safetensors(tmp_path / "c.safetensors",
                                         {**state, "alphas_cumprod": bad}), prediction="eps")


VARIABLES = [var.Category("label", ("covid", "healthy")), var.Number("age", 50.0, 15.0, 20.0, 90.0)]


def test_step_0_is_the_public_model_bit_for_bit_and_every_part_then_learns(tmp_path):
    nets = sd.originals(SD1)
    parts = load_sd(sd.write_safetensors(tmp_path / "m.safetensors", sd.ldm_state(SD1, *nets)),
                    prediction="eps")
    model = Model(parts.unet,
                  Conditioner(VARIABLES, parts.null_context, torch.Generator().manual_seed(0)))
    x, t = torch.randn(
        3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 500.0, 999.0])
    labels = {"label": torch.tensor([0, 1, -1]), "age": torch.tensor([30.0, math.nan, -math.inf])}
    with torch.no_grad():
        public_model = parts.unet(x, t, parts.null_context.expand(3, -1, -1))
        assert torch.equal(model(x, t, labels), public_model)
        assert torch.equal(model(x, t, model.conditioner.null(3)), public_model)
    c, optimizer = model.conditioner, torch.optim.SGD(model.conditioner.parameters(), lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        model(x, t, labels).square().mean().backward()
        assert all(p.weight.grad.any() for p in c.projections)
        assert all(bool(p.grad.any()) == (step == 1) for p in c.embeddings.parameters())
        optimizer.step()
    with torch.no_grad():  # null adds nothing, ever
        assert torch.equal(model(x, t, c.null(3)),
                           public_model) and not torch.equal(model(x, t, labels), public_model)
    assert c.embeddings[0].weight.std().item() == pytest.approx(parts.null_context[1:].std().item(),
                                                                rel=0.5)


def test_show_prints_the_certificate(tmp_path, capsys):
    path = sd.write_folder(tmp_path / "f", *sd.originals(SD1))
    public.show(public.ShowConfig(file=str(path)))
    table = capsys.readouterr().out
    assert "494 tensors" in table and "SD 1.x" in table and "each accounted for once" in table
    public.show(public.ShowConfig(file=str(path), json=True))
    assert json.loads(capsys.readouterr().out)["parts"]["VAE"]["tensors"] == 200


def test_loading_leaves_the_file_as_it_is(tmp_path):
    path = sd.write_safetensors(tmp_path / "m.safetensors", sd.ldm_state(SD1, *sd.originals(SD1)))
    before = path.read_bytes()
    parts = load_sd(path, prediction="eps")
    with torch.no_grad():
        for p in (*parts.unet.parameters(), *parts.vae.parameters()):
            p.add_(1.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", [SD1, SD2])
@pytest.mark.parametrize("part", ["all", "lora"])
def test_training_starts_from_a_public_model(version, part, tmp_path, capsys, no_pictures):
    import train
    from minidiff.data import phantom
    from minidiff.diffusion import store

    path = sd.write_safetensors(tmp_path / "m.safetensors",
                                sd.ldm_state(version, *sd.originals(version)))
    phantom.write(tmp_path / "data", n=48, size=32)
    knobs = {"data": (str(tmp_path / "data"),), "init": str(path), "size": 32, "views": 1,
             "batch": 4, "save_every": 2,
             "snapshots": 0, "lr": 1e-4, "device": "cpu", "out": str(tmp_path / "run")}
    with pytest.raises(InputError, match="cannot be told"):
        train.train_diffusion(train.DiffusionConfig(**knobs, steps=2))
    train.train_diffusion(train.DiffusionConfig(**knobs, steps=2, prediction="v", train=part))
    assert "each accounted for once" in capsys.readouterr().out
    pipeline, _ = store.load_pipeline(tmp_path / "run")
    public_parts = load_sd(path, prediction="v")
    assert pipeline.denoiser.prediction == "v" and torch.equal(pipeline.conditioner.null_context,
                                                               public_parts.null_context)
    assert torch.equal(pipeline.vae.quant_conv.weight, public_parts.vae.quant_conv.weight)
    mine, theirs = (dict(unet.named_parameters())
                    for unet in (pipeline.denoiser.net.unet, public_parts.unet))
    moved = {name: sd.relative(mine[name], theirs[name]) for name in theirs}
    adapted = {name for name in theirs
               if (".to_" in name or ".ff.net." in name) and name.endswith("weight")}
    assert {name for name, by in moved.items() if by} == (set(theirs) if part == "all" else adapted)
    assert max(moved.values()) < 1e-2 and pipeline.conditioner.projections[0].weight.any()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts["init"]["files"][0]["sha256"] == public_parts.certificate.files[0]["sha256"]
