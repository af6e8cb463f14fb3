"""What the judge reads off images, beside what they are or were asked to be.

The attributes that a sample is asked for come from real rows of its label, and where old people
have one label and young ones another, a picture that shows the label alone agrees with the age
asked for, too. So each attribute is also compared within label.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from minidiff import variables as var
from minidiff.classification.judge_agreement import judge_agreement
from minidiff.classification.predictor import Predictor
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.statistics import fisher_interval, group_ids, pearson, z_value
from minidiff.variables import Labels, Variable

SHOWN = {"heldout": "held-out real", "synthetic": "synthetic"}


def asked(judge: Predictor | None,
          tables: Mapping[str, Table]) -> tuple[dict[str, Labels], dict[str, str]]:
    """Cells of held-out and synthetic rows, of what samples were asked for and the judge reads.

    And why an attribute cannot be compared, by its name; InputError where that is the label, which
    samples may also be without.
    """
    found, why = {name: {} for name in SHOWN}, {}
    for v in judge.variables if judge else ():
        if not set(tables["synthetic"].column(v.name)) - {"", var.ANY}:
            continue
        try:
            cells = {name: var.encode([v], tables[name].rows) for name in SHOWN}
        except InputError as error:
            if v.name == "label":
                raise
            why[v.name] = str(error)
        else:
            for name in SHOWN:
                found[name] |= cells[name]
    return found, why


def agree(judge: Predictor | None, labels: Mapping[str, Labels], why: Mapping[str, str],
          tables: Mapping[str, Table], pixels: Mapping[str, Tensor]) -> list[dict]:
    """The judge on held-out real and on synthetic images, each attribute also within label.

    `labels` and `why` are those of `asked`.
    """
    rows = [{"variable": name, "set": shown, "n": 0, "why": text}
            for name, text in why.items() for shown in SHOWN.values()]
    for name, shown in SHOWN.items() if judge else ():
        judged = judge.predict(pixels[name])
        once = SimpleNamespace(variables=judge.variables, predict=lambda _, judged=judged: judged)
        within = within_label(judge.variables, judged, labels[name], tables[name].column("label"))
        rows += [{**row, **within.get(row["variable"], {})}
                 for row in judge_agreement(once, pixels[name], labels[name], shown,
                                            tables[name].column("patient"))]
    return rows


def within_label(variables: Sequence[Variable], judged: Mapping[str, Tensor], labels: Labels,
                 groups: Sequence[str]) -> dict[str, dict]:
    """Name → figures over the known cells of each variable in `labels` but the label itself.

    `groups` are the values of the label. Number: correlation with each label's mean taken off both
    sides, and Fisher's interval (within_r, within_low, within_high). Category: the accuracy of
    guessing the commonest value of each label (within_chance).
    """
    group, found = group_ids(groups), {}
    for v in variables:
        if v.name not in labels or v.name == "label":
            continue
        cells = labels[v.name]
        known = v.known(cells).numpy()
        own, cells = group[known], cells.numpy()[known]
        found[v.name] = {}
        if known.any() and not v.values:
            r = _pooled(cells, judged[v.name].numpy()[known], own)
            found[v.name] = dict(zip(("within_r", "within_low", "within_high"), r))
        elif known.any():
            right = sum(max(Counter(cells[own == g].tolist()).values()) for g in set(own.tolist()))
            found[v.name] = {"within_chance": right / len(cells)}
    return found


def _pooled(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> tuple[float, float, float]:
    """Correlation within groups (r, low, high); every mean taken off costs a degree of freedom."""
    _, group = np.unique(group, return_inverse=True)
    r, _, _ = pearson(_centred(x, group), _centred(y, group))
    free = len(x) - group.max() - 3
    if math.isnan(r) or free < 1:
        return math.nan, math.nan, math.nan
    return r, *fisher_interval(r, z_value() / math.sqrt(free))


def _centred(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    x = x.astype(float)
    rest = x - (np.bincount(group, x) / np.bincount(group))[group]
    # of equal values nothing is left, not even the rounding
    return np.where(np.abs(rest) < 1e-9 * np.abs(x).max(), 0.0, rest)


def certainty(judge: Predictor | None, labels: Sequence[str], pixels: Tensor) -> np.ndarray | None:
    """The judge's probability of the label of each image, (n,); None where it cannot read them. Of
    findings it is the product over all of them."""
    if not reads(judge, labels):
        return None
    v, p = _label(judge), judge.predict(pixels)["label"].double()
    asked = _asked(v, labels)
    return torch.where(asked, p, 1.0 if v.exclusive else 1 - p).prod(1).numpy()


def reads(judge: Predictor | None, labels: Sequence[str]) -> bool:
    """Is there a judge, and does it know each of these labels?"""
    return bool(judge) and bool(v := _label(judge)) and not _unknown(v, labels)


def recognised(judge: Predictor, pixels: Tensor, labels: Sequence[str]) -> Tensor:
    """Does the judge read each image as the label that was asked for, of findings every one as it
    was? (n,) bool."""
    v = _label(judge)
    if unknown := _unknown(v, labels):
        raise InputError(f"the classifier knows {', '.join(v.values) if v else 'no label'}, not "
                         f"{', '.join(unknown)}")
    return (v.seen(judge.predict(pixels)["label"]) == _asked(v, labels)).all(1)


def _label(judge: Predictor) -> Variable | None:
    return next((v for v in judge.variables if v.name == "label"), None)


def _unknown(v: Variable | None, labels: Sequence[str]) -> list[str]:
    """Labels, or findings in them, that the judge does not know."""
    each = set(labels) if not v or v.exclusive else set().union(
        *(var.present("label", label) for label in set(labels)))
    return sorted(each - set(v.values if v else ()))


def _asked(v: Variable, labels: Sequence[str]) -> Tensor:
    return v.bits(var.encode([v], [{"label": label} for label in labels])["label"])
