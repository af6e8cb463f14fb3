"""What figures say: yes, no, or "not resolved" where an interval allows both.

Figures in, answers out; the words around them stand in pages/verdicts.txt. Those of a study are
in study_verdicts.py.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from minidiff.classification.compare import EXCLUDED, GAIN, HARM, UNTESTED, grouped
from minidiff.evaluation.metrics.membership import LEAK, LIKELIHOOD, NEEDED
from minidiff.evaluation.metrics.report_rows import ALL
from minidiff.evaluation.selection import decided
from minidiff.evaluation.study_verdicts import MIXED, UNSHOWN, of_sets, primary
from minidiff.rating import short_by
from minidiff.statistics import Interval

GOOD, BAD, OPEN = "yes", "no", "not resolved"
# how a page marks them
KINDS = {GOOD: "yes", BAD: "no", GAIN: "yes", HARM: "no", EXCLUDED: "no",
         **dict.fromkeys((OPEN, UNTESTED, UNSHOWN, MIXED), "open")}
MARGIN = 0.1  # by which a share may fall short of that of real images
TOLD = 0.6    # AUROC of a discriminator up to which images count as not told apart
# a yes that unreal images get for nothing, and one that stays true of them
FREE, QUALIFIED = ("copies", "variety"), ("likeness", "label", "number", "category")
NEAR_P, COPYING_Z = 0.05, -1.64  # of near-copies and the rank statistic C_T, for plainly new
TAIL = 0.025  # of a one-sided test, and of each end of an interval


def beyond(low: float | None, high: float | None, gate: float) -> str:
    """Does a whole interval lie above a gate? Yes; no where it lies below; else not resolved."""
    if low is None or high is None:
        return OPEN
    return GOOD if low > gate else BAD if high < gate else OPEN


def no_worse(share: float, n: float, real: float, m: float) -> tuple[str, Interval]:
    """Does a share reach that of real images less MARGIN? With the interval of the difference.

    Both are uncertain; n and m are their effective numbers of images.
    """
    ends = short_by(share, n, real, m)
    return beyond(*ends, -MARGIN), ends


def in_every(answers: Iterable[str]) -> str:
    """Yes if all are yes, no if any is; what is not tested does not count."""
    answers = _said(answers)
    return BAD if BAD in answers else answers.pop() if len(answers) == 1 else OPEN


def in_any(answers: Iterable[str]) -> str:
    """Yes if any is yes and none is no; what is not tested does not count."""
    answers = _said(answers)
    return next((a for a in (BAD, GOOD, OPEN, UNTESTED) if a in answers), OPEN)


def _said(answers: Iterable[str]) -> set[str]:
    """The answers but for those not tested, if there are others."""
    answers = set(answers)
    return answers - {UNTESTED} or answers


def unless_selected(answer: str, selected: bool) -> str:
    """Images that were selected to give a yes have not been tested; a no still stands."""
    return UNTESTED if selected and answer == GOOD else answer


def selected(result: Mapping) -> dict[str, Mapping]:
    """Subject → the filter that decided it (`selection.decided`), for the own judge of a report."""
    own = next((j["sha256"] for j in result.get("judges") or [] if j["judge"] == "own"), None)
    return decided((result.get("samples") or {}).get("filters") or [], own)


def kind(v: Mapping) -> str:
    """How a page marks an answer: yes for the welcome one, no, or open."""
    shown = KINDS[v["answer"]]
    return {"yes": "no", "no": "yes"}.get(shown, shown) if v.get("good") == BAD else shown


def verdicts(result: Mapping, on_page: bool = False) -> list[dict]:
    """For each question that the report can answer {"about", "answer", the figures behind it}.

    Variety is asked for on the page only. A study answers by its primary comparison, or else by
    every test set.
    """
    filters, study = selected(result), result.get("study") or {}
    first = _realism(result.get("realism") or {}, filters)
    rest = [*_copies(result.get("neighbours") or {}, result.get("samples") or {}, filters),
            *_membership(result.get("membership") or {}),
            *_likeness(result["distances"], filters),
            *_agreement(result.get("agreement") or [], filters),
            *(primary(study) or of_sets(study)),
            *(variety(result["distances"], filters) if on_page else ())]
    if any(v["answer"] == GOOD for v in first):
        rest = [_unreal(v) for v in rest]
    return first + rest


def _realism(found: Mapping, filters: Collection[str] = ()) -> list[dict]:
    """Can synthetic images be told from real ones? The welcome answer is no.

    Yes where the discriminator's whole interval lies above TOLD, or that of a distance above its
    floor. No where the discriminator's lies below TOLD and, in two or more spaces, every distance
    is within its floor. Images that were selected in one of these spaces are not tested by a no.
    """
    if not found:
        return []
    floors = [(s, s["KD_floor"]["high"]) for s in found.get("spaces", ())
              if s["KD_floor"] and s["KD_low"] is not None]
    far = [s["space"] for s, floor in floors if s["KD_low"] > floor]
    near = [s["space"] for s, floor in floors if s["KD"] <= floor]
    told = beyond(found.get("low"), found.get("high"), TOLD)
    alike = told == BAD and not far and len(near) == len(floors) >= 2
    filtered = any(s["space"] in filters for s, _ in floors)
    ways = [{**x, "more": x["low"] > TOLD} for x in found.get("looks", ())
            if x["low"] > TOLD or x["high"] < 1 - TOLD]
    return [{**found, "about": "realism", "good": BAD, "far": far, "near": near, "limit": TOLD,
             "ways": sorted(ways, key=lambda x: -abs(x["auroc"] - 0.5)),
             "answer": GOOD if told == GOOD or far else OPEN if not alike else
             UNTESTED if filtered else BAD}]


def _unreal(v: dict) -> dict:
    """An answer about images that can be told from real ones."""
    if v["answer"] != GOOD or v["about"] not in FREE + QUALIFIED:
        return v
    return {**v, "unreal": True, "answer": OPEN if v["about"] in FREE else GOOD}


def _copies(neighbours: Mapping, samples: Mapping, filters: Mapping) -> list[dict]:
    if not neighbours:
        return []
    answer = new(neighbours)
    other = bool(samples.get("of_other_data")) and answer == GOOD
    answer = OPEN if other else unless_selected(answer, "copies" in filters)
    return [{"about": "copies", "answer": answer, "of_other_data": other,
             "filter": filters.get("copies"), "found": neighbours["verdict"],
             "named": neighbours.get("named"),
             "fewest": neighbours.get("fewest"), "nearer": nearer(neighbours),
             "random_split": neighbours.get("random_split", True)}]


def new(copies: Mapping) -> str:
    """Are the images new, by `copying.memorisation`?

    No where it suspects copies. Yes takes no sign at all: not `nearer` than held-out images, probes
    that would have been named, and a random split, without which held-out images are no yardstick.
    """
    named = copies.get("named")
    plain = (copies["suspected"] is False and not nearer(copies)
             and copies.get("random_split", True) and not (named and named["seen"] is None))
    return BAD if copies["suspected"] else GOOD if plain else OPEN


def nearer(copies: Mapping) -> bool:
    """Do images lie nearer to training images than held-out ones, as smooth ones do, and copies?

    By the share of near-copies (Fisher, Bonferroni), or by C_T in any space.
    """
    spaces = copies["spaces"]
    return any(s["near_p"] * len(spaces) < NEAR_P or (s["copying_z"] or 0) <= COPYING_Z
               for s in spaces)


def _membership(m: Mapping) -> list[dict]:
    """Does the model keep private who was in its training set?

    No where chance does not explain the share found at 1 % false alarms, or AUROC: each accuses a
    model that has memorised nothing in TAIL of audits, of two attacks in half of that. Yes where
    the upper bound of the first attack's share is below LEAK: the second one, of fewer images, can
    only take a yes away. Neither unless the split is random: held-out images may differ for other
    reasons.
    """
    if m.get("auroc") is None or "tpr_p" not in m:  # an older version decided by AUROC
        return []
    attacks = [m, *filter(None, [m.get(LIKELIHOOD)])]
    level = TAIL / len(attacks)
    leaks = any(min(attack["p"], attack["tpr_p"]) <= level for attack in attacks)
    answer = BAD if leaks else GOOD if m["tpr_most"] < LEAK else OPEN
    return [{**m, "about": "membership", "leak": LEAK, "needed": NEEDED, "level": level,
             "answer": answer if m["random_split"] else OPEN}]


def _likeness(rows: Sequence[Mapping], filters: Mapping) -> list[dict]:
    """Is synthetic X nearer to held-out real X than real images of any other label are?

    One space in which it is nearer suffices, unless it is farther in another: pixels may not show
    the label at all.
    """
    found = []
    for label, own in grouped(rows, "label").items():
        spaces = []
        measured = [r for r in own if r.get("KD") is not None]
        for extractor, sets in grouped(measured, "extractor").items():
            made = [r for r in sets if r["set"] == "synthetic"]
            others = [r for r in sets if r["set"] not in ("synthetic", "real")
                      and r.get("beyond_low") is not None]
            if made and others and label != ALL:
                other = min(others, key=lambda r: r["KD"])
                answer = beyond(other["beyond_low"], other["beyond_high"], 0)
                spaces.append({"space": extractor, "made": made[0]["KD"], "other": other,
                               "answer": unless_selected(answer, extractor in filters)})
        if spaces:
            found.append({"about": "likeness", "label": label, "spaces": spaces,
                          "answer": in_any(s["answer"] for s in spaces)})
    return found


def _agreement(rows: Sequence[Mapping], filters: Mapping) -> list[dict]:
    """Does a judge see what was asked for? Attributes are compared within a label.

    They are asked for as they occur in real rows, so the label alone predicts them in part. Where
    the own judge selected the images, an independent one answers for the label in its place.
    """
    real, found = {_read(r): r for r in rows if r["set"] == "held-out real" and r["n"]}, []
    for r in rows:
        if r["set"] != "synthetic" or not r["n"] or _read(r) not in real:
            continue
        truth = real[_read(r)]
        more = {"made": r, "real": truth}
        if r["variable"] == "label":
            # older reports count every image
            answer, ends = no_worse(r["accuracy"], r.get("worth", r["n"]), truth["accuracy"],
                                    truth.get("worth", truth["n"]))
            if r.get("kind") == "findings":  # all at once may be right where none is ever seen
                apart = [beyond(v["low"] - v["without_high"], v["high"] - v["without_low"], 0)
                         for v in r["by_value"] if v.get("n_without")]
                answer = in_every([answer, *apart])
            more |= {"about": "label", "answer": answer, "difference": list(ends)}
        elif r["kind"] == "number":
            more |= {"about": "number", "answer": beyond(r["within_low"], r["within_high"], 0)}
        else:
            more |= {"about": "category", "answer": beyond(r["low"], r["high"],
                                                           r["within_chance"])}
        own = more["about"] == "label" and "label" in filters and r.get("judge") != "independent"
        found.append({**more, "answer": unless_selected(more["answer"], own)})
    elsewhere = {v["about"] for v in found if v["made"].get("judge") == "independent"}
    return [v for v in found if v["answer"] != UNTESTED or v["about"] not in elsewhere]


def _read(row: Mapping) -> tuple[str, str]:
    """What was read, and by which judge."""
    return row["variable"], row.get("judge", "own")


def variety(rows: Sequence[Mapping], filters: Collection[str] = ()) -> list[dict]:
    """Do synthetic images reach as much of the held-out ones as real images do, less MARGIN?"""
    def answer(r: Mapping) -> str:
        gate = r["coverage_floor"]["median"] - MARGIN
        return unless_selected(beyond(r["coverage_low"], r["coverage_high"], gate),
                               r["extractor"] in filters)

    spaces = [{**r, "answer": answer(r)}
              for r in rows if (r["label"], r["set"]) == (ALL, "synthetic")
              and r.get("coverage_low") is not None
              and (r.get("coverage_floor") or {}).get("median") is not None]
    return [{"about": "variety", "spaces": spaces,
             "answer": in_every(s["answer"] for s in spaces)}] if spaces else []


def of_readers(result: Mapping) -> list[dict]:
    """The answers of a reading study; "good" is the welcome one.

    Of the intervals over other images and over other images and readers, the wider end counts.
    """
    pooled, margin = result["pooled"], result["design"]["margin"]
    answer = beyond(*_widest(pooled["difference"]), -margin) if pooled else OPEN
    found = [{"about": "readers", "answer": answer, "good": GOOD, "pooled": pooled,
              "margin": margin}]
    if origin := (pooled or {}).get("origin"):
        seen = beyond(*_widest(origin), 0.5) == GOOD
        found.append({**origin, "about": "origin", "answer": GOOD if seen else OPEN, "good": BAD})
    return found


def _widest(x: Mapping) -> tuple[float, float]:
    return (min((x[end] for end in ("low", "wide_low") if x[end] is not None), default=-math.inf),
            max((x[end] for end in ("high", "wide_high") if x[end] is not None), default=math.inf))
