"""The page of the study: is there a shortcut, did synthetic images help, and every number behind
it; and the CSV tables.

A function of summary.json, results.json and the galleries alone. What the summary lacks is left
out. Where a trivial feature tells a label, the audit's sentence stands over every table, and
SHORTCUT across it and across every chart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape

from minidiff.data.table import csv_text
from minidiff.evaluation.pages.format import num, percent
from minidiff.evaluation.pages.page import answers as answer_rows
from minidiff.evaluation.pages.page import cards, fields, figure, note, page, table
from minidiff.evaluation.study import charts, sections, trust
from minidiff.evaluation.study.answers import answers, kinds_of, shortcut

TABLE = '<div class="scroll"><table>'  # as page.table begins one
ACROSS = ("background:url(&quot;data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' "
          "width='230' height='84'%3E%3Ctext x='20' y='62' font-family='sans-serif' font-size='27' "
          "fill='%23b5482a' fill-opacity='.15' transform='rotate(-13 115 "
          "42)'%3ESHORTCUT%3C/text%3E%3C/svg%3E&quot;)")
SHOWN = {"hits": "Found", "misses": "Missed", "alarms": "False alarms"}
# pictures one above the other, and lines of text
Gallery = Sequence[tuple[Sequence[bytes], Sequence[str]]]


def study_page(summary: Mapping, results: Sequence[Mapping] = (),
               pictures: Mapping[str, Gallery] | None = None) -> str:
    """The whole page. `pictures`: "hits", "misses" and "alarms" of the label of interest, each
    picture with its Grad-CAM.
    """
    names = list(kinds_of(summary))
    seeds = max((row.get("seeds", 0) for row in summary.get("arms") or []), default=0)
    lead = (
        f"{len(names)} {'arm' if len(names) == 1 else 'arms'} of training images, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'} each, the same network and number of steps; label of "
        f"interest: {summary.get('positive', '–')}, of "
        f"{', '.join(summary.get('labels') or [])}{'' if summary.get('exclusive', True) else ' (an image may have several)'}.")
    parts = {
        "answers": ("What came out", answer_rows(answers(summary))),
        "audit": ("Told without a look at the lungs", sections.audit(summary)),
        "arms": ("The arms, side by side", sections.arms(summary, results)),
        "differences": ("Differences between arms", sections.differences(summary)),
        "curves": ("ROC and reliability", sections.curves(summary)),
        "uncertainty": ("When not to trust an answer", trust.uncertainty(summary)),
        "fairness": ("Does it serve all alike?", trust.fairness(summary)),
        "attributes": ("Who the synthetic patients are", trust.attributes(summary)),
        "pictures": ("Found, missed, and where the network looked",
                     galleries(pictures or {}, summary.get("positive", ""))),
        "training": ("What each arm was trained on", sections.training_sets(summary)),
        "made": ("How it was made", made(summary)),
    }
    audit = summary.get("audit") or {}
    sentence = audit.get("sentence") or "SHORTCUT" if shortcut(summary) else ""
    return page("Did the synthetic images help?", lead, {
        key: (heading, across(html, sentence)) for key, (heading, html) in parts.items() if html})


def across(html: str, sentence: str) -> str:
    """The same with a sentence over each table, and SHORTCUT behind its numbers; all tables pass
    here, so none is missed.
    """
    if not sentence:
        return html
    return html.replace(TABLE, f'<p class="note no">{escape(sentence)}</p><div class="scroll" '
                        f'style="{ACROSS}"><table>')


def galleries(pictures: Mapping[str, Gallery], positive: str) -> str:
    html = "".join(f"<h3>{SHOWN[kind]}</h3>" + cards(
        pictures[kind], ("the image", "where the network looked"), f"{positive}: "
        f"{SHOWN[kind].lower()}, the surest first.") for kind in SHOWN if pictures.get(kind))
    return html and note("Each image with its Grad-CAM below: the warmer, the more it spoke for "
                         "the answer. A warm border, corner or letter is a hint at a shortcut; a "
                         "warm lung is no proof that there is none.") + html


def made(summary: Mapping) -> str:
    """Validation curves, knobs, the judge, and remarks."""
    curves, html = {arm: looks for arm, looks in (summary.get("curves") or {}).items() if looks}, ""
    if curves:
        html += figure(charts.courses(curves, kinds_of(summary)), "Loss on validation, by which "
                       "alone the step of each network was chosen. Red: with synthetic images; "
                       "grey: with duplicates; dark: real alone.", "validation loss against step")
    html += fields(summary["recipe"]) if summary.get("recipe") else ""
    rows = [("", (a["variable"], a["n"], percent(a["accuracy"]) if "accuracy" in a
                  else f"r = {num(a.get('r'))}")) for a in summary.get("judge") or []]
    if rows:
        html += note("The judge, a predictor of label and attributes trained on real patients, on "
                     "held-out real images; it is for evaluate.py and has no part in the figures "
                     "above.") + table(("judge of", "n", "right"), rows)
    html += fields(summary["provenance"]) if summary.get("provenance") else ""
    return html + "".join(note(text) for text in summary.get("notes") or [])


def csv_tables(summary: Mapping, results: Sequence[Mapping] = ()) -> dict[str, str]:
    """Name → CSV text of every table of the page, a row for each line, a column for each number;
    empty ones are left out.
    """
    def by_arm(kind: str) -> list[tuple[dict, dict]]:
        return [({"test_set": s, "arm": arm}, found)
                for s, arms in (summary.get(kind) or {}).items() for arm, found in arms.items()]

    found: dict[str, list[dict]] = {
        "arms": [flat(row) for row in summary.get("arms") or []],
        "seeds": [flat(row) for row in results],
        "differences": [{"test_set": s, **flat(d)}
                        for s, own in (summary.get("differences") or {}).items() for d in own],
        "shortcuts": [flat(row) for row in (summary.get("audit") or {}).get("rows") or []],
        "roc": [{**at, "fpr": x, "tpr": y} for at, corners in by_arm("roc") for x, y in corners],
        "calibration": [{**at, **flat({k: v for k, v in c.items() if not k.startswith("bins")})}
                        for at, c in by_arm("calibration")],
        "reliability": [{**at, "probabilities": name, **b} for at, c in by_arm("calibration")
                        for name, key in (("as trained", "bins"), ("scaled", "bins_scaled"))
                        for b in c.get(key) or []],
        "conformal": [{**at, "label": label, **flat(row)} for at, u in by_arm("uncertainty")
                      for label, row in ((u.get("conformal") or {}).get("classes") or {}).items()],
        "uncertainty": [{**at, "by": name,
                         **flat({k: v for k, v in u[name].items() if k != "selective"})}
                        for at, u in by_arm("uncertainty") for name in trust.UNSURE if name in u],
        "selective": [{**at, "by": name, **row} for at, u in by_arm("uncertainty")
                      for name in trust.UNSURE if name in u
                      for row in u[name]["selective"]["curve"]],
        "groups": [{**at, **flat(row)} for at, f in by_arm("fairness") for row in f.get("groups")
                   or []], "gaps": [{**at, **flat(row)} for at, f in by_arm("fairness")
                                    for row in f.get("gaps") or []],
        **{name: [{"source": source, **flat(row)}
                  for source, own in (summary.get("attributes") or {}).items()
                  for row in own.get(name) or []] for name in ("shares", "association")},
    }
    return {name: csv_text(rows) for name, rows in found.items() if rows}


def flat(value: Mapping, before: str = "") -> dict[str, object]:
    """Nested figures as columns: {"auroc": {"covid": .9}} → auroc_covid; an interval → …_low and
    …_high; lists as JSON.
    """
    found: dict[str, object] = {}
    for key, x in value.items():
        name = f"{before}{key}"
        if isinstance(x, Mapping):
            found |= flat(x, f"{name}_")
        elif isinstance(x, (list, tuple)) and len(x) == 2 and "interval" in name:
            found |= {f"{name}_low": x[0], f"{name}_high": x[1]}
        else:
            found[name] = json.dumps(x) if isinstance(x, (list, tuple)) else x
    return found
