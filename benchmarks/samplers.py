"""How far each sampler ends from the truth after 10, 20 and 50 calls of the network, where the
truth is known.

    python benchmarks/samplers.py   the table of docs/samplers.md, 2 minutes
    python benchmarks/samplers.py --run runs/demo/diffusion   a trained network

The data: a mixture of three Gaussians on a line, mean 0, variance 1; its ideal denoiser is a
formula. The figure: the 2-Wasserstein distance between what the sampler makes of 2^16 starts at σ₀
and the mixture's own distribution at the last σ, in standard deviations of the data. A
deterministic sampler keeps the order of its starts, so for it this is the root mean square distance
from the exact solution of the ODE. A stochastic one is run with four seeds (root mean square); the
last row is what 2^16 draws from the mixture itself score: figures below it do not tell one
stochastic sampler from another.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from minidiff.diffusion.samplers import NOISY, SAMPLERS, TABLE  # noqa: E402
from minidiff.diffusion.schedule import Schedule  # noqa: E402

CALLS, SPACINGS = (10, 20, 50), ("karras", "logsigma", "ays", "trailing")
WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64)
                        for v in ([0.3, 0.5, 0.2], [-1.4, 0.2, 1.6], [0.1, 0.3, 0.2]))
MEANS = MEANS - (WEIGHTS * MEANS).sum()
SIZE = (WEIGHTS * (MEANS**2 + STDS**2)).sum().sqrt()
MEANS, STDS = MEANS / SIZE, STDS / SIZE


def mixture(x, sigma):
    """E[z | x]: each component's own answer, weighted by how likely it made x."""
    variance, x = STDS**2 + sigma**2, x[..., None]
    share = (WEIGHTS.log() - variance.log() / 2 - (x - MEANS) ** 2 / (2 * variance)).softmax(-1)
    return (share * (MEANS + STDS**2 / variance * (x - MEANS))).sum(-1)


def quantiles(sigma, n):
    """The n midpoint quantiles of the mixture at this σ, by bisection."""
    u, std = (torch.arange(n, dtype=torch.float64) + 0.5) / n, (STDS**2 + sigma**2).sqrt()
    low, high = torch.full_like(u, -8 * (2 + sigma.item())), torch.full_like(u,
                                                                             8 * (2 + sigma.item()))
    for _ in range(70):
        middle = (low + high) / 2
        below = (WEIGHTS * torch.special.ndtr((middle[:, None] - MEANS) / std)).sum(1) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


def end(name, denoise, start, sigmas, generator):
    noise = {"noise": lambda: torch.randn(start.shape, generator=generator,
                                          dtype=start.dtype)} if name in NOISY else {}
    *_, (x, _) = SAMPLERS[name](denoise, start, sigmas, **noise)
    return x


def table(figure, names):
    """One row a sampler; `figure(name, spacing, steps)` gives a cell."""
    print("| sampler | " + " | ".join(f"{s} {c}" for s in SPACINGS for c in CALLS) + " |")
    print("|---" * (1 + len(SPACINGS) * len(CALLS)) + "|")
    for name in names:
        cells = [figure(name, s, c // TABLE[name].calls) for s in SPACINGS for c in CALLS]
        print(f"| {name or 'exact draws'} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |",
              flush=True)


def on_the_mixture(name, spacing, steps, n=2**16):
    sigmas, squares = Schedule.scaled_linear().ladder(steps, spacing), []
    start, truth = quantiles(sigmas[0], n), quantiles(sigmas[-1], n)
    for seed in range(4 if name in NOISY or not name else 1):
        g = torch.Generator().manual_seed(seed)
        x = end(name, mixture, start, sigmas,
                g) if name else truth[torch.randint(n, (n,), generator=g)]
        squares.append((x.sort().values - truth).square().mean())
    return torch.stack(squares).mean().sqrt().item()


@torch.no_grad()
def on_a_run(folder, n=16):
    """A cell's function: root mean square distance from 500 steps of heun, in standard deviations
    of the latents.
    """
    from minidiff.diffusion.store import load_pipeline
    pipeline, _ = load_pipeline(Path(folder))
    labels = pipeline.conditioner.null(n)
    denoise = torch.no_grad()(lambda x, sigma: pipeline.denoiser(x, sigma, labels))
    cells, g, schedule = pipeline.size // pipeline.vae.factor, torch.Generator().manual_seed(
        0), pipeline.denoiser.schedule
    sigmas = schedule.ladder(500, "logsigma")
    start = torch.randn(n, pipeline.vae.config.latent_channels, cells, cells, generator=g)
    start = start * (1 + sigmas[0] ** 2).sqrt().item()
    truth = end("heun", denoise, start, sigmas, g)
    return lambda name, spacing, steps: (
        (end(name, denoise, start, schedule.ladder(steps, spacing),
             g) - truth).square().mean().sqrt() / truth.std()).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="folder of a trained diffusion model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        table(on_a_run(args.run), [name for name in SAMPLERS if name not in NOISY])
    else:
        table(on_the_mixture, [*SAMPLERS, ""])
