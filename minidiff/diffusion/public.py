"""Public Stable Diffusion checkpoints in and out, exactly: SD 1.x and 2.x, LDM files and diffusers folders.

    python -m minidiff.diffusion.public show v1-5-pruned-emaonly.safetensors
    python -m minidiff.diffusion.public export runs/x/diffusion --to diffusers --out exported
    python -m minidiff.diffusion.public export runs/x/diffusion --to ldm --rows rows.csv --out exported
    python -m minidiff.diffusion.public latents sd-v1-4.ckpt --data DIR --size 512

`show` prints the load certificate, `export` hands a finished run to other tools, `latents` asks before any training
whether the VAE fits the images.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minidiff import config, runs
from minidiff.data import images
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
from minidiff.diffusion import export as exports
from minidiff.diffusion import store
from minidiff.diffusion.certificate import KNOWN, Certificate, describe_file
from minidiff.diffusion.folder import read_folder, read_vae_folder
from minidiff.diffusion.latents import report
from minidiff.diffusion.ldm import read_ldm, read_vae_file
from minidiff.diffusion.reader import Found
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet
from minidiff.diffusion.vae import VAE
from minidiff.diffusion.weights import read_weights
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


def load_sd(path: str | Path, *, prediction: str | None = None, ema: EMA = "auto", null_context: str = "tower",
            vae: str | Path | None = None) -> SDParts:
    """Read an LDM .ckpt or .safetensors file or a diffusers folder of SD 1.x or 2.x, every tensor accounted for once.

    prediction: eps or v, needed where neither the folder nor the file's SHA-256 tells it. ema: auto takes the moving
    average of the UNet if the file has one. null_context: tower (the text tower is run once on the empty prompt, and
    dropped), zeros, or a contexts.safetensors that was exported. vae: another VAE on top, file or folder.
    float32 on the CPU; tensors of a float32 file stay mapped to it, copy on write. Raises InputError.
    """
    path = Path(path)
    found = read_folder(path, ema) if path.is_dir() else read_ldm(read_weights(path), ema)
    if vae is not None:
        other = read_vae(Path(vae))
        found.vae = other.vae
        found.files += other.files
        if "VAE" in found.parts:
            found.not_used["the model's own VAE: another is put on top"] += found.parts["VAE"].tensors
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
        files, found.dialect, found.version, found.ema, found.parts, dict(found.not_used), found.source_tensors,
        prediction, prediction_from, found.schedule_from, tuple(ends), context_from,
    )
    counted = sum(p.tensors for p in found.parts.values()) + sum(found.not_used.values())
    assert counted == found.source_tensors, f"{counted} tensors accounted for, {found.source_tensors} read"
    return SDParts(found.vae, found.unet, found.schedule, prediction, context, certificate)


def read_vae(path: Path) -> Found:
    return read_vae_folder(path) if path.is_dir() else read_vae_file(read_weights(path))


def which_prediction(found: Found, files: list[dict], given: str | None) -> tuple[str, str]:
    """eps or v cannot be told from the weights: the folder, the known hash or the user says it, or it is refused."""
    known = next((KNOWN[f["sha256"]] for f in files if f["known"] and KNOWN[f["sha256"]][2]), None)
    said, where = (known[2], f"the known hash of {known[0]}") if known else (found.prediction, found.prediction_from)
    if said not in (None, "eps", "v", "x0"):
        raise InputError(f"{found.path}: prediction {said!r} is not one of eps, v, x0")
    if given not in (None, "", "eps", "v", "x0"):
        raise InputError(f"--prediction {given!r} is not one of eps, v, x0")
    if given and said and given != said:
        raise InputError(f"{found.path}: --prediction {given} contradicts {where}, which says {said}")
    if not (given or said):
        raise InputError(f"{found.path}: whether it predicts eps or v cannot be told from the weights; give "
                         "--prediction eps (SD 1.x, 2.x-base) or v (2.x at 768 px)")
    return (said, where) if said else (given, "--prediction")


def which_context(found: Found, choice: str) -> tuple[Tensor, str]:
    """The null context (K, d) and where it came from."""
    width = found.unet.config.context_dim
    if choice == "zeros":
        return torch.zeros(77, width), "zeros, as asked for; the public model was fed CLIP of the empty prompt"
    if choice != "tower":
        context = read_weights(choice).tensors.get("null")
        if context is None or context.ndim != 2 or context.shape[1] != width:
            raise InputError(f"{choice} holds no null context (K, {width})")
        return context.float().clone(), str(choice)
    if found.clip is None:
        raise InputError(f"{found.path} holds no text tower, so no null context: give --null-context zeros or FILE")
    if found.clip.config.width != width:
        raise InputError(f"{found.path}: a text tower {found.clip.config.width} wide does not fit a UNet that takes {width}")
    layers = found.clip.config.layers
    return found.clip.null_context(), f"77 × {width}: {layers} layers of the text tower on the empty prompt"


@dataclass(frozen=True)
class ShowConfig:
    file: str = ""                         # LDM file or diffusers folder; stands without its flag, first
    vae: str = ""                          # another VAE on top, file or folder
    prediction: Literal["", "eps", "v", "x0"] = ""  # where neither the folder nor a known hash tells it
    ema: Literal["auto", "yes", "no"] = "auto"      # the moving average of the UNet: taken if the file has one
    null_context: str = "tower"            # tower, zeros, or a contexts.safetensors
    json: bool = False                     # as JSON in place of the table


def show(cfg: ShowConfig) -> None:
    """Read a public model and print its load certificate."""
    certificate = _load(cfg.file, cfg.vae, cfg.prediction, cfg.ema, cfg.null_context).certificate
    print(json.dumps(certificate.json(), indent=2, ensure_ascii=False) if cfg.json else certificate.text())


@dataclass(frozen=True)
class ExportConfig:
    run: str = "runs/demo/diffusion"       # finished diffusion run; stands without its flag, first
    to: Literal["diffusers", "ldm"] = "diffusers"  # a diffusers folder, or one LDM file
    out: str = ""                          # new folder
    rows: str = ""                         # CSV of conditions, one context each, besides null and every label


def export(cfg: ExportConfig) -> None:
    """Write a finished run as a diffusers folder or an LDM file, with the finished contexts beside it."""
    if not cfg.out:
        raise InputError("export needs --out FOLDER")
    pipeline, _ = store.load_pipeline(Path(cfg.run))
    rows = exports.read_rows(cfg.rows, pipeline.conditioner.variables) if cfg.rows else []
    exports.export(pipeline, cfg.to, Path(cfg.out), rows)
    print(f"{cfg.out}: {cfg.run} for {cfg.to}, trained to predict {pipeline.denoiser.prediction}; contexts.safetensors "
          "holds what other tools take as prompt_embeds and, under null, as negative_prompt_embeds")


@dataclass(frozen=True)
class LatentsConfig:
    file: str = ""                         # public model or VAE alone; stands without its flag, first
    data: tuple[str, ...] = ()             # data sets: folders with metadata.csv or class folders
    size: int = 512                        # side of the square images, px; a multiple of 8
    n: int = 64                            # images, evenly spread over the table
    out: str = "runs/latents"              # folder of latents.json and reconstructions.png


def latents(cfg: LatentsConfig) -> None:
    """Measure these images' latents against the VAE's published scale, and its reconstruction error, before any training."""
    if not cfg.data or cfg.size % 8 or cfg.size < 32 or cfg.n < 1:
        raise InputError("latents needs --data DIR, a --size that is a multiple of 8, 32 or more, and --n of 1 or more")
    vae = read_vae(_named(cfg.file)).vae
    table = read_table(cfg.data, split=False)
    step = max(1, len(table) // cfg.n)
    chosen = replace(table, rows=list(table.rows)[::step][: cfg.n])
    facts, shown = report(vae, load_pixels(chosen, cfg.size)[1])
    out = Path(cfg.out)
    images.write(out / "reconstructions.png", images.grid(shown, columns=len(shown) // 2))
    runs.write_json(out / "latents.json", {"file": cfg.file, "data": list(cfg.data), **facts})
    print(f"latents of {facts['images']} images, unscaled, per channel:\n"
          + "\n".join(f"  {c}  mean {m:+.3f}  std {s:.3f}  of its variance the encoder's noise {100 * k:.1f} %"
                      for c, (m, s, k) in enumerate(zip(facts["mean"], facts["std"], facts["noise_share"])))
          + f"\n1/std of all {facts['scale_of_these_images']:.5f} against the published {facts['scale']:.5f}: scaled "
          f"latents have std {facts['std_scaled']:.3f}\n"
          f"reconstruction: PSNR {facts['psnr_mean']:.2f} dB (worst {facts['psnr_min']:.2f}), "
          f"mean |error| {255 * facts['mean_absolute_error']:.2f} of 255, chroma {facts['chroma']:.2f}\n"
          f"{out}: latents.json, reconstructions.png")


def _load(file: str, vae: str, prediction: str, ema: EMA, null_context: str) -> SDParts:
    return load_sd(_named(file), vae=vae or None, prediction=prediction or None, ema=ema, null_context=null_context)


def _named(file: str) -> Path:
    if not file:
        raise InputError("name the FILE first: a checkpoint or a diffusers folder")
    return Path(file)


def positional(argv: list[str]) -> list[str]:
    """`show FILE` is short for `show --file FILE`."""
    flag = {"show": "--file", "export": "--run", "latents": "--file"}.get(argv[0] if argv else "")
    return [argv[0], flag, *argv[1:]] if flag and len(argv) > 1 and not argv[1].startswith("-") else argv


VERBS = {"show": (ShowConfig, show), "export": (ExportConfig, export), "latents": (LatentsConfig, latents)}

if __name__ == "__main__":
    config.main(VERBS, default="show", doc=__doc__, argv=positional(sys.argv[1:]))
