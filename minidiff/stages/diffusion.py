"""What the diffusion stage is set up with, the batch of each step, and the model that it saves."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff import counted, distributed, runs
from minidiff import variables as var
from minidiff.data import latents
from minidiff.data.dataset import picker, read_training_set
from minidiff.diffusion import begin, lora, store, unet, watch
from minidiff.diffusion.denoiser import require_octaves
from minidiff.diffusion.public.lora import write_lora
from minidiff.diffusion.times import TIMES
from minidiff.diffusion.vae import encoder
from minidiff.errors import InputError
from minidiff.overlap import send
from minidiff.training import state
from minidiff.training.device import pick_device
from minidiff.training.optim import EMA, adamw
from minidiff.training.post_hoc import WIDTHS, PowerEMA
from minidiff.training.precision import Precision


class Stage:
    """All that the diffusion stage works with: read, checked, built and encoded.

    cfg is train.py's DiffusionConfig; `free` are its knobs that a resumed run may change.
    """

    def __init__(self, cfg, free: Sequence[str]):
        distributed.start()
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.precision = Precision(cfg.precision, self.device, deterministic=cfg.deterministic)
        var.check_names(cfg.condition)
        runs.refuse_other(cfg.out, cfg, "diffusion", (*free, "size", "condition"))
        distributed.require_equal_slices(cfg.batch, cfg.accumulate)
        scope = ("lora" if cfg.init else "all") if cfg.train == "auto" else cfg.train
        if cfg.post_hoc and (scope == "lora" or cfg.shard):
            raise InputError("--post-hoc keeps averages of whole weights, not of adapters or "
                             "shards: leave it out, or --train lora and --shard")
        if cfg.shard and (scope != "all" or self.precision.name == "fp16" or cfg.compile == "yes"):
            compiled = ", compiled" if cfg.compile == "yes" else ""
            raise InputError(f"--shard spreads --train all in fp32 or bf16, not {scope} in "
                             f"{self.precision.name}{compiled}")
        vae_run = cfg.vae or ("" if cfg.init else f"{cfg.root}/vae")
        self.data = read_training_set(cfg, begin.known_size(cfg.init, vae_run, cfg.size), cfg.prior)
        self.train, val = self.data.part("train"), self.data.part("val")
        rows = self.train.table.rows
        begin.check_vae(cfg.vae, cfg.init, cfg.root, self.train.hashes)
        names = var.usable(cfg.condition, rows, begin.known_conditions(cfg.init))
        columns = {name: self.train.table.column(name) for name in names}
        self.start = begin.start_diffusion(
            cfg.init, vae_run, cfg.architecture, columns, cfg.prediction, cfg.seed, cfg.unet,
            cfg.lora, cfg.null_context, cfg.schedule, cfg.shift)
        require_octaves(len(cfg.bands), self.data.size // self.start.vae.factor)
        self.start.vae.to(self.device)
        layout = torch.preserve_format if cfg.shard else torch.channels_last
        self.model = self.start.model.to(self.device, memory_format=layout)   # what is trained …
        self.variables = self.model.conditioner.variables
        self.labels = var.encode(self.variables, rows)          # of the training images
        lone = {"label"} & {*cfg.condition} - {*names}  # one label: the other splits have it, too
        var.encode([*self.variables, *(var.Category(v, (rows[0][v],)) for v in lone)],
                   self.data.table.rows)  # refuses a bad cell of any split now
        lora.set_trainable(self.model, scope, cfg.rank, cfg.alpha, counted.seeded(cfg.seed))
        self.model.unet.checkpointing = cfg.checkpointing
        self.base = " + ".join(filter(None, (cfg.unet or cfg.init, *cfg.lora)))  # of the adapters
        self.ema = EMA(self.model, cfg.steps / 10)
        self.averages = {f"average_{k}": PowerEMA(self.model, width)
                         for k, width in enumerate(WIDTHS)} if cfg.post_hoc else {}
        self.run = Path(cfg.out)
        facts = {"data": self.data.table.fingerprint, **self.start.origin}
        if distributed.rank() == 0:
            runs.open_run(self.run, replace(cfg, size=self.data.size, condition=names), "diffusion",
                          free=free, notes=self.data.table.notes, n_train=len(rows), **facts,
                          **self.precision.facts(),
                          conditions={v.name: list(v.values) for v in self.variables})
            state.require_space(self.run, self.model, cfg.snapshots, len(self.averages))
        distributed.require_shared(self.run / "run.json")
        self.net, self.autocast = self.spread(cfg.shard)
        self.optimizer = adamw(self.model, cfg.lr, weight_decay=1e-2)
        self.source, val_means = latents.encoded(
            self.run / "latents.safetensors", runs.json_key(**facts), encoder(self.start.vae),
            self.train.pixels, val.pixels, views=cfg.views, strength=cfg.augment, seed=cfg.seed,
            device=self.device)
        n, held_out = min(len(val), watch.AT_MOST), var.encode(self.variables, val.table.rows)
        self.probes = [watch.Probe.of(*part, n, len(self.start.schedule)) for part in (
            (self.source.mean[0], self.labels), (val_means, held_out))]
        self.pick = picker(self.train, cfg.seed, cfg.balance, cfg.prior, cfg.prior_share)

    def spread(self, shard: bool) -> tuple[nn.Module, Callable]:
        """The model as several ranks train it, and the precision of its calls."""
        if shard and distributed.world() > 1:  # the weights are gathered in that precision
            distributed.shard((self.model, self.ema.model), (unet.ResBlock, unet.Transformer),
                              self.device, self.precision.dtype)
            return self.model, nullcontext
        net = self.model if shard else distributed.parallel(self.model, self.device)
        return net, self.precision.autocast

    def batch(self, step: int) -> tuple[list[int], Tensor, Tensor, Tensor, Tensor, var.Labels]:
        """Which images; the times t of all ranks and (n,) of this one, on the CPU; and its latents
        z (n, 4, h, w), noise, labels and mask of dropout, if any, on the device. A function of the
        step's slots alone."""
        cfg, u = self.cfg, counted.stratified(self.cfg.seed, step, self.cfg.batch)
        slots = distributed.rank_slice(range(step * cfg.batch, (step + 1) * cfg.batch))
        index, times = self.pick(slots), TIMES[cfg.times](u, self.start.schedule)
        drops = counted.drops(cfg.seed, slots, len(self.variables), cfg.drop, cfg.drop_each)
        labels = var.drop(self.variables, {k: v[index] for k, v in self.labels.items()}, drops)
        keep = [send(counted.dropout(counted.generators(cfg.seed, slots, counted.DROPOUT),
                                     sum(self.model.unet.widths), cfg.dropout), self.device)
                ] if cfg.dropout else []
        return (index, times, distributed.rank_slice(times),
                *self.source.draw(index, slots, cfg.offset),
                {name: send(cells, self.device) for name, cells in labels.items()}, *keep)


def save_model(folder: Path, s: Stage, **facts) -> None:
    """Save the EMA weights with adapters merged, the adapters alone, and facts for later stages."""
    model = s.ema.model
    if adapters := lora.adapters(model.unet):
        model = lora.merge(model)
        if distributed.rank() == 0:
            write_lora(folder / "lora.safetensors", adapters, "diffusers", s.base)
    if s.averages and distributed.rank() == 0:
        runs.save_tensors(folder / "averages.safetensors", {
            f"{k}/{name}": x for k, average in enumerate(s.averages.values())
            for name, x in average.state_dict().items()},
            {"step": str(facts.get("step", s.cfg.steps))})
    store.save_model(
        folder, model, s.start.schedule, s.start.prediction, **s.data.facts,
        data=s.data.table.fingerprint, trained_on=sorted({*s.train.hashes, *s.start.trained_on}),
        rows=[{name: row.get(name, "") for name in ("label", *(v.name for v in s.variables))}
              for row in s.train.table.rows],
        **facts)
