"""The regular tasks: a finite automaton can do them."""

from __future__ import annotations

import numpy as np

from dape_training.che.expressions import DIGITS, MINUS, TIMES
from dape_training.che.task import Symbols


def even_pairs(inputs: Symbols) -> Symbols:
    """Bits to the number of unequal neighbours mod 2, which is 1 where the first bit is not the last."""
    return inputs[:, :1] ^ inputs[:, -1:]


def parity_check(inputs: Symbols) -> Symbols:
    """Bits to the number of ones mod 2."""
    return _total(inputs) % 2


def cycle_navigation(inputs: Symbols) -> Symbols:
    """Steps 0, 1, 2 (back, stay, forth) to the place on a cycle of 5 after them, starting at place 0."""
    return _total(inputs - 1) % 5


def draw_modular_arithmetic(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """Digits 0 to 4 at even places, + - * between them; an even length is made odd by taking one away."""
    inputs = generator.integers(DIGITS, size=(count, length - 1 + length % 2))
    inputs[:, 1::2] = generator.integers(DIGITS, TIMES + 1, size=inputs[:, 1::2].shape)
    return inputs


def modular_arithmetic(inputs: Symbols) -> Symbols:
    """An expression without brackets to its value mod 5; * goes before + and -."""
    total, product = np.zeros_like(inputs[:, 0]), inputs[:, 0]
    for operator, digit in zip(inputs[:, 1::2].T, inputs[:, 2::2].T, strict=True):
        times = operator == TIMES
        total = np.where(times, total, total + product)
        product = np.where(times, product * digit % 5, np.where(operator == MINUS, -digit, digit))
    return ((total + product) % 5)[:, None]


def _total(inputs: Symbols) -> Symbols:
    total: Symbols = inputs.sum(1, keepdims=True)
    return total
