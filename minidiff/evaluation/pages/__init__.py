"""Pages: a result in JSON and pictures in, one HTML file out that needs no script and no network.

The prose of a page stands in its template; Python only brings the numbers.
"""

import base64
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Undefined, select_autoescape

from minidiff.data.images import smaller
from minidiff.evaluation import format as formats

MOST = 9_900_000  # bytes of a page: a mail takes 10 MB, and a browser opens it at once
DENSE = 0.25      # bytes a pixel: an image has more, a chart of lines and letters has less
LEAST = 0.02      # share of its sides at which an image is but a dot
URI = "data:image/png;base64,"
PICTURE = re.compile(f'(?<=src="){URI}([^"]+)')  # a text of the user has no such quotation mark


def data_uri(png: bytes | str) -> str:
    """A picture as text that can stand in a page; what is such text already is left alone."""
    if isinstance(png, str):
        return png
    return URI + base64.b64encode(png).decode()


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
    """The page of a template, such as "report.html"; an undefined name in it raises. Its images are
    shown smaller where it would have more than MOST bytes.

    In HTML, text is escaped. Filters: those of FILTERS, plain and png (bytes → data URI);
    functions: span(low, high), distance_names(extractor), and the macros of macros.html.
    """
    return fitted(ENVIRONMENT.get_template(template).render(**context))


def fitted(page: str, most: int = MOST) -> str:
    """The page in so many bytes: one that has more shows all its images at one smaller scale and
    says so. Charts stay as they are."""
    if len(page.encode()) <= most:
        return page
    found, share = PICTURE.findall(page), 1.0
    images = {text: png for text in set(found) if _dense(png := base64.b64decode(text))}
    charts = sum(len(text) for text in found if text not in images)
    small = _shown_at(share, images, page)  # colour that is grey takes a third, without any loss
    while images and (over := len(small.encode()) - most) > 0 and share > LEAST:
        taken = sum(map(len, PICTURE.findall(small))) - charts
        share *= 0.98 * math.sqrt(max(1 - over / taken, 0.01))  # bytes go with the area, or nearly
        small = _shown_at(share, images, page)
    return small


def _shown_at(share: float, images: Mapping[str, bytes], page: str) -> str:
    small = {text: data_uri(smaller(png, share)) for text, png in images.items()}
    note = ENVIRONMENT.get_template("macros.html").module.reduced(share) if share < 1 else ""
    return PICTURE.sub(lambda match: small.get(match[1], match[0]), page).replace(
        "<nav>", f"{note}<nav>", 1)


def _dense(png: bytes) -> bool:
    width, height = struct.unpack(">II", png[16:24])
    return len(png) > DENSE * width * height


def sentence(template: str, macro: str, **context: Any) -> str:
    """One macro of a text template, as one line, or several that ¶ ends."""
    text = getattr(ENVIRONMENT.get_template(template).module, macro)(**context)
    return "\n".join(" ".join(line.split()) for line in text.split("¶")).strip()


def answers(found: Iterable[dict]) -> list[dict]:
    """The answers of verdicts.py in words: {"question", "answer", "text"}, and "good" if it has."""
    return [{"question": sentence("verdicts.txt", "question", v=v),
             **{key: v[key] for key in ("answer", "good") if key in v},
             "text": sentence("verdicts.txt", "text", v=v)} for v in found]
