"""A public Stable Diffusion model, SD 1.x or 2.x, LDM file or diffusers folder, whole and exact.

It comes with a certificate: every tensor of the files, and the source of every choice.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minidiff.diffusion.public import keys
from minidiff.diffusion.public.folder import (
    read_folder,
    read_part,
    read_unet_folder,
    read_vae_folder,
)
from minidiff.diffusion.public.ldm import BUFFERS, read_ldm, read_vae_file, take_unet
from minidiff.diffusion.public.reader import Contents, Part, Reader, on_meta
from minidiff.diffusion.public.weights import read_weights
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet, UNetConfig
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError
from minidiff.hashes import cached_sha256

EMA = Literal["auto", "yes", "no"]
ZERO = ("; it ends at zero SNR: its last ᾱ of 0 is held at 2⁻²⁴, σ = 4096; sample with --ladder "
        "trailing")
# SHA-256: name, version, prediction; each hash was found in five public places or more. Names
# disappear, hashes do not.
KNOWN: dict[str, tuple[str, str, str | None]] = {
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa":
    ("v1-5-pruned-emaonly.safetensors", "SD 1.x", "eps"),
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": ("v1-5-pruned-emaonly.ckpt",
                                                                         "SD 1.x", "eps"),
    "e1441589a6f3c5a53f5f54d0975a18a7feb7cdf0b0dee276dfc3331ae376a053": ("v1-5-pruned.ckpt",
                                                                         "SD 1.x", "eps"),
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": ("sd-v1-4.ckpt", "SD 1.x",
                                                                         "eps"),
    "14749efc0ae8ef0329391ad4436feb781b402f4fece4883c7ad8d10556d8a36a": ("sd-v1-4-full-ema.ckpt",
                                                                         "SD 1.x", "eps"),
    "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0": ("v2-1_768-ema-pruned.ckpt",
                                                                         "SD 2.x", "v"),
    "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac":
    ("v2-1_768-ema-pruned.safetensors", "SD 2.x", "v"),
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75":
    ("vae-ft-mse-840000-ema-pruned.safetensors", "VAE", None),
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab":
    ("vae-ft-mse-840000-ema-pruned.ckpt", "VAE", None),
}


@dataclass(frozen=True)
class Certificate:
    files: list[dict]                # path, bytes, sha256, known (its public name, or null)
    dialect: str
    version: str
    ema: str
    parts: dict[str, Part]
    not_used: dict[str, int]         # why: how many tensors
    source_tensors: int              # in all files; the sum of the rows above
    prediction: str
    prediction_from: str
    schedule_from: str
    alphas_cumprod: tuple[float, float]  # first and last
    null_context: str

    def json(self) -> dict:
        return asdict(self)

    def text(self) -> str:
        rows = [("file", f"{f['path']}  {f['bytes']:,} bytes  SHA-256 {f['sha256']}  "
                 f"{f['known'] or 'not a known file'}") for f in self.files]
        rows += [("dialect", self.dialect), ("version", self.version), ("EMA", self.ema)]
        rows += [(name, f"{p.tensors:,} tensors, {p.parameters:,} parameters, "
                        f"{' + '.join(f'{n} {d}' for d, n in p.dtypes.items())}, from {p.source}")
                 for name, p in self.parts.items()]
        rows += [("not used", f"{n:,} tensors: {why}") for why, n in self.not_used.items()]
        rows += [("in all", f"{self.source_tensors:,} tensors, each accounted for once"),
                 ("prediction", f"{self.prediction}, from {self.prediction_from}"),
                 ("schedule", f"ᾱ {self.alphas_cumprod[0]:.8f} … {self.alphas_cumprod[1]:.8f}, "
                  f"from {self.schedule_from}"), ("null context", self.null_context)]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


@dataclass(frozen=True, eq=False)
class SDParts:
    """A public model, whole: what training starts from."""

    vae: VAE | None               # None: the file has none, and none was needed
    unet: UNet
    schedule: Schedule
    prediction: str
    null_context: Tensor          # (77, d): what the public model is fed for the empty prompt
    certificate: Certificate


def load_sd(path: str | Path, *, prediction: str | None = None, ema: EMA = "auto",
            null_context: str = "tower", vae: str | Path | None = None,
            unet: str | Path | None = None, vae_needed: bool = True) -> SDParts:
    """Read an LDM .ckpt or .safetensors file or a diffusers folder of SD 1.x or 2.x, every tensor
    accounted for once.

    prediction: eps or v, needed where neither the folder nor the file's SHA-256 tells it. ema: auto
    takes the moving average of the UNet if the file has one. null_context: tower (the text tower is
    run once on the empty prompt, and dropped), zeros, or a contexts.safetensors that was exported.
    vae, unet: another VAE or UNet on top, file or folder. float32 on the CPU; tensors of a float32
    file stay mapped to it, copy on write. Raises InputError.
    """
    path = Path(path)
    contents = read_folder(path, ema) if path.is_dir() else read_ldm(read_weights(path), ema)
    if vae is not None:
        contents.vae = put_on_top(contents, "VAE", read_vae(Path(vae))).vae
    if unet is not None:
        other = put_on_top(contents, "UNet", read_unet(Path(unet), contents.unet.config, ema))
        contents.unet, contents.ema = other.unet, other.ema
    for reader in contents.readers:
        reader.finish()
    if contents.vae is None and vae_needed:
        raise InputError(f"{path} holds no VAE: name one (--vae); or, if its UNet was trained from "
                         f"a whole model, name that model here, and this by --unet {path}")
    hashes = {file: cached_sha256(file) for r in contents.readers for file in r.weights.files}
    files = [{"path": str(file), "bytes": file.stat().st_size, "sha256": digest,
              "known": KNOWN.get(digest, (None,))[0]} for file, digest in hashes.items()]
    prediction, prediction_from = which_prediction(contents, files, prediction, unet)
    context, context_from = which_context(contents, null_context)
    parts = {name: part for r in contents.readers for name, part in r.parts.items()}
    not_used = sum((r.not_used for r in contents.readers), Counter())
    tensors = sum(len(r.weights.tensors) for r in contents.readers)
    assert sum(p.tensors for p in parts.values()) + not_used.total() == tensors
    certificate = Certificate(
        files, contents.dialect, contents.version, contents.ema, parts, dict(not_used), tensors,
        prediction, prediction_from,
        contents.schedule_from + (ZERO if contents.schedule.zero_snr else ""),
        tuple(contents.schedule.alphas_cumprod[[0, -1]].tolist()), context_from,
    )
    return SDParts(contents.vae, contents.unet, contents.schedule, prediction, context, certificate)


def read_unet(path: Path, config: UNetConfig, ema: EMA) -> Contents:
    """A UNet that was trained from a model with this config: a folder, or weights without one."""
    if path.is_dir() and any((path / name / "config.json").exists()
                             for name in ("", "unet", "unet_ema")):
        contents = read_unet_folder(path, ema)
    else:
        reader = Reader(read_part(path) if path.is_dir() else read_weights(path))
        contents = Contents(path, "UNet", [reader], ema="as the file has it")
        if any(name.startswith(keys.UNET) for name in reader.left):
            take_unet(reader, contents, config, ema)
            reader.ignore("parts of the file that are not its UNet", *BUFFERS,
                          "alphas_cumprod", starts=(keys.VAE, "cond_stage_model."))
        else:
            net = on_meta(UNet, config, path)
            contents.unet = reader.take("UNet", net, {name: name for name in net.state_dict()})
    if contents.unet.config != config:
        raise InputError(f"{path} is a UNet of another architecture: {contents.unet.config} for "
                         f"{config}")
    return contents


def put_on_top(contents: Contents, part: str, other: Contents) -> Contents:
    """Drop the model's own part from its ledger, for that of another file or folder."""
    for reader in contents.readers:
        if own := reader.parts.pop(part, None):
            reader.not_used[f"the model's own {part}: another is put on top"] += own.tensors
    contents.readers += other.readers
    return other


def read_vae(path: Path) -> Contents:
    """The VAE of a model, or one alone; file or folder."""
    contents = read_vae_folder(path) if path.is_dir() else read_vae_file(read_weights(path))
    for reader in contents.readers:
        reader.finish()
    return contents


def which_prediction(contents: Contents, files: list[dict], given: str | None,
                     unet: object = None) -> tuple[str, str]:
    """eps, v or x0, by the folder, the known hash or the user: the weights do not tell.

    Of another UNet on top the user may say it, for it may have been trained to predict another.
    """
    said, where = contents.prediction, contents.prediction_from
    for name, _, known in (KNOWN[f["sha256"]] for f in files if f["known"]):
        if known:
            said, where = known, f"the known hash of {name}"
    if given and unet:
        said = None
    if given and said and given != said:
        raise InputError(f"{contents.path}: --prediction {given} contradicts {where}, which says "
                         f"{said}")
    if not (given or said):
        raise InputError(f"{contents.path}: whether it predicts eps or v cannot be told from the "
                         "weights; give --prediction eps (SD 1.x, 2.x-base) or v (2.x at 768 px)")
    if (said or given) not in ("eps", "v", "x0"):
        raise InputError(f"{contents.path}: prediction {said or given!r} is not one of eps, v, x0")
    if (said or given) == "eps" and contents.schedule.zero_snr:
        raise InputError(f"{contents.path}: {contents.schedule_from} ends at zero SNR, where eps "
                         "tells nothing about the image: v (or x0) is needed there, not eps; give "
                         "--prediction v if that is what it was trained for")
    return (said, where) if said else (given, "--prediction")


def which_context(contents: Contents, choice: str) -> tuple[Tensor, str]:
    """The null context (K, d) and where it came from."""
    width = contents.unet.config.context_dim
    if choice == "zeros":
        return (torch.zeros(77, width),
                "zeros, as asked for; the public model was fed CLIP of the empty prompt")
    if choice != "tower":
        context, source = read_weights(choice).tensors.get("null"), choice
    elif contents.clip is None:
        raise InputError(f"{contents.path} holds no text tower, so no null context: give "
                         "--null-context zeros or FILE")
    else:
        layers, context = contents.clip.config.layers, contents.clip.null_context()
        source = f"77 × {width}: {layers} layers of the text tower on the empty prompt"
    if context is None or context.ndim != 2 or context.shape[1] != width:
        raise InputError(f"{contents.path}: {source} gives no null context (K, {width})")
    return context.float().clone(), source
