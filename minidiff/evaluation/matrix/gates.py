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
gates nothing: a real set of another month fails it.

A control is caught where the verdict that is meant for it says no. One that is not caught makes the
whole matrix INVALID: then its verdicts on the candidates are worth nothing, either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from minidiff.evaluation.features.spectrum import Spectrum
from minidiff.evaluation.matrix.cells import LIMIT
from minidiff.evaluation.matrix.controls import CONTROLS
from minidiff.evaluation.pages.format import num, percent, signed, span
from minidiff.evaluation.verdicts import BAD, GOOD, MARGIN, OPEN
from minidiff.statistics import wilson

VERDICTS = ("FIDELITY", "COVERAGE", "LABEL", "NOVELTY")
OPTIONAL = ("wrong source",)   # controls for which the data may hold no images
# of the nearness tests of all spaces together, below which novelty is not plain
NEAR_P = 0.05
COPYING_Z = -1.64


def fidelity(spaces: Mapping[str, dict], another_source: bool) -> dict:
    """From ρ of every space (`cells.rho`)."""
    if not spaces:
        return _open("no yardstick: no other real images")
    answers = [{True: GOOD, False: BAD, None: OPEN}[r["within"]] for r in spaces.values()]
    far = "another source" if another_source else "another label"
    parts = [f"{name}: " + (
        f"ρ = {num(r['rho'])} ({span(r['rho_low'], r['rho_high'])})" if r["resolved"] else f"KD "
        f"{num(r['KD'])} ({span(r['KD_low'], r['KD_high'])}), the yardstick is not resolved "
        f"({span(r['yardstick_low'], r['yardstick_high'])})") for name, r in spaces.items()]
    first = next(iter(spaces.values()))
    return {"answer": _all(answers), "spaces": dict(zip(spaces, answers)),
            "resolved": any(r["resolved"] for r in spaces.values()), "text": f"{'; '.join(parts)}. "
            f"1 is as far as {far} (n = {first['n']}, {first['yardstick_n']}, held-out "
            f"{first['n_r']}; limit {LIMIT:g})."}


def coverage(spaces: Mapping[str, dict]) -> dict:
    """From the cell against held-out images in every space but that of texture, which says nothing
    of variety.
    """
    answers, parts = [], []
    spaces = {name: c for name, c in spaces.items() if name != Spectrum.name}
    for name, c in spaces.items():
        goal = c["coverage_null"] - MARGIN if "coverage_null" in c else None
        answers.append(OPEN if goal is None
                       else _interval(c["coverage_low"], c["coverage_high"], goal))
        parts.append(f"{name}: {percent(c['coverage'])} ({percent(c['coverage_low'])} to "
                     f"{percent(c['coverage_high'])}; real: {percent(c.get('coverage_null'))})")
    return {"answer": _all(answers), "spaces": dict(zip(spaces, answers)),
            "text": f"{'; '.join(parts)} (n = {next(iter(spaces.values()))['n']} on both sides)."}


def label(seen: Sequence[bool], real: Sequence[bool]) -> dict:
    """From whether the judge sees the label in each candidate, and in each held-out real image."""
    (low, high), share = wilson(sum(seen), len(seen)), sum(real) / len(real)
    return {"answer": _interval(low, high, share - MARGIN), "agreement": sum(seen) / len(seen),
            "low": low, "high": high, "real": share, "n": len(seen), "n_real": len(real),
            "text": f"The judge sees it in {percent(sum(seen) / len(seen))} ({percent(low)} to "
            f"{percent(high)}; n = {len(seen)}), in held-out real images in {percent(share)} (n = "
            f"{len(real)})."}


def novelty(found: dict) -> dict:
    """From `copying.memorisation`.

    no where it suspects copies: tests that agree, nearer than held-out images are and nearest to
    training images in particular. Images that are only smooth or typical lie nearer to everything:
    the first alone leaves it open. yes takes no sign at all: no more near-copies than held-out
    images have (Fisher, Bonferroni) and C_T above −1.64 in every space.
    """
    if not found["spaces"]:
        return _open(found["verdict"])
    near = min(1.0, min(s["near_p"] for s in found["spaces"]) * len(found["spaces"]))   # Bonferroni
    z = min((s["copying_z"] for s in found["spaces"] if np.isfinite(s["copying_z"])), default=0.0)
    calm = found["suspected"] is False and near >= NEAR_P and z > COPYING_Z
    parts = [f"{s['space']}: {percent(s['near_share'])} nearer to training images than the nearest "
             f"5 % of held-out ones, {s['closest_train']} of the closest {s['closest']} lie next "
             f"to one (by chance {s['closest_expected']:.1f}), C_T z = {num(s['copying_z'])}, "
             f"AuthPct {signed(s['auth_excess'])} points on held-out" for s in found["spaces"]]
    said = found["verdict"].capitalize() if found["suspected"] or calm else (
        "Nearer to training images than held-out ones are, but not to training images in "
        "particular: smooth or typical images, or weak copies")
    return {"answer": BAD if found["suspected"] else GOOD if calm else OPEN, "near_p": near,
            "copying_z": z, "text": f"{said}. {'; '.join(parts)} (n = {found['spaces'][0]['n']}, "
            f"training {found['spaces'][0]['train']}, held-out {found['spaces'][0]['heldout']})."}


def caught(verdicts: Sequence[dict]) -> list[dict]:
    """One row for each control and label: {"control", "label", "verdict", "caught", "why"}; caught
    None: not tested.

    The wrong source is not tested where no space tells this source from the data's own: so is the
    yardstick, then.
    """
    rows = []
    for v in verdicts:
        if v["kind"] != "control":
            continue
        wanted = CONTROLS[v["part"]].verdict
        found = v.get(wanted, {})
        unseen = v["part"] in OPTIONAL and not found.get("resolved")
        right = None if v["grey"] or unseen else found["answer"] == BAD
        why = v["grey"] or ("no space resolves the yardstick, which is this very source" if unseen
                            else found["text"])
        rows.append({"control": v["part"], "label": v["label"], "verdict": wanted, "caught": right,
                     "why": why})
    return rows


def status(rows: Sequence[dict]) -> tuple[str, list[str]]:
    """VALID or INVALID, and why: every control must have been caught wherever it was tested, and
    tested somewhere.
    """
    faults = [f"{r['control']} ({r['label']}) was not caught by {r['verdict']}: "
              f"{r['why']}" for r in rows if r["caught"] is False]
    faults += [f"{name} could not be tested with any label" for name in CONTROLS
               if name not in OPTIONAL
               and not any(r["control"] == name and r["caught"] is not None for r in rows)]
    return ("INVALID" if faults else "VALID"), faults


def _interval(low: float, high: float, goal: float) -> str:
    return GOOD if low >= goal else BAD if high < goal else OPEN


def _all(answers: Sequence[str]) -> str:
    return BAD if BAD in answers else GOOD if set(answers) == {GOOD} else OPEN


def _open(text: str) -> dict:
    return {"answer": OPEN, "text": text}
