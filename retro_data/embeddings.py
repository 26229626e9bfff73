"""The stage `embeddings`: chunk store to blocks of vectors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro_data import store
from retro_data.embedder_settings import EmbedderSettings, embedder_folder, embedder_identity
from retro_data.stage import (
    Block,
    BlockWriter,
    Receipt,
    Resources,
    block_files,
    tile,
    total_counts,
)
from retro_data.store import ChunkStore
from retro_data.tokenizer import LmTokenizer

if TYPE_CHECKING:
    from retro_data.embedder import Embedder

BATCH_CHUNKS = 65_536  # handed to the embedder at once: bounds memory, whatever a block holds
ROUND_CHUNKS = 4096  # to which larger blocks are rounded: full batches of a GPU


@dataclass
class EmbeddingContext:
    embedder: Embedder
    chunks: ChunkStore
    tokenizer: LmTokenizer


class EmbeddingStage:
    """Embeds every chunk of one store.

    Args:
        settings: of the encoder.
        corpus: name of the chunk store.
        chunks: folder and key of the chunk store.
        tokenizer: folder of the LM tokenizer (its key is part of the chunk store's).
    """

    name = "embeddings"
    version = 2
    # While the files of one block are written, the GPU makes the next.
    resources = Resources(gpu=True, threads=0, blocks_at_once=2)
    unit = "chunks"
    tolerance = 0.05

    def __init__(
        self,
        settings: EmbedderSettings,
        corpus: str,
        chunks: tuple[Path, str],
        tokenizer: Path,
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.chunks = chunks
        self.tokenizer = tokenizer
        self.encoder = embedder_folder(settings)
        self.identity = embedder_identity(settings, self.encoder)

    def key_fields(self) -> dict[str, Any]:
        return {"name": self.corpus, **self.identity}

    def parents(self) -> dict[str, str]:
        return {"chunks": self.chunks[1]}

    def blocks(self) -> list[Block]:
        rows = len(ChunkStore(self.chunks[0]))
        return tile(rows, self.settings.block_rows or _block_rows(rows))

    def open(self, device: str) -> AbstractContextManager[EmbeddingContext]:
        from retro_data.embedder import Embedder

        context = EmbeddingContext(
            Embedder(self.settings, self.encoder, device),
            ChunkStore(self.chunks[0]),
            LmTokenizer(self.tokenizer),
        )
        return contextlib.nullcontext(context)

    def make(self, context: EmbeddingContext, block: Block, out: BlockWriter) -> None:
        embedder, chunks = context.embedder, context.chunks
        parts = []
        for start in range(block.start, block.stop, BATCH_CHUNKS):
            rows = slice(start, min(start + BATCH_CHUNKS, block.stop))
            tokens, lengths = chunks.tokens[rows], chunks.lengths[rows]
            ragged = embedder.encode_chunks(tokens, lengths, context.tokenizer)
            made, cut = embedder.embed(ragged)
            parts.append(made)
            out.count("encoder_tokens", int(ragged.sizes.sum()))
            out.count("encoder_tokens_cut", cut)
            out.count("chunks_without_encoder_tokens", int((ragged.sizes == 0).sum()))
        vectors = parts[0] if len(parts) == 1 else np.concatenate(parts)
        out.array(store.block_name(block.index), vectors)
        out.note("forward", embedder.forward)
        out.rows = len(vectors)

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        arrays = block_files(receipts)
        return {
            "arrays": arrays,
            "rows": sum(r.rows for r in receipts),
            "dim": next(iter(arrays.values()))["shape"][1],
            "forward": sorted({r.notes["forward"] for r in receipts}),
            "figures": total_counts(receipts),
        }


def _block_rows(rows: int) -> int:
    """Blocks enough to be shared among devices and to lose little by a kill."""
    wanted = min(max(rows // 64, 256), BATCH_CHUNKS)
    return -(-wanted // ROUND_CHUNKS) * ROUND_CHUNKS if wanted > ROUND_CHUNKS else wanted
