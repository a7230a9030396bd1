"""The calculator of grade-school mathematics."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

from conf.errors import ToolError

MAX_LENGTH = 200
"""Longest expression, in characters."""
MAX_BITS = 256
"""Largest whole number, about 1e77: beyond it arithmetic costs time and memory and answers no question."""
MAX_EXPONENT = 64
ONLY = "only numbers, + - * / // % ** and parentheses can be worked out"
ARITHMETIC = re.compile(r"[0-9\s+\-*/%().eE]*")
SPELLINGS = str.maketrans({",": "", "$": "", "^": "**", "\u00d7": "*", "\u00f7": "/"})
"""Thousands separators, currency signs and schoolbook operators, as the problems write them."""

BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (48 + 24) / 2.
    """
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"the expression has {len(expression)} characters, {MAX_LENGTH} is the most; split it up")
    plain = expression.translate(SPELLINGS).strip()
    if not ARITHMETIC.fullmatch(plain):
        raise ToolError(ONLY)
    try:
        value = _value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f'"{expression}" is not an arithmetic expression') from None
    except ZeroDivisionError:
        raise ToolError(f'"{expression}" divides by zero') from None
    except OverflowError:
        raise ToolError(f'"{expression}" is too large') from None
    return _number_text(value)


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in BINARY:
            return _bounded(BINARY[type(node.op)](left, right))
    raise ToolError(ONLY)


def _power(base: float, exponent: float) -> float:
    if abs(exponent) > MAX_EXPONENT:
        raise ToolError(f"the exponent {exponent} is too large, {MAX_EXPONENT} is the most")
    if base < 0 and exponent != int(exponent):
        raise ToolError(f"{base:g} has no real power {exponent:g}")
    return base**exponent


def _bounded(value: float) -> float:
    fits = value.bit_length() <= MAX_BITS if isinstance(value, int) else math.isfinite(value)
    if not fits:
        raise OverflowError
    return value


def _number_text(value: float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    # 12 digits hide the last bits of binary fractions: 0.1 + 0.2 is 0.3 to a pupil.
    return str(value) if isinstance(value, int) else f"{value:.12g}"
