"""The charts of the study: numbers in, PNG bytes out. Arms are told apart by colour and by mark or
line.

Synthetic: red diamonds. Duplicates, the control: squares, grey lines. Real alone: dark dots. Where
a trivial feature tells a label, every chart says SHORTCUT across itself, so that it still does when
it is copied out of the page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from minidiff.evaluation.pages.charts import ACCENT, INK, PALE, WIDTH, _png, pyplot, styled

COLOURS, MARKS = {"synthetic": ACCENT, "duplicates": "#6d808a",
                  None: INK}, {"synthetic": "D", "duplicates": "s", None: "o"}
DASHES = ("-", "--", ":", "-.", (0, (7, 2)), (0, (1, 3)), (0, (5, 1, 1, 1)), (0, (9, 2, 2, 2)))
COLUMNS = 3  # panels side by side, at most


def forest(points: Mapping[str, Sequence[dict]], kinds: Mapping[str, str | None], xlabel: str,
           shortcut: bool, against: float | None = None) -> bytes:
    """A panel for each test set, on one scale: of each row the value, its interval as a line,
    single seeds as pale dots.

    points: test set → [{"name", "arm", "value", "interval", "seeds": […], "resolved": hollow if
    False}], in the same order; `against` draws a line to be read against, e.g. 0 of differences, or
    the value of the first arm where it is None.
    """
    names = list(dict.fromkeys(p["name"] for own in points.values() for p in own))
    with styled():
        figure, panels = _grid(len(points), 0.9 + 0.27 * len(names), True)
        for axes, (title, own) in zip(panels, points.items()):
            shown = [p for p in own if p["value"] is not None]
            line = against if against is not None else next((p["value"] for p in shown
                                                             if kinds.get(p["arm"]) is None), None)
            if line is not None:
                axes.axvline(line, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
            for p in shown:
                y, kind = names.index(p["name"]), kinds.get(p["arm"])
                colour, mark = COLOURS[kind], MARKS[kind]
                seeds = [s for s in p.get("seeds", ()) if s is not None]
                axes.plot(seeds, [y + 0.26] * len(seeds), mark, color=colour, alpha=0.45,
                          markersize=3, markeredgewidth=0)
                if None not in p["interval"]:
                    axes.plot(p["interval"], [y, y], color=colour, linewidth=1.8,
                              solid_capstyle="butt")
                axes.plot(p["value"], y, mark, color=colour, markersize=6,
                          markerfacecolor=colour if p.get("resolved", True) else "white")
            axes.set(title=title, xlabel=xlabel)
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=6)
            axes.grid(axis="x", alpha=0.3)
        return _done(figure, shortcut)


def roc(curves: Mapping[str, Mapping[str, Sequence]], titles: Mapping[str, str],
        kinds: Mapping[str, str | None], shortcut: bool) -> bytes:
    """A panel for each test set, a line for each arm, the diagonal for guessing."""
    lines = _lines(curves, kinds)
    with styled():
        figure, panels = _grid(len(curves), 3.7)
        for axes, (name, arms) in zip(panels, curves.items()):
            axes.plot([0, 1], [0, 1], color=PALE, linewidth=0.8)
            for arm, corners in arms.items():
                if corners:
                    axes.plot(*zip(*corners), **lines[arm], label=arm)
            axes.set(title=titles[name], xlabel="1 − specificity", ylabel="sensitivity")
            axes.axis((-0.02, 1.02, -0.02, 1.02))
            axes.set_box_aspect(1)
            axes.grid(alpha=0.25)
        return _done(figure, shortcut, panels)


def reliability(arms: Mapping[str, Mapping], kinds: Mapping[str, str | None],
                shortcut: bool) -> bytes:
    """A small panel for each arm: share right against confidence with Wilson's intervals; hollow
    after the temperature.
    """
    with styled():
        figure, panels = _grid(len(arms), 2.1, True, 5)
        for axes, (arm, found) in zip(panels, arms.items()):
            axes.plot([0, 1], [0, 1], color=PALE, linewidth=0.8)
            colour = COLOURS[kinds.get(arm)]
            for bins, face in ((found["bins_scaled"], "white"), (found["bins"], colour)):
                at = np.array([[b["confidence"], b["share"], b["low"], b["high"]] for b in bins]).T
                axes.plot(at[0], at[1], "o", color=colour, markerfacecolor=face, markersize=3.8,
                          markeredgewidth=0.9)
            axes.vlines(at[0], at[2], at[3], color=colour, linewidth=0.9)
            axes.set(xlim=(-0.03, 1.05), ylim=(-0.03, 1.03), xlabel="confidence",
                     ylabel="share right")
            axes.set_title(arm, fontsize=8)
            axes.label_outer()
            axes.set_box_aspect(1)
            axes.grid(alpha=0.25)
        return _done(figure, shortcut)


def selective(curves: Mapping[str, Mapping[str, Sequence[dict]]], titles: Mapping[str, str],
              kinds: Mapping[str, str | None], shortcut: bool) -> bytes:
    """A panel for each test set: accuracy of the images kept, the most certain first; a band for
    the first arm.
    """
    lines = _lines(curves, kinds)
    with styled():
        figure, panels = _grid(len(curves), 3.2)
        for axes, (name, arms) in zip(panels, curves.items()):
            for k, (arm, curve) in enumerate(arms.items()):
                kept, accuracy, low, high = (np.array([100 * row[key] for row in curve])
                                             for key in ("kept", "accuracy", "low", "high"))
                axes.plot(kept, accuracy, **lines[arm], label=arm)
                if k == 0:
                    axes.fill_between(kept, low, high, color=PALE, alpha=0.25, linewidth=0)
            axes.set(title=titles[name], xlabel="most certain images kept, %",
                     ylabel="accuracy of these, %")
            axes.grid(alpha=0.25)
        return _done(figure, shortcut, panels)


def courses(curves: Mapping[str, Sequence], kinds: Mapping[str, str | None]) -> bytes:
    """Validation loss at each look, a line for each arm; they were chosen by its lowest point."""
    lines = _lines({"": curves}, kinds)
    with styled():
        figure, panels = _grid(1, 3.2)
        for arm, looks in curves.items():
            looks = [(step, loss) for step, loss in looks if loss is not None]
            if looks:
                panels[0].plot(*zip(*looks), **lines[arm], label=arm)
        panels[0].set(xlabel="optimiser step", ylabel="validation loss, mean over seeds")
        panels[0].grid(alpha=0.25)
        return _done(figure, False, panels)


def _lines(curves: Mapping[str, Mapping], kinds: Mapping[str, str | None]) -> dict[str, dict]:
    """Of each arm the line: colour by kind, dashes in turn within a kind."""
    found: dict[str, dict] = {}
    for arm in dict.fromkeys(arm for arms in curves.values() for arm in arms):
        before = sum(kinds.get(other) == kinds.get(arm) for other in found)
        found[arm] = {"color": COLOURS[kinds.get(arm)], "linestyle": DASHES[before % len(DASHES)],
                      "linewidth": 1.2 if before < len(DASHES) else 2.2}
    return found


def _grid(n: int, height: float, shared: bool = False, columns: int = COLUMNS):
    """n panels, at most `columns` side by side, each `height` inches high; (figure, the n axes)."""
    across = min(n, columns)
    down = math.ceil(n / across)
    figure, panels = pyplot().subplots(down, across, figsize=(WIDTH, height * down), sharex=shared,
                                       sharey=shared, squeeze=False, layout="constrained")
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    if shared:
        for axes in panels.flat[max(0, n - across) : n]:  # the lowest of each column
            axes.tick_params(labelbottom=True)
    return figure, panels.flat[:n]


def _done(figure, shortcut: bool, panels: Sequence = ()) -> bytes:
    """PNG, with one legend below for all panels, and SHORTCUT across it."""
    named = {name: handle for axes in panels
             for handle, name in zip(*axes.get_legend_handles_labels())}
    if len(named) > 1:
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False,
                      fontsize=8, handlelength=3.2)
    if shortcut:
        figure.text(0.5, 0.5, "SHORTCUT", rotation=14, ha="center", va="center", color=ACCENT,
                    alpha=0.16, fontsize=min(64, 26 * figure.get_figheight()))
    return _png(figure)
