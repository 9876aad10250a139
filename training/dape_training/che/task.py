"""What a CHE task is: a way to draw inputs, and the rule that answers them.

Strings are rows of small integers. A string of length l has an answer whose length depends on l alone.
Letters: B strings, l input length, m answer length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.int64]
END = 2
"""Ends the answers of tasks that are `terminated`."""
Level = Literal["R", "DCF", "CS"]
"""Regular, deterministic context-free, context-sensitive."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Strings of one length with their answers."""

    inputs: Symbols  # [B, l]
    targets: Symbols  # [B, m]
    scored: npt.NDArray[np.bool_]  # [B, m]; what follows the end of an answer is not scored


def one_symbol(_: int) -> int:
    """Return the answer length of tasks that answer with one symbol."""
    return 1


@dataclass(frozen=True, slots=True)
class Task:
    """One task of Delétang et al. 2023, in the set-up of Ruoss et al. 2023."""

    name: str
    title: str
    level: Level
    input_symbols: int
    output_symbols: int
    draw: Callable[[np.random.Generator, int, int], Symbols]
    """(generator, B, l) -> inputs [B, l]; some tasks shorten l by one."""
    solve: Callable[[Symbols], Symbols]
    """inputs [B, l] -> targets [B, m]: the rule."""
    answer_length: Callable[[int], int] = one_symbol
    """l -> m."""
    terminated: bool = False
    """Whether answers stop at `END` and are filled up with zeros, which are not scored."""
    needs_position: bool = True
    """False where the answer does not change when the input is shuffled."""
    published: bool = True
    """Whether the DAPE paper reports it."""

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 1/2 or 1/5. The end symbol of terminated answers counts as no choice."""
        return 1 / (self.output_symbols - self.terminated)

    def sample(self, generator: np.random.Generator, count: int, length: int) -> Examples:
        """Draw strings and answer them.

        Args:
            generator: the only source of randomness.
            count: B, how many.
            length: l, at least 1.

        Raises:
            ValueError: a number is below 1.
        """
        for name, value in (("count", count), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        inputs = self.draw(generator, count, length)
        targets = self.solve(inputs)
        scored = np.ones(targets.shape, dtype=np.bool_)
        if self.terminated:
            scored = np.arange(targets.shape[1]) <= (targets == END).argmax(1)[:, None]
        return Examples(inputs, targets, scored)


def uniform(symbols: int) -> Callable[[np.random.Generator, int, int], Symbols]:
    """Return a `Task.draw` of independent symbols, all equally likely."""

    def draw(generator: np.random.Generator, count: int, length: int) -> Symbols:
        return generator.integers(symbols, size=(count, length))

    return draw
