"""Every command of the documentation is one that the command line knows; `scripts/docs_commands.py` also runs them."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def docs() -> Iterator[ModuleType]:
    yield script("docs_commands")
    del sys.modules["docs_commands"]


def of(docs: ModuleType, folder: Path, text: str) -> list[Any]:
    page = folder / "page.md"
    page.write_text(text)
    return list(docs.commands(page))


def test_the_command_line_knows_them_all(docs: ModuleType) -> None:
    found = [command for page in docs.pages() for command in docs.commands(page)]
    assert len([command for command in found if command.block >= 0]) > 100
    wrong = [f"{c.page}:{c.line}: {c.text}: {why}" for c in found if (why := docs.refused(c))]
    assert not wrong, "\n".join(wrong)


def test_blocks_are_read_as_a_shell_reads_them(docs: ModuleType, tmp_path: Path) -> None:
    text = (
        "a\n```bash\nmanyhands eval M --data 'a # b' \\\n  --json   # so\n\n# nothing\n```\n"
        "`manyhands lab`\n```\n$ manyhands doctor\nout\n```\n"
    )
    found = [(c.line, c.text, c.block) for c in of(docs, tmp_path, text)]
    assert found == [
        (4, "manyhands eval M --data 'a # b' --json", 0),
        (10, "manyhands doctor", 1),
        (8, "manyhands lab", -1),
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("manyhands trian", "no verb"),
        ("manyhands train --presett tiny", "no such option"),
        ("manyhands convert a b c", "unexpected extra argument"),
        ("manyhands convert a", "Missing argument"),
        ("manyhands lab rum", "no verb"),
        ("manyhands plan x --batch 0", "--batch"),
        ("torchrun --nproc-per-node 2 -m manyhands train --nope", "no such option"),
        ("manyhands train --preset tiny train.max_stepz=3", "max_stepz"),
    ],
)
def test_a_wrong_command_is_found(docs: ModuleType, tmp_path: Path, line: str, why: str) -> None:
    (command,) = of(docs, tmp_path, f"```bash\n{line}\n```\n")
    assert why.lower() in (docs.refused(command) or "").lower()


def test_a_wrong_flag_in_a_sentence_is_found(docs: ModuleType, tmp_path: Path) -> None:
    right, wrong = of(docs, tmp_path, "say `manyhands plan --versus` or `manyhands plan --nope`\n")
    assert docs.refused(right) is None and docs.refused(wrong) == "no option --nope"


def test_every_pattern_of_the_table_is_needed(docs: ModuleType) -> None:
    """Else it stands for a command that has gone."""
    found = [command for page in docs.pages() for command in docs.commands(page) if command.block >= 0]
    for pattern in docs.TABLE["skip"]:
        assert any(re.search(pattern, command.text) for command in found), pattern


def told(page: str) -> list[tuple[str, ...]]:
    """Headings, and of each row the options' names and what they do; how Typer writes types and bounds may change."""
    found: list[tuple[str, ...]] = []
    for line in page.splitlines():
        if line.startswith("| `"):
            names, does, _ = re.split(r"(?<!\\) \| ", line)
            found.append((*re.findall(r"(?<![\w-])--?[a-z][\w-]*", names), does))
        elif line.startswith("## "):
            found.append((line,))
    return found


def test_verbs_and_options_are_those_of_the_command_line() -> None:
    made = script("cli_reference")
    written, now = told(made.PAGE.read_text(encoding="utf-8")), told(made.page())
    assert len(now) > 300
    assert written == now, "run: python scripts/cli_reference.py"


def test_file_formats_name_every_file() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    names = re.findall(r'"([\w.]+\.(?:json|jsonl|yaml|safetensors|npy))"', (ROOT / "manyhands/files.py").read_text())
    assert len(names) > 10 and [name for name in names if f"`{name}`" not in page] == []
    journal = (ROOT / "manyhands/trace/journal.py").read_text().partition("Every record")[2].partition("A line is")[0]
    kinds = re.findall(r"^([a-z_]+(?: [a-z_]+)?)  ", journal, re.MULTILINE)
    assert len(kinds) > 5 and [kind for line in kinds for kind in line.split() if f"`{kind}`" not in page] == []


def test_every_route_of_the_server_is_documented() -> None:
    routes = pytest.importorskip("manyhands.serve.app")
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    source = Path(routes.__file__).read_text(encoding="utf-8")
    paths = set(re.findall(r'^            "(/[\w/{}:]+)": self', source, re.MULTILINE))
    assert len(paths) > 12
    assert [path for path in paths if path.replace(":path", "").replace("{name}", "{id}") not in page] == []


def test_the_site_names_pages_that_are_there() -> None:
    text = re.sub(r"!!python\S+ \{.*\}\}", "x", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = re.findall(r"[\w-]+\.md", repr(yaml.safe_load(text)["nav"]))
    assert len(pages) > 20 and len(set(pages)) == len(pages)
    assert [page for page in pages if not (ROOT / "docs" / page).is_file()] == []
