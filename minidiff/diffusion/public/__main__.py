"""Public Stable Diffusion checkpoints in and out, exactly: SD 1.x and 2.x, LDM files and diffusers
folders.

    python -m minidiff.diffusion.public fetch sd-1.5 --to DIR
    python -m minidiff.diffusion.public show v1-5-pruned-emaonly.safetensors
    python -m minidiff.diffusion.public export runs/x/diffusion --to diffusers --out exported
    python -m minidiff.diffusion.public export runs/x/diffusion --to ldm --rows rows.csv --out out
    python -m minidiff.diffusion.public export runs/x/diffusion --to lora --out adapters
    python -m minidiff.diffusion.public lora style.safetensors --to diffusers --out unet.safetensors
    python -m minidiff.diffusion.public latents sd-v1-4.ckpt --data DIR --size 512

`fetch` gets a public file by its name, and lists the names if none is given; nothing else here goes
to the network. `show` prints the load certificate, `export` hands a finished run to other tools,
`lora` reads a LoRA file and writes its UNet part in another form, `latents` asks before any
training whether the VAE fits the images.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import minidiff.threads  # noqa: F401  before torch: sets how its threads wait

import torch
from torch import Tensor

from minidiff import config, runs
from minidiff.data import images
from minidiff.data.dataset import load_pixels
from minidiff.data.table import read_table
from minidiff.diffusion import model as models
from minidiff.diffusion import store
from minidiff.diffusion import unet as unets
from minidiff.diffusion.public import export as exports
from minidiff.diffusion.public.fetch import FetchConfig, fetch
from minidiff.diffusion.public.load import load_sd, read_vae
from minidiff.diffusion.public.lora import LoRA, read_lora, write_lora
from minidiff.diffusion.vae import VAE, Moments, latent_scale
from minidiff.errors import InputError
from minidiff.pixels import to_float, to_uint8
from minidiff.root import Reading
from minidiff.sampling.plan import read_csv


@dataclass(frozen=True)
class ShowConfig:
    positional: ClassVar[str] = "file"
    file: str = ""                         # LDM file or diffusers folder; first, without its flag
    vae: str = ""                          # another VAE on top, file or folder
    unet: str = ""                         # another UNet on top: checkpoint-500, unet_ema, a file
    lora: tuple[str, ...] = ()             # LoRA files to read for this UNet, too
    prediction: Literal["", "eps", "v", "x0"] = ""  # if neither the folder nor a known hash tells
    ema: Literal["auto", "yes", "no"] = "auto"      # the UNet's moving average; auto: if there
    null_context: str = "tower"            # tower, zeros, or a contexts.safetensors
    json: bool = False                     # as JSON in place of the table


def show(cfg: ShowConfig) -> None:
    """Read a public model and print its load certificate."""
    parts = load_sd(_named(cfg.file), vae=cfg.vae or None, unet=cfg.unet or None,
                    prediction=cfg.prediction or None, ema=cfg.ema, null_context=cfg.null_context)
    adapters = [read_lora(file, parts.unet) for file in cfg.lora]
    facts = parts.certificate.json() | ({"lora": [a.facts() for a in adapters]} if adapters else {})
    print(json.dumps(facts, indent=2, ensure_ascii=False) if cfg.json
          else "\n".join([parts.certificate.text(), *(a.text() for a in adapters)]))


@dataclass(frozen=True)
class ExportConfig:
    positional: ClassVar[str] = "run"
    run: str = "runs/demo/diffusion"       # finished diffusion run; stands without its flag, first
    to: Literal["diffusers", "ldm", "lora", "lora-kohya"] = "diffusers"  # a folder, one LDM file,
    # or the adapters of a run of --train lora alone, for diffusers or in kohya's form
    out: str = ""                          # new folder
    rows: str = ""                         # CSV of more conditions, a context for each row


def export(cfg: ExportConfig) -> None:
    """Write a finished run as a diffusers folder or an LDM file, with its finished contexts."""
    if not cfg.out:
        raise InputError("export needs --out FOLDER")
    pipeline, _ = store.load_pipeline(Path(cfg.run))
    rows = read_csv(cfg.rows, [v.name for v in pipeline.conditioner.variables]) if cfg.rows else []
    adapters = None
    if cfg.to in exports.FORMS_OF:
        file = Path(cfg.run) / "lora.safetensors"
        if not file.exists():
            raise InputError(f"{file} is missing: {cfg.run} was not trained by --train lora, so it "
                             "is more than adapters; export it --to diffusers or ldm")
        adapters = read_lora(file, pipeline.denoiser.net.unet)
        print(adapters.text())
    exports.export(pipeline, cfg.to, Path(cfg.out), rows, adapters)
    print(f"{cfg.out}: {cfg.run} for {cfg.to}, trained to predict {pipeline.denoiser.prediction}; "
          "contexts.safetensors holds what other tools take as prompt_embeds and, under null, as "
          "negative_prompt_embeds")


@dataclass(frozen=True)
class LoRAConfig:
    writes: ClassVar[str] = ""             # one file
    positional: ClassVar[str] = "file"
    file: str = ""                         # a LoRA file, or a folder with one; first, without flag
    to: Literal["diffusers", "kohya"] = "diffusers"  # the form that is written
    out: str = ""                          # new file; none: say what was read


def lora(cfg: LoRAConfig) -> None:
    """Say what a LoRA file adapts, and write its UNet part alone, in either form."""
    def read(unet: unets.UNetConfig) -> LoRA:
        with torch.device("meta"):
            return read_lora(_named(cfg.file), unets.UNet(unet), without_text=True)

    for unet in models.UNETS.values():
        with suppress(InputError):
            found = read(unet)
            break
    else:
        found = read(unets.SD15)  # which says what does not fit
    print(found.text())
    if cfg.out:
        if Path(cfg.out).exists() or not cfg.out.endswith(".safetensors"):
            raise InputError(f"{cfg.out} is not a new FILE.safetensors; nothing is overwritten")
        write_lora(Path(cfg.out), found.adapters, cfg.to, found.base)
        print(f"{cfg.out}: for {cfg.to}")


@dataclass(frozen=True)
class LatentsConfig(Reading):
    positional: ClassVar[str] = "file"
    file: str = ""                         # public model, or VAE alone; first, without its flag
    data: tuple[str, ...] = ()             # data sets: folders with metadata.csv or class folders
    size: int = 512                        # side of the square images, px; a multiple of 8
    n: int = 64                            # images, evenly spread over the table
    out: str = "runs/latents"              # folder of latents.json and reconstructions.png


def latents(cfg: LatentsConfig) -> None:
    """Compare these images' latents with the VAE's published scale, and reconstruct them."""
    if not cfg.data or cfg.size % 8 or cfg.size < 32 or cfg.n < 1:
        raise InputError("latents needs --data DIR, a --size that is a multiple of 8, 32 or more, "
                         "and --n of 1 or more")
    vae, out = read_vae(_named(cfg.file)).vae, Path(cfg.out)
    table = read_table(cfg.data, cfg, split=False)
    rows = table.rows[::max(1, len(table) // cfg.n)][:cfg.n]
    pixels = load_pixels(replace(table, rows=rows), cfg.size)[1]
    facts, again = latent_facts(vae, pixels)
    pairs = torch.cat([pixels[:8], again[:8]])
    images.write(out / "reconstructions.png", images.grid(pairs, columns=len(pairs) // 2))
    runs.write_json(out / "latents.json", {"file": cfg.file, "data": list(cfg.data), **facts})
    print(f"latents of {facts['images']} images, unscaled, per channel:\n" + "\n".join(
        f"  {c}  mean {m:+.3f}  std {s:.3f}  of its variance the encoder's noise {100 * k:.1f} "
        f"%" for c, (m, s, k) in enumerate(zip(facts["mean"], facts["std"], facts["noise_share"])))
          + f"\n1/std of all {facts['scale_of_these_images']:.5f} against the published "
          f"{facts['scale']:.5f}: scaled latents have std "
          f"{facts['std_scaled']:.3f}\nreconstruction: PSNR {facts['psnr_mean']:.2f} dB (worst "
          f"{facts['psnr_min']:.2f}), mean |error| {255 * facts['mean_absolute_error']:.2f} of "
          f"255, chroma {facts['chroma']:.2f}\n{out}: latents.json, reconstructions.png")


@torch.no_grad()
def latent_facts(vae: VAE, pixels: Tensor) -> tuple[dict, Tensor]:
    """uint8 (N, 3, H, W) → numbers, and the reconstructions, uint8 (N, 3, H, W).

    Per channel of the unscaled latents: the mean, the std between latents (of means and noise
    together), and the share of its variance that is the encoder's own noise. 1/std of all should be
    near the scale of the weights.
    """
    moments = [vae.encode(to_float(part)) for part in pixels.split(4)]
    again = torch.cat([to_uint8(vae.decode(m.mean)) for m in moments])
    mean, std = (torch.cat([getattr(m, name) / vae.scale for m in moments]).double()
                 for name in ("mean", "std"))
    noise = std.square().mean((0, 2, 3))
    total, scale = mean.var((0, 2, 3), unbiased=False) + noise, latent_scale(Moments(mean, std))
    error = (again.double() - pixels.double()) / 255
    psnr = -10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()
    return {
        "images": len(pixels), "size": list(pixels.shape[-2:]), "scale": round(vae.scale.item(), 6),
        "scale_of_these_images": scale, "std_scaled": vae.scale.item() / scale,
        "mean": mean.mean((0, 2, 3)).tolist(),
        "std": total.sqrt().tolist(), "noise_share": (noise / total).tolist(),
        "mean_absolute_error": error.abs().mean().item(), "psnr_mean": psnr.mean().item(),
        "psnr_min": psnr.min().item(),
        "chroma": (again.amax(1) - again.amin(1)).double().mean().item(),
    }, again


def _named(file: str) -> Path:
    if not file:
        raise InputError("name the FILE first: a checkpoint or a diffusers folder")
    return Path(file)


VERBS = {"fetch": (FetchConfig, fetch), "show": (ShowConfig, show),
         "export": (ExportConfig, export), "lora": (LoRAConfig, lora),
         "latents": (LatentsConfig, latents)}

if __name__ == "__main__":
    config.main(VERBS, default="show", doc=__doc__)
