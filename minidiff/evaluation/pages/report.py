"""The report: numbers and pictures in, report.html and report.json out.

Every section is there whether its input is or not; what is missing is said, with the command that
makes it.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from minidiff import runs
from minidiff.errors import count
from minidiff.evaluation.metrics.neighbours import ALPHA, GATE, UNCLEAR
from minidiff.evaluation.pages import charts as figures
from minidiff.evaluation.pages import report_sections as sections
from minidiff.evaluation.pages.format import jsonable, num, p_value, percent, signed, span
from minidiff.evaluation.pages.page import answers, cards, fields, figure, img, note, page, table
from minidiff.evaluation.verdicts import KINDS, verdicts

# section → run whose command made what it shows
ORIGINS = {"verdict": "report", "copies": "report", "pictures": "samples", "collection": "samples",
           "distances": "report", "numbers": "report", "variety": "report", "conditions": "report",
           "agreement": "report", "matrix": "matrix",
           "study": "classifier", "training": "diffusion"}


def write(folder: Path, result: dict, pictures: dict) -> Path:
    """Write report.json and report.html; returns the page's path.

    result: data, samples, distances, and as far as there are any extractors, growth, variety,
    conditions, neighbours, duplicates, membership, agreement, classifier, study, vae, provenance,
    commands, configs. pictures: those of `pictures.draw`, "rebuilt", all PNG bytes, "logs" {run:
    lines of its log} and "matrix", the contents of a matrix.json.
    """
    result = jsonable({"verdict": verdicts(jsonable(result)), **result})
    runs.write_json(folder / "report.json", result)
    runs.write_atomic(folder / "report.html", render(result, pictures))
    return folder / "report.html"


def render(result: dict, pictures: dict) -> str:
    """The whole page; a function of its arguments alone."""
    data, samples = result["data"], result["samples"]
    lead = (f"{samples['n']} synthetic images at {data['size']} px, compared with "
            f"{data['n_heldout']} held-out and {data['n_train']} training images of "
            f"{' + '.join(data['folders'])}.")
    parts = {
        "verdict": ("Verdict", verdict(result)),
        "copies": ("Are they copies?", copies(result, pictures)),
        "pictures": ("Good and bad, and side by side with real", shown(result, pictures)),
        "collection": ("The collection", collection(pictures)),
        "distances": ("Distances", sections.distances(result)),
        "numbers": ("Every distance", sections.numbers(result)),
        "variety": ("Variety", sections.variety(result)),
        "conditions": ("By condition", sections.conditions(result)),
        "agreement": ("What was asked for", sections.agreement(result)),
        "matrix": ("Reference matrix", matrix(pictures.get("matrix"))),
        "study": ("Training a classifier", study(result)),
        "training": ("Training curves", training(result, pictures)),
        "provenance": ("Provenance", provenance(result)),
    }
    commands = result.get("commands") or {}
    return page(f"Synthetic chest X-rays: {samples['folder']}", lead, {
        key: (heading, body + (command(commands[ORIGINS[key]]) if commands.get(ORIGINS.get(key))
                               else "")) for key, (heading, body) in parts.items()})


def command(text: str) -> str:
    return f'<p class="command">{escape(text)}</p>'


def verdict(result: dict) -> str:
    rows = [(KINDS[v["answer"]], v["answer"], f'{escape(v["question"])}<div '
             f'class="note">{escape(v["text"])}</div>') for v in result["verdict"]]
    notes = list(result["data"].get("notes") or [])
    if result["data"].get("patients_assumed"):
        notes.insert(0, "One image = one patient, assumed: no patient ids, so that intervals may "
                     "be too narrow.")
    return (answers(rows) + '<p class="warning"><strong>Not for diagnosis.</strong> These are '
            'research images. Nothing here shows that ' "they, or a classifier trained on them, "
            "are fit for patients.</p>" + "".join(note(str(n)) for n in notes) + note(
                "Intervals are at 95 %. “Not resolved”: the interval leaves both answers open, and "
                "more images are needed. This page holds images of the data set; treat it as you "
                "treat the data. Below each part stands the command that made its numbers."))


def copies(result: dict, pictures: dict) -> str:
    """Nearest pairs, the tests in each space, duplicates in the training set, and the membership
    audit.
    """
    found = result.get("neighbours")
    if not found:
        return note("Nearest neighbours were not looked for.")
    body = f"<p>{escape(found['verdict'].capitalize())}.</p>"
    if found["spaces"]:
        body += neighbours(found["spaces"])
    if pictures.get("pairs"):
        s = found["spaces"][0]
        body += cards([(shots, [f"{num(p['d_train'])} / {num(p['d_heldout'])}"])
                       for shots, p in zip(pictures["pairs"], found["closest"])],
                      ("generated", "nearest training image", "nearest held-out image"), f"The "
                      f"{len(found['closest'])} synthetic images that are nearest to a training "
                      f"image by the standard of its next neighbours, of n = {s['n']}; from above: "
                      "generated, nearest training, nearest held-out image, and its distance to "
                      f"the two. Space: {s['space']}, histograms equalised. A copy would look the "
                      "same in the first two rows and not in the third.")
    return body + duplicates(result.get("duplicates")) + membership(result.get("membership"))


def neighbours(spaces: list[dict]) -> str:
    first = [("", [s["space"], f"{percent(s['near_share'])} ({percent(s['near_low'])} to "
                   f"{percent(s['near_high'])})", percent(s["near_heldout_share"]),
                   p_value(s["near_p"]), f"{s['closest_train']} of {s['closest']}",
                   f"{s['closest_expected']:.1f}", p_value(s["closest_p"]),
                   f"{num(s['q05'])} / {num(s['q50'])}"]) for s in spaces]
    second = [("", [s["space"], num(s["copying_z"]), p_value(s["copying_p"]),
                    f"{s['auth_pct']:.1f} %", f"{s['auth_heldout']:.1f} %", p_value(s["auth_p"]),
                    f"{s['calibrated_near']} of {s['n']}", p_value(s["calibrated_p"])])
              for s in spaces]
    s = spaces[0]
    return (table(["space", "near", "held-out", "p", "closest in training", "chance", "p",
                   "q 5 % / median"], first) + table(["space", "C_T, z", "p", "AuthPct", "held-out",
                                                      "p", "calibrated near", "p"], second)
            + note(f"n = {s['n']} synthetic, {s['train']} training, {s['heldout']} held-out. Near: "
                   "share nearer to a training image than the nearest 5 % of held-out images "
                   "(Fisher’s exact test). Closest: of the most conspicuously near images, those "
                   "whose nearest real image is a training image (permutation of patients, over "
                   "all spaces). Copies are suspected where near or C_T finds too little distance "
                   f"(p < {GATE}) and closest confirms that it is to training images in particular "
                   f"(p < {ALPHA}); they cannot be excluded where its p is below {UNCLEAR}. q: "
                   "distance to the nearest training image by that to the nearest held-out one, "
                   f"{s['q_size']} images of each; about 1 without copies. C_T: ranks of nearness "
                   "against held-out images (Meehan et al. 2020), far below 0 if copied. AuthPct: "
                   "farther from its nearest training image than that one from its own (Alaa et "
                   "al. 2022), read beside held-out real. Calibrated near: of the distance by "
                   "that of the 50 nearest (Carlini et al. 2023), as many as are below 5 % of "
                   "held-out. Moved: laid over each other after the best of 162 small turns, "
                   "shifts, zooms and mirrorings."))


def duplicates(found: dict | None) -> str:
    if not found:
        return ""
    return (f"<h3>Duplicates in the training set</h3><p>{found['exact']} exact and {found['near']} "
            f"near pairs among {found['n']} training images, {found['across_patients']} of them of "
            f"different patients; {count(found['surplus'], 'image')} would have to go so that none "
            "is there twice. What is there twice is learnt by heart first.</p>")


def membership(found: dict | None) -> str:
    if not found:
        return note("No audit of who was in the training set: it needs the diffusion run "
                    "(--diffusion).")
    if "why" in found:
        return note(f"No audit of who was in the training set: {found['why']}.")
    low, high = found["by_patient"]
    return ("<h3>Who was in the training set?</h3>" + table(
        ["attack", "n", "AUROC", "95 %, by patient", "p", "found at 1 % false alarms", "95 %"],
        [("", ["denoising error", f"{found['n_train']}, {found['n_heldout']}", num(found["auroc"]),
               span(low, high), p_value(found["p"]), percent(found["tpr"]),
               f"{percent(found['tpr_by_patient'][0])} to {percent(found['tpr_by_patient'][1])}"])])
            + note("Training and held-out images, each denoised from the same noise at the same "
                   "times, with its own conditions; an image known by heart is denoised better. "
                   ".5: this attack finds nothing, another "
                   "may. " + (f"{found['note']}. " if found.get("note") else "")
                   + {True: "",
                      False: f"{found.get('run')} is not the model that made these samples.",
                      None: "Which model made the samples is unknown."}[found.get("made")]))


def shown(result: dict, pictures: dict) -> str:
    """Best and worst by rule, beside nearest real, and random grids of each label."""
    body = ""
    rule = ("Of each label, by the sum of two ranks: p, the judge’s probability of the label asked "
            "for, and d, the mean distance to the 5 nearest held-out images of the label by its "
            "median among held-out images; without a judge by d alone. Chosen by that rule, not by "
            "hand.")
    for key, name, caption in (("best", "Best", rule),
                               ("worst", "Worst", "By the same rule, from the other end.")):
        if pictures.get(key):
            items = [((c["png"],), [c["label"], f"d {num(c['d'])}",
                                    *([] if c["p"] is None else [f"p {percent(c['p'])}"])])
                     for c in pictures[key]]
            body += f"<h3>{name}</h3>" + cards(items, (f"{key} synthetic image",), caption)
    if pictures.get("beside"):
        body += "<h3>Beside the nearest real image</h3>" + cards(
            [(shots, []) for shots in pictures["beside"]],
            ("generated", "nearest training image", "nearest held-out image"), "Synthetic images "
            "drawn at random; from above: generated, its nearest training image, its nearest "
            "held-out one (pixels, histograms equalised).")
    for label, (real, made) in (pictures.get("grids") or {}).items():
        n, m = result["data"]["heldout_labels"].get(label,
                                                    0), result["samples"]["labels"].get(label, 0)
        body += (f'<h3>{escape(label)}</h3><div class="pair">'
                 + figure(real, f"Real, held-out; drawn at random from n = {n}.", f"real {label}")
                 + figure(made, f"Synthetic; drawn at random from n = {m}, none picked by hand.",
                          f"synthetic {label}") + "</div>")
    return body or note("No pictures were given.")


def collection(pictures: dict) -> str:
    """Real beside synthetic for every value of every condition."""
    found, body, before = pictures.get("collection") or [], "", None
    for c in found:
        name, value = c["condition"], c["value"]
        body += f"<h3>{escape(name)}</h3>" * (name != before)
        body += '<div class="strips">'
        for side, kind, n in (("heldout", "real", c["n"]), ("synthetic", "synthetic", c["m"])):
            body += (
                f"<figure>{img(c[side], f'{kind}, {name} {value}')}<figcaption>{escape(value)}, "
                f"{kind}, {c['shown']} of {n}</figcaption></figure>")
        body, before = body + "</div>", name
    return body + note("Drawn at random among the images that have, or were asked for with, this "
                       "value." if found
                       else "The synthetic images have no condition that the real ones have, too.")


def matrix(found: dict | None) -> str:
    """The heat maps of a matrix run on the same samples."""
    if not found:
        return note("No matrix of these samples was found. It sets them beside real images of "
                    "every kind, other hospitals and known frauds that it must "
                    "catch.") + command("python evaluate.py matrix")
    caught = sum(c["caught"] is True for c in found["controls"])
    faults = "; ".join(found["faults"])
    return (f"<p><b>{escape(found['status'])}.</b> {caught} of {len(found['controls'])} control "
            f"sets were caught{': ' + escape(faults) if faults else ''}. Its own page is "
            f"matrix.html in {escape(found['config']['out'])}.</p>" + "".join(
                figure(png, f"KD in the space “{name}”.", f"heat map, {name}")
                for name, png in figures.matrix_maps(found)))


def study(result: dict) -> str:
    results, summary = result.get("classifier") or [], result.get("study") or {}
    if not results:
        return note("No study was found. python classify.py trains the same classifier on real, "
                    "real + duplicated and real + synthetic images.")
    sizes = ", ".join(f"{r.get('n', '?')} ({r['test_set']})"
                      for r in {r["test_set"]: r for r in results}.values())
    body = figure(figures.study_chart(results), f"Each dot one seed, lines the means over seeds; "
                  "the same optimiser steps for every arm. n = "
                  f"{sizes}.", "balanced accuracy of each arm")
    lines = [("own" * ("synthetic" in r["arm"]),
              [r["test_set"], r["arm"], r.get("seeds", "–"), r.get("n_train", "–"),
               _sd(r, "accuracy", 100), _sd(r, "balanced_accuracy", 100), _sd(r, "auroc_macro", 1)])
             for r in summary.get("arms") or []]
    head = ["test set", "trained on", "seeds", "images", "accuracy, %", "balanced, %", "AUROC"]
    body += table(head, lines) if lines else ""
    lines = [("", [name, f"{d['arm']} − {d['against']}", d["metric"].replace("_", " "),
                   signed(d["difference"]),
                   span(*d["interval"]), "resolved" if d.get("resolved") else "not resolved"])
             for name, found in (summary.get("differences") or {}).items() for d in found]
    heading = "<h3>Differences</h3>"
    body += heading + table(["test set", "arms", "of", "difference", "95 %", ""],
                            lines) if lines else ""
    return body + note("± standard deviation over seeds. Differences: means over seeds on the same "
                       "images, interval by bootstrap over patients. Duplicates add as many images "
                       "as the synthetic arm and no news; only what exceeds them is due to the new "
                       "images.")


def training(result: dict, pictures: dict) -> str:
    logs = {name: log for name, log in (pictures.get("logs") or {}).items() if log}
    if logs:
        body = figure(figures.curves(logs), "Loss against optimiser steps; held-out where it was "
                      "measured.", "loss curves")
    else:
        body = note("No training log was found.")
    facts = result.get("vae") or {}
    if facts.get("psnr") is not None:
        linear = facts.get("psnr_pca64")
        n = facts.get("n_held_out", "the")
        body += (f"<p>The autoencoder rebuilds {n} held-out images at {facts['psnr']:.1f} dB "
                 f"PSNR" + (f"; 64 principal components of the pixels reach {linear:.1f} dB"
                            if linear else "") + ".</p>")
    if pictures.get("rebuilt"):
        body += figure(pictures["rebuilt"], "Held-out images above, rebuilt by the autoencoder "
                       "below.", "reconstructions")
    return body


def _sd(row: dict, name: str, unit: float) -> str:
    value, sd = row.get(name), row.get(f"{name}_sd")
    return "–" if value is None else num(unit * value) + (f" ± {num(unit * sd)}" if sd is not None
                                                          else "")


def provenance(result: dict) -> str:
    facts = {**{f"data {k}": v for k, v in result["data"].items() if k != "notes"},
             **{f"samples {k}": v for k, v in result["samples"].items()},
             **{f"extractor {e['name']}": {k: v for k, v in e.items() if k != "name"}
                for e in result.get("extractors") or []}, **(result.get("provenance") or {}),
             **{f"command of {name}": text for name, text in (result.get("commands") or {}).items()
                if text}}
    body = fields(facts)
    for name, config in (result.get("configs") or {}).items():
        text = json.dumps(config, indent=1, ensure_ascii=False)
        body += f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" if config else ""
    return body
