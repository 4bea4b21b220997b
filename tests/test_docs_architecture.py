"""docs/architecture.md draws the house that stands: the rooms and their order are the import contract's."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = next(contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")


def floors(lines: list[str]) -> list[set[str]]:
    """Rooms that stand side by side, from the top."""
    return [set(re.split(r"\s*[:|]\s*", line.strip())) for line in lines]


def test_the_picture_is_the_contract() -> None:
    picture = re.search(r"```text\n(.+?)```", PAGE, re.DOTALL)
    assert picture is not None
    drawn = floors([re.split(r"\s{2,}", line.strip())[0] for line in picture[1].splitlines()])
    held = floors([layer.replace("manyhands.", "") for layer in LAYERS])
    assert drawn == held, "docs/architecture.md: draw each layer of pyproject.toml's contract as a line, in its order"


def test_every_room_has_its_paragraph() -> None:
    told = [name for names in re.findall(r"^\*\*([\w, ]+)\.\*\*", PAGE, re.MULTILINE) for name in names.split(", ")]
    rooms = {name for floor in floors([layer.replace("manyhands.", "") for layer in LAYERS]) for name in floor}
    assert set(told) == rooms and len(told) == len(rooms)


def test_every_package_is_a_room() -> None:
    """A new folder is put into the contract, or it is under no rule."""
    rooms = {name for floor in floors([layer.replace("manyhands.", "") for layer in LAYERS]) for name in floor}
    folders = {path.parent.name for path in (ROOT / "manyhands").glob("*/__init__.py")}
    assert folders <= rooms


def test_named_files_exist() -> None:
    """`file.py` in a room's paragraph is a file of that room."""
    for room, text in re.findall(r"^\*\*(\w+)\.\*\* (.+?)(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL):
        for name in re.findall(r"`(\w+\.py)`", text):
            assert list((ROOT / "manyhands" / room).rglob(name)), f"{room}: {name}"
