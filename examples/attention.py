"""Probe attention: how much each cell of a latent looks at each token of the context.

    python examples/attention.py --run runs/demo/diffusion
"""

import argparse

import torch

from minidiff.diffusion.unet import Attention
from minidiff.sampling.finished_run import open_pipeline
from minidiff.sampling.plan import encode

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--run", default="runs/demo/diffusion")
pipeline, facts = open_pipeline(parser.parse_args().run, "cpu")
model = pipeline.denoiser.net
found = {}


def watch(name: str):
    def hook(module: Attention, given: tuple, _) -> None:
        h, context = given
        q, k = module.split(module.to_q(h)), module.split(module.to_k(context))
        found[name] = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (N, heads, T, K)
    return hook


for name, module in model.unet.named_modules():
    if name.endswith("attn2"):  # attn1 is attention of the cells to each other
        module.register_forward_hook(watch(name))
labels = encode(pipeline.conditioner.variables, facts["rows"][:1])
x = torch.randn(1, 4, *[pipeline.size // pipeline.vae.factor] * 2,
                generator=torch.Generator().manual_seed(0))
for sigma in (10.0, 1.0, 0.1):
    with torch.no_grad():
        pipeline.denoiser((x * sigma), sigma, labels)
    for name, weights in found.items():
        shares = " ".join(f"{share:.2f}" for share in weights.mean((0, 1, 2)).tolist())
        print(f"σ {sigma:4g}  {name:48} {shares}")
