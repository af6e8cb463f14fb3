"""Splits by patient: made where the data bring none, and checked wherever they come from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from minidiff.errors import InputError, count
from minidiff.runs import of_other_images, read_json

Row = dict[str, str]
SPLITS = ("train", "val", "test")
# of the patients of a label, once for val and once for test, where the data bring no split
HELD_OUT = 0.15


def split_patients(rows: Sequence[Row], hashes: Mapping[str, str], seed: int) -> dict[str, str]:
    """Patient → split. Patients who share an identical file stay together; a split already given to
    one is kept.
    """
    groups = defaultdict(list)
    for row, group in zip(rows, _groups(rows, hashes)):
        groups[group].append(row)
    holders = Counter(label for group in groups.values()
                      for label in {row["label"] for row in group})
    splits, strata = {}, defaultdict(list)
    for group in groups.values():
        patients = sorted({row["patient"] for row in group})
        given = [row["split"] for row in group if row["split"]]
        if given:
            splits |= dict.fromkeys(patients, given[0])
        else:  # a patient with two labels counts for the rarer one, which can spare it less
            strata[min((holders[row["label"]], row["label"]) for row in group)].append(patients)
    rng = np.random.default_rng(seed)
    for _, members in sorted(strata.items()):
        held = max(1, round(HELD_OUT * len(members))) if len(members) >= len(SPLITS) else 0
        names = ["val"] * held + ["test"] * held + ["train"] * (len(members) - 2 * held)
        for name, k in zip(names, rng.permutation(len(members))):
            splits |= dict.fromkeys(sorted(members)[k], name)
    reached = {(row["label"], row["split"] or splits[row["patient"]]) for row in rows}
    for label in sorted({row["label"] for row in rows if not row["split"]}):
        if not all((label, name) in reached for name in SPLITS):
            raise InputError(f"label {label!r} has {holders[label]} patient(s), too few to split: "
                             "3 or more are needed")
    return splits


def _groups(rows: Sequence[Row], hashes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Name of each row's group, a connected component of patients and file contents
    (union-find).
    """
    parent = {}

    def root(node: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for row in rows:
        parent[root(("content", hashes[row["file"]]))] = root(("patient", row["patient"]))
    return [root(("patient", row["patient"])) for row in rows]


def check_leakage(rows: Sequence[Row], hashes: Mapping[str, str]) -> None:
    """Raise InputError if a patient or an identical file lies in two splits, or an identical file
    under two labels.
    """

    def two(column: str) -> str:
        return f"{first['file']} is {first[column] or 'without'}, {row['file']} is {row[column] or 'without'}"

    patients, contents = {}, {}
    for row in rows:
        first = patients.setdefault(row["patient"], row)
        if first["split"] != row["split"]:
            raise InputError(f"patient {row['patient']!r} crosses splits: {two('split')}")
        first = contents.setdefault(hashes[row["file"]], row)
        if first["split"] != row["split"]:
            raise InputError(f"an identical file crosses splits: {two('split')}")
        if first["label"] != row["label"]:
            raise InputError(f"an identical file has two labels: {two('label')}")


def trained_on(samples: str | Path) -> set[str] | None:
    """SHA-256 of the images that the generator of a samples folder was trained on; None where its
    manifest does not say.
    """
    path = Path(samples) / "manifest.json"
    return set(read_json(path).get("trained_on", [])) or None if path.is_file() else None


def check_synthetic(rows: Sequence[Row], hashes: Mapping[str, str], real: Iterable[str],
                    folder: str) -> None:
    """Raise InputError if a file of a folder of samples is one of the real data, whose SHA-256
    `real` are.
    """
    known = set(real)
    same = [row["file"] for row in rows if hashes[row["file"]] in known]
    if same:
        raise InputError(f"{folder} holds {count(len(same), 'file')} of the real data, e.g. "
                         f"{same[0]}: not synthetic")


def of_other_data(seen: Iterable[str] | None, rows: Sequence[Row],
                  hashes: Mapping[str, str]) -> bool:
    """Was something trained on other images than these training rows? As `runs.of_other_images` has
    it.
    """
    return of_other_images(seen, (hashes[row["file"]] for row in rows))


def check_unseen(rows: Sequence[Row], hashes: Mapping[str, str], seen: set[str] | None,
                 who: str) -> list[str]:
    """Raise InputError if `who` (the generator, the judge) was trained on any of these held-out
    images; a note where what it was trained on is unknown."""
    if not seen:
        return [f"what {who} was trained on is unknown"]
    leaked = [row["file"] for row in rows if hashes[row["file"]] in seen]
    if leaked:
        raise InputError(f"{who} was trained on {len(leaked)} of {len(rows)} held-out images, e.g. "
                         f"{leaked[0]}: give the same --data and split to every stage")
    return []
