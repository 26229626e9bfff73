"""How tests bring a configuration to a stage, all in this process, and open what was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import write_jsonl

from retro_data.artifact import read_manifest
from retro_data.engines import InlineEngine
from retro_data.pipeline import Settings, Step, steps
from retro_data.stage import complete
from retro_data.store import ChunkStore, Embeddings, NeighborLists
from retro_data.tokenizer import LmTokenizer

Array = np.ndarray[Any, Any]


class Made:
    """The artifacts of a configuration up to and with the stage `last` (None: all), by title."""

    def __init__(self, arguments: Mapping[str, Any], last: str | None = None) -> None:
        self.settings = Settings.create(**arguments)
        self.steps: dict[str, Step] = {}
        reached = False
        for step in steps(self.settings):
            if reached and step.stage.name != last:
                break
            reached = step.stage.name == last
            complete(step.stage, step.folder, InlineEngine())
            self.steps[step.title] = step

    def folder(self, title: str) -> Path:
        return self.steps[title].folder

    def manifest(self, title: str) -> dict[str, Any]:
        manifest = read_manifest(self.folder(title))
        assert manifest is not None
        return manifest

    def figures(self, title: str) -> dict[str, Any]:
        figures: dict[str, Any] = self.manifest(title)["figures"]
        return figures

    def tokenizer(self) -> LmTokenizer:
        return LmTokenizer(self.folder("tokenizer"))

    def chunks(self, corpus: str = "small") -> ChunkStore:
        return ChunkStore(self.folder(f"chunks {corpus}"))

    def vectors(self, corpus: str = "small") -> Array:
        """(N, d) float16."""
        return np.concatenate(list(Embeddings(self.folder(f"embeddings {corpus}")).blocks()))

    def neighbors(self, corpus: str = "small") -> NeighborLists:
        return NeighborLists(self.folder(f"neighbors {corpus}"))


def texts(*contents: str, prefix: str = "d") -> list[dict[str, str]]:
    """Documents of these texts, with ids of their own."""
    return [{"id": f"{prefix}{i}", "text": text} for i, text in enumerate(contents)]


def corpus_of(path: Path, documents: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Settings of a corpus `small` that holds these documents, written to `path`."""
    write_jsonl(path, [dict(document) for document in documents])
    return {"name": "small", "path": str(path)}
