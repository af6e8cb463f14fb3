"""When an answer is not to be trusted, whom the classifiers serve less well, and who the synthetic
patients are.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from minidiff.evaluation.pages.format import num
from minidiff.evaluation.pages.page import figure, note, table
from minidiff.evaluation.study import charts
from minidiff.evaluation.study.answers import (
    area,
    delta,
    first,
    kinds_of,
    share,
    shortcut,
    title_of,
)
from minidiff.evaluation.study.sections import folded

FIGURES = {"auroc": "AUROC", "tpr": "sensitivity", "fpr": "false alarms"}
UNSURE = {"entropy": "entropy", "mutual_information": "disagreement of seeds",
          "distance": "distance from training"}


def uncertainty(summary: Mapping) -> str:
    """Selective accuracy, conformal coverage, and what tells of errors and of other hospitals."""
    found = {s: arms for s, arms in (summary.get("uncertainty") or {}).items() if arms}
    curves = {s: {arm: u["entropy"]["selective"]["curve"] for arm, u in arms.items()
                  if "entropy" in u} for s, arms in found.items()}
    curves, html = {s: lines for s, lines in curves.items() if lines}, ""
    if curves:
        html += figure(charts.selective(curves, {s: title_of(s) for s in curves}, kinds_of(summary),
                                        shortcut(summary)), "Accuracy of the most certain images, "
                       "by the entropy of the mean of the seeds; band: Wilson’s interval of the "
                       "first arm. The certainty of a curve that does not fall to the right tells "
                       "nothing.", "selective prediction")
    for s, arms in found.items():
        html += f"<h3>Prediction sets, {escape(title_of(s))}</h3>" + coverage(arms) + folded(
            "What tells of errors and of strangers", telling(arms))
    return html and html + note(
        "Conformal sets leave a label out only where at most one true image in ten would lose it, "
        "label by label, as calibrated on validation. Of each label its coverage, the share of its "
        "images in whose set it is, with Wilson’s interval. Should be: where it lies 95 times in "
        "100 if the images are like those of validation; BELOW: the promise is broken. In every "
        "set: too few calibration images to rule the label out. AUROC for errors: wrong answers "
        "above right ones; for strangers: this set above the internal test set; .5 is of no use.")


def coverage(arms: Mapping[str, Mapping]) -> str:
    """A row for each arm; where coverage should lie follows from the numbers of images, and stands
    above all.
    """
    sets = {arm: found["conformal"] for arm, found in arms.items() if found.get("conformal")}
    if not sets:
        return ""
    lines, classes = [], next(iter(sets.values()))["classes"]
    for arm, found in sets.items():
        own = found["classes"].values()
        lines.append(("own" * any(c["kept"] is False for c in own),
                      (arm, *(share(c["coverage"], (c["low"], c["high"])) + " BELOW"
                              * (c["kept"] is False) for c in own), share(found["single"], None),
                       share(found["empty"], None), f"{found['mean_size']:.2f}")))
    should = [("in every set" if c["always"] else "–".join(share(x, None) for x in c["expected"]))
              + f"; n = {c['n']}" if c["n"] else "no image" for c in classes.values()]
    return table(("arm", *(f"{label}, %" for label in classes), "one label, %", "none, %",
                  "labels in a set"), [("grey", ("should be", *should, "", "", "")), *lines])


def telling(arms: Mapping[str, Mapping]) -> str:
    """How well each kind of uncertainty tells wrong answers and other hospitals' images."""
    lines = []
    for arm, found in arms.items():
        measures = {**{name: found[k] for k, name in UNSURE.items() if k in found},
                    **{f"{name}, MC dropout": found["mc_dropout"][k] for k, name in UNSURE.items()
                       if k in (found.get("mc_dropout") or {})}}
        for k, (name, m) in enumerate(measures.items()):
            wrong, far, off = m["wrong"], m.get("ood"), m.get("atypical")
            lines.append(("first" * (k == 0), (
                arm if k == 0 else "", name, num(m["mean_right"]), num(m["mean_wrong"]),
                f"{area(wrong['auroc'], (wrong['low'], wrong['high']))}; {wrong['n']}, "
                f"{wrong['n_rest']}", area(far["auroc"], (far["low"], far["high"])) if far else "–",
                share(off["share"], (off["low"], off["high"])) if off else "–")))
    return table(("arm", "by", "mean, right", "mean, wrong", "AUROC for errors; n wrong, right",
                  "AUROC for strangers", "farther than 95 % of validation, %"), lines)


def fairness(summary: Mapping) -> str:
    """For each test set and figure the largest gaps of every arm, column by column; all groups are
    folded away.
    """
    html = ""
    for s, arms in (summary.get("fairness") or {}).items():
        gaps = {(g["metric"], arm, g["column"]): g for arm, f in arms.items()
                for g in f.get("gaps") or []}
        columns = list(dict.fromkeys(column for _, _, column in gaps))
        few, html = [], html + (f"<h3>{escape(first(title_of(s)))}</h3>" if gaps else "")
        for metric in dict.fromkeys(metric for metric, _, _ in gaps):
            if all(g["gap"] is None for (of, _, _), g in gaps.items() if of == metric):
                few.append(FIGURES.get(metric, metric))
                continue
            html += table((FIGURES.get(metric, metric), *columns), [("", (arm, *(
                _gap(gaps.get((metric, arm, column))) for column in columns))) for arm in arms])
        html += note(f"Too few in all groups: {', '.join(few)}.") if few else ""
        groups = [("grey" * g["few"],
                   (arm, f"{g['column']}: {g['group']}", g["n"], g["positives"],
                    area(g["auroc"], g["interval"]), share(g["tpr"], g["tpr_interval"]),
                    share(g["fpr"], g["fpr_interval"]), "too few" * g["few"]))
                  for arm, f in arms.items() for g in f.get("groups") or []]
        head = ("arm", "group", "n", "positives", "AUROC", "sensitivity, %", "false alarms, %", "")
        html += folded("Every group", table(head, groups)) if groups else ""
    return html and html + note(f"The largest difference between two groups in telling "
                                f"{summary.get('positive', '')}, with a 95 % interval that is wide "
                                "enough for every pair of groups; *: it leaves out 0. Sensitivity "
                                "and false alarms in points, at the threshold of 90 % specificity "
                                "on validation. Too few: fewer than two groups have 20 images on "
                                "each side that it needs.")


def _gap(g: Mapping | None) -> str:
    if g is None or g["gap"] is None:
        return "too few"
    return f"{delta(g['gap'], g['interval'], g['metric'] != 'auroc')}{' *' * g['resolved']} {g['high']} over {g['low']}"


def attributes(summary: Mapping) -> str:
    """Does a generator tie the label to who the patient is more than the real images do?"""
    html = ""
    for source, found in (summary.get("attributes") or {}).items():
        lines = [("own" * a["amplified"],
                  (f"{a['column']} by {a['label'] or 'label'}",
                   *(area(a[side], a[f"{side}_interval"]) for side in ("real", "synthetic")),
                   delta(a["difference"], a["interval"]), "amplified" * a["amplified"]))
                 for a in found.get("association") or []]
        shares = [("", (r["column"], r["value"], r["label"],
                        *(f"{share(r[side], None)} of {r[f'n_{side}']}"
                          for side in ("real", "synthetic")))) for r in found.get("shares") or []]
        html += f"<h3>{escape(source)}</h3>" + table(("", "real", "synthetic", "difference", ""),
                                                     lines) if lines else ""
        html += folded("Shares", table(("column", "value", "label", "real, %", "synthetic, %"),
                                       shares)) if shares else ""
    return html and note("How much the label tells of each column, in the real training images and "
                         "in the synthetic ones, by what they were asked for: Cramér’s V, 0 to 1, "
                         "corrected for its bias, with 95 %.") + html
