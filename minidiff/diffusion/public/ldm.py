"""LDM files (CompVis, Stability, A1111, ComfyUI): UNet, VAE, text tower, schedule by prefix."""

from minidiff.diffusion import clip as clips
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.model import config_from
from minidiff.diffusion.public import keys
from minidiff.diffusion.public.reader import Contents, Reader, finish_vae, on_meta, schedule_from
from minidiff.diffusion.public.weights import Weights, parse_json
from minidiff.errors import InputError

PUBLIC = {  # told apart by the width and the projections of the cross-attention
    "SD 1.x": (unets.SD15, vaes.SD, clips.CLIP_L),
    "SD 2.x": (unets.SD21, vaes.SD, clips.OPENCLIP_H),
}
FOREIGN = {  # part of a tensor's name: what such a file is
    "conditioner.embedders.": "SDXL", "model.diffusion_model.label_emb.": "SDXL",
    "add_embedding.": "SDXL", "joint_blocks.": "SD3", "double_blocks.": "Flux",
    "double_stream_modulation": "Flux", "lora": "a LoRA file", "hada_w1": "a LoRA file",
    "control_model.": "ControlNet", "controlnet_cond_embedding.": "ControlNet",
    "emb_params": "a textual inversion", "string_to_param": "a textual inversion",
}
BUFFERS = {  # all follow from alphas_cumprod
    "betas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "logvar", "lvlb_weights",
}
COUNTERS = {keys.EMA + "decay", keys.EMA + "num_updates"}
SCALE = 0.18215          # of every public SD 1.x and 2.x VAE
Configs = tuple[unets.UNetConfig, vaes.VAEConfig, clips.CLIPConfig]


def read_ldm(weights: Weights, ema: str) -> Contents:
    """Networks on the CPU in float32. ema: auto (taken if there), yes or no."""
    refuse_foreign(weights)
    reader = Reader(weights)
    contents = Contents(weights.path, "LDM", files=[weights.path])
    contents.version, (unet_config, vae_config, clip_config) = version(weights)
    take_unet(reader, contents, unet_config, ema)
    if any(name.startswith(keys.VAE) for name in weights.tensors):
        contents.vae = take_vae(reader, vae_config, keys.VAE)
    if any(name.startswith("cond_stage_model.") for name in weights.tensors):
        contents.clip = take_clip(reader, clip_config)
    table = reader.left.pop("alphas_cumprod", None)
    contents.schedule, contents.schedule_from = schedule_from(table, weights.path)
    if table is not None:
        reader.not_used["table of the schedule, read"] += 1
    reader.ignore("buffers that follow from the schedule", BUFFERS)
    if "minidiff" in weights.metadata:
        described = parse_json(weights.metadata["minidiff"], weights.path)
        contents.prediction = described.get("prediction")
        contents.prediction_from = "the file's own header"
    contents.add(reader)
    return contents


def take_unet(reader: Reader, contents: Contents, config: unets.UNetConfig, ema: str) -> None:
    """The UNet's weights or their moving average; those that are not taken must be whole, too."""
    path = reader.weights.path
    net = on_meta(unets.UNet, config, path)
    names = {ours: keys.UNET + ldm for ours, ldm in keys.unet_to_ldm(net.state_dict()).items()}
    averaged = {ours: keys.ema_name(name) for ours, name in names.items()}
    has_ema = any(name.startswith(keys.EMA) and name not in COUNTERS
                  for name in reader.weights.tensors)
    if ema == "yes" and not has_ema:
        raise InputError(f"{path} holds no EMA weights; the weights in it may be the average "
                         "already (--ema no)")
    use_ema = has_ema and ema != "no"
    contents.unet = reader.take("UNet", net, averaged if use_ema else names)
    if has_ema:
        contents.ema = "taken" if use_ema else "in the file, not taken"
        others = names if use_ema else averaged
        twin = Reader(reader.weights)
        twin.take("UNet", on_meta(unets.UNet, config, path), others)
        reader.missing += twin.missing
        reader.shapes += twin.shapes
        reader.ignore("UNet weights of the last step" if use_ema else "EMA of the UNet",
                      others.values())
    reader.ignore("counters of the EMA", COUNTERS)


def version(weights: Weights) -> tuple[str, Configs]:
    """The architecture, by the cross-attention; a file of our own names it in its header."""
    path, tensors = weights.path, weights.tensors
    if "minidiff" in weights.metadata:
        described = parse_json(weights.metadata["minidiff"], path)
        try:
            return str(described["version"]), (config_from(unets.UNetConfig, described["unet"]),
                                               config_from(vaes.VAEConfig, described["vae"]),
                                               clips.CLIP_L)
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{path}: its header does not describe a model") from None
    first = next((n for n in sorted(tensors)
                  if n.endswith("attn2.to_k.weight") and n.startswith(keys.UNET)), None)
    if first is None:
        what = "only a VAE" if vae_prefix(weights) is not None else "no Stable Diffusion UNet"
        raise InputError(f"{path} holds {what}; a model of SD 1.x or 2.x is needed")
    width = tensors[first].shape[-1] if tensors[first].ndim else 0
    proj_in = tensors.get(first.split("transformer_blocks")[0] + "proj_in.weight")
    conv_in = tensors.get(keys.UNET + "input_blocks.0.0.weight")
    if conv_in is not None and conv_in.ndim == 4 and conv_in.shape[1] in (5, 7, 8, 9):
        raise InputError(f"{path}: {conv_in.shape[1]} input channels (inpainting, depth or "
                         "editing) are not supported; 4 are")
    for name, configs in PUBLIC.items():
        if configs[0].context_dim == width:
            return name, configs
    if proj_in is not None and width != 2048:  # that one tensor may be damaged: it will be named
        linear = proj_in.ndim == 2
        return next((name, configs) for name, configs in PUBLIC.items()
                    if configs[0].linear_projection == linear)
    raise InputError(f"{path}: cross-attention {width} wide is neither SD 1.x (768) nor 2.x (1024)")


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
        names = keys.clip_to_openclip(ours, prefix)
        extra = {prefix + name for name in ("text_projection", "logit_scale", "attn_mask")}
        reader.take("text tower", net, names)
        run, last = (f"{prefix}transformer.resblocks.{k}."
                     for k in (config.layers - 1, config.layers))
        public = {name[0] if isinstance(name, tuple) else name for name in names.values()}
        layer = {last + name.removeprefix(run) for name in public if name.startswith(run)}
        present = {name for name in reader.left if name.startswith(last)}
        reader.missing += sorted(layer - present) if present else []
        reader.ignore("last layer of the text tower, which SD 2.x does not run", layer)
    else:
        prefix = keys.CLIP_L
        if any(name.startswith(prefix + "text_model.") for name in reader.left):
            prefix += "text_model."
        reader.take("text tower", net, {k: prefix + k for k in ours})
        extra = {prefix + "embeddings.position_ids", keys.CLIP_L + "text_projection.weight",
                 "cond_stage_model.logit_scale", "cond_stage_model.text_projection"}
    reader.ignore("parts of the text tower that give no context", extra)
    return net


def read_vae_file(weights: Weights) -> Contents:
    """A VAE alone or that of a whole model, under LDM's names or diffusers', old or new."""
    refuse_foreign(weights)
    reader, contents = Reader(weights), Contents(weights.path, "LDM", files=[weights.path])
    prefix = vae_prefix(weights)
    if prefix is None:
        raise InputError(f"{weights.path} holds no Stable Diffusion VAE")
    config = next(iter(PUBLIC.values()))[1]
    if prefix == "diffusers":
        contents.dialect = "diffusers"
        contents.vae = take_diffusers_vae(reader, config, SCALE)
    else:
        contents.vae = take_vae(reader, config, prefix)
        reader.ignore("losses of the VAE's training",
                      [n for n in reader.left if n.startswith("loss.")])
        reader.ignore("counters of the EMA", COUNTERS)
        if prefix == keys.VAE:
            rest = (keys.UNET, keys.EMA, "cond_stage_model.")
            reader.ignore("parts of the model that are not its VAE",
                          [n for n in reader.left if n.startswith(rest)])
            reader.ignore("the schedule", {"alphas_cumprod", *BUFFERS})
    contents.add(reader)
    return contents


def take_diffusers_vae(reader: Reader, config: vaes.VAEConfig, scale: float) -> vaes.VAE:
    net = on_meta(vaes.VAE, config, reader.weights.path)
    names = list(net.state_dict())
    old = any(".query." in name for name in reader.weights.tensors)
    reader.take("VAE", net, keys.vae_to_old_diffusers(names) if old else {n: n for n in names},
                matrices=True)
    return finish_vae(net, scale)


def vae_prefix(weights: Weights) -> str | None:
    """Where LDM names of a VAE begin; "diffusers" for diffusers' names, None without a VAE."""
    names = weights.tensors
    if any(name.startswith(keys.VAE + "encoder.down") for name in names):
        return keys.VAE
    if any(name.startswith("encoder.down_blocks.") for name in names):
        return "diffusers"
    return "" if any(name.startswith("encoder.down") for name in names) else None


def refuse_foreign(weights: Weights) -> None:
    for part, what in FOREIGN.items():
        for name in weights.tensors:
            if part in name:
                raise InputError(f"{weights.path}: {what} is not supported (it holds {name}); "
                                 "SD 1.x and 2.x are")
    if not weights.tensors:
        raise InputError(f"{weights.path} holds no tensors")
