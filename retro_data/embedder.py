"""The embedder: token ids to vectors, by any BERT-type encoder.

The stage `embeddings`, queries and generation all come through here, so that a text has one vector
everywhere. Chunk vectors follow Borgeaud et al. 2021, section 2.3: the encoder's outputs averaged over
time, here over the chunk's real tokens without the encoder's specials.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retro_data.artifact import free, key_fields, keyed
from retro_data.errors import RetroDataError
from retro_data.tokenizer import (
    TOKENIZER_FILES,
    LmTokenizer,
    folder_digests,
    load_fast_tokenizer,
    model_folder,
)

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG_FILES = ("config.json",)
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 262_144


@dataclass(frozen=True)
class EmbedderSettings:
    """The encoder and what is made of its outputs.

    Attributes:
        name: a folder, `pkg://package/folder`, or a name on the Hugging Face hub.
        revision: of a hub name.
        pooling: "mean" over real tokens without specials, or "cls".
        normalize: scale vectors to length 1 (sentence-transformers models want it).
        precision: "fp32", "bf16" or "fp16" of the encoder's products. A CPU computes fp16 in fp32.
        max_embed_tokens: encoder tokens of a chunk at most, specials apart; None: what the encoder
            can take. What is cut is counted in the manifest.
        batch_tokens: tokens of one forward pass; 0 chooses by the device.
        block_rows: chunks of one block of work; 0 chooses by the number of chunks.
    """

    name: str = free("bert-base-cased")
    revision: str | None = free(None)
    pooling: str = keyed("mean")
    normalize: bool = keyed(False)
    precision: str = keyed("fp16")
    max_embed_tokens: int | None = keyed(None)
    batch_tokens: int = free(0)
    block_rows: int = free(0)

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "cls"):
            raise RetroDataError(f"embedder.pooling={self.pooling!r}: expected mean or cls.")
        if self.precision not in PRECISIONS:
            raise RetroDataError(
                f"embedder.precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}."
            )


def embedder_folder(settings: EmbedderSettings) -> Path:
    """The local folder of the encoder, fetched from the hub when it is not one already."""
    patterns = [*TOKENIZER_FILES, *CONFIG_FILES]
    folder = model_folder(settings.name, settings.revision, [*patterns, "*.safetensors"])
    if not _weights(folder):
        folder = model_folder(settings.name, settings.revision, [*patterns, "pytorch_model*.bin"])
    if not _weights(folder):
        raise RetroDataError(
            f"{folder} holds no weights (model.safetensors or pytorch_model.bin). "
            "Set embedder.name to the folder or hub name of an encoder."
        )
    return folder


def _weights(folder: Path) -> list[str]:
    safe = sorted(path.name for path in folder.glob("*.safetensors"))
    return safe or sorted(path.name for path in folder.glob("pytorch_model*.bin"))


def embedder_identity(settings: EmbedderSettings, folder: Path) -> dict[str, Any]:
    """What decides a text's vector: weights, config and tokenizer by digest, and the settings."""
    files = [*_weights(folder), *CONFIG_FILES, *TOKENIZER_FILES]
    return {**key_fields(settings), "files": folder_digests(folder, files)}


def embedder_dim(folder: Path) -> int:
    """d, the width of an encoder's vectors, without loading it."""
    config = json.loads((folder / CONFIG_FILES[0]).read_bytes())
    return int(config["hidden_size"])


class Ragged(NamedTuple):
    """Token ids of n texts, one after the other: ids (T,) int64, sizes (n,) int64."""

    ids: Array
    sizes: Array


class Embedder:
    """An encoder on one device.

    Args:
        settings: of the encoder.
        folder: its local folder.
        device: "cpu" or "cuda:0"-like.

    Attributes:
        dim: d, the width of a vector.
        limit: encoder tokens of a text at most, specials apart.
    """

    def __init__(self, settings: EmbedderSettings, folder: Path, device: str = "cpu") -> None:
        self.settings = settings
        self.device = torch.device(device)
        on_cpu_fp16 = self.device.type == "cpu" and settings.precision == "fp16"
        self.dtype = torch.float32 if on_cpu_fp16 else PRECISIONS[settings.precision]
        tokenizer = load_fast_tokenizer(folder, "embedder.name")
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.prefix, self.suffix = _specials(self.backend)
        self.backend.encode_special_tokens = True
        self.pad_id = tokenizer.pad_token_id or 0
        self.model = _load_encoder(folder, self.dtype).to(self.device).eval()
        config = self.model.config
        self.dim: int = config.hidden_size
        specials = len(self.prefix) + len(self.suffix)
        positions = config.max_position_embeddings
        if getattr(self.model.embeddings, "padding_idx", None) is not None:
            positions -= self.pad_id + 1  # RoBERTa and its kin count from behind the pad id
        self.limit = min(positions - specials, settings.max_embed_tokens or positions)
        if self.limit < 1:
            raise RetroDataError(
                f"embedder.max_embed_tokens={settings.max_embed_tokens}: expected at least 1."
            )

    # ---- texts and chunks to encoder tokens ----

    def encode_texts(self, texts: list[str]) -> Ragged:
        rows = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter((i for row in rows for i in row), np.int64, int(sizes.sum()))
        return Ragged(ids, sizes)

    def encode_chunks(self, tokens: Array, lengths: Array, lm: LmTokenizer) -> Ragged:
        """Encoder tokens of chunks of LM tokens.

        Args:
            tokens: (n, chunk_size) ids of the LM tokenizer.
            lengths: (n,) real tokens of each.
        """
        if not self.shares_vocabulary(lm):
            return self.encode_texts(lm.texts(tokens, lengths))
        real = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        if lm.bos_id is not None:
            real &= tokens != lm.bos_id
        return Ragged(tokens[real].astype(np.int64), real.sum(1, dtype=np.int64))

    def shares_vocabulary(self, lm: LmTokenizer) -> bool:
        """Whether LM ids are the encoder's ids, so that chunks need no second tokenizing."""
        if self._shared is None or self._shared[0] != lm.key:
            same = bool(self.backend.get_vocab() == lm.backend.get_vocab())
            self._shared = (lm.key, same)
        return self._shared[1]

    _shared: tuple[str, bool] | None = None

    # ---- encoder tokens to vectors ----

    def embed(self, ragged: Ragged) -> tuple[Array, int]:
        """Vectors of n texts.

        Returns:
            (n, dim) float16, a row of zeros where a text has no tokens, and the number of tokens
            that the encoder's limit cut off.
        """
        kept = np.minimum(ragged.sizes, self.limit)
        cut = int((ragged.sizes - kept).sum())
        vectors = torch.zeros(len(kept), self.dim, dtype=torch.float16, device=self.device)
        starts = np.cumsum(ragged.sizes) - ragged.sizes
        with torch.inference_mode():
            for rows, width in self._batches(kept):
                ids, mask = self._pad(ragged.ids, starts[rows], kept[rows], width)
                vectors[torch.from_numpy(rows).to(self.device)] = self._forward(ids, mask)
        result = vectors.cpu().numpy()
        if not np.isfinite(result).all():
            row = int(np.flatnonzero(~np.isfinite(result).all(1))[0])
            raise RetroDataError(
                f"the embedder gave a vector that is not finite (row {row} of its block). "
                "Set embedder.precision=fp32, or embedder.normalize=true."
            )
        return result, cut

    @cached_property
    def _widths(self) -> Array:
        """Lengths to which texts are padded: a text's own length alone decides, not its batch."""
        steps = [*range(8, 128, 8), *range(128, 256, 16), *range(256, self.limit + 64, 64)]
        widths: Array = np.unique(np.minimum(steps, self.limit))
        return widths

    def _batches(self, sizes: Array) -> Iterator[tuple[Array, int]]:
        """Rows of equal padded length, as many a batch as `batch_tokens` allows."""
        gpu = self.device.type == "cuda"
        budget = self.settings.batch_tokens or (GPU_BATCH_TOKENS if gpu else CPU_BATCH_TOKENS)
        bucket = np.searchsorted(self._widths, sizes)
        for b in np.unique(bucket[sizes > 0]):
            width = int(self._widths[b])
            rows = np.flatnonzero((bucket == b) & (sizes > 0))
            most = max(1, budget // (width + len(self.prefix) + len(self.suffix)))
            for start in range(0, len(rows), most):
                yield rows[start : start + most], width

    def _pad(
        self, ids: Array, starts: Array, sizes: Array, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, prefix + width + suffix) ids, and the mask of the text's own tokens."""
        before, after = len(self.prefix), len(self.suffix)
        padded = np.full((len(sizes), before + width + after), self.pad_id, np.int64)
        padded[:, :before] = self.prefix
        place = np.arange(width)
        real = place < sizes[:, None]
        source = np.minimum(starts[:, None] + place, len(ids) - 1)
        padded[:, before : before + width] = np.where(real, ids[source], self.pad_id)
        for i, token in enumerate(self.suffix):
            padded[np.arange(len(sizes)), before + sizes + i] = token
        mask = np.zeros(padded.shape, bool)
        mask[:, before : before + width] = real
        return torch.from_numpy(padded), torch.from_numpy(mask)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(rows, dim) float16 vectors of padded texts; `mask` is True on their own tokens."""
        ids = ids.to(self.device, non_blocking=True)
        mask = mask.to(self.device, non_blocking=True)
        specials = len(self.prefix) + len(self.suffix)
        width = torch.arange(ids.shape[1], device=self.device)
        seen = width < mask.sum(1, keepdim=True) + specials
        states = self.model(input_ids=ids, attention_mask=seen.long()).last_hidden_state.float()
        if self.settings.pooling == "cls":
            pooled: torch.Tensor = states[:, 0]
        else:
            weight = mask.unsqueeze(-1)
            pooled = (states * weight).sum(1) / weight.sum(1)
        if self.settings.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return pooled.half()


def _load_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The encoder without its unused head, and without a report of what that head lacks."""
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RetroDataError(
            f"transformers loads no encoder from {folder} ({error}). Set embedder.name to the folder "
            "or hub name of a BERT-type encoder."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _specials(backend: Any) -> tuple[list[int], list[int]]:
    """Ids that the encoder's tokenizer puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    raise RetroDataError("the embedder's tokenizer changes a text when it adds its special tokens.")
