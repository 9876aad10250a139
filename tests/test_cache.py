"""Blocks are lent, shared, found again and taken in the right order, whatever the order of events."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from dape_engine.cache import BlockPool, CacheInvariantError, NoFreeBlocksError, extend_block_keys

SIZE = 3


def keys_of(tokens: list[int], block_size: int = SIZE) -> list[bytes]:
    keys: list[bytes] = []
    extend_block_keys(keys, tokens, block_size, len(tokens) // block_size)
    return keys


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Compute a whole prompt: take blocks for it and make the full ones findable."""
    blocks = [pool.allocate() for _ in range(pool.blocks_for(len(tokens)))]
    for block, key in zip(blocks, keys_of(tokens, pool.block_size), strict=False):
        pool.register(block, key)
    return blocks


def test_a_key_stands_for_every_token_up_to_the_end_of_its_block() -> None:
    ab = keys_of([1, 2, 3, 4, 5, 6])
    assert keys_of([1, 2, 3, 4, 5, 7])[0] == ab[0]
    assert keys_of([1, 2, 3, 4, 5, 7])[1] != ab[1]
    assert keys_of([9, 2, 3, 4, 5, 6])[1] != ab[1]
    assert keys_of([4, 5, 6])[0] != ab[1]


def test_known_keys_are_continued_not_computed_again() -> None:
    tokens = list(range(12))
    keys = [b"known", *keys_of(tokens)[1:2]]
    extend_block_keys(keys, tokens, SIZE, 4)
    assert keys[0] == b"known"
    assert keys[2:] == keys_of(tokens)[2:]


def test_a_second_prompt_shares_the_full_blocks_of_the_common_prefix() -> None:
    pool = BlockPool(8, SIZE)
    first = fill(pool, [1, 2, 3, 4, 5, 6, 7])
    shared = pool.match_prefix(keys_of([1, 2, 3, 4, 5, 6, 8, 8, 8]))
    assert shared == first[:2]
    pool.check_invariants([first, shared])
    pool.release(first)
    pool.check_invariants([shared])
    assert pool.num_free == 6


def test_equal_tokens_after_a_different_beginning_are_another_block() -> None:
    pool = BlockPool(4, SIZE)
    fill(pool, [1, 2, 3, 4, 5, 6])
    assert pool.match_prefix(keys_of([4, 5, 6])) == []
    assert pool.match_prefix(keys_of([0, 0, 0, 4, 5, 6])) == []


def test_empty_blocks_go_first_then_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(6, SIZE)
    old, new = fill(pool, [1] * 6), fill(pool, [2] * 6)
    pool.release(old)
    pool.release(new)
    assert (pool.num_free, pool.num_cached) == (6, 4)
    taken = [pool.allocate() for _ in range(4)]
    assert set(taken[:2]) == {4, 5}
    assert taken[2:] == [old[1], old[0]]
    assert pool.match_prefix(keys_of([1] * 6)) == []
    assert pool.match_prefix(keys_of([2] * 6)) == new


def test_use_makes_a_prefix_recent() -> None:
    pool = BlockPool(2, SIZE)
    for tokens in ([1] * 3, [2] * 3):
        pool.release(fill(pool, tokens))
    pool.release(pool.match_prefix(keys_of([1] * 3)))
    pool.allocate()
    assert pool.match_prefix(keys_of([2] * 3)) == []
    assert len(pool.match_prefix(keys_of([1] * 3))) == 1


def test_the_first_of_two_equal_blocks_stays_the_one_that_is_found() -> None:
    pool = BlockPool(3, SIZE)
    first, second = fill(pool, [1, 2, 3]), fill(pool, [1, 2, 3])
    pool.check_invariants([first, second])
    pool.release(second)
    assert pool.num_cached == 0
    pool.release(first)
    assert pool.num_cached == 1
    assert pool.match_prefix(keys_of([1, 2, 3])) == first


def test_misuse_is_an_error_that_names_the_block() -> None:
    pool = BlockPool(1, SIZE)
    block = pool.allocate()
    with pytest.raises(NoFreeBlocksError, match="all 1 cache blocks"):
        pool.allocate()
    pool.register(block, b"a")
    with pytest.raises(CacheInvariantError, match="block 0 is registered with a second content"):
        pool.register(block, b"b")
    pool.release([block])
    with pytest.raises(CacheInvariantError, match="block 0 is released"):
        pool.release([block])
    with pytest.raises(CacheInvariantError, match="block 0 is registered but nobody"):
        pool.register(block, b"a")


def test_the_checker_finds_a_leaked_and_a_lost_block() -> None:
    pool = BlockPool(2, SIZE)
    block = pool.allocate()
    with pytest.raises(CacheInvariantError, match=f"block {block}: 1 references, held 0 times"):
        pool.check_invariants([])
    with pytest.raises(CacheInvariantError, match=f"block {block}: 1 references, held 2 times"):
        pool.check_invariants([[block], [block]])
    pool.check_invariants([[block]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool._empty.append(0), "list of empty blocks"),
        (lambda pool: pool._reusable.clear(), "list of reusable blocks"),
        (lambda pool: pool._index.clear(), "index does not lead"),
        (lambda pool: pool._index.update(x=1), "2 index entries for 1"),
        (lambda pool: pool._references.__setitem__(1, 2), "may still be written is shared"),
    ],
)
def test_the_checker_finds_books_that_disagree(damage, message) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(3, SIZE)
    pool.release(fill(pool, [1, 2, 3]))
    own = [pool.allocate()]
    tables = [own, own] if "shared" in message else [own]
    damage(pool)
    with pytest.raises(CacheInvariantError, match=message):
        pool.check_invariants(tables)


class PoolMachine(RuleBasedStateMachine):
    """Prompts over two tokens come and go; a shadow memory knows what each block really holds."""

    held = Bundle("held")

    @initialize(num_blocks=st.integers(1, 9), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.memory: dict[int, tuple[int, ...]] = {}
        self.tables: list[list[int]] = []

    @rule(target=held, tokens=st.lists(st.integers(0, 1), max_size=9))
    def take(self, tokens: list[int]) -> list[int]:
        """Find what is known of a prompt and compute the rest, as far as there are blocks."""
        size = self.pool.block_size
        keys = keys_of(tokens, size)
        blocks = self.pool.match_prefix(keys)
        for index, block in enumerate(blocks):
            assert self.memory[block] == tuple(tokens[: (index + 1) * size])
        while len(blocks) < self.pool.blocks_for(len(tokens)) and self.pool.num_free:
            block = self.pool.allocate()
            assert all(block not in table for table in self.tables)
            blocks.append(block)
            self.memory[block] = tuple(tokens[: len(blocks) * size])
            if len(blocks) <= len(keys):
                self.pool.register(block, keys[len(blocks) - 1])
        self.tables.append(blocks)
        return blocks

    @rule(table=consumes(held))
    def give_back(self, table: list[int]) -> None:
        self.tables = [other for other in self.tables if other is not table]
        self.pool.release(table)

    @precondition(lambda self: self.pool.num_free == 0)
    @rule()
    def nothing_left(self) -> None:
        with pytest.raises(NoFreeBlocksError):
            self.pool.allocate()

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_invariants(self.tables)
        in_use = {block for table in self.tables for block in table}
        assert self.pool.num_free == self.pool.num_blocks - len(in_use)

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        self.pool.check_invariants([])
        assert self.pool.num_free == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, derandomize=True, deadline=None)
