"""What only a machine with a GPU can show. `pytest -m gpu`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_stage import DeviceStage

from retro_data import RetroDataModule, RetroLM, pipeline, retro_lm
from retro_data.embedder import Embedder
from retro_data.embedder_settings import EmbedderSettings
from retro_data.engines import EngineSettings, LocalEngine
from retro_data.retro_lm import Attention, rotation
from retro_data.stage import complete
from retro_data.store import Embeddings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def rows_of(settings: pipeline.Settings) -> np.ndarray[Any, Any]:
    (folder,) = (settings.root / "embeddings").iterdir()
    return np.concatenate(list(Embeddings(folder).blocks()))


def cosines(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(
    ("precision", "least"), [("fp32", 0.99999), ("fp16", 0.9999), ("bf16", 0.999)]
)
def test_vectors_agree_with_the_cpu(tiny_encoder: Path, precision: str, least: float) -> None:
    from conftest import make_documents

    texts = [document["text"] for document in make_documents(300)]
    truth = Embedder(EmbedderSettings(precision="fp32"), tiny_encoder)
    ours = Embedder(EmbedderSettings(precision=precision), tiny_encoder, "cuda:0")
    expected, _ = truth.embed(truth.encode_texts(texts))
    found, _ = ours.embed(ours.encode_texts(texts))
    assert cosines(found, expected).min() >= least


def test_gradients_are_finite_where_cudnn_gives_nan() -> None:
    """64 keys under a mask, every logit near -120: `retro_lm.ATTENTION_BACKENDS` says more."""
    torch.manual_seed(0)
    attention = Attention(64, 64, 64).cuda()
    with torch.no_grad():
        attention.query.bias.fill_(3.9)
        attention.key_value.bias[:64] = -3.9
        for norm in (attention.query_norm, attention.key_norm):
            norm.weight.fill_(3.9)
    x, context = (torch.randn(8, n, 64, device="cuda", requires_grad=True) for n in (256, 64))
    at = [rotation(torch.zeros(n, device="cuda"), 64) for n in (256, 64)]
    mask = torch.ones(8, 1, 1, 64, dtype=torch.bool, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        follows = torch.ones(8, 64, dtype=torch.bool, device="cuda")
        attention(x, at[0], mask, follows, (context, at[1])).float().pow(2).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.skipif(not retro_lm.HAS_VARLEN, reason="needs torch 2.11")
@pytest.mark.parametrize("heads", [2, 8])  # of 80 dimensions, or of 20: it takes no such
def test_runs_of_documents_are_attended_as_under_the_mask(
    monkeypatch: pytest.MonkeyPatch, heads: int
) -> None:
    """Where FlashAttention takes runs, with any number of documents a row: outputs and gradients."""
    torch.manual_seed(0)
    weight = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    assert retro_lm.runs_can_be_attended(weight, 160 // heads) == (heads == 2)
    model = RetroLM(500, 500, width=160, layers=3, heads=heads, retrieval=False).cuda()
    ids = torch.randint(500, (4, 1024), device="cuda")
    sizes = torch.randint(1, 65, (4, 16), device="cuda")
    documents = torch.randint(2, (4, 16), device="cuda").cumsum(1)
    documents[0], documents[1] = 5, torch.arange(16)  # one, and as many as there are chunks
    ends = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (0, 1), value=True)
    lengths = torch.where(ends, sizes, 64)
    real = (torch.arange(64, device="cuda") < lengths[..., None]).flatten(1)
    batch = {"input_ids": ids.where(real, 500), "chunk_lengths": lengths, "document_ids": documents}
    found = []
    for by_runs, narrow in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(retro_lm, "HAS_VARLEN", by_runs)
        with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            logits = model(batch)[real].float()
        model.zero_grad()
        (logits.logsumexp(-1) * torch.linspace(0, 1, len(logits), device="cuda")).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logits, gradients))
    for of_runs, under_mask, exact in zip(*found, strict=True):
        assert of_runs.isfinite().all()
        off, off_under_mask = ((x - exact).norm() / exact.norm() for x in (of_runs, under_mask))
        assert off < 1.5 * off_under_mask + 1e-3, (off, off_under_mask)


def test_every_worker_sees_one_device_of_its_own(tmp_path: Path) -> None:
    notes = complete(DeviceStage(), tmp_path / "a", LocalEngine())["notes"]
    assert {note["count"] for note in notes} == {1}
    assert len({note["visible"] for note in notes}) == torch.cuda.device_count()
    chosen = LocalEngine(EngineSettings(devices=(torch.cuda.device_count() - 1,)))
    notes = complete(DeviceStage(), tmp_path / "b", chosen)["notes"]
    assert len({note["visible"] for note in notes}) == 1


def test_any_number_of_devices_gives_the_same_bytes(
    small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    results = []
    for name, devices in (("all", None), ("one", [0])):
        arguments = small(root=tmp_path / name, engine={"devices": devices})
        settings = pipeline.Settings.create(**arguments)
        pipeline.prepare(settings)
        results.append(rows_of(settings))
        assert np.isfinite(results[-1]).all()
    assert np.array_equal(*results)


@pytest.mark.parametrize("devices", [1, -1])
def test_training_on_the_devices_of_the_trainer(
    small: Callable[..., dict[str, Any]], tmp_path: Path, devices: int
) -> None:
    from lightning import Trainer

    if devices == -1 and torch.cuda.device_count() > 1:
        pytest.skip("several processes are started by torchrun, not within a test")
    datamodule = RetroDataModule(**small(splits={"val": 0.2}), seq_len=64, batch_size=4)
    datamodule.prepare_data()
    model = RetroLM.from_datamodule(datamodule, width=32, layers=3, heads=2)
    trainer = Trainer(
        max_steps=3,
        accelerator="gpu",
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule)
    assert trainer.global_step == 3
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


# ---- exact search --------------------------------------------------------------------------------


def documents(rows: int, size: int) -> Any:
    """[lo, hi) of each row's document, documents of `size` rows."""
    low = np.arange(rows) // size * size
    return np.stack([low, np.minimum(low + size, rows)], 1)


def clustered(rows: int, dim: int) -> Any:
    rng = np.random.default_rng(rows)
    centers = rng.standard_normal((max(1, rows // 100), dim), dtype=np.float32)
    x = centers[rng.integers(len(centers), size=rows)]
    x += rng.standard_normal((rows, dim), dtype=np.float32)
    return (x / 10).astype(np.float16)


def assert_same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.distances, expected.distances)


@pytest.mark.parametrize(
    ("rows", "dim", "k", "metric", "options"),
    [
        (20_005, 768, 16, "l2", {}),
        (9_001, 100, 128, "ip", {"tile_rows": 4096, "panel_rows": 2048}),
        (9_001, 100, 24, "l2", {"panel_rows": 256}),  # panels enough to learn others' floors
        (9_001, 100, 128, "ip", {"tile_rows": 2048, "resident_bytes": 0}),  # from the host
        (7, 768, 16, "l2", {}),
        (1, 768, 16, "l2", {}),
    ],
)
def test_exact_search_has_the_results_of_the_cpu(
    rows: int, dim: int, k: int, metric: Any, options: dict[str, int]
) -> None:
    """Any queries, and all rows of the database at once: the same bits."""
    from retro_data.all_pairs_triton import AllPairs
    from retro_data.exact import nearest
    from retro_data.exact_triton import GpuSearch
    from retro_data.vectors import Neighbors, Vectors

    x = clustered(rows, dim)
    x[rows // 2 :] = x[: rows - rows // 2]  # every vector twice: ties go to the lower id
    x[5:rows:1000] = 0  # chunks without encoder tokens
    own = documents(rows, 20)
    admitted = np.random.default_rng(1).random(rows) < 0.9 if rows < 10_000 else None
    database = Vectors([x[: rows // 3], x[rows // 3 :]])
    search = GpuSearch(database, metric, admitted, "cuda:0", **options)
    assert search.is_resident == ("resident_bytes" not in options)
    expected = nearest(x, database, k, metric=metric, excluded=own, admitted=admitted)
    some = slice(100, 1500)
    assert_same(search.search(x[some], k, own[some]), Neighbors(*(e[some] for e in expected)))
    if not search.is_resident:
        return
    others = [
        GpuSearch(database, metric, admitted, f"cuda:{i}", **options)
        for i in range(1, torch.cuda.device_count())
    ]
    for searches in ([search], [search, search], [search, *others]):  # shared, if only on one
        pairs = AllPairs(searches, k, own, 0, rows)
        for low, high in ((0, rows // 4), (rows // 4, rows // 3), (rows // 2, rows), (0, 9)):
            high = min(high, rows)
            found = pairs.neighbors(low, high)
            assert_same(found, Neighbors(*(e[low:high] for e in expected)))


def test_exact_search_of_equal_rows_and_of_ascending_similarity() -> None:
    """More ties than a list holds; and every row nearer to the last ones than all before it."""
    from retro_data.exact import Search, nearest
    from retro_data.vectors import Vectors

    equal = clustered(6000, 768)
    equal[500:5500] = equal[500]
    rng = np.random.default_rng(0)
    query = rng.standard_normal(768)
    noise = rng.standard_normal((17_000, 768))
    ascending = (query + np.linspace(3, 0.1, 17_000)[:, None] * noise) / 30
    for x, checked in ((equal, slice(400, 700)), (ascending.astype(np.float16), slice(-300, None))):
        own = documents(len(x), 20)
        database = Vectors([x])
        found = Search(database, metric="l2", device="cuda:0").of_itself(16, own).rows(0, len(x))
        expected = nearest(x[checked], database, 16, metric="l2", excluded=own[checked])
        assert_same(type(found)(found.ids[checked], found.distances[checked]), expected)


def test_neighbors_of_a_corpus_are_the_same_with_and_without_a_gpu(
    small: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from retro_data.store import NeighborLists

    found = []
    shared = pipeline.Settings.create(**small(root=tmp_path, neighbors={"num_stored": 6}))
    for devices in ([0], []):
        arguments = small(
            root=tmp_path,
            engine={"devices": devices},
            neighbors={"num_stored": 6, "block_rows": 40},
        )
        pipeline.prepare(pipeline.Settings.create(**arguments))
        (folder,) = (shared.root / "neighbors").iterdir()
        lists = NeighborLists(folder)
        found.append((np.array(lists.ids), np.array(lists.distances)))
        shutil.rmtree(folder)
    for on_gpu, on_cpu in zip(*found, strict=True):
        np.testing.assert_array_equal(on_gpu, on_cpu)
