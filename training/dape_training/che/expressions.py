"""Expressions mod 5 with brackets: how they are written, drawn and evaluated.

    expression = d | -d | (d) | (-d) | (expression operator expression)

A symbol is a place in ALPHABET. Every operator stands in brackets of its own, so no precedence is needed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

ALPHABET = "01234+-*()x="
DIGITS = 5
MINUS, TIMES, OPEN, CLOSE, UNKNOWN, EQUALS = map(ALPHABET.index, "-*()x=")
OPERATIONS = {5: operator.add, MINUS: operator.sub, TIMES: operator.mul}


def draw_expression(generator: np.random.Generator, length: int, operators: int) -> list[int]:
    """Return an expression of `length` symbols, at least 1.

    From length 5 on it is (left operator right), the length of the left part uniform in 1 to length - 4.

    Args:
        generator: of the random numbers.
        length: of the expression.
        operators: how many of + - * are used.
    """
    if length < 5:
        digit = int(generator.integers(DIGITS))
        return [[digit], [MINUS, digit], [OPEN, digit, CLOSE], [OPEN, MINUS, digit, CLOSE]][length - 1]
    left = int(generator.integers(1, length - 3))
    return [
        OPEN,
        *draw_expression(generator, left, operators),
        DIGITS + int(generator.integers(operators)),
        *draw_expression(generator, length - 3 - left, operators),
        CLOSE,
    ]


def evaluate(expression: Sequence[int]) -> int:
    """Return the value of an expression mod 5."""
    value, _ = _evaluate(expression, 0)
    return value % 5


def _evaluate(expression: Sequence[int], place: int) -> tuple[int, int]:
    """Return the value of the part that begins at a place, and the place after it."""
    symbol = expression[place]
    if symbol < DIGITS:
        return symbol, place + 1
    if symbol == MINUS:
        return -expression[place + 1], place + 2
    left, place = _evaluate(expression, place + 1)
    if expression[place] == CLOSE:
        return left, place + 1
    operation = OPERATIONS[expression[place]]
    right, place = _evaluate(expression, place + 1)
    return operation(left, right) % 5, place + 1
