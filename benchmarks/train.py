"""Training side by side with diffusers: the whole loop, one step of the UNet, and what a machine
can carry.

    python benchmarks/train.py                          TINY and SD 1.5, on the GPU if there is one
    python benchmarks/train.py --size sd15 --pixels 256 --batch 2 --dtype bf16
    python benchmarks/train.py --table   images/s and memory over batch and size; the data alone

Each row has a process of its own, and they work in turn; a ratio is the median of those within each
turn. Memory is a process's highest: on the CPU anonymous memory above that before the network was
built, weights and all. "As it comes", a peer leaves memory to the C library as any script does;
otherwise it keeps what it frees, as minidiff does.

diffusers' loop is that of examples/text_to_image/train_text_to_image.py on the same weights:
encode, add noise, mean squared error, clip, AdamW. Its text encoder, files and learning rate
schedule are left out, which makes it faster.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

# puts minidiff on the path, too
from peers import VARIABLES, Parts, Row, Task, own_unet, parser_of, seconds, their_unet
from torch import nn

# isort: split
from minidiff import counted
from minidiff import variables as var
from minidiff.data.latents import Source
from minidiff.diffusion import lora
from minidiff.diffusion import model as models
from minidiff.diffusion.conditioning import Conditioner
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.unet import UNet
from minidiff.overlap import ahead, send
from minidiff.training.device import pick_device
from minidiff.training.optim import EMA, SCHEDULES, adamw, set_lr
from minidiff.training.precision import Precision

IMAGES = 1500                             # in the data set that is drawn from, as in the demo
PEERS = ("AutoencoderKL", "DDPMScheduler", "UNet2DConditionModel", "training_utils")  # of diffusers
Step = Callable[[], None]


def own_loop(task: Task) -> Step:
    """As train.py: counted draws from cached moments, made ahead, Denoiser.loss, fused AdamW, EMA,
    one read.
    """
    context = torch.randn(task.tokens, models.UNETS[task.architecture].context_dim)
    model = models.Model(own_unet(task),
                         Conditioner(VARIABLES, context, torch.Generator()).to(task.device))
    parameters = lora.set_trainable(model, task.part, 16, 16.0, torch.Generator())
    optimizer = adamw(model, 1e-5, weight_decay=1e-2)
    denoiser = Denoiser(torch.compile(model) if task.compile else model, Schedule.scaled_linear())
    ema, precision = EMA(model, 1000) if task.ema else None, task.precision
    batches = enumerate(ahead(own_data(task), itertools.count(), task.device))
    def step() -> None:
        number, (z, t, noise, y) = next(batches)
        set_lr(optimizer, SCHEDULES["cosine"](number, 1000, 1e-5, 50))
        with precision.autocast():
            losses = denoiser.loss(z, t, noise, y, 5.0)
        precision.backward(losses.mean())
        precision.update(optimizer, parameters, 1.0)
        if ema:
            ema.update(model, number)
        precision.read(losses)
    return step


def own_data(task: Task) -> Callable[[int], tuple]:
    """Everything a step needs from the data and from chance, as train.py draws it."""
    mean, std = torch.randn(1, IMAGES, *task.latents), torch.rand(1, IMAGES, *task.latents)
    source = Source(torch.empty(0), mean, std, lambda x: (x, x), False, 0.0, 0, task.device)
    labels = {v.name: torch.randint(0, 2, (IMAGES,)).to(v.dtype) for v in VARIABLES}
    def draw(number: int) -> tuple:
        slots = range(number * task.batch, (number + 1) * task.batch)
        index = counted.order(IMAGES, 0, slots)
        z, noise = source.draw(index, slots)
        t = (counted.stratified(0, number, task.batch) * 1000).long()
        mask = counted.drops(0, slots, len(VARIABLES), 0.1, 0.05)
        y = var.drop(VARIABLES, {name: values[index] for name, values in labels.items()}, mask)
        return z, t, noise, {name: send(values, task.device) for name, values in y.items()}
    return draw


def their_loop(task: Task, encode: bool, fused: bool = False) -> Step:
    from diffusers import AutoencoderKL, DDPMScheduler
    from diffusers.training_utils import EMAModel
    unet, vae, c = their_unet(task), None, models.VAES[task.vae]
    if encode:
        blocks = {f"{way}_block_types": [f"{way.title()}{coder}Block2D"] * len(c.channels)
                  for way, coder in (("down", "Encoder"), ("up", "Decoder"))}
        vae = AutoencoderKL(block_out_channels=c.channels, layers_per_block=c.blocks,
                            norm_num_groups=c.groups, **blocks)
        vae = vae.requires_grad_(False).to(task.device, task.precision.dtype)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2,
                                  eps=1e-8, fused=fused or None)
    ema = EMAModel(unet.parameters()) if task.ema else None
    images = torch.rand(64, 3, task.pixels,
                        task.pixels) * 2 - 1 if encode else torch.randn(64, *task.latents)
    states, scaler, total = task.batch_of(
        task.tokens, unet.config.cross_attention_dim), scaler_of(task), 0.0
    def step() -> None:
        nonlocal total
        latents = images[torch.randint(0, 64, (task.batch,))].to(task.device)
        if vae:
            latents = vae.encode(
                latents.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (task.batch,),
                          device=task.device)
        noisy = scheduler.add_noise(latents, noise, t)
        with task.precision.autocast():
            predicted = unet(noisy, t, states, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
        total += loss.item()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if ema:
            ema.step(unet.parameters())
    return step


def scaler_of(task: Task) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(task.device.type, enabled=task.precision.name == "fp16")


def unet_step(task: Task, build: Callable[[Task], nn.Module], fused: bool = True) -> Step:
    """Forward, loss, backward and optimiser on the same input, nothing else."""
    net = build(task)
    run = torch.compile(net) if task.compile else net
    x, noise = task.batch_of(*task.latents), task.batch_of(*task.latents)
    t = torch.linspace(0, 999, task.batch, device=task.device).long()
    context = task.batch_of(task.tokens, models.UNETS[task.architecture].context_dim)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-5,
                                  fused=fused or None)
    scaler, own = scaler_of(task), isinstance(net, UNet)
    def step() -> None:
        with task.precision.autocast():
            predicted = run(x, t, context) if own else run(x, t, context, return_dict=False)[0]
        scaler.scale(F.mse_loss(predicted.float(), noise)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step


LOOPS = {"minidiff, cached moments": own_loop,
         "diffusers' script as it comes": partial(their_loop, encode=True),
         "the same, latents given": partial(their_loop, encode=False)}
STEPS = {"minidiff": partial(unet_step, build=own_unet),
         "diffusers as it comes": partial(unet_step, build=their_unet, fused=False),
         "diffusers, fused AdamW, channels_last, memory "
         "kept": partial(unet_step, build=partial(their_unet, last=True))}


def alone(args: argparse.Namespace, build: Callable[[Task], Step],
          **changes) -> tuple[float, float]:
    """Seconds of the faster of two steps after the first, and the highest memory in GB, in a
    process of its own.
    """
    row = Row("", partial(part, build), task_of(argparse.Namespace(**vars(args) | changes), "demo"),
              PEERS)
    one = min([row.seconds("step", 1) for _ in range(3)][1:])
    memory = row.memory()
    row.end()
    return one, memory


def part(build: Callable[[Task], Step], task: Task) -> Parts:
    return {"step": build(task)}


def side_by_side(title: str, rows: dict[str, Callable], task: Task, args: argparse.Namespace,
                 size: str) -> float:
    """Prints the table of one comparison; returns images/s of the first row, minidiff's."""
    sides = {name: Row(name, partial(part, build), task, PEERS) for name, build in rows.items()}
    # after the allocations
    first, *_ = [side.seconds("step", 2) and side.seconds("step", 1) for side in sides.values()]
    each = max(1, min(20, int(0.5 / first)))
    turns = [[side.seconds("step", each) for side in sides.values()] for _ in range(args.repeats)]
    print(f"\n{title}, {size}: {task.architecture}, {task.part} trained, batch {task.batch}, "
          f"{task.pixels} px, {args.dtype}{', EMA' if task.ema else ''}; median of {args.repeats} "
          f"× {each} steps")
    print(f"{'':<46}{'images/s':>10}{'memory, GB':>13}{'minidiff is':>14}{'its memory':>13}")
    own, least = [turn[0] for turn in turns], sides[next(iter(sides))].memory()
    for (name, side), times in zip(sides.items(), zip(*turns)):
        ratio, held = statistics.median(b / a for a, b in zip(own, times)), side.memory()
        print(f"{name:<46}{task.batch / statistics.median(times):>10.2f}{held:>13.2f}"
              f"{ratio:>13.2f}×{least / held:>12.2f}×", flush=True)
        side.end()
    return task.batch / statistics.median(own)


def data_alone(task: Task, consumed: float) -> None:
    """How fast rows, latents, noise, times and drops are drawn, beside what training consumes."""
    draw, numbers, cpu = own_data(task), itertools.count(), torch.device("cpu")
    rate = task.batch / statistics.median(seconds(lambda: draw(next(numbers)), cpu, 10)
                                          for _ in range(5))
    print(f"data alone: {rate:,.0f} images/s drawn, {consumed:,.1f} trained: "
          f"{rate / consumed:.1f}×")


def table(args: argparse.Namespace) -> None:
    """Images a second and memory of one step on the demo's UNet."""
    sides, title = (64, 128, 256, 512), f"TINY, all trained, {args.dtype}: images/s | memory, GB"
    print(f"\n{title}\n{'batch':<8}" + "".join(f"{side:>12} px" for side in sides))
    for batch in (1, 4, 16, 32):
        cells = [alone(args, STEPS["minidiff"], batch=batch, pixels=pixels) for pixels in sides]
        print(f"{batch:<8}" + "".join(f"{batch / one:>8.1f} |{memory:>5.2f}"
                                      for one, memory in cells), flush=True)


def ceiling(task: Task) -> float:
    """FLOP/s of the fastest of some large matrix products in the task's dtype: the most that any
    network could reach.
    """
    sizes = (4096, 8192, 16384) if task.device.type == "cuda" else (256, 512)
    return max(product(n, task.precision.dtype, task.device) for n in sizes)


def product(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the product of two n × n matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device, 3) for _ in range(5))


def main() -> None:
    parser = parser_of(__doc__)
    for name, default, text in (("batch", 0, "images a step [32; SD 1.5: 4 on a GPU, 1 on a CPU]"),
                                ("pixels", 0, "side of the images [64; SD 1.5 on a GPU: 512]")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--ema", action="store_true",
                        help="keep an average of the weights, on both sides")
    parser.add_argument("--table", action="store_true",
                        help="images/s and memory over batch and size, and no comparison")
    args = parser.parse_args()
    device = pick_device(args.device)
    args.dtype = args.dtype or ("bf16" if device.type == "cuda" else "fp32")
    print(torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with "
          f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} "
          f"threads", flush=True)
    if args.table:
        table(args)
        return data_alone(task_of(args, "demo"), 32 / alone(args, own_loop, batch=32)[0])
    for size in ("demo", "sd15") if args.size == "all" else (args.size,):
        task = task_of(args, size)
        consumed = side_by_side("whole loop", LOOPS, task, args, size)
        data_alone(task, consumed)
        side_by_side("the UNet's step alone", STEPS, replace(task, ema=False), args, size)


def task_of(args: argparse.Namespace, size: str) -> Task:
    device = pick_device(args.device)
    demo, precision = size == "demo", Precision(args.dtype, device)
    batch, pixels = (32, 64) if demo else (4, 512) if device.type == "cuda" else (1, 64)
    names, tokens = (("TINY", "TINY", "all"), 8) if demo else (("SD15", "SD", "attention"), 77)
    return Task(*names, args.batch or batch, args.pixels or pixels, tokens, precision, args.ema)


if __name__ == "__main__":
    main()
