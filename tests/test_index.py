"""The index stage: what is in it, how its recall is told, and what it refuses."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_data import artifact, index_factory, integrity, store
from retro_data.codebook import CodebookStage, Trainer
from retro_data.database import DatabasePlace, draw_rows
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine, local
from retro_data.engines.local import StageFailed
from retro_data.errors import RetroDataError
from retro_data.index import Adder, IndexStage
from retro_data.index_factory import (
    choose_factory,
    choose_shard_rows,
    estimated_bytes,
    parse_memory,
)
from retro_data.index_search import Measured, SearchIndex, first_of_the_best, load_index, merge
from retro_data.index_settings import IndexSettings
from retro_data.stage import Block, Receipt, Stage, complete, read_receipts, stage_key

Array = np.ndarray[Any, Any]
DIM = 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On work this small, threads cost more than they bring."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


# ---- databases -----------------------------------------------------------------------------------


def clustered(rows: int, seed: int = 0, clusters: int = 40, dim: int = DIM) -> Array:
    rng = np.random.default_rng(seed)
    centers = 4 * rng.standard_normal((clusters, dim))
    vectors = centers[rng.integers(0, clusters, rows)] + rng.standard_normal((rows, dim))
    return vectors.astype(np.float16)


def write_artifact(folder: Path, arrays: dict[str, Array], **manifest: Any) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for name, array in arrays.items():
        artifact.save_array(folder / name, array)
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    artifact.write_record(folder / artifact.MANIFEST, {"arrays": entries, **manifest})


def make_database(
    root: Path, vectors: Array, *, document_chunks: int = 5, stores: int = 1, refused: int = 0
) -> DatabasePlace:
    """Documents of `document_chunks` chunks in `stores` stores; every `refused`-th not admitted."""
    chunks, embeddings, admitted = [], [], {}
    for s, part in enumerate(np.array_split(vectors, stores)):
        rows = len(part)
        first = np.append(np.arange(0, rows, document_chunks), rows).astype(np.int64)
        documents = len(first) - 1
        arrays = {
            store.TOKENS: np.zeros((rows, 1), np.uint16),
            store.LENGTHS: np.ones(rows, np.uint8),
            store.DOCUMENT_OF_CHUNK: (np.arange(rows) // document_chunks).astype(np.int32),
            store.DOCUMENT_KEYS: np.stack(
                [np.full(documents, s, np.uint64), np.arange(documents, dtype=np.uint64)], 1
            ),
            store.DOCUMENT_FIRST_CHUNK: first,
            store.DOCUMENT_TOKENS: np.diff(first),
            store.DOCUMENT_BYTES: np.diff(first),
            store.DOCUMENT_ID_BYTES: np.zeros(0, np.uint8),
            store.DOCUMENT_ID_OFFSETS: np.zeros(documents + 1, np.int64),
        }
        chunks.append(root / f"chunks-{s}")
        write_artifact(chunks[-1], arrays, fields={"name": f"store-{s}"}, key=f"chunks-{s}")
        embeddings.append((root / f"embeddings-{s}", f"embeddings-{s}"))
        half = rows // 2
        blocks = {store.block_name(0): part[:half], store.block_name(1): part[half:]}
        write_artifact(embeddings[-1][0], blocks, dim=vectors.shape[1])
        keep = np.ones(documents, bool)
        if refused:
            keep[::refused] = False
        admitted[store.admitted_name(s)] = keep
    write_artifact(root / "database", admitted, rows=len(vectors))
    return DatabasePlace(root / "database", "database", tuple(chunks), tuple(embeddings))


def build(
    place: DatabasePlace, folder: Path, metric: str = "l2", **changes: Any
) -> tuple[SearchIndex, dict[str, Any]]:
    chosen: dict[str, Any] = {"planner": "builtin", "recall_queries": 200, "threads": 1, **changes}
    stage = index_stage(IndexSettings(**chosen), metric, place, folder)
    manifest = complete(stage, folder, InlineEngine())
    return load_index(folder), manifest


def index_stage(
    settings: IndexSettings, metric: str, place: DatabasePlace, folder: Path, device: str = "cpu"
) -> IndexStage:
    """The stage of an index in `folder`; what it is trained to lies beside it."""
    training = CodebookStage(settings, metric, place)
    trained = folder.with_name(f"{folder.name}-codebook"), stage_key(training)
    complete(training, trained[0], InlineEngine(device))
    return IndexStage(settings, metric, place, trained)


def exact_others(place: DatabasePlace, k: int, metric: str = "l2") -> tuple[Array, Array]:
    """Rows that may be found, and for each its k nearest of other documents, by numpy alone."""
    database = place.open()
    vectors = database.rows(0, database.shape[0]).astype(np.float64)
    rows = np.flatnonzero(database.admitted & vectors.any(1))
    found = vectors[rows]
    scores = found @ found.T
    if metric == "l2":
        scores -= (found**2).sum(1) / 2
    own = database.own_documents(rows)
    scores[(rows >= own[:, :1]) & (rows < own[:, 1:])] = -np.inf
    return rows, rows[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def share_found(index: SearchIndex, place: DatabasePlace, k: int, metric: str = "l2") -> float:
    """recall@k of an index, with hits of the query's own document dropped from a wider search."""
    rows, truth = exact_others(place, k, metric)
    database = place.open()
    own, hits = database.own_documents(rows), index.search(database.vectors.take(rows), 4 * k)[1]
    shares = []
    for (low, high), ids, true in zip(own, hits, truth, strict=True):
        others = ids[(ids >= 0) & ~((ids >= low) & (ids < high))][:k]
        shares.append(np.isin(true, others).mean())
    return float(np.mean(shares))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> DatabasePlace:
    """1,200 rows in two stores; every fourth document is not admitted, some rows are zero."""
    vectors = clustered(1200)
    vectors[::37] = 0
    return make_database(tmp_path_factory.mktemp("database"), vectors, stores=2, refused=4)


# ---- what is in it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory", ["Flat", "SQfp16", "HNSW16", "IVF16,Flat", "IVF16,SQfp16", "PCA8,IVF16,Flat"]
)
def test_ids_are_global_rows_and_only_of_rows_that_may_be_found(
    tmp_path: Path, place: DatabasePlace, factory: str
) -> None:
    index, manifest = build(place, tmp_path / "index", factory=factory)
    database = place.open()
    vectors = database.rows(0, database.shape[0])
    may_be_found = database.admitted & vectors.any(1)
    assert manifest["rows"] == len(index) == may_be_found.sum() < len(vectors)
    assert manifest["figures"]["rows_left_out"] == len(vectors) - len(index)
    hits = index.search(vectors, 4 * DIM)[1]
    assert set(np.unique(hits[hits >= 0])) <= set(np.flatnonzero(may_be_found))
    first = hits[may_be_found, 0]  # a stored row is its own nearest
    if "PCA" not in factory:
        assert (first == np.flatnonzero(may_be_found)).mean() > 0.99


def test_distances_are_squared_l2(tmp_path: Path, place: DatabasePlace) -> None:
    index, _ = build(place, tmp_path / "index", factory="IVF16,Flat")
    vectors = place.open().rows(0, 1200).astype(np.float32)
    distances, ids = index.search(vectors[:50], 5)
    assert distances.dtype == np.float32
    assert ids.dtype == np.int64
    expected = ((vectors[:50, None] - vectors[ids]) ** 2).sum(2)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-3)
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF16,SQfp16", "IVF16,PQ4x4"])
def test_inner_product(tmp_path: Path, place: DatabasePlace, factory: str) -> None:
    index, manifest = build(place, tmp_path / "index", "ip", factory=factory, recall_queries=10**6)
    vectors = place.open().rows(0, 1200).astype(np.float32)
    distances, ids = index.search(vectors[:50], 5)
    assert (np.diff(distances, axis=1) <= 0).all()
    if "PQ" not in factory:
        expected = (vectors[:50, None] * vectors[ids]).sum(2)
        np.testing.assert_allclose(distances, expected, rtol=1e-2, atol=0.2)
        assert manifest["figures"]["recall"] >= 0.95
    if factory in ("Flat", "IVF16,SQfp16"):  # a graph's wider search finds more; codes tie
        assert manifest["figures"]["recall"] == pytest.approx(
            share_found(index, place, 10, "ip"), abs=0.002
        )


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_rotated_codes(tmp_path: Path, metric: str) -> None:
    rows, factory = 300, "OPQ4_16,IVF4_HNSW8,PQ4"
    place = make_database(tmp_path, clustered(rows))
    index, manifest = build(place, tmp_path / "index", metric, factory=factory)
    assert manifest["factory"] == factory
    assert manifest["figures"]["recall"] >= 0.9
    assert share_found(index, place, 10, metric) >= 0.9
    estimate = estimated_bytes(factory, rows, DIM)
    assert manifest["figures"]["bytes"] == pytest.approx(estimate, abs=2000)


def test_missing_neighbors_are_minus_one_at_an_infinite_distance(tmp_path: Path) -> None:
    place = make_database(tmp_path, clustered(7))
    for metric, worst in (("l2", np.inf), ("ip", -np.inf)):
        index, _ = build(place, tmp_path / metric, metric)
        distances, ids = index.search(clustered(3, seed=1), 10)
        assert (np.sort(ids[:, :7]) == np.arange(7)).all()
        assert (ids[:, 7:] == -1).all()
        assert (distances[:, 7:] == worst).all()
    assert [a.shape for a in index.search(np.zeros((0, DIM), np.float16), 4)] == [(0, 4)] * 2


# ---- recall --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32,PQ4x4", "Flat"])
def test_the_recorded_recall_is_that_of_the_loaded_index(
    tmp_path: Path, place: DatabasePlace, factory: str
) -> None:
    index, manifest = build(place, tmp_path / "index", factory=factory, recall_queries=10**6)
    figures = manifest["figures"]
    assert figures["recall_at"] == 10
    assert figures["recall_queries"] == len(index)
    assert figures["recall"] == pytest.approx(share_found(index, place, 10), abs=0.002)


def test_the_search_parameter_is_the_smallest_that_reaches_the_target(
    tmp_path: Path, place: DatabasePlace
) -> None:
    found = {}
    for target in (0.5, 0.95, 1.0):
        index, manifest = build(
            place, tmp_path / str(target), factory="IVF48,Flat", target_recall=target
        )
        found[target] = manifest["search_parameters"]["nprobe"]
        assert manifest["figures"]["recall"] >= target
        if found[target] > 1:
            narrower = manifest | {"search_parameters": {"nprobe": found[target] // 2}}
            narrow = load_index(tmp_path / str(target), narrower)
            assert share_found(narrow, place, 10) < share_found(index, place, 10)
    assert found[0.5] <= found[0.95] <= found[1.0]
    assert all(nprobe in (1, 2, 4, 8, 16, 32, 48) for nprobe in found.values())
    assert found[0.5] < found[1.0]


def test_a_target_out_of_reach_is_told_with_numbers(
    tmp_path: Path, place: DatabasePlace, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, manifest = build(place, tmp_path / "index", factory="IVF32,PQ2x4", target_recall=0.99)
    assert manifest["figures"]["recall"] < 0.9
    assert manifest["search_parameters"]["nprobe"] < 32  # more lists would cost and not help
    assert f"recall@10 {manifest['figures']['recall']:.4f}" in caplog.text
    assert "index.target_recall=0.99" in caplog.text


def test_more_time_for_nothing_is_not_spent() -> None:
    steps = [Measured({"nprobe": 2**i}, r, 1.0, 1) for i, r in enumerate((0.5, 0.8, 0.804, 0.803))]
    assert first_of_the_best(steps) is steps[1]
    assert first_of_the_best(steps[:1]) is steps[0]


def test_a_slow_query_is_told_and_changes_nothing(
    tmp_path: Path, place: DatabasePlace, caplog: pytest.LogCaptureFixture
) -> None:
    _, patient = build(place, tmp_path / "patient", factory="IVF32,Flat", max_query_ms=1e6)
    assert not caplog.text
    _, hasty = build(place, tmp_path / "hasty", factory="IVF32,Flat", max_query_ms=1e-9)
    assert "index.max_query_ms=1e-09" in caplog.text
    assert hasty["key"] == patient["key"]
    assert hasty["files"] == patient["files"]
    assert hasty["search_parameters"] == patient["search_parameters"]


@pytest.mark.parametrize("factory", ["HNSW16", "IVF32,SQfp16", "IVF64_HNSW8,Flat", "IVF16,PQ4x4"])
def test_the_same_data_and_seed_make_the_same_bytes(
    tmp_path: Path, place: DatabasePlace, factory: str
) -> None:
    options = {"factory": factory, "threads": 2 if "HNSW" in factory else 1}
    made = [build(place, tmp_path / name, **options)[1] for name in "ab"]
    assert made[0]["files"] == made[1]["files"]
    assert made[0]["search_parameters"] == made[1]["search_parameters"]
    _, other = build(place, tmp_path / "c", **options, seed=1)
    assert other["key"] != made[0]["key"]
    if "IVF" in factory:
        assert other["files"] != made[0]["files"]


def test_a_single_document_measures_no_recall(tmp_path: Path) -> None:
    place = make_database(tmp_path, clustered(200), document_chunks=200)
    _, manifest = build(place, tmp_path / "index", factory="IVF4,Flat")
    assert manifest["figures"]["recall"] is None
    assert manifest["search_parameters"] == {"nprobe": 4}


# ---- training ------------------------------------------------------------------------------------


def test_training_sees_the_whole_database(tmp_path: Path) -> None:
    """The first half is one cluster, the second half twenty: each must get centroids."""
    vectors = clustered(3000, clusters=20)
    vectors[:1500] = (100 + np.random.default_rng(1).standard_normal((1500, DIM))).astype("f2")
    place = make_database(tmp_path, vectors)
    _, manifest = build(place, tmp_path / "index", factory="IVF64,Flat", sample_size=800)
    assert manifest["figures"]["training_rows"] == 800
    index = faiss.read_index(str(tmp_path / "index" / store.index_name()))
    centroids = index.quantizer.reconstruct_n(0, 64)
    assert 16 <= (centroids > 50).all(1).sum() <= 48
    nearest = np.square(vectors[1500:, None].astype("f4") - centroids).sum(2).min(1)
    assert np.median(nearest) < 2 * DIM  # the spread of a cluster; any other center is far


def test_too_few_rows_to_train_on_make_a_flat_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = make_database(tmp_path, clustered(100))
    with caplog.at_level(logging.INFO):
        index, manifest = build(place, tmp_path / "index", factory="IVF128,Flat")
    assert manifest["factory"] == "Flat"
    trained = store.finished(tmp_path / "index-codebook")
    assert trained["fields"]["factory"] == "IVF128,Flat"
    assert "IVF128,Flat needs 128 vectors to train on, found 100" in caplog.text
    assert share_found(index, place, 5) == 1.0


@pytest.mark.parametrize(
    "factory", ["PQ4x4", "OPQ4,PQ4x4", "IVF16,PQ4+4", "IDMap,Flat", "Nonsense"]
)
def test_what_cannot_be_searched_beside_a_document_is_refused_before_it_is_trained(
    tmp_path: Path, place: DatabasePlace, factory: str
) -> None:
    with pytest.raises(RetroDataError, match=r"faiss cannot make index\.factory"):
        build(place, tmp_path / "index", factory=factory)


def test_files_filled_from_two_trainings_are_refused(tmp_path: Path, place: DatabasePlace) -> None:
    settings = IndexSettings(factory="IVF16,SQfp16", shard_rows=500, threads=1)
    stage = index_stage(settings, "l2", place, tmp_path / "i")
    manifest = complete(stage, tmp_path / "i", InlineEngine())
    assert len(manifest["files"]) > 1
    other = dataclasses.replace(settings, seed=settings.seed + 1)
    again = index_stage(other, "l2", place, tmp_path / "other").codebook[0]
    for name in (store.TRAINED_INDEX, artifact.MANIFEST):  # as another machine would have made it
        shutil.copy(again / name, stage.codebook[0] / name)
    (tmp_path / "i" / next(iter(manifest["files"]))).unlink()
    with pytest.raises(RetroDataError, match=r"two trainings .* Remove"):
        complete(stage, tmp_path / "i", InlineEngine())


def test_a_training_with_other_bytes_is_no_damage(
    tmp_path: Path, place: DatabasePlace, caplog: pytest.LogCaptureFixture
) -> None:
    settings = IndexSettings(factory="IVF16,SQ8", threads=1)
    folder = index_stage(settings, "l2", place, tmp_path / "i").codebook[0]
    other = CodebookStage(dataclasses.replace(settings, seed=9), "l2", place)
    with caplog.at_level(logging.INFO):
        assert integrity.recompute(other, folder, InlineEngine(), 1.0) == []
    assert "with other bytes" in caplog.text


def test_a_sample_too_small_is_refused(tmp_path: Path, place: DatabasePlace) -> None:
    with pytest.raises(RetroDataError, match=r"at least 128 .* index\.sample_size=100"):
        build(place, tmp_path / "index", factory="IVF128,Flat", sample_size=100)


@pytest.mark.parametrize("planner", ["autofaiss", "builtin"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_tiny_or_empty_database(tmp_path: Path, rows: int, planner: str) -> None:
    place = make_database(tmp_path, clustered(rows))
    index, _ = build(place, tmp_path / "index", planner=planner)
    assert (index.search(clustered(rows), 1)[1][:, 0] == np.arange(rows)).all()
    for name, database in (
        ("zero", make_database(tmp_path / "0", np.zeros((rows, DIM), np.float16))),
        ("refused", make_database(tmp_path / "1", clustered(rows), refused=1)),
    ):
        index, manifest = build(database, tmp_path / name, planner=planner)
        assert manifest["rows"] == len(index) == 0
        assert manifest["figures"]["recall"] is None
        assert (index.search(clustered(rows), 3)[1] == -1).all()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "PCA8,IVF16,SQfp16", "IVF16_HNSW8,Flat"])
def test_centroids_are_trained_where_a_gpu_would_be(
    place: DatabasePlace, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    """Not by faiss on its own, which knows no GPU, no seed of ours and no single-threaded graph."""
    trained = []
    whole = Trainer._train_centroids

    def train(self: Trainer, lists: Any, sample: Array) -> None:
        whole(self, lists, sample)
        trained.append(lists.quantizer.ntotal)

    monkeypatch.setattr(Trainer, "_train_centroids", train)
    trainer = Trainer(IndexSettings(factory=factory), "l2", place.open(), "cpu")
    trainer.train()
    assert trained == [16]
    assert trainer.index.is_trained
    assert trainer.index.ntotal == 0


@pytest.mark.parametrize("factory", ["PCA8,IVF16,SQfp16", "IVF16,PQ4x4fs"])
def test_lists_found_by_a_separate_index_of_centroids_are_the_same(
    tmp_path: Path, place: DatabasePlace, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    """On a GPU the centroids lie there, and rows are added to lists that it found."""
    stage = index_stage(IndexSettings(factory=factory), "l2", place, tmp_path / "i")
    trained = stage.codebook[0] / store.TRAINED_INDEX
    vectors = place.open().rows(100, 700).astype(np.float32)
    made = []
    for separate in (False, True):
        adder = Adder(trained, "l2", "cpu")
        if separate:  # as if in the memory of a GPU
            monkeypatch.setattr(adder, "gpu", "one")
            monkeypatch.setattr(faiss, "index_cpu_to_gpu", lambda *given: given[2], raising=False)
        index = adder.empty()
        adder.add(index, np.arange(100, 700), vectors)
        assert (adder.assigner is not None) == (separate and not factory.endswith("fs"))
        made.append(faiss.serialize_index(index))
    assert np.array_equal(*made)
    assert index.ntotal == 600


@pytest.mark.gpu
@pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus(),
    reason="needs faiss-gpu and a GPU",
)
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_built_on_a_gpu_and_searched_on_a_cpu(
    tmp_path: Path, place: DatabasePlace, metric: str
) -> None:
    """Trained there, and filled in three shards, whose rows find their lists there."""
    settings = IndexSettings(factory="OPQ4_16,IVF16,SQfp16", shard_rows=400)
    stage = index_stage(settings, metric, place, tmp_path / "index", "cuda:0")
    with stage.open("cuda:0") as context:
        assert context.adder.assigner is not None
    manifest = complete(stage, tmp_path / "index", InlineEngine("cuda:0"))
    assert manifest["figures"]["shards"] == 3
    assert manifest["figures"]["recall"] >= 0.95
    assert share_found(load_index(tmp_path / "index"), place, 10, metric) >= 0.95


# ---- several files -------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "factory",
    [
        *("Flat", "IVF16,Flat", "IVF16,SQfp16", "PCA8,IVF16_HNSW8,SQfp16"),
        *("IVF16,PQ4x4", "PCA8,IVF16_HNSW8,PQ4x4"),
    ],
)
def test_shards_find_what_one_index_finds(
    tmp_path: Path, place: DatabasePlace, factory: str, metric: str
) -> None:
    """The same distances, and the same rows but where several are as far as the last."""
    queries = place.open().rows(0, 1200)[::60].astype(np.float32)
    indexes = []
    for shard_rows, files in ((0, 1), (700, 2), (173, 7)):
        folder = tmp_path / str(shard_rows)
        index, manifest = build(place, folder, metric, factory=factory, shard_rows=shard_rows)
        assert manifest["figures"]["shards"] == files == len(list(folder.glob("*.index")))
        assert integrity.damage(folder, read=True) == []
        indexes.append((index, manifest))
    (one, whole), *several = indexes
    for index, manifest in several:
        assert len(index) == len(one) == manifest["rows"]
        assert manifest["search_parameters"] == whole["search_parameters"]
        assert manifest["figures"]["recall_queries"] == whole["figures"]["recall_queries"]
        # Codes tie, and another of those that are equally far may be found.
        far = 0.02 if "PQ" in factory else 0
        assert manifest["figures"]["recall"] == pytest.approx(whole["figures"]["recall"], abs=far)
        for nprobe, k in ((1, 5), (4, 60), (16, 1200)):
            one.parameters = index.parameters = one.parameters and {"nprobe": nprobe}
            expected, found = one.search(queries, k), index.search(queries, k)
            np.testing.assert_array_equal(found[0], expected[0])
            inside = found[0] != found[0][:, -1:]  # of those as far as the last, any may be listed
            for mine, theirs, real in zip(found[1], expected[1], inside, strict=True):
                assert set(mine[real]) == set(theirs[real])


def test_graphs_are_searched_together(tmp_path: Path, place: DatabasePlace) -> None:
    index, manifest = build(place, tmp_path / "index", factory="HNSW16", shard_rows=250)
    assert manifest["figures"]["shards"] == 5
    assert manifest["figures"]["recall"] >= 0.95
    assert share_found(index, place, 10) >= 0.95


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF16,SQfp16", "IVF16,PQ4x4"])
def test_a_shard_without_a_row_is_an_empty_file(tmp_path: Path, factory: str) -> None:
    vectors = clustered(900)
    vectors[300:600] = 0
    place = make_database(tmp_path, vectors)
    index, manifest = build(place, tmp_path / "index", factory=factory, shard_rows=150)
    assert len(list((tmp_path / "index").glob("*.index"))) == 6
    assert faiss.read_index(str(tmp_path / "index" / store.index_name(2))).ntotal == 0
    assert len(index) == manifest["rows"] == 600
    hits = index.search(vectors[[0, 450, 899]], 20)[1]
    assert ((hits >= -1) & ((hits < 300) | (hits >= 600))).all()
    if "PQ" not in factory:
        assert hits[0, 0] == 0
        assert hits[2, 0] == 899


def test_a_shard_is_a_sixteenth_of_the_budget_and_a_million_rows_at_least() -> None:
    for factory, rows, dim, memory in (
        ("IVF65536_HNSW32,SQfp16", 10**8, 768, "160G"),
        ("OPQ64_256,IVF262144_HNSW32,PQ64", 10**9, 768, "80G"),
        ("HNSW32", 10**7, 384, "32G"),
    ):
        most = choose_shard_rows(factory, rows, dim, memory)
        assert 2**20 < most < rows
        assert estimated_bytes(factory, rows, dim) * most / rows <= parse_memory(memory) / 16
    assert choose_shard_rows("IVF4096,SQfp16", 10**6, 768, "16G") == 2**20 > 10**6
    assert choose_shard_rows("Flat", 10**7, 768, "1M") == 2**20


def test_the_nearest_of_lists_are_merged_with_ties_to_the_lower_id() -> None:
    near = np.array([[1, 2, np.inf]], np.float32), np.array([[7, 3, -1]])
    far = np.array([[1, 2, 2]], np.float32), np.array([[5, 9, 2]])
    distances, ids = merge([near, far], 4, "l2")
    assert distances.tolist() == [[1, 1, 2, 2]]
    assert ids.tolist() == [[5, 7, 2, 3]]
    distances, ids = merge([near, far], 7, "ip")
    assert ids.tolist() == [[2, 3, 9, 5, 7, -1]]
    assert distances[0, -1] == -np.inf


class Unlucky(LocalEngine):
    """Kills a worker as soon as the first block is done."""

    def run(self, stage: Stage, folder: Path, missing: Sequence[Block]) -> Iterator[Receipt]:
        children: list[local._Child] = []
        make = local._Child.__init__

        def remembered(child: local._Child, *given: Any) -> None:
            make(child, *given)
            children.append(child)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local._Child, "__init__", remembered)
            receipts = super().run(stage, folder, missing)
            yield next(receipts)
        assert len(children) == 2
        children[1].process.kill()
        yield from receipts


def test_a_killed_worker_costs_its_shard_and_a_resume_makes_the_same_bytes(
    tmp_path: Path, place: DatabasePlace
) -> None:
    settings = IndexSettings(factory="IVF16,SQfp16", shard_rows=60, threads=1)
    engine = EngineSettings(devices=(), workers=2)
    folder = tmp_path / "killed"
    stage = index_stage(settings, "l2", place, folder)
    with pytest.raises(StageFailed, match=r"index: the worker process .* was killed by SIGKILL"):
        complete(stage, folder, Unlucky(engine))
    assert not store.is_finished(folder)
    done = {receipt.block: receipt for receipt in read_receipts(folder)}
    assert 0 < len(done) < 20
    resumed = complete(stage, folder, InlineEngine())
    assert all(receipt in read_receipts(folder) for receipt in done.values())
    _, whole = build(place, tmp_path / "whole", factory="IVF16,SQfp16", shard_rows=60)
    for name in ("files", "search_parameters", "rows"):
        assert resumed[name] == whole[name]


@pytest.mark.parametrize("count", [0, 1, 50, 10_000])
def test_rows_are_drawn_from_all_that_are_admitted(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retro_data.database.DRAWN_AT_ONCE", 97)
    admitted = np.random.default_rng(0).random(3000) < 0.3
    admitted[500:1000] = False
    rows = np.flatnonzero(admitted)
    expected = np.random.default_rng([3, 4]).choice(
        rows, min(count, len(rows)), replace=False, shuffle=False
    )
    assert draw_rows(admitted, count, [3, 4]).tolist() == np.sort(expected).tolist()


# ---- choosing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", ["autofaiss", "builtin"])
@pytest.mark.parametrize("memory_mapped", [True, False])
def test_a_planner_chooses_within_its_budget(
    tmp_path: Path, planner: str, memory_mapped: bool
) -> None:
    rows = 10_500
    place = make_database(tmp_path, clustered(rows))
    options = {"planner": planner, "memory_mapped": memory_mapped, "max_index_memory": "4M"}
    index, manifest = build(place, tmp_path / "index", **options)
    assert manifest["factory"] == choose_factory(planner, rows, DIM, "4M", memory_mapped)
    assert ("HNSW" in manifest["factory"]) == (not memory_mapped)
    figures = manifest["figures"]
    size = (tmp_path / "index" / store.index_name()).stat().st_size
    assert figures["bytes"] == manifest["files"][store.index_name()]["bytes"] == size <= 4 * 2**20
    assert size == pytest.approx(estimated_bytes(manifest["factory"], rows, DIM), rel=0.05)
    assert figures["recall"] >= 0.95
    assert figures["ms_per_query"] > 0
    assert len(index) == rows


@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF16,SQ8", "IVF64_HNSW32,PQ4x4"])
def test_sizes_are_estimated(tmp_path: Path, factory: str) -> None:
    rows = 2500
    _, manifest = build(make_database(tmp_path, clustered(rows)), tmp_path / "i", factory=factory)
    estimate = estimated_bytes(factory, rows, DIM)
    assert manifest["figures"]["bytes"] == pytest.approx(estimate, rel=0.06, abs=1500)


@pytest.mark.parametrize("planner", ["autofaiss", "builtin"])
def test_a_budget_that_nothing_fits_is_refused_with_numbers(
    tmp_path: Path, place: DatabasePlace, planner: str
) -> None:
    with pytest.raises(RetroDataError) as refused:
        choose_factory(planner, 20_000_000, 768, "64M", True)
    message = str(refused.value)
    for part in ("20000000", "768", "max_index_memory=64M", "67108864", "needs about", planner):
        assert part in message
    with pytest.raises(RetroDataError, match=r"no index of \d+ vectors of dimension 16 fits"):
        build(place, tmp_path / "index", planner=planner, max_index_memory="1K")


@settings(deadline=None, max_examples=60)
@given(
    planner=st.sampled_from(["autofaiss", "builtin"]),
    rows=st.integers(0, 10**9),
    dim=st.integers(1, 2048),
    megabytes=st.integers(1, 2**20),
    memory_mapped=st.booleans(),
)
def test_a_choice_fits_or_is_refused(
    planner: str, rows: int, dim: int, megabytes: int, memory_mapped: bool
) -> None:
    budget = f"{megabytes}M"
    try:
        factory = choose_factory(planner, rows, dim, budget, memory_mapped)
    except RetroDataError as refusal:
        need = int(str(refusal).rsplit("(", 2)[1].split(" bytes")[0])
        assert need > megabytes * 2**20
        return
    assert estimated_bytes(factory, rows, dim) <= megabytes * 2**20
    index = faiss.index_factory(dim, factory)  # faiss knows the name and takes the dimension
    assert index.d == dim


def test_autofaiss_is_named_where_it_is_missing(
    tmp_path: Path, place: DatabasePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "autofaiss"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "autofaiss", None)
    with pytest.raises(RetroDataError) as refused:
        build(place, tmp_path / "index", planner="autofaiss")
    assert "pip install 'retro_data[autofaiss]'" in str(refused.value)
    assert "index.planner=builtin" in str(refused.value)
    build(place, tmp_path / "other", planner="builtin")


@pytest.mark.parametrize(
    "factory", ["Foo", "IVF8", "", "IVF8,PQ7", "LSH", "NSG16", "IVF8,PQ4,RFlat"]
)
def test_a_factory_that_cannot_be_is_refused(
    tmp_path: Path, place: DatabasePlace, factory: str
) -> None:
    with pytest.raises(
        RetroDataError, match=r"index\.factory=.* for dimension 16: .*Expected e\.g"
    ):
        build(place, tmp_path / "index", factory=factory)


# ---- faiss itself --------------------------------------------------------------------------------


def test_two_wheels_of_faiss_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    index_factory.import_faiss.cache_clear()
    both = ["faiss-cpu", "faiss-gpu"]
    monkeypatch.setattr(index_factory, "installed_faiss", lambda: both)
    with pytest.raises(RetroDataError, match=r"pip uninstall -y faiss-cpu faiss-gpu"):
        index_factory.import_faiss()


def test_no_wheel_of_faiss_is_refused(
    tmp_path: Path, place: DatabasePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_factory.import_faiss.cache_clear()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RetroDataError, match=r"pip install 'retro_data\[cpu\]'"):
        build(place, tmp_path / "index")


def test_the_installed_wheel_is_found() -> None:
    assert index_factory.installed_faiss() in (["faiss-cpu"], ["faiss-gpu"])


# ---- the artifact --------------------------------------------------------------------------------


def test_what_keys_an_index(place: DatabasePlace) -> None:
    def stages(metric: str = "l2", **changes: Any) -> tuple[CodebookStage, IndexStage]:
        training = CodebookStage(IndexSettings(**changes), metric, place)
        trained = Path("nowhere"), stage_key(training)
        return training, IndexStage(training.settings, metric, place, trained)

    training, index = stages()
    assert set(training.key_fields()) == {
        *("metric", "planner", "factory", "max_index_memory", "memory_mapped", "sample_size"),
        "seed",
    }
    assert set(index.key_fields()) == {
        *("metric", "target_recall", "recall_at", "recall_queries", "shard_rows"),
    }
    assert training.parents() == place.parents()
    assert index.parents() == {"codebook": stage_key(training), **place.parents()}
    keys = [stage_key(stage) for stage in stages()]
    assert [stage_key(pickle.loads(pickle.dumps(stage))) for stage in stages()] == keys
    assert [stage_key(stage) for stage in stages(threads=3, max_query_ms=1)] == keys
    for change in ({"metric": "ip"}, {"seed": 1}, {"sample_size": 9}):
        other = [stage_key(stage) for stage in stages(**change)]
        assert other[0] != keys[0]
        assert other[1] != keys[1]
    assert stage_key(stages(shard_rows=100)[0]) == keys[0]  # nothing is trained again
    assert stage_key(stages(shard_rows=100)[1]) != keys[1]


def test_a_finished_index_is_whole_and_a_damaged_one_is_told(
    tmp_path: Path, place: DatabasePlace
) -> None:
    folder = tmp_path / "index"
    _, manifest = build(place, folder, factory="IVF16,Flat")
    assert integrity.damage(folder, read=True) == []
    with pytest.raises(RetroDataError, match="its manifest says 5"):
        load_index(folder, {**manifest, "rows": 5})
    with pytest.raises(RetroDataError, match="dimension 16"):
        load_index(folder).search(np.zeros((1, 8), np.float32), 1)
    path = folder / store.index_name()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RetroDataError, match="cannot be read"):
        load_index(folder)
    with pytest.raises(RetroDataError, match="not finished"):
        load_index(tmp_path / "elsewhere")


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 1000), st.sampled_from("KMGTkmgt"), st.sampled_from(["", "B", "b"]))
def test_memory_is_parsed(number: int, unit: str, suffix: str) -> None:
    power = "KMGT".index(unit.upper()) + 1
    assert parse_memory(f"{number}{unit}{suffix}") == number * 1024**power


@pytest.mark.parametrize(
    "wrong",
    [
        {"planner": "magic"},
        {"max_index_memory": "much"},
        {"max_index_memory": "4"},
        {"target_recall": 0},
        {"target_recall": 1.5},
        {"recall_at": 0},
        {"recall_queries": 0},
        {"sample_size": 0},
        {"max_query_ms": 0},
        {"shard_rows": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(RetroDataError, match=rf"index\.{name}="):
        IndexSettings(**wrong)
