"""The columns of a table, read as what their cells say whoever wrote them, and remarks on it.

    unknown    nan, N/A, None … become ""; a label and a list of findings may say none
    ages       become years; one that nobody has becomes ""
    lists      Edema; Effusion becomes Edema|Effusion
    spellings  of one value become its first: F for female, AP for antero-posterior, 1 for 1.0

What a cell means is decided in `cells`. What might be guessed wrong stays as it is, with a remark.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from minidiff import cells
from minidiff.data.split import Row
from minidiff.errors import InputError, count, first_few
from minidiff.variables import FEW_VALUES, MOST_FINDINGS, MOST_VALUES, RESERVED


class Remark(NamedTuple):
    """A note on cells, which is also a finding of the audit."""

    kind: str
    level: str  # as in `audit`
    text: str


def read_columns(rows: Sequence[Row]) -> tuple[list[Row], list[Remark]]:
    """The rows with their cells read as above, and what was changed or is doubtful."""
    changed, remarks, told = {}, [], set()
    for name in dict.fromkeys(name for row in rows for name in row):
        if name in (*RESERVED, "source"):
            continue
        column = tuple(row.get(name, "") for row in rows)
        new = _Column(name, column, [row["where"] for row in rows])
        if len(new.now) < len(column) or any(old != said for old, said in new.now.items()):
            changed[name] = new.now  # equal cells become one object: a fifth of a row's memory
        once = (cells.meaning(name), column)  # Patient Age, and age as --columns names it
        remarks += [] if once in told else new.remarks
        told.add(once)
    return [{**row, **{name: now[row[name]] for name, now in changed.items() if name in row}}
            for row in rows], remarks


def alike_patients(patients: Iterable[str]) -> list[Remark]:
    """Ids that differ in capitals or leading zeros only, as after a spreadsheet."""
    return _alike("patient", set(patients), lambda name: name.casefold().lstrip("0"),
                  "in capitals or leading zeros")


class _Column:
    """One column: `now` says what each of its cells is read as."""

    def __init__(self, name: str, column: Sequence[str], where: Sequence[str]):
        self.name, self.remarks = name, list[Remark]()
        self.counts = Counter(column)
        self.first = dict(zip(reversed(column), reversed(where)))
        self.now = {cell: cell for cell in self.counts}
        if name != "label":
            self._unknown()
            self._ages()
            self._lists()
        self._spellings()
        if name == "label":
            if words := [label for label in self._known() if cells.is_unknown(label)]:
                self._remark("unknown labels", "warning", f"{self._listed(words)} is taken as a "
                             "class of its own")
            words = [label for label in self._known() if math.isnan(cells.to_number(label))]
            self.remarks += _alike(name, words, _bare, "in spaces, punctuation or order")

    def _known(self) -> list[str]:
        """The different cells as they are read now, without the unknown, in order."""
        return [cell for cell in dict.fromkeys(self.now.values()) if cell]

    def _read(self, new: Mapping[str, str]) -> None:
        self.now = {old: new.get(cell, cell) for old, cell in self.now.items()}

    def _remark(self, kind: str, level: str, text: str) -> None:
        self.remarks.append(Remark(kind, level, f"{self.name} {text}"))

    def _listed(self, found: Iterable[str]) -> str:
        return first_few((f"{cell!r} ({self.counts[cell]})" for cell in found), 5)

    def _unknown(self) -> None:
        none_is_said = "finding" in self.name.casefold() or any(
            mark in cell for cell in self.counts for mark in (cells.AND, ";", "["))
        empty = [cell for cell in self.counts if cell and cells.is_unknown(cell, self.name)
                 and not (none_is_said and cell.casefold() in cells.NO_FINDING)]
        self._read(dict.fromkeys(empty, ""))
        if empty:
            self._remark("unknown cells", "info", f"{self._listed(empty)} counts as unknown")

    def _ages(self) -> None:
        if cells.meaning(self.name) != "age":
            return
        years = {cell: cells.to_years(cell) for cell in self._known()}
        said = {cell: f"{age:.6g}" for cell, age in years.items()
                if 0 <= age <= cells.OLDEST and not cells.PLAIN.fullmatch(cell)}
        nobody = [cell for cell, age in years.items() if age < 0 or age > cells.OLDEST]
        strange = cells.strange(self.name, years)
        self._read(said | dict.fromkeys(nobody, ""))
        if said:
            cell, age = next(iter(said.items()))
            self._remark("ages with units", "info", f"{cell!r} is read as {age} years; "
                         f"{count(sum(self.counts[cell] for cell in said), 'such cell')}")
        if nobody:
            self._remark("impossible ages", "warning", f"{self._listed(nobody)} is no age in years "
                         f"from 0 to {cells.OLDEST} and counts as unknown: {self._where(nobody)}")
        if strange:
            self._remark("unreadable ages", "warning", f"{self._listed(strange)} is not an age in "
                         f"years; as a condition it is refused: {self._where(strange)}")

    def _where(self, found: Iterable[str]) -> str:
        return first_few(self.first[cell] for cell in found)

    def _lists(self) -> None:
        try:
            said = cells.listed(self.name, self._known())
        except InputError as error:
            if any(cells.AND in cell for cell in self.now.values()):
                self._remark("doubtful lists", "warning", str(error).removeprefix(self.name + " "))
            return
        parts = {part for text in said.values() for part in text.split(cells.AND)}
        if said and len(parts) <= MOST_FINDINGS:
            self._read(said)
            cell, text = next(iter(said.items()))
            self._remark("lists", "info", f"{cell!r} is read as {text!r}; "
                         f"{count(len(said), 'such list')}")

    def _spellings(self) -> None:
        known = self._known()
        if len(known) > MOST_VALUES or len(
                {x for cell in known if not math.isnan(x := cells.to_number(cell))}) > FEW_VALUES:
            return
        new = cells.spelled(self.name, known)
        self._read(new)
        said = [f"{old!r} is read as {now!r}" + " (another Unicode form)" * (
            unicodedata.normalize("NFC", old) == unicodedata.normalize("NFC", now))
            for old, now in sorted(new.items()) if old != now]
        if said:
            self._remark("spellings", "info", first_few(said, 10))
        strange = cells.strange(self.name, self._known())
        if strange and cells.meaning(self.name) != "age":  # which said so
            self._remark("unknown spellings", "warning", f"{self._listed(strange)} has no known "
                         f"meaning beside {first_few(sorted(set(new.values()) - set(strange)))}; "
                         f"as a condition it is refused: {self._where(strange)}")


def _bare(label: str) -> str:
    """Its findings in order, without spaces and punctuation."""
    parts = re.split(r"[|;,]", label.casefold())
    return "|".join(sorted(re.sub(r"[\W_]", "", part) for part in parts))


def _alike(name: str, values: Iterable[str], key, how: str) -> list[Remark]:
    groups = defaultdict(list)
    for value in sorted(values):
        groups[key(value)].append(value)
    pairs = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return [Remark(f"{name}s alike", "warning", f"{name} {first_few(pairs)} differ {how} only, and "
                   "count as different")] if pairs else []
