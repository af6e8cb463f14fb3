"""The report: numbers and pictures in, report.json and report.html out.

The page is a function of the two; its words stand in report.html and verdicts.txt.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jinja2 import UndefinedError

from minidiff import __version__, runs
from minidiff.classification.compare import grouped
from minidiff.errors import InputError
from minidiff.evaluation import pages
from minidiff.evaluation.format import distance_names, jsonable, num
from minidiff.evaluation.metrics.copying import ALPHA, GATE, UNCLEAR
from minidiff.evaluation.metrics.report_rows import AT_EQUAL_N, FEWEST, NEIGHBOUR
from minidiff.evaluation.pages import charts
from minidiff.evaluation.pages.pictures import reduction
from minidiff.evaluation.verdicts import kind, verdicts
from minidiff.root import Rooted

# section → run whose command made what it shows
ORIGINS = {"verdict": "report", "realism": "report", "copies": "report", "pictures": "samples",
           "collection": "samples", "distances": "report", "numbers": "report",
           "variety": "report", "conditions": "report", "agreement": "report",
           "matrix": "matrix", "study": "classifier", "training": "diffusion"}
ABSENT = {  # what stands for a part of the report that there is not
    **dict.fromkeys(("distances", "growth", "conditions", "variety", "agreement", "classifier",
                     "extractors", "judges"), ()),
    **dict.fromkeys(("realism", "neighbours", "duplicates", "membership", "study", "vae",
                     "commands", "configs", "provenance"), {})}
PICTURES = ("labels", "grids", "best", "worst", "beside", "pairs", "named", "collection",
            "rebuilt", "losses")
LIMITS = {"few": FEWEST, "neighbour": NEIGHBOUR, "alpha": ALPHA, "gate": GATE, "unclear": UNCLEAR}


@dataclass(frozen=True)
class PageConfig(Rooted):
    writes: ClassVar[str] = "folder"
    folder: str = "ROOT/report"   # a report; its page is rendered again from its JSON


def run_page(cfg: PageConfig) -> None:
    """Render the page of a finished report again, without measuring anything."""
    print(write_page(Path(cfg.folder)))


def write(folder: Path, result: dict, drawn: dict) -> Path:
    """Write report.json, pictures.json and report.html; returns the page's path.

    result: data, samples, and what there is of ABSENT. drawn: those of `pictures.draw`,
    "rebuilt", all PNG bytes, "losses" {run: its loss.png} and "matrix", the contents of a
    matrix.json.
    """
    result = jsonable(result)
    runs.write_json(folder / "report.json", {"verdict": pages.answers(verdicts(result)), **result})
    runs.write_atomic(folder / "pictures.json", json.dumps(drawn, default=pages.data_uri))
    return write_page(folder)


def write_page(folder: Path) -> Path:
    """report.html from the report.json and the pictures.json of the folder.

    InputError where another version of the program made them and they lack what the page needs.
    """
    result, kept = runs.read_json(folder / "report.json"), folder / "pictures.json"
    version = (result.get("provenance") or {}).get("minidiff", "of another version")
    refused = f"{folder}: minidiff {version} made it, and minidiff {__version__} cannot render it"
    if not kept.is_file():
        raise InputError(f"{refused} without pictures.json; run its command again")
    try:
        page = render(result, runs.read_json(kept))
    except (KeyError, TypeError, UndefinedError) as error:
        if version.split(".")[:2] == __version__.split(".")[:2]:
            raise
        raise InputError(f"{refused}: {error}; run its command again") from error
    runs.write_atomic(folder / "report.html", page)
    return folder / "report.html"


def render(result: dict, drawn: dict) -> str:
    """The whole page; a function of its arguments alone."""
    result = ABSENT | {name: found for name, found in result.items() if found is not None}
    for name in ("distances", "variety", "conditions"):   # older reports say "small"
        result[name] = [{"too_few": r.get("small"), **r} for r in result[name]]
    measured = [r for r in result["distances"] if not r["too_few"]]
    return pages.render("report.html", **{
        **result, **LIMITS, "with_floors": with_floors, "reduction": reduction,
        "matrix": drawn.get("matrix"), "matrix_maps": charts.matrix_maps,
        "equal": [name for name in AT_EQUAL_N if any(name in r for r in measured)],
        "answers": [{**v, "kind": kind(v)}
                    for v in pages.answers(verdicts(result, on_page=True))],
        "commands_of_runs": result["commands"],
        "commands": {section: result["commands"].get(run) for section, run in ORIGINS.items()},
        "configs": {name: json.dumps(config, indent=1, ensure_ascii=False)
                    for name, config in result["configs"].items() if config},
        "agreement": sum(grouped(result["agreement"], "variable").values(), []),
        "numeric_variables": {r["variable"] for r in result["agreement"]
                              if r.get("kind") == "number"},
        "made": [r for r in measured if r["set"] == "synthetic"],
        "drawn": {**dict.fromkeys(PICTURES), **drawn},
        "distances_of_pairs": [f"{num(p['d_train'])}, {num(p['d_heldout'])}"
                               for p in result["neighbours"].get("closest", [])],
        "distances_of_named": [num(p["distance"]) for p in
                               (result["neighbours"].get("named") or {}).get("images", [])],
        "charts": {
            "kernel": measured and distance_chart(measured, "KD"),
            "frechet": measured and distance_chart(measured, "FD"),
            "growth": result["growth"] and growth_chart(result["growth"]),
            "study": result["classifier"] and study_chart(result["classifier"])}})


def with_floors(rows: Sequence[dict]) -> list[dict]:
    """The rows of distances, and after those of each label one of real against real."""
    found = []
    for label, own in grouped(rows, "label").items():
        found += own
        floors = {name: own[0][f"{name}_floor"] for name in AT_EQUAL_N
                  if own[0].get(f"{name}_floor")}
        if floors and not all(r["too_few"] for r in own):
            found.append({"label": label, "set": "floor", "n": next(iter(floors.values()))["n"],
                          "too_few": False,
                          **{f"{name}{end}": spread[key] for name, spread in floors.items()
                             for end, key in (("", "median"), ("_low", "low"), ("_high", "high"))}})
    return found


def distance_chart(rows: Sequence[Mapping], metric: str) -> bytes:
    """Every set's distance to held-out real images, over that of real against real."""
    value, floor = {"KD": ("KD", "KD_floor"), "FD": ("FD_halves", "FD_floor_halves")}[metric]
    panels = {f"{distance_names(extractor)[metric == 'FD']}, {extractor}": [
        {"name": r["set"], "group": r["label"], "value": r.get(value),
         "kind": r["set"] if r["set"] in ("synthetic", "real") else "other",
         "ends": (r.get(f"{metric}_low"), r.get(f"{metric}_high")),
         "band": r.get(floor) and (r[floor]["low"], r[floor]["high"])} for r in own]
              for extractor, own in grouped(rows, "extractor").items()}
    return charts.points(panels, "distance to held-out real images of the label")


def growth_chart(rows: Sequence[Mapping]) -> bytes:
    """Both distances against the number of images: the median and 5–95 % of random draws."""
    panels, extractors = [], grouped(rows, "extractor")
    for (k, metric), (extractor, own) in itertools.product(enumerate(("KD", "FD")),
                                                           extractors.items()):
        lines = []
        for name, key, look in (
                ("floor: real against real", f"{metric}_floor", charts.STROKES[0]),
                ("synthetic against held-out", metric, charts.STROKES[1])):
            # None where the images of one side are all of one patient
            known = [r for r in own if r.get(key) and r[key]["median"] is not None]
            lines.append({"name": name, "look": look, "x": [r["n"] for r in known],
                          **{end: [r[key][spread] for r in known] for end, spread in (
                              ("y", "median"), ("low", "low"), ("high", "high"))}})
        ticks = sorted({r["n"] for r in own})[::2]
        panels.append({"title": f"{distance_names(extractor)[k]}, {extractor}", "lines": lines,
                       "settings": {"xscale": "log", "xticks": ticks, "xticklabels": ticks,
                                    "xlabel": "images on each side"}})
    return charts.lines(panels, columns=len(extractors))


def study_chart(results: Sequence[Mapping]) -> bytes:
    """A panel for each test set: balanced accuracy of every seed, and the mean of each arm."""
    panels: dict[str, list[dict]] = {}
    for (name, arm), own in grouped(results, "test_set", "arm").items():
        shares = (r.get("balanced_accuracy", r.get("accuracy")) for r in own)
        draws = [100 * share for share in shares if share is not None]
        panels.setdefault(f"{name} set", []).append({
            "name": arm, "value": np.mean(draws) if draws else np.nan, "draws": draws,
            "kind": next((kind for kind in ("synthetic", "duplicates") if kind in arm), "real")})
    return charts.points(panels, "balanced accuracy, %")
