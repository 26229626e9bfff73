"""From chunk stores to batches: sequences of a split, each chunk with its retrieved neighbors.

    documents of a split ─► plan: which chunk rows make which sequence      (once, at construction)
    indices ─► chunk rows (B, n/m) ─► tokens, labels, lengths               (one read an array)
                                  └─► neighbor ids ─► neighbor + continuation (one read an array)

The batch, with B sequences, n = seq_len, m = chunk_size, k = num_neighbors, r = 2 * chunk_size:

    input_ids        (B, n) int64          tokens; pad_id beyond each chunk's real tokens
    labels           (B, n) int64          the next token; -100 where there is none to score
    chunk_lengths    (B, n/m) int64        real tokens of each chunk, 0 beyond the document
    neighbor_tokens  (B, n/m, k, r) int64  a neighbor chunk and its continuation; else pad_id
    neighbor_mask    (B, n/m, k, r) bool   True on real tokens
    chunk_ids        (B, n/m) int64        row among the chunks of all corpora in order, -1 beyond
    document_ids     (B, n/m) int64        row among the documents of all corpora, -1 beyond

Stored arrays are memory maps, opened read-only; a batch is a few gathers in numpy, none of them
an item at a time. Numpy rather than torch does them: they are too small to share among threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from retro_data.errors import RetroDataError
from retro_data.row_readers import ChunkReader, NeighborReader, opaque_item
from retro_data.sequences import MODES, PackedPlan, SequencePlan, plan_documents, whole_chunks
from retro_data.splits import SPLITS
from retro_data.store import DatabaseStores, PackedSequences

if TYPE_CHECKING:
    from retro_data.pipeline import PreparedCorpus

Array = np.ndarray[Any, Any]
Batch = dict[str, Tensor]

NO_LABEL = -100


class _Readers:
    """What a dataset reads from, opened anew in each process that reads."""

    def __init__(self, dataset: RetroDataset) -> None:
        size, pad_id = dataset.chunk_size, dataset.pad_id
        real = np.arange(size) < np.arange(size + 1)[:, None]
        self.masks = real.view(f"V{size}").ravel()  # of a chunk, by its length
        self.wide = np.dtype(f"V{8 * size}")  # a chunk of int64
        self.no_tokens = opaque_item(self.wide, np.dtype(np.int64), pad_id)
        self.no_labels = opaque_item(self.wide, np.dtype(np.int64), NO_LABEL)
        self.chunks = ChunkReader(dataset.chunks, 1, dataset.prefetch)
        if dataset.num_neighbors:
            assert dataset.database is not None
            self.database = ChunkReader(dataset.database, size, dataset.prefetch)
            dtype = self.database.dtype
            self.narrow = np.dtype(f"V{dtype.itemsize * size}")  # a chunk as it is stored
            self.no_chunk = opaque_item(self.narrow, dtype, pad_id)
            self.neighbors = NeighborReader(
                dataset.neighbor_ids(),
                dataset.chunks.first_rows,
                dataset.num_neighbors,
                dataset.prefetch,
            )


# ---- the dataset ---------------------------------------------------------------------------------


class RetroDataset(Dataset[Batch]):
    """Sequences of one split with their neighbors, as finished batches.

    Hand it to a DataLoader with `collate_fn=retro_data.dataset.collate`; the loader asks for whole
    batches by `__getitems__`. Index -1 is a row of padding: pad_id, labels -100, masks False and
    ids -1.

    Args:
        corpora: as `pipeline.open_prepared` gives them.
        split: "train", "val" or "test".
        database: the stores that neighbor ids point into; None only with num_neighbors 0.
        seq_len: tokens of a sequence, whole chunks.
        pad_id: what stands beyond real tokens, in the stores too.
        eos_id: label after a document's last token; None leaves it unscored.
        num_neighbors: neighbors of each chunk, the nearest of those stored; 0 reads none.
        eval_stride: tokens, whole chunks. None, for training: every token is in one sequence. Else,
            for evaluation: sequences overlap and each label is scored once (`plan_documents`).
        mode: "document": one document a sequence. "packed", for training: whole chunks of several
            documents, as `PreparedCorpus.sequences` has them.
        prefetch: for stores on disk that memory does not hold: ask for all pages of a batch at once.
            Costs some milliseconds a batch where they are in memory already.

    Raises:
        RetroDataError: a setting does not fit the chunk size, the stored neighbors or the corpora.
    """

    def __init__(
        self,
        corpora: Sequence[PreparedCorpus],
        split: str,
        *,
        database: DatabaseStores | None,
        seq_len: int,
        pad_id: int,
        eos_id: int | None = None,
        num_neighbors: int = 2,
        eval_stride: int | None = None,
        mode: str = "document",
        prefetch: bool = False,
    ) -> None:
        self.split = split
        self.chunks = _stacked(corpora)
        self.neighbors = tuple(corpus.neighbors for corpus in corpora)
        self.database = database
        self.chunk_size = self.chunks.stores[0].chunk_size
        self.seq_len = seq_len
        self.pad_id, self.eos_id = pad_id, eos_id
        self.num_neighbors = num_neighbors
        self.prefetch = prefetch
        self.chunks_per_sequence = whole_chunks("seq_len", seq_len, self.chunk_size)
        stride = None
        if eval_stride is not None:
            stride = whole_chunks("eval_stride", eval_stride, self.chunk_size)
            if stride > self.chunks_per_sequence:
                raise RetroDataError(
                    f"eval_stride={eval_stride} is longer than seq_len={seq_len}: labels between "
                    "two sequences would be scored by neither. Make it at most seq_len."
                )
        documents = [_documents_of(corpus, split) for corpus in corpora]
        self._is_read = [len(rows) > 0 for rows in documents]
        self.plan: SequencePlan | PackedPlan
        self.sequences: list[PackedSequences | None] = []
        if mode == "packed":
            self.sequences = [corpus.sequences for corpus in corpora]
            self.plan = self._packed_plan()
        elif mode == "document":
            self.plan = self._plan(documents, stride)
        else:
            raise RetroDataError(f"mode={mode!r}: expected one of {', '.join(MODES)}.")
        self._layouts: dict[int, Any] = {}  # of batches, by their size
        self._check_padding()
        self._check_neighbors()

    def _plan(self, documents: Sequence[Array], stride: int | None) -> SequencePlan:
        first, count = [], []
        for store, row, chosen in zip(
            self.chunks.stores, self.chunks.first_rows[:-1], documents, strict=True
        ):
            starts = store.documents.first_chunk[chosen]
            first.append(row + starts)
            count.append(store.documents.first_chunk[chosen + 1] - starts)
        return plan_documents(
            np.concatenate(first), np.concatenate(count), self.chunks_per_sequence, stride
        )

    def _packed_plan(self) -> PackedPlan:
        tables = []
        width = self.chunks_per_sequence
        for store, packed, is_read in zip(
            self.chunks.stores, self.sequences, self._is_read, strict=True
        ):
            rows = np.empty((0, width), np.int32) if packed is None else packed.rows
            if is_read and (packed is None or rows.shape[1] != width or self.split != "train"):
                found = "none" if packed is None else f"sequences of {rows.shape[1]} chunks"
                raise RetroDataError(
                    f"mode=packed reads packed sequences of {width} chunks of the split train; found "
                    f"{found} for {store.name}, split {self.split}. Run `retro-data prepare` with "
                    "mode=packed and this seq_len."
                )
            tables.append(rows)
        return PackedPlan(tables, self.chunks.first_rows[:-1])

    @property
    def sequences_of_corpora(self) -> dict[str, int]:
        """Sequences of each corpus; those of the first one come first."""
        counts = self.plan.counts(self.chunks.first_rows).tolist()
        return {s.name: n for s, n in zip(self.chunks.stores, counts, strict=True)}

    def _check_padding(self) -> None:
        """Chunks are handed on with the padding they are stored with."""
        stores = [*self.chunks.stores, *(self.database.stores if self.database else ())]
        for store in stores:
            if store.pad_id not in (self.pad_id, None):
                raise RetroDataError(
                    f"pad_id={self.pad_id}, but the chunks of {store.name} are padded by "
                    f"{store.pad_id}: another tokenizer made them. Run `retro-data prepare`, so that "
                    "all corpora are tokenized by one."
                )

    def _check_neighbors(self) -> None:
        if self.num_neighbors == 0:
            return
        if self.database is None:
            raise RetroDataError(
                f"num_neighbors={self.num_neighbors}, but there is no retrieval database. Set "
                "num_neighbors=0 to read none."
            )
        for store, ids in zip(self.chunks.stores, self.neighbor_ids(), strict=True):
            if ids is not None and not 0 < self.num_neighbors <= ids.shape[1]:
                raise RetroDataError(
                    f"num_neighbors={self.num_neighbors}, but {ids.shape[1]} are stored for each "
                    f"chunk of {store.name}. Ask for fewer, or raise neighbors.num_stored and run "
                    "`retro-data prepare`."
                )

    def neighbor_ids(self) -> list[Array | None]:
        """Stored candidates (N, K) of each corpus, None for one without documents in this split."""
        found: list[Array | None] = []
        for store, lists, is_read in zip(
            self.chunks.stores, self.neighbors, self._is_read, strict=True
        ):
            if not is_read:
                found.append(None)
            elif lists is None:
                raise RetroDataError(
                    f"num_neighbors={self.num_neighbors}, but {store.name} has no stored "
                    "neighbors. Turn retrieval on and run `retro-data prepare`, or set "
                    "num_neighbors=0."
                )
            else:
                found.append(lists.ids)
        return found

    @cached_property
    def _readers(self) -> _Readers:
        return _Readers(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made of memory maps: it would travel as whole copies."""
        made = ("_readers", "plan") if self.sequences else ("_readers",)
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.sequences:
            self.plan = self._packed_plan()

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        """One sequence: the entries of a batch without their first axis."""
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The finished batch of these sequences, in order; see the module's table."""
        numbers = np.asarray(indices, np.int64)
        if numbers.min(initial=0) < -1:
            raise IndexError(f"sequence {numbers.min()}: indices are -1 (padding) or from 0 on")
        rows = self.plan.rows(numbers, self.chunks_per_sequence)
        batch = self._empty_batch(len(rows))
        self._fill_text(rows, batch)
        if self.plan.unscored is not None:
            context = np.arange(rows.shape[1]) < self.plan.unscored[numbers][:, None]
            batch["labels"].reshape(*rows.shape, -1)[context] = NO_LABEL
        if self.num_neighbors:
            self._fill_neighbors(rows, batch)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _empty_batch(self, size: int) -> dict[str, Array]:
        """The arrays of a batch, all in one block of memory."""
        if size not in self._layouts:
            self._layouts[size] = self._layout(size)
        layout, total = self._layouts[size]
        block = np.empty(total, np.uint8)
        return {name: np.ndarray(shape, dtype, block, at) for name, shape, dtype, at in layout}

    def _layout(self, size: int) -> tuple[list[tuple[str, tuple[int, ...], type, int]], int]:
        """Name, shape, dtype and place in bytes of each array of a batch; bytes of all."""
        chunks, tokens = (size, self.chunks_per_sequence), (size, self.seq_len)
        retrieved = (*chunks, self.num_neighbors, 2 * self.chunk_size)
        arrays: tuple[tuple[str, tuple[int, ...], type], ...] = (
            ("input_ids", tokens, np.int64),
            ("labels", tokens, np.int64),
            ("chunk_lengths", chunks, np.int64),
            ("neighbor_tokens", retrieved, np.int64),
            ("chunk_ids", chunks, np.int64),
            ("document_ids", chunks, np.int64),
            ("neighbor_mask", retrieved, np.bool_),  # last: all others are aligned to 8 bytes
        )
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in arrays]
        starts = itertools.accumulate(sizes, initial=0)
        return [(*array, at) for array, at in zip(arrays, starts, strict=False)], sum(sizes)

    def _fill_text(self, rows: Array, batch: dict[str, Array]) -> None:
        size, read = self.chunk_size, self._readers
        flat = rows.ravel()
        tokens, lengths, documents = read.chunks(flat)
        inputs = batch["input_ids"].reshape(-1, size)
        labels = batch["labels"].reshape(-1, size)
        inputs[...] = tokens[:, :size]
        labels[...] = tokens[:, 1:]
        absent = flat < 0
        inputs.view(read.wide).ravel()[absent] = read.no_tokens
        labels.view(read.wide).ravel()[absent] = read.no_labels
        ends = np.flatnonzero((lengths[:, 1] == 0) & ~absent)
        self._end_documents(labels, ends, lengths[ends, 0])
        batch["chunk_lengths"][...] = lengths[:, 0].reshape(rows.shape)
        batch["chunk_ids"][...] = rows
        batch["document_ids"][...] = documents.reshape(rows.shape)
        batch["document_ids"][rows < 0] = -1

    def _end_documents(self, labels: Array, ends: Array, lengths: Array) -> None:
        """Put the label that ends a document, and none beyond, into its last chunk: rows `ends`."""
        real = self._readers.masks.take(lengths).view(bool).reshape(-1, self.chunk_size)
        labels[ends] = np.where(real, labels[ends], NO_LABEL)
        labels[ends, lengths - 1] = NO_LABEL if self.eos_id is None else self.eos_id

    def _fill_neighbors(self, rows: Array, batch: dict[str, Array]) -> None:
        size, read = self.chunk_size, self._readers
        ids = read.neighbors(rows.ravel()).ravel()
        tokens, lengths, _ = read.database(ids)
        tokens = tokens.reshape(-1, size)  # neighbor and continuation by turns
        lengths = lengths.ravel()
        tokens.view(read.narrow).ravel()[lengths == 0] = read.no_chunk
        batch["neighbor_tokens"].reshape(-1, size)[...] = tokens
        mask = batch["neighbor_mask"].reshape(-1, size).view(read.masks.dtype).ravel()
        read.masks.take(lengths, out=mask, mode="clip")


def _stacked(corpora: Sequence[PreparedCorpus]) -> DatabaseStores:
    stores = tuple(corpus.chunks for corpus in corpora)
    if not stores or len({store.chunk_size for store in stores}) > 1:
        raise RetroDataError(
            f"found corpora {[(s.name, s.chunk_size) for s in stores]}; expected at least one, all "
            "of one chunk_size. Run `retro-data prepare`."
        )
    return DatabaseStores(stores, tuple(np.cumsum([0] + [len(s) for s in stores]).tolist()))


def _documents_of(corpus: PreparedCorpus, split: str) -> Array:
    if split not in SPLITS:
        raise RetroDataError(f"split={split!r}; expected one of {', '.join(SPLITS)}.")
    return np.flatnonzero(corpus.split_of_document == SPLITS.index(split))


# ---- between processes and to other models -------------------------------------------------------


def collate(batch: Any) -> Any:
    """A DataLoader's `collate_fn` for batches that are finished: hands them on.

    Out of a worker process a batch travels as one message of narrow integers, since handing over
    its tensors costs more than making them; what arrives is the same batch as without workers.
    """
    return batch if get_worker_info() is None else _Parcel(batch)


class _Parcel:
    """A batch that is pickled small and unpickled as the batch."""

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        arrays = {name: value.numpy() for name, value in self.batch.items()}
        dtypes = {name: array.dtype for name, array in arrays.items()}
        return _unpack, ({name: _narrow(array) for name, array in arrays.items()}, dtypes)


def _narrow(array: Array) -> Array:
    """The same numbers in fewer bytes, where they are integers that fit."""
    if array.dtype == np.int64 and array.size:
        low, high = array.min(), array.max()
        for dtype in (np.uint16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return array.astype(dtype)
    return array


def _unpack(arrays: dict[str, Array], dtypes: dict[str, np.dtype[Any]]) -> Batch:
    return {
        name: torch.from_numpy(array.astype(dtypes[name], copy=False))
        for name, array in arrays.items()
    }


def to_retro_pytorch(batch: Mapping[str, Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """A training batch as `RETRO` of the package retro-pytorch takes it, with `return_loss=True`.

    That model shifts the labels itself, and takes one id for everything it masks: labels in the
    loss, tokens of neighbors in attention. Give it `pad_id=pad_id` and `num_tokens=pad_id + 1`.
    Batches for evaluation lose their context this way: labels to be left out cannot be said.

    Returns:
        sequence (B, n + 1) int64: inputs, each row ended by its last label, padded by pad_id; and
        retrieved (B, n/m, k, r) int64.
    """
    inputs, labels = batch["input_ids"], batch["labels"]
    following = torch.where(labels == NO_LABEL, pad_id, labels)
    return torch.cat([inputs[:, :1], following], 1), batch["neighbor_tokens"]
