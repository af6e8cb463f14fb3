"""The four verdicts on a candidate set of one label, and whether the controls were caught. Never
one combined score.

    FIDELITY   in every space ρ ≤ ½: nearer to held-out real images than half of the way to the
               yardstick
    COVERAGE   in every space of content, the share of held-out images with a candidate in reach is
               at most 10 points short of what real images reach
    LABEL      the judge, trained on real training patients only, sees the label at most 10 points
               less often than in real images
    NOVELTY    candidates lie no nearer to training images of the label than held-out images do

An answer is yes or no only where the whole 95 % interval lies on one side of the gate, else it is
"not resolved". One space that says no is enough for no; yes takes all of them. C2ST is reported and
gates nothing: a real set of another month fails it. The words stand in pages/gates.txt.

A control is caught where the verdict that is meant for it says no. One that is not caught makes the
whole matrix INVALID: then its verdicts on the candidates say nothing.
"""

from collections.abc import Collection, Mapping, Sequence

from minidiff.evaluation.features.extractor import Spectrum
from minidiff.evaluation.matrix.cells import LIMIT
from minidiff.evaluation.matrix.controls import CONTROLS, OPTIONAL
from minidiff.evaluation.pages import sentence
from minidiff.evaluation.verdicts import (
    BAD,
    GOOD,
    MARGIN,
    OPEN,
    UNTESTED,
    beyond,
    in_every,
    new,
    no_worse,
    unless_selected,
)
from minidiff.rating import effective_n, share_interval

VERDICTS = ("FIDELITY", "COVERAGE", "LABEL", "NOVELTY")


def fidelity(spaces: Mapping[str, dict], another_source: bool) -> dict:
    """From ρ in every space (`cells.rho`); no space: there are no other real images."""
    answers = {name: {True: GOOD, False: BAD, None: OPEN}[r["within"]]
               for name, r in spaces.items()}
    return {"answer": in_every(answers.values()) if spaces else UNTESTED, "spaces": answers,
            "resolved": any(r["resolved"] for r in spaces.values()),
            "text": sentence("gates.txt", "fidelity", spaces=spaces, limit=LIMIT,
                             another_source=another_source)}


def coverage(spaces: Mapping[str, dict]) -> dict:
    """From the cell against held-out images in every space but the spectrum, which says nothing of
    variety."""
    spaces = {name: c for name, c in spaces.items() if name != Spectrum.name}
    answers = {name: beyond(c["coverage_low"], c["coverage_high"], c["coverage_null"] - MARGIN)
               if "coverage_null" in c else OPEN for name, c in spaces.items()}
    return {"answer": in_every(answers.values()), "spaces": answers,
            "text": sentence("gates.txt", "coverage", spaces=spaces)}


def label(seen: Sequence[bool], real: Sequence[bool], patients: Sequence,
          of_real: Sequence) -> dict:
    """From whether the judge sees the label in each candidate, and in each held-out real image.

    patients and of_real are those of the images, of which several may be of one patient.
    """
    share, share_real = sum(seen) / len(seen), sum(real) / len(real)
    low, high = share_interval(seen, patients)
    answer, difference = no_worse(share, effective_n(seen, patients),
                                  share_real, effective_n(real, of_real))
    found = {"agreement": share, "low": low, "high": high, "real": share_real, "n": len(seen),
             "n_real": len(real), "difference": list(difference)}
    return {"answer": answer, **found, "text": sentence("gates.txt", "label", found=found)}


def no_label() -> dict:
    """Of images that have all one label."""
    return {"answer": UNTESTED, "text": sentence("gates.txt", "no_label")}


def novelty(found: Mapping) -> dict:
    """From `copying.memorisation`, as the report decides it (`verdicts.new`).

    Images that are only smooth or typical lie nearer to everything: that alone leaves it open.
    """
    answer = new(found)
    return {"answer": answer,
            "text": sentence("gates.txt", "novelty", found=found, answer=answer)}


def of_selected(v: Mapping, filters: Mapping) -> dict:
    """The verdicts on a set, "not tested" where its filters decided a yes (`selection.decided`)."""
    found = dict(v)
    for name, subject in (("LABEL", "label"), ("NOVELTY", "copies")):
        if name in v and subject in filters:
            found[name] = _untested(v[name], unless_selected(v[name]["answer"], True))
    for name in ("FIDELITY", "COVERAGE"):
        spaces = v.get(name, {}).get("spaces", {})
        if spaces.keys() & filters.keys():
            spaces = {space: unless_selected(answer, space in filters)
                      for space, answer in spaces.items()}
            found[name] = _untested({**v[name], "spaces": spaces}, in_every(spaces.values()))
    return found


def _untested(verdict: Mapping, answer: str) -> dict:
    """The verdict with this answer, and why it may have changed."""
    text = sentence("gates.txt", "selected", text=verdict["text"])
    return {**verdict, "answer": answer, "text": text}


def caught(verdicts: Sequence[Mapping]) -> list[dict]:
    """For each control and label, was it caught? None: not tested.

    The wrong source is not tested where no space resolves the yardstick, which is the same source.
    Nor is a control whose verdict cannot be given.
    """
    rows = []
    for v in (v for v in verdicts if v["kind"] == "control"):
        wanted = CONTROLS[v["part"]].verdict
        found = v.get(wanted, {})
        row = {"control": v["part"], "label": v["label"], "verdict": wanted, "caught": None}
        if v["too_few"]:
            why = v["too_few"]
        elif v["part"] in OPTIONAL and not found.get("resolved"):
            why = "no space resolves the yardstick, which is this very source"
        else:
            why = found["text"]
            row["caught"] = None if found["answer"] == UNTESTED else found["answer"] == BAD
        rows.append({**row, "why": why})
    return rows


def status(rows: Sequence[Mapping], unasked: Collection[str] = ()) -> tuple[str, list[str]]:
    """VALID or INVALID, and why: each control must be caught where it is tested, and tested
    somewhere, but for those of verdicts that these data cannot be asked for."""
    faults = [f"{r['control']} ({r['label']}) was not caught by {r['verdict']}: {r['why']}"
              for r in rows if r["caught"] is False]
    tested = {r["control"] for r in rows if r["caught"] is not None}
    faults += [f"{name} could not be tested with any label" for name, control in CONTROLS.items()
               if name not in OPTIONAL and name not in tested and control.verdict not in unasked]
    return ("INVALID" if faults else "VALID"), faults
