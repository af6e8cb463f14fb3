"""The paper of the report: one HTML page that needs nothing else, neither script nor network, and
the marks on it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from minidiff.evaluation.pages.format import plain

CSS = """
:root { --ink: #22303a; --soft: #66757f; --line: #dfe4e7; --paper: #fbfaf7; --accent: #b5482a }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 Georgia, 'Iowan Old Style', 'Times New Roman', serif }
main { max-width: 62rem; margin: 0 auto; padding: 3.5rem 1.4rem 5rem }
h1 { font-size: 2.1rem; line-height: 1.15; font-weight: 500; margin: 0 0 .4rem; letter-spacing: -.01em;
     overflow-wrap: anywhere }
h2 { font-size: 1.3rem; font-weight: 500; margin: 3.4rem 0 .7rem; padding-top: .9rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; font-weight: 600; margin: 1.8rem 0 .4rem }
p { max-width: 44rem; margin: .5rem 0 }
.lead, figcaption, .note, table, nav { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }
.lead { color: var(--soft); font-size: .95rem }
nav { display: flex; flex-wrap: wrap; font-size: .85rem; margin: 1.4rem 0 0 }
nav a { color: var(--soft); margin-right: 1.1rem; text-decoration: none; white-space: nowrap }
nav a:hover { color: var(--accent) }
.warning { border-left: 3px solid var(--accent); padding: .1rem 0 .1rem .9rem; margin: 1.4rem 0 }
figure { margin: 1.2rem 0 }
figcaption, .note { color: var(--soft); font-size: .83rem; line-height: 1.45; max-width: 48rem; margin-top: .45rem }
img { max-width: 100%; height: auto; display: block }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.4rem }
.pair img { width: 100% }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .83rem; font-variant-numeric: tabular-nums; margin: .8rem 0; width: 100% }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; white-space: nowrap; vertical-align: top;
         border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft); border-bottom-color: #b9c3c9 }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
.scroll td:last-child { white-space: normal; min-width: 4.5rem }
tr.own td { color: var(--accent); font-weight: 600 }
tr.grey td { color: #75828a; font-style: italic }
tr.first td { border-top: 1px solid #b9c3c9 }
.verdicts td { white-space: normal; text-align: left; padding: .7rem 1rem .7rem 0 }
.verdicts td:first-child { width: 6.5rem }
.answer { display: inline-block; padding: .05rem .55rem; border-radius: 1rem; font-size: .78rem; border: 1px solid;
          white-space: nowrap }
.yes { color: #2f6b4f } .no { color: #a8321a; border-width: 2px; font-weight: 600 }
.open { color: #6b5c22; border-style: dashed }
.yes::before { content: '✓ ' } .no::before { content: '✗ ' } .open::before { content: '? ' }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr)); gap: .8rem .5rem }
.cards img { width: 100%; margin-bottom: 2px }
.cards div { font: .72rem/1.35 system-ui, sans-serif; color: var(--soft); break-inside: avoid; overflow-wrap: anywhere }
.strips { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem 1.4rem }
.strips figure { margin: .3rem 0 } .strips img { width: 100% }
.command { max-width: none; font: .76rem/1.5 ui-monospace, Menlo, Consolas, monospace; color: var(--soft);
           overflow-wrap: anywhere }
.command::before { content: '$ ' }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
     font: .83rem/1.5 ui-monospace, Menlo, Consolas, monospace }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
details { margin: .4rem 0; font-size: .9rem }
summary { cursor: pointer; color: var(--soft) }
pre { font: .78rem/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
@media (max-width: 640px) {
  main { padding: 2rem 1rem } h1 { font-size: 1.6rem } .pair, .strips, dl { grid-template-columns: minmax(0, 1fr) }
  .scroll > img { max-width: none; width: 42rem } .pair .scroll > img { width: 100% }
  dt { overflow-wrap: anywhere } nav a { padding: .35rem 0 }
  .verdicts td:first-child { width: auto } .scroll td:last-child { min-width: 9rem }
}
@media print {
  @page { margin: 14mm }
  :root { --soft: #46545d; font-size: 12px }
  body { background: #fff; font-size: 10pt; print-color-adjust: exact } nav { display: none }
  main { max-width: none; padding: 0 }
  figure, tr, .cards div { break-inside: avoid } .cards, figure:has(.cards) { break-inside: auto }
  h2, h3 { break-after: avoid } .scroll { overflow: visible }
  table { font-size: 7.5pt } .verdicts { font-size: 9pt } .cards { grid-template-columns: repeat(10, 1fr) }
  th, td { padding: .15rem .4rem .15rem 0; white-space: normal }
  .scroll > img { max-width: 100% } .scroll td:last-child { min-width: 0 }
}
"""


def page(title: str, lead: str, sections: Mapping[str, tuple[str, str]]) -> str:
    """A whole page from sections {id: (heading, HTML)}; title, lead and headings are text and get
    escaped here.
    """
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>'
                    for key, (heading, _) in sections.items())
    bodies = "".join(f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>'
                     for key, (heading, body) in sections.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{CSS}</style></head><body><main><header><h1>{escape(title)}</h1><p '
        f'class="lead">{escape(lead)}</p><nav>{links}</nav></header>'
        f"{bodies}</main></body></html>\n")


def figure(png: bytes, caption: str, alt: str) -> str:
    return f'<figure><div class="scroll">{img(png, alt)}</div><figcaption>{escape(caption)}</figcaption></figure>'


def cards(items: Iterable[tuple[Sequence[bytes], Sequence[str]]], alts: Sequence[str],
          caption: str) -> str:
    """Small pictures side by side, as many as fit: of each item its pictures one above the other,
    then lines of text.
    """
    body = "".join("<div>" + "".join(img(png, alt) for png, alt in zip(shots, alts))
                   + "<br>".join(map(escape, lines)) + "</div>" for shots, lines in items)
    return f'<figure><div class="cards">{body}</div><figcaption>{escape(caption)}</figcaption></figure>'


def img(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence]]) -> str:
    """Rows are (classes, cells); a cell is anything with a text."""
    body = "".join(f'<tr class="{kind.strip()}">' + "".join(
        f"<td>{escape(str(c))}</td>" for c in cells) + "</tr>" for kind, cells in rows)
    return f'<div class="scroll"><table><tr>{"".join(f"<th>{escape(h)}</th>" for h in head)}</tr>{body}</table></div>'


def chip(kind: str, answer: str) -> str:
    """An answer in a frame: kind yes, no, open, or none."""
    return f'<span class="{f"answer {kind}".strip()}">{escape(answer)}</span>'


def answers(rows: Iterable[tuple[str, str, str]]) -> str:
    """Rows are (kind, answer, what it answers and why, as HTML)."""
    body = "".join(f"<tr><td>{chip(kind, answer)}</td><td>{html}</td></tr>"
                   for kind, answer, html in rows)
    return f'<table class="verdicts">{body}</table>'


def fields(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(plain(v))}</dd>"
                   for k, v in facts.items())
    return f"<dl>{rows}</dl>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
