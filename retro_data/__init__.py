"""Data for retrieval-enhanced language models, from a folder of text to a Lightning batch.

    corpus ─► chunks ─► embeddings ─► database ─► index ─► neighbors ─► dataset ─► datamodule ─► Trainer
     (text)   (N,64)     (N,d) f16    which rows   faiss    (N,K) ids     batch       hooks

Every arrow is a stage with an artifact of its own under one root: built once, in blocks, by any
number of workers, resumed after a kill, and named by a hash of all that can change its bytes.

    datamodule = RetroDataModule(root="data", corpus={"name": "wiki", "path": "wiki/*.jsonl"})
    trainer.fit(RetroLM.from_datamodule(datamodule), datamodule)

`pipeline.py` knows the order of the stages, `data.py` what a program sees of them, `datamodule.py` the
hooks of Lightning, `retro_lm.py` is a reference model that reads the batch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "RetroData": "retro_data.data",
    "RetroDataError": "retro_data.errors",
    "RetroDataModule": "retro_data.datamodule",
    "RetroDataset": "retro_data.dataset",
    "RetroLM": "retro_data.retro_lm",
    "Settings": "retro_data.pipeline",
    "check": "retro_data.pipeline",
    "draw_curve": "retro_data.leakage_curve",
    "format_curve": "retro_data.leakage_curve",
    "open_prepared": "retro_data.pipeline",
    "prepare": "retro_data.pipeline",
    "show_sequence": "retro_data.browse",
    "to_retro_pytorch": "retro_data.dataset",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that serving needs no faiss, and so on."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retro_data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
