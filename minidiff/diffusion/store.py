"""A finished model on disk: weights as safetensors and, written last, a JSON that describes it.

    RUN/vae.safetensors     RUN/vae.json     the autoencoder; a diffusion run keeps its own copy
    RUN/model.safetensors   RUN/model.json   the EMA weights of UNet and conditioner; variables,
                                             schedule, prediction
    RUN/best/model.*                         those of the step with the lowest held-out loss
    RUN/snapshots/step_00000500/model.*      those of some steps on the way
    RUN/averaged/std_0.15/model.*            that of another average (train.py average)
"""

from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from minidiff import distributed, runs
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Pipeline
from minidiff.diffusion.model import Model, ModelSpec, config_from, spec
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.vae import VAE, VAEConfig
from minidiff.errors import InputError


def identity(folder: Path, weights: str = "model.safetensors") -> dict:
    """The hash of a run's weights, and of what that run began with: the chain of its stages."""
    facts = runs.find_json(folder / "run.json", {}).get("facts", {})
    return {"sha256": runs.sha256(folder / weights), "data": facts.get("data"),
            "before": facts.get("init")}


def save_vae(folder: Path, vae: VAE, **facts) -> None:
    runs.save_tensors(folder / "vae.safetensors", vae.state_dict())
    runs.write_json(folder / "vae.json",
                    {"config": asdict(vae.config), "scale": vae.scale.item(), **facts})


def load_vae(folder: Path) -> VAE:
    facts = describe(folder / "vae.json", "the VAE stage of train.py has to finish first")
    vae = VAE(config_from(VAEConfig, facts["config"]), facts["scale"])
    return _load_weights(folder / "vae.safetensors", vae)


def save_model(folder: Path, model: Model, schedule: Schedule, prediction: str, **facts) -> None:
    tensors = {name: distributed.gather_full(tensor) for name, tensor in model.state_dict().items()}
    if distributed.rank():
        return
    runs.save_tensors(folder / "model.safetensors", tensors)
    runs.write_json(folder / "model.json", {**asdict(spec(model, schedule, prediction)), **facts})


def load_pipeline(folder: Path) -> tuple[Pipeline, dict]:
    """The finished model of a diffusion run with its VAE, and the facts saved beside it."""
    facts = describe(folder / "model.json", "the diffusion stage of train.py has to finish first")
    described = ModelSpec(**{f.name: facts.pop(f.name) for f in fields(ModelSpec)})
    model, schedule = described.build()
    denoiser = Denoiser(_load_weights(folder / "model.safetensors", model), schedule,
                        described.prediction)
    near = (folder, folder.parent, folder.parent.parent)  # best/ and snapshots/… share RUN's VAE
    vae = load_vae(next((f for f in near if (f / "vae.json").exists()), folder))
    return Pipeline(denoiser, model.conditioner, vae, facts["size"]), facts


def _load_weights(path: Path, module: nn.Module) -> nn.Module:
    try:
        module.load_state_dict(load_file(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} does not hold what the JSON beside it says: {reason}"
                         f"{runs.in_its_place(path)}") from None
    return module.eval().requires_grad_(False)


def describe(path: Path, otherwise: str) -> dict:
    if not path.exists():
        raise InputError(f"{path} is missing: {otherwise}")
    return runs.read_json(path)
