"""Many GPUs: torchrun's ranks, DDP and FSDP2; everything here is a no-op on one process.

    torchrun --nproc-per-node 8 train.py diffusion …

Time, noise, drops and augmentation belong to a slot in the global batch. A rank computes its share
of the slots and gradients are averaged over ranks, so that their number changes nothing but the
rounding. Rank 0 writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minidiff.errors import InputError

_alone = False
PATIENCE = timedelta(hours=2)  # the others wait while rank 0 reads and encodes a large data set


def start() -> None:
    """Join the other processes, if torchrun started this one."""
    if world_asked() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=PATIENCE)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


def stop() -> None:
    """Leave the other processes, all at the same time: one that left early was seen to abort in
    gloo's threads.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world_asked() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process among those of its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Work of this rank that the others know nothing of, e.g. a training of its own: it asks and
    awaits nobody.
    """
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def require_share(batch: int, accumulate: int = 1) -> None:
    """Raise InputError unless a batch falls into equal parts for all ranks and micro-batches."""
    if batch % (world() * accumulate):
        raise InputError(f"--batch {batch} is not a multiple of {world()} processes × {accumulate} "
                         "micro-batches")


def share(slots: range) -> range:
    """This rank's part of the slots of a global batch; the world divides it."""
    n = len(slots) // world()
    return slots[rank() * n : (rank() + 1) * n]


def gather(x: Tensor) -> Tensor:
    """(n,) on the CPU of every rank → (world·n,), in the order of the slots."""
    if world() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def mean(x: Tensor) -> float:
    """The mean of a number over the ranks."""
    return gather(x.detach().float().cpu().reshape(1)).mean().item()


def anywhere(flag: bool) -> bool:
    """Is it so on any rank?"""
    return bool(gather(torch.tensor([flag])).any())


def wait() -> None:
    """Until all ranks have come here."""
    if world() > 1:
        dist.barrier()


@contextmanager
def first() -> Iterator[None]:
    """Rank 0 goes through the body first, the others after it: what it wrote, they find."""
    if rank():
        dist.barrier()
    yield
    if world() > 1 and not rank():
        dist.barrier()


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in DDP, which averages gradients over ranks."""
    if world() == 1:
        return model
    gpus = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, gpus, gradient_as_bucket_view=True)


def shard(model: nn.Module, blocks: tuple[type[nn.Module], ...], device: torch.device) -> None:
    """FSDP2 in place: parameters, gradients and moments spread over ranks, gathered block by block
    (Zhao et al. 2023).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world() > 1:
        mesh = init_device_mesh(device.type, (world(),))
        for module in [m for m in model.modules() if isinstance(m, blocks)]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)


def unsynced(model: nn.Module, last: bool):
    """For the micro-batches before the last one: their gradients stay here and are averaged with
    the last one's.
    """
    return model.no_sync() if not last and isinstance(
        model, nn.parallel.DistributedDataParallel) else nullcontext()


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on the CPU; all ranks have to ask for it together."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().cpu()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards; a tensor that is not sharded is its own."""
    return [t.to_local() if is_sharded(t) else t for t in (t.detach() for t in tensors)]


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh,
                                  target.placements)
    target.copy_(value)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")
