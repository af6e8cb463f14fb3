"""The answers of a study's page: the primary comparison, shortcuts, other hospitals, every set."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minidiff.classification.shortcuts import NAMES
from minidiff.data.baselines import SHORTCUT, SURE
from minidiff.evaluation import pages, study_verdicts, verdicts
from minidiff.evaluation.format import INTERNAL, area, set_name

CHANCE = {1: ("yes", "above chance"), 0: ("open", "not resolved"), -1: ("no", "below chance")}


class Answer(NamedTuple):
    """A row for `answers` of macros.html."""

    kind: str  # yes, no or open
    answer: str
    question: str
    text: str = ""  # a statement a line


def answers(summary: Mapping) -> list[Answer]:
    """The primary comparison, the shortcut, external sets, then every test set by its figures."""
    found = [*_said(study_verdicts.primary(summary)), _shortcut(summary.get("audit") or {}),
             *_external(summary)]
    if "synthetic" not in kinds_of(summary).values():
        return [*found, Answer("open", verdicts.UNTESTED, "Did synthetic images help?",
                               "No arm had synthetic images.")]
    return found + _said(study_verdicts.of_sets(summary))


def _said(found: Sequence[Mapping]) -> list[Answer]:
    """Answers of verdicts.py, as the report has them; each group of comparisons is a line."""
    return [Answer(verdicts.KINDS[v["answer"]], v["answer"], v["question"], v["text"])
            for v in pages.answers(found)]


def kinds_of(summary: Mapping) -> dict[str, str | None]:
    """Arm → what was added to its real images: "synthetic", "duplicates", or None."""
    return {row["arm"]: row["added_kind"] for row in summary.get("arms") or []}


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
