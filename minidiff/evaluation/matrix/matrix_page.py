"""The page of the reference matrix: verdicts first, then ρ, heat maps with their values, controls,
copies, every number.
"""

from __future__ import annotations

from html import escape

from minidiff.evaluation.matrix.cells import LIMIT
from minidiff.evaluation.matrix.controls import CONTROLS
from minidiff.evaluation.matrix.gates import VERDICTS
from minidiff.evaluation.pages import charts as figures
from minidiff.evaluation.pages.format import num, p_value, percent, signed, span
from minidiff.evaluation.pages.page import answers, chip, fields, figure, note, page, table
from minidiff.evaluation.verdicts import BAD, KINDS

MEANING = {
    "FIDELITY": f"Are they as near to held-out real images as ρ ≤ {LIMIT:g} asks, in every space?",
    "COVERAGE": "Do they reach the variety of held-out real images?",
    "LABEL": "Do they show the label asked for?",
    "NOVELTY": "Are they new, not copies of training images?",
}


def render(result: dict) -> str:
    """The whole page; a function of the contents of matrix.json alone."""
    data, made = result["data"], [c for c in result["columns"] if c["kind"] == "synthetic"]
    lead = (f"{len(result['rows'])} real sets against {len(result['columns'])} sets, of them "
            f"{len(made)} synthetic, at {data['size']} px and at most {result['config']['n']} "
            "images of each: "
            f"{' + '.join(data['folders'])}" + (f"; other hospitals: {' + '.join(data['external'])}"
                                                if data["external"] else "") + ".")
    return page(f"Reference matrix: {' + '.join(data['samples'])}", lead, {
        "verdicts": ("Verdicts", verdicts(result)),
        "rho": ("How far, in hospitals", rho(result)),
        "matrix": ("The matrix", heat_maps(result)),
        "controls": ("Controls that must be caught", controls(result)),
        "copies": ("Nearness to training images", copies(result)),
        "numbers": ("Every number against held-out images", numbers(result)),
        "shortcuts": ("What the files give away", shortcuts(result)),
        "provenance": ("Provenance", provenance(result)),
    })


def verdicts(result: dict) -> str:
    """Whether the matrix is valid, then a block for each synthetic set: four answers with their
    numbers, and C2ST.
    """
    tested = [c for c in result["controls"] if c["caught"] is not None]
    if result["status"] == "VALID":
        missed = ", ".join(f"{c['control']} ({c['label']})" for c in result["controls"]
                           if c["caught"] is None)
        missed = f" Not tested: {missed}." if missed else ""
        html = (f"<p><b>VALID.</b> All {len(tested)} control sets that could be tested, known "
                "frauds among the columns, were caught by the verdict that is meant for "
                f"them.{escape(missed)}</p>")
    else:
        faults = "".join(f"<li>{escape(fault)}</li>" for fault in result["faults"])
        html = ('<div class="warning"><p><b>INVALID.</b> A control was not caught: what this page '
                'says of the synthetic '
                f"sets is worth nothing until it is.</p><ul>{faults}</ul></div>")
    alarms = [f"{v['name']}: {k}" for v in result["verdicts"]
              if v["kind"] == "real" for k in VERDICTS if v.get(k, {}).get("answer") == BAD]
    if alarms:
        html += note(f"False alarm: {'; '.join(alarms)} says no to real training images of the "
                     "same hospital.")
    made = [v for v in result["verdicts"] if v["kind"] == "synthetic"]
    rows = ""
    for v in made:
        found = [] if v["grey"] else [v[name]["answer"] for name in VERDICTS]
        cells = "".join(f"<td>{chip(KINDS[answer], answer)}</td>" for answer in found)
        grey = f'<td colspan="4">nothing is said: {escape(v["grey"])}</td>'
        rows += f"<tr><td>{escape(v['name'])}</td><td>{v['n']}</td>{cells or grey}</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("set", "n", *VERDICTS))
    html += f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    html += note("yes and no are said where the whole 95 % interval lies on one side of the gate. "
                 "There is no overall score: a set may be near and copied, or new and far.")
    return html + "".join(f"<h3>{escape(v['name'])}</h3>{_answers(v)}" for v in made
                          if not v["grey"])


def _answers(v: dict) -> str:
    rows = []
    for name in VERDICTS:
        found, remark = v[name], ""
        if name == "LABEL" and v["label_confounded"]:
            remark = " CONFOUNDED: this label comes from other sources than all others; the judge may see the hospital."
        if name == "FIDELITY" and v["yardstick_confounded"]:
            remark = " CONFOUNDED: the yardstick differs in label and in source."
        rows.append((KINDS[found["answer"]], found["answer"], f"<b>{name}.</b> "
                     f"{escape(MEANING[name])}<div>{escape(found['text'] + remark)}</div>"))
    told = "; ".join(f"{space}: {percent(share)} ({percent(low)} to {percent(high)})"
                     for space, (share, low, high) in v["C2ST"].items())
    rows.append(("", "reported", f"<b>C2ST.</b> Can a nearest neighbour tell real from synthetic? "
                 f"50 % is guessing; no gate.<div>{escape(told)}.</div>"))
    return answers(rows)


def rho(result: dict) -> str:
    """A table for each label: ρ of every candidate in every space, and the distances that it is the
    ratio of.
    """
    html = note("ρ = KD(set, held-out real) / KD(yardstick, held-out real), with its 95 % "
                "interval. 0: another sample of the same hospital; 1: as far as the yardstick, "
                "real images of another hospital where there are any, else of another label; above "
                "1: farther. Not resolved: the yardstick cannot be told from the held-out images "
                "here. The row “real, train” is what other patients of this hospital score.")
    for label in dict.fromkeys(v["label"] for v in result["verdicts"]):
        own = [v for v in result["verdicts"] if v["label"] == label and v.get("rho")]
        if not own:
            continue
        spaces, first = list(own[0]["rho"]), own[0]
        rows = [("own" if v["kind"] == "synthetic" else "",
                 (("real, " if v["kind"] == "real" else "") + v["part"], v["n"],
                  *(_ratio(v["rho"][space]) for space in spaces))) for v in own]
        r = first["rho"]
        rows += [("grey", ("KD of the yardstick", r[spaces[0]]["yardstick_n"], *(
            f"{num(r[s]['yardstick_KD'])} ({span(r[s]['yardstick_low'], r[s]['yardstick_high'])})"
            for s in spaces))), ("grey", (f"KD of {own[0]['part']}", first["n"], *(
                f"{num(r[s]['KD'])} ({span(r[s]['KD_low'], r[s]['KD_high'])})" for s in spaces)))]
        confounded = " (CONFOUNDED: another label from another source)" if first[
            "yardstick_confounded"] else ""
        html += f"<h3>{escape(label)}</h3>" + note(f"Yardstick: {first['yardstick']}{confounded}.")
        html += table(("set", "n", *spaces), rows)
    return html


def _ratio(r: dict) -> str:
    return f"{num(r['rho'])} ({span(r['rho_low'], r['rho_high'])})" if r[
        "resolved"] else f"not resolved; KD {num(r['KD'])}"


def heat_maps(result: dict) -> str:
    """One picture a space: KD of every column (downwards) against every row (across)."""
    rows, columns = ([s for s in result[side] if not s["grey"]] for side in ("rows", "columns"))
    html = note("KD of each set (downwards) to each real set (across); darker is farther, by the "
                "root. 0 is what real scores against real on average; it may be negative. ◂ is a "
                "set's own held-out label. † is CONFOUNDED: label and source differ both, and "
                "nobody can say which is seen. – is not measured: too few images, or the same "
                "patients on both sides (the reasons stand in matrix.json and below).")
    for e in result["extractors"]:
        at = {(c["row"], c["column"]): c for c in result["cells"] if c["extractor"] == e["name"]}
        found = [[at[r["name"], c["name"]] for r in rows] for c in columns]
        own = [[r["part"] == "held-out" and r["label"] == c["label"] and c["kind"] != "real"
                for r in rows] for c in columns]
        marks = [[("◂" if o else "") + ("†" if cell["confounded"] else "")
                  for cell, o in zip(line, held)] for line, held in zip(found, own)]
        values = [[None if "grey" in cell else cell["KD"] for cell in line] for line in found]
        png = figures.heat_map(values, [_short(c) for c in columns], [_short(r) for r in rows],
                               marks)
        html += f"<h3>{escape(e['name'])}</h3>" + figure(png, f"KD in the space “{e['name']}”.",
                                                         "Heat map of kernel distances in the "
                                                         f"space {e['name']}")
    few = [("grey", (s["name"], s["grey"])) for s in result["columns"] if s["grey"]]
    return html + (table(("not measured", "why"), few) if few else "")


def _short(s: dict) -> str:
    return s["name"] + (" (synthetic)" if s["kind"] == "synthetic" else "")


def controls(result: dict) -> str:
    """Which control was caught with which label; the numbers behind it are folded away."""
    said = {True: "caught", False: "NOT CAUGHT", None: "not tested"}
    at = {(c["control"], c["label"]): c for c in result["controls"]}
    labels = list(dict.fromkeys(c["label"] for c in result["controls"]))
    rows = [("", (name, control.verdict, *(said[at[name, k]["caught"]] if (name, k) in at
                                           else "no images" for k in labels), control.what))
            for name, control in CONTROLS.items()]
    why = "".join(f"<p><b>{escape(c['control'])}, {escape(c['label'])}:</b> {escape(c['why'])}</p>"
                  for c in result["controls"])
    return table(("control", "must fail", *labels, "what it is"), rows) + (
        f"<details><summary>The numbers by which they were caught</summary>{why}</details>")


def copies(result: dict) -> str:
    rows = []
    for v in result["verdicts"]:
        for s in (v.get("memorisation") or {}).get("spaces", []):
            kind = "own" if v["kind"] == "synthetic" else ""
            rows.append((kind, (v["name"], s["space"], s["n"], num(s["q05"]), num(s["q50"]),
                                f"{percent(s['near_share'])} ({percent(s['near_low'])} to "
                                f"{percent(s['near_high'])})", percent(s["near_heldout_share"]),
                                p_value(s["near_p"]), f"{s['closest_train']} of {s['closest']}",
                                f"{s['closest_expected']:.1f}",
                                num(s["copying_z"]), signed(s["auth_excess"]))))
    head = ("set", "space", "n", "q, 5 %", "q, median", "near-copies", "of held-out", "p",
            "closest in training", "by chance", "C_T, z", "AuthPct less held-out")
    return (note("q: distance to the nearest training image of the label by that to the nearest "
                 "held-out one; 1 without copying. Near-copies: nearer to a training image than "
                 "the nearest 5 % of held-out images are (Fisher's exact p). Closest: of the "
                 "images that lie most conspicuously near to some real one, how many have a "
                 "training image there. C_T far below 0 and AuthPct below that of held-out images "
                 "point to copies, and so do smooth images.") + table(head, rows))


def numbers(result: dict) -> str:
    """Cells against the held-out references, with everything that was measured in them."""
    references = list(dict.fromkeys(v["reference"] for v in result["verdicts"]))
    html = note("Against held-out images of each label; all other cells are in matrix.json. Real: "
                "what two draws of real images of this label score at the same n (median, 5 to 95 "
                "%). p: the share of random divisions of the pooled patients that are as far "
                "apart. C2ST gates nothing.")
    for name in references:
        rows = []
        for c in (c for c in result["cells"] if c["row"] == name and "grey" not in c):
            rows.append(("first" if rows and rows[-1][1][0] != c["extractor"] else "",
                         (c["extractor"], c["column"] + (" †" if c["confounded"] else ""),
                          f"{c['n_s']}, {c['n_r']}", f"{num(c['KD'])} "
                          f"({span(c['KD_low'], c['KD_high'])})", p_value(c["KD_p"]), num(c["FD"]),
                          _null(c, "FD"), num(c["MIND"]), _null(c, "MIND"), num(c["density"]),
                          f"{percent(c['coverage'])}", _null(c, "coverage"), percent(c["C2ST"]))))
        head = ("space", "set", "n set, row", "KD (95 %)", "p", "FD", "FD, real", "MIND",
                "MIND, real", "density", "coverage", "coverage, real", "C2ST")
        html += f"<h3>{escape(name)}</h3>" + table(head, rows)
    return html


def _null(c: dict, name: str) -> str:
    if f"{name}_null" not in c:
        return "–"
    few = "" if c["null_n"] == c["n"] else f" at n = {c['null_n']}"
    return f"{num(c[f'{name}_null'])} ({span(c[f'{name}_null_low'], c[f'{name}_null_high'])}){few}"


def shortcuts(result: dict) -> str:
    rows = [("", (s["label"], s["fact"], num(s["auroc"]), span(s["low"], s["high"]),
                  f"{s['n']}, {s['n_rest']}")) for s in result["shortcuts"]]
    return (note("The one fact about a file, other than its picture, that tells a label best from "
                 "the rest, chosen on training files and measured on held-out ones. Near 1, "
                 "hospital and label go together, and no figure about labels is about disease "
                 "alone.") + table(("label", "fact", "AUROC", "95 %", "n, rest"), rows))


def provenance(result: dict) -> str:
    facts = {**result["provenance"],
             **{f"data, {k}": v for k, v in result["data"]["fingerprints"].items()},
             **{f"space {e['name']}": e["identity"] or "fitted to the training images"
                for e in result["extractors"]},
             **{f"--{k}": v for k, v in result["config"].items() if k != "kind"}}
    return fields(facts) + "".join(map(note, result["notes"]))
