"""The stage `packing`: training documents side by side in sequences of whole chunks.

Only for `mode=packed`. Evaluation scores one document a sequence in either mode, so that its figures
can be compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import keyed
from retro_data.sequences import pack, whole_chunks
from retro_data.splits import SPLITS, SplitOfCorpus, split_hash
from retro_data.stage import Block, BlockWriter, Receipt, Resources, lay_parts, total_counts
from retro_data.store import ChunkStore

BLOCK_CHUNKS = 2**21  # packed by themselves: tens of MB, and too many for one half empty to matter
ORDER = "packing"  # salt of the hash by which documents meet


@dataclass(frozen=True)
class PackingSettings:
    """How training documents share sequences.

    Attributes:
        seq_len: tokens of a sequence, whole chunks.
    """

    seq_len: int = keyed(1024)


class PackingStage:
    """Packs the training documents of one corpus.

    Which documents meet in a sequence depends on their identities alone, not on any seed: runs with
    other seeds train on the same sequences in another order, and prepare nothing.

    Args:
        settings: how.
        split: the corpus, and which of its documents are training documents.
        chunks: folder and key of the chunk store.
    """

    name = "packing"
    version = 1
    resources = Resources(light=True)
    unit = "documents"
    tolerance = 0.0

    def __init__(
        self,
        settings: PackingSettings,
        split: SplitOfCorpus,
        chunks: tuple[Path, str],
    ) -> None:
        self.settings, self.split = settings, split
        self.chunks = chunks

    def key_fields(self) -> dict[str, Any]:
        return {**self.split.key_fields(), **artifact.key_fields(self.settings)}

    def parents(self) -> dict[str, str]:
        return {"chunks": self.chunks[1], **self.split.parents()}

    def blocks(self) -> list[Block]:
        """Documents in corpus order, as many as hold BLOCK_CHUNKS."""
        first = ChunkStore(self.chunks[0]).documents.first_chunk
        edges = np.searchsorted(first[:-1], np.arange(0, first[-1], BLOCK_CHUNKS))
        edges = np.unique([*edges, len(first) - 1])
        return [Block(i, start, stop) for i, (start, stop) in enumerate(pairwise(edges.tolist()))]

    def open(self, device: str) -> AbstractContextManager[ChunkStore]:
        return contextlib.nullcontext(ChunkStore(self.chunks[0]))

    def make(self, context: ChunkStore, block: Block, out: BlockWriter) -> None:
        documents = context.documents
        keys = documents.keys[block.start : block.stop]
        codes = self.split.of(documents, slice(block.start, block.stop))
        train = codes == SPLITS.index("train")
        first = documents.first_chunk[block.start : block.stop + 1]
        count = np.diff(first)
        chosen = np.flatnonzero(train & (count > 0))
        chosen = chosen[np.argsort(split_hash(keys[chosen], ORDER), kind="stable")]
        capacity = whole_chunks("seq_len", self.settings.seq_len, context.chunk_size)
        table = pack(first[chosen], count[chosen], capacity)
        wide = len(context) > np.iinfo(np.int32).max
        out.array(
            store.part_name(block.index, store.SEQUENCES), table.astype("i8" if wide else "i4")
        )
        out.rows = len(table)
        out.count("documents", len(chosen))
        out.count("chunks", int(count[chosen].sum()))
        out.count("tokens", int(documents.tokens[block.start : block.stop][chosen].sum()))
        out.count("sequences_of_one_document", int((-(-count[chosen] // capacity)).sum()))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        counts = total_counts(receipts)
        entry = lay_parts(folder, receipts, store.SEQUENCES)
        rows, capacity = entry["shape"]
        tokens, per_sequence = counts["tokens"], self.settings.seq_len
        fewest = -(-counts["chunks"] // capacity)

        def padding(sequences: int) -> float:
            return round(1 - tokens / max(1, sequences * per_sequence), 6)

        return {
            "arrays": {store.SEQUENCES: entry},
            "rows": rows,
            "figures": {
                **counts,
                "padding": padding(rows),
                "padding_of_one_document_a_sequence": padding(counts["sequences_of_one_document"]),
                "padding_at_the_least": padding(fewest),  # chunks are whole: their ends stay padded
            },
        }
