"""Does a space recognise a patient? How near a patient's other image lies, against chance.

A copy may show a patient in another pose, which neither the rule for single images (`named`) nor
plain pixels find. A space in which another image of the same patient is seldom the nearest cannot
find it either: an image that is new there may still show a patient of the training set.
"""

from collections.abc import Hashable
from functools import lru_cache

import torch
from torch import Tensor

from minidiff.evaluation.metrics.pairwise import ROWS, blocks, to_others
from minidiff.statistics import group_ids, wilson

FEWEST_PATIENTS = 10   # with two images or more, below which nothing is said


@lru_cache(maxsize=8)
def nearest_by_patient(x: Tensor, patients: tuple[Hashable, ...]) -> tuple[Tensor, Tensor]:
    """Distance of each of x to the nearest other image of its own patient, infinite without one,
    and of any other patient: (n,), (n,)."""
    group, own, others = torch.from_numpy(group_ids(patients)), [], []
    for rows, d in zip(blocks(len(x), len(x), ROWS), to_others(x)):
        same = group[rows, None] == group
        own.append(d.masked_fill(~same, torch.inf).amin(1))
        others.append(d.masked_fill(same, torch.inf).amin(1))
    return torch.cat(own), torch.cat(others)


def recognition(own: Tensor, others: Tensor, patients: tuple[Hashable, ...],
                labels: tuple[Hashable, ...], made: Tensor, heldout: Tensor) -> dict | None:
    """Is a patient's other image nearer than any other patient's? None if too few have one.

    own and others (T,) are those of `nearest_by_patient`, made and heldout the distances of each
    synthetic and held-out image to its nearest training image. "found": the share of images whose
    nearest other image is of the same patient; its interval counts patients, not images. "chance":
    the share if the nearest were any image of the same label. "near" and "near_heldout": shares
    nearer to a training image than half of these images are to their patient's other one; training
    patients in another pose would make the first the greater.
    """
    some = own.isfinite()
    codes, kinds = (torch.from_numpy(group_ids(names)) for names in (patients, labels))
    people = len(codes[some].unique())
    if people < FEWEST_PATIENTS:
        return None
    siblings, alike = codes.bincount()[codes] - 1, kinds.bincount()[kinds] - 1
    share = float((own < others)[some].double().mean())
    low, high = wilson(round(share * people), people)
    usual = float(own[some].median())
    return {"n": int(some.sum()), "patients": people, "found": share, "low": low, "high": high,
            "chance": float((siblings / alike.clamp(min=1)).clamp(max=1)[some].mean()),
            "near": float((made < usual).double().mean()),
            "near_heldout": float((heldout < usual).double().mean())}
