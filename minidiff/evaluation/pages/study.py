"""The page of a study: a function of summary.json, results.json and the gallery.

What the summary lacks is left out. The prose stands in study.html.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from minidiff.classification.compare import grouped
from minidiff.classification.fairness import FEW
from minidiff.errors import count
from minidiff.evaluation.format import POINTS, metric_name, set_name
from minidiff.evaluation.pages import render
from minidiff.evaluation.pages import study_pictures as pictures
from minidiff.evaluation.pages import study_tables as tables
from minidiff.evaluation.pages.study_answers import answers, kinds_of
from minidiff.evaluation.study_verdicts import GAIN, HARM, headlines

ABSENT = {"labels": [], "positive": "", "exclusive": True, "images": {}, "patients": {},
          "patients_assumed": False, "notes": [], "audit": {}, "recipe": {}, "provenance": {},
          "judge": [], "generators": {}, "arms": [], "differences": {}, "calibration": {},
          "uncertainty": {}, "fairness": {}, "attributes": {}, "roc": {}, "curves": {},
          "benefit": None, "learning": []}


def study_page(summary: Mapping, results: Sequence[Mapping] = (),
               gallery: Mapping[str, Sequence[dict]] | None = None) -> str:
    """The HTML page; `gallery` is that of `study_pictures`."""
    summary = {**ABSENT, **{key: value for key, value in summary.items() if value is not None}}
    kinds, rows = kinds_of(summary), summary["audit"].get("rows")
    draw = {"kinds": kinds, "shortcut": bool(summary["audit"].get("shortcut"))}
    content = {
        "answers": answers(summary), "audit": rows and tables.audit(rows),
        "arms": _arms(summary, results, draw), "differences": _differences(summary, draw),
        "learning": _learning(summary, draw), "curves": _curves(summary, draw),
        "uncertainty": _uncertainty(summary, draw),
        "fairness": _fairness(summary), "attributes": _attributes(summary),
        "pictures": gallery, "training": _training(summary), "made": _made(summary, kinds)}
    seeds = max((row["seeds"] for row in summary["arms"]), default=0)
    return render("study.html", summary=summary, count=count, arms=len(kinds), seeds=seeds,
                  fewest=FEW,
                  content={name: found for name, found in content.items() if found})


# --- what each section of study.html prints; empty where there is nothing

def _arms(summary: Mapping, results: Sequence[Mapping], draw: Mapping) -> dict:
    """A forest plot of each headline figure, then for each test set the tables of all arms."""
    by_set, positive = grouped(summary["arms"], "test_set"), summary["positive"]
    single, metric = grouped(results, "arm", "test_set"), headlines(summary)[1]

    def point(row: Mapping, metric: str) -> dict:
        name = "auroc_positive" if metric == "auroc" else metric
        value, sd = row[name], row[f"{name}_sd"]
        return {"name": row["arm"], "arm": row["arm"], "value": value,
                "interval": [None, None] if sd is None else [value - sd, value + sd],
                "seeds": [tables.figure_of(r, metric, positive)[0]
                          for r in single.get((row["arm"], row["test_set"]), ())]}

    return by_set and {"charts": _forests(summary, by_set, point, draw), "sets": {
        name: {"arms": tables.arms(own, positive, metric),
               "ensembles": tables.ensembles(own, positive, metric),
               "remarks": grouped([row for row in own if row["remark"]], "remark"),
               "labels": tables.labels(own)} for name, own in by_set.items()}}


def _differences(summary: Mapping, draw: Mapping) -> dict:
    """Likewise of all pairs of arms; the other figures' tables are folded away."""
    by_set = {name: rows for name, rows in summary["differences"].items() if rows}
    found, main = {}, headlines(summary)
    for name, rows in by_set.items():
        all_tables = {metric: tables.differences(own, summary["positive"])
                      for metric, own in grouped(rows, "metric").items()}
        found[name] = {"main": [all_tables.pop(metric) for metric in main],
                       "others": list(all_tables.values())}

    def point(d: Mapping, metric: str) -> dict:
        return {"name": f"{d['arm']} − {d['against']}", "arm": d["arm"], "seeds": [],
                "value": d["difference"], "interval": d["interval"],
                "resolved": d["answer"] in (GAIN, HARM)}

    return by_set and {"charts": _forests(summary, by_set, point, draw, 0.0), "sets": found}


def _forests(summary: Mapping, by_set: Mapping[str, Sequence], point: Callable, draw: Mapping,
             against: float | None = None) -> dict[str, bytes]:
    """A forest plot of each headline figure; `point` says where the row of an arm or pair stands.

    Differences are plotted against 0.
    """
    charts = {}
    for metric in headlines(summary):
        name, unit = metric_name(metric, summary["positive"]), ", %"
        if against is not None:
            name, unit = f"{name}, difference", " in points"
        points = {set_name(test_set): [point(row, metric) for row in rows
                                       if row.get("metric", metric) == metric]
                  for test_set, rows in by_set.items()}
        per_cent = metric in POINTS
        charts[name] = pictures.forest(points, xlabel=f"{name}{unit}" if per_cent else name,
                                       per_cent=per_cent, against=against, **draw)
    return charts


def _learning(summary: Mapping, draw: Mapping) -> dict[str, bytes]:
    """Each headline figure against the share of the real images, a line for each start."""
    by_metric = grouped(summary["learning"], "metric")
    kinds = {row["start"]: draw["kinds"][row["arm"]] for row in summary["learning"]}
    charts = {}
    for metric in filter(by_metric.get, headlines(summary)):
        unit, name = 100 if metric in POINTS else 1, metric_name(metric, summary["positive"])
        panels = {set_name(test_set): {start: _course(rows, unit) for start, rows in
                                       grouped(own, "start").items()}
                  for test_set, own in grouped(by_metric[metric], "test_set").items()}
        charts[name] = pictures.lines(
            panels, kinds, "real training images, %", f"{name}{', %' * (metric in POINTS)}",
            draw["shortcut"], columns=2,
            shares=sorted({100 * row["share"] for row in summary["learning"]}))
    return charts


def _course(rows: Sequence[Mapping], unit: float) -> list[list[float]]:
    """[share in %, value, low, high] by share; without an interval, nan."""
    return sorted([100 * row["share"], *(math.nan if x is None else unit * x
                                         for x in (row["value"], *row["interval"]))]
                  for row in rows)


def _curves(summary: Mapping, draw: Mapping) -> dict:
    corners = {set_name(name): own for name, own in summary["roc"].items() if any(own.values())}
    roc = None
    if corners:
        roc = pictures.lines(corners, xlabel="1 − specificity", ylabel="sensitivity",
                             square=True, **draw)
    sets = {name: {"chart": _reliability(own, draw["shortcut"]),
                   "table": tables.calibration(own, draw["kinds"])}
            for name, own in summary["calibration"].items() if own}
    return {"roc": roc, "sets": sets} if roc or sets else {}


def _reliability(arms: Mapping[str, Mapping], shortcut: bool) -> bytes:
    """Share right against confidence, a panel for each arm."""
    panels = {arm: {name: [(b["confidence"], b["share"]) for b in found[key]]
                    for name, key in (("as trained", "bins"), ("scaled", "bins_scaled"))}
              for arm, found in arms.items()}
    bands = {arm: [[b[name] for b in found["bins"]] for name in ("confidence", "low", "high")]
             for arm, found in arms.items()}
    return pictures.lines(panels, {"scaled": "synthetic"}, "confidence", "share right", shortcut,
                          bands=bands, square=True, columns=4)


def _uncertainty(summary: Mapping, draw: Mapping) -> dict:
    found = {name: own for name, own in summary["uncertainty"].items() if own}
    panels, bands = {}, {}
    for name, own in found.items():
        curves = {arm: measured["entropy"]["selective"]["curve"] for arm, measured in own.items()}
        title = set_name(name)
        panels[title] = {arm: [(100 * row["kept"], 100 * row["accuracy"]) for row in curve]
                        for arm, curve in curves.items()}
        bands[title] = [[100 * row[key] for row in next(iter(curves.values()))]
                        for key in ("kept", "low", "high")]
    if not found:
        return {}
    chart = pictures.lines(panels, xlabel="most certain images kept, %",
                           ylabel="accuracy of these, %", bands=bands, **draw)
    return {"chart": chart,
            "sets": {name: {"coverage": tables.coverage(own), "errors": tables.errors(own)}
                     for name, own in found.items()}}


def _fairness(summary: Mapping) -> dict:
    found = {}
    for name, own in summary["fairness"].items():
        rows = [{**gap, "arm": arm} for arm, measured in own.items() for gap in measured["gaps"]]
        by_metric = grouped(rows, "metric")
        few = [metric for metric, gaps in by_metric.items() if all(g["gap"] is None for g in gaps)]
        if rows:
            found[name] = {
                "gaps": [tables.gaps(metric, gaps) for metric, gaps in by_metric.items()
                         if metric not in few],
                "few": [tables.GROUP_FIGURES[metric] for metric in few],
                "groups": tables.groups(own)}
    return found


def _attributes(summary: Mapping) -> dict:
    return {source: {"association": tables.association(own["association"]),
                     "shares": tables.shares(own["shares"])}
            for source, own in summary["attributes"].items() if own["shares"]}


def _training(summary: Mapping) -> dict:
    found = {"arms": tables.training(summary["arms"]),
             "generators": tables.generators(summary["generators"]),
             "sets": tables.sets(summary["images"], summary["patients"], summary["exclusive"])}
    return found if any(table.rows for table in found.values()) else {}


def _made(summary: Mapping, kinds: Mapping[str, str | None]) -> dict:
    curves = {arm: [(step, loss) for step, loss in points if loss is not None]
              for arm, points in summary["curves"].items()}
    chart = None
    if any(curves.values()):
        chart = pictures.lines({"": curves}, kinds, xlabel="optimiser step",
                               ylabel="validation loss, mean over seeds", shortcut=False)
    judge = tables.judge(summary["judge"]) if summary["judge"] else None
    found = {"chart": chart, "judge": judge,
             **{name: summary[name] for name in ("recipe", "provenance", "notes")}}
    return found if any(found.values()) else {}
