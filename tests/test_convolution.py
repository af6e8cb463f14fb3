"""No network of ours has the convolution that corrupts memory on a CPU without AVX-512, and its
neighbours are sound.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import AVX2
from torch import nn

from minidiff.classification.resnet import Block, ResNet
from minidiff.convolution import LEAST, pointwise
from minidiff.diffusion import unet, vae
from minidiff.diffusion.lpips import LPIPS
from minidiff.errors import InputError
from minidiff.evaluation.features import backbones, inception

NETWORKS = {
    **{f"VAE {name}": partial(vae.VAE, getattr(vae, name)) for name in ("TINY", "SD")},
    **{f"UNet {name}": partial(unet.UNet, getattr(unet, name))
       for name in ("TINY", "SMALL", "SD15", "SD21")},
    "LPIPS": LPIPS, "Inception": inception.Inception,
    **{name: row.make for name, row in backbones.BACKBONES.items()},
}


def unsafe(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d)
            and m.kernel_size == (1, 1) and max(m.stride) > 1 and m.in_channels // m.groups < 8]


def test_unsafe_convolutions_are_found():
    net = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, 2),
                        nn.Conv2d(8, 8, 1, 2))
    assert unsafe(net) == ["0"]


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_has_one(name):
    with torch.device("meta"):
        net = NETWORKS[name]()
    assert any(isinstance(m, nn.Conv2d) for m in net.modules()) and not unsafe(net)


def test_the_narrowest_resnet_has_none_and_narrower_ones_are_refused():
    net = ResNet(2, width=LEAST)
    assert not unsafe(net) and any(m.kernel_size == (1, 1) and m.stride == (2, 2)
                                   and m.in_channels == LEAST
                                   for m in net.modules() if isinstance(m, nn.Conv2d))
    for width in (1, 4, LEAST - 1):
        with pytest.raises(InputError, match=f"width {width} is not allowed: 8 and more, for torch "
                           f"corrupts memory"):
            ResNet(2, width=width)


def test_the_blocks_of_both_resnets_refuse_it():
    for build in (lambda: pointwise(4, 8, 2), lambda: Block(4, 8, 2),
                  lambda: backbones.Bottleneck(4, 8, 2)):
        with pytest.raises(ValueError, match="needs 8 channels or more, not 4"):
            build()
    assert pointwise(4, 8).stride == (1, 1) and pointwise(8, 8, 2).stride == (2, 2)


CODE = """
import torch
from minidiff.classification.resnet import ResNet
from minidiff.diffusion import unet, vae

torch.set_num_threads(1)
g, last = torch.Generator().manual_seed(0), torch.channels_last
with torch.device("meta"):
    sd, net = vae.VAE(vae.SD), unet.UNet(unet.SD15)
for layer in (sd.quant_conv, sd.post_quant_conv, sd.decoder.conv_in, sd.encoder.conv_out,
              net.conv_in, net.conv_out):
    assert min(layer.in_channels, layer.out_channels) <= 8
    layer.to_empty(device="cpu")
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=g)
    x = torch.randn(2, layer.in_channels, 8, 8, generator=g, requires_grad=True)
    up = torch.randn(2, layer.out_channels, 8, 8, generator=g)

    def run(form):
        y = layer.to(memory_format=form)(x.to(memory_format=form))
        return y, *torch.autograd.grad((y * up).sum(), [x, layer.weight, layer.bias])

    plain = [t.clone() for t in run(torch.contiguous_format)]
    for _ in range(20):
        for a, b in zip(plain, run(last)):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max(), layer

small = ResNet(2, width=8).to(memory_format=last)
for _ in range(20):
    small(torch.randn(4, 1, 32, 32, generator=g).to(memory_format=last)).square().sum().backward()
print(torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.parametrize("emulated", [False, True], ids=["natively", "as AVX2"])
def test_the_layers_of_4_channels_are_sound_in_channels_last(emulated):
    """In a process of its own, which a corrupted heap would end."""
    done = subprocess.run([sys.executable, "-c", CODE],
                          env={**os.environ, **(AVX2 if emulated else {})},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not emulated or done.stdout.strip() in ("AVX2", "DEFAULT", "NO AVX")
