"""Does torch.compile pay? It takes a minute or more once, and then each call is faster."""

import os
import shutil
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn

from minidiff import distributed

Compile = Literal["auto", "yes", "no"]


def wanted(choice: Compile, device: torch.device, calls: int, enough: int) -> bool:
    """yes and no as said; auto: on a GPU for which Triton and a C compiler are there, if `enough`
    calls of the network follow to earn the first one's wait. Says so if it is."""
    pays = (device.type == "cuda" and calls >= enough and find_spec("triton") is not None
            and torch.cuda.get_device_capability(device) >= (7, 0)
            and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))))
    if choice == "yes" or (choice == "auto" and pays):
        if distributed.rank() == 0:
            print("compiling the UNet: the first step takes a minute or more (--compile no: none)")
        return True
    return False


def compiled(net: nn.Module, choice: Compile, device: torch.device, calls: int,
             enough: int) -> nn.Module:
    return torch.compile(net) if wanted(choice, device, calls, enough) else net
