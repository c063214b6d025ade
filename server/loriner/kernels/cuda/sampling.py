"""The GPU sampler: packs a step's parameters on the host, launches csrc/sampling.cu.

Semantics: engine/sampler.py without its penalties; this file does not know it and takes plain
values and arrays. Nothing here waits for the GPU, and one captured launch serves any parameters.
Invariant: a row's token is a function of its own logits and parameters alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loriner.kernels.cuda.launch import Device
from loriner.kernels.cuda.upload import Upload

SOURCE = "sampling.cu"
CLUSTER = 8  # blocks that share a row, from sm_90 on
THREADS = 384
BAR_THREADS = 256
FIXED_SMEM = 4096  # bytes of shared memory before a block's part of the row
MAX_TOP = 20  # the most log-probabilities a row can ask for
MAX_VOCAB = 1 << 18  # more could overflow the sum of masses
ENTRIES_PER_ROW = 1280  # room for biases and barred tokens, on average over the rows
_ALIGN = 32  # ids: segments begin on 128 bytes
WORD_BITS = 32  # of a mask

# One row's parameters, as `struct Row`. `scale` is log2(e) / temperature, 0 for greedy; `gap` is
# temperature * ln(min_p); entries are [first_entry, first_entry + num_entries) of the step's.
ROW = np.dtype(
    [
        ("seed", "<u8"),
        ("top_p", "<f8"),
        ("scale", "<f4"),
        ("gap", "<f4"),
        ("top_k", "<i4"),
        ("position", "<i4"),
        ("first_entry", "<i4"),
        ("num_entries", "<i4"),
        ("logprobs", "<i4"),
        ("live", "<i4"),
    ]
)
ENTRY = np.dtype([("id", "<i4"), ("add", "<f4")])  # added to one token's logit; -inf bars it

Records = NDArray[np.void]
Ints = NDArray[np.int32]
NO_LISTS: Mapping[int, Records] = {}


def describe(
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    logprobs: int | None = None,
) -> Records:
    """One sequence's parameters, [1] ROW: made once, then `Sheet.fill` adds what a step changes."""
    row = np.zeros(1, dtype=ROW)
    row["seed"] = seed & ((1 << 64) - 1)
    row["top_p"] = top_p
    row["scale"] = min(math.log2(math.e) / temperature, 1e38) if temperature > 0 else 0.0
    row["gap"] = temperature * math.log(min_p) if min_p > 0 else -math.inf
    row["top_k"] = min(top_k, 2**31 - 1)
    row["logprobs"] = -1 if logprobs is None else min(logprobs, MAX_TOP)
    row["live"] = 1
    return row


def adjustments(bias: Iterable[tuple[int, float]] = (), barred: Iterable[int] = ()) -> Records:
    """A row's list, [n] ENTRY, each id once: logit biases, and tokens that must not be chosen."""
    added: dict[int, float] = {}
    for token, add in bias:
        added[token] = added.get(token, 0.0) + add
    added |= dict.fromkeys(barred, -math.inf)
    return np.array(sorted(added.items()), dtype=ENTRY)


class Sheet:
    """One step's parameters on the host: a contiguous buffer of [max_rows] ROW, then ENTRYs."""

    def __init__(self, buffer: NDArray[np.uint8], max_rows: int) -> None:
        split = max_rows * ROW.itemsize
        self.rows: Records = buffer[:split].view(ROW)
        self.entries: Records = buffer[split:].view(ENTRY)

    @staticmethod
    def num_bytes(max_rows: int, max_entries: int) -> int:
        return max_rows * ROW.itemsize + max_entries * ENTRY.itemsize

    def fill(
        self, rows: Records, positions: Ints | Seq[int], lists: Mapping[int, Records] = NO_LISTS
    ) -> int:
        """rows [B] of `describe`; positions [B]: output tokens so far; lists: row -> adjustments.

        Rows behind B are padding. Returns the bytes in use, from the buffer's start. Raises
        ValueError when the lists are longer than the room for them.
        """
        if sum(map(len, lists.values())) > len(self.entries):
            raise ValueError(f"more than {len(self.entries)} biases and barred tokens in one step")
        self.rows[: len(rows)] = rows
        self.rows["position"][: len(rows)] = positions
        self.rows["live"][len(rows) :] = 0
        end = 0
        for row, entries in lists.items():
            self.rows["first_entry"][row] = end
            self.rows["num_entries"][row] = len(entries)
            self.entries[end : end + len(entries)] = entries
            end += len(entries)
        return self.num_bytes(len(self.rows), end)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a row of the vocabulary is cut."""

    cluster: int  # blocks a row
    segment: int  # ids a warp
    smem: int  # bytes a block

    @classmethod
    def of(cls, vocab: int, capability: tuple[int, int], max_smem: int) -> Plan:
        """Raises ValueError for a vocabulary that is too large."""
        if not 0 < vocab <= MAX_VOCAB:
            raise ValueError(f"the sampler cannot take a vocabulary of {vocab}")
        warps = THREADS // 32
        segment = -(-vocab // (CLUSTER * warps * _ALIGN)) * _ALIGN
        staged = FIXED_SMEM + segment * warps * 4
        if capability >= (9, 0) and staged <= max_smem:
            return cls(CLUSTER, segment, staged)
        return cls(1, -(-vocab // (warps * _ALIGN)) * _ALIGN, FIXED_SMEM)

    @property
    def padded(self) -> int:
        """Ids of all segments together, at least the vocabulary."""
        return self.segment * self.cluster * (THREADS // 32)


class Sampler:
    """Chooses the tokens of up to `max_rows` rows a step. Results stay on the GPU.

    `ids` is the first part of `results`, so one copy of a prefix brings what the step asked for.
    Memory: a bit for each row and token; before sm_90 a copy of the logits, too, 4 bytes x
    `max_rows` x vocabulary.
    """

    def __init__(self, device: Device, vocab: int, max_rows: int) -> None:
        self.plan = Plan.of(vocab, device.capability, device.max_smem)
        self.vocab, self.max_rows = vocab, max_rows
        module = device.module(SOURCE, CLUSTER=self.plan.cluster)
        self._sample = module.kernel("sample", smem=self.plan.smem)
        self._bar = module.kernel("bar")
        where = device.torch_device
        scratch = max_rows * self.plan.padded if self.plan.cluster == 1 else 1
        self._scratch = torch.empty(scratch, dtype=torch.float32, device=where)
        size = Sheet.num_bytes(max_rows, max_rows * ENTRIES_PER_ROW)
        self._parameters = Upload((size,), torch.uint8, where)
        self._sheets = [Sheet(buffer.numpy(), max_rows) for buffer in self._parameters.buffers]
        self._entries = self._parameters.tensor[max_rows * ROW.itemsize :]
        self.num_words = -(-vocab // WORD_BITS)
        # of a row: its number, then a bit for each token
        self._masks = Upload((max_rows, 1 + self.num_words), torch.int32, where)
        self._mask_rows = [buffer.numpy() for buffer in self._masks.buffers]
        self.results = torch.zeros(max_rows * (4 + 2 * MAX_TOP), dtype=torch.int32, device=where)
        sizes = [max_rows, max_rows, max_rows * MAX_TOP, max_rows * MAX_TOP, max_rows * 2]
        ids, logprobs, top_ids, top, cuts = torch.split(self.results, sizes)
        self.ids = ids  # [max_rows] i32; -1: the row's best logit is not finite, or padding
        self.logprobs = logprobs.view(torch.float32)  # [max_rows], where asked for
        self.top_ids = top_ids.view(max_rows, MAX_TOP)
        self.top_logprobs = top.view(torch.float32).view(max_rows, MAX_TOP)  # descending
        self.cuts = cuts.view(max_rows, 2)  # drawn rows: least kept value (f32), kept equals of it

    @property
    def num_bytes(self) -> int:
        """Of GPU memory."""
        held = (self._scratch, self._parameters.tensor, self._masks.tensor, self.results)
        return sum(tensor.nbytes for tensor in held)

    def load(
        self, rows: Records, positions: Ints | Seq[int], lists: Mapping[int, Records] = NO_LISTS
    ) -> None:
        """Give the next launch its parameters (`Sheet.fill`): one asynchronous copy on the current
        stream."""
        turn = self._parameters.begin()
        self._parameters.send(self._sheets[turn].fill(rows, positions, lists))

    def __call__(self, logits: Tensor) -> None:
        """logits [B, V] f32, rows any stride apart; not changed. B is the bucket's: rows that
        `load` did not give are padding."""
        assert logits.dtype == torch.float32 and logits.stride(1) == 1
        assert logits.shape[0] <= self.max_rows and logits.shape[1] == self.vocab
        self._sample(
            (self.plan.cluster, logits.shape[0]),
            THREADS,
            logits,
            logits.stride(0),
            self.vocab,
            self.plan.segment,
            self._parameters.tensor,
            self._entries,
            self._scratch,
            self.ids,
            self.logprobs,
            self.top_ids,
            self.top_logprobs,
            self.cuts,
            cluster=self.plan.cluster,
        )

    def bar(self, logits: Tensor, rows: Seq[int], words: Seq[Ints]) -> None:
        """logits [B, V] f32: -inf where `words` [rows] of [ceil(V / 32)] i32 has no bit for a token
        of that row. In place; other rows are not touched. Never waits."""
        sheet = self._mask_rows[self._masks.begin()]
        for place, (row, mask) in enumerate(zip(rows, words, strict=True)):
            sheet[place, 0], sheet[place, 1:] = row, mask
        count = len(rows)
        self._masks.send(count)
        self._bar(
            (-(-self.num_words // BAR_THREADS), count),
            BAR_THREADS,
            logits,
            logits.stride(0),
            self.vocab,
            self.num_words,
            self._masks.tensor,
        )
