"""A model card and a datasheet, filled from what the runs have written down; what only a person can
say is left blank.

    python evaluate.py card --root runs/x                         from all runs in it, or from those of --runs

Each line says which file, and where in it, the statement comes from, and which guideline asks for
it: TRIPOD+AI (Collins et al. 2024), MI-CLAIM (Norgeot et al. 2020; its six parts), model cards
(Mitchell et al. 2019), datasheets (Gebru et al. 2021). Blank lines are collected in answers.json:
fill them in there, run the command again, and they are in the cards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minidiff import runs
from minidiff.errors import InputError
from minidiff.evaluation.card_items import RESEARCH, datasheet, model_card
from minidiff.evaluation.written import Files, Item
from minidiff.root import Rooted

BLANK = "▢ **TO BE FILLED IN BY A PERSON**"
ANSWERS = "answers.json"


@dataclass(frozen=True)
class CardConfig(Rooted):
    runs: tuple[str, ...] = ("ROOT/",)      # run folders, or folders that hold some
    out: str = "ROOT/card"                  # model_card.md, datasheet.md, card.json, answers.json


def run_card(cfg: CardConfig) -> None:
    """A model card and a datasheet (TRIPOD+AI, MI-CLAIM) from what the runs have written down."""
    files, out = Files(cfg.runs), Path(cfg.out)
    given = out / ANSWERS
    answers = runs.read_json(given) if given.is_file() else {}
    if not isinstance(answers, dict) or not all(isinstance(v, str) for v in answers.values()):
        raise InputError(f"{given}: allowed is one JSON object of texts, {{item: answer}}")
    items = [*model_card(files), *datasheet(files)]
    blank = dict.fromkeys(_key(item) for item in items if not item.value)
    strange = sorted(key for key, text in answers.items() if text and key not in blank)
    if strange:
        raise InputError(f"{given} answers {strange[0]!r}, which is not asked; asked are: "
                         f"{', '.join(blank)}")
    items = [item._replace(value=answers[_key(item)], sources=(f"{given}: {_key(item)}",))
             if not item.value and answers.get(_key(item)) else item for item in items]
    runs.write_json(given, {key: answers.get(key, "") for key in blank})
    runs.write_json(out / "card.json",
                    {"items": [{**item._asdict(), "by": _by(item)} for item in items],
                     "provenance": runs.provenance()})
    for document, name in (("model card", "model_card.md"), ("datasheet", "datasheet.md")):
        own = [item for item in items if item.document == document]
        runs.write_atomic(out / name, markdown(document, own, files))
        left = sum(not item.value for item in own)
        print(f"{out / name}: {len(own) - left} items filled, {left} left to a person")


def markdown(document: str, items: Sequence[Item], files: Files) -> str:
    """A card as tables, one a section."""
    left = sum(not item.value for item in items)
    of = ", ".join(sorted({str(folder.parent) for folder in files.folders.values()}))
    text = (f"# {document.capitalize()}: {of}\n\n**{RESEARCH}**\n\n{len(items) - left} items "
            f"filled, {left} left to a "
            f"person" + (f" and marked {BLANK}: write them into {ANSWERS} and run the command "
                         f"again.\n" if left else ".\n"))
    for section in dict.fromkeys(item.section for item in items):
        text += f"\n## {section}\n\n| | | from | asked for by |\n|---|---|---|---|\n"
        for item in (i for i in items if i.section == section):
            cells = (item.name, item.value or BLANK, "<br>".join(f"`{s}`" for s in item.sources),
                     item.asked_by)
            text += "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ")
                                      for c in cells) + " |\n"
    return text


def _key(item: Item) -> str:
    return f"{item.document}: {item.name}"


def _by(item: Item) -> str:
    if not item.value or not item.sources:
        return "nobody yet"
    return "person" if ANSWERS in item.sources[0] else "files"
