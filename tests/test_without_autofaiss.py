"""The whole way by the builtin planner: what a user of numpy 2 or Python 3.13 has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conftest import make_documents, write_jsonl

from retro_data import RetroDataModule


def test_prepare_by_index_and_read(small: Callable[..., dict[str, Any]], tmp_path: Any) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(120))
    datamodule = RetroDataModule(
        **small(
            corpus={"name": "small", "path": str(corpus)},
            index={"planner": "builtin", "factory": "IVF16,Flat", "target_recall": 0.99},
            neighbors={"num_stored": 4, "search": "index"},
        ),
        seq_len=64,
        batch_size=4,
    )
    datamodule.prepare_data()
    datamodule.setup("fit")
    (manifest,) = (path for path in (tmp_path / "root" / "codebook").glob("*/manifest.json"))
    assert '"planner": "builtin"' in manifest.read_text()
    (corpus_data,) = datamodule.prepared.corpora
    figures = corpus_data.neighbors.manifest["figures"]
    assert figures["fill_rate"] == 1.0
    assert figures["same_document_rate"] == 0.0
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["neighbor_mask"].any()
