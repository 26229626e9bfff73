"""Sequences beside their neighbors, as text that a person can read."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from retro_data.data import RetroData

WIDTH = 100


def show_sequence(data: RetroData, split: str = "train", index: int = 0) -> str:
    """One sequence, chunk by chunk, each with its nearest neighbors (chunk and continuation).

    Args:
        split: "train", "val" or "test".
        index: of the sequence in its split.
    """
    dataset = data.dataset(split)
    if not 0 <= index < len(dataset):
        return f"The split {split} has {len(dataset)} sequences; there is no sequence {index}."
    batch = {name: value[0].numpy() for name, value in dataset.__getitems__([index]).items()}
    tokenizer = data.prepared.tokenizer
    lines = [f"Sequence {index} of {len(dataset)} in {split}"]
    size = data.chunk_size
    for u, length in enumerate(batch["chunk_lengths"].tolist()):
        if not length:
            break
        tokens = batch["input_ids"][u * size : u * size + length]
        chunk, document = batch["chunk_ids"][u], batch["document_ids"][u]
        lines += ["", f"chunk {chunk} of document {document}", _indented(tokenizer.decode(tokens))]
        for n, (ids, mask) in enumerate(
            zip(batch["neighbor_tokens"][u], batch["neighbor_mask"][u], strict=True)
        ):
            lines += [f"  neighbor {n + 1}", _neighbor(tokenizer, ids, mask, size)]
    return "\n".join(lines)


def _neighbor(
    tokenizer: Any, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], size: int
) -> str:
    if not mask.any():
        return _indented("(none)", 4)
    parts = [tokenizer.decode(ids[a:b][mask[a:b]]) for a, b in ((0, size), (size, len(ids)))]
    return _indented(" ▸ ".join(part for part in parts if part), 4)


def _indented(text: str, by: int = 2) -> str:
    prefix = " " * by
    flat = " ".join(text.split())
    return textwrap.fill(flat, WIDTH, initial_indent=prefix, subsequent_indent=prefix)
