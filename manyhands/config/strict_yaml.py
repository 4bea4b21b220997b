"""YAML as a description needs it: no key twice, no endless nesting, nothing that a short text unfolds to.

PyYAML's safe loader keeps the last of two equal keys without a word, and copies what a merge key (`<<`) refers to, so
that 570 bytes become gigabytes. It also lets impossible dates and endless integers escape as ValueError.
"""

from typing import Any

import yaml

MOST_CHARACTERS = 1 << 17
DEEPEST = 32
MOST_NODES = 1 << 14
"""Scalars, lists and mappings, each counted as often as an alias or a merge key repeats it."""


class _Strict(yaml.SafeLoader):
    """Refuses while it composes, before anything is built."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node of the document."""
        if self.depth > DEEPEST:
            raise _refusal(self.peek_event(), f"nested more than {DEEPEST} deep")  # type: ignore[no-untyped-call]
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        """The document, looked through."""
        node = super().get_single_node()
        if node is not None:
            _look_through(node, {})
        return node


def read_yaml(text: str) -> Any:
    """Plain values from YAML text. Raises `ValueError` with one line that says what is wrong and where."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters is too long, the most is {MOST_CHARACTERS:,}")
    try:
        loader = _Strict(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(where + " ".join(str(error.problem or error.context or error).split())[:200]) from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None


def _refusal(where: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _look_through(node: Any, known: dict[int, int | None]) -> int:
    """How many nodes this one is once its aliases are written out; `known` are those counted, None while inside one.

    Refuses too many, an alias inside what it names, and a mapping that has a key twice. A key that a merge brings may
    be given again, as YAML says.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise _refusal(node, "an alias refers to a value that contains it")
        return size
    known[id(node)] = None
    parts = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in node.value for part in pair]
    size = 1 + sum(_look_through(part, known) for part in parts)
    if size > MOST_NODES:
        raise _refusal(node, f"more than {MOST_NODES:,} values, with aliases and merge keys written out")
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            name = key.tag, key.value
            if name in lines:
                raise _refusal(key, f"{key.value!r} is given twice, first in line {lines[name]}")
            lines[name] = key.start_mark.line + 1
