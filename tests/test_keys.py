import re
from pathlib import Path

import pytest
import torch

from minidiff.diffusion import clip, unet, vae
from minidiff.diffusion.public import keys

LIST = Path(__file__).parents[2] / "shared" / "sd1_keys.txt"


def on_meta(network, config):
    with torch.device("meta"):
        return network(config).state_dict()


def sd1() -> dict[str, str]:
    """Our map of a whole SD 1.x file: LDM name → shape as LDM has it."""
    u, v = on_meta(unet.UNet, unet.SD15), on_meta(vae.VAE, vae.SD)
    out = {keys.UNET + ldm: "x".join(map(str, u[ours].shape))
           for ours, ldm in keys.unet_to_ldm(u).items()}
    for ours, ldm in keys.vae_to_ldm(v).items():
        convolution = ".attentions." in ours and v[ours].ndim == 2
        out[keys.VAE + ldm] = "x".join(map(str, (*v[ours].shape, 1, 1) if convolution
                                           else v[ours].shape))
    return out


def test_all_934_public_names_and_shapes():
    if not LIST.exists():
        pytest.skip("the list of public names sd1_keys.txt is not on this machine")
    public = dict(line.split() for line in LIST.read_text().splitlines() if line.strip())
    assert len(public) == 934 and sd1() == public


def back(name: str) -> str:
    """LDM → ours, derived again and by parsing: SD 1.x and 2.x numbers only."""
    name = name.removeprefix(keys.UNET)
    inside = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
              "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}

    def rest(text: str) -> str:
        for ldm, ours in inside.items():
            if text.startswith(ldm + "."):
                return text.replace(ldm, ours, 1)
        return text

    kind, *words = name.split(".")
    if kind == "time_embed":
        return f"time_embedding.linear_{1 + int(words[0]) // 2}.{words[1]}"
    if kind == "out":
        return f"{'conv_norm_out' if words[0] == '0' else 'conv_out'}.{words[1]}"
    i, slot, tail = int(words[0]), words[1], ".".join(words[2:])

    def block(k: int) -> str:
        return f"attentions.{k}.{tail}" if slot == "1" else f"resnets.{k}.{rest(tail)}"

    if kind == "middle_block":
        tail = ".".join(words[1:])
        if i == 1:
            return f"mid_block.attentions.0.{tail}"
        return f"mid_block.resnets.{i // 2}.{rest(tail)}"
    if kind == "input_blocks":
        if i == 0:
            return f"conv_in.{tail}"
        level, k = divmod(i - 1, 3)
        if k == 2:
            return f"down_blocks.{level}.downsamplers.0.conv.{tail.removeprefix('op.')}"
        return f"down_blocks.{level}.{block(k)}"
    level, k = divmod(i, 3)
    if tail.startswith("conv."):
        return f"up_blocks.{level}.upsamplers.0.{tail}"
    return f"up_blocks.{level}.{block(k)}"


@pytest.mark.parametrize("config", [unet.SD15, unet.SD21])
def test_the_unet_map_derived_again_the_other_way(config):
    names = list(on_meta(unet.UNet, config))
    assert {back(ldm): ldm for ldm in keys.unet_to_ldm(names).values()} == keys.unet_to_ldm(names)


@pytest.mark.parametrize("config", [unet.SD15, unet.SD21, unet.TINY, unet.SMALL])
def test_maps_are_one_to_one(config):
    names = list(on_meta(unet.UNet, config))
    ldm = keys.unet_to_ldm(names)
    assert len(set(ldm.values())) == len(names) == len({keys.ema_name(keys.UNET + name)
                                                        for name in ldm.values()})


@pytest.mark.parametrize("config", [vae.SD, vae.TINY])
def test_vae_maps_are_one_to_one_and_renamed_once(config):
    names = list(on_meta(vae.VAE, config))
    for renamed in (keys.vae_to_ldm(names), keys.vae_to_old_diffusers(names)):
        assert len(set(renamed.values())) == len(names)
        assert not any(re.search(r"to_|proj_proj|query_query|qq", name)
                       for name in renamed.values())
    top = len(config.channels) - 1
    assert keys.vae_to_ldm(names)[
        "decoder.up_blocks.0.resnets.0.conv1.weight"] == f"decoder.up.{top}.block.0.conv1.weight"
    old = keys.vae_to_old_diffusers(names)["encoder.mid_block.attentions.0.to_out.0.bias"]
    assert old == "encoder.mid_block.attentions.0.proj_attn.bias"


def test_flat_names_of_the_average():
    average = keys.ema_name("model.diffusion_model.input_blocks.0.0.weight")
    assert average == "model_ema.diffusion_modelinput_blocks00weight"


@pytest.mark.parametrize("network, config, levels",
                         [("unet", unet.SD15, 4), ("unet", unet.SD21, 4), ("vae", vae.SD, 4)])
def test_against_names_enumerated_in_the_order_of_compvis(network, config, levels):
    sd = pytest.importorskip("sd_peer")
    state = on_meta(unet.UNet if network == "unet" else vae.VAE, config)
    numbered = {name: torch.tensor(i) for i, name in enumerate(state)}
    theirs = sd.ldm_unet(numbered, levels) if network == "unet" else sd.ldm_vae(numbered, levels,
                                                                                "")
    mine = keys.unet_to_ldm(state) if network == "unet" else keys.vae_to_ldm(state)
    prefix = keys.UNET if network == "unet" else ""
    assert {prefix + ldm: numbered[ours] for ours, ldm in mine.items()} == theirs


def test_openclip_thirds():
    names = list(on_meta(clip.CLIP, clip.OPENCLIP_H))
    renamed = keys.clip_to_openclip(names)
    assert renamed["encoder.layers.3.self_attn.k_proj.bias"] == (
        "transformer.resblocks.3.attn.in_proj_bias", 1)
    assert renamed[
        "encoder.layers.3.self_attn.out_proj.bias"] == "transformer.resblocks.3.attn.out_proj.bias"
    assert renamed["final_layer_norm.weight"] == "ln_final.weight" and len(
        set(renamed.values())) == len(names) == 372
