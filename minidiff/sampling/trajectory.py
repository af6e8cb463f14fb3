"""One image's way from noise, on one sheet: `python sample.py trajectory`.

    strip      row 1   c_in·x, the noisy latents as the network sees them (but for flow: x/√(1+σ²))
               row 2   D(x; σ), the guided estimate of the clean image at that level, decoded
    arrow      how far guidance moved that estimate, level by level: root mean square in units of z
    attention  at three of these levels, in the conditional call, of one layer, averaged over its
               heads: the share of cross-attention that leaves position 0 for positions 1 …, and
               where the centre cell looks

Conditions are added to context positions 1 … alone, all of them alike; position 0 is the same for
every image. So a share says how much of the context's pull can carry a condition at all; it cannot
say which one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from minidiff import runs
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.samplers import Sampler
from minidiff.diffusion.schedule import Ladder
from minidiff.diffusion.unet import Attention
from minidiff.errors import InputError
from minidiff.pixels import to_grey, to_uint8
from minidiff.root import Rooted
from minidiff.sampling import plan
from minidiff.sampling.finished_run import open_pipeline
from minidiff.variables import Labels

if TYPE_CHECKING:  # to import matplotlib takes half a second, for which --help need not wait
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

AT_MOST = 16  # columns of the strip that can still be read
MAPS = 3      # levels whose attention is shown
FONTS = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 7, "xtick.labelsize": 7,
         "ytick.labelsize": 7, "legend.fontsize": 7}


@dataclass(frozen=True)
class TrajectoryConfig(Rooted):
    writes: ClassVar[str] = ""             # one file
    run: str = "ROOT/diffusion"            # finished diffusion run, or its best/
    out: str = "ROOT/trajectory.png"       # the sheet; one that is there is replaced
    seed: int = 0                          # of the image, and of the conditions that are drawn
    label: str = ""                        # one label; none: the first that the model knows
    given: tuple[str, ...] = ()            # conditions: sex=F, age= unknown, age=null dropped
    sampler: Sampler = Recipe.sampler      # docs/samplers.md compares them
    ladder: Ladder = Recipe.ladder         # spacing of the noise levels
    steps: int = Recipe.steps              # steps of the sampler
    guidance: float = Recipe.guidance      # 1: none
    shown: int = 8                         # steps on the strip, spread evenly from first to last
    device: str = "cpu"                    # cpu, cuda, cuda:1 …


@dataclass(frozen=True, eq=False)
class Step:
    sigma: float
    seen: Tensor                # (1, 4, h, w), x/√(1+σ²)
    denoised: Tensor            # (1, 4, h, w), after guidance
    arrow: float                # how far guidance moved it
    maps: Maps | None


@dataclass(frozen=True, eq=False)
class Maps:
    """Attention of the conditional call in one layer, (cells, cells) each."""

    layer: str
    share: Tensor               # of cross-attention that goes to context positions 1 …
    centre: Tensor              # self-attention of the centre cell
    uniform: float              # the share if all positions drew alike


@contextmanager
def attention_maps(unet: nn.Module, most: float = math.inf) -> Iterator[dict[str, Tensor]]:
    """What each attention layer looks at in the calls inside, by its name: `probabilities`.

    `mid_block.attentions.0.attn1` is self-attention, `….attn2` cross-attention. Layers of more than
    `most` cells are left out.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, layer: Attention, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        if inputs[0].shape[1] <= most:
            found[name.replace(".transformer_blocks.0", "")] = probabilities(layer, *inputs)

    hooks = [layer.register_forward_hook(partial(keep, name))
             for name, layer in unet.named_modules() if isinstance(layer, Attention)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def probabilities(layer: Attention, h: Tensor, context: Tensor) -> Tensor:
    """The mean of the heads' softmax(q·kᵀ/√d_head), (N, cells, tokens) float32 on the CPU.

    The fused kernel never holds them. One head at a time: at 64² cells one map takes 64 MiB.
    """
    q, k = layer.split(layer.to_q(h)), layer.split(layer.to_k(context))
    with torch.autocast(q.device.type, enabled=False):
        q, k = q.float() / math.sqrt(q.shape[-1]), k.float()
        heads = ((a @ b.mT).softmax(-1) for a, b in zip(q.unbind(1), k.unbind(1)))
        return (sum(heads) / q.shape[1]).cpu()


def finest(by_layer: dict[str, Tensor], image: int = 0) -> Maps:
    """The maps of the last layer with the most cells, for one image of a batch.

    The first of a guided batch has all its conditions.
    """
    own = max(reversed([name for name in by_layer if name.endswith("attn1")]),
              key=lambda name: by_layer[name].shape[1])
    layer = own.removesuffix(".attn1")
    self_attention, cross = by_layer[own][image], by_layer[layer + ".attn2"][image]
    side = math.isqrt(len(self_attention))
    centre = self_attention[(side // 2) * side + side // 2]
    return Maps(layer, cross[:, 1:].sum(1).view(side, side), centre.view(side, side),
                1 - 1 / cross.shape[1])


def follow(pipeline: Pipeline, labels: Labels, seed: int, recipe: Recipe,
           mapped: Sequence[int]) -> Iterator[Step | Tensor]:
    """The steps of sampling, those in `mapped` with maps, then the latents (1, 4, h, w)."""
    model, calls, arrows = pipeline.denoiser.net, [], []

    def net(x: Tensor, t: Tensor, labels: Labels) -> Tensor:
        """The model; keeps what it is given and, in steps that are `mapped`, its attention."""
        with attention_maps(model.unet) if i in mapped else nullcontext() as by_layer:
            out = model(x, t, labels)
        calls.append((x[:1].cpu(), finest(by_layer) if by_layer else None))
        return out

    pipeline = replace(pipeline, denoiser=replace(pipeline.denoiser, net=net))
    estimates = pipeline.latents(labels, [seed], recipe, arrows=arrows)
    for i in range(recipe.taken):  # noqa: B007 (`net` reads it)
        denoised = next(estimates)
        (sigma, arrow), (seen, maps) = arrows[0], calls[0]  # of heun's calls the first
        arrows.clear()
        calls.clear()
        yield Step(sigma, seen, denoised, arrow.item(), maps)
    yield next(estimates)


def trajectory(cfg: TrajectoryConfig) -> None:
    """Draw one image's way from noise: the strip, guidance arrow, attention."""
    out, recipe = Path(cfg.out), Recipe(cfg.sampler, cfg.ladder, cfg.steps, cfg.guidance)
    if out.suffix.lower() != ".png" or out.is_dir():
        raise InputError(f"--out {cfg.out}: name a file that ends in .png")
    if cfg.shown > AT_MOST:
        raise InputError(f"--shown {cfg.shown}: {AT_MOST} images side by side at the most")
    pipeline, facts = open_pipeline(cfg.run, cfg.device, "fp32")
    recipe.require_levels(pipeline.denoiser.schedule)
    variables = pipeline.conditioner.variables
    row = plan.plan(variables, facts["rows"], labels=(cfg.label,) if cfg.label else (), per_label=1,
                    given=cfg.given, seed=cfg.seed)[0]
    shown = evenly(cfg.steps, cfg.shown)
    mapped = [shown[i] for i in evenly(len(shown), MAPS)]
    *steps, end = follow(pipeline, plan.encode(variables, [row]), cfg.seed, recipe, mapped)

    @torch.no_grad()
    def picture(z: Tensor) -> Tensor:
        pixels = to_uint8(pipeline.vae.decode(z.to(end.device))).cpu()                # (1, 3, H, W)
        return to_grey(pixels)[0, 0] if facts["grey"] else pixels[0].permute(1, 2, 0)

    strip = [(step, picture(step.seen), picture(step.denoised))
            for step in (steps[i] for i in shown)]
    told = ", ".join(described(v.name, row.get(v.name, ""),
                               v.name in plan.outside(variables, row)) for v in variables)
    conditions = "no conditions (guidance 0)" if cfg.guidance == 0 else told or "no conditions"
    guidance = cfg.guidance if variables else 1.0
    title = (fill(f"A synthetic image on its way from noise: {conditions}", 130)
             + f"\nseed {cfg.seed}, sampler {cfg.sampler}, ladder {cfg.ladder}, "
             f"{cfg.steps} steps, guidance {guidance:g}")
    runs.write_atomic(out, sheet(title, strip, picture(end), steps, guidance))
    print(f"{out}: {conditions}; {len(shown)} of {cfg.steps} steps shown, the attention of "
          f"{steps[mapped[0]].maps.layer} at {len(mapped)} of them")


def described(name: str, cell: str, outside: bool) -> str:
    cell = {"": "unknown", plan.NULL: "dropped"}.get(cell, cell)
    return f"{name} {cell}" + (" (outside what training saw)" if outside else "")


def evenly(n: int, k: int) -> list[int]:
    """Up to k of 0 … n−1, first and last among them; of one, the last."""
    return [n - 1] if k == 1 else sorted({round(i * (n - 1) / (k - 1)) for i in range(k)})


def sheet(title: str, strip: Sequence[tuple[Step, Tensor, Tensor]], image: Tensor,
          steps: Sequence[Step], guidance: float) -> bytes:
    """The whole as PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    columns = len(strip) + 1
    width = max(11.5, columns + 0.5)
    height = 2 * min(width / columns, 2.2) + 0.5  # of the strip
    out = io.BytesIO()
    with rc_context(FONTS):
        figure = Figure(figsize=(width, height + 4.9), dpi=120, layout="constrained")
        figure.suptitle(title, fontsize=10)
        top, below = figure.subfigures(2, 1, height_ratios=[height, 4.4])
        left, right = below.subfigures(1, 2, width_ratios=[4, 6.5])
        draw_strip(top.subplots(2, columns, squeeze=False), strip, image)
        draw_arrows(left.subplots(), steps, {step.sigma for step, *_ in strip}, guidance)
        draw_attention(right, [step for step, *_ in strip if step.maps])
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def draw_strip(axes: np.ndarray, strip: Sequence[tuple[Step, Tensor, Tensor]],
               image: Tensor) -> None:
    columns = [(f"σ {step.sigma:.3g}", seen, denoised) for step, seen, denoised in strip]
    for (upper, lower), (title, *pictures) in zip(axes.T, [*columns, ("finished", image)]):
        upper.set(title=title)
        lower.set_visible(len(pictures) == 2)
        for ax, pixels in zip((upper, lower), pictures):
            ax.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    axes[0, 0].set(ylabel="noisy: x/√(1+σ²)\nas decoded")
    axes[1, 0].set(ylabel="estimate: D(x; σ)\nas decoded")


def draw_arrows(ax: Axes, steps: Sequence[Step], marked: set[float], guidance: float) -> None:
    """How far guidance moved the estimate of each step; those on the strip are marked."""
    points = [(step.sigma, step.arrow) for step in steps]
    shown = [point for point in points if point[0] in marked]
    ax.plot(*zip(*points), color="black", linewidth=1.2, marker=".", label="each step")
    ax.plot(*zip(*shown), color="black", linestyle="none", marker="o", markerfacecolor="white",
            clip_on=False, zorder=3, label="on the strip")
    titles = {0: "guidance 0: the conditions play no part", 1: "guidance 1: nothing is added"}
    ax.set(title=titles.get(guidance, f"how far guidance {guidance:g} moves the estimate"),
           xlabel="noise level σ; time runs to the right", xscale="log",
           ylabel="guidance arrow: rms of guided − unguided, in units of z",
           ylim=(0, 1.1 * max(step.arrow for step in steps) or 1))
    ax.invert_xaxis()
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)


def draw_attention(figure: SubFigure, steps: Sequence[Step]) -> None:
    """Two rows of maps, one scale a row; small maps have their values written in them."""
    first = steps[0].maps
    side = len(first.share)
    figure.suptitle(f"attention in {first.layer} ({side} × {side} cells), the mean of its heads",
                    fontsize=9)
    axes = figure.subplots(2, len(steps), squeeze=False)
    rows = (("cross: share that goes to\npositions 1 …", [step.maps.share for step in steps]),
            ("self: where the centre cell\n(framed) looks", [step.maps.centre for step in steps]))
    for row, (name, values) in zip(axes, rows):
        low, high = min(v.min().item() for v in values), max(v.max().item() for v in values)
        for ax, value in zip(row, values):
            drawn = ax.imshow(value.numpy(), cmap="cividis", vmin=low, vmax=high,
                              interpolation="nearest")
            ax.set(xticks=[], yticks=[],
                   xlabel=f"{value.min().item():.3g} to {value.max().item():.3g}")
            for (y, x), v in np.ndenumerate(value.numpy()) if side <= 8 else ():
                ax.text(x, y, f"{v:.2f}".lstrip("0"), ha="center", va="center", fontsize=6,
                        color="black" if v > low + 0.45 * (high - low) else "white")
        row[0].set(ylabel=name)
        figure.colorbar(drawn, ax=list(row), fraction=0.05)
    middle = side // 2
    corners = middle + np.array([(-.5, -.5), (.5, -.5), (.5, .5), (-.5, .5), (-.5, -.5)]).T
    for (upper, lower), step in zip(axes.T, steps):
        upper.set(title=f"σ {step.sigma:.3g}, mean {step.maps.share.mean().item():.3g}")
        for color, width in (("black", 4), ("white", 2)):
            lower.plot(*corners, color=color, linewidth=width, clip_on=False)
    figure.supxlabel(f"alike everywhere would be {first.uniform:.3g} above and {1 / side**2:.3g} "
                     f"below", fontsize=7)
