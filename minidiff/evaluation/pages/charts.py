"""The charts of the pages, in three forms: numbers in, PNG bytes out.

    points      rows of values with their intervals, over the bands in which real images lie
    lines       values over x with bands
    heat_map    a table of numbers on squares

Everything is told apart by its mark or its line as well as by its colour.
"""

import io
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from minidiff.evaluation.format import distance_names

ACCENT, INK, PALE, RED = "#2b6080", "#22303a", "#8fa3ad", "#a8321a"
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "text.color": INK, "axes.edgecolor": PALE,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.titlesize": 10, "axes.titlelocation": "left"}
WIDTH = 9.6  # inches
COLUMNS = 3  # panels side by side, at most
LOOKS = {"synthetic": (ACCENT, "D"), "real": (INK, "o"), "duplicates": ("#6d808a", "s"),
         "other": (PALE, "X")}  # kind of a row of `points`: its colour and mark
STROKES = [{"color": INK, "marker": "o"}, {"color": ACCENT, "marker": "s", "linestyle": "--"},
           {"color": "#6d808a", "marker": "^", "linestyle": ":"},
           {"color": PALE, "marker": "D", "linestyle": "-."}]  # of lines


def pyplot():
    """matplotlib without a window, imported at first use: the import takes half a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def styled():
    """The look of all charts, as a context."""
    return pyplot().rc_context(STYLE)


def points(panels: Mapping[str, Sequence[Mapping]], xlabel: str = "") -> bytes:
    """A panel for each title; all share their rows.

    A row is {"name", "value"} and may have "ends" of an interval, "band" (low, high), "draws"
    (single values behind it), "kind" (of LOOKS), and "group": rows of one group stand together.
    """
    rows = dict.fromkeys((p.get("group", ""), p["name"]) for own in panels.values() for p in own)
    groups, firsts = list(dict.fromkeys(group for group, _ in rows)), dict(reversed(list(rows)))
    places = {row: k + 0.7 * groups.index(row[0]) for k, row in enumerate(rows)}
    names = [f"{group}  ·  {name}" if group and firsts[group] == name else name
             for group, name in rows]
    bottom = max(places.values(), default=0) + 0.8
    with styled():
        figure, grid = subplots(len(panels), 1.1 + 0.24 * bottom, sharey=True)
        for axes, (title, own) in zip(grid, panels.items()):
            for p in own:
                _row(axes, p, places[p.get("group", ""), p["name"]])
            near = max((abs(end) for p in own for end in p.get("band") or ()), default=0)
            far = max((p["ends"][1] or 0 for p in own if "ends" in p), default=0)
            if 0 < 8 * near < far:   # values lie far beyond the bands: logarithmic out there
                axes.set_xscale("symlog", linthresh=2 * near, linscale=1.0)
                axes.tick_params(axis="x", labelsize=8)
            axes.set(title=title, xlabel=xlabel, ylim=(bottom, -0.8))
            axes.set_yticks(list(places.values()), names)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.3)
        return _png(figure)


def lines(panels: Sequence[Mapping], height: float = 2.6, columns: int = COLUMNS,
          transparent: bool = True) -> bytes:
    """The panels, row by row, with one legend below for all.

    A panel is {"title", "lines"} and may have "bands" {name: (low, high)}, "levels" (thin
    horizontal lines), "at" {name: x} (dashed vertical lines), "near" (y is linear to here and
    logarithmic beyond) and "settings" of matplotlib's axes. A line is {"name", "x", "y"} and may
    have "low" and "high" and a "look", as of STROKES.
    """
    with styled():
        figure, grid = subplots(len(panels), height, columns=columns)
        for axes, panel in zip(grid, panels):
            for name, (low, high) in panel.get("bands", {}).items():
                axes.axhspan(low, high, color=PALE, alpha=0.35, linewidth=0, label=name)
            for y in panel.get("levels", ()):
                axes.axhline(y, color=PALE, linewidth=1)
            for name, x in panel.get("at", {}).items():
                axes.axvline(x, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), label=name)
            for line in panel["lines"]:
                look = {"markersize": 4, "linewidth": 1.4, **line.get("look", {})}
                (drawn,) = axes.plot(line["x"], line["y"], label=line["name"], **look)
                if "low" in line:
                    axes.fill_between(line["x"], line["low"], line["high"], alpha=0.15,
                                      facecolor=drawn.get_color(), linewidth=0)
            axes.set(title=panel["title"], **panel.get("settings", {}))
            if "near" in panel:
                axes.set_yscale("symlog", linthresh=panel["near"])
            axes.xaxis.minorticks_off()
            axes.grid(alpha=0.25)
        legend(figure, grid)
        return _png(figure, transparent)


def heat_map(values: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str],
             marks: Sequence[Sequence[str]]) -> bytes:
    """Values as numbers on squares that darken with their root; None is an empty square with a
    dash. Shades of grey only, so that it prints; marks follow the number."""
    grid = np.array(values, float)
    shade = np.sqrt(np.clip(grid, 0, None))
    shade = shade / (np.nanquantile(shade, 0.97) or 1.0) if np.isfinite(shade).any() else shade
    with styled():
        figure, axes = pyplot().subplots(figsize=(WIDTH, 1.6 + 0.235 * len(down)),
                                         layout="constrained")
        axes.imshow(np.clip(shade, 0, 1), cmap="Greys", vmin=0, vmax=1.15, aspect="auto")
        for i, j in np.ndindex(grid.shape):
            text = f"{_number(grid[i, j])}{marks[i][j]}" if np.isfinite(grid[i, j]) else "–"
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5,
                      color="white" if shade[i, j] > 0.6 else INK)
        axes.set_xticks(range(len(across)), across, rotation=40, ha="left", rotation_mode="anchor")
        axes.set_yticks(range(len(down)), down)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        return _png(figure)


def matrix_maps(found: Mapping) -> list[tuple[str, bytes]]:
    """From matrix.json, for each extractor the distances of every set to every real one."""
    rows, columns = ([s for s in found[side] if not s.get("too_few", s.get("grey"))]
                     for side in ("rows", "columns"))
    names = [s["name"] + (" (synthetic)" if s["kind"] == "synthetic" else "") for s in columns]
    own = {(r["name"], c["name"]) for r in rows for c in columns if r["part"] == "held-out"
           and r["label"] == c["label"] and c["kind"] != "real"}
    at = {(c["extractor"], c["row"], c["column"]): c for c in found["cells"]}
    grids = {e["name"]: [[at[e["name"], r["name"], c["name"]] for r in rows] for c in columns]
             for e in found["extractors"]}
    marks = {(row, column): ("◂" if (row, column) in own else "") + ("†" if c["confounded"] else "")
             for (_, row, column), c in at.items()}
    return [(name, heat_map([[cell.get("KD") for cell in line] for line in grid], names,
                            [r["name"] for r in rows],
                            [[marks[cell["row"], cell["column"]] for cell in line]
                             for line in grid]))
            for name, grid in grids.items()]


def course_chart(result: dict, log: Sequence[dict]) -> bytes:
    """From monitor.json: distances over their floors, and the signs of copying, by step."""
    points, chosen, test = result["points"], result["choice"]["step"], result["test"]
    shared = {"at": {} if chosen is None else {f"take step {chosen}": chosen},
              "settings": {"xlabel": "optimiser step"}}

    def line(name: str, rows: Sequence[dict], look: Mapping, unit: float = 1, **keys: str) -> dict:
        """Through the rows, by step; `keys` name what is y, and what is low and high."""
        return {"name": name, "x": [row["step"] for row in rows], "look": look,
                **{end: [unit * row[key] for row in rows] for end, key in keys.items()}}

    panels = []
    for name, band in result["floors"].items():
        own = [{**p, **p["KD"][name]} for p in points]
        drawn = [line("distance, 95 %", own, STROKES[0], y="value", low="low", high="high"),
                 line("copying not excluded",
                      [p for p in own if p["copying"]["suspected"] is not False],
                      {"color": RED, "marker": "x", "linestyle": "", "markersize": 9}, y="value"),
                 line("taken, on test images",
                      [{**test, **test["KD"][name]}] if "KD" in test else [],
                      {"color": ACCENT, "marker": "D", "markersize": 6}, y="value")]
        panels.append({"title": f"{distance_names(name)[0]} to validation images, {name}", **shared,
                       "lines": [one for one in drawn if one["x"]],
                       "bands": {"floor (real against real), 5–95 %": (band["low"], band["high"])},
                       "near": max(2 * abs(band["high"]), 1e-9)})
    spaces = zip(*([{**s, "step": p["step"]} for s in p["copying"]["spaces"]] for p in points))
    spaces = [(own[0]["space"], own, look) for own, look in zip(spaces, itertools.cycle(STROKES))]
    gap = line("held-out / training loss − 1, to its 95 % lower bound",
               [row for row in log if row.get("gap") is not None], STROKES[0], 100,
               y="gap", low="gap_low", high="gap")
    panels += [{"title": "near to a training image, %; held-out: 5", "levels": [5],
                "lines": [line(*space, 100, y="near_share", low="near_low", high="near_high")
                          for space in spaces],
                **shared, "settings": {"xlabel": "optimiser step", "ylim": (0, None)}},
               {"title": "q: nearest training by nearest held-out; no copies: 1", "levels": [1],
                "lines": [line(*space, y="q50") for space in spaces], **shared},
               {"title": "gap of the denoising losses, %", "lines": [gap], "levels": [0], **shared}]
    return lines(panels, height=2.4, columns=2, transparent=False)


def _row(axes, p: Mapping, y: float) -> None:
    """One row of `points`: its band hatched, its interval as a line, its value as a mark."""
    colour, mark = LOOKS[p.get("kind", "real")]
    if p.get("band"):
        axes.fill_betweenx([y - 0.5, y + 0.5], *p["band"], facecolor="none", edgecolor=PALE,
                           hatch="////", alpha=0.55, linewidth=0)
    draws = p.get("draws", ())
    axes.plot(draws, [y] * len(draws), mark, color=colour, alpha=0.4, markersize=4,
              markeredgewidth=0)
    if None not in p.get("ends", [None]):
        axes.plot(p["ends"], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    if p["value"] is not None:
        axes.plot(p["value"], y, mark, color=colour, markersize=5.5)


def subplots(n: int, height: float, columns: int = COLUMNS, **shared: bool):
    """n panels, at most `columns` side by side, each `height` inches high: (figure, the n axes)."""
    across = max(1, min(n, columns))
    down = max(1, math.ceil(n / across))
    figure, panels = pyplot().subplots(down, across, figsize=(WIDTH, height * down), **shared,
                                       squeeze=False, layout="constrained")
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    return figure, panels.flat[:n]


def legend(figure, panels: Sequence) -> None:
    """One below all panels, where it tells at least two things apart."""
    named = {name: handle for axes in panels
             for handle, name in zip(*axes.get_legend_handles_labels())}
    if len(named) > 1:
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False,
                      fontsize=8, handlelength=3.2)


def _number(x: float) -> str:
    """At least three digits."""
    return f"{x:.{max(0, 3 - len(str(int(abs(x)))))}f}".replace("-", "−")


def _png(figure, transparent: bool = True) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, transparent=transparent, metadata={"Software": None})
    pyplot().close(figure)
    return out.getvalue()
