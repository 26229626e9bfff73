"""The stage `shingles`: what the text of each document is compared by.

A shingle is a run of 13 words (`ngram`) of a text in NFKC and lower case; words are what white space
parts. A text of fewer words is one shingle by itself. Kept are the set of each document as 64-bit
hashes, 8 bytes a word, and a MinHash signature of it, 4 bytes times `num_perm` a document.

The text is read from the corpus again: chunk stores of tokenizers that are not lossless no longer
hold it, and reading costs little beside tokenizing.
"""

from __future__ import annotations

import contextlib
import hashlib
import unicodedata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.artifact import keyed
from retro_data.chunks import even_blocks, text_batches
from retro_data.corpus import CorpusSettings, Reader, open_reader
from retro_data.errors import RetroDataError
from retro_data.scan import ScannedCorpus, block_documents, keys_array
from retro_data.splits import mixed
from retro_data.stage import Block, BlockWriter, Receipt, Resources, lay_parts, total_counts

Array = np.ndarray[Any, Any]

SEED = 1  # of signatures
KNOWN_WORDS = 2**20  # whose hashes are remembered
MULTIPLIER = 0x9E3779B97F4A7C15  # of the rolling hash: odd, 2**64 over the golden ratio
INSTALL = "`pip install 'retro_data[dedup]'`"
KINDS = (
    store.SHINGLES,
    store.SHINGLE_COUNTS,
    store.SHINGLE_KEYS,
    store.SIGNATURES,
)


@dataclass(frozen=True)
class NearDuplicateSettings:
    """Which documents are too much like one of an evaluation split to be trained on or retrieved.

    Attributes:
        jaccard: documents whose sets of shingles have this Jaccard similarity are near-duplicates.
        containment: a document is also left out if it holds this share of the shingles of an
            evaluation document, however long it is; None: it is not.
        ngram: words of a shingle.
        num_perm: hashes of a signature; more miss fewer pairs.
    """

    jaccard: float = keyed(0.8)
    containment: float | None = keyed(None)
    ngram: int = keyed(13)
    num_perm: int = keyed(128)

    def __post_init__(self) -> None:
        for name in ("jaccard", "containment"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise RetroDataError(
                    f"near_duplicates.{name}={value}: expected a share, above 0 and at most 1."
                )
        if self.ngram < 1 or self.num_perm < 16:
            raise RetroDataError(
                f"near_duplicates.ngram={self.ngram} and num_perm={self.num_perm}: expected at least "
                "1 and 16."
            )


# ---- text to sets --------------------------------------------------------------------------------


class _WordHashes(dict[str, int]):
    """64-bit hash of each word, computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= KNOWN_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


class Shingler:
    """Texts to their sets of shingles.

    Args:
        ngram: words of a shingle.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self._hashes = _WordHashes()
        powers = [pow(MULTIPLIER, i, 2**64) for i in range(ngram)]
        self._powers = np.array(powers, np.uint64)

    def __call__(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """The sets of texts, one after the other, each in ascending order.

        Returns:
            hashes (T,) uint64, and the size of each set (D,) int64, at least 1.
        """
        words = [unicodedata.normalize("NFKC", text).lower().split() for text in texts]
        sizes = np.fromiter(map(len, words), np.int64, len(words))
        total, n = int(sizes.sum()), self.ngram
        flat = chain.from_iterable(words)
        hashes = np.fromiter(map(self._hashes.__getitem__, flat), np.uint64, total)
        short = np.flatnonzero(sizes < n)
        of_short = self._whole(hashes, np.cumsum(sizes) - sizes, sizes, short)
        runs = np.maximum(sizes - n + 1, 0)
        document = np.repeat(np.arange(len(sizes)), runs)
        start = np.repeat(np.cumsum(sizes) - sizes - (np.cumsum(runs) - runs), runs)
        start += np.arange(len(document))
        rolled = np.zeros(len(document), np.uint64)
        for i, power in enumerate(self._powers):
            rolled += hashes[start + i] * power
        return _as_sets(
            np.concatenate([mixed(rolled), of_short]),
            np.concatenate([document, short]),
            len(sizes),
        )

    def _whole(self, hashes: Array, starts: Array, sizes: Array, short: Array) -> Array:
        """One hash for each text of fewer words than a shingle, (len(short),) uint64."""
        found = np.zeros(len(short), np.uint64)
        for i in range(self.ngram - 1):
            longer = sizes[short] > i
            found[longer] += hashes[starts[short[longer]] + i] * self._powers[i]
        # Words that happen to begin a shingle are no shingle: the length is part of it.
        return mixed(mixed(found) + sizes[short].astype(np.uint64) + np.uint64(1))


def _as_sets(hashes: Array, document: Array, documents: int) -> tuple[Array, Array]:
    order = np.lexsort((hashes, document))
    hashes, document = hashes[order], document[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (document[1:] != document[:-1])
    return hashes[new], np.bincount(document[new], minlength=documents)


# ---- signatures ----------------------------------------------------------------------------------


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise RetroDataError(
            f"near_duplicates needs the package rensa: {INSTALL}, or set near_duplicates=null."
        ) from error
    return rensa


def minhash_version() -> int:
    """Of the library's signatures: those of two versions cannot be compared."""
    return int(_rensa().RMinHash.ALGORITHM_VERSION)


def signatures(hashes: Array, sizes: Array, num_perm: int) -> Array:
    """(D, num_perm) uint32: the share of equal entries of two rows estimates their sets' Jaccard.

    Args:
        hashes, sizes: as `Shingler` gives them.
    """
    if not len(sizes):
        return np.empty((0, num_perm), np.uint32)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        np.ascontiguousarray(hashes), offsets, num_perm, SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


# ---- the stage -----------------------------------------------------------------------------------


@dataclass
class ShingleContext:
    reader: Reader
    corpus: ScannedCorpus
    shingler: Shingler


class ShingleStage:
    """Reads one corpus and keeps the set and the signature of each document.

    Args:
        settings: of which `ngram` and `num_perm` count here.
        corpus: which documents, with the folder and key of its scan.
    """

    name = "shingles"
    version = 1
    resources = Resources(threads=1)
    unit = "documents"
    tolerance = 0.0

    def __init__(
        self, settings: NearDuplicateSettings, corpus: CorpusSettings, scan: tuple[Path, str]
    ) -> None:
        self.settings = settings
        self.corpus = corpus
        self.scan = scan

    def key_fields(self) -> dict[str, Any]:
        fields = artifact.key_fields(self.settings)
        kept = {name: fields[name] for name in ("ngram", "num_perm")}
        return {"name": self.corpus.name, **kept, "minhash_version": minhash_version()}

    def parents(self) -> dict[str, str]:
        return {"corpus": self.scan[1]}

    def blocks(self) -> list[Block]:
        return even_blocks(ScannedCorpus(self.scan[0]))

    def open(self, device: str) -> AbstractContextManager[ShingleContext]:
        reader, scanned = open_reader(self.corpus), ScannedCorpus(self.scan[0])
        return contextlib.nullcontext(
            ShingleContext(reader, scanned, Shingler(self.settings.ngram))
        )

    def make(self, context: ShingleContext, block: Block, out: BlockWriter) -> None:
        hashes, sizes, keys, rows = [], [], [], []
        for batch in text_batches(block_documents(context.reader, context.corpus, block)):
            found, counts = context.shingler([document.text for document in batch])
            hashes.append(found)
            sizes.append(counts)
            rows.append(signatures(found, counts, self.settings.num_perm))
            for one in np.split(found, np.cumsum(counts)[:-1]):
                keys.append(hashlib.blake2b(one.tobytes(), digest_size=16).digest())
        parts = {
            store.SHINGLES: np.concatenate(hashes),
            store.SHINGLE_COUNTS: np.concatenate(sizes),
            store.SHINGLE_KEYS: keys_array(keys),
            store.SIGNATURES: np.concatenate(rows),
        }
        for kind, array in parts.items():
            out.array(store.part_name(block.index, kind), array)
        out.rows = len(keys)
        out.count("documents", len(keys))
        out.count("shingles", len(parts[store.SHINGLES]))

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        counts = total_counts(receipts)
        arrays = {kind: lay_parts(folder, receipts, kind) for kind in KINDS}
        return {"arrays": arrays, "rows": counts["documents"], "figures": counts}
