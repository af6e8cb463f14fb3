"""The report: numbers and pictures in, report.html and report.json out.

Every section is there whether its input is or not; what is missing is said, with the command that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from minidiff import runs
from minidiff.evaluation import figures
from minidiff.evaluation.page import figure, img, jsonable, note, num, p_value, page, percent, plain, signed, span, table
from minidiff.evaluation.verdict import BAD, GOOD, verdicts


def write(folder: Path, result: dict, pictures: dict) -> Path:
    """Write report.json and report.html; returns the page's path.

    result: data, samples, distances, and as far as there are any neighbours, agreement, classifier, study, vae,
    provenance, configs. pictures: "grids" {label: (real, synthetic)}, "pairs" [(synthetic, training, held-out)], "vae",
    all PNG bytes, and "logs" {run: lines of its log}.
    """
    result = jsonable({"verdict": verdicts(jsonable(result)), **result})
    runs.write_json(folder / "report.json", result)
    runs.write_atomic(folder / "report.html", render(result, pictures))
    return folder / "report.html"


def render(result: dict, pictures: dict) -> str:
    """The whole page; a function of its arguments alone."""
    data, samples = result["data"], result["samples"]
    lead = (f"{samples['n']} synthetic images at {data['size']} px, compared with {data['n_heldout']} held-out and "
            f"{data['n_train']} training images of {' + '.join(data['folders'])}.")
    return page(f"Synthetic chest X-rays: {samples['folder']}", lead, {
        "verdict": ("Verdict", verdict(result)),
        "pictures": ("Real and synthetic side by side", grids(result, pictures)),
        "distances": ("Distances", distances(result)),
        "agreement": ("What was asked for", agreement(result)),
        "copies": ("Closest pairs", copies(result, pictures)),
        "study": ("Training a classifier", study(result)),
        "training": ("Training curves", training(result, pictures)),
        "provenance": ("Provenance", provenance(result)),
    })


def verdict(result: dict) -> str:
    rows = ""
    for v in result["verdict"]:
        kind = {GOOD: "yes", BAD: "no"}.get(v["answer"], "open")
        rows += (f'<tr><td><span class="answer {kind}">{escape(v["answer"])}</span></td>'
                 f"<td>{escape(v['question'])}<div class=\"note\">{escape(v['text'])}</div></td></tr>")
    notes = list(result["data"].get("notes") or [])
    if result["data"].get("patients_assumed"):
        notes.insert(0, "One image = one patient, assumed: no patient ids, so that intervals may be too narrow.")
    return (f'<table class="verdicts">{rows}</table>'
            '<p class="warning"><strong>Not for diagnosis.</strong> These are research images. Nothing here shows that '
            "they, or a classifier trained on them, are fit for patients.</p>" + "".join(note(str(n)) for n in notes)
            + note("Intervals are at 95 %. “Not resolved”: the interval leaves both answers open, and more images are "
                   "needed. This page holds images of the data set; treat it as you treat the data."))


def grids(result: dict, pictures: dict) -> str:
    body = ""
    for label, (real, made) in (pictures.get("grids") or {}).items():
        n, m = result["data"]["heldout_labels"].get(label, 0), result["samples"]["labels"].get(label, 0)
        body += (f'<h3>{escape(label)}</h3><div class="pair">'
                 + figure(real, f"Real, held-out; drawn at random from n = {n}.", f"real {label}")
                 + figure(made, f"Synthetic; drawn at random from n = {m}, none picked by hand.", f"synthetic {label}")
                 + "</div>")
    return body or note("No pictures were given.")


def distances(result: dict) -> str:
    rows = result.get("distances") or []
    if not any("KD" in r for r in rows):
        return note("There are too few images for any distance.")
    made = [r for r in rows if r["set"] == "synthetic" and "KD" in r]
    caption = ("{} to held-out real images. Red: synthetic; dark: real training images of the same label; grey: real "
               "held-out images of another label. Lines: {}. Bands: 5–95 % of real against real, patients apart, at equal "
               f"numbers. n = {_range(r['n'] for r in made)} held-out against {_range(r['m'] for r in made)} synthetic; "
               "extractors as titled.")
    body = ("<p>How far is a set of images from held-out real ones? KD, the kernel distance, is 0 on average between two "
            "sets of the same kind and so may be negative. FD, the Fréchet distance, is never 0 at such numbers of images: "
            "read it against its floor, what real images score against other real ones.</p>")
    body += figure(figures.distance_chart(rows, "KD"), caption.format("KD", "95 % bootstrap by patient"), "kernel distances")
    body += figure(figures.distance_chart(rows, "FD"), caption.format(
        "FD", "5–95 % over random halves of both sides, dot at the median; the band is of halves, too"), "Fréchet distances")
    head = ["label", "set", "n", "m"]
    for extractor in _unique(rows, "extractor"):
        own = [r for r in rows if r["extractor"] == extractor]
        body += (f"<h3>{escape(extractor)}</h3>"
                 + table([*head, "KD", "95 %", "p", "floor"], _distance_lines(own, _kd_cells))
                 + table([*head, "FD", "floor", "of halves", "their floor"], _distance_lines(own, _fd_cells)))
    return body + note(
        "n held-out, m of the set. Floor: median (5–95 %) of real against real; where the real images of a label do not "
        "reach for n + m, of as many as there are. Of halves: 5–95 % of FD between random halves of both sides. p: share of "
        "random divisions of the pooled patients with as large a KD. Features of our own classifier were learnt on the "
        "training images, whose distances they flatter; other labels are therefore held-out. All sets share the held-out "
        "images: their intervals are not independent.")


def agreement(result: dict) -> str:
    rows = result.get("agreement")
    if not rows:
        return note("No judge was found. python classify.py trains one on real training patients.")
    lines, head = [], ["variable", "images", "n", "as labelled", "95 %", "within label", "", ""]
    for name in _unique(rows, "variable"):
        for k, r in enumerate(r for r in rows if r["variable"] == name):
            kind = "own" * (r["set"] == "synthetic") + " grey" * (not r["n"]) + " first" * (k == 0)
            lines.append((kind, [name if k == 0 else "", r["set"], r["n"], *_agreement_cells(r)]))
    return ("<p>A judge, trained on real training patients only, reads label and attributes off each image. On held-out "
            "real images it is measured against the truth; on synthetic ones the request is measured by it, over the cells "
            "that were asked for.</p>" + table(head, lines)
            + note("Category: share judged as labelled, Wilson’s interval. Number: correlation, Fisher’s interval, slope of "
                   "judged on labelled, and mean absolute error in its own unit. Within label: the correlation after each "
                   "label’s mean is taken off both sides; what guessing the commonest value of each label would reach. On a "
                   "phantom, where every factor is drawn into the picture, real images reach nearly 100 %; on patients, "
                   "attributes are harder to read."))


def copies(result: dict, pictures: dict) -> str:
    found = result.get("neighbours")
    if not found:
        return note("Nearest neighbours were not looked for.")
    body = f"<p>{escape(found['verdict'].capitalize())}.</p>"
    if pictures.get("pairs"):
        names = ("generated", "nearest training", "nearest held-out")
        shots = "".join(f"<tr><td>{name}</td>" + "".join(f"<td>{img(png, name)}</td>" for png in column) + "</tr>"
                        for name, column in zip(names, zip(*pictures["pairs"])))
        ratios = "".join(f"<td>{num(p['d_train'])} / {num(p['d_heldout'])}</td>" for p in found["closest"])
        body += (f'<figure><div class="scroll"><table class="shots">{shots}<tr><td>distances</td>{ratios}</tr></table></div>'
                 f"<figcaption>The synthetic images that are nearest to a training image by the standard of its next "
                 f"neighbours, of n = {found['spaces'][0]['n']}; extractor: {escape(found['spaces'][0]['space'])}, "
                 "histograms equalised. A copy would look the same in the first two rows and not in the third.</figcaption>"
                 "</figure>")
    if not found["spaces"]:
        return body
    lines = [("", [s["space"], f"{percent(s['near_share'])} ({percent(s['near_low'])} to {percent(s['near_high'])})",
                   percent(s["near_heldout_share"]), p_value(s["near_p"]), f"{s['closest_train']} of {s['closest']}",
                   f"{s['closest_expected']:.1f}", p_value(s["closest_p"]), f"{num(s['q05'])} / {num(s['q50'])}"])
             for s in found["spaces"]]
    s = found["spaces"][0]
    head = ["space", "near", "held-out", "p", "closest in training", "chance", "p", "q 5 % / median"]
    return body + table(head, lines) + note(
        f"n = {s['n']} synthetic, {s['train']} training, {s['heldout']} held-out. Near: share nearer to a training image "
        "than the nearest 5 % of held-out images (Fisher’s exact test). Closest: of the most conspicuously near images, "
        "those whose nearest real image is a training image (binomial test). Copies are suspected where both p are below "
        ".01, and cannot be excluded where the second is below .05. q: distance to the nearest training image by that to "
        f"the nearest held-out one, {s['q_size']} images of each; about 1 without copies. "
        "Moved: after the best of 81 small turns, shifts and zooms.")


def study(result: dict) -> str:
    results, summary = result.get("classifier") or [], result.get("study") or {}
    if not results:
        return note("No study was found. python classify.py trains the same classifier on real, real + duplicated and "
                    "real + synthetic images.")
    sizes = ", ".join(f"{r.get('n', '?')} ({r['test_set']})" for r in {r["test_set"]: r for r in results}.values())
    body = figure(figures.study_chart(results), "Each dot one seed, lines the means over seeds; the same optimiser steps "
                  f"for every arm. n = {sizes}.", "balanced accuracy of each arm")
    lines = [("own" * ("synthetic" in r["arm"]), [r["test_set"], r["arm"], r.get("seeds", "–"), r.get("n_train", "–"),
              _sd(r, "accuracy", 100), _sd(r, "balanced_accuracy", 100), _sd(r, "auroc_macro", 1)])
             for r in summary.get("arms") or []]
    head = ["test set", "trained on", "seeds", "images", "accuracy, %", "balanced, %", "AUROC"]
    body += table(head, lines) if lines else ""
    lines = [("", [name, f"{d['arm']} − {d['against']}", d["metric"].replace("_", " "), signed(d["difference"]),
                   span(*d["interval"]), "resolved" if d.get("resolved") else "not resolved"])
             for name, found in (summary.get("differences") or {}).items() for d in found]
    heading = "<h3>Differences</h3>"
    body += heading + table(["test set", "arms", "of", "difference", "95 %", ""], lines) if lines else ""
    return body + note(
        "± standard deviation over seeds. Differences: means over seeds on the same images, interval by bootstrap over "
        "patients. Duplicates add as many images as the synthetic arm and no news; only what exceeds them is due to the "
        "new images.")


def training(result: dict, pictures: dict) -> str:
    logs = {name: log for name, log in (pictures.get("logs") or {}).items() if log}
    if logs:
        body = figure(figures.curves(logs), "Loss against optimiser steps; held-out where it was measured.", "loss curves")
    else:
        body = note("No training log was found.")
    facts = result.get("vae") or {}
    if facts.get("psnr") is not None:
        linear = facts.get("psnr_pca64")
        n = facts.get("n_held_out", "the")
        body += (f"<p>The autoencoder rebuilds {n} held-out images at {facts['psnr']:.1f} dB PSNR"
                 + (f"; 64 principal components of the pixels reach {linear:.1f} dB" if linear else "") + ".</p>")
    if pictures.get("vae"):
        body += figure(pictures["vae"], "Held-out images above, rebuilt by the autoencoder below.", "reconstructions")
    return body


def provenance(result: dict) -> str:
    facts = {**{f"data {k}": v for k, v in result["data"].items() if k != "notes"},
             **{f"samples {k}": v for k, v in result["samples"].items()}, **(result.get("provenance") or {})}
    body = "<dl>" + "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(plain(v))}</dd>" for k, v in facts.items()) + "</dl>"
    for name, config in (result.get("configs") or {}).items():
        text = json.dumps(config, indent=1, ensure_ascii=False)
        body += f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" if config else ""
    return body


def _distance_lines(rows: Sequence[dict], cells: Callable[[dict, bool], list[str]]) -> list[tuple[str, list]]:
    """Lines of a table of distances; a label and its floor stand once, on its first line."""
    lines, before = [], None
    for r in rows:
        first, before = r["label"] != before, r["label"]
        kind = "grey" if r["small"] else "own" if r["set"] == "synthetic" else ""
        values = ["n too small", "", "", ""] if r["small"] else cells(r, first)
        lines.append((kind + " first" * first, [r["label"] if first else "", r["set"], r["n"], r["m"], *values]))
    return lines


def _kd_cells(r: dict, first: bool) -> list[str]:
    return [num(r["KD"]), span(r["KD_low"], r["KD_high"]), p_value(r["KD_p"]), _floor(r.get("KD_floor")) if first else ""]


def _fd_cells(r: dict, first: bool) -> list[str]:
    floors = [_floor(r.get(name)) if first else "" for name in ("FD_floor", "FD_floor_halves")]
    return [num(r["FD"]), floors[0], span(r["FD_low"], r["FD_high"]), floors[1]]


def _agreement_cells(r: dict) -> list[str]:
    if not r["n"]:
        return ["no known cell", "", "", "", ""]
    if r["kind"] == "number":
        within = f"r = {num(r['within_r'])} ({span(r['within_low'], r['within_high'])})"
        rest = [f"slope {num(r['slope'])}", f"error {num(r['mae'])}"]
        return [f"r = {num(r['r'])}", span(r["low"], r["high"]), within, *rest]
    values = ", ".join(f"{v['value']} {percent(v['accuracy'])} of {v['n']}" for v in r["by_value"])
    area = f"AUROC {num(r['auroc'])}" if "auroc" in r else ""
    within = f"guessing {percent(r['within_chance'])}" if "within_chance" in r else ""
    return [percent(r["accuracy"]), f"{percent(r['low'])} to {percent(r['high'])}", within, area, values]


def _floor(f: dict | None) -> str:
    return f"{num(f['median'])} ({span(f['low'], f['high'])})" if f else "–"


def _sd(row: dict, name: str, unit: float) -> str:
    value, sd = row.get(name), row.get(f"{name}_sd")
    return "–" if value is None else num(unit * value) + (f" ± {num(unit * sd)}" if sd is not None else "")


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return f"{values[0]}" if len(values) == 1 else f"{values[0]}–{values[-1]}"


def _unique(rows: Iterable[dict], key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in rows))
