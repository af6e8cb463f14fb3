"""Pages: a result in JSON and pictures in, one HTML file out that needs no script and no network.

The prose of a page stands in its template; Python only brings the numbers.
"""

import base64
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined, select_autoescape

from minidiff.evaluation import format as formats


def data_uri(png: bytes | str) -> str:
    """A picture as text that can stand in a page; what is such text already is left alone."""
    if isinstance(png, str):
        return png
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _lenient(write: Callable[..., str]) -> Callable[..., str]:
    """A number that the JSON lacks, for another version wrote it, is written as one missing."""
    return lambda *numbers: write(*(None if isinstance(x, Undefined) else x for x in numbers))


FILTERS = {name: _lenient(getattr(formats, name)) for name in (
    "num", "fixed", "p_value", "signed", "percent", "hundred", "points", "size")}
ENVIRONMENT = Environment(
    loader=PackageLoader("minidiff.evaluation", "pages"), undefined=StrictUndefined,
    autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
    keep_trailing_newline=True)
ENVIRONMENT.filters |= {**FILTERS, "png": data_uri,
                        **{name: getattr(formats, name) for name in (
                            "plain", "about", "difference", "capital")}}
ENVIRONMENT.globals |= {"span": _lenient(formats.span),
                        **{name: getattr(formats, name) for name in (
                            "distance_names", "metric_name", "set_name")}}
PLAIN = ENVIRONMENT.overlay(autoescape=False, undefined=Undefined)


def text(source: str, context: dict[str, Any]) -> str:
    """A line of plain text from a template's source, with the same filters."""
    return PLAIN.from_string(source).render(**context)


def render(template: str, **context: Any) -> str:
    """The page of a template, such as "report.html"; an undefined name in it raises.

    In HTML, text is escaped. Filters: those of FILTERS, plain and png (bytes → data URI);
    functions: span(low, high), distance_names(extractor), and the macros of macros.html.
    """
    return ENVIRONMENT.get_template(template).render(**context)


def sentence(template: str, macro: str, **context: Any) -> str:
    """One macro of a text template, as one line, or several that ¶ ends."""
    text = getattr(ENVIRONMENT.get_template(template).module, macro)(**context)
    return "\n".join(" ".join(line.split()) for line in text.split("¶")).strip()


def answers(found: Iterable[dict]) -> list[dict]:
    """The answers of verdicts.py in words: {"question", "answer", "text"}, and "good" if it has."""
    return [{"question": sentence("verdicts.txt", "question", v=v),
             **{key: v[key] for key in ("answer", "good") if key in v},
             "text": sentence("verdicts.txt", "text", v=v)} for v in found]
