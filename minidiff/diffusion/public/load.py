"""A public Stable Diffusion model, SD 1.x or 2.x, LDM file or diffusers folder, whole and exact."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minidiff.diffusion.public.certificate import KNOWN, Certificate, describe_file
from minidiff.diffusion.public.folder import read_folder, read_vae_folder
from minidiff.diffusion.public.ldm import read_ldm, read_vae_file
from minidiff.diffusion.public.reader import Contents
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
    contents = read_folder(path, ema) if path.is_dir() else read_ldm(read_weights(path), ema)
    if vae is not None:
        other = read_vae(Path(vae))
        contents.vae = other.vae
        contents.files += other.files
        if "VAE" in contents.parts:
            own = contents.parts["VAE"].tensors
            contents.not_used["the model's own VAE: another is put on top"] += own
        contents.parts |= other.parts
        contents.not_used += other.not_used
        contents.source_tensors += other.source_tensors
    if contents.vae is None:
        raise InputError(f"{path} holds no VAE: name one (--vae FILE)")
    files = [describe_file(file) for file in contents.files]
    prediction, prediction_from = which_prediction(contents, files, prediction)
    context, context_from = which_context(contents, null_context)
    ends = contents.schedule.alphas_cumprod[[0, -1]].tolist()
    certificate = Certificate(
        files, contents.dialect, contents.version, contents.ema, contents.parts,
        dict(contents.not_used), contents.source_tensors, prediction, prediction_from,
        contents.schedule_from, tuple(ends), context_from,
    )
    counted = sum(p.tensors for p in contents.parts.values()) + sum(contents.not_used.values())
    assert counted == contents.source_tensors, (counted, contents.source_tensors)
    return SDParts(contents.vae, contents.unet, contents.schedule, prediction, context, certificate)


def read_vae(path: Path) -> Contents:
    return read_vae_folder(path) if path.is_dir() else read_vae_file(read_weights(path))


def which_prediction(contents: Contents, files: list[dict], given: str | None) -> tuple[str, str]:
    """eps or v, by the folder, the known hash or the user: the weights do not tell."""
    known = next((KNOWN[f["sha256"]] for f in files if f["known"] and KNOWN[f["sha256"]][2]), None)
    said, where = contents.prediction, contents.prediction_from
    if known:
        said, where = known[2], f"the known hash of {known[0]}"
    if said not in (None, "eps", "v", "x0"):
        raise InputError(f"{contents.path}: prediction {said!r} is not one of eps, v, x0")
    if given not in (None, "", "eps", "v", "x0"):
        raise InputError(f"--prediction {given!r} is not one of eps, v, x0")
    if given and said and given != said:
        raise InputError(f"{contents.path}: --prediction {given} contradicts {where}, which says "
                         f"{said}")
    if not (given or said):
        raise InputError(f"{contents.path}: whether it predicts eps or v cannot be told from the "
                         "weights; give --prediction eps (SD 1.x, 2.x-base) or v (2.x at 768 px)")
    return (said, where) if said else (given, "--prediction")


def which_context(contents: Contents, choice: str) -> tuple[Tensor, str]:
    """The null context (K, d) and where it came from."""
    width = contents.unet.config.context_dim
    if choice == "zeros":
        return (torch.zeros(77, width),
                "zeros, as asked for; the public model was fed CLIP of the empty prompt")
    if choice != "tower":
        context = read_weights(choice).tensors.get("null")
        if context is None or context.ndim != 2 or context.shape[1] != width:
            raise InputError(f"{choice} holds no null context (K, {width})")
        return context.float().clone(), str(choice)
    if contents.clip is None:
        raise InputError(f"{contents.path} holds no text tower, so no null context: give "
                         "--null-context zeros or FILE")
    if contents.clip.config.width != width:
        raise InputError(f"{contents.path}: a text tower {contents.clip.config.width} wide does "
                         f"not fit a UNet that takes {width}")
    layers = contents.clip.config.layers
    return (contents.clip.null_context(),
            f"77 × {width}: {layers} layers of the text tower on the empty prompt")
