"""The LM tokenizer: any Hugging Face fast tokenizer, or a byte-level BPE trained on the corpus.

It is kept as an artifact of its own: `tokenizer.json` (read by the `tokenizers` library alone, no
network and no code of a model) and the bytes of each vocabulary id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import free, key_fields, keyed
from retro_data.corpus import CorpusSettings, open_reader
from retro_data.errors import RetroDataError
from retro_data.scan import ScannedCorpus, block_documents, document_key, keys_array
from retro_data.source_files import package_path
from retro_data.splits import split_hash
from retro_data.stage import Block, BlockWriter, Receipt, Resources, block_files, total_counts

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

END_OF_TEXT = "<|endoftext|>"
NEVER_CHOSEN = 1000.0  # below the worst score of a Unigram piece, in nats
SMALL_VOCABULARY, LARGE_VOCABULARY = 4096, 16384
_RUN = 1024  # characters; training takes a time that grows with the square of a word's length
_LONG_RUN = re.compile(rf"\S{{{_RUN}}}|\s{{{_RUN}}}")
SMALL_CORPUS_BYTES = 32 * 2**20  # of text: a demo; below it the small vocabulary
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class TokenizerSettings:
    """The LM tokenizer.

    Attributes:
        name: a folder, `pkg://package/folder`, or a name on the Hugging Face hub; None trains one.
        revision: of a hub name.
        vocab_size: of a trained tokenizer; None means 4,096 for a corpus below 32 MiB of text,
            16,384 from there on.
        sample_bytes: text that a trained tokenizer sees at most.
    """

    name: str | None = free(None)
    revision: str | None = free(None)
    vocab_size: int | None = keyed(None)
    sample_bytes: int = keyed(128 * 2**20)


# ---- finding a model's folder --------------------------------------------------------------------


def model_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The local folder of a model or tokenizer.

    Args:
        name: a folder, `pkg://package/sub/folder`, or a hub name (fetched, or found in the cache).
        patterns: files wanted from the hub.
    """
    if name.startswith("pkg://"):
        return Path(package_path(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of many kinds: no network, no such name, no right to read it
        raise RetroDataError(
            f"{name!r} is neither a folder nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {error}). Name an existing folder, or download it first with "
            f"`hf download {name}`."
        ) from error


def folder_digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {n: artifact.file_digest(folder / n) for n in sorted(names) if (folder / n).is_file()}


# ---- the tokenizer in use ------------------------------------------------------------------------


class LmTokenizer:
    """A finished tokenizer artifact.

    Attributes:
        vocab_size: ids are below it; `pad_id` is equal to it and stands for no token.
        bos_id, eos_id: None where the tokenizer has none.
        bytes_per_token: (vocab_size,) int32 UTF-8 bytes of each id, specials 0; None when the
            tokenizer does not restore text exactly, so that bits per byte would be untrue.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        manifest = store.finished(self.folder)
        self.key: str = manifest["key"]
        self.vocab_size: int = manifest["vocab_size"]
        self.bos_id: int | None = manifest["bos_id"]
        self.eos_id: int | None = manifest["eos_id"]
        sizes = artifact.open_array(self.folder / store.TOKEN_BYTES)
        self.bytes_per_token: Array | None = np.asarray(sizes) if len(sizes) else None

    @property
    def pad_id(self) -> int:
        return self.vocab_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Narrowest unsigned type that holds every id and the pad id."""
        return np.dtype(np.uint16 if self.vocab_size < 2**16 else np.uint32)

    @cached_property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`: no truncation, no padding, special text taken as plain text."""
        return load_backend((self.folder / store.TOKENIZER).read_text("utf-8"))

    @cached_property
    def _blob(self) -> tuple[Array, Array]:
        pieces = token_pieces(self.backend, self.vocab_size)
        assert pieces is not None
        starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).astype(np.int64)
        return np.frombuffer(b"".join(pieces), np.uint8), starts

    def texts(self, tokens: Array, lengths: Array) -> list[str]:
        """Text of each chunk; characters cut at a chunk's border are left out.

        Args:
            tokens: (n, chunk_size) ids.
            lengths: (n,) real tokens of each row.
        """
        if self.bytes_per_token is None:
            rows = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
            return list(self.backend.decode_batch(rows, skip_special_tokens=True))
        blob, starts = self._blob
        real = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        ids = np.where(real, tokens, 0).astype(np.int64)
        sizes = np.where(real, starts[ids + 1] - starts[ids], 0)
        flat = sizes.reshape(-1)
        ends = np.cumsum(flat)
        source = np.repeat(starts[ids].reshape(-1) - (ends - flat), flat)
        content = blob[source + np.arange(len(source))].tobytes()
        cuts = np.concatenate([[0], np.cumsum(sizes.sum(1))]).tolist()
        return [content[a:b].decode("utf-8", "ignore") for a, b in pairwise(cuts)]

    def decode(self, ids: Sequence[int] | Array) -> str:
        """Text of a sequence of ids; pad ids are left out."""
        real = np.asarray(ids)
        real = real[(real >= 0) & (real < self.vocab_size)].reshape(1, -1)
        return self.texts(real, np.array([real.shape[1]]))[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return LmTokenizer, (self.folder,)


def load_backend(description: str) -> Any:
    """The `tokenizers.Tokenizer`: no truncation, no padding, special text taken as plain text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(_without_special_pieces(description))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "[SEP]" in a document is never a boundary
    return backend


def _without_special_pieces(description: str) -> str:
    """A Unigram model (XLM-R, T5) that never chooses a special token for text.

    Its specials are pieces of its vocabulary like any other, with the best of scores.
    """
    if '"Unigram"' not in description:
        return description
    parts = json.loads(description)
    if parts["model"]["type"] != "Unigram":
        return description
    specials = {token["content"] for token in parts["added_tokens"] if token["special"]}
    pieces = parts["model"]["vocab"]
    worst = min(score for _, score in pieces) - NEVER_CHOSEN
    parts["model"]["vocab"] = [[p, worst if p in specials else score] for p, score in pieces]
    return json.dumps(parts, ensure_ascii=False)


def token_pieces(backend: Any, vocab_size: int) -> list[bytes] | None:
    """Bytes of every id of a lossless byte-level tokenizer, None for any other."""
    parts = json.loads(backend.to_str())
    if parts.get("normalizer") or not _is_byte_level(parts.get("pre_tokenizer")):
        return None
    byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
    if any(backend.token_to_id(letter) is None for letter in byte_of):
        return None  # a byte that it has no token for is dropped without a word
    added = backend.get_added_tokens_decoder()
    pieces = []
    for index in range(vocab_size):
        token = backend.id_to_token(index)
        if index in added:
            pieces.append(b"" if added[index].special else token.encode())
        elif token is None:
            pieces.append(b"")
        elif all(letter in byte_of for letter in token):
            pieces.append(bytes(byte_of[letter] for letter in token))
        else:
            return None
    return pieces


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
        splits = all(
            s["type"] in ("Split", "Digits", "ByteLevel") and s.get("behavior") != "Removed"
            for s in steps
        )
        return splits and any(_is_byte_level(s) for s in steps)
    return pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]


def _byte_letters() -> list[str]:
    """The printable letter by which byte-level BPE writes each byte (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in kept else next(spare)) for byte in range(256)]


# ---- the stage -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingCorpus:
    """A corpus that a tokenizer may be trained on."""

    settings: CorpusSettings
    folder: Path
    key: str


class TokenizerStage:
    """Takes a named tokenizer in, or trains one.

    Args:
        settings: which.
        corpora: to train on, where none is named.
        salt: of the split hash: only documents in its lower half are trained on, which are training
            documents under any fraction of at least a half.
    """

    name = "tokenizer"
    version = 2
    resources = Resources(threads=0)
    unit = "tokenizers"
    tolerance = 0.0

    def __init__(
        self, settings: TokenizerSettings, corpora: Sequence[TrainingCorpus], salt: str
    ) -> None:
        self.settings = settings
        self.corpora = list(corpora)
        self.salt = salt
        self.folder = (
            model_folder(settings.name, settings.revision, TOKENIZER_FILES)
            if settings.name
            else None
        )

    def key_fields(self) -> dict[str, Any]:
        if self.folder is None:
            return {**key_fields(self.settings), "salt": self.salt}
        return {"files": folder_digests(self.folder, TOKENIZER_FILES)}

    def parents(self) -> dict[str, str]:
        if self.folder is not None:
            return {}
        return {f"corpus {c.settings.name}": c.key for c in self.corpora}

    def blocks(self) -> list[Block]:
        return [Block(0, 0, 1)]

    def open(self, device: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def make(self, context: None, block: Block, out: BlockWriter) -> None:
        if self.folder is not None:
            description, bos, eos = _read_fast_tokenizer(self.folder)
        else:
            description, bos, eos = self._train(out)
        backend = load_backend(description)
        size = backend.get_vocab_size(with_added_tokens=True)
        size = max(size, 1 + max(backend.get_vocab(with_added_tokens=True).values()))
        pieces = token_pieces(backend, size)
        sizes = np.array([len(p) for p in pieces] if pieces else [], np.int32)
        out.rows = 1
        for name, value in (("vocab_size", size), ("bos_id", bos), ("eos_id", eos)):
            out.note(name, value)
        out.bytes(store.TOKENIZER, description.encode())
        out.array(store.TOKEN_BYTES, sizes)

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        files = block_files(receipts)
        return {
            "files": {store.TOKENIZER: files[store.TOKENIZER]},
            "arrays": {store.TOKEN_BYTES: files[store.TOKEN_BYTES]},
            "rows": 1,
            **receipts[0].notes,
            "figures": total_counts(receipts),
        }

    def _train(self, out: BlockWriter) -> tuple[str, int | None, int | None]:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        scanned = [ScannedCorpus(corpus.folder) for corpus in self.corpora]
        total = sum(corpus.text_bytes for corpus in scanned)
        small = total < SMALL_CORPUS_BYTES
        size = self.settings.vocab_size or (SMALL_VOCABULARY if small else LARGE_VOCABULARY)
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(self._sample(scanned, total, out), trainer)
        end = backend.token_to_id(END_OF_TEXT)
        return backend.to_str(), end, end

    def _sample(
        self, scanned: Sequence[ScannedCorpus], total: int, out: BlockWriter
    ) -> Iterator[str]:
        """Training documents from blocks spread evenly over the corpora, up to sample_bytes."""
        share = min(1.0, 2 * self.settings.sample_bytes / max(1, total))
        left = self.settings.sample_bytes
        for settings, corpus in zip(self.corpora, scanned, strict=True):
            reader = open_reader(settings.settings)
            blocks = corpus.blocks(1)
            wanted = np.linspace(0, len(blocks) - 1, max(1, round(share * len(blocks))))
            for block in (blocks[int(i)] for i in wanted):
                for document in block_documents(reader, corpus, block):
                    key = keys_array([document_key(settings.settings.name, document.id)])
                    if split_hash(key, self.salt)[0] < 0.5 and left > 0:
                        left -= len(document.text.encode())
                        out.count("training_documents", 1)
                        yield from _without_long_runs(document.text)


def _without_long_runs(text: str) -> Iterator[str]:
    """A text, cut where a run of letters or of white space is longer than any word."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def _read_fast_tokenizer(folder: Path) -> tuple[str, int | None, int | None]:
    """tokenizer.json, bos id and eos id of any tokenizer that transformers can load as a fast one."""
    tokenizer = load_fast_tokenizer(folder, "tokenizer.name")
    description = tokenizer.backend_tokenizer.to_str()
    return description, tokenizer.bos_token_id, tokenizer.eos_token_id


def load_fast_tokenizer(folder: Path, setting: str) -> Any:
    """The transformers tokenizer of a folder.

    Args:
        setting: that named the folder, for the message.

    Raises:
        RetroDataError: there is none, or not one that the `tokenizers` library can run.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RetroDataError(
            f"no tokenizer can be loaded from {folder} ({error}). Set {setting} to a folder or hub "
            "name that holds a tokenizer.json."
        ) from error
    if not tokenizer.is_fast:
        raise RetroDataError(
            f"the tokenizer in {folder} is not a fast one (no tokenizer.json). Convert it with "
            f"transformers, or set {setting} to another."
        )
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise RetroDataError(  # transformers makes an empty one from a model's config.json alone
            f"{folder} holds no vocabulary (none of {', '.join(VOCABULARY_FILES)}). Set {setting} to a "
            "folder or hub name that holds a tokenizer.json."
        )
    return tokenizer
