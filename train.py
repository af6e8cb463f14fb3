"""Train minidiff: first the autoencoder, then the diffusion model on its latents.

    python train.py                                       the demo, into runs/demo
    python train.py --root runs/x --data DIR --size 128   your images, into runs/x/{vae,diffusion}
    python train.py --root runs/x --data DIR --columns file_name=image,label=finding,patient=id
    python train.py vae --root runs/x --data DIR --size 512 --init sd15.safetensors --lr 1e-5
    python train.py diffusion --root runs/x --data DIR --init sd15.safetensors --lr 1e-4
    python train.py diffusion --root runs/x --data DIR --init sd15.safetensors --lora a.safetensors
    python train.py average --run runs/x/diffusion --std .15   after --post-hoc
    python train.py diffusion --data OTHER --init runs/x/diffusion --train all --out runs/x/stage-2
    python train.py rare --root runs/r --data TEN --init runs/x/diffusion   a label from ten images
    torchrun --nproc-per-node 8 train.py diffusion …

Ctrl-C and SIGTERM finish the step, save and stop; the same command resumes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import minidiff.threads  # noqa: F401  before torch: sets how its threads wait

import torch
from torch import Tensor, nn

from minidiff import config, counted, distributed, runs
from minidiff import variables as var
from minidiff.data.augmentation import augment
from minidiff.data.dataset import picker, read_training_set
from minidiff.diffusion import begin, lora, store, watch
from minidiff.diffusion.denoiser import Denoiser, Prediction
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.lpips import load_lpips
from minidiff.diffusion.schedule import ScheduleName
from minidiff.diffusion.times import Times
from minidiff.diffusion.vae import TERMS, training_terms
from minidiff.overlap import send
from minidiff.pixels import to_float
from minidiff.root import Reading, Rooted, then
from minidiff.stages import rare
from minidiff.stages.average import AverageConfig, average
from minidiff.stages.diffusion import Stage, save_model
from minidiff.stages.finished_vae import finish_vae
from minidiff.stages.pictures import draw_losses, draw_pictures
from minidiff.training import compiling, state
from minidiff.training.checkpointer import Checkpointer
from minidiff.training.compiling import Compile
from minidiff.training.device import pick_device
from minidiff.training.optim import EMA, SCHEDULES, Trained, adamw, set_lr
from minidiff.training.precision import Precision, PrecisionName

PAYS = 2000  # steps from which compiling, a minute or two, is earned back
# Knobs that a resumed run may change: the weights do not depend on them.
FREE = ("log_every", "save_every", "snapshots", "guidance", "device", "compile", "checkpointing",
        "shard")


@dataclass(frozen=True)
class VAEConfig(Reading, Rooted):
    data: tuple[str, ...] = ()       # folders of metadata.csv or class folders; none: the root's
    out: str = "ROOT/vae"            # run folder
    init: str = ""                   # start from: public SD or VAE file or folder, or a VAE run
    train: Literal["auto", "all", "decoder"] = "auto"  # auto: with --init the decoder only
    size: int = 64                   # side of the square images, px; a multiple of 8
    architecture: Literal["TINY", "SMALL", "SD"] = "TINY"  # 0.7 (for a CPU), 21, 84 M parameters
    steps: int = 550                 # optimiser steps
    batch: int = 4                   # images a step; few, for in a short run steps count more
    accumulate: int = 1              # micro-batches a step: less memory, the same result
    lr: float = 2e-3                 # AdamW peak; cosine to a hundredth after 5 % warm-up
    kl: float = 1e-3                 # weight of the KL, in nats per pixel value
    edges: float = 1.0               # weight of the multi-scale gradient term: sharp edges
    lpips: tuple[str, ...] = ()      # LPIPS or VGG-16 files: add the learned perceptual distance
    augment: float = 0.0             # strength of rotation, shift, scale, intensity; few images: 1
    clip: float = 1.0                # largest gradient norm; larger gradients are scaled down
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto: bf16 if the GPU has it
    deterministic: bool = False      # on CUDA the same bytes each time, slower; the CPU always is
    seed: int = 0                    # of initial weights, order, augmentation and noise
    skip_bad: bool = False           # leave out unreadable images and list them; else refuse
    grey: Literal["auto", "yes", "no"] = "auto"  # colour images to grey; auto: if they are ≤ 5 %
    log_every: int = 20              # steps between lines of log.jsonl
    save_every: int = 200            # steps between states, above 2 GB by the 15 minutes alone
    device: str = "auto"             # auto, cpu, cuda, cuda:1 …


@dataclass(frozen=True)
class DiffusionConfig(Reading, Rooted):
    data: tuple[str, ...] = ()       # folders of metadata.csv or class folders; none: the root's
    vae: str = ""                    # finished VAE run; none: --init's own, or vae/ in the root
    init: str = ""                   # start from: public SD 1.x or 2.x, or a diffusion run
    unet: str = ""                   # in place of --init's: checkpoint-500, unet_ema or a file
    null_context: str = "tower"      # of a public --init: its tower's, zeros, or a contexts file
    size: int = 0                    # side of the images, px; 0: the VAE's, 512 for a public --init
    out: str = "ROOT/diffusion"      # run folder
    condition: tuple[str, ...] = var.USUAL  # columns to condition on; "": none; cells may be empty
    architecture: Literal["TINY", "SMALL", "SD15", "SD21"] = "TINY"  # 4, 24, 860, 866 M parameters
    train: Literal["auto", lora.Part] = "auto"  # what is trained; auto: lora with --init, else all
    rank: int = 16                   # of the adapters of --train lora
    alpha: float = 16.0              # scale of the adapters: alpha / rank
    lora: tuple[str, ...] = ()       # LoRA files, kohya's or diffusers', to add to --init's UNet
    prediction: Literal["auto", Prediction] = "auto"   # auto: that of --init, else v
    schedule: Literal["auto", ScheduleName] = "auto"   # auto: that of --init, else SD's
    shift: float = 1.0               # σ of its levels times this; few cells: their side / 64
    times: Times = "uniform"         # how often each of its levels is trained
    min_snr: float = 5.0             # γ of the min-SNR loss weights (Hang et al. 2023); 0: none
    bands: tuple[float, ...] = ()    # loss weights of octaves of the latents, the finest first
    offset: float = 0.0              # offset noise: what a whole channel shares, e.g. .1; 0: none
    dropout: float = 0.0             # share of each ResBlock's channels left out; few images: .1
    steps: int = 650                 # optimiser steps
    batch: int = 16                  # images a step, on all GPUs together
    accumulate: int = 1              # micro-batches a step: less memory, the same result
    lr: float = 2e-3                 # AdamW peak after 5 % warm-up
    decay: Literal["cosine", "constant"] = "cosine"  # of the rate: to a hundredth, or not at all
    balance: float = 0.0             # labels, findings: 0 as frequent as in the data; 1 equally
    prior: tuple[str, ...] = ()      # more data, mixed in so that the model does not forget them
    prior_share: float = 0.5         # share of a batch that is taken from --prior
    drop: float = 0.1                # share of images without any condition, which guidance needs
    drop_each: float = 0.05          # share of single cells dropped, so that any may be left out
    views: int = 1                   # cached views an image, the first as it is; 0: encode live
    augment: float = 0.5             # strength of the augmented views; samples look like them
    clip: float = 1.0                # largest gradient norm; larger gradients are scaled down
    precision: PrecisionName = "auto"  # auto: bf16 on GPUs that have it, else fp16; fp32 on the CPU
    deterministic: bool = False      # on CUDA the same bytes each time, slower; the CPU always is
    compile: Compile = "auto"        # torch.compile; auto: on CUDA, from 2,000 steps on
    checkpointing: bool = False      # compute activations twice: half the memory, a third more time
    shard: bool = False              # FSDP2 in place of DDP: weights spread over torchrun's GPUs
    guidance: float = Recipe.guidance  # of the pictures in grids/
    seed: int = 0                    # of initial weights, order, times, noise and drops
    skip_bad: bool = False           # leave out unreadable images and list them; else refuse
    grey: Literal["auto", "yes", "no"] = "auto"  # colour images to grey; auto: if they are ≤ 5 %
    log_every: int = 20              # steps between lines of log.jsonl
    save_every: int = 325            # steps between validation losses, grids and states (see vae)
    post_hoc: bool = False           # keep two more averages: `train.py average` then makes any
    snapshots: int = 7               # models saved on the way, for evaluate.py monitor, uncertainty
    device: str = "auto"             # auto, cpu, cuda, cuda:1 …


def train_vae(cfg: VAEConfig) -> None:
    """Train the autoencoder: reconstruction, multi-scale gradients and a little KL."""
    distributed.start()
    device = pick_device(cfg.device)
    precision = Precision(cfg.precision, device, fp16=False, deterministic=cfg.deterministic)
    runs.refuse_other(cfg.out, cfg, "vae", FREE)
    data = read_training_set(cfg, cfg.size)
    train = data.part("train")
    distributed.require_equal_slices(cfg.batch, cfg.accumulate)
    vae, origin, seen = begin.start_vae(cfg.init, cfg.architecture, cfg.seed)
    vae = vae.train().requires_grad_(True).to(device, memory_format=torch.channels_last)
    frozen = cfg.train == "decoder" or (cfg.train == "auto" and bool(cfg.init))
    nn.ModuleList([vae.encoder, vae.quant_conv]).requires_grad_(not frozen)
    lpips = load_lpips(*cfg.lpips).to(device) if cfg.lpips else None
    optimizer = adamw(vae, cfg.lr, weight_decay=1e-4)
    ema, run = EMA(vae, cfg.steps / 20), Path(cfg.out)
    if distributed.rank() == 0:
        runs.open_run(run, cfg, "vae", free=FREE, data=data.table.fingerprint,
                      notes=data.table.notes, n_train=len(train), **precision.facts(), **origin)
        state.require_space(run, vae)
    distributed.require_shared(run / "run.json")
    net, pick = distributed.parallel(vae, device), picker(train, cfg.seed)
    cells = (vae.config.latent_channels, *[data.size // vae.factor] * 2)

    def batch(step: int) -> tuple[list[int], Tensor, Tensor]:
        slots = distributed.rank_slice(range(step * cfg.batch, (step + 1) * cfg.batch))
        x = to_float(send(train.pixels[index := pick(slots)], device))
        x = augment(x, counted.generators(cfg.seed, slots, counted.AUGMENT), cfg.augment)
        noise = counted.normal(cfg.seed, slots, counted.NOISE, cells)
        return index, x.contiguous(memory_format=torch.channels_last), send(noise, device)

    with Checkpointer(run, device, steps=cfg.steps, every=cfg.save_every, text="VAE",
                      model=Trained(vae), ema=ema, optimizer=optimizer,
                      precision=precision) as checkpointer:
        for step, (index, x, noise) in checkpointer.steps(batch):
            lr = set_lr(optimizer, SCHEDULES["cosine"](step, cfg.steps, cfg.lr, cfg.steps // 20))
            means = x.new_zeros(1 + len(TERMS))
            for micro in distributed.micro_batches(len(x), cfg.accumulate):
                with precision.autocast(), distributed.unsynced(net, micro.stop == len(x)):
                    y, kl = net(x[micro], noise[micro])
                    l1, edges, kl, perceptual = terms = training_terms(y, x[micro], kl, lpips)
                    loss = l1 + cfg.edges * edges + cfg.kl * kl / x[0].numel() + perceptual
                precision.backward(loss / cfg.accumulate)  # the mean of equal parts
                means += torch.stack([loss, *terms]).detach() / cfg.accumulate
            precision.update(optimizer, vae.parameters(), cfg.clip)
            ema.update(vae, step)

            means = checkpointer.gather(precision.read(means, train.names(index))).mean(0)
            done, named = step + 1, dict(zip(("loss", *TERMS), means.tolist()))
            checkpointer.show(cfg.batch, l1=named["l1"], lr=lr)
            if done % cfg.log_every == 0 or done == cfg.steps:
                checkpointer.log(step=done, **named, lr=lr, grad_norm=precision.norm,
                                 skipped=precision.skipped)
            if checkpointer.is_due(done):
                draw_losses(run, ["loss", "l1", "edges"])

    if distributed.rank() == 0:
        finish_vae(run, ema.model, train, data.part("val", "test"), seen, frozen)
    distributed.wait()  # the next stage reads what was saved


def train_diffusion(cfg: DiffusionConfig) -> None:
    """Train the text-free denoiser on latents."""
    s = Stage(cfg, FREE)
    schedule, device, n = s.start.schedule, s.device, cfg.batch // distributed.world()
    averaged = Denoiser(s.ema.model, schedule, s.start.prediction)
    pipeline = Pipeline(averaged, s.ema.model.conditioner, s.start.vae, s.data.size,
                        autocast=s.autocast)
    snapshot_steps = {cfg.steps * k // (cfg.snapshots + 1) for k in range(1, cfg.snapshots + 1)}
    with Checkpointer(s.run, device, steps=cfg.steps, every=cfg.save_every, text="diffusion",
                      model=Trained(s.model), ema=s.ema, optimizer=s.optimizer,
                      precision=s.precision, **s.averages) as checkpointer:
        # what is computed twice, or gathered block by block, breaks the graph
        choice = "no" if cfg.compile == "auto" and (cfg.checkpointing or cfg.shard) else cfg.compile
        net = compiling.compiled(s.net, choice, device, cfg.steps - checkpointer.start, PAYS)
        denoiser = Denoiser(net, schedule, s.start.prediction)
        for step, (index, times, t, z, noise, y, *keep) in checkpointer.steps(s.batch):
            lr = set_lr(s.optimizer, SCHEDULES[cfg.decay](step, cfg.steps, cfg.lr, cfg.steps // 20))
            losses = []
            for micro in distributed.micro_batches(n, cfg.accumulate):
                with s.autocast(), distributed.unsynced(s.net, micro.stop == n):
                    loss = denoiser.loss(z[micro], t[micro], noise[micro],
                                         {k: v[micro] for k, v in y.items()}, cfg.min_snr,
                                         cfg.bands, *(mask[micro] for mask in keep))
                s.precision.backward(loss.sum() / n)
                losses.append(loss.detach())
            s.precision.update(s.optimizer, s.model.parameters(), cfg.clip)
            for average in (s.ema, *s.averages.values()):
                average.update(s.model, step)

            # until here nothing has waited for a GPU
            losses = s.precision.read(torch.cat(losses), s.train.names(index))
            done, losses = step + 1, checkpointer.gather(losses).flatten()
            checkpointer.show(cfg.batch, loss=losses.mean(), lr=lr)
            is_due, is_snapshot = checkpointer.is_due(done), done in snapshot_steps
            held_out = {"val_loss": None}
            if is_due or is_snapshot:
                held_out = watch.validate(averaged, s.probes, s.autocast, device, cfg.batch,
                                          cfg.min_snr)
            if is_due or is_snapshot or done % cfg.log_every == 0:
                checkpointer.log(step=done, loss=losses.mean().item(),
                                 **watch.by_quarter(losses, times, len(schedule)), **held_out,
                                 lr=lr, grad_norm=s.precision.norm, skipped=s.precision.skipped)
            facts = {"step": done, "val_loss": held_out["val_loss"]}
            if checkpointer.is_best(held_out["val_loss"]):
                save_model(s.run / "best", s, **facts)
            if is_snapshot:
                save_model(s.run / f"snapshots/step_{done:08d}", s, **facts)
            if is_due:
                draw_pictures(s.run, done, pipeline, s.train, guidance=cfg.guidance, seed=cfg.seed)

    if distributed.rank() == 0:
        store.save_vae(s.run, s.start.vae, size=s.data.size, trained_on=s.start.trained_on)
    save_model(s.run, s)  # last: with model.json, the run is finished
    if distributed.rank() == 0:
        best = ", best/ holds those of the lowest held-out loss"  # not without validation images
        print(f"{s.run}: finished; sampling uses the EMA weights"
              f"{best if (s.run / 'best').exists() else ''}\n{then('sample', cfg, 'diffusion')}")


VERBS = {"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion),
         "rare": rare.verb(DiffusionConfig, train_diffusion, FREE),
         "average": (AverageConfig, average)}

if __name__ == "__main__":
    config.main(VERBS, default=["vae", "diffusion"], doc=__doc__)
    distributed.stop()
