"""Small data sets for the tests of tables, layouts and splits."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minidiff.data import images, phantom
from minidiff.data.table import read_table, write_table
from minidiff.errors import InputError


def picture(path: Path, content: int) -> None:
    """An image file whose content is this number: equal numbers make identical files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(path, np.array([[content >> 8, content & 255]], np.uint8))


def data_set(folder: Path, rows: list[dict], contents=None) -> Path:
    """A folder of one image a row, each different unless `contents` says otherwise, and its
    metadata.csv.
    """
    base = 1000 * (sum(folder.name.encode()) % 60)
    for k, row in enumerate(rows):
        picture(folder / row["file_name"], base + k if contents is None else contents[k])
    write_table(folder / "metadata.csv", rows)
    return folder


def drawn(folder: Path, seed: int, n: int) -> list[dict]:
    """n phantoms of 32 px in place of samples: their files, and a row of file_name, label, sex and
    age for each.
    """
    rows = []
    for i in range(n):
        p = phantom.phantom(seed, i, 32)
        name = f"images/{p.row['label']}/{i:06d}.png"
        images.write(folder / name, p.image)
        rows.append({"file_name": name, **{key: p.row[key] for key in ("label", "sex", "age")}})
    return rows


def rows_of(n: int, **columns) -> list[dict]:
    """n rows, labels a and b in turn; a column is a list of n cells or a function of the index."""
    cells = {name: [value(k) if callable(value) else value[k] for k in range(n)]
             for name, value in columns.items()}
    return [
        {"file_name": f"images/{k:03d}.png",
         "label": "ab"[k % 2]} | {name: cells[name][k] for name in cells} for k in range(n)
    ]


def refused(folders, *says: str, **options) -> None:
    with pytest.raises(InputError) as error:
        read_table(folders, **options)
    message = str(error.value)
    assert all(part in message for part in says) and "\n" not in message, message


def in_every_split(table, *splits: str, per_label: int = 1) -> bool:
    """Whether each of these splits has `per_label` or more images of every label."""
    counts = Counter(zip(table.column("label"), table.column("split")))
    return all(counts[label, split] >= per_label for label in table.labels for split in splits)
