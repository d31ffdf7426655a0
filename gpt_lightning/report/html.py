"""Fills the pages of this room; whatever stands in a text is shown, and never acts."""

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # slow to import

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=shown, percent=percent, quoted=quoted, marked=marked)
    return environment


def shown(value: Any) -> str:
    """Writes a value as a person would: 12,345, 0.0123, yes; of a list its members."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value)) or "[]"
    return str(value)


def percent(logprob: float) -> str:
    """Writes the probability whose logarithm this is."""
    share = 100 * math.exp(min(0.0, logprob))
    return f"{share:.3g} %" if share >= 0.001 else "under 0.001 %"


def quoted(text: str) -> str:
    """Writes a token or a few so that its blanks and line breaks are seen."""
    return text.replace("\n", "\u23ce").replace("\t", "\u21e5").replace(" ", "\u00b7")


def marked(text: str) -> str:
    """Writes a token within its text: line breaks and tabs, which no colour would show, get a sign."""
    return text.replace("\n", "\u23ce\n").replace("\t", "\u21e5\t")
