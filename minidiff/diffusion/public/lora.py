"""LoRA files in and out: kohya's form, and diffusers' and peft's, old and new; the UNet's part.

    a name's parts      kohya, LyCORIS                    diffusers and peft
    the network         lora_unet_, lycoris_              unet., base_model.model., or none
    a layer             its dots as underscores           as it is; with .processor. in old files
    D, U                .lora_down.weight, .lora_up.      .lora_A.weight, .lora_B.; in old files
                                                          .lora.down., _lora.down., …
    between the two     .lora_mid.weight (convolutions)
    α; none: the rank   .alpha                            in the header or adapter_config.json

One lookup reads them all: a layer is found by its name, ours or LDM's, with underscores for dots.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff import runs
from minidiff.diffusion.lora import Adapter
from minidiff.diffusion.public import keys
from minidiff.diffusion.public.folder import LORA_FILES
from minidiff.diffusion.public.weights import Weights, parse_json, read_weights, to_float32
from minidiff.errors import InputError, count, first_few

NETWORK = re.compile(r"^(base_model\.model\.|(model\.)?diffusion_model\.|unet\.|lora_unet_|"
                     r"lycoris_)+")
TEXT = re.compile(r"^(base_model\.model\.)?(lora_te|text_encoder|text_model)")
ROLE = re.compile(r"[._](?:lora[._](?:linear_layer\.)?(down|up|mid|A|B)(?:\.\w+)?\.weight|alpha)$")
ROLES = {"A": "down", "B": "up"}  # peft's words: kohya's and ours
OTHERS = {  # a pattern of tensors' names: a form that is not U·D alone
    r"\bhada_": "LoHa", r"\blokr_": "LoKr", r"\b(dora_scale|lora_magnitude_vector)": "DoRA",
    r"\bb?oft_": "OFT", r"\.diff(_b)?$": "whole differences",
    r"lora_B.*\.bias$": "LoRA with biases",
}
FORMS = {  # layer, down or up → its name
    "diffusers": lambda layer, role: f"unet.{layer}.lora_{'BA'[role == 'down']}.weight",
    "kohya": lambda layer, role: f"lora_unet_{layer.replace('.', '_')}.lora_{role}.weight",
}


@dataclass(frozen=True)
class LoRA:
    """The adapters of a file by the names of our layers, and what else it holds."""

    path: Path
    adapters: dict[str, Adapter]
    text_parts: int                  # tensors of the text encoder, left out
    base: str                        # what they go on, if the file says so

    def facts(self) -> dict:
        of = self.adapters.values()
        ranks, scales = [len(a.down) for a in of], [a.scale for a in of]
        return {"file": str(self.path), "sha256": runs.sha256(self.path), "layers": len(of),
                "convolutions": sum(a.down.ndim > 2 for a in of),
                "ranks": [min(ranks), max(ranks)], "scales": [min(scales), max(scales)]}

    def text(self) -> str:
        f = self.facts()
        rank, scale = (" to ".join(f"{x:g}" for x in sorted({*f[key]}))
                       for key in ("ranks", "scales"))
        more = f"; {count(self.text_parts, 'tensor')} of the text encoder left out"
        base = f"; it goes on {self.base}"
        return (f"{self.path}: LoRA of {count(f['layers'], 'layer')} of the UNet, "
                f"{f['convolutions']} of them convolutions; rank {rank}, α/rank {scale}"
                f"{more * bool(self.text_parts)}{base * bool(self.base)}")


def read_lora(path: str | Path, net: nn.Module, *, without_text: bool = False) -> LoRA:
    """The adapters for this UNet in a file, or in a folder of diffusers or peft.

    Every tensor is accounted for. Those that change the text encoder are refused, for no text runs
    here, or left out. Raises InputError.
    """
    path = Path(path)
    path = next((path / name for name in LORA_FILES if (path / name).exists()), path)
    if path.is_dir():
        raise InputError(f"{path} holds none of {', '.join(LORA_FILES)}: name the file itself")
    weights, layers = read_weights(path), layers_of(net)
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    texts, unknown = [], []
    for name, tensor in weights.tensors.items():
        if other := next((what for kind, what in OTHERS.items() if re.search(kind, name)), None):
            raise InputError(f"{path}: {other} is not supported (it holds {name}); LoRA is")
        match = ROLE.search(name)
        layer = layers.get(flat(name[:match.start()])) if match else None
        if TEXT.match(name):
            texts.append(name)
        elif layer is None:
            unknown.append(name)
        else:
            role = ROLES.get(match[1], match[1] or "alpha")
            other, _ = found.setdefault(layer, {}).setdefault(role, (name, tensor))
            if other != name:
                raise InputError(f"{path} holds {other} and {name}, two of one matrix")
    if unknown:
        raise InputError(f"{path}: {count(len(unknown), 'tensor')} of no layer of this UNet (is it "
                         f"a LoRA, and for this model?): {first_few(sorted(unknown), 10)}")
    if not found:
        raise InputError(f"{path} holds no adapter of a UNet")
    if not without_text and any(weights.tensors[n].any() for n in texts if not (
            (match := ROLE.search(n)) and match[1] not in ("up", "B"))):
        raise InputError(f"{path}: {count(len(texts), 'tensor')} change the text encoder, and no "
                         f"text runs here ({first_few(sorted(texts))}); `python -m "
                         f"minidiff.diffusion.public lora {path} --out NEW.safetensors` writes "
                         "its UNet part alone")
    declared = declared_alphas(weights)
    adapters = {layer: adapter(layer, parts, declared, net.get_submodule(layer).weight.shape, path)
                for layer, parts in sorted(found.items())}
    return LoRA(path, adapters, len(texts), weights.metadata.get("goes_on", ""))


def adapter(layer: str, parts: Mapping[str, tuple[str, Tensor]], declared: dict, shape: torch.Size,
            path: Path) -> Adapter:
    """One layer's, in float32; `shape` is that of the weight it is added to."""
    if missing := {"down", "up"} - parts.keys():
        raise InputError(f"{path}: {layer} has {first_few(n for n, _ in parts.values())}, and no "
                         f"{missing.pop()} matrix")
    given = {role: to_float32(tensor, name, path) for role, (name, tensor) in parts.items()
             if role != "alpha"}
    down, up = given["down"], given["up"]
    if "mid" in given:
        try:
            down = torch.einsum("rskl,si->rikl", given["mid"], down.flatten(1))
        except (RuntimeError, IndexError):  # named below
            down = torch.empty(())
    rank = down.shape[0] if down.ndim else 0
    if not rank or trimmed(down) != trimmed(torch.empty(rank, *shape[1:], device="meta")) or (
            trimmed(up) != trimmed(torch.empty(shape[0], rank, device="meta"))):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.values())
        raise InputError(f"{path}: {shapes}: not for {layer}, whose weight is {tuple(shape)} (a "
                         "LoRA of another model?)")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise InputError(f"{path}: {parts['down'][0]} or its up matrix is not finite")
    return Adapter(down.reshape(rank, *shape[1:]), up.reshape(shape[0], rank),
                   alpha_of(layer, parts.get("alpha"), declared, rank, path))


def trimmed(tensor: Tensor) -> tuple[int, ...]:
    """A shape without 1s at its end: that of a matrix, and of it as a 1×1 convolution."""
    shape = tuple(tensor.shape)
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def alpha_of(layer: str, own: tuple[str, Tensor] | None, declared: dict, rank: int,
             path: Path) -> float:
    """α of a layer: its own tensor, else what the header declares, else the rank."""
    pattern = declared.get("alpha_pattern") or {}
    name, value = own or ("lora_alpha", next(  # peft names a layer by its end, the first fits
        (pattern[key] for key in pattern if f".{layer}".endswith(f".{key}")),
        declared.get("lora_alpha", rank)))
    if odd := [key for key in pattern if not re.fullmatch(r"[\w.]+", key)]:
        raise InputError(f"{path}: alpha_pattern {odd[0]!r} is not the name of a layer")
    try:
        alpha = float(value) * (math.sqrt(rank) if declared.get("use_rslora") else 1.0)
    except (TypeError, ValueError, RuntimeError):
        alpha = math.nan
    if not 0 < abs(alpha) < math.inf:
        raise InputError(f"{path}: α of {layer} ({name}) is {value}; a number that is not 0 is "
                         "allowed")
    return alpha


def declared_alphas(weights: Weights) -> dict:
    """LoraConfig of peft for the UNet, as diffusers keeps it in the header and peft beside it."""
    path, beside = weights.path, weights.path.with_name("adapter_config.json")
    if any(name.startswith("base_model.model.") for name in weights.tensors):
        if not beside.exists():
            raise InputError(f"{path}: its α stands in {beside.name}, which is not beside it")
        return parse_json(beside.read_bytes(), beside)
    described = parse_json(weights.metadata.get("lora_adapter_metadata", "{}"), path)
    return {key.removeprefix("unet."): value for key, value in described.items()}


def layers_of(net: nn.Module) -> dict[str, str]:
    """Our names of all Linears and convolutions, by those names and LDM's, flat."""
    names = [name for name, module in net.named_modules()
             if isinstance(module, (nn.Linear, nn.Conv2d))]
    ldm = keys.unet_to_ldm(net.state_dict())
    return ({flat(ldm[f"{name}.weight"].removesuffix(".weight")): name for name in names}
            | {flat(name): name for name in names})


def flat(name: str) -> str:
    name = NETWORK.sub("", name).replace(".processor.", ".")
    return re.sub(r"(?<=attn[12][._])to_out$", "to_out_0", name).replace(".", "_")


def write_lora(path: Path, adapters: Mapping[str, Adapter], form: str, base: str = "") -> None:
    """In the form of diffusers, whose α is the rank, or of kohya, with one α beside each layer.

    Another α goes into U. diffusers reads layers with unlike α of kohya's form wrongly.
    """
    tensors, alphas = {}, {a.alpha for a in adapters.values()}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    for layer, a in adapters.items():
        up = a.up * (a.scale if form == "diffusers" else a.alpha / alpha)
        tensors[FORMS[form](layer, "down")] = a.down
        tensors[FORMS[form](layer, "up")] = up if a.down.ndim == 2 else up[:, :, None, None]
        if form == "kohya":
            tensors[f"lora_unet_{flat(layer)}.alpha"] = torch.tensor(alpha)
    runs.save_tensors(path, tensors, {"format": "pt", "goes_on": base})
