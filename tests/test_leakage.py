"""Leakage: the longest common substring against a slow reference, and the stage against its words."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data import leakage
from retro_data.leakage import longest_common_substrings

Array = np.ndarray[Any, Any]


def slow(query: list[int], retrieved: list[int]) -> int:
    """All substrings of the one, looked for among all of the other."""

    def substrings(tokens: list[int]) -> set[tuple[int, ...]]:
        ends = range(1, len(tokens) + 1)
        return {tuple(tokens[i:j]) for j in ends for i in range(j)}

    return max(map(len, substrings(query) & substrings(retrieved)), default=0)


def rows(seed: int, pairs: int, width: int, values: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, width + 1, pairs)
    return rng.integers(0, values, (pairs, width)), np.arange(width) < lengths[:, None]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    pairs=st.integers(0, 9),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 18)),
    values=st.sampled_from([1, 2, 3, 40]),
)
def test_it_equals_the_slow_reference(
    seed: int, pairs: int, widths: tuple[int, int], values: int
) -> None:
    queries, query_mask = rows(seed, pairs, widths[0], values)
    retrieved, retrieved_mask = rows(seed + 1, pairs, widths[1], values)
    found = longest_common_substrings(queries, retrieved, query_mask, retrieved_mask)
    expected = [
        slow(q[a].tolist(), r[b].tolist())
        for q, a, r, b in zip(queries, query_mask, retrieved, retrieved_mask, strict=True)
    ]
    assert found.tolist() == expected


def test_real_widths_in_batches_against_difflib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "WORKING_BYTES", 20_000)
    rng = np.random.default_rng(0)
    queries, retrieved = (rng.integers(0, 5, (60, n)).astype(np.uint16) for n in (64, 128))
    for pair, size in enumerate(rng.integers(0, 65, 60)):  # copies of every length, anywhere
        at, start = rng.integers(0, 129 - size), rng.integers(0, 65 - size)
        retrieved[pair, at : at + size] = queries[pair, start : start + size]
    every = np.ones_like(queries, bool), np.ones_like(retrieved, bool)
    found = longest_common_substrings(queries, retrieved, *every)
    assert found.dtype == np.uint8
    for q, r, size in zip(queries.tolist(), retrieved.tolist(), found, strict=True):
        assert SequenceMatcher(None, q, r, autojunk=False).find_longest_match().size == size
    assert found.max() > 50


def test_the_largest_token_of_a_dtype_and_long_rows_are_exact() -> None:
    top = np.full((1, 300), 2**16 - 1, np.uint16)
    mask = np.arange(300) < 299
    assert longest_common_substrings(top, top, mask[None], mask[None]).tolist() == [299]
    assert longest_common_substrings(top, top, mask[None], ~mask[None]).tolist() == [1]
    assert longest_common_substrings(top, top, ~mask[None] & False, mask[None]).tolist() == [0]
