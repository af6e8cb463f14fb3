"""What the numbers of a study say, in words: yes, no, or why the question stays open."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from minidiff.classification.compare import ALPHA
from minidiff.classification.shortcuts import NAMES
from minidiff.data.baselines import SHORTCUT, SURE
from minidiff.errors import count
from minidiff.evaluation import verdicts
from minidiff.evaluation.format import p_value

INTERNAL = "test"  # the test set of the training hospitals; all others are external
POINTS = "balanced_accuracy", "accuracy"  # in per cent, and their differences in points
OPEN = "open", "not resolved"
CHANCE = {1: ("yes", "above chance"), 0: OPEN, -1: ("no", "below chance")}


class Answer(NamedTuple):
    """A row for `answers` of macros.html."""

    kind: str  # yes, no or open
    answer: str
    question: str
    text: str = ""  # a statement a line


def answers(summary: Mapping) -> list[Answer]:
    """The primary comparison, the shortcut, external sets, then every test set by two figures."""
    primary = summary.get("primary")
    found = [primary_answer(primary, summary.get("positive", ""))] if primary else []
    found += [_shortcut(summary.get("audit") or {}), *_external(summary)]
    if "synthetic" not in kinds_of(summary).values():
        return [*found, Answer("open", "not tested", "Did synthetic images help?",
                               "No arm had synthetic images.")]
    return found + [_helped(summary, name, metric) for name in summary.get("differences") or {}
                    for metric in headlines(summary)]


def kinds_of(summary: Mapping) -> dict[str, str | None]:
    """Arm → what was added to its real images: "synthetic", "duplicates", or None."""
    return {row["arm"]: row["added_kind"] for row in summary.get("arms") or []}


def headlines(summary: Mapping) -> tuple[str, str]:
    """The two figures that answers are given by."""
    return "auroc", "balanced_accuracy" if summary.get("exclusive", True) else "auroc_macro"


def metric_name(metric: str, positive: str) -> str:
    """auroc → AUROC, covid."""
    names = {"auroc": f"AUROC, {positive}", "auroc_macro": "AUROC, mean over labels"}
    return names.get(metric, metric.replace("_", " "))


def set_name(name: str) -> str:
    return "internal test set" if name == INTERNAL else f"external set {name}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- numbers with their intervals

def with_interval(x: float | None, ends: Sequence[float | None] | None = None, *, form: str,
                  scale: float = 1, between: str = " to ", unit: str = "") -> str:
    """A number with its interval in brackets; – where there is no number."""
    if x is None:
        return "–"
    value, low, high = (v if v is None else form.format(scale * v)
                        for v in (x, *(ends or (None, None))))
    interval = "" if None in (low, high) else f" ({low}{between}{high})"
    return f"{value}{unit}{interval}".replace("-", "−")


share = partial(with_interval, form="{:.1f}", scale=100, between="–")   # 61.2 (54.0–68.1)
area = partial(with_interval, form="{:.3f}", between="–")               # 0.912 (0.871–0.944)
delta = partial(with_interval, form="{:+.3f}")                          # +0.012 (−0.004 to +0.029)
points = partial(with_interval, form="{:+.1f}", scale=100)              # +1.2 (−0.4 to +2.9)


def difference(d: Mapping, unit: str = "") -> str:
    """That of two arms by one figure: points of a share, with the unit " points" or without."""
    if d["metric"] in POINTS:
        return points(d["difference"], d["interval"], unit=unit)
    return delta(d["difference"], d["interval"])


def patients(n: int) -> str:
    """To two digits: the number is no surer than the difference that it follows from."""
    return "over a million" if n > 1e6 else f"{float(f'{n:.2g}'):,.0f}"


# --- the primary comparison

def primary_answer(p: Mapping, positive: str = "") -> Answer:
    """Is the first arm of the primary comparison better than the second?"""
    question = (f"Primary comparison, declared before training: is {p['arm']} better than "
                f"{p['against']}? By {metric_name(p['metric'], positive)}, on the "
                f"{set_name(p['test_set'])}.")
    answer = verdicts.helped(p)
    return Answer(verdicts.KINDS[answer], answer, question, primary_text(p))


def primary_text(p: Mapping) -> str:
    """The difference, what its interval covers, and what would be needed to see more."""
    n = f"{count(p['patients'], 'patient')} and {count(p['seeds'], 'seed')} of the classifier"
    if p["difference"] is None:
        return f"Cannot be measured over {n}: all patients are on one side."
    if p["sees"] is None:
        return (f"{points(p['difference'], unit=' points')} over {n}: with fewer than 3 seeds "
                "nothing is resolved.")
    text = (f"{points(p['difference'], p['interval'], unit=' points')}; the interval covers "
            f"other patients and other seeds ({n}), and holds for this one generator. A true "
            f"difference of {100 * p['sees']:.1f} points would be resolved four times in five")
    if p["times"] > 1:
        text += (f"; one of 2 points with about {p['times']:,.0f} times as many patients and "
                 "seeds")
    return f"{text}."


# --- the shortcut, and external sets

def _shortcut(audit: Mapping) -> Answer:
    question = "Is there a shortcut: can the label be predicted without seeing the lungs?"
    measured = [row for row in audit.get("rows") or [] if row["auroc"] is not None]
    if not measured:
        return Answer("open", "not audited", question, "Trivial features were not tried.")
    inside, outside = (_best_features(measured, external) for external in (False, True))
    if audit["shortcut"]:
        return Answer("no", "SHORTCUT", question, "\n".join([audit["sentence"], *outside]))
    rule = (f"A shortcut is an AUROC of {SHORTCUT} or more on the internal test set, or a whole "
            f"interval above {SURE}, by anything but the thumbnail. That none was found does not "
            "prove that there is none.")
    return Answer("yes", "none found", question, "\n".join([*inside, *outside, rule]))


def _best_features(rows: Sequence[Mapping], external: bool) -> list[str]:
    """The highest AUROC of a trivial feature on each test set."""
    parts = []
    for name in dict.fromkeys(r["test_set"] for r in rows):
        if (name != INTERNAL) is external:
            best = max((r for r in rows if r["test_set"] == name), key=lambda r: r["auroc"])
            parts.append(f"{best['label']} on the {set_name(name)} with AUROC "
                         f"{area(best['auroc'], (best['low'], best['high']))} from "
                         f"{NAMES[best['features']]}")
    return [f"Best prediction without seeing the lungs: {'; '.join(parts)}."] if parts else []


def _external(summary: Mapping) -> list[Answer]:
    """Does the first arm of real images alone recognise the label of interest elsewhere, too?"""
    positive = summary.get("positive", "")
    kinds = kinds_of(summary)
    arm = min(kinds, key=lambda name: kinds[name] is not None, default=None)
    found, areas = [], {row["test_set"]: (row["ensemble"]["auroc"].get(positive),
                                          row["ensemble"]["auroc_interval_patients"].get(positive))
                        for row in summary.get("arms") or [] if row["arm"] == arm}
    for name, (value, ends) in areas.items():
        if name == INTERNAL or value is None or None in ends:
            continue
        above = 1 if ends[0] > 0.5 else -1 if ends[1] < 0.5 else 0
        text = f"AUROC of {arm}: {area(value, ends)} there"
        if areas.get(INTERNAL, (None,))[0] is not None:
            text += f"; {area(*areas[INTERNAL])} on the {set_name(INTERNAL)}"
        found.append(Answer(*CHANCE[above],
                            f"Is {positive} recognised on the {set_name(name)}, too?", f"{text}."))
    return found


# --- synthetic images against as many duplicates

def _helped(summary: Mapping, name: str, metric: str) -> Answer:
    """On one test set, by one figure."""
    facts = {row["arm"]: row for row in summary["arms"]}
    question = (f"{capital(set_name(name))}, "
                f"{metric_name(metric, summary.get('positive', ''))}: "
                "did synthetic images help more than as many duplicates?")
    added = [d for d in summary["differences"][name] if d["metric"] == metric
             and facts[d["arm"]]["added_kind"] == "synthetic" and facts[d["arm"]]["real"]]
    pairs = [d for d in added if facts[d["against"]]["added_kind"] == "duplicates"]
    if not pairs:
        return Answer("open", "not tested", question, _untested(added))
    better = [d for d in pairs if d["resolved"] and d["difference"] > 0]
    worse = [d for d in pairs if d["resolved"] and d["difference"] < 0]
    rest = [d for d in pairs if not d["resolved"]]
    fair = [d for d in better if facts[d["arm"]]["generator_extra"] == 0
            and facts[d["arm"]]["n_train"] == facts[d["against"]]["n_train"]]
    shortcut = name == INTERNAL and (summary.get("audit") or {}).get("shortcut")
    n = (summary.get("patients") or {}).get(name)
    lines = [f"{word}: {'; '.join(_pair(d, facts) for d in own)}." for word, own in (
        ("Better", better), ("Worse", worse),
        (f"Not resolved with {n} patients" if n else "Not resolved", rest)) if own]
    if better and not fair:
        lines.append("Not shown: where synthetic images were better, the number of images "
                     "differed, or their generator saw, or may have seen, real images that the "
                     "arm did not see.")
    if shortcut:
        lines.append("SHORTCUT: a gain on this set is no gain in seeing disease.")
    outcome = OPEN
    if fair:
        outcome = ("open", "yes, by SHORTCUT?") if shortcut else ("yes", "yes")
    elif better:
        outcome = "open", "not shown"
    elif worse and not rest:
        outcome = "no", "no, harmed"
    return Answer(*outcome, question, "\n".join(lines))


def _untested(added: Sequence[Mapping]) -> str:
    if not added:
        return "No arm had synthetic images beside real ones and an arm to compare it with."
    found = "; ".join(f"{d['arm']} minus {d['against']}: {_difference(d)}" for d in added)
    return ("No arm had duplicates, so that the effect of more images cannot be separated from "
            f"that of new ones. {found}.")


def _pair(d: Mapping, facts: Mapping[str, Mapping]) -> str:
    own, other = facts[d["arm"]], facts[d["against"]]
    text = f"{d['arm']} {_difference(d)}"
    if own["n_train"] != other["n_train"]:
        text += (f" [not count-matched: {own['n_train']} images, {d['against']} has "
                 f"{other['n_train']}]")
    return text + (f" [{own['remark']}]" if own["remark"] else "")


def _difference(d: Mapping) -> str:
    """+1.2 points (−0.4 to +2.9), about 640 patients would be needed."""
    text = difference(d, " points")
    return text if d["resolved"] else f"{text}, {open_because(d)}"


def open_because(d: Mapping) -> str:
    """Why a difference is not resolved, and what would be needed."""
    low, high = d["interval"]
    if d["difference"] is None or low is None:
        return "cannot be measured here"
    if low <= 0 <= high:
        if d["patients_needed"] is None:
            return "no difference at all"
        about = "about " if d["patients_needed"] <= 1e6 else ""
        return f"{about}{patients(d['patients_needed'])} patients would be needed"
    if d["p_holm"] is None or d["p_holm"] >= ALPHA:
        return f"p is {p_value(d['p_holm'])} after Holm’s correction"
    return f"only {d['seeds_agree']} of {d['seeds']} seeds agree: more seeds would be needed"
