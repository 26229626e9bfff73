"""What only a machine with a GPU can show. `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_stage import DeviceStage

from retro_data import RetroDataModule, RetroLM, pipeline
from retro_data.embedder import Embedder, EmbedderSettings
from retro_data.engines import EngineSettings, LocalEngine
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


@pytest.mark.parametrize(
    ("rows", "dim", "k", "metric", "tile_rows", "resident_bytes"),
    [
        (20_000, 384, 32, "l2", 2**20, None),
        (20_000, 768, 16, "ip", 2**20, None),
        (9_001, 100, 64, "l2", 4096, 0),  # streamed from the host, rows that need padding
        (5_000, 36, 128, "ip", 2048, None),
        (7, 64, 10, "l2", 2**20, None),
        (1, 64, 2, "l2", 2**20, None),
    ],
)
def test_exact_search_has_the_results_of_the_cpu(
    rows: int, dim: int, k: int, metric: Any, tile_rows: int, resident_bytes: int | None
) -> None:
    from retro_data.exact import Vectors, nearest
    from retro_data.exact_triton import GpuSearch

    rng = np.random.default_rng(rows)
    centers = rng.standard_normal((max(1, rows // 100), dim))
    x = (centers[rng.integers(len(centers), size=rows)] + rng.standard_normal((rows, dim))) / 10
    x = x.astype(np.float16)
    x[rows // 2 :] = x[: rows - rows // 2]  # every vector twice: ties go to the lower id
    x[5:rows:1000] = 0  # chunks without encoder tokens
    document = np.arange(rows) // 20
    excluded = np.stack([document * 20, np.minimum(document * 20 + 20, rows)], 1)
    admitted = rng.random(rows) < 0.8
    queries = slice(0, 2000)
    database = Vectors([x[: rows // 3], x[rows // 3 :]])
    search = GpuSearch(database, metric, admitted, "cuda:0", resident_bytes, tile_rows)
    assert search.is_resident == (resident_bytes is None)
    found = search.search(x[queries], k, excluded[queries])
    expected = nearest(
        x[queries], database, k, metric=metric, excluded=excluded[queries], admitted=admitted
    )
    assert (found.ids == expected.ids).mean() > 0.9999
    assert np.array_equal(found.distances, expected.distances)


def test_ascending_similarity_is_the_worst_order_and_still_exact() -> None:
    from retro_data.exact import Vectors, nearest

    rng = np.random.default_rng(0)
    query = rng.standard_normal(64)
    x = (query + np.linspace(3, 0.1, 30_000)[:, None] * rng.standard_normal((30_000, 64))) / 8
    x = x.astype(np.float16)
    found, expected = (
        nearest(x[-500:], Vectors([x]), 32, metric="l2", excluded=None, device=device)
        for device in ("cuda:0", "cpu")
    )
    assert np.array_equal(found.ids, expected.ids)
