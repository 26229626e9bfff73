"""Rates of the loader: ours, the classic dataset, and what the machine allows, in one run.

    python benchmarks/loader.py                     # a synthetic store of 300,000 chunks
    python benchmarks/loader.py --root data --corpus wiki   # one that was prepared, by folder names
    python benchmarks/loader.py --mode packed       # several documents a sequence
    python benchmarks/loader.py --cold --rows 16000000 --stored 2   # nothing of it in memory

Rates are main tokens a second: positions of `input_ids`, with padding; the share of them that is
real is printed. Each is the best of some rounds through an epoch, rounds of all candidates
interleaved. Cold, each candidate begins with the files out of the page cache (Linux only) and reads a
few batches; what it reads from the disk for each is printed too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader

from retro_data import artifact, store
from retro_data.dataset import RetroDataset, collate
from retro_data.pipeline import PreparedCorpus
from retro_data.sampler import GlobalOrderSampler
from retro_data.sequences import SequencePlan, pack
from retro_data.splits import SPLITS
from retro_data.store import ChunkStore, DatabaseStores, NeighborLists, PackedSequences

Array = np.ndarray[Any, Any]

VOCAB = 16_384
CHUNK = 64
CLASSIC_EOS = 102  # by which the classic dataset knows the end of a document
CLASSIC_BATCH = 8  # its best


# ---- data ----------------------------------------------------------------------------------------


def write_artifact(folder: Path, arrays: dict[str, Array]) -> None:
    folder.mkdir(parents=True)
    entries = {}
    for name, array in arrays.items():
        artifact.save_array(folder / name, array)
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    manifest = {"arrays": entries, "fields": {"name": "synthetic"}, "key": "synthetic"}
    artifact.write_record(folder / artifact.MANIFEST, manifest)


def write_synthetic(root: Path, rows: int, stored: int) -> None:
    """Documents of 1 to 128 chunks of random tokens, with random neighbors."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 129, rows)
    counts = counts[np.cumsum(counts) <= rows]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rows, documents = int(first[-1]), len(counts)
    lengths = np.full(rows, CHUNK, np.uint8)
    lengths[first[1:] - 1] = rng.integers(1, CHUNK + 1, documents)
    tokens = rng.integers(CLASSIC_EOS + 1, VOCAB, (rows, CHUNK), dtype=np.uint16)
    tokens[np.arange(CHUNK) >= lengths[:, None]] = VOCAB
    sizes = np.add.reduceat(lengths.astype(np.int64), first[:-1])
    chunks = {
        store.TOKENS: tokens,
        store.LENGTHS: lengths,
        store.DOCUMENT_OF_CHUNK: np.repeat(np.arange(documents, dtype=np.int32), counts),
        store.DOCUMENT_KEYS: np.arange(2 * documents, dtype=np.uint64).reshape(-1, 2),
        store.DOCUMENT_FIRST_CHUNK: first,
        store.DOCUMENT_TOKENS: sizes,
        store.DOCUMENT_BYTES: sizes,
        store.DOCUMENT_ID_BYTES: np.zeros(0, np.uint8),
        store.DOCUMENT_ID_OFFSETS: np.zeros(documents + 1, np.int64),
    }
    ids = rng.integers(0, rows, (rows, stored)).astype(np.int32)
    distances = np.zeros(ids.shape, np.float32)
    write_artifact(root / "chunks", chunks)
    neighbors = {store.NEIGHBOR_IDS: ids, store.NEIGHBOR_DISTANCES: distances}
    write_artifact(root / "neighbors", neighbors)


def corpus_at(chunks: Path, neighbors: Path) -> PreparedCorpus:
    opened = ChunkStore(chunks)
    split = np.full(len(opened.documents), SPLITS.index("train"), np.uint8)
    return PreparedCorpus(opened, split, NeighborLists(neighbors), opened.key)


def dataset_of(
    corpus: PreparedCorpus, args: argparse.Namespace, scratch: Path, **options: Any
) -> RetroDataset:
    if args.mode == "packed":
        first = corpus.chunks.documents.first_chunk
        sequences = pack(first[:-1], np.diff(first), args.seq_len // CHUNK).astype(np.int32)
        if not (scratch / "packing").exists():
            write_artifact(scratch / "packing", {store.SEQUENCES: sequences})
        corpus = replace(corpus, sequences=PackedSequences(scratch / "packing"))
    return RetroDataset(
        [corpus],
        "train",
        database=DatabaseStores((corpus.chunks,), (0, len(corpus.chunks))),
        seq_len=args.seq_len,
        pad_id=VOCAB if corpus.chunks.pad_id is None else corpus.chunks.pad_id,
        eos_id=0,
        num_neighbors=args.num_neighbors,
        mode=args.mode,
        **options,
    )


def classic_dataset(root: Path, dataset: RetroDataset) -> Any:
    """The same sequences and neighbors as `RETRODataset` of retro-pytorch reads them."""
    from retro_pytorch.data import RETRODataset

    chunks = dataset.chunks.stores[0]
    rows, padding = len(chunks), dataset.chunks_per_sequence
    tokens = np.zeros((rows + padding, CHUNK + 1), np.int32)
    tokens[:rows, :CHUNK] = np.where(chunks.tokens == dataset.pad_id, 0, chunks.tokens)
    tokens[: rows - 1, CHUNK] = tokens[1:rows, 0]
    tokens[chunks.documents.first_chunk[1:] - 1, CHUNK] = CLASSIC_EOS
    ids = dataset.neighbor_ids()[0]
    assert ids is not None
    assert isinstance(dataset.plan, SequencePlan)
    knn = np.full((rows + padding, dataset.num_neighbors), -1, np.int32)
    knn[:rows] = ids[:, : dataset.num_neighbors]
    arrays = {"chunks": tokens, "knn": knn, "sequences": dataset.plan.first.astype(np.int32)}
    for name, array in arrays.items():
        array.tofile(root / f"classic_{name}.dat")
    return RETRODataset(
        num_chunks=rows,
        chunk_size=CHUNK,
        seq_len=dataset.seq_len,
        num_sequences=len(dataset),
        num_neighbors=dataset.num_neighbors,
        chunk_memmap_path=str(root / "classic_chunks.dat"),
        chunk_nn_memmap_path=str(root / "classic_knn.dat"),
        seq_memmap_path=str(root / "classic_sequences.dat"),
        eos_id=CLASSIC_EOS,
        pad_id=0,
    )


# ---- candidates: each yields the main tokens of one batch after the other ------------------------


def bare(dataset: RetroDataset, size: int) -> Iterator[int]:
    order = BatchSampler(GlobalOrderSampler(dataset, size), size, drop_last=True)
    for indices in order:
        yield dataset.__getitems__(indices)["input_ids"].numel()


def loader(dataset: RetroDataset, size: int, workers: int = 0) -> DataLoader[Any]:
    sampler = GlobalOrderSampler(dataset, size)
    return DataLoader(dataset, size, sampler=sampler, num_workers=workers, collate_fn=collate)


def through_loader(dataset: RetroDataset, size: int, workers: int = 0) -> Iterator[int]:
    for batch in loader(dataset, size, workers):
        yield batch["input_ids"].numel()


def classic(dataset: Any, workers: int = 0) -> Iterator[int]:
    for sequence, _ in DataLoader(dataset, CLASSIC_BATCH, shuffle=True, num_workers=workers):
        yield sequence[:, :-1].numel()


def fancy_indexing(dataset: RetroDataset, size: int) -> Iterator[int]:
    """Plain numpy: the chunks, their neighbors and what follows those, widened; nothing else."""
    tokens, ids = np.asarray(dataset.chunks.stores[0].tokens), dataset.neighbor_ids()[0]
    assert ids is not None
    k, last = dataset.num_neighbors, len(tokens) - 1
    for rows in _row_batches(dataset, size):
        inputs = tokens[rows].astype(np.int64)
        found = ids[rows, :k]
        pair = [tokens[found], tokens[np.minimum(found + 1, last)]]
        np.concatenate(pair, -1).astype(np.int64)
        yield inputs.size


def gather_limit(dataset: RetroDataset, size: int) -> Iterator[int]:
    """The fewest memory operations: one overlapping gather for each token array, widened."""
    tokens, ids = np.asarray(dataset.chunks.stores[0].tokens), dataset.neighbor_ids()[0]
    assert ids is not None
    k, last = dataset.num_neighbors, len(tokens) - 2
    row_bytes = tokens.strides[0]
    pairs: Array = np.ndarray((last + 1,), f"V{2 * row_bytes}", tokens, strides=(row_bytes,))
    for rows in _row_batches(dataset, size):
        inputs = tokens[rows].astype(np.int64)
        found = np.minimum(ids[rows, :k], last)
        pairs[found.ravel()].view(tokens.dtype).astype(np.int64)
        yield inputs.size


def _row_batches(dataset: RetroDataset, size: int) -> Iterator[Array]:
    for indices in BatchSampler(GlobalOrderSampler(dataset, size), size, drop_last=True):
        rows = dataset.plan.rows(np.asarray(indices), dataset.chunks_per_sequence)
        yield np.maximum(rows, 0)


# ---- from a disk ---------------------------------------------------------------------------------


def evict(folder: Path) -> None:
    """Drop the files of a store from the page cache; nothing may have them mapped."""
    for path in folder.rglob("*.npy"):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    """Bytes that disks have read since the machine started, whoever asked."""
    fields = (line.split() for line in Path("/proc/diskstats").read_text("ascii").splitlines())
    disks = {path.name for path in Path("/sys/block").iterdir()}
    return sum(512 * int(f[5]) for f in fields if f[2] in disks and not f[2].startswith("loop"))


def run_cold(args: argparse.Namespace, folders: tuple[Path, Path], scratch: Path) -> None:
    print(f"{'from the disk':38}{'M tokens/s':>12}{'MB a batch':>12}")
    for workers, prefetch in itertools.product((0, 2, 8), (False, True)):
        for folder in folders:
            evict(folder)
        dataset = dataset_of(corpus_at(*folders), args, scratch, prefetch=prefetch)
        batches = iter(through_loader(dataset, args.batch_size, workers))
        before, began = disk_bytes(), time.perf_counter()
        tokens = sum(itertools.islice(batches, args.cold_batches))
        seconds = time.perf_counter() - began
        read = (disk_bytes() - before) / args.cold_batches
        name = f"{workers} workers{', prefetch' if prefetch else ''}"
        print(f"{name:38}{tokens / seconds / 1e6:12.2f}{read / 1e6:12.1f}", flush=True)
        del dataset, batches


# ---- Lightning -----------------------------------------------------------------------------------


class Idle(pl.LightningModule):
    """A model that does nothing, as little as its kind of optimization allows."""

    def __init__(self, automatic: bool) -> None:
        super().__init__()
        self.automatic_optimization = automatic
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        self.seen.append(batch["input_ids"].numel())
        return self.weight * 1 if self.automatic_optimization else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Constant:
    """The same batch again and again: what Lightning's loop costs by itself."""

    def __init__(self, batch: dict[str, torch.Tensor], batches: int) -> None:
        self.batch, self.batches = batch, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.batch for _ in range(self.batches))


def lightning_rate(batches: Any, automatic: bool) -> float:
    model = Idle(automatic)
    trainer = pl.Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    clock: list[float] = []
    model.on_train_start = lambda: clock.append(time.perf_counter())  # type: ignore[method-assign]
    model.on_train_end = lambda: clock.append(time.perf_counter())  # type: ignore[method-assign]
    trainer.fit(model, batches)
    return sum(model.seen) / (clock[1] - clock[0])


# ---- measuring -----------------------------------------------------------------------------------


def rate(batches: Iterable[int]) -> float:
    start = time.perf_counter()
    return sum(batches) / (time.perf_counter() - start)


def best(candidates: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, measure in candidates.items():
            rates[name].append(measure())
    return {name: max(found) for name, found in rates.items()}


def run(args: argparse.Namespace, scratch: Path) -> None:
    chunks, neighbors = scratch / "chunks", scratch / "neighbors"
    if args.root:
        chunks, neighbors = (
            next((args.root / kind).glob(f"{args.corpus}-*")) for kind in ("chunks", "neighbors")
        )
    else:
        write_synthetic(scratch, args.rows, args.stored)
    if args.cold:
        run_cold(args, (chunks, neighbors), scratch)
        return
    corpus = corpus_at(chunks, neighbors)
    dataset = dataset_of(corpus, args, scratch)
    batch = dataset.__getitems__(range(args.batch_size))
    constant = Constant(batch, 2000)
    ours = partial(loader, dataset, args.batch_size)
    candidates: dict[str, Callable[[], float]] = {
        "gather and widen alone (limit)": lambda: rate(gather_limit(dataset, args.batch_size)),
        "numpy fancy indexing alone": lambda: rate(fancy_indexing(dataset, args.batch_size)),
        "bare __getitems__": lambda: rate(bare(dataset, args.batch_size)),
        "DataLoader, no workers": lambda: rate(through_loader(dataset, args.batch_size)),
        "DataLoader, 2 workers": lambda: rate(through_loader(dataset, args.batch_size, 2)),
        "Lightning, manual": lambda: lightning_rate(ours(), False),
        "Lightning, manual, constant batch": lambda: lightning_rate(constant, False),
        "Lightning, automatic": lambda: lightning_rate(ours(), True),
        "Lightning, automatic, constant batch": lambda: lightning_rate(constant, True),
    }
    if args.mode == "document":  # the classic dataset knows no other
        old = classic_dataset(scratch, dataset)
        candidates["classic, no workers"] = lambda: rate(classic(old))
        candidates["classic, 2 workers"] = lambda: rate(classic(old, 2))
    rates = best(candidates, args.rounds)
    real = int(corpus.chunks.documents.tokens.sum()) / (len(dataset) * args.seq_len)
    shape = (len(corpus.chunks), len(dataset), args.seq_len, args.batch_size, args.num_neighbors)
    print(
        "{:,} chunks, {:,} sequences of {}, batch {}, {} neighbors, ".format(*shape)
        + f"{real:.0%} of positions real, {torch.get_num_threads()} threads"
    )
    base = rates.get("classic, no workers", math.nan)
    print(f"{'':38}{'M tokens/s':>12}{'of classic':>12}")
    for name, value in rates.items():
        print(f"{name:38}{value / 1e6:12.1f}{value / base:11.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=300_000, help="chunks of the synthetic store")
    parser.add_argument("--stored", type=int, default=32, help="neighbors stored of each chunk")
    parser.add_argument("--mode", default="document", choices=("document", "packed"))
    parser.add_argument("--cold", action="store_true", help="measure from the disk alone")
    parser.add_argument("--cold-batches", type=int, default=32)
    parser.add_argument("--root", type=Path, help="of prepared data, instead of a synthetic store")
    parser.add_argument("--corpus", default="*", help="its name, with --root")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-neighbors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(KeyboardInterrupt):
        run(args, Path(scratch))


if __name__ == "__main__":
    main()
