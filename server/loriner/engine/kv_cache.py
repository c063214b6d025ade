"""Blocks of KV cache: who holds which, and which hold a prefix that another sequence may reuse.

Knows token ids and digests, no tensors. A block's key is SHA-256 over the tenant salt, the adapter
generation and every token up to the block's end, so no adapter and no tenant ever reads another's
keys and values. Invariant: a block is either free or referenced, and a key names at most one block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from loriner.core import Sequence


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

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, sequence: Sequence) -> int:
        """Number of leading tokens already in the cache; at least one token is left to compute."""
        return len(self._matched(sequence)) * self.block_size

    def can_allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether `sequence` can hold its first `num_tokens` tokens, reusing what it can."""
        matched = [] if sequence.blocks else self._matched(sequence)
        held = len(sequence.blocks) + len(matched)
        matched_free = sum(1 for block in matched if self._references[block] == 0)
        return self._blocks_for(num_tokens) - held <= len(self._free) - matched_free

    def allocate(self, sequence: Sequence, num_tokens: int) -> None:
        """Give `sequence` blocks for its first `num_tokens` tokens; the first call takes over the
        cached prefix and sets `num_computed`."""
        assert self.can_allocate(sequence, num_tokens)
        if not sequence.blocks:
            matched = self._matched(sequence)
            for block in matched:
                self._take(block)
            sequence.blocks = matched
            sequence.num_computed = len(matched) * self.block_size
            if sequence.num_preemptions == 0:
                sequence.num_cached = sequence.num_computed
        while len(sequence.blocks) < self._blocks_for(num_tokens):
            block = next(iter(self._free))
            self._forget(block)
            self._take(block)
            sequence.blocks.append(block)

    def commit(self, sequence: Sequence) -> None:
        """Make the full blocks of computed tokens findable. Call after the step that computed
        them."""
        if not self.prefix_cache:
            return
        full = sequence.num_computed // self.block_size
        keys = self._keys(sequence, full)
        for block, key in zip(sequence.blocks[:full], keys, strict=True):
            if key not in self._block_of and block not in self._key_of:
                self._block_of[key] = block
                self._key_of[block] = key

    def free(self, sequence: Sequence) -> None:
        """Take all blocks back. Keyed ones stay findable until they are needed, oldest first."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
        sequence.blocks = []
        sequence.num_computed = 0

    def check_integrity(self) -> None:
        assert all((r == 0) == (b in self._free) for b, r in enumerate(self._references))
        assert {b: k for k, b in self._block_of.items()} == self._key_of

    def _matched(self, sequence: Sequence) -> list[int]:
        if not self.prefix_cache:
            return []
        blocks = []
        for key in self._keys(sequence, (len(sequence.token_ids) - 1) // self.block_size):
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the first `count` full blocks; the chain is kept on the sequence."""
        keys = sequence.hashes
        while len(keys) < count:
            start = len(keys) * self.block_size
            tokens = array("q", sequence.token_ids[start : start + self.block_size]).tobytes()
            parent = keys[-1] if keys else _root(sequence)
            keys.append(hashlib.sha256(parent + tokens).digest())
        return keys[:count]

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

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
