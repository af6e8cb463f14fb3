"""A table of labels beside DICOM files: the label of a file, by an id that both have.

A table has a row for each patient, study or image, or several that agree: one for each box or
reader. Its columns are known by the names below, in any capitals, or by `--columns`. Where several
hold ids, the first of LEVELS counts, which is nearest to the image.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

from minidiff.cells import CUT, is_unknown
from minidiff.data.dialects import column_cells, parts_of, read_lines
from minidiff.data.dicom import Dataset, Refused
from minidiff.data.dicom.pixels import text
from minidiff.errors import InputError, first_few
from minidiff.variables import MOST_VALUES

LEVELS = {  # name: the element that is compared, and what tables call it
    "sop": ("SOPInstanceUID", ("sopinstanceuid", "sopuid", "instanceuid")),
    "image": ("", ("imageid", "dicomid", "filename", "file")),  # the file's name without its ending
    "series": ("SeriesInstanceUID", ("seriesinstanceuid", "seriesuid", "seriesid")),
    "study": ("StudyInstanceUID", ("studyinstanceuid", "studyuid", "studyid")),
    "accession": ("AccessionNumber", ("accessionnumber",)),
    "patient": ("PatientID", ("patientid", "subject", "subjectid")),
}
NEEDED = tuple(element for element, _ in LEVELS.values() if element)
LABEL = ("label", "labels", "class", "classname", "target", "finding", "diagnosis")
ENDING = re.compile(r"\.(dcm|dicom|ima|png|jpe?g)$", re.IGNORECASE)


class Labels(NamedTuple):
    """Labels by id; "" for an id that has a row without one."""

    level: str = ""
    of: Mapping[str, str] = MappingProxyType({})

    def of_name(self, path: str) -> str:
        """The label of a file if ids are file names; else "", for the file has to be read."""
        return self.of.get(stem(path), "") if self.level == "image" else ""


def read(path: str, columns: tuple[str, ...] = ()) -> Labels:
    """The table of a file; `columns` are items patient=patientId, label=Target. Raises InputError
    for a table without these columns, and for an id whose rows disagree."""
    header, lines = read_lines(path)
    rows = [{**dict(zip(header, cells)), "where": f"{path}:{number}"}
            for number, cells in lines if any(cells)]
    if not rows:
        raise InputError(f"{path}: {'a header but no rows' if header else 'no header'}")
    chosen = _chosen(path, header, columns)
    level = next((name for name in LEVELS if name in chosen), "")
    level = level or next((n for n in LEVELS if _named(header, (n, *LEVELS[n][1]))), "")
    if not level:
        raise InputError(f"{path}: no column of ids; it has {', '.join(header)}. Say which it is, "
                         f"e.g. --columns patient={header[0]}; allowed are {', '.join(LEVELS)}")
    key = chosen.get(level) or _only(path, header, level, (level, *LEVELS[level][1]))
    label = chosen.get("label") or _only(path, header, "label", LABEL)
    if label not in header:
        rows = [{**row, label: cell} for row, cell in
                zip(rows, column_cells("label", label, header, rows))]
    return Labels(level, _by_id(path, rows, level, key, label))


def find(ds: Dataset, path: str, table: Labels) -> tuple[str, str]:
    """The id of a file and its label. Raises Refused for a file without a label in the table."""
    element = LEVELS[table.level][0]
    name = _whole(text(ds, element)) if element else stem(path)
    if not table.of.get(name):
        raise Refused("unlisted", f"{element or 'file name'} {name!r}")
    return name, table.of[name]


def stem(path: str) -> str:
    """The name of a file, or of a path in a table, without folders and ending."""
    return ENDING.sub("", PurePosixPath(path.replace("\\", "/")).name)


def check_names(paths: Iterable[str], table: Labels) -> None:
    """InputError if two files have a name that the table lists once, and ids are file names."""
    same = defaultdict(list)
    for path in paths if table.level == "image" else ():
        same[stem(path)].append(path)
    for name, twins in same.items():
        if len(twins) > 1 and name in table.of:
            raise InputError(f"the table of --labels gives {name!r} a label, and {len(twins)} "
                             f"different files have this name: {first_few(twins, 2)}; import their "
                             "folders one by one, or give a table by SOPInstanceUID")


def _chosen(path: str, header: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    chosen = {}
    for item in filter(None, ",".join(columns).split(",")):
        name, _, column = (part.strip() for part in item.partition("="))
        known = parts_of(column, header) if name == "label" else column in header
        if name not in (*LEVELS, "label") or not known:
            raise InputError(f"--columns {item}: write NAME=COLUMN, where NAME is label, "
                             f"{', '.join(LEVELS)}, and COLUMN one of {path}: {', '.join(header)}")
        chosen[name] = known[0] if name == "label" and len(known) == 1 else column
    return chosen


def _named(header: Sequence[str], names: Sequence[str]) -> list[str]:
    return [name for name in header if re.sub(r"[\s_.-]", "", name).lower() in names]


def _only(path: str, header: Sequence[str], name: str, names: Sequence[str]) -> str:
    found = _named(header, names)
    if len(found) != 1:
        fault = f"{' and '.join(found)} may each be" if found else "none is called like"
        raise InputError(f"{path}: of the columns {', '.join(header)}, {fault} the {name}; choose: "
                         f"--columns {name}={found[0] if found else 'COLUMN'}")
    return found[0]


def _by_id(path: str, rows: Sequence[dict[str, str]], level: str, key: str,
           label: str) -> dict[str, str]:
    of, first, spelling = {}, {}, {}
    for row in rows:
        name = stem(row[key]) if level == "image" else _whole(row[key])
        if CUT.fullmatch(name) or is_unknown(name):
            raise InputError(f"{row['where']}: {key} {row[key]!r} is no id: a spreadsheet has "
                             "shortened it, or it is empty; export the table with ids as text")
        given = "" if is_unknown(row[label], "label") else _whole(row[label])
        given = spelling.setdefault(given.casefold(), given)
        if given and of.get(name) and of[name] != given:
            raise InputError(f"{row['where']}: {key} {name!r} has the {label} {given!r}, and "
                             f"{of[name]!r} in {first[name]}; an image has one label. Give a table "
                             "of one label for each id, e.g. finding and no finding, or choose "
                             "another column by --columns label=COLUMN")
        if given or name not in of:
            of[name], first[name] = given, row["where"]
    found = set(of.values()) - {""}
    if "-1" in found and found <= {"-1", "0", "1"}:
        raise InputError(f"{path}: {label} is -1 for {list(of.values()).count('-1')} ids, which "
                         "means uncertain beside 0 and 1: empty these cells to leave them out, or "
                         "decide")
    if not 0 < len(found) <= MOST_VALUES:
        raise InputError(f"{path}: {label} has {len(found)} different values; a label has 1 to "
                         f"{MOST_VALUES}. Choose another column by --columns label=COLUMN")
    return of


def _whole(cell: str) -> str:
    """13.0, as a table has it that was read with empty cells, is 13; 007 stays."""
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", cell)
