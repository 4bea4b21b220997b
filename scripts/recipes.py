"""Try the recipes of CONTRIBUTING.md: `python scripts/recipes.py [WORD …]`, all or those whose titles hold a word.

Each is applied to a copy of the tree, its check runs there, and the files that were touched are printed with the lines
added. The kernel format's compiles the native library.
"""

import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
NAMES = ("router_score", "family", "kernel_format", "verb", "balance_loss", "machine")


def main(words: list[str]) -> int:
    """The number of recipes that are not true."""
    tools = importlib.import_module("tests.recipes.recipe")
    recipes = [importlib.import_module(f"tests.recipes.{name}").RECIPE for name in NAMES]
    failed = 0
    for recipe in recipes:
        if words and not any(word in recipe.title for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            tree = tools.copy_tree(Path(folder))
            for edit in recipe.edits:
                edit.apply(tree)
            started = time.perf_counter()
            if recipe.build:
                command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                built = subprocess.run(command, cwd=tree, capture_output=True, text=True)
                assert built.returncode == 0, built.stderr
            done = tools.run(tree, recipe.check)
            seconds = time.perf_counter() - started
        failed += done.returncode != 0
        print(f"{recipe.title}: {'true' if done.returncode == 0 else 'NOT TRUE'} ({seconds:.0f} s)")
        for path in recipe.files:
            lines = sum(max(1, edit.text.count("\n")) for edit in recipe.edits if edit.path == path)
            new = "" if (ROOT / path).exists() else "  new"
            print(f"  {path:45} {lines:3} lines{new}")
        if done.returncode:
            print(done.stdout + done.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
