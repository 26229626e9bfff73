"""BERT-type encoders on a GPU: a forward pass of packed sequences, from token ids to finished vectors.

    ids ─► embed, layer norm ─► ┌ product q,k,v ─► attention ─► product + residual ─► layer norm ┐ x
                                └ product, GELU ─────────────► product + residual ─► layer norm ┘ layers
        ─► last layer norm, pooling, scaling, float16, each vector to its own row of the result

Sequences of any length lie one after the other in a fixed number of rows: no padding is computed but
at the end of the last batch, and every product has one of few shapes. A row's products do not depend
on the rows beside it, and the sizes in use are held against each other when the encoder is opened,
so that a text has the same bits in any batch.

The bias of a product that adds to the residual is added by the layer norm before it, and taken out of
the product that reads the same rows by that product's own bias: no kernel has to load it.
GELU is its tanh approximation, which library products compute in their epilogue.

With float8, all four products of a layer read e4m3: weights under one scale a matrix, activations under
fixed ones. A float loses no digits by its scale, only what lies beyond 448 / scale is cut. The residual,
norms and attention stay in float16.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from retro_data.bert_kernels_triton import (
    TAIL,
    TILE,
    attention_kernel,
    embed_kernel,
    layer_norm_kernel,
    long_attention_kernel,
    pool_kernel,
)
from retro_data.cublaslt import CublasLt, CublasLtError, Kind, Scales

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Product = Callable[[Tensor, Tensor], None]  # a, out -> out = gelu?(a w^T + bias), or out += a w^T

ARCHITECTURES = ("BertModel", "RobertaModel", "XLMRobertaModel", "CamembertModel")
# 4,096 chunks of 64 + 2 tokens, and 1,056 tiles of 256 rows: products of 768, 2,304 and 3,072 columns
# are whole waves of the 132 multiprocessors of an H100.
FULL_ROWS = 270_336
NORM_ROWS, NORM_STEPS = 2, 8  # of a layer norm program: every size is a multiple of their product
ROW_STEP = NORM_ROWS * NORM_STEPS
SIZE_RATIO = 8  # between sizes
LEAST_ROWS = 2048  # of a smaller size: below it products no longer fill a GPU
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = 448.0
NORM_SCALE, ATTENDED_SCALE, INNER_SCALE = 8.0, 16.0, 8.0  # of activations in float8
WORTH = 0.75  # of a size that must be filled before it is preferred to several smaller ones
MOST_PARTS = 6


class Batch(NamedTuple):
    """Sequences first, first + 1, … of a table, in `rows` rows; they stand in order of length."""

    rows: int
    first: int
    sequences: int
    longest: int
    in_tile: int  # sequences of at most TILE tokens, then those of at most TILE + TAIL
    with_tail: int


def pack(sizes: Array, extra: int, row_sizes: Sequence[int]) -> tuple[Array, Array, list[Batch]]:
    """Share texts out among batches.

    Args:
        sizes: (n,) tokens of each text, without specials.
        extra: specials of a text.
        row_sizes: numbers of rows that a batch may have, the largest first.

    Returns:
        order (m,) of the texts that have tokens, the first row of each in its batch (m,), batches.
    """
    order = np.argsort(sizes, kind="stable")
    order = order[np.searchsorted(sizes[order], 1) :]
    lengths = sizes[order] + extra
    ends = np.cumsum(lengths)
    first_rows = ends - lengths
    tiles = np.searchsorted(lengths, [TILE.value, TILE.value + TAIL.value], "right")
    batches, start = [], 0
    while start < len(order):
        left = int(ends[-1] - first_rows[start])
        fitting = [r for r in row_sizes if r >= lengths[start]]
        rows = next((r for r in fitting if left >= WORTH * r), fitting[-1])
        stop = int(np.searchsorted(ends, first_rows[start] + rows, "right"))
        in_tile, with_tail = (np.clip(tiles, start, stop) - start).tolist()
        longest = int(lengths[stop - 1])
        batches.append(Batch(rows, start, stop - start, longest, in_tile, with_tail - in_tile))
        first_rows[start:stop] -= first_rows[start]
        start = stop
    return order, first_rows, batches


def obstacle(model: Any) -> str | None:
    """Why this encoder cannot be run here; None if it can."""
    config, kind = model.config, type(model).__name__
    if kind not in ARCHITECTURES:
        return f"{kind} is none of {', '.join(ARCHITECTURES)}"
    dim = config.hidden_size // config.num_attention_heads
    width = config.hidden_size & -config.hidden_size
    known = {
        "hidden_act": config.hidden_act in ("gelu", "gelu_new", "gelu_pytorch_tanh"),
        "position_embedding_type": getattr(config, "position_embedding_type", None)
        in (None, "absolute"),
        "is_decoder": not config.is_decoder,
        "num_attention_heads": dim in (16, 32, 64, 128),
        "hidden_size": config.hidden_size // width <= MOST_PARTS,
        "intermediate_size": config.intermediate_size % 8 == 0,
    }
    odd = [f"{name}={getattr(config, name)}" for name, fine in known.items() if not fine]
    return f"its config has {', '.join(odd)}" if odd else None


class _Norm(NamedTuple):
    gamma: Tensor  # (H,) float32
    beta: Tensor


class _Layer(NamedTuple):
    qkv: Product
    attention_output: Product
    attention_norm: _Norm
    intermediate: Product
    output: Product
    output_norm: _Norm


class FusedBert:
    """An encoder made ready on one device.

    Args:
        model: of transformers, in float32 on the CPU, without `obstacle`.
        dtype: torch.float16 or torch.bfloat16, of weights and activations; torch.float8_e4m3fn: of
            products, by cuBLASLt alone, and the rest in float16.
        device: a CUDA device ("cpu" only under Triton's interpreter).
        prefix, suffix: ids around a text.
        pooling: "mean" over the text's own tokens, or "cls".
        normalize: scale vectors to length 1.
        rows: of the largest batch; its activations take about 10 * hidden_size bytes a row.
        longest: tokens of a sequence at most, specials included.

    Attributes:
        row_sizes: numbers of rows of a batch, for `pack`.
        products: "cublaslt", or "torch" where that cannot be had.

    Raises:
        CublasLtError: float8, and no cuBLASLt that multiplies it.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        device: torch.device,
        *,
        prefix: Sequence[int],
        suffix: Sequence[int],
        pooling: str,
        normalize: bool,
        longest: int,
        rows: int = FULL_ROWS,
    ) -> None:
        config = model.config
        self.float8 = dtype == FLOAT8
        self.dtype = torch.float16 if self.float8 else dtype
        self.device = device
        self.hidden, self.heads = config.hidden_size, config.num_attention_heads
        self.intermediate = config.intermediate_size
        self.prefix, self.extra = len(prefix), len(prefix) + len(suffix)
        self.cls, self.normalize = pooling == "cls", normalize
        self.longest = longest
        self.specials = torch.tensor([*prefix, *suffix] or [0], dtype=torch.int32, device=device)
        parts = self.hidden // min(self.hidden & -self.hidden, 1024)
        self._shape = {"HIDDEN": self.hidden, "PARTS": parts, "EPS": config.layer_norm_eps}
        self._narrow_shape = {**self._shape, "NARROW": NORM_SCALE if self.float8 else 0}
        rows = -(-max(rows, longest) // ROW_STEP) * ROW_STEP
        self._x = torch.zeros(rows, self.hidden, dtype=self.dtype, device=device)
        # What products read: x itself, or what layer norms write beside it.
        self._input = torch.zeros_like(self._x, dtype=FLOAT8) if self.float8 else self._x
        # q, k, v and the attended values are done with when the inner activations begin.
        width = max(4 * self.hidden, self.intermediate)
        self._scratch = torch.zeros(rows * width, dtype=self.dtype, device=device)
        with torch.inference_mode():
            try:
                self._open(model, rows, CublasLt(device))
            except CublasLtError as error:
                if self.float8:
                    raise
                log.info("products by torch: %s", error)
                self._open(model, rows, None)

    def _open(self, model: Any, rows: int, library: CublasLt | None) -> None:
        self.products = "torch" if library is None else "cublaslt"
        self._load(model, library)
        self.row_sizes = self._sizes_that_agree(rows)

    # ---- forward ----

    def forward(self, ids: Tensor, table: Tensor, batch: Batch, out: Tensor) -> None:
        """Write the vectors of one batch to their rows of `out`; nothing waits for the device.

        Args:
            ids: flat int32 ids of the texts.
            table: (m, 4) int32: where a text begins in `ids`, its tokens, its first row in the batch,
                its row of `out`.
            out: (n, H) float16.
        """
        rows = batch.rows
        x, read = self._x[:rows], self._input[:rows]
        qkv = self._scratch[: rows * 3 * self.hidden].view(rows, -1)
        free = self._scratch[rows * 3 * self.hidden :].view(read.dtype)
        attended = free[: rows * self.hidden].view(rows, -1)
        inner = self._scratch.view(read.dtype)[: rows * self.intermediate].view(rows, -1)
        self._embed(ids, table, batch)
        for i, layer in enumerate(self.layers):
            layer.qkv(read, qkv)
            self._attend(qkv, table, batch, attended)
            layer.attention_output(attended, x)
            self._layer_norm(x, layer.attention_norm)
            layer.intermediate(read, inner)
            layer.output(inner, x)
            if i + 1 < len(self.layers):
                self._layer_norm(x, layer.output_norm)
        self._pool(x, table, batch, out)

    def _embed(self, ids: Tensor, table: Tensor, batch: Batch) -> None:
        grid = (batch.sequences, -(-batch.longest // 4))
        tensors = (ids, table, self.specials, self.words, self.positions, *self.norm)
        options = {"PREFIX": self.prefix, "EXTRA": self.extra, "ROWS": 4, "num_warps": 2}
        written = (self._x, self._input)
        embed_kernel[grid](*tensors, *written, batch.first, **options, **self._narrow_shape)

    def _attend(self, qkv: Tensor, table: Tensor, batch: Batch, out: Tensor) -> None:
        dim = self.hidden // self.heads
        options = {
            "EXTRA": self.extra,
            "HEADS": self.heads,
            "DIM": dim,
            "SCALE": math.log2(math.e) / math.sqrt(dim),
            "OUT_SCALE": ATTENDED_SCALE if self.float8 else 1,
            "num_warps": 4,
        }
        first = batch.first
        for count, has_tail in ((batch.in_tile, False), (batch.with_tail, True)):
            if count:
                grid = (count * self.heads,)
                attention_kernel[grid](qkv, table, out, first, HAS_TAIL=has_tail, **options)
            first += count
        long = batch.sequences - batch.in_tile - batch.with_tail
        if long:
            long_grid = (long * self.heads, -(-batch.longest // TILE.value))
            long_attention_kernel[long_grid](qkv, table, out, first, **options)

    def _layer_norm(self, x: Tensor, norm: _Norm) -> None:
        options = {"ROWS": NORM_ROWS, "STEPS": NORM_STEPS, "num_warps": 1}
        grid = (len(x) // ROW_STEP,)
        layer_norm_kernel[grid](x, self._input, *norm, **options, **self._narrow_shape)

    def _pool(self, x: Tensor, table: Tensor, batch: Batch, out: Tensor) -> None:
        options = {"PREFIX": self.prefix, "CLS": self.cls, "NORMALIZE": self.normalize}
        tensors = (x, table, *self.layers[-1].output_norm, out)
        pool_kernel[(batch.sequences,)](
            *tensors, batch.first, ROWS=4, num_warps=4, **options, **self._shape
        )

    # ---- weights ----

    def _load(self, model: Any, library: CublasLt | None) -> None:
        embeddings, layers = model.embeddings, list(model.encoder.layer)
        self.words = self._put(embeddings.word_embeddings.weight, self.dtype)
        # RoBERTa and its kin count positions from behind the pad id.
        padding = getattr(embeddings, "padding_idx", None)
        offset = 0 if padding is None else padding + 1
        places = embeddings.position_embeddings.weight[offset : offset + self.longest].float()
        kind = embeddings.token_type_embeddings.weight[0].float()
        self.positions = self._put(places + kind, torch.float32)
        # Biases that each layer norm adds for the residual product behind it.
        ahead = [layer.attention.output.dense.bias.float() for layer in layers]
        ahead.append(torch.zeros_like(ahead[0]))
        self.norm = self._norm(embeddings.LayerNorm, ahead[0])
        make = self._product_maker(library)
        self.layers = []
        for i, layer in enumerate(layers):
            own, output = layer.attention.self, layer.attention.output
            down = layer.output.dense.bias.float()
            weight = torch.cat([own.query.weight, own.key.weight, own.value.weight])
            bias = torch.cat([own.query.bias, own.key.bias, own.value.bias])
            up = layer.intermediate.dense
            self.layers.append(
                _Layer(
                    make("qkv", weight, self._less(bias, weight, ahead[i])),
                    make("attention_output", output.dense.weight, None),
                    self._norm(output.LayerNorm, down),
                    make("intermediate", up.weight, self._less(up.bias, up.weight, down)),
                    make("output", layer.output.dense.weight, None),
                    self._norm(layer.output.LayerNorm, ahead[i + 1]),
                )
            )

    def _put(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.detach().to(dtype).to(self.device).contiguous()

    def _norm(self, norm: Any, added: Tensor) -> _Norm:
        beta = norm.bias.float() + added
        return _Norm(self._put(norm.weight, torch.float32), self._put(beta, torch.float32))

    def _less(self, bias: Tensor, weight: Tensor, added: Tensor) -> Tensor:
        """The bias without what `added` brings in through the weight, as rounded as it is used."""
        if self.float8:
            narrow, scale = _in_float8(weight.detach())
            return bias.float() - narrow.float() @ added * scale
        return bias.float() - weight.to(self.dtype).float() @ added

    def _product_maker(
        self, library: CublasLt | None
    ) -> Callable[[str, Tensor, Tensor | None], Product]:
        kinds: dict[str, Kind] = {}

        def make(name: str, weight: Tensor, bias: Tensor | None) -> Product:
            kind, gelu = kinds.setdefault(name, Kind()), name == "intermediate"
            if self.float8:
                assert library is not None
                return self._float8_product(library, name, weight, bias, kind)
            weight = self._put(weight, self.dtype)
            bias = None if bias is None else self._put(bias, self.dtype)
            if library is None:
                return TorchProduct(weight, bias, gelu)
            return library.product(weight, bias, gelu, kind)

        return make

    def _float8_product(
        self, library: CublasLt, name: str, weight: Tensor, bias: Tensor | None, kind: Kind
    ) -> Product:
        inner = name == "intermediate"  # whose result is read by a product again
        read = {"attention_output": ATTENDED_SCALE, "output": INNER_SCALE}.get(name, NORM_SCALE)
        narrow, scale = _in_float8(weight.detach())
        scales = Scales(
            torch.tensor([scale / read], device=self.device),
            torch.tensor([INNER_SCALE], device=self.device) if inner else None,
        )
        if bias is not None:  # beside a result in float8 it is of bfloat16
            bias = self._put(bias, torch.bfloat16 if inner else self.dtype)
        return library.product(self._put(narrow, FLOAT8), bias, inner, kind, scales)

    # ---- sizes ----

    def _sizes_that_agree(self, rows: int) -> tuple[int, ...]:
        """The largest size, and smaller ones whose products give the same bits.

        Opens what opens at first use too: kernels are compiled, algorithms chosen on activations.
        """
        smaller = [max(rows // SIZE_RATIO**i // ROW_STEP * ROW_STEP, 0) for i in (1, 2)]
        smaller = [size for size in smaller if size >= LEAST_ROWS]
        length = min(self.longest, TILE.value + self.extra)
        size = length - self.extra
        count = rows // length
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(self.words), (count * size,), generator=generator).int()
        ids = ids.to(self.device)
        order = np.arange(count)
        table = np.stack([order * size, np.full(count, size), order * length, order], 1)
        table = torch.from_numpy(table.astype(np.int32)).to(self.device)
        found = torch.zeros(2, count, self.hidden, dtype=torch.float16, device=self.device)
        agree = [rows]
        for tried in (rows, *smaller):
            some = min(count, tried // length)
            tail = some if length > TILE.value else 0
            target = found[0 if tried == rows else 1]
            self.forward(ids, table, Batch(tried, 0, some, length, some - tail, tail), target)
            bits = found[:, :some].view(torch.int16)
            if tried != rows and torch.equal(bits[0], bits[1]):
                agree.append(tried)
        if len(agree) <= len(smaller):
            log.info("batches of %s rows: smaller ones of %s do not agree", agree, smaller)
        return tuple(agree)


def _in_float8(weight: Tensor) -> tuple[Tensor, float]:
    """A matrix in float8, and the scale that makes it whole again."""
    scale = float(weight.abs().max()) / FLOAT8_MOST or 1.0
    return (weight.float() / scale).to(FLOAT8), scale


class TorchProduct:
    """out = gelu?(a weight^T + bias), or out += a weight^T where there is no bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        self.weight, self.bias, self.gelu = weight.t(), bias, gelu

    def __call__(self, a: Tensor, out: Tensor) -> None:
        if self.bias is None:
            out.addmm_(a, self.weight)
        elif self.gelu:
            torch._addmm_activation(self.bias, a, self.weight, use_gelu=True, out=out)
        else:
            torch.addmm(self.bias, a, self.weight, out=out)
