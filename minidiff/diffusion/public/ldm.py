"""LDM files (CompVis, Stability, A1111, ComfyUI): UNet, VAE, text tower and schedule under four
prefixes.
"""

from __future__ import annotations

from collections import Counter

import torch

from minidiff.diffusion import clip as clips
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.model import config_from
from minidiff.diffusion.public import keys
from minidiff.diffusion.public.reader import Found, Reader, finish_vae, on_meta, schedule_from
from minidiff.diffusion.public.weights import Weights, parse_json
from minidiff.errors import InputError

PUBLIC = {  # told apart by the width and the projections of the cross-attention
    "SD 1.x": (unets.SD15, vaes.SD, clips.CLIP_L),
    "SD 2.x": (unets.SD21, vaes.SD, clips.OPENCLIP_H),
}
FOREIGN = {  # part of a name: what such a file is
    "conditioner.embedders.": "SDXL", "model.diffusion_model.label_emb.": "SDXL", "joint_blocks.": "SD3",
    "double_blocks.": "Flux", "double_stream_modulation": "Flux", "lora": "a LoRA file", "hada_w1": "a LoRA file",
    "control_model.": "ControlNet", "controlnet_cond_embedding.": "ControlNet", "emb_params": "a textual inversion",
    "string_to_param": "a textual inversion", "add_embedding.": "SDXL",
}
BUFFERS = {  # all follow from alphas_cumprod
    "betas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "lvlb_weights",
}
COUNTERS = {keys.EMA + "decay", keys.EMA + "num_updates"}
SCALE = 0.18215          # of every public SD 1.x and 2.x VAE


def read_ldm(weights: Weights, ema: str) -> Found:
    """Networks on the CPU in float32. ema: auto (taken if there), yes or no."""
    refuse_foreign(weights)
    reader, found = Reader(weights), Found(weights.path, "LDM", files=[weights.path])
    found.version, configs = version(weights)
    unet_config, vae_config, clip_config = configs
    net = on_meta(unets.UNet, unet_config, weights.path)
    names = {ours: keys.UNET + ldm for ours, ldm in keys.unet_to_ldm(net.state_dict()).items()}
    flat = {ours: keys.ema_name(name) for ours, name in names.items()}
    has_ema = any(name.startswith(keys.EMA) and name not in COUNTERS for name in weights.tensors)
    if ema == "yes" and not has_ema:
        raise InputError(f"{weights.path} holds no EMA weights; the weights in it may be the "
                         "average already (--ema no)")
    use_ema = has_ema and ema != "no"
    found.ema = "none in the file" if not has_ema else "taken" if use_ema else "in the file, not taken"
    found.unet = reader.take("UNet", net, flat if use_ema else names)
    if has_ema:
        twin = Reader(weights)  # the weights that are not taken have to be whole as well
        twin.take("UNet", on_meta(unets.UNet, unet_config, weights.path),
                  names if use_ema else flat)
        reader.missing += twin.missing
        reader.shapes += twin.shapes
        other = (names, "UNet weights of the last step") if use_ema else (flat, "EMA of the UNet")
        reader.ignore(other[1], other[0].values())
    reader.ignore("counters of the EMA", COUNTERS)
    if any(name.startswith(keys.VAE) for name in weights.tensors):
        found.vae = take_vae(reader, vae_config, keys.VAE)
    if any(name.startswith("cond_stage_model.") for name in weights.tensors):
        found.clip = take_clip(reader, clip_config)
    found.schedule, found.schedule_from = schedule_from(reader.left.pop("alphas_cumprod", None),
                                                        weights.path)
    if "alphas_cumprod" in weights.tensors:
        reader.not_used["table of the schedule, read"] += 1
    reader.ignore("buffers that follow from the schedule", BUFFERS)
    if "minidiff" in weights.metadata:
        found.prediction = parse_json(weights.metadata["minidiff"], weights.path).get("prediction")
        found.prediction_from = "the file's own header"
    found.add(reader)
    return found


def version(weights: Weights) -> tuple[str,
                                       tuple[unets.UNetConfig, vaes.VAEConfig, clips.CLIPConfig]]:
    """Which architecture a file has, from its cross-attention; a file of our own says it in its
    header.
    """
    if "minidiff" in weights.metadata:
        described = parse_json(weights.metadata["minidiff"], weights.path)
        try:
            configs = config_from(unets.UNetConfig,
                                  described["unet"]), config_from(vaes.VAEConfig, described["vae"])
            return str(described["version"]), (*configs, clips.CLIP_L)
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{weights.path}: its header does not describe a model") from None
    first = next((n for n in sorted(weights.tensors)
                  if n.endswith("attn2.to_k.weight") and n.startswith(keys.UNET)), None)
    if first is None:
        what = "only a VAE" if vae_prefix(weights) is not None else "no Stable Diffusion UNet"
        raise InputError(f"{weights.path} holds {what}; a model of SD 1.x or 2.x is needed")
    columns = weights.tensors[first].shape[-1] if weights.tensors[first].ndim else 0
    proj_in = weights.tensors.get(first.split("transformer_blocks")[0] + "proj_in.weight")
    linear = proj_in is not None and proj_in.ndim == 2
    conv_in = weights.tensors.get(keys.UNET + "input_blocks.0.0.weight")
    if conv_in is not None and conv_in.ndim == 4 and conv_in.shape[1] in (5, 7, 8, 9):
        raise InputError(f"{weights.path}: {conv_in.shape[1]} input channels (inpainting, depth or "
                         "editing) are not supported; 4 are")
    for name, configs in PUBLIC.items():
        if configs[0].context_dim == columns:
            return name, configs
    # that one tensor may be the damaged one: the report by name is better
    for name, configs in PUBLIC.items():
        if proj_in is not None and configs[0].linear_projection == linear and columns != 2048:
            return name, configs
    raise InputError(f"{weights.path}: cross-attention {columns} wide is neither SD 1.x (768) nor "
                     "2.x (1024)")


def take_vae(reader: Reader, config: vaes.VAEConfig, prefix: str) -> vaes.VAE:
    net = on_meta(vaes.VAE, config, reader.weights.path)
    names = {ours: prefix + ldm for ours, ldm in keys.vae_to_ldm(net.state_dict()).items()}
    reader.take("VAE", net, names, matrices=True)
    reader.ignore("losses of the VAE's training",
                  [n for n in reader.left if n.startswith(prefix + "loss.")])
    return finish_vae(net, SCALE)


def take_clip(reader: Reader, config: clips.CLIPConfig) -> clips.CLIP:
    net = on_meta(clips.CLIP, config, reader.weights.path)
    ours = net.state_dict()
    if any(name.startswith(keys.OPENCLIP) for name in reader.weights.tensors):
        prefix = keys.OPENCLIP
        names = {k: (prefix + v[0], v[1]) if isinstance(v, tuple) else prefix + v
                 for k, v in keys.clip_to_openclip(ours).items()}
        extra = {prefix + name for name in ("text_projection", "logit_scale", "attn_mask")}
        last = f"{prefix}transformer.resblocks.{config.layers}."
        reader.take("text tower", net, names)
        run = f"{prefix}transformer.resblocks.{config.layers - 1}."
        public = {v[0] if isinstance(v, tuple) else v for v in names.values()}
        layer = {last + name.removeprefix(run) for name in public if name.startswith(run)}
        present = {name for name in reader.left if name.startswith(last)}
        if present:
            reader.missing += sorted(layer - present)
        reader.ignore("last layer of the text tower, which SD 2.x does not run", layer)
    else:
        prefix = keys.CLIP_L + ("text_model." if any(n.startswith(keys.CLIP_L + "text_model.")
                                                     for n in reader.left) else "")
        reader.take("text tower", net, {k: prefix + k for k in ours})
        extra = {prefix + "embeddings.position_ids", keys.CLIP_L + "text_projection.weight",
                 "cond_stage_model.logit_scale", "cond_stage_model.text_projection"}
    reader.ignore("parts of the text tower that give no context", extra)
    return net


def read_vae_file(weights: Weights) -> Found:
    """A VAE alone, or that of a whole model: LDM names with or without the prefix, or diffusers'
    names, old or new.
    """
    refuse_foreign(weights)
    reader, found = Reader(weights), Found(weights.path, "LDM", files=[weights.path])
    prefix = vae_prefix(weights)
    if prefix is None:
        raise InputError(f"{weights.path} holds no Stable Diffusion VAE")
    config = next(iter(PUBLIC.values()))[1]
    if prefix == "diffusers":
        found.dialect = "diffusers"
        found.vae = take_diffusers_vae(reader, config, SCALE)
    else:
        found.vae = take_vae(reader, config, prefix)
        reader.ignore("losses of the VAE's training",
                      [n for n in reader.left if n.startswith("loss.")])
        reader.ignore("counters of the EMA", COUNTERS)
        if prefix == keys.VAE:
            rest = (keys.UNET, keys.EMA, "cond_stage_model.")
            reader.ignore("parts of the model that are not its VAE",
                          [n for n in reader.left if n.startswith(rest)])
            reader.ignore("the schedule", {"alphas_cumprod", *BUFFERS})
    found.add(reader)
    return found


def take_diffusers_vae(reader: Reader, config: vaes.VAEConfig, scale: float) -> vaes.VAE:
    net = on_meta(vaes.VAE, config, reader.weights.path)
    names = list(net.state_dict())
    old = any(".query." in name for name in reader.weights.tensors)
    reader.take("VAE", net, keys.vae_to_old_diffusers(names) if old else {n: n for n in names},
                matrices=True)
    return finish_vae(net, scale)


def vae_prefix(weights: Weights) -> str | None:
    """Where the VAE's LDM names begin, "diffusers" for diffusers' names, None if there is no
    VAE.
    """
    heads = Counter(name.split(".down")[0] for name in weights.tensors if "encoder.down" in name)
    if keys.VAE + "encoder" in heads:
        return keys.VAE
    if "encoder" in heads:
        return "diffusers" if any(name.startswith("encoder.down_blocks.")
                                  for name in weights.tensors) else ""
    return None


def refuse_foreign(weights: Weights) -> None:
    for part, what in FOREIGN.items():
        found = next((name for name in weights.tensors if part in name), None)
        if found:
            raise InputError(f"{weights.path}: {what} is not supported (it holds {found}); SD 1.x "
                             "and 2.x are")
    if not any(isinstance(t, torch.Tensor) for t in weights.tensors.values()):
        raise InputError(f"{weights.path} holds no tensors")


def header(version_name: str, unet: dict, vae: dict, prediction: str) -> dict:
    """What our own LDM files say of themselves in the header."""
    return {"version": version_name, "unet": unet, "vae": vae, "prediction": prediction}
