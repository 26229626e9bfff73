"""Plans of sequences: every chunk once, in the mode's way; packing as good as it says, and no slower."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data.sequences import PackedPlan, pack, plan_documents

counts = st.lists(st.integers(0, 40), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(1, 9))
def test_training_plan_holds_every_chunk_once_and_nothing_else(sizes: list[int], n: int) -> None:
    first = np.cumsum([0, *sizes])[:-1]
    plan = plan_documents(first, sizes, n)
    rows = plan.rows(np.arange(len(plan)), n)
    assert rows.shape == (sum(-(-size // n) for size in sizes), n)
    assert sorted(rows[rows >= 0].tolist()) == list(range(sum(sizes)))
    assert (plan.chunks == (rows >= 0).sum(1)).all()
    assert (plan.chunks >= 1).all()
    document = np.repeat(np.arange(len(sizes)), sizes)
    for row in rows:
        assert len(set(document[row[row >= 0]])) == 1


@settings(deadline=None, max_examples=60)
@given(counts, st.integers(1, 9), st.data())
def test_evaluation_plan_scores_each_chunk_once_with_context(
    sizes: list[int], n: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, n))
    first = np.cumsum([0, *sizes])[:-1]
    plan = plan_documents(first, sizes, n, stride)
    starts = set(first.tolist())
    scored: Counter[int] = Counter()
    for begin, length, unscored in zip(plan.first, plan.chunks, plan.unscored, strict=True):
        assert 0 < length <= n
        assert 0 <= unscored < length
        scored.update(range(begin + unscored, begin + length))
        if unscored:  # not the document's first sequence: as long as it can be
            assert length == n
            assert unscored >= n - stride
        else:
            assert begin in starts or stride == n
    assert scored == Counter(range(sum(sizes)))


# ---- packed --------------------------------------------------------------------------------------


def first_rows(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])[:-1]


def runs_of(row: np.ndarray, document: np.ndarray) -> list[tuple[int, int, int]]:
    """(document, first chunk, chunks) of each document of a packed sequence, as they lie there."""
    chunks = row[row >= 0]
    assert (row[len(chunks) :] == -1).all()
    edges = np.flatnonzero(np.diff(document[chunks])) + 1
    return [(int(document[r[0]]), int(r[0]), len(r)) for r in np.split(chunks, edges)]


@settings(deadline=None, max_examples=100)
@given(counts, st.integers(1, 9))
def test_packing_holds_every_chunk_once_and_cuts_only_what_is_too_long(
    sizes: list[int], n: int
) -> None:
    table = pack(first_rows(sizes), np.array(sizes), n)
    assert table.shape[1] == n
    assert sorted(table[table >= 0].tolist()) == list(range(sum(sizes)))
    document = np.repeat(np.arange(len(sizes)), sizes)
    pieces: Counter[int] = Counter()
    for row in table:
        runs = runs_of(row, document)
        assert runs  # no sequence of padding alone
        assert len({d for d, _, _ in runs}) == len(runs)  # a document's chunks lie side by side
        for d, first, length in runs:
            assert row[row >= 0].tolist().count(first) == 1
            assert np.isin(np.arange(first, first + length), row).all()
            pieces[d] += 1
    assert pieces == {d: -(-size // n) for d, size in enumerate(sizes) if size}


def best_fit_decreasing(sizes: list[int], n: int) -> list[list[int]]:
    """Pieces of documents one after the other: the definition."""
    full = [[n] for size in sizes for _ in range(size // n)]
    bins: list[list[int]] = []
    for size in sorted((size % n for size in sizes if size % n), reverse=True):
        fitting = [b for b in bins if n - sum(b) >= size]
        if fitting:
            max(fitting, key=sum).append(size)
        else:
            bins.append([size])
    return full + bins


@settings(deadline=None, max_examples=100)
@given(counts, st.integers(1, 12))
def test_packing_is_best_fit_decreasing(sizes: list[int], n: int) -> None:
    table = pack(first_rows(sizes), np.array(sizes), n)
    document = np.repeat(np.arange(len(sizes)), sizes)
    found = [[length for _, _, length in runs_of(row, document)] for row in table]
    # Which of two sequences with the same room is taken changes no room.
    assert Counter(map(sum, found)) == Counter(map(sum, best_fit_decreasing(sizes, n)))
    lengths = Counter(length for one in found for length in one)
    assert lengths == Counter(length for one in best_fit_decreasing(sizes, n) for length in one)


def test_documents_of_one_length_are_taken_in_the_order_given() -> None:
    first = np.array([30, 10, 20, 0])  # documents of 3, 3, 1 and 1 chunks
    table = pack(first, np.array([3, 3, 1, 1]), 4)
    assert table.tolist() == [[30, 31, 32, 20], [10, 11, 12, 0]]


def test_no_document_makes_no_sequence() -> None:
    assert pack(np.zeros(2), np.zeros(2), 4).shape == (0, 4)


@settings(deadline=None, max_examples=50)
@given(st.lists(counts, min_size=1, max_size=3), st.integers(1, 6))
def test_packed_plans_of_several_corpora_are_one_after_the_other(
    corpora: list[list[int]], n: int
) -> None:
    tables = [pack(first_rows(s), np.array(s), n).astype(np.int32) for s in corpora]
    starts = np.cumsum([0, *map(sum, corpora)])[:-1].tolist()
    plan = PackedPlan(tables, starts)
    expected = [
        [r + start if r >= 0 else -1 for r in row]
        for table, start in zip(tables, starts, strict=True)
        for row in table.tolist()
    ]
    assert len(plan) == len(expected)
    indices = np.array([*range(len(plan)), -1, *range(len(plan))[::-1]])
    rows = plan.rows(indices, n)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[-1] * n if i < 0 else expected[i] for i in indices]
