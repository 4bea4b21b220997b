"""CONTRIBUTING.md's recipes are true: each is applied to a copy of the tree, and its check runs there.

The kernel format's needs a compiler and a minute: `scripts/recipes.py` tries it, and each recipe by itself.
"""

import re
from pathlib import Path

import pytest

from .recipes import balance_loss, family, kernel_format, machine, router_score, verb
from .recipes.recipe import ROOT, Recipe, copy_tree, run

QUICK = [module.RECIPE for module in (router_score, family, verb, balance_loss, machine)]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_all_at_once(tmp_path: Path) -> None:
    """In one copy and one process, to be quick."""
    tree = copy_tree(tmp_path)
    for recipe in QUICK:
        for edit in recipe.edits:
            edit.apply(tree)
    code = "\n".join(f"exec({recipe.check!r}, {{}})" for recipe in QUICK)
    done = run(tree, code)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("recipe", [*QUICK, kernel_format.RECIPE], ids=lambda recipe: recipe.title)
def test_the_guide_names_the_files(recipe: Recipe) -> None:
    section = re.split(r"^### ", GUIDE.partition(f"### {recipe.title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    named = set(re.findall(r"`((?:manyhands|native)/[\w./]+)`", section))
    wanted = {path for path in recipe.files if (ROOT / path).exists()}
    assert wanted <= named, f"{recipe.title}: {sorted(wanted - named)} is not named"
