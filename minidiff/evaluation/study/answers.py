"""What the study says, in plain words, and "not resolved" where it does not say it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from minidiff.evaluation.pages.format import p_value
from minidiff.variables import NONE, present

INTERNAL = "test"  # the set of the training hospitals; all others are external
ALPHA = 0.05
AREAS = "auroc", "auroc_macro"


def answers(summary: Mapping) -> list[tuple[str, str, str]]:
    """Rows (kind, answer, question and why, as HTML) for `page.answers`: the primary comparison
    first, then the shortcut.
    """
    rows = [*_primary(summary), _shortcut(summary), *_elsewhere(summary)]
    if "synthetic" not in kinds_of(summary).values():
        return [*rows, ("open", "not tested", "<b>Did synthetic images help?</b> No arm had any.")]
    for name in summary.get("differences") or {}:
        rows += [_helped(summary, name, metric) for metric in headlines(summary)]
    return rows


def kinds_of(summary: Mapping) -> dict[str, str | None]:
    """Arm → what was added to it: "synthetic", "duplicates", or None."""
    return {row["arm"]: row.get("added_kind") for row in summary.get("arms") or []}


def headlines(summary: Mapping) -> tuple[str, str]:
    """The two figures that are answered by; the others stand in the tables."""
    return "auroc", "balanced_accuracy" if summary.get("exclusive", True) else "auroc_macro"


def name_of(metric: str, positive: str) -> str:
    """auroc → AUROC, covid."""
    return {"auroc": f"AUROC, {positive}",
            "auroc_macro": "AUROC, mean over labels"}.get(metric, metric.replace("_", " "))


def title_of(name: str) -> str:
    return "internal test set" if name == INTERNAL else f"external set {name}"


def first(text: str) -> str:
    """With a capital, and the rest as it is."""
    return text[:1].upper() + text[1:]


def open_because(d: Mapping) -> str:
    """Why a difference is not resolved, and what it would take."""
    low, high = d["interval"]
    if d["difference"] is None or low is None:
        return "cannot be measured here"
    if low <= 0 <= high:
        n = d.get("patients_needed")
        return "no difference at all" if n is None else f"{'about ' * (n <= 1e6)}{patients(n)} patients would be needed"
    if d.get("p_holm") is None or d["p_holm"] >= ALPHA:
        return f"p is {p_value(d.get('p_holm'))} after Holm’s correction"
    return f"only {d['seeds_agree']} of {d['seeds']} seeds agree: more seeds would be needed"


def shortcut(summary: Mapping) -> bool:
    return bool((summary.get("audit") or {}).get("shortcut"))


def by_label(summary: Mapping) -> dict[str, Counter]:
    """Set → images of each label; of findings that go together, of each finding."""
    found: dict[str, Counter] = {}
    for name, cells in (summary.get("images") or {}).items():
        found[name] = Counter()
        for cell, n in cells.items():
            labels = [cell] if summary.get("exclusive", True) else present("label", cell) or [NONE]
            found[name].update(dict.fromkeys(labels, n))
    return found


def size_of(summary: Mapping, name: str) -> str:
    """: 74 images of 70 patients."""
    images, known = (summary.get("images") or {}).get(name), (summary.get("patients")
                                                              or {}).get(name)
    return f": {sum(images.values())} images" + (f" of {known} patients" if known
                                                 else "") if images else ""


def patients(n: int) -> str:
    """To two digits: the number is no surer than the difference that it comes of."""
    return "over a million" if n > 1e6 else f"{float(f'{n:.2g}'):,.0f}"


def _shortcut(summary: Mapping) -> tuple[str, str, str]:
    audit, question = summary.get("audit") or {}, "<b>Is there a shortcut?</b> "
    measured = [r for r in audit.get("rows") or [] if r["auroc"] is not None]
    if not measured:
        return "open", "not audited", question + "Nobody asked what the files tell without a look at the lungs."
    if shortcut(summary):
        return "no", "SHORTCUT", f"{question}<div>{escape(audit['sentence'])}</div>" + _told(
            measured, outside=True)
    return "yes", "none found", (
        question + _told(measured, outside=False) + _told(measured, outside=True) + "<div>.9 and "
        "more would be called a shortcut, or a whole interval above .75, but for the thumbnail. "
        "That none was found is no proof that there is none.</div>")


def _told(rows: Sequence[Mapping], outside: bool) -> str:
    """The most that a trivial feature reaches on each test set, within or outside."""
    parts = []
    for name in dict.fromkeys(r["test_set"] for r in rows
                              if (r["test_set"] != INTERNAL) is outside):
        best = max((r for r in rows if r["test_set"] == name), key=lambda r: r["auroc"])
        parts.append(f"on the {title_of(name)}, AUROC "
                     f"{area(best['auroc'], (best['low'], best['high']))} by {best['features']}, "
                     f"for {best['label']}")
    return f"<div>The most that is told without a look at the lungs: {escape('; '.join(parts))}.</div>" if parts else ""


def _primary(summary: Mapping) -> list[tuple[str, str, str]]:
    """The comparison that the study was made for."""
    p = summary.get("primary")
    if not p:
        return []
    kind = {"gain": "yes", "harm": "no"}.get(p["answer"], "open")
    question = (f"<b>Primary comparison, declared before training:</b> {escape(p['arm'])} less "
                f"{escape(p['against'])}, "
                f"{escape(name_of(p['metric'], summary.get('positive', '')))}, "
                f"{escape(title_of(p['test_set']))}.")
    return [(kind, p["answer"], f"{question}<div>{escape(primary_text(p))}</div>")]


def primary_text(p: Mapping) -> str:
    """The difference of the primary comparison, of what its interval is, and what it would take to
    see more.
    """
    n = f"{p['patients']} patients and {p['seeds']} {'seed' if p['seeds'] == 1 else 'seeds'} of the classifier"
    if p["difference"] is None:
        return f"Cannot be measured over {n}: all are on one side."
    if p["sees"] is None:
        return f"{delta(p['difference'], (None, None), points=True)} points over {n}: fewer than 3 resolve nothing."
    text = (f"{delta(p['difference'], p['interval'], points=True)} points; the interval counts "
            f"{n}, and holds for this one generator. A true difference of {100 * p['sees']:.1f} "
            "points would be resolved four times in five")
    more = f"; one of 2 points with about {p['times']:,.0f} times as many patients and seeds" if p[
        "times"] > 1 else ""
    return f"{text}{more}."


def _elsewhere(summary: Mapping) -> list[tuple[str, str, str]]:
    """Does what real images alone taught hold outside? The AUROC of the label of interest, set by
    set.
    """
    rows, positive = summary.get("arms") or [], summary.get("positive", "")
    arm = next((r["arm"] for r in rows if r.get("added_kind") is None),
               rows[0]["arm"] if rows else "")
    areas = {r["test_set"]: (whole["auroc"].get(positive), *((whole.get("auroc_interval_patients")
                                                              or {}).get(positive) or (None, None)))
             for r in rows if r["arm"] == arm and (whole := r.get("ensemble"))}
    within, found = areas.pop(INTERNAL, None), []
    for name, (value, low, high) in areas.items():
        if value is None or low is None:
            continue  # nothing to say without an interval
        kind, answer = (("yes", "above chance") if low > 0.5 else ("no", "below chance")
                        if high < 0.5 else ("open", "not resolved"))
        text = f"{arm} tells {positive} there with AUROC {area(value, (low, high))}"
        if within and within[0] is not None:
            text += f"; on the {title_of(INTERNAL)} with {area(within[0], within[1:])}"
        question = f"<b>Is {escape(positive)} told on the {escape(title_of(name))}, too?</b>"
        found.append((kind, answer, f"{question}<div>{escape(text)}.</div>"))
    return found


def _helped(summary: Mapping, name: str, metric: str) -> tuple[str, str, str]:
    """Synthetic images over as many duplicates of real ones, on one test set by one figure."""
    facts = {r["arm"]: r for r in summary.get("arms") or []}
    question = (f"<b>{escape(first(title_of(name)))}, "
                f"{escape(name_of(metric, summary.get('positive', '')))}:</b> did synthetic images "
                "help more than as many duplicates?")
    added = [d for d in summary["differences"][name] if d["metric"] == metric
             and facts.get(d["arm"], {}).get("added_kind") == "synthetic"
             and facts[d["arm"]].get("real", 1)]
    pairs = [d for d in added if facts.get(d["against"], {}).get("added_kind") == "duplicates"]
    if not pairs:
        over = "; ".join(f"{d['arm']} over {d['against']} {_said(d)}" for d in added)
        why = (f"No arm had duplicates, so that more images cannot be told from new ones. "
               f"{escape(over)}." if added else "No arm had synthetic images beside real ones, or "
               "none to be held against.")
        return "open", "not tested", f"{question}<div>{why}</div>"
    better, worse = ([d for d in pairs if d["resolved"] and (d["difference"] > 0) is up]
                     for up in (True, False))
    fair = [d for d in better if facts[d["arm"]].get("generator_extra") == 0
            and facts[d["arm"]].get("n_train") == facts[d["against"]].get("n_train")]
    rest = [d for d in pairs if not d["resolved"]]
    kind, answer = (("yes", "yes") if fair else ("open", "not shown") if better else
                    ("no", "no, harmed") if worse and not rest else ("open", "not resolved"))
    html, n = "", (summary.get("patients") or {}).get(name)
    for word, some in (("Better", better), ("Worse", worse),
                       ("Not resolved" + (f" with {n} patients" if n else ""), rest)):
        html += f"<div>{word}: {'; '.join(_pair(d, facts) for d in some)}.</div>" if some else ""
    if better and not fair:
        html += ("<div>Not shown: what was better had another number of images than its "
                 "duplicates, or a generator that saw, or may have seen, real images that the arm "
                 "did not.</div>")
    if name == INTERNAL and shortcut(summary):
        kind, answer = ("open", "yes, by SHORTCUT?") if fair else (kind, answer)
        html += "<div>SHORTCUT: a gain on this set is no gain in seeing disease.</div>"
    return kind, answer, question + html


def _pair(d: Mapping, facts: Mapping[str, Mapping]) -> str:
    own, other = facts[d["arm"]], facts[d["against"]]
    text = f"{d['arm']} {_said(d)}"
    if own.get("n_train") != other.get("n_train"):
        text += f" [not count-matched: {own.get('n_train')} images, {d['against']} has {other.get('n_train')}]"
    return escape(text + (f" [{own['remark']}]" if own.get("remark") else ""))


def _said(d: Mapping) -> str:
    """+1.2 points (−0.4 to +2.9), about 640 patients would be needed."""
    points = d["metric"] not in AREAS
    return delta(d["difference"], d["interval"], points) + (" points" * points) + (
        "" if d["resolved"] else f", {open_because(d)}")


def share(x: float | None, ends: Sequence[float | None] | None) -> str:
    """In per cent: 61.2 (54.0–68.1)."""
    return _with(*(None if v is None else f"{100 * v:.1f}" for v in (x, *(ends or (None, None)))))


def area(x: float | None, ends: Sequence[float | None] | None) -> str:
    """0.912 (0.871–0.944)."""
    return _with(*(None if v is None else f"{v:.3f}" for v in (x, *(ends or (None, None)))))


def _with(value: str | None, low: str | None, high: str | None) -> str:
    return "–" if value is None else value if None in (low, high) else f"{value} ({low}–{high})"


def delta(x: float | None, ends: Sequence[float | None], points: bool = False) -> str:
    """+0.012 (−0.004 to +0.029); in points +1.2 (−0.4 to +2.9)."""
    value, *both = (None if v is None else (f"{100 * v:+.1f}" if points
                                            else f"{v:+.3f}").replace("-", "−") for v in (x, *ends))
    return "–" if value is None else value if None in both else f"{value} ({' to '.join(both)})"
