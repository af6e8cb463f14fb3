"""Labels + seeds → uint8 images: one path for train's grids, sample.py and its checks alike. And
real images → noise.

    latents, images   noise → z → pixels; with `origin` they begin at real images (SDEdit, Meng et
                      al. 2022)
    invert            real images → the noise that ddim leads back to them (Song, Meng & Ermon 2021,
                      section 4.3)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoise, Denoiser
from minidiff.diffusion.guidance import EVERYWHERE, Arrows, guided
from minidiff.diffusion.samplers import NOISY, SAMPLERS, SeededNoise, ddim
from minidiff.diffusion.schedule import LADDERS
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError, TrainingFault
from minidiff.variables import Labels

# images in one pass of the VAE: at 512 px its activations take far more memory than the UNet's
DECODE = 8


@dataclass(frozen=True)
class Recipe:
    """How to sample; written into every image's metadata, so plain JSON values, and made again by
    Recipe(**those).
    """

    sampler: Literal["ddim", "ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"] = "dpmpp_2m"
    ladder: Literal["leading", "trailing", "linspace", "karras", "logsigma"] = "logsigma"
    steps: int = 12                                      # of the whole ladder; `taken` of them are run
    guidance: float = 1.0                                # 1: none
    eta: float = 0.0                                     # fresh noise in ddim
    interval: tuple[float, float] = EVERYWHERE           # noise levels low < σ ≤ high that are guided
    rescale: float = 0.0                                 # 0 … 1, share by which guidance keeps the output's std
    scales: Mapping[str, float] = field(default_factory=dict, hash=False)  # guidance by variable; others have `guidance`
    strength: float = 1.0                                # share of the steps that are run from a real image

    def __post_init__(self):
        if len(self.interval) != 2:
            raise InputError(f"not a recipe: interval asks for two noise levels, not "
                             f"{len(self.interval)}")
        object.__setattr__(self, "interval",
                           tuple(min(float(s), EVERYWHERE[1]) for s in self.interval))
        object.__setattr__(self, "scales",
                           {name: float(scale) for name, scale in dict(self.scales).items()})
        low, high = self.interval
        for wrong, what in (
                (self.sampler not in SAMPLERS,
                 f"sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}"),
                (self.ladder not in LADDERS, f"ladder {self.ladder!r}: choose one of "
                 f"{', '.join(LADDERS)}"), (self.steps < 1, f"steps {self.steps}: 1 or more"),
                (not 0 <= self.guidance < math.inf, f"guidance {self.guidance:g}: a number from 0 "
                 f"on"), (not 0 <= self.eta <= 1, f"eta {self.eta:g}: 0 to 1"),
                (self.eta and self.sampler != "ddim",
                 f"eta {self.eta:g}: it belongs to the sampler ddim, not {self.sampler}"),
                (not 0 <= low < high, f"interval {low:g} to {high:g}: two noise levels from 0 on, "
                 "the lower one first"),
                (not 0 <= self.rescale <= 1, f"rescale {self.rescale:g}: 0 to 1"),
                (not 0 < self.strength <= 1, f"strength {self.strength:g}: above 0, and 1 at the "
                 f"most"), *((not 0 <= scale < math.inf, f"scale {name}={scale:g}: a number from 0 "
                              f"on") for name, scale in self.scales.items()),
        ):
            if wrong:
                raise InputError(f"not a recipe: {what}")

    @property
    def taken(self) -> int:
        """Steps that are run: ⌊steps·strength⌋, the last ones of the ladder, as in diffusers'
        image-to-image.
        """
        return int(self.steps * self.strength)

    def scale(self, names: Sequence[str]) -> float | dict[str, float]:
        """What `guided` takes as its scale for a model conditioned on these variables."""
        for name in self.scales:
            if name not in names:
                near = get_close_matches(name, names, 1, cutoff=0.0)[0]
                raise InputError(f"guidance of {name!r}: the model has no such condition; it has "
                                 f"{', '.join(names)}; nearest: {near}")
        return {name: self.scales.get(name, self.guidance)
                for name in names} if self.scales else self.guidance


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What is needed to make images: a denoiser round a Model (its EMA), that model's conditioner,
    the VAE, the size.

    `against` is a weaker model of the same variables, for guidance by it. `autocast` makes the
    context in which the UNet runs, e.g. Precision's; everything else stays in float32. To compile,
    compile `denoiser.net.unet`.
    """

    denoiser: Denoiser
    conditioner: Conditioner
    vae: VAE
    size: int
    against: Denoiser | None = None
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def guided_by(self, weaker: Pipeline) -> Pipeline:
        """The same with a weaker model to guide by; InputError unless both know the same conditions
        and latents.
        """
        ours, theirs = ({v.name: getattr(v, "values", "number") for v in p.conditioner.variables}
                        for p in (self, weaker))
        if ours != theirs:
            raise InputError(f"a weaker model must know the same conditions and values: {theirs} "
                             f"are not {ours}")
        kept = weaker.vae.state_dict()
        if not all(x.shape == kept[name].shape and torch.equal(x.cpu(), kept[name].cpu())
                   for name, x in self.vae.state_dict().items()):
            raise InputError("a weaker model must work on the same latents: its VAE is another one")
        return replace(self, against=weaker.denoiser)

    @torch.no_grad()
    def latents(self, labels: Labels, seeds: Sequence[int], recipe: Recipe, *,
                origin: Tensor | None = None,
                noise: Tensor | None = None, arrows: Arrows | None = None) -> Iterator[Tensor]:
        """Denoised estimates after each step, the finished latents last: (N, 4, h, w), recipe.taken
        + 1 times.

        Image k depends on its seed and labels alone; `labels` are tensors (N,), one per variable.
        `origin` are real images, uint8 (N, 3, size, size), or their latents (N, 4, h, w): the
        ladder begins at recipe.strength, at z + σ·noise. Strength 1 keeps nothing of them; one that
        leaves no step gives them back. `noise` (N, 4, h, w) takes the place of the seeds' own, e.g.
        what `invert` gave. `arrows`: see `guided`.
        """
        if origin is None and noise is None and recipe.strength < 1:
            raise InputError(f"strength {recipe.strength:g} is the share of steps from a real "
                             "image, and there is none")
        fresh = SeededNoise(seeds, self._shape(), self._device())
        sigmas = self._rungs(recipe)
        noise = fresh() if noise is None else noise.to(self._device())
        up = (1 + sigmas[0] ** 2).sqrt().item()
        if origin is None or recipe.strength == 1:
            x = noise * up
        elif recipe.taken:
            x = self.encode(origin) + noise * sigmas[0].item()
        else:
            x = self.encode(origin) * up
        denoise = self._guided(labels, len(seeds), recipe, arrows)
        options = {"eta": recipe.eta} if recipe.eta else {}
        if recipe.eta or recipe.sampler in NOISY:
            options["noise"] = fresh
        for x, denoised in SAMPLERS[recipe.sampler](denoise, x, sigmas, **options):  # noqa: B007, B020
            yield denoised
        # the public ladder ends at σ(0) = .029, not at 0
        yield x / (1 + sigmas[-1] ** 2).sqrt().item()

    @torch.no_grad()
    def images(self, labels: Labels, seeds: Sequence[int], recipe: Recipe, *, batch: int = 50,
               progress: Callable[[int], object] = lambda n: None, origin: Tensor | None = None,
               noise: Tensor | None = None, decode_batch: int = DECODE,
               rejects: list[int] | None = None) -> Iterator[Tensor]:
        """Yield uint8 (n, 3, size, size) on the CPU, micro-batch by micro-batch; `progress(n)` is
        told of each step.

        A non-finite image ends the run, unless `rejects` is there to take its place in `seeds`,
        before its batch is yielded; its pixels mean nothing then.
        """
        for start in range(0, len(seeds), batch):
            part = slice(start, start + batch)
            some = {"origin": origin if origin is None else origin[part],
                    "noise": noise if noise is None else noise[part]}
            for z in self.latents({k: v[part] for k, v in labels.items()}, seeds[part], recipe,
                                  **some):
                progress(len(z))
            made = []
            for few in z.split(decode_batch):
                pixels = self.vae.decode(few)
                if rejects is not None:
                    finite = pixels.isfinite().flatten(1).all(1)
                    rejects += [start + len(made) * decode_batch + i
                                for i in (~finite).nonzero().flatten().tolist()]
                    pixels = torch.where(finite[:, None, None, None], pixels, 0)
                made.append(to_uint8(pixels).cpu())
            yield torch.cat(made)

    @torch.no_grad()
    def invert(self, origin: Tensor, labels: Labels, recipe: Recipe) -> Tensor:
        """Real images or their latents, as `latents` takes them → the noise (N, 4, h, w) that ddim
        leads back to them.

        ddim up the recipe's ladder without guidance, each step with the estimate of the level that
        it leaves. The way back errs in proportion to the steps' length, and far more under guidance
        (Mokady et al. 2023). Normal to the extent that the model is right: x_T of a
        variance-preserving model, x/√(1+σ²).
        """
        sigmas = self._rungs(recipe).flip(0)
        x = self.encode(origin) * (1 + sigmas[0] ** 2).sqrt().item()
        denoise = self._guided(labels, len(x), Recipe())
        for x, _ in ddim(denoise, x, sigmas):  # noqa: B007, B020 (the first x goes in; the last one is used)
            pass
        return x / (1 + sigmas[-1] ** 2).sqrt().item()

    @torch.no_grad()
    def encode(self, origin: Tensor, batch: int = DECODE) -> Tensor:
        """uint8 images (N, 3, size, size), or (N, 1, …) of grey, → the means of their latents (N,
        4, h, w); latents stay.
        """
        if origin.dtype == torch.uint8:
            if origin.shape[1] not in (1, 3) or origin.shape[2:] != (self.size, self.size):
                raise InputError(f"images of {tuple(origin.shape[1:])}: the model takes (3, "
                                 f"{self.size}, {self.size})")
            pixels = (part.to(self._device()).expand(-1, 3, -1, -1).float() / 127.5 - 1
                      for part in origin.split(batch))
            return torch.cat([self.vae.encode(part).mean for part in pixels])
        if origin.shape[1:] != self._shape():
            raise InputError(f"latents of {tuple(origin.shape[1:])}: the model takes "
                             f"{self._shape()}")
        return origin.to(self._device())

    def _guided(self, labels: Labels, n: int, recipe: Recipe,
                arrows: Arrows | None = None) -> Denoise:
        assert all(len(value) == n
                   for value in labels.values()), f"labels of {n} images, one for each seed"
        labels = {name: value.to(self._device()) for name, value in labels.items()}
        # never round a yield: the caller of a generator would run under it too
        with self.autocast():
            denoise = guided(self.denoiser, labels, self.conditioner.null(n, self._device()),
                             recipe.scale([*labels]), interval=recipe.interval,
                             rescale=recipe.rescale, against=self.against, arrows=arrows)

        def run(x: Tensor, sigma: Tensor) -> Tensor:
            with self.autocast():
                return denoise(x, sigma)

        return run

    def _rungs(self, recipe: Recipe) -> Tensor:
        """The ladder's lower end, taken + 1 descending σ."""
        return self.denoiser.schedule.ladder(recipe.steps,
                                             recipe.ladder)[recipe.steps - recipe.taken:]

    def _shape(self) -> tuple[int, int, int]:
        cells = self.size // self.vae.factor
        return self.vae.config.latent_channels, cells, cells

    def _device(self) -> torch.device:
        return next(self.vae.parameters()).device


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → 0 … 255, rounded; a non-finite pixel is refused, for it would become a black
    one.
    """
    if not images.isfinite().all():
        raise TrainingFault("the model gave non-finite pixels, which are never written: untrained, "
                            "or --guidance too high")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
