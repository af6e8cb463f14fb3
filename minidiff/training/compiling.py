"""Does torch.compile pay? It takes a minute or more once, and then each call is faster."""

from importlib.util import find_spec
from typing import Literal

import torch

from minidiff import distributed

Compile = Literal["auto", "yes", "no"]


def wanted(choice: Compile, device: torch.device, calls: int, enough: int) -> bool:
    """yes and no as said; auto: on CUDA, where Triton is there and `enough` calls of the network
    follow to earn the first one's wait. Says so if it is."""
    pays = device.type == "cuda" and calls >= enough and find_spec("triton") is not None
    if choice == "yes" or (choice == "auto" and pays):
        if distributed.rank() == 0:
            print("compiling the UNet: the first step takes a minute or more (--compile no: none)")
        return True
    return False
