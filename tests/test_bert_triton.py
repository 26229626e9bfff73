"""The fused forward pass against transformers, run by Triton's interpreter; how texts are packed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

SCRIPT = """
import itertools, sys
import numpy as np, torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel
from retro_data.bert_triton import FusedBert, obstacle, pack

LONGEST, SIZES = 110, np.array([64, 3, 0, 62, 78, 79, 1])

def encoder(kind, config, hidden, heads, **changes):
    torch.manual_seed(0)
    made = kind(config(
        vocab_size=300, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=heads,
        intermediate_size=4 * hidden, max_position_embeddings=LONGEST + 2, **changes,
    ), add_pooling_layer=False).eval()
    with torch.no_grad():
        for weight in made.parameters():  # biases and norms that matter
            if weight.ndim == 1:
                weight += 0.3 * torch.randn_like(weight)
    return made

def reference(model, content, pooling, normalize):
    states = model(input_ids=torch.tensor([[4, *content.tolist(), 5]])).last_hidden_state[0]
    row = states[0] if pooling == "cls" else states[1:-1].mean(0)
    return row / row.norm() if normalize else row

def check(model, pooling, normalize, rows):
    assert obstacle(model) is None
    device = torch.device("cpu")
    fused = FusedBert(
        model, torch.float16, device, prefix=[4], suffix=[5], pooling=pooling,
        normalize=normalize, longest=LONGEST, rows=rows,
    )
    rng = np.random.default_rng(0)
    texts = [rng.integers(6, 300, size) for size in SIZES]
    ids = torch.from_numpy(np.concatenate(texts).astype(np.int32))
    results = []
    for chosen in (np.arange(len(SIZES)), np.array([5, 0, 6])):
        order, first, batches = pack(SIZES[chosen], 2, fused.row_sizes)
        texts_of = chosen[order]
        starts = np.cumsum(SIZES) - SIZES
        table = np.stack([starts[texts_of], SIZES[texts_of], first, texts_of], 1).astype(np.int32)
        out = torch.full((len(SIZES), model.config.hidden_size), torch.nan, dtype=torch.float16)
        with torch.inference_mode():
            for batch in batches:
                fused.forward(ids, torch.from_numpy(table), batch, out)
        assert out.isnan().any(1).tolist() == [i not in texts_of for i in range(len(SIZES))]
        results.append(out)
    full, some = results
    assert torch.equal(full[[5, 0, 6]], some[[5, 0, 6]]), "a vector depends on its batch"
    for i in np.flatnonzero(SIZES):
        with torch.inference_mode():
            expected = reference(model, texts[i], pooling, normalize)
        found = full[i].float()
        assert torch.cosine_similarity(expected, found, dim=0) > 0.99999, (i, SIZES[i])
        assert (expected - found).abs().max() < 4e-3 * expected.abs().max(), (i, SIZES[i])

check(encoder(BertModel, BertConfig, 96, 3, hidden_act="gelu_new"), "cls", True, 112)
check(encoder(RobertaModel, RobertaConfig, 32, 1, pad_token_id=1), "mean", True, 112)
"""


def test_the_kernels_have_the_results_of_transformers() -> None:
    """Heads of 32, rows of one part and of three, sequences below, at and above every tile."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(0, 62), max_size=60),
    extra=st.integers(1, 3),
    row_sizes=st.sampled_from([(65,), (128, 65), (640, 80), (512, 128, 65)]),
)
def test_every_text_with_tokens_gets_rows_of_its_own(
    sizes: list[int], extra: int, row_sizes: tuple[int, ...]
) -> None:
    from retro_data.bert_triton import pack

    lengths = np.array(sizes, np.int64)
    order, first_rows, batches = pack(lengths, extra, row_sizes)
    assert sorted(order.tolist()) == np.flatnonzero(lengths).tolist()
    place = 0
    for batch in batches:
        part = slice(batch.first, batch.first + batch.sequences)
        assert batch.first == place
        assert batch.sequences > 0
        assert batch.rows in row_sizes
        taken = lengths[order[part]] + extra
        ends = first_rows[part] + taken
        assert first_rows[part].tolist() == [0, *ends[:-1]], "one after the other"
        assert ends[-1] <= batch.rows
        assert taken.max() == batch.longest
        assert (np.diff(taken) >= 0).all(), "by length, so that kernels can be chosen by it"
        assert batch.in_tile == (taken <= 64).sum()
        assert batch.with_tail == ((taken > 64) & (taken <= 80)).sum()
        place += batch.sequences
    assert place == len(order)


def test_full_chunks_fill_full_batches() -> None:
    """What a large store is made of wastes no row."""
    from retro_data.bert_triton import FULL_ROWS, pack

    _, _, batches = pack(np.full(65_536, 64), 2, (FULL_ROWS, FULL_ROWS // 8, FULL_ROWS // 64))
    assert [(b.rows, b.sequences) for b in batches] == [(FULL_ROWS, 4096)] * 16


def test_the_end_of_a_block_takes_smaller_batches() -> None:
    from retro_data.bert_triton import pack

    _, _, batches = pack(np.full(1000, 62), 2, (64 * 640, 64 * 80, 64 * 10))
    assert [b.rows // 64 for b in batches] == [640, 80, 80, 80, 80, 10, 10, 10, 10]
    _, _, batches = pack(np.full(1, 3), 2, (64 * 640, 64 * 80, 64 * 10))
    assert [b.rows // 64 for b in batches] == [10]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"num_attention_heads": 5, "hidden_size": 60}, "num_attention_heads=5"),
        ({"num_attention_heads": 7, "hidden_size": 112}, "hidden_size=112"),
        ({"is_decoder": True}, "is_decoder=True"),
    ],
)
def test_an_encoder_of_another_make_is_left_to_transformers(changes: dict, said: str) -> None:
    from transformers import BertConfig, BertModel

    from retro_data.bert_triton import obstacle

    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=9, num_hidden_layers=1, **{**small, **changes})
    found = obstacle(BertModel(config))
    assert found is not None
    assert said in found


def test_another_architecture_is_left_to_transformers() -> None:
    from transformers import DistilBertConfig, DistilBertModel

    from retro_data.bert_triton import obstacle

    config = DistilBertConfig(vocab_size=9, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    assert "DistilBertModel is none of BertModel" in (obstacle(DistilBertModel(config)) or "")
