"""The figure of docs/internals.md: every schedule's ᾱ and σ, and where each row of times trains.

    python benchmarks/schedules.py        docs/schedules.png
"""

import sys
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from minidiff.diffusion.schedule import SCHEDULES, Schedule  # noqa: E402
from minidiff.diffusion.times import TIMES  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

U = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


def main() -> None:
    figure, (alpha, sigma, trained) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    schedules = {name: make() for name, make in SCHEDULES.items()}
    schedules["scaled-linear, --shift 0.25"] = Schedule.scaled_linear().shifted(0.25)
    for name, schedule in schedules.items():
        alpha.plot(schedule.alphas_cumprod, label=name)
        sigma.semilogy(schedule.sigmas_table, label=name)
    alpha.set(xlabel="t", ylabel="ᾱ", title="share of the image's variance")
    sigma.set(xlabel="t", ylabel="σ", ylim=(5e-3, 2e2), title="noise level")
    sigma.legend(frameon=False, fontsize=8, loc="lower right")
    usual = Schedule.scaled_linear()
    for name, times in TIMES.items():
        log = usual.sigma(times(U, usual)).log()
        inner = log[(log > log.min()) & (log < log.max())]
        height, edges = torch.histogram(inner.float(), 60, density=True)
        trained.plot((edges[1:] + edges[:-1]) / 2, height * len(inner) / len(log), label=name)
    trained.set(xlabel="ln σ", ylabel="density", title="--times, on scaled-linear", ylim=(0, None))
    trained.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs/schedules.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    main()
