"""Pages: a result in JSON and pictures in, one HTML file out that needs no script and no network.

The prose of a page stands in its template; Python only brings the numbers.
"""

import base64
import functools
from collections.abc import Iterable
from typing import Any

from minidiff.evaluation import format as formats

FILTERS = ("num", "p_value", "signed", "percent", "hundred", "points", "plain")


@functools.cache
def _environment():
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(loader=PackageLoader("minidiff.evaluation", "pages"),
                              autoescape=select_autoescape(["html"]), undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters.update({name: getattr(formats, name) for name in FILTERS})
    environment.filters["png"] = data_uri
    environment.filters["groupby_in_order"] = lambda items, name: [
        (value, [item for item in items if getattr(item, name) == value])
        for value in dict.fromkeys(getattr(item, name) for item in items)]
    environment.globals.update(span=formats.span, distance_names=formats.distance_names)
    return environment


def data_uri(png: bytes | str) -> str:
    """A picture as text that can stand in a page; what is such text already is left alone."""
    if isinstance(png, str):
        return png
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def text(source: str, context: dict[str, Any]) -> str:
    """A line of plain text from a template's source, with the same filters."""
    from jinja2 import Undefined

    plain = _environment().overlay(autoescape=False, undefined=Undefined)
    return plain.from_string(source).render(**context)


def render(template: str, **context: Any) -> str:
    """The page of a template, such as "report.html"; an undefined name in it raises.

    In HTML, text is escaped. Filters: those of FILTERS and png (bytes → data URI); functions:
    span(low, high), distance_names(extractor), and the macros of macros.html.
    """
    return _environment().get_template(template).render(**context)


def sentence(template: str, macro: str, **context: Any) -> str:
    """One macro of a text template, as one line."""
    return " ".join(getattr(_environment().get_template(template).module, macro)(**context).split())


def answers(found: Iterable[dict]) -> list[dict]:
    """The answers of verdicts.py in words: {"question", "answer", "text"}, and "good" if it has."""
    return [{"question": sentence("verdicts.txt", "question", v=v),
             **{key: v[key] for key in ("answer", "good") if key in v},
             "text": sentence("verdicts.txt", "text", v=v)} for v in found]
