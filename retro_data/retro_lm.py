"""A compact reference RETRO decoder, the first user of the batch.

After Borgeaud et al. 2021, "Improving language models by retrieving from trillions of tokens"
(arXiv 2112.04426), section 2.4: some layers of a causal decoder also attend, chunk by chunk, the
encoded neighbors of the chunk before; an encoder reads these in both directions, conditioned on
the decoder's activations of the chunk they were retrieved for. Rotary positions stand in for the
paper's relative ones, and half of the heads see keys shifted by a token and begin by copying. Documents
may share a sequence.

Shapes: B rows, n = seq_len, m = chunk_size, l = n / m, k = num_neighbors, r = retrieved length.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from retro_data.errors import RetroDataError
from retro_data.leakage import ALPHAS
from retro_data.leakage_curve import (
    MEASURES,
    EvaluationLeakage,
    chunks_of_labels,
    curve,
    sums_of_bins,
)

if TYPE_CHECKING:
    from retro_data.data import RetroData

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "window_size" in inspect.signature(varlen_attn).parameters  # from torch 2.11 on
except ImportError:
    varlen_attn, HAS_VARLEN = None, False  # type: ignore[assignment]

IGNORED_LABEL = -100

# All but cuDNN, whose gradients are sometimes NaN from torch 2.11 on, given a mask and 64 keys, as a
# chunk has, or that many past a multiple of 128 (github.com/pytorch/pytorch/issues/196678).
ATTENTION_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Batch = Mapping[str, Tensor]
CrossAttend = Callable[["Attention", Tensor], Tensor]


def neighbor_slots(chunk_lengths: Tensor, document_ids: Tensor, chunk_size: int) -> Tensor:
    """Where each position stands in chunked cross-attention: the paper's causal shift.

    The neighbors of chunk u are attended from a window of m slots: slot 0 is u's last real token,
    slots 1 to m - 1 are the tokens of chunk u + 1 but its last real one, if u + 1 is of the same
    document. Nothing before u's last real token sees what u retrieved, and no document sees the
    neighbors of another. Full chunks of one document are merely shifted by m - 1.

    From chunk_lengths and document_ids (B, l) int64, (B, n) int64: u * m + slot, or n where no
    neighbors can be seen.
    """
    num_chunks = chunk_lengths.shape[1]
    offset = torch.arange(chunk_size, device=chunk_lengths.device)
    window = torch.arange(num_chunks, device=chunk_lengths.device)[:, None] * chunk_size
    last = chunk_lengths[..., None] - 1
    continues = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (1, 0))[..., None]
    previous = window - chunk_size + offset + 1
    slots = torch.where(continues & (offset < last), previous, num_chunks * chunk_size)
    return torch.where(offset == last, window, slots).flatten(1)


def token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood (B, n) float32 of labels (B, n), in nats; 0 where they are -100."""
    flat = logits.flatten(0, 1).float()
    nats = F.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return nats.view_as(labels)


def score_terms(
    nats: Tensor, labels: Tensor, served: Tensor, bytes_per_token: Tensor, eos_id: int | None
) -> Tensor:
    """What each position adds to the sums that all figures of an evaluation follow from.

    Args:
        nats, labels, served: (B, n) float, int64 (-100: no label), bool (neighbors can be seen).
        bytes_per_token: (vocab_size,) int64, bytes of text.
        eos_id: the label of a document's end, which is no text; None if there is none.
    Returns:
        (2, 2, 3, B, n) float64: (all, served) x (text, eos) x (nats, labels, bytes).
    """
    scored = labels != IGNORED_LABEL
    is_eos = labels == eos_id if eos_id is not None else torch.zeros_like(scored)
    kinds = torch.stack([scored & ~is_eos, scored & is_eos])
    chosen = torch.stack([kinds, kinds & served])[:, :, None]
    num_bytes = bytes_per_token[labels.clamp(min=0)]
    quantities = torch.stack([nats.double(), scored.double(), num_bytes.double()])
    return torch.where(chosen, quantities, 0.0)


def score_sums(
    nats: Tensor, labels: Tensor, served: Tensor, bytes_per_token: Tensor, eos_id: int | None
) -> Tensor:
    """The (2, 2, 3) sums of `score_terms`; they add up over batches and ranks."""
    return score_terms(nats, labels, served, bytes_per_token, eos_id).sum((-2, -1))


def score_figures(sums: Tensor) -> dict[str, float]:
    """The figures of an evaluation from its `score_sums`; one without any label is left out.

    `loss` is nats a label with eos, as in training, `loss_eos` that of eos alone. `bits_per_byte`
    is that of text: nats / ln 2 / bytes; `bits_per_token` takes its place where bytes are unknown
    (0). The suffix `_served` restricts a figure to positions that can see neighbors.
    """
    figures = {}
    for suffix, (text, eos) in zip(("", "_served"), sums.tolist(), strict=True):
        if labels := text[1] + eos[1]:
            figures[f"loss{suffix}"] = (text[0] + eos[0]) / labels
        if text[1]:
            unit, size = ("byte", text[2]) if text[2] else ("token", text[1])
            figures[f"bits_per_{unit}{suffix}"] = text[0] / math.log(2) / size
        if eos[1] and not suffix:
            figures["loss_eos"] = eos[0] / eos[1]
    return figures


def learning_rate_factor(step: int, warmup_steps: int, decay_steps: int | None) -> float:
    """Linear warm-up, then a cosine to a tenth at `decay_steps`; constant if that is None."""
    if step < warmup_steps or decay_steps is None:
        return min(1.0, (step + 1) / max(1, warmup_steps))
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    return 0.55 + 0.45 * math.cos(math.pi * progress)


def rotation(positions: Tensor, dim: int) -> Tensor:
    """Cosines and sines (2, t, dim / 2) that `rotate` turns vectors by at positions (t,)."""
    exponents = torch.arange(dim // 2, device=positions.device, dtype=positions.dtype) / (dim // 2)
    angles = positions[:, None] * 10_000.0**-exponents
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, at: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (..., t, d) by `rotation` (2, t, d / 2), in its dtype."""
    a, b = x.to(at.dtype).chunk(2, dim=-1)
    cos, sin = at
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class DocumentRuns(NamedTuple):
    """What causal attention within documents needs in the place of a mask of all pairs.

    Attributes:
        bounds: (B * l + 1,) int32, where a document begins in the rows laid end to end, ascending;
            behind the last begins nothing, at B * n.
        longest: at most so many tokens are of one.
    """

    bounds: Tensor
    longest: int


def document_runs(document_ids: Tensor, chunk_size: int) -> DocumentRuns:
    """The runs of equal document_ids (B, l) in a row; padding ends a run, so no text sees it."""
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    begins = F.pad(begins.flatten(), (0, 1), value=True)
    at = torch.arange(len(begins), device=begins.device, dtype=torch.int32) * chunk_size
    bounds = torch.where(begins, at, at[-1]).sort().values
    return DocumentRuns(bounds, document_ids.shape[1] * chunk_size)


def runs_can_be_attended(weight: Tensor, head_dim: int) -> bool:
    """Whether FlashAttention over runs of tokens (arXiv 2307.08691) can take what `weight` yields."""
    dtype = weight.dtype
    if torch.is_autocast_enabled("cuda") and dtype != torch.float64:  # which is left alone
        dtype = torch.get_autocast_dtype("cuda")
    return (
        HAS_VARLEN
        and weight.is_cuda
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | DocumentRuns) -> Tensor:
    """Attention of q (b, h, t, d) to k and v (b, h, s, d): where a mask is True, or within runs."""
    if isinstance(visible, DocumentRuns):
        bounds, longest = visible
        b = len(q)
        q, k, v = (rearrange(x, "b h t d -> (b t) h d") for x in (q, k, v))
        causal = (-1, 0)
        y = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=causal)
        return rearrange(cast(Tensor, y), "(b t) h d -> b h t d", b=b)
    with sdpa_kernel(ATTENTION_BACKENDS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def open_empty_rows(mask: Tensor) -> Tensor:
    """Lets queries without a visible key see all (no NaN); the caller discards what they get."""
    return mask | ~mask.any(-1, keepdim=True)


def norm_heads(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """In the dtype of x (b, h, t, d), whatever that of the weights: in half precision it is inexact."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def follows_in_text(real: Tensor, documents: Tensor | None = None) -> Tensor:
    """(..., t) bool: whether the token before, in a sequence, is the one before in a text, too.

    From real (..., t) bool and, if a sequence is of several, the documents (..., t) of its tokens.
    """
    follows = real[..., 1:] & real[..., :-1]
    if documents is not None:
        follows = follows & (documents[..., 1:] == documents[..., :-1])
    return F.pad(follows, (1, 0))


def shift_keys(k: Tensor, follows: Tensor) -> Tensor:
    """k (b, h, s, d), but in the latter h // 2 heads the keys of the token before.

    That is 0 for a token that `follows` (b, s) none of its text. A head that looks for the token at
    hand then finds what came after it elsewhere. To copy that, a model need not learn first, in a
    layer before, to hand each token on to the next (smeared keys: Olsson et al. 2022, arXiv
    2209.11895, argument 2).
    """
    own, others = k.tensor_split(2, dim=1)
    before = F.pad(others[:, :, :-1], (0, 0, 1, 0)).masked_fill(~follows[:, None, :, None], 0.0)
    return torch.cat([own, before], dim=1)


class Attention(nn.Module):
    """Pre-normed multi-head attention to the sequence itself or, if `context_dim`, to another.

    Queries and keys are normed in each head, so that attention stays trainable at high learning
    rates (Dehghani et al. 2023, arXiv 2302.05442, section 2), and half of the heads' keys are shifted
    (`shift_keys`).
    """

    def __init__(self, width: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = nn.RMSNorm(width)
        self.context_norm = nn.RMSNorm(context_dim) if context_dim else nn.Identity()
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_dim or width, 2 * width)
        self.query_norm, self.key_norm = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        at: Tensor,
        visible: Tensor | DocumentRuns,
        follows: Tensor,
        context: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The branch to add to x (b, t, w); the context is (b, s, context_dim).

        Each comes with the `rotation` of its positions. `visible` is a mask that broadcasts to
        (b, heads, t, s), or the runs of x that each see themselves up to the query; `follows`
        (b, s), of what is attended, is `follows_in_text`.
        """
        x = self.norm(x)
        source, source_at = (x, at) if context is None else context
        q = rearrange(self.query(x), "b t (h d) -> b h t d", d=self.head_dim)
        k, v = self.key_value(self.context_norm(source)).chunk(2, dim=-1)
        k, v = (rearrange(y, "b s (h d) -> b h s d", d=self.head_dim) for y in (k, v))
        q = rotate(norm_heads(q.to(at.dtype), self.query_norm), at).to(v.dtype)
        k = shift_keys(k, follows)
        k = rotate(norm_heads(k.to(at.dtype), self.key_norm), source_at).to(v.dtype)
        gained: Tensor = self.out(rearrange(attend(q, k, v, visible), "b h t d -> b t (h d)"))
        return gained

    @torch.no_grad()
    def begin_to_copy(self, to_context: Tensor | None = None) -> None:
        """Lets the heads with shifted keys begin by finding a token's like and handing on what follows.

        For that, queries begin equal to keys, and what comes out resembles what was attended:
        products near to the identity, as trained models come to have them (Trockman and Kolter 2023,
        arXiv 2305.09828). Where few tokens gain by copying, it is else not learned for long: each half
        of it is of no use without the other.

        Args:
            to_context: (context_dim, width), what a token's x is multiplied by in the context.
        """
        width = self.query.in_features
        key, value = self.key_value.weight.chunk(2)
        if to_context is not None:
            key, value = key @ to_context, value @ to_context
        copying = slice(width - width // self.head_dim // 2 * self.head_dim, width)
        self.query.weight[copying] = key[copying]
        self.query.bias[copying] = self.key_value.bias[:width][copying] = 0.0
        self.out.weight[:, copying] = value[copying].T * (3 * width) ** -0.5 / value.std()
        self.key_norm.weight.fill_(2.0)  # sharper: a like stands out from hundreds of others


class Layer(nn.Module):
    """Self-attention, cross-attention if it was given one, SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        hidden = 8 * math.ceil(width / 3)  # as many weights as two matrices of 4 * width
        self.attention = Attention(width, head_dim)
        self.cross_attention: Attention | None = None
        self.norm = nn.RMSNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        at: Tensor,
        visible: Tensor | DocumentRuns,
        follows: Tensor,
        cross: CrossAttend | None,
    ) -> Tensor:
        """x (b, t, w), the others as for `Attention`; `cross` gives it a context, None leaves it out."""
        x = x + self.dropout(self.attention(x, at, visible, follows))
        if self.cross_attention is not None and cross is not None:
            x = x + self.dropout(cross(self.cross_attention, x))
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (b, t, w) and what the gated network adds to it."""
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        gained: Tensor = self.dropout(self.down(F.silu(gate) * up))
        return x + gained


def _begin(layers: Sequence[Layer]) -> None:
    """First weights of what layers have without cross-attention."""
    for layer in layers:
        _shrink_branches(layer, len(layers))
        layer.attention.begin_to_copy()


@torch.no_grad()
def _shrink_branches(part: nn.Module, num_layers: int) -> None:
    """So that the residual stream does not grow with depth (Radford et al. 2019, section 2.3)."""
    for name, weight in part.named_parameters():
        if name.endswith(("out.weight", "down.weight")):
            weight.mul_((2 * num_layers) ** -0.5)


class RetroLM(LightningModule):
    """A RETRO decoder that takes the DataModule's batches as they are.

    Token embeddings are shared by decoder, neighbor encoder and output head. Logged are `train/loss`,
    `train/loss_off` if there is a `loss_without_retrieval`, and, over the whole split and all ranks,
    `val/` and `test/` with the names of `score_figures`; the suffix `_off` is for the same batches
    with neighbors off. After an evaluation of data whose leakage was measured, `leakage_curves` holds
    these figures over the chunks that leak at most so much (`retro_data.leakage_curve`).

    Args:
        vocab_size, pad_id, eos_id, bos_id: the DataModule's; bos_id is kept for generation.
        bytes_per_token: (vocab_size,) bytes of text of each id; None if not lossless.
        encoder_layers, encoder_width: its first layer attends the chunk that retrieved.
        cross_attention_every, cross_attention_layers: every such layer of the decoder attends
            neighbors, or these do, counted from 1.
        retrieval: False builds the same decoder without encoder and cross-attention.
        loss_without_retrieval: share of the loss that is of the same batch with neighbors off, in
            [0, 1); more than 0 costs a second pass. What can be copied from neighbors teaches the
            weights little, which then know less where there is nothing to copy.
        evaluate_without_retrieval: evaluate with neighbors off as well.
        beta2: of AdamW; the fewer tokens a batch has, the nearer to 1.
        warmup_steps, decay_steps: see `learning_rate_factor`.
    Raises:
        RetroDataError: sizes that do not fit together.
    """

    REVISION = 4  # of what equal weights compute and equal seeds begin with

    def __init__(
        self,
        vocab_size: int,
        pad_id: int,
        chunk_size: int = 64,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        encoder_layers: int = 2,
        encoder_width: int | None = None,
        cross_attention_every: int = 3,
        cross_attention_layers: Sequence[int] | None = None,
        retrieval: bool = True,
        loss_without_retrieval: float = 0.0,
        evaluate_without_retrieval: bool = False,
        learning_rate: float = 3e-4,
        beta2: float = 0.95,
        weight_decay: float = 0.1,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        dropout: float = 0.0,
        bytes_per_token: np.ndarray | Tensor | None = None,
        eos_id: int | None = None,
        bos_id: int | None = None,
    ) -> None:
        super().__init__()
        if cross_attention_layers is None:
            cross_attention_layers = range(cross_attention_every, layers + 1, cross_attention_every)
        cross_attention_layers = [int(layer) for layer in cross_attention_layers]
        encoder_width = encoder_width or width
        self.save_hyperparameters(ignore="bytes_per_token")
        for name, value in self.hparams.items():  # weights_only=True loads no numpy scalar
            self.hparams[name] = value.item() if isinstance(value, np.generic) else value
        self.head_dim = head_dim = width // heads
        if pad_id != vocab_size:
            raise RetroDataError(f"pad_id={pad_id}, vocab_size={vocab_size}: give the DataModule's")
        if width % (2 * heads) or encoder_width % head_dim:
            raise RetroDataError(
                f"width={width}, heads={heads}, encoder_width={encoder_width}: expected heads of "
                "one even size in both; change one of the three"
            )
        crossed = set(cross_attention_layers) if retrieval else set()
        if not crossed <= set(range(1, layers + 1)) or (retrieval and not crossed):
            raise RetroDataError(
                f"cross_attention_layers={cross_attention_layers}, expected some of 1 to {layers}"
                ": change them, cross_attention_every or layers, or set retrieval=False"
            )
        if not 0 <= loss_without_retrieval < 1:
            raise RetroDataError(
                f"loss_without_retrieval={loss_without_retrieval}, expected a share in [0, 1); to train "
                "without neighbors alone, set retrieval=False"
            )
        self.vocab_size, self.chunk_size, self.eos_id = vocab_size, chunk_size, eos_id
        self.retrieval, self.evaluate_without_retrieval = retrieval, evaluate_without_retrieval
        # Zeros stand for unknown: a checkpoint then loads whether or not it holds bytes.
        known = np.zeros(vocab_size) if bytes_per_token is None else np.asarray(bytes_per_token)
        if known.shape != (vocab_size,):
            raise RetroDataError(
                f"bytes_per_token is {known.shape}, expected ({vocab_size},) of vocab_size; "
                "take both from the DataModule"
            )
        self.bytes_per_token: Tensor
        self.register_buffer("bytes_per_token", torch.tensor(known, dtype=torch.int64))
        self.embedding = nn.Embedding(vocab_size + 1, width, padding_idx=pad_id)
        self.embedding.weight.data.mul_(0.02)  # as it is the output head, too
        decoder = [Layer(width, head_dim, dropout) for _ in range(layers)]
        self.decoder = nn.ModuleList(decoder)
        self.norm = nn.RMSNorm(width)
        _begin(decoder)
        # Last, so that from equal seeds the rest begins as it does without retrieval: a fair pair.
        if retrieval:
            self.to_encoder = nn.Linear(width, encoder_width, bias=False)
            encoder = [Layer(encoder_width, head_dim, dropout) for _ in range(encoder_layers)]
            self.encoder = nn.ModuleList(encoder)
            _begin(encoder)
            for layer in encoder[:1]:
                layer.cross_attention = Attention(encoder_width, head_dim, width)
                _shrink_branches(layer.cross_attention, encoder_layers)
            for number in sorted(crossed):
                layer = decoder[number - 1]
                layer.cross_attention = Attention(width, head_dim, encoder_width)
                _shrink_branches(layer.cross_attention, layers)
                layer.cross_attention.begin_to_copy(self.to_encoder.weight)
        self._sums: dict[str, Tensor] = {}
        self._leakage: EvaluationLeakage | None = None
        self._leakage_sums: dict[str, Tensor] = {}
        # By measure of leakage ("r", "r_seen"), of the evaluation that ended last.
        self.leakage_curves: dict[str, list[dict[str, float]]] = {}

    @classmethod
    def from_datamodule(cls, datamodule: RetroData, **settings: Any) -> RetroLM:
        """A model for a DataModule's vocabulary and chunk_size; `settings` are the others."""
        names = ("vocab_size", "pad_id", "bos_id", "eos_id", "chunk_size", "bytes_per_token")
        return cls(**{name: getattr(datamodule, name) for name in names} | settings)

    def forward(self, batch: Batch, retrieval: bool | None = None) -> Tensor:
        """Logits (B, n, vocab_size) of the next token; meaningless at padding.

        `retrieval` False leaves the neighbors unread; None is as the model was built.

        Raises:
            RetroDataError: another chunk_size, or retrieval by a model built without.
        """
        ids, lengths, documents = batch["input_ids"], batch["chunk_lengths"], batch["document_ids"]
        if ids.shape[1] != lengths.shape[1] * self.chunk_size:
            raise RetroDataError(
                f"found {ids.shape[1]} tokens in {lengths.shape[1]} chunks a row, expected chunks "
                f"of {self.chunk_size}; give DataModule and model the same chunk_size"
            )
        if retrieval and not self.retrieval:
            raise RetroDataError("the model has no cross-attention; build it with retrieval=True")
        retrieval = self.retrieval if retrieval is None else retrieval
        real = torch.arange(self.chunk_size, device=ids.device) < lengths[..., None]
        each_real, document = real.flatten(1), documents.repeat_interleave(self.chunk_size, dim=1)
        follows = follows_in_text(each_real, document)
        visible: Tensor | DocumentRuns
        if runs_can_be_attended(self.embedding.weight, self.head_dim):
            visible = document_runs(documents, self.chunk_size)
        else:
            visible = self._mask_of_pairs(document, each_real)
        slots = neighbor_slots(lengths, documents, self.chunk_size)
        encoded: Tensor | None = None

        def attend_neighbors(attention: Attention, x: Tensor) -> Tensor:
            nonlocal encoded
            if encoded is None:  # the activations of the first such layer condition the encoder
                encoded = self._encode_neighbors(batch, x, real)
            return self._chunked_cross_attention(attention, x, slots, encoded, batch)

        use = attend_neighbors if retrieval and batch["neighbor_tokens"].numel() else None
        x, at = self._embed(ids), self._rotation(0, ids.shape[1])
        for layer in self.decoder:
            x = layer(x, at, visible, follows, use)
        return F.linear(self.norm(x), self.embedding.weight[: self.vocab_size])

    def _embed(self, ids: Tensor) -> Tensor:
        """Scaled as in Vaswani et al. 2017, section 3.4: as small as the output head wants them,
        embeddings would drown in what the first layers add."""
        embedded: Tensor = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)
        return embedded

    def _mask_of_pairs(self, document: Tensor, real: Tensor) -> Tensor:
        """(B, 1, n, n), from (B, n) each: causal, within a document, without padding."""
        visible = (document[:, :, None] == document[:, None, :]) & real[:, None]
        return open_empty_rows(visible.tril())[:, None]

    def _rotation(self, start: int, stop: int) -> Tensor:
        weight = self.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return rotation(torch.arange(start, stop, device=weight.device, dtype=dtype), self.head_dim)

    def _encode_neighbors(self, batch: Batch, x: Tensor, real: Tensor) -> Tensor:
        """(B * l, k, r, encoder_width) from the decoder's activations x (B, n, w).

        All of chunk u conditions its neighbors: only its last real token and later ones see them.
        """
        each = batch["neighbor_mask"].flatten(0, 2)
        mask, follows = open_empty_rows(each[:, None, None]), follows_in_text(each)
        chunk_mask = open_empty_rows(rearrange(real, "b l m -> (b l) 1 1 m"))
        follows_in_chunk = follows_in_text(real.flatten(0, 1))
        chunks = rearrange(x, "b (l m) w -> (b l) m w", m=self.chunk_size)
        k, r = batch["neighbor_tokens"].shape[-2:]
        # A neighbor is aligned with the chunk that retrieved it: both start at position 0.
        context, at = (chunks, self._rotation(0, self.chunk_size)), self._rotation(0, r)
        at_of_all = at.repeat(1, k, 1)

        def attend_chunk(attention: Attention, e: Tensor) -> Tensor:
            e = rearrange(e, "(c k) r w -> c (k r) w", k=k)
            gained: Tensor = attention(e, at_of_all, chunk_mask, follows_in_chunk, context)
            return rearrange(gained, "c (k r) w -> (c k) r w", k=k)

        tokens = self._embed(batch["neighbor_tokens"].flatten(0, 2))
        e: Tensor = self.to_encoder(tokens).to(x.dtype)
        for layer in self.encoder:
            e = layer(e, at, mask, follows, attend_chunk)
        return rearrange(e, "(c k) r w -> c k r w", k=k)

    def _chunked_cross_attention(
        self, attention: Attention, x: Tensor, slots: Tensor, encoded: Tensor, batch: Batch
    ) -> Tensor:
        """What x (B, n, w) gains from neighbors: exactly 0 where none is visible.

        Given `neighbor_slots` (B, n) and the encoded neighbors (B * l, k, r, encoder_width).
        """
        (rows, tokens, width), (k, r) = x.shape, encoded.shape[1:3]
        index = slots[..., None].expand_as(x)
        # Slot n takes the positions that see no neighbors, and hands them 0 on the way back.
        windows = x.new_zeros(rows, tokens + 1, width).scatter(1, index, x)[:, :-1]
        windows = rearrange(windows, "b (l m) w -> (b l) m w", m=self.chunk_size)
        # A continuation is aligned with chunk u + 1, so slot 0, u's last token, is at m - 1.
        at = self._rotation(self.chunk_size - 1, 2 * self.chunk_size - 1)
        visible = rearrange(batch["neighbor_mask"], "b l k r -> (b l) 1 1 (k r)")
        follows = rearrange(follows_in_text(batch["neighbor_mask"]), "b l k r -> (b l) (k r)")
        context = encoded.flatten(1, 2), self._rotation(0, r).repeat(1, k, 1)
        gained = attention(windows, at, open_empty_rows(visible), follows, context)
        gained = gained.masked_fill(~visible.any(-1), 0.0)
        gained = rearrange(gained, "(b l) m w -> b (l m) w", b=rows)
        return F.pad(gained, (0, 0, 0, 1)).gather(1, index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says which model the weights are of."""
        checkpoint["retro_lm_revision"] = self.REVISION

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights that may compute something else here, or were begun otherwise.

        Raises:
            RetroDataError: a checkpoint of another `REVISION`.
        """
        found = checkpoint.get("retro_lm_revision", "none")
        if found != self.REVISION:
            raise RetroDataError(
                f"the checkpoint is of revision {found} of RetroLM, expected {self.REVISION}: its "
                "weights may be of another model. Train again, or use the retro_data that made it."
            )

    def training_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimized, and the mean nats of the batch's labels that it is made of, by name."""
        labels = batch["labels"]
        count = (labels != IGNORED_LABEL).sum().clamp(min=1)
        loss = token_nats(self(batch), labels).sum() / count
        share = self.hparams["loss_without_retrieval"]
        if not share or not self.retrieval:
            return loss, {"loss": loss}
        off = token_nats(self(batch, False), labels).sum() / count
        return torch.lerp(loss, off, share), {"loss": loss, "loss_off": off}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """What is minimized; logs what it is made of."""
        total, losses = self.training_losses(batch)
        rows = len(batch["labels"])
        for name, loss in losses.items():
            self.log(f"train/{name}", loss, prog_bar=name == "loss", batch_size=rows)
        return total

    def on_validation_epoch_start(self) -> None:
        """Empties the sums: one for each way of evaluating, by the suffix of its names."""
        ways = ["", "_off"] if self.retrieval and self.evaluate_without_retrieval else [""]
        self._sums = {way: torch.zeros(2, 2, 3, device=self.device).double() for way in ways}
        measured = getattr(getattr(self.trainer, "datamodule", None), "leakage", None)
        self._leakage = found.to(self.device) if measured and (found := measured()) else None
        shape = (len(MEASURES), len(ALPHAS), 2, 2, 3)
        self._leakage_sums = {w: torch.zeros(shape, device=self.device).double() for w in ways}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the batch to the sums."""
        labels = batch["labels"]
        bins = None
        if self._leakage is not None:
            ids, lengths = batch["chunk_ids"], batch["chunk_lengths"]
            bins = self._leakage.of_chunks(chunks_of_labels(ids, lengths, labels, self.eos_id))
        slots = neighbor_slots(batch["chunk_lengths"], batch["document_ids"], self.chunk_size)
        served = slots < labels.shape[1]
        for suffix, sums in self._sums.items():
            nats = token_nats(self(batch, False if suffix else None), labels)
            terms = score_terms(nats, labels, served, self.bytes_per_token, self.eos_id)
            sums += terms.sum((-2, -1))
            if bins is not None:
                for of_measure, one in zip(self._leakage_sums[suffix], bins, strict=True):
                    of_measure += sums_of_bins(terms, one)

    def on_validation_epoch_end(self) -> None:
        """Logs the figures of all ranks together."""
        split = "test" if self.trainer.testing else "val"
        for suffix, sums in self._sums.items():
            total = self.trainer.strategy.reduce(sums, reduce_op="sum")
            for name, value in score_figures(total).items():
                self.log(f"{split}/{name}{suffix}", value, prog_bar=name == "loss", sync_dist=True)

        if self._leakage is not None:
            self._draw_leakage_curves()

    def _draw_leakage_curves(self) -> None:
        reduce = self.trainer.strategy.reduce
        totals = {w: reduce(sums, reduce_op="sum") for w, sums in self._leakage_sums.items()}
        self.leakage_curves = {}
        for i, measure in enumerate(MEASURES):
            at_most = {way: total[i].cumsum(0) for way, total in totals.items()}
            figures = {way: [score_figures(s) for s in sums] for way, sums in at_most.items()}
            labels = at_most[""][:, 0, 0, 1].tolist()
            self.leakage_curves[measure] = curve(figures, labels)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its learning rate times `learning_rate_factor` of the step."""
        h = self.hparams
        rate, decay = h["learning_rate"], h["weight_decay"]
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim == 1]  # norms and biases do not decay
        optimizer = torch.optim.AdamW(matrices, rate, (0.9, h["beta2"]), weight_decay=decay)
        optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, h["warmup_steps"], h["decay_steps"])
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
