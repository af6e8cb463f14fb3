"""Splits by patient: made where the data bring none, checked, and repaired where patients cross."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy

from minidiff.errors import InputError, count
from minidiff.runs import find_json, of_other_images

Row = dict[str, str]
SPLITS = ("train", "val", "test")
HELD_OUT = 0.15  # share of a label's patients in val, and again in test, where we make the split


def connected(n: int, edges: Iterable[tuple[int, int]]) -> np.ndarray:
    """Number (n,) of the connected component of each of n nodes."""
    i, j = np.array(list(edges), dtype=int).reshape(-1, 2).T
    graph = scipy.sparse.coo_matrix((np.ones(len(i)), (i, j)), (n, n))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1]


def group_images(rows: Sequence[Row], copies: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    """Number (N,) of each image's group: images of one patient, and copies, belong together."""
    return connected(len(rows), [*copies, *equal_pairs(row["patient"] for row in rows)])


def equal_pairs(keys: Iterable[Hashable]) -> list[tuple[int, int]]:
    """(first of its kind, later one) for all equal keys."""
    first: dict[Hashable, int] = {}
    return [(first[key], i) for i, key in enumerate(keys) if first.setdefault(key, i) != i]


def split_patients(rows: Sequence[Row], copies: Iterable[tuple[int, int]],
                   seed: int) -> dict[str, str]:
    """Patient → split, stratified by label. Patients who share a copied image stay together; a
    split that one of them already has is kept."""
    groups = defaultdict(list)
    for row, group in zip(rows, group_images(rows, copies)):
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
        members = sorted(members)
        for name, k in zip(names, rng.permutation(len(members))):
            splits |= dict.fromkeys(members[k], name)
    reached = {(row["label"], row["split"] or splits[row["patient"]]) for row in rows}
    few = [label for label in sorted({row["label"] for row in rows if not row["split"]})
           if not all((label, name) in reached for name in SPLITS)]
    if few:
        raise InputError(f"label {few[0]!r} has {holders[few[0]]} patient(s), too few to split: "
                         "3 or more are needed")
    return splits


def repair_split(rows: Sequence[Row], copies: Sequence[tuple[int, int]]) -> list[Row]:
    """The rows, changed so that each patient and all copies of an image lie in one split.

    What lay in several of train, val and test goes to "train", for a held-out image must be new.
    What shares a patient or a copy with another split ("external") becomes "left-out", and so does
    an image that has a copy under another label.
    """
    group = group_images(rows, copies)
    splits = defaultdict(set)
    for g, row in zip(group, rows):
        splits[g].add(row["split"])
    two_labels = {k for pair in copies for k in pair
                  if rows[pair[0]]["label"] != rows[pair[1]]["label"]}
    repaired = []
    for i, (g, row) in enumerate(zip(group, rows)):
        split, several = row["split"], len(splits[g]) > 1
        if several and splits[g] <= set(SPLITS):
            split = "train"
        if i in two_labels or (several and split in SPLITS and not splits[g] <= set(SPLITS)):
            split = "left-out"
        repaired.append({**row, "split": split})
    return repaired


def check_leakage(rows: Sequence[Row], hashes: Mapping[str, str], hint: str = "") -> None:
    """Raise InputError if a patient or an identical file lies in two splits, or an identical file
    under two labels; `hint` is the way out where it is a patient."""
    patients, contents = (row["patient"] for row in rows), (hashes[row["file"]] for row in rows)
    _refuse_differing(rows, patients, "patient {patient!r}", ("split",), hint)
    _refuse_differing(rows, contents, "an identical file")


def check_pictures(rows: Sequence[Row], contents: Iterable[bytes | None]) -> None:
    """Raise InputError if one picture, however encoded, lies in two splits or under two labels.

    Compares what is trained on, bit for bit, by `pixel_map.contents`: fast enough for the start of
    every training. Altered copies are found by the audit only. Pictures of one grey are not
    compared.
    """
    _refuse_differing(rows, contents, "an identical picture",
                      hint="; evaluate.py audit looks for more")


def _refuse_differing(rows: Sequence[Row], keys: Iterable[Hashable], what: str,
                      columns: Sequence[str] = ("split", "label"), hint: str = "") -> None:
    """Raise InputError if a row differs in a column from the first row of its key; without a key,
    None, it is like no other."""
    first: dict[Hashable, Row] = {}
    for row, key in zip(rows, keys):
        one = row if key is None else first.setdefault(key, row)
        for column in columns:
            if one[column] != row[column]:
                fault = {"split": "crosses splits", "label": "has two labels"}[column]
                raise InputError(f"{what.format(**row)} {fault}: {one['file']} is "
                                 f"{one[column] or 'without'}, {row['file']} is "
                                 f"{row[column] or 'without'}{hint}")


def trained_on(samples: str | Path) -> set[str] | None:
    """SHA-256 of the images that the generator of a samples folder was trained on; None where its
    manifest does not say."""
    manifest = find_json(Path(samples) / "manifest.json", {})
    return set(manifest.get("trained_on", [])) or None


def check_synthetic(rows: Sequence[Row], hashes: Mapping[str, str], real: Iterable[str],
                    folder: str) -> None:
    """Raise InputError if a folder of samples holds a file of the real data, given by SHA-256."""
    known = set(real)
    same = [row["file"] for row in rows if hashes[row["file"]] in known]
    if same:
        raise InputError(f"{folder} holds {count(len(same), 'file')} of the real data, e.g. "
                         f"{same[0]}: not synthetic")


def of_other_data(seen: Iterable[str] | None, rows: Sequence[Row],
                  hashes: Mapping[str, str]) -> bool:
    """Was something trained on other images than these rows? The rule is `runs.of_other_images`."""
    return of_other_images(seen, (hashes[row["file"]] for row in rows))


def check_unseen(rows: Sequence[Row], hashes: Mapping[str, str], seen: set[str] | None,
                 who: str, patients: Mapping[str, str] | None = None) -> list[str]:
    """Raise InputError if `who` (the generator, the judge) was trained on any of these held-out
    images, or on another image of their patients; a note where what it was trained on is unknown.

    patients: file → patient of all files whose hashes are given, as far as it is known.
    """
    if not seen:
        return [f"what {who} was trained on is unknown"]
    leaked = [row["file"] for row in rows if hashes[row["file"]] in seen]
    if leaked:
        raise InputError(f"{who} was trained on {len(leaked)} of {len(rows)} held-out images, e.g. "
                         f"{leaked[0]}: give the same --data and split to every stage")
    known = {patient for file, patient in (patients or {}).items() if hashes.get(file) in seen}
    if shared := [row["patient"] for row in rows if row["patient"] in known]:
        raise InputError(f"{who} was trained on other images of {len(set(shared))} held-out "
                         f"patients, e.g. {shared[0]}: give the same --data and split to every "
                         "stage, or --distinct-patients if another hospital numbers its own")
    return []
