"""Arithmetic over named quantities: `weights("kimi-k2.5", "bf16") / 1e12`. Nothing else is understood."""

import ast
import operator
from collections.abc import Callable, Mapping

from manyhands.config import suggest
from manyhands.errors import ConfigError

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str, quantities: Mapping[str, Callable[..., float]]) -> float:
    """The value of numbers, `quantities` called with names and numbers, + - * / and parentheses.

    Raises `ConfigError` for anything else, and for an unknown quantity with the nearest name.
    """
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"{expression!r}: {error.msg}") from None
    return _value(tree.body, expression, quantities)


def _value(node: ast.expr, whole: str, quantities: Mapping[str, Callable[..., float]]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, whole, quantities), _value(right, whole, quantities))
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]):
            if name not in quantities:
                raise ConfigError(f"{whole!r}: unknown quantity {name!r}; {suggest(name, [*quantities])}")
            return float(quantities[name](*(_argument(argument, whole) for argument in given)))
    raise ConfigError(f"{whole!r}: {ast.unparse(node)!r} is neither a number, a quantity nor arithmetic with them")


def _argument(node: ast.expr, whole: str) -> str | int | float:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        return node.value
    raise ConfigError(f"{whole!r}: {ast.unparse(node)!r} is neither a name nor a number")
