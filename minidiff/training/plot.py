"""The loss plot of a run, drawn from its log."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from minidiff import runs  # noqa: E402


def curves(log: Sequence[dict], names: Sequence[str], title: str) -> bytes:
    """PNG of the named columns of a log against the step, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(6, 3.2), dpi=120, layout="constrained")
    for name in names:
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points), label=name.replace("_", " "), linewidth=1.3, marker="." if len(points) < 15 else None)
    axes.set(xlabel="step", yscale="log", title=title)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()


def plot_run(run: Path, names: Sequence[str]) -> None:
    """run/loss.png from run/log.jsonl."""
    log = runs.read_log(run / "log.jsonl")
    if log:
        runs.write_atomic(run / "loss.png", curves(log, names, f"{run.parent.name} / {run.name}"))
