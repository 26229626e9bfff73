"""The stage `chunks`: documents to the chunk store.

A chunk is `chunk_size` consecutive tokens of one document, the last one shorter (Borgeaud et al.
2021, section 2.1). A document of n stored tokens has ceil(n / chunk_size) chunks; a document without
tokens has none. Stored are `[bos] tokens`: the end of a document is a label, never a token.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import free, keyed
from retro_data.corpus import CorpusSettings, Document, Reader, open_reader
from retro_data.errors import RetroDataError
from retro_data.scan import ScannedCorpus, block_documents, document_key, keys_array
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    array_entry,
    lay_parts,
    total_counts,
)
from retro_data.tokenizer import LmTokenizer

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

ENCODE_BYTES = 2**18  # of text handed to the tokenizer at once; more is no faster, and takes memory
MOST_BLOCKS = 64  # of a small corpus: enough to show progress and to share among workers
LEAST_BLOCK_BYTES = 2**20
CHECK_SHARE = 1 / 1024  # of a batch of every block, on which a fast backend must agree
CHECK_LEAST = 8192  # characters
PARTS = (
    store.TOKENS,
    store.LENGTHS,
    store.DOCUMENT_KEYS,
    store.DOCUMENT_TOKENS,
    store.DOCUMENT_BYTES,
    store.DOCUMENT_ID_BYTES,
)
DOCUMENT_CHUNKS, ID_SIZES = "documents_chunks.npy", "documents_id_sizes.npy"

Encode = Callable[[list[str]], tuple[Array, Array]]  # texts -> flat ids, ids of each text


@dataclass(frozen=True)
class ChunkSettings:
    """How text becomes chunks.

    Attributes:
        chunk_size: tokens of a chunk, m in the paper.
        bos: begin each document with the tokenizer's bos token, where it has one.
        tokenizer_backend: "tokenizers", or "nanotoken" (WordPiece only, extra `fast`), which must
            agree with "tokenizers" on a sample of every block.
        block_bytes: text of one block of work; 0 chooses by the size of the corpus.
    """

    chunk_size: int = keyed(64)
    bos: bool = keyed(True)
    tokenizer_backend: str = keyed("tokenizers")
    block_bytes: int = free(0)

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_size < 2**16:
            raise RetroDataError(f"chunk_size={self.chunk_size}: expected 1 to 65,535 tokens.")
        if self.tokenizer_backend not in ("tokenizers", "nanotoken"):
            raise RetroDataError(
                f"tokenizer_backend={self.tokenizer_backend!r}: expected tokenizers or nanotoken."
            )


# ---- tokens to chunks ----------------------------------------------------------------------------


def cut_chunks(
    ids: Array, sizes: Array, chunk_size: int, pad_id: int
) -> tuple[Array, Array, Array]:
    """Cut the tokens of consecutive documents into chunks.

    Args:
        ids: (T,) tokens of all documents, one after the other.
        sizes: (D,) tokens of each document.
        pad_id: fills each document's last chunk.

    Returns:
        chunks (N, chunk_size) of the dtype of `ids`, real tokens of each chunk (N,) int64, and
        chunks of each document (D,) int64 = ceil(sizes / chunk_size).
    """
    count = -(-sizes // chunk_size)
    first = np.cumsum(count) - count
    total = int(count.sum())
    chunks = np.full(total * chunk_size, pad_id, ids.dtype)
    shift = first * chunk_size - (np.cumsum(sizes) - sizes)  # document's place, less where it was
    chunks[np.arange(len(ids)) + np.repeat(shift, sizes)] = ids
    lengths = np.full(total, chunk_size, np.int64)
    some = count > 0
    last = first[some] + count[some] - 1
    lengths[last] = sizes[some] - (count[some] - 1) * chunk_size
    return chunks.reshape(total, chunk_size), lengths, count


def masked(tokens: Array, mask: Array, value: int, dtype: np.dtype[Any]) -> Array:
    """Tokens as `dtype`, and a value that may be wider than theirs where the mask is False."""
    return np.where(mask, tokens, dtype.type(value)).astype(dtype)


def narrowest(limit: int, types: Sequence[type]) -> np.dtype[Any]:
    """The first of `types` that holds `limit`."""
    return next(np.dtype(t) for t in types if limit <= np.iinfo(t).max)


def with_bos(ids: Array, sizes: Array, bos_id: int) -> tuple[Array, Array]:
    """The same documents, each with `bos_id` before its first token; empty ones stay empty."""
    some = sizes > 0
    starts = (np.cumsum(sizes) - sizes)[some]
    return np.insert(ids, starts, bos_id), sizes + some


# ---- encoders ------------------------------------------------------------------------------------


def reference_encoder(tokenizer: LmTokenizer) -> Encode:
    backend = tokenizer.backend

    def encode(texts: list[str]) -> tuple[Array, Array]:
        rows = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), tokenizer.dtype, int(sizes.sum()))
        return ids, sizes

    return encode


def nanotoken_encoder(tokenizer: LmTokenizer) -> Encode:
    try:
        import nanotoken
    except ImportError as error:
        raise RetroDataError(
            "tokenizer_backend=nanotoken needs the package: `pip install 'retro_data[fast]'`, or set "
            "tokenizer_backend=tokenizers."
        ) from error
    description = json.loads(tokenizer.backend.to_str())
    description["added_tokens"] = []  # special text in a document is plain text
    description["post_processor"] = None
    try:
        backend = nanotoken.Tokenizer.from_json(json.dumps(description))
    except nanotoken.UnsupportedTokenizerError as error:
        raise RetroDataError(
            f"tokenizer_backend=nanotoken cannot serve this tokenizer ({error}): it is for WordPiece. "
            "Set tokenizer_backend=tokenizers."
        ) from error

    def encode(texts: list[str]) -> tuple[Array, Array]:
        batch = backend.encode_batch(texts, add_special_tokens=False)
        return np.asarray(batch.ids).astype(tokenizer.dtype), np.asarray(batch.lengths, np.int64)

    return encode


def _require_agreement(fast: Encode, reference: Encode, texts: list[str]) -> None:
    """Hold a fast backend against the tokenizer itself, on pieces spread over the texts."""
    share = max(1, int(sum(map(len, texts)) * CHECK_SHARE), CHECK_LEAST) // 32
    step = max(1, len(texts) // 32)
    sample = [text[:share] for text in texts[::step]]
    found, expected = (
        np.split(ids, np.cumsum(sizes)[:-1]) for ids, sizes in (fast(sample), reference(sample))
    )
    for text, ids, true_ids in zip(sample, found, expected, strict=True):
        if not np.array_equal(ids, true_ids):
            raise RetroDataError(
                "tokenizer_backend=nanotoken tokenizes a document of this corpus otherwise than the "
                f"tokenizer itself (it begins {text[:60]!r}). Set tokenizer_backend=tokenizers."
            )


# ---- the stage -----------------------------------------------------------------------------------


@dataclass
class ChunkContext:
    reader: Reader
    corpus: ScannedCorpus
    tokenizer: LmTokenizer
    encode: Encode


class ChunkStage:
    """Tokenizes and cuts one corpus.

    Args:
        settings: how.
        corpus: which documents, with the folder and key of its scan.
        tokenizer: folder and key of the LM tokenizer.
    """

    name = "chunks"
    version = 2
    resources = Resources(threads=1)
    unit = "documents"
    tolerance = 0.0

    def __init__(
        self,
        settings: ChunkSettings,
        corpus: CorpusSettings,
        scan: tuple[Path, str],
        tokenizer: tuple[Path, str],
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.scan = scan
        self.tokenizer = tokenizer

    def key_fields(self) -> dict[str, Any]:
        return {"name": self.corpus.name, **artifact.key_fields(self.settings)}

    def parents(self) -> dict[str, str]:
        return {"corpus": self.scan[1], "tokenizer": self.tokenizer[1]}

    def blocks(self) -> list[Block]:
        return even_blocks(ScannedCorpus(self.scan[0]), self.settings.block_bytes)

    def open(self, device: str) -> AbstractContextManager[ChunkContext]:
        tokenizer = LmTokenizer(self.tokenizer[0])
        fast = self.settings.tokenizer_backend == "nanotoken"
        encode = nanotoken_encoder(tokenizer) if fast else reference_encoder(tokenizer)
        reader = open_reader(self.corpus)
        context = ChunkContext(reader, ScannedCorpus(self.scan[0]), tokenizer, encode)
        return contextlib.nullcontext(context)

    def make(self, context: ChunkContext, block: Block, out: BlockWriter) -> None:
        keys: list[bytes] = []
        names: list[bytes] = []
        text_bytes: list[int] = []
        pieces: list[tuple[Array, Array]] = []
        documents = block_documents(context.reader, context.corpus, block)
        for batch in text_batches(documents):
            texts = [document.text for document in batch]
            if not pieces:
                self._check_backend(context, texts)
            pieces.append(context.encode(texts))
            keys += [document_key(self.corpus.name, document.id) for document in batch]
            names += [document.id.encode("utf-8", "surrogatepass") for document in batch]
            text_bytes += [len(text.encode()) for text in texts]
        ids = np.concatenate([p[0] for p in pieces])
        sizes = np.concatenate([p[1] for p in pieces])
        tokenizer = context.tokenizer
        if self.settings.bos and tokenizer.bos_id is not None:
            ids, sizes = with_bos(ids, sizes, tokenizer.bos_id)
        size = self.settings.chunk_size
        chunks, lengths, counts = cut_chunks(ids, sizes, size, tokenizer.pad_id)
        parts = {
            store.TOKENS: chunks,
            store.LENGTHS: lengths.astype(narrowest(size, (np.uint8, np.uint16))),
            store.DOCUMENT_KEYS: keys_array(keys),
            store.DOCUMENT_TOKENS: sizes,
            store.DOCUMENT_BYTES: np.array(text_bytes, np.int64),
            store.DOCUMENT_ID_BYTES: np.frombuffer(b"".join(names), np.uint8),
            DOCUMENT_CHUNKS: counts,
            ID_SIZES: np.array([len(name) for name in names], np.int64),
        }
        for kind, array in parts.items():
            out.array(store.part_name(block.index, kind), array)
        out.rows = len(chunks)
        out.count("documents", len(sizes))
        out.count("documents_without_tokens", int((sizes == 0).sum()))
        out.count("tokens", int(sizes.sum()))
        out.count("text_bytes", sum(text_bytes))

    def _check_backend(self, context: ChunkContext, texts: list[str]) -> None:
        if self.settings.tokenizer_backend != "tokenizers":
            _require_agreement(context.encode, reference_encoder(context.tokenizer), texts)

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        arrays = {name: lay_parts(folder, receipts, name) for name in PARTS}
        chunk_counts = _parts(folder, receipts, DOCUMENT_CHUNKS)
        documents = sum(r.counts["documents"] for r in receipts)
        arrays |= _lay_prefix_sums(
            folder, store.DOCUMENT_FIRST_CHUNK, chunk_counts, documents
        ) | _lay_prefix_sums(
            folder, store.DOCUMENT_ID_OFFSETS, _parts(folder, receipts, ID_SIZES), documents
        )
        arrays |= _lay_document_of_chunk(folder, chunk_counts, documents)
        counts = total_counts(receipts)
        if not sum(r.rows for r in receipts):
            raise RetroDataError(
                f"corpus {self.corpus.name}: none of its {documents} documents has a token."
            )
        return {
            "arrays": arrays,
            "rows": sum(r.rows for r in receipts),
            "chunk_size": self.settings.chunk_size,
            "figures": counts,
        }


def even_blocks(corpus: ScannedCorpus, block_bytes: int = 0) -> list[Block]:
    """Blocks of about `block_bytes` of text; 0 chooses by the size of the corpus."""
    even = corpus.text_bytes // MOST_BLOCKS
    return corpus.blocks(block_bytes or min(max(even, LEAST_BLOCK_BYTES), 16 * 2**20))


def text_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents gathered until they hold about ENCODE_BYTES characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(folder: Path, receipts: Sequence[Receipt], kind: str) -> Callable[[], Iterator[Array]]:
    paths = [folder / store.part_name(r.block, kind) for r in receipts]
    return lambda: (artifact.open_array(path) for path in paths)


def _lay_prefix_sums(
    folder: Path, name: str, counts: Callable[[], Iterator[Array]], documents: int
) -> dict[str, Any]:
    """Write (D + 1,) int64 starts of what was counted block by block."""

    def sums() -> Iterator[Array]:
        yield np.zeros(1, np.int64)
        total = 0
        for part in counts():
            yield total + np.cumsum(part)
            total += int(part.sum())

    return _stream_array(folder, name, np.dtype(np.int64), documents + 1, sums())


def _lay_document_of_chunk(
    folder: Path, counts: Callable[[], Iterator[Array]], documents: int
) -> dict[str, Any]:
    dtype = narrowest(documents, (np.int32, np.int64))

    def rows() -> Iterator[Array]:
        first = 0
        for part in counts():
            yield np.repeat(np.arange(first, first + len(part), dtype=dtype), part)
            first += len(part)

    total = sum(int(part.sum()) for part in counts())
    return _stream_array(folder, store.DOCUMENT_OF_CHUNK, dtype, total, rows())


def _stream_array(
    folder: Path, name: str, dtype: np.dtype[Any], rows: int, pieces: Iterator[Array]
) -> dict[str, Any]:
    """Write a one-dimensional array piece by piece; return its manifest entry."""
    extents = []
    with artifact.new_file(folder / name, replace=True) as handle:
        handle.write(artifact.npy_header(dtype, (rows,)))
        for piece in pieces:
            handle.write(np.ascontiguousarray(piece, dtype).data)
            extents.append(
                {"rows": len(piece), "sha256": artifact.array_digest(piece.astype(dtype))}
            )
    return {name: array_entry(dtype.str, (rows,), extents)}
