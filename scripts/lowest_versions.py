"""The lowest versions that pyproject.toml allows, for pip: `python scripts/lowest_versions.py > low.txt`.

    python3.11 -m venv low && low/bin/pip install -c low.txt -e '.[dev]' && low/bin/python -m pytest -n 2

Only what the package cannot do without is held down; extras, tools, and what those need come as they allow it.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lowest(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """`name==version` for each `name>=version` that the package needs; `ValueError` for one without a lower bound."""
    found = []
    for requirement in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        bound = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)(?:,.*)?", requirement)
        if bound is None:
            raise ValueError(f"{requirement}: expected NAME>=VERSION")
        found.append(f"{bound[1]}=={bound[2]}")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest()) + "\n")
