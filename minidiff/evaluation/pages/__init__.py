"""Pages: a result in JSON and pictures in, one HTML file out that needs no script and no network.

The prose of a page stands in its template; Python only brings the numbers.
"""

from __future__ import annotations

import base64
import functools
from typing import Any

from minidiff.evaluation.pages import format as formats

FILTERS = ("num", "p_value", "signed", "percent", "plain")


@functools.cache
def _environment():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("minidiff.evaluation", "pages"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)
    environment.filters.update({name: getattr(formats, name) for name in FILTERS})
    environment.filters["png"] = lambda png: (
        f"data:image/png;base64,{base64.b64encode(png).decode()}")
    environment.filters["groupby_in_order"] = lambda items, name: [
        (value, [item for item in items if getattr(item, name) == value])
        for value in dict.fromkeys(getattr(item, name) for item in items)]
    environment.globals["span"] = formats.span
    return environment


def text(source: str, context: dict[str, Any]) -> str:
    """A line of plain text from a template's source, with the same filters."""
    from jinja2 import Undefined

    plain = _environment().overlay(autoescape=False, undefined=Undefined)
    return plain.from_string(source).render(**context)


def render(template: str, **context: Any) -> str:
    """The page of a template, such as "report.html"; an undefined name in it raises.

    Text is escaped. Filters: num, p_value, signed, percent, plain, png (bytes → data URI);
    functions: span(low, high), and the macros of macros.html.
    """
    return _environment().get_template(template).render(**context)
