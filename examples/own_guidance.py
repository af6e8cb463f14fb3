"""Guide by your own loss: a closure round the denoiser, here towards images of a wanted brightness.

    python examples/own_guidance.py --run runs/demo/diffusion --brightness .5
"""

import argparse

import torch

from minidiff.diffusion.samplers import SAMPLERS, SeededNoise
from minidiff.pixels import rounded
from minidiff.sampling.finished_run import open_pipeline
from minidiff.sampling.plan import encode

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--run", default="runs/demo/diffusion")
parser.add_argument("--brightness", type=float, default=0.5, help="0 black … 1 white")
parser.add_argument("--strength", type=float, default=3.0, help="0: none")
args = parser.parse_args()
pipeline, facts = open_pipeline(args.run, "cpu")
labels = encode(pipeline.conditioner.variables, facts["rows"][:4])


def guided(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """D moved against the gradient of a loss of the image it decodes to."""
    z = pipeline.denoiser(x, sigma, labels).requires_grad_(True)
    with torch.enable_grad():
        off = pipeline.vae.decode(z).mean((1, 2, 3)) / 2 + 0.5 - args.brightness  # (N,)
        gradient, = torch.autograd.grad(off.square().sum(), z)
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-12
    return z - args.strength * off.abs().view(-1, 1, 1, 1) * gradient / size


sigmas = pipeline.denoiser.schedule.ladder(12, "logsigma")
start = SeededNoise(range(4), (4, *[pipeline.size // pipeline.vae.factor] * 2))
with torch.no_grad():
    *_, (z, _) = SAMPLERS["dpmpp_2m"](guided, start() * sigmas[0].item(), sigmas)
    made = rounded(pipeline.vae.decode(z))
print("brightness:", (made.float().mean((1, 2, 3)) / 255).tolist())
