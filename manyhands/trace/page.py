"""The frame that pages share: one look, one way to fill a template, no file but the page itself.

`frame.html` is what stands around a page, `page.css` how all of them look, `page.js` what the pointer and the arrow
keys show on a chart. A page's own template extends the frame.
"""

import time
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from manyhands.format import compact, duration, number
from manyhands.trace.origin import command_line
from manyhands.version import __version__

COLOURS = 6
"""Of lines: `--c0` to `--c5` of `page.css`."""
_HOME = "manyhands.trace"
_FRAME = "frame.html"


def fill(
    made_by: str,
    package: str,
    page: str,
    values: dict[str, Any],
    filters: dict[str, Any] | None = None,
    command: str = "",
) -> str:
    """The template `page` of a package as text, with `values` in it; all but markup is escaped.

    made_by   the verb: with the version, the time and the `command` (default: this program's) at the page's foot.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: _read(_HOME if name == _FRAME else package, name)),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "compact": compact, "duration": duration, "breakable": breakable}
    environment.filters |= filters or {}
    return environment.get_template(page).render(
        made_by=made_by,
        style=Markup(_read(_HOME, "page.css").rstrip()),
        script=Markup(_read(_HOME, "page.js").rstrip()),
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M"),
        command=command or command_line(),
        **values,
    )


def breakable(name: str) -> Markup:
    """A dotted or underscored name that a narrow page may break where a reader would."""
    return Markup(str(escape(name)).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _read(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text(encoding="utf-8")
