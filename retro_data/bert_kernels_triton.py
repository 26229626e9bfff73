"""Triton kernels of a BERT forward pass on packed sequences (`bert_triton` says what that is).

A *table* of four int32 columns describes the sequences: where a text's ids begin among all ids, how
many they are, the first row of the sequence among the rows of its batch, and the row of the result
that its vector takes. Kernels take the number of the batch's first sequence in the table.

Rows of `HIDDEN` columns are held in `PARTS` parts of a power of two, so that 768 = 3 x 256 columns
waste no lane.

What a product of float8 reads is written in e4m3, times a scale: by layer norms beside their result,
to `narrow`, where NARROW is that scale and not 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # tokens of one tile of attention
TAIL = tl.constexpr(16)  # tokens of the small tile behind it
COLUMNS = tl.constexpr(4)  # of the table


# ---- layer norm ----------------------------------------------------------------------------------


@triton.jit
def _load_parts(pointers, mask, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Rows of float32, as a tuple of (rows, WIDTH) parts."""
    parts = (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    for i in tl.static_range(1, PARTS):
        parts = parts + (tl.load(pointers + i * WIDTH, mask=mask, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def _centered(parts, HIDDEN: tl.constexpr, PARTS: tl.constexpr):
    total = tl.sum(parts[0], 1)
    for i in tl.static_range(1, PARTS):
        total += tl.sum(parts[i], 1)
    mean = (total / HIDDEN)[:, None]
    centered = (parts[0] - mean,)
    for i in tl.static_range(1, PARTS):
        centered = centered + (parts[i] - mean,)
    return centered


@triton.jit
def _inverse_deviation(centered, HIDDEN: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr):
    total = tl.sum(centered[0] * centered[0], 1)
    for i in tl.static_range(1, PARTS):
        total += tl.sum(centered[i] * centered[i], 1)
    return tl.rsqrt(total / HIDDEN + EPS)[:, None]


@triton.jit(do_not_specialize=["first"])
def embed_kernel(
    ids,
    table,
    specials,
    words,
    positions,
    gamma,
    beta,
    out,
    narrow,
    first,
    PREFIX: tl.constexpr,
    EXTRA: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Layer norm of word and position embeddings of ROWS tokens of one sequence.

    `specials` holds the EXTRA ids that stand around a text, the first PREFIX of them before it.
    """
    WIDTH: tl.constexpr = HIDDEN // PARTS
    entry = table + (first + tl.program_id(0)) * COLUMNS
    source = tl.load(entry)
    size = tl.load(entry + 1)
    position = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = position < size + EXTRA
    own = (position >= PREFIX) & (position < PREFIX + size)
    special = tl.where(position < PREFIX, position, position - size)
    word = tl.load(ids + source + position - PREFIX, mask=own, other=0)
    word += tl.load(specials + special, mask=valid & ~own, other=0)
    column = tl.arange(0, WIDTH)[None, :]
    mask = valid[:, None]
    word_parts = _load_parts(
        words + word.to(tl.int64)[:, None] * HIDDEN + column, mask, WIDTH, PARTS
    )
    place_parts = _load_parts(positions + position[:, None] * HIDDEN + column, mask, WIDTH, PARTS)
    parts = (word_parts[0] + place_parts[0],)
    for i in tl.static_range(1, PARTS):
        parts = parts + (word_parts[i] + place_parts[i],)
    parts = _centered(parts, HIDDEN, PARTS)
    scale = _inverse_deviation(parts, HIDDEN, PARTS, EPS)
    row = (tl.load(entry + 2) + position).to(tl.int64)
    place = row[:, None] * HIDDEN + column
    for i in tl.static_range(PARTS):
        weight = tl.load(gamma + i * WIDTH + column)
        value = parts[i] * scale * weight + tl.load(beta + i * WIDTH + column)
        tl.store(out + place + i * WIDTH, value.to(out.dtype.element_ty), mask=mask)
        if NARROW != 0:
            scaled = (value * NARROW).to(narrow.dtype.element_ty)
            tl.store(narrow + place + i * WIDTH, scaled, mask=mask)


@triton.jit
def layer_norm_kernel(
    x,
    narrow,
    gamma,
    beta,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    EPS: tl.constexpr,
    NARROW: tl.constexpr,
):
    """Layer norm of ROWS x STEPS rows, in place. The number of rows is a multiple of that."""
    WIDTH: tl.constexpr = HIDDEN // PARTS
    column = tl.arange(0, WIDTH)[None, :]
    weights = _load_parts(gamma + column, column >= 0, WIDTH, PARTS)
    biases = _load_parts(beta + column, column >= 0, WIDTH, PARTS)
    start = tl.program_id(0).to(tl.int64) * (ROWS * STEPS)
    place = (start + tl.arange(0, ROWS))[:, None] * HIDDEN + column
    for _ in range(STEPS):
        parts = _load_parts(x + place, column >= 0, WIDTH, PARTS)
        parts = _centered(parts, HIDDEN, PARTS)
        scale = _inverse_deviation(parts, HIDDEN, PARTS, EPS)
        for i in tl.static_range(PARTS):
            value = parts[i] * scale * weights[i] + biases[i]
            tl.store(x + place + i * WIDTH, value.to(x.dtype.element_ty))
            if NARROW != 0:
                tl.store(narrow + place + i * WIDTH, (value * NARROW).to(narrow.dtype.element_ty))
        place += ROWS * HIDDEN


@triton.jit(do_not_specialize=["first"])
def pool_kernel(
    x,
    table,
    gamma,
    beta,
    out,
    first,
    PREFIX: tl.constexpr,
    CLS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    """The last layer norm of one sequence, averaged over the text's own tokens (CLS: its first row)."""
    WIDTH: tl.constexpr = HIDDEN // PARTS
    entry = table + (first + tl.program_id(0)) * COLUMNS
    count = tl.load(entry + 1)
    start = tl.load(entry + 2).to(tl.int64) + PREFIX
    if CLS:
        count = 1
        start -= PREFIX
    column = tl.arange(0, WIDTH)
    sums = (tl.zeros((ROWS, WIDTH), tl.float32),)
    for _ in tl.static_range(1, PARTS):
        sums = sums + (tl.zeros((ROWS, WIDTH), tl.float32),)
    for step in range(0, count, ROWS):
        token = step + tl.arange(0, ROWS)
        mask = (token < count)[:, None]  # a masked row is all zeros, and so are its deviations
        place = x + (start + token)[:, None] * HIDDEN + column[None, :]
        parts = _centered(_load_parts(place, mask, WIDTH, PARTS), HIDDEN, PARTS)
        scale = _inverse_deviation(parts, HIDDEN, PARTS, EPS)
        added = (sums[0] + parts[0] * scale,)
        for i in tl.static_range(1, PARTS):
            added = added + (sums[i] + parts[i] * scale,)
        sums = added
    length = 0.0
    means = (tl.sum(sums[0], 0) / count * tl.load(gamma + column) + tl.load(beta + column),)
    for i in tl.static_range(1, PARTS):
        mean = tl.sum(sums[i], 0) / count * tl.load(gamma + i * WIDTH + column)
        means = means + (mean + tl.load(beta + i * WIDTH + column),)
    factor = 1.0
    if NORMALIZE:
        for i in tl.static_range(PARTS):
            length += tl.sum(means[i] * means[i], 0)
        factor = 1.0 / tl.maximum(tl.sqrt(length), 1e-12)
    target = out + tl.load(entry + 3).to(tl.int64) * HIDDEN + column
    for i in tl.static_range(PARTS):
        tl.store(target + i * WIDTH, (means[i] * factor).to(out.dtype.element_ty))


# ---- attention -----------------------------------------------------------------------------------


@triton.jit
def _weighted_values(q, k, v, key_mask, k_tail, v_tail, tail_mask, SCALE: tl.constexpr, HAS_TAIL):
    """softmax(q k^T) v over one tile of keys and, with HAS_TAIL, a small one behind it."""
    scores = tl.where(key_mask[None, :], tl.dot(q, k.T) * SCALE, float("-inf"))
    top = tl.max(scores, 1)
    if HAS_TAIL:
        more = tl.where(tail_mask[None, :], tl.dot(q, k_tail.T) * SCALE, float("-inf"))
        top = tl.maximum(top, tl.max(more, 1))
    scores = tl.exp2(scores - top[:, None])
    total = tl.sum(scores, 1)
    values = tl.dot(scores.to(v.dtype), v)
    if HAS_TAIL:
        more = tl.exp2(more - top[:, None])
        total += tl.sum(more, 1)
        values = tl.dot(more.to(v.dtype), v_tail, values)
    return values / total[:, None]


@triton.jit(do_not_specialize=["first"])
def attention_kernel(
    qkv,
    table,
    out,
    first,
    EXTRA: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
):
    """One head of a sequence of at most TILE tokens (with HAS_TAIL TILE + TAIL), from packed q, k, v.

    A chunk of 64 tokens between [CLS] and [SEP] is 64 + 2: in tiles of 64 alone half of the second
    row and column of tiles, three quarters of the products, would be padding.
    SCALE is log2(e) / sqrt(DIM), OUT_SCALE that of the values written.
    """
    HIDDEN: tl.constexpr = HEADS * DIM
    entry = table + (first + tl.program_id(0) // HEADS) * COLUMNS
    length = tl.load(entry + 1) + EXTRA
    start = tl.load(entry + 2).to(tl.int64)
    head = tl.program_id(0) % HEADS
    qkv += start * (3 * HIDDEN) + head * DIM
    out += start * HIDDEN + head * DIM
    column = tl.arange(0, DIM)[None, :]
    row = tl.arange(0, TILE)
    mask = row < length
    place = qkv + row[:, None] * (3 * HIDDEN) + column
    q = tl.load(place, mask=mask[:, None], other=0.0)
    k = tl.load(place + HIDDEN, mask=mask[:, None], other=0.0)
    v = tl.load(place + 2 * HIDDEN, mask=mask[:, None], other=0.0)
    target = out + row[:, None] * HIDDEN + column
    if HAS_TAIL:
        tail_row = TILE + tl.arange(0, TAIL)
        tail_mask = tail_row < length
        place = qkv + tail_row[:, None] * (3 * HIDDEN) + column
        q_tail = tl.load(place, mask=tail_mask[:, None], other=0.0)
        k_tail = tl.load(place + HIDDEN, mask=tail_mask[:, None], other=0.0)
        v_tail = tl.load(place + 2 * HIDDEN, mask=tail_mask[:, None], other=0.0)
        values = _weighted_values(q, k, v, mask, k_tail, v_tail, tail_mask, SCALE, True)
        tl.store(target, (values * OUT_SCALE).to(out.dtype.element_ty), mask=mask[:, None])
        values = _weighted_values(q_tail, k, v, mask, k_tail, v_tail, tail_mask, SCALE, True)
        target = out + tail_row[:, None] * HIDDEN + column
        tl.store(target, (values * OUT_SCALE).to(out.dtype.element_ty), mask=tail_mask[:, None])
    else:
        values = _weighted_values(q, k, v, mask, k, v, mask, SCALE, False)
        tl.store(target, (values * OUT_SCALE).to(out.dtype.element_ty), mask=mask[:, None])


@triton.jit(do_not_specialize=["first"])
def long_attention_kernel(
    qkv,
    table,
    out,
    first,
    EXTRA: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SCALE: tl.constexpr,
    OUT_SCALE: tl.constexpr,
):
    """TILE queries of one head of a sequence of any length (Dao et al. 2022, algorithm 1)."""
    HIDDEN: tl.constexpr = HEADS * DIM
    entry = table + (first + tl.program_id(0) // HEADS) * COLUMNS
    length = tl.load(entry + 1) + EXTRA
    begin = tl.program_id(1) * TILE
    if begin < length:
        start = tl.load(entry + 2).to(tl.int64)
        head = tl.program_id(0) % HEADS
        qkv += start * (3 * HIDDEN) + head * DIM
        out += start * HIDDEN + head * DIM
        column = tl.arange(0, DIM)[None, :]
        tile = tl.arange(0, TILE)
        row = begin + tile
        mask = (row < length)[:, None]
        q = tl.load(qkv + row[:, None] * (3 * HIDDEN) + column, mask=mask, other=0.0)
        top = tl.full((TILE,), float("-inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        values = tl.zeros((TILE, DIM), tl.float32)
        for step in range(0, length, TILE):
            key = step + tile
            key_mask = key < length
            place = qkv + key[:, None] * (3 * HIDDEN) + column
            k = tl.load(place + HIDDEN, mask=key_mask[:, None], other=0.0)
            v = tl.load(place + 2 * HIDDEN, mask=key_mask[:, None], other=0.0)
            scores = tl.where(key_mask[None, :], tl.dot(q, k.T) * SCALE, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            scores = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(scores, 1)
            values = tl.dot(scores.to(v.dtype), v, values * shrink[:, None])
            top = higher
        place = out + row[:, None] * HIDDEN + column
        values = values / total[:, None] * OUT_SCALE
        tl.store(place, values.to(out.dtype.element_ty), mask=mask)
