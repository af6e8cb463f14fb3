"""A data set at a glance: what was read, before anything is done with it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from minidiff.data.files import typical_side
from minidiff.data.split import SPLITS
from minidiff.data.table import Table

WIDEST = 8  # labels side by side; of more, the most frequent


def glance(folders: Sequence[str], tables: Mapping[str, Table], *, grey: bool | None = None,
           size: int = 0, root: str | Path = "") -> str:
    """Images of each set by label, patients, colour, and the notes of reading them.

    tables: set → its rows; size: the side to which they are resized, px; root: the folder in which
    a split that was made here is kept.
    """
    rows = [row for table in tables.values() for row in table.rows]
    counts = Counter(row["label"] for row in rows)
    labels = sorted(label for label, _ in counts.most_common(WIDEST))
    others = ["others"] if len(counts) > WIDEST else []
    lines = [["", *labels, *others, "images", "patients"]]
    for name, table in tables.items():
        own = Counter(label if label in labels else "others" for label in table.column("label"))
        cells = [*(own[label] for label in labels + others), len(table),
                 len(set(table.column("patient")))]
        lines.append([name, *(f"{n:,}" for n in cells)])
    wide = [max(map(len, column)) for column in zip(*lines)]
    text = [f"data: {' '.join(folders)}"]
    text += ["  " + "  ".join(cell.rjust(w) for cell, w in zip(line, wide)).rstrip()
             for line in lines]
    assumed = any(table.patients_assumed for name, table in tables.items() if name != "synthetic")
    colour = {None: [], True: ["grey"], False: ["colour"]}[grey]
    text += ["  " + "; ".join(["patients assumed: one image, one patient" if assumed
                               else "patients known", *colour])]
    side = typical_side((row["file"] for row in rows), size) if size else 0
    text += [f"  most images have {side} px or fewer and are enlarged to {size}, which blurs "
             f"them"] if side < size else []
    notes = dict.fromkeys(note for table in tables.values() for note in table.notes)
    notes = [note.replace("kept in split-", f"kept in {Path(root) / 'split-'}") for note in notes]
    return "\n".join(text + [f"  {note}" for note in notes
                             if "one image = one patient" not in note])


def by_split(table: Table) -> dict[str, Table]:
    """The table's parts that are trained and tested on."""
    return {name: part for name in SPLITS if len(part := table.select(split=name))}
