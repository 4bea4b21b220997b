"""A few hundred real examples that are on every machine: functions of the standard library, asked for by docstring.

The user gives a function's name, arguments and docstring, the assistant its code, as it stands in the library. Modules
are taken in the order of a hash of their names, and a few functions of each, with a docstring of a line or more and
code of a screen at most. So most are the same in every version of Python, and the others are few.
"""

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from manyhands.errors import DataError
from manyhands.text.corpus import files_of

STDLIB_ROWS = "stdlib-docstrings"
"""The name among data sources."""
_ROWS = 400
_OF_A_MODULE = 8
_LARGEST = 100_000  # bytes of a module: parsing all of the library takes seconds
_MOST_LINES = 24
_MOST_CHARACTERS = 900
"""Of the code."""
_DOCSTRING = range(30, 600)
"""Characters."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_rows(count: int = _ROWS) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The names (`textwrap.dedent`) and messages of `count` functions.

    Raises `DataError` where the sources are not there.
    """
    found: set[str] = set()
    for path, file in sorted(files_of("stdlib")[0], key=lambda pair: _hash(pair[1])):
        try:
            source = path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST else ""
            with warnings.catch_warnings():  # of escapes in old code
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (OSError, ValueError, SyntaxError):  # a file that is no module
            continue
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        lines = source.splitlines()
        pairs = {name: pair for name, function in _functions(tree, module) if (pair := _pair(function, lines))}
        for name in sorted(pairs, key=_hash)[:_OF_A_MODULE]:
            found.add(name)
            asked, code = pairs[name]
            yield name, [{"role": "user", "content": asked}, {"role": "assistant", "content": code}]
            if len(found) == count:
                return
    if not found:
        raise DataError(f"{STDLIB_ROWS}: no functions in {Path(sysconfig.get_paths()['stdlib'])}; name files instead")


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _functions(tree: ast.Module, module: str) -> Iterator[tuple[str, _Function]]:
    """Of the module and of its classes, by their full names; what is private or special is left out."""
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{module}.{node.name}" if isinstance(node, ast.ClassDef) else module
        for function in inside:
            if isinstance(function, _Function) and not function.name.startswith("_"):
                yield f"{prefix}.{function.name}", function


def _pair(function: _Function, lines: list[str]) -> tuple[str, str] | None:
    """What is asked and the code, without its docstring; None where it is not a fair question."""
    docstring = ast.get_docstring(function)
    if docstring is None or len(docstring) not in _DOCSTRING or len(function.body) == 1 or function.end_lineno is None:
        return None
    first, told = function.lineno - 1, function.body[0]
    assert told.end_lineno is not None
    if told.end_lineno >= function.body[1].lineno:  # on one line with it
        return None
    rest = "\n".join(lines[told.end_lineno : function.end_lineno]).lstrip("\n")
    code = textwrap.dedent("\n".join([*lines[first : told.lineno - 1], rest]))
    if len(code) > _MOST_CHARACTERS or code.count("\n") >= _MOST_LINES or told.lineno - 1 <= first:
        return None
    head = f"{'async ' * isinstance(function, ast.AsyncFunctionDef)}def {function.name}({ast.unparse(function.args)})"
    return f"Write the Python function `{head}`.\n\n{docstring}", code + "\n"
