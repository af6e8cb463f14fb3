"""A finished run → files of the tools that the community uses: one LDM file, or a diffusers folder.

    OUT/model.safetensors                    --to ldm: UNet, VAE and schedule under LDM's names
    OUT/{unet,vae,scheduler}/ model_index.json   --to diffusers
    OUT/pytorch_lora_weights.safetensors     --to lora: the adapters of --train lora alone, for
                                             diffusers; lora.safetensors, --to lora-kohya, for the
                                             tools that read kohya's form
    OUT/contexts.safetensors                 the finished (K, d) context of null, of each label and
                                             of each requested row
    OUT/conditioner.safetensors, .json       how contexts are made, for minidiff

Other tools know no conditioner: they take a context as `prompt_embeds`, and "null" as
`negative_prompt_embeds`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from minidiff import runs
from minidiff import variables as var
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.generate import Pipeline
from minidiff.diffusion.public import folder, keys
from minidiff.diffusion.public.folder import LORA_FILES
from minidiff.diffusion.public.ldm import SCALE
from minidiff.diffusion.public.lora import LoRA, write_lora
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError

FORMS_OF = {"lora": ("diffusers", LORA_FILES[0]), "lora-kohya": ("kohya", "lora.safetensors")}
PT = {"format": "pt"}  # which transformers asks for in a header


def export(pipeline: Pipeline, to: str, out: Path, rows: Sequence[dict[str, str]] = (),
           lora: LoRA | None = None) -> None:
    """Write the folder `out`, which must not exist yet or be empty; `lora`: these adapters."""
    if runs.occupied(out):
        raise InputError(f"{out} exists already; give another --out, nothing there is overwritten")
    predicted = pipeline.denoiser.prediction
    if not lora and predicted not in folder.PREDICTIONS:
        raise InputError(f"the model predicts {predicted}; a file of Stable Diffusion can say "
                         f"{', '.join(folder.PREDICTIONS)}")
    contexts, described = finished_contexts(pipeline.conditioner, rows)
    runs.save_tensors(out / "contexts.safetensors", contexts,
                      {**PT, "rows": json.dumps(described, ensure_ascii=False)})
    runs.save_tensors(out / "conditioner.safetensors", pipeline.conditioner.state_dict(), PT)
    runs.write_json(out / "conditioner.json",
                    {"variables": var.to_json(pipeline.conditioner.variables)})
    if lora:
        form, name = FORMS_OF[to]
        write_lora(out / name, lora.adapters, form, lora.base)
    else:
        write = write_ldm if to == "ldm" else write_folder
        write(out, pipeline)


@torch.no_grad()
def finished_contexts(conditioner: Conditioner,
                      rows: Sequence[dict[str, str]]) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Contexts (K, d) by name, and the cells that each stands for.

    They are null; each value of each category and finding, with the other variables null; and the
    requested rows, whose empty cells are unknown.
    """
    variables = conditioner.variables
    wanted: dict[str, tuple[dict, var.Labels]] = {"null": ({}, conditioner.null(1))}
    for v in variables:
        for value in v.values if v.exclusive else (*v.values, var.NONE):
            cells = {v.name: value}
            wanted[f"{v.name}={value}"] = cells, conditioner.null(1) | var.encode([v], [cells])
    for k, row in enumerate(rows):
        cells = {v.name: row.get(v.name, "") for v in variables}
        wanted[f"row_{k:06d}"] = cells, var.encode(variables, [row])
    contexts = {name: conditioner(labels)[0] if variables else conditioner.null_context
                for name, (_, labels) in wanted.items()}
    return contexts, {name: cells for name, (cells, _) in wanted.items()}


def write_ldm(out: Path, pipeline: Pipeline) -> None:
    """One LDM file. Tools take 0.18215 as the latent scale: another is folded into the VAE."""
    unet, schedule = pipeline.denoiser.net.unet, pipeline.denoiser.schedule
    state, scaled = unet.state_dict(), folded(pipeline.vae)
    tensors = {keys.UNET + ldm: state[ours] for ours, ldm in keys.unet_to_ldm(state).items()}
    for ours, ldm in keys.vae_to_ldm(scaled).items():
        convolution = ".attentions.0." in ours and scaled[ours].ndim == 2
        tensors[keys.VAE + ldm] = scaled[ours][:, :, None, None] if convolution else scaled[ours]
    tensors |= {"alphas_cumprod": schedule.alphas_cumprod.float(), "betas": betas(schedule).float()}
    version = {768: "SD 1.x", 1024: "SD 2.x"}.get(unet.config.context_dim, "minidiff")
    described = {"version": version, "unet": asdict(unet.config),
                 "vae": asdict(pipeline.vae.config), "prediction": pipeline.denoiser.prediction}
    runs.save_tensors(out / "model.safetensors", tensors,
                      {**PT, "minidiff": json.dumps(described)})


def folded(vae: VAE) -> dict[str, Tensor]:
    """The VAE's tensors such that its latents, scaled by 0.18215, are what they are now."""
    tensors, ratio = dict(vae.state_dict()), vae.scale.item() / SCALE
    if abs(ratio - 1) > 1e-6:
        n = vae.config.latent_channels
        weight, bias = tensors["quant_conv.weight"].clone(), tensors["quant_conv.bias"].clone()
        weight[:n] *= ratio
        bias[:n] *= ratio
        bias[n:] += 2 * math.log(ratio)
        tensors |= {"quant_conv.weight": weight, "quant_conv.bias": bias,
                    "post_quant_conv.weight": tensors["post_quant_conv.weight"] / ratio}
    return tensors


def write_folder(out: Path, pipeline: Pipeline) -> None:
    """For StableDiffusionPipeline.from_pretrained(OUT, text_encoder=None, tokenizer=None)."""
    unet, vae, size = pipeline.denoiser.net.unet, pipeline.vae, pipeline.size
    for name, net, described in (
            ("unet", unet, folder.unet_json(unet.config, size // vae.factor)),
            ("vae", vae, folder.vae_json(vae.config, vae.scale.item(), size))):
        runs.write_json(out / name / "config.json", described)
        runs.save_tensors(out / name / "diffusion_pytorch_model.safetensors", net.state_dict(), PT)
    runs.write_json(out / "scheduler" / "scheduler_config.json",
                    scheduler_json(pipeline.denoiser.schedule, pipeline.denoiser.prediction))
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    runs.write_json(out / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"], **{name: [None, None] for name in absent},
    })


def scheduler_json(schedule: Schedule, prediction: str) -> dict:
    """Stable Diffusion's own settings: leading spacing from 1, a last step to ᾱ₀, no clipping.

    At zero terminal SNR the spacing is trailing, for the ladder has to begin at the last level.
    """
    usual, ac = Schedule.scaled_linear(), schedule.alphas_cumprod
    rescaled = torch.equal(ac, usual.to_zero_snr().alphas_cumprod)
    known = rescaled or torch.equal(ac, usual.alphas_cumprod)
    return {
        "_class_name": "DDIMScheduler", "num_train_timesteps": len(schedule), "beta_start": 0.00085,
        "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "trained_betas": None if known else betas(schedule).tolist(),
        "rescale_betas_zero_snr": rescaled,
        "prediction_type": folder.PREDICTIONS[prediction], "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
        "timestep_spacing": "trailing" if schedule.zero_snr else "leading",
    }


def betas(schedule: Schedule) -> Tensor:
    ac = schedule.alphas_cumprod
    return 1 - ac / torch.cat([torch.ones(1, dtype=ac.dtype), ac[:-1]])
