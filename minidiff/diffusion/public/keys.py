"""Names of tensors: ours (diffusers' and transformers' attribute names) ↔ those of LDM files.

Every map is a dict {our name: public name}, made from our own names, so that it is one to one and
its inverse needs no parsing. Where one public tensor holds several of ours (OpenCLIP's q, k and v),
the map gives (name, part). Nothing of ours is imported.

    LDM prefix               ours              rules
    model.diffusion_model.   UNet              blocks of all levels are numbered through
    first_stage_model.       VAE               up.0 is the finest; attention is 1×1 convolutions
    cond_stage_model.        CLIP              SD 1.x transformers' own names, SD 2.x OpenCLIP's
    model_ema.               UNet, once more   names without dots: mapped to, never back
"""

import re
from collections.abc import Iterable

UNET, VAE, CLIP_L, OPENCLIP = ("model.diffusion_model.", "first_stage_model.",
                               "cond_stage_model.transformer.", "cond_stage_model.model.")
EMA = "model_ema."
THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}

RESBLOCK = {  # UNet
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_RULES = (
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"conv_norm_out", "norm_out"), (r"conv_shortcut", "nin_shortcut"),
)
VAE_ATTENTION = {  # ours: LDM, old diffusers
    "group_norm": ("norm", "group_norm"), "to_q": ("q", "query"), "to_k": ("k", "key"),
    "to_v": ("v", "value"), "to_out.0": ("proj_out", "proj_attn"),
}
OPENCLIP_RULES = (
    (r"encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."), (r"layer_norm(\d)", r"ln_\1"),
    (r"self_attn", "attn"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"final_layer_norm", "ln_final"), (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
)


def unet_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """Our UNet's names → LDM's, below the prefix, which number all levels' blocks through.

    Going down, a resampling has a number of its own; going up, it belongs to the last block.
    """
    names = list(names)
    matches = [re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name) for name in names]
    blocks = {side: 1 + max(int(m[4]) for m in matches if m and m[1] == side and m[3] == "resnets")
              for side in ("down", "up")}
    attentive = {(m[1], m[2]) for m in matches if m and m[3] == "attentions"}

    def inside(side: str, level: str, kind: str, i: str, rest: str) -> str:
        k, n = int(level), blocks[side]
        if kind == "downsamplers":
            return f"input_blocks.{(k + 1) * (n + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{(k + 1) * n - 1}.{1 + ((side, level) in attentive)}.{rest}"
        block = (f"input_blocks.{1 + k * (n + 1) + int(i)}" if side == "down"
                 else f"output_blocks.{k * n + int(i)}")
        return f"{block}.1.{rest}" if kind == "attentions" else f"{block}.0.{_resblock(rest)}"

    return {name: inside(*m.groups()) if m else _unet_end(name) for name, m in zip(names, matches)}


def vae_to_ldm(names: Iterable[str]) -> dict[str, str]:
    """Our VAE's names → LDM's, below the prefix; its decoder's level 0 is the finest."""
    names = list(names)
    top = max(int(m[1]) for name in names if (m := re.match(r"decoder\.up_blocks\.(\d+)", name)))

    def one(name: str) -> str:
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda m: str(top - int(m[0])), name)
        return _ruled(VAE_RULES, _vae_attention(name, 0))

    return {name: one(name) for name in names}


def vae_to_old_diffusers(names: Iterable[str]) -> dict[str, str]:
    """Our VAE's names → diffusers' until 2023: query, key, value, proj_attn in its attention."""
    return {name: _vae_attention(name, 1) for name in names}


def clip_to_openclip(names: Iterable[str], prefix: str = "") -> dict[str, str | tuple[str, int]]:
    """Our tower's names → OpenCLIP's; q, k and v are thirds (name, 0 … 2) of its in_proj."""
    def one(name: str) -> str | tuple[str, int]:
        third = re.search(r"self_attn\.([qkv]_proj)\.(weight|bias)", name)
        name = prefix + _ruled(OPENCLIP_RULES, name)
        if not third:
            return name
        return name.replace(third[0].partition(".")[2], f"in_proj_{third[2]}"), THIRDS[third[1]]

    return {name: one(name) for name in names}


def ema_name(name: str) -> str:
    """An LDM parameter's name → that of its moving average: without 'model.' and any dot."""
    return EMA + name.removeprefix("model.").replace(".", "")


def _vae_attention(name: str, dialect: int) -> str:
    """A name in the VAE's attention, as LDM (0) or diffusers until 2023 (1) has it."""
    return re.sub(r"(?<=attentions\.0\.)(\w+(?:\.0)?)(?=\.(weight|bias)$)",
                  lambda m: VAE_ATTENTION[m[0]][dialect], name)


def _ruled(rules: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _unet_end(name: str) -> str:
    for ours, ldm in UNET_ENDS.items():
        if name.startswith(ours + "."):
            rest = name.removeprefix(ours + ".")
            return f"{ldm}.{_resblock(rest) if '.resnets.' in name else rest}"
    raise KeyError(f"no LDM name for {name}")


def _resblock(rest: str) -> str:
    layer, _, leaf = rest.partition(".")
    return f"{RESBLOCK[layer]}.{leaf}"
