"""diffusers folders: unet/, vae/, text_encoder/, scheduler/, each a config.json and weights.

The configs go both ways. One that is read has to equal what is written for the network built from
it, key by key, so that a network of another kind is refused.
"""

from itertools import product
from pathlib import Path

import torch

from minidiff.diffusion import clip as clips
from minidiff.diffusion import unet as unets
from minidiff.diffusion import vae as vaes
from minidiff.diffusion.public.ldm import SCALE, take_vae
from minidiff.diffusion.public.reader import Contents, Reader, on_meta, possible, require_plain
from minidiff.diffusion.public.weights import Weights, read_file, read_json, read_weights, unwrapped
from minidiff.diffusion.schedule import Schedule
from minidiff.errors import InputError, first_few

UNET_FIXED = {  # what our UNet is, in keys that `unet_json` leaves out
    "resnet_time_scale_shift": "default", "dropout": 0.0, "time_embedding_type": "positional",
    "transformer_layers_per_block": 1, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "resnet_out_scale_factor": 1.0,
    "addition_embed_type_num_heads": 64,
}
VAE_FIXED = {"use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
# any value will do: they change no network, or `unet_config` and `add_vae` have checked them
FREE = ("sample_size", "attention_head_dim", "upcast_attention", "scaling_factor", "force_upcast",
        # what diffusers' EMAModel writes into unet_ema/
        "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup",
        "inv_gamma", "power")
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin",
              "adapter_model.safetensors")  # of diffusers, of peft
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # ours: diffusers'


def read_folder(folder: Path, ema: str) -> Contents:
    """Networks on the CPU in float32, None without a folder."""
    for name, what in (("transformer", "SD3 or Flux (a transformer)"),
                       ("text_encoder_2", "SDXL (text_encoder_2)")):
        if (folder / name).is_dir():
            raise InputError(f"{folder}: {what} is not supported; SD 1.x and 2.x are")
    contents = read_unet_folder(folder, ema)
    if (folder / "vae").is_dir():
        add_vae(contents, folder / "vae")
    if (folder / "text_encoder").is_dir():
        add_clip(contents, folder / "text_encoder")
    path = folder / "scheduler" / "scheduler_config.json"
    if path.exists():
        described = read_json(path)
        with possible(path):
            contents.schedule = schedule(described)
        contents.schedule_from = contents.prediction_from = str(path.relative_to(folder))
        kind = described.get("prediction_type")
        if "prediction_type" not in described and contents.version == "SD 1.x":
            kind = "epsilon"
            contents.prediction_from += ", which names none: eps"
        known = {None: None, **{theirs: ours for ours, theirs in PREDICTIONS.items()}}
        if kind not in known:
            raise InputError(f"{path}: prediction_type {kind!r} is not one of "
                             f"{', '.join(PREDICTIONS.values())}")
        contents.prediction = known[kind]
    return contents


def read_unet_folder(folder: Path, ema: str) -> Contents:
    """The UNet of a pipeline, of a checkpoint-500 of diffusers' training scripts, or one alone.

    Its average lies in unet_ema/ beside unet/, or in plain files beside *.non_ema ones.
    """
    last, average = folder / "unet", folder / "unet_ema"
    alone = not last.is_dir() and not average.is_dir()
    at = folder if alone else average if average.is_dir() and ema != "no" else last
    path = at / "config.json"
    if not path.exists():
        raise InputError(f"{path} is missing: {what_lies_in(folder)}")
    described = read_json(path)
    if (kind := described.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
        raise InputError(f"{path} is of {kind!r}, not of a UNet")
    require_plain(described.get("in_channels"), path)
    with possible(path):
        config = unet_config(described)
    net = on_meta(unets.UNet, config, path)
    check(described, UNET_FIXED | unet_json(config, 0), path)
    reader = Reader(read_part(at, non_ema=ema == "no"))
    used = reader.weights.files[0].name
    if ema == "yes" and "non_ema" in used:
        raise InputError(f"{at} holds no EMA weights, only {used} (--ema no)")
    version = "SD 2.x" if config.linear_projection else "SD 1.x"
    known = average.is_dir() and not alone
    report = ("taken" if at == average else "in the folder, not taken") if known else ""
    contents = Contents(folder, "diffusers", [reader], version, report or "as the folder has it")
    contents.unet = reader.take("UNet", net, {name: name for name in net.state_dict()})
    return contents


def what_lies_in(folder: Path) -> str:
    """Of a folder without a UNet: what its files say it is, and what to give in its place."""
    if found := sorted(path.name for path in folder.glob("checkpoint-*")):
        return f"name one of its {first_few(found, 10)}"
    if found := [f"snapshots/{path.name}" for path in sorted(folder.glob("snapshots/*"))]:
        return f"name one of its {first_few(found, 10)}"  # the cache of a hub
    if found := [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]:
        return f"{found[0].name} is a link to {found[0].readlink()}, which is not there"
    if found := [name for name in LORA_FILES if (folder / name).exists()]:
        return f"{found[0]} is a LoRA file; name the model it was made for, and this by --lora"
    return "a pipeline's folder, or one with a UNet in unet/ or unet_ema/, is needed"


def read_vae_folder(folder: Path) -> Contents:
    """A VAE alone (config.json and weights, such as sd-vae-ft-mse), or the vae/ of a pipeline."""
    contents = Contents(folder, "diffusers", [])
    add_vae(contents, folder / "vae" if (folder / "vae").is_dir() else folder)
    return contents


def add_vae(contents: Contents, folder: Path) -> None:
    path = folder / "config.json"
    described = read_json(path)
    scale = described.get("scaling_factor", SCALE)
    with possible(path):
        config = vaes.VAEConfig(tuple(described.get("block_out_channels", (64,))),
                                described.get("layers_per_block", 1),
                                described.get("norm_num_groups", 32))
        if not 0 < scale < 100:
            raise ValueError(f"scaling_factor {scale}")
    reader = Reader(read_part(folder))
    contents.readers.append(reader)
    contents.vae = take_vae(reader, config, "diffusers", scale)
    check(described, VAE_FIXED | vae_json(config, scale, 0), path)


def add_clip(contents: Contents, folder: Path) -> None:
    path = folder / "config.json"
    described = read_json(path)
    with possible(path):
        config = clip_config(described)
    reader, net = Reader(read_part(folder)), on_meta(clips.CLIP, config, path)
    contents.readers.append(reader)
    prefix = "text_model." if any(n.startswith("text_model.encoder.") for n in reader.left) else ""
    names = {name: prefix + name for name in net.state_dict()}
    contents.clip = reader.take("text tower", net, names)
    reader.ignore("parts of the text tower that give no context",
                  "text_projection.weight", "logit_scale", ends=("embeddings.position_ids",))


def read_part(folder: Path, non_ema: bool = False) -> Weights:
    """The weights of one folder: single or sharded, float32 first, safetensors before torch's."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    variants = ("non_ema.", "") if non_ema else ("", "fp16.", "bf16.", "non_ema.")
    for kind, variant, stem in product(("safetensors", "bin"), variants, stems):
        for name in (f"{stem}.{kind}.index.{variant}json", f"{stem}.{variant}{kind}.index.json",
                     f"{stem}.{variant}{kind}"):
            if (folder / name).exists():
                read = read_shards if name.endswith(".json") else read_weights
                return read(folder / name)
    raise InputError(f"{folder} holds no weights: {stems[0]} or {stems[1]}.safetensors is needed, "
                     f"single or sharded; {what_lies_in(folder)}")


def read_shards(index: Path) -> Weights:
    """All shards as one; each has to hold exactly the tensors that the index says."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(
            isinstance(v, str) and Path(v).name == v for v in table.values()):
        raise InputError(f"{index}: its weight_map is not a table of tensors and files beside it")
    tensors, paths = {}, [index.parent / name for name in sorted(set(table.values()))]
    for path in paths:
        part = read_file(path).tensors
        wrong = {name for name, file in table.items() if file == path.name} ^ part.keys()
        if wrong:
            raise InputError(f"{path} does not hold what {index.name} says: "
                             f"{first_few(sorted(wrong), 10)}")
        tensors |= part
    return unwrapped(Weights(index, tensors, paths))


def check(given: dict, ours: dict, path: Path) -> None:
    """Refuse a config value that our network does not have; null and false of unknown keys pass."""
    for key, value in given.items():
        if key in FREE or key.startswith("_"):
            continue
        if key not in ours and value not in (None, False):
            raise InputError(f"{path}: {key} {value!r} is not known here")
        if value != ours.get(key, value):
            raise InputError(f"{path}: {key} {value!r} is not supported; {ours[key]!r} is")


def unet_config(c: dict) -> unets.UNetConfig:
    """diffusers' UNet2DConditionModel config → ours, with diffusers' defaults for what is left out.

    Its attention_head_dim is the number of heads.
    """
    channels = tuple(c.get("block_out_channels", (320, 640, 1280, 1280)))
    down = c.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    heads = c.get("attention_head_dim", 8)
    heads = heads if isinstance(heads, list) else [heads] * len(channels)
    one, width = len(set(heads)) == 1, channels[0] // heads[0]
    if not len(channels) == len(down) == len(heads) or not (
            one or heads == [each / width for each in channels]):
        raise ValueError(f"{len(down)} blocks of {channels} channels with attention_head_dim "
                         f"{heads}, which is neither one number of heads nor one width")
    linear = bool(c.get("use_linear_projection", False))
    return unets.UNetConfig(
        channels, tuple(kind == "CrossAttnDownBlock2D" for kind in down),
        c.get("cross_attention_dim", 1280), heads=heads[0] if one else None,
        head_dim=None if one else width, linear_projection=linear,
        float32_attention=linear or bool(c.get("upcast_attention", False)),
        blocks=c.get("layers_per_block", 2), groups=c.get("norm_num_groups", 32),
    )


def unet_json(c: unets.UNetConfig, cells: int) -> dict:
    heads = [c.heads or width // c.head_dim for width in c.channels]
    cross = ["CrossAttn" if attention else "" for attention in c.attention]
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": cells,
        "in_channels": c.latent_channels, "out_channels": c.latent_channels,
        "block_out_channels": list(c.channels), "layers_per_block": c.blocks,
        "down_block_types": [f"{kind}DownBlock2D" for kind in cross],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(cross)],
        "mid_block_type": "UNetMidBlock2DCrossAttn", "cross_attention_dim": c.context_dim,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,  # the number of heads
        "norm_num_groups": c.groups, "use_linear_projection": c.linear_projection,
        "upcast_attention": c.float32_attention, "act_fn": "silu", "norm_eps": 1e-5,
        "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
        "center_input_sample": False, "mid_block_scale_factor": 1,
    }


def vae_json(c: vaes.VAEConfig, scale: float, size: int) -> dict:
    n = len(c.channels)
    return {
        "_class_name": "AutoencoderKL", "sample_size": size, "in_channels": 3, "out_channels": 3,
        "latent_channels": c.latent_channels, "block_out_channels": list(c.channels),
        "layers_per_block": c.blocks, "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n, "norm_num_groups": c.groups, "act_fn": "silu",
        "scaling_factor": round(scale, 9), "force_upcast": True,
    }


def clip_config(c: dict) -> clips.CLIPConfig:
    must = {"max_position_embeddings": clips.TOKENS, "layer_norm_eps": 1e-5}
    quick, vocabulary = c.get("hidden_act", "quick_gelu"), c.get("vocab_size", 49408)
    if quick not in ("quick_gelu", "gelu") or vocabulary <= clips.EOS or any(
            c.get(key, value) != value for key, value in must.items()):
        raise ValueError(f"CLIP's text tower has hidden_act quick_gelu or gelu, a vocab_size above "
                         f"{clips.EOS}, {must}")
    quick = quick == "quick_gelu"
    return clips.CLIPConfig(
        c.get("hidden_size", 512), c.get("num_hidden_layers", 12), c.get("num_attention_heads", 8),
        quick_gelu=quick, pad=clips.EOS if quick else 0, inner=c.get("intermediate_size", 2048),
        vocabulary=vocabulary,
    )


def schedule(c: dict) -> Schedule:
    kind, steps = c.get("beta_schedule", "linear"), c.get("num_train_timesteps", 1000)
    start, end = float(c.get("beta_start", 1e-4)), float(c.get("beta_end", 0.02))
    if not 2 <= steps <= 100_000 or not 0 < start <= end < 1:
        raise ValueError(f"{steps} steps of beta from {start} to {end}")
    given = c.get("trained_betas")
    if given is None and kind not in ("scaled_linear", "linear"):
        raise ValueError(f"beta_schedule {kind!r} is neither scaled_linear nor linear")
    if given is None:
        made = getattr(Schedule, kind)(start, end, steps)
    else:
        betas = torch.as_tensor(given, dtype=torch.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("trained_betas must lie between 0 and 1")
        made = Schedule((1 - betas).cumprod(0))
    return made.to_zero_snr() if c.get("rescale_betas_zero_snr") else made
