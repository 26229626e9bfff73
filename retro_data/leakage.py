"""How much of a chunk to be predicted stands word for word in what was retrieved.

r(C) is the length of the longest token substring that an evaluation chunk C shares with one of its
neighbors, over the tokens of C (Borgeaud et al. 2021, section 2.6).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from retro_data.chunks import narrowest

Array = np.ndarray[Any, Any]

WORKING_BYTES = 2**20  # of one batch of pairs: what a core's cache holds


def longest_common_substrings(
    queries: Array, retrieved: Array, query_mask: Array, retrieved_mask: Array
) -> Array:
    """Length of the longest common substring of each pair of token rows.

    The classic table of common suffixes, for many pairs at once. It is kept by diagonals, so that a
    common suffix grows where it lies: with one token of all queries after the other, the slice of
    diagonals that it crosses is counted up where it matches, and set to 0 where it does not.

    Args:
        queries: (P, m) tokens.
        retrieved: (P, r) tokens.
        query_mask, retrieved_mask: bool, of the same shapes; False matches nothing.

    Returns:
        (P,) uint8 if the shorter side is below 256 tokens, else uint16 or uint32.
    """
    pairs, width, length = len(queries), queries.shape[1], retrieved.shape[1]
    count = narrowest(min(width, length), (np.uint8, np.uint16, np.uint32))
    top = int(max(queries.max(initial=0), retrieved.max(initial=0)))
    dtype = narrowest(top + 2, (np.uint16, np.uint32, np.uint64))
    found = np.empty(pairs, count)
    row_bytes = (width + length) * (dtype.itemsize + 2 * count.itemsize) + length
    step = max(1, WORKING_BYTES // row_bytes)
    for start in range(0, pairs, step):
        part = slice(start, start + step)
        # Two values that no token has and that differ: what is masked matches nothing.
        one = np.where(query_mask[part], queries[part], top + 1).astype(dtype)
        other = np.where(retrieved_mask[part], retrieved[part], top + 2).astype(dtype)
        found[part] = _longest(np.ascontiguousarray(one.T), np.ascontiguousarray(other.T), count)
    return found


def _longest(queries: Array, retrieved: Array, count: np.dtype[Any]) -> Array:
    """`longest_common_substrings` of columns: (m, P) and (r, P)."""
    width, (length, pairs) = len(queries), retrieved.shape
    suffix = np.zeros((width + length - 1, pairs), count)  # common ones that end here, by diagonal
    longest = np.zeros_like(suffix)
    same = np.empty((length, pairs), bool)
    grow = same.view(np.uint8)
    for i, tokens in enumerate(queries):
        crossed = slice(width - 1 - i, width - 1 - i + length)
        np.equal(retrieved, tokens, out=same)
        now = suffix[crossed]
        now += grow
        now *= grow
        np.maximum(longest[crossed], now, out=longest[crossed])
    best: Array = longest.max(0, initial=0)
    return best
