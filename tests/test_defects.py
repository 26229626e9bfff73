"""Defects of the classic retrieval pipelines, by name, each with the tests that fail on it.

Most live beside what they guard; DEFECTS says where. What belongs to no single module is below.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from prepared import Made, corpus_of, texts

from retro_data import artifact, database, store
from retro_data.database import Database, DatabasePlace
from retro_data.dataset import RetroDataset
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.exact import nearest
from retro_data.index import IndexStage
from retro_data.index_factory import import_faiss
from retro_data.pipeline import Settings, open_prepared, prepare, steps
from retro_data.stage import complete
from retro_data.store import ChunkStore, Embeddings
from retro_data.vectors import Vectors

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]

DEFECTS = {
    "the self hit is removed by its rank": [
        "test_neighbors.test_equal_text_in_another_document_is_found_at_distance_zero",
        "test_exact.test_own_document_is_no_neighbor_though_its_twin_is",
    ],
    "ids of -1 wrap around to the last row": [
        "test_dataset.test_missing_neighbors_and_padding_chunks_are_masked",
        "test_exact.test_no_id_wraps_around",
    ],
    "a distance of 1e3 stands for no neighbor": [
        "test_defects.test_distances_beyond_a_thousand_are_distances",
        "test_index.test_missing_neighbors_are_minus_one_at_an_infinite_distance",
    ],
    "a long document fills the candidate list, and its rows are all -1": [
        "test_neighbors.test_a_long_document_that_fills_every_list_is_searched_past",
    ],
    "a document of 1 mod 64 tokens gets a chunk of specials and padding": [
        "test_chunks.test_a_document_of_n_tokens_has_ceil_n_over_64_chunks",
        "test_defects.test_every_chunk_holds_text",
    ],
    "specials of the embedder lie in the LM's tokens": [
        "test_chunks.test_special_tokens_of_the_embedder_are_text_and_never_stored_as_specials",
    ],
    "database and queries are embedded with different specials": [
        "test_embedder.test_the_stage_gives_what_the_embedder_gives_to_a_query",
        "test_embedder.test_shared_ids_are_fed_straight_in",
    ],
    "the end of a document is found by a token's value (102)": [
        "test_defects.test_no_token_value_ends_a_document",
        "test_dataset.test_labels_cross_sequences_of_a_document_and_end_with_eos",
    ],
    "the last chunk is its own continuation": [
        "test_dataset.test_continuation_is_of_the_same_document_and_else_padding",
    ],
    "files are opened r+ and a read extends them": [
        "test_dataset.test_reading_never_changes_a_file",
        "test_artifact.test_an_array_is_opened_read_only_and_a_read_changes_nothing_on_disk",
    ],
    "padding chunks have neighbors": [
        "test_dataset.test_missing_neighbors_and_padding_chunks_are_masked",
        "test_retro_lm.test_neighbors_of_padding_chunks_reach_nothing",
    ],
    "names of blocks sort wrongly past their zero padding": [
        "test_defects.test_blocks_beyond_five_digits_stay_in_order",
        "test_defects.test_stores_beyond_three_digits_stay_in_order",
    ],
    "ids are int32 whatever the database": [
        "test_neighbors.test_ids_are_int64_where_a_database_wants_them",
    ],
    "headerless files are read with a wrong shape": [
        "test_defects.test_an_array_of_another_shape_is_refused",
        "test_artifact.test_a_damaged_array_is_refused_with_the_command_that_mends_it",
    ],
    "a cache is trusted because its file exists": [
        "test_stage.test_a_file_without_a_receipt_proves_nothing",
        "test_defects.test_a_zero_filled_block_is_made_again",
    ],
    "a kill leaves a tail of zeros that counts as complete": [
        "test_defects.test_a_zero_filled_block_is_made_again",
        "test_stage.test_a_kill_at_any_write_leaves_what_a_resume_completes",
    ],
    "arguments are accepted and not passed on": [
        "test_defects.test_each_keyed_setting_changes_a_key",
        "test_datamodule.test_unknown_settings_are_refused_at_once",
    ],
    "a fixed max_chunks": ["test_defects.test_no_number_of_chunks_is_fixed"],
    "text is decoded by the locale": ["test_defects.test_the_locale_changes_nothing"],
    "autofaiss returns (None, None) without an error": [
        "test_index.test_a_budget_that_nothing_fits_is_refused_with_numbers",
    ],
    "faiss-cpu is asked for a GPU": ["test_defects.test_faiss_without_a_gpu_is_not_asked_for_one"],
    "an index is trained on the first rows": ["test_index.test_training_sees_the_whole_database"],
    "recall is never measured": [
        "test_index.test_the_recorded_recall_is_that_of_the_loaded_index",
        "test_neighbors.test_an_approximate_index_finds_what_its_recall_says",
    ],
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_has_a_test(defect: str) -> None:
    for place in DEFECTS[defect]:
        module, name = place.split(".")
        source = (Path(__file__).parent / f"{module}.py").read_text("utf-8")
        functions = [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
        assert name in functions, f"{defect}: {place} is gone"


# ---- distances and tokens ------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_distances_beyond_a_thousand_are_distances(metric: Any) -> None:
    vectors = np.arange(1, 6, dtype=np.float16)[:, None] * np.full((1, 4), -40, np.float16)
    own = np.stack([np.arange(5), np.arange(1, 6)], 1)
    found = nearest(vectors, Vectors([vectors]), 5, metric=metric, excluded=own)
    assert (found.ids[:, :4] >= 0).all()
    assert (np.abs(found.distances[:, :4]) > 1000).all()
    assert (found.ids[:, 4] == -1).all()
    assert np.isinf(found.distances[:, 4]).all()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 64, 65])
def test_every_chunk_holds_text(
    tmp_path: Path, small: Small, tiny_encoder: Path, tokens: int
) -> None:
    """Documents of exactly so many tokens, by a tokenizer without bos or eos."""
    corpus = corpus_of(tmp_path / "c.jsonl", texts(*["river " * tokens] * 3))
    made = Made(small(corpus=corpus, tokenizer={"name": str(tiny_encoder)}), "embeddings")
    chunks = made.chunks()
    assert chunks.documents.tokens.tolist() == [tokens] * 3
    assert len(chunks) == 3 * -(-tokens // 16)
    assert chunks.lengths.sum() == 3 * tokens
    assert made.vectors().any(1).all()


def test_no_token_value_ends_a_document(tmp_path: Path, small: Small, tiny_encoder: Path) -> None:
    """The classic [SEP] is 102: here that id is a common word piece, and stays one."""
    lm = Made(small(tokenizer={"name": str(tiny_encoder)}), "tokenizer").tokenizer()
    words = [lm.backend.id_to_token(i) for i in range(5, lm.vocab_size)]
    whole = [w for w in words if not w.startswith("##")]
    first = lm.backend.id_to_token(102)
    text = " ".join([first.removeprefix("##"), *whole[:60]] * 3)
    documents = [*texts(f"{text} [SEP] {text}"), *make_documents(4, longest=40)]
    arguments = small(
        corpus=corpus_of(tmp_path / "c.jsonl", documents),
        tokenizer={"name": str(tiny_encoder)},
        splits={"val": 0.0, "test": 0.0},
        root=tmp_path / "other",
    )
    made = Made(arguments)
    prepare(made.settings, InlineEngine())
    prepared = open_prepared(made.settings)
    chunks = prepared.corpora[0].chunks
    count = int(chunks.documents.first_chunk[1])
    stored = chunks.tokens[:count][np.arange(16) < chunks.lengths[:count, None]]
    encoded = lm.backend.encode(documents[0]["text"], add_special_tokens=False)
    assert stored.tolist() == encoded.ids
    assert 102 in stored
    dataset = RetroDataset(
        prepared.corpora, "train", database=prepared.database, seq_len=1024, pad_id=lm.pad_id
    )
    batch = dataset.__getitems__(list(range(len(dataset))))
    row = int(np.flatnonzero(np.asarray(batch["chunk_ids"])[:, 0] == 0)[0])
    labels = np.asarray(batch["labels"])[row]
    assert len(stored) <= 1024
    assert labels[: len(stored) - 1].tolist() == stored[1:].tolist(), "one document, no end within"


# ---- files ---------------------------------------------------------------------------------------


def write_artifact(folder: Path, arrays: dict[str, Array], **manifest: Any) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for name, array in arrays.items():
        np.save(folder / name, array)
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    artifact.write_record(folder / artifact.MANIFEST, {"arrays": entries, **manifest})


def test_blocks_beyond_five_digits_stay_in_order(tmp_path: Path) -> None:
    numbers = (9, 99_998, 99_999, 100_000, 100_001, 1_000_000)
    blocks = {store.block_name(n): np.full((1, 2), n % 1999, np.float16) for n in numbers}
    write_artifact(tmp_path / "e", dict(sorted(blocks.items())), dim=2)
    embeddings = Embeddings(tmp_path / "e")
    assert [int(name.split(".")[0]) for name in embeddings.names] == list(numbers)
    found = np.concatenate(list(embeddings.blocks()))[:, 0]
    assert found.tolist() == [n % 1999 for n in numbers]


def test_stores_beyond_three_digits_stay_in_order(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk store under a thousand names, opened once to save time."""
    monkeypatch.setattr(store, "ChunkStore", functools.cache(ChunkStore))
    monkeypatch.setattr(database, "Embeddings", functools.cache(Embeddings))
    made = Made(small(corpus=corpus_of(tmp_path / "c.jsonl", texts("one"))), "embeddings")
    count = 1002
    admitted = {store.admitted_name(i): np.array([i in (2, 1001)]) for i in range(count)}
    write_artifact(tmp_path / "database", admitted, rows=count)
    place = DatabasePlace(
        *(tmp_path / "database", "key"),
        chunks=(made.folder("chunks small"),) * count,
        embeddings=(made.steps["embeddings small"].place,) * count,
    )
    assert np.flatnonzero(Database(place).admitted).tolist() == [2, 1001]


@pytest.mark.parametrize("name", ["tokens.npy", "lengths.npy"])
def test_an_array_of_another_shape_is_refused(small: Small, name: str) -> None:
    folder = Made(small(), "chunks").folder("chunks small")
    array = np.load(folder / name)
    (folder / name).unlink()
    np.save(folder / name, array.reshape(-1)[:-3])
    with pytest.raises(RetroDataError, match=r"its manifest says.*retro-data prepare"):
        ChunkStore(folder)


def test_a_zero_filled_block_is_made_again(tmp_path: Path, small: Small) -> None:
    """As a preallocated file looks after a kill: the right name, shape and size, no content."""
    whole = Made(small(), "embeddings")
    cut = Made(small(root=tmp_path / "killed"), "chunks")
    step = next(s for s in steps(cut.settings) if s.title == "embeddings small")
    step.folder.mkdir(parents=True)
    for name in Embeddings(whole.folder("embeddings small")).names:
        np.save(step.folder / name, np.zeros_like(np.load(whole.folder(step.title) / name)))
    complete(step.stage, step.folder, InlineEngine())
    found = np.concatenate(list(Embeddings(step.folder).blocks()))
    np.testing.assert_array_equal(found, whole.vectors())


def test_no_number_of_chunks_is_fixed(tmp_path: Path, small: Small) -> None:
    """70,000 chunks, past what 16 bits count, in chunks of one token."""
    documents = texts(*["river " * 1000] * 70)
    corpus = corpus_of(tmp_path / "c.jsonl", documents)
    made = Made(
        small(corpus=corpus, chunk_size=1, tokenizer={"vocab_size": 258}, chunks={"bos": False}),
        "chunks",
    )
    chunks = made.chunks()
    assert len(chunks) == chunks.documents.tokens.sum() > 70_000
    assert chunks.documents.first_chunk[-1] == len(chunks)
    assert made.tokenizer().decode(chunks.tokens[-6:, 0].tolist()) in "river " * 7


# ---- settings and surroundings -------------------------------------------------------------------

OTHER_VALUES: dict[str, dict[str, Any]] = {
    "corpora": {
        "name": "other",
        "format": "text",
        "text_field": "body",
        "id_field": None,
        "encoding": "latin-1",
        "encoding_errors": "replace",
        "on_bad_document": "raise",
        "max_document_bytes": 1000,
        "max_expansion": 9,
        "hf_config": "en",
        "hf_split": "train",
        "hf_revision": "main",
        "split": "train",
    },
    "tokenizer": {"vocab_size": 500, "sample_bytes": 1000},
    "chunks": {"chunk_size": 8, "bos": False, "tokenizer_backend": "nanotoken"},
    "splits": {"val": 0.1, "test": 0.1, "database": 0.1, "salt": "other"},
    "embedder": {
        "pooling": "cls",
        "normalize": True,
        "precision": "bf16",
        "max_embed_tokens": 9,
    },
    "database": {"splits": ("val",), "corpora": ("small",), "share": 0.5},
    "index": {
        "planner": "builtin",
        "factory": "Flat",
        "max_index_memory": "1G",
        "memory_mapped": False,
        "target_recall": 0.5,
        "recall_at": 3,
        "recall_queries": 9,
        "sample_size": 99,
        "seed": 9,
        "shard_rows": 99,
    },
    "neighbors": {"search": "exact", "metric": "ip", "num_stored": 3, "exact_rows": 9},
    "selection": {
        "min_distance": 0.1,
        "max_distance": 0.9,
        "max_overlap": 0.5,
        "one_per_document": True,
        "distinct": True,
        "rerank": "bm25",
    },
}
# Not in the key of any artifact: what they name is there by itself (`corpora`: the stores that it
# chooses; `exact_rows`: the search it resolves to).
RESOLVED = {("database", "corpora"), ("neighbors", "exact_rows")}


def keyed_fields(settings: Settings) -> Iterator[tuple[str, str]]:
    for group in OTHER_VALUES:
        value = getattr(settings, group)
        for field in dataclasses.fields(value[0] if group == "corpora" else value):
            if field.metadata["keyed"]:
                yield group, field.name


def changed(settings: Settings, group: str, field: str, value: Any) -> Settings:
    if group == "corpora":
        (corpus,) = settings.corpora
        return dataclasses.replace(
            settings, corpora=(dataclasses.replace(corpus, **{field: value}),)
        )
    old = getattr(settings, group)
    return dataclasses.replace(settings, **{group: dataclasses.replace(old, **{field: value})})


def test_each_keyed_setting_changes_a_key(small: Small) -> None:
    """And no field is missing in OTHER_VALUES: a new one must say what it changes."""
    given = {"neighbors": {"search": "index", "num_stored": 8}, "selection": {"rerank": "overlap"}}
    settings = Settings.create(**small(**given))
    keys = [step.key for step in steps(settings)]
    for group, field in keyed_fields(settings):
        other = changed(settings, group, field, OTHER_VALUES[group][field])
        if (group, field) in RESOLVED:
            assert other.prepared_path() != settings.prepared_path(), (group, field)
        else:
            assert [step.key for step in steps(other)][-1] != keys[-1], (group, field)


def test_free_settings_change_no_key(small: Small) -> None:
    settings = Settings.create(**small(neighbors={"search": "index", "num_stored": 8}))
    keys = [step.key for step in steps(settings)]
    for group, values in {
        "chunks": {"block_bytes": 9},
        "embedder": {"batch_tokens": 9, "block_rows": 9},
        "index": {"max_query_ms": 99.0, "threads": 1},
        "neighbors": {"block_rows": 9, "memory": 9},
        "engine": {"devices": (), "workers": 3},
    }.items():
        for field, value in values.items():
            other = changed(settings, group, field, value)
            assert [step.key for step in steps(other)] == keys, (group, field)


PREPARE = """
import json, sys
from retro_data.engines import InlineEngine
from retro_data.pipeline import Settings, steps
from retro_data.stage import complete
for step in steps(Settings.create(**json.loads(sys.argv[1]))):
    complete(step.stage, step.folder, InlineEngine())
    if step.stage.name == "chunks":
        break
"""


def test_the_locale_changes_nothing(tmp_path: Path, small: Small) -> None:
    corpus = corpus_of(tmp_path / "c.jsonl", texts("x"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("street", "language"):
        (folder / f"{name}.txt").write_bytes(f"{name} Straße naïve 🙂 日本語\n".encode() * 20)
    arguments = small(corpus={**corpus, "path": str(folder)})
    here = Made(arguments, "chunks")
    other = {**arguments, "root": str(tmp_path / "other")}
    subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", PREPARE, json.dumps(other, default=str)],
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0"},
    )
    for name in here.manifest("chunks small")["arrays"]:
        one = here.folder("chunks small") / name
        two = tmp_path / "other" / one.relative_to(here.settings.root)
        assert one.read_bytes() == two.read_bytes(), name


def test_faiss_without_a_gpu_is_not_asked_for_one(tmp_path: Path, small: Small) -> None:
    if hasattr(import_faiss(), "StandardGpuResources"):
        pytest.skip("this faiss can use a GPU")
    index = {"factory": "IVF4,Flat", "recall_queries": 10}
    group = {"search": "index", "num_stored": 4}
    corpus = corpus_of(tmp_path / "c.jsonl", make_documents(20, longest=60))
    made = Made(small(corpus=corpus, neighbors=group, index=index), "index")
    stage = made.steps["index"].stage
    assert isinstance(stage, IndexStage)
    assert not stage.resources.gpu
    complete(stage, tmp_path / "again", InlineEngine(device="cuda:0"))
    one, two = (f / store.index_name() for f in (made.folder("index"), tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()
