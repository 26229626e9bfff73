"""Which encoder embeds, where its files are, and what of it decides a vector; loads no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro_data.artifact import free, key_fields, keyed
from retro_data.errors import RetroDataError
from retro_data.tokenizer import TOKENIZER_FILES, folder_digests, model_folder

PRECISIONS = {  # by torch's names
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "float8_e4m3fn",
}
CONFIG_FILES = ("config.json",)


@dataclass(frozen=True)
class EmbedderSettings:
    """The encoder and what is made of its outputs.

    Attributes:
        name: a folder, `pkg://package/folder`, or a name on the Hugging Face hub.
        revision: of a hub name.
        pooling: "mean" over real tokens without specials, or "cls".
        normalize: scale vectors to length 1 (sentence-transformers models want it).
        precision: "fp32", "bf16", "fp16" or "fp8" of the encoder's products. A CPU computes fp16 in
            fp32. fp8 wants a GPU that multiplies it, is half as fast again, and loses neighbors: for
            candidates that something else ranks again.
        max_embed_tokens: encoder tokens of a chunk at most, specials apart; None: what the encoder
            can take. What is cut is counted in the manifest.
        batch_tokens: tokens of one forward pass; 0 chooses by the device. Less takes less memory.
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
