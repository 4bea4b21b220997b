"""The notebooks of examples/: whole, without outputs, and one of them runs. `scripts/notebooks.py` runs all."""

import json
import re
import runpy
from pathlib import Path

import pytest

from .test_docs_coming_from import parse

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    """The text of each cell that is `code` or `markdown`."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_whole(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]), (
        "strip its outputs"
    )
    said, code = cells(path, "markdown"), cells(path, "code")
    assert said[0].startswith("# ") and len(said) >= 4 and "plt.show()" in "".join(code)
    for number, text in enumerate(code):
        compile(text, f"{path.name}, code cell {number}", "exec")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_commands_and_pages_exist(path: Path) -> None:
    text = "\n".join(cells(path, "markdown"))
    for command in re.findall(r"^manyhands .+$", text, re.MULTILINE):
        parse(command)
    for name in re.findall(r"`(docs/\w+\.md)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(\w+\.ipynb)`", text):
        assert (path.parent / name).is_file(), name


def test_the_first_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    shown: list[int] = []

    def show() -> None:
        shown.append(len(pyplot.get_fignums()))
        pyplot.close("all")

    monkeypatch.setattr(pyplot, "show", show)
    script = tmp_path / "notebook.py"
    text = cells(ROOT / "examples" / "notebooks" / "what_a_router_does.ipynb", "code")
    script.write_text("\n\n".join(text), encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    assert shown == [1, 1] and "largest difference" in capsys.readouterr().out
