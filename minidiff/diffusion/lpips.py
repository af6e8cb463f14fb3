"""The learned perceptual distance, LPIPS, on VGG-16: images that look alike are near, wherever
their pixels lie.

    d(x, y) = Σ_l mean_hw Σ_c w_lc (x̂_lchw − ŷ_lchw)²       Zhang et al. 2018, arXiv 1801.03924,
                                                             eq. 1, version 0.1

x̂_l are VGG-16's activations after its l-th block, at 1, 1/2, 1/4, 1/8 and 1/16 of the side, of
unit length over the channels; w_l ≥ 0 are five learned heads. The weights come in the user's file
or files: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff.diffusion.public.reader import Reader, Uninitialised
from minidiff.diffusion.public.weights import read_weights, to_float32
from minidiff.errors import InputError

# channels and convolutions of VGG-16's blocks
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
# ImageNet's mean and deviation, for images in [-1, 1]
SHIFT, SCALE = (-.030, -.088, -.188), (.458, .448, .450)
SMALLEST = 32                                               # px a side: 2 in the last block


class LPIPS(nn.Module):
    """Frozen: gradients reach the images only. Without learned heads every channel weighs 1, the
    paper's baseline.
    """

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
        """Images (N, 3, H, W) twice, in [-1, 1], H and W ≥ 32 → distances (N,), ≥ 0, float32 or
        better.
        """
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST:
            raise InputError(f"LPIPS compares images (N, 3, H, W) of one shape, {SMALLEST} px a "
                             f"side at the least; these are {tuple(x.shape)} and {tuple(y.shape)}")
        layers = zip(self.blocks(x), self.blocks(y), self.heads.values())
        return sum((w * (unit(a) - unit(b)).square()).sum(1).mean((1, 2)) for a, b, w in layers)

    def blocks(self, images: Tensor) -> Iterator[Tensor]:
        """relu1_2, 2_2, 3_3, 4_3 and 5_3, (N, C, H/2ˡ, W/2ˡ), one after the other: the two images
        go down together.
        """
        h = (images - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield h
            h = layer(h)
        yield h


def unit(h: Tensor) -> Tensor:
    """(N, C, H, W) of unit length over C. In float32 at least: half precision has no 1e-10, and the
    sum over C is long.
    """
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    # vector_norm's gradient at 0 is 0; that of the usual √Σh² is NaN, and black borders do give
    # all-zero cells
    return h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10)


def load_lpips(path: str | Path, *more: str | Path) -> LPIPS:
    """The distance from one file, or from two in any order: VGG-16's weights and the heads'. Raises
    InputError.

    Told by content: torchvision's vgg16 (its classifier is not used), the lpips package's whole
    state dict, and the heads alone (`vgg.pth` of lpips and taming), which need a VGG-16 beside
    them. `about` says which heads there are. The heads of version 0.0, made for unscaled images,
    cannot be told from those of 0.1.
    """
    readers = [Reader(read_weights(p)) for p in (path, *more)]
    vgg, heads = _holder(readers, ("features.", "net.slice"), "VGG-16"), _holder(readers, ("lin",),
                                                                                 "heads")
    if vgg is None:
        holds, do = ("the heads of LPIPS alone", "as well") if heads else ("no weights of VGG-16",
                                                                           "instead")
        raise InputError(f"{(heads or readers[0]).weights.path} holds {holds}: give VGG-16 {do}, "
                         "as torchvision's vgg16-397923af.pth")
    with Uninitialised():
        net = LPIPS()
    features = _vgg_names(net, any(name.startswith("net.slice") for name in vgg.left))
    linear = {f"lin{k}": f"lin{k}.model.1.weight" for k in range(len(BLOCKS))}
    vgg.take("VGG-16", net.features, features)
    if heads:
        heads.take("heads", net.heads, linear)
    repeated = {"scaling_layer.shift": net.shift, "scaling_layer.scale": net.scale,  # the package's file has it all twice
                **{f"lins.{k}.model.1.weight": w for k, w in enumerate(net.heads.values())}}
    for reader in readers:
        reader.ignore("classifier",
                      [f"classifier.{i}.{x}" for i in (0, 3, 6) for x in ("weight", "bias")])
        reader.ignore("repeated", repeated)
        reader.finish()
    for reader in readers:
        file, tensors = reader.weights.path, reader.weights.tensors
        for name in repeated.keys() & tensors.keys():
            found, value = to_float32(tensors[name], name, file), repeated[name]
            # bfloat16's rounding
            if found.shape != value.shape or not torch.allclose(found, value, rtol=4e-3):
                raise InputError(f"{file}: {name} differs from what LPIPS on VGG-16 has there")
        for ours, name in [*features.items(), *linear.items()]:
            value = net.heads[ours] if ours in linear else net.features.get_parameter(ours)
            if name in tensors and not (value.isfinite().all()
                                        and (ours in features or value.min() >= 0)):
                raise InputError(f"{file}: {name} holds other than finite "
                                 f"numbers{' ≥ 0' if ours in linear else ''}")
    learned = f"learned heads of {heads.weights.path.name}" if heads else "no heads: every channel weighs 1, the baseline"
    net.about = f"LPIPS: VGG-16 of {vgg.weights.path.name}, {learned}"
    return net


def _holder(readers: list[Reader], starts: tuple[str, ...], what: str) -> Reader | None:
    holders = [r for r in readers if any(name.startswith(starts) for name in r.left)]
    if len(holders) > 1:
        raise InputError(f"{' and '.join(str(r.weights.path) for r in holders)} both hold the "
                         f"{what} of LPIPS: give one")
    return holders[0] if holders else None


def _vgg_names(net: LPIPS, sliced: bool) -> dict[str, str]:
    """{our name: name there}: torchvision's features.5.weight, or lpips' net.slice2.5.weight, cut
    before every pooling.
    """
    pools = [i for i, layer in enumerate(net.features) if isinstance(layer, nn.MaxPool2d)]
    slices = {name: 1 + sum(i < int(name.split(".")[0]) for i in pools)
              for name in net.features.state_dict()}
    return {name: f"net.slice{k}.{name}" if sliced
            else f"features.{name}" for name, k in slices.items()}
