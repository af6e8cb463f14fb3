"""How numbers are written on pages and terminals."""

import math
from typing import Any


def num(x: float | None) -> str:
    """Three significant digits with a true minus; – for a missing value."""
    if x is None or math.isnan(x):
        return "–"
    text = f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 0.001 or x == 0 else f"{x:.1e}"
    return text.replace("-", "−")


def p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.0005 else f"{p:.3f}"


def signed(x: float | None) -> str:
    return ("+" if x is not None and x > 0 else "") + num(x)


def span(low: float | None, high: float | None) -> str:
    return f"{num(low)} to {num(high)}"


def percent(x: float | None) -> str:
    return "–" if x is None or math.isnan(x) else f"{100 * x:.1f} %"


def hundred(x: float | None) -> str:
    """A share in per cent, without the sign."""
    return "–" if x is None else num(100 * x)


def points(x: float) -> str:
    """A share as percentage points with its sign."""
    return f"{100 * x:+.1f}".replace("-", "−")


def distance_names(extractor: str) -> tuple[str, str]:
    """What the kernel and the Fréchet distance are called: KID and FID in Inception's features."""
    return ("KID", "FID") if "inception" in extractor else ("kernel distance", "Fréchet distance")


def plain(value: Any) -> str:
    """A dictionary or list in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def jsonable(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinity as None, what it cannot as text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
