"""The study on a terminal: the shortcut first, then a table for each test set, then the
differences.
"""

from __future__ import annotations

import textwrap

from minidiff.evaluation.pages.format import num, percent
from minidiff.evaluation.study.answers import primary_text


def printed(summary: dict) -> str:
    """summary.json as text."""
    positive, audit = summary["positive"], summary.get("audit") or {}
    lines = ["", "judge on held-out patients: " + ", ".join(
        f"{a['variable']} " + (percent(a["accuracy"]) if "accuracy" in a
                               else f"r = {num(a.get('r'))}") for a in summary["judge"])]
    for name, differences in summary["differences"].items():
        counts = summary["images"][name]
        lines += ["", f"{name}: {sum(counts.values())} images of {summary['patients'][name]} "
                  f"patients ({', '.join(f'{n} {label}' for label, n in sorted(counts.items()))})"]
        lines += ["  SHORTCUT: see above"] if audit.get("shortcut") else []
        of = f"ensemble of {summary['arms'][0]['seeds']}"
        lines += [f"  {'balanced accuracy':>52}{'AUROC ' + positive:>15}",
                  f"  {'arm':<28}{'images':>7}{'alone ± SD':>14}{of:>15} (95 %, by patient)"]
        for row in (row for row in summary["arms"] if row["test_set"] == name):
            whole = row["ensemble"]
            low, high = (whole["auroc_interval_patients"] or {}).get(positive) or (None, None)
            spread = "" if row.get(
                "balanced_accuracy_sd") is None else f"± {100 * row['balanced_accuracy_sd']:.1f}"
            lines.append(
                f"  {row['arm']:<28}{row['n_train']:>7}{percent(row['balanced_accuracy']):>8} "
                f"{spread:<6}{percent(whole.get('balanced_accuracy')):>9}{num(whole['auroc'][positive]):>9} "
                f"({num(low)} to {num(high)})" + (f"   {row['remark']}" if row["remark"] else ""))
        metric = "balanced_accuracy" if summary["exclusive"] else "auroc_macro"
        lines += ["  Differences of the ensembles, of which each network alone may say "
                  "otherwise:"] if differences else []
        lines += [_difference(d) for d in differences
                  if d["metric"] == metric and d["difference"] is not None]
    if primary := summary.get("primary"):
        lines += ["", f"primary comparison, {primary['arm']} − {primary['against']} on "
                  f"{primary['test_set']}: {primary['answer'].upper()}. {primary_text(primary)} It "
                  f"is the mean of single networks."]
    notes = [textwrap.shorten(f"note: {note}", 240, placeholder=" …") for note in summary["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _difference(d: dict) -> str:
    low, high = (100 * x for x in d["interval"])
    what = "resolved" if d["resolved"] else "not resolved"
    n = d.get("patients_needed") if not d["resolved"] else None
    need = f"; about {n:,} patients would be needed" if n and n < 100_000 else ""
    metric = d["metric"].replace("_", " ")
    return (f"  {d['arm']} − {d['against']}: {metric} {100 * d['difference']:+.1f} points "
            f"({low:+.1f} to {high:+.1f}; of this sign with {d['seeds_agree']} of {d['seeds']} "
            f"seeds), {what}{need}")
