"""LoRA files, in and out: diffusers and peft give the same output, and what is no LoRA is named."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minidiff import config
from minidiff.diffusion import lora
from minidiff.diffusion import unet as unets
from minidiff.diffusion.public import __main__ as public
from minidiff.diffusion.public import keys
from minidiff.diffusion.public.folder import unet_config
from minidiff.diffusion.public.lora import layers_of, read_lora, write_lora
from minidiff.errors import InputError

sd = pytest.importorskip("sd_peer")
SD1, SD2 = "SD 1.x", "SD 2.x"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def ours(peer) -> unets.UNet:
    net = unets.UNet(unet_config(dict(peer.config)))
    net.load_state_dict(peer.state_dict())
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=[SD1, SD2])
def nets(request):
    """diffusers' UNet, ours with the same weights, and inputs; to be read only."""
    peer = sd.originals(request.param)[0]
    generator = torch.Generator().manual_seed(9)
    x, context = (torch.randn(shape, generator=generator)
                  for shape in ((2, 4, 8, 8), (2, 77, peer.config.cross_attention_dim)))
    return peer, ours(peer), (x, torch.tensor([3.0, 900.0]), context)


def adapters(net: nn.Module, every: bool = True, seed: int = 0) -> dict[str, lora.Adapter]:
    """Random ones on all layers, or on those that training adapts, of unlike ranks and α."""
    generator, made = torch.Generator().manual_seed(seed), {}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and (every or lora.ADAPTED.search(name)):
            out, *inside = layer.weight.shape
            rank = 1 + len(made) % 3
            down, up = (0.1 * torch.randn(shape, generator=generator)
                        for shape in ((rank, *inside), (out, rank)))
            made[name] = lora.Adapter(down, up, 1.0 + len(made) % 4)
    return made


@torch.no_grad()
def output(net, inputs, path=None):
    """Of our UNet, with the LoRA file on it."""
    if path is not None:
        net = copy.deepcopy(net)
        lora.put_on(net, read_lora(path, net).adapters)
    return net(*inputs)


def equal(a: dict[str, lora.Adapter], b: dict[str, lora.Adapter]) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[n].scale * a[n].up @ a[n].down.flatten(1),
                       b[n].scale * b[n].up @ b[n].down.flatten(1), atol=1e-7) for n in a)


# Both directions, with the peers.

def peers_pipeline(unet):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), feature_extractor=None,
        requires_safety_checker=False)


@pytest.mark.parametrize("every", [True, False], ids=["all layers", "those trained here"])
@pytest.mark.parametrize("form, name", [("diffusers", "pytorch_lora_weights.safetensors"),
                                        ("kohya", "any.safetensors")])
def test_diffusers_loads_what_is_written(nets, form, name, every, tmp_path):
    pytest.importorskip("peft")
    peer, net, inputs = nets
    write_lora(tmp_path / name, adapters(net, every), form)
    pipeline = peers_pipeline(copy.deepcopy(peer))
    pipeline.load_lora_weights(str(tmp_path), weight_name=name)
    with torch.no_grad():
        theirs = pipeline.unet(*inputs).sample
        assert sd.relative(theirs, peer(*inputs).sample) > 0.1
    assert sd.relative(output(net, inputs, tmp_path / name), theirs) < 3e-6


@pytest.mark.parametrize("settings", [
    {"lora_alpha": 8}, {"lora_alpha": 2, "use_rslora": True},
    {"lora_alpha": 4, "rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 7}}])
@pytest.mark.parametrize("writer", ["diffusers", "diffusers, older names", "peft"])
def test_what_diffusers_and_peft_write_is_loaded(nets, writer, settings, tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    peer, net, inputs = nets
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    if writer != "diffusers, older names":  # which knew attention alone
        targets += ["conv1", "proj_in", "ff.net.2"]
    described = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets, **settings)
    torch.manual_seed(0)
    if writer == "peft":
        trained = peft.get_peft_model(copy.deepcopy(peer), described)
        trained.save_pretrained(tmp_path)
    else:
        trained = copy.deepcopy(peer)
        trained.add_adapter(described)
        state = peft.utils.get_peft_model_state_dict(trained)
        if "older" in writer:
            state = convert_state_dict_to_diffusers(state)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=state,
            unet_lora_adapter_metadata=trained.peft_config["default"].to_dict())
    with torch.no_grad():
        theirs = trained(*inputs).sample
    assert sd.relative(output(net, inputs, tmp_path), theirs) < 3e-6 < 0.1 < sd.relative(
        net(*inputs), theirs)


def test_diffusers_reads_kohyas_names_as_we_do(nets):
    """Without peft: its own conversion of our kohya names gives our layers."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    net = nets[1]
    state = {}
    for layer in (n for n in layers_of(net).values() if lora.ADAPTED.search(n)):
        flat = "lora_unet_" + layer.replace(".", "_")
        state |= {f"{flat}.lora_down.weight": torch.zeros(1), f"{flat}.lora_up.weight":
                  torch.zeros(1), f"{flat}.alpha": torch.tensor(1.0)}
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(state)
    names = {name.replace("to_out_lora", "to_out.0.lora").replace("_lora.", ".lora.")
             .replace(".processor.", ".").removeprefix("unet.").partition(".lora")[0]
             for name in theirs}
    assert names == {n for n in layers_of(net).values() if lora.ADAPTED.search(n)}


# Forms, by the rule itself.

def renamed(made: dict[str, lora.Adapter], name) -> dict[str, torch.Tensor]:
    """name(layer, role) for every tensor; α in U."""
    return {name(layer, role): t for layer, a in made.items()
            for role, t in (("down", a.down), ("up", a.up * a.scale))}


AB = {"down": "A", "up": "B"}
FORMS = {
    "peft's names": lambda n, role: f"{n}.lora_{AB[role]}.weight",
    "with the adapter's name": lambda n, role: f"unet.{n}.lora_{AB[role]}.default.weight",
    "diffusers 0.2x": lambda n, role: f"unet.{n}.lora.{role}.weight",
    "attention processors": lambda n, role: (
        f"unet.{n.replace('attn1.', 'attn1.processor.').replace('attn2.', 'attn2.processor.')}"
        f"_lora.{role}.weight".replace("to_out.0_lora", "to_out_lora")),
    "attention processors alone": lambda n, role: (
        f"{n.replace('attn1.', 'attn1.processor.').replace('attn2.', 'attn2.processor.')}"
        f"_lora.{role}.weight".replace("to_out.0_lora", "to_out_lora")),
    "LyCORIS": lambda n, role: f"lycoris_{n.replace('.', '_')}.lora_{role}.weight",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_adapters(nets, form, tmp_path):
    net = nets[1]
    made = {n: a for n, a in adapters(net, every=False).items()
            if "processors" not in form or ".attn" in n}
    save_file(renamed(made, FORMS[form]), tmp_path / "x.safetensors")
    assert equal(read_lora(tmp_path / "x.safetensors", net).adapters, made)
    torch.save(renamed(made, FORMS[form]), tmp_path / "pytorch_lora_weights.bin")
    assert equal(read_lora(tmp_path, net).adapters, made)  # a folder of diffusers


@pytest.mark.parametrize("begins", ["lora_unet_", "diffusion_model.", "model.diffusion_model."])
def test_ldm_names_of_all_layers(nets, begins, tmp_path):
    net = nets[1]
    made, ldm = adapters(net), keys.unet_to_ldm(net.state_dict())

    def name(layer, role):
        there = ldm[f"{layer}.weight"].removesuffix(".weight")
        there = there.replace(".", "_") if begins == "lora_unet_" else there
        return f"{begins}{there}.lora_{role}.weight"

    save_file(renamed(made, name), tmp_path / "x.safetensors")
    assert equal(read_lora(tmp_path / "x.safetensors", net).adapters, made)


def test_no_two_layers_have_one_name():
    for shape in (unets.SD15, unets.SD21, unets.TINY, unets.SMALL):
        with torch.device("meta"):
            net = unets.UNet(shape)
        n = sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in net.modules())
        table = layers_of(net)
        assert len(set(table.values())) == n and n <= len(table) <= 2 * n
        ldm = keys.unet_to_ldm(net.state_dict())
        for name in set(table.values()):  # conv_in is also …; each name leads to its own layer
            assert table[name.replace(".", "_")] == name
            there = ldm[f"{name}.weight"].removesuffix(".weight")
            assert table[there.replace(".", "_")] == name


def one(net, layer=f"{BLOCK}.attn1.to_q", rank=2, seed=0) -> dict[str, torch.Tensor]:
    """A file's tensors in kohya's form, of one layer."""
    out, *inside = net.get_submodule(layer).weight.shape
    generator, flat = torch.Generator().manual_seed(seed), "lora_unet_" + layer.replace(".", "_")
    extra = (1,) * len(inside[1:])
    return {f"{flat}.lora_down.weight": torch.randn(rank, *inside, generator=generator),
            f"{flat}.lora_up.weight": torch.randn(out, rank, *extra, generator=generator),
            f"{flat}.alpha": torch.tensor(4.0)}


@torch.no_grad()
def moved(net, path, layer) -> torch.Tensor:
    after = copy.deepcopy(net)
    lora.put_on(after, read_lora(path, net).adapters)
    return after.get_submodule(layer).weight - net.get_submodule(layer).weight


def test_alpha_rank_and_convolutions_by_hand(nets, tmp_path):
    net, path, layer = nets[1], tmp_path / "x.safetensors", "down_blocks.0.resnets.0.conv1"
    state = one(net, layer, rank=2)
    (_, down), (_, up), (alpha, _) = state.items()
    save_file(state, path)
    product = torch.einsum("or,rikl->oikl", up.flatten(1), down)
    assert torch.allclose(moved(net, path, layer), 2 * product, atol=1e-5)
    del state[alpha]  # none: the rank
    save_file(state, path)
    assert torch.allclose(moved(net, path, layer), product, atol=1e-5)
    # a convolution between the two
    stem, d = alpha.removesuffix(".alpha"), down[:, :, 0, 0].contiguous()
    u, m = up.squeeze(), torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    save_file({f"{stem}.lora_down.weight": d[:, :, None, None], f"{stem}.lora_mid.weight": m,
               f"{stem}.lora_up.weight": up}, path)
    assert torch.allclose(moved(net, path, layer), torch.einsum("or,rskl,si->oikl", u, m, d),
                          atol=1e-5)


def test_half_precision_and_a_matrix_as_a_1x1_convolution(nets, tmp_path):
    net, path, layer = nets[1], tmp_path / "x.safetensors", f"{BLOCK}.attn2.to_k"
    state = {n: t.half() for n, t in one(net, layer).items()}
    flat = {n: (t[:, :, None, None] if t.ndim == 2 else t) for n, t in state.items()}
    save_file(state, path)
    expected = moved(net, path, layer)
    save_file(flat, path)
    assert torch.equal(moved(net, path, layer), expected) and expected.any()


def test_both_forms_there_and_back(nets, tmp_path):
    net = nets[1]
    made = adapters(net)
    for form in ("diffusers", "kohya"):
        write_lora(tmp_path / f"{form}.safetensors", made, form, "a base")
        back = read_lora(tmp_path / f"{form}.safetensors", net)
        assert equal(back.adapters, made) and back.base == "a base"
        assert back.facts()["layers"] == len(made) and back.facts()["ranks"] == [1, 3]
    same = {n: a._replace(alpha=8.0) for n, a in made.items()}
    write_lora(tmp_path / "x.safetensors", same, "kohya")  # one α for all stays as it is
    assert {a.alpha for a in read_lora(tmp_path / "x.safetensors", net).adapters.values()} == {8.0}


# What is refused, by name.

def refused(path, net, match):
    with pytest.raises(InputError, match=match) as caught:
        read_lora(path, net)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


STEM = "lora_unet_" + BLOCK.replace(".", "_") + "_attn1_to_q"
T = torch.ones(2, 2)


@pytest.mark.parametrize("more, match", [
    ({f"{STEM}.hada_w1_a": T}, r"LoHa is not supported \(it holds lora_unet_\S+hada_w1_a\)"),
    ({f"{STEM}.lokr_w1": T}, "LoKr is not"), ({f"{STEM}.dora_scale": T}, "DoRA is not"),
    ({f"unet.{BLOCK}.attn1.to_q.lora_magnitude_vector": T}, "DoRA is not"),
    ({f"{STEM}.oft_blocks": T}, "OFT is not"), ({f"{STEM}.diff": T}, "whole differences is not"),
    ({f"unet.{BLOCK}.attn1.to_q.lora_B.bias": T}, "biases is not"),
    ({f"{STEM}.lora_other.weight": T}, r"1 tensor of no layer of this UNet.*lora_other"),
    ({"lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.lora_down.weight": T},
     "of no layer of this UNet"),
    ({"conv_in.weight": T}, "of no layer of this UNet.*conv_in.weight"),
    ({f"unet.{BLOCK}.attn1.to_q.lora_A.weight": T}, "two of one matrix"),
    ({f"{STEM.replace('to_q', 'to_k')}.lora_down.weight": T}, "attn1.to_k has .* no up matrix"),
    ({f"{STEM}.alpha": torch.tensor(math.nan)}, "α of .*attn1.to_q .* is nan"),
    ({f"{STEM}.alpha": torch.tensor(0.0)}, "a number that is not 0"),
    ({f"{STEM}.alpha": torch.ones(2)}, "α of .*attn1.to_q"),
    ({f"{STEM}.lora_down.weight": torch.full((2, 32), math.inf)}, "is not finite"),
    ({f"{STEM}.lora_down.weight": torch.ones(2, 320)}, r"\(2, 320\).*not for .* \(32, 32\)"),
    ({f"{STEM}.lora_up.weight": torch.ones(32, 3)}, r"not for .* another model"),
    ({f"{STEM}.lora_up.weight": torch.ones(())}, "not for"),
    ({f"{STEM}.lora_down.weight": torch.ones(())}, "not for"),
    ({f"{STEM}.lora_mid.weight": torch.ones(5, 5, 3, 3)}, "not for"),
    ({f"{STEM}.lora_down.weight": torch.ones(2, 32, dtype=torch.int32)}, "is int32"),
])
def test_what_is_no_lora_for_this_unet_is_refused_by_name(nets, more, match, tmp_path):
    net, path = nets[1], tmp_path / "x.safetensors"
    save_file({**one(net), **more}, path)
    refused(path, net, match)


@pytest.mark.parametrize("name", [
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.{}.weight",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_{}.weight"])
def test_text_parts_are_refused_unless_they_change_nothing(nets, name, tmp_path, monkeypatch,
                                                           capsys):
    net, path = nets[1], tmp_path / "x.safetensors"
    down, up = (name.format(AB[r] if "lora_{}" in name and name[0] == "t" else r) for r in AB)
    save_file({**one(net), down: T, up: T + 1}, path)
    refused(path, net, "2 tensors change the text encoder.*writes its UNet part alone")
    # the way out that it names
    shapes = {"here": net.config}
    monkeypatch.setattr(public.models, "UNETS", shapes)
    out = tmp_path / "new.safetensors"
    ((run, cfg),) = config.parse(public.VERBS, "show", "", ["lora", str(path), "--out", str(out)])
    run(cfg)
    assert "2 tensors of the text encoder left out" in capsys.readouterr().out
    assert equal(read_lora(out, net).adapters, read_lora(path, net, without_text=True).adapters)
    with pytest.raises(InputError, match="nothing is overwritten"):
        run(cfg)
    save_file({**one(net), down: T, up: torch.zeros(2, 2)}, path)  # as before its first step
    assert len(read_lora(path, net).adapters) == 1
    save_file({down: T, up: T + 1}, path)
    refused(path, net, "no adapter of a UNet")
    with pytest.raises(InputError, match="holds none of .*: name the file itself"):
        read_lora(tmp_path, net)


def test_alpha_that_is_elsewhere_is_asked_for(nets, tmp_path):
    net, path = nets[1], tmp_path / "adapter_model.safetensors"
    layer = f"base_model.model.{BLOCK}.attn1.to_q"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight":
             torch.ones(32, 2)}
    save_file(state, path)
    refused(path, net, "adapter_config.json, which is not beside it")
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"lora_alpha": 6}))
    assert read_lora(tmp_path, net).adapters[f"{BLOCK}.attn1.to_q"].scale == 3.0
    beside.write_text(json.dumps({"lora_alpha": 6, "alpha_pattern": {"(a+)+$": 1}}))
    refused(path, net, "is not the name of a layer")
    beside.write_text(json.dumps({"lora_alpha": "much"}))
    refused(path, net, "is much")


def test_a_file_is_not_changed_by_what_is_made_of_it(nets, tmp_path):
    net, path = nets[1], tmp_path / "x.safetensors"
    save_file(one(net), path)
    before = path.read_bytes()
    assert moved(net, path, f"{BLOCK}.attn1.to_q").any()
    assert path.read_bytes() == before and load_file(path).keys() == one(net).keys()
