"""The CHE tasks: hand-made examples of every rule, slow independent oracles, and the laws of the draws."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dape_training.che.expressions import ALPHABET, EQUALS, UNKNOWN, evaluate
from dape_training.che.task import END
from dape_training.che.tasks import TASKS

LENGTHS = [1, 2, 3, 4, 5, 6, 7, 12, 39, 40]


def symbols(text: str) -> list[int]:
    return [ALPHABET.index(letter) for letter in text]


def answer(task: str, row: list[int]) -> list[int]:
    targets: list[list[int]] = TASKS[task].solve(np.array([row])).tolist()
    return targets[0]


def digits(text: str) -> list[int]:
    return [int(letter) for letter in text]


@pytest.mark.parametrize(
    ("task", "given_", "expected"),
    [
        ("even_pairs", "1", "0"),
        ("even_pairs", "01", "1"),
        ("even_pairs", "0110", "0"),  # 01, 10 are unequal: two
        ("even_pairs", "0010", "0"),
        ("even_pairs", "0111", "1"),
        ("parity_check", "1", "1"),
        ("parity_check", "0110", "0"),
        ("cycle_navigation", "1", "0"),
        ("cycle_navigation", "0", "4"),
        ("cycle_navigation", "222222", "1"),
        ("cycle_navigation", "2001", "4"),
        ("stack_manipulation", "1", "12"),
        ("stack_manipulation", "02", "200"),
        ("stack_manipulation", "14", "112"),
        ("stack_manipulation", "0222", "20000"),  # a pop of an empty stack does nothing
        ("stack_manipulation", "02242", "200000"),
        ("stack_manipulation", "0110422", "11020000"),
        ("stack_manipulation", "110334", "1000112"),
        ("reverse_string", "1", "1"),
        ("reverse_string", "0010111", "1110100"),
        ("duplicate_string", "1", "11"),
        ("duplicate_string", "011", "011011"),
        ("missing_duplicate", "1", "1"),
        ("missing_duplicate", "20", "0"),
        ("missing_duplicate", "12", "1"),
        ("missing_duplicate", "01100210", "1"),
        ("missing_duplicate", "1011213", "0"),
        ("missing_duplicate", "213", "1"),
        ("odds_first", "1", "1"),
        ("odds_first", "01", "01"),
        ("odds_first", "000100", "000010"),  # the DAPE paper's example: aaabaa to aaaaba
        ("odds_first", "10101", "11100"),
        ("odds_first", "1000", "1000"),
        ("binary_addition", "0", "02"),
        ("binary_addition", "00", "020"),
        ("binary_addition", "10", "120"),
        ("binary_addition", "01", "012"),
        ("binary_addition", "121", "0120"),  # 1 + 1 = 2
        ("binary_addition", "001201101", "0101120000"),  # 4 + 22 = 26
        ("binary_addition", "11121", "000120"),  # 7 + 1 = 8
        ("binary_addition", "1002010", "11200000"),  # 1 + 2 = 3, zeros at the end are not written
        ("binary_multiplication", "0", "2"),
        ("binary_multiplication", "01", "02"),
        ("binary_multiplication", "121", "120"),
        ("binary_multiplication", "001201101", "000110120"),  # 4 * 22 = 88
        ("binary_multiplication", "1112111", "1000112"),  # 7 * 7 = 49
        ("compute_sqrt", "1", "1"),
        ("compute_sqrt", "11", "1"),
        ("compute_sqrt", "100", "10"),
        ("compute_sqrt", "111", "10"),
        ("compute_sqrt", "100010", "101"),  # 34: the floor of 5.83
        ("compute_sqrt", "100101", "110"),  # 37
        ("compute_sqrt", "0000001", "0001"),
        ("bucket_sort", "4", "4"),
        ("bucket_sort", "421302214", "011222344"),
    ],
)
def test_hand_made_examples(task: str, given_: str, expected: str) -> None:
    assert answer(task, digits(given_)) == digits(expected)


@pytest.mark.parametrize(
    ("task", "given_", "expected"),
    [
        ("modular_arithmetic", "3", 3),
        ("modular_arithmetic", "1-4", 2),
        ("modular_arithmetic", "2+3*4", 4),
        ("modular_arithmetic", "2*3+4", 0),
        ("modular_arithmetic", "1-2*3*4-1", 1),
        ("modular_arithmetic_brackets", "3", 3),
        ("modular_arithmetic_brackets", "-3", 2),
        ("modular_arithmetic_brackets", "(4)", 4),
        ("modular_arithmetic_brackets", "(-4)", 1),
        ("modular_arithmetic_brackets", "(2--3)", 0),
        ("modular_arithmetic_brackets", "(-3*2)", 4),
        ("modular_arithmetic_brackets", "((1-2)*(-3))", 3),
        ("modular_arithmetic_brackets", "((4)-(2*3))", 3),
        ("solve_equation", "0", 0),
        ("solve_equation", "00", 0),
        ("solve_equation", "x=3", 3),
        ("solve_equation", "-x=3", 2),
        ("solve_equation", "(x)=4", 4),
        ("solve_equation", "(1-x)=4", 2),
        ("solve_equation", "((2-x)+(1-(-3)))=0", 1),
        ("solve_equation", "(3-(1-x))=1", 4),
    ],
)
def test_hand_made_expressions(task: str, given_: str, expected: int) -> None:
    assert answer(task, symbols(given_)) == [expected]


def oracle(task: str, row: list[int]) -> list[int]:
    """The rules once more, as slow as they come and without NumPy."""
    size, half = len(row), len(row) // 2
    text = "".join(ALPHABET[symbol] for symbol in row)
    match task:
        case "even_pairs":
            return [sum(a != b for a, b in pairwise(row)) % 2]
        case "parity_check":
            return [row.count(1) % 2]
        case "cycle_navigation":
            place = 0
            for step in row:
                place = {0: place - 1, 1: place, 2: place + 1}[step] % 5
            return [place]
        case "modular_arithmetic" | "modular_arithmetic_brackets":
            return [eval(text) % 5]
        case "solve_equation":
            left, _, right = text.partition("=")
            return [next(x for x in range(5) if eval(left, {"x": x}) % 5 == int(right))] if right else [0]
        case "stack_manipulation":
            stack: list[int] = []
            for symbol in row:
                if symbol == 2:
                    stack = stack[:-1]
                else:
                    stack.append({0: 0, 1: 1, 3: 0, 4: 1}[symbol])
            return ended(stack[::-1], size + 1)
        case "reverse_string":
            return list(reversed(row))
        case "duplicate_string":
            return row + row
        case "missing_duplicate":
            copies = zip(row[:half], row[half : 2 * half], strict=True)
            return [min(pair) for pair in copies if 2 in pair] or [1]
        case "odds_first":
            odd = [symbol for place, symbol in enumerate(row, 1) if place % 2]
            return odd + [symbol for place, symbol in enumerate(row, 1) if not place % 2]
        case "binary_addition" | "binary_multiplication":
            numbers = [sum(int(b) << i for i, b in enumerate(part)) for part in text.split("2")]
            if task == "binary_addition":
                return ended(little_endian(sum(numbers)), size + 1)
            return ended(little_endian(math.prod(numbers)) if size > 2 else [0] * (size - 1), size)
        case "compute_sqrt":
            number, root = int(text, 2), 0
            for bit in reversed(range(size)):
                if (root + (1 << bit)) ** 2 <= number:
                    root += 1 << bit
            return digits(f"{root:b}".zfill(size - half))
        case "bucket_sort":
            return sorted(row)
    raise KeyError(task)


def little_endian(number: int) -> list[int]:
    return [number] if number < 2 else [number % 2, *little_endian(number // 2)]


def ended(symbols_: list[int], length: int) -> list[int]:
    return [*symbols_, END, *[0] * (length - len(symbols_) - 1)]


def test_all_fifteen_tasks_have_an_oracle_and_the_published_marks() -> None:
    assert len(TASKS) == 15
    assert {name for name, task in TASKS.items() if not task.published} == {"binary_multiplication"}
    invariant = {name for name, task in TASKS.items() if not task.needs_position}
    assert invariant == {"parity_check", "cycle_navigation", "bucket_sort"}
    fifths = {name for name, task in TASKS.items() if task.chance == 0.2}
    assert fifths == {
        *("modular_arithmetic", "cycle_navigation", "modular_arithmetic_brackets", "solve_equation"),
        "bucket_sort",
    }
    assert {task.chance for task in TASKS.values()} == {0.2, 0.5}


@pytest.mark.parametrize("task", TASKS)
@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 90), seed=st.integers(0, 2**32))
def test_answers_are_those_of_an_independent_oracle(task: str, length: int, seed: int) -> None:
    rule = TASKS[task]
    examples = rule.sample(np.random.default_rng(seed), 3, length)
    shortened = length - (task == "modular_arithmetic" and length % 2 == 0)
    assert examples.inputs.shape == (3, shortened)
    assert examples.targets.shape == examples.scored.shape == (3, rule.answer_length(length))
    assert examples.inputs.min() >= 0
    assert examples.inputs.max() < rule.input_symbols
    assert 0 <= examples.targets.min() <= examples.targets.max() < rule.output_symbols
    for row, target, scored in zip(
        examples.inputs.tolist(), examples.targets.tolist(), examples.scored.tolist(), strict=True
    ):
        assert target == oracle(task, row)
        last = target.index(END) if rule.terminated else len(target) - 1
        assert scored == [place <= last for place in range(len(target))]


@pytest.mark.parametrize("task", TASKS)
def test_long_strings_are_answered(task: str) -> None:
    examples = TASKS[task].sample(np.random.default_rng(1), 2, 500)
    for row, target in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True):
        assert target == oracle(task, row)


@pytest.mark.parametrize("task", TASKS)
def test_draws_come_from_the_generator_alone(task: str) -> None:
    first, again, other = (
        TASKS[task].sample(np.random.default_rng(seed), 20, 30).inputs.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(("count", "length", "name"), [(0, 4, "count"), (3, 0, "length"), (3, -1, "length")])
def test_impossible_sizes_are_refused(count: int, length: int, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got"):
        TASKS["even_pairs"].sample(np.random.default_rng(0), count, length)


def frequencies(values: list[object]) -> dict[object, float]:
    return {value: count / len(values) for value, count in Counter(values).items()}


def drawn(task: str, length: int, count: int = 4000) -> list[list[int]]:
    rows: list[list[int]] = TASKS[task].draw(np.random.default_rng(7), count, length).tolist()
    return rows


@pytest.mark.parametrize("task", ["even_pairs", "parity_check", "missing_duplicate", "cycle_navigation"])
@pytest.mark.parametrize("length", [20, 40])
def test_answers_are_balanced(task: str, length: int) -> None:
    """Uniform bits have even parity as often as odd; 20 steps of a cycle forget where they began."""
    examples = TASKS[task].sample(np.random.default_rng(3), 4000, length)
    shares = frequencies(examples.targets[:, 0].tolist())
    expected = TASKS[task].chance
    assert shares == {value: pytest.approx(expected, abs=0.03) for value in range(round(1 / expected))}


@pytest.mark.parametrize(("task", "count"), [("even_pairs", 2), ("cycle_navigation", 3), ("bucket_sort", 5)])
def test_plain_strings_are_uniform(task: str, count: int) -> None:
    for place in zip(*drawn(task, 4), strict=True):
        assert frequencies(list(place)) == {v: pytest.approx(1 / count, abs=0.03) for v in range(count)}


def test_operators_of_simple_modular_arithmetic_are_uniform() -> None:
    rows = drawn("modular_arithmetic", 5)
    for place in (1, 3):
        shares = frequencies([ALPHABET[row[place]] for row in rows])
        assert shares == {operator: pytest.approx(1 / 3, abs=0.03) for operator in "+-*"}
    assert frequencies([row[2] for row in rows]) == {d: pytest.approx(0.2, abs=0.03) for d in range(5)}


def test_first_stacks_are_uniformly_high_and_actions_uniform() -> None:
    rows = drawn("stack_manipulation", 5)
    heights = [next(i for i, symbol in enumerate([*row, 2]) if symbol > 1) for row in rows]
    assert frequencies(heights) == {height: pytest.approx(1 / 4, abs=0.03) for height in (1, 2, 3, 4)}
    assert all(min(row[height:]) > 1 for row, height in zip(rows, heights, strict=True))
    assert frequencies([row[-1] for row in rows]) == {a: pytest.approx(1 / 3, abs=0.03) for a in (2, 3, 4)}
    assert all(max(row) < 2 for row in drawn("stack_manipulation", 1))


def test_missing_symbols_are_anywhere() -> None:
    rows = drawn("missing_duplicate", 7)
    assert all(row.count(2) == 1 and row[-1] == 3 for row in rows)
    assert frequencies([row.index(2) for row in rows]) == {
        i: pytest.approx(1 / 6, abs=0.03) for i in range(6)
    }


def operator_place(expression: list[int]) -> int:
    """The place of the outermost operator: after a left part that is an expression itself."""
    return next(i for i in range(1, len(expression)) if complete(expression[1:i]))


def complete(part: list[int]) -> bool:
    text = "".join(ALPHABET[symbol] for symbol in part)
    return text not in ("", "-") and text.count("(") == text.count(")")


@pytest.mark.parametrize(("task", "length", "operators"), [("modular_arithmetic_brackets", 8, "+-*")])
def test_expressions_split_uniformly(task: str, length: int, operators: str) -> None:
    rows = drawn(task, length)
    places = [operator_place(row) for row in rows]
    assert frequencies([place - 1 for place in places]) == {
        left: pytest.approx(1 / 4, abs=0.03) for left in (1, 2, 3, 4)
    }
    used = frequencies([ALPHABET[row[place]] for row, place in zip(rows, places, strict=True)])
    assert used == {operator: pytest.approx(1 / len(operators), abs=0.03) for operator in operators}


def test_equations_hide_the_first_digit_from_a_uniform_place_on() -> None:
    """Of "(a+b)" the first digit is met from places 0, 1 and, going round, 4; the second from 2 and 3."""
    rows = drawn("solve_equation", 7)
    assert frequencies([row.index(UNKNOWN) for row in rows]) == {
        1: pytest.approx(3 / 5, abs=0.03),
        3: pytest.approx(2 / 5, abs=0.03),
    }
    assert all(row[5] == EQUALS and row.count(UNKNOWN) == 1 for row in rows)
    assert frequencies([ALPHABET[row[2]] for row in rows]) == {
        operator: pytest.approx(1 / 2, abs=0.03) for operator in "+-"
    }


@pytest.mark.parametrize("task", ["binary_addition", "binary_multiplication"])
def test_numbers_are_uniform_among_those_above_zero(task: str) -> None:
    rows = ["".join(map(str, row)) for row in drawn(task, 5, 8000)]
    firsts = Counter(row.index("2") for row in rows)
    assert {length: count / 8000 for length, count in firsts.items()} == {
        length: pytest.approx(1 / 3, abs=0.03) for length in (1, 2, 3)
    }
    threes = [row.split("2")[0] for row in rows if row.index("2") == 3]
    assert frequencies(threes) == {f"{number:03b}": pytest.approx(1 / 7, abs=0.03) for number in range(1, 8)}
    assert {row.split("2")[1] for row in rows if row.index("2") == 3} == {"1"}
    alone = frequencies(["".join(map(str, row)) for row in drawn(task, 2)])
    assert alone == {number: pytest.approx(1 / 3, abs=0.03) for number in ("00", "10", "01")}
    assert drawn(task, 1, 10) == [[0]] * 10


def test_roots_are_of_uniform_numbers_above_zero() -> None:
    shares = frequencies(["".join(map(str, row)) for row in drawn("compute_sqrt", 3)])
    assert shares == {f"{number:03b}": pytest.approx(1 / 7, abs=0.03) for number in range(1, 8)}


def test_evaluate_refuses_nothing_that_is_drawn() -> None:
    for length in LENGTHS:
        for row in drawn("modular_arithmetic_brackets", length, 20):
            assert evaluate(row) == eval("".join(ALPHABET[symbol] for symbol in row)) % 5
