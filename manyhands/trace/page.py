"""The frame that pages share: one look, one way to fill a template, no file but the page itself."""

from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from manyhands.format import compact, duration, number

COLOURS = 6
"""Of lines: `--c0` to `--c5` of `page.css`."""


def fill(package: str, values: dict[str, Any], filters: dict[str, Any] | None = None) -> str:
    """`page.html` of a package as text; `style` in it is `page.css`, and everything else is escaped."""
    frame = (resources.files(package) / "page.html").read_text(encoding="utf-8")
    style = (resources.files("manyhands.trace") / "page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "compact": compact, "duration": duration, **(filters or {})}
    return environment.from_string(frame).render(style=Markup(style.rstrip()), **values)
