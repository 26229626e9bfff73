"""Where each artifact lies, what its files are called, and how they are opened.

    <root>/
      corpus/<name>-<key>/      files.tsv · skipped.jsonl · manifest.json
      tokenizer/<key>/          tokenizer.json · token_bytes.npy · manifest.json
      chunks/<name>-<key>/      tokens.npy · lengths.npy · document_of_chunk.npy · documents_*.npy
      embeddings/<name>-<key>/  00000.npy … · manifest.json
      shingles/<name>-<key>/    shingles.npy · shingle_counts.npy · … · manifest.json
      duplicates/<key>/         splits_<corpus>.npy · left_out.jsonl · manifest.json
      database/<key>/           admitted_<store>.npy · manifest.json
      codebook/<key>/           trained.index · manifest.json
      index/<key>/              00000.index … · truth_ids.npy · truth_distances.npy · manifest.json
      neighbors/<name>-<key>/   ids.npy · distances.npy · manifest.json
      selection/<name>-<key>/   ids.npy · distances.npy · manifest.json
      leakage/<name>-<key>/     rows.npy · real_tokens.npy · own.npy · seen.npy · manifest.json
      packing/<name>-<key>/     sequences.npy · manifest.json
      prepared/<settings>.json  which keys a configuration was last prepared to

Everything opened here is read-only and memory-mapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact
from retro_data.errors import RetroDataError

Array = np.ndarray[Any, Any]

STAGES = (
    *("corpus", "tokenizer", "chunks", "embeddings", "shingles", "duplicates"),
    *("database", "codebook", "index", "neighbors", "selection", "leakage", "packing"),
)
KEY_LETTERS = 16  # of the key's 64, in folder names: 64 bits

# corpus
FILES = "files.tsv"
SKIPPED = "skipped.jsonl"
# tokenizer
TOKENIZER = "tokenizer.json"
TOKEN_BYTES = "token_bytes.npy"  # (vocab_size,) int32; empty when the tokenizer is not lossless
# chunks
TOKENS = "tokens.npy"  # (N, chunk_size) uint16 or uint32
LENGTHS = "lengths.npy"  # (N,) uint8 or uint16: real tokens of each chunk
DOCUMENT_OF_CHUNK = "document_of_chunk.npy"  # (N,) int32 or int64: row in the table of documents
DOCUMENT_KEYS = "documents_keys.npy"  # (D, 2) uint64: 128-bit identity
DOCUMENT_FIRST_CHUNK = "documents_first_chunk.npy"  # (D + 1,) int64
DOCUMENT_TOKENS = "documents_tokens.npy"  # (D,) int64
DOCUMENT_BYTES = "documents_bytes.npy"  # (D,) int64: of the text in UTF-8
DOCUMENT_ID_BYTES = "documents_id_bytes.npy"  # one UTF-8 blob, uint8
DOCUMENT_ID_OFFSETS = "documents_id_offsets.npy"  # (D + 1,) int64
# codebook
TRAINED_INDEX = "trained.index"  # centroids and codes, no row
# index
TRUTH_IDS = "truth_ids.npy"  # (files * Q, k) int64: rows of each file nearest to the recall queries
TRUTH_DISTANCES = "truth_distances.npy"  # (files * Q, k) float32
# neighbors, selection
NEIGHBOR_IDS = "ids.npy"  # (N, K) int32 or int64: global rows of the database, -1 for none
NEIGHBOR_DISTANCES = "distances.npy"  # (N, K) float32
# leakage
LEAKAGE_ROWS = "rows.npy"  # (E,) int64: evaluation chunks, by their row in the chunk store
LEAKAGE_TOKENS = "real_tokens.npy"  # (E,) uint8 or uint16: of each, without bos
LEAKAGE_OWN = "own.npy"  # (E, L) longest common substring with each of its own nearest neighbors
LEAKAGE_SEEN = "seen.npy"  # (E, L) with each of those of the chunk before, of the same document
# shingles
SHINGLES = "shingles.npy"  # (T,) uint64: the sets of all documents, each in ascending order
SHINGLE_COUNTS = "shingle_counts.npy"  # (D,) int64: size of each set
SHINGLE_KEYS = "shingle_keys.npy"  # (D, 2) uint64: 128-bit identity of each set
SIGNATURES = "signatures.npy"  # (D, num_perm) uint32
# duplicates
LEFT_OUT = "left_out.jsonl"
# packing
SEQUENCES = "sequences.npy"  # (S, chunks of a sequence) int32 or int64: chunk rows, -1 at the end


def folder_of(root: Path, stage: str, key: str, name: str | None = None) -> Path:
    """The folder of an artifact; `name` is that of its corpus, where it belongs to one."""
    short = key[:KEY_LETTERS]
    return root / stage / (f"{name}-{short}" if name else short)


def prepared_path(root: Path, settings_key: str) -> Path:
    return root / "prepared" / f"{settings_key[:KEY_LETTERS]}.json"


def prepared_notes(root: Path) -> list[Path]:
    """Those of all configurations that were prepared under this root."""
    return sorted((root / "prepared").glob("*.json"))


def digests_path(root: Path, corpus: str) -> Path:
    return root / "corpus" / f"{corpus}.digests.tsv"


def admitted_name(store: int) -> str:
    return f"admitted_{store:03d}.npy"


def splits_name(corpus: int) -> str:
    """(D,) uint8: split of each document of a corpus, near-duplicates told apart."""
    return f"splits_{corpus:03d}.npy"


def block_name(block: int, suffix: str = "npy") -> str:
    return f"{block:05d}.{suffix}"


def index_name(file: int = 0) -> str:
    return block_name(file, "index")


def is_index(name: str) -> bool:
    return name.endswith(".index")


def index_names(files: Iterable[str]) -> list[str]:
    """Those that are files of an index, in order."""
    return sorted(filter(is_index, files), key=lambda name: int(name.split(".")[0]))


def part_name(block: int, kind: str) -> str:
    """A part of the array `kind` (an array's file name) that `finish` lays into that array."""
    return f"{artifact.PARTS}/{block:05d}.{kind}"


def kind_of_part(name: str) -> str:
    """The array's file name in the name of a part."""
    return name.split(".", 1)[1]


def is_finished(folder: Path) -> bool:
    """Whether the artifact has a manifest, damaged or not."""
    return (folder / artifact.MANIFEST).exists()


def finished(folder: Path, command: str = "retro-data prepare") -> dict[str, Any]:
    """The manifest of an artifact that must be finished."""
    manifest = artifact.read_manifest(folder)
    if manifest is None:
        raise RetroDataError(f"{folder} is not finished (it has no manifest): run `{command}`.")
    return manifest


def _open(folder: Path, name: str, manifest: dict[str, Any]) -> Array:
    """An array of a finished artifact, held against what its manifest says."""
    array = artifact.open_array(folder / name)
    entry = manifest["arrays"][name]
    if array.dtype.str != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise RetroDataError(
            f"{folder / name} holds {array.dtype.str}{list(array.shape)}, its manifest says "
            f"{entry['dtype']}{entry['shape']}. {artifact.MEND}"
        )
    return array


class Documents:
    """The table of documents of a chunk store, in corpus order.

    Attributes:
        keys: (D, 2) uint64, identity of each document.
        first_chunk: (D + 1,) int64, row of each document's first chunk; the last entry is N.
        tokens: (D,) int64, stored tokens.
        bytes: (D,) int64, UTF-8 bytes of the text.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.keys = _open(folder, DOCUMENT_KEYS, manifest)
        self.first_chunk = _open(folder, DOCUMENT_FIRST_CHUNK, manifest)
        self.tokens = _open(folder, DOCUMENT_TOKENS, manifest)
        self.bytes = _open(folder, DOCUMENT_BYTES, manifest)
        self._id_bytes = _open(folder, DOCUMENT_ID_BYTES, manifest)
        self._id_offsets = _open(folder, DOCUMENT_ID_OFFSETS, manifest)

    def __len__(self) -> int:
        return len(self.keys)

    def id(self, document: int) -> str:
        """The id by which the corpus names a document."""
        start, stop = self._id_offsets[document : document + 2]
        return self._id_bytes[start:stop].tobytes().decode()

    def find(self, keys: Array) -> Array:
        """Rows of the documents with these identities, -1 where there is none.

        Args:
            keys: (Q, 2) uint64.

        Returns:
            (Q,) int64.
        """
        if not len(self) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        place = np.searchsorted(self._sorted, as_records(keys))
        place = np.minimum(place, len(self) - 1)
        hit = self._sorted[place] == as_records(keys)
        return np.where(hit, self._order[place], -1)

    @cached_property
    def _order(self) -> Array:
        return np.argsort(as_records(self.keys), kind="stable")

    @cached_property
    def _sorted(self) -> Array:
        return as_records(self.keys)[self._order]


def as_records(keys: Array) -> Array:
    """(D, 2) uint64 keys as (D,) items that numpy can sort and compare whole."""
    return np.ascontiguousarray(keys).view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)


class ChunkStore:
    """All chunks of one corpus, in corpus order.

    Attributes:
        tokens: (N, chunk_size) uint16 or uint32; `pad_id` beyond each chunk's real tokens.
        lengths: (N,) real tokens of each chunk, >= 1.
        document_of_chunk: (N,) row in `documents`.
        documents: the table of documents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = finished(self.folder)
        self.name: str = self.manifest["fields"]["name"]
        self.key: str = self.manifest["key"]
        self.tokens = _open(self.folder, TOKENS, self.manifest)
        self.lengths = _open(self.folder, LENGTHS, self.manifest)
        self.document_of_chunk = _open(self.folder, DOCUMENT_OF_CHUNK, self.manifest)
        self.documents = Documents(self.folder, self.manifest)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def chunk_size(self) -> int:
        return int(self.tokens.shape[1])

    @cached_property
    def pad_id(self) -> int | None:
        """What follows the tokens of a document whose last chunk is not full; of the first such one.

        None where there is none among the first documents.
        """
        ragged = np.flatnonzero(self.documents.tokens[:10_000] % self.chunk_size)
        if not len(ragged):
            return None
        return int(self.tokens[self.documents.first_chunk[ragged[0] + 1] - 1, -1])

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkStore, (self.folder,)  # a worker maps the files again


class Embeddings:
    """Vectors of the chunks of one store: consecutive .npy blocks, opened as they are asked for.

    A row of zeros stands for a chunk without encoder tokens: it is never anybody's neighbour.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = finished(self.folder)
        self.names = sorted(self.manifest["arrays"], key=lambda name: int(name.split(".")[0]))
        rows = [self.manifest["arrays"][name]["shape"][0] for name in self.names]
        self.starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)
        self.shape = (int(self.starts[-1]), int(self.manifest["dim"]))

    def blocks(self) -> Iterator[Array]:
        for name in self.names:
            yield _open(self.folder, name, self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Embeddings, (self.folder,)


class NeighborLists:
    """Stored candidates of every chunk of one store, all of them or a selection.

    Attributes:
        ids: (N, K) global database rows in order of distance, or as they were ranked again; -1
            (missing) at the end.
        distances: (N, K) float32.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = finished(self.folder)
        self.ids = _open(self.folder, NEIGHBOR_IDS, self.manifest)
        self.distances = _open(self.folder, NEIGHBOR_DISTANCES, self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return NeighborLists, (self.folder,)


class LeakageTable:
    """What evaluation chunks of one store share with what was retrieved.

    Attributes:
        rows: (E,) int64, chunk rows, ascending.
        real_tokens: (E,) of each chunk, without bos.
        own: (E, L) tokens of the longest substring that the chunk shares with each of its own L
            nearest neighbors, in their order.
        seen: (E, L) the same with the neighbors of the chunk before, of the same document (the
            selected ones, if there is a selection): what a model sees while it predicts the chunk.
            0 for a document's first chunk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        manifest = finished(self.folder)
        self.rows = _open(self.folder, LEAKAGE_ROWS, manifest)
        self.real_tokens = _open(self.folder, LEAKAGE_TOKENS, manifest)
        self.own = _open(self.folder, LEAKAGE_OWN, manifest)
        self.seen = _open(self.folder, LEAKAGE_SEEN, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return LeakageTable, (self.folder,)


class ShingleSets:
    """What the texts of the documents of one corpus are compared by, in corpus order.

    Attributes:
        hashes: (T,) uint64, the set of each document, ascending.
        counts: (D,) int64, size of each set.
        offsets: (D + 1,) int64, where each set begins.
        keys: (D, 2) uint64, identity of each set.
        signatures: (D, num_perm) uint32, MinHash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        manifest = finished(self.folder)
        self.hashes = np.asarray(_open(self.folder, SHINGLES, manifest))
        self.counts = _open(self.folder, SHINGLE_COUNTS, manifest)
        self.keys = _open(self.folder, SHINGLE_KEYS, manifest)
        self.signatures = _open(self.folder, SIGNATURES, manifest)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, document: int) -> Array:
        found: Array = self.hashes[self.offsets[document] : self.offsets[document + 1]]
        return found


def cleaned_splits(folder: Path, corpus: str) -> Array:
    """(D,) uint8 split of each document of a corpus, from a finished `duplicates` artifact."""
    manifest = finished(folder)
    names = [name for name, _ in manifest["fields"]["corpora"]]
    return _open(folder, splits_name(names.index(corpus)), manifest)


class PackedSequences:
    """Training sequences of one store that documents share.

    Attributes:
        rows: (S, chunks of a sequence) chunk rows, -1 at the end of a sequence that is not full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.rows = _open(self.folder, SEQUENCES, finished(self.folder))

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedSequences, (self.folder,)


@dataclass(frozen=True)
class DatabaseStores:
    """The chunk stores of a database, one after the other: a global row is first_rows[s] + row."""

    stores: tuple[ChunkStore, ...]
    first_rows: tuple[int, ...]  # one more than stores: the last is the number of rows

    @classmethod
    def of(cls, folders: Sequence[Path]) -> DatabaseStores:
        stores = tuple(ChunkStore(folder) for folder in folders)
        first = np.concatenate([[0], np.cumsum([len(s) for s in stores])]).astype(int)
        return cls(stores, tuple(int(f) for f in first))

    def __len__(self) -> int:
        return self.first_rows[-1]
