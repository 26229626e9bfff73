"""What the reference decoder may see, what it counts, and that it learns from neighbors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from retro_data import retro_lm
from retro_data.errors import RetroDataError
from retro_data.retro_lm import (
    Attention,
    RetroLM,
    follows_in_text,
    learning_rate_factor,
    neighbor_slots,
    open_empty_rows,
    rotate,
    rotation,
    score_figures,
    score_sums,
    shift_keys,
    token_nats,
)

VOCAB, M, R, K = 29, 4, 8, 2
EOS = 28
SEEN = 1e-9  # in float64, far above rounding and far below the effect of any change of a token
Batch = dict[str, Tensor]


def make_model(**settings: object) -> RetroLM:
    torch.manual_seed(0)
    defaults: dict = {
        "vocab_size": VOCAB,
        "pad_id": VOCAB,
        "chunk_size": M,
        "width": 16,
        "layers": 3,
        "heads": 2,
        "encoder_width": 24,
        "cross_attention_layers": [2, 3],
        "eos_id": EOS,
    }
    return RetroLM(**(defaults | settings))


@pytest.fixture(scope="module")
def model() -> RetroLM:
    """In float64, so that what is seen and what is not are told apart beyond doubt."""
    return make_model().double().eval()


def make_batch(rows: list[list[int]], num_chunks: int, seed: int = 0) -> Batch:
    """Rows of documents, given by their numbers of tokens; random tokens and full neighbors."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.zeros(len(rows), num_chunks, dtype=torch.int64)
    documents = torch.full_like(lengths, -1)
    chunk_ids = torch.full_like(lengths, -1)
    ids = torch.full((len(rows), num_chunks * M), VOCAB)
    labels = torch.full_like(ids, -100)
    document = 0
    for row, sizes in enumerate(rows):
        chunk = 0
        for size in sizes:
            start = chunk * M
            ids[row, start : start + size] = torch.randint(EOS, (size,), generator=generator)
            labels[row, start : start + size - 1] = ids[row, start + 1 : start + size]
            labels[row, start + size - 1] = EOS
            for begin in range(0, size, M):
                lengths[row, chunk] = min(M, size - begin)
                documents[row, chunk] = document
                chunk_ids[row, chunk] = 100 * document + begin // M
                chunk += 1
            document += 1
    neighbors = torch.randint(EOS, (len(rows), num_chunks, K, R), generator=generator)
    return {
        "input_ids": ids,
        "labels": labels,
        "chunk_lengths": lengths,
        "neighbor_tokens": neighbors,
        "neighbor_mask": torch.ones_like(neighbors, dtype=torch.bool),
        "chunk_ids": chunk_ids,
        "document_ids": documents,
    }


def changed(batch: Batch, key: str, where: tuple) -> Batch:
    """The batch with other tokens at one place."""
    tokens = batch[key].clone()
    tokens[where] = (tokens[where] + 5) % EOS
    return batch | {key: tokens}


@torch.no_grad()
def positions_changed(
    model: RetroLM, a: Batch, b: Batch, retrieval: bool | None = None
) -> set[int]:
    """Positions of row 0 whose logits differ."""
    difference = (model(a, retrieval) - model(b, retrieval)).abs().amax(-1)[0]
    return set(torch.nonzero(difference > SEEN).flatten().tolist())


# --- runs of documents ----------------------------------------------------------------------------


def attention_of_runs(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, bounds_of_keys: Tensor, *_: int, **__: Any
) -> Tensor:
    """What `varlen_attn` computes, one run at a time, on a CPU and in any dtype."""
    assert bounds.dtype == torch.int32
    assert bounds is bounds_of_keys
    y = torch.full_like(q, torch.nan)
    for low, high in itertools.pairwise(bounds.tolist()):
        q_, k_, v_ = (x[low:high].swapaxes(0, 1) for x in (q, k, v))
        y[low:high] = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True).swapaxes(0, 1)
    return y


def test_runs_of_documents_are_attended_as_under_the_mask(
    model: RetroLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch([[6, 3, 2], [10], [16], [1, 4, 1, 2], []], 4)
    under_mask = model(batch)
    monkeypatch.setattr(retro_lm, "runs_can_be_attended", lambda weight, head_dim: True)
    monkeypatch.setattr(retro_lm, "varlen_attn", attention_of_runs)
    by_runs = model(batch)
    real = batch["input_ids"] != VOCAB
    torch.testing.assert_close(by_runs[real], under_mask[real])
    assert by_runs.isfinite().all()


def test_runs_end_where_the_document_or_the_row_ends() -> None:
    documents = torch.tensor([[7, 7, 8, -1], [8, 9, 9, 9]])
    runs = retro_lm.document_runs(documents, 4)
    assert runs.bounds.tolist() == [0, 8, 12, 16, 20, 32, 32, 32, 32]
    assert runs.longest == 16


# --- causality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("retrieval", [True, False])
def test_a_token_changes_the_logits_from_its_own_on(model: RetroLM, retrieval: bool) -> None:
    batch = make_batch([[15]], 4)
    for t in range(15):
        seen = positions_changed(model, batch, changed(batch, "input_ids", (0, t)), retrieval)
        assert min(seen) == t
        assert set(range(t, 15)) <= seen


def test_gradients_of_a_logit_reach_no_later_token_and_no_later_neighbor(model: RetroLM) -> None:
    batch = make_batch([[16]], 4)
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.embedding.register_forward_hook(keep)
    logits = model(batch)
    handle.remove()
    tokens, neighbors = embedded
    for t in range(16):
        of_tokens, of_neighbors = torch.autograd.grad(
            logits[0, t].square().sum(), [tokens, neighbors], retain_graph=True
        )
        reached = of_tokens[0].abs().amax(-1) > 0
        assert reached.tolist() == [i <= t for i in range(16)]
        chunks = of_neighbors.reshape(4, -1).abs().amax(-1) > 0
        assert chunks.tolist() == [t >= u * M + M - 1 for u in range(4)]


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_neighbors_reach_their_chunks_last_token_and_the_next_chunk(
    model: RetroLM, chunk: int
) -> None:
    batch = make_batch([[16]], 4)
    seen = positions_changed(model, batch, changed(batch, "neighbor_tokens", (0, chunk, 1, 3)))
    last = chunk * M + M - 1
    assert min(seen) == last
    assert set(range(last, last + M + 1)) <= seen


def test_cross_attention_itself_ends_before_the_next_chunks_last_token() -> None:
    """With attention in the last layer alone nothing carries a neighbor further."""
    model = make_model(cross_attention_layers=[3]).double().eval()
    batch = make_batch([[16]], 4)
    seen = positions_changed(model, batch, changed(batch, "neighbor_tokens", (0, 1, 0, 0)))
    assert seen == {7, 8, 9, 10}


def test_neighbors_of_a_short_last_chunk_reach_its_last_real_token_alone(model: RetroLM) -> None:
    batch = make_batch([[10]], 4)
    seen = positions_changed(model, batch, changed(batch, "neighbor_tokens", (0, 2, 0, 0)))
    assert {t for t in seen if t < 10} == {9}
    before = positions_changed(model, batch, changed(batch, "neighbor_tokens", (0, 1, 0, 0)))
    assert {t for t in before if t < 10} == {7, 8, 9}


def test_neighbors_of_padding_chunks_reach_nothing(model: RetroLM) -> None:
    batch = make_batch([[10]], 4)
    assert not positions_changed(model, batch, changed(batch, "neighbor_tokens", (0, 3)))


def test_the_encoder_is_conditioned_on_the_chunk_that_retrieved(model: RetroLM) -> None:
    batch = make_batch([[16]], 4)
    x = torch.randn(1, 16, 16, dtype=torch.float64)
    other = x.clone()
    other[0, 5] += 1.0
    real = torch.ones(1, 4, M, dtype=torch.bool)
    with torch.no_grad():
        a, b = (model._encode_neighbors(batch, activations, real) for activations in (x, other))
    difference = (a - b).abs().amax((-3, -2, -1))
    assert (difference > SEEN).tolist() == [False, True, False, False]


def test_masked_neighbor_tokens_change_nothing(model: RetroLM) -> None:
    batch = make_batch([[16]], 4)
    batch["neighbor_mask"][0, 1, 0, 5:] = False
    batch["neighbor_mask"][0, 2, 1] = False
    batch["neighbor_mask"][0, 0, 1, :M] = False
    for where in ((0, 1, 0, slice(5, None)), (0, 2, 1), (0, 0, 1, slice(M))):
        assert not positions_changed(model, batch, changed(batch, "neighbor_tokens", where))


def test_neighbors_are_a_set(model: RetroLM) -> None:
    batch = make_batch([[16]], 4)
    swapped = batch | {"neighbor_tokens": batch["neighbor_tokens"].flip(2)}
    assert not positions_changed(model, batch, swapped)


# --- documents that share a sequence --------------------------------------------------------------


@pytest.mark.parametrize("size_of_a", [5, 6, 8])
def test_no_logit_of_b_changes_with_the_tokens_or_neighbors_of_a(
    model: RetroLM, size_of_a: int
) -> None:
    """A's last chunk may have retrieved B's own text: planted here, it must stay unseen."""
    batch = make_batch([[size_of_a, 8]], 4)
    planted = {key: value.clone() for key, value in batch.items()}
    planted["neighbor_tokens"][0, 1] = batch["input_ids"][0, 8:16]
    seen = positions_changed(model, batch, planted)
    assert {t for t in seen if t < size_of_a} == {size_of_a - 1}
    assert not seen & set(range(8, 16))
    for t in range(size_of_a):
        seen = positions_changed(model, batch, changed(batch, "input_ids", (0, t)))
        assert not seen & set(range(8, 16))
    for u in (0, 1):
        seen = positions_changed(model, batch, changed(batch, "neighbor_tokens", (0, u)))
        assert not seen & set(range(8, 16))


@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone(model: RetroLM) -> None:
    packed = make_batch([[6, 7]], 4)
    alone = {key: value[:, 2:] for key, value in packed.items()}
    alone["input_ids"], alone["labels"] = packed["input_ids"][:, 8:], packed["labels"][:, 8:]
    difference = model(packed)[0, 8:15] - model(alone)[0, :7]
    assert difference.abs().max() < SEEN


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[int], int]:
    sizes = draw(st.lists(st.integers(1, 3 * M), min_size=0, max_size=4))
    used = sum(-(-size // M) for size in sizes)
    return sizes, used + draw(st.integers(0 if used else 1, 2))


@settings(deadline=None, max_examples=60)
@given(packed_rows())
def test_slots_follow_their_definition(row: tuple[list[int], int]) -> None:
    sizes, num_chunks = row
    batch = make_batch([sizes], num_chunks)
    lengths, documents = batch["chunk_lengths"], batch["document_ids"]
    expected = [num_chunks * M] * (num_chunks * M)
    for u, length in enumerate(lengths[0].tolist()):
        if length:
            expected[u * M + length - 1] = u * M
        if u and documents[0, u] == documents[0, u - 1]:
            for i in range(length - 1):
                expected[u * M + i] = (u - 1) * M + i + 1
    slots = neighbor_slots(lengths, documents, M)[0].tolist()
    assert slots == expected
    used = [slot for slot in slots if slot < num_chunks * M]
    assert len(used) == len(set(used))


# --- no neighbors ---------------------------------------------------------------------------------


def test_lists_without_neighbors_equal_retrieval_off_and_train() -> None:
    model = make_model()
    batch = make_batch([[15], [6, 7], []], 4)
    batch["neighbor_mask"] &= False
    batch["neighbor_tokens"].fill_(VOCAB)
    logits = model(batch)
    assert torch.equal(logits, model(batch, retrieval=False))
    assert logits.isfinite().all()
    token_nats(logits, batch["labels"]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.embedding.weight.grad is not None


def test_one_list_without_neighbors_leaves_its_window_to_the_residual() -> None:
    model = make_model(cross_attention_layers=[3]).double().eval()
    batch = make_batch([[16]], 4)
    batch["neighbor_mask"][0, 1] = False
    with torch.no_grad():
        difference = (model(batch) - model(batch, retrieval=False)).abs().amax(-1)[0]
    unserved = [0, 1, 2, 7, 8, 9, 10]
    assert (difference == 0).nonzero().flatten().tolist() == unserved


def test_only_rows_without_any_key_are_opened() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    assert open_empty_rows(mask).tolist() == [[True, False], [True, True]]


def test_a_batch_of_no_neighbors_is_retrieval_off() -> None:
    model = make_model()
    batch = make_batch([[15]], 4)
    none = batch | {key: batch[key][:, :, :0] for key in ("neighbor_tokens", "neighbor_mask")}
    assert torch.equal(model(none), model(batch, retrieval=False))


def test_a_share_of_the_loss_may_be_of_the_batch_without_neighbors() -> None:
    batch = make_batch([[15], [6, 7], []], 4)
    batch["labels"][0, :9] = -100  # a mean of labels, not of rows
    real = batch["labels"] != -100
    gradients = []
    for share in (0.0, 0.25):
        model = make_model(loss_without_retrieval=share).double()
        on, off = (
            token_nats(model(batch, way), batch["labels"])[real].mean() for way in (None, False)
        )
        total, losses = model.training_losses(batch)
        torch.testing.assert_close(total, (1 - share) * on + share * off)
        torch.testing.assert_close(losses, {"loss": on, "loss_off": off} if share else {"loss": on})
        (gradient,) = torch.autograd.grad(total, [model.embedding.weight])
        gradients.append(gradient)
    assert not torch.allclose(*gradients)
    without = make_model(retrieval=False, loss_without_retrieval=0.25)
    assert list(without.training_losses(batch)[1]) == ["loss"]


def test_gradients_reach_every_parameter() -> None:
    model = make_model()
    batch = make_batch([[15], [6, 7], []], 4)
    token_nats(model(batch), batch["labels"]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_equal_seeds_begin_with_equal_weights_with_and_without_retrieval() -> None:
    retro, plain = make_model().state_dict(), make_model(retrieval=False).state_dict()
    assert set(plain) < set(retro)
    assert all(torch.equal(weight, retro[name]) for name, weight in plain.items())


def test_built_without_retrieval_reads_no_neighbor_and_refuses_them() -> None:
    model = make_model(retrieval=False)
    batch = make_batch([[15]], 4)
    bare = {key: value for key, value in batch.items() if not key.startswith("neighbor")}
    assert model(bare).shape == (1, 16, VOCAB)
    assert not any("cross" in name or "encoder" in name for name, _ in model.named_parameters())
    with pytest.raises(RetroDataError, match="retrieval=True"):
        model(batch, retrieval=True)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_finite_and_near_float32(autocast: bool) -> None:
    batch = make_batch([[15], [6, 7], []], 4)
    model = make_model()
    exact = model(batch)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
    else:
        logits = model.to(torch.bfloat16)(batch)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert (logits.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)

    def product(a: int, b: int) -> float:
        at = rotation(torch.tensor([a, b], dtype=torch.float64), 8)
        return (rotate(q, at[:, :1]) * rotate(k, at[:, 1:])).sum().item()

    assert product(3, 1) == pytest.approx(product(103, 101))
    assert product(3, 1) != pytest.approx(product(1, 3))


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    factors = [learning_rate_factor(step, 4, 10) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[10] == factors[11] == pytest.approx(0.1)
    assert learning_rate_factor(10**6, 4, None) == learning_rate_factor(0, 0, None) == 1.0


# --- accounting -----------------------------------------------------------------------------------

LABELS = torch.tensor([[1, 2, 0, 9], [1, 9, -100, -100], [-100, -100, -100, -100]])
NATS = torch.tensor([[1.0, 2.0, 4.0, 8.0], [16.0, 32.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
SERVED = torch.tensor([[False, True, True, True], [False, True, True, True], [True] * 4])
BYTES = torch.tensor([5, 3, 2, 0, 0, 0, 0, 0, 0, 7])  # id 9 is eos, which is no text


def test_sums_of_a_hand_computed_example() -> None:
    sums = score_sums(NATS, LABELS, SERVED, BYTES, eos_id=9)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [
        [[23.0, 4.0, 13.0], [40.0, 2.0, 14.0]],
        [[6.0, 2.0, 7.0], [40.0, 2.0, 14.0]],
    ]
    assert score_figures(sums) == {
        "loss": pytest.approx(63 / 6),
        "loss_served": pytest.approx(46 / 4),
        "loss_eos": pytest.approx(40 / 2),
        "bits_per_byte": pytest.approx(23 / math.log(2) / 13),
        "bits_per_byte_served": pytest.approx(6 / math.log(2) / 7),
    }


def test_bits_per_token_stand_in_where_bytes_are_unknown() -> None:
    figures = score_figures(score_sums(NATS, LABELS, SERVED, torch.zeros_like(BYTES), eos_id=9))
    assert figures["bits_per_token"] == pytest.approx(23 / math.log(2) / 4)
    assert figures["bits_per_token_served"] == pytest.approx(6 / math.log(2) / 2)
    assert not any("byte" in name for name in figures)


def test_without_eos_every_label_is_text() -> None:
    sums = score_sums(NATS, LABELS, SERVED, BYTES, eos_id=None)
    assert sums[0].tolist() == [[63.0, 6.0, 27.0], [0.0, 0.0, 0.0]]
    assert "loss_eos" not in score_figures(sums)


def test_sums_add_over_any_split_and_rows_of_padding_count_nothing() -> None:
    whole = score_sums(NATS, LABELS, SERVED, BYTES, eos_id=9)
    parts = [
        score_sums(NATS[i : i + 1], LABELS[i : i + 1], SERVED[i : i + 1], BYTES, eos_id=9)
        for i in range(3)
    ]
    assert torch.equal(sum(parts[1:], parts[0]), whole)
    assert not parts[2].any()
    assert score_figures(parts[2]) == {}


def test_nats_are_those_of_the_labels_and_zero_elsewhere() -> None:
    logits = torch.randn(3, 4, 10)
    nats = token_nats(logits, LABELS)
    assert nats[0, 1] == pytest.approx(-logits[0, 1].log_softmax(-1)[2].item(), rel=1e-5)
    assert torch.equal(nats == 0, LABELS == -100)


def test_keys_are_shifted_in_half_of_the_heads_within_texts() -> None:
    real = torch.tensor([[1, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1]])
    follows = follows_in_text(real, documents)
    assert follows.tolist() == [[False, True, True, False, False, True, False]]
    assert follows_in_text(real)[0, -1]
    k = torch.arange(1.0, 8).repeat(3, 1)[None, ..., None]
    shifted = shift_keys(k, follows)[0, ..., 0].tolist()
    assert shifted == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 0, 5, 0]]


# --- learning -------------------------------------------------------------------------------------


def random_batch_with_planted_continuations(
    rows: int, generator: torch.Generator, offsets: range
) -> Batch:
    """Random text; a chunk's neighbor is 2 * M tokens of it that begin at the chunk's start + offset."""
    tokens = torch.randint(EOS, (rows, 7 * M), generator=generator)
    text = tokens[:, M:]
    offset = torch.randint(offsets.start, offsets.stop, (rows, 4, 1), generator=generator)
    start = M + M * torch.arange(4)[:, None]
    place = (start + offset + torch.arange(2 * M)).flatten(1)
    planted = tokens.gather(1, place).view(rows, 4, 1, 2 * M)
    ones = torch.ones(rows, 4, dtype=torch.int64)
    return {
        "input_ids": text[:, : 4 * M],
        "labels": text[:, 1 : 4 * M + 1],
        "chunk_lengths": M * ones,
        "neighbor_tokens": planted,
        "neighbor_mask": torch.ones_like(planted, dtype=torch.bool),
        "chunk_ids": torch.arange(4) * ones,
        "document_ids": torch.arange(rows)[:, None] * ones,
    }


@pytest.mark.parametrize("crossing", [False, True], ids=["itself", "neighbors"])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_attention_begins_by_handing_on_what_followed_a_token(seed: int, crossing: bool) -> None:
    """Of twenty random vectors; without `begin_to_copy` it is right once in twenty times."""
    torch.manual_seed(seed)
    count, width, head_dim, context_dim = 20, 64, 16, 32
    words, to_context = torch.randn(count, width), torch.randn(context_dim, width)
    attention = Attention(width, head_dim, context_dim if crossing else None)
    attention.begin_to_copy(to_context if crossing else None)
    at, place = rotation(torch.arange(2.0 * count), head_dim), torch.arange(2 * count)
    if crossing:
        visible = torch.ones(count, count, dtype=torch.bool)
        context = ((words @ to_context.T)[None], at[:, :count])
        gained = attention(words[None], at[:, count:], visible, place[None, :count] > 0, context)[0]
    else:
        visible = place[:, None] >= place
        gained = attention(torch.cat([words, words])[None], at, visible, place[None] > 0)[0, count:]
    nearest = (gained @ words.T).argmax(1)
    assert (nearest[:-1] == place[1:count]).float().mean() > 0.8


@pytest.mark.parametrize(
    ("offsets", "steps", "most"),
    [(range(1), 60, 0.2), (range(1 - M, M), 30, 0.85), (range(1 - M, M), 120, 0.6)],
    ids=["aligned", "anywhere-early", "anywhere"],  # the farther, the less of what follows it holds
)
def test_a_planted_continuation_is_learned_and_used(
    offsets: range, steps: int, most: float
) -> None:
    """Random text cannot be told from its past, so all gain is the neighbors'.

    Anywhere, a model without shifted keys comes to 0.9 of chance in 120 steps, one that does not
    begin to copy to 0.96 in 30.
    """
    model = make_model(width=32, layers=2, cross_attention_layers=[2], encoder_width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = random_batch_with_planted_continuations(16, generator, offsets)
        optimizer.zero_grad()
        token_nats(model(batch), batch["labels"]).mean().backward()
        optimizer.step()
    batch = random_batch_with_planted_continuations(128, generator, offsets)
    slots = neighbor_slots(batch["chunk_lengths"], batch["document_ids"], M)
    served = slots < slots.shape[1]
    with torch.no_grad():
        on = token_nats(model(batch), batch["labels"])
        off = token_nats(model(batch, retrieval=False), batch["labels"])
    chance = math.log(EOS)
    assert on[~served].mean() > 0.9 * chance
    assert off[served].mean() > 0.9 * chance
    assert on[served].mean() < most * chance


# --- under a Trainer ------------------------------------------------------------------------------


def make_trainer(folder: Path, **settings: object) -> Trainer:
    quiet: dict = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**(quiet | settings))


def make_loader(*batches: Batch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_fit_validate_checkpoint_and_load(tmp_path: Path) -> None:
    num_bytes = np.arange(VOCAB, dtype=np.uint8)
    model = make_model(
        vocab_size=np.int64(VOCAB),
        bytes_per_token=num_bytes,
        evaluate_without_retrieval=True,
        warmup_steps=2,
        decay_steps=20,
    )
    train = make_loader(*(make_batch([[15], [6, 7]], 4, seed) for seed in range(4)))
    held_out = make_loader(make_batch([[15], []], 4, 9), make_batch([[6, 7], [3]], 4, 10))
    trainer = make_trainer(tmp_path, max_epochs=2, log_every_n_steps=1)
    trainer.fit(model, train, held_out)
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    rate = model.hparams["learning_rate"] * learning_rate_factor(trainer.global_step, 2, 20)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)
    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)

    saved = torch.load(path, weights_only=True)
    assert type(saved["hyper_parameters"]["vocab_size"]) is int
    assert "bytes_per_token" not in saved["hyper_parameters"]
    loaded = RetroLM.load_from_checkpoint(path, map_location="cpu")
    assert loaded.bytes_per_token.tolist() == num_bytes.tolist()
    assert loaded.hparams == model.hparams
    torch.save(saved | {"retro_lm_revision": RetroLM.REVISION - 1}, tmp_path / "other.ckpt")
    with pytest.raises(RetroDataError, match="another model"):
        RetroLM.load_from_checkpoint(tmp_path / "other.ckpt", map_location="cpu")
    [figures] = make_trainer(tmp_path).validate(loaded, held_out, verbose=False)
    [tested] = make_trainer(tmp_path).test(loaded, held_out, verbose=False)
    names = {"loss", "loss_served", "loss_eos", "bits_per_byte", "bits_per_byte_served"}
    assert set(figures) == {f"val/{name}{off}" for name in names for off in ("", "_off")}
    assert tested == {f"test/{name.removeprefix('val/')}": v for name, v in figures.items()}

    nats, total = 0.0, 0
    for batch in held_out:
        is_text = (batch["labels"] != -100) & (batch["labels"] != EOS)
        with torch.no_grad():
            nats += token_nats(loaded(batch), batch["labels"])[is_text].sum().item()
        total += num_bytes[batch["labels"][is_text]].sum(dtype=int)
    assert figures["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / total, rel=1e-5)
    assert figures["val/loss"] != figures["val/loss_off"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_evaluation_counts_stay_exact_in_low_precision(tmp_path: Path, precision: str) -> None:
    """Neither labels nor bytes are rounded with the weights, nor as float32 would."""
    size = 2**25 + 1
    model = make_model(bytes_per_token=np.full(VOCAB, size))
    trainer = make_trainer(tmp_path, precision=precision)
    batch = make_batch([[15]], 4)
    trainer.validate(model, make_loader(batch), verbose=False)
    nats, labels, num_bytes = model._sums[""][0, 0].tolist()
    assert (labels, num_bytes) == (14, 14 * size)
    exact = token_nats(make_model()(batch), batch["labels"])[0, :14].sum().item()
    assert nats == pytest.approx(exact, rel=0.02)


def test_a_datamodule_gives_vocabulary_special_ids_and_bytes() -> None:
    datamodule = SimpleNamespace(
        vocab_size=VOCAB,
        pad_id=VOCAB,
        bos_id=None,
        eos_id=EOS,
        chunk_size=M,
        bytes_per_token=np.ones(VOCAB, dtype=np.int32),
    )
    model = RetroLM.from_datamodule(datamodule, width=16, layers=3, heads=2)
    assert model(make_batch([[15]], 4)).shape == (1, 16, VOCAB)
    assert model.embedding.weight.shape == (VOCAB + 1, 16)
    assert not model.embedding.weight[VOCAB].any()
    assert (model.eos_id, model.bytes_per_token.sum()) == (EOS, VOCAB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad_id": 0}, "pad_id=0, vocab_size=29"),
        ({"width": 18, "heads": 4}, "expected heads of one even size"),
        ({"encoder_width": 20}, "expected heads of one even size"),
        ({"cross_attention_layers": [2, 4]}, "cross_attention_every"),
        ({"cross_attention_layers": []}, "cross_attention_every"),
        ({"cross_attention_layers": None, "layers": 2}, "cross_attention_every"),
        ({"bytes_per_token": np.ones(VOCAB + 1)}, "bytes_per_token is"),
        ({"loss_without_retrieval": 1.0}, r"expected a share in \[0, 1\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(RetroDataError, match=message):
        make_model(**settings)


def test_a_batch_of_another_chunk_size_is_refused() -> None:
    with pytest.raises(RetroDataError, match="same chunk_size"):
        make_model(chunk_size=2 * M)(make_batch([[15]], 4))
