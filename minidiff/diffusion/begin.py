"""Where training starts: from scratch, from a public Stable Diffusion file, or from an earlier run.

Fine-tuning in stages repeats the last of these; `origin` holds what each stage began with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minidiff import runs
from minidiff import variables as var
from minidiff.diffusion import lora as loras
from minidiff.diffusion import model as models
from minidiff.diffusion import store
from minidiff.diffusion.public.load import load_sd, read_vae
from minidiff.diffusion.public.lora import read_lora
from minidiff.diffusion.schedule import SCHEDULES, Schedule
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError


@dataclass(frozen=True, eq=False)
class Start:
    """Everything at step 0, and what identifies it."""

    vae: VAE
    model: models.Model
    schedule: Schedule
    prediction: str
    origin: dict[str, Any]         # hashes and certificates, and those of the stages before
    trained_on: list[str]          # SHA-256 of the images that the model has seen already


def start_diffusion(init: str, vae: str, architecture: str, columns: Mapping[str, Sequence[str]],
                    prediction: str, seed: int, unet: str = "",
                    lora: Sequence[str] = (), null_context: str = "tower", schedule: str = "auto",
                    shift: float = 1.0) -> Start:
    """A model conditioned on these columns of the training table, and all that goes with it.

    init: a public file or folder, a finished diffusion run, or "" for scratch. vae: a finished VAE
    run or "" for init's own. prediction: a Prediction, or auto for init's own, else v. unet: one in
    place of init's, e.g. a checkpoint-500 of diffusers' training. lora: files added to the UNet.
    null_context: see `load_sd`. schedule: one of SCHEDULES, or auto for init's own, else Stable
    Diffusion's; its σ are multiplied by `shift`.
    """
    if shift <= 0:
        raise InputError(f"--shift {shift:g}: a factor of σ, above 0")
    if lora and not init:
        raise InputError(f"--lora {lora[0]} is added to a trained model: name that by --init")
    start = _start(init, vae, architecture, columns, None if prediction == "auto" else prediction,
                   seed, unet, null_context)
    levels = start.schedule if schedule == "auto" else SCHEDULES[schedule]()
    start = replace(start, schedule=levels if shift == 1 else levels.shifted(shift))
    if start.prediction == "eps" and levels.zero_snr:
        named = "the schedule of --init" if schedule == "auto" else f"--schedule {schedule}"
        raise InputError(f"{named} ends in pure noise, where eps tells nothing about the image: "
                         "--prediction v, x0 or flow")
    adapters = [read_lora(file, start.model.unet) for file in lora]
    for each in adapters:
        loras.put_on(start.model.unet, each.adapters)
        print(each.text())
    if adapters:
        start.origin["lora"] = [each.facts() for each in adapters]
    return start


def _start(init: str, vae: str, architecture: str, columns: Mapping[str, Sequence[str]],
           prediction: str | None, seed: int, unet: str, null_context: str) -> Start:
    public = f"--unet {unet}" if unet else f"--null-context {null_context}"
    if (unet or null_context != "tower") and (not init or is_run(init)):
        raise InputError(f"{public} is part of a public model: name that by --init")
    own, origin, seen = None, {}, []
    if vae:
        own, origin["vae"] = store.load_vae(Path(vae)), runs.sha256(Path(vae) / "vae.safetensors")
        seen = runs.read_json(Path(vae) / "vae.json").get("trained_on", [])
    if is_run(init):
        pipeline, facts = store.load_pipeline(Path(init))
        denoiser = pipeline.denoiser
        if prediction not in (None, denoiser.prediction):
            raise InputError(f"--prediction {prediction}: {init} predicts {denoiser.prediction}; "
                             "a run that begins there must, too")
        old = {v.name: v for v in pipeline.conditioner.variables}
        new = [var.infer(name, cells, old.get(name)) for name, cells in columns.items()]
        model = models.from_model(denoiser.net, var.merge(list(old.values()), new), seed)
        origin["init"] = {"run": init, **store.identity(Path(init))}
        return Start(own or pipeline.vae, model, denoiser.schedule, denoiser.prediction, origin,
                     sorted({*seen, *facts.get("trained_on", [])}))
    variables = [var.infer(name, cells) for name, cells in columns.items()]
    print(f"conditions: {'; '.join(map(str, variables)) or 'none'}")
    if not init:
        model = models.from_scratch(models.UNETS[architecture], variables, seed)
        return Start(own, model, Schedule.scaled_linear(), prediction or "v", origin, seen)
    sd = load_sd(init, prediction=prediction, unet=unet or None, null_context=null_context,
                 vae_needed=own is None)
    print(sd.certificate.text())
    return Start(own or sd.vae.requires_grad_(False),
                 models.from_public(sd.unet, sd.null_context, variables, seed), sd.schedule,
                 sd.prediction, {**origin, "init": sd.certificate.json()}, seen)


def start_vae(init: str, architecture: str, seed: int) -> tuple[VAE, dict[str, Any], list[str]]:
    """An autoencoder at step 0, what it began with, and the images it has seen.

    init: a public file or folder, a finished VAE run, or "" for scratch.
    """
    if not init:
        return models.vae_from_scratch(models.VAES[architecture], seed), {}, []
    if (Path(init) / "vae.json").exists():
        origin = {"run": init, **store.identity(Path(init), "vae.safetensors")}
        seen = runs.read_json(Path(init) / "vae.json").get("trained_on", [])
        return store.load_vae(Path(init)), {"init": origin}, seen
    public = read_vae(Path(init))
    files = [{"file": f.name, "sha256": runs.sha256(f)}
             for reader in public.readers for f in reader.weights.files]
    return public.vae, {"init": {"files": files}}, []


def is_run(init: str) -> bool:
    return bool(init) and (Path(init) / "model.json").exists()


def known_conditions(init: str) -> tuple[str, ...]:
    """Names of the conditions that the run which training begins with has learnt already."""
    variables = runs.read_json(Path(init) / "model.json")["variables"] if is_run(init) else []
    return tuple(v["name"] for v in variables)


def check_vae(named: str, init: str, root: str, train: Sequence[str]) -> None:
    """Refuse the root's VAE if no VAE is named and it was trained on other images (SHA-256).

    Where that of `init` is taken in its place, say so.
    """
    found = Path(root) / "vae" / "vae.json"
    if named or not found.exists():
        return
    if init:
        print(f"the VAE is that of {init}; {found.parent} is not used: name it by --vae if its "
              "encoder is the same")
    elif runs.of_other_images(runs.read_json(found).get("trained_on"), train):
        raise InputError(f"{found.parent} was trained on other images than these; train one here "
                         "(train.py vae), or name it by --vae and give another --root")


def known_size(init: str, vae: str, size: int = 0) -> int:
    """Side of the images, px: that of an earlier run, else as asked, else 512 of a public model."""
    files = [Path(vae) / "vae.json"] if vae else []
    files += [Path(init) / "model.json"] if init else []
    for path in files:
        if path.exists() or not init:
            known = store.describe(path, "that stage has to finish first")["size"]
            if size not in (0, known):
                raise InputError(f"--size {size}: {path.parent} works at {known} px; leave --size "
                                 "out, or train another VAE")
            return known
    return size or 512
