"""The context-sensitive tasks: a tape as long as the input is enough for them.

Numbers of any size are Python integers, so no length overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dape_training.che.task import END, Symbols

SEPARATOR = 2
MISSING, FILLER = 2, 3


def duplicate_string(inputs: Symbols) -> Symbols:
    """Bits to the same bits twice."""
    return np.tile(inputs, 2)


def draw_missing_duplicate(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """length // 2 bits twice, one of all these symbols replaced by 2; an odd length ends in a 3.

    Length 1 has no room for a string: always the symbol 1.
    """
    if length == 1:
        return np.ones((count, 1), dtype=np.int64)
    half = length // 2
    inputs = np.full((count, length), FILLER)
    inputs[:, : 2 * half] = np.tile(generator.integers(2, size=(count, half)), 2)
    inputs[np.arange(count), generator.integers(2 * half, size=count)] = MISSING
    return inputs


def missing_duplicate(inputs: Symbols) -> Symbols:
    """A string twice with one symbol missing to that symbol, read from the other copy; length 1 to 1."""
    half = inputs.shape[1] // 2
    if half == 0:
        return np.ones_like(inputs)
    missing = (inputs == MISSING).argmax(1)[:, None]
    return np.take_along_axis(inputs, (missing + half) % (2 * half), 1)


def odds_first(inputs: Symbols) -> Symbols:
    """Bits to the 1st, 3rd, 5th, ... of them and then the 2nd, 4th, ..."""
    return np.concatenate([inputs[:, ::2], inputs[:, 1::2]], 1)


def draw_operation(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """Two numbers with a 2 between them, each little-endian and above 0, uniform among those of its length.

    The length of the first is uniform in 1 to length - 2. Up to length 2 there is one number alone, uniform
    from 0 to 2^length - 2.
    """
    if length <= 2:
        numbers = generator.integers(2**length - 1, size=(count, 1))
        return numbers >> np.arange(length) & 1
    split = generator.integers(1, length - 1, size=(count, 1))
    first = np.arange(length) < split
    second = np.arange(length) > split
    inputs = np.zeros((count, length), dtype=np.int64)
    while (zero := ~((inputs * first).any(1) & (inputs * second).any(1))).any():
        inputs[zero] = generator.integers(2, size=(int(zero.sum()), length))
    np.put_along_axis(inputs, split, SEPARATOR, 1)
    return inputs


def binary_addition(inputs: Symbols) -> Symbols:
    """The sum, little-endian without zeros at the end, then END, then zeros up to length + 1.

    A number alone (up to length 2) is its own answer; the number 0 is written as one 0.
    """
    length = inputs.shape[1]
    return _answers(inputs, length + 1, lambda *numbers: _digits(sum(numbers)))


def binary_multiplication(inputs: Symbols) -> Symbols:
    """The product, little-endian without zeros at the end, then END, then zeros up to length.

    Up to length 2 there is one number alone and no room for every answer: length - 1 zeros and END.
    """
    length = inputs.shape[1]
    if length <= 2:
        return _answers(inputs, length, lambda _: [0] * (length - 1))
    return _answers(inputs, length, lambda *numbers: _digits(math.prod(numbers)))


def draw_compute_sqrt(generator: np.random.Generator, count: int, length: int) -> Symbols:
    """A number above 0, big-endian, uniform among those of its length."""
    inputs = generator.integers(2, size=(count, length))
    while (zero := ~inputs.any(1)).any():
        inputs[zero] = generator.integers(2, size=(int(zero.sum()), length))
    return inputs


def compute_sqrt(inputs: Symbols) -> Symbols:
    """A number to the floor of its square root, big-endian, in half as many bits (rounded up)."""
    half = (inputs.shape[1] + 1) // 2
    roots = [_digits(math.isqrt(_number(row[::-1]))) for row in inputs.tolist()]
    return np.array([([*root, *[0] * half])[:half][::-1] for root in roots])


def bucket_sort(inputs: Symbols) -> Symbols:
    """Symbols 0 to 4 in ascending order."""
    return np.sort(inputs, 1)


def _answers(inputs: Symbols, length: int, answer: Callable[..., list[int]]) -> Symbols:
    """Apply a function to the numbers of every row; write its digits, END and zeros up to `length`."""
    rows = []
    for row in inputs.tolist():
        parts = [row]
        if SEPARATOR in row:
            split = row.index(SEPARATOR)
            parts = [row[:split], row[split + 1 :]]
        digits = [*answer(*map(_number, parts)), END]
        rows.append([*digits, *[0] * (length - len(digits))])
    return np.array(rows)


def _number(digits: list[int]) -> int:
    """Return the value of little-endian digits."""
    return int("".join(map(str, digits[::-1])), 2)


def _digits(number: int) -> list[int]:
    """Return the little-endian digits of a number, without zeros at the end; of 0, one 0."""
    return [int(digit) for digit in f"{number:b}"[::-1]]
