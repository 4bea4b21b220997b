"""Write docs/configuration.md: every field of a run, its default, what it may be, what it does; from the descriptions.

`python scripts/config_reference.py`
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from manyhands.config import RunConfig
from manyhands.config.reference import allowed, default, documents

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
HEAD = """# Every field of a run

What a run file and `section.field=value` may say; [training.md](training.md) is the guide. An unknown field, or a value
that is not allowed, is refused with the nearest name. `python scripts/config_reference.py` writes this page.
"""


def sections(config: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(dotted path, class) of every description in a run, in order."""
    yield path, config
    for name, field in config.model_fields.items():
        for inner in [field.annotation, *get_args(field.annotation)]:
            inner = getattr(inner, "__origin__", inner) if hasattr(inner, "__metadata__") else inner
            if inspect.isclass(inner) and issubclass(inner, BaseModel):
                yield from sections(inner, f"{path}.{name}" if path else name)


def heading(path: str, config: type[BaseModel]) -> str:
    """Of a section; a model of another kind than a decoder says so in the file, and a tuning its method."""
    if "method" in config.model_fields:
        return f"## `{path}` with `method: {config.model_fields['method'].default}`"
    kind = config.model_fields["kind"].default if path == "model" else "decoder"
    return (
        f"## `{path}` with `kind: {kind}`"
        if kind != "decoder"
        else f"## `{path}`"
        if path
        else "## The top of the file"
    )


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def page() -> str:
    """The whole text."""
    parts, seen = [HEAD], set()
    for path, config in sections(RunConfig):
        if config in seen:  # the router of another kind of model
            continue
        seen.add(config)
        told = documents(config)
        lines = [heading(path, config), ""]
        lines += [inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].replace("\n", " "), ""]
        lines += ["| field | default | may be | |", "|---|---|---|---|"]
        for name, field in config.model_fields.items():
            cells = [f"`{name}`", _code(default(field)), allowed(field.annotation, field.metadata, "`")]
            cells.append(told.get(name, ""))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
