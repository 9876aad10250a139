"""The fifteen tasks by name, in the order of the DAPE paper's table: by level of the Chomsky hierarchy."""

from __future__ import annotations

from dape_training.che import context_free as free
from dape_training.che import context_sensitive as sensitive
from dape_training.che import regular
from dape_training.che.expressions import ALPHABET, OPEN, UNKNOWN
from dape_training.che.task import Task, uniform


def _same(length: int) -> int:
    return length


def _one_more(length: int) -> int:
    return length + 1


_ALL = (
    Task("even_pairs", "Even Pairs", "R", 2, 2, uniform(2), regular.even_pairs),
    Task(
        "modular_arithmetic",
        "Modular Arithmetic (Simple)",
        "R",
        OPEN,
        5,
        regular.draw_modular_arithmetic,
        regular.modular_arithmetic,
    ),
    Task("parity_check", "Parity Check", "R", 2, 2, uniform(2), regular.parity_check, needs_position=False),
    Task(
        "cycle_navigation",
        "Cycle Navigation",
        "R",
        3,
        5,
        uniform(3),
        regular.cycle_navigation,
        needs_position=False,
    ),
    Task(
        "stack_manipulation",
        "Stack Manipulation",
        "DCF",
        5,
        3,
        free.draw_stack_manipulation,
        free.stack_manipulation,
        _one_more,
        terminated=True,
    ),
    Task("reverse_string", "Reverse String", "DCF", 2, 2, uniform(2), free.reverse_string, _same),
    Task(
        "modular_arithmetic_brackets",
        "Modular Arithmetic",
        "DCF",
        UNKNOWN,
        5,
        free.draw_modular_arithmetic_brackets,
        free.modular_arithmetic_brackets,
    ),
    Task(
        "solve_equation",
        "Solve Equation",
        "DCF",
        len(ALPHABET),
        5,
        free.draw_solve_equation,
        free.solve_equation,
    ),
    Task(
        "duplicate_string",
        "Duplicate String",
        "CS",
        2,
        2,
        uniform(2),
        sensitive.duplicate_string,
        lambda length: 2 * length,
    ),
    Task(
        "missing_duplicate",
        "Missing Duplicate",
        "CS",
        4,
        2,
        sensitive.draw_missing_duplicate,
        sensitive.missing_duplicate,
    ),
    Task("odds_first", "Odds First", "CS", 2, 2, uniform(2), sensitive.odds_first, _same),
    Task(
        "binary_addition",
        "Binary Addition",
        "CS",
        3,
        3,
        sensitive.draw_operation,
        sensitive.binary_addition,
        _one_more,
        terminated=True,
    ),
    Task(
        "binary_multiplication",
        "Binary Multiplication",
        "CS",
        3,
        3,
        sensitive.draw_operation,
        sensitive.binary_multiplication,
        _same,
        terminated=True,
        published=False,
    ),
    Task(
        "compute_sqrt",
        "Compute Sqrt",
        "CS",
        2,
        2,
        sensitive.draw_compute_sqrt,
        sensitive.compute_sqrt,
        lambda length: (length + 1) // 2,
    ),
    Task(
        "bucket_sort",
        "Bucket Sort",
        "CS",
        5,
        5,
        uniform(5),
        sensitive.bucket_sort,
        _same,
        needs_position=False,
    ),
)
TASKS = {task.name: task for task in _ALL}
