"""Packed training sequences, from a corpus to batches: each document once, next to no padding."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents, write_jsonl
from prepared import Made

from retro_data import packing, pipeline
from retro_data.datamodule import RetroDataModule
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.pipeline import Settings, open_prepared
from retro_data.splits import SPLITS, split_of_documents
from retro_data.store import PackedSequences

CHUNK, SEQ_LEN = 16, 128
CAPACITY = SEQ_LEN // CHUNK

Small = Callable[..., dict[str, Any]]


@pytest.fixture
def arguments(small: Small) -> dict[str, Any]:
    return small(packing={"seq_len": SEQ_LEN}, splits={"val": 0.1, "test": 0.1})


def training_chunks(made: Made) -> tuple[np.ndarray, int]:
    """Rows of all chunks of training documents, and the tokens in them."""
    chunks = made.chunks()
    splits = split_of_documents(chunks.documents.keys, "hash", made.settings.splits)
    rows = np.flatnonzero((splits == SPLITS.index("train"))[chunks.document_of_chunk])
    return rows, int(chunks.lengths[rows].sum())


@pytest.mark.parametrize("block_chunks", [packing.BLOCK_CHUNKS, 40, 1])
def test_all_training_documents_and_no_others_are_packed(
    arguments: dict[str, Any], block_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BLOCK_CHUNKS", block_chunks)
    made = Made(arguments)
    table = PackedSequences(made.folder("packing small")).rows
    rows, tokens = training_chunks(made)
    assert sorted(table[table >= 0].tolist()) == rows.tolist()
    assert table.dtype == np.int32
    figures, manifest = made.figures("packing small"), made.manifest("packing small")
    assert manifest["rows"] == len(table)
    assert (manifest["blocks"] > 1) == (block_chunks < 100)
    assert figures["chunks"] == len(rows)
    assert figures["tokens"] == tokens
    assert figures["padding"] == pytest.approx(1 - tokens / table.size / CHUNK, abs=1e-6)
    least, one = figures["padding_at_the_least"], figures["padding_of_one_document_a_sequence"]
    assert least <= figures["padding"] <= one
    if manifest["blocks"] == 1:  # 60 documents: at most one sequence more than chunks would need
        assert len(table) <= -(-len(rows) // CAPACITY) + 1
        assert one > figures["padding"] + 0.1


def test_packing_goes_by_identity_not_by_place(
    small: Small, tmp_path: Path, tiny_encoder: Path
) -> None:
    """The same documents meet when the corpus is written in another order."""
    documents = make_documents(60)
    met = []
    for name, order in (("a", documents), ("b", documents[::-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", order)
        corpus = {"name": "small", "path": str(path)}
        made = Made(
            small(
                root=tmp_path / name,
                corpus=corpus,
                tokenizer={
                    "name": str(tiny_encoder)
                },  # a trained one may differ, and with it lengths
                packing={"seq_len": 64},
                splits={"val": 0.2},
            )
        )
        chunks, table = made.chunks(), PackedSequences(made.folder("packing small")).rows
        ids = [chunks.documents.id(d) for d in range(len(chunks.documents))]
        met.append(
            sorted(
                tuple(dict.fromkeys(ids[chunks.document_of_chunk[r]] for r in row if r >= 0))
                for row in table
            )
        )
    assert met[0] == met[1]
    assert any(len(documents) > 1 for documents in met[0])


def datamodule_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if name != "packing"}
    return {**kept, "mode": "packed", "seq_len": SEQ_LEN, "batch_size": 4, "num_neighbors": 2}


def prepared(given: dict[str, Any]) -> RetroDataModule:
    data = RetroDataModule(**given)
    pipeline.prepare(data.settings(), InlineEngine())
    return data


def test_the_datamodule_trains_packed_and_evaluates_single_documents(
    arguments: dict[str, Any],
) -> None:
    data = prepared(datamodule_arguments(arguments))
    data.setup("fit")
    batches = list(data.train_dataloader())
    ids = np.concatenate([batch["chunk_ids"].numpy().ravel() for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == training_chunks(Made(arguments))[0].tolist()
    again = pickle.loads(pickle.dumps(data.dataset("train")))
    assert len(pickle.dumps(again)) < 20_000  # no table: a worker maps the file again
    for name, value in again.__getitems__([0, 1]).items():
        assert value.equal(data.dataset("train").__getitems__([0, 1])[name]), name
    documents = np.concatenate([batch["document_ids"].numpy() for batch in batches])
    shared = [len(set(row[row >= 0].tolist())) for row in documents]
    assert max(shared) > 1
    for batch in (b for split in ("val", "test") for b in data._evaluation_loader(split)):
        for row in batch["document_ids"].numpy():
            assert len(set(row[row >= 0].tolist())) <= 1


def test_another_seed_prepares_nothing_and_another_length_packs_again(
    arguments: dict[str, Any],
) -> None:
    given = datamodule_arguments(arguments)
    prepared(given)
    other = RetroDataModule(**{**given, "seed": 7, "prepare": "verify"})
    other.prepare_data()
    other.setup("fit")
    root = Path(given["root"])
    before = set(root.glob("*/*"))
    prepared({**given, "seq_len": 64})
    new = {path.parent.name for path in set(root.glob("*/*")) - before}
    assert new == {"packing", "prepared"}
    longer = RetroDataModule(**{**given, "seq_len": 256, "prepare": "verify"})
    with pytest.raises(RetroDataError, match="retro-data prepare"):
        longer.prepare_data()


def test_without_packed_sequences_nothing_of_them_is_asked(arguments: dict[str, Any]) -> None:
    plain = Settings.create(**{**arguments, "packing": None})
    assert plain.prepared_path() != Settings.create(**arguments).prepared_path()
    made = Made({**arguments, "packing": None})
    assert "packing small" not in made.steps
    with pytest.raises(RetroDataError, match=r"seq_len=100 is not a multiple of chunk_size=16"):
        Settings.create(**{**arguments, "packing": {"seq_len": 100}})


def test_corpora_that_do_not_train_are_not_packed(
    arguments: dict[str, Any], tmp_path: Path, corpus_file: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held.jsonl", make_documents(20, seed=9))
    corpora = [
        arguments["corpus"],
        {"name": "held", "path": str(held_out), "split": "val"},
    ]
    data = prepared(datamodule_arguments({**arguments, "corpus": corpora}))
    first, second = open_prepared(data.settings()).corpora
    assert second.sequences is None
    assert len(data.dataset("train")) == len(first.sequences.rows)
    assert len(data.dataset("val"))
