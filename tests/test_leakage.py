"""Leakage: the longest common substring against a slow reference, and the stage against its words."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Made, corpus_of

from retro_data import leakage, stage
from retro_data.leakage import leakage_bins, longest_common_substrings
from retro_data.splits import split_of_documents
from retro_data.store import LeakageTable

Small = Callable[..., dict[str, Any]]
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


def test_bins_are_the_first_alpha_that_is_not_exceeded() -> None:
    longest, of = np.array([0, 8, 9, 16, 63, 64, 1, 3, 0]), np.array([64] * 6 + [3, 3, 0])
    found = leakage_bins(longest.astype(np.uint8), of)
    assert found.tolist() == [0, 0, 1, 1, 7, 7, 2, 7, 0]
    for n, size, bin in zip(longest, np.maximum(of, 1), found, strict=True):
        alphas = leakage.ALPHAS
        assert bin == next(i for i, alpha in enumerate(alphas) if n / size <= alpha)


# ---- the stage -----------------------------------------------------------------------------------


def by_hand(made: Made, row: int, at: int, width: int, bos: int | None) -> list[int]:
    """What chunk `row` shares with the first `width` neighbors of chunk `at`, one by one."""

    def real(row: int) -> list[int]:
        return [int(t) for t in chunks.tokens[row, : chunks.lengths[row]] if t != bos]

    chunks, found = made.chunks(), []
    of = chunks.document_of_chunk
    for id in made.neighbors().ids[at, :width].tolist():
        text = real(id) if id >= 0 else []
        if 0 <= id < len(chunks) - 1 and of[id] == of[id + 1]:
            text += real(id + 1)
        match = SequenceMatcher(None, real(row), text, autojunk=False).find_longest_match()
        found.append(match.size)
    return found


def test_each_evaluation_chunk_is_held_against_its_own_and_the_seen_neighbors(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leakage, "BATCH_CHUNKS", 7)
    monkeypatch.setattr(leakage, "tile", lambda rows, _: stage.tile(rows, 50))
    documents = make_documents(40, longest=120)
    documents += [{"id": f"{d['id']} again", "text": f"More. {d['text']}"} for d in documents[:20]]
    corpus = corpus_of(tmp_path / "small.jsonl", documents)
    split = {"val": 0.3, "test": 0.2}
    made = Made(small(corpus=corpus, splits=split, neighbors={"num_stored": 12}))
    chunks, bos = made.chunks(), made.tokenizer().bos_id
    table = LeakageTable(made.folder("leakage small"))
    evaluated = split_of_documents(chunks.documents.keys, "hash", made.settings.splits) > 0
    rows = np.flatnonzero(evaluated[chunks.document_of_chunk])
    assert table.rows.tolist() == rows.tolist()
    assert bos is not None
    assert table.own.shape == table.seen.shape == (len(rows), 10)
    for i, row in enumerate(rows.tolist()):
        first = chunks.documents.first_chunk[chunks.document_of_chunk[row]] == row
        assert table.real_tokens[i] == chunks.lengths[row] - first
        assert table.own[i].tolist() == by_hand(made, row, row, 10, bos)
        seen = [0] * 10 if first else by_hand(made, row, row - 1, 10, bos)
        assert table.seen[i].tolist() == seen
    r = table.own.max(1) / np.maximum(table.real_tokens, 1)
    assert 0.1 < (r == 1).mean() < 1, "copies of training documents are found, and others are not"
    figures = made.figures("leakage small")
    assert figures["chunks_with_r_at_most"][-1] == 1
    assert figures["chunks_with_r_at_most"][3] == pytest.approx((r <= 0.5).mean(), abs=1e-6)
    assert figures["covers_training"]
