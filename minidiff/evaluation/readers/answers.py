"""Read the readers' exports, check them against the key and lay them out as tables.

The checksum in a file finds what was cut or edited after export. It is no seal: a forger can
compute it again. Each answer must also stand where the key's order for this reader has it, and only
once.
"""

import csv
import hashlib
import io
import itertools
import json
from dataclasses import dataclass, field
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

    def where(self, **wanted: str) -> list[int]:
        """Places of the items with these values, without repeats."""
        return [k for k, item in enumerate(self.items) if "repeat_of" not in item
                and all(item.get(name) == value for name, value in wanted.items())]

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
    reasons: list[tuple[str, ...]] = field(default_factory=list)  # of each item, in the first part
    missing: int = 0                   # images not rated

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
    by_reader, remarks = {}, []
    for file in files:
        try:
            rows = read_rows(file)
            check_rows(file, rows, key)
            by_reader.setdefault(int(rows[0]["reader"]), []).append((file, rows))
        except InputError as error:
            remarks.append(f"left out: {error}")
    readings = []
    for reader, found in sorted(by_reader.items()):
        found.sort(key=lambda pair: len(pair[1]))
        longest = found[-1]
        if any(longest[1][: len(rows)] != rows for _, rows in found[:-1]):
            remarks.append(f"left out: reader {reader} is doubled, with different answers in "
                           + " and ".join(file for file, _ in found))
            continue
        remarks += [f"left out: {file}: doubled; {longest[0]} has its answers of reader "
                    f"{reader}" for file, _ in found[:-1]]
        reading = lay_out(longest[0], longest[1], key)
        if reading.missing:
            done = len(longest[1])
            remarks.append(f"not pooled: {longest[0]}: reader {reader} is unfinished, {done} of "
                           f"{done + reading.missing} images rated")
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
    readers = {row["reader"] for row in rows}
    if len(readers) > 1 or not all(isinstance(r, int) and 1 <= r <= len(key.orders)
                                   for r in readers):
        raise InputError(f"{file}: reader {', '.join(map(str, readers))}; the key has 1 to "
                         f"{len(key.orders)}, one a file")
    wanted = [(block, key.items[k]["id"]) for block, order in key.orders[readers.pop() - 1].items()
              for k in order]
    for at, (row, shown) in enumerate(itertools.zip_longest(rows, wanted[: len(rows)])):
        if (row["block"], row["item"], row["position"]) != (*(shown or ()), at + 1):
            raise InputError(f"{file}: row {at + 1} is not the image that this reader saw there: "
                             "rows were moved, doubled, left out or taken from another reader")
        sound = (row["answer"] in WORDS[row["block"]] and row["confidence"] in (1, 2, 3, 4)
                 and isinstance(row["reasons"], list)
                 and all(reason in REASONS for reason in row["reasons"])
                 and isinstance(row["ms"], int) and row["ms"] >= 0)
        if not sound:
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
    missing = sum(map(len, blocks.values())) - len(rows)
    return Reading(rows[0]["reader"], str(file), answer, confidence, position,
                   np.array([row["ms"] for row in rows]) / 1000, reasons, missing)
