"""docs/api.md says what there is: every public name, every signature, every error's exit code."""

import re
from pathlib import Path

import manyhands
from manyhands import errors, hf

from .signatures import signature

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
ERRORS = dict(re.findall(r"^\| `mh\.(\w+)` \| (\d+) \|", PAGE, re.MULTILINE))
HEADINGS = re.findall(r"^### `mh\.(\w+)`$", PAGE, re.MULTILINE)


def test_every_public_name_has_its_place() -> None:
    assert sorted([*HEADINGS, *ERRORS]) == sorted(manyhands.__all__)
    assert all(f"`{name}" in PAGE for name in hf.__all__)


def test_signatures() -> None:
    blocks = re.findall(r"```text\n(.+?)```", PAGE, re.DOTALL)
    lines = [" ".join(line.split()) for block in blocks for line in re.split(r"\n(?=\S)", block.strip())]
    shown = {line.partition("(")[0]: line for line in lines}
    assert len(shown) == len(lines) and set(HEADINGS) <= shown.keys()
    for path, line in shown.items():
        assert line == signature(path), "run: python tests/signatures.py"


def test_exit_codes() -> None:
    assert {name: str(getattr(errors, name).exit_code) for name in ERRORS} == ERRORS
