"""explain.html: a function of explain.json and of strips of pictures."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

from minidiff.evaluation.format import Table, fixed, num
from minidiff.evaluation.pages import render
from minidiff.evaluation.pages.charts import ACCENT, INK, STROKES, heat_map, lines

MOST = 24   # values whose cosines can still be read
LEVELS = {"xlabel": "σ", "xscale": "log"}
DOTS = {"color": ACCENT, "marker": "o", "linestyle": ""}


def page(result: Mapping, strips: Mapping[str, Sequence]) -> str:
    """The page; `strips`: of each figure [(title, [(name of a row, PNG of its pictures)])]."""
    f = result["figures"]
    charts = {name: lines(panels, height=2.9) for name, panels in panels_of(f).items()}
    if f["conditions"]:
        names = [f"{row['variable']} {row['value']}" for row in f["conditions"]["values"]][:MOST]
        charts["conditions"] = heat_map([row[:MOST] for row in f["conditions"]["cosine"][:MOST]],
                                        names, names, [[""] * len(names)] * len(names))
    return render("explain.html", result=result, f=f, charts=charts, strips=strips,
                  tables=tables(f))


def curve(name: str, x: Sequence, y: Sequence, **look: Any) -> dict:
    return {"name": name, "x": x, "y": y, "look": {"color": INK, "markersize": 3, **look}}


def curves(*named: tuple[str, Sequence, Sequence]) -> list[dict]:
    """A line for each (name, x, y), told apart by colour, mark and stroke."""
    return [curve(*each, **look) for each, look in zip(named, cycle(STROKES))]


def panels_of(f: Mapping[str, Mapping]) -> dict[str, list[dict]]:
    """Figure → the panels of its chart, for those that have one."""
    found = {"schedule": of_schedule(f["schedule"]), "loss": of_loss(f["loss"])}
    for name, values, title in (
            ("ladder", "left", "rms distance of D(x; σ) from the finished latents"),
            ("arrows", "length", "rms of D(y) − D(∅)")):
        if own := f[name]:
            found[name] = [{"title": title, "settings": LEVELS,
                            "lines": curves(*((title, own["sigma"], y) for title, y in zip(
                                own["names"], own[values])))}]
    if f["scales"]:
        found["scales"] = [{
            "title": "rms by which guidance moved D", "settings": LEVELS, "lines": curves(
                *((f"w = {row['scale']:g}", row["sigma"], row["moved"])
                  for row in f["scales"]["rows"] if row["scale"] > 1))}]
    z, e = f["latents"], f["errors"]
    middle = [(a + b) / 2 for a, b in pairwise(z["edges"])]
    normal = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in middle]
    found["latents"] = [{"title": "density of a channel's numbers", "settings": {"xlabel": "value"},
                         "lines": [curve("normal", middle, normal, linewidth=5, alpha=0.15)]
                         + curves(*((f"channel {k}", middle, y)
                                    for k, y in enumerate(z["density"])))}]
    samplers = {row["sampler"]: [r for r in e["rows"] if r["sampler"] == row["sampler"]]
                for row in e["rows"]}
    calls = sorted({row["calls"] for row in e["rows"]})
    found["errors"] = [{
        "title": f"rms distance from {e['reference']} steps of heun, in latents",
        "settings": {"xlabel": "calls of the network", "xscale": "log", "yscale": "log",
                     "xticks": calls, "xticklabels": calls},
        "lines": curves(*((name, [r["calls"] for r in own], [r["rms"] for r in own])
                          for name, own in samplers.items()))}]
    return found


def of_schedule(s: Mapping) -> list[dict]:
    bins, width = len(s["trained"]), (s["t"][-1] + 1) / len(s["trained"])
    rungs, often = s["rungs"], [bins * share for share in s["trained"]]
    return [
        {"title": "ᾱ", "settings": {"xlabel": "t"}, "lines": [
            curve("schedule", s["t"], s["alpha_bar"]),
            curve("rungs of the ladder", rungs["t"], [1 / (1 + x**2) for x in rungs["sigma"]],
                  **DOTS)]},
        {"title": "σ", "settings": {"xlabel": "t", "yscale": "log"}, "lines": [
            curve("schedule", s["t"], s["sigma"]),
            curve("rungs of the ladder", rungs["t"], rungs["sigma"], **DOTS)]},
        {"title": "how often t is trained; mean 1",
         "settings": {"xlabel": "t", "ylim": (0, 1.2 * max(often))}, "lines": [
             curve(f"--times {s['times']}", [(k + 0.5) * width for k in range(bins)], often,
                   linestyle="--")]}]


def of_loss(loss: Mapping) -> list[dict]:
    logged = [curve("log.jsonl, by quarter of t", [x for ends in pairwise(loss["quarters"])
                                                   for x in ends],
                    [y for y in loss["logged"] for _ in range(2)], color=ACCENT, linestyle="--")]
    return [
        {"title": "mean squared error of D", "settings": {**LEVELS, "yscale": "log"},
         "lines": curves(("model", loss["sigma"], loss["error"]),
                         ("best linear, number by number", loss["sigma"], loss["linear"]))},
        {"title": "loss of training", "settings": LEVELS, "lines": [
            curve("model", loss["sigma"], loss["trained"], marker="o"),
            *(logged if loss["logged"] else [])]}]


def tables(f: Mapping[str, Mapping]) -> dict[str, Table]:
    z, c = f["latents"], f["conditions"]
    return {
        "attention": Table(("layer", "cells", "share of conditions", "if all drew alike",
                            "reach", "if all drew alike"), [
            (row["layer"], row["cells"], *(fixed(row[key], 3) for key in (
                "share", "uniform", "reach", "uniform_reach")))
            for row in f["attention"].get("layers", ())]),
        "latents": Table(("channel", "mean", "standard deviation", *(
            f"correlation with {k}" for k in range(len(z["mean"])))), [
            (k, num(mean), num(std), *(fixed(r, 2) for r in row))
            for k, (mean, std, row) in enumerate(zip(z["mean"], z["std"], z["correlation"]))]),
        "conditions": Table(("variable", "value", "norm", "in norms of the null context"), [
            (row["variable"], row["value"], num(row["norm"]),
             num(row["norm"] / c["null"]) if c["null"] else "–")  # it may be zeros
            for row in c.get("values", ())])}
