"""Exact search: ours, torch, faiss, and the rate of the machine's matrix product, in one run.

    python benchmarks/exact_search.py                                # d = 384 and 768, on the CPU
    python benchmarks/exact_search.py --rows 1000000 --dim 768 --device cuda

Synthetic embeddings: documents of 20 chunks, in clusters of topics. The queries are rows of the
database and their own document may not be found. The share is the time of a float32 product
(float16 on a GPU) of 2 * queries * rows * dim operations over the time of the search. Each time is
the best of some rounds, rounds of all candidates and of the product interleaved. "CPU s" are the
seconds of all cores: on a machine that others use too, their ratios are the ones to trust. The
database is made ready outside the time: widened for torch and faiss, sent to a GPU for ours.

"recall" is against a float64 search of a sample. "filled" is the share of the k places that hold
a neighbor; faiss knows no documents, so it finds `--over-fetch` more and the own ones are dropped.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import faiss
import numpy as np
import psutil
import torch

from retro_data.exact import Search, Vectors, recall

Array = np.ndarray[Any, Any]

DOCUMENT = 20  # chunks
TORCH_BLOCK = 1024  # queries whose scores are in memory at once: its best of 256 to 4096


def clustered(rows: int, dim: int, seed: int = 0) -> Array:
    """(rows, dim) float16: chunks about their document, documents about their topic."""
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((rows // 1000 + 1, dim), dtype=np.float32)
    out = np.empty((rows, dim), np.float16)
    for start in range(0, rows, 1000 * DOCUMENT):
        part = out[start : start + 1000 * DOCUMENT]
        documents = topics[rng.integers(len(topics), size=-(-len(part) // DOCUMENT))]
        documents += 0.5 * rng.standard_normal(documents.shape, dtype=np.float32)
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        part[:] = (documents.repeat(DOCUMENT, axis=0)[: len(part)] + 0.5 * noise) / 30
    return out


def own_documents(rows: Array, total: int) -> Array:
    """(n, 2) int64: the range [lo, hi) of each row's document."""
    low = rows // DOCUMENT * DOCUMENT
    return np.stack([low, np.minimum(low + DOCUMENT, total)], axis=1)


# ---- candidates ----------------------------------------------------------------------------------


def search_torch(database: torch.Tensor, queries: torch.Tensor, own: Array, k: int) -> Array:
    """A product of blocks of queries with the whole database, then topk of each row of scores."""
    ranges = torch.from_numpy(own).to(queries.device)
    bias = -0.5 * database.float().square().sum(1).to(database.dtype)
    columns = torch.arange(len(database), device=queries.device)
    found = []
    for start in range(0, len(queries), TORCH_BLOCK):
        part = slice(start, start + TORCH_BLOCK)
        scores = torch.addmm(bias, queries[part], database.T)
        low, high = int(ranges[part, 0].min()), int(ranges[part, 1].max())
        near = columns[low:high]
        mask = (near >= ranges[part, :1]) & (near < ranges[part, 1:])
        scores[:, low:high].masked_fill_(mask, -torch.inf)
        found.append(scores.topk(k).indices.cpu())
    return torch.cat(found).numpy()


def search_faiss(index: Any, queries: Array, own: Array, k: int, over_fetch: int) -> Array:
    """The nearest k + over_fetch of the flat index, those of the own document dropped."""
    _, ids = index.search(queries, k + over_fetch)
    dropped = (ids >= own[:, :1]) & (ids < own[:, 1:])
    order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    kept: Array = np.take_along_axis(np.where(dropped, -1, ids), order, axis=1)
    return kept


def search_float64(database: Array, queries: Array, own: Array, k: int) -> Array:
    """The truth, a query at a time."""
    wide = torch.from_numpy(database).double()
    ids = np.empty((len(queries), k), np.int64)
    for row, (query, (low, high)) in enumerate(zip(queries, own, strict=True)):
        distances = (wide - torch.from_numpy(query).double()).square().sum(1)
        distances[low:high] = torch.inf
        ids[row] = distances.argsort(stable=True)[:k].numpy()
    return ids


# ---- measuring -----------------------------------------------------------------------------------


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float

    def least(self, other: Cost) -> Cost:
        return Cost(*map(min, self, other))


def product_cost(flop: float, dim: int, device: str) -> Cost:
    """What `flop` would cost at the best rate of a square matrix product with `dim` terms."""
    dtype, sizes = (torch.float32, (2048, 4096)) if device == "cpu" else (torch.float16, (16384,))
    best = Cost(np.inf, np.inf)
    for size in sizes:
        left, right = torch.randn(2, size, dim, device=device).to(dtype)
        out = torch.empty(size, size, dtype=dtype, device=device)
        scale = flop / (2 * size * size * dim)
        for _ in range(4):
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            torch.mm(left, right.T, out=out)
            synchronize(device)
            cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
            best = best.least(Cost(wall * scale, cpu * scale))
    return best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def measured(search: Callable[[], Array]) -> tuple[Array, Cost, int]:
    """What a search finds, its cost, and the bytes of host memory it took at its peak."""
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    try:
        ids = search()
    finally:
        cost = Cost(time.perf_counter() - start, time.process_time() - cpu_start)
        done.set()
        watcher.join()
    return ids, cost, peak - before


def compare(dim: int, args: argparse.Namespace) -> None:
    database = clustered(args.rows, dim)
    rows = np.sort(np.random.default_rng(1).choice(args.rows, args.queries, replace=False))
    queries, own = database[rows], own_documents(rows, args.rows)
    ours = Search(Vectors([database]), metric="l2", device=args.device)
    narrow = torch.float32 if args.device == "cpu" else torch.float16
    wide, wide_queries = (torch.from_numpy(a).to(args.device, narrow) for a in (database, queries))
    candidates: dict[str, Callable[[], Array]] = {
        "ours": lambda: ours(queries, args.k, own).ids,
        "torch, product and topk": partial(search_torch, wide, wide_queries, own, args.k),
    }
    if args.device == "cpu":
        index = faiss.IndexFlatL2(dim)
        index.add(wide.numpy())
        candidates["faiss IndexFlatL2"] = partial(
            search_faiss, index, wide_queries.numpy(), own, args.k, args.over_fetch
        )

    sample = np.random.default_rng(2).choice(args.queries, min(args.sample, args.queries), False)
    truth = search_float64(database, queries[sample], own[sample], args.k)
    flop = 2 * args.queries * args.rows * dim
    limit = product_cost(flop, dim, args.device)
    results: dict[str, tuple[Array, Cost, int]] = {}
    for _ in range(args.rounds):
        for name, search in candidates.items():
            ids, cost, memory = measured(search)
            if name in results:
                cost, memory = cost.least(results[name][1]), max(memory, results[name][2])
            results[name] = ids, cost, memory
            limit = limit.least(product_cost(flop, dim, args.device))

    print(f"\nd = {dim}: {args.queries:,} queries, {args.rows:,} rows, k = {args.k}, {args.device}")
    print(f"{'':26}{'s':>8}{'share':>7}{'CPU s':>9}{'share':>7}{'recall':>9}{'filled':>8}{'MB':>7}")
    for name, (ids, cost, memory) in results.items():
        print(
            f"{name:26}{cost.seconds:8.2f}{limit.seconds / cost.seconds:7.2f}"
            f"{cost.cpu_seconds:9.2f}{limit.cpu_seconds / cost.cpu_seconds:7.2f}"
            f"{recall(ids[sample], truth):9.5f}{(ids >= 0).mean():8.4f}{memory / 1e6:7.0f}"
        )
    print(
        f"{'the matrix product alone':26}{limit.seconds:8.2f}{1:7.2f}{limit.cpu_seconds:9.2f}{1:7.2f}"
        f"     {flop / limit.seconds / 1e12:.3f} TFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the database")
    parser.add_argument("--queries", type=int, default=4096, help="rows that are searched for")
    parser.add_argument("--dim", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--over-fetch", type=int, default=10, help="more that faiss finds")
    parser.add_argument("--sample", type=int, default=64, help="queries whose recall is measured")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, faiss {faiss.__version__}"
    )
    for dim in args.dim:
        compare(dim, args)


if __name__ == "__main__":
    main()
