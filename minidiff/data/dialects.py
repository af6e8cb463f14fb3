"""A table file as rows of text cells: delimiters, encodings, and the names of columns.

    .csv .tsv    comma, semicolon, tab or |; UTF-8, or UTF-16 as spreadsheets save it
    .jsonl       one JSON object a line (Hugging Face)

Columns are known by minidiff's names, in any capitals. `--columns` says how a table names them
otherwise, and a few public tables are known by their header.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minidiff.cells import unlisted
from minidiff.data.images import EXTENSIONS
from minidiff.data.split import Row
from minidiff.errors import InputError
from minidiff.variables import AND, NONE

ENDINGS = (".csv", ".tsv", ".jsonl")
ADDED = ("file", "where")  # columns made by reading, never written
COLUMNS = ("file_name", "label", "split", "patient", "source", "sex", "age", "view")
SPELT = {name.replace("_", ""): name for name in COLUMNS} | {"patientid": "patient"}
PRESETS = {  # public tables, known by the first two columns: how they name ours
    "NIH ChestX-ray14": "file_name=Image Index,label=Finding Labels,patient=Patient ID,"
                        "age=Patient Age,sex=Patient Gender,sex=Patient Sex,view=View Position",
    "PadChest": "file_name=ImageID,label=Labels,patient=PatientID,sex=PatientSex_DICOM,"
                "view=Projection",
    "ieee8023": "file_name=filename,label=finding,patient=patientid",
    "CheXpert": "file_name=Path,view=AP/PA",  # of its findings, --columns chooses
}
FINDING = {1.0: True, 0.0: False, -1.0: None}  # present, absent, uncertain


def read_csv(path: str | Path, needed: Sequence[str], columns: Sequence[str] = ()) -> list[Row]:
    """Rows of text cells; "where" is the place of each, to be named in an error.

    columns: `name=column` items, of which those of other tables may be absent here, if this one
    has the name itself. Raises InputError for a faulty table.
    """
    return to_rows(path, *read_lines(path), needed, columns)


def to_rows(path: str | Path, header: Sequence[str], lines: Sequence[tuple[int, list[str]]],
            needed: Sequence[str], columns: Sequence[str]) -> list[Row]:
    """What `read_csv` makes of a table's header and lines."""
    lines = [(number, cells) for number, cells in lines if any(cells)]
    absent = [name for name in header if header.count(name) > 1 or name in ADDED]
    if absent:
        raise InputError(f"{path}: column {absent[0]!r} is there twice or reserved; rename it")
    asked = _asked(path, header, columns)
    spelt = _spelt(path, header, asked)
    has = [*asked, *(spelt.get(name, name) for name in header)]
    if missing := [name for name in needed if name not in has]:
        raise InputError(f"{path}: no column {missing[0]!r}; it has {', '.join(header) or 'none'}"
                         + _advice(missing, header, lines))
    if not lines:
        raise InputError(f"{path}: a header but no rows")
    rows = [{**dict(zip(header, cells)), "where": f"{path}:{number}"} for number, cells in lines]
    filled = {name: column_cells(name, source, header, rows) for name, source in asked.items()}
    return [{**{spelt.get(name, name): cell for name, cell in row.items()},
             **{name: cells[i] for name, cells in filled.items()}} for i, row in enumerate(rows)]


def naming_images(header: Sequence[str], lines: Sequence[tuple[int, list[str]]]) -> str:
    """The column whose first cells end as image files do; "" for none."""
    return next((name for k, name in enumerate(header) if any(
        cells[k].lower().endswith(EXTENSIONS) for _, cells in lines[:20])), "")


def known_of_images(path: Path) -> set[str]:
    """The columns of a table that names images, our names for them among these; none of others."""
    with suppress(InputError):
        header, lines = read_lines(path)
        if naming_images(header, lines) not in ("", "patient"):  # a split made here names those
            return {*header, *_spelt(path, header, {}).values(), *_preset(header)[1]}
    return set()


def fits(path: Path, columns: Sequence[str]) -> bool:
    """Has this table file names and labels of images, under our names or those asked for?"""
    with suppress(InputError):
        return bool(read_csv(path, ("file_name", "label"), columns))
    return False


def known_as(header: Sequence[str]) -> str:
    """The public data set whose header a table has; "" for none."""
    return _preset(header)[0]


def read_lines(path: str | Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and of each row its line and as many cells, without surrounding blanks."""
    try:
        text = _text(Path(path).read_bytes())
        lines = _json(text) if Path(path).suffix.lower() == ".jsonl" else _csv(text)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (csv.Error, ValueError) as error:  # of decoding and of JSON, too
        raise InputError(f"{path}: not a CSV table in UTF-8 or UTF-16, nor JSON lines by the name "
                         f".jsonl ({error}); save it as CSV UTF-8") from None
    header = lines[0][1] if lines else []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} cells where the header has "
                             f"{len(header)}")
    # spreadsheets export empty columns behind the last
    kept = [k for k, name in enumerate(header) if name or any(cells[k] for _, cells in lines[1:])]
    return [header[k] for k in kept], [(n, [cells[k] for k in kept]) for n, cells in lines[1:]]


def _text(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    if 0 in data[:2]:  # every other byte of Latin letters
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
    return data.decode("utf-8-sig")


def _csv(text: str) -> list[tuple[int, list[str]]]:
    """(line, cells) of each line that is not empty; the delimiter is the one that makes most of the
    header, or that of an Excel file's line `sep=;`."""
    named = re.match(r"sep=([,;\t|])\r?\n", text)

    def columns(delimiter: str) -> int:
        with suppress(csv.Error, StopIteration):
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter,
                                       strict=True)))
        return 0

    file = io.StringIO(text, newline="")
    skipped = bool(named and file.readline())
    reader = csv.reader(file, delimiter=named[1] if named else max(",;\t|", key=columns),
                        strict=True)
    return [(reader.line_num + skipped, [cell.strip() for cell in cells]) for cells in reader
            if cells]


def _json(text: str) -> list[tuple[int, list[str]]]:
    rows = [(number, json.loads(line)) for number, line in enumerate(text.splitlines(), 1)
            if line.strip()]
    if odd := [number for number, row in rows if not isinstance(row, dict)]:
        raise ValueError(f"line {odd[0]} is no JSON object")
    header = list(dict.fromkeys(name for _, row in rows for name in row))
    return [(0, header), *((n, [_cell(row.get(name)) for name in header]) for n, row in rows)]


def _cell(value: Any) -> str:
    """A JSON value as the text of a CSV's cell; a list names findings."""
    if isinstance(value, list):
        return AND.join(map(_cell, value))
    return "" if value is None else str(value).strip()


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _spelt(path: str | Path, header: Sequence[str], taken: Mapping[str, str]) -> dict[str, str]:
    """Column → our name, for columns that differ from it in capitals, spaces and signs only."""
    spelt = {name: SPELT[_plain(name)] for name in header if _plain(name) in SPELT}
    spelt = {name: ours for name, ours in spelt.items() if ours not in (*header, *taken)}
    for name, ours in spelt.items():
        if twins := [other for other in spelt if spelt[other] == ours and other != name]:
            raise InputError(f"{path}: columns {name!r} and {twins[0]!r} may both be {ours}; "
                             f"choose: --columns \"{ours}={name}\"")
    return spelt


def parse(columns: Sequence[str]) -> dict[str, list[str]]:
    """name=column items as name → columns, the first of which is used that a table has."""
    wanted: dict[str, list[str]] = {}
    for item in columns:
        name, _, column = (part.strip() for part in item.partition("="))
        if not name or not column or name in ADDED:
            raise InputError(f"--columns {item!r}: write name=column, e.g. "
                             "label=finding,patient=patientid")
        wanted.setdefault(name, []).append(column)
    return wanted


def _preset(header: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The public data set that has this header, and its name → column; nothing for others."""
    for known, text in PRESETS.items():
        items = [item.split("=") for item in text.split(",")]
        if all(column in header for _, column in items[:2]):
            return known, {name: column for name, column in items if column in header}
    return "", {}


def _asked(path: str | Path, header: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """Our name → the column of this table that holds it, as --columns or a preset says."""
    asked = {}
    for name, options in parse(columns).items():
        there = [option for option in options if parts_of(option, header)]
        if len(there) > 1:
            raise InputError(f"{path}: --columns names {' and '.join(there)} for {name}, and this "
                             "table has both; name one")
        if there:
            asked[name] = there[0]
        elif name not in header:
            raise InputError(f"{path}: no column {options[0]!r} for {name}; it has "
                             f"{', '.join(header) or 'none'}")
    preset = {name: column for name, column in _preset(header)[1].items() if name not in header}
    return preset | asked


def parts_of(column: str, header: Sequence[str]) -> list[str]:
    """The columns that a name stands for: one, whatever its capitals, or several, joined by |."""
    found = [[column] if column in header else
             [name for name in header if _plain(name) == _plain(column)]]
    if not found[0] and AND in column:
        found = [parts_of(part.strip(), header) for part in column.split(AND)]
    return [names[0] for names in found] if all(len(names) == 1 for names in found) else []


def column_cells(name: str, column: str, header: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The cells of a column; columns of 1, 0, −1 and blanks as the names of findings."""
    parts = parts_of(column, header)
    if len(parts) == 1:
        cells = [row[parts[0]] for row in rows]
        flags = {cell: _flag(cell) for cell in cells}
        if name != "label" or not all(cell == "" or flag in FINDING
                                      for cell, flag in flags.items()):
            items = {cell: unlisted(cell) for cell in flags} if name == "label" else {}
            return [cell if items.get(cell) is None else items[cell] for cell in cells]
    for row in rows:
        if odd := [part for part in parts if row[part] and _flag(row[part]) not in FINDING]:
            raise InputError(f"{row['where']}: {odd[0]} {row[odd[0]]!r} is none of 1 (present), 0 "
                             "(absent), −1 (uncertain) and empty")
    return [_findings({part: FINDING[_flag(row[part])] for part in parts if row[part]}, parts)
            for row in rows]


def _flag(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _findings(states: Mapping[str, bool | None], parts: Sequence[str]) -> str:
    """Edema|Effusion of the findings that are present; "" if one is uncertain, or none mentioned.

    Where none is present, it is "none", or "no Edema" if only one was asked for.
    """
    if not states or None in states.values():
        return ""
    return AND.join(part for part in parts if states.get(part)) or (
        NONE if len(parts) > 1 else f"no {parts[0]}")


def _advice(missing: Sequence[str], header: Sequence[str],
            lines: Sequence[tuple[int, list[str]]]) -> str:
    """How to name columns that a table has under other names."""
    if len(header) < 2:
        return ""
    named = {"file_name": naming_images(header, lines)}
    words = ",".join(f"{name}={named.get(name) or 'COLUMN'}" for name in missing)
    return f"; say which it is: --columns \"{words}\"" + (
        ", for CheXpert a finding or several, label=Edema|Pneumonia"
        if _preset(header)[0] == "CheXpert" else "")
