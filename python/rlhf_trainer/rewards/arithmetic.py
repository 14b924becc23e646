"""The value of an arithmetic expression, exactly, and of nothing else: Python's parser, and fractions."""

import ast
import operator
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ..errors import kind

MOST_CHARACTERS = 1000
MOST_BITS = 3000  # of a power, and of the result
MOST_NESTED = 600  # operators inside one another; Python's own limit may be changed by whoever is imported
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def value_of(expression: Any) -> Fraction:
    """The value of an expression of numbers, + - * / // % ** (or × ÷ ^) and parentheses, as Python orders them; a "="
    or "= ?" at its end is ignored. ValueError for everything else, and where it has no value or one too large."""
    if not isinstance(expression, str):
        raise ValueError(f"expected an expression as text, got {kind(expression)}")
    if len(expression) > MOST_CHARACTERS:
        raise ValueError(f"an expression may have {MOST_CHARACTERS} characters, got {len(expression)}")
    text = unicodedata.normalize("NFKC", expression).strip().rstrip("=? \t")
    for sign, python in {"×": "*", "·": "*", "÷": "/", "\N{MINUS SIGN}": "-", "^": "**"}.items():
        text = text.replace(sign, python)
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, text.strip())
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an arithmetic expression: {expression!r}") from error
    except ZeroDivisionError as error:
        raise ValueError(f"{expression!r} divides by zero") from error
    if bits_of(value) > MOST_BITS:
        raise ValueError(f"the value of {expression!r} has over {MOST_BITS} bits")
    return value


def _value(node: ast.expr, text: str, depth: int = 0) -> Fraction:
    if depth > MOST_NESTED:
        raise ValueError(f"an expression may nest {MOST_NESTED} operators")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        digits = ast.get_source_segment(text, node)
        if "e" in digits.lower():
            raise ValueError(f"numbers are written without an exponent, got {digits!r}")
        return Fraction(digits)  # a float has lost some
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _power(_value(node.left, text, depth + 1), _value(node.right, text, depth + 1))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return Fraction(
            OPERATORS[type(node.op)](_value(node.left, text, depth + 1), _value(node.right, text, depth + 1))
        )
    raise ValueError(f"not arithmetic: {ast.unparse(node)!r}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or bits_of(base) * abs(exponent) > MOST_BITS:
        raise ValueError(f"a power may have a whole exponent and {MOST_BITS} bits, got ({base}) ** ({exponent})")
    return base ** int(exponent)


def bits_of(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
