"""Train minidiff: first the autoencoder, then the diffusion model on its latents.

    python train.py                                   the embedded demo: phantom, VAE, diffusion → runs/demo
    python train.py vae --data DIR --size 128 --steps 2000 --out runs/x/vae
    python train.py diffusion --data DIR --vae runs/x/vae --condition label,sex,age,view --out runs/x/diffusion
    python train.py diffusion --data DIR --init v1-5-pruned-emaonly.safetensors --lr 1e-5 --out runs/x/fine-tuned
    python train.py diffusion --from runs/x/diffusion/config.json --seed 1 --out runs/x/diffusion-1

To resume, run the same command again. Ctrl-C and SIGTERM finish the step, save and stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from minidiff import config, runs
from minidiff import variables as var
from minidiff.counted import AUGMENT, DROP, NOISE, ROWS, VALIDATE, VIEW, generators, normal, order, stratified, uniform
from minidiff.data import images, phantom
from minidiff.data.dataset import augment, load_pixels, to_float
from minidiff.data.latents import cached, moments
from minidiff.data.table import Table, read_table
from minidiff.diffusion import model as models
from minidiff.diffusion import store
from minidiff.diffusion.denoiser import Denoiser
from minidiff.diffusion.generate import Pipeline, Recipe, to_uint8
from minidiff.diffusion.public.load import load_sd
from minidiff.diffusion.schedule import Schedule
from minidiff.diffusion.vae import VAE, edge_error
from minidiff.errors import InputError
from minidiff.evaluation.features import grey, pca_psnr, psnr
from minidiff.training import state
from minidiff.training.ema import EMA
from minidiff.training.plot import plot_run
from minidiff.training.precision import Precision, cosine, pick_device

PHANTOM = "runs/demo/phantom"                                # the embedded default, drawn when it is not there
FREE = ("log_every", "save_every", "guidance", "device")     # knobs that do not change the weights


@dataclass(frozen=True)
class VAEConfig:
    data: tuple[str, ...] = (PHANTOM,)     # data sets: folders with metadata.csv or class folders
    out: str = "runs/demo/vae"             # run folder
    size: int = 64                         # side of the square images, px; a multiple of 8
    architecture: Literal["TINY", "SD"] = "TINY"  # TINY: 1.7 M parameters for a CPU; SD: the public 84 M
    steps: int = 550                       # optimiser steps
    batch: int = 16                        # images a step; small, for at this length steps count more than images
    lr: float = 2e-3                       # AdamW peak; cosine to a hundredth after 5 % warm-up
    kl: float = 1e-2                       # weight of the KL, in nats per pixel value
    edges: float = 0.5                     # weight of the multi-scale gradient term: sharp ribs, not a blur
    augment: float = 0.0                   # strength of rotation, shift, scale and intensity; 1 where images are few
    clip: float = 1.0                      # gradient norm
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it; never fp16, the VAE overflows
    seed: int = 0                          # of initial weights, order, augmentation and noise
    skip_bad: bool = False                 # leave unreadable images out, listed and counted, instead of refusing
    log_every: int = 20                    # steps between lines of log.jsonl
    save_every: int = 200                  # steps between checkpoints
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


@dataclass(frozen=True)
class DiffusionConfig:
    data: tuple[str, ...] = (PHANTOM,)     # data sets: folders with metadata.csv or class folders
    vae: str = "runs/demo/vae"             # finished VAE run; its size and latent scale come with it
    init: str = ""                         # public SD 1.x or 2.x file or folder to start from, in place of --vae
    size: int = 512                        # side of the images with --init, px; a VAE run brings its own
    out: str = "runs/demo/diffusion"       # run folder
    condition: tuple[str, ...] = ("label", "sex", "age", "view")  # columns to condition on; cells may be empty
    architecture: Literal["TINY", "SMALL", "SD15", "SD21"] = "TINY"  # TINY 4 M, SMALL 24 M parameters, or public 860 M
    prediction: Literal["auto", "eps", "v", "x0"] = "auto"  # auto: the --init model's, else v, good at both ends
    min_snr: float = 5.0                   # γ of the min-SNR loss weights (Hang et al. 2023); 0 for none
    steps: int = 1300                      # optimiser steps
    batch: int = 32                        # images a step
    lr: float = 2e-3                       # AdamW peak; cosine to a hundredth after 5 % warm-up
    drop: float = 0.1                      # share of images whose conditions are all dropped: the null of guidance
    drop_each: float = 0.05                # share of cells dropped alone, so that any subset may be asked for
    views: int = 1                         # cached views an image: itself and augmented ones; 4 or more where images are few
    augment: float = 0.5                   # strength of the augmented views; samples take after them, so keep it small
    clip: float = 1.0                      # gradient norm
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # bf16 on GPUs that have it, else fp16; fp32 on the CPU
    guidance: float = 1.5                  # of the pictures in grids/
    seed: int = 0                          # of initial weights, order, times, noise and drops
    skip_bad: bool = False                 # leave unreadable images out, listed and counted, instead of refusing
    log_every: int = 20                    # steps between lines of log.jsonl
    save_every: int = 650                  # steps between checkpoints, validation losses and grids
    device: str = "auto"                   # auto, cpu, cuda, cuda:1 …


def train_vae(cfg: VAEConfig) -> None:
    """Train the autoencoder: reconstruction, multi-scale gradients and a little KL."""
    table, pixels = read_data(cfg, cfg.size)
    rows, train = table.select(split="train"), pixels[rows_of(table, "train")]
    device = pick_device(cfg.device)
    precision = Precision(cfg.precision, device)
    vae = models.vae_from_scratch(models.VAES[cfg.architecture], cfg.seed).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    ema = EMA(vae, cfg.steps / 20)
    run = runs.open_run(cfg.out, cfg, "vae", free=FREE, data=table.fingerprint, n_train=len(train), notes=table.notes)
    parts = {"model": vae, "ema": ema, "optimizer": optimizer, "precision": precision}
    start = state.resume(run, **parts)

    with state.Interrupt() as stop, tqdm(total=cfg.steps, initial=start, desc="VAE", unit="step") as bar:
        for step in range(start, cfg.steps):
            slots = range(step * cfg.batch, (step + 1) * cfg.batch)
            index = order(len(train), cfg.seed, slots)
            x = augment(to_float(train[index]), generators(cfg.seed, slots, AUGMENT), cfg.augment)
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            lr = set_lr(optimizer, cosine(step, cfg.steps, cfg.lr, cfg.steps // 20))
            with precision.autocast():
                moments = vae.encode(x)
                noise = normal(cfg.seed, slots, NOISE, moments.mean.shape[1:]).to(device)
                y = vae.decode(moments.sample(noise)).float()
            l1, edges, kl = (y - x).abs().mean(), edge_error(y, x), moments.kl(vae.scale).mean()
            loss = l1 + cfg.edges * edges + cfg.kl * kl / x[0].numel()
            norm = precision.step(loss, optimizer, vae.parameters(), cfg.clip, files(rows, index))
            ema.update(vae, step)

            done = step + 1
            bar.update(), bar.set_postfix(l1=f"{l1.item():.4f}", lr=f"{lr:.1e}")
            if done % cfg.log_every == 0 or done == cfg.steps:
                runs.append_log(run / "log.jsonl", step=done, loss=loss.item(), l1=l1.item(), edges=edges.item(),
                                kl=kl.item(), lr=lr, grad_norm=norm, skipped=precision.skipped)
            if done % cfg.save_every == 0 or done == cfg.steps or stop.requested:
                state.checkpoint(run, done, **parts)
                plot_run(run, ["loss", "l1", "edges"])
            if stop.requested and done < cfg.steps:
                stopped(done, cfg.steps)

    finish_vae(run, ema.model, train, pixels[rows_of(table, "val", "test")], hashes(rows))


@torch.no_grad()
def finish_vae(run: Path, vae: VAE, train: Tensor, held_out: Tensor, trained_on: list[str]) -> None:
    """Measure the latent scale on training images and the reconstruction of held-out ones; save both with the weights."""
    vae.scale.fill_(1.0)
    vae.scale.fill_(1 / moments(train, encoder(vae), text="latent scale")[0].std().item())
    again = torch.cat([to_uint8(vae.decode(m.to(vae.scale.device))).cpu()
                       for m in moments(held_out, encoder(vae), text="held-out images")[0, 0].split(32)])
    facts = {"psnr": psnr(grey(held_out), grey(again)).mean().item(), "psnr_pca64": pca_psnr(train, held_out),
             "n_held_out": len(held_out), "size": train.shape[-1], "trained_on": trained_on}
    shown = torch.cat([held_out[:8], again[:8]])
    images.write(run / "reconstructions.png", images.grid(shown, columns=len(shown) // 2))
    store.save_vae(run, vae, **facts)
    print(f"{run}: PSNR {facts['psnr']:.2f} dB on {len(held_out)} held-out images (PCA-64 of the pixels: "
          f"{facts['psnr_pca64']:.2f} dB); latent scale {vae.scale.item():.4f}")


def train_diffusion(cfg: DiffusionConfig) -> None:
    """Train the text-free denoiser on cached latent moments."""
    device = pick_device(cfg.device)
    precision = Precision(cfg.precision, device)
    var.check_names(cfg.condition)
    trained = None if cfg.init else store.load_vae(Path(cfg.vae))
    known = {} if cfg.init else runs.read_json(Path(cfg.vae) / "vae.json")
    table, pixels = read_data(cfg, known.get("size", cfg.size))
    train, val = table.select(split="train"), table.select(split="val")
    variables = [var.infer(name, train.column(name)) for name in cfg.condition]
    labels, val_labels, _ = (var.encode(variables, part.rows) for part in (train, val, table))  # all cells are read now
    vae, model, schedule, prediction, origin = beginning(cfg, variables, trained)
    model = model.to(device, memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format)
    vae = vae.to(device)
    denoiser = Denoiser(model, schedule, prediction)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = EMA(model, cfg.steps / 10)
    averaged = Denoiser(ema.model, schedule, prediction)
    facts = {"data": table.fingerprint, **origin}
    run = runs.open_run(cfg.out, cfg, "diffusion", free=FREE, **facts, n_train=len(train), notes=table.notes)
    latents = encode_all(run / "latents.safetensors", vae, table, pixels, cfg, facts)
    mean, std = latents["train"]                                         # (views, N, 4, h, w) each
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "precision": precision}
    start = state.resume(run, **parts)

    with state.Interrupt() as stop, tqdm(total=cfg.steps, initial=start, desc="diffusion", unit="step") as bar:
        for step in range(start, cfg.steps):
            slots = range(step * cfg.batch, (step + 1) * cfg.batch)
            index = torch.tensor(order(len(train), cfg.seed, slots))
            view = (uniform(cfg.seed, slots, VIEW, 1)[:, 0] * cfg.views).long()
            within, noise = normal(cfg.seed, slots, NOISE, (2, *mean.shape[2:])).unbind(1)
            z = mean[view, index] + std[view, index] * within
            t = (stratified(cfg.seed, step, cfg.batch) * len(schedule)).long()
            y = var.drop(variables, {k: v[index] for k, v in labels.items()}, drops(cfg, slots, len(variables)))
            lr = set_lr(optimizer, cosine(step, cfg.steps, cfg.lr, cfg.steps // 20))
            with precision.autocast():
                losses = denoiser.loss(z.to(device), t, noise.to(device), to(y, device), cfg.min_snr)
            norm = precision.step(losses.mean(), optimizer, model.parameters(), cfg.clip, files(train, index.tolist()))
            ema.update(model, step)

            done, losses = step + 1, losses.detach().cpu()
            bar.update(), bar.set_postfix(loss=f"{losses.mean():.4f}", lr=f"{lr:.1e}")
            save = done % cfg.save_every == 0 or done == cfg.steps
            if save or done % cfg.log_every == 0:
                held_out = validation_loss(averaged, latents["val"], val_labels, precision, cfg) if save else None
                runs.append_log(run / "log.jsonl", step=done, loss=losses.mean().item(), **by_quarter(losses, t, schedule),
                                val_loss=held_out, lr=lr, grad_norm=norm, skipped=precision.skipped)
            if save or stop.requested:
                state.checkpoint(run, done, **parts)
            if save:
                plot_run(run, ["loss", "val_loss", "loss_t0", "loss_t1", "loss_t2", "loss_t3"])
                pipeline = Pipeline(averaged, ema.model.conditioner, vae, vae.factor * mean.shape[-1])
                draw_grid(run / "grids" / f"step_{done:08d}.png", pipeline, variables, train, cfg)
            if stop.requested and done < cfg.steps:
                stopped(done, cfg.steps)

    seen = sorted({*hashes(train), *known.get("trained_on", [])})
    store.save_vae(run, vae, size=vae.factor * mean.shape[-1], trained_on=known.get("trained_on", []))
    store.save_model(run, ema.model, schedule, prediction, size=vae.factor * mean.shape[-1], data=table.fingerprint,
                     trained_on=seen, grey=pixels.stride(1) == 0,  # one channel, expanded
                     rows=[{name: row[name] for name in cfg.condition} for row in train.rows])
    print(f"{run}: finished; the EMA weights are what is sampled")


def beginning(cfg: DiffusionConfig, variables: list[var.Variable],
              vae: VAE | None) -> tuple[VAE, models.Model, Schedule, str, dict]:
    """VAE, model, schedule and prediction at step 0, of the public model or from scratch, and what identifies them."""
    wanted = None if cfg.prediction == "auto" else cfg.prediction
    if cfg.init:
        sd = load_sd(cfg.init, prediction=wanted)
        print(sd.certificate.text())
        model = models.from_public(sd.unet, sd.null_context, variables, cfg.seed)
        return sd.vae.requires_grad_(False), model, sd.schedule, sd.prediction, {"init": sd.certificate.json()}
    model = models.from_scratch(models.UNETS[cfg.architecture], variables, cfg.seed)
    origin = {"vae": runs.sha256(Path(cfg.vae) / "vae.safetensors")}
    return vae, model, Schedule.scaled_linear(), wanted or "v", origin


def encode_all(path: Path, vae: VAE, table: Table, pixels: Tensor, cfg: DiffusionConfig,
               facts: dict[str, str]) -> dict[str, Tensor]:
    """Latent moments of train and val, (2, views, N, 4, h, w), from the cache if it was made of the same data and VAE."""
    key = runs.json_key(**facts, views=cfg.views, augment=cfg.augment, seed=cfg.seed)
    return cached(path, key, lambda: {
        "train": moments(pixels[rows_of(table, "train")], encoder(vae), cfg.views, strength=cfg.augment, seed=cfg.seed),
        "val": moments(pixels[rows_of(table, "val")], encoder(vae)),
    })


def stopped(done: int, steps: int) -> None:
    """End the process after a signal: what would come next needs this stage to be finished."""
    print(f"stopped at step {done} of {steps}; the same command goes on from here")
    raise SystemExit(0)


def drops(cfg: DiffusionConfig, slots: Sequence[int], n: int) -> Tensor:
    """Which cells are null, (slots, variables): of an image all together for guidance, or each alone."""
    u = uniform(cfg.seed, slots, DROP, 1 + n)
    return (u[:, :1] < cfg.drop) | (u[:, 1:] < cfg.drop_each)


@torch.no_grad()
def validation_loss(denoiser: Denoiser, latents: Tensor, labels: var.Labels, precision: Precision,
                    cfg: DiffusionConfig) -> float | None:
    """Mean loss of validation patients at fixed t and noise, comparable between steps and runs; None if there are none."""
    (mean, _), total = latents[:, 0], 0.0
    if not len(mean):
        return None
    shuffled = order(len(mean), 0, range(len(mean)))  # rows lie by label, and times must not
    t = (stratified(0, 0, len(mean))[shuffled] * len(denoiser.schedule)).long()
    noise = normal(0, range(len(mean)), VALIDATE, mean.shape[1:])
    for part in torch.arange(len(mean)).split(cfg.batch):
        y = to({k: v[part] for k, v in labels.items()}, precision.device)
        with precision.autocast():
            z, n = mean[part].to(precision.device), noise[part].to(precision.device)
            total += denoiser.loss(z, t[part], n, y, cfg.min_snr).sum().item()
    return total / len(mean)


def draw_grid(path: Path, pipeline: Pipeline, variables: Sequence[var.Variable], train: Table, cfg: DiffusionConfig) -> None:
    """Eight images a label from fixed seeds, conditioned as fixed training rows are: the same in every grid of a run."""
    rows = [train.select(label=label).rows for label in train.labels]
    pick = [r[int(u * len(r))] for i, r in enumerate(rows) for u in uniform(cfg.seed, [i], ROWS, 8)[0].tolist()]
    made = pipeline.images(var.encode(variables, pick), range(len(pick)), Recipe(guidance=cfg.guidance))
    images.write(path, images.grid(torch.cat(list(made)), columns=8))


def by_quarter(losses: Tensor, t: Tensor, schedule: Schedule) -> dict[str, float | None]:
    """Mean loss in each quarter of t, from little noise (t0) to much (t3)."""
    quarter = 4 * t // len(schedule)
    return {f"loss_t{q}": losses[quarter == q].mean().item() if (quarter == q).any() else None for q in range(4)}


def read_data(cfg: VAEConfig | DiffusionConfig, size: int) -> tuple[Table, Tensor]:
    """Table and pixels of the data sets; the phantom is drawn first if it is the one asked for."""
    if size % 8 or size < 32:
        raise InputError(f"--size {size} is not allowed: a multiple of 8, 32 or more")
    if cfg.data == (PHANTOM,):
        phantom.write(PHANTOM)
    table = read_table(cfg.data, seed=cfg.seed, split_dir=Path(cfg.out).parent)
    table = table.select(split=("train", "val", "test"))
    for splits in (("train",), ("val", "test")):
        if not len(table.select(split=splits)):
            found = ", ".join(sorted(set(table.column("split")))) or "none of train, val, test"
            raise InputError(f"{' '.join(cfg.data)} has no image in split {' or '.join(splits)}; it has {found}")
    return load_pixels(table, size, skip_bad=cfg.skip_bad)


def encoder(vae: VAE) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Float images on the CPU → (mean, std) of their latents."""
    @torch.no_grad()
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        m = vae.encode(x.to(vae.scale.device))
        return m.mean, m.std

    return encode


def hashes(table: Table) -> list[str]:
    """SHA-256 of each image: later stages refuse to test on what this one was trained on."""
    return sorted({table.hashes[row["file"]] for row in table.rows})


def rows_of(table: Table, *splits: str) -> list[int]:
    return [i for i, row in enumerate(table.rows) if row["split"] in splits]


def files(table: Table, index: Sequence[int]) -> str:
    """The first images of a batch by name, for the message of a fault."""
    names = [table.rows[i]["file"] for i in index[:4]]
    return ", ".join(names) + (f" and {len(index) - 4} more" if len(index) > 4 else "")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def to(labels: var.Labels, device: torch.device) -> var.Labels:
    return {name: value.to(device) for name, value in labels.items()}


VERBS = {"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)}

if __name__ == "__main__":
    config.main(VERBS, default=["vae", "diffusion"], doc=__doc__)
