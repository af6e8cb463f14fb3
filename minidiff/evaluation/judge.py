"""The judge: the classifier that was trained on real images alone and reads labels off pictures; of
these data, or none.
"""

from __future__ import annotations

from pathlib import Path

from minidiff.classification.predictor import Predictor
from minidiff.data.split import of_other_data
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.runs import read_json


def seen_by(classifier: str | Path) -> set[str] | None:
    """SHA-256 of the images that the judge of a classifier run was trained on; None where that is
    not written down.
    """
    path = Path(classifier) / "judge" / "trained_on.json"
    return set(read_json(path)) if path.is_file() else None


def judge_of(classifier: str | Path, train: Table) -> Predictor | None:
    """The judge of a classifier run; None where there is none. InputError where it was trained on
    other images.
    """
    folder = Path(classifier) / "judge"
    if not folder.is_dir():
        return None
    if of_other_data(seen_by(classifier), train.rows, train.hashes):
        raise InputError(f"{folder} was trained on other images than these training images, and "
                         "cannot judge for them: name the --classifier of these data, or one that "
                         "does not exist to go without a judge")
    return Predictor.load(folder)
