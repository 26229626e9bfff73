"""Documents to the chunk store: every token once, in order, cut at chunk_size and at documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Made, corpus_of, texts

from retro_data import chunks
from retro_data.chunks import ChunkSettings, cut_chunks, nanotoken_encoder, with_bos
from retro_data.errors import RetroDataError
from retro_data.scan import document_key, keys_array
from retro_data.store import ChunkStore
from retro_data.tokenizer import LmTokenizer

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]

PAD = 60_000
NO_PIECES = "\u200b\u200b"  # no white space, yet WordPiece drops what cannot be seen


# ---- cutting, against plain Python ---------------------------------------------------------------


def documents_of(sizes: list[int]) -> list[list[int]]:
    """Documents of these sizes whose tokens are 0, 1, 2, … over all of them."""
    starts = np.cumsum([0, *sizes]).tolist()
    return [list(range(a, a + size)) for a, size in zip(starts, sizes, strict=False)]


def flat(documents: list[list[int]]) -> tuple[Array, Array]:
    ids = np.array([token for document in documents for token in document], np.uint16)
    return ids, np.array([len(d) for d in documents], np.int64)


SIZES = st.lists(st.sampled_from([0, 1, 2, 5, 6, 7, 11, 12, 13, 40]), max_size=20)


@settings(deadline=None, max_examples=100)
@given(sizes=SIZES, chunk_size=st.sampled_from([1, 2, 6, 64]))
def test_cutting_equals_slicing_each_document(sizes: list[int], chunk_size: int) -> None:
    documents = documents_of(sizes)
    expected = [
        document[start : start + chunk_size]
        for document in documents
        for start in range(0, len(document), chunk_size)
    ]
    rows, lengths, counts = cut_chunks(*flat(documents), chunk_size, PAD)
    assert rows.dtype == np.uint16
    assert rows.shape == (len(expected), chunk_size)
    assert [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)] == expected
    assert all((row[n:] == PAD).all() for row, n in zip(rows, lengths, strict=True))
    assert counts.tolist() == [-(-size // chunk_size) for size in sizes]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(0, []), (1, [1]), (63, [63]), (64, [64]), (65, [64, 1]), (128, [64, 64]), (129, [64, 64, 1])],
)
def test_a_document_of_n_tokens_has_ceil_n_over_64_chunks(tokens: int, expected: list[int]) -> None:
    _, lengths, counts = cut_chunks(*flat(documents_of([tokens])), 64, PAD)
    assert lengths.tolist() == expected
    assert counts.tolist() == [len(expected)]


@settings(deadline=None, max_examples=50)
@given(sizes=SIZES)
def test_bos_begins_each_document_that_has_tokens(sizes: list[int]) -> None:
    documents = documents_of(sizes)
    ids, counts = with_bos(*flat(documents), 999)
    expected = flat([[999, *document] if document else [] for document in documents])
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(counts, expected[1])
    assert ids.dtype == np.uint16


# ---- the store -----------------------------------------------------------------------------------


def tokens_of_document(store: ChunkStore, document: int) -> list[int]:
    first, last = store.documents.first_chunk[document : document + 2]
    rows = range(int(first), int(last))
    return [int(t) for r in rows for t in store.tokens[r][: store.lengths[r]]]


IDS = ["plain", "Straße/übung", "日本語", "🙂 emoji", "with\ttab", "empty"]


def test_the_store_holds_every_document_whole_and_in_order(tmp_path: Path, small: Small) -> None:
    documents = [{"id": i, "text": f"{i} and some more text of it " * 9} for i in IDS[:-1]]
    documents.insert(3, {"id": "space", "text": " "})
    made = Made(small(corpus=corpus_of(tmp_path / "c.jsonl", documents)), "chunks")
    store, lm = made.chunks(), made.tokenizer()
    kept = [d for d in documents if d["text"].strip()]  # white space alone is no document
    assert [store.documents.id(i) for i in range(len(store.documents))] == [d["id"] for d in kept]
    for i, document in enumerate(kept):
        tokens = tokens_of_document(store, i)
        assert tokens[0] == lm.bos_id
        assert lm.decode(tokens[1:]) == document["text"]
        assert store.documents.tokens[i] == len(tokens)
        assert store.documents.bytes[i] == len(document["text"].encode())
    expected = keys_array([document_key("small", d["id"]) for d in kept])
    np.testing.assert_array_equal(store.documents.keys, expected)


def test_chunks_point_to_their_document(small: Small) -> None:
    store = Made(small(), "chunks").chunks()
    counts = np.diff(store.documents.first_chunk)
    np.testing.assert_array_equal(store.document_of_chunk, np.repeat(np.arange(60), counts))
    assert (np.diff(store.document_of_chunk) >= 0).all()
    np.testing.assert_array_equal(counts, -(-store.documents.tokens // 16))
    assert store.documents.first_chunk[-1] == len(store)
    real = np.arange(16) < store.lengths[:, None]
    assert store.lengths.min() >= 1, "every chunk has a real token"
    assert (store.tokens[~real] == Made(small(), "tokenizer").tokenizer().pad_id).all()
    assert store.tokens.dtype == np.uint16
    assert store.lengths.dtype == np.uint8
    assert store.document_of_chunk.dtype == np.int32


def test_block_sizes_change_no_byte(tmp_path: Path, small: Small) -> None:
    whole = Made(small(), "chunks")
    cut = Made(small(root=tmp_path / "other", chunks={"block_bytes": 1}), "chunks")
    for name, entry in whole.manifest("chunks small")["arrays"].items():
        one, other = (m.folder("chunks small") / name for m in (whole, cut))
        assert one.read_bytes() == other.read_bytes(), (name, entry)
    assert whole.figures("chunks small") == cut.figures("chunks small")


def test_small_batches_of_text_change_no_byte(
    tmp_path: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Made(small(), "chunks").chunks()
    monkeypatch.setattr(chunks, "ENCODE_BYTES", 500)
    cut = Made(small(root=tmp_path / "other"), "chunks").chunks()
    np.testing.assert_array_equal(whole.tokens, cut.tokens)


def test_without_bos_only_text_is_stored(small: Small) -> None:
    made = Made(small(chunks={"bos": False}), "chunks")
    store, lm = made.chunks(), made.tokenizer()
    assert lm.bos_id is not None
    assert not (store.tokens == lm.bos_id).any()


def test_bos_stands_once_a_document_and_the_end_is_not_stored(small: Small) -> None:
    made = Made(small(), "chunks")
    store, lm = made.chunks(), made.tokenizer()
    assert lm.eos_id == lm.bos_id
    rows, places = np.nonzero(store.tokens == lm.bos_id)
    np.testing.assert_array_equal(rows, store.documents.first_chunk[:-1])
    assert (places == 0).all()


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> LmTokenizer:
    folder = tmp_path_factory.mktemp("word_pieces")
    arguments = {
        "root": folder / "root",
        "corpus": corpus_of(folder / "c.jsonl", texts("one text")),
        "tokenizer": {"name": str(tiny_encoder)},
        "embedder": {"name": str(tiny_encoder)},
    }
    return Made(arguments, "tokenizer").tokenizer()


def test_a_document_without_tokens_is_counted_and_has_no_chunk(
    tmp_path: Path, small: Small, tiny_encoder: Path
) -> None:
    documents = texts("stone bridge", NO_PIECES, "river valley")
    made = Made(
        small(
            corpus=corpus_of(tmp_path / "c.jsonl", documents),
            tokenizer={"name": str(tiny_encoder)},
        ),
        "chunks",
    )
    store = made.chunks()
    assert made.figures("chunks small")["documents_without_tokens"] == 1
    assert np.diff(store.documents.first_chunk).tolist() == [1, 0, 1]
    assert store.document_of_chunk.tolist() == [0, 2]
    assert store.documents.tokens[1] == 0


def test_a_corpus_without_any_token_is_refused(
    tmp_path: Path, small: Small, tiny_encoder: Path
) -> None:
    corpus = corpus_of(tmp_path / "c.jsonl", texts(NO_PIECES))
    with pytest.raises(RetroDataError, match="none of its 1 documents has a token"):
        Made(small(corpus=corpus, tokenizer={"name": str(tiny_encoder)}), "chunks")


def test_special_tokens_of_the_embedder_are_text_and_never_stored_as_specials(
    tmp_path: Path, small: Small, tiny_encoder: Path
) -> None:
    documents = texts("[CLS] stone [SEP] bridge [PAD] [MASK] [SEP]", *["stone [SEP]"] * 3)
    corpus = corpus_of(tmp_path / "c.jsonl", documents)
    made = Made(small(corpus=corpus, tokenizer={"name": str(tiny_encoder)}), "chunks")
    store, lm = made.chunks(), made.tokenizer()
    specials = [lm.backend.token_to_id(f"[{n}]") for n in ("CLS", "SEP", "PAD", "MASK")]
    real = np.arange(16) < store.lengths[:, None]
    assert not np.isin(store.tokens[real], specials).any()
    assert len(store.documents) == 4, "no document ends at a literal [SEP]"


# ---- the fast backend ----------------------------------------------------------------------------


HOSTILE = [
    "Straße ÜBUNG e\u0301 naïve", "日本語のテキスト", "🙂👍🏽 emoji", "a\tb\u00a0c\u2028d",
    "don't-stop, o'clock... [SEP] </s> <|endoftext|>", "x" * 300, "\u0000\u0007 bell", "ﬁ ligature",
]  # fmt: skip


def test_nanotoken_makes_the_same_store(tmp_path: Path, small: Small, tiny_encoder: Path) -> None:
    pytest.importorskip("nanotoken")
    corpus = corpus_of(tmp_path / "c.jsonl", [*make_documents(30), *texts(*HOSTILE)])
    made = [
        Made(
            small(
                root=tmp_path / backend,
                corpus=corpus,
                tokenizer={"name": str(tiny_encoder)},
                chunks={"tokenizer_backend": backend},
            ),
            "chunks",
        )
        for backend in ("tokenizers", "nanotoken")
    ]
    for name in made[0].manifest("chunks small")["arrays"]:
        slow, fast = (m.folder("chunks small") / name for m in made)
        assert slow.read_bytes() == fast.read_bytes(), name
    assert made[0].steps["chunks small"].key != made[1].steps["chunks small"].key
    assert made[1].manifest("chunks small")["fields"]["tokenizer_backend"] == "nanotoken"


def test_nanotoken_refuses_a_byte_level_bpe(small: Small) -> None:
    pytest.importorskip("nanotoken")
    with pytest.raises(RetroDataError, match="tokenizer_backend=tokenizers"):
        Made(small(chunks={"tokenizer_backend": "nanotoken"}), "chunks")


def test_a_backend_that_disagrees_is_refused(word_pieces: LmTokenizer, small: Small) -> None:
    """Two real encoders of different vocabularies."""
    bpe = chunks.reference_encoder(Made(small(), "tokenizer").tokenizer())
    reference = chunks.reference_encoder(word_pieces)
    with pytest.raises(RetroDataError, match="tokenizes a document of this corpus otherwise"):
        chunks._require_agreement(bpe, reference, ["stone bridge over the river"])


def test_the_document_named_is_the_one_that_differs(word_pieces: LmTokenizer) -> None:
    pytest.importorskip("nanotoken")
    reference, fast = chunks.reference_encoder(word_pieces), nanotoken_encoder(word_pieces)

    def upside_down(batch: list[str]) -> tuple[Array, Array]:
        """Equal for all but the last text, whose ids differ in number or in value alone."""
        return fast([*batch[:-1], "".join(reversed(batch[-1]))])

    chunks._require_agreement(fast, reference, ["stone", "river", "a b"])
    with pytest.raises(RetroDataError, match="it begins 'a b'"):
        chunks._require_agreement(upside_down, reference, ["stone", "river", "a b"])


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"chunk_size": 0}, {"chunk_size": 2**16}, {"tokenizer_backend": "slow"}]
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RetroDataError, match=f"{next(iter(wrong))}="):
        ChunkSettings(**wrong)


def test_chunks_longer_than_255_tokens_have_wider_lengths(small: Small) -> None:
    store = Made(small(chunk_size=300), "chunks").chunks()
    assert store.lengths.dtype == np.uint16
    assert store.lengths.max() == 300
