"""docs/configuration.md has every field of a run, with its default and what it may be."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows(page: str) -> list[tuple[str, ...]]:
    """Headings, and of each row the field, its default and what it may be."""
    lines = [line for line in page.splitlines() if line.startswith(("## ", "| `"))]
    return [tuple(line.split(" | ")[:3]) for line in lines]


def test_the_page_is_what_the_descriptions_say() -> None:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "scripts" / "config_reference.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written, now = rows(script.PAGE.read_text(encoding="utf-8")), rows(script.page())
    assert len(now) > 100
    assert written == now, "run: python scripts/config_reference.py"
