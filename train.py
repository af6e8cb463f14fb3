"""Train minidiff: first the autoencoder, then the diffusion model on its latents.

    python train.py                                   the embedded demo: phantom, VAE, diffusion → runs/demo
    python train.py --root runs/x --data DIR --size 128   both stages on your own images → runs/x/vae, runs/x/diffusion
    python train.py vae --root runs/x --data DIR --size 512 --init v1-5-pruned-emaonly.safetensors --lr 1e-5
    python train.py diffusion --root runs/x --data DIR --init v1-5-pruned-emaonly.safetensors --lr 1e-4
    python train.py diffusion --data OTHER --init runs/x/diffusion --train all --out runs/x/stage-2
    torchrun --nproc-per-node 8 train.py diffusion …

The same command again resumes. Ctrl-C and SIGTERM finish the step, save and stop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import minidiff.threads  # noqa: F401  before torch, which it tells how its threads wait

import torch
from torch import nn

from minidiff import config, distributed, runs
from minidiff import variables as var
from minidiff.counted import (
    AUGMENT,
    NOISE,
    ROWS,
    drops,
    generators,
    normal,
    seeded,
    stratified,
    uniform,
)
from minidiff.data import images, phantom
from minidiff.data.dataset import Images, augment, picker, read_images
from minidiff.data.glance import by_split, glance
from minidiff.data.latents import Source, encoded, moments
from minidiff.diffusion import lora, store, unet
from minidiff.diffusion.begin import (
    Start,
    begin,
    begin_vae,
    check_vae,
    known_conditions,
    known_size,
)
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Pipeline, Recipe
from minidiff.diffusion.lpips import load_lpips
from minidiff.diffusion.model import Model
from minidiff.diffusion.vae import VAE, edge_error, encoder
from minidiff.diffusion.watch import AT_MOST, Probe, by_quarter, look
from minidiff.errors import InputError
from minidiff.evaluation.features.extractor import grey, pca_psnr, psnr
from minidiff.evaluation.metrics.neighbours import distances, equalised
from minidiff.pixels import to_float, to_uint8
from minidiff.root import DEMO, Rooted, then
from minidiff.training.ema import EMA, Trained
from minidiff.training.plot import plot_run
from minidiff.training.precision import SCHEDULES, Precision, pick_device, set_lr, trained
from minidiff.training.state import Keeper, budget, require_space

PHANTOM = f"{DEMO}/phantom"  # the embedded data, drawn when they are not there
# same weights
FREE = ("log_every", "save_every", "snapshots", "guidance", "device", "compile", "checkpointing",
        "shard")


@dataclass(frozen=True)
class VAEConfig(Rooted):
    data: tuple[str, ...] = ()             # data sets: folders with metadata.csv or class folders; none: the root's
    out: str = "ROOT/vae"                  # run folder
    init: str = ""                         # public SD or VAE file or folder, or a VAE run, to start from
    train: Literal["auto", "all", "decoder"] = "auto"  # auto: with --init the decoder, so that latents stay compatible
    size: int = 64                         # side of the square images, px; a multiple of 8
    architecture: Literal["TINY", "SD"] = "TINY"  # TINY: .6 M parameters for a CPU; SD: the public 84 M
    steps: int = 550                       # optimiser steps
    batch: int = 4                         # images a step; few, for at this length steps count more than images
    lr: float = 2e-3                       # AdamW peak; cosine to a hundredth after 5 % warm-up
    kl: float = 1e-3                       # weight of the KL, in nats per pixel value
    edges: float = 1.0                     # weight of the multi-scale gradient term: sharp ribs, not a blur
    lpips: tuple[str, ...] = ()            # file or files of LPIPS or VGG-16: adds the learned perceptual distance
    augment: float = 0.0                   # strength of rotation, shift, scale and intensity; 1 where images are few
    clip: float = 1.0                      # gradient norm
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it; never fp16, the VAE overflows
    seed: int = 0                          # of initial weights, order, augmentation and noise
    skip_bad: bool = False                 # leave unreadable images out, listed and counted, instead of refusing
    grey: Literal["auto", "yes", "no"] = "auto"  # colour images to grey; auto: where they are 5 % or fewer
    log_every: int = 20                    # steps between lines of log.jsonl
    save_every: int = 200                  # steps between checkpoints; they are saved every 15 minutes, too
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


@dataclass(frozen=True)
class DiffusionConfig(Rooted):
    data: tuple[str, ...] = ()             # data sets: folders with metadata.csv or class folders; none: the root's
    vae: str = ""                          # finished VAE run; none: --init's own, or vae/ in the root
    init: str = ""                         # public SD 1.x or 2.x file or folder, or a diffusion run, to start from
    size: int = 0                          # side of the images, px; 0: that of the VAE run, 512 with a public --init
    out: str = "ROOT/diffusion"            # run folder
    condition: tuple[str, ...] = ("label", "sex", "age", "view")  # columns to condition on; cells may be empty
    architecture: Literal["TINY", "SMALL", "SD15", "SD21"] = "TINY"  # TINY 4 M, SMALL 24 M parameters, or public 860 M
    train: Literal["auto", "all", "attention", "cross-attention", "lora"] = "auto"  # auto: lora with --init, else all
    rank: int = 16                         # of the adapters of --train lora
    alpha: float = 16.0                    # their scale is alpha / rank
    prediction: Literal["auto", "eps", "v", "x0"] = "auto"  # auto: the --init model's, else v, good at both ends
    min_snr: float = 5.0                   # γ of the min-SNR loss weights (Hang et al. 2023); 0 for none
    steps: int = 650                       # optimiser steps
    batch: int = 16                        # images a step, on all GPUs together
    accumulate: int = 1                    # micro-batches a step: less memory, the same result
    lr: float = 2e-3                       # AdamW peak after 5 % warm-up
    decay: Literal["cosine", "constant"] = "cosine"  # of the learning rate: to a hundredth, or not at all
    balance: float = 0.0                   # 0: labels as frequent as in the data; 1: all equally frequent
    prior: tuple[str, ...] = ()            # more data sets (the 10,000 others) that hold the model to its class
    prior_share: float = 0.5               # share of a batch that is taken from --prior
    drop: float = 0.1                      # share of images whose conditions are all dropped: the null of guidance
    drop_each: float = 0.05                # share of cells dropped alone, so that any subset may be asked for
    views: int = 1                         # cached views an image: itself and augmented ones; 0: augmented and encoded live
    augment: float = 0.5                   # strength of the augmented views; samples take after them, so keep it small
    clip: float = 1.0                      # gradient norm
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on GPUs that have it, else fp16; fp32 on the CPU
    compile: bool = False                  # torch.compile: minutes at the start, faster steps
    checkpointing: bool = False            # compute activations twice: about half the memory, a third more time
    shard: bool = False                    # FSDP2 in place of DDP: weights spread over the GPUs of torchrun
    guidance: float = 1.5                  # of the pictures in grids/
    seed: int = 0                          # of initial weights, order, times, noise and drops
    skip_bad: bool = False                 # leave unreadable images out, listed and counted, instead of refusing
    grey: Literal["auto", "yes", "no"] = "auto"  # colour images to grey; auto: where they are 5 % or fewer
    log_every: int = 20                    # steps between lines of log.jsonl
    save_every: int = 325                  # steps between checkpoints (and every 15 minutes), validation losses and grids
    snapshots: int = 7                     # models kept on the way, evenly spaced, for evaluate.py monitor and uncertainty
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def train_vae(cfg: VAEConfig) -> None:
    """Train the autoencoder: reconstruction, multi-scale gradients and a little KL."""
    distributed.start()
    precision = Precision(cfg.precision, device := pick_device(cfg.device))
    runs.refuse_other(cfg.out, cfg, "vae", FREE)
    data = read_data(cfg, cfg.size)
    train = data.part("train")
    distributed.require_share(cfg.batch)
    vae, origin, seen = begin_vae(cfg.init, cfg.architecture, cfg.seed)
    vae = vae.train().requires_grad_(True).to(device, memory_format=torch.channels_last)
    frozen = cfg.train == "decoder" or (cfg.train == "auto" and bool(cfg.init))
    if frozen:
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    lpips = load_lpips(*cfg.lpips).to(device) if cfg.lpips else None
    optimizer = torch.optim.AdamW(trained(vae), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=1e-4,
                                  fused=True)
    ema = EMA(vae, cfg.steps / 20)
    run = open_run(cfg, "vae", data, vae, n_train=len(train), **origin)
    parts = {"model": Trained(vae), "ema": ema, "optimizer": optimizer, "precision": precision}
    pick, net = picker(train, cfg.seed), distributed.parallel(vae, device)

    with Keeper(run, cfg.steps, cfg.save_every, "VAE", **parts) as keeper:
        for step in keeper.steps():
            slots = distributed.share(range(step * cfg.batch, (step + 1) * cfg.batch))
            index = pick(slots)
            x = augment(to_float(train.pixels[index]), generators(cfg.seed, slots, AUGMENT),
                        cfg.augment)
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            noise = normal(cfg.seed, slots, NOISE,
                           (vae.config.latent_channels, *(s // vae.factor for s in x.shape[2:])))
            with precision.autocast():
                y, kl = net(x, noise.to(device))
                perceptual = lpips(y, x).mean() if lpips else x.new_zeros(())
            y = y.float()
            terms = {"l1": (y - x).abs().mean(), "edges": edge_error(y, x), "kl": kl.mean(),
                     "lpips": perceptual}
            loss = terms["l1"] + cfg.edges * terms["edges"] + cfg.kl * terms["kl"] / x[
                0].numel() + terms["lpips"]
            lr = set_lr(optimizer, SCHEDULES["cosine"](step, cfg.steps, cfg.lr, cfg.steps // 20))
            norm = precision.step(loss, optimizer, vae.parameters(), cfg.clip, train.names(index))
            ema.update(vae, step)

            done, terms = step + 1, {k: distributed.mean(v)
                                     for k, v in {"loss": loss, **terms}.items()}
            keeper.show(cfg.batch, l1=terms["l1"], lr=lr)
            if done % cfg.log_every == 0 or done == cfg.steps:
                keeper.log(step=done, **terms, lr=lr, grad_norm=norm, skipped=precision.skipped)
            if (done % cfg.save_every == 0 or done == cfg.steps) and not distributed.rank():
                plot_run(run, ["loss", "l1", "edges"])

    if not distributed.rank():
        finish_vae(run, ema.model, train, data.part("val", "test"), sorted({*seen, *train.hashes}),
                   frozen)
    distributed.wait()  # the next stage begins with what was saved


@torch.no_grad()
def finish_vae(run: Path, vae: VAE, train: Images, held_out: Images, trained_on: list[str],
               frozen: bool) -> None:
    """Measure the latent scale on training images, unless it came with the encoder, and how
    held-out ones come back.
    """
    if not frozen:
        vae.scale.fill_(1.0)
        vae.scale.fill_(1 / moments(train.pixels, encoder(vae),
                                    text="latent scale")[0].std().item())
    again = torch.cat([to_uint8(vae.decode(m.to(vae.scale.device))).cpu() for m in moments(
        held_out.pixels, encoder(vae), text="held-out images")[0, 0].split(32)])
    facts = {"trained_on": trained_on,
             "psnr": psnr(grey(held_out.pixels), grey(again)).mean().item(),
             "psnr_pca64": pca_psnr(train.pixels, held_out.pixels), "n_held_out": len(held_out),
             "size": train.size}
    images.write(run / "reconstructions.png",
                 images.grid(torch.cat([held_out.pixels[:8], again[:8]]), len(again[:8])))
    store.save_vae(run, vae, **facts)
    print(f"{run}: PSNR {facts['psnr']:.2f} dB on {len(held_out)} held-out images (PCA-64 of the "
          f"pixels: {facts['psnr_pca64']:.2f} dB); latent scale {vae.scale.item():.4f}")


@dataclass(frozen=True, eq=False)
class Stage:
    """What the loop of the diffusion stage holds."""
    run: Path
    data: Images
    train: Images
    labels: var.Labels                     # of the training images
    start: Start
    model: Model                           # what is trained …
    net: nn.Module                         # … in DDP, compiled, or as it is
    ema: EMA
    optimizer: torch.optim.Optimizer
    precision: Precision
    latents: Source                        # of the training images
    probes: list[Probe]                    # of train and val


def prepare(cfg: DiffusionConfig) -> Stage:
    """Read and check everything, build the model, and encode the images."""
    distributed.start()
    precision = Precision(cfg.precision, device := pick_device(cfg.device))
    var.check_names(cfg.condition)
    runs.refuse_other(cfg.out, cfg, "diffusion", (*FREE, "size", "condition"))
    vae_run = cfg.vae or ("" if cfg.init else f"{cfg.root}/vae")
    data = read_data(cfg, known_size(cfg.init, vae_run, cfg.size), cfg.prior)
    train, val = data.part("train"), data.part("val")
    check_vae(cfg.vae, cfg.init, cfg.root, train.hashes)
    cfg = replace(cfg, size=data.size,
                  condition=var.usable(cfg.condition, train.table.rows, known_conditions(cfg.init)))
    start = begin(cfg.init, vae_run, cfg.architecture,
                  {name: train.table.column(name) for name in cfg.condition},
                  None if cfg.prediction == "auto" else cfg.prediction, cfg.seed)
    start.vae.to(device)
    model = start.model.to(device, memory_format=torch.preserve_format if cfg.shard
                           else torch.channels_last)
    labels, val_labels, _ = (var.encode(model.conditioner.variables, part.table.rows)
                             for part in (train, val, data))
    kind = cfg.train if cfg.train != "auto" else "lora" if cfg.init else "all"
    lora.set_trainable(model, kind, cfg.rank, cfg.alpha, seeded(cfg.seed))
    model.unet.checkpointing = cfg.checkpointing
    ema = EMA(model, cfg.steps / 10)
    run = open_run(cfg, "diffusion", data, model, **start.origin, n_train=len(train))
    net = spread(cfg, model, ema, kind, precision)
    optimizer = torch.optim.AdamW(trained(model), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=1e-2,
                                  fused=True)
    with distributed.first():
        latents, held_out = encoded(run / "latents.safetensors",
                                    runs.json_key(data=data.table.fingerprint, **start.origin),
                                    encoder(start.vae), train.pixels, val.pixels, views=cfg.views,
                                    strength=cfg.augment, seed=cfg.seed)
    probes = [Probe.of(mean, y, min(len(val), AT_MOST), len(start.schedule))
              for mean, y in ((latents.mean[0], labels), (held_out, val_labels))]
    return Stage(run, data, train, labels, start, model, net, ema, optimizer, precision, latents,
                 probes)


def train_diffusion(cfg: DiffusionConfig) -> None:
    """Train the text-free denoiser on latents."""
    s = prepare(cfg)
    schedule, variables, device = s.start.schedule, s.model.conditioner.variables, s.precision.device
    denoiser = Denoiser(torch.compile(s.net) if cfg.compile else s.net, schedule,
                        s.start.prediction)
    averaged = Denoiser(s.ema.model, schedule, s.start.prediction)
    parts = {"model": Trained(s.model), "ema": s.ema, "optimizer": s.optimizer,
             "precision": s.precision}
    pick = picker(s.train, cfg.seed, cfg.balance, cfg.prior, cfg.prior_share)
    kept = {cfg.steps * k // (cfg.snapshots + 1) for k in range(1, cfg.snapshots + 1)} - {0}

    with Keeper(s.run, cfg.steps, cfg.save_every, "diffusion", **parts) as keeper:
        for step in keeper.steps():
            slots = distributed.share(range(step * cfg.batch, (step + 1) * cfg.batch))
            index = pick(slots)
            z, noise = s.latents.draw(index, slots)
            t = (stratified(cfg.seed, step, cfg.batch)
                 * len(schedule)).long()[slots.start - step * cfg.batch:][:len(slots)]
            null = drops(cfg.seed, slots, len(variables), cfg.drop, cfg.drop_each)
            y = var.drop(variables, {k: v[index] for k, v in s.labels.items()}, null)
            lr = set_lr(s.optimizer, SCHEDULES[cfg.decay](step, cfg.steps, cfg.lr, cfg.steps // 20))
            losses = []
            for micro in torch.arange(len(slots)).chunk(cfg.accumulate):
                with s.precision.autocast(), distributed.unsynced(s.net,
                                                                  last=micro[-1] + 1 == len(slots)):
                    loss = denoiser.loss(z[micro].to(device), t[micro], noise[micro].to(device),
                                         {k: v[micro].to(device) for k, v in y.items()},
                                         cfg.min_snr)
                    s.precision.backward(loss.sum() / len(slots))
                losses.append(loss.detach().cpu())
            norm = s.precision.update(s.optimizer, s.model.parameters(), cfg.clip,
                                      s.train.names(index))
            s.ema.update(s.model, step)

            done, losses, t = step + 1, distributed.gather(torch.cat(losses)), distributed.gather(t)
            keeper.show(cfg.batch, loss=losses.mean(), lr=lr)
            draw, keep = done % cfg.save_every == 0 or done == cfg.steps, done in kept
            if draw or keep or done % cfg.log_every == 0:
                how = s.precision.autocast, device, cfg.batch, cfg.min_snr
                seen = look(averaged, s.probes, *how) if draw or keep else {"val_loss": None}
                keeper.log(step=done, loss=losses.mean().item(),
                           **by_quarter(losses, t, len(schedule)), **seen, lr=lr,
                           grad_norm=norm, skipped=s.precision.skipped)
            if draw or keep:
                for name in ["best"] * keeper.lowest("val_loss", seen["val_loss"]) + [
                        f"snapshots/step_{done:08d}"] * keep:
                    save_model(s.run / name, s, step=done, val_loss=seen["val_loss"])
            if draw:
                draw_pictures(s, averaged, done, cfg)

    if not distributed.rank():
        store.save_vae(s.run, s.start.vae, size=s.data.size, trained_on=s.start.trained_on)
    save_model(s.run, s)
    if not distributed.rank():
        print(f"{s.run}: finished; the EMA weights are what is sampled; best/ holds those of the "
              f"lowest held-out loss\n{then('sample', cfg, 'diffusion')}")


def draw_pictures(s: Stage, averaged: Denoiser, done: int, cfg: DiffusionConfig) -> None:
    """grids/: eight images a label from fixed seeds, conditioned as fixed training rows are, the
    same in every grid of a run. strips/: some of them above the training image that each is nearest
    to."""
    rows = [s.train.table.select(label=label).rows for label in s.train.table.labels]
    chosen = [r[int(u * len(r))] for i, r in enumerate(rows)
              for u in uniform(cfg.seed, [i], ROWS, 8)[0].tolist()]
    pipeline = Pipeline(averaged, s.ema.model.conditioner, s.start.vae, s.data.size)
    made = torch.cat(list(pipeline.images(var.encode(s.model.conditioner.variables, chosen),
                                          range(len(chosen)), Recipe(guidance=cfg.guidance))))
    if distributed.rank():
        return
    images.write(s.run / "grids" / f"step_{done:08d}.png", images.grid(made, columns=8))
    some = made[torch.linspace(0, len(made) - 1, 8).long()]
    nearest = s.train.pixels[distances(equalised(some), equalised(s.train.pixels)).argmin(1)]
    images.write(s.run / "strips" / f"step_{done:08d}.png",
                 images.grid(torch.cat([some, nearest]), columns=8))
    plot_run(s.run,
             ["loss", "val_loss", "val_loss_t0", "val_loss_t1", "val_loss_t2", "val_loss_t3"])


def save_model(folder: Path, s: Stage, **facts) -> None:
    """The averaged weights, adapters merged into them and once more alone, and what sampling and
    later stages ask for.
    """
    adapters, names = lora.adapters(s.ema.model), [v.name for v in s.model.conditioner.variables]
    if adapters and not distributed.rank():
        runs.save_tensors(folder / "lora.safetensors", adapters)
    plain = lora.merge(s.ema.model) if adapters else s.ema.model
    store.save_model(
        folder, plain, s.start.schedule, s.start.prediction, size=s.data.size, grey=s.data.grey,
        data=s.data.table.fingerprint, trained_on=sorted({*s.train.hashes, *s.start.trained_on}),
        rows=[{name: row.get(name, "") for name in names} for row in s.train.table.rows], **facts)


def spread(cfg: DiffusionConfig, model: Model, ema: EMA, kind: str,
           precision: Precision) -> nn.Module:
    """The model over the GPUs of torchrun: copied to each (DDP), or in shards (FSDP2)."""
    distributed.require_share(cfg.batch, cfg.accumulate)
    if not cfg.shard:
        return distributed.parallel(model, precision.device)
    if kind != "all" or precision.name == "fp16":
        raise InputError(f"--shard spreads --train all in fp32 or bf16, not {kind} in "
                         f"{precision.name}")
    for module in (model, ema.model):
        distributed.shard(module, (unet.ResBlock, unet.Transformer), precision.device)
    return model


def open_run(cfg: VAEConfig | DiffusionConfig, kind: str, data: Images, model: nn.Module,
             **facts) -> Path:
    """The run's folder, opened by rank 0, which says what will be trained and looks whether the
    disk has room.
    """
    if not distributed.rank():
        free = (*FREE, "size") if kind == "diffusion" else FREE  # there it is the VAE's
        run = runs.open_run(cfg.out, cfg, kind, free=free, data=data.table.fingerprint,
                            notes=data.table.notes, **facts)
        size, text = budget(model)
        print(f"{run}: {text}")
        require_space(run, size, getattr(cfg, "snapshots", 0),
                      4 * sum(p.numel() for p in model.parameters()))
    return Path(cfg.out)


def read_data(cfg: VAEConfig | DiffusionConfig, size: int, prior: tuple[str, ...] = ()) -> Images:
    """Images of the data sets; the phantom is drawn first if it is the one asked for."""
    with distributed.first():
        if cfg.data == (PHANTOM,):
            phantom.write(PHANTOM, scarce=phantom.SCARCE)
        data = read_images(cfg.data, size, seed=cfg.seed, split_dir=Path(cfg.root),
                           skip_bad=cfg.skip_bad, prior=prior, grey=cfg.grey)
    if not distributed.rank():
        print(glance((*cfg.data, *prior), by_split(data.table), grey=data.grey, size=size,
                     root=cfg.root))
    return data


VERBS = {"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)}

if __name__ == "__main__":
    config.main(VERBS, default=["vae", "diffusion"], doc=__doc__)
    distributed.stop()
