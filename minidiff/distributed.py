"""Many GPUs: torchrun's ranks, DDP and FSDP2; in a single process, everything here does nothing.

    torchrun --nproc-per-node 8 train.py diffusion …

Time, noise, drops and augmentation belong to a slot in the global batch. A rank computes its slice
of the slots, and gradients are averaged over the ranks: how many there are changes only rounding.
Rank 0 writes.
"""

import atexit
import inspect
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidiff.errors import InputError

_independent = False
PATIENCE = timedelta(hours=2)  # how long ranks wait while rank 0 reads and encodes the data
ARRIVAL = timedelta(minutes=10)  # how long they wait for one another at the start
SIGHT = 60  # seconds: a network file system may remember as long that there was no file
ADDRESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process


def announced() -> tuple[int, int]:
    """Rank and number of processes by the environment; 0 of 1 unless it says all that is needed,
    for a variable of an earlier job may be left in a shell."""
    place, world, *address = (os.environ.get(name, "") for name in ADDRESS)
    if all(address) and place.isdecimal() and world.isdecimal() and int(place) < int(world):
        return int(place), int(world)
    return 0, 1


def start() -> None:
    """Join the other processes, if torchrun started this one."""
    if dist.is_initialized():
        return
    if (world := announced()[1]) == 1:
        if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
            print(f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, and {', '.join(ADDRESS)} do not "
                  "fit together: one process, as without them", file=sys.stderr)
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, place, world = next(dist.rendezvous("env://", timeout=ARRIVAL))
    except (RuntimeError, ValueError) as error:
        said = "; ".join(f"{name}={os.environ[name]}" for name in ADDRESS)
        raise InputError(f"the {world} processes that the environment announces ({said}) did not "
                         f"meet in {ARRIVAL}: start all of them, as torchrun does, or unset these "
                         f"variables ({str(error).splitlines()[0]})") from None
    dist.init_process_group(backend, store=store, rank=place, world_size=world, timeout=PATIENCE)
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def stop() -> None:
    """Leave the other processes, all at once: when one left early, gloo was seen to abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def local_rank() -> int:
    """This process among those of its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _independent else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _independent else 1


@contextmanager
def independent() -> Iterator[None]:
    """Within the body this rank is its own world, e.g. to train one model of many."""
    global _independent
    before, _independent = _independent, True
    try:
        yield
    finally:
        _independent = before


def require_equal_slices(batch: int, accumulate: int = 1) -> None:
    """Raise InputError unless a batch splits evenly over all ranks and micro-batches."""
    if batch % (world() * accumulate):
        raise InputError(f"--batch {batch} is not a multiple of {world()} processes × {accumulate} "
                         "micro-batches")


def micro_batches(n: int, accumulate: int) -> list[slice]:
    """A rank's n images in equal parts, which `accumulate` divides."""
    return [slice(i, i + n // accumulate) for i in range(0, n, n // accumulate)]


def rank_slice(batch: Sequence) -> Sequence:
    """This rank's part of a global batch, which the number of ranks divides."""
    n = len(batch) // world()
    return batch[rank() * n : (rank() + 1) * n]


def gather(x: Tensor) -> Tensor:
    """(n,) on the CPU of every rank → (world·n,), in the order of the slots."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def least(flags: Tensor) -> Tensor:
    """(n,) on the device of every rank → the least of each; nothing waits."""
    if world() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MIN)
    return flags


def wait() -> None:
    """Wait until all ranks are here."""
    if world() > 1:
        dist.barrier()


@contextmanager
def rank0_first() -> Iterator[None]:
    """Rank 0 runs the body first, then the others, which find what it wrote."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def require_shared(path: Path) -> None:
    """Raise InputError, on all ranks, unless all of them see a file that rank 0 wrote."""
    wait()
    last = time.monotonic() + SIGHT
    while not path.exists() and time.monotonic() < last:
        time.sleep(0.1)
    if not gather(torch.tensor([path.exists()])).all():
        raise InputError(f"{path}, which rank 0 wrote, is not there for all {world()} processes: "
                         "their machines have to share the file system of --root and --out")


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, which averages gradients over ranks; no buffer of ours ever changes."""
    if world() == 1:
        return model
    ddp = nn.parallel.DistributedDataParallel
    # torch 2.13 has another name for it
    still = next(name for name in ("forward_sync_buffers", "broadcast_buffers")
                 if name in inspect.signature(ddp).parameters)
    return ddp(model, [device.index] if device.type == "cuda" else None,
               gradient_as_bucket_view=True, **{still: False})


def shard(models: Sequence[nn.Module], blocks: tuple[type[nn.Module], ...],
          device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2 (Zhao et al. 2023), in place: split weights, gradients and moments over the ranks.

    The weights are gathered in `dtype`, one block at a time, and computed with as they are, without
    autocast; gradients are added up in float32. Inputs come uncast, for bfloat16 does not tell all
    timesteps apart. The root, too, gives back what it gathered: after a forward pass without a
    backward one it would stay whole, and no average would fit it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if world() > 1:
        mesh = init_device_mesh(device.type, (world(),))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for model in models:
            for module in [*(m for m in model.modules() if isinstance(m, blocks)), model]:
                fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def unsynced(model: nn.Module, last: bool):
    """Context of a micro-batch: gradients are averaged over the ranks with those of the last."""
    if last or not isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full, even if it is sharded; all ranks must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather_full(tensor: Tensor, copy: bool = False) -> Tensor:
    """The same on the CPU of rank 0, which writes, and nothing on the others; `copy`: never memory
    that training goes on to write."""
    full = whole(tensor).detach()
    return full.to("cpu", copy=copy) if rank() == 0 else full.new_empty(0)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh,
                                  target.placements)
    target.copy_(value)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")
