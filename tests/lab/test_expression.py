"""Arithmetic over named quantities, and everything that it is not."""

import pytest

from manyhands.errors import ConfigError
from manyhands.lab.expression import evaluate

QUANTITIES = {"total": lambda name: {"a": 6.0, "b": 2.0}[name], "times": lambda name, n: 10.0 * n}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3", 3.0),
        ('total("a") / total("b")', 3.0),
        ('1 - total("b") * (2 + 0.5)', -4.0),
        ('times("a", 4)', 40.0),
    ],
)
def test_what_it_computes(expression: str, value: float) -> None:
    assert evaluate(expression, QUANTITIES) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ('totl("a")', "did you mean 'total'"),
        ("total(a)", "'a' is neither a name nor a number"),
        ("2 ** 3", "neither a number, a quantity nor arithmetic"),
        ("__import__('os').getcwd()", "neither a number"),
        ("[1]", "neither a number"),
        ('"a"', "neither a number"),
        ('total(name="a")', "neither a number"),
        ("1 +", "invalid syntax"),
    ],
)
def test_what_it_refuses(expression: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(expression, QUANTITIES)
