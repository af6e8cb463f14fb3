"""What the comparisons of a study say: gain, harm, no gain of interest, or not resolved.

"not shown" where something other than the images may be the reason.
"""

from collections.abc import Iterable, Mapping

from minidiff.classification.compare import BENEFIT, EXCLUDED, GAIN, HARM, OPEN, UNTESTED, grouped
from minidiff.evaluation.format import INTERNAL

UNSHOWN, MIXED = "not shown", "gain and harm"
SETTLED = GAIN, HARM, EXCLUDED


def primary(study: Mapping) -> list[dict]:
    """Did synthetic images help a classifier? Empty unless a primary comparison was declared.

    A study of an older version, which had another rule, is not tested.
    """
    p = study.get("primary")
    if any("answer" not in d for rows in (study.get("differences") or {}).values() for d in rows):
        return [{"about": "older study", "answer": UNTESTED}]
    return [{**p, "about": "study", **_words_of(study)}] if p else []


def said(study: Mapping) -> dict:
    """The summary of a study with the final answer to every comparison; "primary" is one of them.

    A gain, a harm or an exclusion is "not shown" where something other than the images may be the
    reason. "doubts" names it: "count", one arm alone has synthetic images, and another number of
    images; "generator", that of the better arm saw, or may have seen, real images that the arm did
    not; "shortcut", the label can be predicted without the lungs.
    """
    arms = {row["arm"]: row for row in study["arms"]}
    shortcut = bool((study.get("audit") or {}).get("shortcut"))
    by_set = {name: [_doubted(d, arms[d["arm"]], arms[d["against"]], shortcut and name == INTERNAL)
                     for d in rows] for name, rows in study["differences"].items()}
    first = [d for rows in by_set.values() for d in rows if d["primary"]]
    return {**study, "differences": by_set, "primary": first[0] if first else None}


def _doubted(d: Mapping, arm: Mapping, against: Mapping, shortcut: bool) -> dict:
    added, n = ([side[key] for side in (arm, against)] for key in ("added_kind", "n_train"))
    staged = arm["stages"] == against["stages"] == 2  # all else is the same for both
    better = arm if d["answer"] == GAIN else against
    reasons = {"count": added.count("synthetic") == 1 and n[0] != n[1] and not staged,
               "generator": better["generator_extra"] != 0, "shortcut": shortcut}
    doubts = [name for name, there in reasons.items() if there and d["answer"] in SETTLED]
    return {**d, "added": added, "real": arm["real"], "n_train": n, "doubts": doubts,
            "answer": UNSHOWN if doubts else d["answer"]}


def of_sets(study: Mapping) -> list[dict]:
    """For every test set and headline figure: did they help more than as many duplicates?"""
    real = {row["arm"]: row.get("real") for row in study.get("arms") or []}
    found = []
    for name, rows in (study.get("differences") or {}).items():
        for metric in headlines(study):
            added = [d for d in map(_synthetic_first, rows)
                     if d["metric"] == metric and real[d["arm"]]
                     and d.get("added", [""])[0] == "synthetic"]
            groups = grouped([d for d in added if d["added"][1] == "duplicates"], "answer")
            if added:
                found.append({"about": "arms", "test_set": name, "metric": metric, "groups": groups,
                              "added": added, "answer": of_many(groups), **_words_of(study)})
    return found


def _synthetic_first(d: Mapping) -> Mapping:
    """Of a primary comparison that was declared as duplicates minus synthetic, the reverse."""
    if d.get("added") != ["duplicates", "synthetic"]:
        return d
    turned = [x and -x for x in (d["difference"], *reversed(d["interval"]))]
    return {**d, "arm": d["against"], "against": d["arm"], "added": d["added"][::-1],
            "n_train": d["n_train"][::-1], "difference": turned[0], "interval": turned[1:],
            "answer": {GAIN: HARM, HARM: GAIN, EXCLUDED: OPEN}.get(d["answer"], d["answer"])}


def of_many(answers: Iterable[str]) -> str:
    """One gain is enough where there is no harm, and one harm where there is no gain."""
    there = set(answers)
    if {GAIN, HARM} <= there:
        return MIXED
    return next((word for word in (GAIN, HARM, UNSHOWN, OPEN, EXCLUDED) if word in there),
                UNTESTED)


def headlines(study: Mapping) -> tuple[str, ...]:
    """The figures that a study's answers are given by."""
    return ("auroc", "balanced_accuracy" if study.get("exclusive", True) else "auroc_macro",
            *([BENEFIT] if study.get("benefit") else []))


def _words_of(study: Mapping) -> dict:
    return {"positive": study.get("positive", ""), "worth": study.get("worth", 0)}
