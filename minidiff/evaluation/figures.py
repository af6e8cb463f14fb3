"""The charts of the report: numbers in, PNG bytes out."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

ACCENT, INK, PALE = "#b5482a", "#2b3a42", "#8fa3ad"
BANDS = {"KD": "KD_floor", "FD": "FD_floor_halves"}  # the floor at the numbers at which the line was measured
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "text.color": INK, "axes.edgecolor": PALE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.titlesize": 10, "axes.titlelocation": "left"}
WIDTH = 9.6  # inches


def distance_chart(rows: Sequence[dict], metric: str) -> bytes:
    """One panel an extractor: every set's distance to held-out real images, over the band of real against real."""
    rows = [r for r in rows if metric in r]
    extractors, places = list(dict.fromkeys(r["extractor"] for r in rows)), _places(rows)
    height = 1.1 + 0.24 * (max(places.values()) + 1)
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(extractors), height)
        for axes, extractor in zip(panels[0], extractors):
            for r in [r for r in rows if r["extractor"] == extractor]:
                y, colour = places[r["label"], r["set"]], _colour(r["set"])
                band = r.get(BANDS[metric])
                if band:
                    axes.fill_betweenx([y - 0.5, y + 0.5], band["low"], band["high"], color=PALE, alpha=0.28, linewidth=0)
                middle = r["KD"] if metric == "KD" else r["FD_halves"]
                ends = [r[f"{metric}_low"], r[f"{metric}_high"]]
                axes.plot(ends, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
                axes.plot(middle, y, "o", color=colour, markersize=5 if r["set"] == "synthetic" else 3.5)
            _soft_scale(axes, [r for r in rows if r["extractor"] == extractor], metric)
            axes.set(title=extractor, xlabel=f"{metric} to held-out real images of the label")
            axes.grid(axis="x", alpha=0.3)
            axes.tick_params(axis="y", length=0)
        names = [f"{label}  ·  {name}" if name == "synthetic" else name for label, name in places]
        panels[0][0].set(yticks=list(places.values()), yticklabels=names, ylim=(max(places.values()) + 0.8, -0.8))
        for tick, (_, name) in zip(panels[0][0].get_yticklabels(), places):
            tick.set_color(_colour(name))
        return _png(figure)


def study_chart(results: Sequence[dict]) -> bytes:
    """One panel a test set: balanced accuracy of every seed as a dot, an arm's mean as a line."""
    sets, arms = (list(dict.fromkeys(r[k] for r in results)) for k in ("test_set", "arm"))
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(sets), 1.0 + 0.35 * len(arms))
        for axes, name in zip(panels[0], sets):
            for y, arm in enumerate(arms):
                own = [r for r in results if (r["arm"], r["test_set"]) == (arm, name)]
                values = [r.get("balanced_accuracy", r.get("accuracy")) for r in own]
                values = [100 * v for v in values if v is not None]
                colour = ACCENT if "synthetic" in arm else INK
                axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.55, markersize=5, markeredgewidth=0)
                if values:
                    axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2)
            axes.set(title=f"{name} set", xlabel="balanced accuracy, %", yticks=range(len(arms)), yticklabels=arms)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.3)
        return _png(figure)


def curves(logs: dict[str, Sequence[dict]]) -> bytes:
    """Loss and validation loss against the step, one panel a run."""
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(logs), 2.6, sharey=False)
        for axes, (name, log) in zip(panels[0], logs.items()):
            for column, colour in (("loss", PALE), ("val_loss", ACCENT)):
                points = [(line["step"], line[column]) for line in log if line.get(column) is not None]
                if points:
                    axes.plot(*zip(*points), color=colour, label={"loss": "training", "val_loss": "held-out"}[column],
                              linewidth=1.4, marker="o" if len(points) < 15 else None, markersize=4)
            axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        return _png(figure)


def _places(rows: Sequence[dict]) -> dict[tuple[str, str], float]:
    """Height of every row, with a gap between labels."""
    places, y, before = {}, -1.0, None
    for key in dict.fromkeys((r["label"], r["set"]) for r in rows):
        y += 1.0 if key[0] == before or before is None else 1.7
        places[key], before = y, key[0]
    return places


def _soft_scale(axes, rows: Sequence[dict], metric: str) -> None:
    """Linear near 0, where real against real lies, and logarithmic beyond: KD may be negative, other labels are far."""
    near = [abs(r[BANDS[metric]][side]) for r in rows if BANDS[metric] in r for side in ("low", "high")]
    far = max((r[f"{metric}_high"] for r in rows), default=0)
    if near and far > 8 * max(near) > 0:
        axes.set_xscale("symlog", linthresh=2 * max(near), linscale=1.0)
        axes.tick_params(axis="x", labelsize=8)


def _panels(columns: int, height: float, sharey: bool = True):
    return plt.subplots(1, columns, figsize=(WIDTH, height), sharey=sharey, squeeze=False, layout="constrained")


def _colour(name: str) -> str:
    return ACCENT if name == "synthetic" else INK if name == "real" else PALE


def _png(figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, transparent=True, metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()
