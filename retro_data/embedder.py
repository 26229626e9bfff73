"""The embedder: token ids to vectors, by any BERT-type encoder.

The stage `embeddings`, queries and generation all come through here, so that a text has one vector
everywhere. Chunk vectors follow Borgeaud et al. 2021, section 2.3: the encoder's outputs averaged over
time, here over the chunk's real tokens without the encoder's specials.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from retro_data.embedder_settings import PRECISIONS, EmbedderSettings
from retro_data.errors import RetroDataError
from retro_data.tokenizer import LmTokenizer, load_fast_tokenizer

if TYPE_CHECKING:
    from retro_data.bert_triton import FusedBert

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 4096, 262_144
ENCODE_TEXTS = 8192  # tokenized at once: their ids are Python's integers for a while
FUSED_CAPABILITY = (8, 0)  # of a GPU: bfloat16 products
FLOAT8_CAPABILITY = (8, 9)
NO_FLOAT8 = (
    "embedder.precision=fp8 wants a GPU of compute capability 8.9 or more, cuBLASLt, Triton and an "
    "encoder of the BERT family; found: {}. Set embedder.precision=fp16."
)


class Ragged(NamedTuple):
    """Token ids of n texts, one after the other: ids (T,) int32, sizes (n,) int64."""

    ids: Array
    sizes: Array


class Embedder:
    """An encoder on one device; threads may share it.

    On a GPU, encoders of the BERT family run in half precision by a forward pass of our own
    (`bert_triton`), all others and fp32 by that of transformers.

    Args:
        settings: of the encoder.
        folder: its local folder.
        device: "cpu" or "cuda:0"-like.

    Attributes:
        dim: d, the width of a vector.
        limit: encoder tokens of a text at most, specials apart.
        forward: what computes: "transformers", or "triton" and whose products it uses.
    """

    def __init__(self, settings: EmbedderSettings, folder: Path, device: str = "cpu") -> None:
        self.settings = settings
        self.device = torch.device(device)
        on_cpu_fp16 = self.device.type == "cpu" and settings.precision == "fp16"
        self.dtype = (
            torch.float32 if on_cpu_fp16 else getattr(torch, PRECISIONS[settings.precision])
        )
        if self.device.type == "cpu" and settings.precision == "fp8":
            raise RetroDataError(NO_FLOAT8.format("a CPU"))
        tokenizer = load_fast_tokenizer(folder, "embedder.name")
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.prefix, self.suffix = _specials(self.backend)
        self.backend.encode_special_tokens = True
        self.pad_id = tokenizer.pad_token_id or 0
        halved = self.device.type == "cuda" and self.dtype != torch.float32
        model = _load_encoder(folder, torch.float32 if halved else self.dtype)
        config = model.config
        self.dim: int = config.hidden_size
        specials = len(self.prefix) + len(self.suffix)
        positions = config.max_position_embeddings
        if getattr(model.embeddings, "padding_idx", None) is not None:
            positions -= self.pad_id + 1  # RoBERTa and its kin count from behind the pad id
        self.limit = min(positions - specials, settings.max_embed_tokens or positions)
        if self.limit < 1:
            raise RetroDataError(
                f"embedder.max_embed_tokens={settings.max_embed_tokens}: expected at least 1."
            )
        self.words: int = model.get_input_embeddings().weight.shape[0]
        self._turn = threading.Lock()  # of those who put work on the device
        self._fused = self._open_fused(model) if halved else None
        self.forward = (
            f"triton, products by {self._fused.products}" if self._fused else "transformers"
        )
        self.model = None if self._fused else model.to(self.device, self.dtype).eval()

    def _open_fused(self, model: Any) -> FusedBert | None:
        """Our own forward pass, where encoder and device allow it."""
        with torch.cuda.device(self.device):
            found = self._own_forward(model)
        if not isinstance(found, str):
            return found
        if self.dtype == torch.float8_e4m3fn:
            raise RetroDataError(NO_FLOAT8.format(found))
        log.info("forward pass by transformers: %s", found)
        return None

    def _own_forward(self, model: Any) -> FusedBert | str:
        """Our own forward pass, or what is in its way."""
        capability = torch.cuda.get_device_capability(self.device)
        float8 = self.dtype == torch.float8_e4m3fn
        if capability < (FLOAT8_CAPABILITY if float8 else FUSED_CAPABILITY):
            name = torch.cuda.get_device_name(self.device)
            return f"{name} is of compute capability {capability[0]}.{capability[1]}"
        try:
            from retro_data import bert_triton
        except ImportError as error:
            return str(error)
        if obstacle := bert_triton.obstacle(model):
            return obstacle
        try:
            return bert_triton.FusedBert(
                model,
                self.dtype,
                self.device,
                prefix=self.prefix,
                suffix=self.suffix,
                pooling=self.settings.pooling,
                normalize=self.settings.normalize,
                longest=self.limit + len(self.prefix) + len(self.suffix),
                rows=self.settings.batch_tokens or bert_triton.FULL_ROWS,
            )
        except bert_triton.CublasLtError as error:
            return str(error)

    # ---- texts and chunks to encoder tokens ----

    def encode_texts(self, texts: list[str]) -> Ragged:
        ids, sizes = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for start in range(0, len(texts), ENCODE_TEXTS):
            part = texts[start : start + ENCODE_TEXTS]
            rows = [e.ids for e in self.backend.encode_batch_fast(part, add_special_tokens=False)]
            sizes.append(np.fromiter(map(len, rows), np.int64, len(rows)))
            ids.append(np.fromiter(chain.from_iterable(rows), np.int32, int(sizes[-1].sum())))
        return Ragged(np.concatenate(ids), np.concatenate(sizes))

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
        return Ragged(tokens[real].astype(np.int32), real.sum(1, dtype=np.int64))

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
        largest = int(ragged.ids.max(initial=0))
        if largest >= self.words:  # a kernel would read beyond its table
            raise RetroDataError(
                f"the embedder's tokenizer gave token {largest}, its model knows "
                f"{self.words}: they are not of one encoder. Set embedder.name to the folder of one."
            )
        kept = np.minimum(ragged.sizes, self.limit)
        cut = int((ragged.sizes - kept).sum())
        run = self._run_padded if self._fused is None else self._run_packed
        on_gpu = self.device.type == "cuda"
        with (
            torch.inference_mode(),
            torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext(),
        ):
            with self._turn:
                vectors = run(ragged, kept)
                done = torch.cuda.current_stream().record_event() if on_gpu else None
            result = (_fetch(vectors, done) if done else vectors).numpy()
        # The largest exponent means infinity or no number; seven times as fast as np.isfinite.
        if result.size and (result.view(np.int16) & 0x7FFF).max() >= 0x7C00:
            row = int(np.flatnonzero(~np.isfinite(result).all(1))[0])
            raise RetroDataError(
                f"the embedder gave a vector that is not finite (row {row} of its block). "
                "Set embedder.precision=fp32, or embedder.normalize=true."
            )
        return result, cut

    # ---- our own forward pass: packed sequences ----

    def _run_packed(self, ragged: Ragged, kept: Array) -> torch.Tensor:
        """(n, dim) float16 on the device; nothing waits for it."""
        from retro_data.bert_triton import pack

        assert self._fused is not None
        extra = len(self.prefix) + len(self.suffix)
        order, rows, batches = pack(kept, extra, self._fused.row_sizes)
        starts = np.cumsum(ragged.sizes) - ragged.sizes
        table = np.stack([starts[order], kept[order], rows, order], 1).astype(np.int32)
        vectors = torch.zeros(len(kept), self.dim, dtype=torch.float16, device=self.device)
        if not batches:
            return vectors
        ids, places = (self._to_device(torch.from_numpy(a)) for a in (ragged.ids, table))
        for batch in batches:
            self._fused.forward(ids, places, batch, vectors)
        return vectors

    # ---- the forward pass of transformers: padded rows ----

    def _run_padded(self, ragged: Ragged, kept: Array) -> torch.Tensor:
        """(n, dim) float16 on the device."""
        vectors = torch.zeros(len(kept), self.dim, dtype=torch.float16, device=self.device)
        starts = np.cumsum(ragged.sizes) - ragged.sizes
        for rows, width in self._batches(kept):
            ids, mask = self._pad(ragged.ids, starts[rows], kept[rows], width)
            vectors[self._to_device(torch.from_numpy(rows))] = self._forward(ids, mask)
        return vectors

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

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
        assert self.model is not None
        ids, mask = self._to_device(ids), self._to_device(mask)
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


def _fetch(vectors: torch.Tensor, done: torch.cuda.Event) -> torch.Tensor:
    """Device vectors in pinned memory, copied beside whatever the device computes next."""
    if not len(vectors):
        return vectors.cpu()
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_event(done)
        host.copy_(vectors, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # a thread that waits for it takes no core
        copied.record()
    copied.synchronize()
    return host


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
