"""A recipe: what is written where, and what must then hold. Tried on a copy of the tree, never on the tree itself."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Edit:
    """Text that goes into one file."""

    path: str
    text: str
    after: str | None = None
    """Right behind this text, which stands in the file; None: at the end, or in a new file."""

    def apply(self, tree: Path) -> None:
        path = tree / self.path
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if self.after is None:
            new = old + self.text
        else:
            assert old.count(self.after) == 1, (
                f"{self.path} holds {self.after!r} {old.count(self.after)} times, not once"
            )
            new = old.replace(self.after, self.after + self.text)
        path.write_text(new, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to extend the package."""

    title: str
    """Its heading in CONTRIBUTING.md."""
    edits: tuple[Edit, ...]
    check: str
    """Python, run in the changed copy."""
    build: bool = False
    """Whether the native library is compiled anew before the check: a minute or two."""

    @property
    def files(self) -> list[str]:
        """The files it touches, in the order of the edits."""
        return list(dict.fromkeys(edit.path for edit in self.edits))


def copy_tree(to: Path) -> Path:
    """The package, and what building it needs."""
    shutil.copytree(ROOT / "manyhands", to / "manyhands", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "native", to / "native")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to / name)
    return to


def run(tree: Path, code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a process that imports the package from `tree`."""
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tree, env=env, capture_output=True, text=True
    )
