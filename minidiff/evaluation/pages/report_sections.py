"""The report's tables of numbers: distances, their growth with n, variety, conditions, and what was
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from minidiff.evaluation.metrics.comparison import EQUAL, FEWEST, NEIGHBOUR
from minidiff.evaluation.pages import charts as figures
from minidiff.evaluation.pages.format import num, p_value, percent, span
from minidiff.evaluation.pages.page import figure, note, table

SHARES = ("precision", "recall", "coverage", "C2ST")   # printed in per cent


def distances(result: dict) -> str:
    rows = result.get("distances") or []
    if not any("KD" in r for r in rows):
        return note(f"There are too few images for any distance: each side needs {FEWEST}.")
    made = [r for r in rows if r["set"] == "synthetic" and "KD" in r]
    caption = ("{} to held-out real images. Diamonds (red): synthetic; dots (dark): real training "
               "images of the same label; " "crosses (grey): real held-out images of another "
               "label. Lines: {}. Hatched: 5–95 % of real against real, "
               f"patients apart, at equal numbers. n = {_range(r['n'] for r in made)} held-out "
               f"against {_range(r['m'] for r in made)} synthetic; extractors as titled.")
    body = ("<p>How far is a set of images from held-out real ones? KD, the kernel distance, is 0 "
            "on average between two sets of the same kind and so may be negative. FD, the Fréchet "
            "distance, is never 0 at such numbers of images: read it against its floor, what real "
            "images score against other real ones.</p>")
    body += figure(figures.distance_chart(rows, "KD"),
                   caption.format("KD", "95 % bootstrap by patient"), "kernel distances")
    body += figure(figures.distance_chart(rows, "FD"),
                   caption.format("FD", "5–95 % over random halves of both sides, mark at the "
                                  "median; hatched is of halves, too"), "Fréchet distances")
    grown = result.get("growth") or []
    if grown:
        body += figure(figures.growth_chart(grown), f"KD and FD against the number of images on "
                       "each side, all labels in the mix of the synthetic set. Diamonds: "
                       "synthetic against held-out; dots, hatched: real against real. Median and "
                       f"5–95 % of random draws, n = {grown[0]['n']} to "
                       f"{max(r['n'] for r in grown)}. What falls with n is due to the number of "
                       f"images; what stays above real is not.", "distance against n")
    return body


def numbers(result: dict) -> str:
    """Every distance of every set, an extractor at a time."""
    rows, body = result.get("distances") or [], ""
    head, shares = ["label", "set", "n",
                    "m"], [f"{name}, %" if name in SHARES else name for name in EQUAL]
    known = {e["name"]: e["identity"] for e in result.get("extractors") or []}
    for extractor in _unique(rows, "extractor"):
        own = [r for r in rows if r["extractor"] == extractor]
        body += (f"<h3>{escape(extractor)}</h3>" + note(f"Identity "
                                                        f"{known.get(extractor, 'unknown')[:16]} …")
                 + table([*head, "KD", "95 %", "p", "floor"], _distance_lines(own, _kd_cells))
                 + table([*head, "FD", "floor", "of halves", "their floor"],
                         _distance_lines(own, _fd_cells))
                 + table([*head[:2], "n each", *shares, "p"], _equal_lines(own)))
    return (body or note("There are no distances.")) + note(
        "n held-out, m of the set. Floor: median (5–95 %) of real against real; where the real "
        "images of a label do not reach for n + m, of as many as there are. Of halves: 5–95 % of "
        "FD between random halves of both sides. p: share of random divisions of the pooled "
        "patients with as large a KD. The third table is at n each of both sides: MIND (sliced "
        f"Wasserstein), precision, recall, density and coverage (neighbour {NEIGHBOUR}; coverage "
        "with Wilson’s interval), C2ST (how often a nearest neighbour tells real from synthetic; "
        "50 % is guessing) with its interval. “real vs real” is its floor. Features of our own "
        "classifier were learnt on the training images, whose distances they flatter; other "
        "labels are therefore held-out. All sets share the held-out images: their intervals are "
        f"not independent. Grey: fewer than {FEWEST} images on a side, or all of one patient.")


def variety(result: dict) -> str:
    rows = result.get("variety") or []
    if not rows:
        return note("Variety was not measured.")
    lines = [("grey", [r["label"], r["measure"], r["n"], _why(r), "", ""]) if r["too_few"] else
             ("", [r["label"], r["measure"], r["n"], num(r["synthetic"]), num(r["real"]),
                   span(r["range"]["low"], r["range"]["high"])]) for r in rows]
    return table(["label", "measure", "n", "synthetic", "held-out real", "real, 5–95 %"],
                 lines) + note("At n of each. Vendi: the effective number of different images in "
                               "that space; less than real is too alike. MS-SSIM: mean likeness of "
                               "random pairs of one label, at 176 px at most; more than real is "
                               "too alike. The last column is of draws of n real images, training "
                               "and held-out together.")


def conditions(result: dict) -> str:
    rows = result.get("conditions") or []
    if not rows:
        return note("The synthetic images have no condition besides their label that the real ones "
                    "have, too.")
    body = ""
    for extractor in _unique(rows, "extractor"):
        lines, before = [], None
        for r in [r for r in rows if r["extractor"] == extractor]:
            first, before = r["condition"] != before, r["condition"]
            values = [_why(r), "", ""] if r["too_few"] else [
                num(r["KD"]), span(r["KD_low"], r["KD_high"]), _floor(r["KD_floor"])]
            lines.append(("grey" * r["too_few"] + " first" * first,
                          [r["condition"] if first else "", r["value"], r["n"], r["m"], *values]))
        body += f"<h3>{escape(extractor)}</h3>" + table(["condition", "value", "n", "m", "KD",
                                                         "95 %", "floor"], lines)
    return body + note("Synthetic images that were asked for with this value against held-out "
                       "images that have it; n held-out, m synthetic, all labels. Numbers are cut "
                       "into thirds of the training patients. The mix of labels within a value may "
                       "differ between the two and is then part of the distance.")


def agreement(result: dict) -> str:
    rows = result.get("agreement")
    if not rows:
        return note("No judge was found. python classify.py trains one on real training patients.")
    lines, head = [], ["variable", "images", "n", "as labelled", "95 %", "within label", "", ""]
    for name in _unique(rows, "variable"):
        for k, r in enumerate(r for r in rows if r["variable"] == name):
            kind = "own" * (r["set"] == "synthetic") + " grey" * (not r["n"]) + " first" * (k == 0)
            lines.append((kind, [name if k == 0 else "", r["set"], r["n"], *_agreement_cells(r)]))
    return ("<p>A judge, trained on real training patients only, reads label and attributes off "
            "each image. On held-out real images it is measured against the truth; on synthetic "
            "ones the request is measured by it, over the cells that were asked "
            "for.</p>" + table(head, lines)
            + note("Category: share judged as labelled, Wilson’s interval; findings: of all at "
                   "once, then of each where it is. Number: correlation, Fisher’s interval, slope "
                   "of judged on labelled, and mean absolute error in its own unit. Within label: "
                   "the correlation after each label’s mean is taken off both sides; what guessing "
                   "the commonest value of each label would reach. On a phantom, where every "
                   "factor is drawn into the picture, real images reach nearly 100 %; on patients, "
                   "attributes are harder to read."))


def _distance_lines(rows: Sequence[dict],
                    cells: Callable[[dict, bool], list[str]]) -> list[tuple[str, list]]:
    """Lines of a table of distances; a label and its floor stand once, on its first line."""
    lines, before = [], None
    for r in rows:
        first, before = r["label"] != before, r["label"]
        kind = "grey" if r["too_few"] else "own" if r["set"] == "synthetic" else ""
        values = [_why(r), "", "", ""] if r["too_few"] else cells(r, first)
        lines.append((kind + " first" * first,
                      [r["label"] if first else "", r["set"], r["n"], r["m"], *values]))
    return lines


def _kd_cells(r: dict, first: bool) -> list[str]:
    return [num(r["KD"]), span(r["KD_low"], r["KD_high"]), p_value(r["KD_p"]),
            _floor(r.get("KD_floor")) if first else ""]


def _fd_cells(r: dict, first: bool) -> list[str]:
    floors = [_floor(r.get(name)) if first else "" for name in ("FD_floor", "FD_floor_halves")]
    return [num(r["FD"]), floors[0], span(r["FD_low"], r["FD_high"]), floors[1]]


def _equal_lines(rows: Sequence[dict]) -> list[tuple[str, list]]:
    """The distances at equal numbers; after the lines of each label one of real against real."""
    lines = []
    for label in _unique(rows, "label"):
        own = [r for r in rows if r["label"] == label]
        for k, r in enumerate(own):
            kind = ("grey" if r["too_few"] else "own" if r["set"] == "synthetic"
                    else "") + " first" * (k == 0)
            values = [_why(r), *[""] * len(EQUAL)] if r["too_few"] else [
                *(_with_ends(name, r.get(name), r.get(f"{name}_low"), r.get(f"{name}_high"))
                  for name in EQUAL), p_value(r["C2ST_p"])]
            lines.append((kind,
                          [label if k == 0 else "", r["set"], r.get("equal_n", r["n"]), *values]))
        floors = [own[0].get(f"{name}_floor") for name in EQUAL]
        if all(floors) and not all(r["too_few"] for r in own):
            lines.append(("", ["", "real vs real", floors[0]["n"], *(_with_ends(
                name, f["median"], f["low"], f["high"]) for name, f in zip(EQUAL, floors)), ""]))
    return lines


def _with_ends(name: str, *values: float | None) -> str:
    """A value with the ends of its interval, where it has one."""
    texts = [("–" if x is None else f"{100 * x:.0f}") if name in SHARES else num(x) for x in values]
    return texts[0] if values[1] is None else f"{texts[0]} ({texts[1]}–{texts[2]})"


def _agreement_cells(r: dict) -> list[str]:
    if not r["n"]:
        return ["no known cell", "", "", "", ""]
    if r["kind"] == "number":
        within = f"r = {num(r['within_r'])} ({span(r['within_low'], r['within_high'])})"
        rest = [f"slope {num(r['slope'])}", f"error {num(r['mae'])}"]
        return [f"r = {num(r['r'])}", span(r["low"], r["high"]), within, *rest]
    values = ", ".join(f"{v['value']} {percent(v['accuracy'])} of {v['n']}" + (
        f" (AUROC {num(v['auroc'])})" if "auroc" in v else "") for v in r["by_value"])
    area = f"AUROC {num(r['auroc'])}" if "auroc" in r else ""
    within = f"guessing {percent(r['within_chance'])}" if "within_chance" in r else ""
    return [percent(r["accuracy"]), f"{percent(r['low'])} to {percent(r['high'])}", within, area,
            values]


def _why(r: dict) -> str:
    """Why a cell is grey."""
    return f"n < {FEWEST}" if min(r["n"], r.get("m", r["n"])) < FEWEST else "one patient"


def _floor(f: dict | None) -> str:
    return f"{num(f['median'])} ({span(f['low'], f['high'])})" if f else "–"


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}–{values[-1]}"


def _unique(rows: Iterable[dict], key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in rows))
