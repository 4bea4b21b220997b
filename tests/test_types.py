"""Users' type checkers see the types: the marker is there, and calling a module is typed as its `forward` is."""

import ast
import re
from pathlib import Path

import manyhands

PACKAGE = Path(manyhands.__file__).parent


def test_the_marker_is_in_the_package() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_every_module_of_ours_has_a_typed_call() -> None:
    """`nn.Module.__call__` gives Any; `scripts/typed_calls.py`, under `make lint`, says what comes instead."""
    seen = []
    for path in sorted([*PACKAGE.glob("moe/*.py"), *PACKAGE.glob("layers/*.py"), *PACKAGE.glob("models/*.py")]):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if not isinstance(node, ast.ClassDef) or not any(base in ("nn.Module", "nn.Linear") for base in bases):
                continue
            seen.append(node.name)
            assert re.search(r"if TYPE_CHECKING:\n +__call__ = forward", ast.unparse(node)), f"{path.name}: {node.name}"
    assert {"MoELayer", "Router", "ExpertBank", "Linear", "Decoder", "RecordLinear"} <= set(seen)
