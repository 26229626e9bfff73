"""Selected neighbors against a slow reference; turning a selection on makes nothing but itself."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Made, corpus_of
from test_dataset import PAD, database_of, write_artifact, write_chunks
from test_leakage import slow as longest_common
from test_pipeline import Recorder

from retro_data import lexical, pipeline, selection, stage, store
from retro_data.database import draw_rows
from retro_data.datamodule import RetroDataModule
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.leakage import longest_common_substrings
from retro_data.lexical import (
    K1,
    B,
    TermStatistics,
    bm25_scores,
    overlap_scores,
    term_statistics,
)
from retro_data.pipeline import Settings
from retro_data.row_readers import ChunkReader
from retro_data.selection import SelectionContext, SelectionSettings, select
from retro_data.store import ChunkStore, DatabaseStores, LeakageTable, NeighborLists

Small = Callable[..., dict[str, Any]]
Array = np.ndarray[Any, Any]
BOS, VOCABULARY = 0, 12


# ---- the same, slowly ----------------------------------------------------------------------------


def random_store(folder: Path, rng: np.random.Generator, documents: int) -> ChunkStore:
    """Documents of few different tokens, which meet again in others, each begun by bos."""
    chunks = write_chunks(folder, rng.integers(1, 14, documents).tolist())
    real = np.arange(chunks.chunk_size) < chunks.lengths[:, None]
    values = rng.integers(1, rng.integers(2, VOCABULARY + 1), real.shape)
    repeated = rng.random(len(chunks)) < 0.4  # whole chunks stand in several places
    values[repeated] = values[rng.integers(0, len(chunks))]
    values[chunks.documents.first_chunk[:-1], 0] = BOS
    chunks.tokens = np.where(real, values, PAD).astype(chunks.tokens.dtype)
    return chunks


class Reference:
    """Selection of one chunk after the other, in lists of plain numbers."""

    def __init__(self, queries: ChunkStore, database: DatabaseStores, admitted: Array) -> None:
        self.queries = self._texts(queries)
        self.database = [text for store in database.stores for text in self._texts(store)]
        self.document = [
            (s, int(d)) for s, of in enumerate(database.stores) for d in of.document_of_chunk
        ]
        known = [text for text, is_in in zip(self.database, admitted, strict=True) if is_in]
        terms = [[t for t in text if t != BOS] for text in known]
        self.holders = Counter(t for text in terms for t in set(text))
        self.count = len(terms)
        self.mean_length = max(1.0, sum(map(len, terms)) / max(1, len(terms)))

    def _texts(self, chunks: ChunkStore) -> list[list[int]]:
        return [
            row[:n].tolist() for row, n in zip(chunks.tokens, chunks.lengths.tolist(), strict=True)
        ]

    def overlap_of(self, query: list[int], id: int) -> float:
        text, after = list(self.database[id]), id + 1
        if after < len(self.database) and self.document[after] == self.document[id]:
            text += self.database[after]
        own = [t for t in query if t != BOS]
        return longest_common(own, [t for t in text if t != BOS]) / max(1, len(own))

    def score(self, query: list[int], id: int, rerank: str) -> np.float32:
        own, text = ([t for t in x if t != BOS] for x in (query, self.database[id]))
        if rerank == "overlap":
            return np.float32(len(set(own) & set(text)) / max(1, len(set(own))))
        score = 0.0
        for term in own:
            n, count = self.holders[term], text.count(term)
            weight = np.float32(math.log1p((self.count - n + 0.5) / (n + 0.5)))
            norm = K1 * (1 - B + B * len(text) / self.mean_length)
            score += float(weight) * count * (K1 + 1) / (count + norm)
        return np.float32(score)

    def __call__(
        self, row: int, candidates: list[tuple[int, float]], of: SelectionSettings
    ) -> tuple[list[tuple[int, float]], dict[str, int]]:
        query, dropped = self.queries[row], dict.fromkeys(of.filters, 0)
        kept = []
        for id, distance in candidates:
            if of.min_distance is not None and distance < of.min_distance:
                dropped["min_distance"] += 1
            elif of.max_distance is not None and distance > of.max_distance:
                dropped["max_distance"] += 1
            elif of.max_overlap is not None and self.overlap_of(query, id) > of.max_overlap:
                dropped["max_overlap"] += 1
            else:
                kept.append((id, distance))
        if of.rerank is not None:
            kept.sort(key=lambda c: self.score(query, c[0], str(of.rerank)), reverse=True)
        left: list[tuple[int, float]] = []
        for id, distance in kept:
            if of.one_per_document and any(self.document[id] == self.document[i] for i, _ in left):
                dropped["one_per_document"] += 1
            elif of.distinct and any(self.database[id] == self.database[i] for i, _ in left):
                dropped["distinct"] += 1
            else:
                left.append((id, distance))
        return left, dropped


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    stored=st.integers(1, 9),
    of=st.builds(
        SelectionSettings,
        min_distance=st.sampled_from([None, 0.1, 0.3]),
        max_distance=st.sampled_from([None, 0.5, 0.9]),
        max_overlap=st.sampled_from([None, 0, 1 / 3, 0.5, 0.75]),
        one_per_document=st.booleans(),
        distinct=st.booleans(),
        rerank=st.sampled_from([None, "bm25", "overlap"]),
    ),
)
def test_it_equals_the_slow_reference(
    seed: int, stored: int, of: SelectionSettings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, rng = tmp_path_factory.mktemp("selection"), np.random.default_rng(seed)
    queries, one, other = (random_store(folder / n, rng, rng.integers(1, 9)) for n in "qab")
    database = database_of(one, other)
    admitted = rng.random(len(database)) < 0.8
    shape = (len(queries), stored)
    ids = np.full(shape, -1, np.int32)
    ids[:, : len(database)] = rng.random((len(ids), len(database))).argsort(1)[:, :stored]
    ids[np.arange(stored) >= rng.integers(0, stored + 1, len(ids))[:, None]] = -1
    distances = np.sort(rng.random(shape), axis=1).round(2).astype(np.float32)
    distances[ids < 0] = np.inf
    arrays = {store.NEIGHBOR_IDS: ids, store.NEIGHBOR_DISTANCES: distances}
    lists = NeighborLists(write_artifact(folder / "n", "n", arrays))
    reader = ChunkReader(database, queries.chunk_size, prefetch=False)
    statistics = term_statistics(reader, admitted, VOCABULARY, BOS) if of.rerank == "bm25" else None
    context = SelectionContext(queries, lists, reader, BOS, statistics)
    found, changed = select(of, context, np.arange(len(queries)))
    reference, expected_changed = Reference(queries, database, admitted), 0
    totals = dict.fromkeys(of.filters, 0)
    plain = SelectionSettings(of.min_distance, of.max_distance, of.max_overlap)
    for row in range(len(queries)):
        stored_ones = list(zip(ids[row].tolist(), distances[row].tolist(), strict=True))
        stored_ones = [c for c in stored_ones if c[0] >= 0]
        expected, dropped = reference(row, stored_ones, of)
        count = int(found.keep[row].sum())
        assert found.keep[row, :count].all()
        kept = zip(found.ids[row, :count].tolist(), found.distances[row].tolist(), strict=False)
        assert list(kept) == expected
        totals = {name: n + dropped[name] for name, n in totals.items()}
        first = reference(row, stored_ones, plain)[0][:1]
        expected_changed += of.rerank is not None and first != expected[:1]
    assert found.dropped == totals
    assert changed == expected_changed


def test_terms_are_counted_in_a_sample_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token t stands in chunk t // 4 alone; three of the six admitted ones are looked at."""
    chunks = write_chunks(tmp_path / "c", [28])
    reader = ChunkReader(database_of(chunks), 0, prefetch=False)
    admitted = np.arange(7) != 3
    monkeypatch.setattr(lexical, "SAMPLE_CHUNKS", 3)
    monkeypatch.setattr(lexical, "READ_CHUNKS", 1)
    found = term_statistics(reader, admitted, 28, bos_id=24)
    rows = draw_rows(admitted, 3, [0])
    assert len(rows) == 3
    assert 3 not in rows
    looked_at = [t for row in rows for t in range(4 * row, 4 * row + 4) if t != 24]
    other = min(set(range(28)) - set(looked_at))
    assert np.flatnonzero(found.weights < found.weights.max()).tolist() == looked_at
    assert found.mean_length == len(looked_at) / 3
    assert found.weights[looked_at[0]] == np.float32(math.log1p(2.5 / 1.5))
    assert found.weights[other] == np.float32(math.log1p(3.5 / 0.5))


def test_terms_of_a_small_part_of_the_database_are_all_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = write_chunks(tmp_path / "c", [28])
    reader = ChunkReader(database_of(chunks), 0, prefetch=False)
    monkeypatch.setattr(lexical, "SAMPLE_CHUNKS", 2)
    found = term_statistics(reader, np.isin(np.arange(7), [1, 5]), 28, bos_id=None)
    counted = [*range(4, 8), *range(20, 24)]
    assert np.flatnonzero(found.weights < found.weights.max()).tolist() == counted


@pytest.mark.parametrize("vocabulary", [2**16 - 2, 2**16 - 1, 2**16])
def test_what_is_masked_matches_nothing_in_vocabularies_that_fill_two_bytes(
    vocabulary: int,
) -> None:
    last = vocabulary - 1
    queries = np.array([[0, 1, last, last]], np.uint16)
    candidates = np.array([[[0, 1, last], [last, last, last]]], np.uint16)
    no, yes = np.zeros((1, 4), bool), np.ones((1, 2, 3), bool)
    statistics = TermStatistics(np.ones(vocabulary, np.float32), 3.0)
    for query_mask, mask in ((no, yes), (~no, ~yes), (no, ~yes)):
        assert not bm25_scores(queries, candidates, query_mask, mask, statistics).any()
        assert not overlap_scores(queries, candidates, query_mask, mask).any()
        pairs = np.repeat(queries, 2, axis=0), candidates[0]
        masks = np.repeat(query_mask, 2, axis=0), mask[0]
        assert not longest_common_substrings(*pairs, *masks).any()


def test_long_chunks_and_many_candidates_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token 300 times in a candidate is counted as 300."""
    monkeypatch.setattr(lexical, "WORKING_BYTES", 1)
    candidates = np.full((3, 5, 300), 7, np.uint16)
    candidates[:, :, ::2] = 2**16 - 1
    queries = np.array([[7, 9], [2**16 - 1, 7], [1, 1]], np.uint16)
    mask, every = np.array([[1, 1], [1, 1], [1, 0]], bool), np.ones(candidates.shape, bool)
    counts = lexical._term_counts(queries, candidates, mask, every).reshape(3, 5, 2)
    assert counts[:, 0].tolist() == [[150, 0], [150, 150], [0, 0]]
    assert (counts == counts[:, :1]).all()
    found = lexical.overlap_scores(queries, candidates, mask, every)
    assert found[:, 0].tolist() == [0.5, 1.0, 0.0]


# ---- the stage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Any]:
    """Settings of a root that is prepared without a selection; copies in it of a third of the texts."""
    folder = tmp_path_factory.mktemp("selection")
    documents = make_documents(40, longest=120)
    documents += [{"id": f"{d['id']} again", "text": d["text"]} for d in documents[:20]]
    arguments = {
        "root": folder / "root",
        "corpus": corpus_of(folder / "small.jsonl", documents),
        "tokenizer": {"vocab_size": 400},
        "chunk_size": 16,
        "splits": {"val": 0.2, "test": 0.1},
        "embedder": {"name": str(tiny_encoder), "precision": "fp32"},
        "neighbors": {"num_stored": 8, "search": "exact"},
    }
    pipeline.prepare(Settings.create(**arguments), InlineEngine())
    return arguments


@pytest.fixture
def arguments(base: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {**base, "root": shutil.copytree(base["root"], tmp_path / "root")}


def stages_made(arguments: dict[str, Any], **changes: Any) -> list[str]:
    recorder = Recorder()
    pipeline.prepare(Settings.create(**{**arguments, **changes}), recorder)
    return sorted(set(recorder.made))


def test_turning_it_on_off_or_changing_it_makes_nothing_else(arguments: dict[str, Any]) -> None:
    plain = pipeline.open_prepared(Settings.create(**arguments))
    assert stages_made(arguments, selection={"max_overlap": 0.5}) == ["leakage", "selection"]
    assert stages_made(arguments, selection={"rerank": "overlap"}) == ["leakage", "selection"]
    assert stages_made(arguments, selection={"max_overlap": 0.5}) == []
    for off in (None, {}, {"rerank": None}):
        assert stages_made(arguments, selection=off) == []
        again = pipeline.open_prepared(Settings.create(**arguments, selection=off))
        assert again.key == plain.key
        assert again.corpora[0].neighbors.folder.parent.name == "neighbors"


def test_batches_hold_the_selected_neighbors_and_leakage_is_of_them(
    arguments: dict[str, Any],
) -> None:
    chosen = {"max_overlap": 0.5, "one_per_document": True, "rerank": "bm25"}
    made = Made({**arguments, "selection": chosen})
    pipeline.prepare(made.settings, InlineEngine())
    opened, chunks = pipeline.open_prepared(made.settings), made.chunks()
    plain = pipeline.open_prepared(Settings.create(**arguments))
    assert opened.key != plain.key
    (corpus,), (before,) = opened.corpora, plain.corpora
    lists, whole = corpus.neighbors, before.neighbors
    assert lists is not None
    assert whole is not None
    assert lists.ids.shape == whole.ids.shape
    assert lists.ids.dtype == whole.ids.dtype
    missing = lists.ids[:] < 0
    assert 0 < missing.mean() < 1
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    assert (lists.distances[missing] == np.inf).all()
    for row, own in zip(lists.ids.tolist(), whole.ids.tolist(), strict=True):
        of = [chunks.document_of_chunk[i] for i in row if i >= 0]
        assert len(set(of)) == len(of)
        assert {i for i in row if i >= 0} <= set(own)

    data = RetroDataModule(
        **arguments, selection=chosen, seq_len=64, batch_size=4, num_neighbors=2, prepare="verify"
    )
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    rows = batch["chunk_ids"].numpy()
    for place in np.argwhere(rows >= 0):
        for k, id in enumerate(lists.ids[rows[tuple(place)], :2].tolist()):
            first = batch["neighbor_tokens"][(*place, k)][:16].numpy()
            expected = chunks.tokens[id] if id >= 0 else np.full(16, opened.tokenizer.pad_id)
            assert first.tolist() == expected.tolist()
    data = RetroDataModule(**arguments, selection=chosen, seq_len=64, num_neighbors=9)
    with pytest.raises(RetroDataError, match=r"num_neighbors=9, but 8 are stored"):
        data.dataset("train")

    # r stays that of the unfiltered lists; r_seen is of what is read now.
    table, unfiltered = corpus.leakage, before.leakage
    assert table is not None
    assert unfiltered is not None
    np.testing.assert_array_equal(table.own, unfiltered.own)
    assert not np.array_equal(table.seen, unfiltered.seen)
    document, first_chunk = chunks.document_of_chunk, chunks.documents.first_chunk
    for row, seen in zip(table.rows.tolist(), table.seen.tolist(), strict=True):
        ids = lists.ids[row - 1].tolist()
        if row == first_chunk[document[row]]:
            ids = [-1] * 8
        assert seen == [
            0 if i < 0 else shared(chunks, row, i, opened.tokenizer.bos_id) for i in ids
        ]

    figures = made.figures("selection small")
    last = np.zeros(len(chunks), bool)
    last[first_chunk[1:] - 1] = True
    real = ~missing
    assert figures["fill_rate"] == figures["fill_rate_of_first"]["8"] == pytest.approx(real.mean())
    assert figures["fill_rate_used"] == pytest.approx(real[~last].mean())
    assert figures["fill_rate_used_of_first"]["2"] == pytest.approx(real[~last, :2].mean())
    assert list(figures["fill_rate_of_first"]) == ["1", "2", "8"]
    assert figures["candidates_before"] == (whole.ids[:] >= 0).sum()
    gone = figures["dropped_by_max_overlap"] + figures["dropped_by_one_per_document"]
    assert figures["candidates_before"] - gone == figures["candidates_found"] == real.sum()
    assert figures["dropped_by_max_overlap"] > 0
    assert 0 < figures["first_neighbors_changed"] < len(chunks)
    assert figures["successor_bigrams"]["nearest"] is not None


def shared(chunks: ChunkStore, row: int, id: int, bos: int | None) -> int:
    """Tokens of the longest substring that chunk `row` shares with chunk `id` and what follows it."""

    def real(row: int) -> list[int]:
        return [int(t) for t in chunks.tokens[row, : chunks.lengths[row]] if t != bos]

    text, of = real(id), chunks.document_of_chunk
    if id + 1 < len(chunks) and of[id] == of[id + 1]:
        text += real(id + 1)
    return longest_common(real(row), text)


def test_nothing_left_is_stored_as_the_search_stores_it(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By inner product, missing ones are at -inf; blocks and batches of any size change no byte."""
    arguments["neighbors"] = {**arguments["neighbors"], "metric": "ip"}
    made = Made({**arguments, "selection": {"min_distance": 1e9}})
    lists = NeighborLists(made.folder("selection small"))
    assert (lists.ids[:] == -1).all()
    assert (lists.distances[:] == -np.inf).all()
    figures = made.figures("selection small")
    assert figures["fill_rate"] == 0
    assert figures["chunks_emptied"] == len(lists.ids)
    assert figures["successor_bigrams"] == {"nearest": None, "random": None}
    assert LeakageTable(made.folder("leakage small")).seen.max() == 0

    given = {**arguments, "selection": {"distinct": True, "rerank": "bm25"}}
    files = [Made(given).folder("selection small") / n for n in ("ids.npy", "distances.npy")]
    whole = [file.read_bytes() for file in files]
    shutil.rmtree(files[0].parent)
    monkeypatch.setattr(selection, "tile", lambda rows, _: stage.tile(rows, 37))
    monkeypatch.setattr(selection, "BATCH_CANDIDATES", 50)
    assert Made(given).manifest("selection small")["blocks"] > 1
    assert [file.read_bytes() for file in files] == whole


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"min_distance": 2, "max_distance": 1}, r"min_distance=2 is above .*max_distance=1"),
        ({"max_overlap": 1}, r"max_overlap=1: expected a share"),
        ({"min_distance": "near"}, r"min_distance='near': expected null or a number"),
        ({"max_distance": float("nan")}, r"max_distance=nan: expected null or a number"),
        ({"distinct": "yes"}, r"distinct='yes': expected true or false"),
        ({"rerank": "tfidf"}, r"rerank='tfidf': expected null, bm25 or overlap"),
        ({"bm25": True}, r"selection\.bm25.*rerank"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    small: Small, given: dict[str, Any], named: str
) -> None:
    with pytest.raises(RetroDataError, match=named):
        Settings.create(**small(selection=given))
