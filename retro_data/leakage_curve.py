"""Bits per byte over the evaluation chunks that leak at most so much: table and plot.

A model that copies what it retrieved does well on chunks whose text was retrieved; whether neighbors
help beyond that is seen on those of low r (Borgeaud et al. 2021, section 2.6 and figure 4). Loss,
bytes and r belong to the chunk of the *label*: the last position of chunk u scores chunk u + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from retro_data.dataset import NO_LABEL
from retro_data.leakage import ALPHAS, leakage_bins

if TYPE_CHECKING:
    from retro_data.pipeline import PreparedCorpus

Array = np.ndarray[Any, Any]
Row = dict[str, float]

MEASURES = ("r", "r_seen")
COLORS = ("#1f6fb4", "#d1495b")  # of neighbors on and off


@dataclass(frozen=True)
class EvaluationLeakage:
    """In which bin each evaluation chunk lies: the first of ALPHAS that it does not exceed.

    Attributes:
        chunk_ids: (E,) int64, ascending, as in a batch.
        bins: (2, E) int64, by each of MEASURES.
    """

    chunk_ids: Tensor
    bins: Tensor

    @classmethod
    def of(cls, corpora: Sequence[PreparedCorpus], num_neighbors: int) -> EvaluationLeakage | None:
        """Of all corpora that were measured; None where none was.

        Args:
            num_neighbors: that a model reads: r_seen is of these, r of all that it was measured with.
        """
        first = np.cumsum([0, *(len(corpus.chunks) for corpus in corpora)])
        ids, bins = [], []
        for corpus, start in zip(corpora, first, strict=False):
            if (table := corpus.leakage) is not None:
                ids.append(start + table.rows)
                longest = (table.own, table.seen[:, :num_neighbors])
                bins.append([leakage_bins(x.max(1, initial=0), table.real_tokens) for x in longest])
        if not ids:
            return None
        return cls(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.hstack(bins)))

    def to(self, device: torch.device) -> EvaluationLeakage:
        return EvaluationLeakage(self.chunk_ids.to(device), self.bins.to(device))

    def of_chunks(self, chunk_ids: Tensor) -> Tensor:
        """Bins (2, …) of chunks (…); of one that was not measured the last, as if it leaked whole."""
        if not len(self.chunk_ids):
            return torch.full((2, *chunk_ids.shape), len(ALPHAS) - 1, device=chunk_ids.device)
        place = torch.searchsorted(self.chunk_ids, chunk_ids).clamp(max=len(self.chunk_ids) - 1)
        known = self.chunk_ids[place] == chunk_ids
        return torch.where(known, self.bins[:, place], len(ALPHAS) - 1)


def chunks_of_labels(
    chunk_ids: Tensor, chunk_lengths: Tensor, labels: Tensor, eos_id: int | None
) -> Tensor:
    """The chunk that each label is of, (B, n) int64; meaningless where there is no label.

    The label of a chunk's last token is the first token of the next chunk of the same document,
    which is the next row of its store, in this sequence or not; the end of a document is of its
    last chunk.

    Args:
        chunk_ids, chunk_lengths: (B, l) int64.
        labels: (B, n) int64, n a multiple of l.
    """
    size = labels.shape[1] // chunk_ids.shape[1]
    offset = torch.arange(size, device=labels.device)
    is_last = (offset == chunk_lengths[..., None] - 1).flatten(1)
    goes_on = is_last & (labels != NO_LABEL)
    if eos_id is not None:
        goes_on &= labels != eos_id
    return chunk_ids.repeat_interleave(size, dim=1) + goes_on


def sums_of_bins(terms: Tensor, bins: Tensor) -> Tensor:
    """Terms (…, B, n) added up by the bin (B, n) of each position: (len(ALPHAS), …)."""
    flat = terms.flatten(-2).flatten(0, -2)
    sums = flat.new_zeros(len(ALPHAS), len(flat))
    sums.index_add_(0, bins.flatten(), flat.T)
    return sums.view(len(ALPHAS), *terms.shape[:-2])


# ---- table and plot ------------------------------------------------------------------------------


def curve(
    figures: Mapping[str, Sequence[Mapping[str, float]]], labels: Sequence[float]
) -> list[Row]:
    """One row for each of ALPHAS.

    Args:
        figures: suffix of a way of evaluating ("": neighbors on, "_off") -> figures of the chunks
            that leak at most each of ALPHAS.
        labels: scored labels of text in these chunks.
    """
    rows = []
    for i, alpha in enumerate(ALPHAS):
        row = {"alpha": alpha, "labels": labels[i], "share": labels[i] / max(1, labels[-1])}
        for suffix, of_alphas in figures.items():
            bits = {f"{n}{suffix}": v for n, v in of_alphas[i].items() if n.startswith("bits_per_")}
            row |= bits
        rows.append(row)
    return rows


def format_curve(rows: Sequence[Row], measure: str) -> str:
    """The rows of `curve` as a table of text."""
    names = [name for name in rows[-1] if name.startswith("bits_per_")]
    lines = [f"{measure} at most   labels  share  " + "  ".join(names)]
    for row in rows:
        head = f"{row['alpha']:>{len(measure) + 8}.1%} {row['labels']:8,.0f} {row['share']:6.1%}  "
        values = (f"{row[n]:.4f}" if n in row else "-" for n in names)
        line = "  ".join(f"{v:>{len(n)}}" for v, n in zip(values, names, strict=True))
        lines.append(head + line)
    return "\n".join(lines)


def draw_curve(
    rows: Sequence[Row],
    measure: str,
    labels: Mapping[str, str] | None = None,
    width: int = 480,
    height: int = 300,
) -> str:
    """The rows of `curve` as an SVG: solid for all labels, dashed for served ones.

    Args:
        labels: what is written at a line, by the name of its figure, where that is not the name.
    """
    names = [name for name in rows[-1] if name.startswith("bits_per_")]
    values = [row[name] for row in rows for name in names if name in row]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) or 1.0
    left, top, right, bottom = 56, 16, width - 12, height - 40

    def x(alpha: float) -> float:
        return left + (right - left) * alpha

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / room

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="#444"/>',
        f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">{measure} at most</text>',
    ]
    for alpha in ALPHAS:
        parts.append(
            f'<text x="{x(alpha):.1f}" y="{bottom + 14}" text-anchor="middle">{alpha:.3g}</text>'
        )
    for value in np.linspace(low, high, 5):
        parts.append(
            f'<text x="{left - 4}" y="{y(value):.1f}" text-anchor="end">{value:.3f}</text>'
        )
    for i, name in enumerate(names):
        points = " ".join(
            f"{x(row['alpha']):.1f},{y(row[name]):.1f}" for row in rows if name in row
        )
        dash = ' stroke-dasharray="5 3"' if "_served" in name else ""
        color = COLORS[name.endswith("_off")]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"{dash}/>')
        label = (labels or {}).get(name, name)
        at = f'x="{right}" y="{top + 12 * (i + 1)}" text-anchor="end"'  # curves fall to the right
        parts.append(f'<text {at} fill="{color}">{label}</text>')
    return "\n".join([*parts, "</svg>"])
