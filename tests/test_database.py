"""The retrieval database: which rows it has, which may be found, and which are a query's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents, write_jsonl
from prepared import Made
from test_pipeline import Recorder

from retro_data import pipeline, store
from retro_data.database import (
    Database,
    DatabasePlace,
    DatabaseSettings,
    DatabaseStage,
    StoreOfDatabase,
)
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.pipeline import Settings
from retro_data.scan import document_key, keys_array
from retro_data.splits import SPLITS, SplitSettings, split_of_documents
from retro_data.stage import complete

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]


def documents(count: int, seed: int) -> list[dict[str, str]]:
    return make_documents(count, seed=seed, longest=60)


def corpora(folder: Path, **groups: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "path": str(write_jsonl(folder / f"{name}.jsonl", content))}
        for name, content in groups.items()
    ]


def open_database(made: Made, *names: str) -> Database:
    place = DatabasePlace(
        *made.steps["database"].place,
        chunks=tuple(made.folder(f"chunks {n}") for n in names),
        embeddings=tuple(made.steps[f"embeddings {n}"].place for n in names),
    )
    return place.open()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Made:
    folder = tmp_path_factory.mktemp("two")
    return Made(
        {
            "root": folder / "root",
            "corpus": corpora(folder, a=documents(20, 1), b=documents(30, 2)),
            "tokenizer": {"vocab_size": 400},
            "chunk_size": 16,
            "splits": {"val": 0.2, "test": 0.2},
            "embedder": {"name": str(tiny_encoder), "precision": "fp32", "block_rows": 11},
            "neighbors": {"num_stored": 4},
        }
    )


# ---- rows ----------------------------------------------------------------------------------------


def test_stores_lie_one_after_the_other(two: Made) -> None:
    database, a, b = open_database(two, "a", "b"), two.chunks("a"), two.chunks("b")
    assert database.first_rows == (0, len(a), len(a) + len(b))
    assert database.shape == (len(a) + len(b), 32)
    expected = np.concatenate([two.vectors("a"), two.vectors("b")])
    np.testing.assert_array_equal(database.rows(0, len(expected)), expected)
    across = slice(len(a) - 7, len(a) + 7)
    np.testing.assert_array_equal(database.rows(across.start, across.stop), expected[across])
    assert two.manifest("database")["rows"] == len(expected)


def admitted_by_hand(made: Made, *names: str, splits: tuple[str, ...]) -> Array:
    found = []
    for name in names:
        chunks = made.chunks(name)
        split = split_of_documents(chunks.documents.keys, "hash", made.settings.splits)
        keep = np.isin(split, [SPLITS.index(s) for s in splits])
        found.append(keep[chunks.document_of_chunk])
    return np.concatenate(found)


def test_rows_of_training_documents_are_admitted(two: Made) -> None:
    database = open_database(two, "a", "b")
    expected = admitted_by_hand(two, "a", "b", splits=("train",))
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(database.admitted, expected)
    figures = two.figures("database")
    assert figures["admitted_chunks"] == expected.sum()
    assert figures["chunks"] == len(expected)
    assert figures["documents"] == 50


def test_other_splits_are_admitted_on_request_alone(tmp_path: Path, small: Small) -> None:
    arguments = small(splits={"val": 0.3, "test": 0.2}, database={"splits": ["train", "test"]})
    made = Made(arguments, "database")
    expected = admitted_by_hand(made, "small", splits=("train", "test"))
    np.testing.assert_array_equal(open_database(made, "small").admitted, expected)


def test_rows_of_documents_are_found_by_identity(two: Made) -> None:
    """A query corpus knows nothing of rows: names lead there, strangers lead nowhere."""
    database, a, b = open_database(two, "a", "b"), two.chunks("a"), two.chunks("b")
    names = [("b", "document-29"), ("a", "document-0"), ("c", "document-0"), ("a", "document-99")]
    found = database.rows_of_documents(keys_array([document_key(*name) for name in names]))
    first = b.documents.first_chunk
    assert found[0].tolist() == [len(a) + first[29], len(a) + first[30]]
    assert found[1].tolist() == a.documents.first_chunk[:2].tolist()
    assert (found[2:, 0] == found[2:, 1]).all()
    assert found.dtype == np.int64
    assert database.rows_of_documents(a.documents.keys[:0]).shape == (0, 2)


def test_each_row_knows_the_rows_of_its_document(two: Made) -> None:
    database = open_database(two, "a", "b")
    rows = np.arange(database.shape[0])
    own = database.own_documents(rows)
    for name, first in zip("ab", database.first_rows, strict=False):
        chunks = two.chunks(name)
        for i, document in enumerate(chunks.document_of_chunk):
            begin, end = chunks.documents.first_chunk[document : document + 2]
            assert own[first + i].tolist() == [first + begin, first + end]
    some = np.array([5, 0, database.shape[0] - 1, 5])
    np.testing.assert_array_equal(database.own_documents(some), own[some])


# ---- queries of one corpus in a database of several ----------------------------------------------


def test_neighbors_across_stores_are_global_rows_of_other_documents(two: Made) -> None:
    database = open_database(two, "a", "b")
    for name, first in zip("ab", database.first_rows, strict=False):
        ids = two.neighbors(name).ids
        rows, _ = np.nonzero(ids >= 0)
        found = ids[ids >= 0]
        assert database.admitted[found].all()
        own = database.own_documents(first + rows)
        assert not ((found >= own[:, 0]) & (found < own[:, 1])).any()
        assert (found < database.first_rows[1]).any(), "some are of store a"
        assert (found >= database.first_rows[1]).any(), "and some of store b"
        vectors = database.rows(0, database.shape[0]).astype(np.float64)
        expected = ((vectors[first + rows] - vectors[found]) ** 2).sum(1)
        np.testing.assert_allclose(two.neighbors(name).distances[ids >= 0], expected, rtol=1e-6)


def test_a_foreign_corpus_has_no_own_rows(tmp_path: Path, small: Small) -> None:
    """The same ids and texts under another name: equal text is found, not taken for itself."""
    same = documents(15, 3)
    both = corpora(tmp_path, queries=same, retrieved=same)
    both[1]["split"] = "database"
    made = Made(small(corpus=both, database={"corpora": ["retrieved"]}))
    database = open_database(made, "retrieved")
    keys = made.chunks("queries").documents.keys
    assert (np.diff(database.rows_of_documents(keys), axis=1) == 0).all()
    found = made.neighbors("queries")
    assert (found.distances[:, 0] == 0).all()
    assert (
        ((found.ids == np.arange(len(found.ids))[:, None]) & (found.distances[:] == 0)).any(1).all()
    )
    assert "neighbors retrieved" not in made.steps, "nobody asks for those"
    assert database.admitted.all()


def test_a_validation_document_is_never_found_though_it_equals_a_training_one(
    tmp_path: Path, small: Small
) -> None:
    contents = documents(30, 4)
    doubled = [{**d, "id": f"{d['id']} again"} for d in contents]
    corpus = corpora(tmp_path, small=[*contents, *doubled])[0]
    made = Made(small(corpus=corpus, splits={"val": 0.4, "test": 0.0}))
    chunks, found = made.chunks(), made.neighbors()
    val = split_of_documents(chunks.documents.keys, "hash", SplitSettings(0.4, 0.0)) == 1
    twin = (np.arange(60) + 30) % 60
    planted = np.flatnonzero(val & ~val[twin])  # in validation, with an equal text in training
    assert len(planted) > 3
    assert not val[chunks.document_of_chunk[found.ids[found.ids >= 0]]].any()
    for document in planted:
        begin, end = chunks.documents.first_chunk[document : document + 2]
        first = chunks.documents.first_chunk[twin[document]]
        assert (found.distances[begin:end, 0] == 0).all(), "it finds its twin in training"
        rows = first + np.arange(end - begin)
        assert (found.ids[begin:end] == rows[:, None]).any(1).all()
        of_twin = found.ids[first : first + end - begin]
        assert not ((of_twin >= begin) & (of_twin < end)).any(), "the twin does not find it"


@pytest.fixture
def planted(tmp_path: Path, small: Small) -> dict[str, Any]:
    """Training text, text to validate on, and a library in which three validation texts stand, too.

    The first two under their own ids, one of them as it is and one in capitals, the third under another.
    """
    held, names = make_documents(8, seed=5, longest=200), ("train", "held", "library")
    of_held = [held[0], {**held[1], "text": held[1]["text"].upper()}, {**held[2], "id": "other"}]
    contents = (documents(20, 1), held, [*documents(12, 9)[8:], *of_held])
    groups = corpora(tmp_path, **dict(zip(names, contents, strict=True)))
    for group, split in zip(groups, ("train", "val", "database"), strict=True):
        group["split"] = split
    return small(corpus=groups, neighbors={"num_stored": 8, "search": "exact"})


PLANTED = slice(4, 7)  # documents of the library


def test_a_planted_validation_document_is_seen_in_leakage_or_left_out(
    planted: dict[str, Any],
) -> None:
    """Ids say nothing across corpora: what tells is the text."""
    for left_out in (False, True):
        made = Made({**planted, "near_duplicates": {} if left_out else None})
        chunks, library = made.chunks("held"), made.chunks("library")
        assert library.documents.id(4) == chunks.documents.id(0)
        admitted = np.load(made.folder("database") / store.admitted_name(2))
        assert admitted[PLANTED].tolist() == [not left_out] * 3
        assert admitted[:4].all()
        table = store.LeakageTable(made.folder("leakage held"))
        leaks = table.own.max(1) == table.real_tokens
        of = chunks.document_of_chunk[table.rows]
        first = library.documents.first_chunk[[PLANTED.start, PLANTED.stop]]
        first = first + len(made.chunks("train")) + len(chunks)
        ids = made.neighbors("held").ids[:]
        found = ((ids >= first[0]) & (ids < first[1])).any(1)
        if left_out:
            lines = (made.folder("duplicates") / store.LEFT_OUT).read_text("utf-8").splitlines()
            assert {json.loads(line)["evaluation_id"] for line in lines} == {
                chunks.documents.id(d) for d in range(3)
            }
            assert not leaks[of < 3].any()
            assert not found.any()
        else:
            assert leaks[(of == 0) | (of == 2)].all()
            assert found[of < 3].any()
            shares = made.figures("leakage held")["chunks_with_r_at_most"]
            assert shares[-2] <= 1 - leaks.mean() + 1e-6


def test_validation_text_is_retrieved_on_request_alone_and_never_by_itself(
    planted: dict[str, Any],
) -> None:
    with pytest.raises(RetroDataError, match=r"empty.*'held'.*database\.splits"):
        Made({**planted, "database": {"corpora": ["held"]}}, "database")
    asked = {"corpora": ["held"], "splits": ["train", "val"]}
    made = Made({**planted, "database": asked})
    chunks, ids = made.chunks("held"), made.neighbors("held").ids[:]
    assert (ids >= 0).any(1).all()
    rows = np.broadcast_to(np.arange(len(chunks))[:, None], ids.shape)[ids >= 0]
    document = chunks.document_of_chunk
    assert (document[ids[ids >= 0]] != document[rows]).all()


def test_another_database_at_test_time_costs_its_own_stages_alone(planted: dict[str, Any]) -> None:
    arguments = {
        **planted,
        "neighbors": {"num_stored": 4, "search": "index"},
        "index": {"factory": "Flat"},
        "packing": {"seq_len": 64},
        "selection": {"rerank": "bm25"},
    }
    names = ("train", "held", "library")

    def made_for(database: str) -> set[str]:
        recorder = Recorder()
        settings = Settings.create(**{**arguments, "database": {"corpora": [database]}})
        pipeline.prepare(settings, recorder)
        opened = pipeline.open_prepared(settings)
        assert [s.name for s in opened.database.stores] == [database]
        rows = len(opened.corpora[names.index(database)].chunks)
        for corpus in opened.corpora[:2]:  # those that train and evaluate ask this database alone
            assert corpus.neighbors is not None
            assert 0 <= corpus.neighbors.ids[:].max() < rows
        return set(recorder.made)

    assert {"chunks", "embeddings", "packing", "database", "leakage"} < made_for("train")
    searched = {"codebook", "index", "neighbors", "selection"}
    assert made_for("library") == {"database", *searched, "leakage"}
    assert made_for("train") == set()


# ---- refusals and keys ---------------------------------------------------------------------------


def test_documents_in_two_stores_are_refused_with_an_example(tmp_path: Path, small: Small) -> None:
    made = Made(small(corpus=corpora(tmp_path, small=documents(4, 1))), "database")
    one = StoreOfDatabase("small", "hash", *made.steps["chunks small"].place)
    twice = DatabaseStage(DatabaseSettings(), SplitSettings(), [one, one])
    with pytest.raises(
        RetroDataError, match=r"4 documents are in two stores.*'document-\d' of small"
    ):
        complete(twice, tmp_path / "twice", InlineEngine())


def test_an_empty_database_is_refused(tmp_path: Path, small: Small) -> None:
    corpus = corpora(tmp_path, small=documents(5, 1))[0]
    arguments = small(
        corpus={**corpus, "split": "val"}, tokenizer={"name": str(small()["embedder"]["name"])}
    )
    with pytest.raises(RetroDataError, match=r"empty.*database\.splits"):
        Made(arguments, "database")


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(RetroDataError, match=r"database\.share="):
        DatabaseSettings(share=share)


def test_a_larger_share_holds_a_smaller_one_alike_from_every_split() -> None:
    keys = keys_array([document_key("c", str(i)) for i in range(20_000)])
    splits = split_of_documents(keys, "hash", SplitSettings(database=0.5))
    settings = [DatabaseSettings(share=share) for share in (0.1, 0.3, 1.0)]
    tenth, third, whole = (one.admits(keys, splits) for one in settings)
    assert (tenth <= third).all()
    assert (third <= whole).all()
    for split in ("train", "database"):
        of_split = splits == SPLITS.index(split)
        assert whole[of_split].all()
        assert tenth[of_split].mean() == pytest.approx(0.1, abs=0.01)
        assert third[of_split].mean() == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize("splits", [(), ("validation",), ("train", "dev")])
def test_splits_that_are_none_are_refused(splits: tuple[str, ...]) -> None:
    with pytest.raises(RetroDataError, match=r"database\.splits="):
        DatabaseSettings(splits=splits)


def test_a_corpus_that_is_none_is_refused(small: Small) -> None:
    with pytest.raises(RetroDataError, match=r"database\.corpora names \['other'\]"):
        Made(small(database={"corpora": ["other"]}), "corpus")


def test_vectors_of_other_chunks_are_refused(two: Made) -> None:
    place = DatabasePlace(
        *two.steps["database"].place,
        chunks=(two.folder("chunks a"), two.folder("chunks b")),
        embeddings=(two.steps["embeddings b"].place, two.steps["embeddings a"].place),
    )
    with pytest.raises(RetroDataError, match=r"vectors for \d+ chunks"):
        place.open()


def test_a_fraction_makes_another_database_of_the_same_chunks(small: Small) -> None:
    made = [Made(small(splits={"val": v}), "database") for v in (0.1, 0.3)]
    for title in ("chunks small", "embeddings small"):
        assert made[0].steps[title].key == made[1].steps[title].key
    assert made[0].steps["database"].key != made[1].steps["database"].key
    masks = [np.load(m.folder("database") / store.admitted_name(0)) for m in made]
    assert (masks[0] >= masks[1]).all()
    assert masks[0].sum() > masks[1].sum()


def test_what_is_only_retrieved_trains_nothing_and_stays_in_the_database(small: Small) -> None:
    made = [Made(small(splits={"val": 0.2, "database": d}), "database") for d in (0.0, 0.5)]
    masks = [np.load(m.folder("database") / store.admitted_name(0)) for m in made]
    np.testing.assert_array_equal(*masks)
    assert made[0].steps["embeddings small"].key == made[1].steps["embeddings small"].key
