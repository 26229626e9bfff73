"""Hostile input: each kind of it alone, through the real scan, comes to what is expected of it.

A case is the files of a corpus, the texts that must come out of it (by id), and the reasons that the
skip report must give. No case may crash, hang or hold what it is told not to hold.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

import retro_data
from retro_data import pipeline, store
from retro_data.corpus import Document, open_reader
from retro_data.engines import InlineEngine
from retro_data.errors import RetroDataError
from retro_data.stage import complete
from retro_data.store import ChunkStore

TEXT = "the harbour was quiet in the morning"
LINE = json.dumps({"id": "good", "text": TEXT}).encode() + b"\n"


class Case(NamedTuple):
    """`files` by name: bytes, or a function that makes them at a path."""

    files: dict[str, bytes | Callable[[Path], Any]]
    texts: dict[str, str]  # id -> text
    reasons: tuple[str, ...] = ()  # of the skip report, each by its first words
    is_bad: bool = True  # refused under on_bad_document: raise


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def one(name: str, content: bytes, text: str, *reasons: str) -> Case:
    return Case({name: content}, {name: text}, reasons, is_bad=False)


def skipped(name: str, content: bytes | Callable[[Path], Any], *reasons: str) -> Case:
    """Beside a good file, which must not be lost."""
    return Case({"good.txt": TEXT.encode(), name: content}, {"good.txt": TEXT}, reasons)


def lines(content: bytes, texts: dict[str, str], *reasons: str, is_bad: bool = True) -> Case:
    return Case({"a.jsonl": content}, texts, reasons, is_bad)


def noise(count: int) -> bytes:
    return random.Random(0).randbytes(count)


GOOD = {"good": TEXT}
TWO = {"good": TEXT, "more": "second"}
MORE = line(id="more", text="second")

CASES: dict[str, Case] = {
    # ---- sizes
    "nothing": skipped("empty.txt", b"", "empty")._replace(is_bad=False),
    "white space": skipped("white.txt", " \t\n\u00a0\u2003".encode(), "empty")._replace(
        is_bad=False
    ),
    "one token": one("a.txt", b"a", "a"),
    "many short lines": one("a.txt", b"x\n" * 200_000, "x\n" * 200_000),
    "no space in a megabyte": one("a.txt", b"word" * 250_000, "word" * 250_000),
    "too large": skipped("large.txt", b"a " * 60_000, "too large"),
    # ---- encodings
    "byte order mark": one("a.txt", b"\xef\xbb\xbf" + TEXT.encode(), TEXT),
    "utf-16": skipped("b.txt", TEXT.encode("utf-16"), "undecodable"),
    "latin-1": skipped("b.txt", "café au lait".encode("latin-1"), "undecodable"),
    "a character cut off": skipped("b.txt", "caf\u00e9".encode()[:-1], "undecodable"),
    "NUL": one("a.txt", b"a\0b", "a b", "repaired"),
    "control characters": one(
        "a.txt", b"the\x07 end\x1b[0m of it all now", "the\x07 end\x1b[0m of it all now"
    ),
    "CRLF": one("a.txt", b"a\r\nb", "a\nb"),
    "CR": one("a.txt", b"a\rb", "a\nb"),
    "other line separators": one(
        "a.txt", "a\u2028b\u2029c\x0b\x85".encode(), "a\u2028b\u2029c\x0b\x85"
    ),
    "binary": skipped("b.txt", noise(20_000), "undecodable"),
    "binary that decodes": skipped("b.txt", bytes(range(1, 9)) * 500, "binary"),
    # ---- scripts
    "CJK": one("a.txt", "港は静かだった".encode(), "港は静かだった"),
    "emoji": one("a.txt", "👩‍👩‍👧 🇫🇷 👍🏽".encode(), "👩‍👩‍👧 🇫🇷 👍🏽"),
    "right to left": one("a.txt", "\u202eשלום العالم\u202c".encode(), "\u202eשלום العالم\u202c"),
    "combining marks": one("a.txt", "e\u0301\u0301 é".encode(), "e\u0301\u0301 é"),
    "special tokens": one("a.txt", b"[SEP] </s> <|endoftext|>", "[SEP] </s> <|endoftext|>"),
    "zero width": one("a.txt", "a\u200b\u2060b".encode(), "a\u200b\u2060b"),
    # ---- the file system
    "a FIFO": skipped("pipe.txt", os.mkfifo, "not a regular file")._replace(is_bad=False),
    "a link to nothing": skipped(
        "link.txt", lambda p: p.symlink_to("nowhere"), "cannot be reached"
    )._replace(is_bad=False),
    "links in a circle": skipped(
        "link.txt", lambda p: p.symlink_to("link.txt"), "cannot be reached"
    )._replace(is_bad=False),
    "a link to its own folder": skipped(
        "loop", lambda p: p.symlink_to("."), "link to a folder that is read already"
    )._replace(is_bad=False),
    "a folder named like a text": Case(
        {"dir.txt/inside.txt": TEXT.encode()}, {"dir.txt/inside.txt": TEXT}
    ),
    "a dot file": Case({".a.txt": b"hidden", "a.txt": TEXT.encode()}, {"a.txt": TEXT}),
    "an upper-case extension": one("A.TXT", TEXT.encode(), TEXT),
    "no extension": Case({"noext": b"unread", "a.txt": TEXT.encode()}, {"a.txt": TEXT}),
    "quotes and a new line in a name": one("a\n'\" $(x) ü.txt", TEXT.encode(), TEXT),
    "a name that is not UTF-8": Case(
        {os.fsdecode(b"bad\xff.txt"): TEXT.encode()}, {"bad\\udcff.txt": TEXT}
    ),
    "deep folders": one("d/" * 40 + "a.txt", TEXT.encode(), TEXT),
    # ---- JSON lines
    "a line that is no JSON": lines(LINE + b"{broken\n" + MORE, TWO, "malformed json"),
    "no text": lines(LINE + line(id="x") + MORE, TWO, "no text field"),
    "no id": lines(LINE + line(text="second"), {"good": TEXT, f"a.jsonl:{len(LINE)}": "second"}),
    "text of another type": lines(
        LINE + line(id="x", text=3) + line(id="y", text=["a"]) + MORE,
        TWO,
        "text is not a string",
        "text is not a string",
    ),
    "no object": lines(LINE + b"[1, 2]\n" + MORE, TWO, "not an object"),
    "an id that is a number": lines(line(id=7, text="seven"), {"7": "seven"}),
    "an id that is a list": lines(LINE + line(id=[1], text="a"), GOOD, "id is not a string"),
    "an empty text": lines(LINE + line(id="x", text=" "), GOOD, "empty", is_bad=False),
    "blank lines, no last new line": lines(LINE + b"\n\n" + MORE[:-1], TWO),
    "CRLF between lines": lines(b"\xef\xbb\xbf" + (LINE + MORE).replace(b"\n", b"\r\n"), TWO),
    "U+2028 in a string": lines('{"id": "a", "text": "x\u2028y"}\n'.encode(), {"a": "x\u2028y"}),
    "a lone surrogate": lines(
        b'{"id": "a", "text": "x\\ud800y"}\n', {"a": "x\ufffdy"}, "repaired", is_bad=False
    ),
    "an escaped NUL": lines(
        b'{"id": "a", "text": "x\\u0000y"}\n', {"a": "x y"}, "repaired", is_bad=False
    ),
    "a key given twice": lines(b'{"id": "a", "text": "x", "text": "y"}\n', {"a": "y"}),
    "an array over many lines": Case(
        {"a.jsonl": LINE, "b.jsonl": b'[\n{"id": "x", "text": "x"}\n]\n'}, GOOD, ("not json lines",)
    ),
    "NaN and digits": lines(
        b'{"id": "a", "text": "x", "n": NaN, "big": ' + b"9" * 400 + b"}\n", {"a": "x"}
    ),
    "more digits than Python reads": lines(
        LINE + b'{"id": "a", "text": "x", "big": ' + b"9" * 9000 + b"}\n", GOOD, "malformed json"
    ),
    "deep nesting": lines(LINE + b"[" * 100_000 + b"]" * 100_000 + b"\n", GOOD, "malformed json"),
    "a long record": lines(line(id="a", text="ab " * 30_000), {"a": "ab " * 30_000}),
    "a record too long": lines(LINE + line(id="a", text="a" * 200_000) + MORE, TWO, "too large"),
    # ---- compression
    "gzip": one("a.txt.gz", gzip.compress(TEXT.encode()), TEXT),
    "gzip lines": Case({"a.jsonl.gz": gzip.compress(LINE + MORE)}, TWO),
    "two gzip members": Case({"a.jsonl.gz": gzip.compress(LINE) + gzip.compress(MORE)}, TWO),
    "gzip cut off": Case(
        {"a.jsonl": LINE, "b.jsonl.gz": gzip.compress(noise(9000).hex().encode())[:-2000]},
        GOOD,
        ("truncated gzip",),
    ),
    "no gzip": Case({"a.jsonl.gz": LINE}, GOOD),
    "gzip by another name": one("a.txt", gzip.compress(TEXT.encode()), TEXT),
    "a bomb": skipped("bomb.txt.gz", gzip.compress(b" " * 50_000_000), "too large"),
    "zstandard": Case({"a.jsonl.zst": zstandard.compress(LINE + MORE)}, TWO),
    "zstandard cut off": Case(
        {"a.jsonl": LINE, "b.jsonl.zst": zstandard.compress(noise(9000))[:-2000]},
        GOOD,
        ("truncated zstd",),
    ),
    "a zstandard bomb": skipped("bomb.txt.zst", zstandard.compress(b" " * 50_000_000), "too large"),
}


def corpus_of(case: Case, folder: Path) -> dict[str, Any]:
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
    is_text = any(".txt" in name.lower() for name in case.files)
    return {
        "name": "nasty",
        "path": str(folder),
        "format": "text" if is_text else "jsonl",
        "max_document_bytes": 100_000 if "too" in "".join(case.reasons) else 2_000_000,
    }


def scanned(small: Any, corpus: dict[str, Any]) -> pipeline.Step:
    settings = pipeline.Settings.create(**small(corpus=corpus))
    step = next(pipeline.steps(settings))
    complete(step.stage, step.folder, InlineEngine())
    return step


@pytest.mark.parametrize("name", CASES)
def test_each_input_comes_to_what_is_expected(name: str, small: Any, tmp_path: Path) -> None:
    case = CASES[name]
    corpus = corpus_of(case, tmp_path / "corpus")
    step = scanned(small, corpus)
    reader = open_reader(step.stage.settings)  # type: ignore[attr-defined]
    records = [r for file in reader.files() for r in reader.records(file.name)]
    assert {r.id: r.text for r in records if isinstance(r, Document)} == case.texts
    report = (step.folder / store.SKIPPED).read_text("utf-8").splitlines()
    reasons = sorted(json.loads(entry)["reason"] for entry in report)
    assert len(reasons) == len(case.reasons), reasons
    for found, expected in zip(reasons, sorted(case.reasons), strict=True):
        assert found.startswith(expected)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.reasons])
def test_each_bad_input_can_be_refused(name: str, small: Any, tmp_path: Path) -> None:
    case = CASES[name]
    corpus = {**corpus_of(case, tmp_path / "corpus"), "on_bad_document": "raise"}
    if not case.is_bad:
        scanned(small, corpus)
        return
    with pytest.raises(RetroDataError, match=case.reasons[0]):
        scanned(small, corpus)


def test_all_text_becomes_chunks_that_hold_something(small: Any, tmp_path: Path) -> None:
    """The texts of all cases as one corpus, through the tokenizer to the chunk store."""
    texts = {
        f"{name}/{key}": text for name, case in CASES.items() for key, text in case.texts.items()
    }
    corpus = tmp_path / "all.jsonl"
    corpus.write_bytes(b"".join(line(id=key, text=text) for key, text in texts.items()))
    settings = pipeline.Settings.create(**small(corpus={"name": "all", "path": str(corpus)}))
    for step in pipeline.steps(settings):
        complete(step.stage, step.folder, InlineEngine())
        if step.stage.name == "chunks":
            chunks = ChunkStore(step.folder)
            break
    assert len(chunks.documents) == len(texts)
    assert chunks.lengths.min() >= 1
    tokens = chunks.documents.tokens
    assert (chunks.documents.first_chunk[1:] - chunks.documents.first_chunk[:-1]).tolist() == [
        -(-int(count) // 16) for count in tokens
    ]


BOUNDED = """
import json, resource, sys
from pathlib import Path
from retro_data import pipeline
from retro_data.engines import InlineEngine
from retro_data.stage import complete
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = pipeline.Settings.create(**json.loads(sys.argv[1]))
step = next(pipeline.steps(settings))
complete(step.stage, step.folder, InlineEngine())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_line_of_100_megabytes_takes_no_memory(small: Any, tmp_path: Path) -> None:
    """Nor do a text of that size, and bombs of 200 MB; kB are measured in a process of its own."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    with (folder / "line.jsonl").open("wb") as handle:
        handle.write(LINE + b'{"id": "long", "text": "')
        for _ in range(100):
            handle.write(b"a" * 1_000_000)
        handle.write(b'"}\n' + MORE)
    (folder / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 200_000_000, 1))
    (folder / "bomb.jsonl.zst").write_bytes(zstandard.compress(b" " * 200_000_000))
    limit = {"max_document_bytes": 1_000_000, "format": "jsonl"}
    arguments = small(corpus={"name": "nasty", "path": str(folder), **limit})
    arguments["root"] = str(arguments["root"])
    command = [sys.executable, "-c", BOUNDED, json.dumps(arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000
    (report,) = Path(arguments["root"]).glob("corpus/*/skipped.jsonl")
    reasons = [json.loads(entry)["reason"] for entry in report.read_text("utf-8").splitlines()]
    assert len(reasons) == 3
    assert all(reason.startswith("too large") for reason in reasons)


LISTED = """
import json, sys
from retro_data.corpus import CorpusSettings, open_reader
reader = open_reader(CorpusSettings(name="n", path=sys.argv[1], format="text"))
ids = [r.id for f in reader.files() for r in reader.records(f.name)]
print(json.dumps(ids))
"""


def test_the_names_of_files_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    for name in ("ü.txt".encode(), b"bad\xff.txt", "港.txt".encode()):
        (tmp_path / os.fsdecode(name)).write_text(TEXT)
    found = []
    for locale in (
        {"LC_ALL": "C.UTF-8"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **locale}
        command = [sys.executable, "-c", LISTED, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert found[0] == ["bad\\udcff.txt", "ü.txt", "港.txt"]


def test_nothing_unpickles() -> None:
    """No pickle is loaded, weights only as such, and no code of a model is run unasked."""
    for path in Path(retro_data.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            place = f"{path.name}:{node.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), place
            assert given.get("allow_pickle", "False") == "False", place
            assert name != "torch.load" or given.get("weights_only") == "True", place
            assert given.get("trust_remote_code", "False") == "False", place
