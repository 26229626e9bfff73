"""Embedding and exact search on 1, 2, … GPUs of one host, in one run: rates, and shares of linear.

    python benchmarks/multi_gpu.py                              # on 1 and on all GPUs
    python benchmarks/multi_gpu.py --devices 1 2 4 --rows 4000000 --k 16 32

- embedding: BERT-base with random weights, from a chunk store on disk to finished blocks on disk,
  between the time that every worker has finished some blocks and the time that the first runs out;
- all pairs: exact search of all rows among themselves, from vectors in host memory to lists there;
- rows only: of `--queries` rows a GPU, as if they were foreign;
- products: what the devices allow, each multiplying matrices at the same time, without us.

Rounds are interleaved, and the best of each is shown. The results on any number of devices are held
against each other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from embedding import TimedEngine, make_tokenizer, random_chunks, random_encoder
from exact_search import clustered, own_documents

from retro_data.embedder_settings import EmbedderSettings
from retro_data.embeddings import EmbeddingStage
from retro_data.engines.local import EngineSettings
from retro_data.exact import Search
from retro_data.stage import complete
from retro_data.vectors import Neighbors, Vectors

Array = np.ndarray[Any, Any]

BLOCK_ROWS = 65_536
CHUNK = 64
WARM_BLOCKS = 3  # of each worker, that are not counted
LINE = "{:<34}{:>9}{:>16}{:>12}{:>12}"


class Row(NamedTuple):
    """A rate on some devices; `unit` says of what."""

    name: str
    devices: int
    rate: float
    unit: str


# ---- embedding -----------------------------------------------------------------------------------


def embedding(scratch: Path, devices: int, seconds: float, expected: float) -> Row:
    """Chunks a second of the stage, from disk to disk, while all workers are at work."""
    encoder = scratch / "encoder"
    if not encoder.exists():
        random_encoder(encoder, {})
        make_tokenizer(scratch, encoder)
    idle = 2 * WARM_BLOCKS * devices  # blocks of the start and of the end
    blocks = idle + round(expected * devices * seconds / BLOCK_ROWS)
    place = random_chunks(scratch, scratch / "tokenizer", blocks * BLOCK_ROWS, CHUNK)
    settings = EmbedderSettings(name=str(encoder), block_rows=BLOCK_ROWS)
    engine = TimedEngine(EngineSettings(tuple(range(devices))))
    stage = EmbeddingStage(settings, "random", place, scratch / "tokenizer")
    complete(stage, scratch / f"vectors-{devices}", engine)
    first, last = WARM_BLOCKS * devices, len(engine.times) - WARM_BLOCKS * devices
    span = engine.times[last] - engine.times[first]
    rate = sum(engine.rows[first + 1 : last + 1]) / span
    return Row(f"embedding, over {span:.0f} s", devices, rate, "chunks/s")


# ---- exact search --------------------------------------------------------------------------------


class ExactBench:
    """One database, made ready on every device."""

    def __init__(self, rows: int, dim: int, queries: int) -> None:
        self.vectors = clustered(rows, dim, "cuda:0")
        self.own = own_documents(np.arange(rows), rows)
        self.queries = queries
        began = time.perf_counter()
        self.search = Search(Vectors([self.vectors]), metric="l2", device="cuda")
        print(f"{rows:,} x {dim} onto each device: {time.perf_counter() - began:.1f} s", flush=True)
        self.gpus = list(self.search.gpus)
        self.found: dict[tuple[str, int], Neighbors] = {}

    def all_pairs(self, devices: int, k: int) -> Row:
        self.search.gpus = self.gpus[:devices]
        rows = len(self.vectors)
        began = time.perf_counter()
        found = self.search.of_itself(k, self.own).rows(0, rows)
        seconds = time.perf_counter() - began
        self._hold("all pairs", k, found)
        flop = 2 * rows * rows * self.vectors.shape[1]
        return Row(f"all pairs, k = {k}", devices, flop / seconds / 1e12, "TFLOP/s")

    def rows_only(self, devices: int, k: int) -> Row:
        self.search.gpus = self.gpus[:devices]
        count = min(self.queries * devices, len(self.vectors))
        began = time.perf_counter()
        found = self.search(self.vectors[:count], k, self.own[:count])
        seconds = time.perf_counter() - began
        self._hold("rows only", k, Neighbors(*(part[: self.queries] for part in found)))
        flop = 2 * count * self.vectors.size
        return Row(f"rows only, k = {k}", devices, flop / seconds / 1e12, "TFLOP/s")

    def _hold(self, name: str, k: int, found: Neighbors) -> None:
        """Results depend on no number of devices."""
        before = self.found.setdefault((name, k), found)
        assert np.array_equal(before.ids, found.ids)
        assert np.array_equal(before.distances, found.distances)


# ---- the devices' own ----------------------------------------------------------------------------


def products(devices: int, seconds: float) -> Row:
    """TFLOP/s of float16 products of 8192-cubes on all devices at once."""

    def run(index: int) -> float:
        with torch.cuda.device(index):
            a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.float16)
            out, done = torch.empty_like(a), 0
            torch.mm(a, b, out=out)
            torch.cuda.synchronize()
            began = time.perf_counter()
            while time.perf_counter() - began < seconds:
                for _ in range(10):
                    torch.mm(a, b, out=out)
                torch.cuda.synchronize()
                done += 10
            return 2 * 8192**3 * done / (time.perf_counter() - began) / 1e12

    with ThreadPoolExecutor(devices) as pool:
        return Row("products of 8192-cubes", devices, sum(pool.map(run, range(devices))), "TFLOP/s")


# ---- the table -----------------------------------------------------------------------------------


def best(measures: Sequence[Callable[[], Row]], rounds: int) -> list[Row]:
    made = [[measure() for measure in measures] for _ in range(rounds)]
    return [max(column, key=lambda row: row.rate) for column in zip(*made, strict=True)]


def show(rows: Sequence[Row]) -> None:
    """One line a row; the share of linear is of the first row, the one on fewest devices."""
    base = rows[0].rate / rows[0].devices
    for row in rows:
        rate = f"{row.rate:,.0f} {row.unit}"
        times = row.rate / rows[0].rate
        share = row.rate / row.devices / base
        print(LINE.format(row.name, row.devices, rate, f"{times:.2f}x", f"{share:.3f}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    count = torch.cuda.device_count()
    parser.add_argument("--devices", type=int, nargs="+", default=sorted({1, count}))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--queries", type=int, default=131_072, help="a GPU, of rows only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of embedding; 0 leaves it out")
    parser.add_argument("--expected", type=float, default=44_000, help="chunks/s of one GPU")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"{count} x {torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    print(LINE.format("", "GPUs", "rate", "of fewest", "of linear"), flush=True)
    show(best([partial(products, n, 1.0) for n in args.devices], args.rounds))
    bench = ExactBench(args.rows, args.dim, args.queries)
    for k in args.k:
        for measure in (bench.all_pairs, bench.rows_only):
            measure(max(args.devices), k)  # compiled, and every device awake
            show(best([partial(measure, n, k) for n in args.devices], args.rounds))
    del bench
    torch.cuda.empty_cache()
    if args.seconds:
        with tempfile.TemporaryDirectory() as scratch:
            show([embedding(Path(scratch), n, args.seconds, args.expected) for n in args.devices])


if __name__ == "__main__":
    main()
