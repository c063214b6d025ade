"""Blocks of KV cache: who holds which, and which hold a prefix that another sequence may reuse.

Knows token ids and digests, no tensors. A block's key is SHA-256 over the tenant salt, the adapter
generation and every token up to the block's end, so no adapter and no tenant ever reads another's
keys and values. Invariant: a block is either free or referenced, a key names at most one block, and
no key is made of a token that is not known yet.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

import numpy as np

from loriner.core import Sequence
from loriner.engine.runs import LAST_ROWS


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}  # computed, full blocks
        self._block_of: dict[bytes, int] = {}
        self.table = np.zeros((16, 16), dtype=np.int32)  # [sequence.row] -> its blocks; grows
        self._free_rows = list(range(16))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, sequence: Sequence) -> int:
        """Number of leading tokens already in the cache; at least one token is left to compute,
        and all of a prompt that is read."""
        return len(self._matched(sequence)) * self.block_size

    def can_allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `sequence` can hold its first `num_tokens` tokens, reusing what it can."""
        return self.num_missing(sequence, num_tokens) <= 0

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """How many more blocks must be free before `can_allocate`; not above 0 when it is so."""
        if sequence.blocks:
            return self.num_needed(num_tokens) - len(sequence.blocks) - len(self._free)
        matched = self._matched(sequence)
        matched_free = sum(1 for block in matched if self._references[block] == 0)
        return self.num_needed(num_tokens) - len(matched) - (len(self._free) - matched_free)

    def num_needed(self, num_tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-num_tokens // self.block_size)

    def num_own(self, sequence: Sequence) -> int:
        """Blocks that nobody else holds: they fall free with it."""
        return sum(1 for block in sequence.blocks if self._references[block] == 1)

    def allocate(self, sequence: Sequence, num_tokens: int) -> None:
        """Give `sequence` blocks for its first `num_tokens` tokens; the first call takes over the
        cached prefix and sets `num_computed`."""
        assert self.can_allocate(sequence, num_tokens)
        if not sequence.blocks:
            self._begin(sequence)
        missing = self.num_needed(num_tokens) - len(sequence.blocks)
        if missing > 0:
            self._extend(sequence, [self._take_free() for _ in range(missing)])

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks of the first `num_tokens` tokens findable. Call after the step that
        computed them; looks at new blocks only."""
        sequence.num_settled = num_tokens
        full = num_tokens // self.block_size
        if not self.prefix_cache or full <= sequence.num_keyed:
            return
        keys = self._keys(sequence, full)
        for i in range(sequence.num_keyed, full):
            block, key = sequence.blocks[i], keys[i]
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key
        sequence.num_keyed = full

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back. Keyed ones stay findable until they are needed, oldest first."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
        if sequence.row >= 0:
            self._free_rows.append(sequence.row)
        sequence.blocks, sequence.row = [], -1
        sequence.num_computed = sequence.num_settled = sequence.num_keyed = 0

    def check_integrity(self) -> None:
        assert all((r == 0) == (b in self._free) for b, r in enumerate(self._references))
        assert {b: k for k, b in self._block_of.items()} == self._key_of

    def _begin(self, sequence: Sequence) -> None:
        """Take over the cached prefix, and a row of the table."""
        matched = self._matched(sequence)
        for block in matched:
            self._take(block)
        if not self._free_rows:
            num_rows = len(self.table)
            self.table = np.concatenate((self.table, np.zeros_like(self.table)))
            self._free_rows += range(num_rows, 2 * num_rows)
        sequence.row = self._free_rows.pop()
        self._extend(sequence, matched)
        count = len(matched) * self.block_size
        sequence.num_computed = sequence.num_settled = count
        sequence.num_keyed = len(matched)
        if sequence.num_preemptions == 0:
            sequence.num_cached = count

    def _extend(self, sequence: Sequence, blocks: list[int]) -> None:
        held = len(sequence.blocks)
        sequence.blocks += blocks
        while len(sequence.blocks) > self.table.shape[1]:
            self.table = np.concatenate((self.table, np.zeros_like(self.table)), axis=1)
        self.table[sequence.row, held : len(sequence.blocks)] = blocks

    def _matched(self, sequence: Sequence) -> list[int]:
        if not self.prefix_cache or sequence.reads_prompt:
            return []
        blocks = []
        left = 1 if sequence.num_output else min(LAST_ROWS, sequence.num_known)
        count = (sequence.num_known - left) // self.block_size
        for key in self._keys(sequence, count)[:count]:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """At least `count` keys of full blocks, from the first; the chain is kept on the
        sequence."""
        assert count * self.block_size <= sequence.num_known, "a key over an unknown token"
        keys = sequence.hashes
        while len(keys) < count:
            start = len(keys) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size]).tobytes()
            parent = keys[-1] if keys else _root(sequence)
            keys.append(hashlib.sha256(parent + tokens).digest())
        return keys

    def _take_free(self) -> int:
        block = next(iter(self._free))
        self._forget(block)
        self._take(block)
        return block

    def _take(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


def _root(sequence: Sequence) -> bytes:
    salt = hashlib.sha256(sequence.request.salt.encode()).digest()
    generation = hashlib.sha256((sequence.generation or "base").encode()).digest()
    return hashlib.sha256(salt + generation).digest()
