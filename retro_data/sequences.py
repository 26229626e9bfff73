"""Which chunks make which sequence: plans that need no chunk to be read.

    document   one document a sequence, the end padded                     `plan_documents`
    packed     whole chunks of several documents, padded next to nothing   `pack`, `PackedPlan`

Sequences begin and end on the borders of chunks (Borgeaud et al. 2021, section 2.1), and no chunk is
left out: a document longer than a sequence makes several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_data.errors import RetroDataError

Array = np.ndarray[Any, Any]

MODES = ("document", "packed")


def whole_chunks(name: str, tokens: int, chunk_size: int) -> int:
    """Chunks of a setting in tokens, which must be a multiple of the chunk size."""
    if tokens < chunk_size or tokens % chunk_size:
        raise RetroDataError(
            f"{name}={tokens} is not a multiple of chunk_size={chunk_size}: sequences are made of "
            f"whole chunks. Take {max(round(tokens / chunk_size), 1) * chunk_size}, or another "
            "chunk_size."
        )
    return tokens // chunk_size


# ---- one document a sequence ----------------------------------------------------------------------


@dataclass(frozen=True)
class SequencePlan:
    """Sequences as runs of consecutive chunk rows.

    Attributes:
        first: (S,) int64, row of each sequence's first chunk.
        chunks: (S,) int32, number of its chunks, at least 1.
        unscored: (S,) int32, leading chunks that are context only: their labels are scored by an
            earlier sequence. None where every label is scored.
    """

    first: Array
    chunks: Array
    unscored: Array | None = None

    def __len__(self) -> int:
        return len(self.first)

    def counts(self, first_rows: Sequence[int]) -> Array:
        """Sequences of each corpus, (corpora,) int64; `first_rows` end with the number of chunks."""
        counts: Array = np.diff(np.searchsorted(self.first, first_rows))
        return counts

    def rows(self, indices: Array, chunks_per_sequence: int) -> Array:
        """Chunk rows (B, chunks_per_sequence) int64 of sequences (B,); -1 beyond, and of -1."""
        position = np.arange(chunks_per_sequence)
        rows: Array = self.first[indices][:, None] + position
        rows[position >= self.chunks[indices][:, None]] = -1
        rows[indices < 0] = -1
        return rows


def plan_documents(
    first_chunk: Array, num_chunks: Array, chunks_per_sequence: int, stride: int | None = None
) -> SequencePlan:
    """Sequences of one document each; a document longer than a sequence makes several.

    Without a stride, each chunk lies in exactly one sequence. With one, for evaluation, sequences
    overlap: each ends `stride` chunks after the one before, or where the document ends, and is
    as long as it can be, so that each label is scored exactly once, by the sequence that first
    reaches it, with at least `chunks_per_sequence - stride` chunks of context after the first.

    Args:
        first_chunk: (D,) row of each document's first chunk.
        num_chunks: (D,) chunks of each document; 0 makes no sequence.
        chunks_per_sequence: at least 1.
        stride: chunks, from 1 to chunks_per_sequence.
    """
    num_chunks = np.asarray(num_chunks, np.int64)
    beyond = np.maximum(num_chunks - chunks_per_sequence, 0)
    more = -(-beyond // (stride or chunks_per_sequence))
    sequences = np.where(num_chunks > 0, 1 + more, 0)
    document = np.repeat(np.arange(len(num_chunks)), sequences)
    number = np.arange(len(document)) - np.repeat(np.cumsum(sequences) - sequences, sequences)
    if stride is None:
        start = number * chunks_per_sequence
        stop = np.minimum(start + chunks_per_sequence, num_chunks[document])
        unscored = None
    else:
        reached = chunks_per_sequence + (number - 1) * stride  # by the sequence before
        stop = np.minimum(reached + stride, num_chunks[document])
        start = np.maximum(stop - chunks_per_sequence, 0)
        unscored = np.where(number > 0, reached - start, 0).astype(np.int32)
    first = np.asarray(first_chunk, np.int64)[document] + start
    return SequencePlan(first, (stop - start).astype(np.int32), unscored)


# ---- packed --------------------------------------------------------------------------------------


def pack(first_chunk: Array, num_chunks: Array, chunks_per_sequence: int) -> Array:
    """Fill sequences with documents, in as few as best-fit decreasing needs.

    A document longer than a sequence makes whole sequences and a rest. The rests and the shorter
    documents are placed from the longest to the shortest, each where it leaves the least room
    (best-fit decreasing; for training data: Ding et al. 2024, "Fewer truncations improve language
    modeling"). Lengths are small integers, so all of one length are placed at once, and the result
    is that of placing one after the other.

    Args:
        first_chunk: (D,) row of each document's first chunk.
        num_chunks: (D,) chunks of each document; 0 takes no place. Among documents of one length
            the earlier one is placed first.
        chunks_per_sequence: at least 1.

    Returns:
        (S, chunks_per_sequence) int64 chunk rows, those of a document side by side; -1 at the end
        of a sequence that is not full.
    """
    capacity = chunks_per_sequence
    first, count = np.asarray(first_chunk, np.int64), np.asarray(num_chunks, np.int64)
    whole, rest = count // capacity, count % capacity
    number = np.arange(int(whole.sum())) - np.repeat(np.cumsum(whole) - whole, whole)
    begin = np.repeat(first, whole) + number * capacity
    order = np.argsort(rest, kind="stable")
    starts = (first + whole * capacity)[order]
    bounds = np.searchsorted(rest[order], np.arange(capacity + 1))  # of the rests of each length
    # At most one of the sequences that are filled here is no more than half full.
    most = min(int((rest > 0).sum()), 2 * int(rest.sum()) // capacity + 1)
    table = np.full((len(begin) + most, capacity), -1, np.int64)
    table[: len(begin)] = begin[:, None] + np.arange(capacity)
    used = len(begin)
    open_rows: list[list[Array]] = [[] for _ in range(capacity + 1)]  # by the chunks they have left
    for length in range(capacity - 1, 0, -1):
        done, stop = bounds[length : length + 2]
        while done < stop:
            room = next((r for r in range(length, capacity) if open_rows[r]), capacity)
            each = min(room // length, stop - done)  # documents, in each of so many sequences:
            wanted = (stop - done) // each
            if room == capacity:
                rows = np.arange(used, used + wanted)
                used += wanted
            else:
                rows = open_rows[room].pop(0)
                if len(rows) > wanted:
                    open_rows[room].insert(0, rows[wanted:])
                    rows = rows[:wanted]
            placed = starts[done : done + len(rows) * each]
            chunks = (placed[:, None] + np.arange(length)).reshape(len(rows), -1)
            table[rows, capacity - room : capacity - room + each * length] = chunks
            done += len(placed)
            open_rows[room - each * length].append(rows)
    return table[:used]


class PackedPlan:
    """Sequences that `pack` filled, of one corpus after the other.

    Args:
        tables: (S, chunks_per_sequence) chunk rows of each corpus.
        first_rows: global row of the first chunk of each corpus.

    Attributes:
        unscored: None: every label is scored.
    """

    unscored: Array | None = None

    def __init__(self, tables: Sequence[Array], first_rows: Sequence[int]) -> None:
        self.tables = [np.asarray(table) for table in tables]  # read faster than a memory map
        self.first_rows = list(first_rows)
        self.starts = np.cumsum([0, *map(len, tables)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def counts(self, first_rows: Sequence[int]) -> Array:
        """Sequences of each corpus, (corpora,) int64."""
        return np.diff(self.starts)

    def rows(self, indices: Array, chunks_per_sequence: int) -> Array:
        """Chunk rows (B, chunks_per_sequence) int64 of sequences (B,); -1 beyond, and of -1."""
        rows = np.full((len(indices), chunks_per_sequence), -1, np.int64)
        for table, start, first_row in zip(
            self.tables, self.starts[:-1], self.first_rows, strict=True
        ):
            chosen = np.flatnonzero((indices >= start) & (indices < start + len(table)))
            if len(chosen):
                found = table[indices[chosen] - start].astype(np.int64)
                found += first_row * (found >= 0)
                rows[chosen] = found
        return rows
