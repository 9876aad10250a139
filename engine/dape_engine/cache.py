"""The blocks of the KV cache: who holds which, which hold a findable prefix, which may be taken.

Blocks are numbers here; what they store is the kernels' business. A block is held (one or more
references), free and empty, or free with a findable prefix, the least recently used of which is
taken when no empty one is left. Only full blocks are findable, so a shared block is never written.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

from dape_engine.block_scores import BlockScores


class NoFreeBlocksError(RuntimeError):
    """All blocks are held."""


class CacheInvariantError(RuntimeError):
    """The books of the cache contradict themselves or those who hold its blocks."""


def extend_block_keys(
    keys: list[bytes], tokens: Sequence[int], block_size: int, count: int, salt: str = ""
) -> None:
    """Append to the keys of the first blocks of `tokens` until there are `count`.

    A key is a SHA-256 over the key of the block before, or the salt, and the block's own tokens, so that
    equal keys mean equal salts and equal tokens from the first one on. Known keys are not computed again.
    """
    for index in range(len(keys), count):
        own = array("q", tokens[index * block_size : (index + 1) * block_size])
        before = keys[-1] if keys else sha256(salt.encode()).digest()
        keys.append(sha256(before + own.tobytes()).digest())


class BlockPool:
    """References to the blocks 0 to num_blocks - 1 and an index of the prefixes they hold."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._scores: dict[int, BlockScores] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._reusable: OrderedDict[int, bytes] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without a findable prefix."""
        return len(self._empty) + len(self._reusable)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that have a findable prefix."""
        return len(self._reusable)

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int:
        """Take one block with one reference; its former content is forgotten.

        Raises:
            NoFreeBlocksError: all blocks are held.
        """
        if self._empty:
            block = self._empty.pop()
        elif self._reusable:
            block, key = self._reusable.popitem(last=False)
            del self._index[key]
            self._keys[block] = None
            self._scores.pop(block, None)
        else:
            raise NoFreeBlocksError(f"all {self.num_blocks} cache blocks are held")
        self._references[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, in the order of its tokens.

        Its last blocks are taken again before its first ones, which more prompts share.

        Raises:
            CacheInvariantError: a block is not held.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise CacheInvariantError(f"block {block} is released but nobody holds it")
            self._references[block] -= 1
            if self._references[block] == 0:
                key = self._keys[block]
                if key is None:
                    self._empty.append(block)
                else:
                    self._reusable[block] = key

    def match_prefix(self, keys: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known run of keys, with one reference taken to each."""
        blocks = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            if self._references[block] == 0:
                del self._reusable[block]
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def register(self, block: int, key: bytes) -> None:
        """Make a held block, now full, findable; where the key is known already, nothing changes.

        Raises:
            CacheInvariantError: the block is not held, or is known under another key.
        """
        if self._references[block] < 1:
            raise CacheInvariantError(f"block {block} is registered but nobody holds it")
        if self._keys[block] not in (None, key):
            raise CacheInvariantError(f"block {block} is registered with a second content")
        if key not in self._index:
            self._index[key] = block
            self._keys[block] = key

    def forget(self, blocks: Sequence[int]) -> None:
        """Make blocks unfindable whose content is in doubt, except those that others read as well."""
        for block in blocks:
            key = self._keys[block]
            if key is not None and self._references[block] == 1:
                del self._index[key]
                self._keys[block] = None
                self._scores.pop(block, None)

    def keep_scores(self, key: bytes, scores: BlockScores) -> None:
        """Keep log-probabilities for as long as the block of a key is findable, the widest ones given."""
        block = self._index.get(key)
        if block is None:
            return
        known = self._scores.get(block)
        if known is None or known.top < scores.top:
            self._scores[block] = scores

    def scores(self, key: bytes) -> BlockScores | None:
        """Return what is kept with the block of a key."""
        block = self._index.get(key)
        return None if block is None else self._scores.get(block)

    def check_invariants(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with each other and with the block tables of all that hold blocks.

        Raises:
            CacheInvariantError: names the blocks and the facts that disagree.
        """
        held = Counter(block for table in tables for block in table)
        empty = Counter(self._empty)
        for block, (references, key) in enumerate(zip(self._references, self._keys, strict=True)):
            free, known = references == 0, key is not None
            reusable = block in self._reusable
            complaints = (
                (references != held[block], "references differ from the block tables"),
                (empty[block] != (free and not known), "the list of empty blocks is wrong"),
                (reusable != (free and known), "the list of reusable blocks is wrong"),
                (references > 1 and not known, "a block that may still be written is shared"),
                (key is not None and self._index.get(key) != block, "the index does not lead to the block"),
                (key is None and block in self._scores, "log-probabilities are kept with an unknown content"),
            )
            for wrong, complaint in complaints:
                if wrong:
                    raise CacheInvariantError(
                        f"{complaint}; block {block}: {references} references, held {held[block]} times, "
                        f"{empty[block]} times among the empty, reusable {reusable}, content known {known}"
                    )
        findable = self.num_blocks - self._keys.count(None)
        if len(self._index) != findable:
            raise CacheInvariantError(f"{len(self._index)} index entries for {findable} known blocks")
