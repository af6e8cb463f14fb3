"""Read the readers' exports, check them against the key and lay them out as tables.

The checksum in a file finds what was cut or edited after export. It is no seal: a forger can
compute it again. Each answer must also stand where the key's order for this reader has it, and only
once.
"""

import csv
import hashlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff import runs
from minidiff.errors import InputError

COLUMNS = ("study", "reader", "block", "position", "item", "answer", "confidence", "reasons", "ms",
           "time", "undone")
NUMBERS = ("reader", "position", "confidence", "ms", "undone")
WORDS = {"quality": ("bad", "good"), "origin": ("real", "generated")}  # answer → 0 or 1
REASONS = ("anatomy", "artefact", "disease", "other", "text_marker")


@dataclass(frozen=True)
class Key:
    """What each image is, and in which order each reader sees them."""

    study: str
    sha256: str
    design: dict
    items: list[dict]
    orders: list[dict]

    def where(self, kind: str) -> list[int]:
        """Places of the items of a kind, without repeats."""
        return [k for k, item in enumerate(self.items)
                if item["kind"] == kind and "repeat_of" not in item]

    @property
    def repeats(self) -> list[tuple[int, int]]:
        """Places of the two showings of each image that is shown twice."""
        place = {item["id"]: k for k, item in enumerate(self.items)}
        return [(place[item["repeat_of"]], k) for k, item in enumerate(self.items)
                if "repeat_of" in item]


@dataclass(frozen=True)
class Reading:
    """One reader's answers in the order of the key's items: 0 or 1, −1 for none."""

    reader: int
    file: str
    answer: dict[str, np.ndarray]      # block → (items,)
    confidence: dict[str, np.ndarray]  # block → (items,), 1 … 4
    position: np.ndarray               # (items,) in the first part, from 1
    seconds: np.ndarray                # of every answer given
    reasons: list[tuple[str, ...]]     # of each item, in the first part
    missing: int                       # images not rated

    def first(self, key: Key, places: list[int]) -> np.ndarray:
        """Good (1) or Bad (0) when an image was shown first, as either of its two items."""
        twin = dict(key.repeats)
        seen = [min((k, twin.get(k, k)), key=lambda p: self.position[p] or 1 << 30) for k in places]
        return self.answer["quality"][seen]


def read_key(path: str | Path) -> Key:
    found = runs.read_json(path)
    digest = runs.sha256(path)
    if not (isinstance(found, dict) and {"secret", "design", "items", "orders"} <= set(found)):
        raise InputError(f"{path}: not the key of a reading study")
    return Key(digest[:16], digest, found["design"], found["items"], found["orders"])


def read_readings(files: tuple[str, ...], key: Key) -> tuple[list[Reading], list[str]]:
    """The readings of usable files, and a remark for each file that is not, or only partly, usable.

    Of two files of one reader, equal answers count once, and a file that continues the other
    replaces it; where answers differ, neither counts.
    """
    by_reader, remarks = defaultdict(list), []
    for file in files:
        try:
            rows = read_rows(file)
            check_rows(file, rows, key)
            by_reader[rows[0]["reader"]].append((file, rows))
        except InputError as error:
            remarks.append(f"left out: {error}")
    readings = []
    for reader, found in sorted(by_reader.items()):
        *shorter, (file, rows) = sorted(found, key=lambda pair: len(pair[1]))
        if any(rows[: len(part)] != part for _, part in shorter):
            remarks.append(f"left out: reader {reader} is doubled, with different answers in "
                           + " and ".join(other for other, _ in found))
            continue
        remarks += [f"left out: {part}: doubled; {file} has its answers of reader {reader}"
                    for part, _ in shorter]
        reading = lay_out(file, rows, key)
        if reading.missing:
            remarks.append(f"not pooled: {file}: reader {reader} is unfinished, {len(rows)} of "
                           f"{len(rows) + reading.missing} images rated")
        readings.append(reading)
    return readings, remarks


def read_rows(file: str | Path) -> list[dict]:
    """The rows of an export, JSONL or CSV, if its checksum fits; values as in JSON."""
    try:
        # a spreadsheet or a mail programme may have changed the first mark and the ends of lines
        body, last = Path(file).read_text("utf-8-sig").rstrip("\n").rsplit("\n", 1)
        body += "\n"
        if last.startswith("sha256,"):
            digest, n = last.split(",")[1], int(last.split(",")[2])
            rows = [{**row, **{name: int(row[name]) for name in NUMBERS},
                     "reasons": row["reasons"].split()}
                    for row in csv.DictReader(io.StringIO(body), strict=True)]
        else:
            end, rows = json.loads(last), [json.loads(line) for line in body.splitlines()]
            digest, n = end["sha256"], end["rows"]
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error):
        raise InputError(f"{file}: not a whole export of the reading page: not UTF-8, its last "
                         "line is no checksum, or a row is damaged") from None
    if hashlib.sha256(body.encode()).hexdigest() != digest or n != len(rows):
        raise InputError(f"{file}: edited or damaged after export: the checksum does not fit")
    if not rows:
        raise InputError(f"{file}: no answers in it")
    return rows


def check_rows(file: str | Path, rows: list[dict], key: Key) -> None:
    """Raise InputError where rows cannot have come from the key's page."""
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != set(COLUMNS):
            raise InputError(f"{file}: row {at + 1} has other columns than {', '.join(COLUMNS)}")
        if row["study"] != key.study:
            raise InputError(f"{file}: foreign: of study {row['study']!r}, but the key is of "
                             f"{key.study!r}; one of the two was changed, or belongs elsewhere")
    reader = rows[0]["reader"]
    if reader not in range(1, len(key.orders) + 1):
        raise InputError(f"{file}: reader {reader}; the key has 1 to {len(key.orders)}")
    wanted = [(reader, block, key.items[k]["id"])
              for block, order in key.orders[reader - 1].items() for k in order]
    for at, row in enumerate(rows):
        shown = (row["reader"], row["block"], row["item"])
        if wanted[at : at + 1] != [shown] or row["position"] != at + 1:
            raise InputError(f"{file}: row {at + 1} is not the image that this reader saw there: "
                             "rows were moved, doubled, left out or taken from another reader")
        if not (row["answer"] in WORDS[row["block"]] and row["confidence"] in (1, 2, 3, 4)
                and isinstance(row["reasons"], list) and set(row["reasons"]) <= set(REASONS)
                and isinstance(row["ms"], int) and row["ms"] >= 0):
            raise InputError(f"{file}: row {at + 1}: answer {row['answer']!r}, confidence "
                             f"{row['confidence']!r}, reasons {row['reasons']!r}, ms {row['ms']!r} "
                             "are not what the page writes")


def lay_out(file: str, rows: list[dict], key: Key) -> Reading:
    place = {item["id"]: k for k, item in enumerate(key.items)}
    n, blocks = len(key.items), key.orders[rows[0]["reader"] - 1]
    answer = {block: np.full(n, -1) for block in blocks}
    confidence = {block: np.zeros(n, np.int64) for block in blocks}
    position, reasons = np.zeros(n, np.int64), [()] * n
    for row in rows:
        k = place[row["item"]]
        answer[row["block"]][k] = WORDS[row["block"]].index(row["answer"])
        confidence[row["block"]][k] = row["confidence"]
        if row["block"] == "quality":
            position[k], reasons[k] = row["position"], tuple(row["reasons"])
    return Reading(rows[0]["reader"], str(file), answer, confidence, position,
                   np.array([row["ms"] for row in rows]) / 1000, reasons,
                   missing=sum(map(len, blocks.values())) - len(rows))
