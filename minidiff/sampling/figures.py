"""What a trained model does, one function a figure: its numbers, and strips of pictures.

The page of `explain` shows each function as it stands here, so each is short and complete: what it
computes is what it says. A strip is a title and its rows; a row a name and its pictures, uint8 (k,
C, S, S).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minidiff.counted import VALIDATE, normal
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoise, Denoiser
from minidiff.diffusion.generate import DECODE, Pipeline, Recipe
from minidiff.diffusion.guidance import batched_cfg, conditioned, guided
from minidiff.diffusion.samplers import SAMPLERS, TABLE, dpmpp_2m, heun
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.times import TIMES
from minidiff.diffusion.vae import VAE
from minidiff.pixels import at_once, to_uint8
from minidiff.sampling.trajectory import attention_maps, evenly, finest, probabilities
from minidiff.variables import Labels, Variable

POINTS, BINS, LEVELS = 101, 50, 16       # of curves over t, of histograms, of noise levels
WIDEST = 4.0                             # of the histogram of latents
SCALES = (0.0, 1.0, 1.5, 3.0, 6.0)       # of guidance
CALLS = (4, 8, 16, 32, 64)               # of the network, by which samplers are compared
CELLS = 32**2                            # of an attention layer that is looked at, at most
Rung = tuple[float, Tensor, Tensor]      # σ, x, D(x; σ)
Found = tuple[dict[str, Any], list[tuple[str, dict[str, Tensor]]]]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, held-out latents, and the images that are followed from noise, one a label."""

    pipeline: Pipeline
    grey: bool
    recipe: Recipe               # ladder, steps and guidance of the images that are followed
    names: Sequence[str]         # of these k images
    labels: Labels               # all their conditions, (k,) each
    noise: Tensor                # (k, 4, h, w)
    z: Tensor                    # held-out latents (n, 4, h, w)
    own: Labels                  # their conditions, (n,) each
    trained: Mapping[str, Any]   # `times` and `min_snr` of the training
    logged: Sequence[float]      # its held-out loss by quarter of t, or nothing
    shown: int                   # rungs of a strip
    level: float                 # σ at which attention is looked at
    reference: int               # steps of the reference of samplers

    @property
    def D(self) -> Denoiser:  # noqa: N802 (as formulas call it)
        return self.pipeline.denoiser

    @property
    def null(self) -> Labels:
        return self.pipeline.conditioner.null(len(self.noise), self.noise.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Labels]]:
        """Held-out latents, noise that is the same at each call, and conditions."""
        noise = normal(0, range(len(self.z)), VALIDATE, self.z.shape[1:]).to(self.z.device)
        for i in torch.arange(len(self.z)).split(at_once(self.pipeline.size)):
            yield self.z[i], noise[i], {name: cells[i] for name, cells in self.own.items()}

    def walk(self, denoise: Denoise, sampler: str, steps: int) -> tuple[list[Rung], Tensor]:
        """What a sampler meets on its way from the noise, and the finished latents."""
        sigmas, rungs = self.D.schedule.ladder(steps, self.recipe.ladder), []
        x = self.noise * (1 + sigmas[0] ** 2).sqrt().item()
        way = tqdm(SAMPLERS[sampler](denoise, x, sigmas), sampler, steps, leave=False)
        for sigma, (after, denoised) in zip(sigmas.tolist(), way):
            rungs.append((sigma, x, denoised))
            x = after
        return rungs, x / (1 + sigmas[-1] ** 2).sqrt().item()

    @cached_property
    def way(self) -> tuple[list[Rung], Tensor]:
        """That of the images that are followed."""
        denoise = guided(self.D, self.labels, self.null, self.recipe.guidance)
        return self.walk(denoise, self.recipe.sampler, self.recipe.steps)

    @property
    def few(self) -> list[int]:
        """The rungs whose pictures are shown."""
        return evenly(self.recipe.steps, self.shown)

    def pixels(self, z: Tensor) -> Tensor:
        """Latents → [-1, 1], (n, 3, S, S) or, of a grey model, (n, 1, S, S), on the CPU."""
        x = torch.cat([self.pipeline.vae.decode(few).cpu()
                       for few in z.split(min(DECODE, at_once(self.pipeline.size)))])
        return x.mean(1, keepdim=True) if self.grey else x

    def picture(self, z: Tensor) -> Tensor:
        return to_uint8(self.pixels(z))

    def strips(self, **rows: Sequence[Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
        """A strip for each image that is followed; rows of pictures (k, C, S, S), one a column."""
        return [(name, {row: torch.stack([column[k] for column in columns])
                        for row, columns in rows.items()}) for k, name in enumerate(self.names)]


def rms(x: Tensor) -> Tensor:
    """Root mean square of each image, (n,)."""
    return x.double().square().flatten(1).mean(1).sqrt()


def schedule(m: Subject) -> Found:
    """ᾱ and σ at each timestep, the rungs of the ladder, and the share of training by t."""
    s, u = m.D.schedule, (torch.arange(5000, dtype=torch.float64) + 0.5) / 5000
    t = torch.linspace(0, len(s) - 1, POINTS, dtype=torch.float64)
    rungs = s.ladder(m.recipe.steps, m.recipe.ladder)
    trained = torch.histc(TIMES[m.trained["times"]](u, s).double(), BINS, 0, len(s))
    return {"t": t, "alpha_bar": 1 / (1 + s.sigma(t) ** 2), "sigma": s.sigma(t),
            "rungs": {"t": s.t(rungs), "sigma": rungs}, "times": m.trained["times"],
            "trained": trained / len(u)}, []


def loss(m: Subject) -> Found:
    """Squared error of D on held-out z + σ·noise by σ, and the loss that training takes of it."""
    sigmas, min_snr = m.D.schedule.ladder(LEVELS - 1, "logsigma"), m.trained["min_snr"]
    error = torch.stack([torch.cat([rms(m.D(z + s * noise, s, labels) - z) ** 2
                                    for z, noise, labels in m.batches()]).mean().cpu()
                         for s in sigmas.tolist()])
    weight = (sigmas**-2).clamp(max=min_snr) if min_snr else m.D.row.c_out(sigmas) ** -2
    variance = m.z.double().var((0, 2, 3), correction=0).cpu()[:, None]
    linear = (variance * sigmas**2 / (variance + sigmas**2)).mean(0)
    quarters = m.D.schedule.sigma(torch.linspace(0, len(m.D.schedule), 5))
    return {"n": len(m.z), "sigma": sigmas, "error": error, "linear": linear,
            "trained": weight * error, "min_snr": min_snr, "logged": m.logged,
            "quarters": quarters}, []


def ladder(m: Subject) -> Found:
    """x and the guided D of one image a label on its way from noise; how far D is from the end."""
    rungs, end = m.way
    left = torch.stack([rms(denoised - end) for *_, denoised in rungs], 1)     # (images, rungs)
    few = [rungs[k] for k in m.few]
    return {"names": m.names, "sigma": [sigma for sigma, *_ in rungs], "left": left,
            "shown": [sigma for sigma, *_ in few]}, m.strips(
        x=[m.picture(x / math.sqrt(1 + sigma**2)) for sigma, x, _ in few],
        D=[m.picture(denoised) for *_, denoised in few])


def arrows(m: Subject) -> Found:
    """The arrow D(y) − D(∅) at each rung: its length, and the difference in the decoded image."""
    if not m.labels:
        return {}, []
    y, null = conditioned(m.D, m.labels), conditioned(m.D, m.null)
    both = [(sigma, y(x, sigma), null(x, sigma)) for sigma, x, _ in m.way[0]]
    length = torch.stack([rms(a - b) for _, a, b in both], 1)                  # (images, rungs)
    pixels = [(m.pixels(a), m.pixels(b)) for _, a, b in (both[k] for k in m.few)]
    most = max((a - b).abs().max().item() for a, b in pixels) or 1.0
    return {"names": m.names, "sigma": [sigma for sigma, *_ in both], "length": length,
            "shown": [both[k][0] for k in m.few], "most": most / 2}, m.strips(**{
        "D(∅)": [to_uint8(b) for _, b in pixels], "D(y)": [to_uint8(a) for a, _ in pixels],
        "D(y) − D(∅)": [to_uint8((a - b) / most) for a, b in pixels]})


def scales(m: Subject) -> Found:
    """The same noise at several scales w: finished images, and how far guidance moved D by σ."""
    if not m.labels:
        return {}, []
    ends, rows = [], []
    for scale in SCALES:
        moved: list[tuple[float, Tensor]] = []
        denoise = guided(m.D, m.labels, m.null, scale, arrows=moved)
        ends.append(m.walk(denoise, m.recipe.sampler, m.recipe.steps)[1])
        rows.append({"scale": scale, "sigma": [sigma for sigma, _ in moved],
                     "moved": [each.mean() for _, each in moved], "std": ends[-1].std()})
    return {"rows": rows}, m.strips(image=[m.picture(z) for z in ends])


def attention(m: Subject) -> Found:
    """Where cells look at one rung, with all conditions: maps of the finest layer, means of all."""
    sigma, x, _ = min(m.way[0], key=lambda rung: abs(math.log(rung[0] / m.level)))
    with attention_maps(m.D.net.unet, CELLS) as found:
        clean = m.D(x, sigma, m.labels)
    if not found:
        return {}, []
    maps = [finest(found, k) for k in range(len(x))]
    share, centre = (torch.stack([getattr(own, name) for own in maps])
                     for name in ("share", "centre"))
    low, high = share.min().item(), share.max().item()
    return {"sigma": sigma, "layers": means(found), "finest": maps[0].layer,
            "range": [low, high]}, [(" · ".join(m.names), {
        "D(x; σ)": m.picture(clean),
        "conditions": shaded((share - low) / max(high - low, 1e-9), m.pipeline.size),
        "from the centre": shaded(centre / centre.amax((1, 2), keepdim=True), m.pipeline.size)})]


def means(by_layer: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Of each layer: the share of cross-attention at context positions 1 …, and how far, in widths
    of the image, self-attention looks; each beside what it would be if all drew alike."""
    rows = []
    for name in [name.removesuffix(".attn1") for name in by_layer if name.endswith("attn1")]:
        own, cross = by_layer[f"{name}.attn1"], by_layer[f"{name}.attn2"]      # (n, cells, …)
        place = torch.cartesian_prod(*[torch.arange(n := math.isqrt(own.shape[1])) / n] * 2)
        far = torch.cdist(place, place)
        rows.append({"layer": name, "cells": own.shape[1], "share": cross[:, :, 1:].sum(2).mean(),
                     "uniform": 1 - 1 / cross.shape[2], "reach": (own * far).sum(2).mean(),
                     "uniform_reach": far.mean()})
    return rows


def shaded(maps: Tensor, side: int) -> Tensor:
    """Maps (n, h, w) of 0 … 1 → grey squares of this side, uint8 (n, 1, side, side)."""
    return F.interpolate((maps[:, None] * 255).round(), (side, side)).to(torch.uint8)


def latents(m: Subject) -> Found:
    """Mean, deviation and histogram of each channel; one image by one channel, and without it."""
    flat = m.z.double().transpose(0, 1).flatten(1).cpu()                       # (channels, numbers)
    mean, std = flat.mean(1), flat.std(1, correction=0)
    height = torch.stack([torch.histc(row, BINS, -WIDEST, WIDEST) for row in flat])
    first, middle = m.z[:1], mean.to(m.z)[:, None, None]
    only = torch.eye(len(flat)).to(m.z)[:, :, None, None] * (first - middle)   # (c, c, h, w)
    whole, tint = m.picture(first), first[0].sub(first.min()).div(first.max() - first.min()).cpu()
    plain = shaded(tint, m.pipeline.size).expand(-1, whole.shape[1], -1, -1)
    return {"mean": mean, "std": std, "edges": torch.linspace(-WIDEST, WIDEST, BINS + 1),
            "density": height / flat.shape[1] * BINS / (2 * WIDEST), "correlation": flat.corrcoef(),
            "n": len(m.z)}, [("a held-out image", {
        "channel": torch.cat([whole, plain]), "alone": torch.cat([whole, m.picture(middle + only)]),
        "left out": torch.cat([whole, m.picture(first - only)])})]


def cells_of(v: Variable) -> dict[str, float]:
    """The values of a variable that are looked at, and their codes."""
    known = {value: v.encode(value) for value in v.values} or {
        f"{x:.3g}": x for x in (v.low, v.mean, v.high)}
    return known | ({} if v.exclusive else {"none": 0}) | {"unknown": v.encode("")}


def conditions(m: Subject) -> Found:
    """What each value adds to the context while all other variables are null: norms, cosines."""
    c: Conditioner = m.pipeline.conditioner
    asked = [(v.name, text, code) for v in c.variables for text, code in cells_of(v).items()]
    if not asked:
        return {}, []
    labels = c.null(len(asked), m.noise.device)
    for k, (name, _, code) in enumerate(asked):
        labels[name][k] = code
    added = (c(labels) - c.null_context)[:, -1].double()   # (n, d); position 0 gets nothing
    unit = added / added.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return {"values": [{"variable": name, "value": text, "norm": length} for (name, text, _), length
                       in zip(asked, added.norm(dim=1))], "cosine": unit @ unit.T,
            "null": c.null_context[1:].norm(dim=1).mean()}, []


def errors(m: Subject) -> Found:
    """rms distance of the finished latents from those of many steps of heun, by calls of D."""
    denoise = guided(m.D, m.labels, m.null, m.recipe.guidance)
    truth = m.walk(denoise, "heun", m.reference)[1]
    rows = [{"sampler": name, "calls": calls,
             "rms": rms(m.walk(denoise, name, calls // facts.calls)[1] - truth).mean()}
            for name, facts in TABLE.items() if not facts.noisy and name != "ddim"
            for calls in CALLS if calls // facts.calls < m.reference]
    return {"reference": m.reference, "rows": rows, "rms": rms(truth).mean()}, []


# figure → the function that makes it, and what it is of the core
FIGURES: dict[str, tuple[Callable[[Subject], Found], tuple[Callable, ...]]] = {
    "schedule": (schedule, (Schedule.sigma, Schedule.ladder)),
    "loss": (loss, (Denoiser.__call__, Denoiser.loss)),
    "ladder": (ladder, (Subject.walk, dpmpp_2m)),
    "arrows": (arrows, (batched_cfg,)),
    "scales": (scales, (guided,)),
    "attention": (attention, (means, probabilities)),
    "latents": (latents, (VAE.encode, VAE.decode)),
    "conditions": (conditions, (cells_of, Conditioner.forward)),
    "errors": (errors, (heun,)),
}
