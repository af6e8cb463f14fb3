"""Labels + seeds → uint8 images, the one path of train.py, sample.py and evaluate.py; and back.

    latents, images   noise → z → pixels; with `origin` they begin at real images
                      (SDEdit, Meng et al. 2022), with `recipe.invert` at their own noise,
                      with `mask` they are made anew in places only
    invert            real images → the noise that ddim leads back to them
                      (Song, Meng & Ermon 2021, section 4.3)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoise, Denoiser
from minidiff.diffusion.guidance import EVERYWHERE, Arrows, guided, own_scales
from minidiff.diffusion.inpainting import keeping, resampled
from minidiff.diffusion.samplers import NOISY, SAMPLERS, Sampler, SeededNoise, ddim
from minidiff.diffusion.schedule import LADDERS, Ladder, Schedule
from minidiff.diffusion.vae import VAE
from minidiff.errors import InputError, refuse
from minidiff.overlap import send
from minidiff.pixels import TOP, at_once, laid_in, require_finite, rounded, to_depth, to_float
from minidiff.variables import Labels, findings_of

DECODE = 8  # images in one pass of the VAE, at most: it takes far more memory than the UNet


@dataclass(frozen=True)
class Recipe:
    """How to sample, as plain JSON values; each image's metadata hold it. The scripts' defaults."""

    sampler: Sampler = "dpmpp_2m"
    ladder: Ladder = "logsigma"
    steps: int = 12                              # 1 or more, of the whole ladder; see `taken`
    guidance: float = 1.5                        # 0 or more; 1: none
    eta: float = 0.0                             # 0 … 1, fresh noise in ddim
    interval: tuple[float, float] = EVERYWHERE   # guided noise levels: 0 ≤ low < σ ≤ high
    rescale: float = 0.0                         # 0 … 1, how far guidance keeps the output's std
    scales: Mapping[str, float] = field(default_factory=dict, hash=False)  # by variable or finding
    strength: float = 1.0                        # above 0 … 1, share of steps from a real image
    invert: bool = False                         # from the real image's own noise, not the seed's
    resample: int = 1                            # 1 or more, times that each step is taken
    churn: float = 0.0                           # 0 or more, noise renewed in heun: EDM's S_churn

    def __post_init__(self):
        interval = tuple(min(float(s), EVERYWHERE[1]) for s in self.interval)
        scales = {name: float(scale) for name, scale in self.scales.items()}
        object.__setattr__(self, "interval", interval)
        object.__setattr__(self, "scales", scales)
        allowed = {
            f"sampler {self.sampler!r}: choose one of {', '.join(SAMPLERS)}":
                self.sampler in SAMPLERS,
            f"ladder {self.ladder!r}: choose one of {', '.join(LADDERS)}": self.ladder in LADDERS,
            f"steps {self.steps}: 1 or more": self.steps >= 1,
            f"guidance {self.guidance:g}: 0 or more": 0 <= self.guidance < math.inf,
            f"eta {self.eta:g}: 0 to 1": 0 <= self.eta <= 1,
            f"eta {self.eta:g}: it belongs to the sampler ddim, not {self.sampler}":
                not self.eta or self.sampler == "ddim",
            f"churn {self.churn:g}: 0 or more": 0 <= self.churn < math.inf,
            f"churn {self.churn:g}: it belongs to the sampler heun, not {self.sampler}":
                not self.churn or self.sampler == "heun",
            f"rescale {self.rescale:g}: 0 to 1": 0 <= self.rescale <= 1,
            f"interval {' to '.join(f'{s:g}' for s in interval)}: two noise levels, 0 or more, the "
            "lower one first": len(interval) == 2 and 0 <= interval[0] < interval[1],
            f"strength {self.strength:g}: above 0, 1 at the most": 0 < self.strength <= 1,
            f"invert: {self.sampler}{f' of eta {self.eta:g}' * bool(self.eta)}"
            f"{f' of churn {self.churn:g}' * bool(self.churn)} draws fresh noise, "
            "which leads away from an image that was inverted; choose one of "
            f"{', '.join(sorted(SAMPLERS.keys() - NOISY))}":
                not (self.invert and (self.eta or self.churn or self.sampler in NOISY)),
            f"resample {self.resample}: 1 or more": self.resample >= 1,
            f"churn {self.churn:g}: a share of all steps, and resample {self.resample} takes each "
            "by itself": not self.churn or self.resample == 1,
            **{f"scale {name}={scale:g}: 0 or more": 0 <= scale < math.inf
               for name, scale in scales.items()},
        }
        refuse({text: not met for text, met in allowed.items()}, "not a recipe: ")

    @property
    def taken(self) -> int:
        """Steps that are run: the last ⌊steps·strength⌋ of the ladder, as in diffusers."""
        return int(self.steps * self.strength)

    @property
    def calls(self) -> int:
        """Steps of the network for a batch: each as often as it is taken, and on the way up."""
        return self.taken * (self.resample + self.invert)

    def require_levels(self, schedule: Schedule) -> None:
        if self.steps > len(schedule):
            raise InputError(f"--steps {self.steps} is more than the {len(schedule)} levels of the "
                             "schedule")
        if schedule.zero_snr and self.ladder in ("karras", "logsigma"):
            print(f"the model's schedule ends at zero SNR, σ = {schedule.sigmas_table[-1]:.0f}: "
                  f"--ladder {self.ladder} spends many of its steps on pure noise; --ladder "
                  "trailing does not")

    def scale(self, names: Sequence[str],
              findings: Sequence[str] = ()) -> float | dict[str, float]:
        """What `guided` takes as its scale for a model conditioned on these variables, whose
        findings may have scales of their own."""
        for name in sorted(self.scales.keys() - {*names, *findings}):
            near = "".join(f"; nearest: {n}" for n in get_close_matches(
                name, [*names, *findings], 1, cutoff=0.0))
            raise InputError(f"guidance of {name!r}: the model has no such condition"
                             f"{' or finding' * bool(findings)}; it has "
                             f"{', '.join([*names, *findings]) or 'none'}{near}")
        each = {name: self.scales.get(name, self.guidance) for name in names}
        return each if self.scales.keys() & set(names) else self.guidance


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What is needed to make images. To compile it, compile `denoiser.net.unet`."""

    denoiser: Denoiser                                          # of a Model, as a rule its EMA
    conditioner: Conditioner                                    # of that model
    vae: VAE
    size: int                                                   # px a side
    against: Denoiser | None = None                             # a weaker model to guide by
    autocast: Callable[[], AbstractContextManager] = nullcontext  # round calls of the UNet alone
    fill: bool = False        # a last batch, up to the others: compile and cuDNN see one shape
    dtype: torch.dtype = torch.uint8                            # of the pixels made; or uint16

    def guided_by(self, weaker: "Pipeline") -> "Pipeline":
        """The same with a weaker model to guide by, of the same conditions and latents."""
        ours, theirs = ({v.name: v.values or v.kind for v in p.conditioner.variables}
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
                origin: Tensor | None = None, before: Labels | None = None,
                mask: Tensor | None = None, noise: Tensor | None = None,
                arrows: Arrows | None = None) -> Iterator[Tensor]:
        """The denoised estimate after each of recipe.taken steps, then the finished latents.

        All are (N, 4, h, w); image k depends on its seed and labels alone. `origin` holds real
        images, uint8 or uint16 (N, 3, size, size), or latents: the ladder begins at
        recipe.strength, at z + σ·noise. Strength 1 keeps nothing of them; one that leaves no step
        gives them back. `noise` (N, 4, h, w) replaces the seeds' own; `recipe.invert` that of
        `invert` under the labels `before`. `mask`, bool (N, 1, size, size), says which pixels are
        made anew: a latent cell is, if any of its pixels is, and the others stay. `arrows`: see
        `guided`.
        """
        self._check(recipe, origin, mask, noise)
        fresh = SeededNoise(seeds, self._shape, self._device)
        sigmas = self._sigmas(recipe)
        known = None if origin is None else self.encode(origin)
        if recipe.invert:
            noise = self.invert(known, labels if before is None else before, recipe)
        noise = fresh() if noise is None else noise.to(self._device)
        up = (1 + sigmas[0] ** 2).sqrt().item()
        if origin is None or recipe.invert or recipe.strength == 1:
            x = noise * up
        elif recipe.taken:
            x = known + noise * sigmas[0].item()
        else:
            x = known * up
        options = {name: share for name in ("eta", "churn") if (share := getattr(recipe, name))}
        if options or recipe.sampler in NOISY:
            options["noise"] = fresh
        denoise = self._guided(labels, len(seeds), recipe, arrows)
        if mask is not None:
            new = F.max_pool2d(send(mask.float(), self._device), self.vae.factor)
            if not recipe.invert:  # then x is on the way of the known z already
                x = torch.lerp(known + noise * sigmas[0].item(), x, new)
            denoise = keeping(denoise, known, new)
        sampler = partial(SAMPLERS[recipe.sampler], denoise, **options)
        steps = (sampler(x, sigmas) if recipe.resample == 1 else
                 resampled(sampler, x, sigmas, recipe.resample, fresh))
        for x, denoised in steps:  # noqa: B007 (the last x is used below)
            yield denoised
        x = x / (1 + sigmas[-1] ** 2).sqrt().item()  # the public ladder ends at σ(0) = .029
        yield x if mask is None else torch.lerp(known, x, new)

    @torch.no_grad()
    def images(self, labels: Labels, seeds: Sequence[int], recipe: Recipe, *, batch: int = 50,
               progress: Callable[[int], object] = lambda n: None, origin: Tensor | None = None,
               before: Labels | None = None, mask: Tensor | None = None,
               noise: Tensor | None = None, decode_batch: int = 0,
               rejects: list[int] | None = None) -> Iterator[Tensor]:
        """Yield pixels (n, 3, size, size) of `dtype` on the CPU, batch by batch; `progress(n)`
        after each step.

        See `latents`. Pixels outside a mask are those of `origin`, which must hold images then.
        A non-finite image raises TrainingFault. With a list of `rejects`, its place in `seeds` is
        added there instead, before its batch is yielded; its pixels mean nothing then. A GPU is
        waited for once a batch, when all of it is under way.
        """
        for start in range(0, len(seeds), batch):
            places = range(start, min(start + batch, len(seeds)))
            n = len(places)
            filled = [*places, *[places[-1]] * (batch - n if self.fill else 0)]
            given = {"origin": origin, "mask": mask, "noise": noise}
            steps = self.latents({k: v[filled] for k, v in labels.items()},
                                 [seeds[i] for i in filled], recipe,
                                 before=before and {k: v[filled] for k, v in before.items()},
                                 **{k: v[filled] for k, v in given.items() if v is not None})
            for z in steps:  # noqa: B007 (the last z is used below)
                progress(n)
            made, finite = [], []
            for few in z[:n].split(decode_batch or min(DECODE, at_once(self.size))):
                pixels = self.vae.decode(few)
                finite.append(pixels.isfinite().flatten(1).all(1))
                made.append(rounded(torch.where(finite[-1][:, None, None, None], pixels, 0),
                                    self.dtype))
            whole = torch.cat(finite).cpu()
            if rejects is None:
                require_finite(whole)
            else:
                rejects += [i for i, good in zip(places, whole.tolist()) if not good]
            pixels = laid_in(made[0].new_empty(n, *made[0].shape[1:]), made).cpu()
            if mask is not None:
                assert origin.dtype in TOP, "a mask keeps pixels, and latents have none"
                pixels = torch.where(mask[places.start : places.stop].cpu(), pixels,
                                     to_depth(origin[places.start : places.stop], self.dtype).cpu())
            yield pixels

    @torch.no_grad()
    def invert(self, origin: Tensor, labels: Labels, recipe: Recipe) -> Tensor:
        """Real images or their latents → the noise (N, 4, h, w) that ddim leads back to them.

        ddim up the recipe's ladder without guidance, each step with the estimate of the level that
        it leaves. The way back errs in proportion to the steps' length, and far more under guidance
        (Mokady et al. 2023). The noise is normal to the extent that the model is right: x_T of a
        variance-preserving model, x/√(1+σ²).
        """
        sigmas = self._sigmas(recipe).flip(0)
        start = x = self.encode(origin) * (1 + sigmas[0] ** 2).sqrt().item()
        denoise = self._guided(labels, len(start), Recipe(guidance=1.0))
        for x, _ in ddim(denoise, start, sigmas):  # noqa: B007 (the last x is used below)
            pass
        return x / (1 + sigmas[-1] ** 2).sqrt().item()

    @torch.no_grad()
    def encode(self, origin: Tensor) -> Tensor:
        """uint8 or uint16 images (N, 3 or 1, size, size) → their mean latents (N, 4, h, w); latents
        stay."""
        shape = tuple(origin.shape[1:])
        if origin.dtype not in TOP:
            if shape != self._shape:
                raise InputError(f"latents of {shape}: the model takes {self._shape}")
            return origin.to(self._device)
        if shape not in ((1, self.size, self.size), (3, self.size, self.size)):
            raise InputError(f"images of {shape}: the model takes (3, {self.size}, {self.size})")
        parts = (to_float(part.to(self._device).expand(-1, 3, -1, -1))
                 for part in origin.split(min(DECODE, at_once(self.size))))
        return torch.cat([self.vae.encode(part).mean for part in parts])

    def _check(self, recipe: Recipe, origin: Tensor | None, mask: Tensor | None,
               noise: Tensor | None) -> None:
        """What a recipe asks for must be there."""
        refuse({
            f"strength {recipe.strength:g} is the share of steps from a real image, and there is "
            "none": recipe.strength < 1 and origin is None and noise is None,
            "invert begins at a real image, and there is none": recipe.invert and origin is None,
            "a mask says where a real image is made anew, and there is none":
                mask is not None and origin is None,
            f"resample {recipe.resample} joins what is new to what a mask keeps, and there is no "
            "mask": recipe.resample > 1 and mask is None,
        })

    @torch.no_grad()
    def check_guidance(self, recipe: Recipe) -> None:
        """InputError where the model, or the weaker one, cannot be guided as this recipe says."""
        self._guided(self.conditioner.null(1, self._device), 1, recipe)

    def _guided(self, labels: Labels, n: int, recipe: Recipe,
                arrows: Arrows | None = None) -> Denoise:
        assert all(len(value) == n for value in labels.values()), "one label for each seed"
        labels = {name: send(value, self._device) for name, value in labels.items()}
        variables = self.conditioner.variables
        scale = recipe.scale([*labels], findings := findings_of(variables))
        own = own_scales(variables, scale, {
            name: w for name, w in recipe.scales.items() if name in {*findings} - {*labels}})
        with self.autocast():  # never round a yield: the caller of a generator would run under it
            denoise = guided(self.denoiser, labels, self.conditioner.null(n, self._device), scale,
                             interval=recipe.interval, rescale=recipe.rescale,
                             against=self.against, own=own, arrows=arrows)

        def run(x: Tensor, sigma: Tensor) -> Tensor:
            with self.autocast():
                return denoise(x, sigma)

        return run

    def _sigmas(self, recipe: Recipe) -> Tensor:
        """The lower end of the ladder: taken + 1 descending σ."""
        ladder = self.denoiser.schedule.ladder(recipe.steps, recipe.ladder)
        return ladder[recipe.steps - recipe.taken:]

    @property
    def _shape(self) -> tuple[int, int, int]:
        cells = self.size // self.vae.factor
        return self.vae.config.latent_channels, cells, cells

    @property
    def _device(self) -> torch.device:
        return next(self.vae.parameters()).device
