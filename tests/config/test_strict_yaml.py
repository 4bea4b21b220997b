"""A description says everything once, and a short one stays small."""

import pytest
import yaml

from manyhands.config.load import parse_run
from manyhands.config.strict_yaml import MOST_NODES, read_yaml
from manyhands.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, null, true]\nc: {d: e}\n",
        "base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\n",
        "base: &b {x: 1}\nother: &o {x: 5, z: 2}\nmine:\n  <<: [*b, *o]\n  w: 0\n",
        "a: {deep: {deeper: &b {x: 1}}}\nmine: {<<: *b}\n",
        "base: &b {x: 1, <<: {x: 2, y: 3}}\nmine: {<<: *b, z: 1}\n",
        "list: &l [1, 2]\nagain: *l\n",
        "",
        "# nothing\n",
        "? a\n: b\n",
        "2020-01-02: date\n",
        "text: |\n  lines\n  more\n",
    ],
)
def test_what_pyyaml_reads(text: str) -> None:
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("train: {seed: 1}\nmodel: {}\ntrain: {}\n", "line 3: 'train' is given twice, first in line 1"),
        ("train:\n  max_steps: 7\n  max_steps: 9\n", "line 3: 'max_steps' is given twice, first in line 2"),
        ("a: {b: 1, b: 1}", "'b' is given twice"),
        ("x: &x {<<: {a: 1}, <<: {b: 1}}", "'<<' is given twice"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
        ("a: &a {b: *a}", "an alias refers to a value that contains it"),
        ("a: &a {<<: *a}", "an alias refers to a value that contains it"),
        ("a: {<<: 3}", "expected a mapping or list of mappings"),
        ("[" * 2000, "deep"),
        ("{a: " * 2000, "deep"),
        ("- " * 2000 + "x", "deep"),
        ("x" * (1 << 20), "too long"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2020-99-99", "month must be in 1..12"),
        ("a: " + "9" * 5000, "digit"),
        ("a: [1, 2", "expected ',' or ']'"),
        ("{[1]: 2}", "unhashable"),
        ("a: 1\n---\nb: 2\n", "another document"),
    ],
)
def test_one_line_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_yaml(text)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def bomb(line: str, levels: int = 40) -> str:
    """Each level holds the one before it ten times."""
    return "a0: &a0 {x: 1}\n" + "".join(line.format(new=i, old=i - 1) + "\n" for i in range(1, levels))


@pytest.mark.parametrize(
    "line",
    [
        "a{new}: &a{new} {{<<: [*a{old}, *a{old}, *a{old}, *a{old}, *a{old}, *a{old}, *a{old}, *a{old}]}}",
        "a{new}: &a{new} [*a{old}, *a{old}, *a{old}, *a{old}, *a{old}]",
        "a{new}: &a{new} {{b: *a{old}, c: *a{old}, d: *a{old}}}",
        "a{new}: &a{new} {{? *a{old} : *a{old}}}",
    ],
)
def test_a_bomb_is_refused_before_it_unfolds(line: str) -> None:
    with pytest.raises(ValueError, match=f"more than {MOST_NODES:,} values"):
        read_yaml(bomb(line))


def test_a_run_file_and_an_override() -> None:
    with pytest.raises(ConfigError, match=r"mine: not valid YAML: line 2: 'train' is given twice"):
        parse_run("train: {seed: 1}\ntrain: {seed: 2}", "mine")
    with pytest.raises(ConfigError, match=r"is not a YAML value: line 1: 'a' is given twice"):
        parse_run("", "mine", ["data.x={a: 1, a: 2}"])
