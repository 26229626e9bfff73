"""Which documents train, and which are kept for evaluation: a keyed hash against thresholds.

The split of a document depends on its identity, a salt and the fractions alone: changing a fraction
tokenizes and embeds nothing again, and a growing corpus moves no document from one split to another.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import store
from retro_data.artifact import key_fields, keyed
from retro_data.errors import RetroDataError

Array = np.ndarray[Any, Any]

SPLITS = ("train", "val", "test", "database")
TRAINING = ("hash", "train")  # `split` of corpora that hold training documents
EVALUATION = ("val", "test")
LEFT_OUT_CODE = len(SPLITS)  # of a document of no split: a near-duplicate of one of evaluation


@dataclass(frozen=True)
class SplitSettings:
    """Fractions of documents; train takes what the others leave.

    Attributes:
        val, test: shares of the documents of a corpus whose `split` is "hash".
        database: share of them that is only ever retrieved: what a model's weights have not seen.
        salt: another salt is another split.
    """

    val: float = keyed(0.05)
    test: float = keyed(0.05)
    database: float = keyed(0.0)
    salt: str = keyed("retro_data")

    def __post_init__(self) -> None:
        if min(self.val, self.test, self.database) < 0 or self.train <= 0:
            raise RetroDataError(
                f"splits.val={self.val}, splits.test={self.test} and splits.database="
                f"{self.database}: each must be at least 0, and together they must leave something "
                "to train on."
            )

    @property
    def evaluation(self) -> float:
        """Share of documents of val and test."""
        return self.val + self.test

    @property
    def train(self) -> float:
        """Share of documents that train."""
        return 1 - self.evaluation - self.database


def split_hash(keys: Array, salt: str) -> Array:
    """A number in [0, 1) for each document, fixed by its identity and the salt.

    Args:
        keys: (D, 2) uint64.

    Returns:
        (D,) float64.
    """
    seed = np.frombuffer(hashlib.blake2b(salt.encode(), digest_size=16).digest(), "<u8")
    both = mixed(mixed(keys[:, 0] ^ seed[0]) ^ keys[:, 1] ^ seed[1])
    place: Array = (both >> np.uint64(11)) / 2.0**53
    return place


def mixed(x: Array) -> Array:
    """Each uint64 to one that looks random: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def split_of_documents(keys: Array, split: str, settings: SplitSettings) -> Array:
    """Index into SPLITS of each document.

    Args:
        keys: (D, 2) uint64 identities.
        split: of their corpus: "hash", or one of SPLITS for all of them.

    Returns:
        (D,) uint8.
    """
    if split != "hash":
        if split not in SPLITS:
            raise RetroDataError(
                f"corpus.split={split!r}: expected 'hash' or one of {', '.join(SPLITS)}."
            )
        return np.full(len(keys), SPLITS.index(split), np.uint8)
    return split_at(split_hash(keys, settings.salt), settings)


def split_at(place: Array, settings: SplitSettings) -> Array:
    """(D,) uint8 index into SPLITS of documents at these places (D,) in [0, 1)."""
    evaluation = 1 - settings.evaluation
    codes = np.full(len(place), SPLITS.index("train"), np.uint8)
    codes[place >= settings.train] = SPLITS.index("database")
    codes[place >= evaluation] = SPLITS.index("val")
    codes[place >= evaluation + settings.val] = SPLITS.index("test")
    return codes


@dataclass(frozen=True)
class SplitOfCorpus:
    """How the documents of one corpus are told apart. Picklable.

    Attributes:
        name: of the corpus.
        split: of the corpus: "hash", or one of SPLITS for all documents.
        settings: of "hash".
        duplicates: folder and key of the stage that told near-duplicates apart; None: nothing did.
    """

    name: str
    split: str
    settings: SplitSettings
    duplicates: tuple[Path, str] | None = None

    def of(self, documents: store.Documents, rows: slice = slice(None)) -> Array:
        """uint8 index into SPLITS of each document, or LEFT_OUT_CODE; of all, or those at `rows`."""
        if self.duplicates is not None:
            return store.cleaned_splits(self.duplicates[0], self.name)[rows]
        return split_of_documents(documents.keys[rows], self.split, self.settings)

    def key_fields(self) -> dict[str, Any]:
        splits = key_fields(self.settings) if self.split == "hash" else None
        return {"name": self.name, "split": self.split, "splits": splits}

    def parents(self) -> dict[str, str]:
        return {"duplicates": self.duplicates[1]} if self.duplicates is not None else {}
