"""Exact search: ours, torch, faiss, and the rate of the machine's matrix product, in one run.

    python benchmarks/exact_search.py                                # d = 384 and 768, on the CPU
    python benchmarks/exact_search.py --device cuda --rows 1000000 --dim 768 384 --k 16 32 64
    python benchmarks/exact_search.py --device cuda --rows 1000000 --embeddings vectors.npy

Synthetic embeddings: documents of 20 chunks, in clusters of topics. The queries are rows of the
database and their own document may not be found. The share is the time of a float32 product of
2 * queries * rows * dim operations over the time of the search. Each time is the best of some
rounds, rounds of all candidates and of the product interleaved. "CPU s" are the seconds of all
cores: on a machine that others use too, their ratios are the ones to trust. The database is made
ready outside the time: widened for torch and faiss, sent to a GPU for ours.

"recall" is against a float64 search of a sample. "filled" is the share of the k places that hold
a neighbor; faiss knows no documents, so it finds `--over-fetch` more and the own ones are dropped.

On a GPU all rows are searched ("all pairs", where a product serves both of its rows), and a part of
them as if they were foreign ("rows only"); TFLOP/s are 2 * queries * rows * dim over the time, and
shares are of float16 products of the same depth by cuBLAS, measured before and after each search
for as long. `--embeddings` repeats vectors of a file, with a little noise, up to `--rows`.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retro_data.exact import Search
from retro_data.vectors import Vectors, recall

with suppress(ImportError):
    import faiss
with suppress(ImportError):
    import psutil

Array = np.ndarray[Any, Any]

DOCUMENT = 20  # chunks
TORCH_BLOCK = 1024  # queries whose scores are in memory at once: its best of 256 to 4096


def clustered(rows: int, dim: int, device: str) -> Array:
    """(rows, dim) float16: chunks about their document, documents about their topic."""
    source = torch.Generator(device).manual_seed(0)
    options: Any = {"generator": source, "device": device}
    topics = torch.randn(rows // 1000 + 1, dim, **options)
    out = np.empty((rows, dim), np.float16)
    for start in range(0, rows, 1000 * DOCUMENT):
        part = out[start : start + 1000 * DOCUMENT]
        documents = -(-len(part) // DOCUMENT)
        center = topics[torch.randint(len(topics), (documents,), **options)]
        center += 0.5 * torch.randn(documents, dim, **options)
        center = center.repeat_interleave(DOCUMENT, 0)[: len(part)]
        center += 0.5 * torch.randn(len(part), dim, **options)
        part[:] = (center / 30).half().cpu().numpy()
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


def product_cost(flop: float, dim: int) -> Cost:
    """What `flop` would cost at the best rate of a square float32 product with `dim` terms."""
    best = Cost(np.inf, np.inf)
    for size in (2048, 4096):
        left, right = torch.randn(2, size, dim)
        out = torch.empty(size, size)
        scale = flop / (2 * size * size * dim)
        for _ in range(4):
            start, cpu_start = time.perf_counter(), time.process_time()
            torch.mm(left, right.T, out=out)
            cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
            best = best.least(Cost(wall * scale, cpu * scale))
    return best


def resident_bytes() -> int:
    """Memory of this process; 0 without psutil."""
    return int(psutil.Process().memory_info().rss) if "psutil" in globals() else 0


def measured(search: Callable[[], Array]) -> tuple[Array, Cost, int]:
    """What a search finds, its cost, and the bytes of host memory it took at its peak."""
    done = threading.Event()
    before = peak = resident_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident_bytes())

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


def compare(database: Array, k: int, args: argparse.Namespace) -> None:
    dim = database.shape[1]
    rows = np.sort(np.random.default_rng(1).choice(args.rows, args.queries, replace=False))
    queries, own = database[rows], own_documents(rows, args.rows)
    ours = Search(Vectors([database]), metric="l2", device="cpu")
    wide, wide_queries = (torch.from_numpy(a).float() for a in (database, queries))
    candidates: dict[str, Callable[[], Array]] = {
        "ours": lambda: ours(queries, k, own).ids,
        "torch, product and topk": partial(search_torch, wide, wide_queries, own, k),
    }
    if "faiss" in globals():
        index = faiss.IndexFlatL2(dim)
        index.add(wide.numpy())
        candidates["faiss IndexFlatL2"] = partial(
            search_faiss, index, wide_queries.numpy(), own, k, args.over_fetch
        )

    sample = np.random.default_rng(2).choice(args.queries, min(args.sample, args.queries), False)
    truth = search_float64(database, queries[sample], own[sample], k)
    flop = 2 * args.queries * args.rows * dim
    limit = product_cost(flop, dim)
    results: dict[str, tuple[Array, Cost, int]] = {}
    for _ in range(args.rounds):
        for name, search in candidates.items():
            ids, cost, memory = measured(search)
            if name in results:
                cost, memory = cost.least(results[name][1]), max(memory, results[name][2])
            results[name] = ids, cost, memory
            limit = limit.least(product_cost(flop, dim))

    print(f"\nd = {dim}: {args.queries:,} queries, {args.rows:,} rows, k = {k}")
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


# ---- on a GPU ------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One search of the first `queries` rows: what it found of the sample, and what it took."""

    name: str
    k: int
    queries: int
    seconds: float
    cublas: float  # TFLOP/s beside it
    found: Array  # ids of the rows of the sample among the queries
    filled: float
    gigabytes: float
    parts: str = ""


class GpuBench:
    """A database on a GPU, its truth on a sample of rows, and what is measured of it."""

    def __init__(self, vectors: Array, args: argparse.Namespace) -> None:
        self.vectors, self.device = vectors, torch.device(args.device)
        self.rows, self.dim = vectors.shape
        self.args = args
        self.own = own_documents(np.arange(self.rows), self.rows)
        self.queries = min(args.queries, self.rows)
        rng = np.random.default_rng(2)
        half = min(args.sample, self.queries) // 2
        inside = rng.choice(self.queries, half, replace=False)  # so that all searches have some
        self.sample = np.unique(np.concatenate([inside, rng.choice(self.rows, half)]))
        self.truth = self._truth(max(args.k))
        left = torch.randn(16384, self.dim, device=self.device).half()
        right = torch.randn(65536, self.dim, device=self.device).half()
        self.product = partial(torch.mm, left, right.T, out=left.new_empty(16384, 65536))
        self.product_flop = 2 * 16384 * 65536 * self.dim
        cubes = torch.randn(2, 8192, 8192, device=self.device).bfloat16()
        self.cube = partial(torch.mm, *cubes, out=torch.empty_like(cubes[0]))

    def _truth(self, k: int) -> Array:
        """Neighbors of the sample by float64, in the order (distance as float32, id)."""
        found = []
        database = torch.from_numpy(self.vectors).to(self.device)
        norms = torch.cat([part.double().square().sum(1) for part in database.split(65536)])
        columns = torch.arange(self.rows, device=self.device)
        for rows in np.array_split(self.sample, -(-len(self.sample) // 256)):
            query = database[torch.from_numpy(rows).to(self.device)].double()
            products = [query @ part.double().T for part in database.split(65536)]
            distances = torch.cat(products, 1).mul_(-2).add_(norms)
            distances += query.square().sum(1, keepdim=True)
            low, high = torch.from_numpy(self.own[rows].T).to(self.device)[:, :, None]
            distances.masked_fill_((columns >= low) & (columns < high), torch.inf)
            best = distances.topk(min(2 * k + 16, self.rows), largest=False)
            ids, order = best.indices.sort(1)
            values = best.values.gather(1, order).float()
            found.append(ids.gather(1, values.sort(dim=1, stable=True).indices[:, :k]).cpu())
        return torch.cat(found).numpy()

    def rate(self, work: Callable[[], Any], flop: float, seconds: float = 0.15) -> float:
        """TFLOP/s of a product, repeated for some time."""
        work()
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(8):
                work()
            torch.cuda.synchronize()
            count += 8
        return flop * count / (time.perf_counter() - start) / 1e12

    def measure(
        self, name: str, k: int, queries: int, search: Callable[[], Array], rounds: int
    ) -> Result:
        """The best of some rounds, each between two measurements of cuBLAS."""
        best: tuple[float, float] | None = None
        for _ in range(rounds):
            before = self.rate(self.product, self.product_flop)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            ids = search()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            beside = (before + self.rate(self.product, self.product_flop)) / 2
            if best is None or seconds < best[0]:
                best = seconds, beside
        assert best is not None
        gigabytes = torch.cuda.max_memory_allocated() / 1e9
        found = ids[self.sample[self.sample < queries]]
        return Result(name, k, queries, *best, found, float((ids >= 0).mean()), gigabytes)

    def show(self, result: Result) -> None:
        tflops = 2 * result.queries * self.rows * self.dim / result.seconds / 1e12
        truth = self.truth[self.sample < result.queries, : result.k]
        print(
            f"{result.name:24}{result.k:4}{result.queries:9}{result.seconds:9.3f}{tflops:8.0f}"
            f"{tflops / result.cublas:7.2f}{result.cublas:7.0f}{recall(result.found, truth):9.5f}"
            f"{result.filled:8.4f}{result.gigabytes:6.1f}  {result.parts}",
            flush=True,
        )

    def run(self) -> None:
        cube = self.rate(self.cube, 2 * 8192**3)
        print(f"\nd = {self.dim}, {self.rows:,} rows; bf16 8192-cube {cube:.0f} TFLOP/s")
        print(
            f"{'':24}{'k':>4}{'queries':>9}{'s':>9}{'TFLOP/s':>8}{'share':>7}{'cuBLAS':>7}"
            f"{'recall':>9}{'filled':>8}{'GB':>6}  milliseconds of parts"
        )
        start = time.perf_counter()
        ours = Search(Vectors([self.vectors]), metric="l2", device=str(self.device))
        torch.cuda.synchronize()
        print(f"made ready in {time.perf_counter() - start:.2f} s", flush=True)
        assert ours.gpus
        for k in self.args.k:
            self.show(self.all_pairs(ours, k))
            self.show(self.rows_only(ours, k))
        del ours
        torch.cuda.empty_cache()
        if not self.args.ours_only:
            self.peers()

    def all_pairs(self, ours: Search, k: int) -> Result:
        def search() -> Array:
            return ours.of_itself(k, self.own).rows(0, self.rows).ids

        parts = self._parts(ours, search)
        result = self.measure("ours, all pairs", k, self.rows, search, self.args.rounds)
        return result._replace(parts=parts)

    def rows_only(self, ours: Search, k: int) -> Result:
        queries, own = self.vectors[: self.queries], self.own[: self.queries]

        def search() -> Array:
            return ours(queries, k, own).ids

        parts = self._parts(ours, search)
        result = self.measure("ours, rows only", k, self.queries, search, self.args.rounds)
        return result._replace(parts=parts)

    def _parts(self, ours: Search, search: Callable[[], Array]) -> str:
        """Where the time of a search goes, by the device's clock; also compiles the kernels."""
        search()
        timings: list[tuple[str, Any]] = []
        ours.gpus[0].timings = timings
        ours.gpus[0].mark("start")
        search()
        torch.cuda.synchronize()
        ours.gpus[0].timings = None
        spent: dict[str, float] = {}
        for (_, before), (part, after) in pairwise(timings):
            spent[part] = spent.get(part, 0) + before.elapsed_time(after)
        return ", ".join(f"{part} {value:.0f}" for part, value in spent.items())

    def peers(self) -> None:
        count, k = min(8192, self.rows), min(self.args.k)
        wide = torch.from_numpy(self.vectors).to(self.device)
        own = self.own[:count]
        search: Callable[[], Array] = partial(search_torch, wide, wide[:count], own, k)
        self.show(self.measure("torch matmul and topk", k, count, search, 2))
        del wide, search
        if "faiss" not in globals() or not hasattr(faiss, "StandardGpuResources"):
            print("this faiss has no GPU support")
            return
        for half in (False, True):
            resources, config = faiss.StandardGpuResources(), faiss.GpuIndexFlatConfig()
            config.useFloat16 = half
            index = faiss.GpuIndexFlatL2(resources, self.dim, config)
            for start in range(0, self.rows, 65536):
                index.add(self.vectors[start : start + 65536].astype(np.float32))
            queries = self.vectors[:count].astype(np.float32)
            search = partial(search_faiss, index, queries, own, k, self.args.over_fetch)
            name = f"faiss Flat {'fp16' if half else 'fp32'}"
            self.show(self.measure(name, k, count, search, 2))
            del index, search


def embeddings_of(path: Path, rows: int) -> Array:
    """(rows, d) float16: the vectors of a file, over and over, each time with other noise."""
    given = np.load(path, mmap_mode="r")
    out = np.empty((rows, given.shape[1]), np.float16)
    rng = np.random.default_rng(0)
    scale = 0.1 * float(np.asarray(given[:10_000], np.float32).std())
    for start in range(0, rows, len(given)):
        part = out[start : start + len(given)]
        part[:] = given[: len(part)]
        if start:
            for low in range(0, len(part), 65536):
                some = part[low : low + 65536]
                some += (scale * rng.standard_normal(some.shape, dtype=np.float32)).astype(
                    some.dtype
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the database")
    parser.add_argument("--queries", type=int, help="rows that are searched for")
    parser.add_argument("--dim", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--k", type=int, nargs="+", default=[32])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--over-fetch", type=int, default=10, help="more that faiss finds")
    parser.add_argument("--sample", type=int, help="queries whose recall is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--embeddings", type=Path, help=".npy of vectors, in place of synthetic ones"
    )
    parser.add_argument("--ours-only", action="store_true", help="leave out torch and faiss")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    args.queries = args.queries or (131_072 if on_gpu else 4096)
    args.sample = args.sample or (1024 if on_gpu else 64)
    name = torch.cuda.get_device_name(args.device) if on_gpu else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    given = None if args.embeddings is None else embeddings_of(args.embeddings, args.rows)
    for dim in args.dim if given is None else [given.shape[1]]:
        vectors = clustered(args.rows, dim, args.device) if given is None else given
        if on_gpu:
            GpuBench(vectors, args).run()
        else:
            for k in args.k:
                compare(vectors, k, args)


if __name__ == "__main__":
    main()
