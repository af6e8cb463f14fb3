"""A smaller data set out of a larger one: fewer training patients of some labels, the same held-out
images.

`classify.py subset` writes it as a folder, so that a generator can be trained on the images that an
arm of the study is trained on.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from minidiff import runs
from minidiff.counted import order
from minidiff.data.layouts import RANDOM_SPLIT
from minidiff.data.split import Row
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError
from minidiff.names import rejoined
from minidiff.root import Reading, Rooted


def first_patients(labels: Sequence[str], patients: Sequence[str], keep: Mapping[str, int],
                   seed: int, at_least_one: bool = False) -> list[int]:
    """Indices of the images that stay, in order: of each label in `keep` at most so many, by whole
    patients.

    The order of patients follows from `seed` and their sorted names, and they are taken until the
    next one would be too many: 25 images are among the 50 of the same seed. A patient counts under
    each of his labels. Where the first patient alone has too many, `at_least_one` keeps him; else
    it raises InputError.
    """
    gone: set[int] = set()
    for label, most in keep.items():
        own = [i for i, name in enumerate(labels) if name == label]
        count = Counter(patients[i] for i in own)
        sorted_names = sorted(count)
        names = [sorted_names[k] for k in order(len(count), seed, range(len(count)))]
        sums = accumulate(count[name] for name in names)
        taken = {name for name, n in zip(names, sums) if n <= most}
        if own and not taken and at_least_one:
            taken = {names[0]}
        elif own and not taken:
            raise InputError(f"{most} images of {label!r} by whole patients: the first patient, "
                             f"{names[0]}, has {count[names[0]]}; ask for more")
        gone |= {i for i in own if patients[i] not in taken}
    return [i for i in range(len(labels)) if i not in gone]


def share_of_patients(labels: Sequence[Sequence[str]], patients: Sequence[str], share: float,
                      seed: int) -> list[int]:
    """Indices of the images of this share of the patients, in order: of each label alike, at least
    one.

    labels: those of each image. A patient counts under the rarest of his own. The order of patients
    follows from `seed` and their sorted names: 5 % are among the 10 % of the same seed.
    """
    images_of, patients_of = Counter(name for own in labels for name in own), defaultdict(set)
    for own, patient in zip(labels, patients):
        for name in own:
            patients_of[name].add(patient)
    home = {}  # the rarest label comes last
    for name in sorted(patients_of, key=lambda name: (-images_of[name], name)):
        home |= dict.fromkeys(patients_of[name], name)
    taken = set()
    for name, everyone in patients_of.items():
        own = sorted(p for p in everyone if home[p] == name) or sorted(everyone)
        taken |= {own[k] for k in order(len(own), seed, range(max(1, round(share * len(own)))))}
    return [i for i, patient in enumerate(patients) if patient in taken]


@dataclass(frozen=True)
class SubsetConfig(Reading, Rooted):
    data: tuple[str, ...] = ()  # data sets to take from, with their splits; none: the root's
    keep: tuple[str, ...] = ("covid=25",)  # label=images: at most so many for training
    out: str = "ROOT/subset"    # folder of the smaller data set
    seed: int = 0               # of the choice of patients; that of the study, for the same arms


def write_subset(cfg: SubsetConfig) -> None:
    """Write a data set with fewer training patients, e.g. for a generator of the arm real@25."""
    table = read_table(cfg.data, cfg, seed=cfg.seed, split_dir=Path(cfg.root))
    keep = _read_keep(cfg.keep, table.labels)
    train = table.select(split="train")
    rest = [row for row in table.rows if row["split"] != "train"]
    kept = first_patients(train.column("label"), train.column("patient"), keep, cfg.seed)
    out = Path(cfg.out)
    nested = [folder for folder in cfg.data if runs.nested(folder, out)]
    if nested:
        raise InputError(f"--out {out} and {nested[0]}, from which it is taken, lie within each "
                         "other; give another --out")
    runs.open_run(out, cfg, "subset", data=table.fingerprint)
    rows = write_rows(out, [*(train.rows[i] for i in kept), *rest], cfg.data)
    if table.random_split:
        runs.write_atomic(out / RANDOM_SPLIT, "drawn at random by patient\n")
    counts = Counter((row["split"], row["label"]) for row in rows)
    print(f"{out}: " + ", ".join(f"{split} {label} {n}"
                                 for (split, label), n in sorted(counts.items())))


def write_rows(out: Path, rows: Sequence[Row], folders: Sequence[str] = ()) -> list[Row]:
    """A data set of these rows of `folders`, none: of all that they are of, with their masks; the
    rows as they are written there."""
    tops = [Path(row["file"]).parents[len(Path(row["file_name"]).parts) - 1] for row in rows]
    prefixes, written = _prefixes(folders or list(dict.fromkeys(map(str, tops)))), []
    for row, folder in zip(rows, tops):
        top, *below = Path(row["file_name"]).parts
        # masks/lungs/… belong to images/…
        masks = [kind.joinpath(*below) for kind in folder.glob("masks/*") if top == "images"]
        for file in (Path(row["file"]), *filter(Path.is_file, masks)):
            _link(file, out / prefixes[folder] / file.relative_to(folder))
        written.append({**row, "file_name": prefixes[folder] + row["file_name"]})
    write_table(out / "metadata.csv", written)
    return written


def _prefixes(folders: Sequence[str]) -> dict[Path, str]:
    """Data folder → its folder in the smaller data set, with a number where names are the same;
    none where it is the only one."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(paths) == 1:
        return {paths[0]: ""}
    names = Counter(path.name for path in paths)
    return {path: f"{path.name}-{k}/" if names[path.name] > 1 else f"{path.name}/"
            for k, path in enumerate(paths, 1)}


def _read_keep(items: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    keep = {}
    for item in rejoined(items, lambda item: item.rpartition("=")[0] in labels):
        label, _, n = item.rpartition("=")
        if label not in labels or not n.isdecimal() or int(n) < 1 or label in keep:
            raise InputError(f"--keep {item}: write label=images, a label once, 1 or more; labels: "
                             f"{', '.join(labels)}")
        keep[label] = int(n)
    return keep


def _link(source: str | Path, target: Path) -> None:
    """The same file in another folder: a hard link where the file system has one, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        pass  # of an earlier run of the same command
    except OSError:
        runs.write_atomic(target, Path(source).read_bytes(), durable=False)
