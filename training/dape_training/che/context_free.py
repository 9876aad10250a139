"""The deterministic context-free tasks: a stack is enough for them."""

from __future__ import annotations

import numpy as np

from dape_training.che.expressions import DIGITS, EQUALS, UNKNOWN, draw_expression, evaluate
from dape_training.che.task import END, Symbols

POP, PUSH_0 = 2, 3


def draw_stack_manipulation(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """A stack of c bits, the bottom first, then length - c actions 2, 3, 4 (pop, push 0, push 1).

    c is uniform in 1 to length - 1; a string of length 1 is one bit without actions.
    """
    bits = generator.integers(2, size=(count, length))
    actions = generator.integers(POP, PUSH_0 + 2, size=(count, length))
    height = generator.integers(1, max(2, length), size=(count, 1))
    return np.where(np.arange(length) < height, bits, actions)


def stack_manipulation(inputs: Symbols) -> Symbols:
    """The stack after all actions from the top, then END, then zeros up to length + 1.

    A bit of the first stack acts as a push of it. A pop of an empty stack does nothing.
    """
    count, length = inputs.shape
    rows = np.arange(count)
    stack = np.zeros((count, length), dtype=np.int64)
    height = np.zeros(count, dtype=np.int64)
    for symbol in inputs.T:
        pop = symbol == POP
        stack[rows, np.where(pop, 0, height)] = np.where(pop, stack[:, 0], symbol % PUSH_0)
        height = np.where(pop, np.maximum(height - 1, 0), height + 1)
    place = height[:, None] - 1 - np.arange(length + 1)
    bits = np.take_along_axis(stack, np.maximum(place, 0), 1)
    return np.where(place >= 0, bits, np.where(place == -1, END, 0))


def reverse_string(inputs: Symbols) -> Symbols:
    """Bits to the same bits from the last to the first."""
    return inputs[:, ::-1].copy()


def draw_modular_arithmetic_brackets(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """Expressions with brackets and + - *."""
    return np.array([draw_expression(generator, length, operators=3) for _ in range(count)])


def modular_arithmetic_brackets(inputs: Symbols) -> Symbols:
    """An expression with brackets to its value mod 5."""
    return np.array([[evaluate(row)] for row in inputs.tolist()])


def draw_solve_equation(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """An expression of length - 2 symbols with + and - only, one digit of it replaced by x, "=", its value.

    The replaced digit is the first one from a uniform place on, going round at the end. Below length 3 there
    is no room for an equation: all zeros.
    """
    if length < 3:
        return np.zeros((count, length), dtype=np.int64)
    return np.array([_equation(generator, length) for _ in range(count)])


def _equation(generator: np.random.Generator, length: int) -> list[int]:
    expression = draw_expression(generator, length - 2, operators=2)
    value = evaluate(expression)
    place = int(generator.integers(len(expression)))
    while expression[place] >= DIGITS:
        place = (place + 1) % len(expression)
    expression[place] = UNKNOWN
    return [*expression, EQUALS, value]


def solve_equation(inputs: Symbols) -> Symbols:
    """An equation to the digit that x stands for; 0 below length 3.

    The left side is linear in x with slope 1 or -1, so its values at 0 and 1 say all.
    """
    if inputs.shape[1] < 3:
        return np.zeros((len(inputs), 1), dtype=np.int64)
    return np.array([[_root(row)] for row in inputs.tolist()])


def _root(equation: list[int]) -> int:
    *expression, _, value = equation
    at_0, at_1 = (evaluate([x if s == UNKNOWN else s for s in expression]) for x in (0, 1))
    return (at_1 - at_0) * (value - at_0) % 5
