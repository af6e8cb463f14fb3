"""A model card and a datasheet, filled from the files of the runs; what only a person can say is
left blank.

    python evaluate.py card --root runs/x              from all runs in it, or from those of --runs

Each item says which file, and where in it, the statement comes from, and which guideline asks for
it: TRIPOD+AI (Collins et al. 2024), MI-CLAIM (Norgeot et al. 2020; its six parts), model cards
(Mitchell et al. 2019), datasheets (Gebru et al. 2021). Blank items are collected in answers.json:
fill them in there, run the command again, and they are on the cards.
"""

import math
from collections import ChainMap, Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minidiff import runs
from minidiff.classification.compare import grouped
from minidiff.data.split import SPLITS
from minidiff.errors import InputError
from minidiff.evaluation import pages
from minidiff.evaluation.card_items import CARDS, RESEARCH, SUMMARY
from minidiff.evaluation.verify import read_as_then
from minidiff.root import Rooted, reading_of
from minidiff.variables import labels_in

KINDS = ("vae", "diffusion", "samples", "classifier", "report", "matrix", "audit", "readers")
BLANK = "▢ **TO BE FILLED IN BY A PERSON**"
ANSWERS = "answers.json"


@dataclass(frozen=True)
class CardConfig(Rooted):
    runs: tuple[str, ...] = ("ROOT/",)      # run folders, or folders that hold some
    out: str = "ROOT/card"                  # model_card and datasheet, card.json, answers.json


def run_card(cfg: CardConfig) -> None:
    """A model card and a datasheet (TRIPOD+AI, MI-CLAIM) from the files of the runs."""
    files, out = Files(cfg.runs), Path(cfg.out)
    items = answered([item for document in CARDS for item in filled(document, files)],
                     out / ANSWERS)
    runs.write_json(out / "card.json", {"items": items, "provenance": runs.provenance()})
    for document, own in grouped(items, "document").items():
        shown = [item for item in own if item["value"] and (item["name"] in SUMMARY or any(
            ".json: verdict." in source for source in item["sources"]))]
        left = sum(not item["value"] for item in own)
        about = {"document": document, "groups": grouped(own, "section"), "summary": shown[:10],
                 "of": ", ".join(sorted({str(run.parent) for run in files.folders.values()})),
                 "filled": len(own) - left, "left": left, "blank": BLANK, "answers": ANSWERS,
                 "research": RESEARCH}
        for ending in ("md", "html"):
            path = out / f"{document.replace(' ', '_')}.{ending}"
            runs.write_atomic(path, pages.render(f"card.{ending}", **about))
        print(f"{path}: {len(own) - left} items filled, {left} left to a person")


def filled(document: str, files: "Files") -> Iterator[dict[str, Any]]:
    """Every item of a document, as card.json holds it; those that no file answers have no value.

    The sources are places, "file: key.key"; "by" says who filled the item in.
    """
    for section, entries in CARDS[document].items():
        for entry in entries:
            item = {"document": document, "section": section, "name": entry.item,
                    "value": entry.missing, "sources": (), "asked_by": entry.asked_by,
                    "by": "nobody yet"}
            found = list(files.each(entry.place))
            for context, sources in found:
                if value := pages.text(entry.value, context):
                    yield {**item, "name": pages.text(entry.item, context), "value": value,
                           "sources": sources, "by": "files"}
            if not found and entry.missing is not None:
                yield item


def answered(items: Sequence[dict], path: Path) -> list[dict]:
    """The items with what a person wrote into answers.json, which is written anew."""
    answers = runs.find_json(path, {})
    if not isinstance(answers, dict) or not all(isinstance(v, str) for v in answers.values()):
        raise InputError(f"{path}: allowed is one JSON object of texts, {{item: answer}}")
    keys = [f"{item['document']}: {item['name']}" for item in items]
    blank = dict.fromkeys(key for key, item in zip(keys, items) if not item["value"])
    strange = sorted(key for key, text in answers.items() if text and key not in blank)
    if strange:
        raise InputError(f"{path} answers {strange[0]!r}, which is not asked; asked are: "
                         f"{', '.join(blank)}")
    answers = {key: answers.get(key, "") for key in blank}
    runs.write_json(path, answers)
    return [{**item, "value": answers[key], "sources": (f"{path}: {key}",), "by": "person"}
            if answers.get(key) and not item["value"] else item for key, item in zip(keys, items)]


class Files:
    """The files of run folders, by kind of run, and what the data say when they are read again."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = find_runs(folders)
        self.content: dict[Path, Any] = {}
        self.again = {"use": (RESEARCH, ["minidiff/evaluation/card_items.py: RESEARCH"])}
        self.data = next((kind for kind in ("diffusion", "vae", "classifier", "audit")
                          if (self.load(kind, "config.json") or {}).get("data")), "")
        if self.data:
            self.again |= read_again(self.data, self.folders[self.data])

    def load(self, kind: str, name: str) -> Any:
        """A file of a run: JSON, the last line of a log, or facts of weights; None without one."""
        path = self.folders.get(kind, Path()) / name
        if kind not in self.folders or not path.is_file():
            return None
        if path not in self.content:
            read = {".json": runs.read_json, ".safetensors": weights,
                    ".jsonl": lambda log: (runs.read_log(log) or [None])[-1]}
            self.content[path] = read[path.suffix](path)
        return self.content[path]

    def each(self, place: str) -> Iterator[tuple[dict, tuple[str, ...]]]:
        """Every member at a place of `card_items` that there is, as (context, sources)."""
        where, _, dotted = place.partition(": ")
        keys = dotted.split(".") if dotted else []
        if where == "again":
            start, sources = self.again.get(keys.pop(0), (None, []))
        else:
            kind, _, name = where.replace("DATA", self.data or "DATA").partition("/")
            start, sources = self.load(kind, name), []
        for found, path in members(start, keys):
            inner_first = [value for value in reversed(found) if isinstance(value, dict)]
            own = {"it": found[-1], "keys": path, "key": path[-1] if path else ""}
            context = dict(ChainMap(own, *inner_first))
            at = sources or [f"{self.folders[kind] / name}: {'.'.join(path)}".rstrip(": ")]
            yield context, tuple(at)


def members(value: Any, keys: Sequence[str]) -> Iterator[tuple[list, list[str]]]:
    """([value, …, innermost member], path) of every member that the keys lead to."""
    if value is None:
        return
    if not keys:
        yield [value], []
        return
    inner = value if isinstance(value, dict) else dict(enumerate(value))
    for key in (inner if keys[0] == "*" else [keys[0]]):
        for found, path in members(inner.get(key), keys[1:]):
            yield [value, *found], [str(key), *path]


def find_runs(folders: Sequence[str]) -> dict[str, Path]:
    """Kind → run folder, among the folders and those inside them; two of a kind are refused."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such run folder")
    places = [path for folder in map(Path, folders) for path in (folder, *sorted(folder.glob("*")))]
    kinds = {place: runs.read_json(place / "config.json").get("kind") for place in places
             if (place / "config.json").is_file()}
    found = {kind: [place for place in kinds if kinds[place] == kind] for kind in KINDS}
    for kind, paths in found.items():
        if len(paths) > 1:
            raise InputError(f"{len(paths)} runs of kind {kind}: {', '.join(map(str, paths))}; "
                             "a card is of one model, so name its runs by --runs")
    if not any(found.values()):
        raise InputError(f"{', '.join(folders)}: no run folder, nor one inside; a card is filled "
                         "from their config.json, …")
    return {kind: paths[0] for kind, paths in found.items() if paths}


def read_again(kind: str, run: Path) -> dict[str, tuple[Any, list[str]]]:
    """(fact, sources) of the data of a run: their splits today, whether they are those trained on,
    "" where nothing was trained, and whether a program drew them."""
    config, record = runs.read_json(run / "config.json"), run / "run.json"
    folders = config["data"]
    drawn = [path for path in (Path(f) / "phantom.json" for f in folders) if path.is_file()]
    facts = {"drawn": ([runs.read_json(path) for path in drawn], list(map(str, drawn)))}
    if not all(Path(folder).is_dir() for folder in folders):
        return facts
    try:
        table = read_as_then(folders, reading_of(config), config.get("seed") or 0, run.parent)
    except InputError as error:
        print(f"the data cannot be read again, so patients are not counted: {error}")
        return facts
    # split → (label, images, patients)
    of_each = [(row["split"], label, row["patient"]) for row, own in zip(
        table.rows, labels_in(table.column("label"))) for label in own]
    images, patients = (Counter(key[:2] for key in keys) for keys in (of_each, {*of_each}))
    splits = {split: [(label, images[split, label], patients[split, label])
                      for label in sorted({label for _, label, _ in of_each})] for split in SPLITS}
    written = runs.read_json(record)["facts"].get("data") if record.is_file() else None
    # a classifier keeps a fingerprint of each split; an audit trains on nothing
    now = ({split: table.select(split=split).fingerprint for split in SPLITS}
           if kind == "classifier" else table.select(split=SPLITS).fingerprint)
    trained_on = "" if kind == "audit" else "yes" if written == now else "no"
    sources = [*folders, *([f"{record}: facts.data"] if written and trained_on else [])]
    return facts | {"splits": (splits, list(folders)), "trained_on": (trained_on, sources)}


def weights(path: Path) -> dict[str, Any]:
    """How many numbers a safetensors file holds, from its header, and its SHA-256."""
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    return {"numbers": sum(map(math.prod, shapes)), "sha256": runs.sha256(path)}
