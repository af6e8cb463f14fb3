"""Where a classifier starts: another run's, or a torchvision resnet18 file."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minidiff.classification.predictor import Predictor
from minidiff.classification.resnet import load_torchvision
from minidiff.errors import InputError


def begin(predictor: Predictor, path: str | Path) -> list[str]:
    """Take over the weights of another predictor's folder (arms/real/0 or judge of a run) or of a
    torchvision resnet18 file (.pth, .safetensors); returns the names that stay as they were: the
    last layer, if it has other outputs."""
    state, path = read(path), Path(path)
    try:
        return load_torchvision(predictor.net, state)
    except InputError as error:
        raise InputError(f"{path}: {error} (--width {predictor.width}; resnet18 has 64)") from None


def read(path: str | Path) -> dict[str, Tensor]:
    """Names → tensors of a folder or file; nothing in a pickle is run."""
    path = Path(path)
    if path.is_dir():
        return Predictor.load(path).net.state_dict()
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # whatever a damaged or hostile file makes torch and safetensors raise
    except Exception as error:
        raise InputError(f"--init {path}: no weights can be read from it "
                         f"({str(error).splitlines()[0][:200]})") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"--init {path}: not a state dict, names with tensors")
    return state
