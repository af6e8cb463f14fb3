"""diffusers' and transformers' networks with random weights, and public files written from them.

The LDM names are enumerated here in the order in which CompVis' code builds its blocks: nothing of
minidiff is used.
"""

import copy
import functools
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

if not all(importlib.util.find_spec(name) for name in ("diffusers", "transformers")):
    pytest.skip("diffusers and transformers are not installed: pip install "
                "minidiff[test]", allow_module_level=True)
if importlib.util.find_spec("torchvision"):
    from torchvision_peer import torchvision
    torchvision()  # transformers imports it, and it may have been built for another torch

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
TINY = {
    "SD 1.x": {
        "unet": {"block_out_channels": (32, 64, 64), "attention_head_dim": 4,
                 "cross_attention_dim": 48, "norm_num_groups": 8},
        "clip": {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "hidden_act": "quick_gelu"},
    }, "SD 2.x": {
        "unet": {"block_out_channels": (32, 64, 64), "attention_head_dim": [2, 4, 4],
                 "cross_attention_dim": 40, "norm_num_groups": 8, "use_linear_projection": True},
        "clip": {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 3,
                 "num_attention_heads": 4, "hidden_act": "gelu"},
    }, "vae": {"block_out_channels": (16, 32, 32), "norm_num_groups": 8},
}
FULL = {
    "SD 1.x": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
                 "cross_attention_dim": 768},
        "clip": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12, "hidden_act": "quick_gelu"},
    }, "SD 2.x": {
        "unet": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim":
                 [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "clip": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                 "num_attention_heads": 16, "hidden_act": "gelu"},
    }, "vae": {"block_out_channels": (128, 256, 512, 512)},
}


def make_unet(config: dict, seed: int = 0) -> UNet2DConditionModel:
    levels = len(config["block_out_channels"])
    return randomise(UNet2DConditionModel(
        down_block_types=["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1), layers_per_block=2,
        sample_size=8, **config), seed)


def make_vae(config: dict, seed: int = 1) -> AutoencoderKL:
    levels = len(config["block_out_channels"])
    return randomise(AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * levels,
                                   up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=2,
                                   scaling_factor=0.18215, **config), seed)


def make_clip(config: dict, seed: int = 2) -> CLIPTextModel:
    return randomise(CLIPTextModel(CLIPTextConfig(**config)), seed)


@torch.no_grad()
def randomise(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every tensor random, the norms' included, so that no swap of two goes unseen; of a size that
    keeps signals near 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        p.normal_(generator=generator)
        if p.ndim > 1:
            p.mul_(1.0 / p[0].numel() ** 0.5 if "embedding" not in name.split(".")[-2] or p.ndim > 2
                   else 0.3)
        elif "norm" in name and name.endswith("weight"):
            p.mul_(0.2).add_(1.0)
        else:
            p.mul_(0.1)
    return net.eval().requires_grad_(False)


def ldm_unet_blocks(levels: int, blocks: int = 2) -> dict[str, str]:
    """diffusers' block → LDM's block, counted as openaimodel.py appends them; attention on all
    levels but the last.
    """
    pairs = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0"}
    count = 1
    for level in range(levels):
        for i in range(blocks):
            pairs[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{count}.0"
            if level < levels - 1:
                pairs[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{count}.1"
            count += 1
        if level < levels - 1:
            pairs[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    for i, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        pairs[f"mid_block.{name}"] = f"middle_block.{i}"
    count = 0
    for up, level in enumerate(reversed(range(levels))):
        for i in range(blocks + 1):
            slots = [f"up_blocks.{up}.resnets.{i}"]
            slots += [f"up_blocks.{up}.attentions.{i}"] if level < levels - 1 else []
            slots += [f"up_blocks.{up}.upsamplers.0"] if i == blocks and level else []
            pairs |= {ours: f"output_blocks.{count}.{slot}" for slot, ours in enumerate(slots)}
            count += 1
    return pairs | {"conv_norm_out": "out.0", "conv_out": "out.2"}


RES = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
       ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection")]


def ldm_unet(state: dict, levels: int) -> dict:
    out = {}
    for name, tensor in state.items():
        block = max((b for b in ldm_unet_blocks(levels) if name.startswith(b + ".")), key=len)
        rest = name[len(block) + 1:]
        if ".resnets." in block:
            first, leaf = rest.rsplit(".", 1)
            rest = f"{dict(RES)[first]}.{leaf}"
        out[f"model.diffusion_model.{ldm_unet_blocks(levels)[block]}.{rest}"] = tensor
    return out


def ldm_vae(state: dict, levels: int, prefix: str = "first_stage_model.") -> dict:
    out = {}
    for name, tensor in state.items():
        words = name.split(".")
        new, i = [], 0
        while i < len(words):
            w = words[i]
            if w in ("down_blocks", "up_blocks"):
                level = int(words[i + 1]) if w == "down_blocks" else levels - 1 - int(words[i + 1])
                kind = words[i + 2]
                new += [w.split("_")[0], str(level)]
                new += ["block", words[i + 3]] if kind == "resnets" else [kind.removesuffix("rs")]
                i += 4
            elif w == "mid_block":
                new += ["mid",
                        f"block_{int(words[i + 2]) + 1}" if words[i + 1] == "resnets" else "attn_1"]
                i += 3
            else:
                new.append({"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
                            "group_norm": "norm", "to_q": "q",
                            "to_k": "k", "to_v": "v", "to_out": "proj_out"}.get(w, w))
                i += 2 if w == "to_out" else 1
        matrix = "attn_1" in new and tensor.ndim == 2
        out[prefix + ".".join(new)] = tensor[:, :, None, None] if matrix else tensor
    return out


def ldm_clip(state: dict, version: str, seed: int = 3) -> dict:
    state = {name.removeprefix("text_model."): t for name, t in state.items()}
    if version == "SD 1.x":
        prefix = "cond_stage_model.transformer.text_model."
        return {prefix + n: t for n, t in state.items()} | {
            prefix + "embeddings.position_ids": torch.arange(77)[None]}
    out, prefix = {}, "cond_stage_model.model."
    for name, t in state.items():
        head, _, rest = name.partition(".layers.")
        if head != "encoder":
            new = "positional_embedding" if "position" in name else name.removeprefix("embeddings.")
            out[prefix + new.replace("final_layer_norm", "ln_final")] = t
            continue
        i, module, *leaf = rest.split(".")
        block = f"{prefix}transformer.resblocks.{i}."
        if leaf[0] in ("q_proj", "k_proj", "v_proj"):
            if leaf[0] == "q_proj":
                parts = [state[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
                out[f"{block}attn.in_proj_{leaf[1]}"] = torch.cat(parts)
            continue
        words = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc",
                 "fc2": "c_proj"}
        out[block + ".".join(words.get(w, w) for w in (module, *leaf))] = t
    last = 1 + max(int(n.split("resblocks.")[1].split(".")[0]) for n in out if "resblocks." in n)
    generator = torch.Generator().manual_seed(seed)
    for name, t in list(out.items()):  # the layer that is there and not run
        if f"resblocks.{last - 1}." in name:
            out[name.replace(f"resblocks.{last - 1}.",
                             f"resblocks.{last}.")] = torch.randn(t.shape, generator=generator)
    width = out[prefix + "positional_embedding"].shape[1]
    return out | {prefix + "text_projection": torch.eye(width),
                  prefix + "logit_scale": torch.tensor(4.6)}


def ldm_state(version: str, unet, vae, clip) -> dict:
    scheduler = DDIMScheduler(**SCHEDULER)
    state = ldm_unet(unet.state_dict(), len(unet.config.block_out_channels))
    state |= ldm_vae(vae.state_dict(), len(vae.config.block_out_channels))
    tables = {"alphas_cumprod": scheduler.alphas_cumprod, "betas": scheduler.betas}
    return state | ldm_clip(clip.state_dict(), version) | tables


def write_safetensors(path: Path, state: dict) -> Path:
    save_file({name: t.contiguous() for name, t in state.items()}, path)
    return path


def old_vae_names(folder: Path, rank: int = 2) -> None:
    """Rewrite a VAE folder in the names (and, at rank 4, the shapes) that diffusers used until
    2023.
    """
    path, state = folder / "diffusion_pytorch_model.safetensors", {}
    for name, t in load_file(path).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                         ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = t[:, :, None, None] if rank == 4 and t.ndim == 2 else t
    write_safetensors(path, state)


def write_folder(root: Path, unet, vae, clip, prediction: str | None = "epsilon",
                 **options) -> Path:
    unet.save_pretrained(root / "unet", **options)
    vae.save_pretrained(root / "vae", **options)
    clip.save_pretrained(root / "text_encoder", **options)
    scheduler = root / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir(parents=True)
    scheduler.write_text(
        json.dumps(SCHEDULER | ({"prediction_type": prediction} if prediction else {})))
    return root


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def ours(monkeypatch, tmp_path) -> None:
    """Tell minidiff of the tiny architectures in place of the public ones, and keep its cache out
    of the home folder.
    """
    from minidiff.diffusion import clip, unet, vae
    from minidiff.diffusion.public import ldm

    small = vae.VAEConfig((16, 32, 32), groups=8)
    channels, attention = (32, 64, 64), (True, True, False)
    monkeypatch.setattr(ldm, "PUBLIC", {
        "SD 1.x": (unet.UNetConfig(channels, attention, 48, heads=4, groups=8), small,
                   clip.CLIPConfig(48, 2, 4, quick_gelu=True, pad=clip.EOS, inner=80)),
        "SD 2.x": (unet.UNetConfig(channels, attention, 40, head_dim=16, groups=8,
                                   linear_projection=True, float32_attention=True), small,
                   clip.CLIPConfig(40, 3, 4, quick_gelu=False, pad=0, inner=64)),
    })
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def originals(version: str) -> tuple:
    """(unet, vae, clip) of diffusers and transformers at the tiny shapes, float32, every tensor
    random; to be read only.
    """
    if version not in _peers:
        _peers[version] = (make_unet(TINY[version]["unet"]), make_vae(TINY["vae"]),
                           make_clip(TINY[version]["clip"]))
    return _peers[version]


def peers(version: str) -> tuple:
    """Copies of them, to be changed."""
    return tuple(copy.deepcopy(net) for net in originals(version))


_peers: dict[str, tuple] = {}


@functools.cache
def rounded(version: str, *dtypes: torch.dtype) -> tuple:
    """The originals, rounded to each of these types in turn; to be read only."""
    nets = rounded(version, *dtypes[:-1]) if dtypes else originals(version)
    return tuple(copy.deepcopy(net).to(dtypes[-1]) for net in nets) if dtypes else nets


class ModelCheckpoint:
    """Named in a .ckpt as Lightning's own callback is."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def write_ckpt(path: Path, state: dict, *, legacy: bool = False, extra: dict | None = None) -> Path:
    """As Lightning writes it: the state under state_dict, and callbacks under their class, with a
    numpy score.
    """
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = ModelCheckpoint
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module.__name__]
    sys.modules.update({names[0]: types.ModuleType(names[0]), names[1]: types.ModuleType(names[1]),
                        names[2]: module})
    try:
        score = {"monitor": "val", "best_model_score": np.float64(0.5),
                 "current_score": torch.tensor(1.0)}
        callbacks = {ModelCheckpoint: score}
        torch.save({"epoch": 3, "global_step": 7, "state_dict": state, "callbacks": callbacks,
                    **(extra or {})}, path, _use_new_zipfile_serialization=not legacy)
    finally:
        for name in names:
            del sys.modules[name]
    return path
