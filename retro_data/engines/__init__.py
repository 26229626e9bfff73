"""Where blocks are made: in this process (`inline`), or in children of it, one a device (`local`)."""

from __future__ import annotations

from retro_data.engines.inline import InlineEngine
from retro_data.engines.local import EngineSettings, LocalEngine

__all__ = ["EngineSettings", "InlineEngine", "LocalEngine"]
