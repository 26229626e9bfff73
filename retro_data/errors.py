"""The one exception users meet."""

from __future__ import annotations


class RetroDataError(Exception):
    """A refusal that states what was found, what was expected, and what mends it."""
