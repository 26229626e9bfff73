"""The retrieval database: which chunk stores, in which order, and which of their documents.

A database is a small artifact that holds no vector and no token. Its stores lie one after the other,
so a *global row* is the first row of a chunk's store plus the chunk's row there. Documents that are
not admitted (those of evaluation splits, above all) keep their rows and are never found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import keyed
from retro_data.errors import RetroDataError
from retro_data.splits import LEFT_OUT_CODE, SPLITS, SplitOfCorpus, SplitSettings, split_hash
from retro_data.stage import Block, BlockWriter, Receipt, Resources, block_files, total_counts
from retro_data.store import ChunkStore, DatabaseStores, Embeddings
from retro_data.vectors import Vectors

Array = np.ndarray[Any, Any]

DRAWN_AT_ONCE = 2**22  # rows looked through for those drawn
SHARE_SALT = "database.share"  # so that a share is drawn alike from every split


@dataclass(frozen=True)
class DatabaseSettings:
    """What may be retrieved.

    Attributes:
        splits: documents of these splits are admitted. Evaluation splits are left out by default, or
            the text to be predicted could be retrieved.
        corpora: names of the corpora whose chunks make the database; None means all.
        share: of these documents, drawn by a hash of their identity, that are admitted: what a
            smaller database would be worth. A larger share holds all of a smaller one.
    """

    splits: tuple[str, ...] = keyed(("train", "database"))
    corpora: tuple[str, ...] | None = keyed(None)
    share: float = keyed(1.0)

    def __post_init__(self) -> None:
        unknown = [s for s in self.splits if s not in SPLITS]
        if unknown or not self.splits:
            raise RetroDataError(
                f"database.splits={list(self.splits)}: expected some of {', '.join(SPLITS)}."
            )
        if not 0 < self.share <= 1:
            raise RetroDataError(
                f"database.share={self.share}: expected more than 0 and at most 1; num_neighbors=0 "
                "reads no neighbors."
            )

    def admits(self, keys: Array, splits: Array) -> Array:
        """(D,) bool: which documents may be retrieved.

        Args:
            keys: (D, 2) uint64 identities.
            splits: (D,) index into SPLITS, or LEFT_OUT_CODE.
        """
        chosen: Array = np.isin(splits, [SPLITS.index(s) for s in self.splits])
        if self.share < 1:
            chosen &= split_hash(keys, SHARE_SALT) < self.share
        return chosen


@dataclass(frozen=True)
class StoreOfDatabase:
    """A chunk store of a database: its corpus' name and split, folder and key."""

    name: str
    split: str
    folder: Path
    key: str


class DatabaseStage:
    """Chooses the admitted documents of each store.

    Args:
        settings: what is admitted.
        splits: how documents of a corpus with split "hash" are told apart.
        stores: the chunk stores, in order.
        duplicates: folder and key of the stage that told near-duplicates apart, if one did.
    """

    name = "database"
    version = 1
    resources = Resources(light=True)
    unit = "stores"
    tolerance = 0.0

    def __init__(
        self,
        settings: DatabaseSettings,
        splits: SplitSettings,
        stores: Sequence[StoreOfDatabase],
        duplicates: tuple[Path, str] | None = None,
    ) -> None:
        self.settings = settings
        self.splits = splits
        self.stores = list(stores)
        self.duplicates = duplicates

    def key_fields(self) -> dict[str, Any]:
        return {
            "stores": [[s.name, s.split] for s in self.stores],
            "splits": asdict(self.splits),
            "admitted": sorted(self.settings.splits),
            "share": self.settings.share,
        }

    def parents(self) -> dict[str, str]:
        found = {f"chunks {s.name}": s.key for s in self.stores}
        return {**found, "duplicates": self.duplicates[1]} if self.duplicates else found

    def blocks(self) -> list[Block]:
        return [Block(i, i, i + 1) for i in range(len(self.stores))]

    def open(self, device: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def make(self, context: None, block: Block, out: BlockWriter) -> None:
        place = self.stores[block.index]
        documents = ChunkStore(place.folder).documents
        split = SplitOfCorpus(place.name, place.split, self.splits, self.duplicates).of(documents)
        admitted = self.settings.admits(documents.keys, split)
        out.array(store.admitted_name(block.index), admitted)
        out.rows = len(admitted)
        out.count("documents", len(admitted))
        out.count("admitted_documents", int(admitted.sum()))
        out.count("documents_left_out", int((split == LEFT_OUT_CODE).sum()))
        out.count("chunks", int(documents.first_chunk[-1]))
        out.count("admitted_chunks", int(np.diff(documents.first_chunk)[admitted].sum()))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        self._refuse_doubled_documents()
        counts = total_counts(receipts)
        if not counts["admitted_chunks"]:
            raise RetroDataError(
                f"the retrieval database is empty: no document of {[s.name for s in self.stores]} "
                f"is of a split in database.splits={list(self.settings.splits)} and within "
                f"database.share={self.settings.share}."
            )
        return {
            "arrays": block_files(receipts),
            "rows": counts["chunks"],
            "stores": [{"name": s.name, "key": s.key} for s in self.stores],
            "figures": counts,
        }

    def _refuse_doubled_documents(self) -> None:
        stores = [ChunkStore(place.folder) for place in self.stores]
        records = store.as_records(np.concatenate([s.documents.keys for s in stores]))
        order = np.argsort(records, kind="stable")
        doubled = order[1:][records[order[1:]] == records[order[:-1]]]
        if len(doubled):
            first = np.cumsum([0, *(len(s.documents) for s in stores)])
            place = int(np.searchsorted(first, doubled[0], side="right")) - 1
            name = stores[place].documents.id(int(doubled[0] - first[place]))
            raise RetroDataError(
                f"{len(doubled)} documents are in two stores of the database, e.g. {name!r} of "
                f"{stores[place].name}. List each corpus once."
            )


@dataclass(frozen=True)
class DatabasePlace:
    """Where a database and its vectors lie. Picklable; workers open it.

    Attributes:
        folder, key: of the database.
        chunks: folders of its chunk stores, in order.
        embeddings: folder and key of the embeddings of each store, in order.
    """

    folder: Path
    key: str
    chunks: tuple[Path, ...]
    embeddings: tuple[tuple[Path, str], ...]

    def parents(self) -> dict[str, str]:
        vectors = {f"embeddings {i}": key for i, (_, key) in enumerate(self.embeddings)}
        return {"database": self.key, **vectors}

    @property
    def rows(self) -> int:
        return int(store.finished(self.folder)["rows"])

    @property
    def mask_bytes(self) -> int:
        """Of the rows that are admitted, in memory wherever it is open; 0 before it is made."""
        with contextlib.suppress(RetroDataError):
            return self.rows
        return 0

    def open(self) -> Database:
        return Database(self)


class Database:
    """An open database with its vectors.

    Attributes:
        stores: its chunk stores.
        vectors: (N, d) float16, all rows of all stores; a row of zeros has no encoder tokens.
        admitted: (N,) bool, rows of admitted documents.
    """

    def __init__(self, place: DatabasePlace) -> None:
        manifest = store.finished(place.folder)
        self.stores = DatabaseStores.of(place.chunks)
        embeddings = [Embeddings(folder) for folder, _ in place.embeddings]
        for chunks, vectors in zip(self.stores.stores, embeddings, strict=True):
            if len(chunks) != vectors.shape[0]:
                raise RetroDataError(
                    f"{vectors.folder} has {vectors.shape[0]} vectors for {len(chunks)} chunks of "
                    f"{chunks.folder}. Remove it and run `retro-data prepare` again."
                )
        self.vectors = Vectors([block for vectors in embeddings for block in vectors.blocks()])
        names = [store.admitted_name(i) for i in range(len(manifest["arrays"]))]
        documents = [artifact.open_array(place.folder / name) for name in names]
        self.admitted = np.concatenate(
            [
                np.repeat(admitted, np.diff(chunks.documents.first_chunk))
                for admitted, chunks in zip(documents, self.stores.stores, strict=True)
            ]
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape

    @property
    def first_rows(self) -> tuple[int, ...]:
        return self.stores.first_rows

    def rows(self, start: int, stop: int) -> Array:
        """(stop - start, d) float16 vectors of global rows [start, stop)."""
        return self.vectors.rows(start, stop)

    def own_documents(self, rows: Array) -> Array:
        """Global rows [lo, hi) of the document that each global row belongs to: (n, 2) int64."""
        first = np.array(self.first_rows)
        of_store = np.searchsorted(first, rows, side="right") - 1
        ranges = np.zeros((len(rows), 2), np.int64)
        for s, chunks in enumerate(self.stores.stores):
            here = of_store == s
            document = chunks.document_of_chunk[rows[here] - first[s]]
            begin = chunks.documents.first_chunk
            ranges[here] = first[s] + np.stack([begin[document], begin[document + 1]], axis=1)
        return ranges

    def rows_of_documents(self, keys: Array) -> Array:
        """Global rows [lo, hi) of the documents with these identities; lo == hi for strangers.

        Args:
            keys: (Q, 2) uint64.

        Returns:
            (Q, 2) int64.
        """
        ranges = np.zeros((len(keys), 2), np.int64)
        for chunks, first in zip(self.stores.stores, self.first_rows, strict=False):
            document = chunks.documents.find(keys)
            known = document >= 0
            begin = chunks.documents.first_chunk
            ranges[known, 0] = first + begin[document[known]]
            ranges[known, 1] = first + begin[document[known] + 1]
        return ranges


def draw_rows(admitted: Array, count: int, seed: Sequence[int]) -> Array:
    """(<= count,) int64 admitted rows, each as likely as any other, ascending.

    Beside the (N,) bool mask, memory goes by `count`, not by N, as long as that is far larger.
    """
    total = int(np.count_nonzero(admitted))
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.choice(total, min(count, total), replace=False, shuffle=False))
    found, before = [np.zeros(0, np.int64)], 0
    for start in range(0, len(admitted), DRAWN_AT_ONCE):
        rows = start + np.flatnonzero(admitted[start : start + DRAWN_AT_ONCE])
        low, high = np.searchsorted(drawn, (before, before + len(rows)))
        found.append(rows[drawn[low:high] - before])
        before += len(rows)
    return np.concatenate(found)
