"""The loss plot of a run, drawn from its log."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from minidiff import runs


def curves(log: Sequence[dict], names: Sequence[str], title: str) -> bytes:
    """PNG of the named columns of a log against the step, on a logarithmic axis; below, the
    memorisation gap, if any.
    """
    # only now: to import it takes half a second, for which --help need not wait
    from matplotlib.figure import Figure
    gaps = [(line["step"], line["gap"], line["gap_low"]) for line in log
            if line.get("gap") is not None]
    figure = Figure(figsize=(6, 4.2 if gaps else 3.2), dpi=120, layout="constrained")
    heights = [3, 1] if gaps else [1]
    axes, *below = figure.subplots(len(heights), sharex=True, squeeze=False,
                                   height_ratios=heights)[:, 0]
    if gaps:
        steps, gap, low = zip(*gaps)
        below[0].plot(steps, gap, color="black", linewidth=1.3, marker="." if len(gaps) < 15
                      else None, label="held-out loss / training loss − 1")
        below[0].fill_between(steps, low, gap, alpha=0.25, color="black",
                              label="to its 95 % lower bound")
        below[0].axhline(0, color="grey", linewidth=0.8)
        below[0].set(xlabel="step", ylabel="held-out loss / training loss − 1")
        below[0].spines[["top", "right"]].set_visible(False)
        below[0].legend(frameon=False, fontsize=7)
    for name in names:
        points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points), label=name.replace("_", " "), linewidth=1.3,
                      marker="." if len(points) < 15 else None)
    axes.set(xlabel="" if gaps else "step", yscale="log", title=title)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def plot_run(run: Path, names: Sequence[str]) -> None:
    """run/loss.png from run/log.jsonl."""
    log = runs.read_log(run / "log.jsonl")
    if log:
        runs.write_atomic(run / "loss.png", curves(log, names, f"{run.parent.name} / {run.name}"))
