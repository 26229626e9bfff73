"""How much a chunk and its stored candidates share, token by token: BM25 and the overlap of tokens.

What retrieval gains is better explained by shared tokens than by nearness of vectors, and ranking the
neighbors that an encoder proposed by BM25 once more keeps part of what a whole search by BM25 gains
(Doostmohammadi et al. 2023, arXiv 2305.16243). A few candidates of each chunk are scored here, not a
corpus: terms are the LM's token ids, and there is no index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from retro_data.chunks import masked, narrowest
from retro_data.database import draw_rows
from retro_data.row_readers import ChunkReader

Array = np.ndarray[Any, Any]

K1 = 1.2  # of BM25: how fast further occurrences of a term stop to count
B = 0.75  # of BM25: how much a long candidate is held back
SAMPLE_CHUNKS = 2**18  # database chunks whose terms are counted, at most
READ_CHUNKS = 2**13  # of them at once
WORKING_BYTES = 2**20  # of one batch of pairs: what a core's cache holds


@dataclass(frozen=True)
class TermStatistics:
    """What BM25 knows of the chunks that may be retrieved.

    Attributes:
        weights: (vocab_size,) float32, ln(1 + (N - n + 1/2) / (n + 1/2)) for a term that n of N chunks
            hold: never negative. In float32, since the last bits of a logarithm are the machine's own.
        mean_length: tokens of a chunk, without bos.
    """

    weights: Array
    mean_length: float


def term_statistics(
    reader: ChunkReader, admitted: Array, vocab_size: int, bos_id: int | None
) -> TermStatistics:
    """Statistics of the admitted chunks of a database, or of as many as are drawn.

    Args:
        reader: of the database's chunks.
        admitted: (M,) bool, which of its rows may be neighbors.
        bos_id: no term.
    """
    rows = draw_rows(admitted, SAMPLE_CHUNKS, [0])
    holders = np.zeros(vocab_size + 1, np.int64)  # the last one: of what is no term
    tokens_read = 0
    for start in range(0, len(rows), READ_CHUNKS):
        tokens, lengths, _ = reader(rows[start : start + READ_CHUNKS])
        tokens = tokens[:, : reader.chunk_size]
        is_term = np.arange(reader.chunk_size) < lengths[:, :1]
        if bos_id is not None:
            is_term &= tokens != bos_id
        terms = np.sort(np.where(is_term, tokens, vocab_size), axis=1)
        is_first = np.ones(terms.shape, bool)
        is_first[:, 1:] = terms[:, 1:] != terms[:, :-1]
        holders += np.bincount(terms[is_first], minlength=vocab_size + 1)
        tokens_read += int(is_term.sum())
    n = holders[:vocab_size].astype(np.float64)
    weights = np.log1p((len(rows) - n + 0.5) / (n + 0.5)).astype(np.float32)
    return TermStatistics(weights, max(1.0, tokens_read / max(1, len(rows))))


def bm25_scores(
    queries: Array,
    candidates: Array,
    query_mask: Array,
    candidate_mask: Array,
    statistics: TermStatistics,
) -> Array:
    """BM25 of each candidate of each query (Robertson and Zaragoza 2009, section 3.3).

    A term counts as often as the query holds it. Candidates without any shared term score 0.

    Args:
        queries: (R, m) tokens.
        candidates: (R, K, c) tokens.
        query_mask, candidate_mask: bool, of the same shapes; False is no term.

    Returns:
        (R, K) float32: scores that differ by rounding alone are equal.
    """
    rows, listed = candidates.shape[:2]
    counts = _term_counts(queries, candidates, query_mask, candidate_mask)
    length = candidate_mask.sum(2).ravel() / statistics.mean_length
    saturation = K1 * (1 - B + B * length)
    pair, place = np.nonzero(counts)
    count = counts[pair, place].astype(np.float64)
    weight = statistics.weights[queries[pair // listed, place]]
    terms = weight * count * (K1 + 1) / (count + saturation[pair])
    scores = np.bincount(pair, terms, minlength=rows * listed)
    return scores.astype(np.float32).reshape(rows, listed)


def overlap_scores(
    queries: Array, candidates: Array, query_mask: Array, candidate_mask: Array
) -> Array:
    """Share of the distinct tokens of each query that stand in each of its candidates.

    Args:
        queries, candidates, query_mask, candidate_mask: as of `bm25_scores`.

    Returns:
        (R, K) float32; 0 for a query without tokens.
    """
    rows, listed, _ = candidates.shape
    width = queries.shape[1]
    counts = _term_counts(queries, candidates, query_mask, candidate_mask)
    before = np.tri(width, k=-1, dtype=bool) & query_mask[:, None, :]
    repeated = ((queries[:, :, None] == queries[:, None, :]) & before).any(2)
    distinct = query_mask & ~repeated
    held = ((counts > 0).reshape(rows, listed, width) & distinct[:, None]).sum(2)
    shares: Array = held / np.maximum(distinct.sum(1), 1)[:, None]
    return shares.astype(np.float32)


def _term_counts(
    queries: Array, candidates: Array, query_mask: Array, candidate_mask: Array
) -> Array:
    """How often each token of a query stands in each candidate: (R * K, m) uint8 or uint16.

    Tokens lie along the first axis, so that one of all queries is compared with all candidates at
    once, as many pairs as a core's cache holds.
    """
    (rows, width), (_, listed, length) = queries.shape, candidates.shape
    count = narrowest(length, (np.uint8, np.uint16))
    top = int(max(queries.max(initial=0), candidates.max(initial=0)))
    dtype = narrowest(top + 2, (np.uint16, np.uint32, np.uint64))
    # Two values that no token has and that differ: what is masked matches nothing.
    wanted = masked(queries, query_mask, top + 1, dtype)
    held = masked(candidates, candidate_mask, top + 2, dtype)
    found = np.empty((rows * listed, width), count)
    row_bytes = listed * ((width + length) * dtype.itemsize + length + width * count.itemsize)
    step = max(1, WORKING_BYTES // row_bytes)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        one = np.ascontiguousarray(np.repeat(wanted[part], listed, axis=0).T)
        other = np.ascontiguousarray(held[part].reshape(-1, length).T)
        same, counts = np.empty(other.shape, bool), np.empty(one.shape, count)
        for i, tokens in enumerate(one):
            np.equal(other, tokens, out=same)
            np.add.reduce(same.view(np.uint8), axis=0, dtype=count, out=counts[i])
        found[start * listed : start * listed + counts.shape[1]] = counts.T
    return found
