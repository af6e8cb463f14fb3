"""The device that computes, and its memory."""

import ctypes
import resource
import sys

import torch

from minidiff import distributed
from minidiff.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # limits of glibc's allocator, see mallopt(3)


def pick_device(name: str = "auto") -> torch.device:
    """auto: the GPU if there is one, else the CPU; cuda: under torchrun, the GPU of this rank."""
    keep_memory()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"device {name!r} is not here; CUDA devices found: "
                         f"{torch.cuda.device_count()}") from None
    if device.type == "cuda":  # memory, provenance and all kernels are then this one's
        torch.cuda.set_device(device)
    return device


def keep_memory() -> None:
    """Let the C library keep the memory that tensors free; without glibc, do nothing.

    Otherwise the pages of each large tensor go back to the system, and are fetched and zeroed for
    the next one: a third of the time of a UNet call at SD 1.5's size on a CPU
    (`benchmarks/sample.py`, "as it comes").
    """
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory() -> int:
    """The most bytes held so far: on the GPU if there is one, else by this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
