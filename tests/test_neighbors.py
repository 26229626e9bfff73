"""Neighbors of every chunk: exact, of other documents, filled where that is possible at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS, make_documents
from prepared import Made, corpus_of

from retro_data import neighbors
from retro_data.database import Database
from retro_data.errors import RetroDataError
from retro_data.index_search import load_index
from retro_data.neighbors import NeighborSettings, _others
from retro_data.splits import SPLITS, split_of_documents
from retro_data.vectors import recall

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]

FLAT = {"factory": "Flat", "recall_queries": 20}


def truth(made: Made, k: int, metric: str = "l2") -> tuple[Array, Array]:
    """Ids (N, k) and distances of each chunk's neighbors, one at a time in float64."""
    store, vectors = made.chunks(), made.vectors().astype(np.float64)
    split = split_of_documents(store.documents.keys, "hash", made.settings.splits)
    admitted = (split == SPLITS.index("train"))[store.document_of_chunk] & vectors.any(1)
    missing = np.inf if metric == "l2" else -np.inf
    ids, distances = np.full((len(vectors), k), -1), np.full((len(vectors), k), missing)
    for row, query in enumerate(vectors):
        allowed = admitted & (store.document_of_chunk != store.document_of_chunk[row])
        value = ((vectors - query) ** 2).sum(1) if metric == "l2" else vectors @ query
        value = value.astype(np.float32)  # as they are kept; equal ones go by their row
        order = np.lexsort((np.arange(len(value)), value if metric == "l2" else -value))
        found = [i for i in order if allowed[i]][:k] if query.any() else []
        ids[row, : len(found)], distances[row, : len(found)] = found, value[found]
    return ids, distances


def few(tmp_path: Path, count: int = 14, longest: int = 120) -> dict[str, Any]:
    return corpus_of(tmp_path / "few.jsonl", make_documents(count, seed=5, longest=longest))


def one_long_document(path: Path) -> dict[str, Any]:
    """A document of 150 chunks that all read alike, and a dozen short ones."""
    long = {"id": "long", "text": " ".join(WORDS[:9] * 300)}
    return corpus_of(path, [long, *make_documents(12, seed=2, longest=60)])


# ---- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("search", ["exact", "index"])
def test_equals_brute_force(tmp_path: Path, small: Small, search: str, metric: str) -> None:
    group = {"num_stored": 6, "search": search, "metric": metric}
    splits = {"val": 0.2, "test": 0.1}
    made = Made(small(corpus=few(tmp_path), neighbors=group, index=FLAT, splits=splits))
    found, (ids, distances) = made.neighbors(), truth(made, 6, metric)
    assert found.ids.shape == (len(made.chunks()), 6), "num_stored columns, a row for each chunk"
    np.testing.assert_allclose(found.distances, distances, rtol=1e-6)
    if search == "exact":
        np.testing.assert_array_equal(found.ids, ids)
    else:  # ties within faiss' float32 may fall the other way
        assert recall(found.ids[:].astype(np.int64), ids) > 0.995
    assert found.ids.dtype == np.int32
    assert found.distances.dtype == np.float32


def test_nobody_finds_its_own_document_or_one_kept_for_evaluation(small: Small) -> None:
    made = Made(small(splits={"val": 0.2, "test": 0.2}))
    store, ids = made.chunks(), made.neighbors().ids
    split = split_of_documents(store.documents.keys, "hash", made.settings.splits)
    assert (np.bincount(split, minlength=3) > 2).all(), "there is something to leave out"
    rows, _ = np.nonzero(ids >= 0)
    found = store.document_of_chunk[ids[ids >= 0]]
    assert (found != store.document_of_chunk[rows]).all()
    assert (split[found] == SPLITS.index("train")).all()
    assert made.figures("neighbors small")["same_document_rate"] == 0
    assert made.figures("neighbors small")["fill_rate"] == 1


def test_equal_text_in_another_document_is_found_at_distance_zero(
    tmp_path: Path, small: Small
) -> None:
    """The self hit is the own document, not the first hit: a twin elsewhere is a neighbor."""
    documents = make_documents(8, longest=60)
    documents += [{**d, "id": f"{d['id']} again"} for d in documents]
    corpus = corpus_of(tmp_path / "c.jsonl", documents)
    made = Made(small(corpus=corpus, splits={"val": 0.0, "test": 0.0}))
    store, found = made.chunks(), made.neighbors()
    first = store.documents.first_chunk
    half = int(first[8])
    twins = (np.arange(len(store)) + half) % len(store)
    assert (found.distances[:, 0] == 0).all()
    zero = found.distances[:] == 0
    assert ((found.ids == twins[:, None]) & zero).any(1).all()


@pytest.mark.parametrize("search", ["exact", "index"])
def test_missing_neighbors_stand_at_the_end(tmp_path: Path, small: Small, search: str) -> None:
    corpus = corpus_of(tmp_path / "c.jsonl", make_documents(3, longest=60))
    group = {"num_stored": 50, "search": search}
    arguments = small(corpus=corpus, neighbors=group, index=FLAT, splits={"val": 0.0, "test": 0.0})
    made = Made(arguments)
    store, found = made.chunks(), made.neighbors()
    others = len(store) - np.diff(store.documents.first_chunk)[store.document_of_chunk]
    assert (others < 50).any()
    np.testing.assert_array_equal((found.ids >= 0).sum(1), np.minimum(others, 50))
    np.testing.assert_array_equal(found.ids >= 0, np.arange(50) < others[:, None])
    assert np.isinf(found.distances[found.ids[:] < 0]).all()
    assert (found.distances[:, 1:] >= found.distances[:, :-1]).all()
    assert 0 < made.figures("neighbors small")["fill_rate"] < 1


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16"])
def test_a_long_document_that_fills_every_list_is_searched_past(
    tmp_path: Path, small: Small, factory: str
) -> None:
    """Its chunks are each other's nearest: 2 K hits, and 16 K, may all be of the own document."""
    corpus = one_long_document(tmp_path / "c.jsonl")
    group = {"num_stored": 4, "search": "index"}
    index = {"factory": factory, "recall_queries": 20}
    splits = {"val": 0.0, "test": 0.0}
    made = Made(small(corpus=corpus, neighbors=group, index=index, splits=splits))
    figures, store = made.figures("neighbors small"), made.chunks()
    assert np.diff(store.documents.first_chunk)[0] > 16 * 4
    assert figures["rows_short_after_8"] >= figures["rows_short_after_64"] > 0
    assert figures["rows_searched_exactly"] == figures["rows_short_after_64"]
    assert figures["fill_rate"] == 1
    assert (made.neighbors().ids[:] >= 0).all()
    assert figures["same_document_rate"] == 0
    long = np.flatnonzero(store.document_of_chunk[:] == 0)
    ids, _ = truth(made, 4)
    assert recall(made.neighbors().ids[long].astype(np.int64), ids[long]) > 0.99


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "HNSW16"])
def test_in_a_large_database_the_index_searches_past_a_long_document(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    monkeypatch.setattr(neighbors, "COMPLETED_EXACTLY", 0)
    corpus = one_long_document(tmp_path / "c.jsonl")
    group = {"num_stored": 4, "search": "index"}
    index = {"factory": factory, "recall_queries": 20}
    splits = {"val": 0.0, "test": 0.0}
    made = Made(small(corpus=corpus, neighbors=group, index=index, splits=splits))
    figures = made.figures("neighbors small")
    assert figures["rows_short_after_64"] > 0
    assert figures["rows_searched_exactly"] == figures["rows_left_short"] == 0
    assert figures["fill_rate"] == 1
    assert figures["same_document_rate"] == 0
    ids, _ = truth(made, 4)
    found = recall(made.neighbors().ids[:].astype(np.int64), ids)
    assert found >= made.figures("index")["recall"] - 0.05


def test_in_a_large_database_lists_are_looked_into_until_neighbors_are_found(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list in 64 holds fewer than is stored; further ones are opened, none is searched exactly."""
    monkeypatch.setattr(neighbors, "COMPLETED_EXACTLY", 0)
    index = {"factory": "IVF64,Flat", "target_recall": 0.01}
    made = Made(small(neighbors={"num_stored": 32, "search": "index"}, index=index))
    assert made.manifest("index")["search_parameters"] == {"nprobe": 1}
    figures = made.figures("neighbors small")
    assert figures["rows_short_after_512"] > 0
    assert figures["rows_searched_exactly"] == figures["rows_left_short"] == 0
    assert figures["fill_rate"] == 1


def test_an_approximate_index_finds_what_its_recall_says(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "RECALL_QUERIES", 10**6)
    index = {"factory": "IVF16,Flat", "recall_queries": 10**6, "target_recall": 0.9}
    made = Made(small(neighbors={"num_stored": 10, "search": "index"}, index=index))
    measured = made.figures("index")["recall"]
    found = made.neighbors().ids[:].astype(np.int64)
    ids, _ = truth(made, 10)
    assert measured >= 0.9
    assert recall(found, ids) >= measured - 0.05
    figures = made.figures("neighbors small")
    assert figures["recall"] == pytest.approx(recall(found, ids), abs=1e-3)  # truth: in float64
    assert (figures["recall_at"], figures["recall_queries"]) == (10, len(found))
    assert (
        load_index(made.folder("index")).parameters == (made.manifest("index")["search_parameters"])
    )


@pytest.mark.parametrize("search", ["exact", "index"])
@pytest.mark.parametrize("change", [{"block_rows": 1}, {"block_rows": 13}, {"memory": 1}])
def test_blocks_and_memory_change_no_byte(
    tmp_path: Path, small: Small, search: str, change: dict[str, int]
) -> None:
    group = {"num_stored": 5, "search": search}
    corpus = few(tmp_path, count=8)
    whole = Made(small(corpus=corpus, neighbors=group, index=FLAT))
    other = small(corpus=corpus, neighbors={**group, **change}, index=FLAT, root=tmp_path / "other")
    cut = Made(other)
    for name in ("ids.npy", "distances.npy"):
        one, two = (m.folder("neighbors small") / name for m in (whole, cut))
        assert one.read_bytes() == two.read_bytes(), name
    assert whole.figures("neighbors small") == cut.figures("neighbors small")


def test_another_number_of_neighbors_is_a_prefix(tmp_path: Path, small: Small) -> None:
    corpus = few(tmp_path)
    wide, narrow = (
        Made(small(corpus=corpus, neighbors={"num_stored": k})).neighbors().ids[:] for k in (12, 3)
    )
    np.testing.assert_array_equal(wide[:, :3], narrow)


# ---- figures -------------------------------------------------------------------------------------


def test_fill_rates_are_those_of_the_lists(tmp_path: Path, small: Small) -> None:
    """`used` leaves out each document's last chunk: its neighbors reach no label but the end."""
    long = {"id": "long", "text": " ".join(WORDS * 3)}
    corpus = corpus_of(tmp_path / "c.jsonl", [long, *make_documents(2, longest=40)])
    splits = {"val": 0.0, "test": 0.0}
    made = Made(small(corpus=corpus, neighbors={"num_stored": 14}, splits=splits))
    store, figures = made.chunks(), made.figures("neighbors small")
    real = made.neighbors().ids[:] >= 0
    last = np.zeros(len(store), bool)
    last[store.documents.first_chunk[1:] - 1] = True
    assert figures["fill_rate"] == pytest.approx(real.mean())
    assert figures["fill_rate_used"] == pytest.approx(real[~last].mean())
    assert real.mean() < 1
    assert real.mean() != real[~last].mean()
    assert figures["candidates"] == real.size
    assert figures["used_candidates"] == real[~last].size


# ---- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "rows", "expected"),
    [
        ("auto", 1_000_000, "exact"),
        ("auto", 1_000_001, "index"),
        ("exact", 10**9, "exact"),
        ("index", 1, "index"),
    ],
)
def test_auto_goes_by_the_number_of_rows(search: str, rows: int, expected: str) -> None:
    assert NeighborSettings(search=search).resolve(rows) == expected


@pytest.mark.parametrize("exact_rows", [10**6, 1])
def test_auto_is_resolved_in_the_key(tmp_path: Path, small: Small, exact_rows: int) -> None:
    group = {"num_stored": 4, "search": "auto", "exact_rows": exact_rows}
    made = Made(small(corpus=few(tmp_path), neighbors=group, index=FLAT))
    expected = "exact" if exact_rows > 1 else "index"
    assert made.manifest("neighbors small")["fields"]["search"] == expected
    assert ("index" in made.steps) is (expected == "index")
    named = Made(
        small(corpus=few(tmp_path), neighbors={"num_stored": 4, "search": expected}, index=FLAT)
    )
    assert named.steps["neighbors small"].key == made.steps["neighbors small"].key


def test_ids_are_int64_where_a_database_wants_them(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Made(small(corpus=few(tmp_path, count=5)))
    monkeypatch.setattr(Database, "shape", property(lambda self: (2**31, self.vectors.shape[1])))
    wide = Made(small(corpus=few(tmp_path, count=5), root=tmp_path / "wide"))
    assert wide.neighbors().ids.dtype == np.int64
    np.testing.assert_array_equal(wide.neighbors().ids[:], narrow.neighbors().ids[:])


@pytest.mark.parametrize(
    "wrong", [{"search": "fast"}, {"metric": "cosine"}, {"num_stored": 0}, {"num_stored": -1}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RetroDataError, match=f"neighbors.{next(iter(wrong))}="):
        NeighborSettings(**wrong)


def test_hits_of_the_own_document_are_dropped_and_the_rest_move_up() -> None:
    hits = np.array([[5, 2, 9, 3, -1], [7, 8, -1, -1, -1], [1, 2, 3, 4, 5]])
    own = np.array([[2, 4], [7, 9], [0, 0]])
    assert _others(hits, own, 3).tolist() == [[5, 9, -1], [-1, -1, -1], [1, 2, 3]]
    assert _others(hits, own, 7).tolist()[2] == [1, 2, 3, 4, 5, -1, -1]
