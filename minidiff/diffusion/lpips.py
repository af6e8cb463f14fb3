"""LPIPS on VGG-16, the learned perceptual distance: a loss of the autoencoder.

    d(x, y) = Σ_l mean_hw Σ_c w_lc (x̂_lchw − ŷ_lchw)²
    Zhang et al. 2018, arXiv 1801.03924, eq. 1, version 0.1

x̂_l are VGG-16's activations after its l-th block, at 1, 1/2, 1/4, 1/8 and 1/16 of the side, of
unit length over the channels; w_l ≥ 0 are five learned heads. Images that look alike are near,
wherever their pixels lie. The weights come in the user's files: nothing is downloaded.
"""

from bisect import bisect
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.diffusion.public.reader import Reader, Uninitialised
from minidiff.diffusion.public.weights import Weights, read_weights, to_float32
from minidiff.errors import InputError

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG-16's channels and convolutions
SHIFT, SCALE = (-.030, -.088, -.188), (.458, .448, .450)    # ImageNet's, for images in [-1, 1]
SMALLEST = 32                                               # px a side: 2 in the last block


class LPIPS(nn.Module):
    """Frozen: gradients reach the images only. Without learned heads each channel weighs 1."""

    def __init__(self):
        super().__init__()
        layers, inputs = [], 3
        for channels, depth in BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for i in [inputs, *[channels] * (depth - 1)]:
                layers += [nn.Conv2d(i, channels, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = channels
        # the indices are torchvision's: features.0, 2, 5, …, 28
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterDict({f"lin{k}": torch.ones(1, c, 1, 1)
                                       for k, (c, _) in enumerate(BLOCKS)})
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.about = "LPIPS with random weights"  # one sentence for the log: which file gave what
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Images (N, 3, H, W) twice, in [-1, 1], H and W ≥ 32 → distances (N,), ≥ float32."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST:
            raise InputError(f"LPIPS compares images (N, 3, H, W) of one shape, {SMALLEST} px a "
                             f"side at the least; these are {tuple(x.shape)} and {tuple(y.shape)}")
        layers = zip(self.blocks(x), self.blocks(y), self.heads.values())
        return sum((w * (unit(a) - unit(b)).square()).sum(1).mean((1, 2)) for a, b, w in layers)

    def blocks(self, images: Tensor) -> Iterator[Tensor]:
        """relu1_2, 2_2, 3_3, 4_3, 5_3, (N, C, H/2ˡ, W/2ˡ), lazily: two images go down together."""
        h = (images - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield h
            h = layer(h)
        yield h


def unit(h: Tensor) -> Tensor:
    """(N, C, H, W) of unit length over C, float32 or better: half precision has no 1e-10."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    # vector_norm's gradient at 0 is 0; that of the usual √Σh² is NaN, and black borders do give
    # all-zero cells
    return h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10)


def load_lpips(path: str | Path, *more: str | Path) -> LPIPS:
    """The distance from one file, or from two in any order: VGG-16's weights and the heads'.

    The content tells which file is which: torchvision's vgg16 (its classifier is not used), the
    lpips package's whole state dict, or the heads alone (`vgg.pth` of lpips and taming), which need
    a VGG-16 beside them. The heads of version 0.0, made for unscaled images, cannot be told from
    those of 0.1. Raises InputError.
    """
    readers = [Reader(read_weights(p)) for p in (path, *more)]
    vgg = _holder(readers, ("features.", "net.slice"), "VGG-16")
    heads = _holder(readers, ("lin",), "heads")
    if vgg is None:
        what = "the heads of LPIPS alone: give VGG-16 as well" if heads else (
            "no weights of VGG-16: give VGG-16 instead")
        raise InputError(f"{(heads or readers[0]).weights.path} holds {what}, as torchvision's "
                         "vgg16-397923af.pth")
    with Uninitialised():
        net = LPIPS()
    names = {name: f"features.{name}" for name in net.features.state_dict()}
    if any(name.startswith("net.slice") for name in vgg.left):  # lpips cuts it after each block
        pools = [i for i, layer in enumerate(net.features) if isinstance(layer, nn.MaxPool2d)]
        names = {name: f"net.slice{1 + bisect(pools, int(name.split('.')[0]))}.{name}"
                 for name in names}
    vgg.take("VGG-16", net.features, names)
    learned = "no heads: every channel weighs 1, the baseline"
    if heads:
        linear = {f"lin{k}": f"lin{k}.model.1.weight" for k in range(len(BLOCKS))}
        heads.take("heads", net.heads, linear)
        learned = f"learned heads of {heads.weights.path.name}"
    repeated = {"scaling_layer.shift": net.shift, "scaling_layer.scale": net.scale,
                **{f"lins.{k}.model.1.weight": w for k, w in enumerate(net.heads.values())}}
    for reader in readers:
        reader.ignore("classifier", *(f"classifier.{i}.{x}"
                                      for i in (0, 3, 6) for x in ("weight", "bias")))
        reader.ignore("repeated", *repeated)  # the package's file has its heads twice
        reader.finish()
    for reader in readers:
        _check_values(reader.weights, repeated)
    net.about = f"LPIPS: VGG-16 of {vgg.weights.path.name}, {learned}"
    return net


def _check_values(weights: Weights, repeated: dict[str, Tensor]) -> None:
    """Refuse a second copy that differs by more than bfloat16's rounding, and values that harm."""
    for name, tensor in weights.tensors.items():
        if name.startswith("classifier."):  # not used
            continue
        copy, value = to_float32(tensor, name, weights.path), repeated.get(name)
        if value is not None and (copy.shape != value.shape
                                  or not torch.allclose(copy, value, rtol=4e-3)):
            raise InputError(f"{weights.path}: {name} differs from what LPIPS on VGG-16 has there")
        if not copy.isfinite().all() or (name.startswith("lin") and copy.min() < 0):
            raise InputError(f"{weights.path}: {name} holds other than finite numbers"
                             f"{' ≥ 0' if name.startswith('lin') else ''}")


def _holder(readers: list[Reader], starts: tuple[str, ...], what: str) -> Reader | None:
    holders = [r for r in readers if any(name.startswith(starts) for name in r.left)]
    if len(holders) > 1:
        raise InputError(f"{' and '.join(str(r.weights.path) for r in holders)} both hold the "
                         f"{what} of LPIPS: give one")
    return holders[0] if holders else None
