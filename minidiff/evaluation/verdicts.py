"""What the figures of a report say: yes, no, or "not resolved" where an interval leaves it open.

Figures in, answers out; the words around them stand in pages/verdicts.txt.
"""

from collections.abc import Iterable, Mapping, Sequence

from minidiff.classification.compare import grouped
from minidiff.evaluation.metrics.report_rows import ALL

GOOD, BAD, OPEN = "yes", "no", "not resolved"
KINDS = {GOOD: "yes", BAD: "no", OPEN: "open"}  # how a page marks them
MARGIN = 0.1  # by which a share may fall short of that of real images
LEAK = 0.6    # AUROC below which, with its whole interval, an attack finds next to nothing
TOLD = 0.6    # AUROC of a discriminator up to which images count as not told apart
# what a generator gets for nothing whose images nobody would take for real, and what is left true
FREE, QUALIFIED = ("copies", "variety"), ("likeness", "label", "number", "category")


def beyond(low: float | None, high: float | None, gate: float) -> str:
    """Does a whole interval lie above a gate? Yes; no where it lies below; else not resolved."""
    if low is None or high is None:
        return OPEN
    return GOOD if low > gate else BAD if high < gate else OPEN


def in_every(answers: Iterable[str]) -> str:
    """Yes takes all of them, and one no is enough for no."""
    answers = set(answers)
    return BAD if BAD in answers else GOOD if answers == {GOOD} else OPEN


def in_any(answers: Iterable[str]) -> str:
    """One yes is enough where none says no."""
    answers = set(answers)
    return BAD if BAD in answers else GOOD if GOOD in answers else OPEN


def kind(v: Mapping) -> str:
    """How a page marks an answer: yes for the welcome one, no, or open."""
    return "open" if v["answer"] == OPEN else "yes" if v["answer"] == v.get("good", GOOD) else "no"


def verdicts(result: Mapping, on_page: bool = False) -> list[dict]:
    """For each question that the report could ask {"about", "answer", the figures behind it}.

    Variety is asked for on the page only.
    """
    first = _realism(result.get("realism") or {})
    rest = [*_copies(result.get("neighbours") or {}, result.get("samples") or {}),
            *_membership(result.get("membership") or {}), *_likeness(result["distances"]),
            *_agreement(result.get("agreement") or []), *_study(result.get("study") or {}),
            *(variety(result["distances"]) if on_page else ())]
    if any(v["answer"] == GOOD for v in first):
        rest = [_unreal(v) for v in rest]
    return first + rest


def _realism(found: Mapping) -> list[dict]:
    """Can synthetic images be told from real ones? The welcome answer is no.

    Yes where the discriminator's whole interval lies above TOLD, or that of a distance above its
    floor; no where the discriminator's lies below and every distance, of two or more, is within
    its floor.
    """
    if not found:
        return []
    floors = [(s, s["KD_floor"]["high"]) for s in found.get("spaces", ())
              if s["KD_floor"] and s["KD_low"] is not None]
    far = [s["space"] for s, floor in floors if s["KD_low"] > floor]
    near = [s["space"] for s, floor in floors if s["KD"] <= floor]
    told = beyond(found.get("low"), found.get("high"), TOLD)
    unlike = told == BAD and len(near) == len(floors) >= 2
    ways = [{**x, "more": x["low"] > TOLD} for x in found.get("looks", ())
            if x["low"] > TOLD or x["high"] < 1 - TOLD]
    return [{**found, "about": "realism", "good": BAD, "far": far, "near": near, "limit": TOLD,
             "ways": sorted(ways, key=lambda x: -abs(x["auroc"] - 0.5)),
             "answer": GOOD if told == GOOD or far else BAD if unlike else OPEN}]


def _unreal(v: dict) -> dict:
    """An answer about images that can be told from real ones."""
    if v["answer"] != GOOD or v["about"] not in FREE + QUALIFIED:
        return v
    return {**v, "unreal": True, "answer": OPEN if v["about"] in FREE else GOOD}


def _copies(neighbours: Mapping, samples: Mapping) -> list[dict]:
    if not neighbours:
        return []
    answer = {True: BAD, False: GOOD, None: OPEN}[neighbours["suspected"]]
    other = bool(samples.get("of_other_data")) and answer == GOOD
    return [{"about": "copies", "answer": OPEN if other else answer, "of_other_data": other,
             "found": neighbours["verdict"], "spaces": neighbours["spaces"]}]


def _membership(m: Mapping) -> list[dict]:
    """Does the denoising error show who was in the training set?"""
    if m.get("auroc") is None:
        return []
    low, high = m["by_patient"]
    answer = BAD if beyond(low, high, 0.5) == GOOD else (
        GOOD if beyond(low, high, LEAK) == BAD else OPEN)
    return [{**m, "about": "membership", "answer": answer}]


def _likeness(rows: Sequence[Mapping]) -> list[dict]:
    """Is synthetic X nearer to held-out real X than real images of any other label are?

    One space in which it is will do, if there is none in which it is farther: pixels may not show
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
                spaces.append({"space": extractor, "made": made[0]["KD"], "other": other,
                               "answer": beyond(other["beyond_low"], other["beyond_high"], 0)})
        if spaces:
            found.append({"about": "likeness", "label": label, "spaces": spaces,
                          "answer": in_any(s["answer"] for s in spaces)})
    return found


def _agreement(rows: Sequence[Mapping]) -> list[dict]:
    """Does the judge see what was asked for? Attributes are compared within a label.

    They are asked for as they occur in real rows, so that the label alone predicts them in part.
    """
    real = {r["variable"]: r for r in rows if r["set"] == "held-out real" and r["n"]}
    found = []
    for r in rows:
        if r["set"] != "synthetic" or not r["n"] or r["variable"] not in real:
            continue
        truth = real[r["variable"]]
        if r["variable"] == "label":
            about, ends, gate = "label", (r["low"], r["high"]), truth["accuracy"] - MARGIN
        elif r["kind"] == "number":
            about, ends, gate = "number", (r["within_low"], r["within_high"]), 0
        else:
            about, ends, gate = "category", (r["low"], r["high"]), r["within_chance"]
        found.append({"about": about, "answer": beyond(*ends, gate), "made": r, "real": truth})
    return found


def _study(study: Mapping) -> list[dict]:
    """Did synthetic images help the classifier? The study's primary comparison answers."""
    p = study.get("primary")
    return [{**p, "about": "study", "answer": helped(p)}] if p else []


def helped(primary: Mapping) -> str:
    """Is the first arm of a primary comparison better? Yes for a gain, no for harm."""
    return {"gain": GOOD, "harm": BAD}.get(primary["answer"], OPEN)


def variety(rows: Sequence[Mapping]) -> list[dict]:
    """Do synthetic images reach as much of the held-out ones as real images do, less MARGIN?"""
    spaces = [{**r, "answer": beyond(r["coverage_low"], r["coverage_high"],
                                     r["coverage_floor"]["median"] - MARGIN)}
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
    return (min(x[end] for end in ("low", "wide_low") if x[end] is not None),
            max(x[end] for end in ("high", "wide_high") if x[end] is not None))
