"""The study's figures of accuracy, a section each; "" where the summary has nothing to tell, and it
is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from minidiff.evaluation.pages.format import num, p_value
from minidiff.evaluation.pages.page import figure, note, table
from minidiff.evaluation.study import charts
from minidiff.evaluation.study.answers import (
    area,
    by_label,
    delta,
    first,
    headlines,
    kinds_of,
    name_of,
    patients,
    share,
    shortcut,
    size_of,
    title_of,
)

POINTS = "balanced_accuracy", "accuracy"  # shown in per cent, their differences in points


def audit(summary: Mapping) -> str:
    """Every trivial feature and label: a column for each test set."""
    rows = (summary.get("audit") or {}).get("rows") or []
    if not rows:
        return ""
    sets, lines = list(dict.fromkeys(r["test_set"] for r in rows)), []
    for kind, label in dict.fromkeys((r["features"], r["label"]) for r in rows):
        own = {r["test_set"]: r for r in rows if (r["features"], r["label"]) == (kind, label)}
        cells = [f"{area(own[s]['auroc'], (own[s]['low'], own[s]['high']))}; {own[s]['n']}, "
                 f"{own[s]['n_rest']}" if s in own else "–" for s in sets]
        lines.append(("own" * any(r["shortcut"] for r in own.values()), (kind, label, *cells)))
    dark = {"masks": "the masks of the data",
            "box": "a central box"}.get(summary["audit"].get("region"), "masks or a box")
    return note(f"AUROC of each label against the rest, learned on the training images, with its "
                "95 % interval by patient; n of the label, of the rest. Red: a SHORTCUT, .9 or "
                "more on the internal test set, or a whole interval above .75. Header: size, "
                f"mode, format and bytes of the file. Lungs blacked out: by {dark}. What a feature "
                "loses on an external set was of the "
                f"hospital.") + table(("told by", "label", *map(title_of, sets)), lines)


def arms(summary: Mapping, results: Sequence[Mapping]) -> str:
    """Forest plots, then for each test set a table of all arms, then every label."""
    rows, positive = summary.get("arms") or [], summary.get("positive", "")
    if not rows:
        return ""
    html = ""
    by_set = {s: [r for r in rows if r["test_set"] == s]
              for s in dict.fromkeys(r["test_set"] for r in rows)}
    for metric in headlines(summary):
        points = {title_of(s): [_point(r, metric, positive, results) for r in own]
                  for s, own in by_set.items()}
        name = f"{name_of(metric, positive)}{', %' * (metric in POINTS)}"
        html += figure(charts.forest(points, kinds_of(summary), name, shortcut(summary)), first(
            f"{name}, of the mean of the seeds’ probabilities, 95 % by patient; small, below it: "
            "each seed by itself. Red diamonds: with synthetic images; squares: with duplicates "
            "of real ones, the control; dots: real images alone, the first of which is the broken "
            f"line. All panels have one scale."), f"{name} of all arms")
    for s, own in by_set.items():
        html += f"<h3>{escape(first(title_of(s)))}{size_of(summary, s)}</h3>" + _arms_table(
            own, positive, headlines(summary)[1])
    return html + note("Of the mean of the seeds’ probabilities, with 95 % intervals by patient; "
                       "±: standard deviation of the seeds, each by itself. Sensitivity and "
                       "specificity: at the threshold that has 90 % specificity on validation, "
                       "Wilson’s intervals. AUPRC is to be read against the share of the label "
                       "among the images.")


def _arms_table(rows: Sequence[Mapping], positive: str, metric: str) -> str:
    show, lines, remarks = share if metric in POINTS else area, [], {}
    for r in rows:
        whole, sd = r.get("ensemble") or {}, r.get(f"{metric}_sd")
        cut = _at(whole, "at_threshold", positive) or {}
        lines.append(("own" * (r.get("added_kind") == "synthetic"), (
            r["arm"] + " †" * bool(r.get("remark")),
            show(whole.get(metric), whole.get(f"{metric}_interval")),
            "–" if sd is None else f"± {show(sd, None)}",
            area(_at(whole, "auroc", positive), _at(whole, "auroc_interval_patients", positive)),
            *(share(cut.get(side), cut.get(f"{side}_interval"))
              for side in ("sensitivity", "specificity")), r.get("n_train", "–"))))
        if r.get("remark"):
            remarks.setdefault(r["remark"], []).append(r["arm"])
    head = ("arm", f"{name_of(metric, positive)}{', %' * (metric in POINTS)}", "SD",
            f"AUROC, {positive}", "sensitivity, %", "specificity, %", "images")
    named = "; ".join(f"{', '.join(own)}: {remark}" for remark, own in remarks.items())
    return table(head, lines) + (note(f"† {named}.") if named else "") + _every_label(rows)


def _every_label(rows: Sequence[Mapping]) -> str:
    lines, answered = [], []
    for r in rows:
        whole = r.get("ensemble") or {}
        for k, label in enumerate(whole.get("auroc") or {}):
            answered = list(whole["auroc"]) if whole.get("confusion") else []
            lines.append(("first" * (k == 0), (
                r["arm"] if k == 0 else "", label, round(whole["prevalence"][label] * whole["n"]),
                share(_at(whole, "recall", label), _at(whole, "recall_interval", label)),
                area(whole["auroc"][label], _at(whole, "auroc_interval_patients", label)),
                area(_at(whole, "auprc", label), _at(whole, "auprc_interval", label)),
                *(whole["confusion"][k] if answered else ()))))
    head = ("arm", "label", "n", "recall, %", "AUROC", "AUPRC",
            *(f"called {name}" for name in answered))
    return folded("Every label, and what it was called", table(head, lines)) if lines else ""


def differences(summary: Mapping) -> str:
    """Forest plots of all pairs, then for each test set a table; the other figures are folded
    away.
    """
    found = {s: own for s, own in (summary.get("differences") or {}).items() if own}
    if not found:
        return ""
    positive, main, html = summary.get("positive", ""), headlines(summary), ""
    for metric in main:
        points = {title_of(s): [_gap(d) for d in own if d["metric"] == metric]
                  for s, own in found.items()}
        name = f"{name_of(metric, positive)}, difference{' in points' * (metric in POINTS)}"
        html += figure(charts.forest(points, kinds_of(summary), name, shortcut(summary), 0.0),
                       first(f"{name}, with 95 % by patient, the same patients for both arms. "
                             "Filled: resolved; hollow: not. Right of the line the first arm is "
                             f"better. All panels have one scale."), name)
    for s, own in found.items():
        tables = {metric: _pairs([d for d in own if d["metric"] == metric], positive)
                  for metric in dict.fromkeys((*main, *(d["metric"] for d in own)))}
        html += f"<h3>{escape(first(title_of(s)))}{size_of(summary, s)}</h3>" + "".join(
            map(tables.pop, main))
        html += folded("By the other figures", "".join(tables.values())) if tables else ""
    return html + note("Of the mean probabilities over seeds. Resolved: the interval leaves out 0, "
                       "p is below .05 after Holm’s correction, and every seed by itself has the "
                       "sign. The correction is over the pairs of one figure and one set, not over "
                       "all tables. Needed: patients to find the difference that was found with 80 "
                       "% power; no surer than that difference is.")


def _pairs(rows: Sequence[Mapping], positive: str) -> str:
    """One figure on one test set."""
    lines = [("own" * d["resolved"],
              (f"{d['arm']} − {d['against']}",
               delta(d["difference"], d["interval"], d["metric"] in POINTS), p_value(d["p"]),
               p_value(d["p_holm"]), d["test"], f"{d['seeds_agree']} of {d['seeds']}",
               "resolved" if d["resolved"] else "not resolved", "–" if d["patients_needed"] is None
               else patients(d["patients_needed"]))) for d in rows]
    metric = rows[0]["metric"] if rows else ""
    head = (name_of(metric, positive), f"{'points' if metric in POINTS else 'difference'} (95 %)",
            "p", "Holm’s p", "test", "seeds", "", "needed")
    return table(head, lines) if lines else ""


def curves(summary: Mapping) -> str:
    """ROC, reliability, and the errors of the probabilities."""
    kinds, html = kinds_of(summary), ""
    found = {s: lines for s, lines in (summary.get("roc") or {}).items() if any(lines.values())}
    if found:
        html += figure(charts.roc(found, {s: title_of(s) for s in found}, kinds, shortcut(summary)),
                       f"ROC of {summary.get('positive', '')} against the rest, of the mean of the "
                       "seeds’ probabilities. Red: with synthetic images; grey: with duplicates; "
                       f"dark: real alone.", "ROC curves")
    measured = {s: own for s, own in (summary.get("calibration") or {}).items() if own}
    for s, own in measured.items():
        html += f"<h3>Are the probabilities right? {escape(first(title_of(s)))}</h3>" + figure(
            charts.reliability(own, kinds, shortcut(summary)), "Share right against confidence, "
            "bins of equally many images. Filled: as trained, with Wilson’s intervals; hollow: "
            "after one temperature, fitted on validation. Below the line: too "
            "sure.", f"reliability on the {title_of(s)}")
        lines = [("own" * (kinds.get(arm) == "synthetic"), (
            arm, c["n"], *(area(one[k], None) for one in (c, c["scaled"])
                           for k in ("ece", "ece_null_high")), num(c["temperature"]),
            *(f"{area(c[k], None)} → {area(c['scaled'][k], None)}" for k in ("brier", "nll"))))
                 for arm, c in own.items()]
        html += table(("arm", "n", "ECE", "chance", "ECE, scaled", "chance", "temperature", "Brier",
                       "NLL"), lines)
    return html + (note("ECE: debiased, 15 bins of equally many images. Chance: what a calibrated "
                        "classifier of the same confidences stays below 95 times in 100; only an "
                        "ECE above it is more than the number of images explains. Brier score and "
                        "NLL: before → after the temperature.") if measured else "")


def training_sets(summary: Mapping) -> str:
    """What each arm was trained on, whether its generator knew more, and how many images there are
    of each label.
    """
    rows, lines = {r["arm"]: r for r in summary.get("arms") or []}.values(), []
    for r in rows:
        real, n = r.get("real"), r.get("n_train")
        added = r.get("added", None if None in (real, n) else n - real)
        lines.append(("own" * bool(r.get("remark")), (
            r["arm"], *("–" if x is None else x for x in (real, added)), r.get("added_kind") or "",
            "–" if n is None else n, r.get("seeds", "–"), r.get("remark", ""))))
    html = (table(("arm", "real", "added", "of", "all", "seeds", ""),
                  lines) + note("All arms have the same number of optimiser steps. An arm whose "
                                "generator saw real images that the arm did not see has an "
                                "advantage that is not of synthetic images.")) if lines else ""
    made = [("", (name, g["n_images"], g["saw"] if g["known"] else "unknown"))
            for name, g in (summary.get("generators") or {}).items()]
    html += table(("synthetic folder", "images", "real images its generator saw"),
                  made) if made else ""
    counts = by_label(summary)
    labels, known = sorted({label for own in counts.values()
                            for label in own}), summary.get("patients") or {}
    sizes = [("", (name, known.get(name, "–"), sum(summary["images"][name].values()),
                   *(own.get(label, 0) for label in labels))) for name, own in counts.items()]
    return html + (table(("set", "patients", "images", *labels), sizes) if sizes
                   else "") + (note("Patients are assumed: one for each image.")
                               if sizes and summary.get("patients_assumed") else "")


def _point(row: Mapping, metric: str, positive: str, results: Sequence[Mapping]) -> dict:
    """One arm's place in the forest plot."""
    def value(score: Mapping) -> float | None:
        return _scaled(_at(score, "auroc", positive) if metric == "auroc" else score.get(metric),
                       metric)

    whole = row.get("ensemble") or {}
    ends = _at(whole, "auroc_interval_patients",
               positive) if metric == "auroc" else whole.get(f"{metric}_interval")
    return {"name": row["arm"], "arm": row["arm"], "value": value(whole),
            "interval": [_scaled(x, metric) for x in ends or (None, None)],
            "seeds": [value(r) for r in results
                      if (r["arm"], r["test_set"]) == (row["arm"], row["test_set"])]}


def _gap(d: Mapping) -> dict:
    """One pair's place in the forest plot."""
    return {"name": f"{d['arm']} − {d['against']}", "arm": d["arm"], "resolved": d["resolved"],
            "value": _scaled(d["difference"], d["metric"]),
            "interval": [_scaled(x, d["metric"]) for x in d["interval"]]}


def _scaled(x: float | None, metric: str) -> float | None:
    return None if x is None else 100 * x if metric in POINTS else x


def _at(score: Mapping, key: str, label: str):
    return (score.get(key) or {}).get(label)


def folded(name: str, html: str) -> str:
    return f"<details><summary>{escape(name)}</summary>{html}</details>"
