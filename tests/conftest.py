"""What most tests stand on: small real corpora, and a small real encoder made on the spot."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retro_data.engines.local import available_cores  # loads no torch, which asks for threads once

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model would cost a minute of retries
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # More threads than cores wait for each other by spinning: small products take 50 times as long.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // int(workers))))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background by a script: the processes of the tests would ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = (
    "harbour quiet morning small boats lay along wall water did not move old man came down steps "
    "with basket began mend net river valley market bread stone bridge winter summer letter house "
    "garden window lamp table paper king queen road forest hill mountain sea island ship sail wind "
    "rain snow fire light dark green blue red white black silver gold iron copper wood glass"
).split()


def make_documents(count: int, seed: int = 0, longest: int = 400) -> list[dict[str, str]]:
    """`count` documents of 1 to `longest` words; some share whole sentences with others."""
    rng = random.Random(seed)
    shared = [" ".join(rng.choices(WORDS, k=40)) for _ in range(8)]
    documents = []
    for i in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
        text = f"{words}. {rng.choice(shared)}" if i % 3 == 0 else words
        documents.append({"id": f"document-{i}", "text": text})
    return documents


def write_jsonl(path: Path, documents: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(d) + "\n" for d in documents), "utf-8")
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents, some 200 chunks."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "small.jsonl", make_documents(60))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer BERT of width 32 with a WordPiece vocabulary of its own: random weights, real code."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator((d["text"] for d in make_documents(50)), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(t, backend.token_to_id(t)) for t in ("[CLS]", "[SEP]")],
    )
    backend.enable_truncation(48)  # as many shipped files do: the embedder must not believe it
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")},
    )
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(str(folder))
    return folder


@pytest.fixture
def small(tmp_path: Path, corpus_file: Path, tiny_encoder: Path) -> Callable[..., dict[str, Any]]:
    """Arguments of `Settings.create` for the small corpus; keywords replace or add groups."""

    def arguments(**changes: Any) -> dict[str, Any]:
        return {
            "root": tmp_path / "root",
            "corpus": {"name": "small", "path": str(corpus_file)},
            "tokenizer": {"vocab_size": 400},
            "chunk_size": 16,
            "embedder": {"name": str(tiny_encoder), "precision": "fp32"},
            "neighbors": {"num_stored": 8},
            **changes,
        }

    return arguments
