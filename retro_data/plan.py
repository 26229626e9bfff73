"""What a configuration will cost, before anything is computed: chunks, bytes, memory, time.

    a few MB of documents ─► corpus, tokenizer, chunks (the stages themselves, in a folder aside)
                          ─► a few blocks of embeddings, a small exact search: rates of this machine
    × the size of the corpus ─► rows, bytes, memory and time of every stage

Sizes follow from the sample; where a stage's time cannot be measured on a sample (the index), it is
computed from the rate of products measured here, and marked so. Nothing is written below the root.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from retro_data import tokenizer as lm
from retro_data.codebook import TRAINING_BYTES, has_gpu_wheel, rows_to_train_on
from retro_data.corpus import CorpusSettings, Document, Reader, SourceFile, open_reader
from retro_data.embedder_settings import embedder_dim, embedder_folder
from retro_data.embeddings import EmbeddingStage
from retro_data.engines import LocalEngine
from retro_data.errors import RetroDataError
from retro_data.exact import Search
from retro_data.index import SHARD_THREADS, shards_of, worker_bytes
from retro_data.index_factory import choose_factory, estimated_bytes, format_memory
from retro_data.leakage import BATCH_CHUNKS, NEAREST, longest_common_substrings
from retro_data.lexical import overlap_scores
from retro_data.packing import BLOCK_CHUNKS
from retro_data.pipeline import Settings, Step, steps
from retro_data.scan import SCAN_BYTES
from retro_data.selection import BATCH_CANDIDATES, SelectionSettings
from retro_data.shingles import NearDuplicateSettings, Shingler, signatures
from retro_data.splits import TRAINING, SplitOfCorpus
from retro_data.stage import Engine, Resources, complete
from retro_data.store import ChunkStore
from retro_data.vectors import Vectors

SAMPLE_BYTES = 8 * 2**20  # of text, spread over the corpora
READ_SECONDS = 5.0  # of reading a corpus to take it from
SAMPLE_FILES = 64  # most files of a corpus that it is taken from
MEASURE_SECONDS = 6.0  # of embedding, after what it takes to start
MEASURE_CHUNKS = 256  # of one block of embeddings while measuring
DUPLICATE_BYTES_A_DOCUMENT = 200  # beside its signature, that telling near-duplicates apart takes
SEARCH_ROWS = {"cpu": (1024, 16_384), "cuda": (16_384, 262_144)}  # queries and rows
KMEANS_ROUNDS = 10  # of faiss
LEAKAGE_BYTES_A_TOKEN = 40  # of a chunk, for each of its neighbors in one batch
SELECTION_BYTES_A_TOKEN = 60  # the same
PROBED_LISTS = 32  # of an inverted file, a guess: nprobe is found when the index is built
SCAN_BYTES_A_DOCUMENT = 57  # that a scan keeps of each document of one block
PRODUCTS = "from the rate of products"
CONTROL_GROUP = Path("/sys/fs/cgroup")
TABLE_BYTES_A_DOCUMENT = 64  # that opening a chunk store or a database takes


@dataclass(frozen=True)
class StagePlan:
    """One line of `retro-data plan`. `how` says where its time comes from."""

    title: str
    rows: int
    bytes: int
    peak_bytes: int  # while it is made: parts lie beside the array that they are laid into
    memory: int  # of all its workers
    seconds: float
    how: str


@dataclass(frozen=True)
class Plan:
    """What a configuration will cost.

    Attributes:
        sampled_bytes: text that the figures are drawn from.
        search: "exact" or "index"; factory: of the index, if one is built.
        disk_peak: most bytes below the root at any time.
        disk_free, memory_free: what this machine has.
    """

    documents: int
    text_bytes: int
    tokens: int
    chunks: int
    dim: int
    sampled_bytes: int
    search: str
    factory: str | None
    stages: tuple[StagePlan, ...]
    disk_peak: int
    disk_free: int
    memory_free: int

    def refusals(self) -> list[str]:
        """Why this will not do on this machine, with the numbers; empty if it will."""
        found = []
        if self.disk_peak > self.disk_free:
            found.append(
                f"disk: {format_memory(self.disk_peak)} are needed at the peak, "
                f"{format_memory(self.disk_free)} are free. Set root to a larger file system"
                f", or lower neighbors.num_stored."
            )
        for stage in self.stages:
            if stage.memory > self.memory_free:
                found.append(
                    f"memory: {stage.title} needs {format_memory(stage.memory)}, "
                    f"{format_memory(self.memory_free)} are free. Lower engine.workers"
                    f"{', index.sample_size' if stage.title == 'codebook' else ''}"
                    f"{', index.shard_rows, index.max_index_memory' if stage.title == 'index' else ''}"
                    f"{', neighbors.memory' if stage.title.startswith('neighbors') else ''}."
                )
        return found


def plan(settings: Settings, engine: LocalEngine | None = None) -> Plan:
    """Measure a sample on this machine and reckon with the whole corpora.

    Args:
        engine: where the sample's blocks are made, not one whose children outlive a stage: memory is
            read off those that ended; child processes of this machine where None.

    Raises:
        RetroDataError: the corpora or models cannot be read, or no index fits its budget.
    """
    engine = engine or LocalEngine(settings.engine.on_this_machine())
    readers = {c.name: open_reader(c) for c in settings.corpora}
    with tempfile.TemporaryDirectory(prefix="retro-data-plan-") as aside:
        shares = {
            name: _sample(reader, SAMPLE_BYTES // len(readers), Path(aside) / f"sample-{name}")
            for name, reader in readers.items()
        }
        measured = _Measured(_of_sample(settings, shares, Path(aside)), engine)
        return _Reckoning(settings, engine, shares, measured).plan()


# ---- sampling ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """A sample of a corpus, and what it stands for."""

    text_bytes: int  # of the sample
    documents: int  # of the corpus
    scale: float  # the text of the corpus, in samples
    largest_block: float  # share of the corpus that one block of a scan reads
    path: Path


class _Meter:
    """Counts the stored bytes that are read from a reader's files."""

    def __init__(self, reader: Any) -> None:
        self.bytes = 0
        self._open = reader._tree.open
        reader._tree.open = self._metered

    def _metered(self, name: str) -> BinaryIO:
        meter, file = self, self._open(name)

        class Metered:
            def read(self, size: int = -1) -> bytes:
                data: bytes = file.read(size)
                meter.bytes += len(data)
                return data

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        return cast(BinaryIO, Metered())


class _Spread:
    """Documents taken evenly from all that pass by, about `text_bytes` of them."""

    def __init__(self, text_bytes: int) -> None:
        self.most = text_bytes
        self.kept: list[tuple[Document, int]] = []
        self.kept_bytes = self.seen = self.seen_bytes = 0
        self.stride = 1

    def add(self, document: Document) -> None:
        size = len(document.text.encode())
        if self.seen % self.stride == 0:
            self.kept.append((document, size))
            self.kept_bytes += size
        self.seen += 1
        self.seen_bytes += size
        if self.kept_bytes > 2 * self.most and len(self.kept) > 1:
            self.kept, self.stride = self.kept[::2], 2 * self.stride
            self.kept_bytes = sum(size for _, size in self.kept)


def _sample(reader: Reader, text_bytes: int, path: Path) -> _Share:
    """Write a sample as JSON lines: of files spread over the corpus, as far as they are soon read."""
    files = reader.files()
    chosen = [files[int(i)] for i in np.linspace(0, len(files) - 1, min(SAMPLE_FILES, len(files)))]
    meter = _Meter(reader) if hasattr(reader, "_tree") else None
    spread, stored = _Spread(text_bytes), 0
    for file in chosen:
        seen, until = spread.seen_bytes, time.monotonic() + READ_SECONDS / len(chosen)
        if meter:
            meter.bytes = 0
        is_whole = True
        for document in _documents(reader, file):
            spread.add(document)
            if time.monotonic() > until:
                is_whole = False
                break
        read = meter.bytes if meter and meter.bytes else spread.seen_bytes - seen
        stored += file.bytes if is_whole else min(file.bytes, read)
    if not spread.kept:
        raise RetroDataError(
            f"corpus {reader.settings.name!r}: no document in a sample of {len(chosen)} files. Check "
            "corpus.path, corpus.format and corpus.text_field; `retro-data prepare` lists what is "
            "skipped and why."
        )
    with path.open("w", encoding="utf-8") as lines:
        for document, _ in spread.kept:
            lines.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
    total = sum(file.bytes for file in files)
    read_share = min(1.0, stored / max(1, total))
    return _Share(
        text_bytes=spread.kept_bytes,
        documents=round(spread.seen / read_share),
        scale=spread.seen_bytes / max(1, spread.kept_bytes) / read_share,
        largest_block=min(1.0, max(SCAN_BYTES, *(file.bytes for file in files)) / max(1, total)),
        path=path,
    )


def _documents(reader: Reader, file: SourceFile) -> Iterator[Document]:
    return (record for record in reader.records(file.name) if isinstance(record, Document))


def _of_sample(settings: Settings, shares: dict[str, _Share], aside: Path) -> Settings:
    """The same configuration, of the sample."""
    corpora = [
        CorpusSettings(name=c.name, path=str(shares[c.name].path), format="jsonl", split=c.split)
        for c in settings.corpora
    ]
    text_bytes = sum(share.text_bytes * share.scale for share in shares.values())
    small = text_bytes < lm.SMALL_CORPUS_BYTES
    size = settings.tokenizer.vocab_size or (lm.SMALL_VOCABULARY if small else lm.LARGE_VOCABULARY)
    return replace(
        settings,
        root=aside / "root",
        corpora=tuple(corpora),
        tokenizer=replace(settings.tokenizer, vocab_size=size),
    )


# ---- measuring -----------------------------------------------------------------------------------


class _Measured:
    """What the sample's own stages took.

    Attributes:
        steps: title -> its step of the sample.
        seconds: title -> worker seconds of its blocks.
        sizes: title -> bytes of its artifact.
        memory: stage -> most bytes that one worker, or this process, has held.
        chunk_seconds: title -> worker seconds of embedding one chunk.
        words, shingle_seconds: corpus -> shingles of the sample, and worker seconds to make them.
        rows, tokens: corpus -> chunks and tokens of the sample.
        admitted: share of the chunks that may be neighbors.
        dim: of a vector.
    """

    def __init__(self, sample: Settings, engine: Engine) -> None:
        self.steps: dict[str, Step] = {}
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.chunk_seconds: dict[str, float] = {}
        self.rows: dict[str, int] = {}
        self.tokens: dict[str, int] = {}
        self.words: dict[str, int] = {}
        self.shingle_seconds: dict[str, float] = {}
        for corpus in sample.corpora if sample.near_duplicates is not None else ():
            self._shingle(corpus, sample.near_duplicates)
        admitted = 0
        for step in steps(sample):
            if step.stage.name not in ("corpus", "tokenizer", "chunks", "embeddings"):
                break
            self.steps[step.title] = step
            if isinstance(step.stage, EmbeddingStage):
                self.chunk_seconds[step.title] = _embedding_seconds(step.stage, step.folder, engine)
            else:
                self.seconds[step.title] = complete(step.stage, step.folder, engine)["seconds"]
            self.memory[step.stage.name] = _peak_memory()
            if step.stage.name == "chunks":
                chunks, name = ChunkStore(step.folder), str(step.corpus)
                self.rows[name] = len(chunks)
                self.tokens[name] = int(chunks.documents.tokens.sum())
                admitted += _admitted(sample, name, chunks)
        self.admitted = admitted / max(1, sum(self.rows.values()))
        self.sizes = {title: _size(step.folder) for title, step in self.steps.items()}
        self.dim = embedder_dim(embedder_folder(sample.embedder))

    def _shingle(self, corpus: CorpusSettings, settings: NearDuplicateSettings | None) -> None:
        assert settings is not None
        reader, shingler = open_reader(corpus), Shingler(settings.ngram)
        texts = [d.text for file in reader.files() for d in _documents(reader, file)]
        began = time.monotonic()
        hashes, sizes = shingler(texts)
        signatures(hashes, sizes, settings.num_perm)
        self.words[corpus.name] = len(hashes)
        self.shingle_seconds[corpus.name] = time.monotonic() - began


def _admitted(settings: Settings, corpus: str, chunks: ChunkStore) -> int:
    """Chunks of documents that the database admits."""
    split = next(c.split for c in settings.corpora if c.name == corpus)
    told = SplitOfCorpus(corpus, split, settings.splits)
    admitted = settings.database.admits(chunks.documents.keys, told.of(chunks.documents))
    return int(admitted[chunks.document_of_chunk].sum())


def _embedding_seconds(stage: EmbeddingStage, folder: Path, engine: Engine) -> float:
    """Worker seconds a chunk: of as many blocks as fit the time, the first left out if it can be."""
    small = replace(stage.settings, block_rows=MEASURE_CHUNKS)
    stage = EmbeddingStage(small, stage.corpus, stage.chunks, stage.tokenizer)
    folder.mkdir(parents=True)
    measured: list[tuple[int, float]] = []
    began: float | None = None
    with contextlib.closing(engine.run(stage, folder, stage.blocks())) as receipts:
        for receipt in receipts:
            measured.append((receipt.rows, receipt.seconds))
            began = began or time.monotonic()
            if time.monotonic() - began > MEASURE_SECONDS:
                break
    warm = measured[1:] or measured
    return sum(s for _, s in warm) / max(1, sum(r for r, _ in warm))


def _peak_memory() -> int:
    """Most bytes that any ended child has held, or this process where there was none."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
    return 1024 * (usage[0].ru_maxrss or usage[1].ru_maxrss)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _product_rate(dim: int, k: int, device: str) -> float:
    """FLOP/s of exact search on this machine."""
    queries, rows = SEARCH_ROWS[device.split(":")[0]]
    vectors = np.random.default_rng(0).standard_normal((rows, dim), np.float32).astype(np.float16)
    search = Search(Vectors([vectors]), metric="l2", device=device)
    search(vectors[:queries], k, None)
    began = time.monotonic()
    search(vectors[:queries], k, None)
    return 2.0 * queries * rows * dim / (time.monotonic() - began)


def _pair_seconds(chunk_size: int) -> float:
    """Seconds to find the longest common substring of a chunk and a neighbor on this machine."""
    rows = np.random.default_rng(0).integers(0, 1000, (4096, 3 * chunk_size)).astype(np.uint16)
    query, retrieved = rows[:, :chunk_size], rows[:, chunk_size:]
    began = time.monotonic()
    longest_common_substrings(query, retrieved, query >= 0, retrieved >= 0)
    return (time.monotonic() - began) / len(rows)


def _score_seconds(chunk_size: int) -> float:
    """Seconds to count what a chunk and a candidate share on this machine."""
    rows = np.random.default_rng(0).integers(0, 1000, (128, 33, chunk_size)).astype(np.uint16)
    mask = np.ones(rows.shape, bool)
    began = time.monotonic()
    overlap_scores(rows[:, 0], rows[:, 1:], mask[:, 0], mask[:, 1:])
    return (time.monotonic() - began) / (128 * 32)


# ---- reckoning -----------------------------------------------------------------------------------


class _Reckoning:
    """From a sample to the whole."""

    def __init__(
        self,
        settings: Settings,
        engine: LocalEngine,
        shares: dict[str, _Share],
        measured: _Measured,
    ) -> None:
        self.settings, self.engine = settings, engine
        self.shares, self.measured = shares, measured
        self.chunks = {n: int(measured.rows[n] * share.scale) for n, share in shares.items()}
        self.documents = {n: share.documents for n, share in shares.items()}
        chosen = settings.database.corpora or tuple(shares)
        self.database_rows = sum(self.chunks[n] for n in chosen)
        self.search = settings.neighbors.resolve(self.database_rows)
        self.factory: str | None = None

    def plan(self) -> Plan:
        stages = [self._of_title(title) for title in self.measured.steps if self._known(title)]
        if self.settings.near_duplicates is not None:
            stages += [self._shingles(name, self.settings.near_duplicates) for name in self.shares]
            stages.append(self._duplicates(self.settings.near_duplicates))
        stages.append(self._database())
        index_bytes = 0
        if self.search == "index":
            stages += [self._codebook(), self._index()]
            index_bytes = stages[-1].bytes
        queried = [c.name for c in self.settings.corpora if c.split != "database"]
        stages += [self._neighbors(name, index_bytes) for name in queried]
        if self.settings.selection is not None:
            stages += [self._selection(name, self.settings.selection) for name in queried]
        stages += [self._leakage(c) for c in self.settings.corpora if self._evaluates(c)]
        if self.settings.packing is not None:
            trained = [c for c in self.settings.corpora if c.split in TRAINING]
            stages += [self._packing(c, self.settings.packing.seq_len) for c in trained]
        before = itertools.accumulate((stage.bytes for stage in stages), initial=0)
        shares = self.shares.values()
        return Plan(
            documents=sum(self.documents.values()),
            text_bytes=int(sum(s.text_bytes * s.scale for s in shares)),
            tokens=int(sum(self.measured.tokens[n] * s.scale for n, s in self.shares.items())),
            chunks=sum(self.chunks.values()),
            dim=self.measured.dim,
            sampled_bytes=sum(s.text_bytes for s in shares),
            search=self.search,
            factory=self.factory,
            stages=tuple(stages),
            disk_peak=max(b + s.peak_bytes for b, s in zip(before, stages, strict=False)),
            disk_free=shutil.disk_usage(_existing(self.settings.root)).free,
            memory_free=_free_memory(),
        )

    def _known(self, title: str) -> bool:
        return title.split()[0] in ("corpus", "tokenizer", "chunks", "embeddings")

    def _of_title(self, title: str) -> StagePlan:
        step = self.measured.steps[title]
        return cast(StagePlan, getattr(self, f"_{step.stage.name}")(title, step))

    def _workers(self, step: Step, blocks: float) -> int:
        return max(1, len(self.engine.places(step.stage.resources, max(1, int(blocks)))))

    def _corpus(self, title: str, step: Step) -> StagePlan:
        share = self.shares[str(step.corpus)]
        workers = self._workers(step, 1 / share.largest_block)
        size = int(self.measured.sizes[title] * share.scale)
        rows = self.documents[str(step.corpus)]
        kept = int(SCAN_BYTES_A_DOCUMENT * rows * share.largest_block)
        memory = workers * (self.measured.memory["corpus"] + kept)
        seconds = self.measured.seconds[title] * share.scale / workers
        return StagePlan(title, rows, size, size, memory, seconds, "measured")

    def _tokenizer(self, title: str, step: Step) -> StagePlan:
        sampled = sum(share.text_bytes for share in self.shares.values())
        total = sum(share.text_bytes * share.scale for share in self.shares.values())
        more = 1.0
        if self.settings.tokenizer.name is None:
            more = min(total, 2 * self.settings.tokenizer.sample_bytes) / sampled
        size = self.measured.sizes[title]
        grown = int(self.measured.memory["tokenizer"] * max(1.0, more**0.5))  # Heaps' law, about
        return StagePlan(
            title, 1, size, size, grown, self.measured.seconds[title] * more, "measured"
        )

    def _chunks(self, title: str, step: Step) -> StagePlan:
        share = self.shares[str(step.corpus)]
        workers = self._workers(step, len(step.stage.blocks()) * share.scale)
        size = int(self.measured.sizes[title] * share.scale)
        memory = workers * self.measured.memory["chunks"]
        seconds = self.measured.seconds[title] * share.scale / workers
        return StagePlan(
            title, self.chunks[str(step.corpus)], size, 2 * size, memory, seconds, "measured"
        )

    def _embeddings(self, title: str, step: Step) -> StagePlan:
        rows, dim = self.chunks[str(step.corpus)], self.measured.dim
        workers = self._workers(step, rows / MEASURE_CHUNKS)
        size = 2 * rows * dim
        seconds = self.measured.chunk_seconds[title] * rows / workers
        memory = workers * (self.measured.memory["embeddings"] + 2 * 65_536 * dim)
        return StagePlan(title, rows, size, size, memory, seconds, "measured")

    def _shingles(self, name: str, settings: NearDuplicateSettings) -> StagePlan:
        documents, words = self.documents[name], int(self.measured.words[name] * self._scale(name))
        size = 8 * words + (8 + 16 + 4 * settings.num_perm) * documents
        chunks = self.measured.steps[f"chunks {name}"]  # whose blocks and workers are alike
        workers = self._workers(chunks, len(chunks.stage.blocks()) * self._scale(name))
        memory = workers * (self.measured.memory["chunks"] + 2**27)
        seconds = self.measured.shingle_seconds[name] * self._scale(name) / workers
        return StagePlan(f"shingles {name}", documents, size, 2 * size, memory, seconds, "measured")

    def _duplicates(self, settings: NearDuplicateSettings) -> StagePlan:
        documents = sum(self.documents.values())
        memory = self.measured.memory["chunks"]
        memory += (DUPLICATE_BYTES_A_DOCUMENT + 4 * settings.num_perm) * documents
        return StagePlan("duplicates", documents, documents, documents, memory, 0.0, "small")

    def _scale(self, name: str) -> float:
        return self.shares[name].scale

    def _database(self) -> StagePlan:
        documents = sum(self.documents.values())
        memory = TABLE_BYTES_A_DOCUMENT * documents + self.database_rows
        return StagePlan("database", self.database_rows, documents, documents, memory, 0.0, "small")

    def _rate(self, device: str) -> float:
        return _product_rate(self.measured.dim, self.settings.neighbors.num_stored, device)

    def _codebook(self) -> StagePlan:
        index, dim = self.settings.index, self.measured.dim
        rows = self._admitted_rows()
        self.factory = index.factory or choose_factory(
            index.planner, rows, dim, index.max_index_memory, index.memory_mapped
        )
        size = estimated_bytes(self.factory, 0, dim)
        training = min(rows, index.sample_size, rows_to_train_on(self.factory))
        seconds = 2.0 * dim * _lists(self.factory) * training * KMEANS_ROUNDS / self._rate("cpu")
        memory = self.measured.memory["chunks"] + self.database_rows
        memory += TRAINING_BYTES * dim * training + size
        return StagePlan("codebook", training, size, size, memory, seconds, PRODUCTS)

    def _index(self) -> StagePlan:
        index, dim, factory = self.settings.index, self.measured.dim, str(self.factory)
        rows = self._admitted_rows()
        blocks = shards_of(index, factory, self.database_rows, dim)
        trained = estimated_bytes(factory, 0, dim)
        truth = len(blocks) * index.recall_queries * index.recall_at * 12
        size = estimated_bytes(factory, rows, dim) + (len(blocks) - 1) * trained + truth
        flop = 2.0 * dim * rows * (_lists(factory) + index.recall_queries)
        largest = max(block.stop - block.start for block in blocks)
        held = worker_bytes(factory, largest * rows // max(1, self.database_rows), dim)
        wanted = Resources(gpu=has_gpu_wheel(), threads=SHARD_THREADS if len(blocks) > 1 else 0)
        workers = max(1, len(self.engine.places(wanted, len(blocks))))
        memory = workers * (self.measured.memory["chunks"] + held + self.database_rows)
        return StagePlan("index", rows, size, size, memory, flop / self._rate("cpu"), PRODUCTS)

    def _admitted_rows(self) -> int:
        return int(self.database_rows * self.measured.admitted)

    def _neighbors(self, name: str, index_bytes: int) -> StagePlan:
        rows, dim = self.chunks[name], self.measured.dim
        neighbors = self.settings.neighbors
        size = self._list_bytes(name)
        admitted = self.database_rows * self.measured.admitted
        base = self.measured.memory["chunks"] + self.database_rows
        if self.search == "exact":
            device, count = self._search_devices()
            flop = 2.0 * rows * admitted * dim
            seconds, how = flop / self._rate(device) / count, "measured"
            memory = count * (base + neighbors.memory)
        else:
            lists = _lists(str(self.factory))
            flop = 2.0 * rows * dim * (lists + PROBED_LISTS * admitted / max(1, lists))
            seconds, how = flop / self._rate("cpu"), PRODUCTS
            memory = base + neighbors.memory  # of lists that are completed exactly
            memory += 0 if self.settings.index.memory_mapped else index_bytes
        return StagePlan(f"neighbors {name}", rows, size, 2 * size, memory, seconds, how)

    def _list_bytes(self, name: str) -> int:
        wide = 8 if self.database_rows >= 2**31 else 4
        return self.chunks[name] * self.settings.neighbors.num_stored * (wide + 4)

    def _selection(self, name: str, settings: SelectionSettings) -> StagePlan:
        rows, size = self.chunks[name], self._list_bytes(name)
        chunk_size, pairs = (
            self.settings.chunks.chunk_size,
            rows * self.settings.neighbors.num_stored,
        )
        chunks = self.measured.steps[f"chunks {name}"]
        workers = self._workers(chunks, rows / BATCH_CHUNKS)
        of_batch = BATCH_CANDIDATES * chunk_size * SELECTION_BYTES_A_TOKEN
        memory = workers * (self.measured.memory["chunks"] + of_batch + self.database_rows)
        seconds = pairs * _pair_seconds(chunk_size) if settings.max_overlap is not None else 0.0
        seconds += pairs * _score_seconds(chunk_size) if settings.rerank is not None else 0.0
        return StagePlan(
            f"selection {name}", rows, size, 2 * size, memory, seconds / workers, "measured"
        )

    def _evaluates(self, corpus: CorpusSettings) -> bool:
        return self.settings.evaluates(corpus.split)

    def _leakage(self, corpus: CorpusSettings) -> StagePlan:
        splits = self.settings.splits
        share = splits.evaluation if corpus.split == "hash" else 1.0
        rows = int(self.chunks[corpus.name] * share)
        nearest = min(NEAREST, self.settings.neighbors.num_stored)
        wide = 1 if self.settings.chunks.chunk_size < 256 else 2
        size = rows * (8 + wide * (1 + 2 * nearest))
        workers = self._workers(self.measured.steps[f"chunks {corpus.name}"], rows / BATCH_CHUNKS)
        of_batch = BATCH_CHUNKS * nearest * self.settings.chunks.chunk_size * LEAKAGE_BYTES_A_TOKEN
        memory = workers * (self.measured.memory["chunks"] + of_batch)
        seconds = 2 * rows * nearest * _pair_seconds(self.settings.chunks.chunk_size) / workers
        return StagePlan(
            f"leakage {corpus.name}", rows, size, 2 * size, memory, seconds, "measured"
        )

    def _packing(self, corpus: CorpusSettings, seq_len: int) -> StagePlan:
        splits, chunks = self.settings.splits, self.chunks[corpus.name]
        wide = 8 if chunks >= 2**31 else 4
        if corpus.split == "hash":
            chunks = int(chunks * splits.train)
        rows, size = chunks * self.settings.chunks.chunk_size // seq_len, wide * chunks
        memory = self.measured.memory["chunks"] + 6 * 8 * min(chunks, BLOCK_CHUNKS)
        return StagePlan(f"packing {corpus.name}", rows, size, 2 * size, memory, 0.0, "small")

    def _search_devices(self) -> tuple[str, int]:
        from retro_data.engines.local import visible_devices

        devices = visible_devices(self.settings.engine.devices)
        return ("cuda:0", len(devices)) if devices else ("cpu", 1)


def _lists(factory: str) -> int:
    """Lists that each vector is compared with; a graph of centroids spares most of them."""
    found = re.search(r"IVF(\d+)(_HNSW)?", factory)
    if not found:
        return 1
    return 1024 if found[2] else int(found[1])


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _free_memory() -> int:
    """Bytes that this machine can give without swapping, and its control group allows."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free = values.get("MemAvailable", free)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = (
            int((CONTROL_GROUP / f"memory.{n}").read_text("ascii")) for n in ("max", "current")
        )
        free = min(free, limit - used)
    return free
