"""The stage `duplicates`: the split of each document, near-duplicates told apart.

Text that a model trains on, or retrieves, in nearly the words of an evaluation document would be
remembered, not predicted (Borgeaud et al. 2021, section 2.1). So

- documents of corpora with split "hash" that are near-duplicates of each other, or of one another by
  way of others, form a *cluster*, which falls into one split as a whole: where its member with the
  lowest hash falls. So the lower half of the documents trains whatever they resemble, and a growing
  corpus moves documents of evaluation to training, never the other way;
- a document of "train" or "database" that is a near-duplicate of one of "val" or "test" is left out:
  it is of no split, and so neither trained on nor retrieved.

MinHash signatures in bands propose pairs (Broder 1997; Leskovec et al., Mining of Massive Datasets,
section 3.4); the sets of shingles themselves decide.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import artifact, store
from retro_data.shingles import NearDuplicateSettings
from retro_data.splits import (
    EVALUATION,
    LEFT_OUT_CODE,
    SPLITS,
    SplitSettings,
    mixed,
    split_at,
    split_hash,
    split_of_documents,
)
from retro_data.stage import Block, BlockWriter, Receipt, Resources, block_files, total_counts
from retro_data.store import ChunkStore, ShingleSets

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

MISSED = 1e-4  # of the pairs just at the threshold, at most
FAR = 0.15  # that the share of 128 equal entries is below the Jaccard of one pair in 100,000
MOST_STEPS = 4096  # documents of one band that each is held against, after those it resembles
SKETCH = 32  # shingles of an evaluation document by which texts that hold it are looked for
MOST_SHARED = 1000  # evaluation documents that share a shingle by which they are looked for
PIECE = 2**20  # shingles looked up at once


# ---- sets ----------------------------------------------------------------------------------------


class Sets:
    """The sets of shingles of several corpora, one after the other.

    Args:
        corpora: of each.

    Attributes:
        sizes: (D,) int64.
        signatures: (D, num_perm) uint32, in memory.
        same: (D,) int64, the first document with the same set.
    """

    def __init__(self, corpora: Sequence[ShingleSets]) -> None:
        self.corpora = list(corpora)
        self.sizes = np.concatenate([np.asarray(c.counts) for c in corpora])
        self.signatures = np.concatenate([np.asarray(c.signatures) for c in corpora])
        # Of each entry one byte, and each row as one opaque item: what can be gathered fastest.
        low = self.signatures.astype(np.uint8)
        self._bytes = low.view(f"V{low.shape[1]}").ravel()
        self._first = np.cumsum([0, *(len(c) for c in corpora)])
        records = store.as_records(np.concatenate([np.asarray(c.keys) for c in corpora]))
        _, first, inverse = np.unique(records, return_index=True, return_inverse=True)
        self.same = first[inverse.ravel()]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> Array:
        """The set of a document: ascending uint64."""
        corpus = int(np.searchsorted(self._first, document, side="right")) - 1
        return self.corpora[corpus][int(document - self._first[corpus])]

    def common(self, one: int, other: int) -> int:
        """Shingles that two documents share."""
        both = np.concatenate([self[one], self[other]])
        both.sort()
        return int((both[1:] == both[:-1]).sum())

    def agreement(self, one: Array, other: Array) -> Array:
        """Share of entries of two signatures whose last bytes agree, of pairs (P,), (P,).

        Estimates the Jaccard similarity; by chance a byte in 256 more than whole entries would.
        """
        same = self._bytes.take(one).view(np.uint8) == self._bytes.take(other).view(np.uint8)
        width = self._bytes.dtype.itemsize
        agree: Array = same.view(np.uint8).reshape(-1, width).sum(1, dtype=np.uint32) / width
        return agree

    def jaccard(self, one: int, other: int) -> float:
        common = self.common(one, other)
        return common / int(self.sizes[one] + self.sizes[other] - common)


# ---- pairs ---------------------------------------------------------------------------------------


def rows_of_a_band(jaccard: float, num_perm: int) -> int:
    """As many as may be, where all but MISSED of the pairs of this similarity meet in some band."""
    fitting = [r for r in range(1, 17) if (1 - jaccard**r) ** (num_perm // r) <= MISSED]
    return max(fitting, default=1)


def bands(signatures: Array, rows: int, among: Array) -> Iterator[tuple[Array, Array]]:
    """For each band, the documents of `among` (M,) that agree in the whole of it with another.

    Returns:
        (A,) int64 documents, those that agree side by side and ascending, and (A,) int64 where in
        this array the group of each ends.
    """
    for start in range(0, signatures.shape[1] - rows + 1, rows):
        key = np.zeros(len(among), np.uint64)
        for column in range(start, start + rows):
            key = mixed(key + signatures[among, column])
        order = np.argsort(key, kind="stable")
        edges = np.flatnonzero(np.diff(key[order])) + 1
        counts = np.diff(np.concatenate([[0], edges, [len(order)]]))
        several = np.repeat(counts > 1, counts)
        counts = counts[counts > 1]
        yield among[order[several]], np.repeat(np.cumsum(counts), counts)


def pairs_of_band(
    members: Array, stop: Array, labels: Callable[[Array], Array]
) -> Iterator[tuple[Array, Array]]:
    """Pairs of one band whose labels differ, those that lie nearer to each other first.

    A group that has come to be of one label is left, so that many documents that are all alike cost
    their number, not its square.

    Args:
        members, stop: as of `bands`.
        labels: of documents; asked again before each yield, since what became of earlier pairs
            may spare later ones.
    """
    for step in range(1, MOST_STEPS + 1):
        place = np.arange(len(members) - step)
        place = place[place + step < stop[place]]
        if not len(place):
            return
        of_members = labels(members)
        chosen = place[of_members[place] != of_members[place + step]]
        yield members[chosen], members[chosen + step]
        members, stop = _undecided(members, stop, labels(members))
    log.warning("%d documents agree with over %d others in a band", len(members), MOST_STEPS)


def _undecided(members: Array, stop: Array, labels: Array) -> tuple[Array, Array]:
    """Without the groups of one label."""
    starts = np.flatnonzero(np.diff(stop, prepend=-1))
    if not len(starts):
        return members, stop
    counts = np.diff(np.append(starts, len(members)))
    differ = np.minimum.reduceat(labels, starts) != np.maximum.reduceat(labels, starts)
    kept = counts[differ]
    return members[np.repeat(differ, counts)], np.repeat(np.cumsum(kept), kept)


def near_pairs(
    sets: Sets, one: Array, other: Array, jaccard: float
) -> Iterator[tuple[int, int, float]]:
    """Those of the pairs (P,), (P,) whose sets are as similar as `jaccard`, with their similarity."""
    small, large = (f(sets.sizes[one], sets.sizes[other]) for f in (np.minimum, np.maximum))
    possible = small >= jaccard * large
    one, other = one[possible], other[possible]
    for start in range(0, len(one), 2**14):
        part = slice(start, start + 2**14)
        near = sets.agreement(one[part], other[part]) >= jaccard - FAR
        for a, b in zip(one[part][near].tolist(), other[part][near].tolist(), strict=True):
            found = sets.jaccard(a, b)
            if found >= jaccard:
                yield a, b, found


# ---- clusters ------------------------------------------------------------------------------------


def clusters(sets: Sets, among: Array, settings: NearDuplicateSettings) -> Array:
    """(D,) int64: the first document of each one's cluster; of others than `among`, themselves.

    Args:
        among: (D,) bool.
    """
    parent = np.arange(len(sets))
    chosen = np.flatnonzero(among)
    # The first of equal sets among these; the first of all may not be one of them.
    _, first, inverse = np.unique(sets.same[chosen], return_index=True, return_inverse=True)
    parent[chosen] = chosen[first][inverse.ravel()]

    def roots(documents: Array) -> Array:
        found = parent[documents]
        while True:
            above = parent[found]
            if (above == found).all():
                return found
            found = above

    rows = rows_of_a_band(settings.jaccard, settings.num_perm)
    for members, stop in bands(sets.signatures, rows, np.sort(chosen[first])):
        for one, other in pairs_of_band(members, stop, roots):
            for a, b, _ in near_pairs(sets, one, other, settings.jaccard):
                low, high = sorted(roots(np.array([a, b])).tolist())
                parent[high] = low
    return roots(np.arange(len(sets)))


# ---- what is left out ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """Why a document is left out: the evaluation document, the measure and its value."""

    document: int
    evaluation: int
    measure: str  # jaccard | containment
    value: float


EVALUATED, LEFT = 0, 2  # labels of sets; 1: a document that trains or is retrieved


def find_matches(
    sets: Sets, evaluated: Array, others: Array, settings: NearDuplicateSettings
) -> list[Match]:
    """The documents of `others` that are too much like one of `evaluated`, ascending.

    Args:
        evaluated, others: (D,) bool, never both.
    """
    of_evaluation = np.full(len(sets), -1)  # set -> an evaluation document that has it
    rows = np.flatnonzero(evaluated)[::-1]
    of_evaluation[sets.same[rows]] = rows
    why: dict[int, tuple[int, str, float]] = {}  # first document of a set -> evaluation, …
    labels = np.full(len(sets), LEFT, np.int8)
    labels[sets.same[others]] = 1
    for one in np.flatnonzero((labels == 1) & (of_evaluation >= 0)).tolist():
        why[one] = (int(of_evaluation[one]), "jaccard", 1.0)
    labels[of_evaluation >= 0] = EVALUATED
    rows_of_band = rows_of_a_band(settings.jaccard, settings.num_perm)
    for members, stop in bands(sets.signatures, rows_of_band, np.flatnonzero(labels != LEFT)):
        for one, other in pairs_of_band(members, stop, lambda documents: labels[documents] == 1):
            useful = (labels[one] == EVALUATED) | (labels[other] == EVALUATED)
            for a, b, value in near_pairs(sets, one[useful], other[useful], settings.jaccard):
                target, source = (b, a) if labels[a] == EVALUATED else (a, b)
                if labels[target] == 1:
                    labels[target] = LEFT
                    why[target] = (int(of_evaluation[source]), "jaccard", value)
    if settings.containment is not None:
        texts = np.flatnonzero(of_evaluation >= 0)
        for target, source, value in _holders(sets, texts, labels == 1, settings.containment):
            why[target] = (int(of_evaluation[source]), "containment", value)
    found = ((d, why.get(int(sets.same[d]))) for d in np.flatnonzero(others).tolist())
    return [Match(document, *reason) for document, reason in found if reason is not None]


def _holders(
    sets: Sets, texts: Array, targets: Array, containment: float
) -> Iterator[tuple[int, int, float]]:
    """Of `targets` (D,) bool those that hold most of a set of `texts` (E,): target, text, share.

    The lowest hashes of each text, as good as drawn at random, are looked up in one pass over all
    sets; where enough of them are found, the whole sets decide.
    """
    sketches = [sets[text][:SKETCH] for text in texts.tolist()]
    number = np.repeat(np.arange(len(texts)), [len(sketch) for sketch in sketches])
    hashes = np.concatenate([*sketches, np.empty(0, np.uint64)])
    order = np.argsort(hashes, kind="stable")
    hashes, number = hashes[order], number[order]
    values, starts, counts = np.unique(hashes, return_index=True, return_counts=True)
    rare = np.repeat(counts <= MOST_SHARED, counts)
    looked_up = np.bincount(number[rare], minlength=len(texts))
    needed = np.maximum(np.ceil(looked_up * (containment - 0.3)), 1)
    starts, counts = starts * (counts <= MOST_SHARED), counts * (counts <= MOST_SHARED)
    for documents, found in _pieces(sets):
        if not len(values):
            return
        place = np.minimum(np.searchsorted(values, found), len(values) - 1)
        hit = (values[place] == found) & targets[documents]
        place, documents = place[hit], documents[hit]
        many = counts[place]
        inside = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        pair = (
            np.repeat(documents, many) * len(texts)
            + number[np.repeat(starts[place], many) + inside]
        )
        pairs, hits = np.unique(pair, return_counts=True)
        held, text = np.divmod(pairs, max(1, len(texts)))
        enough = hits >= needed[text]
        done = -1
        for target, source in zip(held[enough].tolist(), texts[text[enough]].tolist(), strict=True):
            share = 0.0 if target == done else sets.common(source, target) / int(sets.sizes[source])
            if share >= containment:
                done = target
                yield target, source, share


def _pieces(sets: Sets) -> Iterator[tuple[Array, Array]]:
    """All sets in order, whole ones, about PIECE shingles at once: documents (T,), hashes (T,)."""
    first = 0
    for corpus in sets.corpora:
        edges = np.searchsorted(corpus.offsets, np.arange(0, corpus.offsets[-1] + PIECE, PIECE))
        edges = np.unique(np.minimum(edges, len(corpus)))
        for start, stop in pairwise(edges.tolist()):
            counts = corpus.counts[start:stop]
            low, high = corpus.offsets[start], corpus.offsets[stop]
            yield first + np.repeat(np.arange(start, stop), counts), corpus.hashes[low:high]
        first += len(corpus)


# ---- the stage -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitCorpus:
    """A corpus whose documents are told apart: name, split, chunk store and shingles."""

    name: str
    split: str
    chunks: tuple[Path, str]
    shingles: tuple[Path, str]


class DuplicateStage:
    """Splits the documents of all corpora, and leaves out what is too much like evaluation.

    Made in one piece: the texts themselves were read and hashed by `shingles`, in blocks.

    Args:
        settings: what a near-duplicate is.
        splits: how documents of a corpus with split "hash" are told apart.
        corpora: all of the configuration, in order.
    """

    name = "duplicates"
    version = 1
    resources = Resources(threads=1)
    unit = "corpora"
    tolerance = 0.0

    def __init__(
        self,
        settings: NearDuplicateSettings,
        splits: SplitSettings,
        corpora: Sequence[SplitCorpus],
    ) -> None:
        self.settings, self.splits = settings, splits
        self.corpora = list(corpora)

    def key_fields(self) -> dict[str, Any]:
        fields = artifact.key_fields(self.settings)
        return {
            "corpora": [[c.name, c.split] for c in self.corpora],
            "splits": artifact.key_fields(self.splits),
            "jaccard": fields["jaccard"],
            "containment": fields["containment"],
        }

    def parents(self) -> dict[str, str]:
        chunks = {f"chunks {c.name}": c.chunks[1] for c in self.corpora}
        return {**chunks, **{f"shingles {c.name}": c.shingles[1] for c in self.corpora}}

    def blocks(self) -> list[Block]:
        return [Block(0, 0, len(self.corpora))]

    def open(self, device: str) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def make(self, context: None, block: Block, out: BlockWriter) -> None:
        stores = [ChunkStore(c.chunks[0]) for c in self.corpora]
        sets = Sets([ShingleSets(c.shingles[0]) for c in self.corpora])
        codes, together = self._split(sets, stores)
        evaluated = np.isin(codes, [SPLITS.index(name) for name in EVALUATION])
        matches = find_matches(sets, evaluated, ~evaluated, self.settings)
        documents = _Documents(stores)
        with out.file(store.LEFT_OUT) as report:
            for match in matches:
                row = {
                    **documents.name(match.document, ""),
                    "split": SPLITS[codes[match.document]],
                    **documents.name(match.evaluation, "evaluation_"),
                    "evaluation_split": SPLITS[codes[match.evaluation]],
                    match.measure: round(match.value, 6),
                }
                report.write(json.dumps(row).encode() + b"\n")
        left_out = [match.document for match in matches]
        codes[left_out] = LEFT_OUT_CODE
        for i, part in enumerate(np.split(codes, documents.first[1:-1])):
            out.array(store.splits_name(i), part)
        out.rows = len(codes)
        sizes = np.unique(together, return_counts=True)[1]
        out.count("documents", len(codes))
        out.count("clusters", int((sizes > 1).sum()))
        out.count("documents_in_clusters", int(sizes[sizes > 1].sum()))
        out.count("left_out", len(left_out))
        for i, name in enumerate(SPLITS):
            out.count(f"documents_of_{name}", int((codes == i).sum()))

    def _split(self, sets: Sets, stores: Sequence[ChunkStore]) -> tuple[Array, Array]:
        """(D,) split of each document before any is left out, and (D,) its cluster."""
        hashed = np.concatenate(
            [
                np.full(len(chunks.documents), corpus.split == "hash")
                for corpus, chunks in zip(self.corpora, stores, strict=True)
            ]
        )
        keys = np.concatenate([np.asarray(chunks.documents.keys) for chunks in stores])
        codes = np.concatenate(
            [
                split_of_documents(chunks.documents.keys, corpus.split, self.splits)
                for corpus, chunks in zip(self.corpora, stores, strict=True)
            ]
        )
        together = clusters(sets, hashed, self.settings)
        place = split_hash(keys, self.splits.salt)
        lowest = np.ones(len(sets))
        np.minimum.at(lowest, together, place)
        codes[hashed] = split_at(lowest[together], self.splits)[hashed]
        return codes, together

    def finish(self, folder: Path, receipts: Sequence[Receipt]) -> dict[str, Any]:
        files, counts = block_files(receipts), total_counts(receipts)
        if counts["left_out"]:
            log.info(
                "%d documents are near-duplicates of evaluation documents and left out, listed in %s",
                *(counts["left_out"], folder / store.LEFT_OUT),
            )
        report = {store.LEFT_OUT: files.pop(store.LEFT_OUT)}
        return {"arrays": files, "files": report, "rows": counts["documents"], "figures": counts}


class _Documents:
    """Names of the documents of several stores."""

    def __init__(self, stores: Sequence[ChunkStore]) -> None:
        self.stores = stores
        self.first = np.cumsum([0, *(len(chunks.documents) for chunks in stores)])

    def name(self, document: int, prefix: str) -> dict[str, str]:
        place = int(np.searchsorted(self.first, document, side="right")) - 1
        id = self.stores[place].documents.id(int(document - self.first[place]))
        return {f"{prefix}corpus": self.stores[place].name, f"{prefix}id": id}
