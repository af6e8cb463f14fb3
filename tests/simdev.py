"""A device without hardware: `sim:0`, whose tensors compute on the CPU.

As on a GPU, tensors of two devices do not mix, NumPy cannot read one, a generator of the CPU is
refused, autocast lowers matrix products, and the program waits whenever it asks for a value, or
sends one without `non_blocking`. Each wait is counted in `waits`.

torch keeps the name `privateuseone` for devices that others add, and lets Python be one. `start`
registers it for the whole process, so each test needs a process of its own.
"""

import sys
import threading
from collections import Counter
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME, ROOT = "sim", Path(__file__).parents[1]
waits: Counter[tuple[str, str]] = Counter()  # (what for, file:line of the project) → times
kept: list[torch.library.Library] = []       # a registration ends with its object

# What makes a tensor of nothing; zeros, full and the like call one of these.
FACTORIES = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step",
             "linspace", "eye")
# What has to know values before it can go on.
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2")
INDEXING = ("index", "index_put", "_index_put_impl", "_unsafe_index")
# What takes a number on the CPU beside tensors of the device, as all pointwise functions do.
SCALARS = ("where", "masked_fill", "lerp", "fill", "_fused_adamw", "_amp_update_scale")
# Of CUDA's lists for autocast, what the project calls: in 16 bits, and in float32.
LOWERED = ("conv2d", "linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention")
WIDENED = ("group_norm", "layer_norm", "softmax.int", "linalg_vector_norm", "sum",
           "sum.dim_IntList", "exp", "log", "pow.Tensor_Scalar")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]  # what autocast converts


class SimTensor(torch.Tensor):
    """A tensor that says it is on the device; `inner`, on the CPU, holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "SimTensor":
        outer = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0))
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __repr__(self) -> str:
        return f"sim({self.inner!r})"

    def __deepcopy__(self, memo: dict) -> "SimTensor":
        if id(self) not in memo:
            memo[id(self)] = copy = self.detach().clone().requires_grad_(self.requires_grad)
            copy._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **_):
        raise TypeError("can't convert a sim tensor to numpy: use Tensor.cpu() first")


def compute(function, args: tuple, kwargs: dict):
    """A function of torch of which an argument is on the device."""
    name, flat = function.__name__.split(".")[0].rstrip("_"), tree_leaves((args, kwargs))
    host = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, SimTensor)]
    to_host = (name == "copy" and not isinstance(args[0], SimTensor)
               or torch.device(kwargs.get("device") or NAME).type != NAME)
    if name in ("copy", "_to_copy"):
        if to_host or host and not (kwargs.get("non_blocking") or True in args[2:]):
            wait("read" if to_host else "upload")
    elif name in READS:
        wait("read")
    elif name in INDEXING:
        if not isinstance(args[0], SimTensor):
            raise RuntimeError("indices should be on the CPU, as the indexed tensor is")
        if any(x is not None and x.dtype == torch.bool for x in args[1]):
            wait("read")
        elif host:
            wait("upload")
    elif any(x.ndim for x in host) or host and not (
            torch.Tag.pointwise in function.tags or name in SCALARS):
        raise RuntimeError(f"Expected all tensors to be on the same device, got cpu: {function}")
    if any(isinstance(x, torch.Generator) for x in flat):
        raise RuntimeError("Expected a 'sim' device type for generator but found 'cpu'")
    if kwargs.get("device"):
        kwargs = {**kwargs, "device": "cpu"}
    outer = {id(x.inner): x for x in flat if isinstance(x, SimTensor)}
    args, kwargs = tree_map_only(SimTensor, lambda x: x.inner, (args, kwargs))
    found = function(*args, **kwargs)
    return found if to_host else tree_map_only(  # what changed in place stays the same object
        torch.Tensor, lambda x: outer[id(x)] if id(x) in outer else SimTensor(x), found)


def wait(what: str) -> None:
    """Count a wait at the line of the project that causes it. Other threads make nobody wait."""
    frame, thread = sys._getframe(), threading.current_thread()
    while frame and (frame.f_code.co_filename == __file__
                     or not frame.f_code.co_filename.startswith(f"{ROOT}/")):
        frame = frame.f_back
    if thread is threading.main_thread() or isinstance(thread, threading._DummyThread):
        place = frame and f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        waits[what, place or "autograd"] += 1


def operator(name: str):
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload or "default")


def factory(name: str):
    """`empty`, `arange` and so on, on the device."""
    return lambda *args, **kwargs: SimTensor(operator(name)(*args, **{**kwargs, "device": "cpu"}))


def autocast(name: str, dtype: torch.dtype | None):
    """A function that takes its floats in another dtype; None: in the one of autocast."""
    def cast(*args, **kwargs):
        to = dtype or torch.get_autocast_dtype(NAME)
        args, kwargs = tree_map_only(
            SimTensor, lambda x: x.to(to) if x.dtype in FLOATS else x, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(
                torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operator(name)(*args, **kwargs)
    return cast


def start() -> None:
    """Register the device, by what torch has for this in private."""
    kept.extend(torch.library.Library(namespace, "IMPL", key) for namespace, key in (
        ("_", "AutocastPrivateUse1"), ("aten", "AutocastPrivateUse1"), ("aten", "PrivateUse1")))
    kept[0].fallback(torch.library.fallthrough_kernel)
    for name in (*LOWERED, *WIDENED):
        kept[1].impl(name, autocast(name, None if name in LOWERED else torch.float32))
    for name in FACTORIES:
        kept[2].impl(name, factory(name))
    module = backend_registration._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: FLOATS[1:]
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="sim") begins on the CPU
