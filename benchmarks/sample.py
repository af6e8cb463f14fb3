"""Sampling side by side with diffusers: a guided call of the UNet, the whole guided loop, the
decoder, and both defaults.

    python benchmarks/sample.py                          TINY and SD 1.5, on the GPU if there is one
    python benchmarks/sample.py --size sd15 --batch 4 --pixels 512 --dtype bf16 --parts call loops

Each row has a process of its own, and they work in turn, every other turn backwards; a ratio is the
median of those within each turn, beside it the middle half of them. Weights, timesteps, noise and
contexts are equal, and first the outputs are compared. Memory is a process's highest so far. "As it
comes", a peer leaves memory to the C library as any script does; otherwise it keeps what it frees,
as minidiff does.

minidiff runs as sample.py runs it, diffusers in the loop of its StableDiffusionPipeline without
text encoder, progress bar and checks, which makes it faster. All its weights are in the dtype
asked for; of minidiff those of the UNet, and its VAE is in float32.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

# puts minidiff on the path, too
from peers import VARIABLES, Parts, Row, Task, load_peers, own_unet, parser_of, their_unet
from torch import Tensor, nn

# isort: split
from minidiff.diffusion import model as models
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import DECODE, Pipeline, Recipe
from minidiff.diffusion.guidance import guided
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.vae import VAE
from minidiff.training.device import pick_device
from minidiff.training.precision import Precision

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# else it ends in another way
SAME = {"DDIM": ("ddim", "leading", "DDIMScheduler",
                 {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}),
        "DPM-Solver++(2M)": ("dpmpp_2m", "trailing", "DPMSolverMultistepScheduler",
                             {"final_sigmas_type": "sigma_min", "lower_order_final": False})}
PEERS = ("AutoencoderKL", "UNet2DConditionModel", "PNDMScheduler", "DDIMScheduler",
         "DPMSolverMultistepScheduler")
# of the comparisons on equal terms; what sample.py does unless told
GUIDANCE, DEFAULT = 2.0, Recipe(guidance=1.5)
LEVEL = 500                                    # timestep of the single call


def given(task: Task) -> tuple[Conditioner, dict[str, Tensor], Tensor]:
    """What both sides start from: a conditioner that tells labels apart, labels, and noise or
    latents (N, 4, h, w).
    """
    g = torch.Generator().manual_seed(0)
    null = torch.randn(task.tokens, models.UNETS[task.architecture].context_dim, generator=g)
    conditioner = Conditioner(VARIABLES, null, g).requires_grad_(False)
    for projection in conditioner.projections:
        nn.init.normal_(projection.weight, std=0.1, generator=g)
    labels = {v.name: torch.randint(0, 2, (task.batch,), generator=g).to(task.device, v.dtype)
              for v in VARIABLES}
    noise = torch.randn(task.batch, *task.latents, generator=g)
    return conditioner.to(task.device), labels, noise.to(task.device)


def own_vae(task: Task) -> VAE:
    torch.manual_seed(1)
    return VAE(models.VAES[task.vae]).eval().requires_grad_(False)


def own(task: Task, steps: dict[str, int]) -> Parts:
    """As sample.py: channels_last, the contexts computed once, the VAE in float32 and a few images
    at a time.
    """
    conditioner, labels, noise = given(task)
    unet = own_unet(task).eval().requires_grad_(False).to(task.precision.dtype)
    net = models.Model(unet, conditioner)
    vae = own_vae(task).to(task.device, memory_format=torch.channels_last)
    if task.compile:
        net.unet = torch.compile(net.unet, dynamic=False)
    denoiser = Denoiser(net, Schedule.scaled_linear())
    pipeline = Pipeline(denoiser, conditioner, vae, task.pixels)
    sigma, null = denoiser.schedule.sigma(LEVEL), conditioner.null(task.batch, task.device)
    x, denoise = noise * (1 + sigma**2).sqrt().item(), guided(denoiser, labels, null, GUIDANCE)
    @torch.no_grad()
    def call() -> Tensor:
        return (x - denoise(x, sigma)) / sigma.item()
    def loop(recipe: Recipe) -> Tensor:
        *_, z = pipeline.latents(labels, range(task.batch), recipe, noise=noise)
        return z
    def decode(z: Tensor = noise) -> Tensor:
        return torch.cat([vae.decode(few) for few in z.split(DECODE)])
    loops = {f"{name}, {n} steps": partial(loop, Recipe(*SAME[name][:2], n, GUIDANCE))
             for name, n in steps.items()}
    return {"call": call, **loops, "decode": decode, "default": lambda: decode(loop(DEFAULT))}


def theirs(task: Task, steps: dict[str, int], last: bool = False) -> Parts:
    """As StableDiffusionPipeline.__call__; `last`: in channels_last."""
    import diffusers
    (conditioner, labels, noise), device, dtype = given(task), task.device, task.precision.dtype
    unet = their_unet(task, last).eval().requires_grad_(False).to(dtype)
    vae = their_vae(task).to(dtype).to(device, memory_format=torch.channels_last if last
                                       else torch.preserve_format)
    if task.compile:
        unet, vae.decoder = torch.compile(unet), torch.compile(vae.decoder)
    states = torch.cat([conditioner(conditioner.null(task.batch, device)),
                        conditioner(labels)]).to(dtype)
    noise, level = noise.to(dtype), torch.tensor(LEVEL, device=device)
    def predict(x: Tensor, t: Tensor, guidance: float) -> Tensor:
        without, text = unet(torch.cat([x] * 2), t, encoder_hidden_states=states,
                             return_dict=False)[0].chunk(2)
        return without + guidance * (text - without)
    def loop(scheduler, n: int, guidance: float) -> Tensor:
        scheduler.set_timesteps(n, device=device)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            predicted = predict(scheduler.scale_model_input(x, t), t, guidance)
            x = scheduler.step(predicted, t, x, return_dict=False)[0]
        return x
    def decode(z: Tensor = noise) -> Tensor:
        return vae.decode(z / vae.config.scaling_factor, return_dict=False)[0]
    made = {name: getattr(diffusers, kind)(**BETAS, timestep_spacing=spacing, **options)
            for name, (_, spacing, kind, options) in SAME.items()}
    loops = {f"{name}, {n} steps": partial(loop, made[name], n, GUIDANCE)
             for name, n in steps.items()}
    # as in SD 1.x
    pndm = diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False,
                                   steps_offset=1)
    return {"call": lambda: predict(noise, level, GUIDANCE), **loops, "decode": decode,
            "default": lambda: decode(loop(pndm, 50, DEFAULT.guidance))}


def their_vae(task: Task) -> nn.Module:
    """AutoencoderKL of the same architecture and weights."""
    from diffusers import AutoencoderKL
    c = models.VAES[task.vae]
    down, up = ([f"{way}Block2D"] * len(c.channels) for way in ("DownEncoder", "UpDecoder"))
    with torch.device("meta"):  # as their_unet
        vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=c.channels,
                            layers_per_block=c.blocks, norm_num_groups=c.groups)
    vae.load_state_dict(own_vae(task).state_dict(), assign=True)
    return vae.eval().requires_grad_(False)


def hastened(build: Callable[..., Parts], task: Task, steps: dict[str, int]) -> Parts:
    return build(replace(task, compile=True), steps)


def rows(compiled: bool) -> dict[str, Callable[[Task, dict], Parts]]:
    """minidiff first: the others are compared with it."""
    best = partial(theirs, last=True)
    more = {"minidiff, compiled": partial(hastened, own),
            "diffusers, channels_last, memory kept, compiled": partial(hastened, best)}
    more = more if compiled else {}
    return {"minidiff": own, "diffusers as it comes": theirs,
            "diffusers, channels_last, memory kept": best, **more}


def agreement(part: str, sides: dict[str, Row], dtype: str) -> list[float]:
    """Relative L2 distance of each row's output from minidiff's; also the warm-up, and the
    compilation.
    """
    first, *_ = found = [side.output(part) for side in sides.values()]
    apart = [math.nan if None in (x, first)
             else ((x - first).norm() / first.norm()).item() for x in found]
    if part != "default" and dtype == "fp32" and max(apart) > 1e-3:
        sys.exit(f"{part}: relative L2 {max(apart):.1e} from minidiff's output, more than 1e-3: "
                 "nothing to compare")
    return apart


def side_by_side(part: str, sides: dict[str, Row], task: Task, args: argparse.Namespace) -> None:
    """Prints the table of one part: images/s, ratio, memory, agreement."""
    apart, turns = agreement(part, sides, args.dtype), []
    first = sides["minidiff"].seconds(part, 1)
    each = 1 if math.isnan(first) else max(1, min(20, int(0.3 / first)))
    for turn in range(args.repeats):
        turns.append({name: sides[name].seconds(part, each)
                      for name in list(sides)[:: -1 if turn % 2 else 1]})
    what = {"call": "one guided call of the UNet",
            "default": "the defaults: dpmpp_2m, 12 steps; PNDM, 50; both decoded"}
    print(f"\n{what.get(part, part)}: {task.architecture}, batch {task.batch}, {task.pixels} px, "
          f"{args.dtype}; median of {args.repeats} × {each}")
    print(f"{'':<46}{'images/s':>10}{'minidiff is':>14}{'middle half':>16}{'memory, GB':>12}"
          f"{'relative L2':>13}")
    for name, relative in zip(sides, apart):
        ratios, quarter = sorted(turn[name] / turn["minidiff"] for turn in turns), len(turns) // 4
        speed = task.batch / statistics.median(turn[name] for turn in turns)
        middle = f"{ratios[quarter]:>9.2f}–{ratios[-1 - quarter]:.2f}"
        ratio = f"{statistics.median(ratios):.2f}×{middle}"
        far = f"{relative:>13.1e}" * (relative > 0 and part != "default")
        cells = f"{speed:>10.3g}{ratio:>29} ", f"{sides[name].memory():>12.2f}", far
        print(f"{name:<46}" + "".join(f"{'–':>{len(c)}}" if "nan" in c else c for c in cells),
              flush=True)


def cases(args: argparse.Namespace, size: str) -> list[tuple[Task, dict[str, int]]]:
    """What is measured, and the steps of each sampler: few where a step takes seconds."""
    precision = Precision(args.dtype, pick_device(args.device))
    gpu, names = precision.device.type == "cuda", ("TINY", "TINY") if size == "demo" else ("SD15",
                                                                                           "SD")
    shapes = [(50, 64)] if size == "demo" else [
        (n, 512) for n in (1, 4, 16, 64)] if gpu else [(1, 64), (1, 256)]
    if args.batch or args.pixels:
        shapes = [(args.batch or shapes[0][0], args.pixels or shapes[0][1])]
    steps = dict(zip(SAME, (20, 16) if gpu or size == "demo" else (4, 4)))
    return [(Task(*names, "all", *shape, 8 if size == "demo" else 77, precision), steps)
            for shape in shapes]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, default=0,
                        help="[50 for TINY; SD 1.5: 1, 4, 16, 64 on a GPU, 1 on a CPU]")
    parser.add_argument("--pixels", type=int, default=0,
                        help="[64 for TINY; SD 1.5: 512 on a GPU, 64 and 256 on a CPU]")
    parser.add_argument("--parts", nargs="*", default=["call", "loops", "decode", "default"],
                        help="what to measure [all]")
    parser.add_argument("--compile", action="store_true",
                        help="compiled rows besides, as always on a GPU")
    args = parser.parse_args()
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    args.dtype, args.compile = args.dtype or ("bf16" if gpu else "fp32"), args.compile or gpu
    diffusers = load_peers(*PEERS)
    print(f"torch {torch.__version__}, diffusers "
          f"{diffusers.__version__}, " + (torch.cuda.get_device_name(device) if gpu else f"CPU "
                                          f"with {torch.backends.cpu.get_cpu_capability()}, "
                                          f"{torch.get_num_threads()} threads"), flush=True)
    for size in ("demo", "sd15") if args.size == "all" else (args.size,):
        for task, steps in cases(args, size):
            sides = {name: Row(name, partial(build, steps=steps), task, PEERS)
                     for name, build in rows(args.compile).items()}
            for part in sides["minidiff"].parts():
                # SD 1.5's defaults take a minute a row and a turn on a CPU, and follow from the
                # call: 12 against 51
                if ("loops" if "steps" in part
                    else part) in args.parts and (part != "default" or gpu or size == "demo"):
                    side_by_side(part, sides, task, args)
            for side in sides.values():
                side.end()


if __name__ == "__main__":
    main()
