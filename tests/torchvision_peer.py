"""torchvision as a peer to compare with; the package itself never imports it."""

import sys

import pytest
import torch

# What torchvision registers shape functions for at import. Its compiled ops are absent where its
# wheel was built for another torch (CUDA beside CPU, say); its models need none of them, so a
# declaration is all the import asks for.
OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # a Library takes its ops with it when it is collected


def torchvision():
    """The module torchvision, or a skip where it is not installed."""
    try:
        import torchvision
    except ModuleNotFoundError:
        pytest.skip("torchvision is not installed: pip install minidiff[test]")
    except RuntimeError:
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in OPS:
            library.define(op)
        _libraries.append(library)
        import torchvision
    return torchvision
