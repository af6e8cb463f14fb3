"""The audit of a data set as a page with the pictures of what it found.

    python evaluate.py audit --data DIR [DIR …] --out runs/x/audit [--write-split]

audit.json holds every number, audit.html is for the reader. Exit status: 0 no error found, 1 errors
must be repaired first, 2 the folders are not laid out as a data set.
"""

import shutil
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff import runs
from minidiff.data import audit, images
from minidiff.data.baselines import SHORTCUT, SURE
from minidiff.data.files import Box, Facts
from minidiff.data.split import Row, repair_split, split_patients
from minidiff.data.table import Table, read_table, write_split, write_table
from minidiff.errors import InputError
from minidiff.evaluation import format as tables
from minidiff.evaluation.format import jsonable, num, percent, span
from minidiff.evaluation.pages import render
from minidiff.root import Reading, Rooted

SIDE, CROP = 176, (264, 88)  # px of the page's pictures; width and height of those of letters
WITHOUT_PICTURES = ("unreadable", "patient with two labels", "images per patient")


@dataclass(frozen=True)
class AuditConfig(Reading, Rooted):
    data: tuple[str, ...] = ()  # data sets; several are audited as one; none: the root's
    out: str = "ROOT/audit"     # audit.html and audit.json
    shortcuts: tuple[str, ...] = audit.COLUMNS  # columns that might tell the label
    write_split: bool = False   # write a split by patient and copy, or repair the one that leaks
    shown: int = 24             # pictures of each finding, at most
    seed: int = 0               # of the split that is written


def run_audit(cfg: AuditConfig) -> None:
    """What is wrong with a data set, before a model learns from it: a page, JSON, exit status."""
    table = read_table(cfg.data, cfg, split=False, check=False)
    out = runs.open_run(cfg.out, cfg, "audit", free=("write_split", "shown"),
                        data=table.fingerprint)
    result, facts = audit.audit(table, columns=cfg.shortcuts, folder=out / "facts")
    result = jsonable({**result, "folders": list(cfg.data), "provenance": runs.provenance()})
    runs.write_json(out / "audit.json", {**result, "files_of": table.column("file")})
    runs.write_atomic(out / "audit.html", page(result, table.rows, facts, cfg.shown))
    shutil.rmtree(out / "facts", ignore_errors=True)
    for f in result["findings"]:
        print(f"{f['level']:>7}  {f['text']}")
    if cfg.write_split:
        certain = result["compared_at"] == audit.SIDE
        for path in write_splits(cfg, table, [(i, j) for i, j, distance in result["pairs"]
                                              if certain or distance == 0]):
            print(path)
    print(out / "audit.html")
    if result["status"] == "error":
        kinds = dict.fromkeys(f["kind"] for f in result["findings"] if f["level"] == "error")
        print(f"repair before anything is trained: {', '.join(kinds)}", file=sys.stderr)
        raise SystemExit(1)


def write_splits(cfg: AuditConfig, table: Table, copies: Sequence[tuple[int, int]]) -> list[Path]:
    """Write a split in which no patient and no copy of an image lies twice; the files written.

    Where the data bring no split, it is the file beside --out that train.py, classify.py and
    evaluate.py read for them. Where they bring one, it is a metadata.csv for each folder, in --out,
    to be looked at and put in place by hand.
    """
    given = [row["split"] != "" for row in table.rows]
    if not any(given):
        path = Path(cfg.root) / f"split-{table.fingerprint[:12]}.csv"
        if path.exists():
            print(f"{path} is there already and is kept; delete it to split anew", file=sys.stderr)
        else:
            write_split(path, split_patients(table.rows, copies, cfg.seed))
        return [path]
    if not all(given):
        raise InputError(f"{given.count(False)} of {len(given)} images have no split, as some "
                         "folders bring one and some do not; audit the latter alone with "
                         "--write-split")
    rows, parts = repair_split(table.rows, copies), defaultdict(list)
    if rows == table.rows:
        print("the data bring a split in which no patient and no image lies twice: nothing to "
              "write")
        return []
    folders = sorted((Path(f).absolute() for f in cfg.data), key=lambda f: -len(str(f)))
    for row in rows:
        parts[next(f for f in folders if Path(row["file"]).is_relative_to(f))].append(row)
    paths = [Path(cfg.out) / f"metadata-{k}-{folder.name}.csv" for k, folder in enumerate(parts, 1)]
    for path, part in zip(paths, parts.values()):
        columns = dict.fromkeys(["file_name", "label", "split",
                                 *(name for row in part for name in row if row[name])])
        write_table(path, [{name: row[name] for name in columns} for row in part])
    return paths


def page(result: dict, rows: Sequence[Row], facts: Sequence[Facts], shown: int) -> str:
    """audit.html."""
    labels = sorted({label for cells in result["tables"].values() for counts in cells.values()
                     for label in counts})
    found = [(f, len(f["pairs"] or f["images"]), pictures(f, rows, facts, shown))
             for f in result["findings"]]
    return render(
        "audit.html", result=result, shortcut=SHORTCUT, sure=SURE,
        pictures=[item for item in found if item[2]],
        counts={name: tables.Table((name, *labels), [
            (value or "unknown", *(counts.get(label, 0) for label in labels))
            for value, counts in cells.items()]) for name, cells in result["tables"].items()},
        trivial=tables.Table(
            ("label", "predicted from", "AUROC", "95 %", "n", "n of the rest", "shortcut"),
            [tables.Row((b["label"], b["features"], num(b["auroc"]), span(b["low"], b["high"]),
                         b["n"], b["n_rest"], "yes" if b["shortcut"] else ""),
                        "own" if b["shortcut"] else "") for b in result["baselines"]]),
        missing=tables.Table(("column", *labels), [
            (name, *(percent(shares.get(label)) for label in labels))
            for name, shares in result["missing"].items()]),
        heights={source: np.sqrt(shares) / max(np.sqrt(shares).max(), 1e-9)
                 for source, shares in result["histograms"].items()})


def pictures(finding: dict, rows: Sequence[Row], facts: Sequence[Facts],
             shown: int) -> list[tuple[list[tuple[bytes, str]], float | None]]:
    """Pictures of a finding: (PNGs with captions, side by side; distance, if they are a pair)."""
    def picture(i: int) -> tuple[bytes, str]:
        row, image = rows[i], images.read(rows[i]["file"])
        if finding["kind"] == "burned-in text":
            image = surroundings(image, facts[i].text[0])
        else:
            image = images.square(image, SIDE)
        words = (Path(row["file_name"]).name, *(row[name] for name in
                                                ("label", "split", "source", "patient")))
        return images.png_bytes(image), " · ".join(filter(None, words))

    if finding["kind"] in WITHOUT_PICTURES:
        return []
    if finding["pairs"]:
        return [([picture(i), picture(j)], d) for i, j, d in finding["pairs"][:shown]]
    n = len(finding["images"])
    even = np.unique(np.linspace(0, n - 1, min(shown, n)).round().astype(int))
    return [([picture(finding["images"][k])], None) for k in even]


def surroundings(picture: np.ndarray, box: Box) -> np.ndarray:
    """The part of uint8 (C,H,W) round a line of letters, in the shape of CROP."""
    left, top, right, bottom = box
    scale = max((right - left) * 1.6 / CROP[0], (bottom - top) * 3 / CROP[1], 0.5)
    w, h = (min(round(side * scale), most) for side, most in zip(CROP, picture.shape[:0:-1]))
    x = int(np.clip((left + right - w) // 2, 0, picture.shape[2] - w))
    y = int(np.clip((top + bottom - h) // 2, 0, picture.shape[1] - h))
    return picture[:, y : y + h, x : x + w]
