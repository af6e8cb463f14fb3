"""What a recipe costs and what its images are worth: samplers × steps × guidance of a finished run,
beside diffusers' PNDM.

    python benchmarks/quality.py   a dozen recipes of runs/demo/diffusion, 300 images each
    python benchmarks/quality.py --n 1000 --rows dpmpp_2m/logsigma/16/1.5 unipc/logsigma/8/1.5
    python benchmarks/quality.py --rows dpmpp_2m/logsigma/16/2/0.3-5   guidance for .3 < σ ≤ 5

A row is sampler/ladder/steps/guidance, and an interval if there is one; pndm/leading/50/1.5 is the
loop of diffusers' pipeline and its default scheduler on the same weights, contexts and noise. All
rows make the same images, label for label and seed for seed, batch by batch in turn, so that the
seconds of one batch can be compared.

KD: kernel distance to held-out images, its bootstrap by patient (95 %). "farther": that of a row
less that of `--against`, draw by draw on the same patients and the same seeds. The yardstick is the
floor, real images against other real ones (5 to 95 %) at the same numbers: a row is as good as the
reference if the upper end of "farther" is at most half the floor's width.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peers import load_peers  # puts minidiff on the path, too
from torch import Tensor

# isort: split

from minidiff import runs
from minidiff.classification.predictor import Predictor
from minidiff.data.dataset import Images, read_images
from minidiff.diffusion.generate import DECODE, Pipeline, Recipe
from minidiff.diffusion.guidance import EVERYWHERE
from minidiff.diffusion.samplers import SeededNoise
from minidiff.diffusion.store import load_pipeline
from minidiff.evaluation.features.extractor import Extractor, PixelPCA, PredictorFeatures
from minidiff.evaluation.metrics.agreement import recognised
from minidiff.evaluation.metrics.distances import draw, floor, kid, kid_draws, same_mix
from minidiff.evaluation.metrics.neighbours import prdc
from minidiff.pixels import to_uint8
from minidiff.sampling import plan as plans
from minidiff.statistics import finite_percentile, wilson
from minidiff.training.device import pick_device
from minidiff.variables import Labels

PEER, DEFAULT = "pndm/leading/50/1.5", "dpmpp_2m/logsigma/12/1.5"
ROWS = (PEER, DEFAULT, *(f"dpmpp_2m/logsigma/{n}/1.5" for n in (8, 16, 24)), "ddim/trailing/20/1.5",
        "ddim/leading/50/1.5", "unipc/logsigma/8/1.5", "unipc/logsigma/12/1.5",
        "dpmpp_2m/logsigma/16/1", "dpmpp_2m/logsigma/16/3", "dpmpp_2m/logsigma/16/1.5/0.3-5")
WORDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
Make = Callable[[Labels, list[int]], Tensor]  # labels, seeds → uint8 (n, 3, S, S)


def maker(pipeline: Pipeline, row: str) -> Make:
    """A row's function: a recipe through our own pipeline, or the peer's loop."""
    sampler, ladder, steps, guidance, *interval = row.split("/")
    if sampler == "pndm":
        return peer(pipeline, ladder, int(steps), float(guidance))
    levels = tuple(float(level) for level in interval[0].split("-")) if interval else EVERYWHERE
    recipe = Recipe(sampler, ladder, int(steps), float(guidance), interval=levels)
    return lambda labels, seeds: next(iter(pipeline.images(labels, seeds, recipe,
                                                           batch=len(seeds))))


def peer(pipeline: Pipeline, spacing: str, steps: int, guidance: float) -> Make:
    """StableDiffusionPipeline's loop with PNDM as the public SD 1.x repositories set it up, round
    our networks.
    """
    from diffusers import PNDMScheduler
    schedule, net = pipeline.denoiser.schedule, pipeline.denoiser.net
    device = pipeline.conditioner.null_context.device
    kept = schedule.alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64),
                                                schedule.alphas_cumprod[:-1]])
    scheduler = PNDMScheduler(len(schedule), trained_betas=(1 - kept).numpy(),
                              timestep_spacing=spacing, steps_offset=1,
                              skip_prk_steps=True, set_alpha_to_one=False,
                              prediction_type=WORDS[pipeline.denoiser.prediction])
    cells = pipeline.size // pipeline.vae.factor

    @torch.no_grad()
    def make(labels: Labels, seeds: list[int]) -> Tensor:
        n = len(seeds)
        labels = {name: values.to(device) for name, values in labels.items()}
        contexts = torch.cat([pipeline.conditioner(labels)
                              for labels in (pipeline.conditioner.null(n, device), labels)])
        x = SeededNoise(seeds, (pipeline.vae.config.latent_channels, cells, cells), device)()
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            without, asked = net.unet(torch.cat([x, x]), t.float().to(device).expand(2 * n),
                                      contexts).chunk(2)
            x = scheduler.step(without + guidance * (asked - without), t, x).prev_sample
        return torch.cat([to_uint8(pipeline.vae.decode(few)).cpu() for few in x.split(DECODE)])

    return make


def generate(pipeline: Pipeline, rows: list[str], plan: list[dict],
             batch: int) -> tuple[dict, dict, dict]:
    """For each row: its images, seconds an image in each batch, and images through the UNet for
    each image made.
    """
    makers = {row: maker(pipeline, row) for row in rows}
    pixels, times, through = defaultdict(list), defaultdict(list), dict.fromkeys(rows, 0)
    unet, now = pipeline.denoiser.net.unet, [rows[0]]
    alone = torch.get_num_threads() == 1 and pipeline.conditioner.null_context.device.type == "cpu"
    # CPU time: other programs lengthen it less
    clock = time.process_time if alone else time.perf_counter

    def count(module: torch.nn.Module, inputs: tuple) -> None:
        through[now[0]] += len(inputs[0])

    hook = unet.register_forward_pre_hook(count)
    for start in range(0, len(plan), batch):
        cell = plan[start : start + batch]
        labels, seeds = plans.encode(pipeline.conditioner.variables,
                                     cell), [int(row["seed"]) for row in cell]
        for row, make in makers.items():
            now[0], begin = row, clock()
            pixels[row].append(make(labels, seeds))  # on the CPU, so everything is done
            times[row].append((clock() - begin) / len(cell))
        print(f"\r{start + len(cell)} of {len(plan)} images of {len(rows)} recipes", end="",
              file=sys.stderr, flush=True)
    hook.remove()
    print(file=sys.stderr)
    return {row: torch.cat(parts)
            for row, parts in pixels.items()}, times, {r: k / len(plan) for r, k in through.items()}


def costs(rows: list[str], pixels: dict, times: dict, through: dict, against: str,
          judge: Predictor | None, labels: list[str]) -> None:
    """Prints what a row costs, and whether its labels are recognised."""
    print(f"\n{'':<34}{'UNet passes':>12}{'s an image':>12}{'faster':>9}   label recognised (95 %)")
    for row in rows:
        faster = statistics.median(b / a for a, b in zip(times[row], times[against]))
        seen = ""
        if judge:
            k = int(recognised(judge, pixels[row], labels).sum())
            low, high = wilson(k, len(labels))
            seen = f"   {k / len(labels):.1%} ({low:.1%} to {high:.1%})"
        print(
            f"{row:<34}{through[row]:>12.1f}{statistics.median(times[row]):>12.4f}"
            f"{faster:>8.2f}×{seen}")


def distances(extractor: Extractor, rows: list[str], pixels: dict, train: Images, reference: Images,
              against: str) -> None:
    """Prints KD, density and coverage of each row in one space, and how much farther it is than the
    row compared with.

    Density and coverage are those of as many images as there are held-out ones, and beside real
    training images at that n.
    """
    real, patients = extractor(reference.pixels).double().numpy(), np.array(
        reference.table.column("patient"))
    both = {"real": real, "real_patients": patients}
    made = {row: extractor(pixels[row]).double().numpy() for row in rows}
    # equal seeds: the same patients, the same images
    draws = {row: kid_draws(**both, fake=made[row]) for row in rows}
    point = {row: kid(**both, fake=made[row]) for row in rows}
    other = extractor(train.pixels).double().numpy()
    pool = np.concatenate([other, real])
    bottom = floor(kid, real=pool,
                   patients=np.concatenate([train.table.column("patient"), patients]), n=len(real),
                   m=len(made[against]))
    margin, n = (bottom.high - bottom.low) / 2, min(len(real), len(other), len(made[against]))

    def where(side) -> str:
        return "{2:>9.2f}{3:>10.2f}".format(*prdc(real=draw(real, n, 0), fake=draw(side, n, 1)))

    print(f"\n{extractor.name}: KD of {len(made[against])} images to {len(real)} held-out ones of "
          f"{len(set(patients))} patients; floor {bottom.median:.4f} ({bottom.low:.4f} to "
          f"{bottom.high:.4f}), half its width {margin:.4f}")
    print(
        f"{'':<34}{'density':>9}{'coverage':>10}{'KD':>8}{'95 %':>22}{'farther':>10}{'95 %':>22}   "
        f"as good as {against}")
    print(f"{f'real training images, n = {n}':<34}{where(other)}")
    for row in rows:
        low, high = finite_percentile(draws[row])
        words = f"{row:<34}{where(made[row])}{point[row]:>8.4f}{f'{low:.4f} to {high:.4f}':>22}"
        if row != against:
            low, high = finite_percentile(draws[row] - draws[against])
            answer = "yes" if high <= margin else "no" if low > margin else "not resolved"
            better = ", and nearer" if high < 0 else ""
            words += (f"{point[row] - point[against]:>10.4f}{f'{low:.4f} to {high:.4f}':>22}   "
                      f"{answer}{better}")
        print(words, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo/diffusion",
                        help="finished diffusion run [runs/demo/diffusion]")
    parser.add_argument("--data", nargs="*", default=[],
                        help="data sets with held-out images [those of the run]")
    parser.add_argument("--judge", default="runs/demo/classifier/judge",
                        help="reads labels; '' for none [%(default)s]")
    parser.add_argument("--rows", nargs="*", default=list(ROWS),
                        help="sampler/ladder/steps/guidance[/low-high] …")
    parser.add_argument("--against", nargs="*", default=[PEER, DEFAULT],
                        help=f"rows to compare with [{PEER} {DEFAULT}]")
    for name, default, text in (("n", 300, "images of each row [300]"),
                                ("batch", 50, "images in one pass [50]"),
                                ("seed", 0, "of the first image, and of the conditions [0]")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … [auto]")
    args = parser.parse_args()
    load_peers("PNDMScheduler")
    pipeline, facts = load_pipeline(Path(args.run))
    device = pick_device(args.device)
    for module in (pipeline.denoiser.net, pipeline.vae):
        module.to(device, memory_format=torch.channels_last)
    rows, variables = list(dict.fromkeys([*args.against,
                                          *args.rows])), pipeline.conditioner.variables
    names = next((v.values for v in variables if v.name == "label"), ("any",))
    plan = plans.plan(variables, facts["rows"], per_label=-(-args.n // len(names)), seed=args.seed)
    folders = args.data or runs.read_json(Path(args.run) / "config.json")["data"]
    data = read_images(folders, pipeline.size, seed=0, split_dir=Path(args.run).parent,
                       skip_bad=True)
    judge = Predictor.load(args.judge) if args.judge else None
    train, held_out, labels = data.part("train"), data.part("val",
                                                            "test"), [row["label"] for row in plan]
    # held-out images in the proportions of the labels made
    keep = same_mix(held_out.table.column("label"), labels)
    reference = Images(type(held_out.table)([held_out.table.rows[i] for i in keep]),
                       held_out.pixels[keep])
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with "
               f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"{args.run}, {pipeline.size} px, batch {args.batch}, fp32, {machine}", flush=True)
    pixels, times, through = generate(pipeline, rows, plan, args.batch)
    costs(rows, pixels, times, through, args.against[0], judge, labels)
    for extractor in (PixelPCA().fit(train.pixels), *([PredictorFeatures(judge)] if judge else [])):
        for against in args.against:
            distances(extractor, rows, pixels, train, reference, against)


if __name__ == "__main__":
    main()
