"""The charts of the pages: numbers in, PNG bytes out."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence

import numpy as np

ACCENT, INK, PALE = "#b5482a", "#2b3a42", "#8fa3ad"
# the floor at the numbers at which the line was measured
BANDS = {"KD": "KD_floor", "FD": "FD_floor_halves"}
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "text.color": INK, "axes.edgecolor": PALE,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.titlesize": 10, "axes.titlelocation": "left"}
WIDTH = 9.6  # inches
MARKS = {"synthetic": "D", "real": "o"}  # others "x": told apart without colour
LINES = (("o", "-", INK), ("s", "--", ACCENT), ("^", ":", PALE), ("D", "-.", INK))  # so are these


def pyplot():
    """matplotlib's, without a window. Only now: to import it takes half a second, for which --help
    need not wait.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def styled():
    """The look of all charts, as a context."""
    return pyplot().rc_context(STYLE)


def distance_chart(rows: Sequence[dict], metric: str) -> bytes:
    """One panel an extractor: every set's distance to held-out real images, over the band of real
    against real.
    """
    rows = [r for r in rows if metric in r]
    extractors, places = list(dict.fromkeys(r["extractor"] for r in rows)), _places(rows)
    height = 1.1 + 0.24 * (max(places.values()) + 1)
    with styled():
        figure, panels = _panels(len(extractors), height)
        for axes, extractor in zip(panels[0], extractors):
            for r in [r for r in rows if r["extractor"] == extractor]:
                y, colour = places[r["label"], r["set"]], _colour(r["set"])
                band = r.get(BANDS[metric])
                if band:
                    axes.fill_betweenx([y - 0.5, y + 0.5], band["low"], band["high"],
                                       facecolor="none", edgecolor=PALE,
                                       hatch="////", alpha=0.55, linewidth=0)
                middle = r["KD"] if metric == "KD" else r["FD_halves"]
                ends = [r[f"{metric}_low"], r[f"{metric}_high"]]
                axes.plot(ends, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
                size = 5.5 if r["set"] == "synthetic" else 4
                axes.plot(middle, y, MARKS.get(r["set"], "x"), color=colour, markersize=size)
            _soft_scale(axes, [r for r in rows if r["extractor"] == extractor], metric)
            axes.set(title=extractor, xlabel=f"{metric} to held-out real images of the label")
            axes.grid(axis="x", alpha=0.3)
            axes.tick_params(axis="y", length=0)
        names = [f"{label}  ·  {name}" if name == "synthetic" else name for label, name in places]
        panels[0][0].set(yticks=list(places.values()), yticklabels=names,
                         ylim=(max(places.values()) + 0.8, -0.8))
        for tick, (_, name) in zip(panels[0][0].get_yticklabels(), places):
            tick.set_color(_colour(name))
        return _png(figure)


def growth_chart(rows: Sequence[dict]) -> bytes:
    """KD above and FD below against n, one column an extractor: median and 5–95 % of draws, over
    that of real draws.
    """
    extractors = list(dict.fromkeys(r["extractor"] for r in rows))
    with styled():
        figure, panels = pyplot().subplots(2, len(extractors), figsize=(WIDTH, 5.0), squeeze=False,
                                           sharex=True, layout="constrained")
        for (i, metric), (j, extractor) in itertools.product(enumerate(("KD", "FD")),
                                                             enumerate(extractors)):
            axes, own = panels[i, j], [r for r in rows if r["extractor"] == extractor]
            floors = [r for r in own if r[f"{metric}_floor"]]
            for some, key, colour, mark, name in (
                    (own, metric, ACCENT, "D-", "synthetic against held-out"),
                    (floors, f"{metric}_floor", INK, "o--", "real against real")):
                n, ends = [r["n"] for r in some], [[r[key][side] for r in some]
                                                   for side in ("low", "high")]
                axes.plot(n, [r[key]["median"] for r in some], mark, color=colour, markersize=4,
                          linewidth=1.4, label=name)
                axes.fill_between(n, *ends, facecolor=colour if key == metric else "none",
                                  alpha=0.18, linewidth=0,
                                  hatch=None if key == metric else "////", edgecolor=colour)
            axes.set(title=f"{metric}, {extractor}",
                     ylim=(min(0, axes.get_ylim()[0]) if metric == "KD" else 0, None))
            axes.set_xscale("log")
            ticks = sorted({r["n"] for r in own})[::2]
            axes.set_xticks(ticks, [str(k) for k in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.25)
            if metric == "FD":
                axes.set_xlabel("n images on each side")
        panels[0, 0].legend(frameon=False)
        return _png(figure)


def study_chart(results: Sequence[dict]) -> bytes:
    """One panel a test set: balanced accuracy of every seed as a dot, an arm's mean as a line."""
    sets, arms = (list(dict.fromkeys(r[k] for r in results)) for k in ("test_set", "arm"))
    with styled():
        figure, panels = _panels(len(sets), 1.0 + 0.35 * len(arms))
        for axes, name in zip(panels[0], sets):
            for y, arm in enumerate(arms):
                own = [r for r in results if (r["arm"], r["test_set"]) == (arm, name)]
                values = [r.get("balanced_accuracy", r.get("accuracy")) for r in own]
                values = [100 * v for v in values if v is not None]
                colour = ACCENT if "synthetic" in arm else INK
                mark = "D" if "synthetic" in arm else "o"
                axes.plot(values, [y] * len(values), mark, color=colour, alpha=0.55, markersize=5,
                          markeredgewidth=0)
                if values:
                    axes.plot([np.mean(values)] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2)
            axes.set(title=f"{name} set", xlabel="balanced accuracy, %", yticks=range(len(arms)),
                     yticklabels=arms)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.3)
        return _png(figure)


def curves(logs: dict[str, Sequence[dict]]) -> bytes:
    """Loss and validation loss against the step, one panel a run."""
    with styled():
        figure, panels = _panels(len(logs), 2.6, sharey=False)
        for axes, (name, log) in zip(panels[0], logs.items()):
            for column, colour, line in (("loss", PALE, "-"), ("val_loss", ACCENT, "--")):
                points = [(line["step"], line[column]) for line in log
                          if line.get(column) is not None]
                if points:
                    axes.plot(*zip(*points), color=colour,
                              label={"loss": "training", "val_loss": "held-out"}[column],
                              linestyle=line, linewidth=1.4,
                              marker="o" if len(points) < 15 else None, markersize=4)
            axes.set(title=name, xlabel="step", ylabel="loss", yscale="log")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        return _png(figure)


def course_chart(result: dict, log: Sequence[dict]) -> bytes:
    """From monitor.json: KD over its floor on the left, one panel a space; what tells of copying on
    the right.
    """
    points, steps = result["points"], [p["step"] for p in result["points"]]
    spaces = [s["space"] for s in points[0]["copying"]["spaces"]]
    with styled():
        height = max(len(result["floors"]), 3)
        figure, panels = pyplot().subplots(height, 2, figsize=(WIDTH, 2.1 * height), sharex=True,
                                           squeeze=False, layout="constrained")
        for axes, (name, band) in zip(panels[:, 0], result["floors"].items()):
            k = [p["KD"][name] for p in points]
            axes.axhspan(band["low"], band["high"], color=PALE, alpha=0.35, linewidth=0,
                         label="KD of real against real, 5–95 %")
            axes.errorbar(steps, [x["value"] for x in k], _bars(k, "value", "low", "high"),
                          color=INK, marker="o",
                          markersize=4, capsize=2, linewidth=1.3, label="KD, 95 %")
            doubted = [(p["step"], p["KD"][name]["value"]) for p in points
                       if p["copying"]["suspected"] is not False]
            if doubted:
                axes.plot(*zip(*doubted), "x", color=ACCENT, markersize=9, markeredgewidth=2,
                          label="copying not excluded")
            axes.set(title=f"KD to held-out, {name}")
            axes.set_yscale("symlog", linthresh=max(2 * abs(band["high"]), 1e-9))
        shares, ratios, gaps = panels[:3, 1]
        for space, (marker, line, colour) in zip(range(len(spaces)), LINES * len(spaces)):
            own = [p["copying"]["spaces"][space] for p in points]
            style = {"marker": marker, "linestyle": line, "color": colour, "markersize": 4,
                     "linewidth": 1.3}
            shares.errorbar(steps, [100 * s["near_share"] for s in own],
                            100 * np.array(_bars(own, "near_share", "near_low", "near_high")),
                            capsize=2, label=spaces[space], **style)
            ratios.plot(steps, [s["q50"] for s in own], label=spaces[space], **style)
        shares.axhline(5, color=PALE, linewidth=1)
        shares.set(title="near to a training image, %; held-out: 5", ylim=(0, None))
        ratios.axhline(1, color=PALE, linewidth=1)
        ratios.set(title="q: nearest training by nearest held-out; no copies: 1")
        seen = [(line["step"], 100 * line["gap"], 100 * line["gap_low"]) for line in log
                if line.get("gap") is not None]
        if seen:
            at, gap, low = zip(*seen)
            gaps.plot(at, gap, marker=".", color=INK, linewidth=1.3,
                      label="gap: held-out / training loss − 1")
            gaps.fill_between(at, low, gap, color=PALE, alpha=0.35, linewidth=0,
                              label="gap, to its 95 % lower bound")
        gaps.axhline(0, color=PALE, linewidth=1)
        gaps.set(title="gap of the denoising losses, %", xlabel="step")
        _finish(panels, len(result["floors"]), result["choice"]["step"])
        return _png(figure, transparent=False)


def heat_map(values: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str],
             marks: Sequence[Sequence[str]]) -> bytes:
    """Values as numbers on squares that darken with their root; None is an empty square with a
    dash. Grey alone, so that it prints; marks follow the number."""
    grid = np.array([[np.nan if v is None else v for v in line] for line in values], float)
    shade = np.sqrt(np.clip(grid, 0, None))
    shade = shade / (np.nanquantile(shade, 0.97) or 1.0) if np.isfinite(shade).any() else shade
    with styled():
        figure, axes = pyplot().subplots(figsize=(WIDTH, 1.6 + 0.235 * len(down)),
                                         layout="constrained")
        axes.imshow(np.clip(shade, 0, 1), cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
        for i, j in np.ndindex(grid.shape):
            dark = np.isfinite(shade[i, j]) and shade[i, j] > 0.6
            text = f"{_number(grid[i, j])}{marks[i][j]}" if np.isfinite(grid[i, j]) else "–"
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5,
                      color="white" if dark else INK)
        axes.set_xticks(range(len(across)), across, rotation=40, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(down)), down)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        return _png(figure)


def matrix_maps(found: dict) -> list[tuple[str, bytes]]:
    """From matrix.json, for each extractor the distances of every set to every real one."""
    rows, columns = ([s for s in found[side] if not s["too_few"]] for side in ("rows", "columns"))
    names = [s["name"] + (" (synthetic)" if s["kind"] == "synthetic" else "") for s in columns]
    maps = []
    for extractor in (e["name"] for e in found["extractors"]):
        at = {(c["row"], c["column"]): c for c in found["cells"] if c["extractor"] == extractor}
        cells = [[at[r["name"], c["name"]] for r in rows] for c in columns]
        own = [[r["part"] == "held-out" and r["label"] == c["label"] and c["kind"] != "real"
                for r in rows] for c in columns]
        marks = [[("◂" if is_own else "") + ("†" if cell["confounded"] else "")
                  for is_own, cell in zip(*line)] for line in zip(own, cells)]
        maps.append((extractor, heat_map([[cell.get("KD") for cell in line] for line in cells],
                                         names, [r["name"] for r in rows], marks)))
    return maps


def _number(x: float) -> str:
    text = f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
    return text.replace("-", "−")


def _places(rows: Sequence[dict]) -> dict[tuple[str, str], float]:
    """Height of every row, with a gap between labels."""
    places, y, before = {}, -1.0, None
    for key in dict.fromkeys((r["label"], r["set"]) for r in rows):
        y += 1.0 if key[0] == before or before is None else 1.7
        places[key], before = y, key[0]
    return places


def _soft_scale(axes, rows: Sequence[dict], metric: str) -> None:
    """Linear near 0, where real against real lies, and logarithmic beyond: KD may be negative,
    other labels are far.
    """
    near = [abs(r[BANDS[metric]][side]) for r in rows
            if BANDS[metric] in r for side in ("low", "high")]
    far = max((r[f"{metric}_high"] for r in rows), default=0)
    if near and far > 8 * max(near) > 0:
        axes.set_xscale("symlog", linthresh=2 * max(near), linscale=1.0)
        axes.tick_params(axis="x", labelsize=8)


def _panels(columns: int, height: float, sharey: bool = True):
    return pyplot().subplots(1, columns, figsize=(WIDTH, height), sharey=sharey, squeeze=False,
                             layout="constrained")


def _colour(name: str) -> str:
    return ACCENT if name == "synthetic" else INK if name == "real" else PALE


def _finish(panels: np.ndarray, used: int, chosen: int | None) -> None:
    for axes in panels[used:, 0]:
        axes.set_axis_off()
    panels[used - 1, 0].set_xlabel("step")
    panels[used - 1, 0].tick_params(labelbottom=True)
    for axes in (*panels[:used, 0], *panels[:3, 1]):
        if chosen is not None:
            axes.axvline(chosen, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)),
                         label=f"take step {chosen}")
        axes.grid(alpha=0.25)
    marks = [axes.get_legend_handles_labels() for axes in (panels[0, 0], *panels[:3, 1])]
    named = {name: handle for handles, names in marks for handle, name in zip(handles, names)}
    panels[0, 0].figure.legend(named.values(), named, loc="outside lower center", ncols=4,
                               frameon=False, fontsize=8)


def _bars(rows: Sequence[dict], value: str, low: str, high: str) -> list[list[float]]:
    """Lengths of error bars to both sides, (2, n); none where a percentile interval leaves its own
    value out.
    """
    return [[max(0.0, r[value] - r[low]) for r in rows],
            [max(0.0, r[high] - r[value]) for r in rows]]


def _png(figure, transparent: bool = True) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, transparent=transparent, metadata={"Software": None})
    pyplot().close(figure)
    return out.getvalue()
