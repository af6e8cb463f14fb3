"""diffusers folders: unet/, vae/, text_encoder/, scheduler/, each a config.json and weights."""

from pathlib import Path

import torch

from minidiff.diffusion import clip as clips
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.public.ldm import SCALE, refuse_foreign, take_diffusers_vae
from minidiff.diffusion.public.reader import Contents, Reader, on_meta
from minidiff.diffusion.public.weights import Weights, read_json, read_weights
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError

UNET_MUST = {  # what our UNet is; a config that says otherwise is another network
    "act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
    "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default", "dropout": 0.0,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "time_embedding_type": "positional",
    "transformer_layers_per_block": 1, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "resnet_out_scale_factor": 1.0, "in_channels": 4,
    "out_channels": 4, "addition_embed_type_num_heads": 64,
}
UNET_FREE = {"sample_size", "block_out_channels", "down_block_types", "up_block_types",
             "cross_attention_dim", "layers_per_block", "attention_head_dim", "norm_num_groups",
             "use_linear_projection", "upcast_attention"}
VAE_MUST = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "latent_channels": 4,
            "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
VAE_FREE = {"sample_size", "block_out_channels", "down_block_types", "up_block_types",
            "layers_per_block", "norm_num_groups", "scaling_factor", "force_upcast"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def read_folder(folder: Path, ema: str) -> Contents:
    """Networks on the CPU in float32, None without a folder. ema: no takes *.non_ema files."""
    for name, what in (("transformer", "SD3 or Flux (a transformer)"),
                       ("text_encoder_2", "SDXL (text_encoder_2)")):
        if (folder / name).is_dir():
            raise InputError(f"{folder}: {what} is not supported; SD 1.x and 2.x are")
    contents = Contents(folder, "diffusers", ema="as the folder has it")
    path = folder / "unet" / "config.json"
    config = unet_config(read_json(path), path)
    contents.version = "SD 2.x" if config.linear_projection else "SD 1.x"
    reader, used = read_part(folder / "unet", non_ema=ema == "no")
    if ema == "yes" and any("non_ema" in p.name for p in used):
        raise InputError(f"{folder / 'unet'} holds no EMA weights, only {used[0].name} (--ema no)")
    net = on_meta(unets.UNet, config, path)
    contents.unet = reader.take("UNet", net, {name: name for name in net.state_dict()})
    contents.files += used
    contents.add(reader)
    if (folder / "vae").is_dir():
        add_vae(contents, folder / "vae")
    if (folder / "text_encoder").is_dir():
        add_clip(contents, folder / "text_encoder")
    path = folder / "scheduler" / "scheduler_config.json"
    if path.exists():
        described = read_json(path)
        contents.schedule = schedule(described, path)
        contents.schedule_from = contents.prediction_from = str(path.relative_to(folder))
        kind = described.get("prediction_type")
        if kind is None and "prediction_type" not in described and contents.version == "SD 1.x":
            kind = "epsilon"
            contents.prediction_from += ", which names none: eps"
        if kind is not None and kind not in PREDICTIONS:
            raise InputError(f"{path}: prediction_type {kind!r} is not one of "
                             f"{', '.join(PREDICTIONS)}")
        contents.prediction = PREDICTIONS.get(kind)
    return contents


def read_vae_folder(folder: Path) -> Contents:
    """A VAE alone (config.json and weights, such as sd-vae-ft-mse), or the vae/ of a pipeline."""
    contents = Contents(folder, "diffusers")
    add_vae(contents, folder / "vae" if (folder / "vae").is_dir() else folder)
    return contents


def add_vae(contents: Contents, folder: Path) -> None:
    path = folder / "config.json"
    described = read_json(path)
    reader, used = read_part(folder)
    scale = described.get("scaling_factor", SCALE)
    if not isinstance(scale, (int, float)) or not 0 < scale < 100:
        raise InputError(f"{path}: scaling_factor {scale!r} is not possible")
    contents.vae = take_diffusers_vae(reader, vae_config(described, path), scale)
    contents.files += used
    contents.add(reader)


def add_clip(contents: Contents, folder: Path) -> None:
    path = folder / "config.json"
    reader, used = read_part(folder)
    net = on_meta(clips.CLIP, clip_config(read_json(path), path), path)
    prefix = "text_model." if any(name.startswith("text_model.") for name in reader.left) else ""
    names = {name: prefix + name for name in net.state_dict()}
    contents.clip = reader.take("text tower", net, names)
    reader.ignore("parts of the text tower that give no context",
                  {prefix + "embeddings.position_ids", "text_projection.weight", "logit_scale"})
    contents.files += used
    contents.add(reader)


def read_part(folder: Path, non_ema: bool = False) -> tuple[Reader, list[Path]]:
    """The weights of one folder: single or sharded, float32 first, safetensors before torch's."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    variants = ("non_ema.", "") if non_ema else ("", "fp16.", "bf16.", "non_ema.")
    for kind in ("safetensors", "bin"):
        for variant in variants:
            for stem in stems:
                for name in (f"{stem}.{kind}.index.{variant}json",
                             f"{stem}.{variant}{kind}.index.json"):
                    if (folder / name).exists():
                        return read_shards(folder / name)
                path = folder / f"{stem}.{variant}{kind}"
                if path.exists():
                    weights = read_weights(path)
                    refuse_foreign(weights)
                    return Reader(weights), [path]
    raise InputError(f"{folder} holds no weights: {stems[0]} or {stems[1]}.safetensors is needed, "
                     "single or sharded")


def read_shards(index: Path) -> tuple[Reader, list[Path]]:
    """All shards as one; each has to hold exactly the tensors that the index says."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(
            isinstance(v, str) and Path(v).name == v for v in table.values()):
        raise InputError(f"{index}: its weight_map is not a table of tensors and files beside it")
    tensors, paths = {}, [index.parent / name for name in sorted(set(table.values()))]
    for path in paths:
        part = read_weights(path).tensors
        said = {name for name, file in table.items() if file == path.name}
        if wrong := sorted(said ^ set(part)):
            raise InputError(f"{path} does not hold what {index.name} says: "
                             f"{', '.join(wrong[:10])} ({len(wrong)} in all)")
        tensors |= part
    weights = Weights(index, tensors)
    refuse_foreign(weights)
    return Reader(weights), paths


def check(given: dict, must: dict, free: set[str], path: Path) -> None:
    """Refuse a config value that our network does not have; null and false of unknown keys pass."""
    for key, value in given.items():
        if key in must:
            if value != must[key]:
                raise InputError(f"{path}: {key} {value!r} is not supported; {must[key]!r} is")
        elif key not in free and not key.startswith("_") and value not in (None, False):
            what = "SDXL is not supported: " if value == "text_time" else ""
            raise InputError(f"{path}: {what}{key} {value!r} is not known here")


def unet_config(c: dict, path: Path) -> unets.UNetConfig:
    """diffusers' UNet2DConditionModel config → ours, with diffusers' defaults for what is left out.

    Its attention_head_dim is the number of heads.
    """
    check(c, UNET_MUST, UNET_FREE, path)
    channels = _tuple(c.get("block_out_channels", (320, 640, 1280, 1280)), path)
    down = c.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = c.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    attention = tuple(kind == "CrossAttnDownBlock2D" for kind in down)
    mirror = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)]
    known = set(down) <= {"CrossAttnDownBlock2D", "DownBlock2D"}
    if len(down) != len(channels) or list(up) != mirror or not known:
        raise InputError(f"{path}: blocks {', '.join(map(str, [*down, *up]))} are not those of "
                         "Stable Diffusion")
    heads = c.get("attention_head_dim", 8)
    heads = _tuple(heads, path) if isinstance(heads, list) else (heads,) * len(channels)
    if len(heads) != len(channels) or not all(isinstance(h, int) and h > 0 for h in heads):
        raise InputError(f"{path}: attention_head_dim {heads} is not possible")
    one_number = len(set(heads)) == 1
    widths = {width / h for width, h in zip(channels, heads)}
    width = widths.pop()
    if not one_number and (widths or not width.is_integer()):
        raise InputError(f"{path}: attention_head_dim {list(heads)} has neither one number of "
                         "heads nor one width")
    linear = bool(c.get("use_linear_projection", False))
    return unets.UNetConfig(
        channels, attention, c.get("cross_attention_dim", 1280),
        heads=heads[0] if one_number else None, head_dim=None if one_number else int(width),
        linear_projection=linear,
        float32_attention=linear or bool(c.get("upcast_attention", False)),
        blocks=c.get("layers_per_block", 2), groups=c.get("norm_num_groups", 32),
    )


def vae_config(c: dict, path: Path) -> vaes.VAEConfig:
    check(c, VAE_MUST, VAE_FREE, path)
    kinds = {*c.get("down_block_types", ["DownEncoderBlock2D"]),
             *c.get("up_block_types", ["UpDecoderBlock2D"])}
    if kinds != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise InputError(f"{path}: blocks {', '.join(sorted(map(str, kinds)))} are not those of "
                         "Stable Diffusion's VAE")
    return vaes.VAEConfig(_tuple(c.get("block_out_channels", (64,)), path),
                          c.get("layers_per_block", 1), c.get("norm_num_groups", 32))


def clip_config(c: dict, path: Path) -> clips.CLIPConfig:
    activation, eps = c.get("hidden_act", "quick_gelu"), c.get("layer_norm_eps", 1e-5)
    tokens = c.get("max_position_embeddings", 77)
    if activation not in ("quick_gelu", "gelu") or eps != 1e-5 or tokens != clips.TOKENS:
        raise InputError(f"{path}: not CLIP's text tower (hidden_act {activation!r}, "
                         f"layer_norm_eps {eps!r})")
    vocabulary = c.get("vocab_size", 49408)
    if not isinstance(vocabulary, int) or vocabulary <= clips.EOS:
        raise InputError(f"{path}: vocab_size {vocabulary!r} lacks the tokens of the empty prompt, "
                         f"up to {clips.EOS}")
    quick = activation == "quick_gelu"
    return clips.CLIPConfig(
        c.get("hidden_size", 512), c.get("num_hidden_layers", 12), c.get("num_attention_heads", 8),
        quick_gelu=quick, pad=clips.EOS if quick else 0, inner=c.get("intermediate_size", 2048),
        vocabulary=vocabulary,
    )


def schedule(c: dict, path: Path) -> Schedule:
    kind, steps = c.get("beta_schedule", "linear"), c.get("num_train_timesteps", 1000)
    if c.get("rescale_betas_zero_snr"):
        raise InputError(f"{path}: rescale_betas_zero_snr is not supported: σ would be infinite at "
                         "the start")
    try:
        start, end = float(c.get("beta_start", 1e-4)), float(c.get("beta_end", 0.02))
        if not 2 <= steps <= 100_000 or not 0 < start <= end < 1:
            raise ValueError("out of range")
        if c.get("trained_betas") is not None:
            betas = torch.tensor(c["trained_betas"], dtype=torch.float64)
            if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
                raise ValueError("trained_betas out of range")
        elif kind == "scaled_linear":
            return Schedule.scaled_linear(start, end, steps)
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        else:
            raise ValueError(f"beta_schedule {kind!r} is neither scaled_linear nor linear")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} describes no noise schedule: {error}") from None
    return Schedule((1 - betas).cumprod(0))


def _tuple(values: object, path: Path) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or not values or not all(
            isinstance(v, int) and v > 0 for v in values):
        raise InputError(f"{path}: {values!r} is no list of channels")
    return tuple(values)
