"""Guidance: a sampler's `(x, sigma) → denoised` as a mix of several denoised estimates.

    plain        D(∅) + w·(D(y) − D(∅)), ∅: all variables null     Ho & Salimans 2022, eq. 6
    by variable  D(∅) + Σ_k w_k·(D(S_k) − D(S_{k−1}))              Brooks et al. 2023, eq. 3,
                 for any number of sets ∅ ⊂ S_1 ⊂ S_2 ⊂ … ⊂ y
    by finding   y₀ for y above, + Σ_f w_f·(D(y₀, f) − D(y₀))      Liu et al. 2022, eq. 11,
                 y₀: y with the named findings absent              with y₀ in place of ∅
    by a weaker  W(y) + w·(D(y) − W(y))                            Karras et al. 2024
                 model W (autoguidance)
    interval     w = 1 unless low < σ ≤ high                       Kynkäänniemi et al. 2024
    by a         D + s·σ²·∇ₓ log p(y | D(x))                       Dhariwal & Nichol 2021; of D(x)
    classifier                                                     in place of x: Chung et al. 2023
    rescaled     std(F) is drawn towards that of the unguided F    Lin et al. 2023 (2305.08891),
                                                                   eq. 15 and 16

The sets S_k are nested. Variables of scale 1 come first, then the others by rising scale, those of
equal scale together; those of scale 0 never. So equal scales are plain guidance, and no estimate of
weight 0 is computed: a step costs one estimate for each scale other than 0 and 1, and one for where
they start from, which is ∅ or the variables of scale 1. One batch holds them all. The composition
of Liu et al. 2022 (eq. 11) adds up D({i}) − D(∅) instead: it takes variables for independent given
the image, and with equal scales it is not plain guidance.

A finding may have a scale of its own. It is then added to the others by itself: D(y₀, f) − D(y₀)
is σ² times the gradient of its log odds given x and what is in y₀. So findings that never stood
together in training can, for no estimate asks for them together; they are taken for independent
given the image. It costs one estimate for each finding that is named.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.diffusion.denoiser import Denoise, Denoiser
from minidiff.diffusion.model import Model
from minidiff.errors import InputError
from minidiff.variables import Labels, Variable

EVERYWHERE = (0.0, 1e9)  # the interval of all σ; plain numbers, for JSON knows no infinity
Arrows = list[tuple[float, Tensor]]
Own = tuple[str, int, float]  # a variable of findings, the place of one in it, its scale


def guided(denoiser: Denoiser, labels: Labels, null: Labels,
           scale: float | Mapping[str, float] = 1.0, *, interval: tuple[float, float] = EVERYWHERE,
           rescale: float = 0.0, against: Denoiser | None = None,
           own: Sequence[Own] = (), arrows: Arrows | None = None) -> Denoise:
    """The guided denoiser of these N images as a closure; sigma is one level for all of them.

    `scale` is one number, or one for each variable. `against` is a weaker model of the same labels,
    which takes the place of the null labels. `own`: findings with scales of their own. Each call
    appends to `arrows` σ and how far guidance moved each image's estimate, (N,): the root mean
    square of guided − unguided, in units of z. What depends on the labels alone is computed here,
    not in each call.
    """
    if against is None:
        sets = nested_sets(with_findings(labels, own), null, scale)
    elif own:
        raise InputError("guidance by a weaker model has one scale: no finding has its own")
    else:
        sets = [(labels, 1.0), (labels, common_scale(scale))]
    strongest = sets[-1][1]
    all_labels = sets[-1][0] if against else nested_sets(labels, null, scale)[-1][0]
    conditional = conditioned(denoiser, all_labels)
    low, high = interval
    if strongest == 1 and not own:
        low = math.inf  # nothing to guide: no σ lies inside
    elif against is None:
        estimates = batched_cfg(denoiser, [
            *(with_findings(all_labels, own, kept) for kept in own), *(part for part, _ in sets)])
    else:
        estimates = autoguidance(conditioned(against, labels), conditional)

    def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
        if not low < float(sigma) <= high:
            out = unguided = conditional(x, sigma)
        else:
            alone, parts = (both := estimates(x, sigma))[: len(own)], both[len(own) :]
            out, unguided = parts[0], parts[-1]
            for (_, weight), lower, upper in zip(sets[1:], parts, parts[1:]):
                out = out + weight * (upper - lower)
            for (_, _, weight), estimate in zip(own, alone):
                out, unguided = (so_far + w * (estimate - parts[-1])
                                 for so_far, w in ((out, weight), (unguided, 1)))
            if rescale:
                out = rescaled(out, unguided, denoiser.kept(x, sigma), rescale)
        if arrows is not None:
            arrows.append((float(sigma), (out - unguided).square().flatten(1).mean(1).sqrt().cpu()))
        return out

    return denoise


def by_classifier(denoise: Denoise, log_p: Callable[[Tensor], Tensor], scale: float) -> Denoise:
    """A denoiser of p(z)·p(y|z)ˢ: `denoise` moved by the gradient of log_p (N, C, h, w) → (N,).

    By Tweedie's formula the estimate is x + σ²·∇ₓ log p(x). A classifier of clean images knows
    p(y|z) alone, so that of the estimate stands for p(y|x): exact for a log_p that is linear in z
    on Gaussian data, and the worse the wider p(z|x) is. It costs a way back through the network,
    and through all that log_p does: as a rule the VAE's decoder and the classifier.
    """
    def guided(x: Tensor, sigma: Tensor | float) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            out = denoise(x, sigma)
            gradient, = torch.autograd.grad(log_p(out).sum(), x)
        return out.detach() + scale * float(sigma) ** 2 * gradient

    return guided


def nested_sets(labels: Labels, null: Labels,
                scale: float | Mapping[str, float]) -> list[tuple[Labels, float]]:
    """The sets S_k, as labels with null for all other variables, and their weights w_k.

    The first set is where the steps start, and has weight 1: empty, or the variables of scale 1.
    """
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(labels, float(scale))
    assert set(scales) == set(labels), "one scale for each variable"
    chosen: set[str] = set()
    sets = []
    for weight in sorted({1.0, *scales.values()} - {0.0}, key=lambda w: (w != 1, w)):
        chosen |= {name for name, w in scales.items() if w == weight}
        sets.append(({name: (labels if name in chosen else null)[name] for name in labels}, weight))
    return sets


def own_scales(variables: Sequence[Variable], scale: float | Mapping[str, float],
               findings: Mapping[str, float]) -> list[Own]:
    """Where the findings with scales of their own stand.

    InputError for one whose variable is not guided at all, for then D(y₀) is not computed.
    """
    found = []
    for name, own in findings.items():
        v = next(v for v in variables if not v.exclusive and name in v.values)
        if (scale[v.name] if isinstance(scale, Mapping) else scale) == 0:
            raise InputError(f"guidance of finding {name!r}: {v.name} has scale 0, and is left out")
        found.append((v.name, v.values.index(name), own))
    return found


def with_findings(labels: Labels, own: Sequence[Own], kept: Own | None = None) -> Labels:
    """The labels with these findings absent, but for one that is kept where it is present; cells
    that are unknown or null stay."""
    labels = dict(labels)
    for name, place, _ in (finding for finding in own if finding != kept):
        cells = labels[name]
        labels[name] = torch.where(cells >= 0, cells & ~(1 << place), cells)
    return labels


def common_scale(scale: float | Mapping[str, float]) -> float:
    """The one scale of autoguidance; the weaker model knows all variables, so none has its own."""
    values = set(scale.values()) if isinstance(scale, Mapping) else {scale}
    if len(values) != 1:
        raise InputError("guidance by a weaker model has one scale for all conditions: name none "
                         "of them")
    return float(values.pop())


def conditioned(denoiser: Denoiser, labels: Labels) -> Denoise:
    """The denoiser of these labels. A Model's context is computed once, here.

    Any other callable is called as it is: DDP and FSDP (a subclass of Model) work by hooks on calls
    of the whole module, and `torch.compile` returns one graph. To compile and keep the context,
    compile `Model.unet`.
    """
    if type(denoiser.net) is not Model:
        return lambda x, sigma: denoiser(x, sigma, labels)
    unet, context = replace(denoiser, net=denoiser.net.unet), denoiser.net.conditioner(labels)
    return lambda x, sigma: unet(x, sigma, context)


def batched_cfg(denoiser: Denoiser, sets: list[Labels]) -> Callable[..., Sequence[Tensor]]:
    """(x, sigma) → the estimate (N, C, h, w) for each set of labels, computed as one batch."""
    parts = sets[::-1]
    batch = conditioned(denoiser, {k: torch.cat([part[k] for part in parts]) for k in parts[0]})
    return lambda x, sigma: batch(x.repeat(len(parts), 1, 1, 1), sigma).chunk(len(parts))[::-1]


def autoguidance(weaker: Denoise, stronger: Denoise) -> Callable[..., Sequence[Tensor]]:
    """(x, sigma) → the estimates W(y) and D(y)."""
    return lambda x, sigma: (weaker(x, sigma), stronger(x, sigma))


def rescaled(guided: Tensor, unguided: Tensor, kept: Tensor, share: float) -> Tensor:
    """Guided estimates (N, C, h, w) whose F has, to this share, the std of the unguided F.

    Eq. 15 and 16 are about F, and so is diffusers' `rescale_noise_cfg`: eps, v or x0, whatever the
    network was trained for. D = kept + c_out·F, and c_out cancels in all of it. A constant F (an
    untrained network gives 0) stays as it is.
    """
    guided, unguided = guided - kept, unguided - kept
    std, target = (F.std(dim=(1, 2, 3), keepdim=True) for F in (guided, unguided))
    ratio = torch.where(std > 0, target / std, 1)
    return kept + (share * ratio + (1 - share)) * guided
