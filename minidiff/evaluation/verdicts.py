"""What the numbers say, in plain words; where an interval leaves it open, "not resolved"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minidiff.evaluation.metrics.comparison import ALL
from minidiff.evaluation.pages.format import num, percent
from minidiff.evaluation.study.answers import primary_text

GOOD, BAD, OPEN = "yes", "no", "not resolved"
KINDS = {GOOD: "yes", BAD: "no", OPEN: "open"}  # how `page.chip` shows them
MARGIN = 0.1  # by which agreement may fall short of that on real images
# AUROC of an attack below which, with its whole interval, it is said to find next to nothing
LEAK = 0.6


def beyond(low: float | None, high: float | None, gate: float) -> str:
    """Does a whole interval lie above a gate? Yes; no where it lies below; else not resolved."""
    if low is None or high is None:
        return OPEN
    return GOOD if low > gate else BAD if high < gate else OPEN


def in_every(answers: Iterable[str]) -> str:
    """Yes takes all of them, and one no is enough for no."""
    answers = set(answers)
    return BAD if BAD in answers else GOOD if answers == {GOOD} else OPEN


def verdicts(result: dict) -> list[dict]:
    """One {"question", "answer", "text"} for each question that the report could ask; answers are
    yes, no, not resolved.
    """
    return [*_copies(result.get("neighbours") or {}, result.get("samples") or {}),
            *_membership(result.get("membership") or {}), *_likeness(result["distances"]),
            *_agreement(result.get("agreement") or []), *_study(result.get("study") or {})]


def _likeness(rows: Sequence[dict]) -> list[dict]:
    """Is synthetic X nearer to held-out real X than real images of any other label are? One space
    in which it is will do, for pixels may not see the label at all, if there is none in which it is
    farther."""
    found = []
    for label in dict.fromkeys(r["label"] for r in rows if r["label"] != ALL):
        answers, parts = [], []
        for extractor in dict.fromkeys(r["extractor"] for r in rows):
            own = [r for r in rows if (r["extractor"], r["label"]) == (extractor, label)
                   and r.get("KD") is not None]
            made = next((r for r in own if r["set"] == "synthetic"), None)
            others = [r for r in own
                      if r["set"] not in ("synthetic", "real") and r.get("beyond_low") is not None]
            if made is None or not others:
                continue
            other = min(others, key=lambda r: r["KD"])
            answers.append(GOOD if other["beyond_low"] > 0 else BAD if other["beyond_high"] < 0
                           else OPEN)
            parts.append(f"{extractor}: KD {num(made['KD'])}, and {num(other['KD'])} of "
                         f"{other['set']}, which is {num(other['beyond_low'])} to "
                         f"{num(other['beyond_high'])} farther")
        if answers:
            question = f"Is synthetic {label} nearer to held-out real {label} than real images of other labels are?"
            found.append({"question": question, "answer": _all(answers),
                          "text": "; ".join(parts) + "."})
    return found


def _agreement(rows: Sequence[dict]) -> list[dict]:
    """Attributes within label: those asked for come from real rows of a label, so the label alone
    tells of them.
    """
    real = {r["variable"]: r for r in rows if r["set"] == "held-out real"}
    found = []
    for r in rows:
        truth = real.get(r["variable"], {})
        if r["set"] != "synthetic" or not r["n"] or not truth.get("n"):
            continue
        if r["variable"] == "label":
            goal = truth["accuracy"] - MARGIN
            text = (f"The judge, trained on real patients only, sees the label asked for in "
                    f"{percent(r['accuracy'])} ({percent(r['low'])} to {percent(r['high'])}) of "
                    f"{r['n']} synthetic images, and the true label in "
                    f"{percent(truth['accuracy'])} of {truth['n']} held-out real ones.")
            answer = GOOD if r["low"] >= goal else BAD if r["high"] < goal else OPEN
            found.append({"question": "Do the pictures show the label asked for?", "answer": answer,
                          "text": text})
        elif r["kind"] == "number":
            low, high = r["within_low"], r["within_high"]
            text = (f"Within a label, {r['variable']} asked for and judged correlate with r = "
                    f"{num(r['within_r'])} ({num(low)} to {num(high)}; n = {r['n']}); on held-out "
                    f"real images, r = {num(truth['within_r'])}.")
            answer = OPEN if low is None else GOOD if low > 0 else BAD if high <= 0 else OPEN
            found.append({"question": f"Does asking for {r['variable']} move the picture?",
                          "answer": answer, "text": text})
        else:
            chance = r["within_chance"]
            text = (f"The judge sees the {r['variable']} asked for in {percent(r['accuracy'])} "
                    f"({percent(r['low'])} to {percent(r['high'])}; n = {r['n']}), guessing by the "
                    f"label would reach {percent(chance)}; on held-out real images, "
                    f"{percent(truth['accuracy'])}.")
            answer = GOOD if r["low"] > chance else BAD if r["high"] <= chance else OPEN
            found.append({"question": f"Does asking for {r['variable']} move the picture?",
                          "answer": answer, "text": text})
    return found


def _copies(neighbours: dict, samples: dict) -> list[dict]:
    if not neighbours:
        return []
    text = "; ".join(f"{s['space']}: {percent(s['near_share'])} are conspicuously near to a "
                     f"training image (of held-out images {percent(s['near_heldout_share'])} are), "
                     f"and {s['closest_train']} of the closest {s['closest']} lie next to one (by "
                     f"chance {s['closest_expected']:.1f})" for s in neighbours["spaces"])
    answer = {True: BAD, False: GOOD, None: OPEN}[neighbours["suspected"]]
    if samples.get("of_other_data") and answer == GOOD:
        answer, text = OPEN, f"The generator was trained on other images, whose copies cannot be seen here. {text}"
    return [{"question": "Are the pictures new, not copies of training images?", "answer": answer,
             "text": f"{neighbours['verdict'].capitalize()}. {text}{'.' if text else ''}"}]


def _membership(m: dict) -> list[dict]:
    """Does the denoising error give training patients away?"""
    if m.get("auroc") is None:
        return []
    low, high = m["by_patient"]
    text = (f"From its denoising error a training image is told from a held-out one with AUROC "
            f"{num(m['auroc'])} ({num(low)} to {num(high)}, by patient; n = {m['n_train']} and "
            f"{m['n_heldout']}); .5 is guessing. Other attacks may find more.")
    answer = OPEN if low is None else BAD if low > 0.5 else GOOD if high < LEAK else OPEN
    return [{"question": "Does the model keep who was in its training set to itself?",
             "answer": answer, "text": text}]


def _study(study: dict) -> list[dict]:
    """Did synthetic images help the classifier? The study's primary comparison says so; its own
    page says more.
    """
    if not (p := study.get("primary")):
        return []
    return [{"question": f"Do synthetic training images help a classifier ({p['test_set']} set)?",
             "answer": {"gain": GOOD, "harm": BAD}.get(p["answer"], OPEN), "text": f"{p['arm']} "
             f"less {p['against']}, {p['metric'].replace('_', ' ')}: {primary_text(p)}"}]


def _all(answers: Sequence[str]) -> str:
    return BAD if BAD in answers else GOOD if GOOD in answers else OPEN


def of_readers(result: dict) -> list[dict]:
    """{"question", "answer", "text", "good"} of a reading study; "good" is the welcome answer.

    Of the intervals over other images and over other images and readers, the wider end counts.
    """
    pooled, margin = result["pooled"], result["design"]["margin"]
    question = ("Are synthetic images called Good as often as real ones, to within "
                f"{100 * margin:.0f} points?")
    if not pooled:
        return [{"question": question, "answer": OPEN, "good": GOOD,
                 "text": "No reader is both finished and attentive."}]
    d, shares = pooled["difference"], [pooled[kind]["value"] for kind in ("synthetic", "real")]
    low = min(d[end] for end in ("low", "wide_low") if d[end] is not None)
    high = max(d[end] for end in ("high", "wide_high") if d[end] is not None)
    answer = GOOD if low > -margin else BAD if high < -margin else OPEN
    text = (f"{percent(shares[0])} of synthetic and {percent(shares[1])} of real; difference "
            f"{100 * d['value']:+.1f} points ({_both(d, '{:+.1f}')}).")
    found = [{"question": question, "answer": answer, "good": GOOD, "text": text}]
    if o := pooled["origin"]:
        low = min(o[end] for end in ("low", "wide_low") if o[end] is not None)
        text = (f"{percent(o['value'])} of the answers are right, where chance is 50 % "
                f"({_both(o, '{:.1f}')} %).")
        found.append({"question": "Can readers tell synthetic images from real ones?",
                      "answer": GOOD if low > 0.5 else OPEN, "good": BAD, "text": text})
    return found


def _both(x: dict, number: str) -> str:
    """Both intervals of a share or a difference, in per cent."""
    low, high, wide_low, wide_high = (None if x[end] is None else number.format(100 * x[end])
                                      for end in ("low", "high", "wide_low", "wide_high"))
    wide = "" if wide_low is None else f"; over other readers, too, {wide_low} to {wide_high}"
    return f"{low} to {high}{wide}".replace("-", "−")
