"""The pictures of a study as PNG: charts of its numbers, and images with their Grad-CAM.

Arms are told apart by colour, mark and line. Where there is a shortcut, every chart says so in its
margin, so that it still does after it is copied out of the page.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minidiff.classification.arms import Images
from minidiff.classification.gradcam import gradcam, overlay
from minidiff.classification.inputs import Inputs
from minidiff.classification.predictor import Predictor
from minidiff.data.images import png_bytes
from minidiff.evaluation.pages import charts
from minidiff.evaluation.pages.charts import ACCENT, INK, PALE, RED, WIDTH, _png, styled
from minidiff.runs import read_json

COLOURS = {"synthetic": ACCENT, "duplicates": PALE, "other": RED, None: INK}
MARKS = {"synthetic": "D", "duplicates": "s", "other": "X", None: "o"}
DASHES = ("-", "--", ":", "-.", (0, (7, 2)), (0, (1, 3)), (0, (5, 1, 1, 1)), (0, (9, 2, 2, 2)))
SHOWN = 8  # images of each kind in the gallery

Kinds = Mapping[str, str | None]  # arm → what was added to it


def forest(points: Mapping[str, Sequence[dict]], kinds: Kinds, xlabel: str, shortcut: bool, *,
           per_cent: bool = False, against: float | None = None) -> bytes:
    """A panel for each test set on one scale: values with intervals, single seeds below in pale.

    points: test set → [{"name", "arm", "value", "interval", "seeds", "resolved": hollow if False}].
    `against` is where a line is drawn; without it, at the first arm of real images alone.
    """
    names = list(dict.fromkeys(p["name"] for own in points.values() for p in own))
    with styled():
        figure, panels = charts.subplots(len(points), 0.9 + 0.27 * len(names), sharex=True,
                                         sharey=True)
        for axes, (title, own) in zip(panels, points.items()):
            shown = [p for p in own if p["value"] is not None]
            real = [p["value"] for p in shown if kinds.get(p["arm"]) is None]
            for x in real[:1] if against is None else [against]:
                axes.axvline(x, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
            for p in shown:
                _forest_row(axes, names.index(p["name"]), p, kinds.get(p["arm"]))
            axes.set(title=title, xlabel=xlabel, ylim=(len(names) - 0.4, -0.6))
            axes.set_yticks(range(len(names)), names, fontsize=8)
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelbottom=True)
            axes.locator_params(axis="x", nbins=6)
            if per_cent:
                axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}".replace("-", "−"))
            axes.grid(axis="x", alpha=0.3)
        return _finish(figure, shortcut)


def _forest_row(axes, y: int, point: Mapping, kind: str | None) -> None:
    colour, mark = COLOURS[kind], MARKS[kind]
    seeds = [s for s in point["seeds"] if s is not None]
    axes.plot(seeds, [y + 0.26] * len(seeds), mark, color=colour, alpha=0.45, markersize=3,
              markeredgewidth=0)
    if None not in point["interval"]:
        axes.plot(point["interval"], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt")
    axes.plot(point["value"], y, mark, color=colour, markersize=6,
              markerfacecolor=colour if point.get("resolved", True) else "white")


def lines(panels: Mapping[str, Mapping[str, Sequence]], kinds: Kinds, xlabel: str, ylabel: str,
          shortcut: bool, *, bands: Mapping[str, Sequence] | None = None,
          square: bool = False, columns: int = 3, shares: Sequence[float] = ()) -> bytes:
    """A panel for each title, a line through the points (x, y) of each arm, or (x, y, low, high)
    with intervals.

    bands: title → (x, low, high), shaded. square: shares against shares, with the diagonal.
    shares: those to write below a logarithmic x axis, where arms stand a little side by side.
    """
    styles, height = line_styles(panels, kinds), 1.15 * WIDTH / columns if square else 3.2
    with styled():
        figure, axes_of = charts.subplots(len(panels), height, columns=columns)
        for axes, (title, arms) in zip(axes_of, panels.items()):
            axes.set(xlabel=xlabel, ylabel=ylabel)
            for k, (arm, points) in enumerate(arms.items()):
                if len(points):
                    x, y, *ends = zip(*points)
                    x = [v * 1.03 ** (k - len(arms) / 2 + 0.5) if shares else v for v in x]
                    axes.plot(x, y, **styles[arm], label=arm,
                              marker="." if len(points) < 15 else None)
                    if ends:
                        axes.vlines(x, *ends, color=styles[arm]["color"], linewidth=0.8)
            if shares:
                axes.set_xscale("log")
                axes.set_xticks(shares, [f"{x:g}" for x in shares])
                axes.minorticks_off()
            if bands:
                axes.fill_between(*bands[title], color=PALE, alpha=0.25, linewidth=0)
            if square:
                axes.plot([0, 1], [0, 1], color=PALE, linewidth=0.8)
                axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
                axes.label_outer()
            axes.set_title(title, fontsize=10 if columns == 3 else 8)
            axes.grid(alpha=0.25)
        return _finish(figure, shortcut, axes_of)


def line_styles(panels: Mapping[str, Mapping], kinds: Kinds) -> dict[str, dict]:
    """How each arm is drawn: a colour for each kind, dashes in turn within a kind."""
    found: dict[str, dict] = {}
    for arm in dict.fromkeys(arm for arms in panels.values() for arm in arms):
        before = sum(kinds.get(other) == kinds.get(arm) for other in found)
        found[arm] = {"color": COLOURS[kinds.get(arm)], "linestyle": DASHES[before % len(DASHES)],
                      "linewidth": 1.2 if before < len(DASHES) else 2.2}
    return found


def _finish(figure, shortcut: bool, panels: Sequence = ()) -> bytes:
    """PNG with one legend below all panels, and SHORTCUT above them."""
    charts.legend(figure, panels)
    if shortcut:
        figure.suptitle("SHORTCUT", color=RED, fontsize=9, fontweight="bold", x=0.99, ha="right")
    return _png(figure)


def gallery(data: Inputs, summary: Mapping, out: Path) -> dict[str, list[dict]]:
    """"hits", "misses" and "alarms" of the label of interest, as items of `cards` (macros.html).

    The classifier is the first seed of the arm with the lowest validation loss. Its answer is its
    likeliest label; of findings, which may be there together, each of probability .5 or more.
    Hits, misses and false alarms of which it was surest come first, from all test sets.
    """
    tuned = {row["arm"]: read_json(out / "arms" / row["arm"] / "tuned.json")
             for row in summary["arms"]}
    arm = min(tuned, key=lambda name: tuned[name]["val_loss"])
    predictor = Predictor.load(out / "arms" / arm / str(tuned[arm]["seeds"][0]))
    predictor.to(summary["recipe"]["device"])
    place, found = data.labels.index(summary["positive"]), {}
    for name, images in data.tests.items():
        p = predictor.predict(images.pixels)["label"].numpy()
        called = p.argmax(1) == place if data.exclusive else p[:, place] >= 0.5
        truth = data.truth(name)[:, place].numpy()
        for kind, which, sign in (("hits", truth & called, -1), ("misses", truth & ~called, 1),
                                  ("alarms", ~truth & called, -1)):
            found.setdefault(kind, []).extend(
                (sign * float(p[i, place]), name, int(i)) for i in which.nonzero()[0])
    return {kind: [_card(data.tests[name].take([i]), predictor, place,
                         [name, f"p({summary['positive']}) {abs(p):.2f}", f"by {arm}"])
                   for p, name, i in sorted(own)[:SHOWN]] for kind, own in found.items() if own}


def _card(image: Images, predictor: Predictor, place: int, lines: list[str]) -> dict:
    """The picture with its Grad-CAM below, on what the classifier is shown of it."""
    row, pixels = image.rows[0], image.pixels[:]
    warm = overlay(predictor.standard(pixels).cpu(), gradcam(predictor, pixels, place))
    warm = warm[0].transpose(2, 0, 1)
    return {"shots": [png_bytes(pixels[0, 0]), png_bytes(warm)],
            "lines": [row["label"], row["file_name"], *lines]}
