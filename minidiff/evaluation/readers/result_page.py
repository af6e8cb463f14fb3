"""The page of a scored study: numbers in, HTML out."""

from __future__ import annotations

import json
from html import escape

from minidiff.evaluation.pages.format import num, p_value, percent, signed, span
from minidiff.evaluation.pages.page import answers, fields, note, page, table
from minidiff.evaluation.verdicts import BAD, GOOD, OPEN

NAMES = {"cohen": "Cohen’s kappa", "fleiss": "Fleiss’ kappa"}


def verdicts(result: dict) -> list[dict]:
    """{"question", "answer", "text", "good"} for what the study was made to answer; "good" says
    which answer is welcome.
    """
    pooled, margin = result["pooled"], result["design"]["margin"]
    question = f"Are synthetic images called Good as often as real ones, to within {100 * margin:.0f} points?"
    if not pooled:
        return [{"question": question, "answer": OPEN, "good": GOOD,
                 "text": "No reader is both finished and attentive."}]
    d = pooled["difference"]
    low, high = (pick(x for x in (d[end], d[f"wide_{end}"]) if x is not None)
                 for end, pick in (("low", min), ("high", max)))
    answer = GOOD if low > -margin else BAD if high < -margin else OPEN
    rates = " and ".join(f"{percent(pooled[k]['value'])} of {k}" for k in ("synthetic", "real"))
    others = "; over other readers, too, "
    wide = f"{others}{points(d['wide_low'])} to {points(d['wide_high'])}" if d[
        "wide_low"] is not None else ""
    found = [{"question": question, "answer": answer, "good": GOOD, "text": f"{rates}; difference "
              f"{points(d['value'])} points ({points(d['low'])} to {points(d['high'])}{wide})."}]
    o = pooled["origin"]
    if o:
        low = min(x for x in (o["low"], o["wide_low"]) if x is not None)
        wide = others + span_percent(o["wide_low"],
                                     o["wide_high"]) if o["wide_low"] is not None else ""
        text = f"{percent(o['value'])} right, where chance is 50 % ({span_percent(o['low'], o['high'])}{wide})."
        found.append({"question": "Do readers tell synthetic images from real ones?",
                      "answer": GOOD if low > 0.5 else OPEN, "good": BAD, "text": text})
    return found


def render(result: dict) -> str:
    """The whole page; a function of its argument alone."""
    pooled, readers = result["pooled"], result["readers"]
    lead = (f"{len(readers)} readers, of whom {len(pooled['readers']) if pooled else 0} count; "
            f"study {result['study']}, key {result['key_sha256']}.")
    return page("Reading study", lead, {
        "verdict": ("Verdict", verdict(result)),
        "good": ("Good or Bad", good(result)),
        "agreement": ("Agreement", agreement(result)),
        "origin": ("Real or generated", origin(result)),
        "labels": ("By set and label", labels(result)),
        "reasons": ("Why Bad", reasons(result)),
        "numbers": ("Against computed numbers", numbers(result)),
        "files": ("Files", files(result)),
    })


def verdict(result: dict) -> str:
    rows = [("open" if v["answer"] == OPEN else "yes" if v["answer"] == v["good"] else "no",
             v["answer"], f'{escape(v["question"])}<div class="note">{escape(v["text"])}</div>')
            for v in result["verdict"]]
    named = "".join(map(note, result["remarks"]))
    return (answers(rows) + '<p class="warning"><strong>Not for diagnosis.</strong> Readers judged '
            "pictures, not patients. An image called Good may still be wrong.</p>" + named
            + note("Intervals are at 95 %. The margin and the rule by which inattentive readers "
                   "are left out were written down before the reading."))


def good(result: dict) -> str:
    lines, care = [], []
    for r in result["readers"]:
        kind = "" if r["pooled"] else "grey"
        state = "unfinished" if r["missing"] else "" if r["attentive"] else "inattentive"
        rates = [f"{r[k]['k']} of {r[k]['n']}, {share(r[k])}" for k in ("synthetic", "real")]
        lines.append((kind, [r["reader"], state, *rates, change(r["difference"])]))
        care.append((kind, [f"reader {r['reader']}", f"{r['controls_bad']} of {r['controls']}",
                            num(r["seconds"])]))
    p = result["pooled"]
    for name, prefix in (("these readers", ""), ("other readers, too", "wide_")) if p else ():
        lines.append(("own", ["pooled", name, *(share(p[k], prefix) for k in ("synthetic", "real")),
                              change(p["difference"], prefix)]))
    return table(["reader", "", "synthetic", "real", "difference, points"], lines) + note(
        "Share called Good, at the first showing. One reader: Wilson’s interval, Newcombe’s of the "
        "difference. Pooled over these readers: Wilson’s at the number of independent images that "
        "the spread between images is worth; the difference as Newcombe’s. Over other readers, "
        "too: two-way variance of readers and images with Satterthwaite’s degrees of freedom; with "
        "fewer than five readers it rests on very little. Grey: not pooled."
    ) + table(["", "spoilt images called Bad", "seconds an image"], care)


def agreement(result: dict) -> str:
    lines = [("", [a["of"], a["n"], percent(a["observed"]), coefficient(a["kappa"]),
                   coefficient(a["ac1"])]) for a in result["agreement"]]
    kappa = NAMES[result["agreement"][0]["which"]] if lines else ""
    body = (table(["between readers", "images", "agree", kappa, "Gwet’s AC1"], lines) if lines
            else note("Agreement between readers needs two who count."))
    own = [("" if r["pooled"] else "grey", [f"reader {r['reader']}", r["intra"]["n"],
                                            percent(r["intra"]["same"]), coefficient(r["intra"])])
           for r in result["readers"]]
    return body + table(["with himself", "images twice", "same answer", "intraclass kappa"],
                        own) + note(f"1: full agreement, 0: what chance would give. Kappa falls "
                                    "where nearly all images get the same answer, however well "
                                    "readers agree; AC1 does not. Shown twice, at least "
                                    f"{result['design']['gap']} images apart: interval of Donner "
                                    "and Eliasziw.")


def origin(result: dict) -> str:
    lines = [("" if r["pooled"] else "grey",
              [r["reader"], f"{o['k']} of {o['n']}, {share(o)}", p_value(o["p"]),
               percent(o["said_synthetic"]), percent(o["said_real"]),
               coefficient({"value": o["auroc"], "low": o["auroc_low"], "high": o["auroc_high"]})])
             for r in result["readers"] if (o := r.get("origin")) and o["n"]]
    if not lines:
        return note("This question was not asked or not answered.")
    o = (result["pooled"] or {}).get("origin")
    for name, prefix in (("these readers", ""), ("other readers, too", "wide_")) if o else ():
        lines.append(("own", [f"pooled, {name}", share(o, prefix), "", "", "", ""]))
    return table(["reader", "right", "p", "synthetic", "real", "AUROC"], lines) + note(
        "p: exact binomial against 50 %. Synthetic, real: share of each called generated. AUROC: "
        "of answers graded by confidence, DeLong’s interval. 50 % right is what guessing gives; an "
        "interval that holds it does not show that readers cannot tell.")


def labels(result: dict) -> str:
    lines = [("own" * (r["kind"] == "synthetic"), [r["set"], r["label"], r["n"], share(r)])
             for r in result["labels"]]
    return table(["set", "label", "images", "Good"], lines) if lines else note("No reader counts.")


def reasons(result: dict) -> str:
    lines = [("", [r["reason"].replace("_", " or "),
                   *(f"{r[k]['k']} of {r[k]['n']}" for k in ("synthetic", "real"))])
             for r in result["reasons"]]
    return table(["reason", "synthetic", "real"],
                 lines) + note("Of all answers Bad; several reasons or none may be "
                               "given.") if lines else note("No reader counts.")


def numbers(result: dict) -> str:
    lines = [("", [r["number"], r["n"],
                   *(coefficient({"value": r[k], "low": r[f"{k}_low"], "high": r[f"{k}_high"]})
                     for k in ("r", "auroc"))]) for r in result["numbers"]]
    if not lines:
        return note("None were given (--numbers).")
    return table(["number", "images", "rank correlation with Good", "AUROC for Good"],
                 lines) + note("Synthetic images. Correlation with the share of readers who call "
                               "an image Good; AUROC .5: the number says nothing about what most "
                               "readers call Good.")


def files(result: dict) -> str:
    facts = {**{f"design {k}": v for k, v in result["design"].items()}, **result["answers"],
             **result["provenance"]}
    text = escape(json.dumps(result["pooled"], indent=1))
    return fields(
        facts) + f"<details><summary>pooled numbers</summary><pre>{text}</pre></details>" + note(
            "A checksum finds damage and edits after export. It is no signature: a forger can "
            "compute it anew.")


def share(x: dict, prefix: str = "") -> str:
    return f"{percent(x['value'])} ({span_percent(x[prefix + 'low'], x[prefix + 'high'])})"


def change(x: dict, prefix: str = "") -> str:
    return f"{points(x['value'])} ({points(x[prefix + 'low'])} to {points(x[prefix + 'high'])})"


def span_percent(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{100 * low:.1f} to {100 * high:.1f} %"


def points(x: float | None) -> str:
    return "–" if x is None else signed(round(100 * x, 1))


def coefficient(x: dict) -> str:
    return f"{num(x['value'])} ({span(x['low'], x['high'])})"
