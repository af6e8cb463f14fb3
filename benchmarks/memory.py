"""Memory of training and coding at SD's size and 512 px, counted tensor by tensor; none is used.

    python benchmarks/memory.py   prints the table and writes memory.json beside it, in minutes

The steps are those of train.py on fake tensors. "step" is the most that one holds on top of its
weights, their average and AdamW's moments. A GPU's libraries and work space are left out.
"""

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff import variables as var  # noqa: E402
from minidiff.diffusion import denoiser, lora, model, schedule, unet, vae  # noqa: E402
from minidiff.training.optim import EMA, adamw  # noqa: E402
from minidiff.training.precision import Precision  # noqa: E402

VARIABLES = [var.Category(name, ("a", "b")) for name in ("label", "sex", "age", "view")]
KNOBS = ("part", "precision", "images", "checkpointing")
UNET = [(part, "bf16", n, c) for part, many in (("all", 16), ("attention", 4), ("lora", 4))
        for n in (1, many) for c in (False, True)]
VAE = [*((part, p, n) for part, p in (("all", "fp32"), ("all", "bf16"), ("decoder", "bf16"))
         for n in (1, 4)), ("encode", "fp32", 4), ("encode", "fp32", 32), ("decode", "fp32", 4)]


class Held(TorchDispatchMode):
    """Bytes of all storages that are alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for storage in [x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor)]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def free(self, storage: int, size: int) -> None:
        self.known.remove(storage)
        self.now -= size


def as_on_cuda(module: nn.Module, args: tuple) -> tuple:
    """What a norm is given there: float32 under autocast, and GroupNorm never channels_last."""
    if not isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return args
    return ((args[0].float() if torch.is_autocast_enabled("cpu") else args[0]).contiguous(),)


def count(net: nn.Module, work: Callable[[], Tensor], precision: str = "") -> dict[str, int]:
    """Bytes that a network and `work` hold: the loss of its training; without precision, a call."""
    hook = nn.modules.module.register_module_forward_pre_hook(as_on_cuda)
    with hook, FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        weights = net.to_empty(device="cpu") and held.now
        if not precision:
            torch.no_grad()(work)()
            return {"weights": weights, "step": held.peak - weights, "peak": held.peak}
        ema, average, how = EMA(net, 1000), held.now - weights, Precision(precision)
        optimizer = adamw(net, 1e-5, weight_decay=1e-2)
        for step in range(2):  # the first makes the moments
            between = held.peak = held.now
            with how.autocast():
                error = work()
            how.backward(error)
            how.update(optimizer, net.parameters(), 1.0)
            ema.update(net, step)
        return {"weights": weights, "EMA": average, "moments": between - weights - average,
                "step": held.peak - between, "peak": held.peak}


def count_unet(part: str, precision: str, n: int, checkpointing: bool) -> dict[str, int]:
    with torch.device("meta"):
        net = unet.UNet(unet.SD15)
    net.checkpointing = checkpointing
    whole = model.from_public(net, torch.ones(77, 768), VARIABLES, 0)
    lora.set_trainable(whole, part, 16, 16.0, torch.Generator())
    whole.to(memory_format=torch.channels_last)
    own = denoiser.Denoiser(whole, schedule.Schedule.scaled_linear())
    def loss() -> Tensor:
        z, noise, t = torch.randn(n, 4, 64, 64), torch.randn(n, 4, 64, 64), torch.zeros(n).long()
        return own.loss(z, t, noise, whole.conditioner.null(n), 5.0).mean()
    return count(whole, loss, precision)


def count_vae(part: str, precision: str, n: int) -> dict[str, int]:
    with torch.device("meta"):
        net = vae.VAE(vae.SD).to(memory_format=torch.channels_last)
    if part in ("encode", "decode"):
        size = (3, 512, 512) if part == "encode" else (4, 64, 64)
        return count(net, lambda: getattr(net, part)(torch.randn(n, *size)))
    nn.ModuleList([net.encoder, net.quant_conv]).requires_grad_(part == "all")
    def loss() -> Tensor:
        x = torch.randn(n, 3, 512, 512).contiguous(memory_format=torch.channels_last)
        y, kl = net(x, torch.randn(n, 4, 64, 64))
        return sum(vae.training_terms(y, x, kl, None))
    return count(net, loss, precision)


if __name__ == "__main__":
    table = []
    for network, measure, rows in (("UNet", count_unet, UNET), ("VAE", count_vae, VAE)):
        for row in rows:
            sizes = measure(*row)
            print(network, *row, *(f"{name} {x / 1e9:.2f}" for name, x in sizes.items()), sep="  ")
            table.append({"network": network, **dict(zip(KNOBS, row)), **sizes})
    Path(__file__).with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
