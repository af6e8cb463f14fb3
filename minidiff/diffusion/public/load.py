"""A public Stable Diffusion model, SD 1.x or 2.x, LDM file or diffusers folder, whole and exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minidiff.diffusion.public.certificate import KNOWN, Certificate, describe_file
from minidiff.diffusion.public.folder import read_folder, read_vae_folder
from minidiff.diffusion.public.ldm import read_ldm, read_vae_file
from minidiff.diffusion.public.reader import Found
from minidiff.diffusion.public.weights import read_weights
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError

EMA = Literal["auto", "yes", "no"]


@dataclass(frozen=True, eq=False)
class SDParts:
    """A public model, whole: what training starts from."""

    vae: VAE
    unet: UNet
    schedule: Schedule
    prediction: str
    null_context: Tensor          # (77, d): what the public model is fed for the empty prompt
    certificate: Certificate


def load_sd(path: str | Path, *, prediction: str | None = None, ema: EMA = "auto",
            null_context: str = "tower", vae: str | Path | None = None) -> SDParts:
    """Read an LDM .ckpt or .safetensors file or a diffusers folder of SD 1.x or 2.x, every tensor
    accounted for once.

    prediction: eps or v, needed where neither the folder nor the file's SHA-256 tells it. ema: auto
    takes the moving average of the UNet if the file has one. null_context: tower (the text tower is
    run once on the empty prompt, and dropped), zeros, or a contexts.safetensors that was exported.
    vae: another VAE on top, file or folder. float32 on the CPU; tensors of a float32 file stay
    mapped to it, copy on write. Raises InputError.
    """
    path = Path(path)
    found = read_folder(path, ema) if path.is_dir() else read_ldm(read_weights(path), ema)
    if vae is not None:
        other = read_vae(Path(vae))
        found.vae = other.vae
        found.files += other.files
        if "VAE" in found.parts:
            found.not_used["the model's own VAE: another is put on "
                           "top"] += found.parts["VAE"].tensors
        found.parts |= other.parts
        found.not_used += other.not_used
        found.source_tensors += other.source_tensors
    if found.vae is None:
        raise InputError(f"{path} holds no VAE: name one (--vae FILE)")
    files = [describe_file(file) for file in found.files]
    prediction, prediction_from = which_prediction(found, files, prediction)
    context, context_from = which_context(found, null_context)
    ends = found.schedule.alphas_cumprod[[0, -1]].tolist()
    certificate = Certificate(
        files, found.dialect, found.version, found.ema, found.parts, dict(found.not_used),
        found.source_tensors,
        prediction, prediction_from, found.schedule_from, tuple(ends), context_from,
    )
    counted = sum(p.tensors for p in found.parts.values()) + sum(found.not_used.values())
    assert counted == found.source_tensors, f"{counted} tensors accounted for, {found.source_tensors} read"
    return SDParts(found.vae, found.unet, found.schedule, prediction, context, certificate)


def read_vae(path: Path) -> Found:
    return read_vae_folder(path) if path.is_dir() else read_vae_file(read_weights(path))


def which_prediction(found: Found, files: list[dict], given: str | None) -> tuple[str, str]:
    """eps or v cannot be told from the weights: the folder, the known hash or the user says it, or
    it is refused.
    """
    known = next((KNOWN[f["sha256"]] for f in files if f["known"] and KNOWN[f["sha256"]][2]), None)
    said, where = (known[2], f"the known hash of {known[0]}") if known else (found.prediction,
                                                                             found.prediction_from)
    if said not in (None, "eps", "v", "x0"):
        raise InputError(f"{found.path}: prediction {said!r} is not one of eps, v, x0")
    if given not in (None, "", "eps", "v", "x0"):
        raise InputError(f"--prediction {given!r} is not one of eps, v, x0")
    if given and said and given != said:
        raise InputError(f"{found.path}: --prediction {given} contradicts {where}, which says "
                         f"{said}")
    if not (given or said):
        raise InputError(f"{found.path}: whether it predicts eps or v cannot be told from the "
                         "weights; give --prediction eps (SD 1.x, 2.x-base) or v (2.x at 768 px)")
    return (said, where) if said else (given, "--prediction")


def which_context(found: Found, choice: str) -> tuple[Tensor, str]:
    """The null context (K, d) and where it came from."""
    width = found.unet.config.context_dim
    if choice == "zeros":
        return torch.zeros(
            77, width), "zeros, as asked for; the public model was fed CLIP of the empty prompt"
    if choice != "tower":
        context = read_weights(choice).tensors.get("null")
        if context is None or context.ndim != 2 or context.shape[1] != width:
            raise InputError(f"{choice} holds no null context (K, {width})")
        return context.float().clone(), str(choice)
    if found.clip is None:
        raise InputError(f"{found.path} holds no text tower, so no null context: give "
                         "--null-context zeros or FILE")
    if found.clip.config.width != width:
        raise InputError(f"{found.path}: a text tower {found.clip.config.width} wide does not fit "
                         f"a UNet that takes {width}")
    layers = found.clip.config.layers
    return found.clip.null_context(), f"77 × {width}: {layers} layers of the text tower on the empty prompt"
