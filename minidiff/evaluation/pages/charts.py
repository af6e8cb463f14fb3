"""The charts of the pages, in three forms: numbers in, PNG bytes out.

    points      rows of values with their intervals, over the bands in which real images lie
    lines       values over x with bands
    heat_map    a table of numbers on squares

Everything is told apart by its mark or its line as well as by its colour.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ACCENT, INK, PALE = "#2b6080", "#22303a", "#8fa3ad"
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "text.color": INK, "axes.edgecolor": PALE,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.titlesize": 10, "axes.titlelocation": "left"}
WIDTH = 9.6  # inches
COLUMNS = 3  # panels side by side, at most
LOOKS = {"synthetic": (ACCENT, "D"), "real": (INK, "o"), "duplicates": ("#6d808a", "s"),
         "other": (PALE, "X")}  # kind of a point: its colour and mark
STROKES = (("o", "-", INK), ("s", "--", ACCENT), ("^", ":", "#6d808a"), ("D", "-.", PALE))


@dataclass(frozen=True)
class Point:
    """One row of `points`: a value, its interval, the band to read it against, and single draws."""

    name: str
    value: float | None
    interval: Sequence[float | None] = (None, None)
    band: Sequence[float] | None = None
    draws: Sequence[float] = ()   # such as one for each seed, as pale marks
    kind: str = "real"            # a key of LOOKS
    group: str = ""               # rows of one group stand together, under its name


@dataclass(frozen=True)
class Line:
    """One line of a panel; low and high bound the band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    look: Mapping[str, Any] = field(default_factory=dict)   # of matplotlib's plot


@dataclass(frozen=True)
class Panel:
    """One panel of `lines`."""

    title: str
    lines: Sequence[Line]
    bands: Mapping[str, tuple[float, float]] = field(default_factory=dict)   # name → low, high
    levels: Sequence[float] = ()                             # thin horizontal lines
    at: Mapping[str, float] = field(default_factory=dict)    # named dashed vertical lines
    near: float | None = None    # y is linear to here and logarithmic beyond
    settings: Mapping[str, Any] = field(default_factory=dict)   # of matplotlib's axes.set


def pyplot():
    """matplotlib without a window, imported at first use: the import takes half a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def styled():
    """The look of all charts, as a context."""
    return pyplot().rc_context(STYLE)


def points(panels: Mapping[str, Sequence[Point]], xlabel: str = "",
           against: float | None = None) -> bytes:
    """A panel for each title; all share the rows. `against` draws a line to read the values by.

    The scale is linear where the bands lie and logarithmic beyond, where values lie far from them.
    """
    rows = _places(p for own in panels.values() for p in own)
    with styled():
        figure, grid = _grid(len(panels), 1.1 + 0.24 * (max(rows.values(), default=0) + 1),
                             sharey=True)
        for axes, (title, own) in zip(grid, panels.items()):
            for p in own:
                _draw(axes, p, rows[p.group, p.name])
            if against is not None:
                axes.axvline(against, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            _soft_scale(axes, own)
            axes.set(title=title, xlabel=xlabel, ylim=(max(rows.values(), default=0) + 0.8, -0.8))
            axes.set_yticks(list(rows.values()), _row_names(rows))
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", alpha=0.3)
        return _png(figure)


def lines(panels: Sequence[Panel], height: float = 2.6, columns: int = COLUMNS,
          transparent: bool = True) -> bytes:
    """The panels, row by row, with one legend below for all."""
    with styled():
        figure, grid = _grid(len(panels), height, columns=columns)
        for axes, panel in zip(grid, panels):
            for name, (low, high) in panel.bands.items():
                axes.axhspan(low, high, color=PALE, alpha=0.35, linewidth=0, label=name)
            for y in panel.levels:
                axes.axhline(y, color=PALE, linewidth=1)
            for name, x in panel.at.items():
                axes.axvline(x, color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), label=name)
            for line in panel.lines:
                (drawn,) = axes.plot(line.x, line.y, **{"markersize": 4, "linewidth": 1.4,
                                                        "label": line.name, **line.look})
                if line.low is not None:
                    axes.fill_between(line.x, line.low, line.high, facecolor=drawn.get_color(),
                                      alpha=0.15, linewidth=0)
            axes.set(title=panel.title, **panel.settings)
            if panel.near:
                axes.set_yscale("symlog", linthresh=panel.near)
            axes.xaxis.minorticks_off()
            axes.grid(alpha=0.25)
        _legend(figure, grid)
        return _png(figure, transparent)


def heat_map(values: Sequence[Sequence[float | None]], down: Sequence[str], across: Sequence[str],
             marks: Sequence[Sequence[str]]) -> bytes:
    """Values as numbers on squares that darken with their root; None is an empty square with a
    dash. Shades of grey only, so that it prints; marks follow the number."""
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


def matrix_maps(found: Mapping) -> list[tuple[str, bytes]]:
    """From matrix.json, for each extractor the distances of every set to every real one."""
    rows, columns = ([s for s in found[side] if not s.get("too_few", s.get("grey"))]
                     for side in ("rows", "columns"))
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


def course_chart(result: dict, log: Sequence[dict]) -> bytes:
    """From monitor.json: distances over their floors, and the signs of copying, by step."""
    points, steps = result["points"], [p["step"] for p in result["points"]]
    chosen = result["choice"]["step"]
    at = {} if chosen is None else {f"take step {chosen}": chosen}

    def course(name: str, rows: Sequence[dict], keys: Sequence[str], unit: float, stroke: int):
        marker, style, colour = STROKES[stroke % len(STROKES)]
        ends = [[unit * row[key] for row in rows] for key in keys]
        return Line(name, steps, *ends, look={"marker": marker, "ls": style, "color": colour})

    panels = []
    for name, band in result["floors"].items():
        own = course("KD, 95 %", [p["KD"][name] for p in points], ("value", "low", "high"), 1, 0)
        doubted = [(p["step"], y) for p, y in zip(points, own.y)
                   if p["copying"]["suspected"] is not False]
        marked = [Line("copying not excluded", *zip(*doubted), look={
            "marker": "x", "ls": "", "color": "#a8321a", "markersize": 9})] if doubted else []
        panels.append(Panel(f"KD to held-out, {name}", [own, *marked], at=at, bands={
            "KD of real against real, 5–95 %": (band["low"], band["high"])},
            near=max(2 * abs(band["high"]), 1e-9)))
    spaces = list(enumerate(s["space"] for s in points[0]["copying"]["spaces"]))
    rows = [[p["copying"]["spaces"][k] for p in points] for k, _ in spaces]
    panels.append(Panel("near to a training image, %; held-out: 5", [
        course(name, rows[k], ("near_share", "near_low", "near_high"), 100, k)
        for k, name in spaces], levels=[5], at=at, settings={"ylim": (0, None)}))
    panels.append(Panel("q: nearest training by nearest held-out; no copies: 1", [
        course(name, rows[k], ("q50",), 1, k) for k, name in spaces], levels=[1], at=at))
    gaps = [line for line in log if line.get("gap") is not None]
    gap, low = ([100 * line[key] for line in gaps] for key in ("gap", "gap_low"))
    panels.append(Panel("gap of the denoising losses, %", [Line(
        "gap: held-out / training loss − 1, and its 95 % lower bound", [g["step"] for g in gaps],
        gap, low, gap, look={"marker": ".", "color": INK})], levels=[0], at=at))
    return lines(panels, height=2.4, columns=2, transparent=False)


def _draw(axes, p: Point, y: float) -> None:
    """One row: its band hatched, its interval as a line, its value as a mark."""
    colour, mark = LOOKS[p.kind]
    if p.band:
        axes.fill_betweenx([y - 0.5, y + 0.5], *p.band, facecolor="none", edgecolor=PALE,
                           hatch="////", alpha=0.55, linewidth=0)
    axes.plot(p.draws, [y] * len(p.draws), mark, color=colour, alpha=0.4, markersize=4,
              markeredgewidth=0)
    if None not in p.interval:
        axes.plot(p.interval, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    if p.value is not None:
        axes.plot(p.value, y, mark, color=colour, markersize=5.5)


def _soft_scale(axes, own: Sequence[Point]) -> None:
    near = max((abs(end) for p in own for end in p.band or ()), default=0)
    far = max((p.interval[1] for p in own if p.interval[1] is not None), default=0)
    if 0 < 8 * near < far:
        axes.set_xscale("symlog", linthresh=2 * near, linscale=1.0)
        axes.tick_params(axis="x", labelsize=8)


def _places(own) -> dict[tuple[str, str], float]:
    """(group, name) → height of the row, with a gap between groups."""
    places, y, before = {}, 0.0, None
    for group, name in dict.fromkeys((p.group, p.name) for p in own):
        y += 0.0 if before is None else 1.0 if group == before else 1.7
        places[group, name], before = y, group
    return places


def _row_names(rows: Mapping[tuple[str, str], float]) -> list[str]:
    """The name of each row; the first of a group carries the group's, too."""
    firsts = dict(reversed(list(rows)))
    return [f"{group}  ·  {name}" if group and firsts[group] == name else name
            for group, name in rows]


def _grid(n: int, height: float, sharey: bool = False, columns: int = COLUMNS):
    """n panels, at most `columns` side by side, each `height` inches high: (figure, the n axes)."""
    across = max(1, min(n, columns))
    down = max(1, math.ceil(n / across))
    figure, panels = pyplot().subplots(down, across, figsize=(WIDTH, height * down), sharey=sharey,
                                       squeeze=False, layout="constrained")
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    return figure, panels.flat[:n]


def _legend(figure, panels) -> None:
    """One legend below for all panels; what has a name once is listed once."""
    named = {name: handle for axes in panels
             for handle, name in zip(*axes.get_legend_handles_labels())}
    if len(named) > 1:
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False,
                      fontsize=8, handlelength=3.2)


def _number(x: float) -> str:
    text = f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else f"{x:.2f}"
    return text.replace("-", "−")


def _png(figure, transparent: bool = True) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, transparent=transparent, metadata={"Software": None})
    pyplot().close(figure)
    return out.getvalue()
