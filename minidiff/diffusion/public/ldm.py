"""LDM files (CompVis, Stability, A1111, ComfyUI): UNet, VAE, text tower, schedule by prefix."""

import torch

from minidiff.diffusion import clip as clips
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.model import config_from
from minidiff.diffusion.public import keys
from minidiff.diffusion.public.reader import Contents, Reader, on_meta, possible, schedule_from
from minidiff.diffusion.public.weights import Weights, parse_json
from minidiff.errors import InputError

PUBLIC = {  # told apart by the width and the projections of the cross-attention
    "SD 1.x": (unets.SD15, vaes.SD, clips.CLIP_L),
    "SD 2.x": (unets.SD21, vaes.SD, clips.OPENCLIP_H),
}
BUFFERS = {  # all follow from alphas_cumprod
    "betas", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2", "logvar", "lvlb_weights",
}
COUNTERS = {keys.EMA + "decay", keys.EMA + "num_updates"}
SCALE = 0.18215          # of every public SD 1.x and 2.x VAE
PARTS = (keys.UNET, keys.EMA, "cond_stage_model.")  # of a whole model, besides its VAE


def read_ldm(weights: Weights, ema: str) -> Contents:
    """Networks on the CPU in float32. ema: auto (taken if there), yes or no."""
    reader = Reader(weights)
    version, (unet_config, vae_config, clip_config) = architecture(weights)
    contents = Contents(weights.path, "LDM", [reader], version)
    take_unet(reader, contents, unet_config, ema)
    if any(name.startswith(keys.VAE) for name in weights.tensors):
        contents.vae = take_vae(reader, vae_config, keys.VAE)
    if any(name.startswith("cond_stage_model.") for name in weights.tensors):
        contents.clip = take_clip(reader, clip_config)
    table = weights.tensors.get("alphas_cumprod")
    contents.schedule, contents.schedule_from = schedule_from(table, weights.path)
    reader.ignore("table of the schedule, read", "alphas_cumprod")
    reader.ignore("buffers that follow from the schedule", *BUFFERS)
    if "minidiff" in weights.metadata:
        described = parse_json(weights.metadata["minidiff"], weights.path)
        contents.prediction = described.get("prediction")
        contents.prediction_from = "the file's own header"
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
        reader.missing |= twin.missing
        reader.shapes |= twin.shapes
        reader.ignore("UNet weights of the last step" if use_ema else "EMA of the UNet",
                      *others.values())
    reader.ignore("counters of the EMA", *COUNTERS)


def architecture(weights: Weights) -> tuple[str, tuple]:
    """The version and its configs of UNet, VAE and text tower, by the cross-attention.

    A file of our own names them in its header.
    """
    path, tensors = weights.path, weights.tensors
    if "minidiff" in weights.metadata:
        described = parse_json(weights.metadata["minidiff"], path)
        with possible(path):
            return str(described["version"]), (config_from(unets.UNetConfig, described["unet"]),
                                               config_from(vaes.VAEConfig, described["vae"]),
                                               clips.CLIP_L)
    first = next((n for n in sorted(tensors)
                  if n.endswith("attn2.to_k.weight") and n.startswith(keys.UNET)), None)
    if first is None:
        what = "only a VAE" if vae_prefix(weights) is not None else "no Stable Diffusion UNet"
        raise InputError(f"{path} holds {what}; a model of SD 1.x or 2.x is needed")
    width = tensors[first].shape[-1] if tensors[first].ndim else 0
    proj_in = tensors.get(first.split("transformer_blocks")[0] + "proj_in.weight")
    found = [name for name, (unet, *_) in PUBLIC.items() if unet.context_dim == width]
    if not found and proj_in is not None and width != 2048:  # one tensor is damaged: to be named
        found = ["SD 2.x" if proj_in.ndim == 2 else "SD 1.x"]
    if not found:
        raise InputError(f"{path}: cross-attention {width} wide is neither SD 1.x (768) nor 2.x "
                         "(1024)")
    return found[0], PUBLIC[found[0]]


def take_vae(reader: Reader, config: vaes.VAEConfig, prefix: str, scale: float = SCALE) -> vaes.VAE:
    """`prefix`: see `vae_prefix`."""
    net = on_meta(vaes.VAE, config, reader.weights.path)
    names = {name: name for name in net.state_dict()}
    if prefix != "diffusers":
        names = {ours: prefix + ldm for ours, ldm in keys.vae_to_ldm(names).items()}
        reader.ignore("losses of the VAE's training", starts=(prefix + "loss.",))
    elif any(".query." in name for name in reader.weights.tensors):
        names = keys.vae_to_old_diffusers(names)
    reader.take("VAE", net, names, matrices=True)
    net.scale = torch.tensor(scale)  # no tensor carries it, and the network was built on meta
    return net


def take_clip(reader: Reader, config: clips.CLIPConfig) -> clips.CLIP:
    net = on_meta(clips.CLIP, config, reader.weights.path)
    ours = net.state_dict()
    if any(name.startswith(keys.OPENCLIP + "transformer.resblocks.") for name in reader.left):
        prefix = keys.OPENCLIP
        names = keys.clip_to_openclip(ours, prefix)
        extra = [prefix + name for name in ("text_projection", "logit_scale", "attn_mask")]
        layer = prefix + "transformer.resblocks.{}."
    else:
        prefix = keys.CLIP_L
        if any(name.startswith(prefix + "text_model.encoder.") for name in reader.left):
            prefix += "text_model."
        names = {name: prefix + name for name in ours}
        extra = [keys.CLIP_L + "text_projection.weight", "cond_stage_model.logit_scale",
                 "cond_stage_model.text_projection"]
        layer = prefix + "encoder.layers.{}."
    if not config.quick_gelu:
        run, last = (layer.format(k) for k in (config.layers - 1, config.layers))
        public = {name[0] if isinstance(name, tuple) else name for name in names.values()}
        more = {last + name.removeprefix(run) for name in public if name.startswith(run)}
        if more & reader.left.keys():
            reader.missing |= more - reader.left.keys()
        reader.ignore("last layer of the text tower, which SD 2.x does not run", *more)
    reader.take("text tower", net, names)
    reader.ignore("parts of the text tower that give no context", *extra,
                  ends=("embeddings.position_ids",))
    return net


def read_vae_file(weights: Weights) -> Contents:
    """A VAE alone or that of a whole model, under LDM's names or diffusers', old or new."""
    reader, prefix = Reader(weights), vae_prefix(weights)
    if prefix is None:
        raise InputError(f"{weights.path} holds no Stable Diffusion VAE")
    _, config, _ = architecture(weights)[1] if "minidiff" in weights.metadata else PUBLIC["SD 1.x"]
    contents = Contents(weights.path, "diffusers" if prefix == "diffusers" else "LDM", [reader])
    contents.vae = take_vae(reader, config, prefix)
    if prefix != "diffusers":
        reader.ignore("counters of the EMA", *COUNTERS)
    if prefix == keys.VAE:
        reader.ignore("parts of the model that are not its VAE", starts=PARTS)
        reader.ignore("the schedule", "alphas_cumprod", *BUFFERS)
    return contents


def vae_prefix(weights: Weights) -> str | None:
    """Where LDM names of a VAE begin; "diffusers" for diffusers' names, None without a VAE."""
    begins = {keys.VAE + "encoder.down": keys.VAE, "encoder.down_blocks.": "diffusers",
              "encoder.down.": ""}
    return next((prefix for begin, prefix in begins.items()
                 if any(name.startswith(begin) for name in weights.tensors)), None)
