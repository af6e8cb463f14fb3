"""What the benchmarks share: a task, our networks and diffusers' for it with equal weights,
processes to time them in.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import torch
from load import Peak
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from minidiff import variables as var  # noqa: E402
from minidiff.diffusion import lora  # noqa: E402
from minidiff.diffusion import model as models  # noqa: E402
from minidiff.diffusion import unet as unets  # noqa: E402
from minidiff.training.device import keep_memory  # noqa: E402
from minidiff.training.precision import Precision  # noqa: E402

VARIABLES = [var.Category("label", ("a", "b", "c")), var.Category("sex", ("f", "m")),
             var.Number("age", 60, 15, 20, 95)]


@dataclass(frozen=True)
class Task:
    architecture: str
    vae: str
    part: str                             # of lora.PARTS
    batch: int
    pixels: int
    tokens: int
    precision: Precision
    ema: bool = False
    compile: bool = False
    checkpointing: bool = False

    @property
    def device(self) -> torch.device:
        return self.precision.device

    @property
    def latents(self) -> tuple[int, int, int]:
        side = self.pixels // 2 ** (len(models.VAES[self.vae].channels) - 1)
        return 4, side, side

    def batch_of(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, device=self.device)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that training and sampling have in common."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="all", choices=["demo", "sd15", "all"],
                        help="TINY, SD 1.5 or both [all]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 … [auto]")
    parser.add_argument("--dtype", default="", choices=["", "fp32", "bf16", "fp16"],
                        help="[bf16 on a GPU, fp32 on a CPU]")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each comparison [7]")
    return parser


def own_unet(task: Task) -> unets.UNet:
    torch.manual_seed(0)
    with task.device:
        net = unets.UNet(models.UNETS[task.architecture])
    net.checkpointing = task.checkpointing
    return trainable(net.to(task.device, memory_format=torch.channels_last), task.part)


def their_unet(task: Task, last: bool = False) -> nn.Module:
    """UNet2DConditionModel of the same architecture and weights."""
    from diffusers import UNet2DConditionModel
    c = models.UNETS[task.architecture]
    kinds = [("CrossAttn" if attention else "") + "{}Block2D" for attention in c.attention]
    with torch.device("meta"):  # no second copy of the weights is made, which would count as theirs
        net = UNet2DConditionModel(
            down_block_types=[k.format("Down") for k in kinds],
            up_block_types=[k.format("Up") for k in kinds[::-1]], block_out_channels=c.channels,
            layers_per_block=c.blocks, cross_attention_dim=c.context_dim,
            norm_num_groups=c.groups, use_linear_projection=c.linear_projection,
            attention_head_dim=[c.heads or channels // c.head_dim for channels in c.channels])
    torch.manual_seed(0)
    with task.device:
        net.load_state_dict(unets.UNet(c).state_dict(), assign=True)
    net = net.train().to(task.device,
                         memory_format=torch.channels_last if last else torch.preserve_format)
    return trainable(net, task.part)


def trainable(net: nn.Module, part: str) -> nn.Module:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(re.search(lora.PARTS[part], name) is not None)
    return net


def work_of(task: Task) -> int:
    """FLOPs of a training step, an image; without what checkpointing computes again."""
    with torch.device("meta"):
        net = unets.UNet(models.UNETS[task.architecture])
        x, t = torch.zeros(1, *task.latents), torch.zeros(1)
        context = torch.zeros(1, task.tokens, net.config.context_dim)
    if task.part == "lora":
        lora.add(net, 16, 16.0, torch.Generator())
    trainable(net, task.part)
    with FlopCounterMode(display=False) as counter:
        net(x, t, context).sum().backward()
    return counter.get_total_flops()


Parts = dict[str, Callable[[], Tensor | None]]  # what can be timed, in order of size


class Row:
    """A process that holds one row's networks and works when it is told to: with a memory allocator
    of its own.

    `build` makes the parts of a task, and no part is run before it is asked for. A row keeps the
    memory that it frees, as minidiff's scripts do, unless it is a peer "as it comes".
    """

    def __init__(self, name: str, build: Callable[[Task], Parts], task: Task,
                 peers: tuple[str, ...]):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        keep = "as it comes" not in name
        self.process = context.Process(target=serve, args=(other, build, task, keep, peers),
                                       daemon=True)
        self.process.start()
        other.close()

    def _ask(self, *words):
        try:
            self.pipe.send(words)
            return self.pipe.recv()
        except (EOFError, OSError):
            sys.exit("a row's process has ended: see its message above")

    def parts(self) -> list[str]:
        return self._ask("parts")

    def output(self, part: str) -> Tensor | None:
        """What a part gives, float32 on the CPU; None where it does not fit."""
        found = self._ask("run", part)
        return None if found is None else torch.from_numpy(found)

    def seconds(self, part: str, steps: int) -> float:
        """Seconds a step, the mean of so many; nan where it does not fit."""
        return self._ask("time", part, steps)

    def memory(self) -> float:
        """Highest memory so far in GB: of a GPU, or anonymous memory above that before the networks
        were built.
        """
        return self._ask("memory")

    def end(self) -> None:
        self.pipe.close()
        self.process.join()


def serve(pipe: Connection, build: Callable[[Task], Parts], task: Task, keep: bool,
          peers: tuple[str, ...]) -> None:
    """The other side of a Row, until its pipe is closed."""
    load_peers(*peers)
    if keep:
        keep_memory()
    gpu, watch = task.device.type == "cuda", Peak()
    watch.start()
    parts = build(task)
    with contextlib.suppress(EOFError):
        while True:
            what, *words = pipe.recv()
            if what == "parts":
                answer = list(parts)
            elif what == "memory":
                answer = (torch.cuda.max_memory_allocated(task.device) if gpu else watch.peak) / 1e9
            else:
                try:
                    done = seconds(parts[words[0]], task.device,
                                   words[1]) if what == "time" else parts[words[0]]()
                    answer = done.detach().float().cpu().numpy() if isinstance(done,
                                                                               Tensor) else done
                except torch.OutOfMemoryError:
                    answer = float("nan") if what == "time" else None
            pipe.send(answer)
            if gpu:
                torch.cuda.empty_cache()  # the next row needs it


def seconds(step: Callable, device: torch.device, steps: int = 1) -> float:
    """Seconds a step. With one CPU thread the clock is CPU time, which other programs lengthen
    less.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    begin = wait() or clock()
    for _ in range(steps):
        step()
    return (wait() or clock() - begin) / steps


def load_peers(*names: str) -> ModuleType | None:
    """diffusers with these parts, which load when they are named: now, for it is no row's memory.
    Else torchvision alone.
    """
    # a skip of pytest's; torchvision may be built for another torch
    with contextlib.suppress(BaseException):
        importlib.import_module("torchvision_peer").torchvision()
    if not names:
        return None
    diffusers = importlib.import_module("diffusers")
    diffusers.logging.set_verbosity_error()
    assert [getattr(diffusers, name) for name in names]
    return diffusers
