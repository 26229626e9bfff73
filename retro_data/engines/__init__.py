"""Where blocks are made: in this process (`inline`), in children of it, one a device (`local`), or in
actors of a cluster (`ray`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from retro_data.engines.inline import InlineEngine
from retro_data.engines.local import LocalEngine
from retro_data.engines.settings import EngineSettings
from retro_data.stage import Engine

__all__ = ["EngineSettings", "InlineEngine", "LocalEngine", "open_engine"]


@contextlib.contextmanager
def open_engine(settings: EngineSettings) -> Iterator[Engine]:
    """The engine that the settings name; its processes end, or its cluster is left, at the end."""
    if settings.kind == "local":
        with LocalEngine(settings) as local:
            yield local
        return
    from retro_data.engines.ray import RayEngine

    with RayEngine(settings) as engine:
        yield engine
