"""Embedding on a GPU: our own forward pass there gives the vectors of transformers. `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared import Made
from test_embedder import MINILM, TEXTS, broken_encoder, needs_minilm, reference, vectors_of

from retro_data.embedder import FLOAT8_CAPABILITY, Embedder, Ragged
from retro_data.embedder_settings import EmbedderSettings, embedder_folder
from retro_data.embeddings import EmbeddingStage
from retro_data.engines import InlineEngine, LocalEngine
from retro_data.errors import RetroDataError
from retro_data.stage import complete
from retro_data.store import Embeddings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_float8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FLOAT8_CAPABILITY,
    reason="a GPU that multiplies no float8",
)
Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """Four layers of BERT-base's shape, with biases and norms that matter."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_hidden_layers=4)
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


VOCABULARY = 200  # less than the words that the tiny encoder's tokenizer knows


def on_gpu(folder: Path, **changes: Any) -> Embedder:
    return Embedder(EmbedderSettings(name=str(folder), **changes), folder, "cuda:0")


def random_texts(count: int, longest: int, seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, longest + 1, count)
    sizes[: count // 2] = 64
    return Ragged(rng.integers(5, VOCABULARY, sizes.sum()).astype(np.int32), sizes)


def some_of(ragged: Ragged, rows: Array) -> Ragged:
    ends = np.cumsum(ragged.sizes)
    parts = [ragged.ids[end - size : end] for end, size in zip(ends, ragged.sizes, strict=True)]
    return Ragged(np.concatenate([parts[row] for row in rows]), ragged.sizes[rows])


def cosines(a: Array, b: Array) -> Array:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


@pytest.mark.parametrize(
    ("precision", "least"),
    [("fp16", 0.9999), ("bf16", 0.9995), pytest.param("fp8", 0.99, marks=needs_float8)],
)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_equals_transformers_in_fp32(
    base: Path, precision: str, least: float, pooling: str
) -> None:
    ours = on_gpu(base, precision=precision, pooling=pooling)
    assert ours.forward.startswith("triton")
    truth = on_gpu(base, precision="fp32", pooling=pooling)
    assert truth.forward == "transformers"
    ragged = random_texts(600, 300)
    found, expected = ours.embed(ragged)[0], truth.embed(ragged)[0]
    real = ragged.sizes > 0
    assert not found[~real].any()
    assert ours.embed(some_of(ragged, np.flatnonzero(~real)))[0].shape == ((~real).sum(), 768)
    assert ours.embed(Ragged(ragged.ids[:0], ragged.sizes[:0]))[0].shape == (0, 768)
    assert cosines(found[real], expected[real]).min() >= least


@needs_minilm
@pytest.mark.parametrize(
    ("precision", "least"),
    [("fp16", 0.9999), ("bf16", 0.999), pytest.param("fp8", 0.98, marks=needs_float8)],
)
def test_real_weights_on_real_text(precision: str, least: float) -> None:
    folder = embedder_folder(EmbedderSettings(name=MINILM))
    contents = [
        "The quick brown fox jumps over the lazy dog.",
        "In the beginning God created the heaven and the earth. And the earth was without form.",
        "Straße, naïve, 日本語 and 🙂.",
        "Population: 5,094,114 (July 2024 est.) comparison ranking: total 127 " * 4,
    ]
    found = vectors_of(on_gpu(folder, precision=precision, normalize=True), contents)
    expected = reference(folder, contents, pooling="mean", normalize=True)
    assert cosines(found, expected).min() >= least


@pytest.mark.parametrize("precision", ["fp16", "bf16", pytest.param("fp8", marks=needs_float8)])
def test_a_text_has_the_same_bits_in_any_batch(base: Path, precision: str) -> None:
    ours = on_gpu(base, precision=precision)
    ragged = random_texts(9000, 150)
    whole, _ = ours.embed(ragged)
    rows = np.random.default_rng(1).permutation(len(whole))[:1500]
    for some in (rows, rows[:40], rows[:1]):
        np.testing.assert_array_equal(ours.embed(some_of(ragged, some))[0], whole[some])
    with ThreadPoolExecutor(3) as pool:
        for found, _ in pool.map(ours.embed, [ragged] * 6):
            np.testing.assert_array_equal(found, whole)
    small = on_gpu(base, precision=precision, batch_tokens=20_000)
    np.testing.assert_array_equal(small.embed(ragged)[0], whole)


def test_products_by_torch_are_beneath_where_cublaslt_is_not(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retro_data import bert_triton
    from retro_data.cublaslt import CublasLtError

    ragged = random_texts(500, 100)
    ours = on_gpu(base)
    assert ours.forward == "triton, products by cublaslt"

    def missing(device: torch.device) -> None:
        raise CublasLtError("none here")

    monkeypatch.setattr(bert_triton, "CublasLt", missing)
    plain = on_gpu(base)
    assert plain.forward == "triton, products by torch"
    real = ragged.sizes > 0
    found, expected = plain.embed(ragged)[0][real], ours.embed(ragged)[0][real]
    assert cosines(found, expected).min() > 0.99999


def test_float8_is_refused_where_nothing_multiplies_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retro_data import bert_triton
    from retro_data.cublaslt import CublasLtError

    def missing(device: torch.device) -> None:
        raise CublasLtError("none here")

    monkeypatch.setattr(bert_triton, "CublasLt", missing)
    with pytest.raises(RetroDataError, match=r"none here\. Set embedder\.precision=fp16"):
        on_gpu(base, precision="fp8")


def test_another_architecture_runs_by_transformers(tmp_path: Path, tiny_encoder: Path) -> None:
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.save_pretrained(tmp_path)
    config = DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=64
    )
    DistilBertModel(config).save_pretrained(tmp_path)
    ours = on_gpu(tmp_path)
    assert ours.forward == "transformers"
    expected = reference(tmp_path, TEXTS, pooling="mean", normalize=False)
    assert cosines(vectors_of(ours, TEXTS), expected).min() >= 0.9999


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_vectors_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_encoder: Path, value: float
) -> None:
    chosen = on_gpu(broken_encoder(tiny_encoder, tmp_path / "broken", value))
    with pytest.raises(RetroDataError, match=r"not finite.*embedder\.normalize=true"):
        vectors_of(chosen, TEXTS)


def test_two_blocks_at_once_give_the_bytes_of_one_after_the_other(
    tmp_path: Path, small: Small, tiny_encoder: Path
) -> None:
    """Through the stage, in a worker and here; the LM has a vocabulary of its own."""
    group = {"name": str(tiny_encoder), "block_rows": 100}
    made = Made(small(embedder=group), "chunks")
    stage = EmbeddingStage(
        made.settings.embedder, "small", made.steps["chunks small"].place, made.folder("tokenizer")
    )
    vectors = []
    for name, engine in (("worker", LocalEngine()), ("here", InlineEngine("cuda:0"))):
        manifest = complete(stage, tmp_path / name, engine)
        assert manifest["forward"] == ["triton, products by cublaslt"]
        vectors.append(np.concatenate(list(Embeddings(tmp_path / name).blocks())))
    assert len(manifest["arrays"]) > 3
    np.testing.assert_array_equal(*vectors)
