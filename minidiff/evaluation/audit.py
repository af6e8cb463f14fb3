"""The audit of a data set as a page with the pictures of what it found.

    python evaluate.py audit --data DIR [DIR …] --out runs/x/audit [--write-split]

audit.json holds every number, audit.html is for the reader. Exit status: 0 go on, 1 something must
be mended first, 2 the folders are not laid out as a data set.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from minidiff import runs
from minidiff.data import audit, images
from minidiff.data.baselines import SHORTCUT, SURE
from minidiff.data.duplicates import Pair
from minidiff.data.files import Box, Facts
from minidiff.data.split import Row
from minidiff.data.table import Table, read_table, write_table
from minidiff.errors import InputError
from minidiff.evaluation.pages.format import jsonable, num, percent, plain, span
from minidiff.evaluation.pages.page import answers, fields, img, note, page, table
from minidiff.root import Rooted

SIDE, CROP = 176, (264, 88)  # px of the page's pictures; width and height of those of letters
SAID = {"mend": "must be mended", "look": "look at it", "note": "to be known"}
MARK = {"mend": "no", "look": "open", "note": "yes"}


@dataclass(frozen=True)
class AuditConfig(Rooted):
    data: tuple[str, ...] = ()                          # data sets; several are audited as one; none: the root's
    out: str = "ROOT/audit"                             # audit.html and audit.json
    columns: tuple[str, ...] = audit.COLUMNS            # that might tell the label: tables, and the metadata baseline
    write_split: bool = False                           # write a split by patient and film, or mend the one that leaks
    shown: int = 24                                     # pictures of each finding, at most
    seed: int = 0                                       # of the split that is written


def run_audit(cfg: AuditConfig) -> None:
    """What is wrong with a data set, before a model learns it: one page, one JSON, an exit
    status.
    """
    found = read_table(cfg.data, split=False, check=False)
    out = runs.open_run(cfg.out, cfg, "audit", free=("write_split", "shown"),
                        data=found.fingerprint)
    result, facts = audit.audit(found, columns=cfg.columns, seed=cfg.seed)
    result = jsonable({**result, "folders": list(cfg.data), "provenance": runs.provenance()})
    runs.write_json(out / "audit.json", {**result, "files_of": found.column("file")})
    runs.write_atomic(out / "audit.html", render(result, found.rows, facts, cfg.shown))
    for f in result["findings"]:
        print(f"{SAID[f['level']]:>14}  {f['text']}")
    if cfg.write_split:
        sure = [tuple(p) for p in result["pairs"]
                if p[2] == 0 or result["compared_at"] == audit.SIDE]
        for path in write_split(cfg, found, sure):
            print(path)
    print(out / "audit.html")
    if result["status"] == "mend":
        kinds = dict.fromkeys(f["kind"] for f in result["findings"] if f["level"] == "mend")
        print(f"to be mended before anything is trained: {', '.join(kinds)}", file=sys.stderr)
        raise SystemExit(1)


def write_split(cfg: AuditConfig, found: Table, pairs: Sequence[Pair]) -> list[Path]:
    """Where the data bring no split, the file beside --out that train.py, classify.py and
    evaluate.py read for it, with patients who share a film in one split. Where they bring one, a
    metadata.csv for each folder with its leaks mended, in --out, to be looked at and put in place
    by hand."""
    given = [row["split"] != "" for row in found.rows]
    if not any(given):
        path = Path(cfg.root) / f"split-{found.fingerprint[:12]}.csv"
        if path.exists():
            print(f"{path} is there already and is kept; delete it to split anew", file=sys.stderr)
        else:
            splits = audit.new_split(found, pairs, cfg.seed)
            write_table(path,
                        [{"patient": patient, "split": split} for patient, split in splits.items()])
        return [path]
    if not all(given):
        raise InputError(f"{given.count(False)} of {len(given)} images have no split, as some "
                         "folders bring one and some do not; audit the latter alone with "
                         "--write-split")
    rows, parts = audit.mended(found, pairs), defaultdict(list)
    if rows == found.rows:
        print("the data bring a split, in which no patient and no film lies twice: nothing to "
              "write")
        return []
    folders = sorted((Path(f).absolute() for f in cfg.data), key=lambda f: -len(str(f)))
    for row in rows:
        parts[next(f for f in folders if Path(row["file"]).is_relative_to(f))].append(row)
    paths = [Path(cfg.out) / f"metadata-{k}-{folder.name}.csv" for k, folder in enumerate(parts, 1)]
    for path, part in zip(paths, parts.values()):
        known = dict.fromkeys(("file_name", "label",
                               "split")) | dict.fromkeys(k for row in part for k in row if row[k])
        write_table(path, [{k: row[k] for k in known} for row in part])
    return paths


def render(result: dict, rows: Sequence[Row], facts: Sequence[Facts], shown: int) -> str:
    """audit.html."""
    word = "Something must be mended before anything is trained" if result[
        "status"] == "mend" else "Go on"
    lead = (f"{', '.join(result['folders'])}: {result['images']:,} images of "
            f"{result['patients']:,} patients{' (assumed)' if result['patients_assumed'] else ''}. "
            f"{word}.")
    return page("Data audit", lead, {
        "findings": ("Findings", findings(result)),
        "pictures": ("What was found", pictures(result, rows, facts, shown)),
        "trivial": ("Told without the lungs", trivial(result)),
        "tables": ("Who and where", tables(result)),
        "greys": ("Greys of each source", greys(result)),
        "files": ("Files", files(result)),
        "provenance": ("Provenance", provenance(result)),
    })


def findings(result: dict) -> str:
    rows = [(MARK[f["level"]], SAID[f["level"]], f"<b>{escape(f['kind'])}</b>: {escape(f['text'])}")
            for f in result["findings"]]
    return (answers(rows) if rows else note("Nothing.")) + "".join(map(note, result["notes"]))


def pictures(result: dict, rows: Sequence[Row], facts: Sequence[Facts], shown: int) -> str:
    """The images of every finding that names any, and both of a pair side by side."""
    html = ""
    for f in result["findings"]:
        if f["kind"] == "burned-in text":
            tiles = [_tile(_crop(rows[i]["file"], facts[i].text[0]), _caption(rows[i]))
                     for i in _spread(f["images"], shown)]
        elif f["pairs"]:
            tiles = [_pair(rows[i], rows[j], d) for i, j, d in f["pairs"][:shown]]
        elif f["kind"] in ("unreadable", "patient with two labels", "images per patient"):
            tiles = []
        else:
            tiles = [_tile(_picture(rows[i]["file"]), _caption(rows[i]))
                     for i in _spread(f["images"], shown)]
        if tiles:
            n = len(f["pairs"]) or len(f["images"])
            count = f" – {len(tiles)} of {n}" if n > len(tiles) else ""
            html += f"<h3>{escape(f['kind'])}{count}</h3>" + (
                '<div style="display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start">'
                + "".join(tiles) + "</div>")
    return html or note("No picture to show.")


def trivial(result: dict) -> str:
    rows = [("own" if b["shortcut"] else "",
             (b["label"], b["features"], num(b["auroc"]), span(b["low"], b["high"]),
              f"{b['n']}, {b['n_rest']}", "SHORTCUT" if b["shortcut"] else ""))
            for b in result["baselines"]]
    return note(f"How well a small logistic regression tells a label from the rest that sees the "
                "file's header alone (size, shape, mode, format, bytes), the border alone (the "
                "outer 1/16), a thumbnail of 8 × 8, or the columns of the table. Cross-validation "
                f"in 5 parts, by patient; intervals over resamples of patients. From {SHORTCUT} "
                f"on, or with a whole interval above {SURE}, all but the thumbnail say that a "
                "classifier of these images may be reading hospitals. A low number is no proof of "
                f"the opposite.") + (
                    table(("label", "features", "AUROC", "95 %", "n, rest", ""), rows) if rows
                    else note("Too few patients, or one label only: not measured."))


def tables(result: dict) -> str:
    labels = sorted({label for cells in result["tables"].values() for counts in cells.values()
                     for label in counts})
    html = ""
    for name, cells in result["tables"].items():
        drawn = table((name, *labels),
                      [("", (value or "unknown", *(counts.get(label, 0) for label in labels)))
                       for value, counts in cells.items()])
        html += (f"<details><summary>{escape(name)}: source and the columns above, "
                 f"together</summary>{drawn}</details>" if name == "all at once" else drawn)
    rows = [("", (name, *(percent(shares.get(label)) for label in labels)))
            for name, shares in result["missing"].items()]
    return html + (f"<h3>Empty cells</h3>{table(('column', *labels), rows)}" if rows else "")


def greys(result: dict) -> str:
    """A small chart for each source; height is the share of pixels, by its root, black is left."""
    html = note("Share of the pixels at each grey, black left, white right; heights by the root. "
                "Sources whose outlines differ were processed differently, and a network sees that "
                "at once.")
    for source, shares in result["histograms"].items():
        high = np.sqrt(shares) / max(np.sqrt(shares).max(), 1e-9) * 58
        points = " ".join(f"{4 * k},{60 - y:.1f} {4 * k + 4},{60 - y:.1f}"
                          for k, y in enumerate(high))
        html += (f'<figure style="display:inline-block;margin:.4rem 1.2rem .4rem 0"><svg '
                 f'width="256" height="60" role="img" aria-label="Greys of '
                 f'{escape(source)}"><polygon points="0,60 {points} 256,60" fill="#8fa3ad"/></svg>'
                 f"<figcaption>{escape(source)}</figcaption></figure>")
    return html


def files(result: dict) -> str:
    return table(("", ""),
                 [("", (name, plain(counts))) for name, counts in result["files"].items()])


def provenance(result: dict) -> str:
    return fields({"data": result["fingerprint"], **result["provenance"]})


def _caption(row: Row) -> str:
    name = row["file_name"].split("/")[-1]
    return " · ".join(filter(None,
                             (name, row["label"], row["split"], row["source"], row["patient"])))


def _tile(png: bytes, caption: str) -> str:
    return (f'<figure style="margin:0;width:{SIDE}px">{img(png, caption)}<figcaption '
            f'style="overflow-wrap:anywhere">' f"{escape(caption)}</figcaption></figure>")


def _pair(a: Row, b: Row, distance: float) -> str:
    both = _tile(_picture(a["file"]), _caption(a)) + _tile(_picture(b["file"]), _caption(b))
    said = note("equal in every pixel" if distance == 0 else f"distance {num(distance)}")
    return ('<div style="border-top:2px solid #b9c3c9;padding-top:.5rem">'
            f'<div style="display:flex;gap:.4rem">{both}</div>{said}</div>')


def _picture(file: str) -> bytes:
    return images.png_bytes(images.square(images.read(file), SIDE))


def _crop(file: str, box: Box) -> bytes:
    """The surroundings of a line of letters, in the shape of CROP."""
    picture, (wide, high) = images.read(file), CROP
    left, top, right, bottom = box
    scale = max((right - left) * 1.6 / wide, (bottom - top) * 3 / high, 0.5)
    w, h = (min(round(side * scale), most) for side, most in zip(CROP, picture.shape[:0:-1]))
    x = int(np.clip((left + right - w) // 2, 0, picture.shape[2] - w))
    y = int(np.clip((top + bottom - h) // 2, 0, picture.shape[1] - h))
    return images.png_bytes(picture[:, y : y + h, x : x + w])


def _spread(places: Sequence[int], shown: int) -> Iterable[int]:
    """At most `shown` of the places, from first to last at equal steps."""
    return [places[k] for k in np.unique(np.linspace(0, len(places) - 1,
                                                     min(shown, len(places))).round().astype(int))]
