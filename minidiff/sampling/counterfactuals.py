"""What a model of normal images would have made of a real image, and how likely it holds it.

    SDEdit       noise up to a strength, then sampled down again        Meng et al. 2022; for
                                                                        anomalies Wyatt et al. 2022
    inversion    ddim up without a label, ddim down guided towards      Sanchez et al. 2022;
                 normal; only a model that knows labels has it          Wolleb et al. 2022
    VAE          encoded and decoded: the baseline of both
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import runs
from minidiff import variables as var
from minidiff.counted import VALIDATE, normal
from minidiff.diffusion.generate import DECODE, Pipeline, Recipe
from minidiff.diffusion.guidance import conditioned
from minidiff.diffusion.likelihood import bits_per_dimension, log_likelihood
from minidiff.diffusion.lpips import unit
from minidiff.errors import InputError
from minidiff.evaluation.anomalies import maps
from minidiff.evaluation.anomalies.run import AnomaliesConfig
from minidiff.evaluation.metrics.membership import denoising_errors
from minidiff.pixels import at_once, rounded, to_float, to_grey
from minidiff.sampling.finished_run import open_pipeline
from minidiff.variables import Labels


class Counterfactuals:
    """The model of a run, opened; called with a batch of images and their rows."""

    def __init__(self, cfg: AnomaliesConfig):
        self.cfg = cfg
        self.pipeline, self.facts = open_pipeline(cfg.run, cfg.device)
        self.facts["sha256"] = runs.sha256(f"{cfg.run}/model.safetensors")
        self.variables = self.pipeline.conditioner.variables
        self.guides = any(v.name == "label" for v in self.variables)
        usual = Recipe(steps=cfg.steps, guidance=1.0,
                       scales={"label": cfg.guidance} if self.guides else {})
        usual.require_levels(self.pipeline.denoiser.schedule)
        self.recipes = {f"{maps.SDEDIT} {s:g}": replace(usual, strength=s) for s in cfg.strengths}
        if empty := [s for s, r in zip(cfg.strengths, self.recipes.values()) if not r.taken]:
            raise InputError(f"--strengths {empty[0]:g} of --steps {cfg.steps} leaves no step to "
                             f"take: {1 / cfg.steps:.2g} or more")
        self.inversion = replace(usual, sampler="ddim", strength=cfg.strengths[-1])

    @torch.no_grad()
    def __call__(self, images: Tensor, rows: Sequence[dict[str, str]], normal_label: str,
                 seeds: Sequence[int]) -> dict[str, Tensor]:
        """uint8 (n, 3, S, S) → counterfactuals, uint8 (n, 1 or 3, S, S); the feature map of each,
        float16 (n, S, S); "bits" a number of the latents and "error" of denoising, (n,), of the
        images and of blurred normal ones."""
        pipeline, n = self.pipeline, len(images)
        labels = self.labels(rows, normal_label)
        z = pipeline.encode(images)
        decoded = [rounded(pipeline.vae.decode(few)).cpu()
                   for few in z.split(min(DECODE, at_once(pipeline.size)))]
        made = {maps.VAE: torch.cat(decoded)}
        for name, recipe in self.recipes.items():
            made[name], = pipeline.images(labels, seeds, recipe, batch=n, origin=z)
        if self.guides:
            blind = labels | {"label": torch.full_like(labels["label"], var.NULL)}
            noise = pipeline.invert(z, blind, self.inversion)
            made[maps.INVERSION], = pipeline.images(labels, seeds, self.inversion, batch=n,
                                                    noise=noise)
        features = self.features(images, made)
        if self.facts["grey"]:
            made = {name: to_grey(c) for name, c in made.items()}
        return made | features | self.densities(z, labels, seeds) | self.control(
            images, [row["label"] == normal_label for row in rows], labels, seeds)

    def labels(self, rows: Sequence[dict[str, str]], normal_label: str) -> Labels:
        """The conditions of the images, but normal; what the model does not know is unknown."""
        def cell(v: var.Variable, row: dict[str, str]) -> str:
            try:
                v.encode(row.get(v.name, ""))
            except InputError:
                return ""
            return row.get(v.name, "")

        healthy = [{**row, "label": normal_label} for row in rows]
        return var.encode(self.variables, [{v.name: cell(v, row) for v in self.variables}
                                           for row in healthy])

    def features(self, images: Tensor, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """The feature map of each counterfactual, float16 (n, S, S)."""
        found: dict[str, list[Tensor]] = {name: [] for name in made}
        for few in torch.arange(len(images)).split(at_once(self.pipeline.size)):
            here = layers(self.pipeline, images[few])
            for name, c in made.items():
                there = layers(self.pipeline, c[few])
                found[name].append(maps.feature_map(here, there, images.shape[-1]).half().cpu())
        return {maps.FEATURE + name: torch.cat(parts) for name, parts in found.items()}

    def control(self, images: Tensor, chosen: Sequence[bool], labels: Labels,
                seeds: Sequence[int]) -> dict[str, Tensor]:
        """Densities of the chosen images without their noise; NaN of the others."""
        index = [i for i, own in enumerate(chosen) if own]
        dull = maps.blurred(images[index].flatten(0, 1).float().numpy(), maps.FAINT)
        dull = torch.from_numpy(dull).round().to(torch.uint8).view(-1, *images.shape[1:])
        found = self.densities(self.pipeline.encode(dull),
                               {name: cells[index] for name, cells in labels.items()},
                               [seeds[i] for i in index]) if index else {}
        names = ("error", "bits") if self.cfg.likelihood else ("error",)
        every = {maps.BLURRED + name: torch.full((len(images),), math.nan, dtype=torch.float64)
                 for name in names}
        for name, own in found.items():
            every[maps.BLURRED + name][index] = own.cpu()
        return every

    def densities(self, z: Tensor, labels: Labels, seeds: Sequence[int]) -> dict[str, Tensor]:
        pipeline, cfg = self.pipeline, self.cfg
        labels = {name: cells.to(z.device) for name, cells in labels.items()}
        errors = denoising_errors(losses(pipeline, z, labels), torch.arange(len(z)))
        found = {"error": errors.log().mean(1)}
        if cfg.likelihood:
            probes = normal(cfg.seed, seeds, VALIDATE, z.shape[1:]).sign().to(z.device)
            found["bits"] = bits(pipeline, z, labels, probes, cfg.likelihood)
        return found


def layers(pipeline: Pipeline, images: Tensor) -> list[Tensor]:
    """Activations of uint8 images in the encoder after each of its levels, of unit length."""
    encoder, found = pipeline.vae.encoder, []
    h = encoder.conv_in(to_float(images.to(pipeline.vae.scale.device).expand(-1, 3, -1, -1)))
    for level in encoder.down_blocks:
        found.append(unit(h := level(h)))
    return found


def bits(pipeline: Pipeline, z: Tensor, labels: Labels, probes: Tensor,
         steps: int = AnomaliesConfig.likelihood) -> Tensor:
    """Bits a number of latents z (n, C, h, w) under their labels, by one probe of ±1 each."""
    ladder = pipeline.denoiser.schedule.ladder(steps, "logsigma")
    log_p = log_likelihood(conditioned(pipeline.denoiser, labels), z, ladder, probes[None])
    return bits_per_dimension(log_p, z[0].numel())


def perplexities(pipeline: Pipeline, z: Tensor, labels: Labels, seed: int) -> Tensor:
    """2^bits of latents z and their labels, (n, 1): the errors of the membership audit's second
    attack. Every image has the same probe, as it has the same noise in the first."""
    probe = normal(seed, [0], VALIDATE, z.shape[1:]).sign().to(z.device)
    parts = torch.arange(len(z)).split(at_once(pipeline.size))
    found = [bits(pipeline, z[some], {name: cells[some].to(z.device)
                                      for name, cells in labels.items()},
                  probe.expand(len(some), -1, -1, -1))
             for some in tqdm(parts, "likelihoods", leave=False)]
    return 2 ** torch.cat(found).cpu()[:, None]


def losses(pipeline: Pipeline, z: Tensor, labels: Labels) -> Callable[[Tensor, int, int], Tensor]:
    """Losses of the images of latents z and their labels, as `denoising_errors` asks for them."""
    def of(index: Tensor, t: int, seed: int) -> Tensor:   # images by their number
        noise = normal(seed, [0], VALIDATE, z.shape[1:]).to(z.device)
        own = {name: cells[index].to(z.device) for name, cells in labels.items()}
        return pipeline.denoiser.loss(z[index], torch.full((len(index),), t),
                                      noise.expand(len(index), -1, -1, -1), own)

    return of
