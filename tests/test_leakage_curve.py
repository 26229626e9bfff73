"""The leakage curve: each label counts for the chunk it is of, and the whole is what was before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import make_documents
from lightning import Trainer
from prepared import corpus_of

from retro_data import RetroDataModule, RetroLM, draw_curve, format_curve, pipeline
from retro_data.engines import InlineEngine
from retro_data.leakage import ALPHAS
from retro_data.leakage_curve import EvaluationLeakage, chunks_of_labels, sums_of_bins
from retro_data.retro_lm import token_nats

Small = Callable[..., dict[str, Any]]


@pytest.fixture
def data(tmp_path: Path, small: Small) -> RetroDataModule:
    documents = make_documents(30, longest=90)
    copies = [{"id": f"{d['id']} again", "text": f"More. {d['text']}"} for d in documents[:10]]
    corpus = corpus_of(tmp_path / "small.jsonl", [*documents, *copies])
    made = RetroDataModule(
        **small(corpus=corpus, splits={"val": 0.4, "test": 0.1}),
        seq_len=64,
        eval_stride=32,
        batch_size=3,
        num_neighbors=2,
    )
    pipeline.prepare(made.settings(), InlineEngine())
    return made


def test_each_label_is_of_the_chunk_that_holds_it(data: RetroDataModule) -> None:
    chunks = data.prepared.corpora[0].chunks
    scored: dict[int, int] = {}
    for batch in data.val_dataloader():
        labels = batch["labels"]
        of = chunks_of_labels(batch["chunk_ids"], batch["chunk_lengths"], labels, data.eos_id)
        for row, at in (labels != -100).nonzero().tolist():
            chunk, label = int(of[row, at]), int(labels[row, at])
            here = int(batch["chunk_ids"][row, at // 16])
            if label == data.eos_id:
                assert chunk == here
            else:
                inside = 0 if chunk > here else at % 16 + 1
                assert chunks.tokens[chunk, inside] == label
                assert inside < chunks.lengths[chunk]
                scored[chunk] = scored.get(chunk, 0) + 1
    first = set(chunks.documents.first_chunk.tolist())
    bos = {chunk: int(chunk in first) for chunk in scored}  # of which nothing is the label
    assert scored == {chunk: chunks.lengths[chunk] - bos[chunk] for chunk in scored}
    assert len(scored) > 50


def test_sums_of_bins_add_up_to_the_whole() -> None:
    terms, bins = torch.rand(2, 2, 3, 4, 32).double(), torch.randint(0, 8, (4, 32))
    found = sums_of_bins(terms, bins)
    torch.testing.assert_close(found.sum(0), terms.sum((-2, -1)))
    for i in range(len(ALPHAS)):
        torch.testing.assert_close(found[i], (terms * (bins == i)).sum((-2, -1)))


def test_a_chunk_that_was_not_measured_counts_as_leaking_whole() -> None:
    some = EvaluationLeakage(torch.tensor([3, 5]), torch.tensor([[0, 1], [2, 3]]))
    assert some.of_chunks(torch.tensor([[3, 4], [5, 9]])).tolist() == [
        [[0, 7], [1, 7]],
        [[2, 7], [3, 7]],
    ]
    none = EvaluationLeakage(
        torch.empty(0, dtype=torch.int64), torch.empty(2, 0, dtype=torch.int64)
    )
    assert none.of_chunks(torch.tensor([1])).tolist() == [[7], [7]]


def test_the_curve_of_an_evaluation(data: RetroDataModule, tmp_path: Path) -> None:
    model = RetroLM.from_datamodule(
        data, width=16, layers=3, heads=2, evaluate_without_retrieval=True
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1, **quiet, default_root_dir=tmp_path)
    (figures,) = trainer.validate(model, data, verbose=False)
    table = data.prepared.corpora[0].leakage
    assert table is not None
    of_row = {"r": table.own, "r_seen": table.seen[:, :2]}
    assert set(model.leakage_curves) == set(of_row)
    for measure, longest in of_row.items():
        rows = model.leakage_curves[measure]
        assert [row["alpha"] for row in rows] == list(ALPHAS)
        for name in ("bits_per_byte", "bits_per_byte_served", "bits_per_byte_off"):
            assert rows[-1][name] == pytest.approx(figures[f"val/{name}"], rel=1e-5)
        r = longest.max(1) / table.real_tokens
        low = set(table.rows[r <= 0.5].tolist())
        nats, size, count = 0.0, 0, 0
        for batch in data.val_dataloader():
            labels = batch["labels"]
            with torch.no_grad():
                lost = token_nats(model.cpu().eval()(batch), labels)
            of = chunks_of_labels(batch["chunk_ids"], batch["chunk_lengths"], labels, data.eos_id)
            chosen = torch.tensor(np.isin(of.numpy(), list(low)))
            chosen &= (labels != -100) & (labels != data.eos_id)
            nats += float(lost[chosen].double().sum())
            size += int(model.bytes_per_token[labels[chosen]].sum())
            count += int(chosen.sum())
        assert rows[3]["labels"] == count
        assert 0 < count < rows[-1]["labels"]
        assert rows[3]["bits_per_byte"] == pytest.approx(nats / np.log(2) / size, rel=1e-5)
        lines = format_curve(rows, measure).splitlines()
        assert len(lines) == 1 + len(ALPHAS)
        assert f"{rows[3]['bits_per_byte']:.4f}" in lines[4]
        drawn = ElementTree.fromstring(draw_curve(rows, measure))
        assert len(drawn.findall("{*}polyline")) == 4
