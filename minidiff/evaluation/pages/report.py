"""The report: numbers and pictures in, report.json and report.html out.

The page is a function of the two; its words stand in report.html and verdicts.txt.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff import runs
from minidiff.errors import InputError
from minidiff.evaluation import pages
from minidiff.evaluation.format import distance_names, jsonable, num
from minidiff.evaluation.metrics.copying import ALPHA, GATE, UNCLEAR
from minidiff.evaluation.metrics.report_rows import AT_EQUAL_N, FEWEST, NEIGHBOUR
from minidiff.evaluation.pages import charts
from minidiff.evaluation.verdicts import KINDS, variety, verdicts
from minidiff.root import Rooted

# section → run whose command made what it shows
ORIGINS = {"verdict": "report", "copies": "report", "pictures": "samples", "collection": "samples",
           "distances": "report", "numbers": "report", "variety": "report", "conditions": "report",
           "agreement": "report", "matrix": "matrix",
           "study": "classifier", "training": "diffusion"}
OPTIONAL = ("growth", "conditions", "neighbours", "duplicates", "membership", "agreement",
            "classifier", "study", "vae", "commands", "configs", "provenance", "extractors",
            "variety")
PICTURES = ("labels", "grids", "best", "worst", "beside", "pairs", "collection", "rebuilt",
            "losses")
LIMITS = {"few": FEWEST, "neighbour": NEIGHBOUR, "alpha": ALPHA, "gate": GATE, "unclear": UNCLEAR}


@dataclass(frozen=True)
class PageConfig(Rooted):
    folder: str = "ROOT/report"   # a report; its page is rendered again from its JSON


def run_page(cfg: PageConfig) -> None:
    """Render the page of a finished report again, without measuring anything."""
    print(write_page(Path(cfg.folder)))


def write(folder: Path, result: dict, drawn: dict) -> Path:
    """Write report.json, pictures.json and report.html; returns the page's path.

    result: data, samples, distances, and what there is of OPTIONAL. drawn: those of
    `pictures.draw`, "rebuilt", all PNG bytes, "losses" {run: its loss.png} and "matrix", the
    contents of a matrix.json.
    """
    result = jsonable(result)
    runs.write_json(folder / "report.json", {"verdict": pages.answers(verdicts(result)), **result})
    runs.write_atomic(folder / "pictures.json", json.dumps(drawn, default=pages.data_uri))
    return write_page(folder)


def write_page(folder: Path) -> Path:
    """report.html from the report.json and the pictures.json of the folder."""
    if not (folder / "report.json").is_file():
        raise InputError(f"{folder} holds no report.json: python evaluate.py makes one")
    kept = folder / "pictures.json"
    if not kept.is_file():
        raise InputError(f"{folder} holds no pictures.json: an older version made this report, and "
                         "its page would lose its pictures; run the command of the report again")
    result, drawn = runs.read_json(folder / "report.json"), runs.read_json(kept)
    runs.write_atomic(folder / "report.html", render(result, drawn))
    return folder / "report.html"


def render(result: dict, drawn: dict) -> str:
    """The whole page; a function of its arguments alone."""
    result = {**dict.fromkeys(OPTIONAL), **result}
    for name in ("distances", "variety", "conditions"):   # older reports say "small"
        result[name] = [{"too_few": r.get("small"), **r} for r in result[name] or []]
    asked = [*verdicts(result), *variety(result["distances"])]
    commands = result["commands"] or {}
    readings = result["agreement"] or []
    variables = list(dict.fromkeys(r["variable"] for r in readings))
    measured = [r for r in result["distances"] if "KD" in r]
    return pages.render("report.html", **{
        **result, **LIMITS, "with_floors": with_floors, "equal": AT_EQUAL_N,
        "answers": [{**v, "kind": KINDS[v["answer"]]} for v in pages.answers(asked)],
        "commands_of_runs": commands,
        "commands": {section: commands.get(run) for section, run in ORIGINS.items()},
        "configs": {name: json.dumps(config, indent=1, ensure_ascii=False)
                    for name, config in (result["configs"] or {}).items() if config},
        "study": result["study"] or {},
        "agreement": sorted(readings, key=lambda r: variables.index(r["variable"])),
        "numeric_variables": {r["variable"] for r in readings if r.get("kind") == "number"},
        "made": [r for r in measured if r["set"] == "synthetic"],
        "drawn": {**dict.fromkeys(PICTURES), **drawn},
        "distances_of_pairs": [f"{num(p['d_train'])}, {num(p['d_heldout'])}" for p in (
            result["neighbours"] or {}).get("closest", [])],
        "matrix": drawn.get("matrix"), "matrix_maps": charts.matrix_maps,
        "charts": {
            "kernel": measured and distance_chart(measured, "KD"),
            "frechet": measured and distance_chart(measured, "FD"),
            "growth": result["growth"] and growth_chart(result["growth"]),
            "study": result["classifier"] and study_chart(result["classifier"])}})


def with_floors(rows: Sequence[dict]) -> list[dict]:
    """The rows of distances, and after those of each label one of real against real."""
    found = []
    for label in dict.fromkeys(r["label"] for r in rows):
        own = [r for r in rows if r["label"] == label]
        found += own
        floors = {name: own[0].get(f"{name}_floor") for name in AT_EQUAL_N}
        if all(floors.values()) and not all(r["too_few"] for r in own):
            found.append({"label": label, "set": "real vs real", "n": floors["MIND"]["n"],
                          "too_few": False, "C2ST_p": None,
                          **{f"{name}{end}": spread[key] for name, spread in floors.items()
                             for end, key in (("", "median"), ("_low", "low"), ("_high", "high"))}})
    return found


def distance_chart(rows: Sequence[Mapping], metric: str) -> bytes:
    """Every set's distance to held-out real images, over that of real against real."""
    panels: dict[str, list[dict]] = {}
    value, floor = {"KD": ("KD", "KD_floor"), "FD": ("FD_halves", "FD_floor_halves")}[metric]
    for r in rows:
        name = distance_names(r["extractor"])[metric == "FD"]
        panels.setdefault(f"{name}, {r['extractor']}", []).append({
            "name": r["set"], "group": r["label"], "value": r[value],
            "kind": r["set"] if r["set"] in ("synthetic", "real") else "other",
            "ends": (r[f"{metric}_low"], r[f"{metric}_high"]),
            "band": r.get(floor) and (r[floor]["low"], r[floor]["high"])})
    return charts.points(panels, "distance to held-out real images of the label")


def growth_chart(rows: Sequence[Mapping]) -> bytes:
    """Both distances against the number of images: the median and 5–95 % of random draws."""
    panels = []
    extractors = dict.fromkeys(r["extractor"] for r in rows)
    for metric, extractor in itertools.product(("KD", "FD"), extractors):
        own = [r for r in rows if r["extractor"] == extractor]
        lines = [{"name": name, "look": look, "x": [r["n"] for r in own if r[key]],
                  **{end: [r[key][spread] for r in own if r[key]] for end, spread in (
                      ("y", "median"), ("low", "low"), ("high", "high"))}}
                 for name, key, look in (
                     ("real against real", f"{metric}_floor", charts.STROKES[0]),
                     ("synthetic against held-out", metric, charts.STROKES[1]))]
        ticks = sorted({r["n"] for r in own})[::2]
        panels.append({"title": f"{distance_names(extractor)[metric == 'FD']}, {extractor}",
                       "lines": lines, "settings": {"xscale": "log", "xticks": ticks,
                                                    "xticklabels": ticks,
                                                    "xlabel": "images on each side"}})
    return charts.lines(panels, columns=len(extractors))


def study_chart(results: Sequence[Mapping]) -> bytes:
    """A panel for each test set: balanced accuracy of every seed, and the mean of each arm."""
    panels: dict[str, list[dict]] = {}
    for name, arm in dict.fromkeys((r["test_set"], r["arm"]) for r in results):
        own = [r.get("balanced_accuracy", r.get("accuracy")) for r in results
               if (r["test_set"], r["arm"]) == (name, arm)]
        own = [100 * value for value in own if value is not None]
        panels.setdefault(f"{name} set", []).append({
            "name": arm, "value": np.mean(own) if own else np.nan, "draws": own,
            "kind": next((kind for kind in ("synthetic", "duplicates") if kind in arm), "real")})
    return charts.points(panels, "balanced accuracy, %")
