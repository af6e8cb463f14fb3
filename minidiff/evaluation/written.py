"""What runs have written down, and where: the values of a card, each with the file and the place it
was read from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from minidiff import runs
from minidiff.data.table import Table
from minidiff.errors import InputError
from minidiff.evaluation.verify import read_as_then

KINDS = ("vae", "diffusion", "samples", "classifier", "report", "matrix", "audit", "readers")


class Item(NamedTuple):
    """One line of a card. Without a value it waits for a person."""

    document: str                # model card, datasheet
    section: str
    name: str
    value: str = ""
    sources: tuple[str, ...] = ()   # "file: key.key", as many as it needed
    asked_by: str = ""


class Items:
    """Collects the items of a document under the section that is set."""

    def __init__(self, document: str) -> None:
        self.document, self.section, self.all = document, "", []

    def __call__(self, name: str, value: str = "", sources: Sequence[str] = (),
                 asked_by: str = "") -> None:
        self.all.append(Item(self.document, self.section, name, value, tuple(sources), asked_by))


class Files:
    """The JSON files of run folders, by kind of run."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = _find(folders)
        self.read: dict[Path, Any] = {}

    def path(self, kind: str, name: str) -> Path | None:
        path = self.folders[kind] / name if kind in self.folders else None
        return path if path and path.is_file() else None

    def get(self, kind: str, name: str, *keys: str) -> tuple[Any, str]:
        """(value, "file: key.key"); (None, "") where there is none."""
        path = self.path(kind, name)
        if path is None:
            return None, ""
        value = self.read.setdefault(path, runs.read_json(path) if path not in self.read else None)
        for key in keys:
            if not isinstance(value, dict) or value.get(key) is None:
                return None, ""
            value = value[key]
        return value, f"{path}: {'.'.join(keys)}".rstrip(": ")

    def each(self, kind: str, name: str, *keys: str) -> list[tuple[Any, str]]:
        """The members of a list, each as `get` gives it; none where there is no list."""
        values, at = self.get(kind, name, *keys)
        return [(value, f"{at}.{k}") for k, value in enumerate(values or ())]


def _find(folders: Sequence[str]) -> dict[str, Path]:
    """Kind → folder, of run folders and of those right inside the folders given; two of a kind are
    refused.
    """
    found = defaultdict(list)
    for folder in dict.fromkeys(map(Path, folders)):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such run folder")
        for path in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
            config = path / "config.json"
            kind = runs.read_json(config).get("kind", "") if config.is_file() else ""
            if kind in KINDS and path not in found[kind]:
                found[kind].append(path)
    for kind, paths in found.items():
        if len(paths) > 1:
            some = ", ".join(map(str, paths))
            raise InputError(f"{len(paths)} runs of kind {kind}: {some}; a card is of one model, "
                             "so name its runs by --runs")
    if not found:
        raise InputError(f"{', '.join(folders)}: no run folder, nor one inside; a card is filled "
                         "from their config.json, …")
    return {kind: paths[0] for kind, paths in found.items()}


def read_again(files: Files, kind: str) -> Table | None:
    """The data set of a run, where it still is and can be read, split as the run split it; nothing
    is written.
    """
    folders, _ = files.get(kind, "config.json", "data")
    if not folders or not all(Path(f).is_dir() for f in folders):
        return None
    seed, _ = files.get(kind, "config.json", "seed")
    try:
        return read_as_then(folders, seed or 0, files.folders[kind].parent)
    except InputError as error:
        print(f"the data cannot be read again, so patients are not counted: {error}")
        return None


def numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header."""
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from None
